"""The matrices that a weight is made of: one for each place of a kernel, each group, each part of a fused layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_plasticity.layer_views.home_made import home_made

# Weights that hold queries, keys and values one above the other: PyTorch's attention, and timm's.
FUSED = {"*in_proj_weight": 3, "*qkv.weight": 3}


@dataclass(frozen=True)
class Matrices:
    """How a weight is made of matrices with a row for each output and a column for each input.

    Attributes:
        shape: of the weight.
        parts: matrices one above the other: those of a fused layer, or the groups of a convolution.
        is_transposed: whether each group of the weight has a row for each input, as in a transposed convolution.
        is_turned: whether the weight is one matrix that has a row for each input; ``shape`` is then what it would be.

    Example:
        >>> grouped = nn.Conv2d(4, 6, 3, groups=2)
        >>> matrices = Matrices.of(grouped, "weight", grouped.weight, FUSED)
        >>> matrices.split(grouped.weight).shape  # 2 groups and 9 places
        torch.Size([18, 3, 2])
        >>> torch.equal(matrices.join(matrices.split(grouped.weight)), grouped.weight)
        True
    """

    shape: tuple[int, ...]
    parts: int
    is_transposed: bool
    is_turned: bool = False

    @classmethod
    def of(cls, layer: nn.Module, name: str, weight: Tensor, fused: Mapping[str, int]) -> Matrices:
        """The matrices of a layer's weight.

        Args:
            layer: whose weight it is.
            name: of the weight.
            weight: the weight itself.
            fused: how many matrices are one above the other, by patterns of names of weights.

        Raises:
            ValueError: If the rows of a fused weight cannot be shared out evenly.
        """
        if isinstance(layer, _ConvNd):
            return cls(tuple(weight.shape), layer.groups, isinstance(layer, _ConvTransposeNd))
        kind = home_made(layer)
        if kind is not None and weight.ndim > 2:
            return cls(tuple(weight.shape), kind.groups, False)
        is_turned = kind is not None and kind.transposed
        outputs, *others = reversed(weight.shape) if is_turned else weight.shape
        parts = next((number for pattern, number in fused.items() if fnmatchcase(name, pattern)), 1)
        if parts < 1 or outputs % parts:
            raise ValueError(
                f"The {outputs} rows of {name!r} must be shared out evenly among the parts that it is fused of, "
                f"but fused= says {parts}. Give its number of parts, or 1 to take it as one matrix."
            )
        return cls((outputs, *others), parts, False, is_turned)

    @property
    def places(self) -> int:
        """The number of places of the kernel."""
        return math.prod(self.shape[2:])

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has its own filter, as such a weight has no matrices to speak of."""
        return len(self.shape) > 2 and self.parts > 1 and self.shape[1] == 1

    def split(self, weight: Tensor) -> Tensor:
        """The matrices, along the first dimension."""
        weight = weight.mT if self.is_turned else weight
        by_place = torch.unflatten(weight, 0, (self.parts, -1)).unsqueeze(-1).flatten(3)  # part, row, column, place
        matrices = by_place.movedim(-1, 1).flatten(0, 1)
        return matrices.mT if self.is_transposed else matrices

    def join(self, matrices: Tensor) -> Tensor:
        """The weight that is made of these matrices."""
        by_place = torch.unflatten(matrices.mT if self.is_transposed else matrices, 0, (self.parts, -1))
        weight = by_place.movedim(1, -1).reshape(self.shape)
        return weight.mT if self.is_turned else weight
