"""What rounding to half precision takes away from small changes, kept until it counts.

A weight of bfloat16 or float16 has 8 or 11 bits. A change of less than half of the last one is lost, however often it
is made, which is the way of methods that nudge every weight at every step. So the rest is kept, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.shards.parts import held_of
from lightning_plasticity.shards.tensors import for_state, local, shared_out_as

_HALF = (torch.bfloat16, torch.float16)


class Remainders:
    """What is kept for the parameters of a model: nothing before a small change, and nothing for float32 and float64.

    Values are those of the parts of tensors that this rank holds.

    Nor is anything kept for buffers, which follow the batches by themselves, and differ from rank to rank.

    In between others may write. An optimizer's step leaves what is kept as it is, but a value that was set anew has no
    remainder. A remainder is small beside its value, so that one that is not is out of date, and dropped. An entry that
    was set to 0 stays 0.

    Example:
        >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> remainders = Remainders(nn.ParameterList([weight]))
        >>> with torch.no_grad():
        ...     for _ in range(1000):  # each time less than the 0.0039 below 1 that bfloat16 has
        ...         [value] = remainders.open([weight])
        ...         remainders.close([weight], [value.mul_(0.999)])
        >>> weight.item(), round(0.999**1000, 3)
        (0.3671875, 0.368)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[Tensor, Tensor] = {}
        # asked first, for some methods write all tensors at every step
        self._are_needed = any(map(_is_half, model.parameters()))

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, or where they are in half precision their values in float32 with what is kept, as copies."""
        if not self._are_needed:
            return [local(x) for x in tensors]
        return [
            self._current(x) + local(x) if x in self._kept else local(x).float() if _is_half(x) else local(x)
            for x in tensors
        ]

    def open(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What :meth:`read` gives, in the memory of what is kept: to be changed in place and given to :meth:`close`."""
        if not self._are_needed:
            return [local(x) for x in tensors]
        return [self._current(x).add_(local(x)) if _is_half(x) else local(x) for x in tensors]

    def close(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write float32 values to the tensors that are in half precision, and keep what does not fit into them."""
        for tensor, value in zip(tensors, values, strict=True) if self._are_needed else ():
            if _is_half(tensor) and (value.dtype != tensor.dtype or tensor in self._kept):
                local(tensor).copy_(value)
                torch.sub(value, local(tensor), out=self._memory(tensor))

    def _memory(self, tensor: Tensor) -> Tensor:
        if tensor not in self._kept:
            self._kept[tensor] = torch.zeros_like(local(tensor), dtype=torch.float32)
        return self._kept[tensor]

    def _current(self, tensor: Tensor) -> Tensor:
        kept = self._memory(tensor)
        is_small = kept.abs() <= local(tensor).abs().div_(16)  # which NaN is not
        return kept.masked_fill_(is_small.logical_not_(), 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, by the parameters' names, shared out among ranks as these are."""
        named = self._model.named_parameters()
        return {name: for_state(shared_out_as(p, self._kept[p])) for name, p in named if p in self._kept}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave, or the same put together.

        Raises:
            ValueError: If the model has no such parameters in half precision.
        """
        named = dict(self._model.named_parameters())
        for name, kept in state_dict.items():
            if name not in named or named[name].shape != kept.shape or not _is_half(named[name]):
                own = (
                    f"is {named[name].dtype} of shape {tuple(named[name].shape)}" if name in named else "does not exist"
                )
                raise ValueError(
                    f"The checkpoint has what rounding kept back from {name!r}, a parameter in half precision of shape "
                    f"{tuple(kept.shape)}, which in this {type(self._model).__name__} {own}. Resume with the model and "
                    "the precision of the run."
                )
        self._kept = {
            named[name]: held_of(kept, named[name]).to(named[name].device, copy=True)
            for name, kept in state_dict.items()
        }


def _is_half(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.dtype in _HALF
