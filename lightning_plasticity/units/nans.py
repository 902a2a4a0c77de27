"""Where tensors are NaN, told and changed fast: probing asks it of every tensor on its way.

``isnan`` makes a boolean tensor, which costs ten times as much as a maximum, and a maximum is NaN where any of its
numbers is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _maximum_tells(x: Tensor) -> bool:
    """Whether the maximum of tensors like ``x`` is known to be NaN where any number is: not so on all devices."""
    return x.dtype in _FLOATS and (x.is_cpu or x.is_cuda) and x.numel() > 0


def any_nan(x: Tensor) -> bool:
    """Whether a NaN is anywhere."""
    return bool(x.amax().isnan()) if _maximum_tells(x) else bool(x.isnan().any())


def nan_along(x: Tensor, dims: list[int]) -> Tensor:
    """Whether a NaN is anywhere along these dimensions, which are kept with one entry."""
    if not dims:
        return x.isnan()
    return x.amax(dims, keepdim=True).isnan() if _maximum_tells(x) else x.isnan().any(dim=dims, keepdim=True)


def all_nan_along(x: Tensor, dims: list[int]) -> Tensor:
    """Whether there is nothing but NaN along these dimensions, which are kept with one entry."""
    if not dims:
        return x.isnan()
    if not _maximum_tells(x):
        return x.isnan().all(dim=dims, keepdim=True)
    # where there is a number at all, the least of them is not above the greatest
    return clean(x, math.inf).amin(dims, keepdim=True) > clean(x, -math.inf).amax(dims, keepdim=True)


def nan_channels(x: Tensor, dim: int) -> Tensor:
    """For each index of ``dim`` whether a NaN is anywhere in it."""
    others = _others(x, dim)
    if others and _maximum_tells(x):
        return x.amax(others).isnan()
    return x.isnan().any(dim=others) if others else x.isnan()


def _others(x: Tensor, dim: int) -> list[int]:
    return [d for d in range(x.ndim) if d != dim % x.ndim]


def clean(x: Tensor, number: float = 0.0) -> Tensor:
    """A number, zero, in place of NaN."""
    if x.is_complex():
        return torch.where(x.isnan(), number, x)
    return x.nan_to_num(number, math.inf, -math.inf)


def ones_for_nan(x: Tensor) -> Tensor:
    """Ones in place of NaN: a probability, a scale and a count may be one."""
    return clean(x, 1.0)


def nan_factors(mask: Tensor) -> Tensor:
    """What makes NaN of all that a mask says: a product with one changes no bit of the rest."""
    return torch.where(mask, math.nan, 1.0)


def times_channels(x: Tensor, dim: int, factors: Tensor) -> Tensor:
    """A product with a factor for each channel."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * factors.to(x).view(shape)


class NaNs:
    """Where a tensor is NaN.

    Args:
        x: the tensor.
        dim: the dimension over channels, if there is one: most often a channel is NaN as a whole or not at all, which
            is faster to tell and to repeat.
    """

    def __init__(self, x: Tensor, dim: int | None) -> None:
        self.x = x
        self._along = None if dim is None else _others(x, dim)
        self.any = any_nan(x)
        self._channels = nan_along(x, self._along) if self.any and self._along is not None else None
        if self._channels is not None and not torch.equal(self._channels, all_nan_along(x, self._along or [])):
            self._channels = None

    def are_exceeded_by(self, output: Tensor) -> bool:
        """Whether a tensor of the same shape is NaN where this one is not."""
        if self._channels is not None:
            return bool((nan_along(output, self._along or []) & ~self._channels).any())
        return bool((output.isnan() & ~self.x.isnan()).any())

    def put_into(self, output: Tensor) -> Tensor:
        """A tensor of the same shape, with NaN where this one is."""
        if self._channels is not None:
            return output * nan_factors(self._channels).to(output)
        return output.masked_fill(self.x.isnan(), math.nan)


def is_elementwise(y: Tensor) -> bool:
    """Whether, of a tensor that was computed with NaN in the first entry only, that entry alone is NaN."""
    nans = y.isnan()
    return int(nans.sum()) == 1 < y.numel() and bool(nans[(0,) * y.ndim])
