"""The fine-tuning example from end to end, on images made up for it and, where there are some, on real ones."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

# Lightning's advice, not about what is tested here; and what its own code does that newer packages deprecate
pytestmark = pytest.mark.filterwarnings("ignore:::lightning.pytorch")


@pytest.fixture
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "finetune_timm.py"
    spec = importlib.util.spec_from_file_location("finetune_timm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of each of three colours, 10 to train and 2 to test."""
    from PIL import Image

    for number, colour in enumerate(("red", "green", "blue")):
        for i in range(12):
            pixels = torch.randint(0, 60, (24, 20, 3), dtype=torch.uint8)
            pixels[..., number] += 180
            path = tmp_path / "images" / ("train" if i < 10 else "test") / colour / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "images"


def rows(results: Path) -> list[dict[str, str]]:
    with results.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(example: ModuleType, folder: Path, model: str, *more: str) -> list[dict[str, str]]:
    weights, results = folder.parent / f"{model}.pt", folder.parent / "results"
    if not weights.exists():
        torch.save(timm.create_model(model).state_dict(), weights)
    settings = ["--model", model, "--weights", str(weights), "--data-dir", str(folder), "--image-size", "32"]
    settings += ["--epochs", "3", "--patience", "1", "--lr", "3e-3", "--accelerator", "cpu"]
    example.main([*settings, "--results", str(results), "--keep-in-memory", *more])
    return rows(results)


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_cases_and_seeds(example: ModuleType, folder: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    cases = ["--case", "base", "10M", "10M/keep-biases"]
    first = run(example, folder, model, *cases, "--seeds", "1")
    assert [(row["case"], row["seed"]) for row in first] == [("base", "0"), ("10M", "0"), ("10M/keep-biases", "0")]
    assert all(0 <= float(row["test_accuracy"]) <= 100 for row in first)
    assert all(1 <= int(row["best_epoch"]) <= int(row["epochs_run"]) <= 3 for row in first)

    both = run(example, folder, model, *cases, "--seeds", "2")
    assert both[:3] == first
    assert [row["seed"] for row in both[3:]] == ["1"] * 3
    assert run(example, folder, model, *cases, "--seeds", "2") == both

    results = folder.parent / "results"
    assert "6 runs." in results.with_suffix(".md").read_text()
    assert "| 10M | 2 |" in capsys.readouterr().out
    assert results.with_suffix(".png").stat().st_size > 10_000


def test_a_run_can_be_repeated(example: ModuleType, folder: Path) -> None:
    [once] = run(example, folder, "test_vit", "--case", "25MN", "--seeds", "1")
    (folder.parent / "results.csv").unlink()
    [again] = run(example, folder, "test_vit", "--case", "25MN", "--seeds", "1")
    assert {**once, "seconds": ""} == {**again, "seconds": ""}


def made_up(case: str, accuracies: list[float], **settings: Any) -> list[dict[str, str]]:
    ours = {"data": "d", "model": "m"} | settings
    rest = dict.fromkeys(("image_size", "train_images", "epochs", "patience", "batch_size", "lr", "seed"), "1")
    measured = {"best_epoch": "4", "epochs_run": "5", "seconds": "6"}
    return [{**rest, **measured, **ours, "case": case, "test_accuracy": str(accuracy)} for accuracy in accuracies]


def test_comparison(example: ModuleType) -> None:
    base, worse = made_up("base", [50, 51, 52, 53]), made_up("10N", [40, 41, 42, 43])
    table = example.table(base + worse)
    assert "| base | 4 | 51.50 ± 1.29 |  |  |  | 4.00 ± 0.00 |" in table
    assert "| 10N | 4 | 41.50 ± 1.29 | -10.00 | 1.000 | 0.014 | 4.00 ± 0.00 |" in table  # 1 of 70 orders
    other = made_up("base", [10.0], model="n") + made_up("5N", [12.0], model="n")
    assert "| N | 2 | -4.00 | 1 | 0 | 1 | 1 |" in example.by_code(base + worse + other)


def test_a_fifth_of_each_class_is_for_validation(example: ModuleType) -> None:
    labels = [0] * 50 + [1] * 10
    train, validation = example.split(labels, None)
    assert sorted(train + validation) == list(range(60))
    assert sum(labels[i] for i in validation) == 2
    assert len(validation) == 12
    train, validation = example.split(labels, 30)
    assert (len(train), len(validation)) == (24, 6)
    assert not set(train) & set(validation)


def test_data_that_is_not_there(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="or the name of a torchvision data set, not 'nowhere'"):
        example.find_data("nowhere", tmp_path)


def test_a_torchvision_data_set(example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Old:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.targets = torch.tensor([0, 1, int(train)])

    class New:
        def __init__(self, root: str, split: str, download: bool) -> None:
            self.split = split

        def __iter__(self) -> Any:
            return iter([("image", 3), ("image", 4 + (self.split == "train"))])

    monkeypatch.setattr(example.torchvision.datasets, "Old", Old, raising=False)
    monkeypatch.setattr(example.torchvision.datasets, "New", New, raising=False)
    assert example.find_data("Old", tmp_path)[2] == [0, 1, 1]
    train, test, labels = example.find_data("New", tmp_path)
    assert (train.split, test.split, labels) == ("train", "test", [3, 5])


@pytest.mark.data
@pytest.mark.slow
def test_real_images_and_weights(example: ModuleType, plasticity_data: Path, tmp_path: Path) -> None:
    """One short run with each pretrained model is better than chance: three standard deviations are 4.5 points."""
    for model, options in (("mobilenetv2_100", ["--model-option", "pad_type=same"]), ("vit_tiny_patch16_224", [])):
        settings = ["--model", model, *options, "--weights", str(plasticity_data / f"{model}_imagenet.safetensors")]
        settings += ["--data-dir", str(plasticity_data / "dtd10.zip"), "--train-images", "300", "--image-size", "64"]
        half = ["0.5", "0.5", "0.5"]
        settings += [
            "--mean",
            *half,
            "--std",
            *half,
            "--epochs",
            "5",
            "--lr",
            "1e-3",
            "--keep-in-memory",
            "--accelerator",
            "cpu",
        ]
        example.main([*settings, "--case", "10M/keep-biases", "--seeds", "1", "--results", str(tmp_path / model)])
        [row] = rows(tmp_path / model)
        assert float(row["test_accuracy"]) > 10 + 4.5
