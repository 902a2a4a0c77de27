"""Files for those who publish and cite the package agree with it."""

import re
from importlib.metadata import metadata, requires, version
from pathlib import Path

import distribution
import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type", "license", "version"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert all(author["name"] for author in citation["authors"])
    assert str(citation["version"]) == version("lightning-plasticity")
    assert citation["license"] == metadata("lightning-plasticity")["License-Expression"]
    assert f"version = {{{citation['version']}}}" in (ROOT / "docs" / "cite.md").read_text()


def test_the_lower_bounds_that_are_tested_are_those_that_are_promised():
    needed = [line.split("; ") for line in requires("lightning-plasticity")]
    promised = [bound for bound, *extra in needed if not extra or re.search("vision|plot", extra[0])]
    tested = (ROOT / ".github" / "lower_bounds.txt").read_text().split()

    def padded(bound):
        name, number = re.split("[>=]=", bound)
        return name, tuple(map(int, f"{number}.0.0".split(".")[:3]))

    assert sorted(map(padded, tested)) == sorted(map(padded, promised))


def test_workflows_and_templates_are_yaml_and_run_commands_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".readthedocs.yaml"]
    assert len(files) == 7
    for path in files:
        assert yaml.safe_load(path.read_text())
        for command in re.findall(r"run: make (\w+)", path.read_text()):
            assert f"\n{command}:" in makefile


def test_differences_in_what_was_built_are_told():
    distribution._equal("files", {"a"}, {"a"})
    with pytest.raises(SystemExit, match=r"files must be others, differing: \{'b'\}"):
        distribution._equal("files", {"a"}, {"a", "b"})
    with pytest.raises(SystemExit, match="Name must be x, differing: y"):
        distribution._equal("Name", "y", "x")
