"""Direction-aware shrinking: weights that point where the loss does not call for shrink more than others."""

from __future__ import annotations

import torch
from torch import Tensor


def shrink_factors(weight: Tensor, direction: Tensor, least: float) -> Tensor:
    r"""By what to multiply a weight: :math:`\mathrm{clamp}(\cos(w, g), \lambda, 1)` for each of its parts.

    Parts are the rows of a matrix, the kernels of a convolution, one for each output and input, and a vector as a
    whole. Where either is 0 all over, so is the cosine.

    Args:
        weight: the weight.
        direction: where the loss calls for the weight to go, of the same shape.
        least: :math:`\lambda`.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
        >>> direction = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> shrink_factors(weight, direction, 0.3)
        tensor([[1.0000],
                [0.3000],
                [0.8000],
                [0.3000]])
    """
    dims = (0,) if weight.ndim == 1 else (1,) if weight.ndim == 2 else tuple(range(2, weight.ndim))
    precise = torch.promote_types(weight.dtype, torch.float32)
    w, g = weight.to(precise), direction.to(precise)
    # Each is scaled to a largest entry of 1 first: squares of small gradients would be 0.
    w, g = (x / torch.where(size > 0, size, 1.0) for x in (w, g) for size in [x.abs().amax(dims, keepdim=True)])
    lengths = torch.linalg.vector_norm(w, dim=dims, keepdim=True) * torch.linalg.vector_norm(g, dim=dims, keepdim=True)
    cosine = (w * g).sum(dims, keepdim=True) / torch.where(lengths > 0, lengths, 1.0)
    return cosine.clamp(least, 1.0)
