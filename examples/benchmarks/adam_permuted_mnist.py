"""Online permuted MNIST with Adam: what should the optimizer remember of units that are replaced?

    python examples/benchmarks/adam_permuted_mnist.py --data-dir data

The tasks and the ReLU network of `permuted_mnist.py`, which says what `data` is, with Adam in place of SGD and with
each value of `optimizer_state` for each method that works on units. A row of `adam_permuted_mnist.csv` is written after
each task. A second call runs what is missing, and begins runs that were interrupted anew; several calls at once may
share the file with different `--lr`, `--arm` or `--seed`. Every call writes the table from all rows that are there.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from permuted_mnist import MEASURES, NETWORKS, TASK, learn, load_digits, make_network, measure
from study_rows import Curves, mean_and_std, write_row
from torch import Tensor

from lightning_plasticity import ActivationReset, ContinualBackprop, ReDo
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback

BATCH = 16  # images of a step
LAST_TASKS = 10
LEARNING_RATES = ("0.001", "0.0001")
METHODS: dict[str, Callable[[int, OptimizerState], PlasticityCallback]] = {
    "ContinualBackprop": lambda seed, memory: ContinualBackprop(optimizer_state=memory, seed=seed),
    "ActivationReset": lambda seed, memory: ActivationReset("relu", optimizer_state=memory, seed=seed),
    "ReDo, score_steps=100": lambda seed, memory: ReDo(score_steps=100, optimizer_state=memory, seed=seed),
}
# The name of an arm: what the table calls it, and what makes its method from a seed.
ARMS: dict[str, tuple[str, OptimizerState] | None] = {"plain": None} | {
    f"{method}, {memory}": (method, memory) for method in METHODS for memory in get_args(OptimizerState)
}
KEY = ("lr", "arm", "seed", "task")


def run(lr: str, arm: str, seed: int, tasks: int, digits: tuple[Tensor, Tensor], results: Path) -> None:
    images, labels = digits
    torch.manual_seed(seed)
    model = make_network(NETWORKS["relu"])
    optimizer = torch.optim.Adam(model.parameters(), lr=float(lr), fused=True)
    method = None
    if made := ARMS[arm]:
        name, memory = made
        method = METHODS[name](seed, memory).attach(model, optimizer, example_inputs=(images[:1],))
    orders = torch.Generator().manual_seed(seed)  # the same tasks for all arms
    for task in range(1, tasks + 1):
        pixels = torch.randperm(784, generator=orders)
        order = torch.randperm(len(images), generator=orders)
        x, y = images[order][:, pixels], labels[order]
        accuracy = learn(model, optimizer, method, x, y, BATCH)
        row = {"lr": lr, "arm": arm, "seed": seed, "task": task, "accuracy": accuracy} | measure(model, x[:2000])
        write_row(results.with_suffix(".csv"), [*KEY, *MEASURES], row)
    print(f"Adam {lr}, {arm}, seed {seed}: {accuracy:.1%} in task {tasks}", flush=True)


# ---- what came out


EXPLANATION = """Written by `adam_permuted_mnist.py`. {images:,} digits a task, batch {batch}, Adam, {tasks} tasks,
three ReLU layers of 100 units. Accuracy is that on each image before it was learned from. Dead units, effective rank
and the mean size of the weights are taken after a task, as means over the last {last} tasks. ± is the standard
deviation over seeds."""


def table(results: Curves, lr: str, tasks: int) -> str:
    last = f"tasks {max(1, tasks - LAST_TASKS + 1)} to {tasks}"
    lines = [
        f"| arm | seeds | accuracy, task 1, % | {last}, % | all tasks, % | dead units, % | effective rank "
        "| weight magnitude |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in ARMS:
        seeds = results.seeds(lr, arm, last=tasks)
        if not seeds:
            continue
        curves = {m: results.of(lr, arm, times=range(1, tasks + 1), measure=m) for m in MEASURES}
        accuracy = 100 * curves["accuracy"]
        ends = {m: curve[:, -LAST_TASKS:].mean(1) for m, curve in curves.items()}
        cells = [
            arm,
            str(len(seeds)),
            mean_and_std(accuracy[:, 0], 1),
            mean_and_std(100 * ends["accuracy"], 2),
            mean_and_std(accuracy.mean(1), 2),
            mean_and_std(100 * ends["dead_units"], 1),
            mean_and_std(ends["effective_rank"], 1),
            mean_and_std(ends["weight_magnitude"], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(results: Curves, tasks: int) -> str:
    parts = [
        "# Online permuted MNIST with Adam",
        EXPLANATION.format(images=TASK, batch=BATCH, tasks=tasks, last=LAST_TASKS),
    ]
    for lr in LEARNING_RATES:
        parts += [f"## Adam {lr}", table(results, lr, tasks)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with mnist.npz or torchvision's MNIST")
    parser.add_argument("--lr", nargs="*", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--arm", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("adam_permuted_mnist"),
        help="where to write .csv and .md, without the ending",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is too small to gain from more
    torch.set_flush_denormal(True)  # averages for pixels that are seldom on fade away, and are slow to compute with
    digits = load_digits(options.data_dir)
    csv_file = options.results.with_suffix(".csv")
    for seed in options.seed:
        for lr in options.lr:
            for arm in options.arm:
                if seed not in Curves(csv_file, KEY).seeds(lr, arm, last=options.tasks):
                    run(lr, arm, seed, options.tasks, digits, options.results)
    options.results.with_suffix(".md").write_text(report(Curves(csv_file, KEY), options.tasks))


if __name__ == "__main__":
    main()
