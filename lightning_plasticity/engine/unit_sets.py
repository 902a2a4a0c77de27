"""Sets of units as methods use them: tables of entries on the device, checked against the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_plasticity.editing.editable import check_editable, check_layer
from lightning_plasticity.layer_views import LayerView, layer_at
from lightning_plasticity.names import submodule
from lightning_plasticity.units.find import HiddenUnits, Slots

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """The entries of one layer or norm that belong to a set of units: row ``i`` holds those of unit ``i``."""

    module: str
    entries: Tensor
    view: LayerView | None  # of the layer; None for a norm

    @staticmethod
    def of(slots: Slots, size: int, device: torch.device, view: LayerView | None) -> Table:
        """Sorts the entries by unit; every unit must have the same number of them."""
        order = slots.unit.argsort(stable=True)
        expected = torch.arange(size).repeat_interleave(max(len(order) // size, 1))
        if not torch.equal(slots.unit[order].cpu(), expected):
            raise ValueError(
                f"Every unit of a set must have the same number of entries in {slots.module!r}, at least one, but "
                "these have not. Give units that are wired differently as separate HiddenUnits."
            )
        return Table(slots.module, slots.entry[order].view(size, -1).to(device), view)

    @property
    def layer(self) -> LayerView:
        """The layer, where this is one."""
        assert self.view is not None
        return self.view

    @property
    def weight(self) -> str:
        """The qualified name of the layer's weight."""
        return self.layer.weight_path(self.module)

    @cached_property
    def is_in_order(self) -> bool:
        """Whether entry ``i`` is the only one of unit ``i``."""
        every = torch.arange(len(self.entries), device=self.entries.device)
        return torch.equal(self.entries, every.unsqueeze(1))

    def of_units(self, units: Tensor) -> Tensor:
        """The entries of some units, unit by unit."""
        return units if self.is_in_order else self.entries[units].flatten()


@dataclass(frozen=True)
class Reader:
    """A layer that uses a set of units: ``columns`` is the place of its entries in the flat arrays over columns."""

    table: Table
    columns: slice
    number: int
    weight: Tensor
    in_order: bool  # its entries are all inputs of the layer, in their order

    @property
    def view(self) -> LayerView:
        """The layer."""
        return self.table.layer

    @property
    def groups(self) -> int:
        """Those of a grouped convolution; otherwise 1."""
        return self.view.groups

    @property
    def weights_per_column(self) -> int:
        """By how many weights a column is multiplied."""
        return self.view.matrix(torch.empty(self.weight.shape, device="meta")).numel() // self.view.inputs

    def take(self, channels: Tensor) -> Tensor:
        """From one value for each input of the layer: those of the entries."""
        return channels if self.in_order else channels[self.table.entries.flatten()]


@dataclass(frozen=True)
class UnitSet:
    """A set of units: ``span`` is its place in the flat arrays over units."""

    units: HiddenUnits
    producers: tuple[Table, ...]
    norms: tuple[Table, ...]
    readers: tuple[Reader, ...]
    span: slice
    weights: tuple[Tensor, ...]  # of producers and readers: what an edit writes to

    @property
    def weights_per_row(self) -> int:
        """How many weights are in each of the main rows."""
        main = self.producers[0].layer
        return main.by_output(torch.empty(self.weights[0].shape, device="meta")).shape[1:].numel()

    @property
    def added_up(self) -> list[Table]:
        """The rows of the main producer, and those of recurrent weights whose products are added to theirs."""
        main = self.producers[0].layer
        added = [t for t in self.producers[1:] if t.layer.layer is main.layer and t.layer.adds_to == main.part != ""]
        return [self.producers[0], *added]

    @property
    def columns(self) -> slice:
        """Its place in the flat arrays over columns."""
        return slice(self.readers[0].columns.start, self.readers[-1].columns.stop)

    @property
    def name(self) -> str:
        """The name of the layer that makes the units."""
        return self.units.name


def reader_shapes(sets: Sequence[UnitSet]) -> np.ndarray[Any, Any]:
    """For kernels, a row for each reader, which has its entries in order.

    The first unit, the first column, columns for each unit, and the weight's groups, outputs and inputs of a group,
    places of the kernel, and whether inputs come first.
    """
    rows = [
        (
            unit_set.span.start,
            reader.columns.start,
            reader.table.entries.shape[1],
            reader.groups,
            reader.view.outputs // reader.groups,
            reader.view.inputs // reader.groups,
            math.prod(reader.weight.shape[2:]),
            reader.view.transposed,
        )
        for unit_set in sets
        for reader in unit_set.readers
    ]
    return np.array(rows, dtype=np.int64)


def weights_of_producers(sets: Iterable[UnitSet]) -> list[str]:
    """The names of the weights that make the units of some sets, each once."""
    return list(dict.fromkeys(table.weight for unit_set in sets for table in unit_set.producers))


def renamed(units: HiddenUnits, prefix: str) -> HiddenUnits:
    """The same units, named from a module further out."""
    if not prefix:
        return units
    moved = units.with_slots(lambda slots: changed(slots, module=prefix + slots.module))
    return changed(moved, name=prefix + units.name)


def check_units(model: nn.Module, units: HiddenUnits) -> dict[str, LayerView]:
    """Raises where units contradict the model; returns the layers that make and use them, by name."""
    if not units.producers or not units.consumers:
        raise ValueError(f"Hidden units need a producer and a consumer, but {units.name!r} lacks one of them.")
    layers = {}
    for slots in (*units.producers, *units.consumers):
        layer = _look_up(model, units, slots, layer_at)
        if layer is None:
            raise ValueError(
                f"The units {units.name!r} name {slots.module!r}, which is no linear or convolution layer. Take units "
                "from find_units() on this model."
            )
        check_layer(layer, slots.module)
        is_producer = any(slots is producer for producer in units.producers)
        limit = layer.outputs if is_producer else layer.inputs
        what = "outputs" if is_producer else "inputs"
        if len(slots.entry) == 0 or not 0 <= int(slots.entry.min()) <= int(slots.entry.max()) < limit:
            raise ValueError(
                f"The units {units.name!r} name {what} of {slots.module!r} that it does not have: it has {limit}. "
                "Take units from find_units() on this model."
            )
        layers[slots.module] = layer
    for slots in units.norms:
        check_editable(_look_up(model, units, slots, submodule), slots.module)
    if len({layer.weight.device for layer in layers.values()}) > 1:
        raise ValueError(f"All weights of the units {units.name!r} must be on one device.")
    return layers


def _look_up(model: nn.Module, units: HiddenUnits, slots: Slots, find: Callable[[nn.Module, str], T]) -> T:
    try:
        return find(model, slots.module)
    except AttributeError as error:
        raise ValueError(
            f"The units {units.name!r} name a module {slots.module!r} that {type(model).__name__} does not have. Names "
            "are those of model.named_modules(), for a LightningModule counted from itself."
        ) from error
