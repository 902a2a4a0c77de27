r"""Spectral regularisation: draw the largest singular value of weight matrices towards 1.

The largest singular value comes from power iteration, :math:`v = W^\top u / \|\cdot\|`, then
:math:`u = W v / \|\cdot\|` and :math:`\sigma = \|W v\|`. Where matrices are shared out among ranks, these vectors are
whole on each.
"""

import torch
from torch import Tensor

from lightning_plasticity.shards.parts import Part


def times_columns(part: Part, left: Tensor) -> Tensor:
    r"""What a part of a matrix adds to :math:`W^\top u`, which is the sum over all parts.

    Args:
        part: of :math:`W`; a kernel is flattened to one row for each output.
        left: :math:`u`, whole.

    Example:
        >>> from lightning_plasticity.shards.parts import part_of
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> times_columns(part_of(weight), torch.tensor([1.0, 0.0]))
        tensor([3., 0.])
    """
    product = part.local.flatten(1).mT @ part.take(left, 0)
    return part.widen(product.view(1, *part.local.shape[1:]), *range(1, part.local.ndim)).flatten()


def times_rows(part: Part, right: Tensor) -> Tensor:
    r"""What a part of a matrix adds to :math:`W v`, which is the sum over all parts.

    Example:
        >>> from lightning_plasticity.shards.parts import part_of
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> times_rows(part_of(weight), torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    return part.widen(part.local.flatten(1) @ _columns_of(part, right), 0)


def outer(part: Part, left: Tensor, right: Tensor) -> Tensor:
    r"""The part of :math:`u v^\top`.

    Example:
        >>> from lightning_plasticity.shards.parts import part_of
        >>> outer(part_of(torch.zeros(1, 2)), torch.tensor([2.0]), torch.tensor([3.0, 4.0]))
        tensor([[6., 8.]])
    """
    return torch.outer(part.take(left, 0), _columns_of(part, right)).view(part.local.shape)


def _columns_of(part: Part, right: Tensor) -> Tensor:
    """Of a vector with an entry for each column of the whole matrix, the entries of the part's columns."""
    return part.take(right.view(1, *part.shape[1:]), *range(1, len(part.shape))).flatten()


def lengths_and_directions(products: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The lengths of vectors, and the vectors with length 1, or 0 where they are 0.

    Example:
        >>> lengths_and_directions([torch.tensor([3.0, 4.0]), torch.zeros(1)])
        ([tensor(5.), tensor(0.)], [tensor([0.6000, 0.8000]), tensor([0.])])
    """
    lengths = torch._foreach_norm(products)
    above_zero = torch._foreach_clamp_min(lengths, [torch.finfo(product.dtype).tiny for product in products])
    return list(lengths), list(torch._foreach_div(products, above_zero))


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
    size = (2 * rate * power * sigma ** (power - 1) * (sigma**power - 1)).abs()
    return torch.minimum(size, (1 - sigma).abs()) * (1 - sigma).sign()


def vector_factor(square: Tensor, rate: Tensor | float, power: int = 2) -> Tensor:
    r"""How far the penalty :math:`\|b\|^{2k}` moves a vector, as a multiple of it: :math:`-2 e k \|b\|^{2k-2}`.

    Never past 0.

    Args:
        square: :math:`\|b\|^2`.
        rate: :math:`e`.
        power: :math:`k`.

    Example:
        >>> vector_factor(torch.tensor(25.0), 0.001), vector_factor(torch.tensor(25.0), 1.0)
        (tensor(-0.1000), tensor(-1.))
    """
    return (-2 * rate * power * square ** (power - 1)).clamp(min=-1.0)
