"""Kernels for CUDA, compiled by Triton, which comes with PyTorch.

There an operation costs a launch, and PyTorch launches one for each tensor where a list's operation has none for all.
Each of these does all tensors in one launch. They have been compiled for GPUs and run in Triton's interpreter; how fast
they are has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_plasticity.kernels.tensors import Tensors

_BLOCK = 1024  # entries that a program works on at a time
_PROGRAMS = 64  # at most, for each tensor
_ROWS, _UNITS = 32, 32  # weights of so many units, so many of each at a time, that a program adds up


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
    _launch_for_each(_average_in, averages, weight)


def scale(tensors: Tensors, factors: Tensor) -> None:
    """Multiplies each tensor by its factor, which is of their type."""
    _launch_for_each(_scale, tensors, factors)


def pull(tensors: Tensors, rate: float) -> None:
    """Draws tensors towards what is beside them: adds the ``-rate``-fold of the difference."""
    _launch_for_each(_pull, tensors, -rate)


def reader_table(shapes: np.ndarray[Any, Any], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """What ``contributions`` is told of readers, from ``reader_shapes``.

    Their rows; the first reader of each set of units, and of the next; and the number of units of the largest set.
    """
    starts = np.flatnonzero(np.diff(shapes[:, 0], prepend=-1))
    first = np.append(starts, len(shapes))
    largest = int((shapes[:, 3] * shapes[:, 5] // shapes[:, 2]).max())
    return torch.from_numpy(shapes).to(device), torch.from_numpy(first).to(device), largest


def contributions(weights: Tensors, readers: tuple[Tensor, Tensor, int], sizes: Tensor | None, out: Tensor) -> None:
    """For each unit: the size of its activation times the mean size of the weights that use it, over all readers.

    Args:
        weights: of the readers, their entries in order.
        readers: from ``reader_table``.
        sizes: of the activations of all columns; None for 1.
        out: where to write, for all units. A unit's columns in one reader give their mean, and readers add up.
    """
    rows, first, largest = readers
    grid = len(first) - 1, triton.cdiv(largest, _UNITS)
    arguments = weights.places, rows, first, out if sizes is None else sizes, out
    _launch(_contributions, grid, *arguments, SIZED=sizes is not None, ROWS=_ROWS, UNITS=_UNITS)


def clamp(tensors: Tensors, limits: Sequence[float]) -> None:
    """Brings all entries of each tensor into its limits."""
    torch._foreach_clamp_min_(tensors.tensors, [-limit for limit in limits])  # each is one launch for all
    torch._foreach_clamp_max_(tensors.tensors, list(limits))


def _launch_for_each(kernel: Any, tensors: Tensors, argument: Tensor | float) -> None:
    largest = max(tensor.numel() for tensor in tensors.tensors)
    programs = min(_PROGRAMS, triton.cdiv(largest, _BLOCK))
    _launch(kernel, (len(tensors.tensors), programs), tensors.places, argument, BLOCK=_BLOCK)


def _launch(kernel: Any, grid: tuple[int, ...], places: Tensor, *arguments: Any, **constants: Any) -> None:
    with _on_device_of(places):
        kernel[grid](places, *arguments, **constants)


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


@triton.jit  # type: ignore[untyped-decorator]
def _contributions(places, readers, first, sizes, out, SIZED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    begin, end = tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)
    row = readers + 8 * begin  # all readers of a set have the same units
    units = tl.load(row + 3) * tl.load(row + 5) // tl.load(row + 2)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    is_unit = unit < units
    total = tl.zeros((UNITS,), tl.float32)
    for reader in range(begin, end):
        row = readers + 8 * reader
        first_column, of_each = tl.load(row + 1), tl.load(row + 2)
        outputs, inputs, kernel, is_transposed = (
            tl.load(row + 4),
            tl.load(row + 5),
            tl.load(row + 6),
            tl.load(row + 7),
        )
        weights = tl.load(places + 3 * reader).to(tl.pointer_type(tl.float32))
        count = outputs * kernel  # of the weights of a column
        to_next = tl.where(is_transposed != 0, kernel, inputs * kernel)  # output
        for k in range(0, of_each):
            column = unit * of_each + k
            by_output = (column // inputs) * count * inputs + (column % inputs) * kernel
            start = tl.where(is_transposed != 0, column * count, by_output)
            sums = tl.zeros((UNITS,), tl.float32)
            for n in range(0, count, ROWS):
                at = n + tl.arange(0, ROWS)
                offset = (at // kernel) * to_next + at % kernel
                is_inside = (at < count)[:, None] & is_unit[None, :]
                entries = tl.load(weights + start[None, :] + offset[:, None], mask=is_inside, other=0.0)
                sums += tl.sum(tl.abs(entries), 0)
            mean = sums / (count * of_each)
            if SIZED:
                mean *= tl.load(sizes + first_column + column, mask=is_unit, other=0.0)
            total += mean
    tl.store(out + tl.load(readers + 8 * begin) + unit, total, mask=is_unit)
