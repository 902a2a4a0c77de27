"""Selective reinitialisation: which weights of a tensor are of the least use, and what takes their place."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Reinit: TypeAlias = Literal["mean", "mean_noise", "normal", "init", "init_mean"]

# Tensors are read in pieces, so that choosing takes hardly any memory beside the mask. On the CPU they are just too
# small for PyTorch to share them among threads, which wait longer for each other than they work on a busy machine.
_PIECE = {"cpu": 2**15 - 1}
_PIECE_ON_ACCELERATORS = 2**22
_DIGIT = 11  # bits
_PATTERN = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True)
class Case:
    """A setting of the fine-tuning paper: ``fraction`` of the weights is given new values by ``reinit`` and ``std``."""

    fraction: float
    reinit: Reinit
    std: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read a case: a percentage and one of the codes M (mean), MN (mean and noise), NS (N(0, 0.2)), N (N(0, 1)).

        Raises:
            ValueError: If it is written otherwise, or above 100 %.

        Example:
            >>> Case.parse("5MN"), Case.parse("25NS")
            (Case(fraction=0.05, reinit='mean_noise', std=None), Case(fraction=0.25, reinit='normal', std=0.2))
        """
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)(MN|M|NS|N)", text) if isinstance(text, str) else None
        if parts is None or float(parts[1]) > 100:
            raise ValueError(
                "A case is a percentage from 0 to 100 and one of the codes M, MN, NS and N, as in '10M' or '5MN', "
                f"but case is {text!r}. Write it like these."
            )
        codes: dict[str, tuple[Reinit, float | None]] = {
            "M": ("mean", None),
            "MN": ("mean_noise", None),
            "NS": ("normal", 0.2),
            "N": ("normal", 1.0),
        }
        return cls(float(parts[1]) / 100, *codes[parts[2]])


def count_due(fraction: float, size: int) -> tuple[int, float]:
    """How many of ``size`` weights are ``fraction`` of them: the whole number below, and the remainder.

    Example:
        >>> count_due(0.25, 10), count_due(0.29, 100)  # although 0.29 * 100 == 28.999999999999996
        ((2, 0.5), (29, 0.0))
    """
    share = fraction * size
    if math.isclose(share, round(share), rel_tol=1e-14):
        return round(share), 0.0
    return math.floor(share), share - math.floor(share)


