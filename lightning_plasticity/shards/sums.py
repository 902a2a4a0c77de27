"""Sums and norms over whole tensors, from what each rank has of its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plasticity.distributed import sum_over_ranks, world_size
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.tensors import is_shared_out, local


def sum_over_shards(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums that each rank has taken over its part of a tensor, put together to those over the whole tensor.

    All ranks must call this, with values of the same shapes and types in one order. All values of one type travel in a
    single message to all ranks, whatever the layouts; where no tensor is shared out nothing is sent. A part that
    several ranks hold counts once, and sums of integers are exact.

    Args:
        values: each computed from the part of a tensor, 0 where that is empty.
        tensors: for each value the tensor.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> sum_over_shards([part_of(weight).local.sum()], [weight])
        [tensor(3.)]
    """
    parts = [part_of(tensor) for tensor in tensors]
    shared = [i for i, part in enumerate(parts) if part.shards > 1]
    if not shared:
        return list(values)
    sums = sum_over_ranks([values[i] for i in shared])
    together = {i: _of_one_copy(total, world_size() // parts[i].shards) for i, total in zip(shared, sums, strict=True)}
    return [together.get(i, value) for i, value in enumerate(values)]


def _of_one_copy(total: Tensor, copies: int) -> Tensor:
    return total / copies if total.is_floating_point() else total // copies


def whole_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Euclidean norms of whole tensors. Where some are shared out all ranks must call this, and send one message.

    Example:
        >>> whole_norms([torch.tensor([3.0, 4.0]), torch.zeros(0)], torch.float32)
        tensor([5., 0.])
    """
    held = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors], dtype=dtype))
    if not any(map(is_shared_out, tensors)):
        return held
    squares = sum_over_shards(list(held.double().square().unbind()), tensors)  # where float32 would overflow
    return torch.stack(squares).sqrt().to(dtype)
