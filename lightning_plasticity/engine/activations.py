"""How active units were since the last step, as the layers that read them are given it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.conv import _ConvNd

from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.forward import ModelHook, in_backward
from lightning_plasticity.engine.unit_sets import Reader, channels_of
from lightning_plasticity.units.examining import is_examining

_PIECE = 2**18  # entries
_SMALL = 2**16  # entries whose absolute values are written to memory that stays

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
        self._rows: list[int] = []  # how many each reader has been given; of one row the size follows from the total
        self._totals = self._sizes = torch.zeros(0)
        self._parts: list[tuple[Tensor, Tensor]] = []  # of totals and sizes, for each reader
        self._inputs: dict[int, list[Tensor]] = {}
        self._memory: dict[torch.Size, Tensor] = {}

    def add(self, readers: Sequence[Reader], zeros: Callable[[int], Tensor]) -> None:
        """Makes room for more readers, which have the next numbers; ``zeros`` makes an array."""
        self._readers += readers
        self._rows += [0] * len(readers)
        more = sum(reader.table.entries.numel() for reader in readers)
        self._totals, self._sizes = (
            torch.cat([sums.to(zeros(0)), zeros(more)]) for sums in (self._totals, self._sizes)
        )
        # With a dimension for the row.
        sums = torch.stack([self._totals, self._sizes]).unsqueeze(1)
        self._totals, self._sizes = sums[0, 0], sums[1, 0]
        self._parts = [(sums[0, :, reader.columns], sums[1, :, reader.columns]) for reader in self._readers]

    def hook(self, layer: nn.Module, readers: Sequence[Reader]) -> ModelHook:
        """What to call with the arguments and keyword arguments of each call of a layer."""
        channels = channels_of(layer)
        dim = -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1

        def hear(x: Tensor, is_lent: bool) -> None:
            """``is_lent``: of memory that compiled code writes to again."""
            if not self.listening or not self._callback.scope_is_training or in_backward() or is_examining():
                return
            x = x.detach()
            if x.ndim == -dim:
                x = x.unsqueeze(0)  # without a batch
            rows, size = x.numel() // channels, None
            if rows == 1:
                total = x.view(1, channels) if x.ndim != 2 else x
            elif dim == -1 and self._is_first_and_only(readers) and x.dtype == self._totals.dtype:
                # The usual case of a linear layer: written where it stays, without tensors in between.
                first = readers[0].number
                self._rows[first] = rows
                (total, size), flat = self._parts[first], x.reshape(rows, channels)
                torch.sum(flat, 0, keepdim=True, out=total)
                if self._with_sizes:
                    self.write_sum_of_sizes(flat, size)
                return
            else:
                others = [d for d in range(x.ndim) if d != x.ndim + dim]
                total = x.sum(others, dtype=self._totals.dtype)
                size = sum_of_sizes(x, others, self._totals.dtype) if self._with_sizes else None
            for reader in readers:
                self._note(reader, rows, total, size)
                if self._with_inputs:
                    inputs = x.movedim(dim, -1).flatten(0, -2)
                    self._inputs.setdefault(reader.number, []).append(inputs.clone() if is_lent else inputs)

        uncompiled: Callable[[Tensor, bool], None] = torch.compiler.disable(hear)  # type: ignore[no-untyped-call]
        number = torch.tensor(next(_numbers), device="cpu")
        _listeners[int(number)] = hear

        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["input"]
            if not is_compiling():
                uncompiled(x, False)
            elif not _is_exporting():
                torch.ops.lightning_plasticity.hear(number, x.detach())

        return ModelHook(hook)

    def _is_first_and_only(self, readers: Sequence[Reader]) -> bool:
        """Whether what the one reader of a layer is given need not be added to anything, picked from or kept."""
        first = readers[0]
        return len(readers) == 1 and first.in_order and not self._rows[first.number] and not self._with_inputs

    def write_sum_of_sizes(self, x: Tensor, out: Tensor) -> None:
        """Writes the sum of the absolute values over rows, as a row."""
        if x.is_cpu and x.numel() <= _SMALL and x.dtype == out.dtype:
            if x.shape not in self._memory:
                whole = self._memory.setdefault(torch.Size([_SMALL]), torch.empty(_SMALL, dtype=x.dtype))
                self._memory[x.shape] = whole[: x.numel()].view(x.shape)
            torch.sum(torch.abs(x, out=self._memory[x.shape]), 0, keepdim=True, out=out)
        else:
            out.copy_(sum_of_sizes(x, [0], out.dtype))

    def _note(self, reader: Reader, rows: int, total: Tensor, size: Tensor | None) -> None:
        """Adds totals and sizes by channel; of a single row no sizes are given."""
        n = reader.number
        before = self._rows[n]
        self._rows[n] = before + rows
        if not reader.in_order:
            total, size = reader.take(total.flatten()), None if size is None else reader.take(size)
        total_so_far, size_so_far = self._parts[n]
        if before == 0:
            total_so_far.copy_(total)
            if size is not None:
                size_so_far.copy_(size)
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
        sums = torch.zeros_like(torch.stack([self._totals, self._sizes]))
        for reader, rows, (total, size) in zip(self._readers, self._rows, self._parts, strict=True):
            if rows:
                sums[:, reader.columns] = torch.cat([total, total.abs() if rows == 1 else size])
        return sums, torch.tensor(self._rows, device=sums.device)

    def restore(self, readers: Sequence[Reader], sums: Tensor, rows: Sequence[int]) -> None:
        """From the checkpoint, for readers that follow each other; a first forward pass may have been read already."""
        totals, sizes = sums.to(self._totals)
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
        return all([self._rows[reader.number] for reader in readers])  # noqa: C419 (a list takes half the time)

    def take_means(self, readers: Sequence[Reader]) -> tuple[Tensor, Tensor]:
        """The means of what these readers were given since it was last taken, and the mean sizes if these are wanted.

        In arrays over the columns of all readers, to be used before the next forward pass.
        """
        rows = [self._rows[reader.number] for reader in readers]
        for reader in readers:
            self._rows[reader.number] = 0
        if len(readers) == len(self._readers) and min(rows) == max(rows):
            self._finish(rows[0], self._totals, self._sizes)
        else:
            for reader, count in zip(readers, rows, strict=True):
                self._finish(count, *self._parts[reader.number])
        return self._totals, self._sizes

    def _finish(self, rows: int, totals: Tensor, sizes: Tensor) -> None:
        if rows > 1:
            totals /= rows
            sizes /= rows
        elif self._with_sizes:
            torch.abs(totals, out=sizes)

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
