"""The units that a method works on: how active they were since the last step, and how to replace them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_plasticity import checks
from lightning_plasticity.distributed import sum_over_ranks
from lightning_plasticity.editing.initial import InitialDistribution
from lightning_plasticity.engine.activations import Activations, sum_of_sizes, write_sum_of_sizes
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.unit_sets import Reader, Table, UnitSet, check_units, reader_shapes, renamed
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.layer_views import LayerView, layers_of
from lightning_plasticity.names import named_modules_as_written
from lightning_plasticity.shards import by_output, gradient, inputs_read, is_shared_out, matrix, part_of
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.find import Findings, HiddenUnits, explore

Index: TypeAlias = slice | Tensor


class Population:
    """All sets of units of a method, with flat arrays over all units and over all columns that read them.

    Args:
        callback: the method.
        units: the sets, given by hand; None to find them.
        exclude: patterns (as in ``fnmatch``) of names of sets to leave alone.
        keep_inputs: hold what the readers read until the next step, for ``take_mean_distance``.
        reads_sizes: whether the mean sizes of activations are wanted, besides their means.
    """

    def __init__(
        self,
        callback: PlasticityCallback,
        units: Sequence[HiddenUnits] | None,
        exclude: Sequence[str] | str,
        keep_inputs: bool = False,
        reads_sizes: bool = True,
    ) -> None:
        self._callback = callback
        self._reads_sizes = reads_sizes
        self._keep_inputs = keep_inputs
        self._given = checks.optional(checks.instances, "units", units, kind=HiddenUnits)
        self._exclude = checks.words("exclude", exclude)
        self._handles: list[RemovableHandle] = []
        self.clear()

    def clear(self) -> None:
        """Forgets the model."""
        self.sets: list[UnitSet] = []
        self.size = self.columns = 0
        self.device = torch.device("cpu")
        self.dtype = torch.float32  # of averages: at least this, whatever the precision of the network
        self._refused: dict[str, str] = {}  # why layers or sets were left out
        self._owners: dict[str, Optimizer | None] = {}
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._readers: dict[str, list[Reader]] = {}
        self._by_number: list[Reader] = []
        self.activations = Activations(self._callback, self._reads_sizes, self._keep_inputs)
        self._places: dict[tuple[int, ...], tuple[Index, Index]] = {}
        self._are_shared_out = False
        self._consumers = torch.zeros(0)  # how many each unit has
        self._is_plain = True  # each unit is read by one column of one layer
        self._weights: list[Tensor] = []  # of all sets
        self._outgoing = self._share_of_weight = torch.zeros(0)
        self._outgoing_of: list[Tensor] = []  # of each reader
        self._contribution = torch.zeros(0)
        self._read_weights: Tensors | None = None  # None where kernels cannot read them

    # ---- finding

    def add_found(self, found: Findings) -> None:
        """Takes in the units of a part of the model, whose layers are heard from now on."""
        self._add(found.units)
        self._refused |= found.left_out

    def add_given(self) -> None:
        """Takes in the units that were given by hand."""
        self._add(self._given or ())

    def check(self) -> None:
        """Raises where there is nothing to work on, and warns where that waits for a layer to be unfrozen."""
        name = type(self._callback).__name__
        if any(self._trains(unit_set) for unit_set in self.sets):
            return
        waiting = [layer for layer, module in self._layers().items() if not self._is_trained(module)]
        if not self.sets and not waiting:
            where = type(self._callback.model).__name__ if self._callback.module is None else self._callback.module
            raise ValueError(
                f"{name} needs hidden units, but has none to work on in {where!r}. `find_units(model, example, "
                "explain=True)` prints why layers are left out. Name the part of the model that has hidden units with "
                "module=, exclude less, or give the units with units=."
                + "".join(f"\n  {layer}: {reason}" for layer, reason in list(self._refused.items())[:12])
            )
        rank_zero_warn(
            f"{name} has nothing to do yet, for of the layers that are trained none has hidden units to work on. "
            f"Frozen, or in no optimizer: {checks.few(waiting or [unit_set.name for unit_set in self.sets])}. "
            "It begins with those that are unfrozen and handed to an optimizer while training goes on."
        )

    def _layers(self) -> dict[str, nn.Module]:
        """The modules of all layers, and of others with weights of their own that could make or use hidden units."""
        found: dict[str, nn.Module] = {}
        for name, module in named_modules_as_written(self._callback.scope, self._callback.module or ""):
            views = layers_of(module)
            for part, view in views.items():
                found.setdefault(f"{name}.{part}".strip("."), view.layer)
            has_weights = any(p.ndim > 1 for p in module.parameters(recurse=False))
            if has_weights and not views and not isinstance(module, nn.Embedding):
                found[name] = module
        return found

    def _is_trained(self, module: nn.Module) -> bool:
        trained = [p for p in module.parameters(recurse=False) if p.requires_grad]
        return any(not self._callback.optimizers or self._callback.optimizer_of(p) is not None for p in trained)

    def in_words(self, not_called: Sequence[str]) -> str:
        """How many units of how many layers there are, and which layers have none."""
        made = {table.module for unit_set in self.sets for table in unit_set.producers}
        others = [name for name in self._layers() if name not in made]
        words = f"{self.size:,} units of {len(made)} layers (of {len(made) + len(others)})."
        left_out = [name for name in others if name not in not_called]
        if left_out:
            words += f" Left out: {checks.few(left_out)}; find_units(model, example, explain=True) says why."
        return words

    def _add(self, found: Iterable[HiddenUnits]) -> None:
        model = self._callback.model
        for units in found:
            if any(fnmatchcase(units.name, pattern) for pattern in self._exclude):
                self._refused[units.name] = "it is excluded"
                continue
            layers = check_units(model, units)
            weights = tuple(layers[slots.module].weight for slots in (*units.producers, *units.consumers))
            self.device = weights[0].device
            self.dtype = torch.promote_types(weights[0].dtype, self.dtype)
            producers, norms, consumers = (
                tuple(Table.of(slots, units.size, self.device, layers.get(slots.module)) for slots in part)
                for part in (units.producers, units.norms, units.consumers)
            )
            readers = tuple(self._add_reader(table) for table in consumers)
            span = slice(self.size, self.size + units.size)
            self.size = span.stop
            self.sets.append(UnitSet(units, producers, norms, readers, span, weights))
            self._weights += weights
            self._is_plain &= len(readers) == 1 and readers[0].table.entries.shape[1] == 1
        self._places = {}
        counts = [self.zeros(unit_set.units.size) + len(unit_set.readers) for unit_set in self.sets]
        self._consumers = torch.cat([self.zeros(0), *counts])
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
        if are_whole and all(reader.weight.is_cpu for reader in self._by_number):
            self._read_weights = Tensors([reader.weight for reader in self._by_number])
            self._shapes = reader_shapes(self.sets)

    def _share_of(self, tensor: Tensor) -> float:
        """By what a sum over the part of a tensor is multiplied before :meth:`_over_ranks`."""
        return part_of(tensor).share if self._are_shared_out else 1.0

    def _over_ranks(self, values: list[Tensor]) -> list[Tensor]:
        """The sums over all ranks, in one message, where parameters are shared out; otherwise each rank has it all."""
        return sum_over_ranks(values) if self._are_shared_out else values

    def zeros(self, *shape: int) -> Tensor:
        """An array for averages."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _add_reader(self, table: Table) -> Reader:
        columns = slice(self.columns, self.columns + table.entries.numel())
        self.columns = columns.stop
        every = torch.arange(table.layer.inputs, device=self.device)
        in_order = torch.equal(table.entries.flatten(), every)
        reader = Reader(table, columns, len(self._by_number), table.layer.weight, in_order)
        self._by_number.append(reader)
        if table.module not in self._readers:
            self._readers[table.module] = []
            self._handles.append(self.activations.listen(table.layer, self._readers[table.module]))
            self._callback.keep(self._handles[-1])
        self._readers[table.module].append(reader)
        return reader

    # ---- whose step it was

    def _trains(self, unit_set: UnitSet) -> bool:
        if not all(weight.requires_grad for weight in unit_set.weights):
            return False
        return not self._callback.optimizers or self._owner(unit_set) is not None

    def _owner(self, unit_set: UnitSet) -> Optimizer | None:
        if self._owners.get(unit_set.name) is None:  # a layer may be unfrozen and handed to the optimizer later
            self._owners[unit_set.name] = self._callback.optimizer_of(unit_set.weights[0])
        return self._owners[unit_set.name]

    def trained_by(self, optimizer: Optimizer | None) -> Sequence[int]:
        """The sets that a step of this optimizer has trained: their places in ``sets``."""
        if self._all_trained_by(optimizer):
            return range(len(self.sets))
        return [
            i
            for i, unit_set in enumerate(self.sets)
            if self._trains(unit_set) and (optimizer is None or self._owner(unit_set) is optimizer)
        ]

    def _all_trained_by(self, optimizer: Optimizer | None) -> bool:
        """Whether the usual case is at hand: one optimizer trains everything. Told quickly, for each step asks."""
        if optimizer is not None:
            is_only_one = len(self._callback.optimizers) == 1 and len(self._owners) == len(self.sets)
            if not is_only_one or None in self._owners.values():
                return False
        return all([weight.requires_grad for weight in self._weights])  # noqa: C419 (a list takes half the time)

    def places(self, sets: Sequence[int]) -> tuple[Index, Index]:
        """Where sets stand in the flat arrays over units and over columns."""
        if len(sets) == len(self.sets):
            return slice(None), slice(None)
        key = tuple(sets)
        if key not in self._places:
            units, columns = torch.arange(self.size), torch.arange(self.columns)
            self._places[key] = (
                torch.cat([units[self.sets[i].span] for i in sets]).to(self.device),
                torch.cat([columns[r.columns] for i in sets for r in self.sets[i].readers]).to(self.device),
            )
        return self._places[key]

    def readers(self, sets: Sequence[int]) -> Sequence[Reader]:
        """The readers of sets, in the order of their columns."""
        if len(sets) == len(self.sets):
            return self._by_number
        return [reader for i in sets for reader in self.sets[i].readers]

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

    def unit_of_column(self, sets: Sequence[int]) -> Tensor:
        """For each column of the sets the unit that it reads, as a place among the units of these sets."""
        parts, start = [], 0
        for i in sets:
            size = self.sets[i].units.size
            numbers = torch.arange(start, start + size, device=self.device)
            parts += [numbers.repeat_interleave(reader.table.entries.shape[1]) for reader in self.sets[i].readers]
            start += size
        return torch.cat(parts)

    def per_unit(self, values: Tensor, sets: Sequence[int]) -> Tensor:
        """From one value for each column of the sets to one for each unit.

        The mean over a consumer's columns of the unit, added up over consumers.
        """
        if self._is_plain:
            return values
        parts, start = [], 0
        for i in sets:
            total = None
            for reader in self.sets[i].readers:
                table = reader.table.entries
                part = values[start : start + table.numel()].view(table.shape)
                part = part.squeeze(1) if table.shape[1] == 1 else part.mean(1)
                total = part if total is None else total + part
                start += table.numel()
            assert total is not None
            parts.append(total)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def mean_over_consumers(self, values: Tensor, sets: Sequence[int]) -> Tensor:
        """Like ``per_unit``, but the mean over consumers."""
        if self._is_plain:
            return values
        units, _ = self.places(sets)
        return self.per_unit(values, sets) / self._consumers[units]

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
        kernels.contributions(weights, self._shapes, sizes, self._contribution)
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
        parts = []
        for i in sets:
            unit_set = self.sets[i]
            main = unit_set.producers[0]
            parts.append(self._size_by_row(main.layer, unit_set.weights[0].detach())[main.entries[:, 0]])
        return self._over_ranks([torch.cat(parts)])[0]

    def _size_by_row(self, layer: LayerView, tensor: Tensor) -> Tensor:
        """For each output of a layer the mean size of the entries of its row, before :meth:`_over_ranks`."""
        part = by_output(layer, tensor)
        sizes = part.local.flatten(1).abs().sum(1, dtype=self.dtype) / part.shape[1:].numel()
        return part.spread(sizes, 0) * self._share_of(tensor) if self._are_shared_out else sizes

    def gradient_sizes(self, sets: Sequence[int]) -> dict[int, Tensor]:
        """For each unit of the sets, by set, the mean size of the gradients of the main rows that make it.

        Of those sets that have gradients.
        """
        sizes = {}
        for i in sets:
            found, main = gradient(self.sets[i].weights[0]), self.sets[i].producers[0]
            if found is not None:
                sizes[i] = self._size_by_row(main.layer, found)[main.entries].mean(1)
        return dict(zip(sizes, self._over_ranks(list(sizes.values())), strict=True))

    def columns_of(self, chosen: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The columns that read some units, given by set: of each the unit and its own place, in the flat arrays.

        Reader by reader, and unit by unit.
        """
        units, columns = [], []
        for i, of_set in chosen.items():
            numbers = of_set + self.sets[i].span.start
            for reader in self.sets[i].readers:
                of_each = reader.table.entries.shape[1]
                first = of_set * of_each + reader.columns.start
                if of_each == 1:
                    units.append(numbers)
                    columns.append(first)
                else:
                    units.append(numbers.repeat_interleave(of_each))
                    columns.append((first.unsqueeze(1) + torch.arange(of_each, device=self.device)).flatten())
        return torch.cat(units), torch.cat(columns)

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


def units_in(call: ForwardCall) -> Findings:
    """The hidden units of what is called, with names inside the model: the question that methods on units ask."""
    found = call.on_one_example(lambda args, kwargs: explore(call.module, args, kwargs, explain=False))
    return Findings(
        [renamed(units, call.prefix) for units in found.units],
        {(call.prefix + name).rstrip("."): reason for name, reason in found.left_out.items()},
        found.runs,
    )


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
