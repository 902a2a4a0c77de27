"""How old each entry of a parameter is, for optimizers that count steps by tensor: what cleared entries need also."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam
from torch.utils.hooks import RemovableHandle

from lightning_plasticity.shards.tensors import local

AGE = "age"  # in the optimizer's state of a parameter, so that its checkpoints have it; infinite: as old as the tensor


def _filled(beta: float, counts: Tensor) -> Tensor:
    """How much of an average has come into it since it began at 0."""
    return -torch.expm1(counts * math.log(beta)) if beta else torch.ones_like(counts)


def _of_adam(counts: Tensor, beta1: float, beta2: float, _: float) -> Tensor:
    return _filled(beta2, counts).sqrt() / _filled(beta1, counts)


def _of_adamax(counts: Tensor, beta1: float, *_: float) -> Tensor:
    return 1 / _filled(beta1, counts)


def _of_nadam(counts: Tensor, beta1: float, beta2: float, momentum_decay: float) -> Tensor:
    share, following = (beta1 * (1 - 0.5 * 0.96 ** (c * momentum_decay)) for c in (counts, counts + 1))
    product = share.cumprod(0)
    of_gradient, of_momentum = (1 - share) / (1 - product), following / (1 - product * following)
    return _filled(beta2, counts).sqrt() * (of_gradient + of_momentum * _filled(beta1, counts))


def _of_radam(counts: Tensor, beta1: float, beta2: float, _: float) -> Tensor:
    at_last = 2 / (1 - beta2) - 1
    length = at_last - 2 * counts * beta2**counts / _filled(beta2, counts)
    rectified = (length - 4) * (length - 2) * at_last / ((at_last - 4) * (at_last - 2) * length)
    # It divides by sizes of gradients only then. Not 0, so that ratios of such steps are numbers.
    return torch.where(length > 5, rectified.sqrt() * _of_adam(counts, beta1, beta2, _), 1e-30)


_Formula = Callable[[Tensor, float, float, float], Tensor]
# For each count of steps how far the optimizer goes, with averages of gradients that began at 0 and a gradient that
# stays the same, in units that do not matter: from counts, both betas, and what NAdam has besides.
_STEP_SIZES: dict[type[Optimizer], _Formula] = {
    Adam: _of_adam,
    AdamW: _of_adam,
    Adamax: _of_adamax,
    NAdam: _of_nadam,
    RAdam: _of_radam,
}
_FOLLOWED: WeakKeyDictionary[Optimizer, _Followed] = WeakKeyDictionary()


class Follower:
    r"""Lets entries that are renewed begin as with a fresh optimizer, if this one is known to count steps by tensor.

    Such optimizers make up for averages that began at 0, by a factor :math:`f(t)` that depends on the count of steps
    :math:`t` alone: Adam's is :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`. An entry that began anew later has age
    :math:`a`, and so each of its steps is multiplied by :math:`f(a) / f(t)`, right after the optimizer has taken it.
    The form of the optimizer (fused, foreach, capturable) does not matter, and only tensors with such entries cost
    anything: a copy of them during the step, and an age for each entry. After :math:`10 / (1 - \beta)` steps, with the
    larger :math:`\beta`, the factor is 1 up to 0.00003, and an entry as old as the tensor.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._followed: _Followed | None = None
        formula = _formula(optimizer)
        if formula is not None:
            self._followed = _FOLLOWED.get(optimizer) or _Followed(optimizer, formula)
            self._followed.followers.append(self)

    def remove(self) -> None:
        """Leaves the optimizer alone. Ages stay in its state, for whoever follows it next."""
        if self._followed is not None:
            self._followed.leave(self)
            self._followed = None


