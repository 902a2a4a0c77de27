"""Soft Weight Rescaling: by which factors, and which factors must be common."""

import math

import torch
from torch import Tensor

_ABOVE_MINUS_ONE = torch.finfo(torch.float32).eps - 1


def log_rescaling_factors(norms: Tensor, initial_norms: Tensor, coefficients: Tensor) -> Tensor:
    r"""Logarithms of the factors that draw norms towards the initial ones.

    .. math:: c_l = \frac{\lambda_l n_l + (1 - \lambda_l) \|W_l\|}{\|W_l\|}, \qquad c_l = 1 \text{ where } \|W_l\| = 0

    A norm that did not change, one that is not finite, and a coefficient of 0 give 0 exactly. Products of factors are
    sums of these.
    A factor of 0 (a coefficient of 1 where the initial norm is 0) becomes the smallest that keeps its logarithm finite.

    Args:
        norms: :math:`\|W_l\|` of each layer.
        initial_norms: :math:`n_l`.
        coefficients: :math:`\lambda_l`, from 0 to 1.

    Example:
        >>> log_rescaling_factors(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.5])).exp()
        tensor([0.7500])
    """
    change = coefficients * (initial_norms / norms - 1)
    smallest = torch.finfo(norms.dtype).eps - 1
    return torch.where((norms > 0) & norms.isfinite(), change, 0.0).clamp(min=smallest).log1p()


def log_rescaling_factor(norm: float, initial_norm: float, coefficient: float) -> float:
    """The same for one layer and Python's numbers, which take far less time than small tensors on the CPU.

    Example:
        >>> round(math.exp(log_rescaling_factor(2.0, 1.0, 0.5)), 6)
        0.75
    """
    change = coefficient * (initial_norm / norm - 1) if norm and math.isfinite(norm) else 0.0
    return math.log1p(max(change, _ABOVE_MINUS_ONE))


def joint_norms(norms: Tensor, groups: Tensor) -> Tensor:
    """The norm of each group of layers taken together; ``groups[g, l]`` is 1 where layer ``l`` belongs to group ``g``.

    Example:
        >>> joint_norms(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 1.0]]))
        tensor([5.])
    """
    return (groups * norms.square()).sum(1).sqrt()


def tie(constraints: Tensor) -> tuple[Tensor, Tensor]:
    """Makes factors meet linear constraints on their logarithms ``x``: ``constraints @ x == 0``.

    Layers whose factors must simply be equal become one group, whose factor follows from their joint norm. For the
    other constraints the nearest logarithms that meet them are taken, an orthogonal projection.

    Args:
        constraints: A matrix with one column for each layer, in float64.

    Returns:
        ``groups`` as in :func:`joint_norms`, and the matrix that turns the groups' logarithms into those of the layers.

    Example:
        >>> groups, spread = tie(torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64))
        >>> groups, spread
        (tensor([[1., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64), tensor([[1., 0.],
                [1., 0.],
                [0., 1.]], dtype=torch.float64))
    """
    leader = list(range(constraints.shape[1]))
    for row in constraints.tolist():
        ends = [layer for layer, value in enumerate(row) if value]
        if len(ends) == 2 and row[ends[0]] == -row[ends[1]]:
            first, second = sorted(leader[end] for end in ends)
            leader = [first if member == second else member for member in leader]
    groups = torch.zeros(len(leader), len(leader), dtype=torch.float64)
    groups[leader, range(len(leader))] = 1.0
    groups = groups[groups.any(1)]
    reduced = constraints @ groups.T
    projection = torch.eye(len(groups), dtype=torch.float64) - torch.linalg.pinv(reduced) @ reduced
    # What is left of rounding where the projection is 0 would let untied layers act upon each other.
    projection[projection.abs() < 1e-9] = 0.0
    return groups, groups.T @ projection


def proportionality_error(before: Tensor, after: Tensor) -> float:
    """The relative distance of ``after`` from the nearest multiple of ``before``: 0 where it is ``k * before``.

    Example:
        >>> proportionality_error(torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0]))
        0.0
    """
    before, after = before.detach().double().flatten(), after.detach().double().flatten()
    multiple = (before @ after) / (before @ before).clamp(min=torch.finfo(torch.float64).tiny)
    distance = torch.linalg.vector_norm(after - multiple * before)
    return float(distance / torch.linalg.vector_norm(after).clamp(min=torch.finfo(torch.float64).tiny))
