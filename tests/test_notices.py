"""Warnings name the line of the program that led to them."""

import warnings
from collections.abc import Callable
from inspect import currentframe
from types import FunctionType
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_plasticity import OptimizerReset
from lightning_plasticity.notices import warn, warn_on_rank_zero


def inside(module: str, function: FunctionType, *defaults: Any) -> FunctionType:
    """The function, as if it had been written in a module, with values for arguments that it is not given."""
    return FunctionType(function.__code__, {"__name__": module}, None, defaults)


def says(warns: Callable[[str], None]) -> None:
    warns("look here")


def calls(function: Callable[[], None]) -> None:
    function()


@pytest.mark.parametrize("warns", [warn, warn_on_rank_zero])
def test_frameworks_are_passed_over(warns: Callable[[str], None]) -> None:
    ours, through_torch = inside("lightning_plasticity.engine.loop", says, warns), inside("torch.optim", calls)
    with pytest.warns(UserWarning, match="look here") as said:
        through_torch(ours)
    line = currentframe().f_lineno - 1
    assert [(warning.filename, warning.lineno) for warning in said] == [(__file__, line)]
    with pytest.warns(UserWarning, match="look here") as said:
        through_torch(inside("torchlike.own", says, warns))
    assert [(warning.filename, warning.lineno) for warning in said] == [(__file__, says.__code__.co_firstlineno + 1)]


def test_what_is_so_on_all_ranks_is_said_by_the_first(monkeypatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_on_rank_zero("look here")
    with pytest.warns(UserWarning, match="look here"):
        warn("look here")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_in_a_trainer_it_is_the_line_that_calls_fit(tmp_path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[OptimizerReset(every_n_train_steps=1)],
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(Module(), torch.ones(2, 3))
    ours = [warning for warning in said if "found nothing to reset" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]
