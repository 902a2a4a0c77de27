"""Modules and tensors that are shared out, as the only rank of a group sees them."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lightning_plasticity.shards.modules import sharded_modules, splits_layers
from lightning_plasticity.shards.tensors import (
    for_state,
    gradient,
    is_flattened,
    is_shared_out,
    local,
    shared_out_as,
    whole,
)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(*placements: list[Placement] | None) -> nn.Module:
    """A network of parameters that are placed so; None for one that is whole."""
    model = nn.Module()
    for number, places in enumerate(placements):
        tensor = torch.ones(2, 2)
        if places is not None:
            tensor = distribute_tensor(tensor, init_device_mesh("cpu", (1,) * len(places)), places)
        model.register_parameter(f"weight{number}", nn.Parameter(tensor))
    return model


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("placements", "splits"),
    [
        ([], False),
        ([None], False),
        ([[Replicate()]], False),
        ([[Shard(0)], [Replicate()], None], True),
        ([[Replicate()], [Shard(1)]], True),
        ([[Replicate(), Replicate()]], False),
        ([[Replicate(), Shard(0)]], True),
    ],
)
def test_layers_are_split_where_a_parameter_is_cut(placements: list[list[Placement] | None], splits: bool) -> None:
    assert splits_layers(network(*placements)) == splits


@pytest.mark.usefixtures("group")
def test_fsdp_2_alone_splits_no_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert sharded_modules(model) == []
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensors"))
    fully_shard(model[1], mesh=mesh["data"])
    assert sharded_modules(model) == [model[1]]
    assert not splits_layers(model)
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0), Shard(0)]))
    assert splits_layers(model)


@pytest.mark.usefixtures("group")
def test_a_tensor_that_is_shared_out_and_what_is_held_of_it() -> None:
    mesh: DeviceMesh = init_device_mesh("cpu", (1,))
    tensor = distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)]).requires_grad_()
    assert is_shared_out(tensor)
    held = local(tensor)
    assert not is_shared_out(held)
    assert not held.requires_grad
    held.add_(1)
    assert whole(tensor).tolist() == [[1, 2], [3, 4], [5, 6]]
    twice = shared_out_as(tensor, held * 2)
    assert isinstance(twice, DTensor)
    assert (twice.placements, twice.shape, twice.stride()) == (tensor.placements, tensor.shape, tensor.stride())
    assert whole(twice).tolist() == [[2, 4], [6, 8], [10, 12]]
    assert for_state(tensor) is tensor
    assert gradient(tensor) is None
    tensor.grad = DTensor.from_local(torch.ones(3, 2), mesh, [Partial()])
    found = gradient(tensor)
    assert isinstance(found, DTensor)
    assert found.placements == tensor.placements
    assert whole(found).tolist() == [[1, 1]] * 3
    tensor.grad = twice
    assert gradient(tensor) is tensor.grad


def test_pieces_of_flat_parameters_are_known_by_their_marks() -> None:
    for mark in ("_is_flat_param", "_fsdp_flattened", "ds_id"):
        parameter = nn.Parameter(torch.ones(2))
        assert not is_flattened(parameter)
        setattr(parameter, mark, 0)
        assert is_flattened(parameter)
