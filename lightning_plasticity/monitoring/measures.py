"""The metrics of a monitor: what each of them measures, and their clones for each layer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plasticity.metrics import (
    Churn,
    DeadUnits,
    DistanceFromInit,
    DormantUnits,
    EffectiveRank,
    GradientCovariance,
    GradientDormancy,
    GradientNorm,
    UpdateRatio,
    WeightMagnitude,
    WeightNorm,
    ZeroGradientFraction,
)
from lightning_plasticity.metrics.base import PlasticityMetric, UnitMetric

Kind = Literal["features", "model", "gradients", "step", "inputs", "batch"]
_KINDS: dict[tuple[str, ...], Kind] = {
    ("features",): "features",
    ("model",): "model",
    ("model", "inputs"): "inputs",
    ("model", "inputs", "targets"): "batch",
}


def kind_of(name: str, metric: Metric) -> Kind:
    """What a metric measures, told by the names of the arguments of its ``update``.

    Example:
        >>> from lightning_plasticity.metrics import DeadUnits, UpdateRatio
        >>> kind_of("dead", DeadUnits()), kind_of("ratio", UpdateRatio())
        ('features', 'step')
    """
    if isinstance(metric, GradientNorm | GradientDormancy | ZeroGradientFraction):
        return "gradients"
    if isinstance(metric, UpdateRatio):
        return "step"
    arguments = tuple(inspect.signature(metric.update).parameters)
    if arguments not in _KINDS:
        raise ValueError(
            "A metric's update must take (features), (model), (model, inputs) or (model, inputs, targets), but that of "
            f"{name!r} takes ({', '.join(arguments)}). Update it in training_step, where its arguments are known, and "
            "log it there."
        )
    return _KINDS[arguments]


def named(metrics: Sequence[Metric] | Mapping[str, Metric] | None) -> dict[str, Metric]:
    """The prototypes by their names; None gives a cheap set that shows the usual signs of lost plasticity."""
    if metrics is None:
        metrics = [EffectiveRank(), DormantUnits(), DeadUnits(), WeightMagnitude(), WeightNorm(), DistanceFromInit()]
    if isinstance(metrics, Mapping):
        prototypes = dict(metrics)
    elif isinstance(metrics, Sequence):
        names = [type(metric).__name__ for metric in metrics]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(
                f"metrics must have different names, but {', '.join(sorted(repeated))} stands there more than once. "
                "Give a dict from names to metrics."
            )
        prototypes = dict(zip(names, metrics, strict=True))
    else:
        raise ValueError(
            f"metrics must be a list of metrics, a dict from names to metrics, or None, got {type(metrics).__name__}."
        )
    for name, metric in prototypes.items():
        if not isinstance(metric, Metric):
            raise ValueError(
                f"metrics must hold torchmetrics metrics, but {name!r} is of type {type(metric).__name__}."
            )
    if not prototypes:
        raise ValueError("metrics must hold at least one metric, got none. Leave it out for a default set.")
    return prototypes


class Measures:
    """All metrics of a monitor: clones of the prototypes, one for each layer where they measure features.

    Args:
        prototypes: the metrics by their names.
        synchronize: whether ranks measure different data, which belong together.
    """

    def __init__(self, prototypes: Mapping[str, Metric], *, synchronize: bool) -> None:
        self.prototypes = prototypes
        self._synchronize = synchronize
        self.device = torch.device("cpu")  # where metrics are made
        self._kinds = {name: kind_of(name, metric) for name, metric in prototypes.items()}
        self.clear()

    def clear(self) -> None:
        """Forgets everything that was measured, with the references of metrics that compare with an earlier moment."""
        self._metrics: dict[tuple[str, str], Metric] = {}  # by measure and layer; of the whole model: an empty layer
        self._saved: dict[str, dict[str, Any]] = {}

    def has(self, *kinds: Kind) -> bool:
        """Whether there is a metric of one of these kinds."""
        return any(kind in kinds for kind in self._kinds.values())

    def check_take_parts(self) -> None:
        """Raises for measures that cannot be taken of a model whose parameters are shared out among ranks."""
        for name, metric in self.prototypes.items():
            differentiates = isinstance(metric, PlasticityMetric) and not isinstance(metric, Churn)
            if differentiates and self._kinds[name] in ("inputs", "batch"):
                raise RuntimeError(
                    f"{type(metric).__name__} differentiates the model on a batch and needs whole parameters, but they "
                    f"are shared out among ranks (FSDP2 or tensor parallelism). Leave {name!r} out, or measure a model "
                    "on one device that has loaded the weights."
                )

    def of(self, kind: Kind, layer: str = "", unit_dim: int | None = None) -> list[Metric]:
        """The metrics of a kind, made when they are first needed."""
        return [self._get(name, layer, unit_dim) for name, its_kind in self._kinds.items() if its_kind == kind]

    def _get(self, name: str, layer: str, unit_dim: int | None) -> Metric:
        if (name, layer) not in self._metrics:
            metric = self.prototypes[name].clone()
            if not self._synchronize:
                metric.distributed_available_fn = _alone
            if isinstance(metric, UnitMetric) and unit_dim is not None:
                metric.unit_dim = unit_dim
            if f"{name}/{layer}" in self._saved:
                metric.load_state_dict(self._saved.pop(f"{name}/{layer}"))
            self._metrics[name, layer] = metric.to(self.device)
        return self._metrics[name, layer]

    def forget(self, *kinds: Kind) -> None:
        """Forgets what metrics of these kinds have measured since values were last taken."""
        for (name, _), metric in self._metrics.items():
            if self._kinds[name] in kinds:
                metric.reset()

    def take(self, seen: Mapping[tuple[str, str], int]) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
        """Values by measure and layer, and the matrices that some values sum up; then starts anew.

        Args:
            seen: how often each metric was updated, on all ranks; what was not has no value.
        """
        values: dict[str, dict[str, float]] = {}
        matrices: dict[str, Tensor] = {}
        for (name, layer), metric in self._metrics.items():
            if not seen[name, layer]:
                continue
            with warnings.catch_warnings():
                # data of another rank are data, too
                warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
                values.setdefault(name, {})[layer] = _number(name, metric.compute())
            if isinstance(metric, WeightNorm):
                values[name] |= {weight: float(norm) for weight, norm in metric.per_layer().items()}
            if isinstance(metric, GradientCovariance):
                matrices[name] = metric.matrix().cpu()
            metric.reset()
        return values, matrices

    def updates(self) -> dict[tuple[str, str], int]:
        """How often each metric was updated on this rank since values were last taken."""
        return {key: self._metrics[key].update_count for key in sorted(self._metrics)}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What metrics keep from one measurement to the next, by measure and layer."""
        states = {f"{name}/{layer}": dict(metric.state_dict()) for (name, layer), metric in self._metrics.items()}
        return {**self._saved, **{key: state for key, state in states.items() if state}}

    def load_state_dict(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Takes back what ``state_dict`` gave, also for metrics that are still to be made."""
        self.clear()
        self._saved = dict(states)


def _alone() -> bool:
    """What a metric is told of other ranks where all measure the same data."""
    return False


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"A metric's compute must give one number, but that of {name!r} gives {shape}.")
    return float(value)


def mean_and_layers(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What to log: ``plasticity/<measure>/<layer>``, and ``plasticity/<measure>`` of the model, or else the mean."""
    numbers = {}
    for name, by_layer in values.items():
        mean = torch.tensor(list(by_layer.values()), dtype=torch.float64).mean()
        numbers[f"plasticity/{name}"] = by_layer.get("", float(mean))
        numbers |= {f"plasticity/{name}/{layer}": value for layer, value in by_layer.items() if layer}
    return numbers
