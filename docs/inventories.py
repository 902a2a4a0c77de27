"""Writes docs/inventories: which names of other projects our pages link to, and where their sites describe them.

    python docs/inventories.py

Sphinx reads them instead of asking the sites, so that a build needs no network. Each name is looked up in the installed
package, which also tells under which other name annotations show it (``torch.nn.Module`` is
``torch.nn.modules.module.Module`` there). When a build misses a name, add it to PAGES and run this again.
"""

from __future__ import annotations

import importlib
import inspect
import zlib
from pathlib import Path
from typing import Any

# {} in a page stands for the name itself.
PAGES = {
    "python": {
        "library/functions.html": ["float", "int", "object"],
        "library/stdtypes.html": ["bool", "dict", "list", "str", "tuple"],
        "library/collections.abc.html": [
            f"collections.abc.{name}"
            for name in (
                "Callable",
                "Iterable",
                "Iterator",
                "Mapping",
                "Sequence",
                "Set",
                "Sized",
            )
        ],
        "library/exceptions.html": ["RuntimeError", "ValueError"],
    },
    "torch": {
        "generated/{}.html": [
            "torch.Generator",
            "torch.nn.Module",
            "torch.nn.Linear",
            "torch.nn.ReLU",
        ],
        "generated/torch.nn.parameter.Parameter.html": ["torch.nn.parameter.Parameter"],
        "tensors.html": ["torch.Tensor"],
        "optim.html": ["torch.optim.Optimizer"],
    },
    "lightning": {
        "api/{}.html": [
            "lightning.pytorch.callbacks.Callback",
            "lightning.pytorch.callbacks.ModelCheckpoint",
            "lightning.pytorch.core.LightningModule",
            "lightning.pytorch.trainer.trainer.Trainer",
        ]
    },
    "torchmetrics": {"references/metric.html": ["torchmetrics.Metric"]},
    "matplotlib": {
        "api/_as_gen/{}.html": ["matplotlib.axes.Axes", "matplotlib.figure.Figure"]
    },
}


def look_up(name: str) -> Any:
    """What an installed package, or Python, has under this name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module or "builtins"), attribute)


def lines_of(page: str, name: str) -> list[str]:
    """The name's lines in an inventory: under itself, and under where it was defined."""
    found = look_up(name)
    role = (
        "function"
        if inspect.isroutine(found)
        else "exception"
        if _is_exception(found)
        else "class"
    )
    module = found.__module__.removeprefix("builtins")
    names = {name, f"{module}.{found.__qualname__}".removeprefix(".")}
    return [
        f"{each} py:{role} 1 {page.format(name)}#{name} -" for each in sorted(names)
    ]


def _is_exception(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, BaseException)


def inventory(project: str) -> bytes:
    """A project's inventory, as Sphinx reads it."""
    lines = [
        line
        for page, names in PAGES[project].items()
        for name in names
        for line in lines_of(page, name)
    ]
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n# The remainder is compressed by zlib.\n"
    return head.encode() + zlib.compress(
        "".join(f"{line}\n" for line in sorted(lines)).encode(), 9
    )


def main() -> None:
    """Writes all of them."""
    folder = Path(__file__).parent / "inventories"
    folder.mkdir(exist_ok=True)
    for project in PAGES:
        (folder / f"{project}.inv").write_bytes(inventory(project))


if __name__ == "__main__":
    main()
