"""The kinds of runs that tell which unit reaches which input column; see ``probing.py`` for the idea."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.layer_views import TORCH_LAYERS
from lightning_plasticity.units.channels import Layer, Site, tensors_in, weights_of
from lightning_plasticity.units.nans import any_nan, clean, nan_channels, set_channels_nan
from lightning_plasticity.units.probing import LAYER_CALLS, Network, StopRun, Watch, describe

T = TypeVar("T")

_MATRIX_CALLS = LAYER_CALLS | frozenset(
    (
        *("matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "bmm", "baddbmm", "einsum", "tensordot", "bilinear"),
        "multi_head_attention_forward",
        *(f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")),
    )
)
_CHANGES = frozenset(
    ("mul", "__mul__", "__rmul__", "div", "__truediv__", "sub", "__sub__", "mean", "std", "var", "norm", "round")
)


def memory(x: Tensor) -> int:
    """What two tensors have in common of which one is a view of the other."""
    return int(x.untyped_storage()._cdata)


def _by_memory(parameters: Iterable[tuple[nn.Parameter, T]]) -> dict[int, T]:
    """What belongs to each parameter, by its memory; nothing for those that share theirs with others."""
    found: dict[int, tuple[nn.Parameter, T]] = {}
    shared = set()
    for parameter, value in parameters:
        if found.setdefault(memory(parameter), (parameter, value))[0] is not parameter:
            shared.add(memory(parameter))
    return {key: value for key, (_, value) in found.items() if key not in shared}


class Survey(Watch):
    """A run without NaN: which layers are called, how often, in which order, and what their weights are used for."""

    looks_at_parameters = True

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.calls: Counter[str] = Counter()
        self.order: list[Layer] = []
        self.direct: set[str] = set()  # layers that hand their own parameter to torch's linear or convolution
        self.elsewhere: dict[Layer, str] = {}  # the function outside a layer that used its parameters
        self.foreign: dict[str, str] = {}  # modules that are no such layers -> the function that used their weight
        self._owner = _by_memory((p, layer) for layer in network.layers for p in layer.module.parameters(recurse=False))
        self._foreign = _by_memory((p, name) for name, m in network.foreign.items() for p in weights_of(m))
        self.nan_outputs = False

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        self.calls[layer.name] += 1
        if self.calls[layer.name] == 1:
            self.order.append(layer)
        return x

    @override
    def uses_parameters(self, name: str, arguments: Sequence[Any]) -> None:
        for argument in tensors_in(arguments):
            foreign = self._foreign.get(memory(argument))
            if foreign is not None and (name in _MATRIX_CALLS or self._changes_weight(name, foreign)):
                self.foreign.setdefault(foreign, name)
            owner = self._owner.get(memory(argument))
            if owner is None:
                continue
            if not self._active or self._active[-1] is not owner:
                self.elsewhere[owner] = name
            elif name in LAYER_CALLS and arguments[1] is owner.module.weight:
                self.direct.add(owner.name)

    def _changes_weight(self, name: str, foreign: str) -> bool:
        """Whether a module computes a weight for a layer call; one with parts may hold embeddings as well."""
        return name in _CHANGES and next(self.network.foreign[foreign].children(), None) is None

    @override
    def finish(self, outputs: Any) -> None:
        self.nan_outputs = any(any_nan(x) for x in tensors_in(outputs))

    def mark(self) -> None:
        """Writes the reasons why layers cannot be used into them."""
        for layer in self.network.layers:
            calls = self.calls[layer.name]
            used_in = self.elsewhere.get(layer)
            if layer.reason is not None:
                continue
            if calls == 0 and used_in is not None:
                layer.reason = f"it is not called: its parameters are used outside of it (by {used_in})"
            elif calls == 0:
                layer.reason = "it is not called in a forward pass"
            elif calls > 1:
                layer.reason = f"it is called {calls} times in one forward pass"
            elif used_in is not None:
                layer.reason = f"its parameters are also used outside of it (by {used_in})"
            elif isinstance(layer.module, TORCH_LAYERS) and layer.name not in self.direct:
                layer.reason = f"its weight is changed before it is used ({type(layer.module).__name__})"


class _Marked(Watch):
    """A run in which some channels are NaN when they leave their layer."""

    marks = True

    def __init__(self, network: Network, marked: Tensor) -> None:
        super().__init__(network)
        self.marked = marked

    @override
    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        if layer.reason is not None or layer.unmarked is not None:
            return output
        return set_channels_nan(output, layer.channel_dim, self.marked[layer.first : layer.first + layer.size])


@dataclass
class Gate:
    """Two tensors that carry channels are multiplied: ``dim``, from the end, runs over the channels of the gate."""

    dim: int | None


class FindGates(_Marked):
    """A run with every second channel NaN: where do two tensors that carry channels meet, and in which dimension?"""

    def __init__(self, network: Network, marked: Tensor) -> None:
        super().__init__(network, marked)
        self.gates: dict[int, Gate] = {}
        self.mixtures: set[int] = set()  # the events at which all units are mixed
        self.activations: dict[int, tuple[str, int]] = {}

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        return clean(x)

    @override
    def activates(self, event: int, kind: str, x: Tensor) -> None:
        dim = _varying_dim(x)
        if dim is not None:
            self.activations[event] = (kind, dim)

    @override
    def multiplies(self, event: int, value: Tensor, gate: Tensor) -> Tensor:
        if not (any_nan(gate) and any_nan(value)):
            return gate
        dim = _varying_dim(gate)
        same_size = dim is not None and value.ndim >= -dim and value.shape[dim] == gate.shape[dim]
        self.gates[event] = Gate(dim if same_size else None)
        return clean(gate)

    @override
    def mixes(self, event: int, what: str, x: Tensor, dim: int | None) -> Tensor:
        nans = x.isnan()
        if not bool(nans.any()):
            return x
        spreads = dim is None or bool((nans.any(dim) & (~nans).any(dim)).any())
        if not (spreads or not bool(x.isfinite().any())):
            return x
        self.mixtures.add(event)
        return clean(x)


def _varying_dim(x: Tensor) -> int | None:
    """The one dimension, from the end, along which NaN and numbers alternate; None where there is not exactly one."""
    nans = x.isnan()
    varying = [d for d in range(x.ndim) if bool((nans.any(d) != nans.all(d)).any())]
    return varying[0] - x.ndim if len(varying) == 1 else None


class ReadCodes(_Marked):
    """The run for one bit: adds the bit to the code of each channel of each site at which NaN is seen."""

    def __init__(self, network: Network, marked: Tensor, bit: int, found: FindGates, codes: dict[Site, Tensor]) -> None:
        super().__init__(network, marked)
        self.bit, self.found, self.codes = bit, found, codes

    def _record(self, site: Site, nans: Tensor) -> None:
        bits = nans.to("cpu", torch.int64) << self.bit
        self.codes[site] = self.codes[site] | bits if site in self.codes else bits

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        nans = nan_channels(x, layer.channel_dim)
        self._record(Site("column", layer.name), nans)
        return clean(x) if bool(nans.any()) else x

    @override
    def passes_depthwise(self, layer: Layer, nans: Tensor) -> None:
        self._record(Site("depthwise", layer.name), nans)

    @override
    def passes_norm(self, name: str, x: Tensor, dim: int | None) -> None:
        if dim is None:
            return
        module = self.network.norms[name]
        entry_dims = getattr(module, "weight", None)
        several = entry_dims.ndim if isinstance(entry_dims, Tensor) else 1
        if several > 1:
            self._record(Site("norm", name), x.isnan().reshape(-1, *x.shape[-several:]).any(0).flatten())
        else:
            self._record(Site("norm", name), nan_channels(x, dim))

    @override
    def activates(self, event: int, kind: str, x: Tensor) -> None:
        if event in self.found.activations:
            name, dim = self.found.activations[event]
            self._record(Site("activation", f"{event} {name}"), nan_channels(x, dim))

    @override
    def multiplies(self, event: int, value: Tensor, gate: Tensor) -> Tensor:
        if event not in self.found.gates:
            return gate
        dim = self.found.gates[event].dim
        if dim is not None:
            self._record(Site("gate", str(event)), nan_channels(gate, dim))
            self._record(Site("value", str(event)), nan_channels(value, dim))
        return clean(gate)

    @override
    def mixes(self, event: int, what: str, x: Tensor, dim: int | None) -> Tensor:
        return clean(x) if event in self.found.mixtures else x


class Proof(_Marked):
    """Only the members are NaN and only their own columns clean them: wherever else NaN arrives, it has escaped.

    ``units`` gives for each channel of a site the number of the unit it belongs to, -1 for none.
    """

    def __init__(self, network: Network, members: Tensor, units: Mapping[Site, Tensor], found: FindGates) -> None:
        super().__init__(network, members)
        self.units = units
        self.gates, self.mixtures = found.gates, found.mixtures
        self.escape: str | None = None
        self.at: Layer | None = None  # the layer at whose inputs it was seen
        self.mixed = False  # all of that layer's inputs were NaN
        self.mixing_norms: set[str] = set()  # that NaN has passed

    def _escaped(self, where: str) -> None:
        self.escape = where
        raise StopRun

    def _own(self, site: Site) -> Tensor:
        units = self.units[site]
        return (units >= 0) & self.marked[units.clamp(min=0)]

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        nans = nan_channels(x, layer.channel_dim).cpu()
        if not bool(nans.any()):
            return x
        if layer.reason is not None or bool((nans & ~self._own(Site("column", layer.name))).any()):
            self.mixed, self.at = bool(nans.all()), layer
            self._escaped(f"the inputs of {layer.name!r}")
        return clean(x)

    @override
    def multiplies(self, event: int, value: Tensor, gate: Tensor) -> Tensor:
        if event not in self.gates:
            return gate
        dim = self.gates[event].dim
        if dim is not None:
            own = self._own(Site("gate", str(event))).nonzero().squeeze(1)
            gate = gate.index_fill(dim, own.to(gate.device), 0.0)
        if any_nan(gate):
            self._escaped("a product with other units")
        return gate

    @override
    def mixes(self, event: int, what: str, x: Tensor, dim: int | None) -> Tensor:
        if event in self.mixtures and any_nan(x):
            self._escaped(what)
        return x

    @override
    def passes_norm(self, name: str, x: Tensor, dim: int | None) -> None:
        if name in self.network.mixing and any_nan(x):
            self.mixing_norms.add(name)

    @override
    def meets_opaque(self, name: str) -> None:
        self._escaped(f"the inputs of {name!r} ({type(self.network.opaque[name]).__name__})")

    @override
    def decides(self, name: str) -> None:
        self._escaped(f"a decision ({name})")

    @override
    def finish(self, outputs: Any) -> None:
        if any(any_nan(x) for x in tensors_in(outputs)):
            self._escaped("the network's output")

    @override
    def refuses(self, error: Exception) -> bool:
        self.escape = f"a check of their values, which raises {describe(error)}"
        return False


class Noise(Watch):
    """Members carry noise and their own columns ignore it: the network's output must not depend on the noise."""

    def __init__(self, network: Network, members: Tensor, units: Mapping[Site, Tensor], seed: int) -> None:
        super().__init__(network)
        self.members, self.units = members, units
        self.generator = torch.Generator().manual_seed(seed)
        self.refused = False  # the network's own code has raised an error

    @override
    def refuses(self, error: Exception) -> bool:
        self.refused = True
        return False

    @override
    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        members = self.members[layer.first : layer.first + layer.size]
        if layer.reason is not None or not bool(members.any()):
            return output
        noise = torch.randn(output.shape, generator=self.generator).to(output)
        shape = [1] * output.ndim
        shape[layer.channel_dim] = -1
        return torch.where(members.view(shape).to(output.device), noise, output)

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        if layer.reason is not None:
            return x
        units = self.units[Site("column", layer.name)]
        own = ((units >= 0) & self.members[units.clamp(min=0)]).nonzero().squeeze(1)
        return x.index_fill(layer.channel_dim, own.to(x.device), 0.0)
