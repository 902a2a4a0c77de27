"""The part of a tensor that this rank holds.

A whole tensor is the simplest case, a part that is all of it: whoever writes through parts has one path for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plasticity.distributed import world_size
from lightning_plasticity.shards.layout import Layout, layout_of
from lightning_plasticity.shards.tensors import is_shared_out, local


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a tensor that this rank holds: a block of it, some indices of each dimension.

    Attributes:
        local: its values, in the memory of the tensor: what is written here is written to the tensor.
        layout: where it lies in the whole; None where it is the whole.

    Example:
        >>> layout = Layout(torch.Size([4, 2]), (torch.tensor([2, 3]), None), pieces=(2, 1), piece=(1, 0))
        >>> part = Part(torch.zeros(2, 2), layout)  # as the second of two ranks has it under FSDP2
        >>> part.find(0, torch.tensor([3, 0]))  # of rows 3 and 0 it has the first: in its own row 1
        (tensor([1]), tensor([0]))
        >>> part.take(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), 0).tolist(), part.spread(torch.ones(2), 0).tolist()
        ([[2.0], [3.0]], [0.0, 0.0, 1.0, 1.0])
    """

    local: Tensor
    layout: Layout | None

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.local.shape if self.layout is None else self.layout.shape

    @property
    def shards(self) -> int:
        """Of how many different parts the whole consists: 1 where every rank has all."""
        return 1 if self.layout is None else math.prod(self.layout.pieces)

    @property
    def share(self) -> float:
        """By what a value that each rank computes from its part is multiplied, so that the sum over all ranks is right.

        Every part is held by as many ranks, the world divided by the number of parts, and counts once.
        """
        return self.shards / world_size()

    def swapped(self) -> Part:
        """With the first two dimensions exchanged."""
        if self.layout is None:
            return Part(self.local.transpose(0, 1), None)
        first, second, *others = self.layout.shape
        (a, b, *rest), (x, y, *more), (i, j, *same) = self.layout.places, self.layout.pieces, self.layout.piece
        shape = torch.Size((second, first, *others))
        swapped = Layout(shape, (b, a, *rest), (y, x, *more), (j, i, *same))
        return Part(self.local.transpose(0, 1), swapped)

    def held_rows(self, rows: slice) -> slice:
        """Where in the part those of some rows of the whole tensor are that it has."""
        first, last, _ = rows.indices(self.shape[0])
        begin, count = (0, len(self.local)) if self.layout is None else self.layout.run
        inside = min(max(first - begin, 0), count)
        return slice(inside, max(min(last - begin, count), inside))

    def rows(self, rows: slice) -> Part:
        """The part of the tensor that consists of some rows of this one."""
        if rows == slice(None):
            return self
        return Part(self.local[self.held_rows(rows)], None if self.layout is None else self.layout.of_rows(rows))

    def places(self, dim: int) -> Tensor | None:
        """The indices in the whole of what the part has in a dimension; None where it has all."""
        return None if self.layout is None else self.layout.places[dim]

    def find(self, dim: int, indices: Tensor) -> tuple[Tensor, Tensor | slice]:
        """Those of some indices of a dimension that are here: their places in the part, and among those given.

        Where all are here, ``(indices, slice(None))``. Otherwise this waits for the device.
        """
        lookup = None if self.layout is None else self.layout.lookups[dim]
        if lookup is None:
            return indices, slice(None)
        found = lookup[indices]
        here = (found >= 0).nonzero().squeeze(1)
        return found[here], here

    def take(self, values: Tensor, *dims: int) -> Tensor:
        """Of values over the whole of some dimensions, those that belong to the part.

        Args:
            values: in these dimensions as long as the whole tensor; a value for each of its entries if none is given.
            *dims: which dimensions, by their number in the tensor and in ``values`` alike.
        """
        for dim in dims or range(len(self.shape)):
            places = self.places(dim)
            values = values if places is None else values.index_select(dim, places.to(values.device))
        return values

    def widen(self, values: Tensor, *dims: int) -> Tensor:
        """From values over the part to values over the whole of some dimensions: 0 where others have them.

        What :meth:`take` takes again.
        """
        for dim in dims:
            places = self.places(dim)
            if places is not None:
                shape = [*values.shape]
                shape[dim] = self.shape[dim]
                values = values.new_zeros(shape).index_copy(dim, places, values)
        return values

    def spread(self, values: Tensor, dim: int) -> Tensor:
        """From one value for each place of the part in a dimension to one for each index of the whole: 0 elsewhere."""
        places = self.places(dim)
        if places is None:
            return values
        assert self.layout is not None
        return values.new_zeros(self.layout.shape[dim]).index_copy(0, places, values)


def part_of(tensor: Tensor) -> Part:
    """The part of a tensor that this rank holds; all of it for one that is not shared out.

    No rank talks. FSDP2, tensor parallelism and both together are understood, with parts of any size, and empty ones.

    Raises:
        RuntimeError: If the tensor is a sum of which each rank holds one term, so that no rank holds any entry.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> part_of(weight).local is weight
        True
    """
    if not is_shared_out(tensor):
        return Part(tensor, None)
    held = local(tensor)
    return Part(held, layout_of(tensor.shape, tensor.placements, tensor.device_mesh, held.device))


def held_of(values: Tensor, tensor: Tensor) -> Tensor:
    """Of values for all entries of a tensor, those that belong to the part that this rank holds.

    Args:
        values: whole, as in a checkpoint, or shared out as the tensor.
        tensor: which may be shared out.

    Example:
        >>> held_of(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    return local(values) if is_shared_out(values) else part_of(tensor).take(values)
