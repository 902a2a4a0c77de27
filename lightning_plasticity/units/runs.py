"""The kinds of runs that tell which unit reaches which input column; see ``probing.py`` for the idea."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity.units.channels import Layer, Site, tensors_in
from lightning_plasticity.units.nans import any_nan, clean, nan_channels, nan_factors, times_channels
from lightning_plasticity.units.network import Network
from lightning_plasticity.units.probing import StopRun, Watch, describe


class _Marked(Watch):
    """A run in which some channels are NaN when they leave their layer."""

    marks = True
    stands_in = True

    def __init__(self, network: Network, marked: Tensor) -> None:
        super().__init__(network)
        self.mark(marked)

    def mark(self, marked: Tensor) -> None:
        """From here on these channels are NaN."""
        self.marked = marked
        self._factors = nan_factors(marked)

    @override
    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        if layer.reason is not None or layer.unmarked is not None:
            return output
        return times_channels(output, layer.channel_dim, self._factors[layer.first : layer.first + layer.size])


@dataclass
class Gate:
    """Two tensors that carry channels are multiplied: ``dim``, from the end, runs over the channels of the gate."""

    dim: int | None


class FindGates(_Marked):
    """A run with every second channel NaN: where do two tensors that carry channels meet, and in which dimension?"""

    sees = "where units are multiplied or mixed"

    def __init__(self, network: Network, marked: Tensor) -> None:
        super().__init__(network, marked)
        self.gates: dict[int, Gate] = {}
        self.mixtures: set[int] = set()  # the events at which all units are mixed
        self.activations: dict[int, tuple[str, int]] = {}

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        return clean(x)

    @override
    def carries(self, layer: Layer, x: Tensor) -> Tensor:
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


class Seen(dict[Site, Tensor]):
    """For each channel of each site, the bits of the runs in which NaN was seen there.

    They lie together: small tensors that stay, made between large ones, would split the memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room = torch.zeros(0, dtype=torch.int64)

    def add(self, site: Site, nans: Tensor, bit: int) -> None:
        """Notes where NaN was seen in the run for a bit."""
        if site not in self:
            if len(self._room) < len(nans) or self._room.device != nans.device:
                self._room = torch.zeros(max(len(nans), 1 << 16), dtype=torch.int64, device=nans.device)
            self[site], self._room = self._room[: len(nans)], self._room[len(nans) :]
        self[site] |= nans.to(torch.int64) << bit


class ReadCodes(_Marked):
    """The run for one bit: notes at which channels of each site NaN is seen."""

    sees = "which unit reaches which weight"

    def __init__(self, network: Network, marked: Tensor, bit: int, found: FindGates, seen: Seen) -> None:
        super().__init__(network, marked)
        self.bit, self.found, self.seen = bit, found, seen

    def _record(self, site: Site, nans: Tensor) -> None:
        self.seen.add(site, nans, self.bit)

    @override
    def arrives(self, layer: Layer, x: Tensor) -> Tensor:
        self._record(Site("column", layer.name), nan_channels(x, layer.channel_dim))
        return clean(x)

    @override
    def carries(self, layer: Layer, x: Tensor) -> Tensor:
        self._record(Site("state", layer.name), nan_channels(x, layer.channel_dim))
        return clean(x)

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


@dataclass(frozen=True)
class Escape:
    """Where units have come that is none of their own columns: a layer's inputs, ``at``, or somewhere else."""

    where: str
    at: Layer | None = None
    mixed: bool | None = None  # whether all of that layer's inputs were NaN


OUTPUT = "the network's output"


