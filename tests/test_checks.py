"""Wrong settings: every constructor and function refuses them with an error that names the argument."""

import inspect
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lightning_plasticity
from lightning_plasticity import callbacks, checks, functional, metrics
from lightning_plasticity.engine.schedule import Schedule
from lightning_plasticity.functional.activation_reset import ActivationStrategy

NAN, INFINITY = float("nan"), float("inf")
NO_NUMBERS = [None, "1", b"1", [1], (1,), {1: 1}, True, False, 1j, object(), torch.tensor(1.0), np.ones(2), print]
NO_COUNTS = [*NO_NUMBERS, NAN, INFINITY, 1.5, 2.0, -1, Fraction(1, 2), -(10**400)]
WRONG: dict[str, list[Any]] = {
    "count from 0": NO_COUNTS,
    "count from 1": [*NO_COUNTS, 0],
    "from 0": [*NO_NUMBERS, NAN, INFINITY, -INFINITY, -1e-9, 10**400],
    "above 0": [*NO_NUMBERS, NAN, INFINITY, 0, 0.0, -1.0],
    "from 0 to 1": [*NO_NUMBERS, NAN, INFINITY, -0.1, 1.1],
    "from 0 below 1": [*NO_NUMBERS, NAN, INFINITY, -0.1, 1.0],
    "between 0 and 1": [*NO_NUMBERS, NAN, INFINITY, 0.0, 1.0],
    "from -1 to 1": [*NO_NUMBERS, NAN, INFINITY, -1.1, 1.1],
    "share above 0": [*NO_NUMBERS, NAN, INFINITY, 0.0, -0.1, 1.1],
    "finite": [*NO_NUMBERS, NAN, INFINITY, -INFINITY],
    "flag": [None, "yes", 1, 0, 1.0, [], torch.tensor(True), np.ones(2)],
    "choice": ["no such word", 1.5, 0, b"relu", [], object(), torch.ones(2), np.ones(2), NAN],
    "init": ["no such word", 1.5, None, [], torch.ones(2), NAN],
    "zero_biases": ["no such word", 1.5, 1, 0, torch.tensor(True), np.ones(2)],
    "reduce": ["no such word", 1.5, 0, False, [], torch.ones(2)],
    "words": [None, 1, 1.5, "", [""], [1], ["a", None], {"a": 1}, b"a", torch.ones(2), object()],
    "name": ["", 1, 1.5, ["a"], b"a", True, torch.ones(2)],
    "seed": ["1", 1.5, True, NAN, 2**64, -(2**63) - 1, torch.tensor(1), [1]],
    "function": ["abs", 1, [print], torch.ones(2)],
    "unit_dim": ["1", 1.5, True, 0, [1], NAN, torch.tensor(1)],
    "layers": ["", 0, -1, 1.5, True, None, [""], [1], [], NAN, b"a"],
    "metrics": ["DeadUnits", 1, [1], [None], {"a": 1}, [], {}, [metrics.DeadUnits(), metrics.DeadUnits()]],
    "strategy": ["elu", 1, None, {"a": "elu"}, {1: "relu"}, {"": "relu"}, torch.ones(2), ["relu"]],
    "fused": ["*qkv*", 1, ["*qkv*"], {"": 3}, {1: 3}, {"*qkv*": 0}, {"*qkv*": 1.5}, {"*qkv*": None}],
    "batches": [1, print, iter([1]), object()],
    "units": ["0", 1, [], [None], ["0"], {"0": 1}, {}, torch.ones(2)],
    "network": ["net", None, 1, print, torch.ones(2), torch.nn.Linear],
    "tensor": ["x", None, 1, [1.0], np.ones(2)],
    "case": [None, 10, "10", "M", "101M", "-1M", "1e1M", b"10M", ""],
}
# What is just allowed.
RIGHT: dict[str, list[Any]] = {
    "count from 0": [0],
    "count from 1": [1],
    "from 0": [0],
    "above 0": [1e-9],
    "from 0 to 1": [0, 1],
    "from 0 below 1": [0, 1 - 1e-9],
    "between 0 and 1": [1e-9, 1 - 1e-9],
    "from -1 to 1": [-1, 1],
    "share above 0": [1e-9, 1],
}
# What may also be None is marked with a question mark.
COMMON = {"module": "name?", "optimizer_state": "choice", "seed": "seed?"}
UNITS = {**COMMON, "exclude": "words", "units": "units?"}
STEPS = {"every_n_train_steps": "count from 1?", "every_n_epochs": "count from 1?"}
FEATURES = {"features": "", "unit_dim": "unit_dim?", "reduce": "reduce", "kwargs": ""}
LANCZOS = {"loss_fn": "function", "max_iterations": "count from 1", "tolerance": "above 0"}
PROBE = {
    "fresh": "function?",
    "measure": "choice",
    "budget": "count from 1",
    "target_loss": "above 0",
    "learning_rate": "above 0",
    "seed": "seed",
}
LAYERS = {**COMMON, "include": "words", "exclude": "words"}
BOUNDARY = {**STEPS, "on_fit_start": "flag"}
SPECTRUM = {"summary": "choice", "energy": "share above 0"}
NTK = {"summary": "choice", "energy": "share above 0", "chunk_size": "count from 1?"}
REDUNDANCY = {"outputs": "choice", "noise": "above 0", "chunk_size": "count from 1?"}
CALLBACKS: dict[str, dict[str, str]] = {
    "ActivationReset": {
        **UNITS,
        "strategy": "strategy",
        "decay_rate": "from 0 below 1",
        "maturity_threshold": "count from 0",
        "max_weight": "above 0?",
    },
    "ContinualBackprop": {
        **UNITS,
        "replacement_rate": "from 0 to 1",
        "maturity_threshold": "count from 0",
        "decay_rate": "from 0 below 1",
        "utility": "choice",
        "init": "init",
        "compensate_bias": "flag",
    },
    "DirectionAwareShrink": {
        **LAYERS,
        **BOUNDARY,
        "averaging": "share above 0",
        "least": "from 0 to 1",
        "data": "batches?",
        "loss": "function?",
    },
    "HareAndTortoise": {**COMMON, **STEPS, "decay": "from 0 below 1", "evaluate": "choice"},
    "IsometryReinit": {
        **LAYERS,
        **BOUNDARY,
        "iterations": "count from 1",
        "exact": "flag",
        "fused": "fused?",
    },
    "L2Init": {
        **COMMON,
        "coefficient": "from 0",
        "match": "choice",
        "decoupled": "flag",
        "norms": "flag",
        "every_n_train_steps": "count from 1",
        "exclude": "words",
    },
    "LayerReset": {**COMMON, **STEPS, "layers": "layers", "on_fit_start": "flag", "init": "init"},
    "OptimizerReset": {**COMMON, **BOUNDARY, "what": "choice", "exclude": "words"},
    "ParsevalRegularization": {
        **LAYERS,
        "coefficient": "from 0",
        "target": "above 0",
        "reference_width": "count from 1?",
        "last_layer": "flag",
    },
    "PartialReset": {
        **UNITS,
        "strength": "from 0 to 1",
        "every_n_train_steps": "count from 1",
        "decay_rate": "from 0 below 1",
        "sharpness": "from 0",
        "init": "init",
    },
    "PlasticityMonitor": {
        **STEPS,
        "metrics": "metrics?",
        "module": "name?",
        "layers": "words?",
        "probe_batch": "",
        "figures": "flag",
    },
    "ReDo": {
        **UNITS,
        "threshold": "from 0",
        "every_n_train_steps": "count from 1",
        "score_steps": "count from 1",
        "score": "choice",
        "init": "init",
    },
    "SelfNormalizedReset": {
        **UNITS,
        "significance": "between 0 and 1",
        "every_n_train_steps": "count from 1",
        "min_silence": "count from 1",
        "max_silence": "count from 1",
        "init": "init",
    },
    "SelectiveReinit": {
        **COMMON,
        **STEPS,
        "fraction": "from 0 to 1?",
        "reinit": "choice?",
        "case": "case?",
        "parameters": "choice",
        "std": "from 0?",
        "utility": "choice",
        "decay_rate": "from 0 below 1",
        "threshold": "from 0?",
        "relative_threshold": "from 0?",
        "zero_biases": "zero_biases?",
        "forget": "choice",
        "include": "words",
        "exclude": "words",
    },
    "ShrinkAndPerturb": {
        **COMMON,
        **STEPS,
        "shrink": "from 0",
        "perturb": "from 0",
        "on_fit_start": "flag",
        "init": "init",
        "exclude": "words",
    },
    "SoftWeightRescaling": {
        **COMMON,
        "coefficient": "from 0 to 1",
        "classifier_coefficient": "from 0 to 1?",
        "classifier": "words?",
        "tie_residual": "flag",
        "biases": "choice",
        "rebase_on_lr_drop": "between 0 and 1?",
        "exclude": "words",
    },
    "SpectralRegularization": {
        **LAYERS,
        "coefficient": "from 0",
        "power": "count from 1",
        "biases": "flag",
        "norms": "flag",
    },
    "WeightClipping": {**LAYERS, "kappa": "above 0", "biases": "flag"},
}
METRICS: dict[str, dict[str, str]] = {
    "DeadUnits": {**FEATURES, "eps": "from 0"},
    "RarelyActiveUnits": {**FEATURES, "rate": "from 0 to 1"},
    "DormantUnits": {**FEATURES, "tau": "from 0"},
    "SaturatedUnits": {**FEATURES, "low": "finite", "high": "finite", "margin": "finite"},
    "SignEntropy": FEATURES,
    "LinearizedUnits": FEATURES,
    "GradientDormancy": {"tau": "from 0", "kwargs": ""},
    "IsometryDeviation": {"any_scale": "flag", "kwargs": ""},
    "OptimizationReadiness": {
        "loss_fn": "function",
        "batch_size": "count from 1",
        "batches": "count from 1",
        "kwargs": "",
    },
    "Churn": {"outputs": "choice", "kwargs": ""},
    "NTKRank": {**NTK, "kwargs": ""},
    "LocalRedundancy": {**REDUNDANCY, "kwargs": ""},
    "DuplicateUnits": {**FEATURES, "threshold": "from -1 to 1"},
    "EffectiveRank": FEATURES,
    "StableRank": FEATURES,
    "FeatureRank": {**FEATURES, "delta": "from 0 below 1"},
    "GradientCovariance": {
        "loss_fn": "function",
        "summary": "choice",
        "chunk_size": "count from 1?",
        "kwargs": "",
    },
    "Sharpness": {**LANCZOS, "kwargs": ""},
    "HessianSpectrum": {**SPECTRUM, "loss_fn": "function", "steps": "count from 1", "kwargs": ""},
    "TrainabilityProbe": {**PROBE, "kwargs": ""},
    "DistanceFromInit": {"relative": "flag", "kwargs": ""},
    "TaskAccuracy": {"summary": "choice", "kwargs": ""},
    **{
        name: {"kwargs": ""}
        for name in (
            *("Balancedness", "GradientNorm", "OnlineAccuracy", "UpdateRatio", "WeightMagnitude", "WeightNorm"),
            "ZeroGradientFraction",
        )
    },
}
RATES = {"low_rate": "from 0 to 1", "high_rate": "from 0 to 1", "low_scale": "finite", "high_scale": "finite"}
OF_FUNCTIONS = {"DeadUnits": "dead_units", "RarelyActiveUnits": "rarely_active_units", "DormantUnits": "dormant_units"}
OF_FUNCTIONS |= {"SaturatedUnits": "saturated_units", "SignEntropy": "sign_entropy", "FeatureRank": "feature_rank"}
OF_FUNCTIONS |= {"LinearizedUnits": "linearized_units"}
OF_FUNCTIONS |= {"DuplicateUnits": "duplicate_units", "EffectiveRank": "effective_rank", "StableRank": "stable_rank"}


