"""The README's Python blocks run; its numbers are those of `docs/results.md`, and these are those of the studies."""

import csv
import json
import re
from pathlib import Path

import readme_uses
import timm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()


def test_the_python_blocks_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme_uses.run(ROOT / "README.md", tmp_path, lambda name, **options: timm.create_model(name, **options | OFFLINE))


OFFLINE = {"pretrained": False}
BENCHMARKS = ROOT / "examples/benchmarks"


def table(first_cells):
    """The rows of the page's table that begins so, as lists of cells by the first cell."""
    lines = RESULTS[RESULTS.index(first_cells) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def read(name):
    return list(csv.DictReader((BENCHMARKS / name).read_text().splitlines()))


def mean(values):
    return sum(values) / len(values)


# What `ActivationReset()` does in each network.
AUTOMATIC = {
    "relu": "ActivationReset relu",
    "tanh": "ActivationReset tanh, rates 1e-6, 1e-5",
    "mixed": "ActivationReset auto",
}


def test_the_numbers_of_the_readme_are_those_of_the_page():
    short = README[README.index("## Results in short") : README.index("## The pages")]
    numbers = re.findall(r"\d+\.\d+", short)
    assert len(numbers) > 5
    assert {number for number in numbers if number not in RESULTS} == set()


def test_what_the_page_says_of_permuted_mnist_is_what_was_measured():
    rows = {(r["network"], r["arm"], int(r["seed"]), int(r["task"])): r for r in read("permuted_mnist.csv")}

    def measured(network, name, measure, scale):
        arm = AUTOMATIC[network] if name == "ActivationReset" else name
        if (network, arm, 0, 1) not in rows:
            return ""  # it did not run there
        values = [float(rows[network, arm, seed, task][measure]) for seed in (0, 1) for task in range(81, 101)]
        return f"{scale * mean(values):.1f}"

    shown = table("| | ReLU |")
    assert shown
    for name, cells in shown.items():
        accuracies = [measured(network, name, "accuracy", 100) for network in AUTOMATIC]
        rest = [measured("relu", name, "dead_units", 100), measured("relu", name, "effective_rank", 1)]
        assert cells == [*accuracies, *rest]


def test_what_the_page_says_of_the_regression_is_what_was_measured():
    rows = read("slowly_changing_regression.csv")
    changes = {
        "SGD": "rises",
        "SGD, ContinualBackprop": "falls",
        "Adam 0.01": "goes",
        "Adam 0.01, ContinualBackprop": "sinks",
    }
    for arm, change in changes.items():
        errors = {}
        for ends in ((50_000, 100_000), (950_000, 1_000_000)):
            ours = [float(r["squared_error"]) for r in rows if r["arm"] == arm and int(r["examples"]) in ends]
            assert len(ours) == 5 * len(ends)
            errors[ends[-1]] = f"{mean(ours):.2f}"
        assert f"{change} from {errors[100_000]} to {errors[1_000_000]}" in RESULTS.replace("\n", " ")


def test_what_the_page_says_of_fine_tuning_is_what_was_measured():
    models = {"MobileNetV2": "mobilenetv2_100", "ViT-tiny": "vit_tiny_patch16_224"}
    data_sets = {"textures": "dtd10", "brain MRI": "brain_tumor_mri"}
    rows, shown = read("finetune_timm.csv"), table("| | runs each |")
    assert len(shown) == 4
    for name, (runs, *cells) in shown.items():
        model, data = name.split(", ")
        ours = [r for r in rows if (r["model"], r["data"]) == (models[model], data_sets[data])]
        cases = ("base", "5M", "10M", "10MN", "10NS", "10N", "10M/keep-biases")
        measured = [[float(r["test_accuracy"]) for r in ours if r["case"] == case] for case in cases]
        assert {str(len(accuracies)) for accuracies in measured} == {runs}
        assert cells == [f"{mean(accuracies):.1f}" for accuracies in measured]


def test_what_the_page_says_of_the_cost_is_what_was_measured():
    cases = {
        "3 \u00d7 100 units, batch 1, plain loop": "mlp1-loop",
        "the same, batch 100": "mlp100-loop",
        "the same, batch 1, Trainer": "mlp1-trainer",
        "the same, batch 100, Trainer": "mlp100-trainer",
        "ResNet-18, 64 \u00d7 64, batch 32": "resnet18-64-32",
    }
    [rows] = json.loads((BENCHMARKS / "overhead.json").read_text()).values()
    by_case = {(r["case"], r["method"]): r for r in rows if r["compiled"] == "no"}
    shown = table("| | `ContinualBackprop` |")
    assert list(shown) == list(cases)
    for name, cells in shown.items():
        methods = ("ContinualBackprop", "ActivationReset", "SoftWeightRescaling")
        assert cells == [f"{by_case[cases[name], method]['ratio']:.2f}" for method in methods]
    lines = (BENCHMARKS / "find_units_cost.md").read_text().splitlines()
    cost = {cells[1]: cells[4] for cells in (re.split(r" *\| *", line) for line in lines) if len(cells) > 4}
    sentence = " ".join(RESULTS.split())
    assert f"ResNet-50 at 64 \u00d7 64 in {cost['resnet50']} s of one core" in sentence
    assert f"ViT-B/16 at 224 \u00d7 224 in {cost['vit_base_patch16_224']} s" in sentence
