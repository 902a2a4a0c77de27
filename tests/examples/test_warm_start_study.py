"""The warm-start study, at a size at which it learns little."""

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def study(monkeypatch):
    path = Path(__file__).parents[2] / "examples" / "benchmarks" / "warm_start.py"
    spec = importlib.util.spec_from_file_location("warm_start_study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"IMAGES": 40, "POOL": 60, "VALIDATION": 20, "HALF_EPOCHS": 2, "ALL_EPOCHS": 2, "BATCH": 10}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    # One arm with a choice of coefficients is enough; of the others each tries its first ones.
    arms = {name: arm if name == "L2" else replace(arm, grid=arm.grid[:1]) for name, arm in module.ARMS.items()}
    monkeypatch.setattr(module, "ARMS", arms)
    return module


@pytest.fixture
def call(study, tmp_path):
    draws = np.random.default_rng(0)
    labels = np.arange(80) % 10
    for name, shape in (("mnist", (28, 28)), ("cifar10_small", (32, 32, 3))):
        images = draws.integers(0, 256, (80, *shape), np.uint8)
        np.savez(tmp_path / f"{name}.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    results = tmp_path / "found"

    def call(*options):
        study.main(["--data-dir", str(tmp_path), "--results", str(results), *options])
        rows = list(csv.DictReader(results.with_suffix(".csv").read_text().splitlines()))
        return rows, results.with_suffix(".md").read_text()

    call.results = results
    return call


def test_every_arm_trains_every_network_it_is_for(study, call):
    rows, report = call("--seeds", "0")
    assert {(row["network"], row["arm"]) for row in rows} == {
        (network, arm)
        for network in study.NETWORKS
        for arm in study.ARMS
        if network != "MNIST MLP" or "augmented" not in arm
    }
    assert report.count("| SoftWeightRescaling |") == 3
    by_arm = {row["arm"]: row for row in rows if row["network"] == "CIFAR-10 CNN"}
    assert by_arm["from scratch"]["half"] == ""
    for arm in ("plain", "L2", "L2Init", "SoftWeightRescaling"):  # these do nothing when the images come
        assert by_arm[arm]["changed"] == by_arm[arm]["half"]


def test_a_second_call_runs_what_is_missing(call, tmp_path):
    options = "--network", "CIFAR-10 CNN", "--arm", "from scratch", "SoftWeightRescaling"
    first, _ = call(*options, "--seeds", "0")
    assert len(first) == 2
    second, report = call(*options, "--seeds", "0", "1")
    assert second[:2] == first
    assert [(row["arm"], row["seed"]) for row in second[2:]] == [("from scratch", "1"), ("SoftWeightRescaling", "1")]
    accuracy = {(row["arm"], row["seed"]): 100 * float(row["accuracy"]) for row in second}
    gains = [accuracy["SoftWeightRescaling", seed] - accuracy["from scratch", seed] for seed in "01"]
    line = next(line for line in report.splitlines() if line.startswith("| SoftWeightRescaling | 0.001 |"))
    assert line.split(" | ")[4] == f"{np.mean(gains):+.1f} ± {np.std(gains, ddof=1):.1f}"
    assert (tmp_path / "found.png").stat().st_size > 0


def test_the_best_coefficient_is_chosen_and_its_trial_stays_out_of_the_results(study, call, monkeypatch):
    judged = []

    def run(name, arm, coefficients, seed, data, judges):
        judged.append((coefficients, seed, judges is data.validation))
        return {"accuracy": {0.001: 0.9}.get(coefficients[0], 0.5) if seed == study.TUNING_SEED else 0.25}

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "MEASURES", ("accuracy",))
    monkeypatch.setattr(study, "report", study.tuning_table)
    rows, report = call("--network", "MNIST MLP", "--arm", "L2", "--seeds", "0", "1")
    trials = [((0.0001,), 100, True), ((0.001,), 100, True), ((0.01,), 100, True)]
    assert judged == [*trials, ((0.001,), 0, False), ((0.001,), 1, False)]
    assert "| MNIST MLP | L2 | 0.0001: 50.0; 0.001: 90.0; 0.01: 50.0 | 0.001 |" in report
    assert [row["seed"] for row in rows] == ["tuning"] * 3 + ["0", "1"]
    assert study.Results(call.results.with_suffix(".csv")).of("MNIST MLP", "L2", "accuracy") == {0: 0.25, 1: 0.25}


@pytest.mark.parametrize(("arm", "parts"), [("ShrinkAndPerturb", ["hidden", "output"]), ("head reset", ["output"])])
def test_some_methods_change_the_network_when_the_images_come(study, arm, parts):
    images = torch.randn(40, 1, 28, 28), torch.arange(40) % 10
    network = study.make_network("MNIST MLP")
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    arm = study.ARMS[arm]
    coefficients = arm.grid[0]
    optimizer = study.make_optimizer(network, arm, coefficients)
    study.train(network, images, 0, arm, arm.with_new_images(coefficients, 0, images), optimizer)
    changed = {name.split(".")[1] for name, weight in network.named_parameters() if not before[name].equal(weight)}
    assert changed == set(parts)


def test_soft_weight_rescaling_remembers_the_first_norms_when_the_images_come(study):
    images = torch.randn(40, 1, 28, 28), torch.arange(40) % 10
    network = study.make_network("MNIST MLP")
    before = network.classifier.hidden.weight.norm().item()
    arm = study.ARMS["SoftWeightRescaling"]
    method = arm.from_the_start((1.0,), 0)
    study.train(network, images, 1, arm, method, study.make_optimizer(network, arm, (1.0,)))
    network.classifier.hidden.weight.data.mul_(2.0)
    study.train(network, images, 1, arm, method, study.make_optimizer(network, arm, (1.0,)))
    assert network.classifier.hidden.weight.norm().item() == pytest.approx(before, rel=1e-5)


def test_augmentation_moves_and_mirrors_each_image_by_itself(study):
    torch.manual_seed(0)
    image = torch.arange(32.0 * 32).view(1, 1, 32, 32)
    moved = study.augment(image.expand(200, 1, 32, 32))
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4), value=-1)[0, 0]
    crops = {}
    for down in range(9):
        for right in range(9):
            crop = padded[down : down + 32, right : right + 32]
            crops[crop.numpy().tobytes()] = down, right, False
            crops[crop.flip(1).numpy().tobytes()] = down, right, True
    found = [crops[x[0].contiguous().numpy().tobytes()] for x in moved]
    assert len(set(found)) > 80
    assert 70 < sum(is_mirrored for *_, is_mirrored in found) < 130
