"""Stop and resume anywhere: the same run, bit for bit, as never stopping."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn.functional import cross_entropy

from contract.cases import Case

from .test_loops import CallsChildren, Fails
from .training import (
    BATCHES,
    EPOCHS,
    Batches,
    LightningNetwork,
    Network,
    adam,
    assert_same,
    every_case,
    fit,
    hooks,
    seeded,
    weights,
)

STEPS = FIRST, MID_EPOCH, EPOCH_END = 1, BATCHES + 2, 2 * BATCHES
everywhere = pytest.mark.parametrize("step", STEPS)


class Saves(Callback):
    """Saves a checkpoint after some steps. (Lightning asks for a `ModelCheckpoint` of a run again when it resumes.)"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in STEPS:
            trainer.save_checkpoint(checkpoint(self.folder, trainer.global_step))


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"{step}.ckpt"


@everywhere
@every_case
def test_resume(case: Case, step: int, tmp_path: Path) -> None:
    method = case.make()
    model = fit(method, Saves(tmp_path))
    torch.manual_seed(1)  # another process has another random state
    resumed = case.make()
    other = fit(resumed, module=lambda: LightningNetwork(), ckpt_path=checkpoint(tmp_path, step))
    assert_same(weights(other), weights(model))
    assert_same(resumed.state_dict(), method.state_dict())


@everywhere
@every_case
def test_resume_where_children_are_called_one_by_one(case: Case, step: int, tmp_path: Path) -> None:
    method, resumed = case.make(), case.make()
    model = fit(method, Saves(tmp_path), module=CallsChildren)
    other = fit(resumed, module=CallsChildren, ckpt_path=checkpoint(tmp_path, step))
    assert_same(weights(other), weights(model))
    assert_same(resumed.state_dict(), method.state_dict())


@every_case
def test_saving_changes_nothing(case: Case, tmp_path: Path) -> None:
    method, saved = case.make(), case.make()
    often = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    assert_same(weights(fit(saved, often)), weights(fit(method)))
    assert_same(saved.state_dict(), method.state_dict())
    last = torch.load(tmp_path / f"step={EPOCHS * BATCHES}.ckpt", weights_only=True)
    assert_same(last["callbacks"][saved.state_key], saved.state_dict())


class RestoresLate(SingleDeviceStrategy):
    """Loads the checkpoint after `on_fit_start`, as DeepSpeed and FSDP do."""

    restore_checkpoint_after_setup = True


@every_case
def test_resume_with_a_strategy_that_restores_late(case: Case, tmp_path: Path) -> None:
    method, resumed = case.make(), case.make()
    model = fit(method, Saves(tmp_path))
    other = fit(resumed, ckpt_path=checkpoint(tmp_path, MID_EPOCH), strategy=RestoresLate("cpu"))
    assert_same(weights(other), weights(model))
    assert_same(resumed.state_dict(), method.state_dict())


class SavesEarly(Callback):
    """Saves before the first step of each fit."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.path.exists():
            trainer.save_checkpoint(self.path)

    def __init__(self, path: Path) -> None:
        self.path = path


@every_case
def test_resume_from_a_checkpoint_saved_right_after_resuming(case: Case, tmp_path: Path) -> None:
    """Before its first step a resumed run has examined nothing: what it saves is what it was given."""
    method, again = case.make(), case.make()
    model = fit(method, Saves(tmp_path))
    early = tmp_path / "early.ckpt"
    fit(case.make(), SavesEarly(early), ckpt_path=checkpoint(tmp_path, EPOCH_END))
    other = fit(again, ckpt_path=early)
    assert_same(weights(other), weights(model))
    assert_same(again.state_dict(), method.state_dict())


@pytest.mark.filterwarnings("ignore:..fit.ckpt_path=None.. was called without a model:UserWarning")
@pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint:UserWarning')
@every_case
def test_a_checkpoint_saved_on_an_exception_is_complete(case: Case, tmp_path: Path) -> None:
    method = case.make()
    model = seeded(Fails)
    with pytest.raises(ZeroDivisionError):
        fit(method, OnExceptionCheckpoint(tmp_path, "stopped"), module=model)
    assert hooks(model) == 0
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["callbacks"][method.state_key]
    stopped = case.make()
    fit(stopped, max_steps=10)
    assert_same(saved, stopped.state_dict())


def train_some(model: Network, optimizer: Any, method: Any, stream: list) -> None:
    for x, y in stream:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        method.step()


@pytest.mark.parametrize("order", ["load, attach", "attach, load", "attach with an example, load"])
@every_case
def test_resume_a_plain_loop(case: Case, order: str, tmp_path: Path) -> None:
    stream = [*Batches(), *Batches()]
    model = seeded(Network)
    optimizer = adam(model.parameters())
    method = case.make().attach(model, optimizer)
    train_some(model, optimizer, method, stream[:7])
    parts = {"model": model, "optimizer": optimizer, "method": method}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "saved.pt")
    train_some(model, optimizer, method, stream[7:])

    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = case.make()
    other = seeded(Network, seed=1)
    other_optimizer = adam(other.parameters())
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    if order == "load, attach":
        resumed.load_state_dict(loaded["method"])
    example = (stream[0][0],) if "example" in order else None
    resumed.attach(other, other_optimizer, example_inputs=example)
    if order != "load, attach":
        resumed.load_state_dict(loaded["method"])
    train_some(other, other_optimizer, resumed, stream[7:])
    assert_same(weights(other), weights(model))
    assert_same(resumed.state_dict(), method.state_dict())


@every_case
def test_state_is_a_copy(case: Case) -> None:
    """A state that was read does not change when training goes on."""
    model = seeded(Network)
    optimizer = adam(model.parameters())
    method = case.make().attach(model, optimizer)
    train_some(model, optimizer, method, list(Batches()))
    state = method.state_dict()
    before = copy.deepcopy(state)
    train_some(model, optimizer, method, list(Batches()))
    assert_same(state, before)
