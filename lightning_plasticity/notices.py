"""Warnings that name the line of the user's program, however deep in frameworks they come up."""

import sys
import warnings

from lightning.pytorch.utilities import rank_zero_only

_FRAMEWORKS = {"lightning_plasticity", "lightning", "pytorch_lightning", "lightning_utilities", "torch", "contextlib"}


def warn(message: str) -> None:
    """Warns at the innermost line that is neither of this package nor of PyTorch or Lightning."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _FRAMEWORKS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@rank_zero_only
def warn_on_rank_zero(message: str) -> None:
    """Warns on the first rank, of what is so on all."""
    warn(message)
