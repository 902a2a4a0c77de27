r"""Spectral regularisation: draw the largest singular value of weight matrices towards 1.

The largest singular value comes from power iteration, :math:`v = W^\top u / \|\cdot\|`, then
:math:`u = W v / \|\cdot\|` and :math:`\sigma = \|W v\|`. Where matrices are shared out among ranks, these vectors are
whole on each.
"""

import torch
from torch import Tensor

from lightning_plasticity.shards import Part


def times_columns(part: Part, left: Tensor) -> Tensor:
    r"""What a part of a matrix adds to :math:`W^\top u`, which is the sum over all parts.

    Args:
        part: of :math:`W`; a kernel is flattened to one row for each output.
        left: :math:`u`, whole.

    Example:
        >>> from lightning_plasticity.shards import part_of
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> times_columns(part_of(weight), torch.tensor([1.0, 0.0]))
        tensor([3., 0.])
    """
    product = part.local.flatten(1).mT @ part.take(left, 0)
    return part.widen(product.view(1, *part.local.shape[1:]), *range(1, part.local.ndim)).flatten()


def times_rows(part: Part, right: Tensor) -> Tensor:
    r"""What a part of a matrix adds to :math:`W v`, which is the sum over all parts.

    Example:
        >>> from lightning_plasticity.shards import part_of
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> times_rows(part_of(weight), torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    return part.widen(part.local.flatten(1) @ _columns_of(part, right), 0)


def outer(part: Part, left: Tensor, right: Tensor) -> Tensor:
    r"""The part of :math:`u v^\top`.

    Example:
        >>> from lightning_plasticity.shards import part_of
        >>> outer(part_of(torch.zeros(1, 2)), torch.tensor([2.0]), torch.tensor([3.0, 4.0]))
        tensor([[6., 8.]])
    """
    return torch.outer(part.take(left, 0), _columns_of(part, right)).view(part.local.shape)


def _columns_of(part: Part, right: Tensor) -> Tensor:
    """Of a vector with an entry for each column of the whole matrix, the entries of the part's columns."""
    return part.take(right.view(1, *part.shape[1:]), *range(1, len(part.shape))).flatten()


def length_and_direction(product: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The length of a vector, and the vector with length 1: where it is 0, as it was before, or 0.

    Example:
        >>> length_and_direction(torch.tensor([3.0, 4.0]))
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    length = torch.linalg.vector_norm(product)
    direction = product / length.clamp(min=torch.finfo(product.dtype).tiny)
    return length, direction if before is None else torch.where(length > 0, direction, before)


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


def squared_length(values: Tensor) -> Tensor:
    r"""What entries of a vector add to :math:`\|b\|^2`.

    Example:
        >>> squared_length(torch.tensor([3.0, 4.0]))
        tensor(25.)
    """
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().sum()


def vector_step(values: Tensor, square: Tensor, rate: Tensor | float, power: int = 2) -> Tensor:
    r"""How far the penalty :math:`\|b\|^{2k}` moves a vector: :math:`-2 e k \|b\|^{2k-2} \, b`, and never past 0.

    Args:
        values: :math:`b`, or some of its entries.
        square: :math:`\|b\|^2`.
        rate: :math:`e`.
        power: :math:`k`.

    Example:
        >>> vector_step(torch.tensor([3.0, 4.0]), torch.tensor(25.0), 0.001)
        tensor([-0.3000, -0.4000])
        >>> vector_step(torch.tensor([3.0, 4.0]), torch.tensor(25.0), 1.0)
        tensor([-3., -4.])
    """
    factor = (2 * rate * power * square ** (power - 1)).clamp(max=1.0)
    return (values.to(square.dtype) * -factor).to(values.dtype)
