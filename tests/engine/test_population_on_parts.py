"""What methods read of weights that ranks share out: on each rank what one rank reads of whole ones."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from engine.test_population import NAMES, Network, close
from lightning_plasticity import ContinualBackprop, find_units

SETS = [[*range(len(NAMES))], [0], [3, 1], [4, 2]]
WAYS: dict[str, list[Placement]] = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()]}
SOME = "rows of some"


def network() -> Network:
    """With gradients."""
    torch.manual_seed(0)
    model = Network().double()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def shared_out(modules: Iterable[nn.Module], placements: list[Placement]) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for module in modules:
        weight = module.weight
        module.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, placements))
        module.weight.grad = distribute_tensor(weight.grad, mesh, placements)


def read(model: nn.Module) -> list[Tensor]:
    units = find_units(network(), torch.zeros(1, 1, 4, 4).double())
    population = ContinualBackprop(units=units).attach(model)._population
    found = []
    with torch.no_grad():
        for sets in SETS:
            sizes = torch.linspace(1, 2, len(population.unit_of_column(sets)), dtype=torch.float64)
            which, gradients = population.gradient_sizes(sets)
            assert [*which] == sets
            found += [
                population.contribution(sets).clone(),
                population.contribution(sets, sizes).clone(),
                population.incoming(sets),
                gradients,
            ]
    return found


def on_each(rank: int) -> dict[str, list[Tensor]]:
    found = {}
    for name, placements in WAYS.items():
        model = network()
        shared_out(model.children(), placements)
        found[name] = read(model)
    model = network()
    shared_out([model.grouped, model.both], WAYS["rows"])
    return found | {SOME: read(model)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, on_each, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", [*WAYS, SOME])
def test_sizes_of_weights_are_those_of_the_whole_network(way: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for found, expected in zip(rank[way], read(network()), strict=True):
            close(found, expected)
