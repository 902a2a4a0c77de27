"""The monitor in a plain and in a Fabric loop: what it measures is what it measures in a Trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.training import EPOCHS, Batches, LightningNetwork, Network, adam, assert_same, fit, hooks, seeded, weights
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_plasticity import ContinualBackprop, PlasticityMonitor
from lightning_plasticity import metrics as M

ALL_KINDS = [
    M.EffectiveRank,
    M.DeadUnits,
    M.WeightNorm,
    M.DistanceFromInit,
    M.UpdateRatio,
    M.GradientNorm,
    M.GradientCovariance,
]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *methods: Any,
    epochs: int = EPOCHS,
    accumulate: int = 1,
    begin: int = 0,
) -> list[dict[str, float]]:
    """What the monitor, the last of the methods, returned after each step."""
    returned = []
    for i, (x, y) in list(enumerate([batch for _ in range(epochs) for batch in Batches()]))[begin:]:
        if i % accumulate == 0:
            optimizer.zero_grad()
        (cross_entropy(model(x), y) / accumulate).backward()
        if i % accumulate == accumulate - 1:
            optimizer.step()
            for method in methods:
                returned.append(method.step(*[(x, y)] * isinstance(method, PlasticityMonitor)))
    return [numbers for numbers in returned if numbers is not None]


def loop(monitor: PlasticityMonitor | None, *methods: Any, **options: Any) -> tuple[nn.Module, list[dict[str, float]]]:
    model = seeded(Network)
    optimizer = adam(model.parameters())
    every = [*methods, *[monitor] * (monitor is not None)]
    for method in every:
        method.attach(model, optimizer)
    returned = train(model, optimizer, *every, **options)
    for method in every:
        method.detach()
    assert hooks(model, optimizer) == 0
    return model, returned


class Numbers:
    """A logger of one's own."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_same_numbers_as_in_a_trainer_and_no_other_run(accumulate: int) -> None:
    in_trainer, alone = (PlasticityMonitor([make() for make in ALL_KINDS], 3) for _ in range(2))
    fit(ContinualBackprop(0.1, 2, seed=1), in_trainer, module=LightningNetwork, accumulate_grad_batches=accumulate)
    model, returned = loop(alone, ContinualBackprop(0.1, 2, seed=1), accumulate=accumulate)
    plain, _ = loop(None, ContinualBackprop(0.1, 2, seed=1), accumulate=accumulate)
    assert_same(weights(model), weights(plain))
    assert alone.history.keys() == in_trainer.history.keys()
    for name, records in in_trainer.history.items():
        if (name, accumulate) != ("GradientCovariance", 2):  # of the first of several batches, or of the one given
            assert alone.history[name] == records, name
    due = [bool(numbers) for numbers in returned]
    assert due == [step % 3 == 2 for step in range(18 // accumulate)]
    assert returned[-1] == alone.values
    assert {"plasticity/EffectiveRank", "plasticity/EffectiveRank/net.first"} <= alone.values.keys()


def test_numbers_and_figures_go_where_they_are_sent(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(tmp_path, name="", version="of_fabric"))
    torch.manual_seed(0)
    model = Network()
    model, optimizer = fabric.setup(model, adam(model.parameters()))
    monitor = PlasticityMonitor([M.DeadUnits(), M.WeightNorm()], 4).attach(model, optimizer, logger=fabric)
    train(model, optimizer, monitor, epochs=1)
    monitor.detach()
    fabric.loggers[0].finalize("success")
    lines = (tmp_path / "of_fabric" / "metrics.csv").read_text().splitlines()
    assert "plasticity/DeadUnits/net.first" in lines[0]
    assert len(lines) == 2
    assert (tmp_path / "of_fabric" / "plasticity" / "DeadUnits.png").exists()

    numbers, others = Numbers(), Numbers()
    model = seeded(Network)
    optimizer = adam(model.parameters())
    monitor = PlasticityMonitor([M.WeightNorm()], 2).attach(model, optimizer, logger=[numbers, others])
    returned = train(model, optimizer, monitor, epochs=1)
    assert numbers.logged == others.logged == [(step, returned[step]) for step in (1, 3, 5)]


def test_a_loop_that_goes_on_from_a_checkpoint_measures_what_one_that_never_stopped_does() -> None:
    whole = PlasticityMonitor([make() for make in ALL_KINDS], 4)
    loop(whole)
    model = seeded(Network)
    optimizer = adam(model.parameters())
    first = PlasticityMonitor([make() for make in ALL_KINDS], 4).attach(model, optimizer)
    train(model, optimizer, first, epochs=1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), first.state_dict()))
    first.detach()
    for monitor in (first, PlasticityMonitor([make() for make in ALL_KINDS], 4)):
        if monitor is not first:  # it goes on by itself, the other from the checkpoint
            model = seeded(Network, 1)
            optimizer = adam(model.parameters())
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            monitor.load_state_dict(saved[2])
        monitor.attach(model, optimizer)
        train(model, optimizer, monitor, begin=6)
        monitor.detach()
        for name, records in whole.history.items():
            assert [step for step, _ in records] == [3, 7, 11, 15]
            # which layers are read is found anew, in the first step; UpdateRatio and others go on
            assert monitor.history[name] == records, name


