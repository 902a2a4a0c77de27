"""The API pages have every public name, once, and every method with the studies that it is in."""

import csv
import importlib
import re
import runpy
import zlib
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
API = DOCS / "api"
# Which page has the names of which room.
PAGES = {
    "lightning_plasticity": "methods.md, measures.md or units.md",
    "lightning_plasticity.callbacks": "methods.md",
    "lightning_plasticity.metrics": "measures.md",
    "lightning_plasticity.functional": "functions.md",
    "lightning_plasticity.units": "units.md",
    "lightning_plasticity.engine": "building.md",
    "lightning_plasticity.editing": "building.md",
    "lightning_plasticity.layers": "building.md",
    "lightning_plasticity.monitoring": "building.md",
}
TEXT = {path.name: path.read_text() for path in API.glob("*.md")}
DIRECTIVE = re.compile(
    r"^### (\w+)\n(.*?)^```\{eval-rst\}\n\.\. (auto\w+|py:data):: ([\w.]+)$", re.MULTILINE | re.DOTALL
)
ENTRIES = [entry for text in TEXT.values() for entry in DIRECTIVE.findall(text)]


def found(path: str) -> object:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("room", PAGES)
def test_every_public_name_has_an_entry(room):
    documented = [found(path) for *_, path in ENTRIES]
    for name in importlib.import_module(room).__all__:
        kind = "class" if isinstance(found(f"{room}.{name}"), type) else "function"
        assert any(one is found(f"{room}.{name}") for one in documented), (
            f"{room}.{name} is public, but on no page of the API. Write this into a group of docs/api/{PAGES[room]}:"
            f"\n\n### {name}\n\n```{{eval-rst}}\n.. auto{kind}:: {room}.{name}\n```"
        )


def test_every_entry_is_read():
    assert len(ENTRIES) == sum(text.count("```{eval-rst}") for text in TEXT.values()) > 100
    assert all(path.endswith(f".{heading}") for heading, _, _, path in ENTRIES)
    assert len({path for *_, path in ENTRIES}) == len(ENTRIES)


def test_every_method_names_its_studies():
    methods = importlib.import_module("lightning_plasticity.callbacks").__all__
    above = {heading: text for heading, text, _, _ in ENTRIES}
    without = {name for name in methods if name != "PlasticityMonitor" and "Studies: " not in above.get(name, "")}
    assert without == set(), "docs/api/methods.md: a line 'Studies: ...' below the heading, or 'Studies: none yet.'"


# The heading of each study in the results, by the file of its rows.
STUDIES = {
    "permuted_mnist": "online-permuted-mnist",
    "slowly_changing_regression": "slowly-changing-regression",
    "warm_start": "warm-start",
}


@pytest.mark.parametrize("study", STUDIES)
def test_the_studies_that_a_method_is_in_are_linked_to_it(study):
    with (DOCS.parent / f"examples/benchmarks/{study}.csv").open() as file:
        arms = " ".join({row["arm"] for row in csv.DictReader(file)})
    tried = {*re.findall(r"\w+", arms)} & {*importlib.import_module("lightning_plasticity.callbacks").__all__}
    linked = {heading for heading, text, _, _ in ENTRIES if f"#{STUDIES[study]})" in text}
    assert tried
    assert tried - linked == set(), f"docs/api/methods.md: link the study #{STUDIES[study]} below the heading of each"


def test_every_method_has_a_reference():
    methods = importlib.import_module("lightning_plasticity.callbacks").__all__
    docstrings = {
        name: found(f"lightning_plasticity.{name}").__doc__ for name in methods if name != "PlasticityMonitor"
    }
    assert {name for name, text in docstrings.items() if not re.search("References?:\n", text)} == set()


def test_names_of_other_projects_are_those_that_are_installed():
    script = runpy.run_path(str(DOCS / "inventories.py"))
    assert {path.stem for path in DOCS.glob("inventories/*.inv")} == script["PAGES"].keys()
    for project in script["PAGES"]:
        kept, made = (
            zlib.decompress(text.split(b"zlib.\n")[1])
            for text in ((DOCS / f"inventories/{project}.inv").read_bytes(), script["inventory"](project))
        )
        assert kept == made, "run python docs/inventories.py"
        assert kept


@pytest.mark.parametrize(
    ("page", "room", "left_out"),
    [("README.md", "callbacks", {"PlasticityMonitor"}), ("docs/measures.md", "metrics", set())],
)
def test_the_tables_have_all_methods_and_all_measures(page, room, left_out):
    rows = re.findall(r"^\| (`[^|]*`) \|", (DOCS.parent / page).read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    missing = {*importlib.import_module(f"lightning_plasticity.{room}").__all__} - left_out - named
    assert missing == set(), f"write a row for each into the table of {page}"
