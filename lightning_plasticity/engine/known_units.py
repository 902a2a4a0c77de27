"""Which units a method works on, where they stand in flat arrays, and which optimizer trains them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity import checks
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.unit_sets import Reader, Table, UnitSet, check_units, renamed
from lightning_plasticity.layer_views import layers_of
from lightning_plasticity.names import named_modules_as_written
from lightning_plasticity.notices import warn_on_rank_zero
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.find import Findings, HiddenUnits, explore

Index: TypeAlias = slice | Tensor


class KnownUnits:
    """All sets of units of a method, numbered from set to set, as are the columns that read them.

    Args:
        callback: the method.
        units: the sets, given by hand; None to find them.
        exclude: patterns (as in ``fnmatch``) of names of sets to leave alone.
    """

    def __init__(
        self, callback: PlasticityCallback, units: Sequence[HiddenUnits] | None, exclude: Sequence[str] | str
    ) -> None:
        self._callback = callback
        self._given = checks.optional(checks.instances, "units", units, kind=HiddenUnits)
        self._exclude = checks.words("exclude", exclude)
        self.clear()

    def clear(self) -> None:
        """Forgets the model."""
        self.sets: list[UnitSet] = []
        self.size = self.columns = 0
        self.device = torch.device("cpu")
        self.dtype = torch.float32  # of averages: at least this, whatever the precision of the network
        self._refused: dict[str, str] = {}  # why layers or sets were left out
        self._owners: dict[str, Optimizer | None] = {}
        self._readers: dict[str, list[Reader]] = {}
        self._by_number: list[Reader] = []
        self._places: dict[tuple[int, ...], tuple[Index, Index]] = {}
        self._segments: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # sizes of sets, and each unit's set
        self._consumers = torch.zeros(0)  # how many each unit has
        self._is_plain = True  # each unit is read by one column of one layer
        self._weights: list[Tensor] = []  # of all sets

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
        warn_on_rank_zero(
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
            self._weights = list(dict.fromkeys([*self._weights, *weights]))  # most are of two sets, and asked each step
            self._is_plain &= len(readers) == 1 and readers[0].table.entries.shape[1] == 1
        self._places, self._segments = {}, {}
        counts = [self.zeros(unit_set.units.size) + len(unit_set.readers) for unit_set in self.sets]
        self._consumers = torch.cat([self.zeros(0), *counts])
        self._grow()

    def _grow(self) -> None:
        """Makes room for what is kept of more sets."""

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
        self._readers.setdefault(table.module, []).append(reader)
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

    # ---- flat arrays

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
        return torch.cat(parts)

    def mean_over_consumers(self, values: Tensor, sets: Sequence[int]) -> Tensor:
        """Like ``per_unit``, but the mean over consumers."""
        if self._is_plain:
            return values
        units, _ = self.places(sets)
        return self.per_unit(values, sets) / self._consumers[units]

    def mean_of_sets(self, values: Tensor, sets: Sequence[int]) -> Tensor:
        """For each unit of the sets the mean of values over the units of its set."""
        key = tuple(sets)
        if key not in self._segments:
            sizes = torch.tensor([self.sets[i].units.size for i in sets], device=self.device)
            self._segments[key] = sizes, torch.arange(len(sets), device=self.device).repeat_interleave(sizes)
        sizes, set_of_unit = self._segments[key]
        return torch.segment_reduce(values, "mean", lengths=sizes, unsafe=True)[set_of_unit]

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


def units_in(call: ForwardCall) -> Findings:
    """The hidden units of what is called, with names inside the model: the question that methods on units ask."""
    found = call.on_one_example(lambda args, kwargs: explore(call.module, args, kwargs, explain=False))
    return Findings(
        [renamed(units, call.prefix) for units in found.units],
        {(call.prefix + name).rstrip("."): reason for name, reason in found.left_out.items()},
        found.runs,
    )
