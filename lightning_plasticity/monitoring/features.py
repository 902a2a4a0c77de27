"""What the hidden layers of a model give out, read while somebody listens; at other times no hook is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_plasticity.engine.activations import check_channels
from lightning_plasticity.engine.examination import Part, is_inside
from lightning_plasticity.engine.forward import ModelHook, allow_compiled_code, run_eagerly
from lightning_plasticity.layer_views import layer_at
from lightning_plasticity.names import named_modules_as_written
from lightning_plasticity.notices import warn
from lightning_plasticity.shards.modules import splits_layers
from lightning_plasticity.shards.tensors import is_shared_out, whole
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.find import Findings, HiddenUnits


class FeatureReader:
    """Finds the hidden layers of a model inside its first calls, and hands on what they give out.

    The features of a set of hidden units are what the first layer that uses them reads: after normalisation,
    activation, pooling and dropout. They arrive as ``(samples, units)``, or ``(samples, positions, units)`` for
    convolutions and tokens.

    Args:
        model: the whole model; names are counted from it.
        scope: the module in it to read.
        name: the name of this module; empty for the model itself.
        patterns: names or patterns (as in ``fnmatch``) of the layers to read; None for all that have hidden units. A
            pattern that fits no set of hidden units reads the output of each module that it fits, as it is.
        hears: asked in every call of a layer, between :meth:`start` and :meth:`stop`, whether it is to be read.
        receive: is given the layer's name and its features.
    """

    def __init__(
        self,
        model: nn.Module,
        scope: nn.Module,
        name: str,
        patterns: Sequence[str] | None,
        hears: Callable[[], bool],
        receive: Callable[[str, Tensor], None],
    ) -> None:
        self._model, self._scope, self._name = model, scope, name
        self._are_split = splits_layers(model)
        self._patterns, self._hears, self._receive = patterns, hears, receive
        self.layers: dict[str, int | None] = {}  # the dimension of units in the features; None where it is not known
        self._matched: set[str] = set()
        self._has_warned = False
        self._left_out: dict[str, str] = {}
        self._registers: list[Callable[[], RemovableHandle]] = []  # each puts one hook in its place
        self._listening: ExitStack | None = None

    def start(self) -> None:
        """Listens from now on. Meanwhile compiled models run uncompiled: compiled code does not know of new hooks."""
        if self._listening is None:
            self._listening = ExitStack()
            self._listening.callback(allow_compiled_code, self)
            run_eagerly(self)
            for register in self._registers:
                self._listening.enter_context(register())

    def stop(self) -> None:
        """Listens no more."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        """Takes in the layers of a part of the model, in time to read the call that is about to go on."""
        self.add(part.found, part.name)

    def forget_parts(self) -> None:
        """Forgets all layers."""
        self.stop()
        self.layers, self._matched, self._left_out, self._registers = {}, set(), {}, []

    def add(self, found: Findings, part: str) -> None:
        """Takes in the hidden layers that were found in the part of the model that has this name."""
        self._left_out |= found.left_out
        sets = {units.name: units for units in found.units}
        for name, units in sets.items():
            if self._patterns is None or any(_fits(name, pattern) for pattern in self._patterns):
                self.layers[name] = -1
                self._read_units(name, units)
        for pattern in self._patterns or ():
            if any(_fits(name, pattern) for name in sets):
                self._matched.add(pattern)
            elif pattern not in self._matched:
                self._add_outputs(pattern, part)

    def _add_outputs(self, pattern: str, part: str) -> None:
        for name, module in named_modules_as_written(self._scope, self._name):
            if name != self._name and is_inside(name, part) and fnmatchcase(name, pattern):
                self._matched.add(pattern)
                self.layers[name] = None
                self._read_output(name, module)

    def check(self, failed: Mapping[str, Exception]) -> None:
        """Raises where a layer that was asked for is not read, and warns where there is none to read.

        Args:
            failed: the parts of the model that could not be examined, and why.
        """
        if self._patterns is not None:
            unmatched = [pattern for pattern in self._patterns if pattern not in self._matched]
            if unmatched:
                raise ValueError(
                    "layers= must name layers of modules that training calls, but nothing has the name or pattern "
                    f"{', '.join(map(repr, unmatched))}. model.named_modules() lists the names."
                )
        elif not self.layers and not self._has_warned:
            self._has_warned = True
            reasons = list({**failed, **self._left_out}.items())[:12]
            warn(
                "Measures of features need hidden layers, but none was found: these measures are left out. "
                "`find_units(model, example, explain=True)` prints why. Name the modules whose output to measure with "
                "layers=, the part of the model that has hidden units with module=, or give other metrics only."
                + "".join(f"\n  {layer}: {reason}" for layer, reason in reasons)
            )

    def _read_units(self, name: str, units: HiddenUnits) -> None:
        slots = units.consumers[0]
        layer = layer_at(self._model, slots.module)
        assert layer is not None
        entries = slots.entry[slots.unit.argsort(stable=True)].view(units.size, -1).to(layer.weight.device)

        def read(x: Tensor) -> None:
            if not self._hears():
                return
            x = whole(x.detach())  # of a layer that tensor parallelism splits each rank is given a piece
            if is_shared_out(layer.weight):
                check_channels(x.shape[layer.channel_dim], layer.inputs)
            self._receive(name, by_unit(x, entries, layer.channel_dim))

        self._add(partial(layer.hear, read, ModelHook))

    def _read_output(self, name: str, module: nn.Module) -> None:
        has_parameters = any(True for _ in module.parameters())

        def read(_: nn.Module, args: Any, output: Any) -> None:
            if not self._hears():
                return
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"layers= must name modules that return a tensor, but {name!r} returns {type(output).__name__}. "
                    "Name a module inside it."
                )
            if self._are_split and not has_parameters and not is_shared_out(output):
                raise RuntimeError(
                    f"Under tensor parallelism layers= must name modules with parameters, but {name!r} has none: what "
                    "it returns may be a rank's piece. Name a set of hidden units, the layer before or the one around."
                )
            self._receive(name, whole(output.detach()))

        # Before tensor parallelism makes a plain piece of the output, which would not say which piece it is.
        self._add(partial(module.register_forward_hook, ModelHook(read), prepend=self._are_split))

    def _add(self, register: Callable[[], RemovableHandle]) -> None:
        self._registers.append(register)
        if self._listening is not None:
            self._listening.enter_context(register())


def by_unit(inputs: Tensor, entries: Tensor, dim: int) -> Tensor:
    """Arranges what a layer reads as ``(samples, units)``, or ``(samples, positions, units)`` if there are positions.

    Args:
        inputs: the layer's input; without a batch it is one sample.
        entries: the channels that hold each unit, one row a unit; several are positions, which were flattened.
        dim: the dimension of the channels, counted from the end.

    Example:
        >>> import torch
        >>> by_unit(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0, 1], [2, 3]]), -1)
        tensor([[[1., 3.],
                 [2., 4.]]])
        >>> by_unit(torch.tensor([[1.0, 2.0]]), torch.tensor([[1], [0]]), -1)
        tensor([[2., 1.]])
    """
    inputs = inputs.unsqueeze(0) if inputs.ndim == -dim else inputs
    channels_last = inputs.movedim(dim, -1)
    values = channels_last[..., entries.flatten()].view(*channels_last.shape[:-1], *entries.shape)
    positions = values.movedim(-1, -2).flatten(1, -2)
    return positions.squeeze(1) if positions.shape[1] == 1 else positions


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits a set's name, or the name of the layer whose units fall into several sets."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.split(":")[0], pattern)


def call_with(module: nn.Module, prefix: str, batch: Any) -> ForwardCall:
    """The call of a module with a batch's inputs; a tuple or a dict of inputs are its arguments."""
    inputs = inputs_of(batch)
    if isinstance(inputs, dict):
        return ForwardCall(module, prefix, (), inputs)
    return ForwardCall(module, prefix, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch: the first of a pair, otherwise all of it."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def inputs_and_targets_of(batch: Any) -> tuple[Any, Any]:
    """Both parts of a batch; raises where it is no pair."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            "Metrics of inputs and targets need batches that are pairs of them, got "
            f"{type(batch).__name__}. Give such a pair as probe_batch=(inputs, targets)."
        )
    return batch[0], batch[1]
