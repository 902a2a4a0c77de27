"""A network as probing sees it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_plasticity.layer_views import named_layers
from lightning_plasticity.names import named_modules_as_written, submodule
from lightning_plasticity.units.channels import TORCH_NORMS, Layer, is_norm
from lightning_plasticity.units.combined import Combined
from lightning_plasticity.units.examining import random_states
from lightning_plasticity.units.stand_ins import StandIns

# Layers that mix their input channels in a way for which no column of one weight belongs to one input channel.
_OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


class Network:
    """A network, its example input, and what has been found out about its parts."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        modules = dict(named_modules_as_written(model))
        self.layers = [Layer(name, view) for name, view in named_layers(model).items()]
        self.combined = self._combine()
        self.norms = {name: m for name, m in modules.items() if is_norm(m)}
        known = {layer.module for layer in self.layers} | {*self.norms.values()}
        self.opaque = {name: m for name, m in modules.items() if isinstance(m, _OPAQUE) and m not in known}
        self.foreign = {  # modules that may be layers of kinds that are not known
            name: m for name, m in modules.items() if not (m in known or isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
        }
        self.mixing: set[str] = set()  # norms in which one channel's NaN reaches others
        self.elementwise: set[str] = set()  # norms in which each entry's NaN stays where it is
        self.stand_ins = StandIns()
        self.parameters = {id(parameter) for parameter in model.parameters()}
        self.nan_of_its_own = False  # whether it looks for NaN and finds some without our doing
        self.training_path = False
        self.runs = 0
        self._began, self._patience = time.monotonic(), 3.0
        self.put_random_states_back = random_states(model)
        self._modules = [
            (m, next(m.children(), None) is None or isinstance(m, (*TORCH_NORMS, *_DROPOUTS))) for m in model.modules()
        ]
        self._mark_unusable_weights()

    def begin_run(self, doing: str) -> None:
        """Counts a run; who waits for more than three seconds is told what is done, again after four times as long."""
        waited = time.monotonic() - self._began
        if waited > self._patience:
            self._patience = 4 * waited
            rank_zero_info(
                f"Finding the hidden units of {self}, which is done once: its forward pass runs on the example to see "
                f"{doing} (run {self.runs + 1}, {waited:.0f} s so far)."
            )
        self.runs += 1

    def __str__(self) -> str:
        return type(self.model).__name__

    def _combine(self) -> list[Combined]:
        """The modules that hold several layers."""
        parts: dict[str, dict[str, Layer]] = defaultdict(dict)
        for layer in self.layers:
            if layer.view.given is not None:
                name, _, part = layer.name.rpartition(".")
                parts[name][part] = layer
        return [Combined(name, submodule(self.model, name), layers) for name, layers in parts.items()]

    def _mark_unusable_weights(self) -> None:
        owners: dict[int, list[str]] = defaultdict(list)
        for name, module in named_modules_as_written(self.model):
            for key, parameter in module.named_parameters(recurse=False):
                owners[id(parameter)].append(f"{name}.{key}".lstrip("."))
        for layer in self.layers:
            weight = layer.module._parameters.get(layer.view.weight_name)
            if weight is None:
                layer.reason = (
                    "its weight is computed (parametrized or weight-normalised), not a parameter: "
                    "a column of it cannot be set to 0 by itself"
                )
            elif isinstance(layer.module, _ConvTransposeNd) and layer.module.groups > 1:
                layer.reason = f"it is a transposed convolution with groups={layer.module.groups}"
            elif not weight.is_floating_point():
                layer.reason = f"its weight has the type {weight.dtype}, not a floating-point one"
            elif len(owners[id(weight)]) > 1:
                others = ", ".join(o for o in owners[id(weight)] if o != layer.view.weight_path(layer.name))
                layer.reason = f"it shares its weight with {others}"
        for combined in self.combined:  # what one of its layers does cannot be told without the others
            reasons = [layer.reason for layer in combined.layers.values() if layer.reason is not None]
            for layer in combined.layers.values() if reasons else ():
                layer.reason = layer.reason or f"it is in one call with a layer that is left out: {reasons[0]}"

    def set_modes(self) -> None:
        """Evaluation mode; on the training path containers train while norms, dropouts and other leaves evaluate."""
        for module, is_leaf in self._modules:
            training = self.training_path and not is_leaf
            if module.training != training:
                module.training = training
