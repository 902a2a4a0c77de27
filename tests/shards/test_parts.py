"""Parts of tensors: against the whole ones, on four ranks, for every way in which torch shares a network out."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from lightning_plasticity.functional import gradient_norm
from lightning_plasticity.functional.gradients import read_gradients
from lightning_plasticity.shards.layout import Layout
from lightning_plasticity.shards.modules import splits_layers
from lightning_plasticity.shards.parts import Part, held_of, part_of
from lightning_plasticity.shards.sums import sum_over_shards, whole_norms
from lightning_plasticity.shards.tensors import for_state, gradient, local, shared_out_as, whole

RANKS = 4


def network() -> nn.Sequential:
    """Sizes that four ranks cannot share evenly, and a layer with fewer rows than ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def split_over_tensors(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def fsdp(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (4,)))


def hsdp(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


def columns(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    return fully_shard(nn.Sequential(nn.Linear(4, 8)), mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))


def tensors(model: nn.Module) -> nn.Module:
    return split_over_tensors(model, init_device_mesh("cpu", (4,)))


def both(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensors"))
    return fully_shard(split_over_tensors(model, mesh["tensors"]), mesh=mesh["data"])


WAYS: list[Callable[[nn.Module], nn.Module]] = [fsdp, hsdp, columns, tensors, both]


def looked_at(parameter: Tensor) -> dict[str, Any]:
    """What a part says of itself, and what the whole tensor is."""
    part = part_of(parameter)
    everything = whole(parameter).detach()
    numbers = torch.arange(float(everything.numel())).view(everything.shape)
    found = [part.find(dim, torch.arange(size).flip(0)) for dim, size in enumerate(part.shape)]
    return {
        "shape": part.shape,
        "layout": part.layout,
        "whole": everything,
        "local": part.local.detach().clone(),
        "taken": part.take(everything),
        "together": whole(shared_out_as(parameter, part.local.detach() * 2)),
        "held": [held_of(values, parameter).clone() for values in (everything, parameter.detach())],
        "numbers": part.take(numbers),
        "counts": part.take(torch.ones_like(numbers)).sum() * part.shards / RANKS,
        "widened": part.take(part.widen(part.local.detach(), *range(parameter.ndim))),
        "wide": part.widen(part.local.detach(), *range(parameter.ndim)),
        "spread": [part.spread(torch.ones(size), dim) for dim, size in enumerate(part.local.shape)],
        "found": [(a, torch.arange(part.shape[d]).flip(0)[b]) for d, (a, b) in enumerate(found)],
        "sum": sum_over_shards([local(parameter).detach().double().sum()], [parameter])[0],
        "share": local(parameter).detach().double().sum() * part.share,
        "count": sum_over_shards([torch.tensor(local(parameter).numel())], [parameter])[0],
        "norm": whole_norms([parameter.detach()], torch.float32)[0],
    }


def sequence() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10)), torch.randn(2, 8, 6)


def gradients_of_a_sequence(rank: int) -> dict[str, Any]:
    """Of a network of which each rank is given a part of the sequence: of the norm's it has a term each."""
    model, x = sequence()
    mesh = init_device_mesh("cpu", (RANKS,))
    model = parallelize_module(model, mesh, {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1))})
    (model(x.chunk(RANKS, 1)[rank]) ** 2).sum().backward()
    assert model[0].weight.grad.placements[0].is_partial()
    assert all(gradient(p).placements == p.placements for p in model.parameters())
    norm = gradient_norm(read_gradients(model.parameters()))
    return {name: whole(gradient(p)) for name, p in model.named_parameters()} | {"norm": norm}


