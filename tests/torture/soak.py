"""Many steps of each method: memory and the time of a step stay what they were."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contract.cases import CASES, Case
from torch import nn

from torture.processes import Child

PARTS = 20  # of a run, of which the second and the last are compared: in the first, memory is taken
GROWTH = 4.0  # MiB: what the allocator may still take
SLOWER = 1.3  # times: what is left of a busy machine in processor time


def resident() -> float:
    """The memory that this process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soaked(case: Case, steps: int) -> tuple[float, float]:
    """By how much memory has grown, in MiB, and how much longer a step takes, in processor time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    method = case.make().attach(model, optimizer, (torch.zeros(2, 6),))
    x, y = torch.randn(1000, 4, 6), torch.randn(1000, 4, 3)
    memory, times = [], []
    for _ in range(PARTS):
        start = time.process_time()
        for i in range(steps // PARTS):
            optimizer.zero_grad()
            (model(x[i % 1000]) - y[i % 1000]).square().mean().backward()
            optimizer.step()
            method.step()
        times.append(time.process_time() - start)
        memory.append(resident())
    method.detach()
    return memory[-1] - memory[1], min(times[-3:]) / min(times[1:4])


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
        f"the end, against the end of the second of {PARTS} parts; and the processor time of a step in the last parts,",
        "against the first, each the least of three.",
        "",
        "| method | memory, MiB | time of a step |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines)
