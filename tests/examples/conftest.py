"""What the examples' tests share."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _imports_as_a_script(monkeypatch):
    """The folder that Python searches first when a study is run as a script."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
