"""A layer as what it does: which dimension of its weight runs over its outputs, and which over its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from lightning_plasticity.layer_views.home_made import home_made

Given: TypeAlias = Callable[[Sequence[Any], Mapping[str, Any], Any], Tensor]

TORCH_LAYERS = (nn.Linear, _ConvNd)
_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class LayerView:
    """A layer: a linear map from inputs to outputs, and which entries of its module's parameters it is made of.

    Most modules are one layer; others hold several (:func:`.layers_of`). Seen ``by_output``, a tensor of the weight's
    shape has the outputs first, then all that makes each; seen as a ``matrix`` it has rows, then inputs (of a group),
    then the kernel. Both are views, and the same but where several rows make one output, as the gates of an LSTM do.

    Attributes:
        layer: the module.
        transposed: whether the weight has the inputs in its first dimension and the outputs in its second.
        groups: those of a convolution.
        part: what to add to the module's name where it holds several layers.
        weight_name, bias_name: of the module's parameters.
        rows, bias_rows: which part of their first dimension is this layer's.
        gates: how many rows make one output: row ``k * outputs + i`` belongs to output ``i``.
        adds_to: the part to whose outputs the module adds those of this layer.
        activation: of what the module gives, where its output is not just that of this layer.
        given: what the layer is given, told from the arguments, keyword arguments and output of a call; None where it
            is the first argument.
        caller: the module whose call this is, where it is not ``layer``.

    Example:
        >>> view = view_of(nn.ConvTranspose2d(2, 3, 4))
        >>> view.outputs, view.inputs, tuple(view.weight.shape), tuple(view.by_output(view.weight).shape)
        (3, 2, (2, 3, 4, 4), (3, 2, 4, 4))
    """

    layer: nn.Module
    transposed: bool = False
    groups: int = 1
    part: str = ""
    weight_name: str = "weight"
    bias_name: str = "bias"
    rows: slice = field(default_factory=lambda: slice(None))
    bias_rows: slice = field(default_factory=lambda: slice(None))
    gates: int = 1
    adds_to: str | None = None
    activation: str | None = None
    given: Given | None = None
    caller: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        """The parameter that holds its weight."""
        weight = getattr(self.layer, self.weight_name)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The parameter that holds its bias, if it has one."""
        bias = getattr(self.layer, self.bias_name, None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def weight_path(self, name: str) -> str:
        """The qualified name of its weight, when its own name is ``name``."""
        module = name.removesuffix(self.part).removesuffix(".") if self.part else name
        return f"{module}.{self.weight_name}".lstrip(".")

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape with the rows first, then the inputs (of a group): a view of it."""
        own = tensor if self.rows == _ALL else tensor[self.rows]
        return own.transpose(0, 1) if self.transposed else own

    def by_output(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape with the outputs first, then what makes each: a view of it."""
        matrix = self.matrix(tensor)
        return matrix if self.gates == 1 else matrix.view(self.gates, -1, *matrix.shape[1:]).movedim(0, -1)

    def bias_by_row(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the bias's shape that belongs to the rows: a view of it."""
        return tensor if self.bias_rows == _ALL else tensor[self.bias_rows]

    def bias_by_output(self, tensor: Tensor) -> Tensor:
        """A tensor of the bias's shape with the outputs first: a view of it."""
        own = self.bias_by_row(tensor)
        return own if self.gates == 1 else own.view(self.gates, -1).movedim(0, -1)

    def hear(
        self, listener: Callable[[Tensor], None], as_hook: Callable[[Callable[..., None]], Callable[..., None]]
    ) -> RemovableHandle:
        """Call ``listener`` with what the layer is given, whenever it is called.

        ``as_hook`` is what to make of a function that is called by the module.
        """
        given = self.given
        if given is None:

            def before(_: nn.Module, args: Any, kwargs: Any) -> None:
                listener(args[0] if args else kwargs["input"])

            return self.layer.register_forward_pre_hook(as_hook(before), with_kwargs=True)

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            listener(given(args, kwargs, output))

        return (self.caller or self.layer).register_forward_hook(as_hook(after), with_kwargs=True)

    def own(self) -> list[Tensor]:
        """Its weight, and its bias if it has one: what of the parameters is this layer's."""
        weight = self.weight if self.rows == _ALL else self.weight[self.rows]
        return [weight] if self.bias is None else [weight, self.bias_by_row(self.bias)]

    @property
    def outputs(self) -> int:
        """How many output features or channels."""
        if isinstance(self.layer, TORCH_LAYERS):
            return self.layer.out_channels if isinstance(self.layer, _ConvNd) else self.layer.out_features
        return self.matrix(self.weight).shape[0] // self.gates

    @property
    def inputs(self) -> int:
        """How many input features or channels."""
        if isinstance(self.layer, TORCH_LAYERS):
            return self.layer.in_channels if isinstance(self.layer, _ConvNd) else self.layer.in_features
        return self.matrix(self.weight).shape[1] * self.groups

    @property
    def seen_of_kernel(self) -> float:
        """How much of the kernel is in each output, on average over positions."""
        return 1 / math.prod(self.layer.stride) if isinstance(self.layer, _ConvTransposeNd) else 1.0

    @property
    def channel_dim(self) -> int:
        """The dimension of features or channels, from the end: inputs may come without a batch."""
        if isinstance(self.layer, TORCH_LAYERS):
            return -1 - len(self.layer.kernel_size) if isinstance(self.layer, _ConvNd) else -1
        return 1 - self.weight.ndim


def view_of(module: nn.Module) -> LayerView | None:
    """How a layer holds its weight, None where a module is no linear or convolution layer.

    Torch's layers are told by their type. A module of another type is a layer if that is what it does: it has a
    ``weight``, perhaps a ``bias``, nothing else, and with other numbers in them it gives what ``linear`` gives with
    these, with the weight as it is or transposed (GPT-2's ``Conv1D``), or what a convolution gives.

    Example:
        >>> import torch
        >>> class Own(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.zeros(2, 3))
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> view_of(Own()).transposed, view_of(nn.LayerNorm(2))
        (True, None)
    """
    if isinstance(module, _ConvNd):
        return LayerView(module, isinstance(module, _ConvTransposeNd), groups=module.groups)
    if isinstance(module, nn.Linear):
        return LayerView(module)
    kind = home_made(module)
    return None if kind is None else LayerView(module, kind.transposed, groups=kind.groups)
