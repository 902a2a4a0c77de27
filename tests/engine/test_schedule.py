"""When scheduled methods act: in a Trainer, in a plain loop, and over fits and checkpoints."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback

BATCHES = 3


class Notes(ScheduledCallback):
    """Writes down after how many optimizer steps it acted."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.acted: list[int] = []
        self.epochs: list[int] = []  # in which it did

    @override
    def _start(self) -> None:
        pass

    @override
    def _works_on(self) -> str:
        return "nothing."

    @override
    def _act(self) -> None:
        assert not torch.is_grad_enabled()
        self.acted.append(self.optimizer_steps)
        if self._trainer is not None:
            self.epochs.append(self._trainer.current_epoch)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(2 * BATCHES, 2)), batch_size=2)


def trainer(*callbacks, epochs=6, **settings) -> Trainer:
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


def fit(method: Notes, model=None, ckpt_path=None, **settings) -> Trainer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")
        warnings.filterwarnings("ignore", ".*number of training batches.*")
        used = trainer(method, **settings)
        used.fit(model or Model(), ckpt_path=ckpt_path)
    return used


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(every_n_train_steps=4), [4, 8, 12, 16]),
        (Schedule(every_n_epochs=1), [3, 6, 9, 12, 15]),  # not at the end, where nothing would follow
        (Schedule(every_n_epochs=2), [6, 12]),
        (Schedule(on_fit_start=True), [0]),
        (Schedule(every_n_epochs=4, on_fit_start=True), [0, 12]),
    ],
)
def test_when_it_acts(schedule, expected):
    method = Notes(schedule)
    fit(method)
    assert method.acted == expected


def test_steps_are_real_ones():
    method = Notes(Schedule(every_n_train_steps=2))
    fit(method, accumulate_grad_batches=3)
    assert method.acted == [2, 4, 6]


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_resumed_fit_goes_on_as_if_it_had_not_stopped(stop, tmp_path):
    schedule = Schedule(every_n_epochs=2, on_fit_start=True)
    whole, first, second = Notes(schedule), Notes(schedule), Notes(schedule)
    fit(whole)
    used = fit(first, max_steps=stop * BATCHES - 1)  # in the middle of an epoch
    used.save_checkpoint(tmp_path / "checkpoint")
    fit(second, ckpt_path=tmp_path / "checkpoint")
    # In epochs, for what of an interrupted one is still to come depends on the loader.
    assert first.epochs + second.epochs == whole.epochs == [0, 2, 4]


def test_every_fit_starts_anew():
    method, model = Notes(Schedule(every_n_epochs=2, on_fit_start=True)), Model()
    fit(method, model, epochs=3)
    fit(method, model, epochs=3)
    assert method.acted == [0, 6, 9, 15]


def test_a_plain_loop():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Notes(Schedule(every_n_train_steps=2, on_fit_start=True)).attach(model, optimizer)
    for _ in range(5):
        model(torch.randn(1, 2)).sum().backward()
        optimizer.step()
        method.step()
    assert method.acted == [0, 2, 4]
    resumed = Notes(method.schedule)
    resumed.load_state_dict(method.state_dict())
    method.detach()
    resumed.attach(model, optimizer)
    model(torch.randn(1, 2)).sum().backward()
    optimizer.step()
    resumed.step()
    assert resumed.acted == [6]


def test_each_optimizer_has_its_own_count():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    due = []

    class NotesParameters(Notes):
        def _act(self) -> None:
            due.append([id(parameter) in self._due() for parameter in model.parameters()])

    method = NotesParameters(Schedule(every_n_train_steps=2)).attach(model, optimizers)
    for i in (0, 1, 1, 0):
        model(torch.randn(1, 2)).sum().backward()
        optimizers[i].step()
        method.step()
    assert due == [[False, False, True, True], [True, True, False, False]]


def test_epochs_need_a_trainer():
    with pytest.raises(ValueError, match="every_n_epochs needs a Trainer"):
        Notes(Schedule(every_n_epochs=1)).attach(nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "It must be said when to act"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a whole number, at least 1, got 0"),
        ({"every_n_train_steps": 1.5}, "every_n_train_steps must be a whole number, at least 1, got 1.5"),
        ({"every_n_epochs": 1, "every_n_train_steps": 1}, "Only one of every_n_train_steps and every_n_epochs"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)
