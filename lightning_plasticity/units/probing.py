"""Finds out by experiment which unit reaches which input column of a network.

Every output channel of every linear and convolution layer has a number and a codeword of bits. In the run for bit ``j``
the channels whose codeword has that bit are set to NaN as they leave their layer. NaN passes by itself through whatever
keeps channels apart (activations, pooling, reshapes, concatenation, dropout). Each layer writes down which of its input
channels arrive as NaN and cleans them, so that NaN never crosses a layer that mixes channels. After all runs every
input channel has spelled the codeword of the one unit that feeds it.

All codewords have the same number of ones, so two different ones together have more: a channel that is fed by several
units cannot be mistaken for one that is fed by a single one, and about ``log2(channels)`` runs suffice.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_plasticity.units.channels import (
    TORCH_NORMS,
    Layer,
    clean,
    is_norm,
    map_tensors,
    nan_channels,
    tensors_in,
)
from lightning_plasticity.units.names import named_modules_as_written

# Layers that mix their input channels in a way for which no column of one weight belongs to one input channel.
_OPAQUE = (_ConvTransposeNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)

_ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
        *("softplus", "softsign", "tanh", "sigmoid", "hardtanh", "hardsigmoid", "tanhshrink", "hardshrink"),
        *("softshrink", "logsigmoid", "threshold"),
    )
)
_PRODUCTS = frozenset(["mul", "multiply", "__mul__", "__rmul__", "__imul__"])
LAYER_CALLS = frozenset(["linear", "conv1d", "conv2d", "conv3d"])
_SCALAR_READS = frozenset(["item", "tolist", "__bool__", "__float__", "__int__", "__index__"])
# Calls on a parameter that only look at it.
_GLANCES = frozenset(
    (
        *("__get__", "size", "dim", "numel", "stride", "is_contiguous", "data_ptr", "type", "is_floating_point"),
        *("__len__", "__hash__"),
    )
)


class StopRun(BaseException):
    """Ends a run early. Not an ``Exception``, so that a network's own handlers let it through."""


_examinations = 0  # how many are going on, one inside another


