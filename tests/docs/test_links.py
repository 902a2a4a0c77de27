"""Links between Markdown files lead to files and headings that exist; the checker of the site sees what does not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def places(path: Path) -> set[str]:
    """The anchors of a file's headings, as GitHub and MyST make them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, place = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} is not there"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not place or place in places(target), f"{link}: no heading makes the anchor #{place}"


def check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docs/links.py"), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_checker_of_the_site_sees_what_leads_nowhere(tmp_path):
    (tmp_path / "style.css").touch()
    page = '<h1 id="top"></h1><link href="style.css?v=1"><a href="#top"></a><a href="https://example.org/a#b"></a>'
    (tmp_path / "a.html").write_text(page + '<a href="b.html#there"></a>')
    (tmp_path / "b.html").write_text(page + '<p id="there"><a href="a.html"></a>')
    whole = check(tmp_path)
    assert (whole.returncode, whole.stdout) == (0, "2 pages, 0 broken links\n")
    assert check(tmp_path, "--external").stdout == "https://example.org/a\n"
    (tmp_path / "b.html").write_text(page + '<img src="no.png"><a href="a.html#nowhere">')
    broken = check(tmp_path)
    assert broken.returncode == 1
    assert broken.stdout.splitlines() == [
        "a.html: b.html#there names a place that is not on that page",
        "b.html: no.png is no file of the site",
        "b.html: a.html#nowhere names a place that is not on that page",
        "2 pages, 3 broken links",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tests_that_a_page_names_exist(path):
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", path.read_text()):
        found = [one for one in (ROOT / "tests").rglob("*.py") if one.as_posix().endswith(f"/{file}")]
        assert any(f"def {name}(" in one.read_text() for one in found), f"no {file} under tests has {name}"
