"""Kernels for small networks on the CPU, compiled by Numba.

There a call of PyTorch takes longer than its arithmetic. Each of these does all layers in one call, in one pass over
memory, on the tensors' own memory, whose address it is given. What differs from PyTorch's operations is said with each;
where nothing is said, results are the same to the last bit. Sums are in float64.

There are none for bfloat16, which Numba does not know; what methods change in it goes through float32 anyway, so that
nothing is lost to rounding (:mod:`lightning_plasticity.editing.remainders`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from lightning_plasticity.kernels.tensors import PLAIN, Tensors

F = TypeVar("F", bound=Callable[..., Any])

# Two threads of PyTorch take as long for so many entries, and less for more: see `examples/benchmarks/kernels.md`.
LARGE = 2**18
_LIKE: dict[torch.dtype, np.ndarray[Any, Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
}  # tell Numba the type
_BITS = {4: np.empty(0, np.int32), 8: np.empty(0, np.int64)}  # by bytes


def suit(dtype: torch.dtype, size: int) -> bool:
    """Whether tensors of this type, with so many entries in all, are for these kernels."""
    return dtype in _LIKE and (size <= LARGE or torch.get_num_threads() == 1)


def places(tensors: Sequence[Tensor], beside: Sequence[Tensor]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What tells Numba the tensors' type; the address and number of entries of each, and the address of the other."""
    others = [tensor.data_ptr() for tensor in beside] or [0] * len(tensors)
    rows = [(t.data_ptr(), t.numel(), b) for t, b in zip(tensors, others, strict=True)]
    return _LIKE[tensors[0].dtype], np.array(rows, dtype=np.int64)


