"""Slowly-changing regression: does a learner that has learned for long still follow a target that keeps changing?

    python examples/benchmarks/slowly_changing_regression.py

The problem of Dohare et al. (arXiv 2306.13812; Nature 632, 2024). Of 20 input bits 5 are drawn anew for every example,
and 15 stay as they are, but one of them flips after every 10,000 examples. The target is a fixed network of 100 linear
threshold units, and a learner with 5 hidden ReLU units is too small for it: it has to go on tracking. It sees every
example once, one by one, and its squared error before it learned from an example is what counts.

A row of `slowly_changing_regression.csv` is written after every 50,000 examples. A second call runs what is missing,
and begins runs that were interrupted anew; several calls at once may share the file with different `--arm` or
`--seeds`. Every call writes the table and the picture from all rows that are there.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_rows import Curves, mean_and_std, write_row
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_plasticity import ContinualBackprop
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.functional import dead_units, effective_rank, weight_magnitude

INPUTS, FLIPPING = 20, 15  # bits, and those of them that stay until they flip
FLIP_EVERY = 10_000  # examples
TARGET_UNITS, BETA = 100, 0.7
HIDDEN = 5
BLOCK = 50_000  # examples that make one row; a whole number of flips
ENDS = 2  # blocks that count as the first and the last ones
KEY = ("arm", "seed", "examples")
MEASURES = ("squared_error", "dead_units", "effective_rank", "weight_magnitude")


@dataclass(frozen=True)
class Arm:
    """One way to train, and how its line looks: the colour tells methods apart, and so does the style without it."""

    optimizer: Callable[[Any], torch.optim.Optimizer]
    method: Callable[[], PlasticityCallback] | None = None
    colour: str = "#D55E00"
    style: str = "--"


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, fused=True)


def adam(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, fused=True)


def continual_backprop(optimizer_state: OptimizerState = "survivors") -> PlasticityCallback:
    """With the utility that the authors' code has for this problem."""
    return ContinualBackprop(1e-4, 100, 0.99, "adaptable_contribution", optimizer_state=optimizer_state, seed=0)


ARMS = {
    "SGD": Arm(sgd),
    "SGD, ContinualBackprop": Arm(sgd, continual_backprop, "#0072B2", "-"),
    "Adam 0.001": Arm(adam(0.001)),
    "Adam 0.001, ContinualBackprop": Arm(adam(0.001), continual_backprop, "#0072B2", "-"),
    "Adam 0.001, ContinualBackprop, reset": Arm(adam(0.001), partial(continual_backprop, "reset"), "#009E73", "-."),
    "Adam 0.001, ContinualBackprop, keep": Arm(adam(0.001), partial(continual_backprop, "keep"), "#000000", ":"),
    "Adam 0.01": Arm(adam(0.01)),
    "Adam 0.01, ContinualBackprop": Arm(adam(0.01), continual_backprop, "#0072B2", "-"),
    "Adam 0.01, ContinualBackprop, reset": Arm(adam(0.01), partial(continual_backprop, "reset"), "#009E73", "-."),
    "Adam 0.01, ContinualBackprop, keep": Arm(adam(0.01), partial(continual_backprop, "keep"), "#000000", ":"),
}


# ---- the problem


class Target:
    """The network to learn: units that are 1 where enough of their inputs are as their weights want them."""

    def __init__(self, generator: torch.Generator) -> None:
        def signs(*shape: int) -> Tensor:
            return 2.0 * torch.randint(2, shape, generator=generator) - 1

        self.incoming, self.outgoing = signs(INPUTS + 1, TARGET_UNITS), signs(TARGET_UNITS, 1)  # the last input is 1
        self.threshold = BETA * (INPUTS + 1) - (self.incoming < 0).sum(0)

    def of(self, bits: Tensor) -> Tensor:
        """What the network gives for rows of bits."""
        with_constant = F.pad(bits, (0, 1), value=1.0)
        return ((with_constant @ self.incoming > self.threshold).float() @ self.outgoing).squeeze(1)


