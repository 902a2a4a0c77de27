"""ReDo: which units are dormant."""

import torch
from torch import Tensor


def dormancy_scores(mean_size: Tensor) -> Tensor:
    r"""The size of each unit's activation relative to its layer, :math:`s_i = m_i / \overline m`.

    :math:`m_i` is the mean of :math:`|h_i|` over examples and positions. Where the whole layer is silent every score
    is 0.

    Example:
        >>> dormancy_scores(torch.tensor([0.0, 1.0, 3.0, 4.0]))
        tensor([0.0000, 0.5000, 1.5000, 2.0000])
        >>> dormancy_scores(torch.zeros(2))
        tensor([0., 0.])
    """
    mean = mean_size.mean()
    return torch.where(mean > 0, mean_size / torch.where(mean > 0, mean, torch.ones_like(mean)), torch.zeros_like(mean))


def gradient_scores(sizes: Tensor, mean: Tensor | None = None) -> Tensor:
    r"""The size of each unit's gradient relative to its layer, :math:`s_i = G_i / (\overline{G} + 10^{-9})`.

    Args:
        sizes: :math:`G`, of the units of a layer, or of several.
        mean: the mean over the layer, for each unit where there are several; None to take that of the sizes.

    Example:
        >>> gradient_scores(torch.tensor([0.0, 1.0, 3.0, 4.0]))
        tensor([0.0000, 0.5000, 1.5000, 2.0000])
        >>> gradient_scores(torch.zeros(2))
        tensor([0., 0.])
    """
    return sizes / ((sizes.mean() if mean is None else mean) + 1e-9)
