"""Warm start: does a network that has learned half of the images learn less from all of them than a fresh one?

    python examples/benchmarks/warm_start.py --data-dir data

The experiment of Oh et al. 2025 (arXiv 2507.04683), smaller: a network trains on half of some images until it knows
them by heart, and then on all of them, with a new optimizer; "from scratch" trains on all of them only. `data` is a
folder with `mnist.npz` and `cifar10_small.npz`: arrays x_train and x_test (uint8, colours last), y_train and y_test.

A row of `warm_start.csv` is written after each run. A second call runs what is missing; several calls at once may share
the file with different `--network`, `--arm` or `--seeds`. Every call writes the table and the picture from all rows
that are there. Where a method has coefficients to choose from, each is tried in one run first, judged by images that
no run trains on.
"""

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_rows import read_rows, write_row
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity import (
    DirectionAwareShrink,
    HareAndTortoise,
    IsometryReinit,
    L2Init,
    LayerReset,
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

IMAGES = 4000  # to train on; half of them come first
POOL, VALIDATION = 8000, 2000  # training images of which each seed draws its own, and those that coefficients meet
HALF_EPOCHS, ALL_EPOCHS = 60, 30  # the same number of steps
BATCH = 64
LEARNING_RATE = 1e-3
TUNING, TUNING_SEED = "tuning", 100  # what stands in place of the seed in rows of runs that try a coefficient
NETWORKS = {"MNIST MLP": "mnist.npz", "CIFAR-10 CNN": "cifar10_small.npz", "CIFAR-10 CNN-BN": "cifar10_small.npz"}
KEY = ("network", "arm", "coefficient", "seed")
MEASURES = ("accuracy", "half_train", "half", "changed", "first_epoch", "seconds")

Images = tuple[Tensor, Tensor]  # with their labels
Coefficients = tuple[float, ...]
Method = Callable[[Coefficients, int], PlasticityCallback]  # made with a seed
MethodOnData = Callable[[Coefficients, int, Images], PlasticityCallback]


@dataclass(frozen=True)
class Arm:
    """One way to train: with a method from the start or with one that comes with all images, or with neither.

    ``grid`` has the coefficients to choose from; ``published`` is one for each network, without a choice.
    """

    from_the_start: Method | None = None
    with_new_images: MethodOnData | None = None
    grid: Sequence[Coefficients] = ((),)
    published: Sequence[Coefficients] = ()
    decays_weights: bool = False
    keeps_optimizer: bool = False
    is_warm: bool = True
    augments: bool = False

    def candidates(self, network: str) -> Sequence[Coefficients]:
        """The coefficients to choose from for a network."""
        return [self.published[list(NETWORKS).index(network)]] if self.published else self.grid

    def is_for(self, network: str) -> bool:
        """Digits are not to be mirrored."""
        return not (self.augments and network == "MNIST MLP")


def soft_weight_rescaling(coefficients: Coefficients, seed: int) -> PlasticityCallback:
    if len(coefficients) == 1:
        return SoftWeightRescaling(*coefficients, seed=seed)
    return SoftWeightRescaling(*coefficients, classifier="classifier", seed=seed)


def direction_aware_shrink(coefficients: Coefficients, seed: int, data: Images) -> PlasticityCallback:
    batches = list(zip(data[0].split(BATCH), data[1].split(BATCH), strict=True))
    return DirectionAwareShrink(
        *coefficients,
        data=batches,
        loss=lambda network, batch: F.cross_entropy(network(batch[0]), batch[1]),
        on_fit_start=True,
        seed=seed,
    )


ARMS = {
    "from scratch": Arm(is_warm=False),
    "plain": Arm(),
    "L2": Arm(decays_weights=True, grid=[(1e-4,), (1e-3,), (1e-2,)]),
    "L2Init": Arm(
        lambda coefficients, seed: L2Init(*coefficients, seed=seed),
        grid=[(0.1,), (0.3,), (1.0,)],
    ),
    "ShrinkAndPerturb": Arm(
        with_new_images=lambda coefficients, seed, _: ShrinkAndPerturb(
            1 - coefficients[0], coefficients[0], on_fit_start=True, init="reset_parameters", seed=seed
        ),
        grid=[(0.2,), (0.4,), (0.6,)],
    ),
    "head reset": Arm(
        with_new_images=lambda _, seed, __: LayerReset(
            "classifier.output", on_fit_start=True, init="reset_parameters", seed=seed
        )
    ),
    "SoftWeightRescaling": Arm(soft_weight_rescaling, published=[(1e-4,), (1e-3,), (1e-4, 1.0)]),
    # A new optimizer when the images come, as all others have it, is what OptimizerReset(on_fit_start=True) gives.
    "plain, optimizer kept": Arm(keeps_optimizer=True),
    "IsometryReinit": Arm(with_new_images=lambda _, seed, __: IsometryReinit(on_fit_start=True, seed=seed)),
    "IsometryReinit, exact": Arm(
        with_new_images=lambda _, seed, __: IsometryReinit(exact=True, on_fit_start=True, seed=seed)
    ),
    "DirectionAwareShrink": Arm(
        with_new_images=direction_aware_shrink, grid=[(0.3, 0.3), (0.3, 0.05), (0.1, 0.3), (0.1, 0.05)]
    ),
    # Hands over every ten epochs, of the first half or of all images. What is judged at the end is the slow weights.
    "HareAndTortoise": Arm(
        lambda coefficients, seed: HareAndTortoise(every_n_train_steps=int(coefficients[0]), seed=seed),
        grid=[(320,), (630,)],
    ),
    "SoftWeightRescaling of NaP": Arm(lambda _, seed: SoftWeightRescaling(1.0, biases="keep", seed=seed)),
    "ParsevalRegularization": Arm(
        lambda coefficients, seed: ParsevalRegularization(*coefficients, seed=seed), grid=[(0.01,), (0.1,), (1.0,)]
    ),
    "SpectralRegularization": Arm(
        lambda coefficients, seed: SpectralRegularization(*coefficients, seed=seed), grid=[(0.01,), (0.1,), (1.0,)]
    ),
    "WeightClipping": Arm(lambda coefficients, seed: WeightClipping(*coefficients, seed=seed), grid=[(1,), (2,), (3,)]),
    "L2Init, sorted": Arm(
        lambda coefficients, seed: L2Init(*coefficients, match="sorted", seed=seed), grid=[(0.1,), (0.3,), (1.0,)]
    ),
    # The others with a threshold or a strength, and how many steps lie between: all are some 3,800.
    "ReDo by gradient": Arm(
        lambda coefficients, seed: ReDo(coefficients[0], int(coefficients[1]), score="gradient", seed=seed),
        grid=[(0.01, 1000), (0.1, 1000), (0.1, 100)],
    ),
    # The authors' 20,000 and 100 examples, in steps.
    "SelfNormalizedReset": Arm(
        lambda coefficients, seed: SelfNormalizedReset(
            *coefficients, every_n_train_steps=320, min_silence=2, max_silence=20_000 // BATCH, seed=seed
        ),
        grid=[(0.08,), (0.02,)],
    ),
    "PartialReset": Arm(
        lambda coefficients, seed: PartialReset(coefficients[0], int(coefficients[1]), seed=seed),
        grid=[(0.015, 1000), (0.015, 100), (0.15, 1000)],
    ),
    "SelectiveReinit as published": Arm(
        lambda coefficients, seed: SelectiveReinit.as_published(
            relative_threshold=coefficients[0], every_n_train_steps=int(coefficients[1]), seed=seed
        ),
        grid=[(5e-4, 128), (5e-4, 1024), (5e-3, 128)],
    ),
    "from scratch, augmented": Arm(is_warm=False, augments=True),
    "plain, augmented": Arm(augments=True),
}


# ---- networks and images


def make_network(name: str) -> nn.Sequential:
    if name == "MNIST MLP":
        features, width = nn.Sequential(nn.Flatten()), 784
    else:
        norm = nn.BatchNorm2d if name.endswith("BN") else nn.Identity
        features, width = nn.Sequential(
            nn.Conv2d(3, 16, 5), norm(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 5), norm(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        ), 400  # fmt: skip
    classifier = OrderedDict(hidden=nn.Linear(width, 100), relu=nn.ReLU(), output=nn.Linear(100, 10))
    network = nn.Sequential(OrderedDict(features=features, classifier=nn.Sequential(classifier)))
    return network.to(memory_format=torch.channels_last)  # twice as fast


@dataclass(frozen=True)
class Data:
    """The images of a data set, between -1 and 1."""

    pool: Images
    validation: Images
    test: Images

    @staticmethod
    def load(file: Path) -> "Data":
        """From arrays of bytes, colours last; grey ones have no colours."""
        with np.load(file) as arrays:
            parts = {name: torch.from_numpy(arrays[name]) for name in ("x_train", "y_train", "x_test", "y_test")}

        def of(split: str, part: slice) -> Images:
            images = parts[f"x_{split}"][part].float() / 127.5 - 1
            with_colours = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
            return with_colours.contiguous(memory_format=torch.channels_last), parts[f"y_{split}"][part].long()

        everything = slice(None)
        return Data(of("train", slice(POOL)), of("train", slice(POOL, POOL + VALIDATION)), of("test", everything))

    def draw(self, seed: int) -> Images:
        """The images that a seed trains on."""
        chosen = torch.randperm(len(self.pool[1]), generator=torch.Generator().manual_seed(seed))[:IMAGES]
        images, labels = self.pool
        return images[chosen], labels[chosen]


def augment(images: Tensor) -> Tensor:
    """Each image moved by up to four pixels in both directions, and every other one mirrored."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4), value=-1)  # black
    down, right = torch.randint(9, (2, count, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    each = torch.arange(count)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


# ---- a run


def make_optimizer(network: nn.Module, arm: Arm, coefficients: Coefficients) -> torch.optim.Optimizer:
    decay = coefficients[0] if arm.decays_weights else 0.0
    return torch.optim.Adam(network.parameters(), LEARNING_RATE, weight_decay=decay, fused=True)


def train(
    network: nn.Module,
    data: Images,
    epochs: int,
    arm: Arm,
    method: PlasticityCallback | None,
    optimizer: torch.optim.Optimizer,
    watch: Callable[[int], None] = lambda _: None,
) -> None:
    """Train; ``watch`` is called before the first epoch and after each, with their number."""
    images, labels = data
    network.train()
    if method is not None:
        method.attach(network, optimizer, example_inputs=(images[:BATCH],))
    watch(0)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(labels)).split(BATCH):
            x = augment(images[batch]) if arm.augments else images[batch]
            loss = F.cross_entropy(network(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if method is not None:
                method.step()
        watch(epoch)
    if method is not None:
        method.detach()  # it remembers what it needs when it is attached again


@torch.no_grad()
def accuracy(network: nn.Module, data: Images) -> float:
    images, labels = data
    network.eval()
    right = [(network(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    network.train()
    return int(sum(right)) / len(labels)


def run(name: str, arm: Arm, coefficients: Coefficients, seed: int, data: Data, judges: Images) -> dict[str, Any]:
    """Train once; all accuracies but one are those on the images that judge."""
    started = time.perf_counter()
    everything = data.draw(seed)
    half = everything[0][: IMAGES // 2], everything[1][: IMAGES // 2]
    torch.manual_seed(seed)
    network = make_network(name)
    optimizer = make_optimizer(network, arm, coefficients)
    measured: dict[str, float] = {}
    method = arm.from_the_start(coefficients, seed) if arm.from_the_start else None
    if arm.is_warm:
        train(network, half, HALF_EPOCHS, arm, method, optimizer)
        measured |= {"half_train": accuracy(network, half), "half": accuracy(network, judges)}
    if arm.with_new_images is not None:
        method = arm.with_new_images(coefficients, seed, everything)

    def watch(epoch: int) -> None:
        if arm.is_warm and epoch < 2:
            measured["first_epoch" if epoch else "changed"] = accuracy(network, judges)

    torch.manual_seed(seed)  # the same order of the images for all arms
    if not arm.keeps_optimizer:
        optimizer = make_optimizer(network, arm, coefficients)
    train(network, everything, ALL_EPOCHS, arm, method, optimizer, watch)
    if isinstance(method, HareAndTortoise):
        network.load_state_dict(method.slow_state(), strict=False)
    return measured | {"accuracy": accuracy(network, judges), "seconds": time.perf_counter() - started}


# ---- rows


def text(coefficients: Coefficients) -> str:
    return ", ".join(f"{x:g}" for x in coefficients)


class Results:
    """All rows."""

    def __init__(self, file: Path) -> None:
        self._rows = read_rows(file, KEY)

    def find(self, network: str, arm: str, coefficients: Coefficients, seed: int | str) -> dict[str, str] | None:
        """The row of a run, if there is one."""
        return self._rows.get((network, arm, text(coefficients), str(seed)))

    def tried(self, network: str, arm: str) -> dict[Coefficients, float]:
        """The accuracy that each coefficient reached when it was tried."""
        rows = {x: self.find(network, arm, x, TUNING) for x in ARMS[arm].candidates(network)}
        return {coefficients: float(row["accuracy"]) for coefficients, row in rows.items() if row}

    def chosen(self, network: str, arm: str) -> Coefficients:
        """The best of the coefficients that were tried, or those that there is no choice about."""
        tried = self.tried(network, arm)
        return max(tried, key=tried.__getitem__) if tried else ARMS[arm].candidates(network)[0]

    def of(self, network: str, arm: str, measure: str) -> dict[int, float]:
        """A measure by seed."""
        wanted = (network, arm, text(self.chosen(network, arm)))
        rows = {int(key[3]): row for key, row in self._rows.items() if key[:3] == wanted and key[3] != TUNING}
        return {seed: float(rows[seed][measure]) for seed in sorted(rows) if rows[seed][measure]}


# ---- what came out


EXPLANATION = """Written by `warm_start.py`. {images:,} images a seed, drawn from {pool:,}: half of them for
{half_epochs} epochs and then all of them for {all_epochs} (from scratch: only that); Adam with step size {rate:g}, new
when the images come, batch {batch}. Accuracies are those on test images, in percent, as mean ± standard deviation over
seeds: at the end; its difference from the same seed's from scratch (from the one that is augmented too, where the arm
is); before the new images; right after the method did what it does when they come; and one epoch later. "By heart" is
the accuracy on the first half before the others come."""


def percent(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    std = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{sign}.1f}{std}"


def table(results: Results, network: str) -> str:
    lines = [
        "| arm | coefficient | seeds | accuracy | against scratch | by heart | before | right after "
        "| one epoch later |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in ARMS.items():
        found = {measure: results.of(network, name, measure) for measure in MEASURES}
        end, reference = found["accuracy"], "from scratch, augmented" if arm.augments else "from scratch"
        if not end:
            continue
        fresh = results.of(network, reference, "accuracy")
        differences = [end[seed] - fresh[seed] for seed in end if seed in fresh and name != reference]
        on_the_way = [percent([*found[m].values()]) for m in ("half_train", "half", "changed", "first_epoch")]
        coefficients = text(results.chosen(network, name))
        cells = [name, coefficients, str(len(end)), percent([*end.values()]), percent(differences, "+")]
        lines.append(f"| {' | '.join([*cells, *on_the_way])} |")
    return "\n".join(lines)


def tuning_table(results: Results) -> str:
    """What each coefficient reached."""
    lines = ["| network | arm | accuracy by coefficient | chosen |", "|---|---|---|---:|"]
    for network in NETWORKS:
        for arm in ARMS:
            if tried := results.tried(network, arm):
                reached = "; ".join(f"{text(x)}: {100 * accuracy:.1f}" for x, accuracy in tried.items())
                lines.append(f"| {network} | {arm} | {reached} | {text(results.chosen(network, arm))} |")
    return "\n".join(lines)


def report(results: Results) -> str:
    explanation = EXPLANATION.format(
        images=IMAGES, pool=POOL, half_epochs=HALF_EPOCHS, all_epochs=ALL_EPOCHS, rate=LEARNING_RATE, batch=BATCH
    )
    parts = ["# Warm start", explanation]
    for network in NETWORKS:
        parts += [f"## {network}", table(results, network)]
    tried = f"One run each, with a seed of its own, judged by {VALIDATION:,} training images that no run trains on."
    return "\n\n".join([*parts, "## How coefficients were chosen", tried, tuning_table(results)]) + "\n"


def draw(results: Results, picture: Path) -> None:
    """The accuracy at the end: a point for each seed, a bar for the mean; and lines at the means from scratch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in ARMS if any(results.of(network, name, "accuracy") for network in NETWORKS)]
    size = (8, 1.2 + 0.25 * len(shown))
    figure, axes = pyplot.subplots(1, len(NETWORKS), figsize=size, sharey=True, layout="constrained")
    for axis, network in zip(axes, NETWORKS, strict=True):
        for place, name in enumerate(shown):
            arm = ARMS[name]
            end = [100 * x for x in results.of(network, name, "accuracy").values()]
            if not end:
                continue
            # Colours of Okabe and Ito, that colour-blind readers can tell apart; the style tells them apart without.
            colour, style = ("#D55E00", ":") if arm.augments else ("#0072B2", "--")
            axis.plot(end, [place] * len(end), "o", color=colour, alpha=0.5, markersize=5, markeredgewidth=0)
            axis.plot(np.mean(end), place, "|", color="black", markersize=14, markeredgewidth=2)
            if not arm.is_warm:
                axis.axvline(np.mean(end), color=colour, linestyle=style, linewidth=1)
        axis.set(title=network, xlabel="test accuracy, %")
    axes[0].set_yticks(range(len(shown)), shown)
    axes[0].invert_yaxis()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with mnist.npz and cifar10_small.npz")
    parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--arm", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--results", type=Path, default=Path("warm_start"), help="where to write .csv, .md and .png, without the ending"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the networks are too small to gain from more
    csv_file = options.results.with_suffix(".csv")
    loaded = {file: Data.load(options.data_dir / file) for file in {NETWORKS[network] for network in options.network}}
    arms = [(network, arm) for network in options.network for arm in options.arm if ARMS[arm].is_for(network)]

    def run_if_missing(network: str, arm: str, coefficients: Coefficients, seed: int | str) -> None:
        if Results(csv_file).find(network, arm, coefficients, seed):
            return
        data, is_tuning = loaded[NETWORKS[network]], seed == TUNING
        judges = data.validation if is_tuning else data.test
        measured = run(network, ARMS[arm], coefficients, TUNING_SEED if is_tuning else int(seed), data, judges)
        row = {"network": network, "arm": arm, "coefficient": text(coefficients), "seed": seed}
        write_row(csv_file, [*KEY, *MEASURES], row | measured)
        print(f"{', '.join(map(str, row.values()))}: {measured['accuracy']:.1%}", flush=True)

    for network, arm in arms:
        candidates = ARMS[arm].candidates(network)
        for coefficients in candidates if len(candidates) > 1 else ():
            run_if_missing(network, arm, coefficients, TUNING)
    for seed in options.seeds:
        for network, arm in arms:
            run_if_missing(network, arm, Results(csv_file).chosen(network, arm), seed)
    found = Results(csv_file)
    options.results.with_suffix(".md").write_text(report(found))
    draw(found, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
