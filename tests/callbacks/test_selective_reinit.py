"""Selective reinitialisation: its numbers against a slow reference, what it works on, and that once means once."""

import csv
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.training import (
    BATCHES,
    EPOCHS,
    Batches,
    LightningNetwork,
    Network,
    adam,
    assert_same,
    difference,
    fit,
    seeded,
    trainer,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from callbacks.streams import INPUT, mlp, train
from lightning_plasticity import L2Init, SelectiveReinit
from lightning_plasticity.functional.selective_reinit import Case


class Mixed(nn.Module):
    """A layer of each kind, and what must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Embedding(10, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.final = nn.LayerNorm(4)
        self.up = nn.ConvTranspose1d(4, 3, 2)
        self.tied = nn.Linear(4, 10, bias=False)
        self.tied.weight = self.position.weight
        self.head = nn.Linear(4, 7)
        self.shared = self.head
        self.recurrent = nn.LSTM(4, 4)


WEIGHTS = [
    "patches.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
    "cross.out_proj.weight",
    "up.weight",
    "head.weight",
]
OWN_BIASES = [
    "patches.bias",
    "attention.in_proj_bias",
    "attention.out_proj.bias",
    "cross.in_proj_bias",
    "cross.out_proj.bias",
    "up.bias",
    "head.bias",
]
SHIFTS = ["norm.bias", "final.bias"]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]


def mixed() -> Mixed:
    model = seeded(Mixed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 1.0)  # biases too, so that one sees which are set to 0
    return model


# ---- the numbers


def least(values: Tensor, count: int) -> list[int]:
    numbers = values.flatten().tolist()
    return sorted(sorted(range(len(numbers)), key=lambda i: (abs(numbers[i]), i))[:count])


def new_numbers(weight: Tensor, chosen: list[int], code: Case, draw: torch.Generator) -> list[float]:
    numbers = weight.flatten().tolist()
    mean = math.fsum(numbers) / len(numbers)
    if code.reinit == "mean":
        return [mean] * len(chosen)
    noise = torch.randn(len(chosen), generator=draw, dtype=weight.dtype).tolist()
    if code.reinit == "normal":
        return [code.std * x for x in noise]
    rest = [abs(x) for i, x in enumerate(numbers) if i not in set(chosen)]
    return [mean + x * math.fsum(rest) / max(len(rest), 1) / 10 for x in noise]


def check_written(weight: Tensor, before: Tensor, chosen: list[int], new: list[float]) -> None:
    expected = before.flatten().clone()
    expected[chosen] = torch.tensor(new)
    kept = torch.ones(len(expected), dtype=torch.bool)
    kept[chosen] = False
    assert torch.equal(weight.detach().flatten()[kept], expected[kept])
    torch.testing.assert_close(weight.detach().flatten(), expected)


@pytest.mark.parametrize("case", ["5M", "10M", "25M", "5MN", "10MN", "25MN", "10NS", "25N", "0M", "100MN"])
def test_case(case: str) -> None:
    model = mixed()
    before = snapshot(model)
    method = SelectiveReinit.from_case(case, seed=3).attach(model)
    draw = torch.Generator().manual_seed(method.draws.state_dict()["seed"])
    code = Case.parse(case)
    for name in WEIGHTS:
        weight = model.get_parameter(name)
        count = round(100 * code.fraction) * weight.numel() // 100
        chosen = least(before[name], count)
        check_written(weight, before[name], chosen, new_numbers(before[name], chosen, code, draw))
        assert (weight != before[name]).sum() == count
    assert set(changed(model, before)) <= {*WEIGHTS, *OWN_BIASES}
    assert all(not model.get_parameter(name).any() for name in OWN_BIASES)


def test_ties_go_to_those_that_come_first() -> None:
    layer = nn.Linear(5, 2)
    nn.init.constant_(layer.weight, 0.5)
    layer.weight.data[1] = -0.5
    SelectiveReinit(0.3, "normal").attach(layer)
    assert (layer.weight.abs() != 0.5).flatten().tolist() == [True] * 3 + [False] * 7


CHOICES: dict[str, dict[str, float]] = {
    "fraction": {"fraction": 0.3},
    "threshold": {"threshold": 0.05},
    "relative": {"relative_threshold": 0.4},
}
UTILITIES: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "gradient": {"utility": "gradient"},
    "average": {"utility": "gradient", "decay_rate": 0.7},
    "forgetful average": {"utility": "gradient", "decay_rate": 0.7, "forget": "all"},
}
REINITS: dict[str, dict[str, Any]] = {
    "mean": {"reinit": "mean"},
    "mean_noise": {"reinit": "mean_noise"},
    "normal": {"reinit": "normal", "std": 0.3},
    "init": {"reinit": "init"},
    "init_mean": {"reinit": "init_mean"},
}


class Reference:
    """The form on a schedule, entry by entry, in Python's floats."""

    def __init__(self, model: nn.Module, settings: dict[str, Any], seed: int) -> None:
        self.model, self.settings = model, settings
        self.draw = torch.Generator().manual_seed(seed)
        self.initial = snapshot(model)
        self.averages: dict[str, list[float]] = {}
        self.updates = 0

    def after_step(self, is_due: bool) -> dict[str, Tensor]:
        """What the parameters must be after the method has acted."""
        expected = snapshot(self.model)
        self.updates = self.updates + 1 if self.averages else 1
        for name in ("net.first.weight", "net.second.weight", "net.head.weight"):
            weight = self.model.get_parameter(name)
            numbers, slopes = weight.flatten().tolist(), weight.grad.flatten().tolist()
            utility = [abs(x) for x in numbers]
            if self.settings.get("utility") == "gradient":
                decay = self.settings.get("decay_rate", 0.0)
                product = [abs(x * slope) for x, slope in zip(numbers, slopes, strict=True)]
                old = self.averages.get(name, [0.0] * len(product))
                average = [decay * u + (1 - decay) * y for u, y in zip(old, product, strict=True)]
                self.averages[name] = average
                utility = [u / (1 - decay**self.updates) for u in average]
            if is_due:
                chosen = self.choose(utility)
                expected[name].view(-1)[chosen] = weight.new_tensor(self.new_values(name, numbers, chosen))
                if self.settings.get("forget") == "all":
                    del self.averages[name]
                elif name in self.averages:
                    mean = math.fsum(self.averages[name]) / len(utility)
                    for i in chosen:
                        self.averages[name][i] = mean
        return expected

    def choose(self, utility: list[float]) -> list[int]:
        if "fraction" in self.settings:
            share = self.settings["fraction"] * len(utility)
            one_more = torch.rand((), generator=self.draw).item() < share - math.floor(share)
            ranked = sorted(range(len(utility)), key=lambda i: (utility[i], i))
            return sorted(ranked[: math.floor(share) + one_more])
        bound = self.settings.get("threshold")
        if bound is None:
            bound = self.settings["relative_threshold"] * math.fsum(utility) / len(utility)
            return [i for i, u in enumerate(utility) if u <= bound]
        return [i for i, u in enumerate(utility) if u < bound]

    def new_values(self, name: str, numbers: list[float], chosen: list[int]) -> list[float]:
        reinit, initial = self.settings["reinit"], self.initial[name]
        if reinit == "init_mean":
            return [0.0] * len(chosen)
        if reinit == "init":
            drawn = torch.randn(initial.shape, generator=self.draw, dtype=torch.float64)
            return (drawn * initial.std(correction=0) + initial.mean()).flatten()[chosen].tolist()
        code = Case(0, reinit, self.settings.get("std"))
        return new_numbers(torch.tensor(numbers, dtype=torch.float64), chosen, code, self.draw)


@pytest.mark.parametrize("reinit", REINITS)
@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("choice", CHOICES)
def test_every_code_on_a_schedule(choice: str, utility: str, reinit: str) -> None:
    settings = {**CHOICES[choice], **UTILITIES[utility], **REINITS[reinit]}
    if choice == "threshold" and utility != "magnitude":
        settings["threshold"] = 1e-3
    model = seeded(Network).double()
    optimizer = adam(model.parameters())
    method = SelectiveReinit(**settings, every_n_train_steps=2, seed=5).attach(model, optimizer)
    reference = Reference(model, settings, method.draws.state_dict()["seed"])
    acted = 0
    for i, (x, y) in enumerate([*Batches(), *Batches()]):
        optimizer.zero_grad()
        cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        trained = snapshot(model)
        expected = reference.after_step(is_due=i % 2 == 1)
        method.step()
        torch.testing.assert_close(snapshot(model), expected, rtol=1e-9, atol=1e-12)
        acted += difference(snapshot(model), trained) is not None
    assert acted == BATCHES


class Clipped(LightningNetwork):
    """Notes the gradients with which the optimizer steps, and the weights that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        weight = self.net.first.weight
        self.seen.append((weight.detach() * weight.grad).abs())


class SeesUtility(SelectiveReinit):
    def __init__(self, **settings: Any) -> None:
        super().__init__(utility="gradient", include="net.first", **settings)
        self.seen: list[Tensor] = []

    def _choose(self, values: Tensor, weight: Tensor) -> Tensor:
        self.seen.append(values.clone())
        return super()._choose(values, weight)


@pytest.mark.parametrize("settings", [{"every_n_train_steps": 1}, {"every_n_epochs": 1}])
def test_gradients_are_clipped_ones(settings: dict[str, int]) -> None:
    """Lightning clips after `on_before_optimizer_step`. Fraction 0, so that the weights stay those of the step."""
    model, method = seeded(Clipped), SeesUtility(fraction=0.0, **settings)
    fit(method, module=model, gradient_clip_val=0.01)
    norms = [float(utility.norm()) for utility in method.seen]
    at = range(EPOCHS * BATCHES) if "every_n_train_steps" in settings else range(BATCHES - 1, 2 * BATCHES, BATCHES)
    torch.testing.assert_close(method.seen, [model.seen[i] for i in at])
    assert max(norms) < 0.01 * model.net.first.weight.abs().max()


def test_each_optimizer_has_its_own_gradients() -> None:
    """What another optimizer's step left in a gradient is no new value of the average."""
    model = seeded(Network)
    first = torch.optim.SGD(model.net.first.parameters(), lr=0.1)
    second = torch.optim.SGD(model.net.second.parameters(), lr=0.1)
    method = SelectiveReinit(utility="gradient", decay_rate=0.5, every_n_train_steps=100)
    method.attach(model, [first, second])
    (x, y), *_ = Batches()
    cross_entropy(model(x), y).backward()
    first.step()
    method.step()
    first.step()
    method.step()
    second.step()
    method.step()
    assert method.state_dict()["method"]["averages"]["updates"] == {"net.first.weight": 2, "net.second.weight": 1}


def test_a_weight_without_gradient_is_not_judged() -> None:
    model = seeded(Network)
    optimizer = adam(model.parameters())
    method = SelectiveReinit(0.5, utility="gradient", every_n_train_steps=1).attach(model, optimizer)
    model.net.second.weight.requires_grad_(False)
    before = snapshot(model)
    model.net.first(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    method.step()
    assert set(changed(model, before)) == {"net.first.weight", "net.first.bias"}


def test_gradients_that_are_gone() -> None:
    model = seeded(Network)
    optimizer = adam(model.parameters())
    method = SelectiveReinit(utility="gradient", every_n_train_steps=1).attach(model, optimizer)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"have a gradient, but found none. In a plain loop, call step\(\) before"):
        method.step()


def test_a_weight_that_is_not_finite_is_left_alone_and_it_says_so() -> None:
    model = seeded(Network)
    with torch.no_grad():
        model.net.first.weight[0, 0] = math.inf
    before = snapshot(model)
    with pytest.warns(UserWarning, match="leaves 'net.first.weight' alone where its weights or their gradients"):
        SelectiveReinit(0.5, zero_biases=False).attach(model)
    assert set(changed(model, before)) == {"net.second.weight", "net.head.weight"}


# ---- where


def test_what_it_works_on() -> None:
    model = mixed()
    before = snapshot(model)
    SelectiveReinit(0.5, "normal", zero_biases=False).attach(model)
    assert sorted(changed(model, before)) == sorted(WEIGHTS)


def test_biases() -> None:
    for zero_biases, expected in ((True, OWN_BIASES), ("all", OWN_BIASES + SHIFTS)):
        model = mixed()
        before = snapshot(model)
        SelectiveReinit(0.0, zero_biases=zero_biases).attach(model)
        assert sorted(changed(model, before)) == sorted(expected)
        assert all(not model.get_parameter(name).any() for name in expected)


def test_biases_stay_unless_a_case_is_published_otherwise() -> None:
    for settings, expected in (
        ({}, []),
        ({"case": "0M"}, OWN_BIASES),
        ({"case": "0M", "zero_biases": False}, []),
        ({"case": "0M", "every_n_train_steps": 1}, []),
    ):
        model = mixed()
        before = snapshot(model)
        settings = settings if "case" in settings else {"fraction": 0.0, **settings}
        SelectiveReinit(**settings).attach(model)
        assert sorted(changed(model, before)) == sorted(expected)


def test_a_layer_that_is_silent_gets_new_values_by_a_multiple_of_its_mean() -> None:
    """As published: the utility of each weight is at most any multiple of 0."""
    layer = nn.Linear(16, 8)
    method = SelectiveReinit(
        relative_threshold=0.05, utility="gradient", reinit="normal", every_n_train_steps=1
    ).attach(layer)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    method.step()
    assert (layer.weight != before).sum() == 128


@pytest.mark.parametrize("zero_biases", [True, "all"])
def test_a_model_without_trained_biases(zero_biases: Any) -> None:
    """As large language models are made, and as adapters leave them."""
    without = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    frozen = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name == "0.weight")
    for model, expected in ((without, ["0.weight", "2.weight"]), (frozen, ["0.weight"])):
        before = snapshot(model)
        SelectiveReinit(0.5, zero_biases=zero_biases).attach(model, adam(model.parameters()))
        assert sorted(changed(model, before)) == expected


