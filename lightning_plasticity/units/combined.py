"""Modules that hold several layers, as probing sees them: what each layer is given and what becomes of its units.

Inside they are one call, into which no hook reaches. But what they do is known, so that it is played beside them with a
tensor for each layer's units: these leave their layer and arrive where the module uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_plasticity.units.channels import Layer


class Passes(Protocol):
    """What is done to units as they leave layers and arrive at others."""

    def arrive(self, layer: Layer, x: Tensor) -> Tensor:
        """A layer's input."""

    def leave(self, layer: Layer, output: Tensor) -> Tensor:
        """A layer's output."""

    def carries(self, layer: Layer, x: Tensor) -> Tensor:
        """The state that a layer's units go on from: their own, from an earlier call, or other units'."""

    def score(self, x: Tensor) -> None:
        """Scores of attention are made of units."""


class Combined:
    """A module that holds several layers, by their parts."""

    def __init__(self, name: str, module: nn.Module, layers: Mapping[str, Layer]) -> None:
        self.name, self.module, self.layers = name, module, layers
        for layer in layers.values():
            layer.inside = name
            layer.joins = None if layer.view.adds_to is None else layers[layer.view.adds_to]

    def enter(self, watch: Passes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """The arguments of a call."""
        if isinstance(self.module, nn.MultiheadAttention):
            for place, name in enumerate(("query", "key", "value")):
                layer = self.layers[f"{name[0]}_proj"]
                args, kwargs = _changed(args, kwargs, place, name, lambda x, layer=layer: watch.arrive(layer, x))
            return args, kwargs
        args, kwargs = _changed(args, kwargs, 0, "input", lambda x: self._read(watch, x))
        return _changed(args, kwargs, 1, "hx", lambda hx: self._carry(watch, hx))

    def leave(self, watch: Passes, output: Any) -> Any:
        """What a call gives."""
        if isinstance(self.module, nn.MultiheadAttention):
            return self._attend(watch, output)
        if isinstance(self.module, nn.RNNCellBase):
            return self._leave_cell(watch, output)
        return self._leave_network(watch, output)

    # ---- attention

    def _attend(self, watch: Passes, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        attended, weights = output
        query, key, value = (
            watch.leave(self.layers[part], attended.new_zeros(self.layers[part].size))
            for part in ("q_proj", "k_proj", "v_proj")
        )
        watch.score(query)
        watch.score(key)
        watch.arrive(self.layers["out_proj"], value)
        return watch.leave(self.layers["out_proj"], attended), weights

    # ---- recurrence

    def _suffixes(self) -> list[list[str]]:
        """How the parts of each direction of each layer end."""
        if isinstance(self.module, nn.RNNCellBase):
            return [[""]]
        assert isinstance(self.module, nn.RNNBase)
        directions = ["", "_reverse"] if self.module.bidirectional else [""]
        return [[f"_l{layer}{direction}" for direction in directions] for layer in range(self.module.num_layers)]

    def _shown(self, suffix: str) -> Layer:
        """The layer whose outputs are what the module shows of a direction of a layer."""
        return self.layers.get(f"hr{suffix}", self.layers[f"ih{suffix}"])

    def _read(self, watch: Passes, x: Tensor | PackedSequence) -> Tensor | PackedSequence:
        values = x.data if isinstance(x, PackedSequence) else x
        for suffix in self._suffixes()[0]:
            read = watch.arrive(self.layers[f"ih{suffix}"], values)
        return x._replace(data=read) if isinstance(x, PackedSequence) else read

    def _carry(self, watch: Passes, hx: Any) -> Any:
        units, cells = hx if isinstance(hx, tuple) else (hx, None)
        units = self._carry_each(watch, units, self._shown)
        if cells is None:
            return units
        return units, self._carry_each(watch, cells, lambda suffix: self.layers[f"ih{suffix}"])

    def _carry_each(self, watch: Passes, states: Tensor, layer_of: Callable[[str], Layer]) -> Tensor:
        if isinstance(self.module, nn.RNNCellBase):
            return watch.carries(layer_of(""), states)
        every = (suffix for suffixes in self._suffixes() for suffix in suffixes)
        return torch.stack([watch.carries(layer_of(s), x) for s, x in zip(every, states, strict=True)])

    def _leave_cell(self, watch: Passes, output: Any) -> Any:
        units, *cells = output if isinstance(output, tuple) else (output,)
        layer = self.layers["ih"]
        watch.arrive(self.layers["hh"], watch.leave(layer, units.new_zeros(layer.size)))
        left = [watch.leave(layer, x) for x in (units, *cells)]
        return tuple(left) if cells else left[0]

    def _leave_network(self, watch: Passes, output: tuple[Any, Any]) -> tuple[Any, Any]:
        sequence, states = output
        last, cells = states if isinstance(states, tuple) else (states, None)
        below: list[Tensor] = []
        for suffixes in self._suffixes():
            for suffix in suffixes if below else ():
                watch.arrive(self.layers[f"ih{suffix}"], torch.cat(below, -1))
            below = [self._repeat(watch, suffix, last) for suffix in suffixes]
        values = sequence.data if isinstance(sequence, PackedSequence) else sequence
        parts = zip(values.chunk(len(suffixes), -1), suffixes, strict=True)
        values = torch.cat([watch.leave(self._shown(suffix), part) for part, suffix in parts], -1)
        sequence = sequence._replace(data=values) if isinstance(sequence, PackedSequence) else values
        every = [suffix for layer in self._suffixes() for suffix in layer]
        last = torch.stack([watch.leave(self._shown(s), x) for s, x in zip(every, last, strict=True)])
        if cells is None:
            return sequence, last
        cells = [watch.leave(self.layers[f"ih{s}"], x) for s, x in zip(every, cells, strict=True)]
        return sequence, (last, torch.stack(cells))

    def _repeat(self, watch: Passes, suffix: str, like: Tensor) -> Tensor:
        """The units of a direction of a layer, which arrive at their own recurrent weights."""
        units = watch.leave(self.layers[f"ih{suffix}"], like.new_zeros(self.layers[f"ih{suffix}"].size))
        if f"hr{suffix}" in self.layers:
            projection = self.layers[f"hr{suffix}"]
            watch.arrive(projection, units)
            units = watch.leave(projection, like.new_zeros(projection.size))
        watch.arrive(self.layers[f"hh{suffix}"], units)
        return units


def _changed(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, change: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with one of them changed, wherever it is; nothing where it is missing or None."""
    if len(args) > place:
        if args[place] is not None:
            args = (*args[:place], change(args[place]), *args[place + 1 :])
    elif kwargs.get(name) is not None:
        kwargs = {**kwargs, name: change(kwargs[name])}
    return args, dict(kwargs)
