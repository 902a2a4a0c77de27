"""What `find_units` finds in the smallest model of every timm family and in torchvision's classification families.

    python examples/benchmarks/find_units_sweep.py

writes `find_units_sweep.csv` and `find_units_sweep.md` beside this file, a row as soon as a family is done; a second
call goes on where the first one stopped. Every set of units found is checked by the property that makes it valid: with
the consumers' columns at zero, noise in the producers' rows leaves the output as it was, bit by bit (where a norm that
mixes units stands on the way, with that norm taken out).
"""

import argparse
import csv
import multiprocessing
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_plasticity.units.find import explore

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from units.property_check import invalid

HERE = Path(__file__).parent
FIELDS = [
    *("library", "family", "model", "image", "layers", "elsewhere", "found", "sets", "inexact"),
    *("invalid", "runs", "seconds", "forward", "note"),
]


def families() -> dict[tuple[str, str], list[str]]:
    """Model names by library and family."""
    found = defaultdict(list)
    for name in timm.list_models():
        found["timm", timm.models._registry._model_to_module[name]].append(name)
    for name in torchvision.models.list_models(module=torchvision.models):
        found["torchvision", torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[-1]].append(name)
    return found


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """An untrained model and the image size it wants."""
    if library == "torchvision":
        return torchvision.models.get_model(name, weights=None), 299 if name == "inception_v3" else 224
    model = timm.create_model(name, pretrained=False)
    return model, model.pretrained_cfg["input_size"][-1]


def smallest(library: str, names: list[str]) -> str:
    """The model with the fewest parameters."""

    def parameters(name: str) -> int:
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in build(library, name)[0].parameters())
        except Exception:  # some builders compute with values, which meta tensors do not have
            return sum(p.numel() for p in build(library, name)[0].parameters())

    tests = [name for name in names if name.startswith("test_")]
    # building hundreds of large models only to count their parameters would take longer than all the rest
    modest = [name for name in names if not re.search("large|huge|giant|medium|so[0-9]+m|_b[3-9]|_l", name)]
    return tests[0] if tests else min(modest or names, key=parameters)


def examine(library: str, family: str, names: list[str], rows) -> None:
    """Puts the row of one family into the queue ``rows``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name = smallest(library, names)
    row = {"library": library, "family": family, "model": name}
    rows.put(row)
    model, image = build(library, name)
    model.eval()
    inputs = (torch.randn(1, 3, image, image),)
    start = time.perf_counter()
    with torch.no_grad():
        model(*inputs)
    row |= {"image": image, "forward": round(time.perf_counter() - start, 3)}
    start = time.perf_counter()
    found = explore(model, inputs, {}, explain=True)
    row |= {"seconds": round(time.perf_counter() - start, 2), "runs": found.runs, "sets": len(found.units)}
    rows.put(row)
    reasons = found.left_out
    # what cannot be hidden units: on a residual stream, the output itself, or not part of the forward pass
    elsewhere = [r for r in reasons.values() if "residual stream" in r or "network's output" in r or "not called" in r]
    row |= {
        "layers": sum(isinstance(m, (nn.Linear, _ConvNd)) for m in model.modules()),
        "elsewhere": len(elsewhere),
        "found": len({slots.module for units in found.units for slots in units.producers}),
        "inexact": sum(not units.exact for units in found.units),
    }
    mixed = {r for r in reasons.values() if "network's output" not in r and "residual stream" not in r}
    row |= {
        "invalid": " ".join(invalid(model, inputs, found.units)),
        "note": "" if found.units else "; ".join(sorted(mixed))[:300],
    }
    rows.put(row | {"done": True})


def supervise(library: str, family: str, names: list[str], limit: float) -> dict:
    """Examines a family in a process of its own, for ``limit`` seconds at most."""
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


def write_table(path: Path) -> None:
    """Writes the Markdown table from the CSV file."""
    rows = list(csv.DictReader(path.open()))
    done = [row for row in rows if row["found"]]
    invalid = sum(len(row["invalid"].split()) for row in done)
    sets = sum(int(row["sets"]) for row in done)
    lines = [
        "# Hidden units found, by family",
        "",
        "Made by `python examples/benchmarks/find_units_sweep.py` on one CPU core, with "
        + ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in (torch, timm, torchvision))
        + ".",
        "",
        f"{len(done)} of {len(rows)} families finished; {sets} sets of units were found, of which "
        f"{invalid} failed the property test. *Could be*: linear and convolution layers whose units are neither on a "
        "residual stream nor the output. *Found*: layers that are a producer of some set. *Runs* and *seconds* include "
        "one run for each layer left out, to say why.",
        "",
        "| library | family | model | image | found | could be | layers | sets | inexact | invalid | runs | seconds "
        "| forward, s | note |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["library"], row["family"])):
        could = int(row["layers"]) - int(row["elsewhere"]) if row["found"] else ""
        cells = [
            row["library"],
            row["family"],
            row["model"],
            row["image"],
            row["found"],
            could,
            row["layers"],
            row["sets"],
        ]
        cells += [
            row["inexact"],
            len(row["invalid"].split()) if row["found"] else "",
            row["runs"],
            row["seconds"],
            row["forward"],
        ]
        lines.append("| " + " | ".join(map(str, [*cells, row["note"]])) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Goes through all families that the results file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "find_units_sweep.csv")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for one family")
    parser.add_argument("--only", nargs="*", help="families (default: all)")
    options = parser.parse_args()
    known = set()
    if options.output.exists():
        known = {(row["library"], row["family"]) for row in csv.DictReader(options.output.open())}
    else:
        with options.output.open("w", newline="") as file:
            csv.DictWriter(file, FIELDS).writeheader()
    quick_first = sorted(families().items(), key=lambda item: not any(name.startswith("test_") for name in item[1]))
    for (library, family), names in quick_first:
        if (library, family) in known or (options.only and family not in options.only):
            continue
        row = supervise(library, family, names, options.limit)
        print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
        with options.output.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row)
    write_table(options.output)


if __name__ == "__main__":
    main()
