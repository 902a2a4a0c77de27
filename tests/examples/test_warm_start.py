"""The warm-start example from end to end, at a size at which it learns nothing."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.filterwarnings("ignore:::lightning.pytorch")
def test_it_prints_a_row_for_each_method(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "examples" / "warm_start.py"
    spec = importlib.util.spec_from_file_location("warm_start", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    images, labels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8), np.arange(60) % 10
    np.savez(tmp_path / "cifar10_small.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    settings = ["--images", "60", "--epochs", "1", "--more-epochs", "1", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["warm_start.py", "--data-dir", str(tmp_path), *settings])
    example.main()
    rows = capsys.readouterr().out.splitlines()
    assert [row[:22].strip() for row in rows] == [
        "from scratch", "plain warm start", "Shrink & Perturb", "layer reset", "Soft Weight Rescaling", "L2 Init"
    ]  # fmt: skip


def test_it_says_where_the_data_is_to_come_from(monkeypatch, capsys):
    path = Path(__file__).parents[2] / "examples" / "warm_start.py"
    spec = importlib.util.spec_from_file_location("warm_start", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.delenv("PLASTICITY_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["warm_start.py"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--data-dir is needed" in capsys.readouterr().err