def on_each_rank(rank: int) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {}
    written: dict[str, tuple[Tensor, Tensor]] = {}
    for way in WAYS:
        model = way(network())
        assert splits_layers(model) == (way in (tensors, both))
        parts[way.__name__] = {name: looked_at(p) for name, p in model.named_parameters()}
        parameter = next(model.parameters())
        with torch.no_grad():
            local(parameter).fill_(rank + 1.0)
        written[way.__name__] = whole(parameter).detach(), part_of(parameter).take(whole(parameter).detach())
    # fewer rows than ranks, and dimensions that are split several times
    mesh = init_device_mesh("cpu", (2, 2))
    for name, placements in {
        "both rows": [Shard(0), Shard(0)],
        "rows and columns": [Shard(0), Shard(1)],
        "negative": [Shard(-1), Replicate()],
        "copies": [Replicate(), Replicate()],
    }.items():
        for size in (1, 3, 5, 8):
            tensor = distribute_tensor(
                torch.randn(size, size + 2, generator=torch.Generator().manual_seed(size)), mesh, placements
            )
            parts[f"{name} {size}"] = {"tensor": looked_at(tensor)}
    parameter = distribute_tensor(torch.zeros(4), mesh, [Shard(0), Replicate()]).requires_grad_()
    parameter.grad = DTensor.from_local(torch.arange(2.0) + rank, mesh, [Shard(0), Partial()])
    assert gradient(parameter).placements == parameter.placements
    alone = distribute_tensor(torch.zeros(4, 2), init_device_mesh("cpu", (4, 1)), [Shard(0), Shard(1)])
    assert part_of(alone).places(1) is None, "it has all"
    large = distribute_tensor(torch.full((4,), 1.2e19), mesh, [Shard(0), Shard(0)])
    term = DTensor.from_local(torch.ones(2), mesh, [Partial(), Partial()])
    with pytest.raises(RuntimeError, match="each rank holds a term of a sum"):
        part_of(term)
    return {
        "parts": parts,
        "written": written,
        "gradients": gradients_of_a_sequence(rank),
        "terms": whole(gradient(parameter)),
        "norm": whole_norms([large], torch.float32),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(RANKS, on_each_rank, tmp_path_factory.mktemp("ranks"))


def test_parts_are_what_the_ranks_hold(ranks: list[dict[str, Any]]) -> None:
    expected = copy.deepcopy(network()).state_dict()
    for way, parts in ranks[0]["parts"].items():
        for name in parts:
            of_ranks = [rank["parts"][way][name] for rank in ranks]
            for part in of_ranks:
                if name in expected and way != "columns":
                    assert torch.equal(part["whole"], expected[name]), (way, name)
                assert torch.equal(part["local"], part["taken"]), (way, name)
                assert torch.equal(part["local"], part["widened"]), (way, name)
                elsewhere = part["wide"] != part["whole"]
                assert not part["wide"][elsewhere].any(), "nothing where others have it"
                assert (~elsewhere).sum() >= part["local"].numel()
                assert torch.equal(part["together"], part["whole"] * 2), (way, name)
                assert all(torch.equal(part["local"], held) for held in part["held"]), (way, name)
                for total in (part["sum"], sum(part["share"] for part in of_ranks)):
                    torch.testing.assert_close(total, part["whole"].double().sum(), rtol=1e-12, atol=1e-12)
                assert part["count"].dtype == torch.int64
                assert part["count"] == part["whole"].numel()
                torch.testing.assert_close(part["norm"], part["whole"].double().norm().float())
                for dim, (places, indices) in enumerate(part["found"]):
                    spread = part["spread"][dim]
                    assert spread.sum() == part["local"].shape[dim]
                    assert sorted(indices.tolist()) == spread.nonzero().squeeze(1).tolist()
                    assert places.tolist() == sorted(places.tolist(), reverse=True)
            # together the parts are the whole, each entry held equally often
            held = torch.cat([part["numbers"].flatten() for part in of_ranks]).long()
            counts = torch.bincount(held, minlength=of_ranks[0]["whole"].numel())
            assert (counts == counts[0]).all(), (way, name)
            assert sum(part["counts"] for part in of_ranks) == of_ranks[0]["whole"].numel()


def test_pieces_are_counted_in_the_order_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    for way, parts in ranks[0]["parts"].items():
        for name, first in parts.items():
            of_ranks = [rank["parts"][way][name] for rank in ranks]
            layout = first["layout"]
            assert (layout is None) == all(part["local"].shape == part["shape"] for part in of_ranks), (way, name)
            for dim, size in enumerate(first["shape"] if layout else ()):
                pieces = {part["layout"].piece[dim]: part["layout"].places[dim] for part in of_ranks}
                assert sorted(pieces) == list(range(layout.pieces[dim])), (way, name)
                if len(pieces) > 1:
                    assert torch.cat([pieces[i] for i in sorted(pieces)]).tolist() == list(range(size)), (way, name)


def test_what_is_written_to_a_part_is_in_the_tensor(ranks: list[dict[str, Any]]) -> None:
    for way in WAYS:
        for rank, results in enumerate(ranks):
            after, own = results["written"][way.__name__]
            assert (after > 0).all()
            if way not in (hsdp, columns):  # where others have written to the same entries
                assert (own == rank + 1).all()


def test_gradients_are_added_up_where_each_rank_has_a_term(ranks: list[dict[str, Any]]) -> None:
    model, x = sequence()
    (model(x) ** 2).sum().backward()
    for rank in ranks:
        for name, parameter in model.named_parameters():
            assert gradient(parameter) is parameter.grad
            # each rank's loss is of its part of the outputs
            torch.testing.assert_close(rank["gradients"][name], parameter.grad)
        torch.testing.assert_close(rank["gradients"]["norm"], gradient_norm([p.grad for p in model.parameters()]))
        assert rank["terms"].tolist() == [0 + 1, 1 + 2, 2 + 3, 3 + 4]  # of two ranks each


def test_norms_are_finite_where_the_sum_of_squares_is_not(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["norm"], torch.tensor([2.4e19]))


def test_a_whole_tensor_is_the_part_that_is_all_of_it() -> None:
    weight = torch.randn(3, 2)
    part = part_of(weight)
    assert part.local is weight
    assert local(weight) is weight
    assert whole(weight) is weight
    assert part.take(weight) is weight
    assert shared_out_as(weight, part.local) is weight
    assert held_of(weight, weight) is weight
    assert part.find(0, torch.tensor([2, 0]))[0].tolist() == [2, 0]
    assert part.shards == 1
    assert torch.equal(part.spread(weight[:, 0], 0), weight[:, 0])
    assert sum_over_shards([weight], [weight])[0] is weight
    remembered = for_state(weight)
    assert torch.equal(remembered, weight)
    assert remembered is not weight


def test_some_rows_of_a_part_are_a_part_of_these_rows() -> None:
    tensor = torch.arange(10.0).view(5, 2)
    runs = [slice(first, last) for first, last in itertools.combinations_with_replacement(range(6), 2)]
    for held, rows in itertools.product(runs, runs):
        places = torch.arange(5)[held]
        part = Part(tensor[held], Layout(tensor.shape, (places, None), (2, 1), (0, 0))).rows(rows)
        assert part.shape == tensor[rows].shape
        assert torch.equal(part.local, part.take(tensor[rows]))
        assert part.local[:, 0].div(2).tolist() == [row for row in range(5)[rows] if row in range(5)[held]]


def test_a_part_with_its_dimensions_exchanged_is_a_part_of_such_a_tensor() -> None:
    tensor = torch.arange(24.0).view(4, 6, 1)
    layout = Layout(tensor.shape, (torch.tensor([2, 3]), torch.tensor([0, 1]), None), (2, 3, 1), (1, 0, 0))
    part = Part(tensor[2:, :2], layout).swapped()
    assert part.shape == (6, 4, 1)
    assert torch.equal(part.local, part.take(tensor.transpose(0, 1)))
    assert part.layout is not None
    assert (part.layout.pieces, part.layout.piece) == ((3, 2, 1), (0, 1, 0))