def test_a_schedule_leaves_biases_alone() -> None:
    model = mixed()
    method = SelectiveReinit(0.5, "normal", every_n_train_steps=1).attach(model)
    before = snapshot(model)
    method.step()
    assert sorted(changed(model, before)) == sorted(WEIGHTS)


def test_patterns_and_module() -> None:
    for settings, expected in (
        ({"include": "cross*"}, [*WEIGHTS[3:7], "cross.in_proj_bias", "cross.out_proj.bias"]),
        ({"exclude": ["*att*", "cross", "up", "patches"]}, ["cross.out_proj.weight", "cross.out_proj.bias", *HEAD]),
        ({"include": ("head", "up"), "exclude": "up"}, HEAD),
        ({"module": "head"}, HEAD),
        ({"module": "head", "include": "head", "zero_biases": False}, HEAD[:1]),
        ({"include": "[fh]*", "zero_biases": "all"}, [*HEAD, "final.bias"]),
    ):
        model = mixed()
        before = snapshot(model)
        SelectiveReinit(0.5, **{"zero_biases": True, **settings}).attach(model)
        assert sorted(changed(model, before)) == sorted(expected)


HEAD = ["head.weight", "head.bias"]


def test_frozen_parameters_stay_frozen() -> None:
    """Those that require no gradient, and those that no optimizer has."""
    model = mixed()
    model.attention.requires_grad_(False)
    model.up.bias.requires_grad_(False)
    optimizer = adam([*model.attention.parameters(), *model.up.parameters(), *model.patches.parameters()])
    before = snapshot(model)
    SelectiveReinit(0.5, zero_biases="all").attach(model, optimizer)
    assert sorted(changed(model, before)) == ["patches.bias", "patches.weight", "up.weight"]


