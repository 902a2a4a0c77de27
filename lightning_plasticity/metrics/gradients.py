"""What the gradients of a model look like."""

from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_plasticity import checks
from lightning_plasticity.functional import gradients
from lightning_plasticity.functional.gradients import LossFunction, Summary
from lightning_plasticity.functional.weights import Source, named_parameters
from lightning_plasticity.metrics.base import MeanOverUpdates, PlasticityMetric
from lightning_plasticity.metrics.plotting import Plotted


class GradientNorm(MeanOverUpdates):
    """Euclidean norm of all gradients of a model together; the mean over the updates.

    Update after ``backward`` and before ``zero_grad``. Parameters without a gradient are left out.

    Args:
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import GradientNorm
        >>> w = torch.zeros(2, requires_grad=True)
        >>> (w * torch.tensor([3.0, 4.0])).sum().backward()
        >>> metric = GradientNorm()
        >>> metric.update({"w": w})
        >>> metric.compute()
        tensor(5., dtype=torch.float64)
    """

    plot_lower_bound: float | None = 0.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, model: Source) -> None:
        """Read ``.grad`` of a module's parameters or of named tensors."""
        self._record(gradients.gradient_norm(gradients.read_gradients(named_parameters(model).values())))


class ZeroGradientFraction(MeanOverUpdates):
    """Share of gradient entries that are exactly 0; the mean over the updates, NaN if an entry is not finite.

    Update after ``backward`` and before ``zero_grad``. Parameters without a gradient are left out.

    Args:
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import ZeroGradientFraction
        >>> w = torch.zeros(2, requires_grad=True)
        >>> (w * torch.tensor([3.0, 0.0])).sum().backward()
        >>> metric = ZeroGradientFraction()
        >>> metric.update({"w": w})
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, model: Source) -> None:
        """Read ``.grad`` of a module's parameters or of named tensors."""
        self._record(gradients.zero_gradient_fraction(gradients.read_gradients(named_parameters(model).values())))


class GradientDormancy(MeanOverUpdates):
    r"""Share of units whose incoming weights have next to no gradient, relative to their layer; the mean over updates.

    .. math:: \frac{G_i}{\mathrm{mean}_k\, G_k + 10^{-9}} \le \tau, \qquad G_i = \mathrm{mean}_j |g_{ij}|

    Every row of a weight matrix or kernel counts as a unit, those of the last layer and of embeddings as well; name
    some tensors to measure these alone. Update after ``backward`` and before ``zero_grad``. One batch is noisy: take
    several. A unit without gradient may also be one that has finished learning.

    Args:
        tau: the threshold.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import GradientDormancy
        >>> w = torch.zeros(2, 2, requires_grad=True)
        >>> (w * torch.tensor([[0.0, 0.0], [1.0, -3.0]])).sum().backward()
        >>> metric = GradientDormancy()
        >>> metric.update({"w": w})
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    Reference:
        Liu et al., NeurIPS 2025; arXiv 2505.24061.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, tau: float = 0.01, **kwargs: Any) -> None:
        super().__init__(tau, **kwargs)
        self.tau = checks.number("tau", tau, least=0)

    def update(self, model: Source) -> None:
        """Read ``.grad`` of a module's parameters or of named tensors."""
        self._record(gradients.gradient_dormancy(gradients.read_gradients(named_parameters(model).values()), self.tau))


class GradientCovariance(PlasticityMetric):
    r"""Cosines between the gradients of single examples: a matrix, and a summary of its entries off the diagonal.

    .. math:: C_{ij} = \langle g_i, g_j \rangle / (\|g_i\| \|g_j\|)

    ``compute`` gives the summary, ``matrix`` the matrix, and ``plot`` draws it. The directions of all examples since
    the last reset are kept (examples times parameters, in float32), so a few dozen examples are meant. The model runs
    in evaluation mode and is left as it was. An example whose gradient is 0 has a row of zeros; one that is not finite
    makes the summary NaN, as does a single example. Each rank needs at least one update.

    Args:
        loss_fn: takes the output and the target of a batch of one example, gives its loss.
        summary: ``"mean"``, ``"negative"`` (share of negative entries) or ``"least"``.
        chunk_size: examples that are differentiated at once; fewer need less memory. None: all.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import GradientCovariance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> metric = GradientCovariance(lambda output, target: (output - target).sum(), summary="least")
        >>> metric.update(model, torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]), torch.zeros(3, 1))
        >>> metric.compute()
        tensor(-1., dtype=torch.float64)

    Reference:
        C. Lyle, Z. Zheng, E. Nikishin, B. Avila Pires, R. Pascanu, W. Dabney, "Understanding plasticity in neural
        networks", ICML 2023.
    """

    plot_lower_bound: float | None = -1.0
    plot_upper_bound: float | None = 1.0
    directions: list[Tensor] | Tensor

    def __init__(
        self,
        loss_fn: LossFunction = cross_entropy,
        summary: Summary = "mean",
        chunk_size: int | None = 16,
        **kwargs: Any,
    ) -> None:
        # Rows are joined, not summed: nothing may be padded.
        kwargs.setdefault("dist_sync_fn", gather_all_tensors)
        super().__init__(**kwargs)
        self.loss_fn: LossFunction = checks.function("loss_fn", loss_fn)
        self.summary: Summary = checks.choice("summary", summary, get_args(Summary))
        self.chunk_size = checks.optional(checks.count, "chunk_size", chunk_size, least=1)
        self.add_state("directions", [], dist_reduce_fx="cat")

    def update(self, model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Differentiate the loss of each example."""
        rows = gradients.per_sample_gradients(model, self.loss_fn, inputs, targets, self.chunk_size)
        assert isinstance(self.directions, list)
        if self.directions and self.directions[0].shape[1] != rows.shape[1]:
            raise ValueError(
                f"All updates need the same number of parameters, {self.directions[0].shape[1]}, got {rows.shape[1]}: "
                "use one metric for each model, and `reset` after parameters were frozen or added."
            )
        self.directions.append(gradients.unit_length(rows))

    def compute(self) -> Tensor:
        """Summary over all pairs of examples since the last reset; NaN without a pair."""
        return gradients.summarize_covariance(self._matrix(), self.summary)

    def matrix(self) -> Tensor:
        """The matrix over all examples since the last reset, of all ranks."""
        return self.synchronized(self._matrix)

    def _matrix(self) -> Tensor:
        if len(self.directions) == 0:
            return self._nan.expand(0, 0)
        return gradients.cosine_matrix(dim_zero_cat(self.directions))

    def _plotted(self) -> Plotted:
        return self.matrix()