def on_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **settings: function(torch.rand(4, 3), **settings)


def on_a_network(function: Callable[..., Any], *more: Any) -> Callable[..., Any]:
    loss = () if function is functional.trainability else (torch.nn.functional.mse_loss,)
    return lambda **settings: function(
        **{
            "model": torch.nn.Linear(3, 2),
            **({"loss_fn": loss[0], "targets": torch.zeros(4, 2)} if loss else {}),
            "inputs": torch.zeros(4, 3),
            **settings,
        }
    )


def on_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **settings: function(
        **{"model": torch.nn.Linear(3, 2), "inputs": torch.zeros(4, 3), **settings},
    )


# What a setting is nothing without.
BELONGING: dict[str, dict[str, dict[str, Any]]] = {
    "SelfNormalizedReset": {"max_silence": {"min_silence": 1}},
    "SelectiveReinit": {"std": {"reinit": "normal"}, "decay_rate": {"utility": "gradient", "every_n_train_steps": 5}},
}


def scheduled(name: str) -> Callable[..., Any]:
    """The constructor of a callback with what the setting at hand needs, and a schedule where it is none itself."""
    make = getattr(callbacks, name)

    def made(**settings: Any) -> Any:
        for setting, companions in BELONGING.get(name, {}).items():
            settings = {**companions, **settings} if setting in settings else settings
        needs = ("on_fit_start" in CALLBACKS[name] or name == "HareAndTortoise") and not {*STEPS} & {*settings}
        return make(**settings, **({"every_n_train_steps": 5} if needs else {}))

    return made


