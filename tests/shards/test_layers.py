"""Layers whose parameters may be shared out: which of their values belong to which outputs and inputs."""

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_plasticity.layer_views import layers_of, view_of
from lightning_plasticity.shards.layers import by_output, heard_by_all, inputs_read, own_here
from lightning_plasticity.shards.tensors import local

RANKS = 2


def attention() -> nn.MultiheadAttention:
    """Of its three projections the first rank holds one and a half."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 1)
    nn.init.normal_(attention.in_proj_bias)
    return attention


def grouped() -> nn.Conv1d:
    return nn.Conv1d(4, 6, 1, groups=2)


def inputs() -> Tensor:
    return torch.arange(12.0).view(3, 4)


def on_each_rank(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (RANKS,))
    views = layers_of(fully_shard(attention(), mesh=mesh))
    by_channels, by_examples = (distribute_tensor(inputs(), mesh, [Shard(dim)]) for dim in (1, 0))
    return {
        "own": {name: [local(tensor).detach().clone() for tensor in own_here(view)] for name, view in views.items()},
        "read": inputs_read(view_of(fully_shard(grouped(), mesh=mesh))),
        "heard": [heard_by_all(by_channels, dim) for dim in (-1, 1)],
        "examples": heard_by_all(by_examples, -1),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(RANKS, on_each_rank, tmp_path_factory.mktemp("ranks"))


def test_together_ranks_hold_the_rows_of_each_layer_of_a_module(ranks: list[dict[str, Any]]) -> None:
    for name, view in layers_of(attention()).items():
        for held, expected in zip(zip(*(rank["own"][name] for rank in ranks), strict=True), view.own(), strict=True):
            assert torch.equal(torch.cat(held), expected), name


def test_inputs_read_are_those_of_the_rows_that_are_here(ranks: list[dict[str, Any]]) -> None:
    read = torch.cat([rank["read"] for rank in ranks])
    assert read.tolist() == [[0, 1]] * 3 + [[2, 3]] * 3


def test_the_mean_over_ranks_of_what_is_heard_is_what_the_layer_is_given(ranks: list[dict[str, Any]]) -> None:
    for heard in zip(*(rank["heard"] for rank in ranks), strict=True):
        assert torch.equal(sum(heard) / RANKS, inputs())
    assert torch.equal(torch.cat([rank["examples"] for rank in ranks]), inputs())


def test_each_gate_of_a_whole_layer_is_of_the_same_outputs() -> None:
    view = layers_of(nn.LSTM(2, 3))["ih_l0"]
    part = by_output(view, view.weight)
    assert torch.equal(part.local, view.weight.view(4, 3, 2).movedim(0, -1))
    assert part.layout is None
