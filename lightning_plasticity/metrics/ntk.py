"""The tangent kernel of a network."""

from typing import Any, get_args

import torch
from torch import Tensor

from lightning_plasticity import checks
from lightning_plasticity.functional.ntk import NTKSummary, ntk_rank
from lightning_plasticity.metrics.base import MeanOverUpdates


class NTKRank(MeanOverUpdates):
    r"""Rank of the neural tangent kernel :math:`J J^\top` on a batch's inputs; the mean over the batches.

    :math:`J` has a row for each input: the gradient of the sum of the outputs. The model runs in evaluation mode and is
    left as it was. Memory grows with inputs times parameters, so that some dozens of inputs are meant, and as many each
    time, for the rank is at most their number.

    Args:
        summary: ``"energy"``, how many of the largest eigenvalues it takes for this share of their sum, or
            ``"effective"``, the exponential of the entropy of their shares.
        energy: the share.
        chunk_size: inputs that are differentiated at once; fewer need less memory. None: all.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import NTKRank
        >>> metric = NTKRank()
        >>> model = torch.nn.Linear(3, 1, bias=False)  # whose gradient is the input
        >>> metric.update(model, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0

    def __init__(
        self, summary: NTKSummary = "energy", energy: float = 0.99, chunk_size: int | None = 16, **kwargs: Any
    ) -> None:
        super().__init__(summary, energy, **kwargs)
        self.summary: NTKSummary = checks.choice("summary", summary, get_args(NTKSummary))
        self.energy = checks.number("energy", energy, above=0, most=1)
        self.chunk_size = checks.optional(checks.count, "chunk_size", chunk_size, least=1)

    def update(self, model: torch.nn.Module, inputs: Tensor) -> None:
        """Measure the model on some inputs."""
        self._record(ntk_rank(model, inputs, self.summary, self.energy, self.chunk_size))