def stream(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets from one flip to the next, without end; the same for all arms."""
    generator = torch.Generator().manual_seed(seed)
    target = Target(generator)
    slow = torch.randint(2, (FLIPPING,), generator=generator).float()
    while True:
        fast = torch.randint(2, (FLIP_EVERY, INPUTS - FLIPPING), generator=generator).float()
        bits = torch.cat([slow.expand(FLIP_EVERY, -1), fast], 1)
        yield bits, target.of(bits)
        flipped = torch.randint(FLIPPING, (), generator=generator)
        slow[flipped] = 1 - slow[flipped]


# ---- a run


class Learners(nn.Module):
    """One learner for each seed, side by side in one network.

    They share nothing but the calls, which are most of what a step of such small networks costs.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.learners = nn.ModuleList(make_learner(seed) for seed in seeds)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """From inputs (examples, seeds, bits) to outputs (examples, seeds)."""
        return torch.cat([learner(x) for learner, x in zip(self.learners, inputs.unbind(1), strict=True)], 1)


def make_learner(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    learner = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    for layer, nonlinearity in ((learner[0], "relu"), (learner[2], "linear")):
        nn.init.kaiming_uniform_(layer.weight, nonlinearity=nonlinearity)
        nn.init.zeros_(layer.bias)
    return learner


def learn(
    learners: Learners,
    optimizer: torch.optim.Optimizer,
    method: PlasticityCallback | None,
    inputs: Tensor,
    targets: Tensor,
) -> Tensor:
    """One pass; returns the mean squared error of each learner, on each example before it was learned from."""
    errors = []
    for x, y in zip(inputs.split(1), targets.split(1), strict=True):
        error = (learners(x) - y).square()
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
        if method is not None:
            method.step()
        errors.append(error.detach())
    return torch.cat(errors).double().mean(0)


def run(name: str, seeds: Sequence[int], examples: int, results: Path) -> None:
    arm, learners = ARMS[name], Learners(seeds)
    optimizer = arm.optimizer(learners.parameters())
    method = arm.method() if arm.method else None
    if method is not None:
        method.attach(learners, optimizer, example_inputs=(torch.zeros(1, len(seeds), INPUTS),))
    streams = [stream(seed) for seed in seeds]
    started = time.perf_counter()
    for seen in row_times(examples):
        errors = torch.zeros(len(seeds), dtype=torch.float64)
        for _ in range(BLOCK // FLIP_EVERY):
            inputs, targets = (torch.stack(parts, 1) for parts in zip(*map(next, streams), strict=True))
            errors += learn(learners, optimizer, method, inputs, targets) * FLIP_EVERY / BLOCK
        for seed, learner, x, error in zip(seeds, learners.learners, inputs.unbind(1), errors.tolist(), strict=True):
            row = {"arm": name, "seed": seed, "examples": seen, "squared_error": error} | measure(learner, x)
            write_row(results.with_suffix(".csv"), [*KEY, *MEASURES], row)
    step = (time.perf_counter() - started) / examples * 1e6
    print(f"{name}, {len(seeds)} seeds: {step:.0f} µs a step, the last error {errors.mean():.3f}", flush=True)


def row_times(examples: int) -> range:
    """The numbers of examples after which rows are written."""
    return range(BLOCK, examples + 1, BLOCK)


@torch.no_grad()
def measure(learner: nn.Sequential, inputs: Tensor) -> dict[str, float]:
    """The state of the hidden units on some inputs, and the size of the weights."""
    features = learner[:2](inputs)
    return {
        "dead_units": float(dead_units(features)),
        "effective_rank": float(effective_rank(features)),
        "weight_magnitude": float(weight_magnitude(learner)),
    }


# ---- what came out


EXPLANATION = """Written by `slowly_changing_regression.py`. {examples:,} examples, batch 1, SGD with step size 0.01,
Adam with the step sizes that its arms name; `ContinualBackprop` with rate 1e-4, maturity threshold 100 and adaptable
contribution, and `optimizer_state="survivors"`, the default, where the arm names no other. Adam 0.001 was added after
short trials on these seeds in which `ContinualBackprop`, with cleared moments, was behind plain Adam 0.01. The error is
the mean squared error on the examples, each before it was learned from; ± is the standard deviation over seeds, each
with a target and a stream of its own, so that the change within runs tells more than the spread between them.
Dead units, effective rank (of {hidden} hidden units, on the {probe:,} examples before a row was written)
and the mean size of the weights are means over the last {ends:,} examples. Published (100 seeds): the error of plain
SGD and Adam rises, that of Continual Backprop stays."""

BEGINNING = 6  # rows: of all that was run, for what Adam remembers of new units
ABOUT_MEMORY = """## What Adam remembers of new units

The error over the first {examples:,} examples, of all arms that have come so far."""


def report(results: Curves, examples: int) -> str:
    ends, times = ENDS * BLOCK, row_times(examples)
    lines = [
        f"| arm | seeds | error, first {ends:,} | error, last {ends:,} | change | seeds where it rose | dead units, % "
        "| effective rank | weight magnitude |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in ARMS:
        if not results.seeds(arm, last=examples):
            continue
        error = results.of(arm, times=times, measure="squared_error")
        first, last = error[:, :ENDS].mean(1), error[:, -ENDS:].mean(1)
        cells = [arm, str(len(error)), *(mean_and_std(x, 3) for x in (first, last, last - first))]
        cells.append(f"{(last > first).sum()} of {len(error)}")
        for measure, scale in (("dead_units", 100), ("effective_rank", 1), ("weight_magnitude", 1)):
            at_the_end = results.of(arm, times=times, measure=measure)[:, -ENDS:].mean(1)
            cells.append(mean_and_std(scale * at_the_end, 1 if scale == 100 else 2))
        lines.append(f"| {' | '.join(cells)} |")
    explanation = EXPLANATION.format(examples=examples, hidden=HIDDEN, probe=FLIP_EVERY, ends=ends)
    whole = f"# Slowly-changing regression\n\n{explanation}\n\n" + "\n".join(lines) + "\n"
    return whole + report_of_memory(results)


def report_of_memory(results: Curves) -> str:
    times = row_times(BEGINNING * BLOCK)
    lines = ["| arm | seeds | error |", "|---|---:|---:|"]
    for arm in (arm for arm in ARMS if arm.startswith("Adam") and results.seeds(arm, last=times[-1])):
        error = results.of(arm, times=times, measure="squared_error").mean(1)
        lines.append(f"| {arm} | {len(error)} | {mean_and_std(error, 3)} |")
    if not lines[2:]:
        return ""
    return f"\n{ABOUT_MEMORY.format(examples=times[-1])}\n\n" + "\n".join(lines) + "\n"


def draw(results: Curves, examples: int, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    complete = [name for name in ARMS if results.seeds(name, last=examples)]
    optimizers = dict.fromkeys(name.split(",")[0] for name in complete)
    if not optimizers:
        return
    size = (2 + 2.7 * len(optimizers), 3.8)
    figure, axes = pyplot.subplots(1, len(optimizers), figsize=size, sharey=True, squeeze=False, layout="constrained")
    times = row_times(examples)
    seen = np.array(times) / 1e6
    for axis, optimizer in zip(axes[0], optimizers, strict=True):
        axis.set(title=optimizer, xlabel="examples, millions")
        for name in (name for name in complete if name.split(",")[0] == optimizer):
            error = results.of(name, times=times, measure="squared_error")
            mean, std, arm = error.mean(0), error.std(0, ddof=min(1, len(error) - 1)), ARMS[name]
            label = name.partition(", ")[2] or "plain"
            axis.plot(seen, mean, color=arm.colour, linestyle=arm.style, label=f"{label}, {len(error)} seeds")
            axis.fill_between(seen, mean - std, mean + std, color=arm.colour, alpha=0.2, linewidth=0)
        axis.legend(frameon=False)
    axes[0, 0].set_ylabel("mean squared error")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--examples", type=int, default=1_000_000, help=f"a multiple of {BLOCK:,}")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("slowly_changing_regression"),
        help="where to write .csv, .md and .png, without the ending",
    )
    options = parser.parse_args(arguments)
    if options.examples < BLOCK or options.examples % BLOCK:
        parser.error(f"--examples must be a multiple of {BLOCK:,}, got {options.examples:,}")
    torch.set_num_threads(1)  # the network is too small to gain from more
    csv_file = options.results.with_suffix(".csv")
    for arm in options.arm:
        done = Curves(csv_file, KEY).seeds(arm, last=options.examples)
        missing = [seed for seed in options.seeds if seed not in done]
        if missing:
            run(arm, missing, options.examples, options.results)
    found = Curves(csv_file, KEY)
    options.results.with_suffix(".md").write_text(report(found, options.examples))
    draw(found, options.examples, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
