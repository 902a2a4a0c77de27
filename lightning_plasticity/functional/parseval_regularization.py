"""Parseval regularisation: draw the rows or columns of weight matrices towards being orthogonal."""

import torch
from torch import Tensor


def parseval_update(matrix: Tensor, rate: Tensor | float, target: float = 2.0) -> Tensor:
    r"""What to add to a matrix: :math:`-e \nabla \|W W^\top - s I\|_F^2 = -4 e (W W^\top - s I) W`.

    Of the two products :math:`W W^\top` and :math:`W^\top W` the smaller one is meant, for the other cannot be
    :math:`s I`. A singular value :math:`\sigma` becomes :math:`\sigma (1 - 4 e (\sigma^2 - s))`. No singular value ever
    passes :math:`\sqrt s`: the rate is held below :math:`1 / 4 (3 m - s)`, with :math:`m` the larger of :math:`s` and
    :math:`\|W W^\top\|_F \ge \sigma_{\max}^2`, up to which the new value grows with the old one.

    Args:
        matrix: :math:`W`, or several of one shape.
        rate: :math:`e`.
        target: :math:`s`, the squared singular values to draw to.

    Example:
        >>> parseval_update(torch.tensor([[2.0, 0.0]]), 0.01, target=1.0)
        tensor([[-0.2400, -0.0000]])
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    gram = gram_of(wide)
    factor = parseval_factor(torch.linalg.matrix_norm(gram, keepdim=True), rate, target)
    gram.diagonal(dim1=-2, dim2=-1).sub_(target)
    return (factor * times_gram(gram, wide)).to(matrix.dtype)


def gram_of(matrix: Tensor) -> Tensor:
    r"""The smaller one of :math:`W W^\top` and :math:`W^\top W`, of a matrix or of several of one shape.

    Example:
        >>> gram_of(torch.tensor([[1.0, 2.0]]))
        tensor([[5.]])
    """
    return matrix @ matrix.mT if _is_wide(matrix) else matrix.mT @ matrix


def times_gram(gram: Tensor, matrix: Tensor) -> Tensor:
    """The product of a matrix with what was made of its :func:`gram_of`, from that one's side.

    Example:
        >>> times_gram(torch.tensor([[5.0]]), torch.tensor([[1.0, 2.0]]))
        tensor([[ 5., 10.]])
    """
    return gram @ matrix if _is_wide(matrix) else matrix @ gram


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[-1] > matrix.shape[-2]


def parseval_factor(norm: Tensor, rate: Tensor | float, target: float = 2.0) -> Tensor:
    r"""By what :math:`(W W^\top - s I) W` is multiplied: :math:`-4 e`, or less where that would throw too far.

    Args:
        norm: :math:`\|W W^\top\|_F`.
        rate: :math:`e`.
        target: :math:`s`.

    Example:
        >>> parseval_factor(torch.tensor(4.0), 0.01, target=1.0), parseval_factor(torch.tensor(4.0), 1.0, target=1.0)
        (tensor(-0.0400), tensor(-0.0909))
    """
    most = torch.rsub(norm.clamp(min=target), target, alpha=3).reciprocal()
    return torch.clamp(most, min=-4 * rate)
