"""Sets of hidden units: the entries of layers and norms that belong to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_plasticity import checks


@dataclass(frozen=True, eq=False)
class Slots:
    """Entries of one module that belong to units: ``entry[k]`` belongs to ``unit[k]``.

    An entry is an output row of a producer, an entry of a normalisation layer, or an input channel of a consumer. Every
    unit of a set has the same number of entries in a ``Slots``. ``module`` is the name of a module, or of a layer in a
    module that holds several (``"lstm.ih_l0"``, ``"attention.v_proj"``).
    """

    module: str
    entry: Tensor
    unit: Tensor


@dataclass(frozen=True, eq=False)
class HiddenUnits:
    """A set of hidden units that are wired alike.

    If the consumers' columns of a unit are zero, its producers' rows may hold anything: the network's output stays the
    same.

    Attributes:
        name: the producing module's qualified name (with ``:0``, ``:1``, … where its units fall into several sets).
        size: the number of units.
        producers: output rows (or channels) whose weights and bias make the unit; the first is the main one. A layer
            that gates the unit and a depthwise convolution that it passes are further producers.
        norms: entries of normalisation layers that the unit passes.
        consumers: input columns (or channels) of the layers that use the unit.
        activation: the activation function on the way (``"relu"``, ``"gelu"``, …), None if none was seen.
        exact: False where a norm that mixes units (LayerNorm, GroupNorm) stands on the way: then a unit also reaches
            the output by changing the others' scale.
    """

    name: str
    size: int
    producers: tuple[Slots, ...]
    norms: tuple[Slots, ...]
    consumers: tuple[Slots, ...]
    activation: str | None
    exact: bool

    def grouped(self, size: int) -> HiddenUnits:
        """Groups of neighbouring units as one unit each, for methods to judge and renew together.

        So whole heads of attention are units: the value channels of a head follow each other.

        Args:
            size: how many units make one; for heads, the width of a head.

        Example:
            >>> import torch
            >>> from lightning_plasticity import find_units
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> [values] = find_units(model, *[torch.randn(3, 8)] * 3)
            >>> values.size, values.grouped(4).size
            (8, 2)
        """
        if self.size % checks.count("size", size, least=1):
            raise ValueError(
                f"The {self.size} units of {self.name!r} are no whole number of groups of {size}. Give a size that "
                "divides them."
            )

        of_groups = self.with_slots(lambda slots: replace(slots, unit=slots.unit // size))
        return replace(of_groups, size=self.size // size)

    def with_slots(self, change: Callable[[Slots], Slots]) -> HiddenUnits:
        """The same units, with each of their slots changed."""
        return replace(
            self,
            producers=tuple(map(change, self.producers)),
            norms=tuple(map(change, self.norms)),
            consumers=tuple(map(change, self.consumers)),
        )
