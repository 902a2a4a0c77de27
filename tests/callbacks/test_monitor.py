"""The monitor: that it logs what it should have measured, when it should, to real loggers, and does nothing else."""

import csv
import functools
import logging
import os
import socket
import warnings

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract.training import (
    BATCHES,
    Batches,
    LightningNetwork,
    PytorchLightningNetwork,
    adam,
    assert_same,
    difference,
    fit,
    hooks,
    seeded,
)
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanSquaredError

from lightning_plasticity import PlasticityMonitor, ReDo
from lightning_plasticity import metrics as M

PAIR = (torch.linspace(-1, 1, 60).view(10, 6), torch.arange(10) % 3)


class Recorder(Callback):
    """What a monitor in another place of the list of callbacks should have seen."""

    def __init__(self):
        self.inputs, self.weights, self.gradients = [], [], []  # of each batch, after each batch, before each step

    def on_train_start(self, trainer, pl_module):
        self.start = snapshot(pl_module)
        pl_module.net.second.register_forward_pre_hook(
            lambda module, args: self.inputs.append(args[0].detach().clone()) if module.training else None
        )

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm().item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(snapshot(pl_module))


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def norm(*tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item()


def fed(metric, *batches):
    for batch in batches:
        metric.update(batch)
    return metric.compute().item()


def steps(monitor, name):
    return [step for step, _ in monitor.history[name]]


@pytest.mark.parametrize(
    ("package", "module"), [(lightning.pytorch, LightningNetwork), (pytorch_lightning, PytorchLightningNetwork)]
)
def test_measures_what_happened_in_the_step(package, module):
    monitor = PlasticityMonitor(
        [M.EffectiveRank(), M.WeightMagnitude(), M.DistanceFromInit(), M.UpdateRatio(), M.GradientNorm()],
        every_n_train_steps=4,
    )
    recorder = Recorder()
    fit(recorder, monitor, ReDo(0.5, 2), module=module, package=package)  # ReDo acts in each step that is measured
    # under the step that Lightning logs for the batch
    assert all(steps(monitor, name) == [3, 7, 11, 15] for name in ("EffectiveRank", "UpdateRatio", "GradientNorm"))
    for position, step in enumerate((3, 7, 11, 15)):
        values = {name: records[position][1] for name, records in monitor.history.items()}
        now, before = recorder.weights[step], recorder.weights[step - 1]
        moved = [now[name] - before[name] for name in now]
        matrices = torch.cat([tensor.flatten() for tensor in now.values() if tensor.ndim > 1])
        assert values["EffectiveRank"]["net.first"] == fed(M.EffectiveRank(), recorder.inputs[step])
        assert list(values["EffectiveRank"]) == ["net.first", "net.second"]
        assert values["WeightMagnitude"][""] == pytest.approx(matrices.abs().mean().item(), rel=1e-6)
        far = [now[name] - recorder.start[name] for name in now]
        assert values["DistanceFromInit"][""] == pytest.approx(norm(*far), rel=1e-6)
        assert values["UpdateRatio"][""] == pytest.approx(norm(*moved) / norm(*before.values()), rel=1e-6)
        assert values["GradientNorm"][""] == pytest.approx(recorder.gradients[step], rel=1e-6)
    by_layer = monitor.history["EffectiveRank"][-1][1]
    assert monitor.values["plasticity/EffectiveRank"] == pytest.approx(sum(by_layer.values()) / 2)
    assert monitor.values["plasticity/EffectiveRank/net.second"] == by_layer["net.second"]


def test_an_epoch_is_measured_on_its_last_two_batches():
    monitor, recorder = PlasticityMonitor([M.EffectiveRank(), M.WeightNorm()], every_n_epochs=2), Recorder()
    fit(recorder, monitor, max_epochs=5, limit_val_batches=1, val_check_interval=2)
    assert steps(monitor, "EffectiveRank") == [2 * BATCHES - 1, 4 * BATCHES - 1]
    for step, values in monitor.history["EffectiveRank"]:
        assert values["net.first"] == fed(M.EffectiveRank(), *recorder.inputs[step - 1 : step + 1])
    assert set(monitor.history["WeightNorm"][0][1]) == {"", "net.first.weight", "net.second.weight", "net.head.weight"}


def test_a_run_that_ends_in_the_middle_of_an_epoch_is_measured():
    monitor, recorder = PlasticityMonitor([M.EffectiveRank()]), Recorder()
    fit(recorder, monitor, max_steps=BATCHES + 3)
    assert steps(monitor, "EffectiveRank") == [BATCHES - 1, BATCHES + 2]
    assert monitor.values["plasticity/EffectiveRank/net.first"] == fed(M.EffectiveRank(), *recorder.inputs[-2:])


def test_accumulated_batches_are_one_step():
    monitor, recorder = PlasticityMonitor([M.EffectiveRank()], every_n_train_steps=2), Recorder()
    fit(recorder, monitor, accumulate_grad_batches=2, max_epochs=2)
    assert steps(monitor, "EffectiveRank") == [1, 3, 5]
    for position, first in enumerate((2, 6, 10)):
        value = monitor.history["EffectiveRank"][position][1]["net.first"]
        assert value == fed(M.EffectiveRank(), *recorder.inputs[first : first + 2])


def test_a_probe_batch_is_measured_as_the_network_is_after_the_step():
    metrics = [M.DormantUnits(), M.GradientCovariance(), M.TrainabilityProbe(measure="loss", budget=3)]
    monitor = PlasticityMonitor(metrics, every_n_train_steps=18, probe_batch=PAIR)
    model = fit(monitor)
    watched = fit(PlasticityMonitor(every_n_train_steps=1, probe_batch=PAIR))
    assert difference(model.state_dict(), watched.state_dict()) is None  # batch statistics, too
    model.eval()
    read = {}
    for name, user in (("net.first", model.net.second), ("net.second", model.net.head)):
        user.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0].detach()}))
    with torch.no_grad():
        model(PAIR[0])
    expected = {name: fed(M.DormantUnits(), features) for name, features in read.items()}
    assert monitor.history["DormantUnits"] == [(17, expected)]
    alone = M.GradientCovariance(), M.TrainabilityProbe(measure="loss", budget=3)
    alone[0].update(model, *PAIR)
    alone[1].update(model, PAIR[0])
    assert monitor.values["plasticity/GradientCovariance"] == pytest.approx(alone[0].compute().item(), rel=1e-6)
    assert monitor.values["plasticity/TrainabilityProbe"] == pytest.approx(alone[1].compute().item(), rel=1e-6)


