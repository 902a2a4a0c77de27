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

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_plasticity.layer_views import view_of
from lightning_plasticity.names import named_modules_as_written
from lightning_plasticity.units.channels import (
    TORCH_NORMS,
    Layer,
    is_norm,
    map_tensors,
    norm_dims,
    tensors_in,
)
from lightning_plasticity.units.examining import quietly, random_states
from lightning_plasticity.units.nans import NaNs, any_nan, clean, nan_channels, ones_for_nan, set_channels_nan

# Layers that mix their input channels in a way for which no column of one weight belongs to one input channel.
_OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)

_ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
        *("softplus", "softsign", "tanh", "sigmoid", "hardtanh", "hardsigmoid", "tanhshrink", "hardshrink"),
        *("softshrink", "logsigmoid", "threshold"),
    )
)
_PRODUCTS = frozenset(["mul", "multiply", "__mul__", "__rmul__", "__imul__"])
LAYER_CALLS = frozenset(["linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))])
_SOFTMAXES = frozenset(["softmax", "log_softmax", "softmin"])
_SCALAR_READS = frozenset(["item", "tolist", "__bool__", "__float__", "__int__", "__index__"])
_LOOKS_FOR_NAN = frozenset(["isfinite", "isnan", "isinf", "isposinf", "isneginf"])
_REPLACES_NAN = frozenset(["nan_to_num", "nan_to_num_"])
# Calls on a parameter that only look at it.
_GLANCES = frozenset(
    (
        *("__get__", "size", "dim", "numel", "stride", "is_contiguous", "data_ptr", "type", "is_floating_point"),
        *("__len__", "__hash__"),
    )
)


class StopRun(BaseException):
    """Ends a run early. Not an ``Exception``, so that a network's own handlers let it through."""


class Network:
    """A network, its example input, and one way to run it so that nothing remains."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        modules = dict(named_modules_as_written(model))
        views = {name: view_of(module) for name, module in modules.items()}
        self.layers = [Layer(name, view) for name, view in views.items() if view is not None]
        self.norms = {name: m for name, m in modules.items() if is_norm(m)}
        self.opaque = {name: m for name, m in modules.items() if isinstance(m, _OPAQUE)}
        known = {layer.module for layer in self.layers} | {*self.norms.values()}
        self.foreign = {  # modules that may be layers of kinds that are not known
            name: m for name, m in modules.items() if not (m in known or isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
        }
        self.mixing: set[str] = set()  # norms in which one channel's NaN reaches others
        self.nan_of_its_own = False  # whether it looks for NaN and finds some without our doing
        self.training_path = False
        self.runs = 0
        self._put_random_states_back = random_states(model)
        self._mark_unusable_weights()

    def __str__(self) -> str:
        return type(self.model).__name__

    def _mark_unusable_weights(self) -> None:
        owners: dict[int, list[str]] = defaultdict(list)
        for name, module in named_modules_as_written(self.model):
            for key, parameter in module.named_parameters(recurse=False):
                owners[id(parameter)].append(f"{name}.{key}".lstrip("."))
        for layer in self.layers:
            weight = layer.module._parameters.get("weight")
            if weight is None:
                layer.reason = "its weight is computed (parametrized or weight-normalised), not a parameter"
            elif isinstance(layer.module, _ConvTransposeNd) and layer.module.groups > 1:
                layer.reason = f"it is a transposed convolution with groups={layer.module.groups}"
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
        """One forward pass under ``watch``; None where it ended early."""
        self.runs += 1
        self.set_modes()
        self._put_random_states_back()
        handles = [
            layer.module.register_forward_pre_hook(watch.before_layer(layer), with_kwargs=True) for layer in self.layers
        ]
        handles += [layer.module.register_forward_hook(watch.after_layer(layer)) for layer in self.layers]
        handles += [
            m.register_forward_pre_hook(watch.before_opaque(n), with_kwargs=True) for n, m in self.opaque.items()
        ]
        for name, module in self.norms.items():
            handles.append(module.register_forward_pre_hook(watch.before_norm(name)))
            handles.append(module.register_forward_hook(watch.after_norm(name), with_kwargs=True))
        try:
            with quietly(), watch:
                outputs = self.model(*self.args, **self.kwargs)
            watch.finish(outputs)
            return outputs
        except StopRun:
            return None
        except Exception as error:
            if watch.refuses(error):
                raise
            return None
        finally:
            for handle in handles:
                handle.remove()


def describe(error: BaseException | None) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _has_nan(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(any_nan(x) for x in tensors_in((args, kwargs)))


def _without_nan(name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function that looks for NaN gives where there is none; NaN that it would replace stays."""
    if name in _LOOKS_FOR_NAN:
        return func(*map_tensors(clean, args), **map_tensors(clean, kwargs))
    nans = next(tensors_in((args, kwargs))).isnan()
    return func(*args, **kwargs).masked_fill_(nans, math.nan)


class Watch(TorchFunctionMode):
    """What is done to a forward pass and written down of it; this base does nothing, each kind of run its part."""

    marks = False  # whether units are NaN in this run
    looks_at_parameters = False  # whether to be told of functions' arguments

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self._paused = False  # inside our own hooks
        self._events = 0
        self._active: list[Layer] = []
        self._carried: list[Tensor] = []  # which input channels of a passed layer are NaN
        self._inside_norms: list[NaNs | None] = []  # the inputs of the norms that are running

    # ---- what a kind of run may override

    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        """The output of a layer."""
        return output

    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        """The input of a layer."""
        return x

    def passes_norm(self, name: str, x: Tensor, dim: int | None) -> None:
        """A normalisation layer has seen ``x``, whose dimension ``dim`` runs over the layer's entries."""

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

    def uses_parameters(self, name: str, arguments: Sequence[Any]) -> None:
        """A function is called, perhaps with a parameter among its arguments."""

    def mixes(self, event: int, what: str, x: Tensor, dim: int | None) -> Tensor:
        """A softmax over ``dim``, or scores of attention (None) are made of ``x``; returns what to take instead."""
        return x

    def finish(self, outputs: Any) -> None:
        """The forward pass is over."""

    def refuses(self, error: Exception) -> bool:
        """The network's own code has raised an error; returns whether it is to be raised again."""
        return True

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
        return set_channels_nan(output, layer.channel_dim, nans)

    def before_opaque(self, name: str) -> Callable[..., Any]:
        """The hook on the inputs of a layer that mixes: cleans them."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            with self._pause():
                if any(any_nan(x) for x in tensors_in((args, kwargs))):
                    self.meets_opaque(name)
                    return map_tensors(clean, args), map_tensors(clean, kwargs)
                return None

        return hook

    def before_norm(self, name: str) -> Callable[..., Any]:
        """The hook on the input of a normalisation layer; one that is known to mix gets numbers in place of NaN.

        What it computes inside is its own affair.
        """

        def hook(module: nn.Module, args: Any) -> Any:
            if not args or not isinstance(args[0], Tensor):
                self._inside_norms.append(None)
                return None
            with self._pause():
                dim = norm_dims(module, args[0])
                self.passes_norm(name, args[0], dim)
                nans = NaNs(args[0], dim)
                self._inside_norms.append(nans)
                return (clean(nans.x), *args[1:]) if nans.any and name in self.network.mixing else None

        return hook

    def after_norm(self, name: str) -> Callable[..., Any]:
        """The hook on a normalisation layer: where NaN spread in it, run it again on clean input and put NaN back."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            nans = self._inside_norms.pop()
            if nans is None or not nans.any or not isinstance(output, Tensor) or output.shape != nans.x.shape:
                return None
            with self._pause():
                if name not in self.network.mixing and nans.are_exceeded_by(output):
                    self.network.mixing.add(name)
                    output = module.forward(clean(nans.x), *args[1:], **kwargs)
                return nans.put_into(output)

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
        result = self._call(name, func, args, kwargs)
        carries_no_nan = isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex())
        if (
            (name in _SCALAR_READS or carries_no_nan)
            and not (self._inside_norms or name in _LOOKS_FOR_NAN)
            and _has_nan(args, kwargs)
        ):
            self.decides(name)
        return result

    def _call(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a function; one that looks for NaN does not find those that stand for units.

        A function that does not take NaN (a sampler, a decomposition) gets ones instead, as do numbers for Python.
        """
        if name in _LOOKS_FOR_NAN or name in _REPLACES_NAN:
            if not self.marks:
                self.network.nan_of_its_own |= _has_nan(args, kwargs)
            elif not self.network.nan_of_its_own:
                return _without_nan(name, func, args, kwargs)
        try:
            if not (self.marks and name in _SCALAR_READS and _has_nan(args, kwargs)):
                return func(*args, **kwargs)
        except Exception:
            if not (self.marks and _has_nan(args, kwargs)):
                raise
        self.decides(name)
        return func(*map_tensors(ones_for_nan, args), **map_tensors(ones_for_nan, kwargs))

    def _before_call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
        if self.looks_at_parameters:
            self.uses_parameters(name, [*args, *kwargs.values()])
        kind = name.rstrip("_")
        if kind in _ACTIVATIONS and args:
            if kind == "hardtanh" and (args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)) >= 0:
                kind = "relu6"  # what nn.ReLU6 calls
            self._events += 1
            # within a norm, its input tells which channels these are: the norm may have mixed them already
            inside = self._inside_norms[-1] if self._inside_norms else None
            self.activates(self._events, kind, args[0] if inside is None else inside.x)
        elif self._inside_norms:
            return args
        elif (name in _PRODUCTS or kind == "mul") and len(args) == 2:
            return self._product(args)
        elif name in _SOFTMAXES and args and isinstance(args[0], Tensor):
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            self._events += 1
            return (
                self.mixes(self._events, "a softmax, which mixes them", args[0], dim if isinstance(dim, int) else -1),
                *args[1:],
            )
        elif name == "scaled_dot_product_attention":
            args = (*args, *(kwargs.pop(key) for key in ("query", "key", "value")[len(args) :]))
            self._events += 2
            scores = "the scores of attention, which mix them"
            query = self.mixes(self._events - 1, scores, args[0], None)
            return (query, self.mixes(self._events, scores, args[1], None), *args[2:])
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
