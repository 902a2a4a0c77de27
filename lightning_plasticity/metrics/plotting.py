"""Pictures of values: bars, curves and heat maps. Matplotlib is imported when something is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_plasticity import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plotted = Tensor | Mapping[str, Tensor] | Sequence[Tensor] | Sequence[Mapping[str, Tensor]]


def draw(
    values: Plotted,
    ax: "Axes | None" = None,
    *,
    name: str,
    x_label: str = "step",
    low: float | None = None,
    high: float | None = None,
) -> "tuple[Figure, Axes]":
    """Draw a value as a bar, values by name as bars, a sequence as curves, a matrix as a heat map from -1 to 1.

    Args:
        values: what to draw.
        ax: where; None makes a new figure.
        name: of the measure.
        x_label: what a sequence counts.
        low: the least value that the measure can take, if there is one.
        high: the greatest.
    """
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    _check(values)
    if ax is not None and not isinstance(ax, Axes):
        raise ValueError(f"ax must be axes of matplotlib or None, got {checks.shown(ax)}. Take them from subplots().")
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    figure = ax.figure.figure  # of a subfigure the whole figure, of a figure itself
    if isinstance(values, Tensor) and values.ndim == 2:
        _heat_map(values, ax)
        ax.set_title(name)
    elif isinstance(values, (Mapping, int, float)) or (isinstance(values, Tensor) and values.ndim == 0):
        _bars(values if isinstance(values, Mapping) else {"": values}, ax)
        ax.set(xlabel=name, xlim=_widened(low, high, *ax.get_xlim()))
    else:
        _curves(values, ax)
        ax.set(xlabel=x_label, ylabel=name, ylim=_widened(low, high, *ax.get_ylim()))
    return figure, ax


def _check(values: object) -> None:
    """Raise unless it is a number, numbers by name, a matrix, or one or more of the first two."""
    if isinstance(values, Tensor) and values.ndim in (1, 2):
        steps: list[object] = [] if values.numel() else [values]
    else:
        steps = list(values) if isinstance(values, (list, tuple)) else [values]
    for step in steps:
        for value in step.values() if isinstance(step, Mapping) and step else [step]:
            if not (isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)):
                raise ValueError(
                    f"Numbers are required to plot, alone, by name or in a list, got {checks.shown(value)}. Pass what "
                    "compute() returned, or a list of such values."
                )


def _widened(low: float | None, high: float | None, seen_low: float, seen_high: float) -> tuple[float, float]:
    """Limits that show the measure's bounds, with room for a line that lies on one."""
    bottom = seen_low if low is None else low
    top = seen_high if high is None else high
    room = 0.03 * (top - bottom)
    return (bottom if low is None else low - room), (top if high is None else high + room)


def _bars(values: Mapping[str, Tensor], ax: "Axes") -> None:
    bars = ax.barh(list(values), [float(value) for value in values.values()])
    ax.bar_label(bars, fmt="%.4g", padding=3)
    ax.invert_yaxis()  # the first layer on top
    ax.margins(x=0.15, y=0.5 / len(values))  # room for the numbers, and around a single bar


def _curves(values: Tensor | Sequence[Tensor] | Sequence[Mapping[str, Tensor]], ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    if len(values) == 0:
        raise ValueError("At least one value is required to plot, got none: pass the values that `compute` returned.")
    curves: dict[str, list[float]] = {}
    for step in values:
        for label, value in (step if isinstance(step, Mapping) else {"": step}).items():
            curves.setdefault(label, []).append(float(value))
    for label, curve in curves.items():
        ax.plot(curve, marker=".", label=label)
    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(curves):
        ax.legend()


def _heat_map(matrix: Tensor, ax: "Axes") -> None:
    image = ax.imshow(matrix.detach().to("cpu", torch.float64).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    ax.figure.colorbar(image, ax=ax)
    ax.set(xlabel="example", ylabel="example")
