"""What hidden units do: dead, rarely active, dormant, saturated and duplicate units, and the entropy of their signs.

Each measure has two steps, so that features may arrive in pieces: a statistic of some rows, whose pieces are merged by
a sum (or a maximum), and a value of the merged statistic. The public functions take both at once.

NaN or infinity anywhere in the features gives NaN: such activations have no meaningful share of anything.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_plasticity import checks
from lightning_plasticity.functional.weights import dense

Reduce = Literal["mean"] | None

# Rows that are turned into float64 at once: bounds the memory of the copy, not the result.
_ROWS_AT_ONCE = 8192


def unit_rows(features: Tensor, unit_dim: int | None = None, reduce: Reduce = None) -> Tensor:
    """Arrange features as a matrix: one row a sample, one column a unit.

    Args:
        features: activations, samples in dimension 0.
        unit_dim: the dimension that counts the units: 1 for convolutions ``(N, C, H, W)``, -1 for tokens ``(N, T, C)``.
            It must be said where there are more than two dimensions; a matrix has its units in dimension 1.
        reduce: ``None`` counts every position (or token) as a sample; ``"mean"`` averages the positions of a sample.

    Example:
        >>> images = torch.rand(8, 16, 5, 5)
        >>> unit_rows(images, unit_dim=1).shape, unit_rows(images, unit_dim=1, reduce="mean").shape
        (torch.Size([200, 16]), torch.Size([8, 16]))
    """
    check_layout(unit_dim, reduce)
    if dense("features", features).ndim < 2 or features.numel() == 0:
        raise ValueError(
            "Features must be floating-point numbers, (samples, units) or (samples, ..., units), at least one of each, "
            f"got shape {tuple(features.shape)} of {features.dtype}: pass the activations of at least one sample."
        )
    if features.ndim > 2 and unit_dim is None:
        raise ValueError(
            f"Features of shape {tuple(features.shape)} need `unit_dim`, the dimension that counts the units: "
            "pass unit_dim=1 for convolutions (N, C, H, W) or unit_dim=-1 for tokens (N, T, C)."
        )
    dim = 1 if unit_dim is None else unit_dim
    if not -features.ndim < dim < features.ndim or dim == 0:
        raise ValueError(
            f"unit_dim must be a dimension of the features other than 0, the samples', got unit_dim={unit_dim} for "
            f"shape {tuple(features.shape)}: pass 1 for convolutions or -1 for tokens."
        )
    units_last = features.detach().movedim(dim, -1)
    if reduce == "mean" and features.ndim > 2:
        return units_last.flatten(1, -2).mean(dim=1, dtype=torch.float64)
    return units_last.flatten(0, -2)


def check_layout(unit_dim: int | None, reduce: Reduce) -> None:
    """Raise where no features could be arranged by these settings."""
    if unit_dim is not None and checks.count("unit_dim", unit_dim, least=None) == 0:
        raise ValueError("unit_dim must not be 0, the samples' dimension: pass 1 for convolutions or -1 for tokens.")
    checks.choice("reduce", reduce, (None, "mean"))  # positions are samples, or averaged


def gram_matrix(rows: Tensor) -> Tensor:
    """Gram matrix ``A^T A`` (units by units) in float64; the matrices of pieces add up to that of the whole."""
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _ROWS_AT_ONCE):
        exact = part.double()
        gram.addmm_(exact.T, exact)
    return gram


def count(condition: Tensor, rows: Tensor) -> Tensor:
    """Count per unit the rows where the condition holds; NaN for a unit with an entry that is not finite."""
    # 0 * x is NaN for NaN and infinity, and 0 otherwise: no synchronisation with the device is needed.
    return condition.sum(dim=0, dtype=torch.float64) + (rows * 0).sum(dim=0, dtype=torch.float64)


def share(chosen: Tensor, evidence: Tensor) -> Tensor:
    """Share of True entries; NaN if the evidence they were chosen by is not all finite."""
    return chosen.double().mean() + (evidence * 0).sum()


def dead_units(features: Tensor, eps: float = 0.0, *, unit_dim: int | None = None, reduce: Reduce = None) -> Tensor:
    """Share of units that are 0 (or at most ``eps`` in absolute value) on every sample.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import dead_units
        >>> dead_units(torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 3.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    eps = checks.number("eps", eps, least=0)
    return dead_share(largest_activation(unit_rows(features, unit_dim, reduce)), eps)


def largest_activation(rows: Tensor) -> Tensor:
    """Largest absolute value of each unit."""
    return rows.abs().amax(dim=0).double()


def dead_share(largest: Tensor, eps: float) -> Tensor:
    """Share of dead units, given each unit's largest absolute value."""
    return share(largest <= eps, largest)


def linearized_units(features: Tensor, *, unit_dim: int | None = None, reduce: Reduce = None) -> Tensor:
    """Share of units that are above 0 on every sample: with ReLU they have become linear.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import linearized_units
        >>> linearized_units(torch.tensor([[0.5, 1.0, 0.0, 2.0], [0.0, 2.0, 0.0, 3.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    rows = unit_rows(features, unit_dim, reduce)
    return linearized_share(count(rows <= 0, rows))


def linearized_share(not_positive: Tensor) -> Tensor:
    """Share of linearized units, given how often each was not above 0."""
    return share(not_positive == 0, not_positive)


def rarely_active_units(
    features: Tensor, rate: float = 0.01, *, unit_dim: int | None = None, reduce: Reduce = None
) -> Tensor:
    """Share of units that are non-zero on fewer than ``rate`` of the samples.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import rarely_active_units
        >>> rarely_active_units(torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, 1.0]]), rate=0.5)
        tensor(0.5000, dtype=torch.float64)
    """
    rate = checks.number("rate", rate, least=0, most=1)
    rows = unit_rows(features, unit_dim, reduce)
    return rarely_active_share(count(rows != 0, rows), len(rows), rate)


def rarely_active_share(nonzero: Tensor, samples: int | Tensor, rate: float) -> Tensor:
    """Share of rarely active units, given how often each was non-zero."""
    return share(nonzero / samples < rate, nonzero)


def dormant_units(
    features: Tensor, tau: float = 0.025, *, unit_dim: int | None = None, reduce: Reduce = None
) -> Tensor:
    """Share of units whose mean absolute activation is at most ``tau`` times the layer's mean.

    Where the whole layer is 0, every unit is dormant.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import dormant_units
        >>> dormant_units(torch.tensor([[0.01, 1.0], [-0.01, 1.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    tau = checks.number("tau", tau, least=0)
    return dormant_share(absolute_sum(unit_rows(features, unit_dim, reduce)), tau)


def absolute_sum(rows: Tensor) -> Tensor:
    """Sum of the absolute values of each unit."""
    return rows.abs().sum(dim=0, dtype=torch.float64)


def dormant_share(absolute: Tensor, tau: float) -> Tensor:
    """Share of dormant units, given a multiple of each unit's mean absolute activation."""
    # Not divided by the layer's mean, which may be 0: then 0 <= 0 holds for every unit, as it should.
    return share(absolute <= tau * absolute.mean(), absolute)


def saturated_units(
    features: Tensor,
    low: float = -1.0,
    high: float = 1.0,
    margin: float = 0.05,
    *,
    unit_dim: int | None = None,
    reduce: Reduce = None,
) -> Tensor:
    """Share of activations within ``margin`` of either end of a bounded activation, by default of tanh.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import saturated_units
        >>> saturated_units(torch.tensor([[-0.99, 0.0], [0.5, 0.96]]))
        tensor(0.5000, dtype=torch.float64)
    """
    check_bounds(low, high, margin)
    rows = unit_rows(features, unit_dim, reduce)
    return saturated_count(rows, low, high, margin).mean() / len(rows)


def check_bounds(low: float, high: float, margin: float) -> None:
    """Raise unless the bounds are in order and the two margins do not meet."""
    low, high = checks.number("low", low), checks.number("high", high)
    if not (low < high and 0 <= checks.number("margin", margin) < (high - low) / 2):
        raise ValueError(
            f"Saturation needs low < high and 0 <= margin < (high - low) / 2, got low={low}, high={high}, "
            f"margin={margin}: pass the activation's bounds, such as 0 and 1 for sigmoid."
        )


def saturated_count(rows: Tensor, low: float, high: float, margin: float) -> Tensor:
    """How often each unit is within the margin of an end."""
    return count((rows <= low + margin) | (rows >= high - margin), rows)


def sign_entropy(features: Tensor, *, unit_dim: int | None = None, reduce: Reduce = None) -> Tensor:
    """Mean over units of the binary entropy of ``P(h > 0)``, in bits: 1 if signs are even, 0 if they never change.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import sign_entropy
        >>> sign_entropy(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    rows = unit_rows(features, unit_dim, reduce)
    return mean_sign_entropy(count(rows > 0, rows), len(rows))


def mean_sign_entropy(positive: Tensor, samples: int | Tensor) -> Tensor:
    """Mean binary entropy, given how often each unit was positive."""
    p = positive / samples
    nats: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
    return nats.mean() / math.log(2)


def duplicate_units(
    features: Tensor, threshold: float = 0.95, *, unit_dim: int | None = None, reduce: Reduce = None
) -> Tensor:
    """Share of units whose Pearson correlation with another unit exceeds ``threshold``.

    A constant unit has no correlation and counts as no duplicate; a single sample gives NaN.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import duplicate_units
        >>> h = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 1.0], [3.0, 6.0, 0.0]])
        >>> duplicate_units(h)
        tensor(0.6667, dtype=torch.float64)
    """
    threshold = checks.number("threshold", threshold, least=-1, most=1)
    rows = unit_rows(features, unit_dim, reduce)
    return duplicate_share(rows.sum(dim=0, dtype=torch.float64), gram_matrix(rows), len(rows), threshold)


def duplicate_share(total: Tensor, products: Tensor, samples: int | Tensor, threshold: float) -> Tensor:
    """Share of duplicate units, given the sums of the units and of their products over the samples.

    The variance is a difference of two sums. What lies below 1e-12 of the mean square is rounding, so a unit whose
    standard deviation is below a millionth of its root mean square counts as constant.
    """
    if samples < 2:
        return total.new_tensor(float("nan"))
    mean = total / samples
    covariance = products / samples - torch.outer(mean, mean)
    variance, mean_square = covariance.diagonal(), products.diagonal() / samples
    deviation = torch.where(variance > 1e-12 * mean_square, variance, float("inf")).sqrt()
    correlation = covariance / torch.outer(deviation, deviation)
    correlation.fill_diagonal_(-1.0)
    # -1 never exceeds a threshold, so neither the diagonal nor a layer of one unit has a duplicate.
    return share((correlation > threshold).any(dim=1), mean_square)
