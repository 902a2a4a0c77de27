"""How active units were since the last step, as the layers that read them are given it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.forward import ModelHook, compiler_is_near, in_backward
from lightning_plasticity.engine.unit_sets import Reader
from lightning_plasticity.kernels import kernels_on
from lightning_plasticity.layer_views import LayerView
from lightning_plasticity.shards.layers import heard_by_all
from lightning_plasticity.shards.tensors import is_shared_out
from lightning_plasticity.units.examining import is_examining

_PIECE = 2**18  # entries
_KINDS_OF_BATCHES = 16  # whose sizes are remembered on the device

_listeners: weakref.WeakValueDictionary[int, Callable[[Tensor, bool], None]] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # not in torch 2.6

# What a hook is in compiled code: one operator that the compiler does not look into, and knows no more of than a tensor
# that holds a number. So there is nothing to guard on, and layers that are alike share their code. The operator claims
# to write to that tensor, so that no call of it is left out or moved. The tensor is on the CPU to keep the operator out
# of CUDA graphs: they would repeat its kernels without its Python.
_OPERATOR = "lightning_plasticity::hear"
_TAGS = ("pt2_compliant_tag", "flexible_layout", "cudagraph_unsafe")  # the last is not in torch 2.6
torch.library.define(
    _OPERATOR,
    "(Tensor(a!) number, Tensor x) -> ()",
    tags=[getattr(torch.Tag, name) for name in _TAGS if hasattr(torch.Tag, name)],
)


def _hear(number: Tensor, x: Tensor) -> None:
    listener = _listeners.get(int(number))
    if listener is not None:  # its hook is still there
        listener(x, True)


torch.library.impl(_OPERATOR, "default", _hear)
torch.library.register_fake(_OPERATOR, lambda number, x: None)


class Activations:
    """Adds up what the readers of units are given, and its size, over examples and positions until it is taken.

    The sums are written into memory that stays: in a small network a new tensor costs more than what is computed.

    Args:
        callback: the method; calls count while its scope is in training mode.
        with_sizes: whether mean sizes are wanted, besides means.
        with_inputs: hold the inputs themselves until they are taken, for ``take_mean_distance``.
    """

    def __init__(self, callback: PlasticityCallback, with_sizes: bool, with_inputs: bool) -> None:
        self._callback = callback
        self.listening = True
        self._with_sizes, self._with_inputs = with_sizes, with_inputs
        self._readers: list[Reader] = []
        self._rows: list[int] = []  # how many each reader has been given
        self._lacks_sizes = False  # whether there are sums of one row, whose sizes are still to be made from the totals
        self._sums = torch.zeros(2, 0)  # totals and sizes, whose own names are
        self._totals, self._sizes = self._sums
        self._parts: list[tuple[Tensor, Tensor]] = []  # of totals and sizes, for each reader
        self._counts: dict[tuple[int, ...], Tensor] = {}
        self._inputs: dict[int, list[Tensor]] = {}
        self._kernels: list[Callable[[Tensor, int], int] | None] = []  # what adds up for each reader

    def _find_kernels(self) -> None:
        """Kernels add up what readers are given whose entries are all inputs of a layer that nobody else reads."""
        found = kernels_on(self._sums.device.type)
        self._kernels = [
            found.column_sums(reader.view.channel_dim, total, size if self._with_sizes else None)
            if found is not None and reader.in_order and not self._with_inputs and total.numel()
            else None
            for reader, (total, size) in zip(self._readers, self._parts, strict=True)
        ]

    def add(self, readers: Sequence[Reader], zeros: Callable[[int], Tensor]) -> None:
        """Makes room for more readers, which have the next numbers; ``zeros`` makes an array."""
        self._readers += readers
        self._rows += [0] * len(readers)
        more = sum(reader.table.entries.numel() for reader in readers)
        self._sums = torch.cat([self._sums.to(zeros(0)), torch.stack([zeros(more), zeros(more)])], 1)
        self._totals, self._sizes = self._sums
        self._parts = [(self._sums[0, reader.columns], self._sums[1, reader.columns]) for reader in self._readers]
        self._counts = {}
        self._find_kernels()

    def listen(self, layer: LayerView, readers: Sequence[Reader]) -> RemovableHandle:
        """Hears what a layer is given whenever it is called, for those who read it."""
        channels, dim, scope = layer.inputs, layer.channel_dim, self._callback.scope
        is_split = is_shared_out(layer.weight)  # perhaps by tensor parallelism

        def hear(x: Tensor, is_lent: bool) -> None:
            """``is_lent``: of memory that compiled code writes to again."""
            if not self.listening or not scope.training or in_backward() or is_examining():
                return
            if is_split:
                x = heard_by_all(x, dim)
                check_channels(x.shape[dim], channels)
            n = readers[0].number
            kernel = self._kernels[n] if len(readers) == 1 else None
            if kernel is not None:
                added = kernel(x, self._rows[n])
                if added:
                    self._rows[n] += added
                    return
            is_only = len(readers) == 1 and readers[0].in_order and not self._with_inputs
            x = x.detach()
            if x.ndim == -dim:
                x = x.unsqueeze(0)  # without a batch
            rows, size = x.numel() // channels, None
            others = [d for d in range(x.ndim) if d != x.ndim + dim]
            if is_only and rows > 1 and not self._rows[n]:
                self._sum_at_once(x, others, n, rows)
                return
            total = x.reshape(channels) if rows == 1 else x.sum(others, dtype=self._sums.dtype)
            if rows > 1 and self._with_sizes:
                size = sum_of_sizes(x, others, self._sums.dtype)
            for reader in readers:
                self._note(reader, rows, total, size)
                if self._with_inputs:
                    inputs = x.movedim(dim, -1).flatten(0, -2)
                    self._inputs.setdefault(reader.number, []).append(inputs.clone() if is_lent else inputs)

        uncompiled: Callable[[Tensor, bool], None] = torch.compiler.disable(hear)  # type: ignore[no-untyped-call]
        number = torch.tensor(next(_numbers), device="cpu")
        _listeners[int(number)] = hear

        def listener(x: Tensor) -> None:
            if is_compiling():
                if not _is_exporting():
                    torch.ops.lightning_plasticity.hear(number, x.detach())
            elif compiler_is_near():
                uncompiled(x, False)
            else:
                hear(x, False)

        return layer.hear(listener, ModelHook)

    def _sum_at_once(self, x: Tensor, dims: list[int], number: int, rows: int) -> None:
        """Writes the sums of what a reader is given right where they stay."""
        total, size = self._parts[number]
        torch.sum(x, dims, dtype=total.dtype, out=total)
        if self._with_sizes:
            write_sum_of_sizes(x, dims, size)
        self._rows[number] = rows

    def _note(self, reader: Reader, rows: int, total: Tensor, size: Tensor | None) -> None:
        """Adds totals and sizes by channel; of a single row no sizes are given."""
        n = reader.number
        before = self._rows[n]
        self._rows[n] = before + rows
        if not reader.in_order:
            total, size = reader.take(total), None if size is None else reader.take(size)
        total_so_far, size_so_far = self._parts[n]
        if before == 0:
            total_so_far.copy_(total)
            if size is not None:
                size_so_far.copy_(size)
            self._lacks_sizes |= size is None
            return
        if self._with_sizes:
            if before == 1:
                torch.abs(total_so_far, out=size_so_far)
            size_so_far += total.abs() if size is None else size
        total_so_far += total

    def state(self) -> tuple[Tensor, Tensor]:
        """What was read since it was last taken, for the checkpoint: an optimizer may step less often than others.

        Totals and sizes, two rows over all columns, and for each reader of how many rows they are.
        """
        sums = torch.zeros_like(self._sums)
        for reader, rows, (total, size) in zip(self._readers, self._rows, self._parts, strict=True):
            if rows:
                sums[:, reader.columns] = torch.stack([total, total.abs() if rows == 1 else size])
        return sums, torch.tensor(self._rows, device=sums.device)

    def restore(self, readers: Sequence[Reader], sums: Tensor, rows: Sequence[int]) -> None:
        """From the checkpoint, for readers that follow each other; a first forward pass may have been read already."""
        totals, sizes = sums.to(self._sums)
        first = readers[0].columns.start
        for reader, count in zip(readers, rows, strict=True):
            if count:
                columns = slice(reader.columns.start - first, reader.columns.stop - first)
                self._note(replace(reader, in_order=True), count, totals[columns], sizes[columns])

    def forget(self) -> None:
        """Drops what was read since it was last taken: no step has followed it."""
        self._rows = [0] * len(self._rows)
        self._inputs.clear()

    def are_read(self, readers: Sequence[Reader]) -> bool:
        """Whether each of the readers was given something since it was last taken."""
        if len(readers) == len(self._rows):
            return all(self._rows)
        return all(self._rows[reader.number] for reader in readers)

    def take_means(self, readers: Sequence[Reader]) -> tuple[Tensor, Tensor]:
        """The means of what these readers were given since it was last taken, and the mean sizes if these are wanted.

        In arrays over the columns of all readers, to be used before the next forward pass.
        """
        totals, sizes, rows = self._totals, self._sizes, self._rows
        if len(readers) == len(rows) and rows.count(rows[0]) == len(rows):  # the usual case
            self._rows = [0] * len(rows)
            if rows[0] > 1:
                self._sums /= rows[0]
            elif self._with_sizes and self._lacks_sizes:
                torch.abs(totals, out=sizes)
            self._lacks_sizes = False
            return totals, sizes
        rows = [0] * len(rows)
        for reader in readers:
            n = reader.number
            rows[n], self._rows[n] = self._rows[n], 0
        for reader in readers if self._with_sizes else ():
            if rows[reader.number] == 1:
                torch.abs(totals[reader.columns], out=sizes[reader.columns])
        self._sums /= self._counts_of(tuple(rows))
        return totals, sizes

    def _counts_of(self, rows: tuple[int, ...]) -> Tensor:
        """By what the sums of each column are divided. Kept for the next step, which mostly has batches as large."""
        if rows not in self._counts:
            if len(self._counts) > _KINDS_OF_BATCHES:
                self._counts.clear()
            counts = [max(count, 1) for count in rows]
            widths = [reader.table.entries.numel() for reader in self._readers]
            each = torch.tensor(counts).repeat_interleave(torch.tensor(widths))
            self._counts[rows] = each.to(self._sums)
        return self._counts[rows]

    def take_mean_distance(self, centre: Tensor, readers: Sequence[Reader]) -> Tensor:
        """The mean distance of what the readers were given from a value for each column, since it was last taken."""
        parts, start = [], 0
        for reader in readers:
            stop = start + reader.table.entries.numel()
            inputs = self._inputs.pop(reader.number)
            distances = [(reader.take(x.T).T - centre[start:stop]).abs().sum(0) for x in inputs]
            parts.append(torch.stack(distances).sum(0) / sum(len(x) for x in inputs))
            start = stop
        return torch.cat(parts)


def check_channels(given: int, channels: int) -> None:
    """Raise where a layer that is shared out is given a piece of its input that does not say which."""
    if given != channels:
        raise RuntimeError(
            f"Under tensor parallelism a layer of {channels} inputs must be given a DTensor where they are split, got "
            f"a tensor with {given}. Split the layer by RowwiseParallel of torch.distributed.tensor.parallel."
        )


def write_sum_of_sizes(x: Tensor, dims: list[int], out: Tensor) -> None:
    """Writes the sum of the absolute values over some dimensions."""
    if x.is_cpu:
        out.copy_(sum_of_sizes(x, dims, out.dtype))
    else:
        torch.linalg.vector_norm(x, 1, dims, dtype=out.dtype, out=out)


def sum_of_sizes(x: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
    """The sum of the absolute values over some dimensions.

    On the CPU the kernel of ``vector_norm`` is several times slower over leading dimensions than ``abs`` and ``sum``;
    these go piece by piece, so that the absolute values stay in the cache and memory does not grow.
    """
    if not x.is_cpu:
        sizes: Tensor = torch.linalg.vector_norm(x, 1, dims, dtype=dtype)
        return sizes
    if x.numel() <= _PIECE:
        return torch.sum(x.abs(), dims, dtype=dtype)
    rows = max(1, _PIECE * x.shape[dims[0]] // x.numel())
    return torch.stack([piece.abs().sum(dims, dtype=dtype) for piece in torch.split(x, rows, dims[0])]).sum(0)
