"""When a method acts that does not act after every step."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_plasticity import checks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.examination import Question
from lightning_plasticity.shards.modules import shard_again


@dataclass(frozen=True)
class Schedule:
    """When to act, named as in Lightning's ``ModelCheckpoint``.

    Args:
        every_n_train_steps: After every so many real optimizer steps.
        every_n_epochs: After every so many epochs. Needs a Trainer.
        on_fit_start: Once, when fitting starts.

    Raises:
        ValueError: If a number is not a positive integer, both numbers are given, or nothing is.

    Example:
        >>> schedule = Schedule(every_n_train_steps=100)
        >>> schedule.due_after_step(100), schedule.due_after_step(101)
        (True, False)
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    on_fit_start: bool = False

    def __post_init__(self) -> None:
        for name in ("every_n_train_steps", "every_n_epochs"):
            value = getattr(self, name)
            # the class is frozen for others
            object.__setattr__(self, name, checks.optional(checks.count, name, value, least=1))
        checks.flag("on_fit_start", self.on_fit_start)
        if self.every_n_train_steps is not None and self.every_n_epochs is not None:
            raise ValueError(
                "Only one of every_n_train_steps and every_n_epochs may be given, "
                f"got {self.every_n_train_steps} and {self.every_n_epochs}."
            )
        if self.every_n_train_steps is None and self.every_n_epochs is None and not self.on_fit_start:
            raise ValueError(
                "It must be said when to act, and nothing was given. "
                "Set every_n_train_steps, every_n_epochs or on_fit_start=True."
            )

    def due_after_step(self, optimizer_steps: int) -> bool:
        """Whether to act when this many optimizer steps have been made."""
        return self.every_n_train_steps is not None and optimizer_steps % self.every_n_train_steps == 0

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether to act when the epoch of this number, counted from 0, has been completed."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0


class ScheduledCallback(PlasticityCallback):
    """Base of the methods that act at boundaries.

    What is due after an epoch happens when the first batch of the next one arrives: what a checkpoint holds at the end
    of an epoch is then what was validated, and training never ends with an edit that nothing follows. What is due when
    fitting starts happens in every fit, except in one that goes on from a checkpoint in which it has happened. In a
    plain loop fitting starts with ``attach``; to go on from a checkpoint there, call ``load_state_dict`` before it. Of
    several optimizers each has its own count of steps, for the parameters that it trains.

    Args:
        schedule: when to act.
        module: see :class:`PlasticityCallback`, as for all that follow.
        optimizer_state: what happens to the optimizer state of what is written.
        seed: of the method's own draws.
        question: what must be known of the parts that training calls.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        module: str | None = None,
        optimizer_state: OptimizerState = "reset",
        seed: int | None = None,
        question: Question | None = None,
    ) -> None:
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed, question=question)
        self.schedule = schedule
        self._resumes = False
        self._last_epoch: int | None = None  # the last one after which it has acted
        self._steps: list[int] = []  # of each optimizer
        self._stepped_last: Optimizer | None = None  # the one whose step is the reason to act

    @abstractmethod
    def _act(self) -> None:
        """Does, without gradients, what the method does each time it is due, to the parameters of ``_due``."""

    def _due(self) -> set[int]:
        """The ids of the trained parameters concerned: those of the optimizer that is the reason to act, or of all."""
        optimizers = self.optimizers if self._stepped_last is None else [self._stepped_last]
        groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
        parameters = itertools.chain(*groups) if self.optimizers else self.scope.parameters()
        return {id(parameter) for parameter in parameters if parameter.requires_grad}

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        which = 0 if optimizer is None else self.optimizers.index(optimizer)
        self._steps[which] += 1
        if self.schedule.due_after_step(self._steps[which]):
            self._stepped_last = optimizer
            self._act()
            self._stepped_last = None

    @torch.no_grad()
    def _start_fitting(self) -> None:
        if not self._resumes:
            self._last_epoch = None
            if self.schedule.on_fit_start:
                self._act()
        self._resumes = False

    @override
    def _attach(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        given = list(optimizers)
        self._steps = [0] * max(len(given), 1)
        super()._attach(model, given)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start_fitting()  # not in on_fit_start, after which the Trainer loads the optimizers' state

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not in on_train_epoch_start, which a resumed Trainer may skip.
        completed = trainer.current_epoch - 1
        if completed >= 0 and completed != self._last_epoch and self.schedule.due_after_epoch(completed):
            self._last_epoch = completed
            shard_again(self._sharded)
            with torch.no_grad():
                self._act()

    @override
    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> Self:
        if self.schedule.every_n_epochs is not None:
            raise ValueError(
                f"every_n_epochs needs a Trainer, which counts epochs, got {type(self).__name__}.attach() with "
                f"every_n_epochs={self.schedule.every_n_epochs}. Use every_n_train_steps in a plain loop."
            )
        super().attach(model, optimizer, example_inputs)
        self._start_fitting()
        return self

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict and (self._is_interrupted or not self._ready):
            self._resumes = True
        super().load_state_dict(state_dict)

    @override
    def _state(self) -> dict[str, Any]:
        return {"last_epoch": self._last_epoch, "steps": list(self._steps)}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        self._last_epoch = state["last_epoch"]
        self._steps = list(state["steps"])
