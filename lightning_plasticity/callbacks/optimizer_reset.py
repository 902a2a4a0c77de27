"""Optimizer reset: at a boundary, the optimizer forgets."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.editing.optimizer_reset import Memory, reset_optimizer
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback
from lightning_plasticity.notices import warn


class OptimizerReset(ScheduledCallback):
    r"""Optimizer reset: at a boundary, such as a new task, puts what the optimizer remembers back to its start.

    The weights stay, and so do the optimizer's settings, its groups and learning-rate schedules. It works in place,
    with any optimizer whose state has the shape of the weights, and with ``what="all"`` also with others.

    ============= ============================================================== =================
    ``what``      put back                                                       published
    ============= ============================================================== =================
    ``"all"``     everything                                                     Asadi et al. 2023
    ``"step"``    Adam's count of steps: its averages are corrected as if they   Ellis et al. 2024
                  had just begun, which keeps steps small when gradients jump    (Adam-Rel)
    ``"moments"`` the averages, not the count: Adam's next steps are up to 6.6
                  times as large as usual, for it takes its averages for settled
    ============= ============================================================== =================

    Asadi et al. reset at each update of the target network, Ellis et al. at that or at each new rollout. To clear
    everything can be too much where the data change little by little.

    Args:
        what: ``"all"``, ``"step"`` or ``"moments"``.
        every_n_epochs: act after every so many epochs, when the next one begins.
        every_n_train_steps: act after every so many optimizer steps.
        on_fit_start: act once when a fit starts, if it does not go on from a checkpoint in which that was done.
        module: the name of the module inside the model whose parameters count; None for all of it.
        exclude: patterns (as in ``fnmatch``) of names of parameters whose state stays.
        optimizer_state: accepted as by all methods; only ``"reset"`` makes sense.
        seed: accepted as by all methods; nothing is drawn.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> method = OptimizerReset(every_n_train_steps=2).attach(model, optimizer)
        >>> for _ in range(2):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        ...     method.step()
        >>> optimizer.state[model.weight]
        {'step': tensor(0.), 'exp_avg': tensor([[0., 0.]]), 'exp_avg_sq': tensor([[0., 0.]])}

    References:
        Asadi, Fakoor, Sabach, NeurIPS 2023, arXiv 2306.17833; Ellis et al., NeurIPS 2024, arXiv 2412.17113.
    """

    works_on_parts = True

    def __init__(
        self,
        what: Memory = "all",
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        on_fit_start: bool = False,
        module: str | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "reset",
        seed: int | None = None,
    ) -> None:
        schedule = Schedule(every_n_train_steps, every_n_epochs, on_fit_start)
        super().__init__(schedule, module=module, optimizer_state=optimizer_state, seed=seed)
        if optimizer_state != "reset":
            raise ValueError(
                f"OptimizerReset needs optimizer_state='reset', for it does nothing else, got {optimizer_state!r}. "
                "Leave it out."
            )
        self.what: Memory = checks.choice("what", what, get_args(Memory))
        self.exclude = checks.words("exclude", exclude)
        self.resets = 0
        self._named: dict[str, nn.Parameter] = {}
        self._has_warned = False

    @override
    def _start(self) -> None:
        if not self.optimizers:
            raise ValueError("OptimizerReset needs the optimizer. Give it to attach(model, optimizer).")
        self._named = {
            self.prefix + name: parameter
            for name, parameter in self.scope.named_parameters()
            if not any(fnmatchcase(self.prefix + name, pattern) for pattern in self.exclude)
        }
        due = self._due()
        if not any(id(parameter) in due for parameter in self._named.values()):
            raise ValueError(
                f"OptimizerReset needs parameters that the optimizer trains, but none is left (module={self.module!r}, "
                f"exclude={self.exclude!r}). Name another part of the model with module=, or exclude less."
            )
        self.resets = 0

    @override
    def _act(self) -> None:
        optimizers = self.optimizers if self._stepped_last is None else [self._stepped_last]
        found = [reset_optimizer(optimizer, self._named.values(), self.what) for optimizer in optimizers]
        self.resets += 1
        if not any(found) and self.optimizer_steps and not self._has_warned:
            self._has_warned = True
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            warn(
                f"OptimizerReset(what={self.what!r}) found nothing to reset: {names} keeps nothing of that kind. "
                "Use what='all', or leave the method out for this optimizer."
            )

    @override
    def _works_on(self) -> str:
        return f"the optimizer's state of {len(self._named)} parameters."

    @override
    def _stop(self) -> None:
        self._named = {}

    @override
    def _state(self) -> dict[str, Any]:
        return super()._state() | {"resets": self.resets}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.resets = state["resets"]

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        return {"resets": self.resets}
