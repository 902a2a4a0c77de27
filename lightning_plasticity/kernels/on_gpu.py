"""Kernels for CUDA, compiled by Triton, which comes with PyTorch.

There an operation costs a launch, and PyTorch launches one for each tensor where a list's operation has none for all.
Each of these does all tensors in one launch. They have been compiled for GPUs and run in Triton's interpreter; how fast
they are has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_plasticity.kernels.tensors import Tensors

_BLOCK = 1024  # entries that a program works on at a time
_PROGRAMS = 64  # at most, for each tensor


def suit(dtype: torch.dtype, size: int) -> bool:
    """Whether tensors of this type, with so many entries in all, are for these kernels."""
    return dtype == torch.float32


def places(tensors: Sequence[Tensor], beside: Sequence[Tensor]) -> Tensor:
    """The address and the number of entries of each tensor, and the address of what is beside it."""
    others = [tensor.data_ptr() for tensor in beside] or [0] * len(tensors)
    rows = [(t.data_ptr(), t.numel(), b) for t, b in zip(tensors, others, strict=True)]
    return torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)


def column_sums(dim: int, total: Tensor, size: Tensor | None) -> None:
    """There is nothing that adds up activations: PyTorch's own sums are two launches for each layer."""


def average_in(averages: Tensors, weight: float) -> None:
    """Moves averages towards the values beside them, but for those that are not finite."""
    _launch(_average_in, averages, weight)


def scale(tensors: Tensors, factors: Tensor) -> None:
    """Multiplies each tensor by its factor, which is of their type."""
    _launch(_scale, tensors, factors)


def pull(tensors: Tensors, rate: float) -> None:
    """Draws tensors towards what is beside them: adds the ``-rate``-fold of the difference."""
    _launch(_pull, tensors, -rate)


def clamp(tensors: Tensors, limits: Sequence[float]) -> None:
    """Brings all entries of each tensor into its limits."""
    torch._foreach_clamp_min_(tensors.tensors, [-limit for limit in limits])  # each is one launch for all
    torch._foreach_clamp_max_(tensors.tensors, list(limits))


def _launch(kernel: Any, tensors: Tensors, argument: Tensor | float) -> None:
    largest = max(tensor.numel() for tensor in tensors.tensors)
    programs = min(_PROGRAMS, triton.cdiv(largest, _BLOCK))
    with _on_device_of(tensors.places):
        kernel[(len(tensors.tensors), programs)](tensors.places, argument, BLOCK=_BLOCK)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# Triton compiles these: it has no types for mypy, and takes an annotation of an argument for a constant.


@triton.jit  # type: ignore[untyped-decorator]
def _average_in(places, weight, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = places + 3 * tl.program_id(0)
    averages, values = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 2).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 1)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_inside = at < size
        average, value = tl.load(averages + at, mask=is_inside), tl.load(values + at, mask=is_inside)
        value = tl.where(value * 0 == 0, value, average)
        tl.store(averages + at, average * (1 - weight) + value * weight, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(places, factors, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = places + 3 * tl.program_id(0)
    entries, size = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1)
    factor = tl.load(factors + tl.program_id(0))
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_inside = at < size
        tl.store(entries + at, tl.load(entries + at, mask=is_inside) * factor, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _pull(places, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = places + 3 * tl.program_id(0)
    entries, targets = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 2).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 1)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_inside = at < size
        entry, target = tl.load(entries + at, mask=is_inside), tl.load(targets + at, mask=is_inside)
        tl.store(entries + at, entry + (entry - target) * factor, mask=is_inside)
