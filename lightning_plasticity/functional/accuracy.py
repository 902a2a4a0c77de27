"""Accuracy on a stream of tasks, and its slope over the tasks."""

import torch
from torch import Tensor

from lightning_plasticity import checks


def correct_predictions(predictions: Tensor, targets: Tensor) -> Tensor:
    """Which examples were classified correctly, as a boolean tensor of the targets' shape.

    Args:
        predictions: class scores ``(N, C, ...)`` or class numbers ``(N, ...)``.
        targets: class numbers ``(N, ...)``.

    A row of scores that contains NaN predicts nothing and counts as wrong.

    Example:
        >>> correct_predictions(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        tensor([ True, False])
    """
    checks.tensor("predictions", predictions)
    checks.tensor("targets", targets)
    scores = predictions.ndim == targets.ndim + 1 and predictions.shape[:1] + predictions.shape[2:] == targets.shape
    numbers = predictions.shape == targets.shape and not predictions.is_floating_point()
    if targets.numel() == 0 or predictions.numel() == 0 or targets.is_floating_point() or not (scores or numbers):
        raise ValueError(
            "Accuracy needs integer targets (N, ...) of at least one example, and as predictions scores (N, C, ...) or "
            f"integer classes (N, ...), got targets {tuple(targets.shape)} of {targets.dtype} and predictions "
            f"{tuple(predictions.shape)} of {predictions.dtype}: pass the network's scores before any reduction."
        )
    if numbers:
        return predictions == targets
    return (predictions.argmax(dim=1) == targets) & ~predictions.isnan().any(dim=1)


def online_accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
    """Share of correct predictions, each made before the network was trained on that example.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import online_accuracy
        >>> online_accuracy(torch.tensor([2, 0, 1, 1]), torch.tensor([2, 0, 1, 0]))
        tensor(0.7500, dtype=torch.float64)
    """
    return correct_predictions(predictions, targets).double().mean()


def accuracy_slope(accuracies: Tensor) -> Tensor:
    """Slope of the least-squares line through the tasks' accuracies: the change of accuracy from one task to the next.

    Tasks without accuracy (NaN) are left out; with fewer than two tasks the slope is NaN.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import accuracy_slope
        >>> accuracy_slope(torch.tensor([0.9, 0.8, 0.7]))
        tensor(-0.1000, dtype=torch.float64)
    """
    if checks.tensor("accuracies", accuracies).ndim != 1:
        raise ValueError(f"accuracies must be one number for each task, got shape {tuple(accuracies.shape)}.")
    tasks = torch.arange(len(accuracies), dtype=torch.float64, device=accuracies.device)
    seen = ~accuracies.isnan()
    x, y = tasks[seen], accuracies[seen].double()
    # 0 / 0 for a single task: NaN, as documented.
    centred = x - x.mean()
    return (centred * y).sum() / centred.square().sum()
