"""The defaults of settings are promises: results stand in papers by them. A new one needs a line in the changelog."""

import inspect
from types import ModuleType
from typing import Any

import pytest

from lightning_plasticity import callbacks, functional, metrics

DEFAULTS: dict[str, dict[str, Any]] = {
    "ActivationReset": {
        "strategy": "auto",
        "decay_rate": 0.99,
        "maturity_threshold": 100,
        "max_weight": 10.0,
        "optimizer_state": "survivors",
    },
    "ContinualBackprop": {
        "replacement_rate": 0.0001,
        "maturity_threshold": 100,
        "decay_rate": 0.99,
        "utility": "contribution",
        "init": "empirical",
        "compensate_bias": True,
        "optimizer_state": "survivors",
    },
    "DirectionAwareShrink": {
        "averaging": 0.3,
        "least": 0.3,
        "on_fit_start": False,
        "include": "*",
        "optimizer_state": "keep",
    },
    "HareAndTortoise": {"decay": 0.999, "evaluate": "slow", "optimizer_state": "keep"},
    "IsometryReinit": {
        "iterations": 10,
        "exact": False,
        "on_fit_start": False,
        "include": "*",
        "optimizer_state": "reset",
    },
    "L2Init": {
        "coefficient": 0.001,
        "match": "position",
        "decoupled": True,
        "norms": True,
        "every_n_train_steps": 1,
        "optimizer_state": "keep",
    },
    "LayerReset": {"layers": 1, "on_fit_start": False, "init": "empirical", "optimizer_state": "reset"},
    "OptimizerReset": {"what": "all", "on_fit_start": False, "optimizer_state": "reset"},
    "ParsevalRegularization": {
        "coefficient": 0.001,
        "target": 2.0,
        "reference_width": 64,
        "last_layer": False,
        "include": "*",
        "optimizer_state": "keep",
    },
    "PartialReset": {
        "strength": 0.015,
        "every_n_train_steps": 1000,
        "decay_rate": 0.99,
        "sharpness": 16.0,
        "optimizer_state": "keep",
    },
    "PlasticityMonitor": {"every_n_epochs": 1, "figures": True},
    "ReDo": {
        "threshold": 0.025,
        "every_n_train_steps": 1000,
        "score_steps": 1,
        "score": "activation",
        "init": "empirical",
        "optimizer_state": "survivors",
    },
    "SelectiveReinit": {
        "utility": "magnitude",
        "decay_rate": 0.0,
        "forget": "renewed",
        "parameters": "weights",
        "include": "*",
        "optimizer_state": "survivors",
    },
    "SelfNormalizedReset": {
        "significance": 0.08,
        "every_n_train_steps": 1000,
        "min_silence": 7,
        "max_silence": 1250,
        "init": "empirical",
        "optimizer_state": "survivors",
    },
    "ShrinkAndPerturb": {"shrink": 0.6, "perturb": 0.4, "on_fit_start": False, "init": "empirical"},
    "SoftWeightRescaling": {"coefficient": 0.001, "tie_residual": False, "biases": "follow", "optimizer_state": "keep"},
    "SpectralRegularization": {
        "coefficient": 0.001,
        "power": 2,
        "biases": True,
        "norms": True,
        "include": "*",
        "optimizer_state": "keep",
    },
    "WeightClipping": {"kappa": 1.0, "biases": True, "include": "*", "optimizer_state": "keep"},
    "Churn": {"outputs": "classes"},
    "DeadUnits": {"eps": 0.0},
    "DistanceFromInit": {"relative": False},
    "DormantUnits": {"tau": 0.025},
    "DuplicateUnits": {"threshold": 0.95},
    "FeatureRank": {"delta": 0.01},
    "GradientCovariance": {"summary": "mean", "chunk_size": 16},
    "GradientDormancy": {"tau": 0.01},
    "HessianSpectrum": {"summary": "energy", "energy": 0.99, "steps": 50},
    "IsometryDeviation": {"any_scale": False},
    "LocalRedundancy": {"outputs": "classes", "noise": 1.0, "chunk_size": 16},
    "NTKRank": {"summary": "energy", "energy": 0.99, "chunk_size": 16},
    "OptimizationReadiness": {"batch_size": 4, "batches": 128},
    "RarelyActiveUnits": {"rate": 0.01},
    "SaturatedUnits": {"low": -1.0, "high": 1.0, "margin": 0.05},
    "Sharpness": {"max_iterations": 100, "tolerance": 0.001},
    "TaskAccuracy": {"summary": "mean"},
    "TrainabilityProbe": {"measure": "steps", "budget": 200, "target_loss": 0.1, "learning_rate": 0.001, "seed": 0},
}


SHARES = ("DeadUnits", "DormantUnits", "DuplicateUnits", "GradientDormancy", "LinearizedUnits", "OnlineAccuracy")
SHARES += ("RarelyActiveUnits", "SaturatedUnits", "SignEntropy", "ZeroGradientFraction")
HIGHER_IS_BETTER = ("EffectiveRank", "FeatureRank", "NTKRank", "OnlineAccuracy", "OptimizationReadiness", "SignEntropy")
HIGHER_IS_BETTER += ("StableRank", "TaskAccuracy")
NEITHER = ("DistanceFromInit", "GradientCovariance", "GradientNorm", "HessianSpectrum", "LocalRedundancy", "Sharpness")
NEITHER += ("UpdateRatio",)
BOUNDS = {"GradientCovariance": (-1.0, 1.0), "Sharpness": (None, None), "TaskAccuracy": (None, None)}


def plain_defaults(thing: Any) -> dict[str, Any]:
    """The defaults that are numbers, words, or yes and no."""
    parameters = inspect.signature(thing).parameters.values()
    return {one.name: one.default for one in parameters if isinstance(one.default, (bool, int, float, str))}


@pytest.mark.parametrize("room", [callbacks, metrics], ids=["callbacks", "metrics"])
def test_defaults_are_the_promised_ones(room: ModuleType) -> None:
    for name in room.__all__:
        assert plain_defaults(getattr(room, name)) == DEFAULTS.get(name, {}), name


def test_a_function_has_the_defaults_of_its_metric() -> None:
    of_metrics: dict[str, set[Any]] = {}
    for name in metrics.__all__:
        for argument, value in plain_defaults(getattr(metrics, name)).items():
            of_metrics.setdefault(argument, set()).add(value)
    for name in functional.__all__:
        for argument, value in plain_defaults(getattr(functional, name)).items():
            assert value in of_metrics[argument], (name, argument)


def test_a_method_that_has_not_begun_has_done_nothing() -> None:
    rescaling, memory = callbacks.ActivationReset(), callbacks.OptimizerReset(every_n_train_steps=1)
    assert (rescaling.scaled_low, rescaling.scaled_high, memory.resets, memory.optimizer_steps) == (0, 0, 0, 0)
    for kind in (callbacks.ContinualBackprop, callbacks.ReDo, callbacks.SelfNormalizedReset):
        assert kind().replaced == 0


@pytest.mark.parametrize("name", metrics.__all__)
def test_what_metrics_say_of_themselves(name: str) -> None:
    metric = getattr(metrics, name)
    assert metric.higher_is_better is (None if name in NEITHER else name in HIGHER_IS_BETTER)
    assert metric.is_differentiable is False
    assert metric.full_state_update is (name == "TaskAccuracy")
    bounds = BOUNDS.get(name, (0.0, 1.0 if name in SHARES else None))
    assert (metric.plot_lower_bound, metric.plot_upper_bound) == bounds
