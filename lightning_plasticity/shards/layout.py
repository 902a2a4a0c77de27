"""Where the part of a tensor that a rank holds lies in the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the part of a rank lies in the whole.

    Attributes:
        shape: of the whole.
        places: for each dimension the indices in the whole of what the part has there, in order; None where it has all.
        pieces: for each dimension into how many pieces it is cut; a piece is a run of indices.
        piece: for each dimension which of these the part has, counted in the order of the whole.
    """

    shape: torch.Size
    places: tuple[Tensor | None, ...]
    pieces: tuple[int, ...]
    piece: tuple[int, ...]

    @cached_property
    def run(self) -> tuple[int, int]:
        """At which row of the whole the part begins, and how many rows it has."""
        rows = self.places[0]
        return (0, self.shape[0]) if rows is None else (int(rows[0]) if len(rows) else 0, len(rows))

    def of_rows(self, rows: slice) -> Layout:
        """Where the part lies in the tensor that consists of some rows of the whole."""
        first, last, _ = rows.indices(self.shape[0])
        return _of_rows(self, first, last)

    @cached_property
    def lookups(self) -> tuple[Tensor | None, ...]:
        """For each dimension the place in the part of each index of the whole, -1 where another rank has it."""
        return tuple(
            None if place is None else torch.full((size,), -1, device=place.device).index_copy(0, place, _count(place))
            for size, place in zip(self.shape, self.places, strict=True)
        )


@lru_cache(maxsize=4096)
def layout_of(shape: torch.Size, placements: tuple[Any, ...], mesh: Any, device: torch.device) -> Layout | None:
    """Where the part of this rank lies; None where it has all."""
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"Parameters that are shared out among ranks must be split or copied, but one of shape {tuple(shape)} is "
            f"placed as {placements}: each rank holds a term of a sum. Redistribute it as Shard or Replicate."
        )
    places: list[Tensor | None] = [None] * len(shape)
    pieces, piece = [1] * len(shape), [0] * len(shape)
    coordinates = mesh.get_coordinate()
    # FSDP2 splits what tensor parallelism has left, and marks that by a split factor: it comes last, from the right.
    plain = [i for i, placement in enumerate(placements) if not hasattr(placement, "split_factor")]
    strided = [i for i in reversed(range(len(placements))) if i not in plain]
    for i in (*plain, *strided):
        dim = getattr(placements[i], "dim", None)
        if dim is None or mesh.size(i) == 1:
            continue
        dim %= len(shape)
        before = places[dim]
        held = torch.arange(shape[dim], device=device) if before is None else before
        chunks = torch.chunk(held, mesh.size(i))  # fewer than asked for where there is too little: the others are empty
        places[dim] = chunks[coordinates[i]] if coordinates[i] < len(chunks) else held[:0]
        pieces[dim] *= mesh.size(i)
        piece[dim] = piece[dim] * mesh.size(i) + coordinates[i]
    return Layout(shape, tuple(places), tuple(pieces), tuple(piece)) if math.prod(pieces) > 1 else None


@lru_cache(maxsize=4096)
def _of_rows(layout: Layout, first: int, last: int) -> Layout:
    places = layout.places[0]
    inside = None if places is None else places[(places >= first) & (places < last)] - first
    return replace(layout, shape=torch.Size((last - first, *layout.shape[1:])), places=(inside, *layout.places[1:]))


def _count(places: Tensor) -> Tensor:
    return torch.arange(len(places), device=places.device)
