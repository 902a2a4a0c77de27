"""FSDP2 beside activation checkpointing and compilers; and what is refused where networks are shared out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

from contract.shared_out import FSDP_2, NETS, batch
from lightning_plasticity import ActivationReset, ContinualBackprop, PlasticityMonitor
from lightning_plasticity.functional.activation_reset import ActivationStrategy
from lightning_plasticity.names import original
from lightning_plasticity.shards import whole

METHODS: dict[str, Callable[[], Any]] = {
    "ContinualBackprop": partial(ContinualBackprop, 0.05, 3, seed=1),
    "ActivationReset": partial(ActivationReset, ActivationStrategy(0.01, 0.01, -0.5, 0.5), maturity_threshold=3),
}


def plain() -> nn.Module:
    return NETS["ViT"].seeded()


def shared(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (FSDP_2.data,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_checkpoints() -> nn.Module:
    model = plain()
    model.set_grad_checkpointing()  # type: ignore[operator]
    return shared(model)


def with_compiled_blocks() -> nn.Module:
    model = plain()
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager")
    return shared(model)


def compiled() -> nn.Module:
    return torch.compile(shared(plain()), backend="aot_eager")  # type: ignore[return-value]


FORMS: Mapping[str, Callable[[], nn.Module]] = {
    "checkpoints": with_checkpoints,
    "compiled blocks": with_compiled_blocks,
    "compiled": compiled,
}

CASES = [("checkpoints", "ActivationReset"), *((form, "ContinualBackprop") for form in FORMS)]


def course(make: Callable[[], Any], model: nn.Module, parts: list[int]) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-6)
    method, monitor = make(), PlasticityMonitor(every_n_train_steps=5)
    for each in (method, monitor):
        each.attach(model, optimizer)
    chosen = []
    for step in range(10):
        optimizer.zero_grad()
        for part in parts:
            x, y = batch(step, part)
            (cross_entropy(model(x), y) / len(parts)).backward()
        optimizer.step()
        method.step()
        monitor.step()
        chosen.append((method._ages.now() == 0).nonzero().squeeze(1).tolist())
    weights = {name: whole(p).detach() for name, p in original(model).named_parameters()}
    for each in (method, monitor):
        each.detach()
    return {"chosen": chosen, "weights": weights, "measured": monitor.history}


def stages(rank: int) -> nn.Module:
    """One stage of a pipeline on each rank, which FSDP2 shards within the stage."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stages", "data"))
    return fully_shard(nn.Sequential(nn.Linear(16 if rank == 0 else 8, 8), nn.ReLU()), mesh=mesh["data"])


def given_plain_pieces() -> tuple[nn.Module, Tensor]:
    """Layers that are split by hand, so that the second is given a piece of its input that does not say which."""
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    parallelize_module(model, mesh, {"0": ColwiseParallel()})

    def split(name: str, module: nn.Module, mesh: Any) -> None:
        for own_name, parameter in list(module.named_parameters(recurse=False)):
            placement = [Shard(1)] if own_name == "weight" else None
            setattr(module, own_name, nn.Parameter(distribute_tensor(parameter, mesh, placement)))

    distribute_module(model[2], mesh, split)
    return model, batch(0, 0)[0]


def refusals(rank: int) -> dict[str, str]:
    found = {}
    for name in ("method", "monitor"):
        one = METHODS["ContinualBackprop"]() if name == "method" else PlasticityMonitor(every_n_train_steps=1)
        model, x = given_plain_pieces()
        one.attach(model, torch.optim.SGD(model.parameters()), (x,))
        with pytest.raises(RuntimeError) as refused:
            model(x)
        found[f"piece, {name}"] = str(refused.value)
    model = stages(rank)
    with pytest.raises(RuntimeError) as refused:
        METHODS["ContinualBackprop"]().attach(model, torch.optim.SGD(model.parameters()))
    return found | {"pipeline": str(refused.value)}


def on_each(rank: int) -> dict[str, Any]:
    courses = {}
    for form, name in CASES:
        counters.clear()
        courses[form, name] = course(METHODS[name], FORMS[form](), [rank])
        assert (counters["stats"]["unique_graphs"] > 0) == ("compiled" in form)
    return {"courses": courses, "refusals": refusals(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(2, on_each, tmp_path_factory.mktemp("ranks"), seconds=600)


@pytest.mark.parametrize("name", METHODS)
def test_the_course_is_that_of_one_plain_device(ranks: list[Any], name: str) -> None:
    alone = course(METHODS[name], plain(), [0, 1])
    assert any(alone["chosen"])
    for rank in ranks:
        for form in [form for form, own_name in CASES if own_name == name]:
            got = rank["courses"][form, name]
            assert got["chosen"] == alone["chosen"], form
            for parameter, wanted in alone["weights"].items():
                assert (got["weights"][parameter] - wanted).abs().max() < 1e-9 * wanted.abs().max(), (form, parameter)
            for measure, records in alone["measured"].items():
                for (_, values), (_, others) in zip(got["measured"][measure], records, strict=True):
                    assert values == pytest.approx(others, rel=1e-9, abs=1e-12), (form, measure)


def test_pieces_that_do_not_say_which_are_refused(ranks: list[Any]) -> None:
    for rank in ranks:
        for name in ("method", "monitor"):
            assert (
                "a layer of 10 inputs must be given a DTensor where they are split, got a tensor with 5"
                in (rank["refusals"][f"piece, {name}"])
            )


def test_a_pipeline_is_refused(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "ranks have other parameters, as in pipeline parallelism" in rank["refusals"]["pipeline"]