def test_a_layer_that_is_unfrozen_later() -> None:
    model = seeded(Network)
    model.net.first.requires_grad_(False)
    method = SelectiveReinit(0.5, every_n_train_steps=1).attach(model)
    before = snapshot(model)
    method.step()
    assert "net.first.weight" not in changed(model, before)
    model.net.first.requires_grad_(True)
    method.step()
    assert "net.first.weight" in changed(model, before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)), r"but include=\('\*',\) leaves none in Sequential\."),
        (
            nn.Linear(2, 2).requires_grad_(False),
            r"but the only one that .* leaves in Linear is frozen or belongs to no",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False), r"but each of the 2 that .* is frozen"),
    ],
)
def test_nothing_to_work_on(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveReinit().attach(model)


def test_a_pattern_that_matches_nothing() -> None:
    for settings in ({"include": ["head", "hed"]}, {"exclude": "hed"}):
        with pytest.raises(
            ValueError, match=r"got 'hed'. The names are: patches, attention, attention.out_proj, cross"
        ):
            SelectiveReinit(**settings).attach(mixed())


def test_a_weight_that_is_computed() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"0\.weight must be a parameter, but it is computed from other tensors"):
        SelectiveReinit().attach(model)
    before = snapshot(model)
    SelectiveReinit(0.5, exclude="0").attach(model)
    assert changed(model, before) == ["1.weight"]


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.1}, "fraction must be a finite number, at least 0 and at most 1, got 1.1"),
        ({"reinit": "zero"}, "reinit must be one of .* got 'zero'"),
        ({"std": 0.2}, "belongs to reinit='normal', got 0.2 with 'mean'"),
        ({"reinit": "normal", "std": -1.0}, "std must be a finite number, at least 0,"),
        (
            {"case": "10M", "std": 0.5},
            "stands for fraction, reinit and std, .* got fraction=None, reinit=None, std=0.5",
        ),
        ({"case": "10M", "fraction": 0.1}, "Leave out either the case or the three"),
        ({"case": "10X"}, "A case is a percentage from 0 to 100 and one of the codes"),
        ({"utility": "fisher"}, "utility must be one of .* got 'fisher'"),
        ({"utility": "gradient"}, "needs gradients, and there are none when fitting starts"),
        (
            {"utility": "gradient", "decay_rate": 1.0, "every_n_epochs": 1},
            "decay_rate must be a finite .* below 1, got 1.0",
        ),
        ({"decay_rate": 0.5, "every_n_epochs": 1}, "belongs to utility='gradient', got 0.5 with 'magnitude'"),
        ({"threshold": 0.1, "relative_threshold": 0.1}, "Only one of threshold and relative_threshold"),
        ({"threshold": -0.1}, "threshold must be a finite number, at least 0, got -0.1"),
        ({"relative_threshold": -0.1}, "relative_threshold must be a finite number, at least 0, got -0.1"),
        ({"zero_biases": "norms"}, "zero_biases must be one of True, False, 'all', got 'norms'"),
        (
            {"utility": "gradient", "forget": "all", "every_n_epochs": 1},
            "forget='all' belongs to a running average, got it with decay_rate=0.0",
        ),
        ({"zero_biases": "all", "every_n_epochs": 1}, "got it with a schedule, where biases stay as they are"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveReinit(**settings)


# ---- once


class Watches(Callback):
    """How often a fit began with other weights than it was given."""

    def __init__(self) -> None:
        self.acted = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = weights(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.first_step:
            self.acted += difference(weights(pl_module), self.before) is not None

    first_step = 0


class Saves(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class RestoresLate(SingleDeviceStrategy):
    """Loads the checkpoint after `on_fit_start`, as DeepSpeed and FSDP do."""

    restore_checkpoint_after_setup = True


class CountsActs(SelectiveReinit):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.acts = 0

    def _act(self) -> None:
        super()._act()
        self.acts += 1


def test_it_acts_before_the_first_batch() -> None:
    watches = Watches()
    fit(CountsActs(), watches)
    assert watches.acted == 1
    fit(watches)
    assert watches.acted == 1


@pytest.mark.parametrize("strategy", [lambda: "auto", lambda: RestoresLate("cpu")], ids=["early", "late"])
@pytest.mark.parametrize("step", [1, BATCHES + 2])
def test_not_again_on_resume(strategy: Any, step: int, tmp_path: Path) -> None:
    method, resumed, path = CountsActs(seed=1), CountsActs(seed=1), tmp_path / "saved.ckpt"
    model = fit(method, Saves(path, step))
    other = fit(resumed, ckpt_path=path, strategy=strategy())
    assert (method.acts, resumed.acts) == (1, 0)
    assert_same(weights(other), weights(model))
    assert_same(resumed.state_dict(), method.state_dict())


@pytest.mark.parametrize("strategy", [lambda: "auto", lambda: RestoresLate("cpu")], ids=["early", "late"])
def test_from_a_checkpoint_of_a_run_without_it(strategy: Any, tmp_path: Path) -> None:
    """It acts on what was loaded, also on the optimizer state that was loaded too."""
    path = tmp_path / "saved.ckpt"
    model = fit(Saves(path, BATCHES))
    loaded = torch.load(path, weights_only=True)["state_dict"]

    class Looks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            [optimizer] = trainer.optimizers
            for name in ("first", "second", "head"):
                layer = pl_module.net.get_submodule(name)
                is_new = layer.weight != loaded[f"net.{name}.weight"]
                assert is_new.sum() == layer.weight.numel() // 10
                assert not optimizer.state[layer.weight]["exp_avg"][is_new].any()
                second = optimizer.state[layer.weight]["exp_avg_sq"]
                torch.testing.assert_close(second[is_new], second[~is_new].mean().expand(int(is_new.sum())))
                assert second[~is_new].any()
                assert not optimizer.state[layer.bias]["exp_avg"].any()

    method = CountsActs(zero_biases=True)
    fit(method, Looks(), ckpt_path=path, strategy=strategy())
    assert method.acts == 1
    assert weights(model).keys() == loaded.keys()


def test_not_in_a_second_fit_unless_asked() -> None:
    model, method = seeded(LightningNetwork), CountsActs()
    fit(method, module=model)
    fit(method, module=model)
    assert method.acts == 1
    method.rearm()
    fit(method, module=model)
    fit(method, module=model)
    assert method.acts == 2


def test_another_model_is_left_alone_with_a_warning() -> None:
    method = CountsActs().attach(seeded(Network))
    method.detach()
    other = seeded(Network)
    before = weights(other)
    with pytest.warns(UserWarning, match=r"acts once, and has acted on another model: .* Call rearm\(\) to let it act"):
        method.attach(other)
    assert_same(weights(other), before)
    method.detach()
    method.rearm()
    method.attach(other)
    assert method.acts == 2


def test_not_after_an_exception() -> None:
    class Fails(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise ZeroDivisionError

    model, method = seeded(LightningNetwork), CountsActs()
    with pytest.raises(ZeroDivisionError):
        fit(method, Fails(), module=model)
    fit(method, module=model)
    assert method.acts == 1


def test_not_in_validate_test_and_predict() -> None:
    model = seeded(LightningNetwork)
    model.test_step = model.validation_step
    method, before = CountsActs(), weights(model)
    run = trainer(method, limit_val_batches=1, limit_test_batches=1)
    run.validate(model, verbose=False)
    run.test(model, Batches(), verbose=False)
    run.predict(model, DataLoader(torch.randn(4, 6), batch_size=2))
    assert method.acts == 0
    assert_same(weights(model), before)
    run.fit(model)
    assert method.acts == 1


def test_in_a_plain_loop() -> None:
    model = seeded(Network)
    method = CountsActs(seed=1).attach(model)
    method.step()
    method.detach()
    method.attach(model).detach()
    assert method.acts == 1
    resumed = CountsActs(seed=1)
    resumed.load_state_dict(method.state_dict())
    before = weights(model)
    resumed.attach(model)
    assert resumed.acts == 0
    assert_same(weights(model), before)
    resumed.detach()
    resumed.rearm()
    resumed.attach(model)
    assert resumed.acts == 1
    assert_same(resumed.state_dict()["method"], method.state_dict()["method"])


def test_two_in_one_trainer() -> None:
    """One acts once, one on a schedule: they have a state each."""
    once, again = CountsActs(), CountsActs(every_n_epochs=1)
    fit(once, again)
    assert (once.acts, again.acts) == (1, EPOCHS - 1)


def test_methods_after_it_see_the_new_weights() -> None:
    class Looks(L2Init):
        def _start(self) -> None:
            super()._start()
            self.seen = weights(self.model)

    model, looks = seeded(LightningNetwork), Looks()
    expected = SelectiveReinit(seed=1).attach(seeded(LightningNetwork))
    fit(SelectiveReinit(seed=1), looks, module=model)
    assert_same(looks.seen, weights(expected.model))


# ---- what it tells


def logged(logger: CSVLogger, key: str) -> list[dict[str, str]]:
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row[f"plasticity/SelectiveReinit/{key}"]]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for record in caplog.records if "SelectiveReinit" in (text := record.getMessage())]


def test_numbers_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(SelectiveReinit.from_case("25M"), logger=logger, log_every_n_steps=1, max_epochs=1)
    [row] = logged(logger, "weights")
    numbers = {name.removeprefix("plasticity/SelectiveReinit/"): float(value) for name, value in row.items()}
    assert numbers["step"] == 0
    assert numbers["weights"] == 18 + 36 + 9
    assert numbers["share"] == 63 / 252
    assert (numbers["weights/net.second.weight"], numbers["share/net.second.weight"]) == (36, 0.25)
    start, message = messages(caplog)
    assert start == "SelectiveReinit works on 3 weights."
    assert "gave new values to 63 of 252 weights (25.00%):\n  net.first.weight: 18 of 72 (25.00%)" in message


def test_numbers_of_a_schedule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    method = SelectiveReinit(0.5, every_n_train_steps=2)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(method, logger=logger, log_every_n_steps=1, max_epochs=1)
    rows = logged(logger, "share")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]  # Lightning counts the steps before this one
    assert all(float(row["plasticity/SelectiveReinit/share"]) == 0.5 for row in rows)
    assert len(messages(caplog)) == 2  # at the start, and the first time that it acts


# ---- cost


def peak_memory(function: Any) -> int:
    """The most bytes that PyTorch had allocated at one time, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("case", ["10M", "10MN", "25N"])
def test_memory(case: str) -> None:
    layer = nn.Linear(1500, 1000)
    before = layer.weight.detach().clone()
    size = before.numel() * before.element_size()
    assert peak_memory(lambda: SelectiveReinit.from_case(case).attach(layer)) < size
    assert not torch.equal(layer.weight, before)
    assert size <= peak_memory(lambda: before + 1) < 1.01 * size  # it does see what is allocated


@pytest.mark.slow
def test_time() -> None:
    """The 86 million weights of a ViT-B/16, on one core. The best of three, for other programs slow it down."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):  # its own start would take longer than the test
        model = timm.create_model("vit_base_patch16_224")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)

    def seconds() -> float:
        started = time.process_time()
        SelectiveReinit.from_case("10MN").attach(model)
        return time.process_time() - started

    assert min(seconds() for _ in range(3)) < 2


