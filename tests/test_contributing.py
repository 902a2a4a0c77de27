"""What CONTRIBUTING.md says is true: its floors, its files, its method and its measure."""

import doctest
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from contract import test_precision, test_resume, test_statistics
from contract.cases import Case
from contract.training import fit
from lightning.pytorch.loggers import CSVLogger
from metrics.cases import Case as MetricCase
from metrics.cases import mean_of, networks
from test_checks import LAYERS, WRONG
from test_rooms import FLOORS

from lightning_plasticity import PlasticityMonitor
from lightning_plasticity import functional as F
from lightning_plasticity.functional import weights
from lightning_plasticity.metrics import weights as metrics_of_weights

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FORMULA, METHOD, CASE, SETTINGS, FUNCTION, METRIC, METRIC_CASE, METRIC_SETTINGS = re.findall(
    r"```python\n(.*?)```", TEXT, flags=re.DOTALL
)


@pytest.fixture
def method(monkeypatch):
    """The class of the example, whose files are as good as there."""
    for name, source in (("functional", FORMULA), ("callbacks", METHOD)):
        module = ModuleType(f"lightning_plasticity.{name}.weight_noise")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(source, vars(module))
    return module.WeightNoise


def case_of(method) -> Case:
    return eval(CASE, {"Case": Case, "partial": partial, "WeightNoise": method})


def failures(function, names) -> int:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(recurse=True).find(function, globs=names):
        runner.run(test)
    assert runner.tries > 0
    return runner.failures


def test_the_floors_are_those_that_are_held():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", TEXT, flags=re.MULTILINE)
    floors = [
        [name for row, rooms in rows if int(row) == floor for name in re.findall(r"`(\w+)(?:/|\.py)`", rooms)]
        for floor in range(len(FLOORS), 0, -1)
    ]
    assert [sorted(rooms) for rooms in floors] == [sorted(rooms) for rooms in FLOORS]


def test_the_files_are_there():
    named = {name for name in re.findall(r"`([\w/.]+\.(?:py|md))`", TEXT) if "NAME" not in name}
    places = [ROOT, ROOT / "lightning_plasticity", ROOT / "tests", ROOT / "examples/benchmarks"]
    example = "lightning_plasticity/functional/weight_noise.py", "lightning_plasticity/callbacks/weight_noise.py"
    assert {name for name in named if not any((place / name).exists() for place in places)} == set(example)


def test_the_example_s_own_examples(method):
    assert failures(method, {"WeightNoise": method, "torch": torch}) == 0
    module = sys.modules["lightning_plasticity.functional.weight_noise"]
    assert failures(module.noise_like, dict(vars(module))) == 0


def test_the_method_passes_the_contract(method, tmp_path):
    case = case_of(method)
    for step in test_resume.STEPS:
        (folder := tmp_path / str(step)).mkdir()
        test_resume.test_resume(case, step, folder)
    test_resume.test_saving_changes_nothing(case, tmp_path / "checkpoints")
    test_precision.test_low_precision(case, "bf16-true")
    test_statistics.test_rate_zero_changes_nothing(case)


def test_its_settings_are_checked_as_it_says(method):
    settings = eval(SETTINGS, {"LAYERS": LAYERS})["WeightNoise"]
    assert set(settings) == {"std", *LAYERS}
    for value in WRONG[settings["std"]]:
        with pytest.raises(ValueError, match="std must be"):
            method(std=value)


def test_the_measure_is_one_and_the_monitor_takes_it(monkeypatch, tmp_path):
    exec(FUNCTION, names := dict(vars(weights)))
    monkeypatch.setattr(weights, "zero_weight_fraction", names["zero_weight_fraction"], raising=False)
    monkeypatch.setattr(F, "zero_weight_fraction", names["zero_weight_fraction"], raising=False)
    exec(METRIC, names := dict(vars(metrics_of_weights)))
    metric = names["ZeroWeightFraction"]
    monkeypatch.setattr("lightning_plasticity.metrics.ZeroWeightFraction", metric, raising=False)
    assert failures(F.zero_weight_fraction, {}) == failures(metric, {}) == 0
    assert F.zero_weight_fraction({"a": torch.tensor([0.0, torch.nan])}).isnan()

    known = {"Case": MetricCase, "M": SimpleNamespace(ZeroWeightFraction=metric), "F": F}
    case = eval(METRIC_CASE, {**known, "networks": networks, "mean_of": mean_of})["ZeroWeightFraction"]
    updates = case.updates(0)
    with torch.no_grad():
        updates[0][0][0].weight[:3] = 0.0
    measured = case.make()
    for arguments in updates:
        measured.update(*arguments)
    assert measured.compute() == case.expected(updates) == 12 / 42 / len(updates)
    assert eval(METRIC_SETTINGS) == {"ZeroWeightFraction": {"kwargs": ""}}

    logger = CSVLogger(tmp_path)
    fit(PlasticityMonitor([metric()], every_n_train_steps=1), logger=logger, log_every_n_steps=1)
    assert "plasticity/ZeroWeightFraction" in (Path(logger.log_dir) / "metrics.csv").read_text()
