"""Up to which size Numba's kernels are faster than PyTorch's operations, with one thread of PyTorch and with two.

    python examples/benchmarks/kernels.py

Four tensors of the same size are worked on together, with warm caches; of each time the shortest of twelve is taken.
Prints a table, and writes it to `kernels.md` beside this file. `LARGE` in `lightning_plasticity/kernels/on_cpu.py` is
chosen by it.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lightning_plasticity.kernels import Tensors, on_cpu


def shortest(function: Callable[[], object], calls: int) -> float:
    """The microseconds of a call."""
    function()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return min(times)


def pairs(entries: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What kernels do, and what PyTorch does instead, on so many entries in all."""
    columns = max(entries // 4, 1) // 2 ** ((entries.bit_length() - 3) // 2)
    weights = [torch.randn(entries // 4 // columns, columns) for _ in range(4)]
    together, factors, norms = Tensors(weights), torch.ones(4), torch.zeros(4)
    together.kernels()
    shape = np.array([[0, 0, 1, 1, len(weights[0]), columns, 1, 0]] * 4)
    sizes, out = torch.rand(columns), torch.zeros(columns)
    x, total, size = torch.randn(entries // 64, 64), torch.zeros(64), torch.zeros(64)
    each, add = factors.unbind(), on_cpu.column_sums(-1, total, size)
    return {
        "clamp": (lambda: on_cpu.clamp(together, [9.0] * 4), lambda: [w.clamp_(-9.0, 9.0) for w in weights]),
        "norms": (lambda: on_cpu.norms(together, norms), lambda: torch._foreach_norm(weights)),
        "scale": (lambda: on_cpu.scale(together, factors), lambda: torch._foreach_mul_(weights, each)),
        "sizes of outgoing weights": (
            lambda: on_cpu.contributions(together, shape, sizes, out),
            lambda: [torch.sum(w.abs(), 0) for w in weights],
        ),
        "sums of activations": (
            lambda: add(x, 0),
            lambda: (x.sum(0), x.abs().sum(0)),
        ),
    }


def main() -> None:
    on_cpu.LARGE = 2**40
    names = list(pairs(2**12))
    lines = ["| threads | entries | " + " | ".join(names) + " |", "|---:|---:|" + "---:|" * len(names)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for power in (12, 14, 16, 17, 18, 19, 20, 22):
            cells = []
            for kernel, plain in pairs(2**power).values():
                calls = max(2, 2**17 >> power)
                cells.append(f"{shortest(kernel, calls):.0f} / {shortest(plain, calls):.0f}")
            lines.append(f"| {threads} | 2^{power} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    title = "# Microseconds of Numba's kernels / of PyTorch's operations"
    made_by = "Made by `python examples/benchmarks/kernels.py`."
    Path(__file__).with_suffix(".md").write_text("\n\n".join([title, "\n".join(lines), made_by]) + "\n")


if __name__ == "__main__":
    main()
