"""Put what an optimizer remembers of whole parameters back to the start."""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_plasticity.editing.optimizer_state import (
    EntryState,
    has_the_entries_of,
    holds_many_values,
    levels,
    restart_counts,
)

Memory: TypeAlias = Literal["all", "moments", "step"]


def reset_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor], what: Memory = "all") -> int:
    """Put an optimizer's state of some parameters back to its start, in place, and leave its settings alone.

    Args:
        optimizer: the optimizer; those inside of wrappers are found.
        parameters: whose state; those of others count for nothing.
        what: ``"moments"``, all that has a value for each weight; ``"step"``, the counts of steps and what follows from
            them; or ``"all"``. Only then state of other shapes (the factors of Adafactor, the history of LBFGS) starts
            anew as well: it is dropped, and the optimizer makes it again.

    Returns:
        How many items of state were put back.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([weight])
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> reset_optimizer(optimizer, [weight], "step")
        1
        >>> optimizer.state[weight]["step"], optimizer.state[weight]["exp_avg"].any()
        (tensor(0.), tensor(True))
    """
    wanted = {id(parameter) for parameter in parameters}
    count = 0
    for level in levels(optimizer):
        entries = EntryState([level], "reset")
        for group in level.param_groups:
            own = [parameter for parameter in group["params"] if id(parameter) in wanted]
            if isinstance(level, LBFGS) and own and what == "all":
                count += len(level.state)
                level.state.clear()  # it is kept with the first parameter, for all
            for parameter in own:
                count += _reset_parameter(level, parameter, entries, what)
            if what != "moments" and own and len(own) == len(group["params"]) and isinstance(group.get("step"), int):
                group["step"] = 0  # there are optimizers that count once for a group
                count += 1
    return count


def _reset_parameter(optimizer: Optimizer, parameter: Tensor, entries: EntryState, what: Memory) -> int:
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    if what == "all" and any(_is_of_another_shape(parameter, value) for value in state.values()):
        count = len(state)
        state.clear()
        return count
    count = 0
    for _, value, initial in entries.of(parameter) if what != "step" else ():
        value.copy_(initial)
        count += 1
    return count if what == "moments" else count + restart_counts(optimizer, parameter)


def _is_of_another_shape(parameter: Tensor, value: Any) -> bool:
    return holds_many_values(value) and not has_the_entries_of(parameter, value)
