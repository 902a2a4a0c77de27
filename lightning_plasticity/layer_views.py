"""A layer as what it does: which dimension of its weight runs over its outputs, and which over its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

TORCH_LAYERS = (nn.Linear, _ConvNd)


@dataclass(frozen=True, eq=False)
class LayerView:
    """A linear or convolution layer of torch's, also a transposed one.

    Example:
        >>> view = LayerView(nn.ConvTranspose2d(2, 3, 4))
        >>> view.outputs, view.inputs, tuple(view.weight.shape), tuple(view.by_output(view.weight).shape)
        (3, 2, (2, 3, 4, 4), (3, 2, 4, 4))
    """

    layer: nn.Linear | _ConvNd

    @property
    def weight(self) -> Tensor:
        """Its weight as it is."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Its bias, if it has one."""
        return self.layer.bias

    @property
    def transposed(self) -> bool:
        """Whether the weight has the inputs in its first dimension and the outputs in its second."""
        return isinstance(self.layer, _ConvTransposeNd)

    def by_output(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape with the outputs first, then the inputs (of a group): a view of it."""
        return tensor.transpose(0, 1) if self.transposed else tensor

    @property
    def groups(self) -> int:
        """Those of a convolution; otherwise 1."""
        return self.layer.groups if isinstance(self.layer, _ConvNd) else 1

    @property
    def outputs(self) -> int:
        """How many output features or channels."""
        return self.layer.out_channels if isinstance(self.layer, _ConvNd) else self.layer.out_features

    @property
    def inputs(self) -> int:
        """How many input features or channels."""
        return self.layer.in_channels if isinstance(self.layer, _ConvNd) else self.layer.in_features

    @property
    def seen_of_kernel(self) -> float:
        """How much of the kernel is in each output, on average over positions."""
        return 1 / math.prod(self.layer.stride) if isinstance(self.layer, _ConvTransposeNd) else 1.0

    @property
    def channel_dim(self) -> int:
        """The dimension of features or channels, from the end: inputs may come without a batch."""
        return -1 - len(self.layer.kernel_size) if isinstance(self.layer, _ConvNd) else -1
