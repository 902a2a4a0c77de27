"""The units that a method works on: how active they were since the last step, and how to replace them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_plasticity.distributed import sum_over_ranks
from lightning_plasticity.editing.initial import InitialDistribution
from lightning_plasticity.engine.activations import Activations, sum_of_sizes, write_sum_of_sizes
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.known_units import Index, KnownUnits
from lightning_plasticity.engine.unit_sets import Reader, UnitSet, reader_shapes
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.shards.layers import by_output, inputs_read, matrix
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.tensors import gradient, is_shared_out
from lightning_plasticity.units.find import HiddenUnits


class Population(KnownUnits):
    """What methods ask of their units: activations, weights and gradients, in flat arrays over units and columns.

    Args:
        callback, units, exclude: see ``KnownUnits``.
        keep_inputs: hold what the readers read until the next step, for ``take_mean_distance``.
        reads_sizes: whether the mean sizes of activations are wanted, besides their means.
    """

    def __init__(
        self,
        callback: PlasticityCallback,
        units: Sequence[HiddenUnits] | None,
        exclude: Sequence[str] | str,
        keep_inputs: bool,
        reads_sizes: bool,
    ) -> None:
        self._reads_sizes = reads_sizes
        self._keep_inputs = keep_inputs
        self._hooks: dict[str, RemovableHandle] = {}  # of the layers that are heard
        super().__init__(callback, units, exclude)

    @override
    def clear(self) -> None:
        super().clear()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        self.activations = Activations(self._callback, self._reads_sizes, self._keep_inputs)
        self._are_shared_out = False
        self._row_lengths = torch.zeros(0)  # how many weights are in each main row of each unit
        self._outgoing = self._share_of_weight = torch.zeros(0)
        self._outgoing_of: list[Tensor] = []  # of each reader
        self._contribution = torch.zeros(0)
        self._read_weights: Tensors | None = None  # None where kernels cannot read them
        self._reader_table: Any = None  # what kernels know of them besides

    @override
    def _grow(self) -> None:
        for module, readers in self._readers.items():
            if module not in self._hooks:
                self._hooks[module] = self.activations.listen(readers[0].view, readers)
                self._callback.keep(self._hooks[module])
        lengths = [self.zeros(s.units.size) + s.weights_per_row for s in self.sets]
        self._row_lengths = torch.cat([self.zeros(0), *lengths])
        self.activations.add(self._by_number[len(self._outgoing_of) :], self.zeros)
        self._are_shared_out = any(map(is_shared_out, self._weights))
        shares = [
            self.zeros(r.table.entries.numel()) + self._share_of(r.weight) / r.weights_per_column
            for r in self._by_number
        ]
        self._share_of_weight = torch.cat([self.zeros(0), *shares])
        self._outgoing = self.zeros(self.columns)
        self._outgoing_of = [self._outgoing[reader.columns] for reader in self._by_number]
        self._contribution, self._read_weights = self.zeros(self.size), None
        are_whole = all(reader.in_order and not reader.view.part for reader in self._by_number)
        if are_whole:
            self._read_weights = Tensors([reader.weight for reader in self._by_number], in_order=True)
            self._reader_table = None

    def _share_of(self, tensor: Tensor) -> float:
        """By what a sum over the part of a tensor is multiplied before :meth:`_over_ranks`."""
        return part_of(tensor).share if self._are_shared_out else 1.0

    def _over_ranks(self, values: list[Tensor]) -> list[Tensor]:
        """The sums over all ranks, in one message, where parameters are shared out; otherwise each rank has it all."""
        return sum_over_ranks(values) if self._are_shared_out else values

    # ---- activations

    def heard(self, sets: Sequence[int]) -> Sequence[int]:
        """Those of the sets whose activations were read since they were last taken."""
        if self.activations.are_read(self.readers(sets)):
            return sets
        return [i for i in sets if self.activations.are_read(self.sets[i].readers)]

    def take_means(self, sets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The mean activation and mean size of activation of each column of the sets, since they were last taken.

        Over the columns in the order of ``places(sets)``; to be used before the next forward pass.
        """
        means, sizes = self.activations.take_means(self.readers(sets))
        _, columns = self.places(sets)
        return (means, sizes) if isinstance(columns, slice) else (means[columns], sizes[columns])

    # ---- weights

    def contribution(self, sets: Sequence[int], sizes: Tensor | None = None) -> Tensor:
        """For each unit of the sets the mean size of its outgoing weights, times that of its activation.

        ``sizes`` are of all columns of the sets; without them only the weights count. To be used before the next call.
        """
        weights, kernels = self._read_weights, None
        if weights is not None and len(sets) == len(self.sets):
            kernels = weights.kernels()
        if weights is None or kernels is None or weights.tensors[0].dtype != self.dtype:
            outgoing = self._outgoing_sizes(sets)
            return self.per_unit(outgoing if sizes is None else outgoing.mul_(sizes), sets)
        if self._reader_table is None:
            self._reader_table = kernels.reader_table(reader_shapes(self.sets), self.device)
        kernels.contributions(weights, self._reader_table, sizes, self._contribution)
        return self._contribution

    def _outgoing_sizes(self, sets: Sequence[int]) -> Tensor:
        """For each column of the sets the mean size of the weights that it is multiplied by."""
        for reader in self.readers(sets):
            sizes = self._outgoing_of[reader.number]
            if reader.in_order:
                _write_size_by_column(reader, sizes)
            else:
                every = sizes.new_empty(reader.view.inputs)
                _write_size_by_column(reader, every)
                sizes.copy_(reader.take(every))
        _, columns = self.places(sets)
        if isinstance(columns, slice):
            return self._over_ranks([self._outgoing.mul_(self._share_of_weight)])[0]
        return self._over_ranks([self._outgoing[columns] * self._share_of_weight[columns]])[0]

    def incoming(self, sets: Sequence[int]) -> Tensor:
        """For each unit of the sets the mean size of the weights of the main row that makes it."""
        return self._mean_sizes(sets, [self._sizes_by_row(self.sets[i], self.sets[i].weights[0])[:, 0] for i in sets])

    def gradient_sizes(self, sets: Sequence[int]) -> tuple[Sequence[int], Tensor]:
        """For each unit of those of the sets that have gradients the mean size of these in the main rows that make it.

        Returns:
            Which sets these are, and the sizes over their units, in the order of ``places``.
        """
        found = {i: of_set for i in sets if (of_set := gradient(self.sets[i].weights[0])) is not None}
        if not found:
            return [], self.zeros(0)
        sizes = [self._sizes_by_row(self.sets[i], of_set) for i, of_set in found.items()]
        of_units = [rows.mean(1) if rows.shape[1] > 1 else rows.squeeze(1) for rows in sizes]
        return [*found], self._mean_sizes([*found], of_units)

    def _sizes_by_row(self, unit_set: UnitSet, tensor: Tensor) -> Tensor:
        """For each unit the sums of the sizes of entries in the main rows that make it, before :meth:`_over_ranks`."""
        main = unit_set.producers[0]
        part = by_output(main.layer, tensor.detach())
        rows = part.local.flatten(1)
        if rows.is_cpu:
            sizes = rows.abs().sum(1, dtype=self.dtype)
        else:
            sizes = torch.linalg.vector_norm(rows, 1, 1, dtype=self.dtype)
        if self._are_shared_out:
            sizes = part.spread(sizes, 0) * self._share_of(tensor)
        return sizes.unsqueeze(1) if main.is_in_order and len(sizes) == len(main.entries) else sizes[main.entries]

    def _mean_sizes(self, sets: Sequence[int], sums: Sequence[Tensor]) -> Tensor:
        """From sums over the main rows of units to means, over all ranks."""
        units, _ = self.places(sets)
        return self._over_ranks([torch.cat([*sums]) / self._row_lengths[units]])[0]

    def replace(
        self, chosen: Mapping[int, Tensor], initial: InitialDistribution, amounts: Tensor | None = None
    ) -> None:
        """Replaces units: ``chosen`` are units by set, ``amounts`` what is to be made up for of each of their columns.

        All biases are shifted by the old weights first, and all rows drawn before any column becomes zero: where two
        layers meet in one weight, the zero stays, and a replaced unit's bias is 0.
        """
        editor = self._callback.editor
        generator = self._callback.draws.generator(self.device)
        parts = [(self.sets[i], units) for i, units in chosen.items()]
        read = [(r.table.module, r.table.of_units(units)) for unit_set, units in parts for r in unit_set.readers]
        if amounts is not None:
            each = torch.split(amounts, [len(columns) for _, columns in read])
            for (module, columns), of_columns in zip(read, each, strict=True):
                editor.shift_bias(module, columns, of_columns)
        for unit_set, units in parts:
            for table in unit_set.producers:
                rows = table.of_units(units)
                editor.redraw_rows(table.module, rows, initial.draw(table.weight, generator, rows, table.layer))
            for table in unit_set.norms:
                editor.reset_norm(table.module, table.of_units(units))
        for module, columns in read:
            editor.zero_columns(module, columns)


