"""What a method defines."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_plasticity.engine.examination import Part
from lightning_plasticity.units.calls import ForwardCall


class Method:
    """What :class:`.PlasticityCallback` asks of a method, in the order in which it is asked.

    Only ``_start``, ``_works_on`` and ``_after_step`` must be defined.

    Attributes:
        works_on_parts: whether the method works where parameters are shared out among ranks (FSDP2, tensor
            parallelism), so that each has a part of them: see ``shards``. Others refuse such models.
    """

    works_on_parts: bool = False

    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        """Learns of a part of the model that training calls for the first time, before the call goes on.

        Hooks that are set here hear that call already: before ``_start`` or ``_grow`` and ``_restore``, which must not
        lose it. Without a ``call`` the part was called before, or on another rank.
        """

    def forget_parts(self) -> None:
        """Forgets what ``hear_of`` told and removes the hooks that were set there: all of it will be told anew."""

    @abstractmethod
    def _start(self) -> None:
        """Prepares the method's state: the model has its initial weights (or, on resume, those of the checkpoint).

        Methods with a question are called once a part of the model has been examined, before the first step.
        """

    @abstractmethod
    def _works_on(self) -> str:
        """What the method works on, in a few words, for the line that is logged when it starts."""

    def _grow(self) -> None:
        """Begins to work on the parts that were called for the first time since ``_start`` or the last ``_grow``."""

    @abstractmethod
    def _after_step(self, optimizer: Optimizer | None) -> None:
        """Acts after one real step of ``optimizer`` (None in a loop that has none).

        Where there are several optimizers it had better write only to what this one trains: the backward pass of a loss
        of the others may be still to come.
        """

    def _skipped(self) -> None:
        """Forgets what was heard since the last step: no step follows it."""

    def _numbers(self) -> dict[str, Tensor | float]:
        """What to log, by name; read at the Trainer's logging interval only."""
        return {}

    def _state(self) -> dict[str, Any]:
        """All that the method must remember, besides its settings, equal on every rank: all ranks call it together.

        It changes nothing, so that a run goes on alike whether it was saved or not. What differs from rank to rank goes
        through ``gather_over_ranks``.
        """
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        """Takes back what ``_state`` gave; called after ``_start``."""

    def _stop(self) -> None:
        """Lets go of the model. The hooks given to ``keep`` are gone; ``hear_of`` and ``_start`` may follow again."""
