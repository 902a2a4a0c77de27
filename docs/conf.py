"""The site, made of the repository's Markdown as it lies: ``sphinx-build -c docs . build/docs``, or ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

import lightning_plasticity
from lightning_plasticity.engine.settings import ShowsSettings
from lightning_plasticity.monitoring import pictures

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for mathml.py

project = "lightning-plasticity"
author = "the authors of lightning-plasticity"
version = release = lightning_plasticity.__version__
root_doc = "docs/index"
include_patterns = ["docs/**.md", "examples/benchmarks/*.md", "*.md"]
exclude_patterns = [".*", "build", "dist", "tests", "README.md"]
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "mathml",
]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"
html_extra_path = ["root"]  # an index.html that leads to the start page
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # Lightning's hooks are described by Lightning
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = True
INSIDE = "editing|engine|layer_views|layers|monitoring|units"
nitpick_ignore_regex = [
    # Signatures of what methods stand on also show classes that are nobody else's
    # business: they are shown without a link. So is one of torch's that its site lacks.
    ("py:class", rf"(lightning_plasticity\.({INSIDE})|torch\.utils\.hooks)\..*"),
    (
        "py:class",
        r"KnownUnits|collections\.abc\.Collection",
    ),  # the second is not in the inventory
    ("py:obj", r"typing\.Literal\[.*"),  # Sphinx cuts `Literal["a", "b"] | None` in two
]
pictures.Figure = Figure  # which it imports for type checkers alone
del ShowsSettings.__new__  # its signature would stand in place of that of each __init__

# Which names other projects' sites have, and where, is read from docs/inventories, so that a build needs no network.
intersphinx_mapping = {
    project: (site, (str(HERE / f"inventories/{project}.inv"), None))
    for project, site in {
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
        "lightning": "https://lightning.ai/docs/pytorch/stable/",
        "torchmetrics": "https://lightning.ai/docs/torchmetrics/stable/",
        "matplotlib": "https://matplotlib.org/stable/",
    }.items()
}
