"""Pictures of what was measured, and the loggers that take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plasticity.metrics.plotting import Plotted, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = tuple[int, dict[str, float]]  # the step, and the values by name of layer; of a single value the name is empty


def picture(name: str, metric: Metric, history: Sequence[Record], matrix: Tensor | None = None) -> Figure:
    """Draws a matrix as a heat map, one measurement as bars, several as curves over the training steps."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")  # not pyplot's, which keeps every figure and may open windows
    axes = figure.subplots()
    labels = list(dict.fromkeys(label for _, values in history for label in values))
    labels = [label for label in labels if label] or labels  # by layer where there are layers
    rows = [{label: torch.tensor(values.get(label, float("nan"))) for label in labels} for _, values in history]
    shown: Plotted = matrix if matrix is not None else rows[0] if len(rows) == 1 else rows
    draw(shown, axes, name=name, low=metric.plot_lower_bound, high=metric.plot_upper_bound)
    for line in axes.lines:
        line.set_xdata([step for step, _ in history])
    axes.relim()
    axes.autoscale_view(scaley=False)
    return figure


def send_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Gives a figure to a logger that takes figures; beside a CSV logger's table it becomes a PNG file."""
    for base in type(logger).__mro__:
        # By name: `lightning` and `pytorch_lightning` have loggers of their own, and need not both be installed.
        if base.__name__ in _SENDERS:
            _SENDERS[base.__name__](logger, name, figure, step)
            return


def _to_tensorboard(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.experiment.add_figure(f"plasticity/{name}", figure, global_step=step)


def _to_wandb(logger: Any, name: str, figure: Figure, step: int) -> None:
    # Another name than the number's: W&B keeps one kind of value under each.
    logger.log_image(f"plasticity_figures/{name}", [figure], step=step)


def _to_mlflow(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"plasticity/{name}.png")


def _to_png(logger: Any, name: str, figure: Figure, step: int) -> None:
    path = Path(logger.log_dir) / "plasticity" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


_SENDERS: dict[str, Callable[[Any, str, Figure, int], None]] = {
    "TensorBoardLogger": _to_tensorboard,
    "WandbLogger": _to_wandb,
    "MLFlowLogger": _to_mlflow,
    "CSVLogger": _to_png,
}


def send_numbers(logger: Any, numbers: Mapping[str, float], step: int) -> None:
    """Gives numbers to a logger.

    Where MLflow writes to files, a number's name is a file's, and cannot be the folder of others as well: there that
    of all layers, ``plasticity/<measure>``, is called ``plasticity/<measure>/all``.
    """
    is_mlflow = any(base.__name__ == "MLFlowLogger" for base in type(logger).__mro__)
    if is_mlflow and urlparse(logger.experiment.tracking_uri).scheme in ("", "file"):
        folders = {name.rsplit("/", 1)[0] for name in numbers}
        numbers = {f"{name}/all" if name in folders else name: number for name, number in numbers.items()}
    logger.log_metrics(dict(numbers), step=step)
