"""Online permuted MNIST: which method keeps a network able to learn, task after task.

    python examples/benchmarks/permuted_mnist.py --data-dir data

A task shows 10,000 digits once, one by one, with the pixels in a new random order, so that every task is as hard as any
other; plain SGD with step size 0.003. `data` is a folder that holds `mnist.npz`, or one where torchvision has MNIST or
may download it to. A row of `permuted_mnist.csv` is written after each task. A second call runs what is missing, and
begins runs that were interrupted anew; several calls at once may share the file with different `--network`, `--arm` or
`--seed`. Every call writes `permuted_mnist.md` and the pictures from all rows that are there.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_rows import Curves, mean_and_std, write_row
from torch import Tensor, nn

from lightning_plasticity import (
    ActivationReset,
    ActivationStrategy,
    ContinualBackprop,
    HareAndTortoise,
    IsometryReinit,
    L2Init,
    ParsevalRegularization,
    PartialReset,
    ReDo,
    SelectiveReinit,
    SelfNormalizedReset,
    ShrinkAndPerturb,
    SoftWeightRescaling,
    SpectralRegularization,
    WeightClipping,
)
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.functional import dead_units, effective_rank, gradient_covariance, weight_magnitude

TASK = 10_000  # images of a task, and so optimizer steps
LAST_TASKS = 20
NETWORKS = {
    "relu": ("relu", "relu", "relu"),
    "tanh": ("tanh", "tanh", "tanh"),
    "mixed": ("relu", "relu", "tanh", "tanh", "relu"),
}


@dataclass(frozen=True)
class Arm:
    """One way to train; ``published`` is the mean online accuracy in Purice 2025, for some networks."""

    method: Callable[[int], PlasticityCallback] | None = None  # made with a seed
    weight_decay: float = 0.0
    layer_norm: bool = False
    published: tuple[tuple[str, str], ...] = ()


ARMS = {
    "plain": Arm(),
    "ContinualBackprop": Arm(lambda seed: ContinualBackprop(seed=seed)),
    "ActivationReset auto": Arm(lambda seed: ActivationReset("auto", seed=seed)),
    "ActivationReset relu": Arm(
        lambda seed: ActivationReset("relu", seed=seed),
        published=(("relu", "88.65 ± 0.4"), ("tanh", "84.12 ± 0.5")),
    ),
    "ActivationReset tanh, rates 1e-5, 1e-6": Arm(
        lambda seed: ActivationReset(ActivationStrategy(1e-5, 1e-6, 0.5, 0.2), seed=seed),
        published=(("relu", "84.98 ± 0.7"), ("tanh", "87.60 ± 0.32")),
    ),
    "ActivationReset tanh, rates 1e-6, 1e-5": Arm(
        lambda seed: ActivationReset(ActivationStrategy(1e-6, 1e-5, 0.5, 0.2), seed=seed)
    ),
    # The strategy for tanh where a ReLU follows and that for ReLU where tanh follows, in the mixed network.
    "ActivationReset opposite": Arm(
        lambda seed: ActivationReset({"0": "tanh", "2": "tanh", "4": "relu", "6": "relu", "8": "tanh"}, seed=seed)
    ),
    "SoftWeightRescaling": Arm(lambda seed: SoftWeightRescaling(1e-3, seed=seed)),
    "L2": Arm(weight_decay=1e-3, published=(("relu", "86.23 ± 0.4"), ("tanh", "86.45 ± 0.37"))),
    "L2Init": Arm(lambda seed: L2Init(1e-3, seed=seed)),
    "ReDo": Arm(lambda seed: ReDo(seed=seed)),  # a unit is judged by one image
    "ReDo, score_steps=100": Arm(lambda seed: ReDo(score_steps=100, seed=seed)),
    "ShrinkAndPerturb": Arm(lambda seed: ShrinkAndPerturb(0.6, 0.4, every_n_train_steps=TASK, seed=seed)),
    "LayerNorm, L2": Arm(weight_decay=1e-3, layer_norm=True),
    # Each of these with what its authors have, where they say so, and otherwise with its defaults. Resets come at the
    # change of tasks. (OptimizerReset has no arm: plain SGD remembers nothing. Nor has DirectionAwareShrink, whose pass
    # is over all data so far: here no two tasks are alike.)
    "IsometryReinit": Arm(lambda seed: IsometryReinit(every_n_train_steps=TASK, seed=seed)),
    "IsometryReinit, exact": Arm(lambda seed: IsometryReinit(exact=True, every_n_train_steps=TASK, seed=seed)),
    "HareAndTortoise": Arm(lambda seed: HareAndTortoise(every_n_train_steps=TASK, seed=seed)),
    "ParsevalRegularization": Arm(lambda seed: ParsevalRegularization(seed=seed)),
    "SpectralRegularization": Arm(lambda seed: SpectralRegularization(seed=seed)),
    "WeightClipping": Arm(lambda seed: WeightClipping(2.0, seed=seed)),
    "L2Init, sorted": Arm(lambda seed: L2Init(1e-3, match="sorted", every_n_train_steps=100, seed=seed)),
    "ReDo by gradient, score_steps=100": Arm(lambda seed: ReDo(0.01, score="gradient", score_steps=100, seed=seed)),
    # Of 0.08, 0.02 and 0.00125 the best over tasks 11 to 19 with seed 100; a task is 10,000 steps.
    "SelfNormalizedReset": Arm(
        lambda seed: SelfNormalizedReset(
            0.00125, every_n_train_steps=TASK, min_silence=100, max_silence=20_000, seed=seed
        )
    ),
    "SoftWeightRescaling of NaP": Arm(lambda seed: SoftWeightRescaling(1.0, biases="keep", seed=seed)),
    "PartialReset": Arm(lambda seed: PartialReset(seed=seed)),
    # one image would decide, without an average
    "SelectiveReinit as published, decay_rate=0.999": Arm(
        lambda seed: SelectiveReinit.as_published(decay_rate=0.999, seed=seed)
    ),
}
# `auto` takes the ReLU strategy for ReLU and that for tanh for tanh, so that it and its opposite are arms of their own
# in the mixed network only.
SKIPPED = {(network, f"ActivationReset {arm}") for network in ("relu", "tanh") for arm in ("auto", "opposite")}
KEY = ("network", "arm", "seed", "task")
MEASURES = ("accuracy", "effective_rank", "dead_units", "weight_magnitude")


def load_digits(folder: Path) -> tuple[Tensor, Tensor]:
    """The first training images of MNIST, as rows of numbers between 0 and 1."""
    if (folder / "mnist.npz").exists():
        data = np.load(folder / "mnist.npz")
        images, labels = torch.from_numpy(data["x_train"]), torch.from_numpy(data["y_train"])
    else:
        from torchvision.datasets import MNIST

        digits = MNIST(folder, train=True, download=True)
        images, labels = digits.data, digits.targets
    return images[:TASK].flatten(1).float() / 255, labels[:TASK].long()


def make_network(activations: Sequence[str], layer_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, activation in enumerate(activations):
        linear = nn.Linear(784 if i == 0 else 100, 100)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity=activation)
        nn.init.zeros_(linear.bias)
        norm = [nn.LayerNorm(100)] if layer_norm else []
        layers += [linear, *norm, nn.ReLU() if activation == "relu" else nn.Tanh()]
    head = nn.Linear(100, 10)
    nn.init.kaiming_uniform_(head.weight, nonlinearity="linear")
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, head)


def start(activations: Sequence[str], arm: Arm, seed: int) -> tuple[nn.Sequential, PlasticityCallback | None]:
    """The network that a seed begins with, and the arm's method."""
    torch.manual_seed(seed)
    return make_network(activations, arm.layer_norm), arm.method(seed) if arm.method else None


