"""Spectral regularisation: draw the largest singular value of weight matrices towards 1."""

import torch
from torch import Tensor


def power_iteration(matrix: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""One step towards the largest singular value: :math:`v = W^\top u / \|\cdot\|`, then :math:`u = W v / \|\cdot\|`.

    Where a product is 0 there is no direction to take, and ``left`` stays as it is.

    Args:
        matrix: :math:`W`.
        left: :math:`u`, of length 1.

    Returns:
        The estimate :math:`\|W v\|` of the singular value, then :math:`u` and :math:`v`.

    Example:
        >>> power_iteration(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([1.0, 0.0]))
        (tensor(3.), tensor([1., 0.]), tensor([1., 0.]))
    """
    right = matrix.mT @ left
    right = right / torch.linalg.vector_norm(right).clamp(min=torch.finfo(right.dtype).tiny)
    product = matrix @ right
    sigma = torch.linalg.vector_norm(product)
    left = torch.where(sigma > 0, product / sigma.clamp(min=torch.finfo(product.dtype).tiny), left)
    return sigma, left, right


def spectral_step(sigma: Tensor, rate: Tensor | float, power: int = 2) -> Tensor:
    r"""How far the penalty :math:`(\sigma^k - 1)^2` moves a singular value: :math:`-2 e k \sigma^{k-1} (\sigma^k - 1)`.

    Never past 1: the value is held between 0 and :math:`1 - \sigma`.

    Args:
        sigma: :math:`\sigma`.
        rate: :math:`e`.
        power: :math:`k`.

    Example:
        >>> spectral_step(torch.tensor(2.0), 0.01), spectral_step(torch.tensor(2.0), 1.0)
        (tensor(-0.2400), tensor(-1.))
    """
    step = -2 * rate * power * sigma ** (power - 1) * (sigma**power - 1)
    return torch.minimum(step.abs(), (1 - sigma).abs()) * (1 - sigma).sign()


def vector_step(values: Tensor, rate: Tensor | float, power: int = 2) -> Tensor:
    r"""How far the penalty :math:`\|b\|^{2k}` moves a vector: :math:`-2 e k \|b\|^{2k-2} \, b`, and never past 0.

    Args:
        values: :math:`b`.
        rate: :math:`e`.
        power: :math:`k`.

    Example:
        >>> vector_step(torch.tensor([3.0, 4.0]), 0.001), vector_step(torch.tensor([3.0, 4.0]), 1.0)
        (tensor([-0.3000, -0.4000]), tensor([-3., -4.]))
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    factor = (2 * rate * power * wide.square().sum() ** (power - 1)).clamp(max=1.0)
    return (wide * -factor).to(values.dtype)
