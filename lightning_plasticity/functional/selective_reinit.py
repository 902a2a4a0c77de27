"""Selective reinitialisation: which weights of a tensor are of the least use, and what takes their place."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_plasticity.functional.selection import Chosen, mean_of_all, pieces_of
from lightning_plasticity.shards.sums import sum_over_shards
from lightning_plasticity.shards.tensors import local

Reinit: TypeAlias = Literal["mean", "mean_noise", "normal", "init", "init_mean"]


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
    held, wide = local(weight).detach(), _wide(weight.dtype)
    mean = mean_of_all(held, weight)
    if reinit == "mean":
        return mean
    chosen = Chosen(mask, weight)
    noise = torch.randn(chosen.count, generator=generator, dtype=wide, device=held.device)
    noise = chosen.take(noise)
    if reinit == "normal":
        return noise.mul_(1.0 if std is None else std)
    pieces = zip(pieces_of(held), pieces_of(mask), strict=True)
    sizes = [torch.linalg.vector_norm(torch.where(own, 0, w), 1, dtype=wide) for w, own in pieces]
    [remaining] = sum_over_shards([sum(sizes, start=mean.new_zeros(()))], [weight])
    return noise.mul_(remaining / (10 * max(weight.numel() - chosen.count, 1))).add_(mean)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