ON_NETWORKS = ("sharpness", "hessian_spectrum", "optimization_readiness", "per_sample_gradients", "gradient_covariance")
MEASURED = [
    *((name, on_a_network, ("model", "loss_fn", "inputs", "targets")) for name in ON_NETWORKS),
    ("trainability", on_a_network, ("model", "inputs")),
    *((name, on_inputs, ("model", "inputs")) for name in ("ntk_rank", "local_redundancy")),
]
KINDS = {"model": "network", "loss_fn": "function", "inputs": "tensor", "targets": "tensor"}
TABLE: list[tuple[str, Callable[..., Any], str, str]] = [
    *((name, scheduled(name), argument, kind) for name, row in CALLBACKS.items() for argument, kind in row.items()),
    *((name, getattr(metrics, name), key, kind) for name, row in METRICS.items() for key, kind in row.items()),
    *(
        (function, on_rows(getattr(functional, function)), argument, kind)
        for metric, function in OF_FUNCTIONS.items()
        for argument, kind in METRICS[metric].items()
    ),
    *(("sharpness", on_a_network(functional.sharpness), argument, kind) for argument, kind in LANCZOS.items()),
    ("hessian_spectrum", on_a_network(functional.hessian_spectrum), "steps", "count from 1"),
    *(
        ("summarize_spectrum", lambda **one: functional.summarize_spectrum(torch.ones(2), **one), argument, kind)
        for argument, kind in SPECTRUM.items()
    ),
    *(
        ("optimization_readiness", on_a_network(functional.optimization_readiness), argument, kind)
        for argument, kind in METRICS["OptimizationReadiness"].items()
    ),
    *(("ntk_rank", on_inputs(functional.ntk_rank), argument, kind) for argument, kind in NTK.items()),
    *(("local_redundancy", on_inputs(functional.local_redundancy), key, kind) for key, kind in REDUNDANCY.items()),
    ("churn", lambda **one: functional.churn(torch.zeros(2, 2), torch.zeros(2, 2), **one), "outputs", "choice"),
    ("gradient_dormancy", lambda **one: functional.gradient_dormancy([torch.ones(2, 2)], **one), "tau", "from 0"),
    (
        "isometry_deviation",
        lambda **one: functional.isometry_deviation({"w": torch.ones(2, 2)}, **one),
        "any_scale",
        "flag",
    ),
    *(("trainability", on_a_network(functional.trainability), argument, kind) for argument, kind in PROBE.items()),
    *(
        ("per_sample_gradients", on_a_network(functional.per_sample_gradients), argument, kind)
        for argument, kind in {"loss_fn": "function", "chunk_size": "count from 1?"}.items()
    ),
    *(
        (name, on(getattr(functional, name)), argument, KINDS[argument])
        for name, on, arguments in MEASURED
        for argument in arguments
    ),
    *(("Schedule", Schedule, argument, kind) for argument, kind in {**STEPS, "on_fit_start": "flag"}.items()),
    *(
        ("ActivationStrategy", lambda **one: ActivationStrategy(**{**dict.fromkeys(RATES, 0.5), **one}), name, kind)
        for name, kind in RATES.items()
    ),
    ("from_case", lightning_plasticity.SelectiveReinit.from_case, "case", "case"),
]