def test_measuring_changes_neither_training_nor_what_methods_hear():
    metrics = [M.DeadUnits(), M.Sharpness(), M.TrainabilityProbe(measure="loss", budget=2)]
    alone = fit(ReDo(0.5, 3, seed=0))
    watched = fit(PlasticityMonitor(metrics, every_n_train_steps=1), ReDo(0.5, 3, seed=0))
    assert difference(alone.state_dict(), watched.state_dict()) is None
    assert hooks(watched) == hooks(alone)


class Images(LightningNetwork):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.net(x.view(-1, 1, 2, 3))


def test_positions_of_a_convolution_are_samples_and_other_modules_can_be_named():
    every, outputs = [], []

    class Reads(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.net[3].register_forward_pre_hook(training(lambda args: every.append(args[0].detach())))
            pl_module.net[1].register_forward_hook(
                lambda module, _, output: training(outputs.append)(module, output.detach())
            )

    def training(note):
        return lambda module, value: note(value) if module.training else None

    metrics = {"EffectiveRank": M.EffectiveRank(unit_dim=1), "DeadUnits": M.DeadUnits(unit_dim=1)}
    monitor = PlasticityMonitor(metrics, 2, layers=["net.[03]", "net.1"])
    fit(Reads(), monitor, module=Images, max_steps=2)
    ((_, values),) = monitor.history["EffectiveRank"]
    assert set(values) == {"net.0", "net.3", "net.1"}
    channels = every[1].view(-1, 5, 2)  # flattened: channel by channel, two positions each
    assert values["net.0"] == pytest.approx(fed(M.EffectiveRank(unit_dim=1), channels), rel=1e-9)
    assert values["net.1"] == pytest.approx(fed(M.EffectiveRank(unit_dim=1), outputs[1]), rel=1e-9)


def test_children_that_are_called_by_themselves_are_found():
    class Alternating(LightningNetwork):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]), batch[1])

    monitor = PlasticityMonitor([M.DeadUnits()], 2)
    fit(monitor, module=Alternating, max_steps=2)
    assert set(monitor.history["DeadUnits"][0][1]) == {"net.first", "net.second"}


# ---- nothing between scheduled times


