"""Sharpness of the loss."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_plasticity import checks
from lightning_plasticity.functional.gradients import LossFunction
from lightning_plasticity.functional.sharpness import check_lanczos, sharpness
from lightning_plasticity.metrics.base import MeanOverUpdates


class Sharpness(MeanOverUpdates):
    """Largest eigenvalue of the Hessian of a batch's loss; the mean over the batches.

    Each update takes the Hessian of its own batch: the mean over batches is not the value of all their examples
    together. The model runs in evaluation mode and is left as it was. NaN if the loss or its curvature is not finite.

    Args:
        loss_fn: takes the output and the targets of a batch, gives a scalar.
        max_iterations: Hessian-vector products at most for a batch; reaching it without convergence warns.
        tolerance: accepted residual, relative to the eigenvalue.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import Sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> metric = Sharpness(lambda output, target: (output - target).square().sum() / 2)
        >>> metric.update(model, torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> metric.compute()
        tensor(4.0000, dtype=torch.float64)
    """

    def __init__(
        self,
        loss_fn: LossFunction = cross_entropy,
        max_iterations: int = 100,
        tolerance: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        max_iterations, tolerance = check_lanczos(max_iterations, tolerance)
        super().__init__(max_iterations, tolerance, **kwargs)
        self.loss_fn: LossFunction = checks.function("loss_fn", loss_fn)
        self.max_iterations = max_iterations
        self.tolerance = tolerance

    def update(self, model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Measure the model on a batch."""
        self._record(sharpness(model, self.loss_fn, inputs, targets, self.max_iterations, self.tolerance))
