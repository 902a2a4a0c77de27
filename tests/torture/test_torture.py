"""The parts of the torture themselves: small runs, and that they try what they say."""

import ast
from pathlib import Path

import pytest

from lightning_plasticity import callbacks
from torture import fuzz, mutation, page
from torture.cases import METHODS
from torture.mutants import PACKAGE, mutants, sample


def test_every_method_is_among_the_random_cases() -> None:
    assert METHODS.keys() == set(callbacks.__all__) - {"PlasticityMonitor"}


@pytest.mark.filterwarnings("ignore")
def test_a_few_random_cases() -> None:
    assert "- cases: 30, of which failed: 0" in fuzz.run(30)


def test_small_faults() -> None:
    found = list(mutants("functional/redo.py"))
    source = (PACKAGE / "functional/redo.py").read_bytes()
    assert len(found) > 5
    for mutant in found:
        assert ast.unparse(ast.parse(mutant.of(source))) != ast.unparse(ast.parse(source)), mutant
    assert sample(20) == sample(20)
    assert sample(20) != sample(20, seed=1)


def test_a_fault_is_judged_by_tests_that_are_there() -> None:
    for mutant in sample(50):
        for stage in mutation.stages(mutant.file):
            files = stage[: stage.index("-k")] if "-k" in stage else stage
            assert all((mutation.ROOT / file).exists() for file in files), stage
    assert mutation.stages("callbacks/redo.py")[0] == [
        "lightning_plasticity/callbacks/redo.py",
        "tests/callbacks/test_redo.py",
    ]
    assert ["tests/callbacks/test_direction_aware_shrink.py"] in mutation.stages("engine/training_pass.py")


def test_a_part_writes_its_own_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "torture.md")
    page.put("Soak", "flat", 10)
    page.put("Fuzz", "- cases: 3", 1)
    page.put("Soak", "flat again", 20)
    text = page.PAGE.read_text()
    assert text.index("## Fuzz\n\n- cases: 3\n") < text.index("## Soak\n\nflat again\n\nTook 20 s")
    assert text.count("## ") == 2