def test_another_model_is_counted_and_compared_from_its_own_start() -> None:
    monitor = PlasticityMonitor([M.DistanceFromInit()], 5)
    loop(monitor)
    _, returned = loop(monitor, epochs=1)
    assert [bool(numbers) for numbers in returned] == [False] * 4 + [True, False]
    assert [step for step, _ in monitor.history["DistanceFromInit"]] == [4]


def test_a_step_that_was_skipped_is_forgotten() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.ones(3, 2)
    assert (model[:2](x) > 0).any()
    monitor = PlasticityMonitor([M.DeadUnits(), M.GradientNorm()], 1).attach(model, optimizer)
    model(x).sum().backward()
    assert monitor.step() == {}  # the scaler has left the step out
    optimizer.zero_grad()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    model(x).sum().backward()
    optimizer.step()
    assert monitor.step()["plasticity/DeadUnits"] == 1.0
    assert [step for step, _ in monitor.history["DeadUnits"]] == [0]


def test_several_optimizers_and_none_count_steps_of_training() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    for optimizers in ([torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[2])], None):
        monitor = PlasticityMonitor([M.GradientNorm(), M.EffectiveRank()], 2).attach(model, optimizers, logger=None)
        returned = []
        for _ in range(4):
            model(torch.randn(8, 2)).sum().backward()
            expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
            for optimizer in optimizers or ():
                optimizer.step()
            returned.append(monitor.step())
        assert [bool(numbers) for numbers in returned] == [False, True] * 2
        assert returned[-1]["plasticity/GradientNorm"] == pytest.approx(expected)
        monitor.detach()


def test_layers_are_found_by_an_example_and_none_has_a_hook_between_measurements() -> None:
    model = seeded(Network)
    optimizer = adam(model.parameters())
    monitor = PlasticityMonitor([M.EffectiveRank()], 3)
    monitor.attach(model, optimizer, example_inputs=(torch.zeros(2, 6),))
    held = []
    for x, y in Batches():
        optimizer.zero_grad()
        held.append(hooks(model))
        cross_entropy(model(x), y).backward()
        optimizer.step()
        monitor.step()
    assert held == [0, 0, 2, 0, 0, 2]


def test_a_probe_batch_takes_the_place_of_the_batch() -> None:
    x = torch.linspace(-1, 1, 60).view(10, 6)
    probe = PlasticityMonitor([M.Sharpness(cross_entropy), M.EffectiveRank()], 4, probe_batch=(x, torch.arange(10) % 3))
    model = seeded(Network)
    optimizer = adam(model.parameters())
    probe.attach(model, optimizer)
    for batch in Batches():
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        numbers = probe.step()
        if numbers:
            metric = M.EffectiveRank()
            metric.update(model.eval().net[:3](x).detach())
            model.train()
            assert numbers["plasticity/EffectiveRank/net.first"] == pytest.approx(float(metric.compute()))
    assert len(probe.history["Sharpness"]) == 1


def test_what_cannot_work_is_refused() -> None:
    model = seeded(Network)
    optimizer = adam(model.parameters())
    with pytest.raises(ValueError, match=r"every_n_epochs needs a Trainer, .* Use every_n_train_steps in a plain loop"):
        PlasticityMonitor().attach(model, optimizer)
    monitor = PlasticityMonitor([M.Sharpness(cross_entropy), M.DeadUnits()], 1)
    with pytest.raises(RuntimeError, match=r"step\(\) needs a model. Call attach\(model, optimizer\) first"):
        monitor.step()
    with pytest.raises(ValueError, match="logger must be a Fabric, or something with log_metrics"):
        monitor.attach(model, optimizer, logger=print)
    with pytest.raises(ValueError, match="module= must name a module of Network, got 'head'"):
        PlasticityMonitor([M.DeadUnits()], 1, module="head").attach(model, optimizer)
    assert hooks(model, optimizer) == 0
    monitor.attach(model, optimizer)
    with pytest.raises(RuntimeError, match=r"is attached to a model already. Call detach\(\) before attach"):
        monitor.attach(model, optimizer)
    with pytest.raises(RuntimeError, match=r"is attached to a model already. Call detach\(\) before fit"):
        fit(monitor)
    cross_entropy(model(torch.zeros(4, 6)), torch.zeros(4).long()).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"run the model on a batch, and none was given. Give .* step\(batch="):
        monitor.step()
    monitor.detach()
    assert hooks(model, optimizer) == 0


def test_where_no_hidden_layer_is_found_the_warning_names_the_line_of_the_loop() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = adam(model.parameters())
    monitor = PlasticityMonitor([M.DeadUnits()], 1).attach(model, optimizer)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="need hidden layers, but none was found") as caught:
        assert monitor.step() == {}
    assert [warning.filename for warning in caught] == [__file__]
