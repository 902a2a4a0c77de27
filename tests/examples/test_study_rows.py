"""The tables beside the studies are what the rows beside them give."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("permuted_mnist", lambda study, rows: study.report(study.Curves(rows, study.KEY), 100)),
        ("slowly_changing_regression", lambda study, rows: study.report(study.Curves(rows, study.KEY), 1_000_000)),
        ("adam_permuted_mnist", lambda study, rows: study.report(study.Curves(rows, study.KEY), 30)),
        ("dqn_catch", lambda study, rows: study.report(study.Curves(rows, study.KEY), 6)),
        ("warm_start", lambda study, rows: study.report(study.Results(rows))),
    ],
)
def test_a_table_is_what_its_rows_give(name, report):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    assert report(study, FOLDER / f"{name}.csv") == (FOLDER / f"{name}.md").read_text()
