"""Kernels for CUDA, compiled by Triton, which comes with PyTorch.

There an operation costs a launch, and PyTorch launches one for each tensor where a list's operation has none for all.
Each of these does all tensors in one launch. They have been compiled for GPUs and run in Triton's interpreter; how fast
they are has not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from lightning_plasticity.kernels import programs
from lightning_plasticity.kernels.tensors import PLAIN, Tensors

_BLOCK = 1024  # entries that a program works on at a time
_PROGRAMS = 64  # at most, for each tensor
_SUMMED = torch.float32, torch.bfloat16, torch.float16  # activations
_ROWS, _UNITS = 32, 32  # weights of so many units, so many of each at a time, that a program adds up
_DOWN, _ACROSS = (64, 32), (16, 128)  # columns and rows, or rows and columns, that are multiplied at a time

# Activations: rows and channels that a program adds up at a time, where channels lie side by side and where not.
_SIDE_BY_SIDE, _APART = (32, 64), (512, 4)
_SUMMING = 512  # programs at most for all of an activation, and
_SPLITS = 128  # for the same channels: the last of them to end reads what the others have written


def suit(dtype: torch.dtype, size: int) -> bool:
    """Whether tensors of this type, with so many entries in all, are for these kernels."""
    return dtype == torch.float32


def places(tensors: Sequence[Tensor], beside: Sequence[Tensor]) -> Tensor:
    """The address and the number of entries of each tensor, and the address of what is beside it."""
    others = [tensor.data_ptr() for tensor in beside] or [0] * len(tensors)
    return _table(tensors, others)


def _table(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """The address and the number of entries of each tensor, and a number besides."""
    rows = [(t.data_ptr(), t.numel(), number) for t, number in zip(tensors, numbers, strict=True)]
    device = tensors[0].device
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)  # from pinned memory: nobody waits for the device


class ColumnSums:
    """Adds up entries, and their sizes, by channel, in float32: one launch for each activation.

    Many programs share the rows of a large activation: a GPU would be idle while one program for each channel read it.
    Each writes its sums where they stand alone, and the last one to end adds up what all have written, always in the
    same order: so the same activations give the same bits, on every rank and in every run.

    Args:
        dim: where channels are, counted from the end; other dimensions are rows.
        total: where the sums are kept, which stays where it is.
        size: where the sums of sizes are kept; None where these are not wanted.
    """

    def __init__(self, dim: int, total: Tensor, size: Tensor | None) -> None:
        self._dim, self._channels, self._total, self._size = dim, total.numel(), total, size
        blocks = triton.cdiv(self._channels, min(_SIDE_BY_SIDE[1], _APART[1]))
        self._ended = torch.zeros(blocks, dtype=torch.int32, device=total.device)  # programs, by channels

    def add(self, x: Tensor, rows_before: int) -> int:
        """Takes in a tensor, if it is one of this kind.

        Args:
            x: what is added up.
            rows_before: how many rows are in the sums: without any they are set. Of one the size is told from the
                total.

        Returns:
            How many rows were added: 0 if it does not take it.
        """
        dim, channels, total = self._dim, self._channels, self._total
        if type(x) not in PLAIN or x.dtype not in _SUMMED or total.dtype != torch.float32 or x.device != total.device:
            return 0
        if x.ndim < -dim or x.shape[dim] != channels:  # the layer will refuse it
            return 0
        steps = _row_steps(x, dim)
        if len(steps) > 2 or not x.numel():
            return 0
        (_, to_far), (near, to_near) = [(1, 0), (1, 0), *steps][-2:]
        rows, to_channel = x.numel() // channels, x.stride(dim)
        at_once, block = _SIDE_BY_SIDE if to_channel == 1 else _APART
        blocks = triton.cdiv(channels, block)
        splits = max(1, min(triton.cdiv(rows, at_once), _SUMMING // blocks, _SPLITS))
        apart = total.new_empty(2, splits, channels)
        sized, size = self._size is not None, total if self._size is None else self._size
        layout = channels, rows, near, to_far, to_near, to_channel
        arguments = total, size, apart, self._ended, *layout, rows_before
        _launch(programs.sum_columns, (blocks, splits), x, *arguments, SIZED=sized, ROWS=at_once, CHANNELS=block)
        return rows


def _row_steps(x: Tensor, dim: int) -> list[tuple[int, int]]:
    """Lengths and strides of the dimensions of rows, from the widest stride: one where several follow each other."""
    found: list[tuple[int, int]] = []
    others = [(x.stride(d), x.shape[d]) for d in range(x.ndim) if d != x.ndim + dim and x.shape[d] > 1]
    for stride, length in sorted(others, reverse=True):
        if found and found[-1][1] == length * stride:
            found[-1] = found[-1][0] * length, stride
        else:
            found.append((length, stride))
    return found


def column_sums(dim: int, total: Tensor, size: Tensor | None) -> Callable[[Tensor, int], int]:
    """What adds up activations."""
    return ColumnSums(dim, total, size).add


def average_in(averages: Tensors, weight: float) -> None:
    """Moves averages towards the values beside them, but for those that are not finite."""
    _launch_for_each(programs.average_in, averages, weight)


def average_utilities(averages: Tensors, gradients: Tensors, weight: float) -> None:
    """Moves averages towards the size of the weight beside each, times its gradient, but for what is not finite."""
    _launch_for_each(programs.average_utilities, averages, gradients.places, weight)


def scale(tensors: Tensors, factors: Tensor) -> None:
    """Multiplies each tensor by its factor, which is of their type."""
    _launch_for_each(programs.scale, tensors, factors)


def scale_from_diagonal(stacks: Sequence[Tensor], target: float, factors: Tensor) -> None:
    """Multiplies each square matrix of some stacks, minus ``target`` on its diagonal, by its factor."""
    squares = [matrix for stack in stacks for matrix in stack.unbind()]
    table = _table(squares, [len(matrix) for matrix in squares])
    _launch(programs.scale_from_diagonal, _grid(squares), table, factors, target, BLOCK=_BLOCK)


def pull(tensors: Tensors, rate: float) -> None:
    """Draws tensors towards what is beside them: adds the ``-rate``-fold of the difference."""
    _launch_for_each(programs.pull, tensors, -rate)


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
    _launch(programs.contributions, grid, *arguments, SIZED=sizes is not None, ROWS=_ROWS, UNITS=_UNITS)


def power_iteration(matrices: Tensors, lefts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""One power iteration for each matrix: :math:`v = W^\top u / \|\cdot\|`, then :math:`W v = \sigma u`.

    Args:
        matrices: their entries in order.
        lefts: :math:`u` of all matrices, one after the other.

    Returns:
        :math:`\sigma` of each matrix; the new :math:`u`, the old one where :math:`\sigma` is 0 or no number; :math:`v`.
    """
    sizes = _sizes(matrices)
    rows_from, columns_from, _ = _starts(sizes, lefts.device)
    rights, products = lefts.new_empty(sum(columns for _, columns in sizes)), torch.empty_like(lefts)
    lengths = lefts.new_empty(len(sizes))
    for by_row, given, out, (outputs, inputs) in ((False, lefts, rights, _DOWN), (True, rights, products, _ACROSS)):
        grid = len(sizes), triton.cdiv(max(size[0 if by_row else 1] for size in sizes), outputs)
        constants = {"BY_ROW": by_row, "OUTPUTS": outputs, "INPUTS": inputs}
        _launch(programs.times_matrices, grid, matrices.places, rows_from, columns_from, given, out, **constants)
        vectors = (out, rows_from, lefts) if by_row else (out, columns_from, out)
        _launch(programs.directions, (len(sizes),), *vectors, lengths, BLOCK=_BLOCK)
    return lengths, products, rights


