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
    return x.dtype in _FLOATS and x.device.type in ("cpu", "cuda") and x.numel() > 0


def any_nan(x: Tensor) -> bool:
    """Whether a NaN is anywhere."""
    return bool(x.amax().isnan()) if _maximum_tells(x) else bool(x.isnan().any())


def nan_channels(x: Tensor, dim: int) -> Tensor:
    """For each index of ``dim`` whether a NaN is anywhere in it."""
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    if not others:
        return x.isnan()
    return x.amax(others).isnan() if _maximum_tells(x) else x.isnan().any(dim=others)


def clean(x: Tensor, number: float = 0.0) -> Tensor:
    """A number, zero, in place of NaN."""
    if x.is_complex():
        return torch.where(x.isnan(), number, x)
    return x.nan_to_num(number, math.inf, -math.inf)


def ones_for_nan(x: Tensor) -> Tensor:
    """Ones in place of NaN: a probability, a scale and a count may be one."""
    return clean(x, 1.0)


def set_channels_nan(x: Tensor, dim: int, channels: Tensor) -> Tensor:
    """NaN in all of the channels of a mask; a product with one changes no bit of the others."""
    factors = torch.where(channels.to(x.device), math.nan, 1.0).to(x.dtype)
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * factors.view(shape)


def _nan_as_a_whole(x: Tensor, dim: int) -> Tensor:
    """For each index of ``dim`` whether it is NaN everywhere."""
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    if not (others and _maximum_tells(x)):
        return x.isnan().all(dim=others) if others else x.isnan()
    # where there is a number at all, the least of them is not above the greatest
    return clean(x, math.inf).amin(others) > clean(x, -math.inf).amax(others)


class NaNs:
    """Where a tensor is NaN.

    Args:
        x: the tensor.
        dim: the dimension over channels, if there is one: most often a channel is NaN as a whole or not at all, which
            is faster to tell and to repeat.
    """

    def __init__(self, x: Tensor, dim: int | None) -> None:
        self.x = x
        self.any = any_nan(x)
        self._dim = dim or 0
        self._channels = nan_channels(x, dim) if self.any and dim is not None else None
        if self._channels is not None and not torch.equal(self._channels, _nan_as_a_whole(x, self._dim)):
            self._channels = None
        self._mask = x.isnan() if self.any and self._channels is None else None

    def are_exceeded_by(self, output: Tensor) -> bool:
        """Whether a tensor of the same shape is NaN where this one is not."""
        if self._channels is not None:
            return bool((nan_channels(output, self._dim) & ~self._channels).any())
        return any_nan(output) if self._mask is None else bool((output.isnan() & ~self._mask).any())

    def put_into(self, output: Tensor) -> Tensor:
        """A tensor of the same shape, with NaN where this one is."""
        if self._channels is not None:
            return set_channels_nan(output, self._dim, self._channels)
        return output if self._mask is None else output.masked_fill(self._mask, math.nan)
