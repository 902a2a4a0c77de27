"""Copies of what is in the middle of training: of a method, with its model or without, and of the model alone."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from contract.cases import CASES, Case
from contract.training import Batches, Network, adam, assert_same, fit, hooks, seeded, weights
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_plasticity import ContinualBackprop, PlasticityMonitor

every_method = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])


def pickled(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_way = pytest.mark.parametrize("copied", [copy.deepcopy, pickled])


def train(model: nn.Module, optimizer: Any, method: Any, batches: Iterable[Any]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if method is not None:
            method.step()


@every_way
@every_method
def test_a_copy_of_a_run_goes_on_as_the_run_does(case: Case, copied: Callable[[Any], Any]) -> None:
    model, method = seeded(Network), case.make()
    optimizer = adam(model.parameters())
    method.attach(model, optimizer)
    train(model, optimizer, method, Batches())
    twin, twin_optimizer, twin_method = copied((model, optimizer, method))
    assert repr(twin_method) == repr(method)
    assert twin_method.optimizer_steps == method.optimizer_steps
    with pytest.raises(RuntimeError, match=r"step\(\) needs a model. Call attach\(model, optimizer\) first"):
        twin_method.step()

    train(model, optimizer, method, Batches())  # the copy has no part in it
    twin_method.attach(twin, twin_optimizer)
    train(twin, twin_optimizer, twin_method, Batches())
    assert_same(weights(twin), weights(model))
    assert_same(twin_method.state_dict(), method.state_dict())


def test_a_copy_has_the_settings_of_now() -> None:
    method = ContinualBackprop(0.1, 2)
    model = Network()
    method.attach(model, adam(model.parameters()))
    method.replacement_rate = 0.2
    assert copy.deepcopy(method).replacement_rate == 0.2
    assert pickle.loads(pickle.dumps(method)).replacement_rate == 0.2


@pytest.mark.parametrize("is_called_first", [True, False])
@every_way
@every_method
def test_a_copy_of_the_model_is_not_listened_to(
    case: Case, copied: Callable[[Any], Any], is_called_first: bool
) -> None:
    """Such as the teacher of a student: it may run in training mode, before the model does or after it."""

    def run(has_copy: bool) -> Any:
        model, method = seeded(Network), case.make()
        optimizer = adam(model.parameters())
        method.attach(model, optimizer)
        if not is_called_first:
            train(model, optimizer, method, Batches())
        other = copied(model) if has_copy else seeded(Network)
        for x, y in Batches():
            for _ in range(2):
                other(3 - x)
            train(model, optimizer, method, [(x, y)])
            other(x * 2)
        train(other, adam(other.parameters()), None, Batches())
        method.detach()
        return weights(model), method.state_dict(), hooks(model, optimizer)

    assert_same(run(has_copy=True), run(has_copy=False))


class CopiesAll(Callback):
    """Copies all callbacks, and the model, at each moment of a fit."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for callback in trainer.callbacks:
            if callback is not self:
                twin = pickle.loads(pickle.dumps(copy.deepcopy(callback)))
                assert_same(twin.state_dict(), callback.state_dict())
        pickled(copy.deepcopy(pl_module.net))(torch.zeros(2, 6))

    on_before_optimizer_step = on_train_batch_end = on_train_epoch_end = on_train_batch_start


def test_copies_in_the_middle_of_a_fit_change_nothing() -> None:
    def run(*others: Any) -> Any:
        method, monitor = ContinualBackprop(0.1, 2), PlasticityMonitor(every_n_train_steps=2)
        return weights(fit(method, monitor, *others)), method.state_dict(), monitor.history

    assert_same(run(CopiesAll()), run())
