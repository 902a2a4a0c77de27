"""Two ranks with different data and different random states stay equal to the last bit."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from contract.cases import CASES, Case
from lightning_plasticity.engine.base import PlasticityCallback

from .test_resume import MID_EPOCH, Saves, checkpoint
from .training import (
    Batches,
    LightningNetwork,
    adam,
    assert_same,
    difference,
    every_case,
    fit,
    weights,
)

TALK = [
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
]


def fit_on_rank(rank: int, *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(100 + rank)  # initial weights differ too, until DDP makes them equal
    return weights(fit(*callbacks, module=LightningNetwork(), devices=2, strategy="ddp", **options))


def outcome(rank: int, method: PlasticityCallback, *callbacks: Any, **options: Any) -> Any:
    return {"weights": fit_on_rank(rank, method, *callbacks, **options), "state": method.state_dict()}


def talk_in_ordinary_steps(rank: int, method: PlasticityCallback) -> list[str]:
    """The calls of `torch.distributed` in steps of a method that has nothing to do."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in TALK}

    def noted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    torch.manual_seed(0)
    model = LightningNetwork()
    optimizer = adam(model.parameters())
    method.attach(model, optimizer)
    for name in TALK:
        setattr(dist, name, noted(name))
    try:
        for x, y in Batches(rank):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            method.step()
            if method.optimizer_steps == 1:
                calls.clear()  # in the first step ranks compare what they found
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    method.detach()
    return calls


def everything(rank: int, case: Case, folder: Path) -> dict[str, Any]:
    """All runs of one method on one of two ranks."""
    results = {
        "saved": outcome(rank, case.make(), Saves(folder)),
        "not saved": outcome(rank, case.make()),
        "resumed": outcome(rank, case.make(), ckpt_path=checkpoint(folder, MID_EPOCH)),
        "accumulated": outcome(rank, case.make(), accumulate_grad_batches=2),
        "half": outcome(rank, case.make(), precision="bf16-true"),
        "without": {"weights": fit_on_rank(rank)},
    }
    if not isinstance(case.rate_zero, str):
        results["zero"] = outcome(rank, case.rate_zero())
        results["talk"] = talk_in_ordinary_steps(rank, case.rate_zero())
    return results


def work(rank: int, port: int, names: list[str], folder: Path) -> None:
    """One of two processes. They serve several cases, because starting them takes seconds."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "contract",  # tells Lightning that the processes are there
    }
    for case in CASES:
        if case.name in names:
            torch.save(everything(rank, case, folder / case.name), folder / f"{case.name} {rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """What both ranks got in the runs of a case."""
    folder = tmp_path_factory.mktemp("ranks")
    waiting = list(
        dict.fromkeys(
            item.callspec.params["case"].name
            for item in request.session.items
            if item.path == request.path and "case" in item.callspec.params and not item.get_closest_marker("skip")
        )
    )

    def results(case: Case) -> list[dict[str, Any]]:
        if case.name in waiting:
            names = waiting[waiting.index(case.name) :]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            try:
                mp.spawn(work, args=(port, names, folder), nprocs=2)
            except mp.ProcessException:
                if not (folder / f"{case.name} 1.pt").exists():
                    raise  # otherwise a later case has failed: it fails again when it is asked for
            waiting[:] = [name for name in waiting if not (folder / f"{name} 1.pt").exists()]
        return [torch.load(folder / f"{case.name} {rank}.pt", weights_only=True) for rank in range(2)]

    return results


def assert_alike_but_for_batch_statistics(a: Any, b: Any) -> None:
    """Each rank has its own running mean and variance of batch norm: they are of its own data."""
    running = {name for name in a["weights"] if "running" in name}
    trained = [{name: tensor for name, tensor in x["weights"].items() if name not in running} for x in (a, b)]
    assert_same(*trained)
    assert_same(a["state"], b["state"])


@every_case
def test_two_ranks_stay_equal(case: Case, two_ranks: Any) -> None:
    first, second = two_ranks(case)
    assert difference(first["saved"]["weights"], first["without"]["weights"]) is not None
    for run in ("saved", "not saved", "resumed", "accumulated", "half"):
        assert_alike_but_for_batch_statistics(first[run], second[run])
    assert first["saved"]["state"]["optimizer_steps"] == 2 * first["accumulated"]["state"]["optimizer_steps"]


@every_case
def test_two_ranks_save_and_resume(case: Case, two_ranks: Any) -> None:
    for rank in two_ranks(case):
        assert_same(rank["saved"], rank["not saved"])
    # The checkpoint holds the batch statistics of rank 0, so that only this rank resumes with its own.
    first, second = two_ranks(case)
    assert_same(first["resumed"], first["saved"])
    assert_alike_but_for_batch_statistics(second["resumed"], second["saved"])


@every_case
def test_no_talk_in_ordinary_steps(case: Case, two_ranks: Any) -> None:
    if isinstance(case.rate_zero, str):
        pytest.skip(case.rate_zero)
    for rank in two_ranks(case):
        assert rank["talk"] == []
        assert_same(rank["zero"]["weights"], rank["without"]["weights"])
