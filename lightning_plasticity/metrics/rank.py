"""Rank of a layer's features, from a Gram matrix whose size does not depend on the number of batches."""

from typing import Any

import torch
from torch import Tensor

from lightning_plasticity import checks
from lightning_plasticity.functional.activity import Reduce, gram_matrix
from lightning_plasticity.functional.rank import (
    effective_rank_of,
    feature_rank_of,
    singular_values_from_gram,
    stable_rank_of,
)
from lightning_plasticity.metrics.base import UnitMetric


class RankMetric(UnitMetric):
    """Base of the rank measures: keeps the Gram matrix, units by units, in float64.

    Its eigenvalues are the squared singular values, so that singular values below some 1e-7 of the largest cannot be
    told from rounding and count as 0; the functions of the same names, which see all features at once, do not have this
    limit.
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    gram: Tensor

    def __init__(self, *, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any) -> None:
        super().__init__(unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.add_state("gram", torch.zeros(1, 1, dtype=torch.float64), dist_reduce_fx="sum")

    def _accumulate(self, rows: Tensor) -> None:
        self.gram = self.gram + gram_matrix(rows)

    def _singular_values(self) -> Tensor:
        return singular_values_from_gram(self.gram, int(self.samples))


class EffectiveRank(RankMetric):
    r"""Exponential of the entropy of the normalised singular values of the features.

    .. math:: \exp\Bigl(-\sum_i p_i \ln p_i\Bigr), \qquad p_i = s_i / \sum_j s_j

    Of the singular values, not of the eigenvalues of the covariance. Features that are all 0 have rank 0, one sample
    has rank 1; NaN or infinity gives NaN.

    Args:
        unit_dim: the dimension of the features that counts the units: 1 for convolutions, -1 for tokens; not needed for
            a matrix.
        reduce: ``None`` counts positions and tokens as samples, ``"mean"`` averages them first.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import EffectiveRank
        >>> metric = EffectiveRank()
        >>> metric.update(torch.eye(4))
        >>> metric.compute()
        tensor(4.0000, dtype=torch.float64)

    Reference:
        O. Roy, M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """

    def _value(self) -> Tensor:
        return effective_rank_of(self._singular_values())


class StableRank(RankMetric):
    r"""Squared Frobenius norm over squared spectral norm of the features.

    .. math:: \|A\|_F^2 / \|A\|_2^2

    Some code calls the number of singular values that make up 99 % of their sum by this name: that is
    :class:`FeatureRank`. Features that are all 0 have rank 0, one sample has rank 1; NaN or infinity gives NaN.

    Args:
        unit_dim: as for :class:`EffectiveRank`.
        reduce: as for :class:`EffectiveRank`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import StableRank
        >>> metric = StableRank()
        >>> metric.update(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)

    Reference:
        M. Rudelson, R. Vershynin, "Sampling from large matrices", Journal of the ACM 54(4), 2007.
    """

    def _value(self) -> Tensor:
        return stable_rank_of(self._singular_values())


class FeatureRank(RankMetric):
    r"""Least number of singular values that make up ``1 - delta`` of their sum (srank).

    .. math:: \min\Bigl\{k : \sum_{i \le k} s_i \ge (1 - \delta) \sum_j s_j\Bigr\}

    Features that are all 0 have rank 0, one sample has rank 1; NaN or infinity gives NaN.

    Args:
        delta: the part of the sum that may be missing.
        unit_dim: as for :class:`EffectiveRank`.
        reduce: as for :class:`EffectiveRank`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import FeatureRank
        >>> metric = FeatureRank(delta=0.01)
        >>> metric.update(torch.diag(torch.tensor([98.0, 1.5, 0.5])))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)

    Reference:
        A. Kumar, R. Agarwal, D. Ghosh, S. Levine, "Implicit under-parameterization inhibits data-efficient deep
        reinforcement learning", ICLR 2021.
    """

    def __init__(
        self, delta: float = 0.01, *, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any
    ) -> None:
        super().__init__(unit_dim=unit_dim, reduce=reduce, **kwargs)
        self.delta = checks.number("delta", delta, least=0, below=1)

    def _value(self) -> Tensor:
        return feature_rank_of(self._singular_values(), self.delta)