def make_optimizer(model: nn.Module, arm: Arm) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.003, weight_decay=arm.weight_decay)


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: PlasticityCallback | None,
    images: Tensor,
    labels: Tensor,
    batch: int = 1,
) -> float:
    """One pass; returns the share of images that the network had right before it learned from them."""
    answers = []
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        scores = model(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores, y).backward()
        optimizer.step()
        if method is not None:
            method.step()
        answers.append(scores.detach())
    return float((torch.cat(answers).argmax(1) == labels).double().mean())


@torch.no_grad()
def measure(model: nn.Sequential, images: Tensor) -> dict[str, float]:
    """The state of the hidden layers, as means over them, and the size of all weights."""
    ranks, dead, x = [], [], images
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.ReLU | nn.Tanh):
            ranks.append(float(effective_rank(x)))
            dead.append(float(dead_units(x)))
    return {
        "effective_rank": sum(ranks) / len(ranks),
        "dead_units": sum(dead) / len(dead),
        "weight_magnitude": float(weight_magnitude(model)),
    }


def run(network: str, name: str, seed: int, tasks: int, digits: tuple[Tensor, Tensor], results: Path) -> None:
    images, labels = digits
    model, method = start(NETWORKS[network], ARMS[name], seed)
    optimizer = make_optimizer(model, ARMS[name])
    if method is not None:
        method.attach(model, optimizer, example_inputs=(images[:1],))
    orders = torch.Generator().manual_seed(seed)  # the same tasks for all arms
    for task in range(1, tasks + 1):
        pixels = torch.randperm(784, generator=orders)
        order = torch.randperm(len(images), generator=orders)
        x, y = images[order][:, pixels], labels[order]
        if (network, seed, task) == ("relu", 0, tasks):
            covariance = gradient_covariance(model, nn.functional.cross_entropy, x[:50], y[:50])
            np.save(covariance_file(results, name), covariance.numpy().astype("float32"))
        accuracy = learn(model, optimizer, method, x, y)
        row = {"network": network, "arm": name, "seed": seed, "task": task, "accuracy": accuracy}
        write_row(results.with_suffix(".csv"), [*KEY, *MEASURES], row | measure(model, x[:2000]))
    print(f"{network}, {name}, seed {seed}: {accuracy:.1%} in task {tasks}", flush=True)


