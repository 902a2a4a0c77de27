"""The monitor where no rank holds the whole network: its numbers are those of one device."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

from contract.shared_out import BOTH, FSDP_2, HSDP, NETS, TENSORS_2, Way, batch
from lightning_plasticity import PlasticityMonitor
from lightning_plasticity import metrics as M
from lightning_plasticity.distributed import gather_objects

STEPS = 9
CASES = {
    2: [(FSDP_2, "ViT"), (TENSORS_2, "MLP"), (TENSORS_2, "ViT")],
    4: [(BOTH, "MLP"), (BOTH, "ResNet"), (HSDP, "MLP")],
}
OF_TRAINING = [
    M.EffectiveRank,
    M.StableRank,
    M.FeatureRank,
    M.DeadUnits,
    M.DormantUnits,
    M.LinearizedUnits,
    M.RarelyActiveUnits,
    M.SaturatedUnits,
    M.SignEntropy,
    M.DuplicateUnits,
    M.WeightMagnitude,
    M.WeightNorm,
    M.DistanceFromInit,
    M.UpdateRatio,
    M.IsometryDeviation,
    M.Balancedness,
    M.GradientNorm,
    M.GradientDormancy,
]
OF_PROBE = [M.EffectiveRank, M.DormantUnits, M.Churn]
# Outputs of modules, of which tensor parallelism leaves the first alone, and makes the second a sum.
OUTPUTS = {"MLP": ["1", "5"], "ViT": ["blocks.0", "blocks.1.mlp.fc2"], "ResNet": ["second", "head"]}


def monitors(kind: str) -> dict[str, PlasticityMonitor]:
    features = {"outputs": M.StableRank(unit_dim=1 if kind == "ResNet" else -1)}
    return {
        "training": PlasticityMonitor([make() for make in OF_TRAINING], 3),
        "probe": PlasticityMonitor({f"probe {m.__name__}": m() for m in OF_PROBE}, 3, probe_batch=batch(100, 0)),
        "outputs": PlasticityMonitor(features, 3, layers=OUTPUTS[kind]),
    }


def course(kind: str, model: nn.Module, parts: list[int]) -> dict[str, Any]:
    """What is measured while a network is trained; after some steps new monitors go on from the state of the first."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-6)
    states: dict[str, Any] = {}
    for steps in (range(5), range(5, STEPS)):
        own = monitors(kind)
        for name, monitor in own.items():
            if states:
                monitor.load_state_dict(states[name])
            monitor.attach(model, optimizer, (batch(0, 0)[0],))
        for step in steps:
            optimizer.zero_grad()
            for part in parts:
                x, y = batch(step, part)
                (cross_entropy(model(x), y) / len(parts)).backward()
            optimizer.step()
            for monitor in own.values():
                monitor.step()
        states = gather_objects({name: monitor.state_dict() for name, monitor in own.items()})[0]
        for monitor in own.values():
            monitor.detach()
    model.eval()
    with torch.no_grad():
        model(batch(0, 0)[0])  # after which FSDP2 keeps parameters whole
    last = PlasticityMonitor([M.WeightNorm(), M.DistanceFromInit()], 1).attach(model)
    last.step()
    return {"states": states, "last": last.values}


def courses(rank: int, cases: list[tuple[Way, str]]) -> list[Any]:
    results: list[Any] = [course(kind, way.share_out(NETS[kind]), [rank // way.tensors]) for way, kind in cases]
    return [*results, pieces() if TENSORS_2 in [way for way, _ in cases] else None]


def one_layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 6), nn.Tanh()).double()


def outputs(model: nn.Module, layers: str) -> float:
    monitor = PlasticityMonitor([M.StableRank()], 1, layers=layers).attach(model)
    model(batch(0, 0)[0]).sum().backward()
    return monitor.step()["plasticity/StableRank"]


def pieces() -> tuple[float, str]:
    """Outputs that tensor parallelism splits between ranks: of a layer that it knows, and of what comes after."""
    mesh = init_device_mesh("cpu", (2,))
    models = [parallelize_module(one_layer(), mesh, {"0": ColwiseParallel()}) for _ in range(2)]
    with pytest.raises(RuntimeError) as refused:
        outputs(models[0], "1")
    return outputs(models[1], "0"), str(refused.value)


def test_outputs_are_put_together_or_refused(ranks: Any) -> None:
    _, results = ranks
    for rank in results:
        if rank[-1] is not None:
            value, refusal = rank[-1]
            assert value == pytest.approx(outputs(one_layer(), "0"), rel=1e-9)
            assert "must name modules with parameters, but '1' has none" in refusal


def test_what_differentiates_the_model_is_refused_at_the_start(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = one_layer().append(nn.Linear(6, 2).double())
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))  # one layer is enough
        monitor = PlasticityMonitor({"of the batch": M.GradientCovariance()}, 1)
        with pytest.raises(RuntimeError, match=r"GradientCovariance differentiates .* Leave 'of the batch' out"):
            monitor.attach(model)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=CASES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = CASES[request.param]
    return cases, on_ranks(request.param, courses, tmp_path_factory.mktemp("ranks"), cases, seconds=600)


def numbers(history: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    return {
        (name, step, layer): value
        for name, records in history.items()
        for step, by_layer in records
        for layer, value in by_layer.items()
    }


def assert_equal_tensors(got: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert_equal_tensors(got[key], wanted[key])


def test_the_numbers_are_those_of_one_device(ranks: Any) -> None:
    cases, results = ranks
    for i, (way, kind) in enumerate(cases):
        parts = list(range(way.data * way.copies))
        alone = course(kind, NETS[kind].seeded(), parts)
        for rank in results:
            for name, state in alone["states"].items():
                if name == "probe" and kind != "ViT" and len(parts) > 1:
                    continue  # each rank measures what its own running statistics give
                wanted, found = numbers(state["history"]), numbers(rank[i]["states"][name]["history"])
                assert len({step for _, step, _ in wanted}) == 3
                assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9, nan_ok=True), (way, kind, name)
            # the start, from which distances are told, put together
            assert_equal_tensors(
                rank[i]["states"]["training"]["metrics"]["DistanceFromInit/"],
                alone["states"]["training"]["metrics"]["DistanceFromInit/"],
            )
            assert rank[i]["last"] == pytest.approx(alone["last"], rel=1e-9)
