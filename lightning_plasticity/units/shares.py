"""How many entries of a network's parameters belong to hidden units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_plasticity.layer_views import LayerView
from lightning_plasticity.names import submodule
from lightning_plasticity.units.sets import HiddenUnits


def entries_by_name(model: nn.Module, layers: Mapping[str, LayerView], units: Iterable[HiddenUnits]) -> dict[str, int]:
    """How many entries of each layer and norm belong to units: rows, biases, columns, entries of norms, each once.

    Args:
        model: the network.
        layers: its layers by name.
        units: its sets of units.

    Example:
        >>> from lightning_plasticity.layer_views import named_layers
        >>> from lightning_plasticity.units import find_units
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> entries_by_name(model, named_layers(model), find_units(model, torch.zeros(1, 4)))
        {'0': 40, '2': 16}
    """
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    norms: dict[str, list[Tensor]] = defaultdict(list)
    for unit_set in units:
        for part, slots_of in ((outputs, unit_set.producers), (inputs, unit_set.consumers), (norms, unit_set.norms)):
            for slots in slots_of:
                part[slots.module].append(slots.entry)
    found = {}
    for name in dict.fromkeys([*outputs, *inputs]):
        found[name] = _entries_of_layer(layers[name], outputs.get(name, []), inputs.get(name, []))
    for name, entries in norms.items():
        own = [p for p in submodule(model, name).parameters(recurse=False) if p.numel() > 1]
        found[name] = len(set(torch.cat(entries).tolist())) * len(own)
    return found


def size_of(view: LayerView) -> int:
    """How many entries a layer has."""
    bias = 0 if view.bias is None else view.bias_by_row(_shape_of(view.bias)).numel()
    return view.matrix(_shape_of(view.weight)).numel() + bias


def _entries_of_layer(view: LayerView, outputs: list[Tensor], inputs: list[Tensor]) -> int:
    is_made, is_read = torch.zeros(view.outputs, dtype=torch.bool), torch.zeros(view.inputs, dtype=torch.bool)
    for mask, entries in ((is_made, outputs), (is_read, inputs)):
        for part in entries:
            mask[part.cpu()] = True
    others = [(~mask).view(view.groups, -1).sum(1) for mask in (is_made, is_read)]
    matrix = view.matrix(_shape_of(view.weight))
    kernel = view.gates * matrix[0, 0].numel()
    bias = 0 if view.bias is None else int(is_made.sum()) * view.gates
    return matrix.numel() - int((others[0] * others[1]).sum()) * kernel + bias


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, device="meta")
