"""Proofs of many sets of units in one run: when one has escaped, the next has its turn."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity.units.channels import Layer, Site, memory, tensors_in
from lightning_plasticity.units.combined import Combined
from lightning_plasticity.units.nans import any_nan, clean
from lightning_plasticity.units.network import Network
from lightning_plasticity.units.probing import StopRun
from lightning_plasticity.units.runs import Escape, FindGates, Proof


class ProofsInTurn(Proof):
    """Where each of several sets of units escapes to, for as many of them as one run can tell.

    The NaN of a set that has escaped is taken out of every tensor that is left, so that the next set finds the network
    as it is without. A set of which a layer is called before its turn has to wait for another run.
    """

    def __init__(
        self, network: Network, sets: Sequence[Tensor], units: Mapping[Site, Tensor], found: FindGates
    ) -> None:
        self._nobody = torch.zeros_like(sets[0])
        super().__init__(network, self._nobody, units, found)
        self.sets = sets
        self.told: dict[int, Escape | None] = {}  # for each set that had its turn, by its place
        self._whose_turn: int | None = None
        self._waiting: dict[Layer, list[int]] = defaultdict(list)  # for a layer to be called
        for layer in network.layers:
            if layer.reason is None:
                self._waiting[layer] = [i for i, own in enumerate(sets) if bool(own[layer.numbers].any())]
        self._too_late: set[int] = set()
        self._made: list[weakref.ref[Tensor]] = []  # tensors that this run has made
        self._memory_made: set[int] = set()

    @override
    def leaves(self, layer: Layer, output: Tensor) -> Tensor:
        for place in self._waiting[layer]:
            if place in self.told or place in self._too_late:
                continue
            if self._whose_turn is None:
                self._whose_turn, self.told[place] = place, None
                self.mark(self.sets[place])
            else:
                self._too_late.add(place)
        return super().leaves(layer, output)

    @override
    def _escaped(self, where: str, at: Layer | None = None, mixed: bool | None = None) -> None:
        if self._whose_turn is None:
            return
        self.told[self._whose_turn] = Escape(where, at, mixed)
        self._whose_turn = None
        if len(self.told) + len(self._too_late) == len(self.sets):
            raise StopRun
        self.mark(self._nobody)
        self._made = [made for made in self._made if made() is not None]
        for x in [x for made in self._made if (x := made()) is not None and any_nan(x)]:
            try:
                x.copy_(clean(x))
            except RuntimeError:  # not every tensor can be written to
                raise StopRun from None

    def _note(self, made: Any, given: Any) -> None:
        """Remembers new tensors; never what was there before, nor views of it, which are not ours to write to."""
        others = {memory(x) for x in tensors_in(given)} - self._memory_made
        for x in tensors_in(made):
            if memory(x) not in others:
                self._memory_made.add(memory(x))
                self._made.append(weakref.ref(x))

    # ---- where tensors are made

    @override
    def _call(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = super()._call(name, func, args, kwargs)
        self._note(result, (args, kwargs))
        return result

    def _noting(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            result = hook(*arguments)
            self._note(result, arguments)
            return result

        return noting

    @override
    def after_layer(self, layer: Layer) -> Callable[..., Any]:
        return self._noting(super().after_layer(layer))

    @override
    def after_combined(self, combined: Combined) -> Callable[..., Any]:
        return self._noting(super().after_combined(combined))

    @override
    def after_norm(self, name: str) -> Callable[..., Any]:
        return self._noting(super().after_norm(name))

    # ---- how a run goes on after an escape

    @override
    def decides(self, name: str) -> None:
        super().decides(name)
        raise StopRun  # from here on the network may do what it would not do with numbers

    @override
    def refuses(self, error: Exception) -> bool:
        super().refuses(error)
        if self._whose_turn is not None:
            self.told[self._whose_turn] = self.escape
        return not self.told
