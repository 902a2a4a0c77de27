"""Choosing over shards against sorting the whole, with threads as ranks: so hypothesis can try many ways to cut."""

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_plasticity.functional import selection, selective_reinit
from lightning_plasticity.functional.selection import Chosen, below, mean_of_all, smallest
from lightning_plasticity.functional.selective_reinit import new_values
from lightning_plasticity.shards.layout import Layout
from lightning_plasticity.shards.parts import Part

Numbers = st.sampled_from([0.0, -0.0, 1e-40, 0.1, -0.1, 0.10001, 1.0, -2.0, math.inf, math.nan])


def layouts(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Layout]:
    """Of all blocks of a tensor, of which each dimension is cut before these places; empty blocks too."""
    bounds = [[0, *sorted(at), size] for at, size in zip(cuts, shape, strict=True)]
    pieces = tuple(len(bound) - 1 for bound in bounds)
    return [
        Layout(
            torch.Size(shape),
            tuple(
                None if n == 1 else torch.arange(bound[i], bound[i + 1])
                for n, bound, i in zip(pieces, bounds, piece, strict=True)
            ),
            pieces,
            piece,
        )
        for piece in itertools.product(*map(range, pieces))
    ]


def on_ranks(blocks: Sequence[Layout], function: Callable[[Layout], Any]) -> list[Any]:
    """What a function returns on each of several ranks, which are threads."""
    barrier = threading.Barrier(len(blocks), timeout=20)
    sent: list[Any] = [None] * len(blocks)
    results: list[Any] = [None] * len(blocks)
    own = threading.local()

    def part_of(tensor: Tensor) -> Part:
        return Part(tensor, own.layout)

    def sum_over_shards(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        sent[own.rank] = list(values)
        barrier.wait()
        totals = [torch.stack(each).sum(0) for each in zip(*sent, strict=True)]
        barrier.wait()
        return totals

    def run(rank: int) -> None:
        own.rank, own.layout = rank, blocks[rank]
        try:
            results[rank] = function(blocks[rank])
        except BaseException:
            barrier.abort()
            raise

    with pytest.MonkeyPatch.context() as patch:
        for module in (selection, selective_reinit):
            patch.setattr(module, "sum_over_shards", sum_over_shards)
        patch.setattr(selection, "part_of", part_of)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(blocks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not barrier.broken
    return results


def taken(layout: Layout, values: Tensor) -> Tensor:
    return Part(values, layout).take(values)


def together(blocks: Sequence[Layout], parts: Sequence[Tensor]) -> Tensor:
    whole = parts[0].new_zeros(blocks[0].shape)
    for layout, part in zip(blocks, parts, strict=True):
        numbers = taken(layout, torch.arange(whole.numel()).view(whole.shape))
        whole.view(-1)[numbers.flatten()] = part.flatten()
    return whole


@st.composite
def cut(draw: st.DrawFn) -> tuple[Tensor, list[Layout]]:
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    cuts = [draw(st.lists(st.integers(0, size), max_size=2)) for size in shape]
    if not any(cuts):
        cuts[0] = [0]
    size = math.prod(shape)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    values = torch.tensor(draw(st.lists(Numbers, min_size=size, max_size=size)), dtype=dtype)
    return values.view(shape), layouts(shape, cuts)


@given(data=st.data(), given_cut=cut(), piece=st.sampled_from([3, 2**18]))
def test_smallest_over_shards(data: st.DataObject, given_cut: tuple[Tensor, list[Layout]], piece: int) -> None:
    values, blocks = given_cut
    count = data.draw(st.integers(0, values.numel()))
    magnitudes = values.flatten().abs()
    order = sorted(range(values.numel()), key=lambda i: (magnitudes[i].isnan().item(), magnitudes[i].item(), i))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(selection._PIECE, "cpu", piece)

        def choose(layout: Layout) -> Tensor:
            part = taken(layout, values)
            return smallest(part, count, part)

        mask = together(blocks, on_ranks(blocks, choose))
    assert mask.flatten().nonzero().flatten().tolist() == sorted(order[:count])


@given(data=st.data(), given_cut=cut())
def test_chosen_are_counted_in_the_order_of_the_whole(
    data: st.DataObject, given_cut: tuple[Tensor, list[Layout]]
) -> None:
    values, blocks = given_cut
    size = values.numel()
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(values.shape)
    count = int(mask.sum())
    first = data.draw(st.integers(0, count))
    numbers = torch.full_like(mask, -1, dtype=torch.int64)
    numbers[mask] = torch.arange(count)

    def look(layout: Layout) -> None:
        own = taken(layout, mask)
        chosen = Chosen(own, own)
        assert chosen.count == count
        own_numbers = taken(layout, numbers)[own]
        assert chosen.take(torch.arange(count)).tolist() == own_numbers.tolist()
        assert chosen.first(first) == int((own_numbers < first).sum())

    on_ranks(blocks, look)


class Whole(Tensor):
    """A part that says how many entries the whole has, as a tensor does that is shared out."""

    def numel(self) -> int:
        return 60


@pytest.mark.parametrize("reinit", ["mean", "mean_noise", "normal"])
def test_new_values_and_means_over_shards(reinit: Any) -> None:
    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
    mask = smallest(weight, 23)
    blocks = layouts((12, 5), [[5, 5, 9], [2]])
    wanted = new_values(weight, mask, reinit, torch.Generator().manual_seed(1), None)
    placed = weight.clone()
    placed[mask] = wanted
    small = below(weight, 0.5, relative=True)

    def renew(layout: Layout) -> Tensor:
        part, own = taken(layout, weight).clone(), taken(layout, mask)
        seen = part.clone().as_subclass(Whole)
        part[own] = new_values(seen, own, reinit, torch.Generator().manual_seed(1), None).as_subclass(Tensor)
        torch.testing.assert_close(mean_of_all(part * 0 + taken(layout, weight), seen), weight.mean())
        bounded = below(taken(layout, weight), 0.5, relative=True, tensor=seen)
        assert torch.equal(bounded, taken(layout, small))
        return part

    torch.testing.assert_close(together(blocks, on_ranks(blocks, renew)), placed, rtol=1e-13, atol=0)
