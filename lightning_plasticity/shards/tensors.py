"""Tensors that FSDP2 or tensor parallelism shares out among ranks: what this rank holds, and the whole."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.tensor import DTensor


# FSDP1 with flat and with original parameters, and DeepSpeed stage 3.
_MARKS_OF_FLATTENING = ("_is_flat_param", "_fsdp_flattened", "ds_id")


def is_flattened(parameter: Tensor) -> bool:
    """Whether a parameter is a piece of a flat one, which does not know its shape."""
    return any(hasattr(parameter, mark) for mark in _MARKS_OF_FLATTENING)


def is_shared_out(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``, of which each rank may hold only a part.

    Example:
        >>> is_shared_out(torch.zeros(2))
        False
    """
    return dist.is_available() and isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The values of a tensor that this rank holds, in the tensor's memory.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> local(weight) is weight
        True
    """
    if not is_shared_out(tensor):
        return tensor
    with torch.no_grad():  # without which this would be a copy for the backward pass
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks, which must all call this; one that is not shared out as it is.

    Each rank then holds all of it: for one layer at a time, and only where parts do not do.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> whole(weight) is weight
        True
    """
    return tensor.full_tensor() if is_shared_out(tensor) else tensor


def shared_out_as(tensor: Tensor, held: Tensor) -> Tensor:
    """A tensor of which this rank holds ``held``, and which is shared out as another; ``held`` where that is whole.

    No rank talks.

    Example:
        >>> shared_out_as(torch.zeros(2), torch.ones(2))
        tensor([1., 1.])
    """
    if not is_shared_out(tensor):
        return held
    where = tensor.device_mesh, tensor.placements
    return DTensor.from_local(held, *where, run_check=False, shape=tensor.shape, stride=tensor.stride())


def gradient(parameter: Tensor) -> Tensor | None:
    """A parameter's gradient, shared out as the parameter is.

    Under sequence parallelism each rank has a term of it: then the terms are added up, and all ranks must call this.

    Example:
        >>> gradient(torch.zeros(2, requires_grad=True)) is None
        True
    """
    found = parameter.grad
    if found is None or not is_shared_out(found) or not any(each.is_partial() for each in found.placements):
        return found
    assert is_shared_out(parameter), "what every rank holds for itself has a gradient of its own"
    return found.redistribute(placements=parameter.placements)


def for_state(tensor: Tensor) -> Tensor:
    """A tensor that is remembered, as state has it: a copy, or itself where it is shared out.

    Such are put together for a checkpoint, or copied, one by one, by who asks for the state.

    Example:
        >>> for_state(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor if is_shared_out(tensor) else tensor.clone()
