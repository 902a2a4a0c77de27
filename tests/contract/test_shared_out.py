"""Networks that no rank holds whole: the course of a method is that on one device, to rounding.

Every rank that shares the batch has other data. On one device the same batches are accumulated, one after another, so
that batch norm sees what it sees on each rank.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from contract.cases import Case
from contract.shared_out import BOTH, COMBINED, FSDP_2, FSDP_4, HSDP, NETS, TENSORS_2, Way, batch, of_rank_0
from contract.training import Network, assert_same, every_case, seeded
from lightning_plasticity import (
    ActivationReset,
    ContinualBackprop,
    DirectionAwareShrink,
    HareAndTortoise,
    IsometryReinit,
    L2Init,
    LayerReset,
    OptimizerReset,
    ParsevalRegularization,
    PartialReset,
    ReDo,
    SelectiveReinit,
    SelfNormalizedReset,
    ShrinkAndPerturb,
    SoftWeightRescaling,
    SpectralRegularization,
    WeightClipping,
)
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.unit_callback import UnitCallback
from lightning_plasticity.functional.activation_reset import ActivationStrategy
from lightning_plasticity.layers.flow import trace
from lightning_plasticity.layers.rescaling import change_of_outputs, plan
from lightning_plasticity.shards.tensors import local, whole

STEPS = 60


def mean_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([cross_entropy(model(x), y) for x, y in batches]).mean()


METHODS: dict[str, partial[PlasticityCallback]] = {
    "ContinualBackprop": partial(ContinualBackprop, 0.02, 5, seed=1),
    "ContinualBackprop, adaptable": partial(ContinualBackprop, 0.02, 5, utility="adaptation", init="quantiles", seed=1),
    "ActivationReset": partial(ActivationReset, ActivationStrategy(0.01, 0.01, -0.5, 0.5), maturity_threshold=5),
    "ReDo": partial(ReDo, 0.7, 10, seed=1),
    "ReDo by gradient": partial(ReDo, 0.7, 10, score="gradient", score_steps=3, optimizer_state="reset", seed=1),
    "PartialReset": partial(PartialReset, 0.3, 10, seed=1),
    "ShrinkAndPerturb": partial(ShrinkAndPerturb, 0.8, 0.2, every_n_train_steps=10, seed=1),
    "LayerReset": partial(LayerReset, 1, every_n_train_steps=10, seed=1),
    "WeightClipping": partial(WeightClipping, 0.9),
    "SoftWeightRescaling": partial(SoftWeightRescaling, 0.3),
    "SoftWeightRescaling, held": partial(SoftWeightRescaling, 1.0, biases="keep"),
    "L2Init": partial(L2Init, 0.3),
    # Before batch norm a bias has no gradient but the penalty's, which is made of rounding.
    "L2Init, in the gradient": partial(L2Init, 0.3, decoupled=False, exclude="0.bias"),
    "L2Init, sorted": partial(L2Init, 0.3, match="sorted", every_n_train_steps=2),
    "HareAndTortoise": partial(HareAndTortoise, 0.8, every_n_train_steps=10),
    "ShrinkAndPerturb, from the start": partial(ShrinkAndPerturb, 0.8, 0.2, init="start", every_n_train_steps=10),
    "IsometryReinit": partial(IsometryReinit, every_n_train_steps=10),
    "IsometryReinit, exact": partial(IsometryReinit, exact=True, every_n_train_steps=10),
    "ParsevalRegularization": partial(ParsevalRegularization, 0.1),
    # Without the layer before batch norm, the gradient of whose bias is rounding and points anywhere.
    "DirectionAwareShrink": partial(DirectionAwareShrink, data=(), loss=mean_loss, exclude="0", every_n_train_steps=10),
    "SpectralRegularization": partial(SpectralRegularization, 0.1, seed=1),
    "OptimizerReset": partial(OptimizerReset, every_n_train_steps=10),
    "SelectiveReinit": partial(SelectiveReinit, 0.2, "mean_noise", every_n_train_steps=10, seed=1),
    "SelectiveReinit by chance": partial(SelectiveReinit, 0.2, "normal", std=0.1, utility="random", seed=1),
    "SelectiveReinit by gradient": partial(
        SelectiveReinit, 0.1, "init", utility="gradient", decay_rate=0.9, zero_biases=True, every_n_train_steps=10
    ),
    # Without the layer before batch norm, among the gradients of whose bias rounding alone would choose.
    "SelectiveReinit as published": partial(
        SelectiveReinit,
        reinit="init",
        utility="gradient",
        relative_threshold=0.2,
        parameters="all",
        optimizer_state="keep",
        every_n_train_steps=10,
        exclude="0",
        seed=1,
    ),
    "SelfNormalizedReset": partial(
        SelfNormalizedReset, 0.2, every_n_train_steps=10, min_silence=1, max_silence=4, seed=1
    ),
}


# Of methods on weights several act in one course where ranks are many, each after the others: each once.
TOGETHER = [
    ("ShrinkAndPerturb", "L2Init", "HareAndTortoise", "SoftWeightRescaling", "OptimizerReset"),
    ("WeightClipping", "L2Init, sorted", "IsometryReinit", "SpectralRegularization", "LayerReset"),
    (
        "L2Init, in the gradient",
        "ShrinkAndPerturb, from the start",
        "IsometryReinit, exact",
        "ParsevalRegularization",
        "DirectionAwareShrink",
        "SoftWeightRescaling, held",
    ),
]


def course(names: Sequence[str], model: nn.Module, parts: list[int], examples: Any) -> dict[str, Any]:
    """A plain loop; for each step what was new, and at the end all weights, put together."""
    # A bias before batch norm has gradients of 0 but for rounding, which without eps Adam would make as large as any.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-6)
    methods = {name: METHODS[name]() for name in names}
    chosen: list[Any] = []
    acted: set[str] = set()

    def weights() -> list[Tensor]:
        return copies(model.parameters())

    def act(name: str, do: Callable[[], Any], changed: Callable[[], list[Tensor]]) -> None:
        before = changed()
        do()
        if not all(map(torch.equal, before, changed())):
            acted.add(name)

    for name, method in methods.items():
        if isinstance(method, DirectionAwareShrink):
            method.data = [[batch(1000 + i, part) for part in parts] for i in range(3)]
        act(name, partial(method.attach, model, optimizer, examples), weights)
    in_gradient = next((n for n, m in methods.items() if isinstance(m, L2Init) and not m.decoupled), "")
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in parts:
            x, y = batch(step, part)
            (cross_entropy(model(x), y) / len(parts)).backward()
        act(
            in_gradient,
            optimizer.step,
            lambda: [local(p.grad).clone() for p in model.parameters() if p.grad is not None],
        )
        for name, method in methods.items():
            act(name, method.step, weights)
            if method._numbers().get("resets"):
                acted.add(name)
            if isinstance(method, SelectiveReinit):
                chosen.append(dict(method._renewed))
            if isinstance(method, UnitCallback):
                new = (method._ages.now() == 0).nonzero().squeeze(1).tolist()
                chosen.append((method._numbers().get("replaced"), new))
    tensors = {name: whole(p).detach() for name, p in model.named_parameters()}
    for method in methods.values():
        state = method.state_dict()
        method.load_state_dict(of_rank_0(state))
        assert_same(method.state_dict(), state)
        if isinstance(method, SelectiveReinit):
            averages = method._averages.state_dict(method._weights)["averages"]
            tensors |= {f"average of {name}": whole(average) for name, average in averages.items()}
        method.detach()
    return {"chosen": chosen, "tensors": tensors, "have acted": acted >= set(names)}


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(tensor).detach().clone() for tensor in tensors]


@every_case
def test_a_method_works_on_parts_or_refuses_them(case: Case, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = seeded(Network)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        method = case.make()
        if method.works_on_parts:
            assert any(case.name.startswith(name) for name in METHODS), "its course is compared above"
            return
        with pytest.raises(RuntimeError, match=f"{type(method).__name__} needs whole parameters .* strategy='ddp'"):
            method.attach(model, torch.optim.Adam(model.parameters()))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gates_are_refused(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        layers = [kind(4, 3), Last(), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)]
        model = fully_shard(nn.Sequential(*layers), mesh=init_device_mesh("cpu", (1,)))
        method = ContinualBackprop()
        with pytest.raises(RuntimeError, match=r"An edit of an LSTM or a GRU needs whole parameters, .* exclude the"):
            method.attach(model, torch.optim.SGD(model.parameters()), (torch.randn(5, 2, 4),))
        method = ContinualBackprop(exclude="0.*")
        method.attach(model, torch.optim.SGD(model.parameters()), (torch.randn(5, 2, 4),))
        assert [unit_set.units.name for unit_set in method._population.sets] == ["2"]
        method.detach()
    finally:
        dist.destroy_process_group()


class Last(nn.Module):
    """The outputs of a recurrent network at its last step."""

    def forward(self, x: tuple[Tensor, Any]) -> Tensor:
        return x[0][-1]


def change(model: nn.Module, x: Tensor) -> float:
    """By how much a network's outputs would be moved by what Soft Weight Rescaling does to its weights."""
    rescaling = plan(model, trace(model, (x,), {}), tie_streams=False)
    return change_of_outputs(model, (x,), {}, rescaling)