def average_in(average: Tensor, places: Index, values: Tensor, weight: float) -> None:
    """Moves some places of a running average towards new values, except where these are not finite."""
    before = average[places]
    # x * 0 is 0 for every finite x, and otherwise NaN: this takes fewer kernels than isfinite
    values = torch.where(values * 0 == 0, values, before)
    if isinstance(places, slice):  # all of them
        average.mul_(1 - weight).add_(values, alpha=weight)
    else:
        average[places] = before * (1 - weight) + values * weight


def _write_size_by_column(reader: Reader, out: Tensor) -> None:
    """Writes, for each input of a layer, the sum of the sizes of the weights that it is multiplied by."""
    part = matrix(reader.view, reader.weight)
    if part.shards > 1 and reader.groups > 1:  # the rows of a group may be on several ranks
        sizes = part.local.flatten(2).abs().sum(2, dtype=out.dtype)
        out.zero_().index_add_(0, inputs_read(reader.view).flatten(), sizes.flatten())
        return
    if part.places(1) is not None:
        of_part = out.new_empty(part.local.shape[1])
        _write_size_of_columns(part.local, 1, of_part)
        out.copy_(part.spread(of_part, 1))
        return
    _write_size_of_columns(part.local, reader.groups, out)


def _write_size_of_columns(weight: Tensor, groups: int, out: Tensor) -> None:
    """For a weight with the outputs first."""
    dims = weight.ndim
    if groups > 1:
        weight, out = torch.unflatten(weight, 0, (groups, -1)), out.view(groups, -1)
    first = weight.ndim - dims  # 1 with a dimension for groups
    if not weight.is_cpu or weight.ndim == 2:
        write_sum_of_sizes(weight, [d for d in range(weight.ndim) if d not in (first - 1, first + 1)], out)
    else:  # over outputs first, with the kernel in one row with the inputs: over both at once takes twice the time
        sizes = sum_of_sizes(weight.flatten(first + 1), [first], out.dtype)
        torch.sum(sizes.view(*out.shape, -1), -1, out=out)
