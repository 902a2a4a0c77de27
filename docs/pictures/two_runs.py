"""Draws docs/pictures/two_runs.png: a run that loses its ability to learn, one that does not, and what is seen of it.

    python docs/pictures/two_runs.py

Both are the network and the stream of tasks of `examples/monitor.py`; the second has Continual Backprop beside the
monitor. It prints the numbers that docs/loss_of_plasticity.md tells. Two to four minutes on one core.
"""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
# Before the imports below, of which the first is from there.
sys.path.insert(0, str(HERE.parents[1] / "examples"))

from monitor import DigitsStream, overall  # noqa: E402

from lightning_plasticity import ContinualBackprop, PlasticityMonitor  # noqa: E402
from lightning_plasticity.metrics import DeadUnits, EffectiveRank, WeightNorm  # noqa: E402

TASKS, EVERY = 100, 5
RUNS = {"plain": [], "with ContinualBackprop": [ContinualBackprop]}
LABELS = {
    "DeadUnits": "dead units",
    "EffectiveRank": "effective rank",
    "WeightNorm": "norm of weights",
}
COLOURS = {
    "plain": "#D55E00",
    "with ContinualBackprop": "#0072B2",
}  # which colour-blind readers tell apart


def run(methods: list[type[pl.Callback]]) -> tuple[list[float], dict[str, list[float]]]:
    """The accuracy on each task, and what the monitor saw after every fifth."""
    pl.seed_everything(0, verbose=False)
    model = DigitsStream()
    monitor = PlasticityMonitor(
        [DeadUnits(), EffectiveRank(), WeightNorm()],
        every_n_epochs=EVERY,
        probe_batch=(model.images[:500], model.labels[:500]),
    )
    trainer = pl.Trainer(
        max_epochs=TASKS,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        callbacks=[monitor, *(method() for method in methods)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    return model.accuracies, {
        name: [overall(values) for _, values in seen]
        for name, seen in monitor.history.items()
    }


def main() -> None:
    torch.set_num_threads(1)  # the network is too small to gain from more
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(4, sharex=True)
    for name, methods in RUNS.items():
        accuracies, seen = run(methods)
        smooth = 100 * np.convolve(accuracies, np.full(10, 0.1), mode="valid")
        print(
            f"{name}: accuracy, tasks 1 to 10 {smooth[0]:.1f} %, 91 to 100 {smooth[-1]:.1f} %"
        )
        panels[0].plot(
            np.arange(len(smooth)) + 10, smooth, color=COLOURS[name], label=name
        )
        for axes, measure in zip(panels[1:], LABELS, strict=True):
            values = seen[measure]
            print(
                f"{name}: {measure}, after task {EVERY} {values[0]:.2f}, after task {TASKS} {values[-1]:.2f}"
            )
            axes.plot(
                EVERY * (np.arange(len(values)) + 1), values, ".-", color=COLOURS[name]
            )
    for axes, label in zip(
        panels, ["accuracy on\nnew images, %", *LABELS.values()], strict=True
    ):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    panels[-1].set_xlabel("task")
    figure.savefig(HERE / "two_runs.png", dpi=90)


if __name__ == "__main__":
    main()
