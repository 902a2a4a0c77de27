"""Many steps of each method: memory and the time of a step stay what they were."""

import itertools
import os
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contract.cases import CASES, Case
from torch import nn

from torture.processes import Child

PARTS = 20  # of a run, of which the second and the last are compared: in the first, memory is taken
FEW = 5  # parts, of which the median counts
BLOCK = 25  # steps, with the method and without it in turn: a busy machine slows both
GROWTH = 4.0  # MiB: what the allocator may still take
SLOWER = 1.3  # times


def resident() -> float:
    """The memory that this process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soaked(case: Case, steps: int) -> tuple[float, float]:
    """By how much memory has grown, in MiB, and how much longer a step takes, beside plain steps at the same time."""
    method_steps, plain_steps = training(case), training(None)
    memory, ratios = [], []
    for _ in range(PARTS):
        times = {method_steps: 0.0, plain_steps: 0.0}
        for _ in range(steps // PARTS // BLOCK):
            for trained in times:
                start = time.process_time()
                for _ in range(BLOCK):
                    next(trained)
                times[trained] += time.process_time() - start
        ratios.append(times[method_steps] / times[plain_steps])
        memory.append(resident())
    method_steps.close()
    return memory[-1] - memory[1], median(ratios[-FEW:]) / median(ratios[1 : 1 + FEW])


def training(case: Case | None) -> Generator[None]:
    """A step each time, of a small network with a method, or without one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    method = case and case.make().attach(model, optimizer, (torch.zeros(2, 6),))
    x, y = torch.randn(1000, 4, 6), torch.randn(1000, 4, 3)
    try:
        for i in itertools.count():
            optimizer.zero_grad()
            (model(x[i % 1000]) - y[i % 1000]).square().mean().backward()
            optimizer.step()
            if method:
                method.step()
            yield
    finally:
        if method:
            method.detach()


def run(steps: int, cases: Any = CASES) -> str:
    """All methods; the figures in Markdown."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            growth, slower = Child(Path(folder) / "found.pt", soaked, case, steps).result()
        rows.append(f"| {case.name} | {growth:+.2f} | {slower:.2f} |")
        print(rows[-1], flush=True)
        if growth > GROWTH or slower > SLOWER:
            raise AssertionError(f"{case.name}: {growth:.1f} MiB more, steps take {slower:.2f} times as long")
    lines = [
        f"{steps:,} steps of each method on a small network, each in a process of its own: what it holds in memory at",
        f"the end, against the end of the second of {PARTS} parts; and what a step costs, as a multiple of a plain one",
        f"that runs beside it, in the last {FEW} parts against the first.",
        "",
        "| method | memory, MiB | cost of a step |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines)
