"""Continual Backprop: how useful is a unit, and which units are the least useful."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Utility: TypeAlias = Literal[
    "contribution", "adaptable_contribution", "zero_contribution", "adaptation", "weight", "random"
]
UTILITIES: tuple[Utility, ...] = get_args(Utility)


def bias_corrected(average: Tensor, age: Tensor, decay_rate: float) -> Tensor:
    r"""An exponential average that started from zero ``age`` steps ago, as a mean: :math:`v / (1 - \eta^a)`.

    At age 0 nothing has been averaged yet: the value is 0.

    Example:
        >>> bias_corrected(torch.tensor([0.01, 0.0]), torch.tensor([1, 0]), 0.99)
        tensor([1.0000, 0.0000])
    """
    weight = 1 - torch.pow(decay_rate, age.to(torch.float64)).to(average.dtype)
    return (average / weight).masked_fill_(age <= 0, 0.0)


def per_incoming(values: Tensor, incoming: Tensor) -> Tensor:
    """Values divided by the size of the weights that make the units; a unit with weights of 0 gets a finite value too.

    Example:
        >>> per_incoming(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0]))
        tensor([2., 0.])
    """
    return values / incoming.clamp(min=torch.finfo(incoming.dtype).eps)


def ranked(values: Tensor, eligible: Tensor) -> Tensor:
    """What sorts eligible places by their values, and the others after them.

    Example:
        >>> ranked(torch.tensor([0.1, torch.nan]), torch.tensor([False, True]))
        tensor([       inf, 3.4028e+38])
    """
    # NaN sorts after infinity: a diverged unit is not to be taken before an eligible one, nor after an ineligible one
    return values.nan_to_num(nan=torch.finfo(values.dtype).max).masked_fill_(~eligible, torch.inf)


def least(values: Tensor, eligible: Tensor, count: int) -> Tensor:
    """The ``count`` eligible places with the smallest values; of equal ones the first.

    ``count`` must not exceed the number of eligible places. Nothing waits for the device.

    Example:
        >>> least(torch.tensor([0.1, 0.3, 0.2, 0.2]), torch.tensor([False, True, True, True]), 2)
        tensor([2, 3])
    """
    return ranked(values, eligible).argsort(stable=True)[:count]
