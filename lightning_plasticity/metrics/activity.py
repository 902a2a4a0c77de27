"""What the units of a layer do: dead, linear, rarely active, dormant, saturated, duplicate, entropy of their signs."""

from typing import Any

import torch
from torch import Tensor

from lightning_plasticity import checks
from lightning_plasticity.functional import activity
from lightning_plasticity.functional.activity import Reduce
from lightning_plasticity.metrics.base import UnitMetric


class _ShareOfUnits(UnitMetric):
    """Base of the shares: bounds, and the direction that is good."""

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0


class DeadUnits(_ShareOfUnits):
    """Share of units that are 0 (or at most ``eps`` in absolute value) on every sample.

    NaN or infinity in the features gives NaN, here and in the other measures of activity.

    Args:
        eps: largest absolute value of a dead unit.
        unit_dim: the dimension of the features that counts the units: 1 for convolutions, -1 for tokens; not needed for
            a matrix.
        reduce: ``None`` counts positions and tokens as samples, ``"mean"`` averages them first.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import DeadUnits
        >>> metric = DeadUnits()
        >>> metric.update(torch.tensor([[0.0, 1.0, 0.0, 2.0]]))
        >>> metric.update(torch.tensor([[0.0, 0.0, 0.0, 3.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    Reference:
        S. Dohare et al., "Loss of plasticity in deep continual learning", Nature 632, 2024.
    """

    largest: Tensor

    def __init__(self, eps: float = 0.0, *, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any) -> None:
        super().__init__(unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.eps = checks.number("eps", eps, least=0)
        self.add_state("largest", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="max")

    def _accumulate(self, rows: Tensor) -> None:
        self.largest = torch.maximum(self.largest, activity.largest_activation(rows))

    def _value(self) -> Tensor:
        return activity.dead_share(self.largest, self.eps)


class LinearizedUnits(_ShareOfUnits):
    """Share of units that are above 0 on every sample: with ReLU they have become linear.

    Args:
        unit_dim: as for :class:`DeadUnits`.
        reduce: as for :class:`DeadUnits`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import LinearizedUnits
        >>> metric = LinearizedUnits()
        >>> metric.update(torch.tensor([[0.5, 1.0, 0.0, 2.0], [0.0, 2.0, 0.0, 3.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    not_positive: Tensor

    def __init__(self, *, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any) -> None:
        super().__init__(unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.add_state("not_positive", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def _accumulate(self, rows: Tensor) -> None:
        self.not_positive = self.not_positive + activity.count(rows <= 0, rows)

    def _value(self) -> Tensor:
        return activity.linearized_share(self.not_positive)


class RarelyActiveUnits(_ShareOfUnits):
    """Share of units that are non-zero on fewer than ``rate`` of the samples.

    The code of Continual Backprop's image experiments calls these units dormant; :class:`DormantUnits` goes by their
    size.

    Args:
        rate: share of the samples.
        unit_dim: as for :class:`DeadUnits`.
        reduce: as for :class:`DeadUnits`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import RarelyActiveUnits
        >>> metric = RarelyActiveUnits(rate=0.5)
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, 1.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    Reference:
        S. Dohare et al., "Loss of plasticity in deep continual learning", Nature 632, 2024.
    """

    nonzero: Tensor

    def __init__(
        self, rate: float = 0.01, *, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any
    ) -> None:
        super().__init__(unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.rate = checks.number("rate", rate, least=0, most=1)
        self.add_state("nonzero", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def _accumulate(self, rows: Tensor) -> None:
        self.nonzero = self.nonzero + activity.count(rows != 0, rows)

    def _value(self) -> Tensor:
        return activity.rarely_active_share(self.nonzero, self.samples, self.rate)


class DormantUnits(_ShareOfUnits):
    r"""Share of units whose mean absolute activation is at most ``tau`` times the layer's mean.

    .. math:: \frac{\mathrm{mean}|h_i|}{\mathrm{mean}_k\, \mathrm{mean}|h_k|} \le \tau

    Where the whole layer is 0, every unit is dormant. Other code calls :class:`RarelyActiveUnits` dormant, or units
    whose gradients are small.

    Args:
        tau: threshold.
        unit_dim: as for :class:`DeadUnits`.
        reduce: as for :class:`DeadUnits`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import DormantUnits
        >>> metric = DormantUnits(tau=0.025)
        >>> metric.update(torch.tensor([[0.01, 1.0], [-0.01, 1.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    Reference:
        G. Sokar, R. Agarwal, P. S. Castro, U. Evci, "The dormant neuron phenomenon in deep reinforcement learning",
        ICML 2023.
    """

    absolute: Tensor

    def __init__(
        self, tau: float = 0.025, *, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any
    ) -> None:
        super().__init__(unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.tau = checks.number("tau", tau, least=0)
        self.add_state("absolute", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def _accumulate(self, rows: Tensor) -> None:
        self.absolute = self.absolute + activity.absolute_sum(rows)

    def _value(self) -> Tensor:
        return activity.dormant_share(self.absolute, self.tau)


class SaturatedUnits(_ShareOfUnits):
    """Share of activations within ``margin`` of either end of a bounded activation.

    Args:
        low: lower end of the activation's range; the default is tanh's.
        high: upper end.
        margin: distance from an end that still counts.
        unit_dim: as for :class:`DeadUnits`.
        reduce: as for :class:`DeadUnits`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import SaturatedUnits
        >>> metric = SaturatedUnits(low=0.0, high=1.0)
        >>> metric.update(torch.sigmoid(torch.tensor([[-9.0, 0.0], [0.5, 9.0]])))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    saturated: Tensor

    def __init__(
        self,
        low: float = -1.0,
        high: float = 1.0,
        margin: float = 0.05,
        *,
        unit_dim: int | None = None,
        reduce: Reduce = None,
        **kwargs: Any,
    ) -> None:
        activity.check_bounds(low, high, margin)
        super().__init__(low, high, margin, unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.low, self.high, self.margin = low, high, margin
        self.add_state("saturated", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def _accumulate(self, rows: Tensor) -> None:
        self.saturated = self.saturated + activity.saturated_count(rows, self.low, self.high, self.margin)

    def _value(self) -> Tensor:
        return self.saturated.mean() / self.samples


class SignEntropy(UnitMetric):
    """Mean over units of the binary entropy of ``P(h > 0)``, in bits.

    1 where every unit is positive on half of the samples, 0 where no unit's sign ever changes: each then acts as a
    linear or a dead unit.

    Args:
        unit_dim: as for :class:`DeadUnits`.
        reduce: as for :class:`DeadUnits`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import SignEntropy
        >>> metric = SignEntropy()
        >>> metric.update(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    Reference:
        A. Lewandowski, D. Schuurmans, M. C. Machado, "Plastic learning with deep Fourier features", ICLR 2025.
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    positive: Tensor

    def __init__(self, *, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any) -> None:
        super().__init__(unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.add_state("positive", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def _accumulate(self, rows: Tensor) -> None:
        self.positive = self.positive + activity.count(rows > 0, rows)

    def _value(self) -> Tensor:
        return activity.mean_sign_entropy(self.positive, self.samples)


class DuplicateUnits(_ShareOfUnits):
    """Share of units whose Pearson correlation with another unit exceeds ``threshold``.

    A constant unit has no correlation and counts as no duplicate; fewer than two samples give NaN.

    Args:
        threshold: on the correlation, with its sign: opposite units are no duplicates.
        unit_dim: as for :class:`DeadUnits`.
        reduce: as for :class:`DeadUnits`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import DuplicateUnits
        >>> metric = DuplicateUnits()
        >>> metric.update(torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 1.0], [3.0, 6.0, 0.0]]))
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)

    Reference:
        A. Joudaki et al., "Barriers for learning in an evolving world: mathematical understanding of loss of
        plasticity", arXiv 2510.00304, 2025.
    """

    total: Tensor
    products: Tensor

    def __init__(
        self, threshold: float = 0.95, *, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any
    ) -> None:
        super().__init__(unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.threshold = checks.number("threshold", threshold, least=-1, most=1)
        self.add_state("total", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(1, 1, dtype=torch.float64), dist_reduce_fx="sum")

    def _accumulate(self, rows: Tensor) -> None:
        self.total = self.total + rows.sum(dim=0, dtype=torch.float64)
        self.products = self.products + activity.gram_matrix(rows)

    def _value(self) -> Tensor:
        return activity.duplicate_share(self.total, self.products, self.samples, self.threshold)
