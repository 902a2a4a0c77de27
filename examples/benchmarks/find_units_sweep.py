"""What `find_units` finds in networks of every family of timm and torchvision, and of many other kinds.

    python examples/benchmarks/find_units_sweep.py

writes `find_units_sweep.csv` and `find_units_sweep.md` beside this file, a row as soon as a network is done; a second
call goes on where the first one stopped. Every set of units found is checked by the property that makes it valid: with
the consumers' columns at zero, noise in the producers' rows of a random half of the units leaves the output as it was,
bit by bit (where a norm that mixes units stands on the way, with that norm taken out).
"""

import argparse
import csv
import multiprocessing
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from lightning_plasticity.layer_views import named_layers
from lightning_plasticity.units.find import explore

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
from find_units_networks import NETWORKS
from units.property_check import invalid

HERE = Path(__file__).parent
FIELDS = [
    *("library", "family", "model", "layers", "elsewhere", "found", "sets", "inexact", "invalid"),
    *("parameters", "of_units", "of_stream", "runs", "forwards", "note"),
]


# ---- timm and torchvision: the smallest model of each family


def families() -> dict[tuple[str, str], list[str]]:
    """Model names by library and family."""
    import timm
    import torchvision

    found = defaultdict(list)
    for name in timm.list_models():
        found["timm", timm.models._registry._model_to_module[name]].append(name)
    for name in torchvision.models.list_models(module=torchvision.models):
        found["torchvision", torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[-1]].append(name)
    return found


def image_model(library: str, name: str) -> tuple[nn.Module, int]:
    """An untrained model and the image size it wants."""
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(name, weights=None), 299 if name == "inception_v3" else 224
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, model.pretrained_cfg["input_size"][-1]


def smallest(library: str, names: list[str]) -> str:
    """The model with the fewest parameters."""

    def parameters(name: str) -> int:
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in image_model(library, name)[0].parameters())
        except Exception:  # some builders compute with values, which meta tensors do not have
            return sum(p.numel() for p in image_model(library, name)[0].parameters())

    tests = [name for name in names if name.startswith("test_")]
    # building hundreds of large models only to count their parameters would take longer than all the rest
    modest = [name for name in names if not re.search("large|huge|giant|medium|so[0-9]+m|_b[3-9]|_l", name)]
    return tests[0] if tests else min(modest or names, key=parameters)


def build(library: str, family: str, name: str) -> tuple[nn.Module, tuple]:
    """A network and its example input."""
    if (library, family) in NETWORKS:
        return NETWORKS[library, family]()
    model, image = image_model(library, name)
    return model, (torch.randn(1, 3, image, image),)


# ---- one network


def cpu_seconds(function: Callable[[], object]) -> float:
    """The processor time of a call, which other processes do not add to."""
    start = time.process_time()
    function()
    return time.process_time() - start


