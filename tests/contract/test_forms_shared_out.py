"""FSDP2 beside activation checkpointing, compilers and half precision; sequence parallelism; and what is refused."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy

from contract.shared_out import FSDP_2, NETS, batch
from contract.training import assert_same
from lightning_plasticity import ActivationReset, ContinualBackprop, PlasticityMonitor, SelectiveReinit
from lightning_plasticity.functional.activation_reset import ActivationStrategy
from lightning_plasticity.names import original
from lightning_plasticity.shards.tensors import whole

METHODS: dict[str, Callable[[], Any]] = {
    "ContinualBackprop": partial(ContinualBackprop, 0.05, 3, seed=1),
    "ActivationReset": partial(ActivationReset, ActivationStrategy(0.01, 0.01, -0.5, 0.5), maturity_threshold=3),
    "SelectiveReinit": partial(
        SelectiveReinit.as_published, relative_threshold=0.2, every_n_train_steps=3, decay_rate=0.5, seed=1
    ),
}


def plain() -> nn.Module:
    return NETS["ViT"].seeded()


def shared(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (FSDP_2.data,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


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


class Tokens(nn.Module):
    """A block of a transformer without attention, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)
        self.last_norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.view(-1, 4, 4))
        x = x + self.narrow(torch.relu(self.wide(self.norm(x))))
        return self.head(self.last_norm(x)).mean(1)


def tokens() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().double()


def over_the_sequence() -> nn.Module:
    """Between the layers that are split each rank has some of the tokens: norms have a term of their gradient each."""
    whole, tokens_split = Replicate(), Shard(1)
    plan = {
        "embedding": PrepareModuleOutput(output_layouts=whole, desired_output_layouts=tokens_split),
        "norm": SequenceParallel(),
        "wide": ColwiseParallel(input_layouts=tokens_split),
        "narrow": RowwiseParallel(output_layouts=tokens_split),
        "last_norm": SequenceParallel(),
        "head": PrepareModuleInput(input_layouts=tokens_split, desired_input_layouts=whole, use_local_output=True),
    }
    return parallelize_module(tokens(), init_device_mesh("cpu", (2,)), plan)


FORMS: Mapping[str, Callable[[], nn.Module]] = {
    "checkpoints": with_checkpoints,
    "compiled blocks": with_compiled_blocks,
    "compiled": compiled,
    "sequence": over_the_sequence,
}
CASES = [
    ("checkpoints", "ActivationReset"),
    ("sequence", "SelectiveReinit"),
    *((form, "ContinualBackprop") for form in FORMS),
]


def course(make: Callable[[], Any], model: nn.Module, parts: list[int]) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-6)
    method, monitor = make(), PlasticityMonitor(every_n_train_steps=5)
    for each in (method, monitor):
        each.attach(model, optimizer, (batch(0, 0)[0],))
    chosen = []
    for step in range(10):
        optimizer.zero_grad()
        for part in parts:
            x, y = batch(step, part)
            (cross_entropy(model(x), y) / len(parts)).backward()
        optimizer.step()
        method.step()
        monitor.step()
        is_selective = isinstance(method, SelectiveReinit)
        chosen.append(method._renewed if is_selective else (method._ages.now() == 0).nonzero().squeeze(1).tolist())
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
        courses[form, name] = course(METHODS[name], FORMS[form](), [0 if form == "sequence" else rank])
        assert (counters["stats"]["unique_graphs"] > 0) == ("compiled" in form)
    return {"courses": courses, "refusals": refusals(rank), "half": in_half_precision(rank)}


def in_half_precision(rank: int) -> dict[str, Any]:
    """What is computed is in bfloat16, and parameters are in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shared(plain().float(), mp_policy=policy)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    methods = [make().attach(model, optimizer) for make in METHODS.values()]
    monitor = PlasticityMonitor(every_n_train_steps=5).attach(model, optimizer)
    for step in range(10):
        x, y = batch(step, rank)
        optimizer.zero_grad()
        cross_entropy(model(x.float()).float(), y).backward()
        optimizer.step()
        for method in methods:
            method.step()
        numbers = monitor.step()
    weights = {name: whole(p).detach() for name, p in model.named_parameters()}
    return {"weights": weights, "numbers": numbers, "replaced": methods[0].replaced}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(2, on_each, tmp_path_factory.mktemp("ranks"), seconds=600)


@pytest.mark.parametrize(("form", "name"), CASES)
def test_the_course_is_that_of_one_plain_device(ranks: list[Any], form: str, name: str) -> None:
    alone = course(METHODS[name], *((tokens(), [0]) if form == "sequence" else (plain(), [0, 1])))
    assert any(alone["chosen"])
    for rank in ranks:
        got = rank["courses"][form, name]
        assert got["chosen"] == alone["chosen"]
        for parameter, wanted in alone["weights"].items():
            assert (got["weights"][parameter] - wanted).abs().max() < 1e-9 * wanted.abs().max(), parameter
        for measure, records in alone["measured"].items():
            for (_, values), (_, others) in zip(got["measured"][measure], records, strict=True):
                assert values == pytest.approx(others, rel=1e-9, abs=1e-12), measure


def test_half_precision_is_computed_with_alike_on_all_ranks(ranks: list[Any]) -> None:
    first, second = (rank["half"] for rank in ranks)
    assert first["replaced"] > 3
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in first["weights"].values())
    assert_same(first, second)


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
