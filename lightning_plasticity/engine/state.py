"""State of methods in a checkpoint: whether it fits, told before any of it is taken, and what is shared out in it.

What a method remembers of each entry of a parameter is shared out among ranks as the parameter is: a ``DTensor``, of
which each rank holds its part. In a checkpoint it is whole, so that any number of ranks can go on from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_plasticity import checks
from lightning_plasticity.distributed import world_size
from lightning_plasticity.editing.editable import is_finite
from lightning_plasticity.shards.tensors import is_shared_out, whole

_OF_ANY_LENGTH = {"young", "states"}  # lists of what has happened so far
_MAYBE_NONE = {"last_epoch"}
VERSION = 1  # of the form of state; what has none was saved by version 0.1.0


def for_checkpoint(state: Mapping[str, Any]) -> dict[str, Any]:
    """State with what is shared out put together, one tensor after another, in the main memory of rank 0.

    All ranks must call this. On other ranks than the first, None stands in the place of what was put together, for a
    checkpoint has what rank 0 has.
    """

    def together(value: Any) -> Any:
        if not is_shared_out(value):
            return value
        complete = whole(value)  # by all ranks
        # a copy also where this rank has all of it, and of what is in use
        return complete.to("cpu", copy=True) if dist.get_rank() == 0 else None

    put_together: dict[str, Any] = tree_map(together, state)
    return put_together


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """State of which nothing is in use: copies of what is shared out, which all else is already."""
    copies: dict[str, Any] = tree_map(lambda value: value.clone() if is_shared_out(value) else value, state)
    return copies


def check_state(method: str, given: Any, own: Mapping[str, Any]) -> None:
    """Raise unless the state of a method can be its own: same kinds of values, same shapes, all numbers finite.

    What one of the two has not, such as layers that were not called yet, is left to the method.

    Args:
        method: its name, for the error.
        given: the state to be loaded.
        own: the state that the method has now.
    """
    if not isinstance(given, Mapping):
        raise _misfit(method, "the state", "a dict", checks.shown(given))
    missing = [key for key in ("optimizer_steps", "draws", "method") if key not in given]
    if missing:
        raise _misfit(method, "the state", "the parts optimizer_steps, draws and method", f"none named {missing[0]!r}")
    version = given.get("version", 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        raise _misfit(method, "'version'", f"at most {VERSION}", checks.shown(version))
    if type(given["optimizer_steps"]) is not int or given["optimizer_steps"] < 0:
        raise _misfit(method, "'optimizer_steps'", "a count", checks.shown(given["optimizer_steps"]))
    _check_finite(method, given["method"], "method")
    if version:
        _compare(method, given, own, "the state")


def _misfit(method: str, where: str, needed: str, got: str) -> ValueError:
    return ValueError(
        f"The state that {method} loads must fit it: {where} must be {needed}, got {got}. Resume with the model and "
        "the settings of the run that saved it. Nothing was changed."
    )


def _check_finite(method: str, value: Any, where: str) -> None:
    if isinstance(value, Tensor):
        is_sound = not value.is_floating_point() or is_finite(value)
    else:
        is_sound = not isinstance(value, float) or math.isfinite(value)
    if not is_sound:
        raise _misfit(method, f"'{where}'", "finite", "NaN or infinity")
    for key, part in _parts(value):
        _check_finite(method, part, f"{where}.{key}")


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def _kind(value: Any) -> str:
    """What a value is; whole numbers and others are told apart, as a count that is 1.5 is none."""
    if isinstance(value, Mapping):
        return "a dict"
    if isinstance(value, Tensor):
        return "a tensor of floating-point numbers" if value.is_floating_point() else "a tensor of whole numbers"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"a {type(value).__name__}"


def _compare(method: str, given: Any, own: Any, where: str) -> None:
    if own is None:
        return  # nothing has been there yet
    if given is None and is_shared_out(own):
        raise _misfit(method, where, "of rank 0, where it is whole", "that of another rank")
    if _kind(given) != _kind(own):
        raise _misfit(method, where, _kind(own), _kind(given))
    if isinstance(own, Tensor):
        # What differs from rank to rank has a dimension for them, and their number may have changed.
        by_rank = (
            own.ndim > 0
            and not is_shared_out(own)
            and len(own) in (1, world_size())
            and given.ndim > 0
            and len(given) > 0
        )
        if given.shape != own.shape and not (by_rank and given.shape[1:] == own.shape[1:]):
            raise _misfit(method, where, f"of shape {tuple(own.shape)}", f"{tuple(given.shape)}")
    elif isinstance(own, Mapping):
        for key in own.keys() & given.keys() - _OF_ANY_LENGTH:
            if given[key] is None and key in _MAYBE_NONE:
                continue
            _compare(method, given[key], own[key], f"{where} {key!r}")
    elif isinstance(own, (list, tuple)):
        if len(given) != len(own):
            raise _misfit(method, where, f"of length {len(own)}", str(len(given)))
        for place, (theirs, mine) in enumerate(zip(given, own, strict=True)):
            _compare(method, theirs, mine, f"{where} {place}")
