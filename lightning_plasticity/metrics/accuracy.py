"""Accuracy on a stream of tasks."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_plasticity import checks
from lightning_plasticity.functional.accuracy import accuracy_slope, correct_predictions
from lightning_plasticity.metrics.base import PlasticityMetric
from lightning_plasticity.metrics.plotting import Plotted


class OnlineAccuracy(PlasticityMetric):
    """Share of correct predictions, each made before the network was trained on that example.

    Update with the scores that the training step's forward pass gave. A row of scores that contains NaN counts as
    wrong.

    Args:
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import OnlineAccuracy
        >>> metric = OnlineAccuracy()
        >>> metric.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    Reference:
        S. Dohare et al., "Loss of plasticity in deep continual learning", Nature 632, 2024.
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Take in scores ``(N, C, ...)`` or classes ``(N, ...)``, and the true classes ``(N, ...)``."""
        self.correct = self.correct + correct_predictions(predictions, targets).sum()
        self.total = self.total + targets.numel()

    def compute(self) -> Tensor:
        """Accuracy over all examples since the last reset; NaN without examples."""
        return self.correct.double() / self.total


class TaskAccuracy(PlasticityMetric):
    """Online accuracy of each task: its mean over the tasks, or its slope, the change from one task to the next.

    ``per_task`` gives the accuracy of each, and ``plot`` draws these. Every task counts the same, whatever its length.
    A falling slope is what loss of plasticity looks like from outside.

    Args:
        summary: ``"mean"`` or ``"slope"`` (of the least-squares line; NaN with fewer than two tasks).
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import TaskAccuracy
        >>> metric = TaskAccuracy()
        >>> metric.update(torch.tensor([1, 1]), torch.tensor([1, 1]), task=0)
        >>> metric.update(torch.tensor([1, 0]), torch.tensor([1, 1]), task=1)
        >>> metric.compute(), metric.per_task()
        (tensor(0.7500, dtype=torch.float64), tensor([1.0000, 0.5000], dtype=torch.float64))

    Reference:
        S. Dohare et al., "Loss of plasticity in deep continual learning", Nature 632, 2024.
    """

    higher_is_better: bool | None = True
    # Batches of different tasks have states of different sizes, which a plain sum could not merge.
    full_state_update: bool | None = True
    plot_x_label: ClassVar[str] = "task"
    correct_by_task: Tensor
    total_by_task: Tensor

    def __init__(self, summary: Literal["mean", "slope"] = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.summary = checks.choice("summary", summary, ("mean", "slope"))
        self.add_state("correct_by_task", torch.zeros(1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total_by_task", torch.zeros(1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor, task: int) -> None:
        """Take in predictions and targets, as for :class:`OnlineAccuracy`, of the task of this number, from 0."""
        task = checks.count("task", task)
        correct = correct_predictions(predictions, targets).sum()
        missing = max(0, task + 1 - len(self.total_by_task))
        at_task = torch.arange(len(self.total_by_task) + missing, device=self.total_by_task.device) == task
        self.correct_by_task = pad(self.correct_by_task, (0, missing)) + at_task * correct
        self.total_by_task = pad(self.total_by_task, (0, missing)) + at_task * targets.numel()

    def compute(self) -> Tensor:
        """Mean or slope over the tasks since the last reset, without those that had no examples; NaN without any."""
        accuracies = self._per_task()
        return accuracy_slope(accuracies) if self.summary == "slope" else accuracies.nanmean()

    def per_task(self) -> Tensor:
        """Accuracy of each task, of all ranks; NaN for a task without examples."""
        return self.synchronized(self._per_task)

    def _per_task(self) -> Tensor:
        return self.correct_by_task.double() / self.total_by_task

    def _plotted(self) -> Plotted:
        return self.per_task()
