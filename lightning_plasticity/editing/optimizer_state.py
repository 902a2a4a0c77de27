"""Which state of an optimizer belongs to the single entries of a parameter, and the value it starts from."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer, Rprop

# One value per tensor whatever the tensor's shape, so that a parameter without dimensions is no exception.
_COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})
# Copies of the weight, or averages that start from it; 0 would pull the weight towards 0. In this order of: ASGD,
# Schedule-Free, MADGRAD, timm's Lookahead.
_COPIES_OF_THE_WEIGHT = frozenset({"ax", "z", "x0", "lookahead_slow_buff"})


class StateOfEntries:
    """Find the optimizer state that has one value for each entry of a parameter, by the parameter's identity.

    Args:
        optimizers: Where to look. Optimizers that hold another one (Lightning's and Fabric's wrappers,
            ``ZeroRedundancyOptimizer``, Lookahead, SAM) are looked into.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=0.5)
        >>> [(state, initial)] = StateOfEntries([optimizer]).of(weight)
        >>> state is optimizer.state[weight]["sum"], initial
        (True, tensor([0.5000, 0.5000]))
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = [level for optimizer in optimizers for level in _levels(optimizer)]
        self._has_warned = False

    def of(self, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each such state tensor with its initial value, which may be a view of the parameter: use it at once.

        State that has no value for each entry is left out, and a warning says so the first time.
        """
        for optimizer in self._optimizers:
            # LBFGS keeps one flat history of all its parameters, with the first of them.
            if isinstance(optimizer, LBFGS):
                if optimizer.state and _group(optimizer, parameter) is not None:
                    self._warn_once(optimizer, "old_dirs")
                continue
            for key, state in optimizer.state.get(parameter, {}).items():
                if key in _COUNTERS:
                    continue
                if _has_the_entries_of(parameter, state):
                    yield state, _initial(optimizer, key, parameter, state)
                elif _holds_many_values(state):
                    self._warn_once(optimizer, key)

    def _warn_once(self, optimizer: Optimizer, key: str) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"The state {key!r} of {type(optimizer).__name__} has no entry for each weight: it cannot be reset for the "
            "weights that are edited, and stays as it is. Use an optimizer whose state has the shape of the weights, "
            "such as AdamW, or accept this with optimizer_state='keep'.",
            stacklevel=2,
        )


def _levels(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer after those that it holds, for either may have state."""
    held = (getattr(optimizer, name, None) for name in ("optimizer", "optim", "base_optimizer", "_base_optimizer"))
    return [level for inner in held if isinstance(inner, Optimizer) for level in _levels(inner)] + [optimizer]


def _group(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    return next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), None)


def _has_the_entries_of(parameter: Tensor, state: Any) -> bool:
    # Quantised state, whether integers or a tensor subclass, has no entries that can be set one by one.
    return type(state) in (Tensor, nn.Parameter) and state.shape == parameter.shape and state.is_floating_point()


def _holds_many_values(state: Any) -> bool:
    if isinstance(state, Tensor):
        return state.numel() > 1
    parts = list(state.values()) if isinstance(state, dict) else state
    return isinstance(parts, list | tuple) and any(_holds_many_values(part) for part in parts)


def _initial(optimizer: Optimizer, key: str, parameter: Tensor, state: Tensor) -> Tensor:
    if key in _COPIES_OF_THE_WEIGHT:
        return parameter.detach().to(state.dtype)
    start: Tensor | float = 0.0
    if isinstance(optimizer, Adagrad) and key == "sum":
        start = optimizer.defaults["initial_accumulator_value"]
    elif isinstance(optimizer, Rprop) and key == "step_size":
        group = _group(optimizer, parameter)
        assert group is not None, "an optimizer has state for its own parameters only"
        start = group["lr"]
    value = start.detach().to(state).reshape(()) if isinstance(start, Tensor) else state.new_full((), start)
    return value.expand(parameter.shape)