def gradient_utilities(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    r"""How much the loss would change, to first order, if a weight were 0: :math:`|w \cdot \partial L / \partial w|`.

    Example:
        >>> gradient_utilities([torch.tensor([2.0, -1.0])], [torch.tensor([-0.5, 0.0])])
        [tensor([1., 0.])]
    """
    utilities = list(torch._foreach_mul(list(weights), list(gradients)))
    torch._foreach_abs_(utilities)
    return utilities


def smallest(values: Tensor, count: int) -> Tensor:
    """Mask the ``count`` entries of the smallest magnitude; among equal ones those that come first, row by row.

    So the choice depends on the values alone, and is the same on every rank. NaN counts as the largest.

    Example:
        >>> smallest(torch.tensor([[0.5, -0.1], [0.2, 0.1]]), 2)
        tensor([[False,  True],
                [False,  True]])
    """
    mask = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    if count == 0:
        return mask
    last, ties = _pattern_of_rank(values, count)
    for chosen, patterns in zip(_pieces(mask), _patterns(values), strict=True):
        torch.lt(patterns, last, out=chosen)
        tied = (patterns == last).nonzero().flatten()[:ties]
        chosen[tied] = True
        ties -= len(tied)
    return mask


def below(values: Tensor, threshold: float, relative: bool = False) -> Tensor:
    """Mask the entries whose magnitude is below a threshold, or at most this multiple of the tensor's mean magnitude.

    Where all entries are 0, all are masked with a multiple; where the mean is not finite, none is.

    Example:
        >>> below(torch.tensor([1.0, -2.0, 3.0]), 2.0), below(torch.tensor([1.0, -2.0, 9.0]), 0.5, relative=True)
        (tensor([ True, False, False]), tensor([ True,  True, False]))
    """
    magnitudes = values.abs()
    if not relative:
        return magnitudes < threshold
    bound = threshold * magnitudes.mean(dtype=_wide(values.dtype))
    return (magnitudes <= bound) & bound.isfinite()


def new_values(
    weight: Tensor, mask: Tensor, reinit: Reinit, generator: torch.Generator, std: float | None = None
) -> Tensor:
    r"""What takes the place of the masked weights: one value for all, or one for each in their order.

    ========================= =====================================================
    ``"mean"``                the mean of the whole tensor
    ``"mean_noise"``          mean :math:`+\, \mathcal{N}(0, 1) \cdot \mu / 10`
    ``"normal"``              :math:`\mathcal{N}(0, \text{std}^2)`
    ========================= =====================================================

    :math:`\mu` is the mean magnitude of the weights that remain (0 where none does), so that the noise is an order of
    magnitude smaller than they are. The mean itself, close to 0, would make it next to nothing.

    Raises:
        ValueError: If ``reinit`` is none of these; the others need the initial distribution.

    Example:
        >>> weight = torch.tensor([0.0, 2.0, 4.0])
        >>> new_values(weight, weight == 0, "mean", torch.Generator())
        tensor(2.)
    """
    if reinit not in ("mean", "mean_noise", "normal"):
        raise ValueError(f"reinit must be 'mean', 'mean_noise' or 'normal' here, got {reinit!r}.")
    weight, wide = weight.detach(), _wide(weight.dtype)
    mean = weight.mean(dtype=wide)
    if reinit == "mean":
        return mean
    # Not mask.sum(), which turns the mask into integers first: twice the memory of the tensor.
    count = int(torch.count_nonzero(mask))
    noise = torch.randn(count, generator=generator, dtype=wide, device=weight.device)
    if reinit == "normal":
        return noise.mul_(1.0 if std is None else std)
    pieces = zip(_pieces(weight), _pieces(mask), strict=True)
    remaining = sum(torch.linalg.vector_norm(torch.where(chosen, 0, w), 1, dtype=wide) for w, chosen in pieces)
    return noise.mul_(remaining / (10 * max(weight.numel() - count, 1))).add_(mean)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _pieces(values: Tensor) -> Sequence[Tensor]:
    """Views, row by row; of a copy where the tensor is laid out otherwise."""
    return torch.split(values.detach().flatten(), _PIECE.get(values.device.type, _PIECE_ON_ACCELERATORS))


def _patterns(values: Tensor) -> Iterator[Tensor]:
    """The bits of the magnitudes as integers, piece by piece: they are in the same order as the magnitudes."""
    for piece in _pieces(values):
        yield piece.abs().view(_PATTERN[values.dtype])


def _pattern_of_rank(values: Tensor, count: int) -> tuple[int, int]:
    """The bits of the magnitude that is at place ``count``, and how many of those equal to it are needed up to there.

    Found digit by digit, the highest first, from a histogram of those that agree in the digits before it: several times
    as fast as ``torch.kthvalue``, and without copies of the tensor.
    """
    bits, found = torch.finfo(values.dtype).bits, 0
    remaining = bits
    while remaining > 0:
        width = min(_DIGIT, remaining)
        remaining -= width
        histogram = torch.zeros(2**width, dtype=torch.int64, device=values.device)
        for patterns in _patterns(values):
            digits = patterns >> remaining
            if remaining + width < bits:
                digits = digits[digits >> width == found] & (2**width - 1)
            histogram += torch.bincount(digits, minlength=2**width)
        up_to = histogram.cumsum(0)
        digit = int(torch.searchsorted(up_to, count))
        count -= int(up_to[digit] - histogram[digit])
        found = found << width | digit
    return found, count


def check_settings(
    *,
    once: bool,
    reinit: Reinit,
    std: float | None,
    utility: str,
    decay_rate: float,
    forget: str,
    threshold: float | None,
    relative_threshold: float | None,
    zero_biases: bool | Literal["all"],
) -> None:
    """Raise if settings do not go together; ``once``: the method acts when fitting starts, and never again."""
    if std is not None and reinit != "normal":
        raise ValueError(f"std belongs to reinit='normal', got {std} with {reinit!r}. Leave it out, or change reinit.")
    if utility == "gradient" and once:
        raise ValueError(
            "utility='gradient' needs gradients, and there are none when fitting starts. "
            "Give every_n_train_steps or every_n_epochs, or use utility='magnitude'."
        )
    if decay_rate > 0 and utility != "gradient":
        raise ValueError(
            f"decay_rate belongs to utility='gradient', got {decay_rate} with {utility!r}. "
            "Leave it out, or change utility."
        )
    if forget == "all" and not decay_rate > 0:
        raise ValueError(
            "forget='all' belongs to a running average, got it with decay_rate=0.0, where the last step decides. "
            "Leave it out, or give a decay_rate."
        )
    if threshold is not None and relative_threshold is not None:
        raise ValueError(
            f"Only one of threshold and relative_threshold may be given, got {threshold} and {relative_threshold}."
        )
    if zero_biases == "all" and not once:
        raise ValueError(
            "zero_biases='all' belongs to the form that acts once, got it with a schedule, where biases stay as "
            "they are. Leave one of the two out."
        )
