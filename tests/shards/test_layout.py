"""Where the part of a rank lies, told from its coordinates in a mesh alone."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from lightning_plasticity.shards.layout import Layout, layout_of


class Strided(Shard):
    """As FSDP2 marks what tensor parallelism has split before."""

    split_factor = 2


@dataclass(frozen=True)
class Mesh:
    """As one of its ranks sees it."""

    sizes: tuple[int, ...]
    coordinate: tuple[int, ...]

    def size(self, dim: int) -> int:
        return self.sizes[dim]

    def get_coordinate(self) -> list[int]:
        return [*self.coordinate]


def layouts(shape: tuple[int, ...], placements: tuple[Placement, ...], sizes: tuple[int, ...]) -> list[Layout | None]:
    """Of all ranks, in the order of their coordinates."""
    return [
        layout_of(torch.Size(shape), placements, Mesh(sizes, coordinate), torch.device("cpu"))
        for coordinate in itertools.product(*map(range, sizes))
    ]


def indices(layout: Layout, dim: int) -> list[int]:
    places = layout.places[dim]
    return [*range(layout.shape[dim])] if places is None else places.tolist()


@pytest.mark.parametrize(
    ("placements", "sizes", "pieces"),
    [
        ((Shard(0),), (4,), (4, 1)),
        ((Shard(-1),), (4,), (1, 4)),
        ((Replicate(), Shard(1)), (2, 3), (1, 3)),
        ((Shard(0), Shard(1)), (2, 3), (2, 3)),
        ((Shard(0), Shard(0)), (2, 3), (6, 1)),
        ((Shard(0), Shard(0), Shard(0)), (2, 1, 2), (4, 1)),
        ((Strided(0), Shard(0)), (3, 2), (6, 1)),
        ((Strided(0), Strided(0), Shard(0)), (2, 2, 2), (8, 1)),
    ],
)
@pytest.mark.parametrize("shape", [(12, 6), (5, 7), (1, 2), (0, 3)])
def test_pieces_follow_each_other_and_are_the_whole_together(
    placements: tuple[Placement, ...], sizes: tuple[int, ...], pieces: tuple[int, int], shape: tuple[int, int]
) -> None:
    found = layouts(shape, placements, sizes)
    count: dict[tuple[int, ...], int] = {}
    by_piece: list[dict[int, list[int]]] = [{}, {}]
    for layout in found:
        assert layout is not None
        assert layout.shape == shape
        assert layout.pieces == pieces
        assert all(type(number) is int for number in (*layout.piece, *layout.pieces))
        for entry in itertools.product(indices(layout, 0), indices(layout, 1)):
            count[entry] = count.get(entry, 0) + 1
        for dim in (0, 1):
            assert (layout.places[dim] is None) == (pieces[dim] == 1)
            assert by_piece[dim].setdefault(layout.piece[dim], indices(layout, dim)) == indices(layout, dim)
    copies = math.prod(sizes) // math.prod(pieces)
    assert count == dict.fromkeys(itertools.product(*map(range, shape)), copies)
    for dim in (0, 1):
        in_order = [by_piece[dim][piece] for piece in range(pieces[dim])]
        assert [*itertools.chain(*in_order)] == [*range(shape[dim])]


def test_the_first_of_two_cuts_is_the_coarser_one() -> None:
    for placements, sizes in [((Shard(0), Shard(0)), (2, 3)), ((Strided(0), Shard(0)), (3, 2))]:
        first, second = layouts((12,), placements, sizes)[:2]
        assert first is not None
        assert second is not None
        assert indices(first, 0) == [0, 1]
        assert indices(second, 0) == ([2, 3] if sizes == (2, 3) else [6, 7])


@pytest.mark.parametrize("placements", [(Replicate(), Replicate()), (Replicate(), Shard(0))])
def test_a_rank_that_has_all_has_no_layout(placements: tuple[Placement, ...]) -> None:
    assert layouts((4, 2), placements, (3, 1)) == [None] * 3


def test_a_term_of_a_sum_is_no_part() -> None:
    with pytest.raises(RuntimeError, match="must be split or copied"):
        layouts((4, 3), (Replicate(), Partial()), (2, 2))


@pytest.mark.parametrize("rows", [None, [], [2, 3, 4]])
def test_rows_are_found_from_the_whole_and_from_the_part(rows: list[int] | None) -> None:
    places = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    layout = Layout(torch.Size((6, 2)), (places, torch.tensor([1])), (2, 2), (1, 1))
    held = [*range(6)] if rows is None else rows
    assert layout.run == (held[0] if held else 0, len(held))
    by_row, by_column = layout.lookups
    assert by_column is not None
    assert by_column.tolist() == [-1, 0]
    if rows is None:
        assert by_row is None
    else:
        assert by_row is not None
        assert by_row.tolist() == [rows.index(row) if row in rows else -1 for row in range(6)]
    for first, last in itertools.combinations_with_replacement(range(7), 2):
        inside = layout.of_rows(slice(first, last))
        assert inside.shape == (last - first, 2)
        expected: list[int] | None = None if rows is None else [row - first for row in rows if first <= row < last]
        found: Tensor | None = inside.places[0]
        assert (None if found is None else found.tolist()) == expected
        assert inside.places[1] is layout.places[1]
        assert (inside.pieces, inside.piece) == (layout.pieces, layout.piece)
