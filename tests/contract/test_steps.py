"""What counts as a step: an optimizer that has changed weights, once, whatever led to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from contract.cases import Case

from .test_loops import CallsChildren
from .training import (
    BATCHES,
    EPOCHS,
    Batches,
    LightningNetwork,
    Network,
    adam,
    assert_acted,
    assert_same,
    every_case,
    fit,
    seeded,
    train_plainly,
    weights,
)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam, capturable steps": partial(torch.optim.Adam, lr=0.03, amsgrad=True, foreach=True),
    "Adam, fused": partial(torch.optim.Adam, lr=0.03, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.03),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1),
    "NAdam": partial(torch.optim.NAdam, lr=0.03),
    "RAdam": partial(torch.optim.RAdam, lr=0.03),
    "Adamax": partial(torch.optim.Adamax, lr=0.03),
    "Adadelta": partial(torch.optim.Adadelta, lr=0.5),
}


@every_case
def test_accumulation(case: Case) -> None:
    method, twin = case.make(), case.make()
    model = fit(method, accumulate_grad_batches=4)
    assert method.optimizer_steps == 2 * EPOCHS  # four batches, then the two that are left
    # Both loops divide each loss by four, also in the second step.
    assert_same(weights(train_plainly(twin, accumulate=4)), weights(model))
    assert_same(twin.state_dict(), method.state_dict())


class CountsChanges(Callback):
    """Counts the batches in which weights changed, by looking at them."""

    def __init__(self) -> None:
        self.changes = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        same = all(torch.equal(a, b) for a, b in zip(self.before, pl_module.parameters(), strict=True))
        self.changes += not same


@pytest.mark.parametrize("fused", [False, True])
@every_case
def test_steps_that_a_gradient_scaler_skips(case: Case, fused: bool) -> None:
    class Fused(LightningNetwork):
        make_optimizer = staticmethod(partial(torch.optim.Adam, lr=0.03, fused=fused))

    # Half precision overflows until the scale has been halved often enough; then it doubles every four steps.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    method, counted = case.make(), CountsChanges()
    fit(method, counted, module=Fused, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=5)
    assert 0 < counted.changes < 5 * BATCHES
    assert method.optimizer_steps == counted.changes


@pytest.mark.parametrize("fused", [False, True])
@every_case
def test_skipped_steps_in_a_plain_loop(case: Case, fused: bool) -> None:
    model, method = seeded(Network), case.make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    method.attach(model, optimizer)
    for i, (x, y) in enumerate([*Batches(), *Batches()]):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) * (float("inf") if i in (0, 1, 5) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        method.step()
    assert method.optimizer_steps == 2 * BATCHES - 3


class TwoOptimizers(CallsChildren):
    """In each batch one step for `net` and two for `top`, in every third batch none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[Optimizer]:
        return [adam(self.net.parameters()), adam(self.top.parameters())]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        for optimizer, child in ((first, 0), (second, 1), (second, 1)):
            losses = [cross_entropy(part(x), y) for part in (self.net, self.top)]
            if batch_idx % 3 < 2:
                self.advance(optimizer, losses[child])

    def advance(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@every_case
def test_manual_optimization_with_two_optimizers(case: Case) -> None:
    first, second, both = case.make(module="net"), case.make(module="top"), case.make()
    model, without = fit(first, second, module=TwoOptimizers), fit(module=TwoOptimizers)
    batches = EPOCHS * BATCHES * 2 // 3
    assert (first.optimizer_steps, second.optimizer_steps) == (batches, 2 * batches)
    assert_acted(model.net, without.net)
    assert_acted(model.top, without.top)
    fit(both, module=TwoOptimizers)
    assert both.optimizer_steps == 3 * batches


class SometimesNone(LightningNetwork):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx % 3 == 0:  # also in the very first batch, before there was any forward pass
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning")
@every_case
def test_training_step_returns_none(case: Case) -> None:
    method, counted = case.make(), CountsChanges()
    fit(method, counted, module=SometimesNone)
    assert counted.changes == EPOCHS * BATCHES * 2 // 3
    assert method.optimizer_steps == counted.changes


class AlwaysNone(LightningNetwork):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning")
@every_case
def test_training_step_always_returns_none(case: Case) -> None:
    method = case.make()
    fit(method, module=AlwaysNone)
    assert method.optimizer_steps == 0


class Closures(LightningNetwork):
    make_optimizer = staticmethod(partial(torch.optim.LBFGS, lr=0.1, max_iter=4))

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        return super().training_step(batch, batch_idx)


@every_case
def test_several_closures_in_one_step(case: Case) -> None:
    method, twin = case.make(), case.make()
    model = fit(method, module=Closures)
    assert model.calls > 2 * EPOCHS * BATCHES
    assert method.optimizer_steps == EPOCHS * BATCHES
    assert_same(weights(train_plainly(twin, Closures.make_optimizer)), weights(model))
    assert_same(twin.state_dict(), method.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
@every_case
def test_common_optimizers(case: Case, name: str) -> None:
    method = case.make()
    assert_acted(train_plainly(method, OPTIMIZERS[name]), train_plainly(None, OPTIMIZERS[name]))
    assert method.optimizer_steps == EPOCHS * BATCHES
