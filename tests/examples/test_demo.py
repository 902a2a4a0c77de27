"""The demo from end to end, on two tasks: what it prints is what its networks did, and the picture is one."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def demo(monkeypatch):
    path = Path(__file__).parents[2] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("PLASTICITY_DATA", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # it would outlast the test
    return module


def rows(printed):
    """The numbers of each row of the table, by the row's name."""
    found = (re.fullmatch(r"(\D+?) +([\d.]+)% +([\d.]+)% +([\d.]+)% +([\d.]+) +([\d.]+)", line) for line in printed)
    return {match[1]: [float(number) for number in match.groups()[1:]] for match in found if match}


def test_it_prints_a_row_for_each_network_and_draws_a_picture(demo, tmp_path, monkeypatch, capsys):
    learners = {}

    def draw(found, picture, draw=demo.draw):
        learners.update(found)
        draw(found, picture)

    monkeypatch.setattr(demo, "draw", draw)
    picture = tmp_path / "new folder" / "picture.png"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--tasks", "2", "--picture", str(picture)])
    demo.main()
    output = capsys.readouterr()
    assert "2/2" in output.err  # the progress bar
    table = rows(output.out.splitlines())
    assert list(table) == list(demo.LINES)
    for name, (first, last, dead, rank, weight) in table.items():
        learner = learners[name]
        assert len(learner.accuracies) == 2
        assert first == last == pytest.approx(100 * np.mean(learner.accuracies), abs=0.05)
        assert first > 50  # it learns: chance is 10 %
        weights = torch.cat([p.detach().flatten() for p in learner.model.parameters() if p.ndim > 1])
        assert weight == pytest.approx(weights.abs().mean().item(), abs=6e-4)
        assert 0 <= dead < 10
        assert 20 < rank <= 100
    assert len({tuple(learner.accuracies) for learner in learners.values()}) == len(learners)  # each method acted
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_takes_mnist_where_a_folder_has_it(demo, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2000, 28, 28), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=np.uint8(np.arange(2000) % 10))
    found, labels = demo.load_images(tmp_path)
    torch.testing.assert_close(found, torch.from_numpy(images[:1797]).flatten(1) / 255)
    assert labels.tolist() == [i % 10 for i in range(1797)]