def outer_products(matrices: Tensors, lefts: Tensor, rights: Tensor, factors: Tensor) -> Tensor:
    r"""The entries of :math:`f \, u v^\top`, as large as each matrix, one after the other."""
    sizes = _sizes(matrices)
    starts, out = _starts(sizes, lefts.device), lefts.new_empty(sum(rows * columns for rows, columns in sizes))
    _launch(programs.outer_products, (len(sizes), _PROGRAMS), *starts, lefts, rights, factors, out, BLOCK=_BLOCK)
    return out


def _sizes(matrices: Tensors) -> tuple[tuple[int, int], ...]:
    return tuple((len(tensor), math.prod(tensor.shape[1:])) for tensor in matrices.tensors)


@lru_cache(maxsize=64)
def _starts(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Where rows, columns and entries of each matrix begin, in arrays over all, and where the last ones end."""
    of_each = [(rows, columns, rows * columns) for rows, columns in sizes]
    return torch.tensor([(0, 0, 0), *of_each]).cumsum(0).mT.contiguous().to(device)


def clamp(tensors: Tensors, limits: Sequence[float]) -> None:
    """Brings all entries of each tensor into its limits."""
    torch._foreach_clamp_min_(tensors.tensors, [-limit for limit in limits])  # each is one launch for all
    torch._foreach_clamp_max_(tensors.tensors, list(limits))


def _launch_for_each(kernel: Any, tensors: Tensors, *arguments: Tensor | float) -> None:
    _launch(kernel, _grid(tensors.tensors), tensors.places, *arguments, BLOCK=_BLOCK)


def _grid(tensors: Sequence[Tensor]) -> tuple[int, int]:
    largest = max(tensor.numel() for tensor in tensors)
    return len(tensors), min(_PROGRAMS, triton.cdiv(largest, _BLOCK))


def _launch(kernel: Any, grid: tuple[int, ...], places: Tensor, *arguments: Any, **constants: Any) -> None:
    with _on_device_of(places):
        kernel[grid](places, *arguments, **constants)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
