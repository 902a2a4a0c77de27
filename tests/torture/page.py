"""The page of the docs that holds the figures of the last run of each part."""

import platform
import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "torture.md"
HEAD = """# Torture

Written by `make torture`: runs, and faults, that no test names one by one. The same seeds give the same runs. Each part
writes its own section; `make torture PARTS="soak mutation"` runs those that take longer than ten minutes.
"""
ORDER = ("Fuzz", "Kill", "State", "Ranks", "Soak", "Mutation")


def put(title: str, text: str, seconds: float) -> None:
    """Writes the section of a part in the place of the one before; the others stay."""
    old = PAGE.read_text() if PAGE.exists() else ""
    sections = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=^## |\Z)", old, re.MULTILINE | re.DOTALL))
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    sections[title] = f"{text}\n\nTook {seconds:,.0f} s with {versions}.\n"
    parts = [f"## {name}\n\n{sections[name].strip()}\n" for name in ORDER if name in sections]
    PAGE.write_text("\n".join([HEAD, *parts]))
