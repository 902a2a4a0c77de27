"""Watch a network lose its ability to learn: in TensorBoard, and in pictures.

Each task shows the handwritten digits that come with scikit-learn once, with the pixels in a new random order. Every
task is as hard as any other, and yet the network learns the later ones less well: its accuracy falls, and meanwhile
hidden units die, features lose rank and weights grow. `PlasticityMonitor` is handed to the Trainer, which knows nothing
else of plasticity. It takes one to two minutes:

    python examples/monitor.py
    tensorboard --logdir lightning_logs

`--pictures FOLDER` also keeps one picture of each kind.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import PlasticityMonitor
from lightning_plasticity.metrics import (
    DeadUnits,
    DistanceFromInit,
    DormantUnits,
    EffectiveRank,
    GradientCovariance,
    OnlineAccuracy,
    WeightNorm,
)

BATCH_SIZE = 8
LEARNING_RATE = 0.1  # of 0.025, 0.05, 0.1 and 0.2 the one with which a fresh network learns its first task best
EVERY = 5  # tasks between two measurements


class DigitsStream(pl.LightningModule):
    """A network without anything about plasticity, and the accuracy with which it meets each task."""

    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        self.images, self.labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        widths = (64, 100, 100, 100)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(100, 10))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.accuracy = OnlineAccuracy()
        self.accuracies: list[float] = []  # of each task

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.net(images)

    def train_dataloader(self) -> DataLoader:
        """A task for each epoch: the Trainer asks for new data before each."""
        images = self.images[:, torch.randperm(64)]
        return DataLoader(TensorDataset(images, self.labels), BATCH_SIZE, shuffle=True, drop_last=True)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # noqa: D102
        images, labels = batch
        scores = self(images)
        self.accuracy.update(scores, labels)  # each image is judged before it is learned from
        return nn.functional.cross_entropy(scores, labels)

    def on_train_epoch_end(self) -> None:  # noqa: D102
        self.accuracies.append(float(self.accuracy.compute()))
        self.accuracy.reset()
        self.log("online_accuracy", self.accuracies[-1])
        if len(self.accuracies) % 10 == 0:
            print(f"tasks up to {len(self.accuracies):3}: {np.mean(self.accuracies[-10:]):6.1%}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def overall(values: dict[str, float]) -> float:
    """A measure's value for the whole network: its own, or the mean over layers."""
    return values.get("", sum(values.values()) / len(values))


def draw(accuracies: list[float], monitor: PlasticityMonitor) -> Figure:
    """The accuracy and, below it on the same tasks, what the monitor saw."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, *others = figure.subplots(4, sharex=True)
    window = min(10, len(accuracies))
    mean = np.convolve(accuracies, np.full(window, 1 / window), mode="valid")
    top.plot(np.arange(len(accuracies)) + 1, accuracies, ".", color="0.7", label="each task")
    top.plot(np.arange(len(mean)) + window, mean, color="#D55E00", label=f"mean of {window} tasks")
    top.set_ylabel("online accuracy")
    top.legend(loc="lower left")
    titles = {"DeadUnits": "dead units (share)", "EffectiveRank": "effective rank", "WeightNorm": "norm of weights"}
    for axes, (name, title) in zip(others, titles.items(), strict=True):
        values = [overall(values) for _, values in monitor.history[name]]
        axes.plot(EVERY * (np.arange(len(values)) + 1), values, "o-", color="#0072B2", markersize=4)
        axes.set_ylabel(title)
    others[-1].set_xlabel("task")
    for axes in (top, *others):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--pictures", type=Path, help="a folder for one picture of each kind")
    options = parser.parse_args()
    if options.tasks < EVERY:
        parser.error(f"--tasks must be at least {EVERY}, the tasks between two measurements, got {options.tasks}.")
    torch.set_num_threads(1)  # the network is too small to gain from more
    torch.manual_seed(0)
    model = DigitsStream()
    monitor = PlasticityMonitor(
        [DeadUnits(), DormantUnits(), EffectiveRank(), WeightNorm(), DistanceFromInit(), GradientCovariance()],
        every_n_epochs=EVERY,
        # the same digits each time, with pixels in their own order, so that what changes is the network
        probe_batch=(model.images[:100], model.labels[:100]),
    )
    loggers = [TensorBoardLogger("."), CSVLogger(".")]  # both write to ./lightning_logs
    trainer = pl.Trainer(
        max_epochs=options.tasks,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        callbacks=[monitor],
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    print("Online accuracy, mean of ten tasks")
    trainer.fit(model)

    print(f"\n{'after task':20}{EVERY:>10}{len(monitor.history['DeadUnits']) * EVERY:>10}")
    for name, records in monitor.history.items():
        print(f"{name:20}{overall(records[0][1]):10.3f}{overall(records[-1][1]):10.3f}")
    folder = Path(loggers[1].log_dir) / "plasticity"
    draw(model.accuracies, monitor).savefig(folder / "overview.png", dpi=100)
    print(f"TensorBoard: {loggers[0].log_dir}\nPictures: {', '.join(str(path) for path in sorted(folder.iterdir()))}")
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        kinds = {"overview": "overview", "curves": "EffectiveRank", "heat_map": "GradientCovariance"}
        for kind, name in kinds.items():
            (options.pictures / f"{kind}.png").write_bytes((folder / f"{name}.png").read_bytes())
        _, last_values = monitor.history["DeadUnits"][-1]
        figure, _ = DeadUnits().plot({layer: torch.tensor(value) for layer, value in last_values.items()})
        figure.savefig(options.pictures / "bars.png")


if __name__ == "__main__":
    main()
