"""Data-parallel training of all kinds, in plain loops on four ranks: they stay equal to the last bit."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from contract.cases import CASES, Case
from lightning_plasticity import find_units

from .training import adam, assert_same, difference, every_case, weights

RANKS, STEPS = 4, 9
# These do what plain data-parallel training does, but for the order in which gradients are added up.
EQUAL = ("static graph", "gradients in buckets", "sharded optimizer")


class Branches(nn.Module):
    """Two branches, of which a call takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        return self.head(torch.relu(self.second[branch](torch.relu(self.first(x)))))


@dataclass(frozen=True)
class Scenario:
    """One kind of data-parallel training."""

    wrapped: Callable[[nn.Module], nn.Module] = DistributedDataParallel
    optimizer: Callable[[nn.Module], Any] = lambda model: adam(model.parameters())
    rows: Callable[[int, int], int] = lambda rank, step: 8
    branch: Callable[[int, int], int | None] = lambda rank, step: 0


def with_hook(hook: Any) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(None, hook)
        return ddp

    return wrapped


SCENARIOS = {
    "plain": Scenario(),
    "static graph": Scenario(lambda model: DistributedDataParallel(model, static_graph=True)),
    "gradients in buckets": Scenario(lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True)),
    "sharded optimizer": Scenario(
        optimizer=lambda model: ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.03)
    ),
    "gradients sent in half precision": Scenario(with_hook(default_hooks.bf16_compress_hook)),
    "unused parameters": Scenario(
        lambda model: DistributedDataParallel(model, find_unused_parameters=True),
        # Each branch is taken by some ranks, or by all, or by none.
        branch=lambda rank, step: 0 if step % 3 == 1 else (rank + step) % 2,
    ),
    "uneven and empty batches": Scenario(rows=lambda rank, step: (3 * rank + step) % 5),
}
every_scenario = pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "plain"])


def train(scenario: Scenario, case: Case | None, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Branches().double()
    if scenario.branch(0, 0) == scenario.branch(1, 0):
        del model.second[1]
    ddp = scenario.wrapped(model)
    optimizer = scenario.optimizer(model)
    method = case.make() if case else None
    if method:
        method.attach(ddp, optimizer)
    generator = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        x = torch.randn(scenario.rows(rank, step), 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        ddp(x, scenario.branch(rank, step)).square().sum().backward()
        optimizer.step()
        if method:
            method.step()
    found = {"weights": weights(model)}
    if method:
        found |= {"state": method.state_dict(), "steps": method.optimizer_steps}
        method.detach()
    return found


def uneven_ends(case: Case, rank: int) -> str:
    """What a method says where ranks end at different times."""
    model = Branches()
    del model.second[1]
    ddp = DistributedDataParallel(model)
    method, optimizer = case.make(), adam(model.parameters())
    method.attach(ddp, optimizer)
    try:
        with Join([ddp]):
            for _ in range(3):
                optimizer.zero_grad()
                ddp(torch.randn(4, 6), 0).sum().backward()
                optimizer.step()
                method.step()
    except RuntimeError as error:
        return str(error)
    finally:
        method.detach()
    return "nothing"


def work(rank: int, port: int, names: list[str], folder: Path) -> None:
    """One of four processes, which serve all methods, because starting them takes seconds."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results: dict[Any, Any] = {name: train(scenario, None, rank) for name, scenario in SCENARIOS.items()}
    for case in CASES:
        if case.name in names:
            for name, scenario in SCENARIOS.items():
                results[case.name, name] = train(scenario, case, rank)
            results[case.name, "uneven ends"] = uneven_ends(case, rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    """What each rank got in all runs of the cases that are asked for."""
    folder = tmp_path_factory.mktemp("parallel")
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = list(dict.fromkeys(item.callspec.params["case"].name for item in items))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, names, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@every_scenario
@every_case
def test_ranks_stay_equal(case: Case, scenario: str, ranks: list[dict[Any, Any]]) -> None:
    first = ranks[0][case.name, scenario]
    for other in ranks[1:]:
        assert_same(other[case.name, scenario], first)
    assert first["steps"] == STEPS
    assert all(tensor.isfinite().all() for tensor in first["weights"].values())
    assert difference(first["weights"], ranks[0][scenario]["weights"]) is not None
    if scenario in EQUAL:
        for name, weight in ranks[0][case.name, "plain"]["weights"].items():
            torch.testing.assert_close(first["weights"][name], weight)


@every_case
def test_ranks_that_end_at_different_times_are_refused(case: Case, ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert "needs all ranks to make the same steps" in rank[case.name, "uneven ends"]


def test_units_behind_synchronised_norms() -> None:
    plain = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    (units,), (expected,) = (find_units(model, torch.zeros(2, 6)) for model in (synchronised, plain))
    assert (units.name, units.size, [slots.module for slots in units.norms]) == (expected.name, 12, ["1"])