def covariance_file(results: Path, arm: str) -> Path:
    folder = results.with_name(results.name + "_covariance")
    folder.mkdir(exist_ok=True)
    return folder / f"{arm}.npy"


# ---- what came out


def table(results: Curves, network: str, tasks: int) -> str:
    last = f"tasks {max(1, tasks - LAST_TASKS + 1)} to {tasks}"
    lines = [
        f"| arm | seeds | accuracy, task 1, % | {last}, % | all tasks, % | published | dead units, % | effective rank "
        "| weight magnitude |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in ARMS.items():
        seeds = results.seeds(network, name, last=tasks)
        if not seeds:
            continue
        curves = {m: results.of(network, name, times=range(1, tasks + 1), measure=m) for m in MEASURES}
        accuracy = 100 * curves["accuracy"]
        ends = {m: curve[:, -LAST_TASKS:].mean(1) for m, curve in curves.items()}
        cells = [
            name,
            str(len(seeds)),
            mean_and_std(accuracy[:, 0], 1),
            mean_and_std(100 * ends["accuracy"], 2),
            mean_and_std(accuracy.mean(1), 2),
            dict(arm.published).get(network, ""),
            mean_and_std(100 * ends["dead_units"], 1),
            mean_and_std(ends["effective_rank"], 1),
            mean_and_std(ends["weight_magnitude"], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


EXPLANATION = """Written by `permuted_mnist.py`. {images:,} digits a task, batch 1, SGD 0.003, {tasks} tasks, layers of
100 units. Accuracy is that on each image before it was learned from. Dead units (the share that is 0 for all of 2,000
images of the task; saturation of tanh does not count), effective rank (mean over the hidden layers) and the mean size
of the weights are taken after a task, as means over the last {last} tasks. ± is the standard deviation over seeds.
"Published" is the mean online accuracy in Purice 2025 (3 seeds, more tasks)."""


def report(results: Curves, tasks: int) -> str:
    parts = ["# Online permuted MNIST", EXPLANATION.format(images=TASK, tasks=tasks, last=LAST_TASKS)]
    for network, activations in NETWORKS.items():
        parts += [f"## {len(activations)} layers: {', '.join(activations)}", table(results, network, tasks)]
    return "\n\n".join(parts) + "\n"


# Colours of Okabe and Ito, that colour-blind readers can tell apart; line styles tell them apart without colour.
STYLES: dict[str, tuple[str, Any]] = {
    "plain": ("#000000", "-"),
    "ContinualBackprop": ("#0072B2", (0, (6, 1))),
    "ActivationReset auto": ("#D55E00", "-"),
    "ActivationReset relu": ("#D55E00", (0, (3, 1))),
    "ActivationReset tanh, rates 1e-5, 1e-6": ("#D55E00", ":"),
    "ActivationReset tanh, rates 1e-6, 1e-5": ("#56B4E9", "-"),
    "ActivationReset opposite": ("#999999", "-"),
    "SoftWeightRescaling": ("#009E73", "-."),
    "L2": ("#E69F00", (0, (1, 1))),
    "LayerNorm, L2": ("#CC79A7", (0, (4, 2, 1, 2))),
}

TITLES = {
    "accuracy": "online accuracy, %",
    "dead_units": "dead units, %",
    "weight_magnitude": "mean size of the weights",
    "effective_rank": "effective rank",
}


def smooth(curve: np.ndarray, width: int = 5) -> np.ndarray:
    """Means of so many tasks in a row."""
    return np.convolve(curve, np.ones(width) / width, "valid")


def draw_curves(results: Curves, network: str, tasks: int, picture: Path) -> None:
    from matplotlib import pyplot

    if tasks < 5 or not any(results.seeds(network, arm, last=tasks) for arm in STYLES):
        return
    # Where all units are tanh, none can be dead.
    state = "weight_magnitude" if set(NETWORKS[network]) == {"tanh"} else "dead_units"
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, measure in zip(axes, ("accuracy", state, "effective_rank"), strict=True):
        axis.set(xlabel="task", title=TITLES[measure])
        for arm, (colour, style) in STYLES.items():
            curves = results.of(network, arm, times=range(1, tasks + 1), measure=measure)
            if len(curves):
                scale = 100 if measure in ("accuracy", "dead_units") else 1
                y = scale * smooth(np.mean(curves, axis=0))
                [handles[arm]] = axis.plot(np.arange(3, 3 + len(y)), y, color=colour, linestyle=style)
    figure.suptitle(f"Online permuted MNIST, {len(NETWORKS[network])} layers: {', '.join(NETWORKS[network])}")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def draw_covariances(results: Path, tasks: int, picture: Path) -> None:
    """Heat maps of the gradients of 50 images, each against each, as the last task begins."""
    from matplotlib import pyplot

    files = {arm: covariance_file(results, arm) for arm in ARMS}
    maps = {arm: np.load(file) for arm, file in files.items() if file.exists()}
    if not maps:
        return
    rows = -(-len(maps) // 4)
    figure, axes = pyplot.subplots(rows, 4, figsize=(10, 2.7 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (arm, covariance) in zip(axes.flat, maps.items(), strict=False):
        shown = axis.imshow(covariance, cmap="PuOr", vmin=-1, vmax=1)
        axis.set_title(arm.replace(", ", ",\n", 1), fontsize=9)
    figure.colorbar(shown, ax=axes, label="cosine of two gradients", shrink=0.8)
    figure.suptitle(f"50 images as task {tasks} begins, relu network, seed 0")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def write_report(results: Path, tasks: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    found = Curves(results.with_suffix(".csv"), KEY)
    results.with_suffix(".md").write_text(report(found, tasks))
    for network in NETWORKS:
        draw_curves(found, network, tasks, results.with_name(f"{results.name}_{network}.png"))
    draw_covariances(results, tasks, results.with_name(results.name + "_covariance.png"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with mnist.npz or torchvision's MNIST")
    parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--arm", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("permuted_mnist"),
        help="where to write .csv, .md and pictures, without the ending",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is too small to gain from more
    digits = load_digits(options.data_dir)
    for seed in options.seed:
        for network in options.network:
            for arm in options.arm:
                done = Curves(options.results.with_suffix(".csv"), KEY).seeds(network, arm, last=options.tasks)
                if (network, arm) not in SKIPPED and seed not in done:
                    run(network, arm, seed, options.tasks, digits, options.results)
    write_report(options.results, options.tasks)


if __name__ == "__main__":
    main()
