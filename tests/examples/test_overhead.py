"""The overhead benchmark, at a tiny size."""

import importlib
import json
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_plasticity import ContinualBackprop
from lightning_plasticity.engine.base import PlasticityCallback


class Sleepy(PlasticityCallback):
    """Costs 5 ms a step, at least."""

    def _start(self):
        pass

    def _works_on(self):
        return "nothing."

    def _after_step(self, optimizer):
        time.sleep(0.005)


class Chatty(Sleepy):
    def _after_step(self, optimizer):
        dist.all_reduce(torch.zeros(1))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    module = importlib.import_module("overhead")
    for name in ("mlp1-loop", "mlp1-trainer"):
        small = module.Case(lambda: module.mlp(4, 1), (1, 784), {"each": 1.5}, steps=5, trainer="trainer" in name)
        monkeypatch.setitem(module.CASES, name, small)
    monkeypatch.setitem(module.METHODS, "ActivationReset", Sleepy)
    monkeypatch.setattr(module, "set_up", lambda options: None)  # threads and logging belong to the tests
    return module


def call(benchmark, output, *options):
    benchmark.main(["--rounds", "4", "--device", "cpu", "--output", str(output), *options])
    (rows,) = json.loads(output.with_suffix(".json").read_text()).values()
    return {(row["case"], row["method"]): row for row in rows}


@pytest.mark.parametrize("name", ["mlp1-loop", "mlp1-trainer"])
def test_a_row_tells_what_a_method_adds(benchmark, tmp_path, name):
    row = call(benchmark, tmp_path / "found", "--case", name, "--method", "ActivationReset")[name, "ActivationReset"]
    assert row["added, µs"] > 4000  # the plain steps vary
    assert row["ratio"] > 1.5
    assert (row["target"], row["met"], row["rounds"]) == (1.5, "no", 4)
    line = next(x for x in (tmp_path / "found.md").read_text().splitlines() if x.startswith(f"| {name} |"))
    assert f"| {row['ratio']} |" in line
    assert row["command"].endswith(f"--case {name} --method ActivationReset")
    assert row["command"] in (tmp_path / "found.md").read_text()


def test_a_new_run_replaces_its_own_rows_only(benchmark, tmp_path):
    output = tmp_path / "found"
    first = call(benchmark, output, "--case", "mlp1-*", "--method", "ActivationReset", "PlasticityMonitor")
    assert list(first) == [("mlp1-loop", "ActivationReset")] + [
        ("mlp1-trainer", method) for method in ("ActivationReset", "PlasticityMonitor")
    ]
    found = json.loads(output.with_suffix(".json").read_text())
    output.with_suffix(".json").write_text(json.dumps(found | {"another device": next(iter(found.values()))}))
    benchmark.main(["--rounds", "3", "--device", "cpu", "--output", str(output), "--case", "mlp1-loop"])
    here, there = json.loads(output.with_suffix(".json").read_text()).values()
    assert [(row["method"], row["rounds"]) for row in there] == [(key[1], 4) for key in first]
    assert [(row["method"], row["rounds"]) for row in here] == [
        ("ActivationReset", 3),
        ("ContinualBackprop", 3),
        ("SoftWeightRescaling", 3),
        ("ActivationReset", 4),
        ("PlasticityMonitor", 4),
    ]
    assert "## another device" in output.with_suffix(".md").read_text()


def test_what_the_optimizer_remembers_is_compared_with_adam(benchmark, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.CASES, "mlp1-adam", benchmark.Case(benchmark.mlp, (1, 784), steps=5, adam=True))
    rows = call(benchmark, tmp_path / "found", "--case", "mlp1-adam")
    assert list(rows) == [("mlp1-adam", name) for name in ("ContinualBackprop", benchmark.KEEP, benchmark.RESET)]
    states = [benchmark.METHODS[name]().optimizer_state for _, name in rows]
    assert states == ["survivors", "keep", "reset"]
    batches = benchmark.random_batches((1, 784), 1, Namespace(device="cpu"))
    assert isinstance(benchmark.LoopTwin(benchmark.mlp(), batches, adam=True)._optimizer, torch.optim.Adam)
    assert isinstance(benchmark.LoopTwin(benchmark.mlp(), batches)._optimizer, torch.optim.SGD)


def test_a_loop_and_a_trainer_do_the_same_steps(benchmark):
    batches = benchmark.random_batches((2, 784), 3, Namespace(device="cpu"))
    torch.manual_seed(0)
    models = [benchmark.mlp(4, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for make, model in zip((benchmark.LoopTwin, benchmark.TrainerTwin), models, strict=True):
        twin = make(model, batches, ContinualBackprop(0.5, 2, seed=0))
        assert twin.train(5) > 0
        assert twin.train(4) > 0
        twin.stop()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_what_goes_wrong_in_a_trainer_is_raised(benchmark):
    twin = benchmark.TrainerTwin(nn.Linear(3, 2), benchmark.random_batches((2, 784), 3, Namespace(device="cpu")))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        twin.train(2)


def test_collectives_of_a_method_are_counted_beside_those_of_ddp(benchmark, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        batches = benchmark.random_batches((2, 784), 3, Namespace(device="cpu"))
        twins = [
            benchmark.LoopTwin(DistributedDataParallel(benchmark.mlp(4, 1)), batches, method)
            for method in (None, Chatty(), ContinualBackprop())
        ]
        for twin in twins:
            twin.train(2)
        assert [benchmark.count_collectives(twin) for twin in twins] == [1.0, 2.0, 1.0]
    finally:
        dist.destroy_process_group()


def test_bad_options(benchmark, capsys):
    for options, message in (
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["--case", "nothing"], "none of nothing can be run on cpu"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(["--device", "cpu", *options])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_of_their_own(benchmark, tmp_path):
    rows = call(
        benchmark, tmp_path / "found", "--quick", "--case", "ranks-mlp1", "reinit*", "--method", "ContinualBackprop"
    )
    assert rows["ranks-mlp1", "ContinualBackprop"]["of the method"] == 0.0
    assert rows["ranks-mlp1", "ContinualBackprop"]["collectives per step of DDP"] == 1.0
    assert rows["reinit-vit_b_16", "10M"]["seconds"] > 0
    assert 0 < rows["reinit-vit_b_16", "10M"]["memory, MiB"] < 330  # less than the network