class _Followed:
    """What all followers of an optimizer share: each step is made up for once."""

    def __init__(self, optimizer: Optimizer, formula: _Formula) -> None:
        _FOLLOWED[optimizer] = self
        self._formula = formula
        self.followers: list[Follower] = []
        self.steps_since_renewal: dict[Tensor, int] = {}
        self._before: dict[Tensor, Tensor] = {}
        self._hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def leave(self, follower: Follower) -> None:
        self.followers.remove(follower)
        if not self.followers:
            for hook in self._hooks:
                hook.remove()
            for optimizer in [optimizer for optimizer, followed in _FOLLOWED.items() if followed is self]:
                del _FOLLOWED[optimizer]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._before = {}
        for group in optimizer.param_groups:
            # An entry that decays beside its step does so whatever its age.
            is_apart = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
            kept = 1 - group["lr"] * group["weight_decay"] if is_apart else 1
            for parameter in group["params"]:
                if AGE in optimizer.state.get(parameter, {}):
                    self._before[parameter] = local(parameter) * kept

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        before, self._before = self._before, {}
        found_inf = getattr(optimizer, "found_inf", None)
        if not before or (isinstance(found_inf, Tensor) and bool(found_inf.any())):
            return  # a fused optimizer under a gradient scaler skips inside its kernel
        for group in optimizer.param_groups:
            sizes = _step_sizes(self._formula, *group["betas"], group.get("momentum_decay", 0.0))
            for parameter in group["params"]:
                if parameter in before and parameter.grad is not None:
                    state = optimizer.state[parameter]
                    _make_up_for(local(parameter), before[parameter], state, sizes)
                    steps = self.steps_since_renewal[parameter] = self.steps_since_renewal.get(parameter, 0) + 1
                    if steps >= len(sizes) - 1:  # all are as old as the tensor
                        del state[AGE], self.steps_since_renewal[parameter]


def count_ages(optimizer: Optimizer, parameter: Tensor) -> None:
    """Begin to count for a parameter, before entries of it are renewed: renewing sets their ages to 0."""
    state, followed = optimizer.state.get(parameter, {}), _FOLLOWED.get(optimizer)
    if followed and "step" in state:
        followed.steps_since_renewal[parameter] = 0
        if AGE not in state:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            state[AGE] = torch.full_like(parameter, torch.inf, dtype=wide)


def may_overshoot(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether an optimizer that is not PyTorch's counts the steps of a parameter, so that it may make up for averages.

    Of PyTorch's own all that do so are followed.
    """
    state, step = optimizer.state.get(parameter, {}), inspect.unwrap(type(optimizer).step)
    return "step" in state and AGE not in state and not step.__module__.startswith("torch.optim.")


def _formula(optimizer: Optimizer) -> _Formula | None:
    """How the optimizer makes up for averages that began at 0; one that takes the steps of its base does as that."""
    step = inspect.unwrap(type(optimizer).step)  # PyTorch wraps it when the first optimizer of a class is made
    return next((formula for kind, formula in _STEP_SIZES.items() if inspect.unwrap(kind.step) is step), None)


def _make_up_for(parameter: Tensor, before: Tensor, state: dict[str, Any], sizes: Tensor) -> None:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    sizes = sizes.to(parameter.device, wide)
    count = local(torch.as_tensor(state["step"])).to(parameter.device, wide).clamp(max=len(sizes) - 1)
    if state[AGE].dtype != wide:
        state[AGE] = state[AGE].to(wide)  # a loaded state has the parameter's type
    age = local(state[AGE]).add_(1).clamp_(max=count)
    ratios = sizes.index_select(0, age.flatten().int()).div_(sizes.index_select(0, count.int().reshape(1)))
    torch.lerp(before, parameter, ratios.view(parameter.shape).to(parameter.dtype), out=parameter)


@lru_cache(maxsize=64)
def _step_sizes(formula: _Formula, beta1: float, beta2: float, momentum_decay: float) -> Tensor:
    beta1, beta2 = float(beta1), float(beta2)  # they may be tensors
    counts = torch.arange(1.0, round(10 / (1 - max(beta1, beta2))) + 1, dtype=torch.float64)
    counts[-1] = 1e9  # the last stands for all that are larger
    sizes = formula(counts, beta1, beta2, momentum_decay)
    return torch.cat([sizes[:1], sizes])  # by the count: the first is that of count 0, which no step has