ALL_NETS = NETS | COMBINED
WAYS = {2: [FSDP_2, TENSORS_2], 4: [BOTH, FSDP_4, HSDP]}


def cases(way: Way) -> Iterator[tuple[str, tuple[str, ...]]]:
    """One method everywhere; each on the MLP under every kind of sharing out, and with empty parts if on weights."""
    one = ("ContinualBackprop",)
    for kind in NETS:
        yield kind, one
    on_weights = [name for names in TOGETHER for name in names]
    apart = [name for name in METHODS if way.ranks == 2 or name not in on_weights]
    if way in (FSDP_2, TENSORS_2, BOTH):
        yield from (("MLP", (name,)) for name in apart if (name,) != one)
    if way in (BOTH, FSDP_4):
        yield from (("MLP", names) for names in TOGETHER)
    for kind in COMBINED if way == FSDP_4 else ():
        yield from ((kind, (name,)) for name in ("ContinualBackprop", "ActivationReset", "PartialReset"))


def courses(rank: int, ways: list[Way]) -> dict[Any, Any]:
    got: dict[Any, Any] = {}
    for way in ways:
        part = rank // way.tensors
        for kind in NETS:
            got[str(way), kind] = change(way.share_out(NETS[kind]), batch(0, part)[0])
        for kind, names in cases(way):
            got[str(way), kind, names] = course(names, way.share_out(ALL_NETS[kind]), [part], (batch(0, part)[0],))
    return got


