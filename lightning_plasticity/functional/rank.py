"""How many directions a layer's features span: effective rank, stable rank and feature rank."""

import torch
from torch import Tensor

from lightning_plasticity import checks
from lightning_plasticity.functional.activity import Reduce, unit_rows


def effective_rank(features: Tensor, *, unit_dim: int | None = None, reduce: Reduce = None) -> Tensor:
    r"""Exponential of the entropy of the normalised singular values.

    .. math:: \exp\Bigl(-\sum_i p_i \ln p_i\Bigr), \qquad p_i = s_i / \sum_j s_j

    Taken from the singular values, not from the eigenvalues of the covariance (their squares), which give less. A zero
    matrix has rank 0, where some code has 1; NaN or infinity gives NaN.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import effective_rank
        >>> effective_rank(torch.eye(4))
        tensor(4.0000, dtype=torch.float64)
    """
    return effective_rank_of(singular_values(unit_rows(features, unit_dim, reduce)))


def stable_rank(features: Tensor, *, unit_dim: int | None = None, reduce: Reduce = None) -> Tensor:
    r"""Squared Frobenius norm over squared spectral norm.

    .. math:: \|A\|_F^2 / \|A\|_2^2 = \sum_i s_i^2 / s_1^2

    Some code gives this name to the number of singular values that make up 99 % of their sum: that is
    :func:`feature_rank`. A zero matrix has rank 0; NaN or infinity gives NaN.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import stable_rank
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        tensor(1.5000, dtype=torch.float64)
    """
    return stable_rank_of(singular_values(unit_rows(features, unit_dim, reduce)))


def feature_rank(
    features: Tensor, delta: float = 0.01, *, unit_dim: int | None = None, reduce: Reduce = None
) -> Tensor:
    r"""Least number of singular values that make up ``1 - delta`` of their sum (srank).

    .. math:: \min\Bigl\{k : \sum_{i \le k} s_i \ge (1 - \delta) \sum_j s_j\Bigr\}

    Some code counts only those before the share is reached, which is one less. A zero matrix has rank 0; NaN or
    infinity gives NaN.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import feature_rank
        >>> feature_rank(torch.diag(torch.tensor([98.0, 1.5, 0.5])))
        tensor(2., dtype=torch.float64)
    """
    delta = checks.number("delta", delta, least=0, below=1)
    return feature_rank_of(singular_values(unit_rows(features, unit_dim, reduce)), delta)


def singular_values(rows: Tensor) -> Tensor:
    """Singular values of a matrix, descending, in float64; all NaN if an entry is not finite."""
    if not rows.isfinite().all():
        return torch.full((min(rows.shape),), float("nan"), dtype=torch.float64, device=rows.device)
    values: Tensor = torch.linalg.svdvals(rows.double())
    return values


def singular_values_from_gram(gram: Tensor, samples: int) -> Tensor:
    """Singular values of a matrix, descending, from its Gram matrix; all NaN if an entry is not finite.

    Squaring squares the condition number: rounding of relative size ``eps`` in an eigenvalue is one of ``sqrt(eps)`` in
    a singular value. Eigenvalues up to ``(units + sqrt(samples)) * eps`` times the largest are thus taken for noise
    and set to 0. Singular values below the root of that, some 1e-7 of the largest, are lost; their sum is at most the
    number of units times that.
    """
    units = len(gram)
    if not gram.isfinite().all():
        return torch.full((units,), float("nan"), dtype=torch.float64, device=gram.device)
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    noise = (units + samples**0.5) * torch.finfo(torch.float64).eps * eigenvalues[0]
    return torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt()


def effective_rank_of(s: Tensor) -> Tensor:
    """Effective rank, given the singular values."""
    if s[0] == 0:
        return s.new_zeros(())
    entropy: Tensor = torch.special.entr(s / s.sum()).sum()
    return entropy.exp()


def stable_rank_of(s: Tensor) -> Tensor:
    """Stable rank, given the singular values."""
    if s[0] == 0:
        return s.new_zeros(())
    # Divided before squaring, so that tiny values do not underflow.
    return (s / s[0]).square().sum()


def feature_rank_of(s: Tensor, delta: float) -> Tensor:
    """Feature rank, given the singular values in descending order."""
    if s[0] == 0 or s.isnan().any():
        return s[0].clone()
    reached = s.cumsum(0) / s.sum()
    # The slack decides ties such as the 99th of 100 equal values, which rounding would otherwise decide.
    return (reached < 1 - delta - 1e-10).sum().double() + 1
