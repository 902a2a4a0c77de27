"""Which entries of a tensor have the smallest magnitude, whether it is whole or shared out among ranks."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.sums import sum_over_shards

# Tensors are read in pieces, so that choosing takes hardly any memory beside the mask. On the CPU they are just too
# small for PyTorch to share them among threads, which wait longer for each other than they work on a busy machine.
_PIECE = {"cpu": 2**15 - 1}
_PIECE_ON_ACCELERATORS = 2**22
_DIGIT = 11  # bits
_DIGIT_THAT_IS_SENT = 8  # a message of 2 kB in place of 16
_PATTERN = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class Chosen:
    """The entries of a tensor that are chosen, of which each rank knows those of its own part.

    They are counted row by row in the whole tensor. All ranks must make this; it takes one message, of a number for
    each row and each piece that rows are cut into. For a tensor that is not shared out nothing is sent.

    Args:
        mask: which entries of the part are chosen.
        tensor: of which it is the part.

    Attributes:
        count: how many there are on all ranks.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> chosen = Chosen(weight > 2, weight)
        >>> chosen.count, chosen.first(1), chosen.take(torch.tensor([7.0, 8.0])).tolist()
        (2, 1, [7.0, 8.0])
    """

    def __init__(self, mask: Tensor, tensor: Tensor) -> None:
        layout = part_of(tensor).layout
        self._is_all = layout is None
        if layout is None:
            self.count = int(torch.count_nonzero(mask))
            return
        # Entries that are neighbours in the part are so in the whole, up to the last dimension that is cut.
        last = max(dim for dim, places in enumerate(layout.places) if places is not None)
        rows = torch.arange(math.prod(layout.shape[:last]), device=mask.device).view(layout.shape[:last])
        for dim, places in enumerate(layout.places[:last]):
            rows = rows if places is None else rows.index_select(dim, places)
        own = torch.count_nonzero(mask.flatten(last), dim=-1).flatten()
        here = (rows.flatten(), layout.piece[last])
        table = own.new_zeros(layout.shape[:last].numel(), layout.pieces[last])
        table[here] = own
        [table] = sum_over_shards([table], [tensor])
        self.count = int(table.sum())
        self._own = own  # how many there are in each row of the part
        self._before = (table.flatten().cumsum(0).view(table.shape) - table)[here]  # how many before, in the whole

    def take(self, values: Tensor) -> Tensor:
        """Of values for all that are chosen, those for the part."""
        if self._is_all:
            return values
        first = self._own.cumsum(0) - self._own
        shifts = (self._before - first).repeat_interleave(self._own)
        return values[shifts + torch.arange(len(shifts), device=shifts.device)]

    def first(self, count: int) -> int:
        """How many of the first ``count`` that are chosen are in the part."""
        if self._is_all:
            return min(count, self.count)
        return int((count - self._before).clamp(min=0).minimum(self._own).sum())


def smallest(values: Tensor, count: int, tensor: Tensor | None = None) -> Tensor:
    """Mask the ``count`` entries of the smallest magnitude; among equal ones those that come first, row by row.

    So the choice depends on the values alone, and is the same on every rank. NaN counts as the largest. Where a tensor
    is shared out, ranks send how many entries have which digits, never the entries: 2 kB for each byte of an entry.

    Args:
        values: one for each entry of the tensor, or of the part of it that this rank holds.
        count: how many on all ranks together.
        tensor: of which the values are; None where they are all.

    Returns:
        A mask of the values' shape.

    Example:
        >>> smallest(torch.tensor([[0.5, -0.1], [0.2, 0.1]]), 2)
        tensor([[False,  True],
                [False,  True]])
    """
    tensor = values if tensor is None else tensor
    mask = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    if count == 0:
        return mask
    last, ties, equal = _pattern_of_rank(values, count, tensor)
    if ties < equal and part_of(tensor).layout is not None:
        tied = torch.cat([patterns == last for patterns in _patterns(values)]).view(values.shape)
        ties = Chosen(tied, tensor).first(ties)
    for chosen, patterns in zip(pieces_of(mask), _patterns(values), strict=True):
        torch.lt(patterns, last, out=chosen)
        of_these = (patterns == last).nonzero().flatten()[:ties]
        chosen[of_these] = True
        ties -= len(of_these)
    return mask


def below(values: Tensor, threshold: float, relative: bool = False, tensor: Tensor | None = None) -> Tensor:
    """Mask the entries whose magnitude is below a threshold, or at most this multiple of the tensor's mean magnitude.

    Where all entries are 0, all are masked with a multiple; where the mean is not finite, none is.

    Args:
        values: one for each entry of the tensor, or of the part of it that this rank holds.
        threshold: the bound or the multiple.
        relative: whether it is a multiple.
        tensor: of which the values are; None where they are all.

    Example:
        >>> below(torch.tensor([1.0, -2.0, 3.0]), 2.0), below(torch.tensor([1.0, -2.0, 9.0]), 0.5, relative=True)
        (tensor([ True, False, False]), tensor([ True,  True, False]))
    """
    magnitudes = values.abs()
    if not relative:
        return magnitudes < threshold
    bound = threshold * mean_of_all(magnitudes, values if tensor is None else tensor)
    return (magnitudes <= bound) & bound.isfinite()


def mean_of_all(values: Tensor, tensor: Tensor) -> Tensor:
    """The mean over a whole tensor, in float32 at least, of values for the part of it that this rank holds.

    Example:
        >>> mean_of_all(torch.tensor([1.0, 2.0]), torch.zeros(2))
        tensor(1.5000)
    """
    [total] = sum_over_shards([values.sum(dtype=torch.promote_types(values.dtype, torch.float32))], [tensor])
    return total / tensor.numel()


def pieces_of(values: Tensor) -> Sequence[Tensor]:
    """Views, row by row; of a copy where the tensor is laid out otherwise."""
    return torch.split(values.detach().flatten(), _PIECE.get(values.device.type, _PIECE_ON_ACCELERATORS))


def _patterns(values: Tensor) -> Iterator[Tensor]:
    """The bits of the magnitudes as integers, piece by piece: they are in the same order as the magnitudes."""
    for piece in pieces_of(values):
        yield piece.abs().view(_PATTERN[values.dtype])


def _pattern_of_rank(values: Tensor, count: int, tensor: Tensor) -> tuple[int, int, int]:
    """The bits of the magnitude that is at place ``count``, how many equal to it are needed up to there, and are there.

    Found digit by digit, the highest first, from a histogram of those that agree in the digits before it: several times
    as fast as ``torch.kthvalue``, and without copies of the tensor.
    """
    bits, found = torch.finfo(values.dtype).bits, 0
    remaining, digit_size = bits, _DIGIT if part_of(tensor).layout is None else _DIGIT_THAT_IS_SENT
    while remaining > 0:
        width = min(digit_size, remaining)
        remaining -= width
        histogram = torch.zeros(2**width, dtype=torch.int64, device=values.device)
        for patterns in _patterns(values):
            digits = patterns >> remaining
            if remaining + width < bits:
                digits = digits[digits >> width == found] & (2**width - 1)
            histogram += torch.bincount(digits, minlength=2**width)
        [histogram] = sum_over_shards([histogram], [tensor])
        up_to = histogram.cumsum(0)
        digit = int(torch.searchsorted(up_to, count))
        equal = int(histogram[digit])
        count -= int(up_to[digit]) - equal
        found = found << width | digit
    return found, count, equal
