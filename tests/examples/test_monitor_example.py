"""The monitor's example from end to end, on two tasks: TensorBoard, table and pictures hold what was measured."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest


@pytest.fixture
def example(monkeypatch, tmp_path):
    path = Path(__file__).parents[2] / "examples" / "monitor.py"
    spec = importlib.util.spec_from_file_location("monitor_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.torch, "set_num_threads", lambda threads: None)  # it would outlast the test
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.filterwarnings("ignore:::lightning.pytorch")
def test_tensorboard_table_and_pictures_hold_what_was_measured(example, monkeypatch, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn = {}

    def draw(accuracies, monitor, draw=example.draw):
        drawn.update(accuracies=accuracies, history=monitor.history)
        return draw(accuracies, monitor)

    monkeypatch.setattr(example, "draw", draw)
    monkeypatch.setattr(example, "EVERY", 1)
    monkeypatch.setattr(sys, "argv", ["monitor.py", "--tasks", "2", "--pictures", str(tmp_path / "kept")])
    example.main()
    accuracies, history = drawn["accuracies"], drawn["history"]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.5  # it learns: chance is 0.1
    events = EventAccumulator("lightning_logs/version_0").Reload()
    assert [event.value for event in events.Scalars("online_accuracy")] == pytest.approx(accuracies, rel=1e-6)
    dead = [sum(values.values()) / 3 for _, values in history["DeadUnits"]]
    assert [event.value for event in events.Scalars("plasticity/DeadUnits")] == pytest.approx(dead, rel=1e-6)
    rows = re.findall(r"^(\w+) +([\d.-]+) +([\d.-]+)$", capsys.readouterr().out, flags=re.MULTILINE)
    table = {name: (float(first), float(last)) for name, first, last in rows}
    assert set(table) == set(history)
    assert table["DeadUnits"] == pytest.approx(dead, abs=6e-4)
    assert table["WeightNorm"] == pytest.approx([values[""] for _, values in history["WeightNorm"]], abs=6e-4)
    kept = list((tmp_path / "kept").iterdir())
    assert {path.stem for path in kept} == {"overview", "curves", "bars", "heat_map"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in kept)


def test_too_few_tasks_are_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monitor.py", "--tasks", "4"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--tasks must be at least 5" in capsys.readouterr().err