def is_examining() -> bool:
    """Whether a network is being examined: then its calls are no training, and hooks on it have nothing to hear.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with undisturbed(model):
        ...     is_examining()
        True
        >>> is_examining()
        False
    """
    return _examinations > 0


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Examines a network: puts training flags, buffers and every random state back as they were.

    Meanwhile :func:`is_examining` is true, and autocasting, which goes on where it was on, keeps no casts of weights:
    one that was made without gradients would be taken again when training goes on, and cut its gradients off.
    """
    global _examinations
    import numpy as np

    flags = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    keeps_casts = torch.is_autocast_cache_enabled()
    _examinations += 1
    torch.set_autocast_cache_enabled(False)
    try:
        # dispatches on one accelerator type at a time; a network on two types of accelerators does not occur
        kind = next((d.type for d in devices), "cuda")
        indices = [d.index if d.index is not None else 0 for d in devices]
        with torch.random.fork_rng(devices=indices, device_type=kind):
            yield
    finally:
        torch.set_autocast_cache_enabled(keeps_casts)
        _examinations -= 1
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, training in flags.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                # a NaN in a buffer that was there before is equal to itself here
                if not torch.equal(buffer.nan_to_num(), before.nan_to_num()) or buffer.isnan().any():
                    buffer.copy_(before)


class Network:
    """A network, its example input, and one way to run it so that nothing remains."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        modules = dict(named_modules_as_written(model))
        self.layers = [
            Layer(name, m)
            for name, m in modules.items()
            if isinstance(m, (nn.Linear, _ConvNd)) and not isinstance(m, _ConvTransposeNd)
        ]
        self.norms = {name: m for name, m in modules.items() if is_norm(m)}
        self.opaque = {name: m for name, m in modules.items() if isinstance(m, _OPAQUE)}
        self.mixing: set[str] = set()  # norms in which one channel's NaN reaches others
        self.training_path = False
        self.runs = 0
        self._random_state = torch.get_rng_state()
        self._mark_unusable_weights()

    def _mark_unusable_weights(self) -> None:
        owners: dict[int, list[str]] = defaultdict(list)
        for name, module in named_modules_as_written(self.model):
            for key, parameter in module.named_parameters(recurse=False):
                owners[id(parameter)].append(f"{name}.{key}".lstrip("."))
        for layer in self.layers:
            weight = layer.module._parameters.get("weight")
            if weight is None:
                layer.reason = "its weight is computed (parametrized or weight-normalised), not a parameter"
            elif not weight.is_floating_point():
                layer.reason = f"its weight has the type {weight.dtype}, not a floating-point one"
            elif len(owners[id(weight)]) > 1:
                others = ", ".join(o for o in owners[id(weight)] if o != f"{layer.name}.weight".lstrip("."))
                layer.reason = f"it shares its weight with {others}"

    def set_modes(self) -> None:
        """Evaluation mode; on the training path containers train while norms, dropouts and other leaves evaluate."""
        for module in self.model.modules():
            leaf = next(module.children(), None) is None or isinstance(module, (*TORCH_NORMS, *_DROPOUTS))
            module.training = self.training_path and not leaf

    def run(self, watch: Watch) -> Any:
        """One forward pass under ``watch``."""
        self.runs += 1
        self.set_modes()
        torch.set_rng_state(self._random_state)
        random.seed(0)
        handles = [
            layer.module.register_forward_pre_hook(watch.before_layer(layer), with_kwargs=True) for layer in self.layers
        ]
        handles += [layer.module.register_forward_hook(watch.after_layer(layer)) for layer in self.layers]
        handles += [
            m.register_forward_pre_hook(watch.before_opaque(n), with_kwargs=True) for n, m in self.opaque.items()
        ]
        for name, module in self.norms.items():
            handles.append(module.register_forward_pre_hook(watch.before_norm))
            handles.append(module.register_forward_hook(watch.after_norm(name), with_kwargs=True))
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                warnings.catch_warnings(),
                watch,
            ):
                warnings.simplefilter("ignore")
                outputs = self.model(*self.args, **self.kwargs)
            watch.finish(outputs)
            return outputs
        except StopRun:
            return None
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for handle in handles:
                handle.remove()


