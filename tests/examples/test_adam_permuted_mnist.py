"""The study of what Adam remembers on permuted MNIST, with few images."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples/benchmarks/adam_permuted_mnist.py"


@pytest.fixture
def study(monkeypatch):
    spec = importlib.util.spec_from_file_location("adam_permuted_mnist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BATCH", 4)
    return module


@pytest.fixture
def run(study, tmp_path):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (40, 28, 28), dtype=np.uint8), generator.integers(0, 10, 40)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels)

    def call(*arguments):
        options = ["--data-dir", str(tmp_path), "--results", str(tmp_path / "found"), "--tasks", "2"]
        study.main([*options, "--lr", "0.001", "--seed", *arguments])
        return (tmp_path / "found.csv").read_text().splitlines(), (tmp_path / "found.md").read_text()

    return call


def test_every_arm_runs_once_and_the_table_holds_what_the_rows_say(study, run):
    rows, _ = run("0")
    assert len(rows) == 1 + 2 * len(study.ARMS)
    again, table = run("0", "1")
    assert again[: len(rows)] == rows
    assert len(again) == 1 + 4 * len(study.ARMS)
    plain = [row.split(",") for row in again if row.startswith("0.001,plain")]
    accuracy = np.array([float(row[4]) for row in plain]).reshape(2, 2) * 100
    line = next(line for line in table.splitlines() if line.startswith("| plain"))
    assert line.split(" | ")[4] == f"{accuracy.mean():.2f} ± {accuracy.mean(1).std(ddof=1):.2f}"


def test_arms_differ_in_what_the_optimizer_remembers_alone(study):
    made = {arm: study.METHODS[parts[0]](0, parts[1]) for arm, parts in study.ARMS.items() if parts}
    assert {arm: method.optimizer_state for arm, method in made.items()} == {arm: arm.split(", ")[-1] for arm in made}
    for method in study.METHODS:
        shown = {repr(m).replace(arm.split(", ")[-1], "") for arm, m in made.items() if arm.startswith(method)}
        assert len(shown) == 1
