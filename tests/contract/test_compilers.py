"""Compiled models: hooks that compiled code did not know of must act all the same."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from contract.cases import Case

from .training import (
    Batches,
    LightningNetwork,
    Network,
    adam,
    assert_same,
    every_case,
    fit,
    seeded,
    train_plainly,
    weights,
)

# The tracer looks at every tensor's `grad` and hides the warning that this brings, unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# The backend runs what was traced as it is, so that compiled and uncompiled runs agree to the last bit.
BACKEND = "eager"


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class CompiledChild(LightningNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend=BACKEND)


def compiled_lightning_module() -> Any:
    return torch.compile(LightningNetwork(), backend=BACKEND)


def compiled_in_place() -> Any:
    module = LightningNetwork()
    module.compile(backend=BACKEND)
    return module


@pytest.mark.parametrize("make", [CompiledChild, compiled_lightning_module, compiled_in_place])
@every_case
def test_compiled_in_a_trainer(case: Case, make: Any) -> None:
    method, twin = case.make(), case.make()
    # Validation runs, and compiles, the network before the method has seen a training forward.
    model = fit(method, module=make, limit_val_batches=2, num_sanity_val_steps=2)
    assert_same(weights(model), weights(fit(twin)))
    assert_same(method.optimizer_steps, twin.optimizer_steps)


@pytest.mark.parametrize("how", ["model", "step function"])
@every_case
def test_compiled_before_in_a_plain_loop(case: Case, how: str) -> None:
    model = seeded(Network)
    optimizer = adam(model.parameters())

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(called(x), y)

    compiled = torch.compile(model if how == "model" else loss, backend=BACKEND)
    called: nn.Module = compiled if how == "model" else model
    loss_of = loss if how == "model" else compiled
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for x, y in Batches():
        loss_of(x, y)
    model.load_state_dict(before)  # but for the statistics of the norm nothing had changed

    method, twin = case.make(), case.make()
    method.attach(compiled if how == "model" else model, optimizer)
    for x, y in [*Batches(), *Batches()]:
        optimizer.zero_grad()
        loss_of(x, y).backward()
        optimizer.step()
        method.step()
    expected = train_plainly(twin, epochs=2)
    assert_same(weights(model), weights(expected))

    method.detach()
    state = method.state_dict()
    loss_of(x, y)  # compiled code with hooks that are no longer there
    method.attach(model, optimizer)
    assert_same(method.state_dict(), state)