def examine(library: str, family: str, names: list[str], rows) -> None:
    """Puts the row of one network into the queue ``rows``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    name = smallest(library, names) if len(names) > 1 else names[0]
    row = {"library": library, "family": family, "model": name}
    rows.put(row)
    model, inputs = build(library, family, name)
    model.eval()
    with torch.no_grad():
        forward = min(cpu_seconds(lambda: model(*inputs)) for _ in range(2))
    found = None

    def find() -> None:
        nonlocal found
        found = explore(model, inputs, {}, explain=True)

    seconds = cpu_seconds(find)
    reasons = found.left_out
    # what cannot be hidden units: on a residual stream, the output itself, or not part of the forward pass
    elsewhere = [r for r in reasons.values() if "residual stream" in r or "network's output" in r or "not called" in r]
    others = {re.sub("'[^']*'", "…", r) for r in reasons.values() if r not in elsewhere}
    row |= {
        "layers": len(named_layers(model)),
        "elsewhere": len(elsewhere),
        "found": len({slots.module for units in found.units for slots in units.producers}),
        "sets": len(found.units),
        "inexact": sum(not units.exact for units in found.units),
        "parameters": found.parameters,
        "of_units": found.of_units,
        "of_stream": found.of_stream,
        "runs": found.runs,
        "forwards": round(seconds / forward, 1),
        "note": "; ".join(sorted(others))[:400],
    }
    rows.put(row)
    row["invalid"] = " ".join(invalid(model, inputs, found.units)) or "none"
    rows.put(row | {"done": True})


def supervise(library: str, family: str, names: list[str], limit: float) -> dict:
    """Examines a network in a process of its own, for ``limit`` seconds at most."""
    context = multiprocessing.get_context("fork")
    rows = context.Queue()
    process = context.Process(target=examine, args=(library, family, names, rows))
    process.start()
    row: dict = {"library": library, "family": family}
    end = time.monotonic() + limit
    while not row.get("done") and time.monotonic() < end and (process.is_alive() or not rows.empty()):
        try:
            row = rows.get(timeout=1)
        except Exception:
            continue
    if not row.get("done"):
        row["note"] = f"not finished in {limit:.0f} s" if process.is_alive() else "stopped with an error"
    process.terminate()
    process.join()
    return {field: row.get(field, "") for field in FIELDS}


# ---- the page


def share(row: dict, field: str) -> str:
    """A number of parameters in percent of all."""
    return f"{100 * int(row[field]) / int(row['parameters']):.0f}" if row[field] else ""


def page(rows: list[dict]) -> str:
    """The Markdown page of the rows."""
    done = [row for row in rows if row["invalid"]]
    failed = sum(len(row["invalid"].split()) for row in done if row["invalid"] != "none")
    totals = {field: sum(int(row[field]) for row in done) for field in ("layers", "elsewhere", "found", "sets")}
    lines = [
        "# Hidden units found, by family",
        "",
        "Made by `python examples/benchmarks/find_units_sweep.py` on one CPU core, with "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torchvision", "transformers"))
        + ".",
        "",
        f"{len(done)} of {len(rows)} networks finished; {totals['sets']:,} sets of units were found, of which "
        f"**{failed} failed** the property test. They are made by {totals['found']:,} of {totals['layers']:,} layers; "
        f"{totals['elsewhere']:,} others are on a residual stream, the output itself or not called: *could be* is what "
        "is left.",
        "",
        "*Units, %*: how much of all parameters belongs to units (rows, columns, biases and entries of norms). "
        "*Stream, %*: how much does not but is in layers on a residual stream. *Forwards*: the processor time of "
        "`find_units(explain=True)`, which includes a run for each layer left out, in forward passes.",
        "",
        "| library | family | model | found | could be | layers | sets | inexact | invalid | parameters | units, % "
        "| stream, % | runs | forwards | left out besides |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["library"], row["family"])):
        could = int(row["layers"]) - int(row["elsewhere"]) if row["found"] else ""
        cells = [row["library"], row["family"], row["model"], row["found"], could]
        cells += [row["layers"], row["sets"], row["inexact"], "0" if row["invalid"] == "none" else row["invalid"]]
        cells += [f"{int(row['parameters']):,}" if row["parameters"] else "", share(row, "of_units")]
        cells += [share(row, "of_stream"), row["runs"], row["forwards"], row["note"].replace("|", "/")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Goes through all networks that the results file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "find_units_sweep.csv")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for one network")
    parser.add_argument("--only", nargs="*", help="families (default: all)")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    known: dict[tuple[str, str], str] = {}
    if options.output.exists():
        known = {(row["library"], row["family"]): row["model"] for row in csv.DictReader(options.output.open())}
    else:
        with options.output.open("w", newline="") as file:
            csv.DictWriter(file, FIELDS).writeheader()
    every = {} if options.page else {key: [key[1]] for key in NETWORKS} | families()
    # quick ones first
    for (library, family), names in sorted(
        every.items(), key=lambda item: (item[0] not in NETWORKS, not any(name.startswith("test_") for name in item[1]))
    ):
        if (library, family) in known or (options.only and family not in options.only):
            continue
        row = supervise(library, family, names, options.limit)
        print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
        with options.output.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row)
    options.output.with_suffix(".md").write_text(page(list(csv.DictReader(options.output.open()))))


if __name__ == "__main__":
    main()
