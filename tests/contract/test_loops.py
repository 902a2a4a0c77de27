"""Every method acts, and alike in both Trainers, in Fabric and in a plain loop; it leaves nothing behind."""

import copy
import pickle

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contract.cases import Case

from .training import (
    BATCHES,
    EPOCHS,
    Batches,
    LightningNetwork,
    Network,
    PytorchLightningNetwork,
    adam,
    assert_acted,
    assert_same,
    every_case,
    fit,
    hooks,
    layers,
    seeded,
    train_plainly,
    train_with_fabric,
    trainer,
    weights,
)


@every_case
def test_trains_alike_in_both_packages(case: Case) -> None:
    method, twin = case.make(), case.make()
    model = fit(method)
    assert_acted(model, fit())
    assert method.optimizer_steps == BATCHES * EPOCHS
    other = fit(twin, module=PytorchLightningNetwork, package=pytorch_lightning)
    assert_same(weights(other), weights(model))
    assert_same(twin.state_dict(), method.state_dict())


@every_case
def test_plain_loop_equals_trainer(case: Case) -> None:
    method, twin = case.make(), case.make()
    assert_same(weights(train_plainly(method)), weights(fit(twin)))
    assert_same(method.state_dict(), twin.state_dict())


@every_case
def test_fabric_equals_trainer(case: Case) -> None:
    method, twin = case.make(), case.make()
    assert_same(weights(train_with_fabric(method)), weights(fit(twin)))
    assert_same(method.state_dict(), twin.state_dict())


class CallsChildren(LightningNetwork):
    """Never called as a whole: `training_step` calls two children one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.top = layers()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.net(x), y) + cross_entropy(self.top(x), y)


@every_case
def test_children_that_are_called_one_by_one(case: Case) -> None:
    model, without = fit(case.make(), module=CallsChildren), fit(module=CallsChildren)
    assert_acted(model.net, without.net)
    assert_acted(model.top, without.top)


@every_case
def test_module_names_a_part(case: Case) -> None:
    method = case.make(module="net")
    model, without = fit(method, module=CallsChildren), fit(module=CallsChildren)
    assert_acted(model.net, without.net)
    assert_same(weights(model.top), weights(without.top))
    assert method.optimizer_steps == BATCHES * EPOCHS


@every_case
def test_two_on_two_modules(case: Case) -> None:
    def methods() -> list:
        return [case.make(module="net", seed=1), case.make(module="top", seed=1)]

    both, alone = methods(), methods()
    model = fit(*both, module=CallsChildren)
    assert_same(weights(model.net), weights(fit(alone[0], module=CallsChildren).net))
    assert_same(weights(model.top), weights(fit(alone[1], module=CallsChildren).top))
    assert_same([m.state_dict() for m in both], [m.state_dict() for m in alone])


@every_case
def test_parameters_keep_their_identity(case: Case) -> None:
    model = seeded(LightningNetwork)
    before = list(model.parameters())
    pointers = [parameter.data_ptr() for parameter in before]
    fit(case.make(), module=model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert pointers == [parameter.data_ptr() for parameter in before]


class Fails(LightningNetwork):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == 10:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


@every_case
def test_no_hooks_stay(case: Case) -> None:
    model, method = seeded(LightningNetwork), case.make()
    run = trainer(method)
    run.fit(model)
    assert hooks(model, *run.optimizers) == 0

    failing, method = seeded(Fails), case.make()
    run = trainer(method)
    with pytest.raises(ZeroDivisionError):
        run.fit(failing)
    assert hooks(failing, *run.optimizers) == 0

    plain = Network()
    optimizer = adam(plain.parameters())
    method = case.make().attach(plain, optimizer, example_inputs=(torch.zeros(2, 6),))
    assert hooks(plain, optimizer) > 0
    method.detach()
    assert hooks(plain, optimizer) == 0


@every_case
def test_fit_again(case: Case) -> None:
    """With the same model a method goes on; with another it starts anew."""
    model, method = seeded(LightningNetwork), case.make()
    fit(method, module=model)
    fit(method, module=model)
    assert method.optimizer_steps == 2 * BATCHES * EPOCHS
    other, fresh = fit(method), case.make()
    assert_same(weights(other), weights(fit(fresh)))
    assert_same(method.state_dict(), fresh.state_dict())


@every_case
def test_fit_again_after_an_exception(case: Case) -> None:
    model, method = seeded(Fails), case.make()
    with pytest.raises(ZeroDivisionError):
        fit(method, module=model)
    fit(method, module=model, max_epochs=1)
    assert method.optimizer_steps == 10 + BATCHES


@every_case
def test_detach_and_attach_go_on(case: Case) -> None:
    def run(pauses: bool) -> tuple[nn.Module, dict]:
        model, method = seeded(Network), case.make()
        optimizer = adam(model.parameters())
        method.attach(model, optimizer)
        for i, (x, y) in enumerate([*Batches(), *Batches()]):
            if pauses and i in (4, 9):
                method.detach()
                method.attach(model, optimizer)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            method.step()
        return model, method.state_dict()

    (model, state), (paused, paused_state) = run(pauses=False), run(pauses=True)
    assert_same(weights(paused), weights(model))
    assert_same(paused_state, state)


@every_case
def test_copies_of_an_unattached_method(case: Case) -> None:
    trained = case.make()
    expected = weights(fit(trained))
    for copied in (copy.deepcopy(case.make()), pickle.loads(pickle.dumps(case.make()))):
        assert_same(weights(fit(copied)), expected)
    pickle.loads(pickle.dumps(trained))
