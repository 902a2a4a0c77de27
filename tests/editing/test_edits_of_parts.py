"""Edits of parameters that are shared out among ranks: together they are the edits of the whole ones."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_plasticity.editing.edits import Editor
from lightning_plasticity.editing.initial import InitialDistribution
from lightning_plasticity.editing.optimizer_state import OPTIMIZER_STATES
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.tensors import whole

RANKS = 4


def network() -> nn.Module:
    """One layer of each kind; rows that four ranks cannot share evenly, and fewer of them than ranks."""
    torch.manual_seed(0)
    layers = OrderedDict(
        first=nn.Linear(5, 10),
        norm=nn.BatchNorm1d(10),
        several=nn.LayerNorm((3, 2)),
        second=nn.Linear(10, 3),
        conv=nn.Conv2d(4, 6, 3),
        grouped=nn.Conv2d(6, 6, 2, groups=3),
        transposed=nn.ConvTranspose2d(6, 5, 2, stride=2),
    )
    return nn.Sequential(layers).double()


def by_columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % 2 == 0 else None


def split(model: nn.Module, ranks: int) -> tuple[nn.Module, Any]:
    mesh = init_device_mesh("cpu", (RANKS // ranks, ranks), mesh_dim_names=("data", "tensors"))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(model, mesh["tensors"], plan), mesh["data"]


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "FSDP2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (4,))),
    "HSDP": lambda model: fully_shard(
        model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")), shard_placement_fn=by_columns
    ),
    "tensors": lambda model: split(model, RANKS)[0],
    "both": lambda model: (lambda parts, mesh: fully_shard(parts, mesh=mesh))(*split(model, 2)),
}


def same_part(values: Tensor, parameter: Tensor) -> Tensor:
    """Values over a whole parameter, as what it is: shared out or not."""
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(
        part_of(parameter).take(values).contiguous(),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def edited(model: nn.Module, mode: Any, make_optimizer: Callable[..., torch.optim.Optimizer]) -> dict[str, Any]:
    """Steps of an optimizer and one edit of each kind; all parameters and states, put together, at three times."""
    optimizer = make_optimizer(model.parameters())
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = same_part(gradient, parameter)
        optimizer.step()

    def now() -> list[Tensor]:
        states = [state for p in model.parameters() for _, state in sorted(optimizer.state.get(p, {}).items())]
        tensors = [*model.parameters(), *model.buffers(), *(s for s in states if isinstance(s, Tensor))]
        return [whole(tensor).detach().clone() for tensor in tensors]

    def rows(name: str, *entries: int) -> None:
        index = torch.tensor(entries, dtype=torch.int64)
        editor.redraw_rows(name, index, initial.draw(f"{name}.weight", generator, index))

    step()
    initial = InitialDistribution(
        model, [name for name, p in model.named_parameters() if p.ndim > 1 and "several" not in name]
    )
    editor = Editor(model, [optimizer], mode)
    amounts = torch.tensor([0.5, -2.0], dtype=torch.float64)
    for name, columns in {"second": [9, 2], "conv": [3, 0], "grouped": [5, 2], "transposed": [1, 4]}.items():
        editor.shift_bias(name, torch.tensor(columns), amounts)
    rows("first", 9, 0, 4)
    rows("conv", 5)
    rows("grouped", 1, 2)
    rows("transposed", 3, 0)
    editor.scale_rows("second", torch.tensor([2, 0]), -0.5)
    editor.scale_rows("transposed", torch.tensor([4]), 3.0)
    editor.reset_norm("norm", torch.tensor([7, 1]))
    editor.reset_norm("several", torch.tensor([5, 2]))
    for name, columns in {"second": [9, 2], "conv": [3], "grouped": [5, 2], "transposed": [1, 4]}.items():
        editor.zero_columns(name, torch.tensor(columns))
    first = [now()]
    step()
    weight, bias = model.get_submodule("first").weight, model.get_submodule("conv").bias
    kernel = model.get_submodule("conv").weight
    chosen = torch.rand(weight.shape, generator=generator) < 0.3
    mask, drawn = part_of(weight).take(chosen), initial.draw("first.weight", generator)
    editor.write_masked(weight, mask, drawn)
    mask = part_of(kernel).take(torch.rand(kernel.shape, generator=generator) < 0.3)
    editor.write_packed(kernel, mask, torch.full((int(mask.sum()),), 7.0, dtype=torch.float64))
    editor.scale([weight, bias], 0.5)
    editor.add([weight, bias], [value + 1 for value in editor.precise([weight, bias])], 0.25)
    editor.write([bias], [torch.zeros_like(editor.precise([bias])[0])])
    editor.reset_norm("several")
    editor.clamp(list(model.parameters()), 1.0)
    first.append(now())
    step()
    first.append(now())
    editor.close()
    return {"tensors": first}


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def all_ways(rank: int) -> dict[Any, Any]:
    return {
        (way, mode, name): edited(share(network()), mode, make)
        for way, share in WAYS.items()
        for mode in OPTIMIZER_STATES
        for name, make in OPTIMIZERS.items()
        if name == "Adam" or mode == "survivors"
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_ranks(RANKS, all_ways, tmp_path_factory.mktemp("ranks"))


def test_edits_of_parts_are_those_of_the_whole(ranks: Any) -> None:
    alone = {key[1:]: edited(copy.deepcopy(network()), key[1], OPTIMIZERS[key[2]]) for key in ranks[0]}
    for rank in ranks:
        for key, result in rank.items():
            torch.testing.assert_close(
                result, alone[key[1:]], rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
            )