class Watch(TorchFunctionMode):
    """What is done to a forward pass and written down of it; this base does nothing, each kind of run its part."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self._paused = False  # inside our own hooks
        self._events = 0
        self._active: list[Layer] = []
        self._carried: list[Tensor] = []  # which input channels of a passed layer are NaN
        self._inside_norms: list[Tensor | None] = []  # the inputs of the norms that are running

    # ---- what a kind of run may override

    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        """The output of a layer."""
        return output

    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        """The input of a layer."""
        return x

    def passes_norm(self, name: str, x: Tensor, nans: Tensor) -> None:
        """A normalisation layer has seen ``x``."""

    def passes_depthwise(self, layer: Layer, nans: Tensor) -> None:
        """A depthwise convolution is passed, with NaN in some input channels."""

    def meets_opaque(self, name: str) -> None:
        """NaN arrives at a layer that mixes."""

    def activates(self, event: int, kind: str, x: Tensor) -> None:
        """An activation function is applied to ``x``."""

    def multiplies(self, event: int, value: Tensor, gate: Tensor) -> Tensor:
        """Two tensors are multiplied; returns what to take as the second."""
        return gate

    def decides(self, name: str) -> None:
        """NaN enters a comparison, a branch, or another call whose result cannot carry it on."""

    def uses_parameter(self, name: str, arguments: Sequence[Any]) -> None:
        """A function is called with a parameter among its arguments."""

    def finish(self, outputs: Any) -> None:
        """The forward pass is over."""

    # ---- hooks

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def before_layer(self, layer: Layer) -> Callable[..., Any]:
        """The hook on a layer's input."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            self._active.append(layer)
            with self._pause():
                if args:
                    return (self._arrive(layer, args[0]), *args[1:]), kwargs
                key, x = next(iter(kwargs.items()))
                return args, {**kwargs, key: self._arrive(layer, x)}

        return hook

    def after_layer(self, layer: Layer) -> Callable[..., Any]:
        """The hook on a layer's output."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            self._active.pop()
            with self._pause():
                return self._leave(layer, output) if isinstance(output, Tensor) else output

        return hook

    def _arrive(self, layer: Layer, x: Tensor) -> Tensor:
        if not layer.passes:
            return self.arrives(layer, x)
        nans = nan_channels(x, layer.channel_dim)
        self._carried.append(nans)
        self.passes_depthwise(layer, nans)
        return clean(x)

    def _leave(self, layer: Layer, output: Tensor) -> Tensor:
        if not layer.passes:
            return self.leaves(layer, output)
        nans = self._carried.pop().repeat_interleave(layer.size // layer.columns)
        return output.index_fill(layer.channel_dim, nans.nonzero().squeeze(1), math.nan)

    def before_opaque(self, name: str) -> Callable[..., Any]:
        """The hook on the inputs of a layer that mixes: cleans them."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            with self._pause():
                if any(bool(x.isnan().any()) for x in tensors_in((args, kwargs))):
                    self.meets_opaque(name)
                    return map_tensors(clean, args), map_tensors(clean, kwargs)
                return None

        return hook

    def before_norm(self, _: nn.Module, args: Any) -> None:
        """The hook on the input of a normalisation layer: what it computes inside is its own affair."""
        self._inside_norms.append(args[0] if args and isinstance(args[0], Tensor) else None)

    def after_norm(self, name: str) -> Callable[..., Any]:
        """The hook on a normalisation layer: where NaN spread in it, run it again on clean input and put NaN back."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            self._inside_norms.pop()
            with self._pause():
                if not args or not isinstance(output, Tensor) or not isinstance(args[0], Tensor):
                    return None
                x = args[0]
                nans = x.isnan()
                self.passes_norm(name, x, nans)
                if output.shape != x.shape or not bool(nans.any()):
                    return None
                if bool((output.isnan() & ~nans).any()):
                    self.network.mixing.add(name)
                    output = module.forward(clean(x), *args[1:], **kwargs)
                return output.masked_fill(nans, math.nan)

        return hook

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in _GLANCES:
            with self._pause():
                args = self._before_call(name, args, kwargs)
        result = func(*args, **kwargs)
        if self._inside_norms:
            return result
        if name in _SCALAR_READS or (
            isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex())
        ):
            with self._pause():
                if any(bool(x.isnan().any()) for x in tensors_in((args, kwargs))):
                    self.decides(name)
        return result

    def _before_call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        if any(isinstance(argument, nn.Parameter) for argument in itertools.chain(args, kwargs.values())):
            self.uses_parameter(name, [*args, *kwargs.values()])
        kind = name.rstrip("_")
        if kind in _ACTIVATIONS and args:
            if kind == "hardtanh" and (args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)) >= 0:
                kind = "relu6"  # what nn.ReLU6 calls
            self._events += 1
            # within a norm, its input tells which channels these are: the norm may have mixed them already
            inside = self._inside_norms[-1] if self._inside_norms else None
            self.activates(self._events, kind, args[0] if inside is None else inside)
        elif self._inside_norms:
            return args
        elif (name in _PRODUCTS or kind == "mul") and len(args) == 2:
            return self._product(args)
        elif kind == "glu":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            value, gate = args[0].chunk(2, dim)
            self._events += 1
            return (torch.cat([value, self.multiplies(self._events, value, gate)], dim), *args[1:])
        return args

    def _product(self, args: Sequence[Any]) -> Sequence[Any]:
        left, right = args
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return args
        if not (left.is_floating_point() and right.is_floating_point() and left.ndim and right.ndim):
            return args
        self._events += 1
        if left.numel() < right.numel():  # the smaller one gates the other
            return self.multiplies(self._events, right, left), right
        return left, self.multiplies(self._events, left, right)
