"""Self-normalized resets: how long units are usually silent, and which have been for too long."""

from __future__ import annotations

import torch
from torch import Tensor

SILENT, FIRED = 1, 2  # what a unit did in a step; 0 where it was not heard
_FINE = 16


def bin_of(silences: Tensor) -> Tensor:
    """The bin in which a number of steps is counted.

    Up to 16 steps each number has a bin of its own; from there on bins are a sixteenth as wide as what they count is
    long, so that a histogram has some hundred bins instead of thousands.

    Example:
        >>> bin_of(torch.tensor([0, 15, 31, 32, 33, 34, 20_000]))
        tensor([  0,  15,  31,  32,  32,  33, 179])
    """
    mantissa, exponent = torch.frexp(silences.float())
    logarithmic = (exponent.long() - 5) * _FINE + (2 * _FINE * mantissa).long()
    return torch.where(silences < _FINE, silences, logarithmic)


def longest_of(bins: Tensor) -> Tensor:
    """The largest number of steps that is counted in a bin.

    Example:
        >>> longest_of(torch.tensor([0, 15, 31, 32, 33, 179]))
        tensor([    0,    15,    31,    33,    35, 20479])
    """
    octave = (bins // _FINE - 1).clamp(min=0)
    logarithmic = (bins % _FINE + _FINE + 1) * 2**octave - 1
    return torch.where(bins < _FINE, bins, logarithmic)


def count_silences(silences: Tensor, histogram: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
    """What units did in some steps: how long each has been silent now, and how often it was for how long before.

    Args:
        silences: for how many steps each unit had been silent before.
        histogram: units, bins: how often each was silent for as long before it fired; longer ones are in the last bin.
        heard: steps, units: 2 where a unit fired, 1 where it was silent, 0 where it was not heard: no time passes then.

    Example:
        >>> heard = torch.tensor([[1], [2], [1], [1], [2], [1]])
        >>> count_silences(torch.tensor([3]), torch.zeros(1, 6, dtype=torch.int32), heard)
        (tensor([1]), tensor([[0, 0, 1, 0, 1, 0]], dtype=torch.int32))
    """
    time = (heard > 0).cumsum(0)
    fired = heard == FIRED
    # Times begin at 1, so that the largest is that of the last firing, or where there was none that before the steps.
    last = torch.where(fired, time, -silences).cummax(0).values
    before = torch.cat([-silences[None], last[:-1]])
    ended = torch.where(fired, time - 1 - before, 0)
    bins = bin_of(ended).clamp(max=histogram.shape[1] - 1)
    histogram = histogram.scatter_add(1, bins.T, fired.T.to(histogram.dtype))
    return time[-1] - last[-1], histogram


def new_thresholds(thresholds: Tensor, histogram: Tensor, significance: float, least: int, most: int) -> Tensor:
    r"""From how long units were silent before they fired: for how long it is likely that they fire again.

    With :math:`q` the first length that is not exceeded by more than a share ``significance`` of the silences, it is
    :math:`q` if that is below the threshold until now, and otherwise twice that; between ``least`` and ``most``. A unit
    without silences keeps its threshold.

    Example:
        >>> histogram = torch.zeros(3, 16, dtype=torch.int32)
        >>> histogram[0, 4], histogram[0, 8], histogram[1, 12] = 90, 10, 1
        >>> new_thresholds(torch.tensor([10, 10, 10]), histogram, 0.1, 2, 15)
        tensor([ 4, 15, 10])
    """
    counts = histogram[:, 1:].cumsum(1).float()
    total = counts[:, -1:]
    enough = (1 - significance) * total * (1 - 1e-6)  # reached up to rounding
    likely = longest_of((counts < enough).sum(1) + 1)
    new = torch.where(likely < thresholds, likely, 2 * thresholds)
    return torch.where(total.squeeze(1) > 0, new, thresholds).clamp(least, most)
