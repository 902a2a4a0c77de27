"""How old each entry of a parameter is for an Adam that counts steps by tensor: what a cleared entry needs besides."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_plasticity.shards import local

AGE = "age"  # in the optimizer's state of a parameter, so that its checkpoints have it; infinite: as old as the tensor
_FOLLOWERS: WeakKeyDictionary[Optimizer, list[Follower]] = WeakKeyDictionary()


class Follower:
    r"""Lets entries that are renewed begin as with a fresh optimizer, if this one is an Adam or AdamW.

    Adam divides its averages by how much has come into them since they began at 0, :math:`1 - \beta^t`, with one count
    :math:`t` for the tensor. So each step of a younger entry is made up for, right after it: what Adam has taken off is
    given back, and what it would have taken off with the entry's own count is taken off. Nothing is copied, and the
    form of the optimizer (fused, foreach) does not matter. Of several followers of one optimizer the first does this.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._handle: RemovableHandle | None = None
        self._all: list[Follower] = []
        if type(optimizer) in (Adam, AdamW):
            self._all = _FOLLOWERS.setdefault(optimizer, [])
            self._all.append(self)
            self._handle = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Leaves the optimizer alone. Ages stay in its state, for whoever follows it next."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._all.remove(self)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._all[0] is self:
            _make_up(optimizer)


def count_ages(optimizer: Optimizer, parameter: Tensor) -> None:
    """Begin to count for a parameter, before entries of it are renewed: renewing sets their ages to 0."""
    state = optimizer.state.get(parameter, {})
    if _FOLLOWERS.get(optimizer) and "step" in state and AGE not in state:
        state[AGE] = torch.full_like(parameter, torch.inf, dtype=torch.promote_types(parameter.dtype, torch.float32))


@torch.no_grad()
def _make_up(optimizer: Optimizer) -> None:
    found_inf = getattr(optimizer, "found_inf", None)
    if isinstance(found_inf, Tensor) and bool(found_inf.any()):
        return  # a fused optimizer under a gradient scaler skips inside its kernel
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if AGE in state and parameter.grad is not None:
                _make_up_for(parameter, state, group)


def _make_up_for(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    state[AGE] = state[AGE].to(wide).add_(1)  # a loaded state has the parameter's type
    second = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    first, second, age = (local(of_entries).to(wide) for of_entries in (state["exp_avg"], second, state[AGE]))
    step = torch.as_tensor(state["step"]).to(parameter.device, wide)
    second = second.sqrt()
    surplus = _step(first, second, step, group) - _step(first, second, age, group)
    local(parameter).add_(torch.where(age.isfinite(), surplus, 0.0).mul_(group["lr"]).to(parameter.dtype))


def _step(first: Tensor, second: Tensor, count: Tensor, group: dict[str, Any]) -> Tensor:
    """How many learning rates Adam takes off an entry of this count."""
    beta1, beta2 = group["betas"]
    taken_off: Tensor = first / _filled(beta1, count) / (second / _filled(beta2, count).sqrt() + group["eps"])
    return taken_off


def _filled(beta: float | Tensor, count: Tensor) -> Tensor:
    """How much of an average has come into it: ``1 - beta**count``, exactly also where that is small."""
    rate = math.log(beta) if beta else -math.inf
    return torch.expm1(count * rate).neg_()