@pytest.fixture(scope="module", params=WAYS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return WAYS[request.param], on_ranks(
        request.param, courses, tmp_path_factory.mktemp("ranks"), WAYS[request.param], seconds=1200
    )


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def test_the_course_is_that_of_one_device(ranks: Any) -> None:
    ways, results = ranks
    for way in ways:
        for kind, names in cases(way):
            parts = list(range(way.data * way.copies))
            alone = course(names, ALL_NETS[kind].seeded(), parts, (batch(0, 0)[0],))
            assert alone["have acted"], (kind, names)
            for rank in results:
                got = rank[str(way), kind, names]
                assert got["chosen"] == alone["chosen"], (way, kind, names)
                assert got["tensors"].keys() == alone["tensors"].keys()
                for tensor, wanted in alone["tensors"].items():
                    assert relative_difference(got["tensors"][tensor], wanted) < 1e-9, (way, kind, names, tensor)


def test_the_change_of_outputs_is_that_of_one_device(ranks: Any) -> None:
    ways, results = ranks
    for kind in NETS:
        alone = change(NETS[kind].seeded(), batch(0, 0)[0])
        assert (alone > 0) == (kind != "MLP")  # which would be rescaled exactly
        for way in ways:
            for rank in results:
                assert rank[str(way), kind] == pytest.approx(alone, rel=1e-9)