def cases(values: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(make, argument, value, id=re.sub(r" at 0x\w+", "", f"{name}({argument}={checks.shown(value)})"))
        for name, make, argument, kind in TABLE
        for value in values.get(kind.removesuffix("?"), ())
        if not (value is None and kind.endswith("?"))
    ]


def test_the_table_has_every_argument_of_every_constructor() -> None:
    rooms = ((callbacks, CALLBACKS), (metrics, METRICS))
    for room, table in rooms:
        assert set(room.__all__) == set(table)
        for name, row in table.items():
            arguments = set(inspect.signature(getattr(room, name)).parameters)
            assert arguments == set(row) - {"features"}, name
    assert {kind.removesuffix("?") for *_, kind in TABLE} - {""} <= set(WRONG)
    assert len(cases(WRONG)) > 900


@pytest.mark.parametrize(("make", "argument", "value"), cases(WRONG))
def test_a_wrong_setting_is_refused_by_name(make: Callable[..., Any], argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument}\b") as refused:
        make(**{argument: value})
    raised_in = refused.traceback[-1].path
    assert "lightning_plasticity" in str(raised_in), f"raised outside the package, in {raised_in}"


@pytest.mark.filterwarnings("ignore:The largest eigenvalue must converge in 1 iterations:UserWarning")
@pytest.mark.parametrize(("make", "argument", "value"), cases(RIGHT))
def test_what_is_just_allowed_is_taken(make: Callable[..., Any], argument: str, value: Any) -> None:
    make(**{argument: value})


