"""Calibrated partial resets: how much of each unit to reset."""

import torch
from torch import Tensor


def reset_shares(utility: Tensor, strength: float = 0.015, sharpness: float = 16.0) -> Tensor:
    r"""What share of each unit to reset: :math:`r = \rho \min(2 \, \mathrm{sigmoid}(-\kappa (u - 1)), 1)`.

    Units of at most the mean utility get the whole strength, and others the less the more they are above it.

    Args:
        utility: :math:`u`, relative to the mean of the layer.
        strength: :math:`\rho`.
        sharpness: :math:`\kappa`.

    Example:
        >>> reset_shares(torch.tensor([0.5, 1.0, 1.1]), strength=1.0)
        tensor([1.0000, 1.0000, 0.3360])
    """
    return strength * (2 * torch.sigmoid(-sharpness * (utility - 1))).clamp(max=1.0)
