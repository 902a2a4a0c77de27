"""Cheap tensors in place of matrix products, for runs in which only NaN counts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.units.nans import all_nan_along, nan_along, nan_factors

# Enough numbers for sums and spreads over any few of them to be like those of the whole.
_KEPT = 4096


class StandIns:
    """Parts of what a network's matrix products gave in one run, repeated to the size of the whole.

    A product whose factors hold no NaN gives numbers, and as long as the network decides nothing by them, any will do
    where only NaN counts. Most of the time of a forward pass goes into these numbers.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Tensor, tuple[int, ...], tuple[int, ...]]] = {}

    def clear(self) -> None:
        """Stands in for nothing any more."""
        self._kept.clear()

    def keep(self, call: Hashable, result: Any) -> None:
        """Keeps a part of what the first such call has given."""
        if call not in self._kept and isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            part = result.reshape(-1)[:_KEPT].clone()
            self._kept[call] = (part, tuple(result.shape), result.stride())

    def give(self, call: Hashable) -> Tensor | None:
        """A new tensor like the result of that call, None where none was kept."""
        if call not in self._kept:
            return None
        part, shape, stride = self._kept[call]
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        return part.repeat(-(-extent // len(part))).as_strided(shape, stride)


def signature(layer: str, function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What calls have in common that give tensors of one kind."""
    return layer, function, *map(_kind, args), *map(_kind, kwargs.items())


def _kind(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return value if isinstance(value, (int, str, float)) else repr(value)


def attended(result: Tensor, value: Tensor) -> Tensor | None:
    """What attention gives of values some of whose channels are NaN for all keys; None where only some keys' are."""
    nans = nan_along(value, [-2])
    if not bool(nans.any()):
        return result
    if value.shape[:-2] != result.shape[:-2] or not torch.equal(nans, all_nan_along(value, [-2])):
        return None
    return result * nan_factors(nans).to(result)
