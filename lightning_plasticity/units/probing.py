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
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_plasticity.units.channels import (
    Layer,
    map_tensors,
    norm_dims,
    tensors_in,
)
from lightning_plasticity.units.combined import Combined
from lightning_plasticity.units.examining import quietly
from lightning_plasticity.units.nans import (
    NaNs,
    any_nan,
    clean,
    is_elementwise,
    nan_channels,
    nan_factors,
    ones_for_nan,
    times_channels,
)
from lightning_plasticity.units.network import Network
from lightning_plasticity.units.stand_ins import attended, signature

_ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
        *("softplus", "softsign", "tanh", "sigmoid", "hardtanh", "hardsigmoid", "tanhshrink", "hardshrink"),
        *("softshrink", "logsigmoid", "threshold"),
    )
)
_OTHER_NAMES = {"_threshold": "threshold", "log_sigmoid": "logsigmoid"}  # what functions call themselves
_PRODUCTS = frozenset(["mul", "multiply", "__mul__", "__rmul__", "__imul__"])
LAYER_CALLS = frozenset(["linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))])
MATRIX_CALLS = LAYER_CALLS | frozenset(
    (
        *("matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "bmm", "baddbmm", "einsum", "tensordot", "bilinear"),
        "multi_head_attention_forward",
        *(f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")),
    )
)
_ATTENTION = "scaled_dot_product_attention"
_SCORES = "the scores of attention, which mix them"
_SOFTMAXES = frozenset(["softmax", "log_softmax", "softmin"])
_SCALAR_READS = frozenset(["item", "tolist", "__bool__", "__float__", "__int__", "__index__"])
# What they give depends on the shape of a tensor, whatever is in it.
_LOOKS_AT_SHAPES = frozenset(
    (
        *("expand_as", "view_as", "reshape_as", "new_zeros", "new_ones", "new_full", "new_empty"),
        *(f"{what}_like" for what in ("zeros", "ones", "full", "empty", "randint")),
    )
)
_LOOKS_FOR_NAN = frozenset(["isfinite", "isnan", "isinf", "isposinf", "isneginf"])
_REPLACES_NAN = frozenset(["nan_to_num", "nan_to_num_"])
# Calls on a parameter that only look at it.
GLANCES = frozenset(
    (
        *("__get__", "size", "dim", "numel", "stride", "is_contiguous", "data_ptr", "type", "is_floating_point"),
        *("__len__", "__hash__"),
    )
)


class StopRun(BaseException):
    """Ends a run early. Not an ``Exception``, so that a network's own handlers let it through."""


def describe(error: BaseException | None) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def has_nan(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a NaN is anywhere in a function's arguments."""
    return any(any_nan(x) for x in tensors_in((args, kwargs)))


def _without_nan(name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function that looks for NaN gives where there is none; NaN that it would replace stays."""
    if name in _LOOKS_FOR_NAN:
        return func(*map_tensors(clean, args), **map_tensors(clean, kwargs))
    nans = next(tensors_in((args, kwargs))).isnan()
    return func(*args, **kwargs).masked_fill_(nans, math.nan)


own_functions = torch._C.DisableTorchFunction  # for what hooks compute, which no mode needs to see


class Watch(TorchFunctionMode):
    """What is done to a forward pass and written down of it; this base does nothing, each kind of run its part."""

    sees = ""  # what the run is for, in words for people who wait
    marks = False  # whether units are NaN in this run
    surveys = False  # whether to look at functions' parameters, at what they compute, and at norms
    stands_in = False  # whether numbers do not count, so that others may stand in for those of matrix products

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self._paused = False
        self._events = 0
        self._active: list[Layer | Combined] = []
        self._carried: list[Tensor] = []  # which input channels of a passed layer are NaN
        self._arrived: Tensor | None = None  # what the layer that is running was given
        self._inside_norms: list[tuple[Tensor | None, NaNs | None]] = []  # inputs of norms that are running, their NaN

    def run(self) -> Any:
        """One forward pass of the network under this watch; None where it ended early."""
        network = self.network
        network.begin_run(self.sees)
        network.set_modes()
        network.put_random_states_back()
        handles = []
        for layer in network.layers:
            if layer.inside is None:
                handles.append(layer.module.register_forward_pre_hook(self.before_layer(layer), with_kwargs=True))
                handles.append(layer.module.register_forward_hook(self.after_layer(layer)))
        for combined in network.combined:
            before, after = self.before_combined(combined), self.after_combined(combined)
            handles.append(combined.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(combined.module.register_forward_hook(after))
        for name, opaque in network.opaque.items():
            handles.append(opaque.register_forward_pre_hook(self.before_opaque(name), with_kwargs=True))
        for name, norm in network.norms.items():
            handles.append(norm.register_forward_pre_hook(self.before_norm(name)))
            handles.append(norm.register_forward_hook(self.after_norm(name), with_kwargs=True))
        try:
            with quietly(), self:
                outputs = network.model(*network.args, **network.kwargs)
            self.finish(outputs)
            return outputs
        except StopRun:
            return None
        except Exception as error:
            if self.refuses(error):
                raise
            return None
        finally:
            for handle in handles:
                handle.remove()

    # ---- what a kind of run may override

    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        """The output of a layer."""
        return output

    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        """The input of a layer."""
        return x

    def carries(self, layer: Layer, x: Tensor) -> Tensor:
        """The state that a recurrent layer's units go on from: their own, from an earlier call, or other units'."""
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

    def stand_in(self, call: Hashable, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """What stands in for a matrix product, None where it is to be computed: here where NaN comes into it.

        Attention may hand on the NaN of whole channels of its values.
        """
        value = args[2] if name == _ATTENTION else None
        if any(any_nan(x) for x in self.in_doubt(args, kwargs) if x is not value):
            return None
        result = self.network.stand_ins.give(call)
        return result if result is None or value is None else attended(result, value)

    def finish(self, outputs: Any) -> None:
        """The forward pass is over."""

    def refuses(self, error: Exception) -> bool:
        """The network's own code has raised an error; returns whether it is to be raised again."""
        return True

    def in_doubt(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among the arguments other than parameters and what the running layer was given."""
        known = self.network.parameters
        return [x for x in tensors_in((args, kwargs)) if not (x is self._arrived or id(x) in known)]

    # ---- hooks

    def _again(self, module: nn.Module, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a module's forward unwatched."""
        self._paused = True
        try:
            return module.forward(x, *args, **kwargs)
        finally:
            self._paused = False

    def _keeps_apart(self, module: nn.Module, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a norm hands on NaN of one entry of its input to that entry of its output alone."""
        with own_functions():
            with_one = x.clone()
            with_one[(0,) * x.ndim] = math.nan
        try:
            output = self._again(module, with_one, args, kwargs)
        except Exception:  # it checks its values
            return False
        with own_functions():
            return is_elementwise(output)

    def before_layer(self, layer: Layer) -> Callable[..., Any]:
        """The hook on a layer's input."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            self._active.append(layer)
            with own_functions():
                if args:
                    self._arrived = self.arrive(layer, args[0])
                    return (self._arrived, *args[1:]), kwargs
                key, x = next(iter(kwargs.items()))
                self._arrived = self.arrive(layer, x)
                return args, {**kwargs, key: self._arrived}

        return hook

    def after_layer(self, layer: Layer) -> Callable[..., Any]:
        """The hook on a layer's output."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            self._active.pop()
            self._arrived = None
            with own_functions():
                return self.leave(layer, output) if isinstance(output, Tensor) else output

        return hook

    def before_combined(self, combined: Combined) -> Callable[..., Any]:
        """The hook on the arguments of a module that holds several layers."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            self._active.append(combined)
            with own_functions():
                return combined.enter(self, args, kwargs)

        return hook

    def after_combined(self, combined: Combined) -> Callable[..., Any]:
        """The hook on the output of a module that holds several layers."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            self._active.pop()
            with own_functions():
                return combined.leave(self, output)

        return hook

    def score(self, x: Tensor) -> None:
        """Scores of attention are made of ``x``, inside a module that holds several layers."""
        self._events += 1
        self.mixes(self._events, _SCORES, x, None)

    def arrive(self, layer: Layer, x: Tensor) -> Tensor:
        """A layer is given its input."""
        if not layer.passes:
            return self.arrives(layer, x)
        nans = nan_channels(x, layer.channel_dim)
        self._carried.append(nans)
        self.passes_depthwise(layer, nans)
        return clean(x)

    def leave(self, layer: Layer, output: Tensor) -> Tensor:
        """A layer gives its output."""
        if not layer.passes:
            return self.leaves(layer, output)
        nans = self._carried.pop().repeat_interleave(layer.size // layer.columns)
        return times_channels(output, layer.channel_dim, nan_factors(nans))

    def before_opaque(self, name: str) -> Callable[..., Any]:
        """The hook on the inputs of a layer that mixes: cleans them."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            with own_functions():
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
            x = args[0] if args and isinstance(args[0], Tensor) else None
            with own_functions():
                dim = None if x is None else norm_dims(module, x)
                if x is not None:
                    self.passes_norm(name, x, dim)
                nans = None if x is None or name in self.network.elementwise else NaNs(x, dim)
                self._inside_norms.append((x, nans))
                mixes = nans is not None and nans.any and name in self.network.mixing
                return (clean(args[0]), *args[1:]) if mixes else None

        return hook

    def after_norm(self, name: str) -> Callable[..., Any]:
        """The hook on a normalisation layer: where NaN spread in it, run it again on clean input and put NaN back."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x, nans = self._inside_norms.pop()
            if x is None or not isinstance(output, Tensor) or output.shape != x.shape:
                return None
            if self.surveys and self._keeps_apart(module, x, args[1:], kwargs):
                self.network.elementwise.add(name)
            if nans is None or not nans.any:
                return None
            with own_functions():
                spreads = name not in self.network.mixing and nans.are_exceeded_by(output)
                numbers = clean(x) if spreads else x
            if spreads:
                self.network.mixing.add(name)
                output = self._again(module, numbers, args[1:], kwargs)
            with own_functions():
                return nans.put_into(output)

        return hook

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._paused or name in GLANCES:
            return func(*args, **kwargs)
        args = self._before_call(name, args, kwargs)
        result = self._call(name, func, args, kwargs)
        carries_no_nan = isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex())
        if (
            (name in _SCALAR_READS or carries_no_nan)
            and not (self._inside_norms or name in _LOOKS_FOR_NAN or name in _LOOKS_AT_SHAPES)
            and has_nan(args, kwargs)
        ):
            self.decides(name)
        return result

    def _call(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a function; one that looks for NaN does not find those that stand for units.

        A function that does not take NaN (a sampler, a decomposition) gets ones instead, as do numbers for Python.
        """
        if name in _LOOKS_FOR_NAN or name in _REPLACES_NAN:
            if not self.marks:
                self.network.nan_of_its_own |= has_nan(args, kwargs)
            elif not self.network.nan_of_its_own:
                return _without_nan(name, func, args, kwargs)
        try:
            if not (self.marks and name in _SCALAR_READS and has_nan(args, kwargs)):
                return self._compute(name, func, args, kwargs)
        except Exception:
            if not (self.marks and has_nan(args, kwargs)):
                raise
        self.decides(name)
        return func(*map_tensors(ones_for_nan, args), **map_tensors(ones_for_nan, kwargs))

    def _compute(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a function, or takes what stands in for it."""
        if not (self.surveys or self.stands_in) or not (name in MATRIX_CALLS or name == _ATTENTION):
            return func(*args, **kwargs)
        running = self._active[-1] if self._active else None
        call = signature(running.name if isinstance(running, Layer) else "", name, args, kwargs)
        result = self.stand_in(call, name, args, kwargs) if self.stands_in else None
        if result is None:
            result = func(*args, **kwargs)
        if self.surveys:
            self.network.stand_ins.keep(call, result)
        return result

    def _before_call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
        if self.surveys:
            self.uses_parameters(name, [*args, *kwargs.values()])
        kind = _OTHER_NAMES.get(name, name.rstrip("_"))
        if kind in _ACTIVATIONS and args:
            if kind == "hardtanh" and (args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)) >= 0:
                kind = "relu6"  # what nn.ReLU6 calls
            self._events += 1
            # within a norm, its input tells which channels these are: the norm may have mixed them already
            inside = self._inside_norms[-1][0] if self._inside_norms else None
            self.activates(self._events, kind, args[0] if inside is None else inside)
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
        elif name == _ATTENTION:
            args = (*args, *(kwargs.pop(key) for key in ("query", "key", "value")[len(args) :]))
            self._events += 2
            query = self.mixes(self._events - 1, _SCORES, args[0], None)
            return (query, self.mixes(self._events, _SCORES, args[1], None), *args[2:])
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