def test_nothing_is_updated_between_scheduled_times(monkeypatch):
    updated, trainer_steps = [], []
    for metric in (M.EffectiveRank, M.WeightNorm, M.GradientNorm, M.UpdateRatio, M.GradientCovariance):
        update = metric.update

        @functools.wraps(update)  # the monitor looks at the names of the arguments
        def counted(self, *args, update=update):
            updated.append((len(trainer_steps), type(self).__name__))
            update(self, *args)

        monkeypatch.setattr(metric, "update", counted)

    class CountsSteps(Callback):
        def on_train_batch_end(self, *_):
            trainer_steps.append(None)

    metrics = {
        "rank": M.EffectiveRank(),
        "norm": M.WeightNorm(),
        "gradient": M.GradientNorm(),
        "ratio": M.UpdateRatio(),
        "batch": M.GradientCovariance(),
    }
    monitor = PlasticityMonitor(metrics, every_n_train_steps=7)
    fit(monitor, CountsSteps())
    # the reference of the update's size is taken when training starts
    assert sorted({step for step, name in updated if (step, name) != (0, "UpdateRatio")}) == [6, 13]
    assert {name for step, name in updated if step == 6} == {type(metric).__name__ for metric in metrics.values()}


def test_no_layer_has_a_hook_between_scheduled_times():
    class CountsHooks(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            counts.append(hooks(pl_module))

    counts = []
    fit(PlasticityMonitor([M.DeadUnits()], every_n_train_steps=7), CountsHooks())
    _, *others = counts  # in the first batch layers are looked for
    assert [step for step, count in enumerate(others, 1) if count] == [6, 13]
    counts.clear()
    fit(PlasticityMonitor([M.DeadUnits()], every_n_train_steps=7, probe_batch=PAIR), CountsHooks())
    assert set(counts) == {0}


# ---- compiled models


@pytest.fixture
def compiled():
    """A module whose network must compile as a whole, and the list of the compilations."""
    torch.compiler.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    model = seeded(LightningNetwork)
    model.net.compile(backend=backend, fullgraph=True, dynamic=False)
    yield model, compilations
    torch.compiler.reset()


@pytest.mark.parametrize("probe_batch", [None, PAIR])
def test_a_compiled_model_stays_whole_and_is_compiled_no_more_often(compiled, probe_batch):
    model, compilations = compiled
    monitor, uncompiled = (
        PlasticityMonitor([M.EffectiveRank()], every_n_train_steps=4, probe_batch=probe_batch) for _ in range(2)
    )
    fit(monitor, module=model)
    assert len(compilations) == 2  # one for each size of a batch
    fit(uncompiled)
    assert steps(monitor, "EffectiveRank") == [3, 7, 11, 15]
    assert monitor.history == uncompiled.history


def test_an_exception_in_a_measured_batch_leaves_the_compiler_at_work(compiled):
    class Fails(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            raise KeyError("a mistake of the user")

    model, compilations = compiled
    with pytest.raises(KeyError, match="a mistake"):
        fit(PlasticityMonitor(every_n_train_steps=1), Fails(), module=model)
    assert not compilations
    model(PAIR[0])
    assert len(compilations) == 1


# ---- checkpoints and several fits


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(tmp_path):
    def monitor():
        return PlasticityMonitor([M.DeadUnits(), M.DistanceFromInit(), M.UpdateRatio(), M.Balancedness()], 3)

    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 9:
                trainer.save_checkpoint(tmp_path / "9.ckpt")

    whole, resumed = monitor(), monitor()
    fit(whole, Saves())
    fit(resumed, ckpt_path=tmp_path / "9.ckpt")
    assert steps(whole, "DeadUnits") == [2, 5, 8, 11, 14, 17]
    assert resumed.history == whole.history


def test_the_next_fit_of_a_model_keeps_its_reference_and_another_model_has_its_own():
    monitor = PlasticityMonitor([M.DistanceFromInit()])
    recorder, again = Recorder(), Recorder()
    model = fit(recorder, monitor, max_epochs=1)
    fit(again, monitor, module=model, max_epochs=1)
    far = [again.weights[-1][name] - recorder.start[name] for name in recorder.start]
    assert monitor.values["plasticity/DistanceFromInit"] == pytest.approx(norm(*far), rel=1e-6)
    other = Recorder()
    fit(other, monitor, max_epochs=1)
    near = [other.weights[-1][name] - other.start[name] for name in other.start]
    assert monitor.values["plasticity/DistanceFromInit"] == pytest.approx(norm(*near), rel=1e-6)


def test_an_exception_leaves_no_hooks():
    class Fails(LightningNetwork):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("a mistake of the user")
            return super().training_step(batch, batch_idx)

    model, monitor = Fails(), PlasticityMonitor()
    before = hooks(model)
    with pytest.raises(KeyError, match="a mistake"):
        fit(monitor, module=model)
    assert hooks(model) == before


# ---- several ranks


class Unnormalised(LightningNetwork):
    """Without batch norm, whose statistics are each rank's own."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.net.norm = nn.Identity()


class JoinedBatches(Batches):
    def __init__(self):
        super().__init__()
        pairs = zip(Batches(0), Batches(1), strict=True)
        self._batches = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in pairs]


class AllData(Unnormalised):
    def train_dataloader(self):
        return JoinedBatches()


def rank_metrics():
    return [
        M.EffectiveRank(),
        M.DeadUnits(),
        M.WeightNorm(),
        M.DistanceFromInit(),
        M.GradientNorm(),
        M.GradientCovariance(),
    ]


class Talk(Callback):
    """Counts the messages between ranks, by training step."""

    NAMES = (
        "all_reduce",
        "all_gather",
        "all_gather_object",
        "all_gather_into_tensor",
        "barrier",
        "broadcast",
        "reduce",
    )

    def on_train_start(self, trainer, pl_module):
        self.calls, self.step = [], 0
        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self.originals.items():
            setattr(dist, name, self.noted(name, function))

    def noted(self, name, function):
        def call(*args, **kwargs):
            self.calls.append((self.step, name))
            return function(*args, **kwargs)

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_end(self, trainer, pl_module):
        for name, function in self.originals.items():
            setattr(dist, name, function)


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "monitor",  # tells Lightning that the processes are there
    }
    options = {
        "module": Unnormalised,
        "devices": 2,
        "strategy": "ddp",
        "precision": "64-true",
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    monitor, talk, probe, without = PlasticityMonitor(rank_metrics(), 5), Talk(), Talk(), Talk()
    fit(monitor, talk, logger=lightning.pytorch.loggers.CSVLogger(folder, name="", version="logs"), **options)
    fit(PlasticityMonitor([M.DeadUnits()], 5, probe_batch=PAIR), probe, **options)
    fit(without, **options)  # the Trainer and DDP talk in every step
    model = seeded(Unnormalised).double()
    optimizer, plainly = adam(model.parameters()), PlasticityMonitor(rank_metrics(), 5)
    plainly.attach(model, optimizer)
    for x, y in [*Batches(rank), *Batches(rank)]:
        optimizer.zero_grad()
        cross_entropy(model(x.double()), y).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
        plainly.step(batch=(x.double(), y))
    calls = {"talk": talk.calls, "probe": probe.calls, "without": without.calls}
    torch.save({"history": monitor.history, "plainly": plainly.history, **calls}, folder / f"{rank}.pt")


def test_two_processes_measure_what_one_measures_on_all_data(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = PlasticityMonitor(rank_metrics(), 5)
    fit(alone, module=AllData, precision="64-true", max_epochs=2)
    assert first["history"] == second["history"]
    assert first["plainly"] == second["plainly"]
    for name, records in first["history"].items():
        for (step, expected), (its_step, values) in zip(records, first["plainly"][name], strict=True):
            assert its_step == step
            assert values == pytest.approx(expected, rel=1e-6)
    assert set(first["history"]) == set(alone.history)
    for name, records in alone.history.items():
        assert [step for step, _ in records] == [4, 9]
        for (step, expected), (its_step, values) in zip(records, first["history"][name], strict=True):
            assert its_step == step
            assert values == pytest.approx(expected, rel=1e-6)
    for rank in (first, second):
        # In the first step they compare the layers that they found.
        assert [call for call in rank["talk"] if call[0] not in (0, 4, 9)] == [
            call for call in rank["without"] if call[0] not in (0, 4, 9)
        ]
        assert len(rank["talk"]) > len(rank["without"])
        assert rank["probe"] == rank["without"]
    with open(tmp_path / "logs" / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "9"]  # by one of the ranks


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": None}, "when to measure"),
        ({"every_n_train_steps": 0}, "every_n_train_steps must be a whole number, at least 1,"),
        ({"every_n_train_steps": 3, "every_n_epochs": 2}, "Only one of"),
        ({"metrics": []}, "at least one metric"),
        ({"metrics": M.DeadUnits()}, "a list of metrics, a dict"),
        ({"metrics": [M.DeadUnits]}, "'ABCMeta' is of type ABCMeta"),
        ({"metrics": [M.DeadUnits(), M.DeadUnits(0.1)]}, "DeadUnits stands there more than once"),
        ({"metrics": [MeanSquaredError()]}, r"takes \(preds, target\)"),
        ({"metrics": [M.WeightNorm()], "layers": "net.0"}, "needs a metric that measures features"),
        ({"metrics": [M.Sharpness()], "probe_batch": PAIR[0]}, "pairs of them, got Tensor"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlasticityMonitor(**arguments)


class WithoutForward(LightningNetwork):
    forward = lightning.pytorch.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])


class Linear(LightningNetwork):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)


class TwoNumbers(M.WeightMagnitude):
    def compute(self):
        return torch.zeros(2)


class ReturnsTuple(LightningNetwork):
    def __init__(self):
        super().__init__()
        self.net = nn.LSTM(6, 3)

    def forward(self, x):
        return self.net(x)[0]


@pytest.mark.parametrize("probe_batch", [None, PAIR[0]])
def test_a_line_says_which_layers_are_read(caplog, probe_batch):
    with caplog.at_level(logging.INFO):
        fit(PlasticityMonitor([M.EffectiveRank()], every_n_train_steps=3, probe_batch=probe_batch), max_epochs=1)
    lines = [record.getMessage() for record in caplog.records if "PlasticityMonitor" in record.getMessage()]
    assert lines == ["PlasticityMonitor reads the features of 2 layers: 'net.first', 'net.second'."]


def test_a_model_without_hidden_layers_is_measured_without_them() -> None:
    monitor = PlasticityMonitor([M.EffectiveRank(), M.WeightNorm()], every_n_train_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # Lightning's own among them
        fit(monitor, module=Linear)
    said = [str(warning.message) for warning in caught if "need hidden layers" in str(warning.message)]
    assert len(said) == 1
    assert "but none was found: these measures are left out" in said[0]
    assert "WeightNorm" in monitor.history
    assert "EffectiveRank" not in monitor.history


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (LightningNetwork, {"module": "nets"}, "module= must name a module of LightningNetwork, got 'nets'"),
        (LightningNetwork, {"layers": ["net.second", "third"]}, "nothing has the name or pattern 'third'"),
        (LightningNetwork, {"metrics": [TwoNumbers()]}, r"must give one number, but that of 'TwoNumbers' gives \(2,\)"),
        (WithoutForward, {"probe_batch": PAIR[0]}, "WithoutForward cannot be called with probe_batch"),
        (ReturnsTuple, {"layers": "net"}, "'net' returns tuple"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(PlasticityMonitor(**{"every_n_train_steps": 1} | arguments), module=module)


def test_sharded_weights_are_refused():
    model = LightningNetwork()
    model.net.head.weight.ds_id = 0
    with pytest.raises(RuntimeError, match="sharded"):
        fit(PlasticityMonitor(), module=model)


def test_a_model_without_hidden_units_can_be_measured_by_its_weights():
    monitor = PlasticityMonitor([M.WeightNorm()])
    fit(monitor, module=Linear, max_epochs=1)
    assert set(monitor.values) == {"plasticity/WeightNorm", "plasticity/WeightNorm/net.weight"}


def test_two_monitors_with_schedules_of_their_own():
    """They measure what each measures alone, and go on from one checkpoint; the same name twice is refused."""

    def monitors():
        by_step = PlasticityMonitor([M.EffectiveRank(), M.WeightNorm()], every_n_train_steps=4)
        by_epoch = PlasticityMonitor({"rank at the end": M.EffectiveRank()}, module="net")
        return [by_step, by_epoch]

    both = monitors()
    model = fit(*both)
    for together, alone in zip(both, monitors(), strict=True):
        assert difference(dict(fit(alone).state_dict()), dict(model.state_dict())) is None
        assert together.history == alone.history
    assert len({monitor.state_key for monitor in both}) == 2
    with pytest.raises(ValueError, match=r"but two would log 'WeightNorm'\. Name them in one of the two"):
        fit(both[0], PlasticityMonitor([M.WeightNorm()], every_n_train_steps=3))


def test_layers_that_are_called_by_keyword() -> None:
    class ByKeyword(LightningNetwork):
        def forward(self, x):
            for layer in self.net:
                x = layer(input=x)
            return x

    monitor, other = (PlasticityMonitor(every_n_train_steps=2) for _ in range(2))
    fit(monitor, module=ByKeyword)
    fit(other)
    assert_same(monitor.history, other.history)
