"""The runs that come first: which layers a network calls, and whether what they compute matters to its path."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.layer_views import TORCH_LAYERS
from lightning_plasticity.units.channels import Layer, memory, tensors_in, weights_of
from lightning_plasticity.units.nans import any_nan, clean
from lightning_plasticity.units.network import Network
from lightning_plasticity.units.probing import (
    LAYER_CALLS,
    MATRIX_CALLS,
    StopRun,
    Watch,
    describe,
    has_nan,
)

T = TypeVar("T")

_CHANGES = frozenset(
    ("mul", "__mul__", "__rmul__", "div", "__truediv__", "sub", "__sub__", "mean", "std", "var", "norm", "round")
)


class _Owners(Generic[T]):
    """To whom the memory of each parameter belongs; nobody, where two of them have the same."""

    def __init__(self, parameters: Iterable[tuple[nn.Parameter, T]]) -> None:
        # All parameters may be views of one vector, as after torch.nn.utils.vector_to_parameters.
        self._found: dict[int, list[tuple[nn.Parameter, T]]] = defaultdict(list)
        for parameter, owner in parameters:
            found = self._found[memory(parameter)]
            if all(parameter is not other for other, _ in found):
                found.append((parameter, owner))

    def of(self, x: Tensor) -> T | None:
        """Whose parameter a tensor is, or is a view of."""
        owners = [owner for parameter, owner in self._found.get(memory(x), ()) if _holds(parameter, x)]
        return owners[0] if len(owners) == 1 else None


def _holds(parameter: nn.Parameter, x: Tensor) -> bool:
    first = parameter.storage_offset()
    last = first + sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
    return bool(first <= x.storage_offset() <= last)


class Survey(Watch):
    """A run without NaN: which layers are called, how often, in which order, and what their weights are used for."""

    sees = "which layers it calls"
    surveys = True

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.calls: Counter[str] = Counter()
        self.order: list[Layer] = []
        self.direct: set[str] = set()  # layers that hand their own parameter to torch's linear or convolution
        self.elsewhere: dict[str, str] = {}  # the function outside a layer, or a call, that used its parameters
        self.foreign: dict[str, str] = {}  # modules that are no such layers -> the function that used their weight
        self._owners = _Owners((p, layer) for layer in network.layers for p in layer.module.parameters(recurse=False))
        self._foreign = _Owners((p, name) for name, m in network.foreign.items() for p in weights_of(m))
        self.nan_outputs = False
        self._bit = {layer: 2 << place for place, layer in enumerate(network.layers)}
        self.norm_sites = {name: 2 << place for place, name in enumerate(network.norms, len(network.layers))}
        self._sources: dict[int, int] = {}  # memory -> the layers whose units may be in it, as bits
        self._read: dict[int, int] = defaultdict(int)  # a layer's or norm's bit, 1 for the output -> what it may read

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        self.calls[layer.name] += 1
        if self.calls[layer.name] == 1:
            self.order.append(layer)
        self._read[self._bit[layer]] |= self._sources.get(memory(x), 0)
        return x

    @override
    def passes_norm(self, name: str, x: Tensor, dim: int | None) -> None:
        self._read[self.norm_sites[name]] |= self._sources.get(memory(x), 0)

    @override
    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        self._sources[memory(output)] = self._bit[layer]
        return output

    @override
    def _call(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = super()._call(name, func, args, kwargs)
        sources = 0
        for x in tensors_in((args, kwargs)):
            sources |= self._sources.get(memory(x), 0)
        for x in tensors_in(
            args[:1] if result is None else result
        ):  # what gives nothing writes into its first argument
            self._sources[memory(x)] = sources
        return result

    @override
    def uses_parameters(self, name: str, arguments: Sequence[Any]) -> None:
        for argument in tensors_in(arguments):
            foreign = self._foreign.of(argument)
            if foreign is not None and (name in MATRIX_CALLS or self._changes_weight(name, foreign)):
                self.foreign.setdefault(foreign, name)
            owner = self._owners.of(argument)
            if owner is None:
                continue
            if not self._active or self._active[-1].name != owner.call:
                self.elsewhere[owner.call] = name
            elif owner.inside is None and name in LAYER_CALLS and arguments[1] is owner.module.weight:
                self.direct.add(owner.name)

    def _changes_weight(self, name: str, foreign: str) -> bool:
        """Whether a module computes a weight for a layer call; one with parts may hold embeddings as well."""
        return name in _CHANGES and next(self.network.foreign[foreign].children(), None) is None

    @override
    def finish(self, outputs: Any) -> None:
        self.nan_outputs = any(any_nan(x) for x in tensors_in(outputs))
        for x in tensors_in(outputs):
            self._read[1] |= self._sources.get(memory(x), 0)

    def mark(self) -> None:
        """Writes the reasons why layers cannot be used into them."""
        for layer in self.network.layers:
            layer.site = self._bit[layer]
            # what comes out of a module of several layers is put together where nobody sees it
            layer.reach = (
                -1 if layer.inside is not None else sum(site for site, read in self._read.items() if read & layer.site)
            )
            layer.calls = calls = self.calls[layer.name]
            used_in = self.elsewhere.get(layer.call)
            if layer.reason is not None:
                continue
            if calls == 0 and used_in is not None:
                layer.reason = f"it is not called: its parameters are used outside of it (by {used_in})"
            elif calls == 0:
                layer.reason = "it is not called in a forward pass"
            elif used_in is not None:
                layer.reason = f"its parameters are also used outside of it (by {used_in})"
            elif isinstance(layer.module, TORCH_LAYERS) and layer.inside is None and layer.name not in self.direct:
                layer.reason = f"its weight is changed before it is used ({type(layer.module).__name__})"


class Decisions(Watch):
    """A run in which all that layers compute is NaN: does the network decide anything by it?"""

    sees = "whether it decides anything by the numbers"
    marks = True
    stands_in = True

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.taken: str | None = None

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        return clean(x)

    @override
    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        return output if layer.inside is None else torch.full_like(output, torch.nan)

    @override
    def carries(self, layer: Layer, x: Tensor) -> Tensor:
        return clean(x)

    @override
    def stand_in(self, call: Hashable, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        result = super().stand_in(call, name, args, kwargs)
        return None if result is None else torch.full_like(result, torch.nan)

    @override
    def mixes(self, event: int, what: str, x: Tensor, dim: int | None) -> Tensor:
        return clean(x) if dim is None else x

    @override
    def decides(self, name: str) -> None:
        self.taken = name
        raise StopRun

    @override
    def _call(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = super()._call(name, func, args, kwargs)
        several = result if isinstance(result, (tuple, list)) else ()
        has_indices = any(isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex()) for x in several)
        if (has_indices or name in ("numpy", "__array__")) and not self._inside_norms and has_nan(args, kwargs):
            self.decides(name)
        return result

    @override
    def refuses(self, error: Exception) -> bool:
        self.taken = f"an error, {describe(error)}"
        return False


class Rehearsal(Watch):
    """A run with stand-ins and without NaN: does it call what the network calls, and does no NaN come of it?"""

    sees = "whether it decides anything by the numbers"
    stands_in = True

    def __init__(self, network: Network, calls: Counter[str]) -> None:
        super().__init__(network)
        self._missing = Counter(calls)
        self.succeeds = True

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        self._missing[layer.name] -= 1
        if any_nan(x):
            self.succeeds = False
            raise StopRun
        return x

    @override
    def finish(self, outputs: Any) -> None:
        self.succeeds = not (any(self._missing.values()) or any(any_nan(x) for x in tensors_in(outputs)))

    @override
    def refuses(self, error: Exception) -> bool:
        self.succeeds = False
        return False