def as_published(model: nn.Module, **settings: Any) -> tuple[SelectiveReinit, torch.optim.Optimizer]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = SelectiveReinit.as_published(every_n_train_steps=1, **settings).attach(model, optimizer)
    return method, optimizer


def test_as_published_all_parameters_take_part_and_one_without_gradient_is_redrawn_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    method, optimizer = as_published(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 5.0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[1].weight.grad.zero_()
    model[1].bias.grad.zero_()
    model[2].weight.grad[0, 0] = 0.0
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    method.step()
    changed = {name: (p != before[name]).sum().item() for name, p in model.named_parameters()}
    assert changed == {"0.weight": 0, "1.weight": 4, "1.bias": 4, "2.weight": 1, "2.bias": 0}
    assert model[1].weight.tolist() == [1.0] * 4  # the initial values of normalisation layers
    assert model[1].bias.tolist() == [0.0] * 4
    assert optimizer.state[model[2].weight]["step"] == 1


def test_as_published_same_course_as_a_slow_reference_over_300_steps() -> None:
    model, twin = mlp(), mlp()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.02) for net in (model, twin)]
    settings: dict[str, Any] = {"reinit": "init_mean", "relative_threshold": 0.2, "decay_rate": 0.9}
    method = SelectiveReinit.as_published(**settings, every_n_train_steps=20).attach(model, optimizers[0])
    averages = [torch.zeros_like(parameter) for parameter in twin.parameters()]
    steps = replaced = 0

    @torch.no_grad()
    def reference() -> None:
        nonlocal steps, replaced
        steps += 1
        for parameter, average in zip(twin.parameters(), averages, strict=True):
            average.mul_(0.9).add_(0.1 * (parameter * parameter.grad).abs())
            if steps % 20 == 0:
                bound = 0.2 * average.mean()
                for value, utility in zip(parameter.view(-1), average.view(-1), strict=True):
                    if utility <= bound:
                        value.fill_(0.0)  # the mean of the distributions that they started from
                        replaced += 1
                average.zero_()

    train(model, optimizers[0], method.step, INPUT[mlp], 300)
    train(twin, optimizers[1], reference, INPUT[mlp], 300)
    assert replaced > 100
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-8, atol=1e-10)


def test_random_utility_chooses_by_chance_and_alike_with_one_seed() -> None:
    def chosen(seed: int) -> torch.Tensor:
        model = nn.Linear(50, 40)
        model.weight.data = torch.arange(2000.0).view(40, 50) + 1
        SelectiveReinit(0.25, "normal", utility="random", seed=seed).attach(model)
        return model.weight.detach() != torch.arange(2000.0).view(40, 50) + 1

    assert chosen(0).sum() == 500
    assert torch.equal(chosen(0), chosen(0))
    assert not torch.equal(chosen(0), chosen(1))
    assert 0.15 < chosen(0)[:20].float().mean() < 0.35


def test_as_published_settings_may_be_replaced() -> None:
    method = SelectiveReinit.as_published(every_n_epochs=2, fraction=0.4, relative_threshold=None)
    assert (method.schedule.every_n_epochs, method.schedule.every_n_train_steps) == (2, None)
    assert (method.fraction, method.relative_threshold, method.parameters) == (0.4, None, "all")
