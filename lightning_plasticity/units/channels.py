"""The layers of a network as probing sees them: channels, some of which are NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_plasticity.layer_views import LayerView

TORCH_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


@dataclass(eq=False)
class Layer:
    """A linear or convolution layer: ``reason`` says why its units or columns cannot be used, None where they can."""

    name: str
    view: LayerView
    reason: str | None = None
    unmarked: str | None = None  # why its units are never NaN, though its columns are read
    passes: bool = False  # a depthwise convolution whose channels belong to the units that feed it
    inside: str | None = None  # the module whose call it is part of, where that holds several layers
    joins: Layer | None = None  # the layer whose units its outputs belong to, where a module adds the two up
    # known once the network has been surveyed
    first: int = field(init=False)  # number of its first output channel, where it can be used
    site: int = field(init=False)  # a bit of its own
    # the bits of the layers and norms that its units may come to, 1 for the network's output; -1 where unknown
    reach: int = field(init=False)
    calls: int = field(init=False)  # in one forward pass

    @property
    def call(self) -> str:
        """The module that is called with its input, by name."""
        return self.name if self.inside is None else self.inside

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.view.layer

    @property
    def size(self) -> int:
        """How many output channels."""
        return self.view.outputs

    @property
    def columns(self) -> int:
        """How many input channels."""
        return self.view.inputs

    @property
    def depthwise(self) -> bool:
        """Whether each output channel sees a single input channel."""
        return 1 < self.view.groups == self.view.inputs

    @property
    def channel_dim(self) -> int:
        """The channel dimension of inputs and outputs, counted from the end (inputs may come without a batch)."""
        return self.view.channel_dim

    @property
    def numbers(self) -> Tensor:
        """The numbers of its output channels."""
        return torch.arange(self.first, self.first + self.size)


NOBODY = -1  # in the place of a unit's number


@dataclass(frozen=True)
class Site:
    """A place where channels are read: ``role`` is column, depthwise, norm, activation, gate, value or state."""

    role: str
    name: str


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in a nested structure."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif value is None or isinstance(value, (int, float, str)):  # most of what there is, told before the slow kinds
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name))


def memory(x: Tensor) -> int:
    """What two tensors have in common of which one is a view of the other."""
    return int(x.untyped_storage()._cdata)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies ``function`` to the floating-point tensors in nested arguments."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def is_norm(module: nn.Module) -> bool:
    """Torch's normalisation layers, and modules that call themselves one and hold no other layer with parameters."""
    named_so = "norm" in type(module).__name__.lower()
    alone = all(next(child.parameters(), None) is None for child in module.children())
    return isinstance(module, TORCH_NORMS) or (named_so and alone)


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters that could be a layer's weight: with entries in two dimensions."""
    return [p for p in module.parameters(recurse=False) if p.requires_grad and sum(size > 1 for size in p.shape) > 1]


def norm_dims(module: nn.Module, x: Tensor) -> int | None:
    """The dimension of ``x`` that runs over the entries of a normalisation layer, None where it has none.

    Negative dimensions; for a layer norm over several dimensions, which has an entry for each of their positions, -1.
    """
    entries = getattr(module, "weight", None)
    entries = entries if isinstance(entries, Tensor) else getattr(module, "running_mean", None)
    if not isinstance(entries, Tensor) or not callable(getattr(module, "reset_parameters", None)):
        return None  # no entries, or no way to tell what they would be in a fresh module
    if isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return 1 - x.ndim
    if entries.ndim > 1:
        return -1 if x.shape[-entries.ndim :] == entries.shape else None
    channels_second = x.ndim > 2 and x.shape[1] == entries.numel()
    if x.shape[-1] == entries.numel() and not (channels_second and "2d" in type(module).__name__.lower()):
        return -1
    return 1 - x.ndim if channels_second else None
