"""Hare & Tortoise: slow weights that follow the fast ones."""

from collections.abc import Sequence

import torch
from torch import Tensor


def follow(slow: Sequence[Tensor], fast: Sequence[Tensor], decay: float) -> None:
    r"""Move slow tensors, in place, a little towards fast ones: :math:`s \leftarrow d s + (1 - d) f`.

    Entries that are not finite are not followed.

    Args:
        slow: :math:`s`, which may have a higher precision than the fast ones.
        fast: :math:`f`.
        decay: :math:`d`.

    Example:
        >>> slow = [torch.tensor([1.0])]
        >>> follow(slow, [torch.tensor([2.0])], decay=0.75)
        >>> slow
        [tensor([1.2500])]
    """
    if slow:
        as_precise = [f.to(s.dtype) for s, f in zip(slow, fast, strict=True)]
        as_precise = [torch.where(f * 0 == 0, f, s) for s, f in zip(slow, as_precise, strict=True)]
        torch._foreach_lerp_(list(slow), as_precise, 1 - decay)
