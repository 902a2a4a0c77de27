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
    is_wide = wide.shape[1] > wide.shape[0]
    gram = wide @ wide.mT if is_wide else wide.mT @ wide
    largest = torch.linalg.matrix_norm(gram, keepdim=True).clamp(min=target)
    factor = torch.clamp(torch.reciprocal(target - 3 * largest), min=-4 * rate)
    gram.diagonal(dim1=-2, dim2=-1).sub_(target)
    return (factor * (gram @ wide if is_wide else wide @ gram)).to(matrix.dtype)
