from pathlib import Path
from typing import Any

import pytest
import torch
from contract.training import LightningNetwork, fit, seeded
from lightning.pytorch import Callback
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from lightning_plasticity import HareAndTortoise


@pytest.mark.parametrize("network", [mlp, convolutional])
def test_same_course_as_the_slow_reference_over_300_steps(network):
    model, twin = network(), network()
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.003) for net in (model, twin)]
    method = HareAndTortoise(0.98, every_n_train_steps=40).attach(model, optimizers[0])
    slow = {name: tensor.numpy().copy() for name, tensor in twin.state_dict().items()}
    steps = 0

    def reference() -> None:
        nonlocal steps
        steps += 1
        for name, tensor in twin.state_dict().items():
            if tensor.is_floating_point():
                slow[name] = 0.98 * slow[name] + 0.02 * tensor.numpy()
                if steps % 40 == 0:
                    tensor.copy_(torch.from_numpy(slow[name]))

    train(model, optimizers[0], method.step, INPUT[network], 300)
    train(twin, optimizers[1], reference, INPUT[network], 300)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-8, atol=1e-10)
        if tensor.is_floating_point():
            torch.testing.assert_close(method.slow_state()[name], torch.from_numpy(slow[name]), rtol=1e-8, atol=1e-10)
    distance = sum(float((twin.state_dict()[name].double() - torch.from_numpy(slow[name])).square().sum())
                   for name in method.slow_state())  # fmt: skip
    assert float(method._numbers()["distance_to_slow"]) == pytest.approx(distance**0.5)


def stepped(optimizer_state: str = "keep") -> tuple[nn.Module, torch.optim.Optimizer, HareAndTortoise]:
    model = convolutional()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    method = HareAndTortoise(0.9, every_n_train_steps=3, optimizer_state=optimizer_state).attach(model, optimizer)
    train(model, optimizer, method.step, INPUT[convolutional], 3)
    return model, optimizer, method


def test_after_the_hand_over_nothing_is_shared_and_the_optimizer_remembers():
    model, optimizer, method = stepped()
    slow = method.slow_state()
    for name, tensor in model.state_dict().items():
        assert name not in slow or torch.equal(tensor, slow[name])
    assert set(slow) == {name for name in model.state_dict() if "num_batches" not in name}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(slow[name], tensor) for name, tensor in method.slow_state().items())
    assert all(optimizer.state[p]["exp_avg"].any() for p in model.parameters())
    model, optimizer, method = stepped("reset")
    assert not any(optimizer.state[p]["exp_avg"].any() for p in model.parameters())


def test_the_slow_weights_for_a_while():
    model, optimizer, method = stepped()
    train(model, optimizer, method.step, INPUT[convolutional], 2)
    fast = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slow = method.slow_state()
    with method.slow_weights():
        for name, tensor in slow.items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert not torch.equal(model[0].weight, fast["0.weight"])
    assert all(torch.equal(tensor, fast[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError), method.slow_weights():
        model(torch.ones(1))  # an error on the way
    assert all(torch.equal(tensor, fast[name]) for name, tensor in model.state_dict().items())
    method.detach()
    assert all(torch.equal(slow[name], tensor) for name, tensor in method.slow_state().items())
    other = convolutional()
    other.load_state_dict(method.slow_state(), strict=False)
    assert torch.equal(other[0].weight, slow["0.weight"])


class Watches(Callback):
    """Notes the weights of validation and training, and saves a checkpoint in the middle of validation."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = None if folder is None else folder / "middle.ckpt"
        self.validated: list[torch.Tensor] = []
        self.trained: list[torch.Tensor] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.validated.append(pl_module.net.first.weight.detach().clone())
        if self.path is not None and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.trained.append(pl_module.net.first.weight.detach().clone())


@pytest.mark.parametrize("evaluate", ["slow", "fast"])
def test_validation_has_the_slow_weights_and_training_goes_on_with_the_fast_ones(evaluate, tmp_path):
    options = {"limit_val_batches": 1, "max_epochs": 1, "num_sanity_val_steps": 1}
    method, watches = HareAndTortoise(0.9, every_n_epochs=10, evaluate=evaluate), Watches(tmp_path)
    model = fit(method, watches, **options)
    sanity, after_epoch = watches.validated
    fast = watches.trained[-1]
    assert torch.equal(model.net.first.weight, fast)
    assert torch.equal(sanity, seeded(LightningNetwork).net.first.weight)
    slow = method.slow_state()["net.first.weight"]
    assert not torch.equal(slow, fast)
    assert torch.equal(after_epoch, slow if evaluate == "slow" else fast)
    # What is saved in the middle is what training goes on with.
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["net.first.weight"], fast)
    assert torch.equal(saved["callbacks"][method.state_key]["method"]["slow"]["net.first.weight"], slow)


class FailsInValidation(LightningNetwork):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step:
            raise ZeroDivisionError


def test_an_error_in_validation_leaves_the_fast_weights():
    watches, model = Watches(), seeded(FailsInValidation)
    with pytest.raises(ZeroDivisionError):
        fit(HareAndTortoise(0.9, every_n_epochs=10), watches, module=model, limit_val_batches=1, max_epochs=1)
    assert torch.equal(model.net.first.weight, watches.trained[-1])


def test_of_two_optimizers_each_ones_steps_count_for_what_it_trains():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)).double()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.0) for i in (0, 1)]
    method = HareAndTortoise(0.5, every_n_train_steps=2).attach(model, optimizers)
    with torch.no_grad():
        for tensor in [*model.parameters(), model[2].running_mean]:
            tensor += 1
    before = method.slow_state()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers[0].step()
    method.step()
    moved = {name for name, tensor in method.slow_state().items() if not torch.equal(tensor, before[name])}
    assert moved == {"0.weight", "0.bias", "2.running_mean"}
    model_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizers[0].step()
    method.step()
    handed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, model_before[name])}
    assert handed == {"0.weight", "0.bias", "2.running_mean"}


def test_small_steps_count_in_half_precision():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    method = HareAndTortoise(0.999, every_n_train_steps=2000).attach(model)
    model.weight.data.fill_(2.0)
    for _ in range(1000):
        method.step()
    assert method.slow_state()["weight"].item() == pytest.approx(2 - 0.999**1000, rel=1e-4)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="It must be said when to act"):
        HareAndTortoise()
    with pytest.raises(ValueError, match="HareAndTortoise needs parameters to average"):
        HareAndTortoise(every_n_train_steps=1).attach(nn.ReLU())
    with (
        pytest.raises(RuntimeError, match="has no slow weights before it is attached"),
        HareAndTortoise(every_n_train_steps=1).slow_weights(),
    ):
        pass
    state = HareAndTortoise(every_n_train_steps=1).attach(mlp()).state_dict()
    method = HareAndTortoise(every_n_train_steps=1).attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"only one of the two has \['0.bias'"):
        method.load_state_dict(state)


@pytest.mark.parametrize("is_in_optimizer", [False, True])
def test_a_target_network_is_left_to_who_moves_it(is_in_optimizer):
    model = nn.ModuleDict({"online": mlp(), "target": mlp()})
    if is_in_optimizer:
        model["target"].requires_grad_(False)
    optimizer = torch.optim.SGD((model if is_in_optimizer else model["online"]).parameters(), lr=0.1)
    method = HareAndTortoise(0.9, every_n_train_steps=1).attach(model, optimizer)
    model["online"](torch.ones(2, 6).double()).sum().backward()
    with torch.no_grad():
        model["target"][0].weight.add_(1)
    optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("online.")}