def compiled(function: F, **options: Any) -> F:
    """Compiles when it is first called, and keeps that on disk where something can be kept."""
    try:
        made: F = numba.njit(cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        made = numba.njit(error_model="numpy", **options)(function)
    return made


def summing(function: F) -> F:
    """The same, with sums in an order that adds several entries at a time; it is the same order each time."""
    return compiled(function, fastmath={"reassoc", "nsz"})


def _pointer(_: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


_at: Any = intrinsic(_pointer)


# ---- activations


class ColumnSums:
    """Adds up entries, and their sizes, by channel.

    Args:
        dim: where channels are, counted from the end; other dimensions are rows.
        total: where the sums are kept, which stays where it is.
        size: where the sums of sizes are kept; None where these are not wanted.
    """

    def __init__(self, dim: int, total: Tensor, size: Tensor | None) -> None:
        self._memory = total, size  # held, for the addresses are of it
        self._dim, self._dtype, self._channels, self._like = dim, total.dtype, total.numel(), _LIKE[total.dtype]
        self._total_at, self._size_at = total.data_ptr(), 0 if size is None else size.data_ptr()

    def add(self, x: Tensor, rows_before: int) -> int:
        """Takes in a tensor, if it is one of this kind.

        Args:
            x: what is added up.
            rows_before: how many rows are in the sums: without any they are set. Of one the size is told from the
                total.

        Returns:
            How many rows were added: 0 if it does not take it.
        """
        if x.dtype is not self._dtype or not x.is_cpu or type(x) not in PLAIN or not x.is_contiguous():
            return 0
        entries, channels, dim = x.numel(), self._channels, self._dim
        if entries > LARGE and not suit(self._dtype, entries):
            return 0
        inner, rows = 1 if dim == -1 else math.prod(x.shape[dim + 1 :]), entries // channels
        addresses = self._total_at, self._size_at
        _sum_columns(self._like, x.data_ptr(), rows // inner, channels, inner, *addresses, rows_before)
        return rows


def column_sums(dim: int, total: Tensor, size: Tensor | None) -> Callable[[Tensor, int], int]:
    """What adds up activations."""
    return ColumnSums(dim, total, size).add


@summing
def _sum_columns(
    like: Any, x_at: int, outer: int, channels: int, inner: int, total_at: int, size_at: int, rows_before: int
) -> None:
    entries = numba.carray(_at(x_at), (outer, channels, inner), like.dtype)
    totals = numba.carray(_at(total_at), channels, like.dtype)
    if outer * inner == 1 and rows_before == 0:  # of one example: nothing to add
        for c in range(channels):
            totals[c] = entries[0, c, 0]
        if size_at:
            first_sizes = numba.carray(_at(size_at), channels, like.dtype)
            for c in range(channels):
                first_sizes[c] = abs(entries[0, c, 0])
        return
    sums, sums_of_sizes = np.zeros(channels), np.zeros(channels)
    for o in range(outer):
        if inner == 1:
            for c in range(channels):
                sums[c] += entries[o, c, 0]
            if size_at:
                for c in range(channels):
                    sums_of_sizes[c] += abs(entries[o, c, 0])
        else:
            for c in range(channels):
                sum_of_channel = sum_of_sizes = 0.0
                for i in range(inner):
                    sum_of_channel += entries[o, c, i]
                    sum_of_sizes += abs(entries[o, c, i])
                sums[c] += sum_of_channel
                sums_of_sizes[c] += sum_of_sizes
    if size_at:
        sizes = numba.carray(_at(size_at), channels, like.dtype)
        for c in range(channels):
            if rows_before == 0:
                sizes[c] = sums_of_sizes[c]
            elif rows_before == 1:
                sizes[c] = abs(totals[c]) + sums_of_sizes[c]
            else:
                sizes[c] += sums_of_sizes[c]
    for c in range(channels):
        totals[c] = sums[c] if rows_before == 0 else totals[c] + sums[c]


def average_in(averages: Tensors, weight: float) -> None:
    """Moves averages towards the values beside them, but for those that are not finite; rounded once."""
    like, rows = averages.places
    _average_in(like, rows, weight)


@compiled
def _average_in(like: Any, places: Any, weight: float) -> None:
    for t in range(len(places)):
        at, count, beside_at = places[t]
        averages = numba.carray(_at(at), count, like.dtype)
        values = numba.carray(_at(beside_at), count, like.dtype)
        for i in range(len(averages)):
            value = values[i] if values[i] * 0 == 0 else averages[i]
            averages[i] = averages[i] * (1.0 - weight) + value * weight


def average_utilities(averages: Tensors, gradients: Tensors, weight: float) -> None:
    """Moves averages towards the size of the weight beside each, times its gradient, but for what is not finite."""
    like, rows = averages.places
    _average_utilities(like, rows, gradients.places[1], weight)


@compiled
def _average_utilities(like: Any, places: Any, of_gradients: Any, weight: float) -> None:
    for t in range(len(places)):
        at, count, beside_at = places[t]
        averages = numba.carray(_at(at), count, like.dtype)
        weights = numba.carray(_at(beside_at), count, like.dtype)
        gradients = numba.carray(_at(of_gradients[t, 0]), count, like.dtype)
        for i in range(len(averages)):
            value = abs(weights[i] * gradients[i])
            value = value if value * 0 == 0 else averages[i]
            averages[i] = averages[i] * (1.0 - weight) + value * weight


# ---- weights


def reader_table(shapes: np.ndarray[Any, Any], device: torch.device) -> np.ndarray[Any, Any]:
    """What ``contributions`` is told of readers, from ``reader_shapes``."""
    return shapes


def contributions(weights: Tensors, readers: np.ndarray[Any, Any], sizes: Tensor | None, out: Tensor) -> None:
    """For each unit: the size of its activation times the mean size of the weights that use it, over all readers.

    Args:
        weights: of the readers, their entries in order.
        readers: from ``reader_table``.
        sizes: of the activations of all columns; None for 1.
        out: where to write, for all units. A unit's columns in one reader give their mean, and readers add up.
    """
    address = 0 if sizes is None else sizes.data_ptr()
    like, rows = weights.places
    _contributions(like, rows, readers, address, out.data_ptr(), out.numel())


@summing
def _contributions(like: Any, places: Any, readers: Any, sizes_at: int, out_at: int, units: int) -> None:
    out = numba.carray(_at(out_at), units, like.dtype)
    out[:] = 0.0
    for r in range(len(places)):
        first_unit, first_column, per_unit, groups, outputs, inputs, kernel, is_transposed = readers[r]
        at, _, _ = places[r]
        sums = np.zeros(groups * inputs)
        if is_transposed:
            by_input = numba.carray(_at(at), (inputs, outputs * kernel), like.dtype)
            for i in range(inputs):
                total = 0.0
                for k in range(outputs * kernel):
                    total += abs(by_input[i, k])
                sums[i] = total
        elif kernel == 1:
            by_output = numba.carray(_at(at), (groups, outputs, inputs), like.dtype)
            for g in range(groups):
                _add_sizes_of_rows(by_output[g], sums[g * inputs : (g + 1) * inputs])
        else:
            by_place = numba.carray(_at(at), (groups, outputs, inputs, kernel), like.dtype)
            for g in range(groups):
                for o in range(outputs):
                    for i in range(inputs):
                        total = 0.0
                        for k in range(kernel):
                            total += abs(by_place[g, o, i, k])
                        sums[g * inputs + i] += total
        share = 1.0 / (outputs * kernel * per_unit)
        for c in range(groups * inputs):
            if sizes_at:
                sums[c] *= numba.carray(_at(sizes_at), first_column + c + 1, like.dtype)[first_column + c]
            out[first_unit + c // per_unit] += sums[c] * share


@compiled
def _add_sizes_of_rows(rows: Any, sums: Any) -> None:
    by_fours = len(rows) - len(rows) % 4  # sums are read and written once for four rows, in the order of rows
    for r in range(0, by_fours, 4):
        first, second, third, fourth = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        for i in range(len(sums)):
            total = sums[i] + abs(first[i])
            total += abs(second[i])
            total += abs(third[i])
            sums[i] = total + abs(fourth[i])
    for r in range(by_fours, len(rows)):
        for i in range(len(sums)):
            sums[i] += abs(rows[r, i])


def clamp(tensors: Tensors, limits: Sequence[float]) -> None:
    """Brings all entries of each tensor into its limits."""
    like, rows = tensors.places
    _clamp(like, _BITS[like.dtype.itemsize], rows, _array(tuple(limits), like.dtype))


@lru_cache(maxsize=64)
def _array(numbers: tuple[float, ...], dtype: Any) -> np.ndarray[Any, Any]:
    return np.array(numbers, dtype)


@compiled
def _clamp(like: Any, bits: Any, places: Any, limits: Any) -> None:
    without_sign = np.iinfo(bits.dtype).max
    bits_of_limits = numba.carray(_at(limits.ctypes.data), len(limits), bits.dtype)
    for t in range(len(places)):
        at, count, _ = places[t]
        entries, limit = numba.carray(_at(at), count, like.dtype), limits[t]
        # Numbers without their signs are ordered as their bits are, as integers, of which many are compared at once.
        sizes, bits_of_limit = numba.carray(_at(at), count, bits.dtype), bits_of_limits[t]
        for start in range(0, len(entries), 1024):
            largest = bits.dtype.type(0)
            for size in sizes[start : start + 1024]:
                largest = max(largest, size & without_sign)
            if largest > bits_of_limit:  # seldom: most pieces are only read
                piece = entries[start : start + 1024]
                for i in range(len(piece)):
                    if piece[i] > limit:
                        piece[i] = limit
                    elif piece[i] < -limit:
                        piece[i] = -limit


def norms(tensors: Tensors, out: Tensor) -> None:
    """Writes the Euclidean norm of each tensor, in ``out``'s type."""
    like, rows = tensors.places
    _norms(like, rows, out.numpy())


@summing
def _norms(like: Any, places: Any, out: Any) -> None:
    for t in range(len(places)):
        at, count, _ = places[t]
        entries = numba.carray(_at(at), count, like.dtype)
        total = 0.0
        for i in range(len(entries)):
            entry = float(entries[i])
            total += entry * entry
        out[t] = np.sqrt(total)


def rescaling_factors(
    tensors: Tensors, initial_norms: Tensor, coefficients: Tensor, exponents: Tensor, factors: Tensor
) -> None:
    """Writes the exponentials of ``exponents @ log_rescaling_factors(norms(tensors), initial_norms, coefficients)``.

    All of these are of the tensors' type, with their entries in order.
    """
    addresses = initial_norms.data_ptr(), coefficients.data_ptr(), exponents.data_ptr(), factors.data_ptr()
    like, rows = tensors.places
    _rescaling_factors(like, rows, *addresses, factors.numel())


@compiled
def _rescaling_factors(
    like: Any, places: Any, initial_at: int, coefficients_at: int, exponents_at: int, factors_at: int, count: int
) -> None:
    weights, smallest = len(places), np.finfo(like.dtype).eps - 1
    initial = numba.carray(_at(initial_at), weights, like.dtype)
    coefficients = numba.carray(_at(coefficients_at), weights, like.dtype)
    exponents = numba.carray(_at(exponents_at), (count, weights), like.dtype)
    factors = numba.carray(_at(factors_at), count, like.dtype)
    logs, norms = np.zeros(weights), np.empty(weights, like.dtype)
    _norms(like, places, norms)
    for t in range(weights):
        if norms[t] > 0 and norms[t] < np.inf:
            logs[t] = np.log1p(max(coefficients[t] * (initial[t] / float(norms[t]) - 1.0), smallest))
    for f in range(count):
        total = 0.0
        for t in range(weights):
            total += exponents[f, t] * logs[t]
        factors[f] = np.exp(total)


def scale(tensors: Tensors, factors: Tensor) -> None:
    """Multiplies each tensor by its factor, which is of their type."""
    in_order = factors.contiguous()
    like, rows = tensors.places
    _scale(like, rows, in_order.data_ptr())


@compiled
def _scale(like: Any, places: Any, factors_at: int) -> None:
    factors = numba.carray(_at(factors_at), len(places), like.dtype)
    for t in range(len(places)):
        at, count, _ = places[t]
        entries, factor = numba.carray(_at(at), count, like.dtype), factors[t]
        for i in range(len(entries)):
            entries[i] *= factor


def overflow(tensors: Tensors, factors: Tensor) -> bool:
    """Whether a finite entry times its tensor's factor is not finite."""
    in_order = factors.to(tensors.tensors[0].dtype).contiguous()
    like, rows = tensors.places
    return bool(_overflow(like, rows, in_order.data_ptr()))


@compiled
def _overflow(like: Any, places: Any, factors_at: int) -> Any:
    factors = numba.carray(_at(factors_at), len(places), like.dtype)
    for t in range(len(places)):
        at, count, _ = places[t]
        entries, factor = numba.carray(_at(at), count, like.dtype), factors[t]
        if factor > 1:
            for i in range(len(entries)):
                if np.isfinite(entries[i]) and not np.isfinite(entries[i] * factor):
                    return True
    return False


def pull(tensors: Tensors, rate: float) -> None:
    """Draws tensors towards what is beside them: adds the ``-rate``-fold of the difference."""
    like, rows = tensors.places
    _pull(like, rows, like.dtype.type(-rate))


@compiled
def _pull(like: Any, places: Any, factor: Any) -> None:
    for t in range(len(places)):
        at, count, beside_at = places[t]
        entries = numba.carray(_at(at), count, like.dtype)
        targets = numba.carray(_at(beside_at), count, like.dtype)
        for i in range(len(entries)):
            entries[i] += (entries[i] - targets[i]) * factor