def test_numbers_of_numpy_become_plain_ones() -> None:
    method = callbacks.ContinualBackprop(np.float32(0.5), np.int64(3), np.float64(0.5), seed=np.int32(1))
    settings = [method.replacement_rate, method.maturity_threshold, method.decay_rate, method.seed]
    assert settings == [0.5, 3, 0.5, 1]
    assert [type(one) for one in settings] == [float, int, float, int]
    strategy = ActivationStrategy(np.float32(0.5), Fraction(1, 4), 1, np.int64(2))
    assert {type(getattr(strategy, name)) for name in RATES} == {float}
    assert type(Schedule(np.int64(3)).every_n_train_steps) is int


def test_a_network_and_tensors_are_required() -> None:
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got 'net'. Give the network"):
        checks.module("model", "net")
    with pytest.raises(ValueError, match=r"inputs must be a tensor, got \[1\] \(a list\). Convert it"):
        checks.tensor("inputs", [1])


def test_what_an_error_shows_is_short() -> None:
    assert len(checks.shown("x" * 1000)) == 60
    assert len(checks.shown(torch.zeros(1000))) == 60 + len(" (a Tensor)")
    assert len(checks.shown(list(range(1000)))) < 100
    assert [checks.shown(value) for value in (None, True, 1, 1.5)] == ["None", "True", "1", "1.5"]


def test_of_many_names_four_are_shown() -> None:
    assert checks.few([]) == ""
    assert checks.few(list("abcd")) == "'a', 'b', 'c', 'd'"
    assert checks.few(list("abcde")) == "'a', 'b', 'c', 'd' and 1 more"


def test_instances_are_all_of_one_kind() -> None:
    assert checks.instances("numbers", iter([1, 2]), kind=int) == (1, 2)
    for value in ([1, "a"], ["a", 1], [], "12", b"12", {1: 2}, torch.ones(2), 1):
        with pytest.raises(ValueError, match="numbers must be one int or more in a list, got"):
            checks.instances("numbers", value, kind=int)
