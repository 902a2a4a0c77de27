"""Tensors that kernels work on together."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.kernels.choice import kernels_on

PLAIN = (Tensor, nn.Parameter)  # others may not hold their entries themselves, as DTensor does not


class Tensors:
    """Some tensors that kernels work on together, and where they lie in memory: found anew where one has moved.

    Args:
        tensors: the tensors.
        beside: as many others, each of which has as many entries as its tensor and is laid out alike.
        in_order: whether kernels count on the entries' being in the order of the dimensions, which they are not in
            ``torch.channels_last``.

    Attributes:
        tensors: the tensors.
        places: what kernels are told of where they are; only to be used after ``kernels`` has given some.
    """

    def __init__(self, tensors: Sequence[Tensor], beside: Sequence[Tensor] = (), *, in_order: bool = False) -> None:
        self.tensors, self._beside = list(tensors), list(beside)
        self._in_order = in_order
        self._all = [*self.tensors, *self._beside]
        self._are_plain = bool(self._all) and all(type(tensor) in PLAIN for tensor in self._all)
        self._seen: list[int] = []
        self._memory: list[torch.UntypedStorage] = []
        self._kernels: ModuleType | None = None
        self.places: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen": [], "_memory": [], "_kernels": None, "places": None}  # a copy lies elsewhere

    def are(self, tensors: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> bool:
        """Whether it is these, each the same object."""
        if len(self.tensors) != len(tensors) or len(self._beside) != len(beside):
            return False
        return all(map(is_, self.tensors, tensors)) and all(map(is_, self._beside, beside))

    def kernels(self) -> ModuleType | None:
        """The kernels that can work on these tensors where they lie; None where only PyTorch's operations can."""
        if not self._are_plain:
            return None
        seen = [tensor.data_ptr() for tensor in self._all]
        if seen != self._seen:
            self._seen = seen
            self._memory = [tensor.untyped_storage() for tensor in self._all]  # held, so that no other takes its place
            self._kernels = self._choose()
            self.places = None if self._kernels is None else self._kernels.places(self.tensors, self._beside)
        return self._kernels

    def _choose(self) -> ModuleType | None:
        first = self._all[0]
        are_alike = all(t.dtype == first.dtype and t.device == first.device and is_dense(t) for t in self._all)
        pairs = zip(self.tensors, self._beside, strict=False)
        if not are_alike or any(a.shape != b.shape or a.stride() != b.stride() for a, b in pairs):
            return None
        if self._in_order and not all(tensor.is_contiguous() for tensor in self._all):
            return None
        kernels = kernels_on(first.device.type)
        size = sum(tensor.numel() for tensor in self._all)
        return kernels if kernels is not None and kernels.suit(first.dtype, size) else None

    def written(self) -> None:
        """To be called when a kernel has written to the tensors, so that autograd knows."""
        torch.autograd.graph.increment_version(self.tensors)


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill the memory from the first to the last."""
    if tensor.layout is not torch.strided:
        return False
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.is_contiguous() or (
        tensor.ndim in formats and tensor.is_contiguous(memory_format=formats[tensor.ndim])
    )
