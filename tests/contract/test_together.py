"""Several callbacks on one model: all act, none hears another one examine it, and a monitor changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_plasticity as lp
from contract.training import (
    Batches,
    LightningNetwork,
    adam,
    assert_same,
    difference,
    fit,
    hooks,
    layers,
    seeded,
    trainer,
    weights,
)
from lightning_plasticity import metrics as M
from lightning_plasticity.functional.activation_reset import ActivationStrategy


class Whole(LightningNetwork):
    """`training_step` calls the module itself."""


class Child(LightningNetwork):
    """The commonest module there is: no `forward`, `training_step` calls a child."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])


class Leaf(LightningNetwork):
    """A child, and then a layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.head(self.net(batch[0])), batch[1])


class Beside(LightningNetwork):
    """The module itself, and a child that its `forward` does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.other = layers()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]) + self.other(batch[0]), batch[1])


SHAPES = [Whole, Child, Leaf, Beside]
CALLBACKS: dict[str, Callable[[], Any]] = {
    "ContinualBackprop": lambda: lp.ContinualBackprop(0.1, 2),
    "ActivationReset": lambda: lp.ActivationReset(ActivationStrategy(0.1, 0.1, -0.5, 0.5), maturity_threshold=2),
    "ReDo": lambda: lp.ReDo(0.5, 3),
    "SoftWeightRescaling": lambda: lp.SoftWeightRescaling(0.1),
    "ShrinkAndPerturb": lambda: lp.ShrinkAndPerturb(0.8, 0.2, every_n_train_steps=4),
    "L2Init": lambda: lp.L2Init(0.1),
    "LayerReset": lambda: lp.LayerReset(1, every_n_train_steps=4),
    "SelectiveReinit": lambda: lp.SelectiveReinit(0.2, "mean_noise", every_n_train_steps=4),
    "PartialReset": lambda: lp.PartialReset(every_n_train_steps=2),
    "SelfNormalizedReset": lambda: lp.SelfNormalizedReset(min_silence=1, max_silence=1),
    "DirectionAwareShrink": lambda: lp.DirectionAwareShrink(data=list(Batches()), every_n_train_steps=4),
    "HareAndTortoise": lambda: lp.HareAndTortoise(every_n_train_steps=4),
    "IsometryReinit": lambda: lp.IsometryReinit(every_n_train_steps=4),
    "OptimizerReset": lambda: lp.OptimizerReset(every_n_train_steps=4),
    "ParsevalRegularization": lambda: lp.ParsevalRegularization(0.1),
    "SpectralRegularization": lambda: lp.SpectralRegularization(0.1),
    "WeightClipping": lambda: lp.WeightClipping(0.5),
    "PlasticityMonitor": lambda: lp.PlasticityMonitor(
        [M.EffectiveRank(), M.DeadUnits(), M.WeightNorm(), M.GradientNorm()], every_n_train_steps=2
    ),
}


def names_of(*callbacks: Any) -> list[str]:
    return [type(callback).__name__ for callback in callbacks]


def assert_all_worked(callbacks: list[Any], model: nn.Module) -> None:
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), names_of(*callbacks)
    for callback in callbacks:
        if isinstance(callback, lp.PlasticityMonitor):
            assert callback.history["EffectiveRank"]
        else:
            assert callback.optimizer_steps == 6
            state = callback.state_dict()["method"]
            counted = [state.get("replaced", 1), *state.get("scaled", [1])]
            assert sum(counted) > 0, f"{names_of(callback)} did nothing beside {names_of(*callbacks)}"
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:SoftWeightRescaling cannot keep this network's outputs proportional")
@pytest.mark.filterwarnings("ignore:LayerReset counts the last layers")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("first", CALLBACKS)
def test_every_ordered_pair(first: str, shape: type) -> None:
    for second in CALLBACKS:
        pair = [CALLBACKS[first](), CALLBACKS[second]()]
        if first == second and pair[0].state_key == pair[1].state_key:
            continue  # Lightning itself refuses two callbacks of one key
        assert_all_worked(pair, fit(*pair, module=shape, max_epochs=1))


@pytest.mark.filterwarnings("ignore:SoftWeightRescaling cannot keep this network's outputs proportional")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_all_at_once(shape: type) -> None:
    runs = []
    for order in (list(CALLBACKS), list(reversed(CALLBACKS))):
        callbacks = [CALLBACKS[name]() for name in order]
        model = fit(*callbacks, module=shape, max_epochs=1)
        assert_all_worked(callbacks, model)
        runs.append(weights(model))
    again = fit(*(CALLBACKS[name]() for name in CALLBACKS), module=shape, max_epochs=1)
    assert_same(weights(again), runs[0])


