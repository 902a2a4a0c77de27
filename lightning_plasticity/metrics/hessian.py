"""Curvature of the loss in all directions."""

from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_plasticity import checks
from lightning_plasticity.functional.gradients import LossFunction
from lightning_plasticity.functional.hessian import HessianSummary, hessian_spectrum, summarize_spectrum
from lightning_plasticity.metrics.base import MeanOverUpdates


class HessianSpectrum(MeanOverUpdates):
    r"""In how many directions the loss of a batch is curved, by eigenvalues of its Hessian; the mean over the batches.

    The eigenvalues come from Lanczos iteration, and are all of them where ``steps`` is the number of parameters. With
    fewer the largest in size are exact first, and a rank is at most ``steps``: compare values with the same number.
    Each step costs two backward passes, and memory grows with steps times parameters: small networks are meant. The
    model runs in evaluation mode and is left as it was. NaN if the loss or its curvature is not finite.

    Args:
        summary: ``"energy"``, how many of the largest eigenvalues in size it takes for this share of the sum of all
            sizes; ``"effective"``, the exponential of the entropy of their shares; or ``"negative"``, the share of that
            sum that negative ones have.
        energy: the share.
        loss_fn: takes the output and the targets of a batch, gives a scalar.
        steps: how many eigenvalues, at most the number of parameters.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import HessianSpectrum
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> metric = HessianSpectrum(loss_fn=lambda output, target: (output - target).square().sum() / 2)
        >>> metric.update(model, torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)

    References:
        Lewandowski et al. 2023, arXiv 2312.00246: the rank of the Hessian falls as plasticity is lost.
    """

    plot_lower_bound: float | None = 0.0

    def __init__(
        self,
        summary: HessianSummary = "energy",
        energy: float = 0.99,
        *,
        loss_fn: LossFunction = cross_entropy,
        steps: int = 50,
        **kwargs: Any,
    ) -> None:
        super().__init__(summary, energy, steps, **kwargs)
        self.summary: HessianSummary = checks.choice("summary", summary, get_args(HessianSummary))
        self.energy = checks.number("energy", energy, above=0, most=1)
        self.loss_fn: LossFunction = checks.function("loss_fn", loss_fn)
        self.steps = checks.count("steps", steps, least=1)

    def update(self, model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Measure the model on a batch."""
        spectrum = hessian_spectrum(model, self.loss_fn, inputs, targets, self.steps)
        self._record(summarize_spectrum(spectrum, self.summary, self.energy))
