"""The Python on each page of `docs` runs as it stands, from top to bottom, and prints what the page says it prints."""

import logging
import re
from pathlib import Path

import pytest
import timm
import torch

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)
PAGES = {path.relative_to(DOCS).as_posix(): BLOCK.findall(path.read_text()) for path in sorted(DOCS.rglob("*.md"))}


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs
@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if "python" in dict(blocks)])
def test_the_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create_model(name, **options | {"pretrained": False})
    )
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "propagate", True)
    caplog.set_level(logging.INFO)
    random_state = torch.random.get_rng_state()
    names: dict[str, object] = {}
    before = ""
    for number, (language, block) in enumerate(PAGES[page]):
        if language == "python":
            caplog.clear()
            exec(compile(block, f"{page}, block {number}", "exec"), names)
            before = masked(capsys.readouterr().out + caplog.text)
        elif before:
            for line in block.splitlines():
                assert masked(line) in before, f"docs/{page} says that {line!r} is printed; what was:\n{before}"
    torch.random.set_rng_state(random_state)


def masked(text: str) -> str:
    """Text in which all numbers look alike: they differ between machines and versions."""
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?%?", "#", text))


def test_every_page_to_work_with_has_code():
    index = (DOCS / "index.md").read_text()
    to_do = re.search(r":caption: To do\n\n(.*?)\n```", index, re.DOTALL).group(1).split()
    without = {page for page in to_do if "```python" not in (DOCS / f"{page}.md").read_text()}
    assert len(to_do) > 8
    assert without == set()