class Proof(_Marked):
    """Only the members are NaN and only their own columns clean them: wherever else NaN arrives, it has escaped.

    ``units`` gives for each channel of a site the number of the unit it belongs to, or ``NOBODY``.
    """

    sees = "whether units reach nothing else"

    def __init__(self, network: Network, members: Tensor, units: Mapping[Site, Tensor], found: FindGates) -> None:
        super().__init__(network, members)
        self.units = units
        self.gates, self.mixtures = found.gates, found.mixtures
        self.escape: Escape | None = None
        self.mixing_norms: set[str] = set()  # that NaN has passed

    def _escaped(self, where: str, at: Layer | None = None, mixed: bool | None = None) -> None:
        self.escape = Escape(where, at, mixed)
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
            self._escaped(f"the inputs of {layer.name!r}", layer, bool(nans.all()))
        return clean(x)

    @override
    def carries(self, layer: Layer, x: Tensor) -> Tensor:
        if bool((nan_channels(x, layer.channel_dim).cpu() & ~self._own(Site("state", layer.name))).any()):
            self._escaped(f"the state of {layer.name!r}")
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
            gate = clean(gate)
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
            self._escaped(OUTPUT)

    @override
    def refuses(self, error: Exception) -> bool:
        self.escape = Escape(f"a check of their values, which raises {describe(error)}")
        return False


class SharedProof(Proof):
    """Proofs of several sets of units in one run, which goes on after an escape at a layer: that tells whose it is."""

    def __init__(self, network: Network, members: Tensor, units: Mapping[Site, Tensor], found: FindGates) -> None:
        super().__init__(network, members, units, found)
        self.escapes: list[Escape] = []
        self.stopped = False  # by an escape that may be anybody's

    @override
    def _escaped(self, where: str, at: Layer | None = None, mixed: bool | None = None) -> None:
        if at is None and where != OUTPUT:
            self.stopped = True
            raise StopRun
        self.escapes.append(Escape(where, at, mixed))

    @override
    def refuses(self, error: Exception) -> bool:
        self.stopped = True
        return False


class Noise(Watch):
    """Members carry noise and their own columns ignore it: no layer's inputs, nor the output, may depend on it.

    What a layer computes depends on its inputs alone. So it needs not be computed, as long as they are compared.
    """

    sees = "whether units reach nothing else"
    stands_in = True

    def __init__(self, network: Network, members: Tensor, units: Mapping[Site, Tensor], seed: int) -> None:
        super().__init__(network)
        self.members, self.units = members, units
        self.generator = torch.Generator().manual_seed(seed)
        self.refused = False  # the network's own code has raised an error
        self.seen: list[int] = []  # a number for each tensor that the noise may not change

    @override
    def refuses(self, error: Exception) -> bool:
        self.refused = True
        return False

    @override
    def stand_in(self, call: Hashable, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        return None if self.in_doubt(args, kwargs) else self.network.stand_ins.give(call)

    @override
    def arrive(self, layer: Layer, x: Tensor) -> Tensor:
        return self._without_own("depthwise" if layer.passes else "column", layer, x)

    @override
    def carries(self, layer: Layer, x: Tensor) -> Tensor:
        return self._without_own("state", layer, x)

    def _without_own(self, role: str, layer: Layer, x: Tensor) -> Tensor:
        if layer.reason is None:
            units = self.units[Site(role, layer.name)]
            own = ((units >= 0) & self.members[units.clamp(min=0)]).nonzero().squeeze(1)
            x = x.index_fill(layer.channel_dim, own.to(x.device), 0.0)
        self.seen.append(_digest(x))
        return x

    @override
    def leave(self, layer: Layer, output: Tensor) -> Tensor:
        members = None if layer.reason is not None else self.members[layer.first : layer.first + layer.size]
        if members is None or not bool(members.any()):
            return output
        noise = torch.randn(min(output.numel(), 4096), generator=self.generator)
        noise = noise.repeat(-(-output.numel() // len(noise)))[: output.numel()].view(output.shape).to(output)
        shape = [1] * output.ndim
        shape[layer.channel_dim] = -1
        return torch.where(members.view(shape).to(output.device), noise, output)

    @override
    def finish(self, outputs: Any) -> None:
        self.seen += [_digest(x) for x in tensors_in(outputs)]


def _digest(x: Tensor) -> int:
    """A number made of all bits of a tensor and of their places; others have the same by a chance of about 2^-32."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(x.element_size(), torch.int64)
    bits = x.contiguous().view(-1).view(integers)
    places = torch.arange(1, 2 * len(bits), 2, device=x.device, dtype=torch.int32)
    return int((bits * places).sum())