@pytest.mark.filterwarnings("ignore:SoftWeightRescaling cannot keep this network's outputs proportional")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("name", sorted(CALLBACKS.keys() - {"PlasticityMonitor"}))
def test_a_monitor_changes_no_bit_of_the_run(name: str, shape: type) -> None:
    alone = CALLBACKS[name]()
    expected = weights(fit(alone, module=shape, max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0))
    for monitor_first in (True, False):
        method, monitor = CALLBACKS[name](), CALLBACKS["PlasticityMonitor"]()
        callbacks = [monitor, method] if monitor_first else [method, monitor]
        found = fit(*callbacks, module=shape, max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0)
        assert_same(weights(found), expected)
        assert_same(method.state_dict(), alone.state_dict())


@pytest.mark.parametrize("name", ["ContinualBackprop", "ActivationReset", "ReDo"])
def test_parts_beside_the_forward_are_worked_on(name: str) -> None:
    method = CALLBACKS[name]()
    fit(method, module=Beside, max_epochs=1)
    sets = method.state_dict()["method"]["sets"]
    assert set(sets) == {"net.first", "net.second", "other.first", "other.second"}
    assert all(state["maturity"]["steps"] == 6 for state in sets.values())


class Later(LightningNetwork):
    """A part that training calls from the third step on, trained by the same optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.later = layers()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        output = self.net(batch[0])
        if self.trainer.global_step >= 2:
            output = output + self.later(batch[0])
        return cross_entropy(output, batch[1])


@pytest.mark.parametrize("saved_after", [1, 4])
@pytest.mark.parametrize("name", ["ContinualBackprop", "ActivationReset", "ReDo", "SoftWeightRescaling"])
@pytest.mark.filterwarnings("ignore:SoftWeightRescaling cannot keep this network's outputs proportional")
def test_a_part_that_is_called_late_joins_and_resumes(name: str, saved_after: int, tmp_path: Any) -> None:
    method = CALLBACKS[name]()
    whole = fit(method, module=Later, max_steps=12, max_epochs=-1)
    without = fit(module=Later, max_steps=12, max_epochs=-1)
    later = {key: tensor for key, tensor in weights(whole).items() if key.startswith("later")}
    assert difference(later, {key: tensor for key, tensor in weights(without).items() if key in later}) is not None
    run = trainer(CALLBACKS[name](), max_steps=saved_after, max_epochs=-1)
    run.fit(seeded(Later))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = CALLBACKS[name]()
    model = fit(resumed, module=Later, max_steps=12, max_epochs=-1, ckpt_path=tmp_path / "saved.ckpt")
    assert_same(weights(model), weights(whole))
    assert_same(resumed.state_dict(), method.state_dict())


class Target(LightningNetwork):
    """A target network in training mode, which no optimizer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.target = layers().requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            aim = self.target(batch[0])
        return (self.net(batch[0]) - aim).square().mean()


def test_a_target_network_is_left_alone() -> None:
    method = CALLBACKS["ContinualBackprop"]()
    model = fit(method, module=Target, max_epochs=1)
    assert set(method.state_dict()["method"]["sets"]) == {"net.first", "net.second"}
    assert hooks(model) == 0


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed", "bf16-true", "64"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.filterwarnings("ignore:SoftWeightRescaling cannot keep this network's outputs proportional")
def test_every_precision_in_every_shape(shape: type, precision: str) -> None:
    plugins: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        from lightning.pytorch.plugins import MixedPrecision

        plugins = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}
    for name, other in itertools.pairwise([*CALLBACKS, next(iter(CALLBACKS))]):
        pair = [CALLBACKS[name](), CALLBACKS[other]()]
        model = fit(*pair, module=shape, max_epochs=1, **plugins)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), names_of(*pair)
        assert hooks(model) == 0


def test_one_examination_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_plasticity.engine import known_units

    asked = []
    explore = known_units.explore
    monkeypatch.setattr(known_units, "explore", lambda *args, **kwargs: asked.append(args) or explore(*args, **kwargs))
    fit(*(CALLBACKS[name]() for name in ("ContinualBackprop", "ReDo", "PlasticityMonitor")), max_epochs=1)
    assert len(asked) == 1


def test_plain_loops_share_an_examination() -> None:
    model = Whole()
    optimizer = adam(model.parameters())
    x, y = next(iter(Batches()))
    first = lp.ContinualBackprop(0.1, 2).attach(model, optimizer, example_inputs=(x,))
    second = lp.ContinualBackprop(0.1, 2, module="net").attach(model, optimizer)
    third = lp.ReDo(0.5, 3).attach(model, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        for method in (first, second, third):
            method.step()
    first.detach()
    assert second.replaced > 0
    assert third.replaced > 0
    second.detach()
    third.detach()
    assert hooks(model, optimizer) == 0
