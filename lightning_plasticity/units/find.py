"""Hidden units of any network: the weights that make each, the norm entries it passes, the columns that use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.names import original
from lightning_plasticity.shards.tensors import is_flattened
from lightning_plasticity.units.channels import NOBODY, Layer
from lightning_plasticity.units.examining import undisturbed
from lightning_plasticity.units.network import Network
from lightning_plasticity.units.runs import Escape
from lightning_plasticity.units.sets import HiddenUnits as HiddenUnits
from lightning_plasticity.units.sets import Slots as Slots
from lightning_plasticity.units.shares import entries_by_name, size_of
from lightning_plasticity.units.together import as_if_alone, example_of_all
from lightning_plasticity.units.wiring import Group, Wiring

_STREAM = "(a residual stream)"


@dataclass(frozen=True)
class Findings:
    """What a network was found to consist of: its sets of units, and for each layer left out the reason.

    ``parameters`` is how many entries all of its parameters have, ``of_units`` how many of them belong to units, and
    ``of_stream`` how many do not but are in layers whose units are added up in a residual stream.
    """

    units: list[HiddenUnits]
    left_out: dict[str, str]
    runs: int
    parameters: int = 0
    of_units: int = 0
    of_stream: int = 0


def find_units(model: nn.Module, *inputs: Any, explain: bool = False, **named_inputs: Any) -> list[HiddenUnits]:
    """Finds the hidden units of a network by running it on an example.

    The network runs some dozens of times, in evaluation mode and without gradients, and is afterwards as it was. Where
    FSDP2 or tensor parallelism shares its parameters out among ranks, all ranks must call this; the example of rank 0
    counts.

    Args:
        model: any network; a compiled one is examined through its original module.
        *inputs: an example of what ``model`` is called with. One example in the batch is enough and fastest.
        explain: print a table of what was found, with the reason for each layer that was left out.
        **named_inputs: what it is called with by name, as in ``find_units(model, input_ids=tokens)``.

    Returns:
        The sets of units, in the order of the forward pass. Empty if there are none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> units, = find_units(model, torch.zeros(1, 4))
        >>> units.name, units.size, units.consumers[0].module, units.activation
        ('0', 8, '2', 'relu')
    """
    found = explore(model, inputs, named_inputs, explain=explain)
    if explain:
        print(table(found))
    return found.units


def explore(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, explain: bool = True) -> Findings:
    """Like ``find_units``, for any call of the model; without ``explain`` only the cheap reasons are given."""
    model = original(model)
    _refuse_unprobeable(model)
    args, kwargs = example_of_all(model, (tuple(args), dict(kwargs)))
    with undisturbed(model), as_if_alone(model):
        network = Network(model, args, kwargs)
        wiring = Wiring(network)
        if explain:
            _explain(wiring)
        units = _assemble(wiring)
        left_out = {layer.name: reason for layer in network.layers if (reason := layer.reason or layer.unmarked)}
        for name, function in wiring.foreign.items():
            kind = type(network.foreign[name]).__name__
            left_out[name] = (
                f"its type is {kind}, which is not known as a linear or convolution layer (it uses {function})"
            )
    layers = {layer.name: layer.view for layer in network.layers}
    own = entries_by_name(model, layers, units)
    on_stream = [name for name, reason in left_out.items() if reason.endswith(_STREAM)]
    return Findings(
        units,
        left_out,
        network.runs,
        parameters=sum(p.numel() for p in model.parameters()),
        of_units=sum(own.values()),
        of_stream=sum(size_of(layers[name]) - own.get(name, 0) for name in on_stream),
    )


def _refuse_unprobeable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "find_units needs a module written in Python, got a TorchScript module. Pass the module it was made from."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"Parameter {name!r} of a lazy module has no shape yet. Run the model once on an example first."
            )
        if parameter.is_meta:
            raise ValueError(
                f"Parameter {name!r} is on the meta device and has no values. Materialise the model first."
            )
        if is_flattened(parameter):
            raise ValueError(
                f"Finding hidden units needs parameters that keep their shapes, but {name!r} is sharded as a piece of "
                "a flat one (FSDP1 or DeepSpeed stage 3). Find them before the model is sharded, or shard it by FSDP2 "
                "(fully_shard, ModelParallelStrategy)."
            )


def _explain(wiring: Wiring) -> None:
    """Gives each usable layer of which no unit was proven a reason."""
    proven = wiring.members(wiring.proven)
    unproven = [layer for layer in wiring.layers if not bool(proven[layer.numbers].any()) and layer.unmarked is None]
    alone = [layer for layer in unproven if layer.joins is None]
    escapes = wiring.prover.escapes_in_turn([_every_second(wiring, layer) for layer in alone])
    reasons = [_reason(escape) for escape in escapes]
    for layer, reason in zip(alone, reasons, strict=True):
        layer.reason = reason
    for layer in unproven:
        if layer.joins is not None:
            layer.reason = layer.joins.reason


def _every_second(wiring: Wiring, layer: Layer) -> Tensor:
    """Half of a layer's units: where all inputs of a layer then arrive as NaN, the units were mixed before."""
    chosen = torch.zeros(wiring.count, dtype=torch.bool)
    chosen[wiring.root[layer.numbers[::2]]] = True
    return chosen[wiring.root]


def _reason(escape: Escape | None) -> str:
    if escape is None:
        return "no layer uses its units one by one"
    if escape.at is None:
        return f"its units reach {escape.where}"
    if escape.at.reason is not None:
        return f"its units are used by {escape.at.name!r}, which is left out: {escape.at.reason}"
    if escape.mixed:
        return f"its units are mixed before {escape.at.name!r} uses them"
    if escape.at.calls > 1:
        return f"its units meet those of other layers where {escape.at.name!r} uses them in {escape.at.calls} calls"
    return f"its units are added to those of other layers before {escape.at.name!r} uses them {_STREAM}"


def _assemble(wiring: Wiring) -> list[HiddenUnits]:
    found = []
    for layer in wiring.layers:
        groups = [group for group in wiring.proven if group.layer is layer]
        for index, group in enumerate(groups):
            found.append(_hidden_units(wiring, group, layer.name if len(groups) == 1 else f"{layer.name}:{index}"))
    return found


def _hidden_units(wiring: Wiring, group: Group, name: str) -> HiddenUnits:
    position = torch.full((wiring.count,), NOBODY)
    position[group.roots] = torch.arange(len(group.roots))
    place = position[wiring.root]  # of each unit, in this set

    def slots(module: str, units: Tensor) -> Slots | None:
        unit = torch.where(units >= 0, place[units.clamp(min=0)], NOBODY)
        entry = (unit >= 0).nonzero().squeeze(1)
        return Slots(module, entry, unit[entry]) if len(entry) else None

    def sites(role: str) -> list[Slots]:
        read = (slots(site.name, units) for site, units in wiring.units.items() if site.role == role)
        return [found for found in read if found is not None]

    producers = [Slots(group.layer.name, group.roots - group.layer.first, torch.arange(len(group.roots)))]
    for layer in wiring.layers:
        numbers = layer.numbers
        joined = slots(layer.name, torch.where(wiring.root[numbers] != numbers, numbers, NOBODY))
        producers += [joined] if joined is not None else []
    return HiddenUnits(
        name=name,
        size=len(group.roots),
        producers=tuple(producers),
        norms=tuple(sites("norm")),
        consumers=tuple(sites("column")),
        activation=_activation(wiring, place) or group.layer.view.activation,
        exact=group.exact,
    )


def _activation(wiring: Wiring, place: Tensor) -> str | None:
    """The last activation function on the way of the units' values; if there is none, that on their gates' way."""
    on_value, on_gate = None, None
    for site, units in wiring.units.items():
        if site.role == "activation":
            inside = units[units >= 0]
            inside = inside[place[inside] >= 0]
            if len(inside):
                kind = site.name.split()[1]
                on_value, on_gate = (on_value, kind) if bool(wiring.is_gate[inside].all()) else (kind, on_gate)
    return on_value or on_gate


def table(found: Findings) -> str:
    """What was found, as a table for people."""
    rows = [("layer", "units", "with", "norms", "used by", "activation", "exact")]
    for units in found.units:
        rows.append(
            (
                units.name,
                str(units.size),
                ", ".join(slots.module for slots in units.producers[1:]),
                ", ".join(slots.module for slots in units.norms),
                ", ".join(slots.module for slots in units.consumers),
                units.activation or "",
                "yes" if units.exact else "no",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if found.left_out:
        lines += ["", "left out:"]
        widest = max(map(len, found.left_out))
        lines += [f"  {name.ljust(widest)}  {reason}" for name, reason in found.left_out.items()]
    if found.parameters:
        lines += [
            "",
            f"{found.of_units:,} of {found.parameters:,} parameters belong to units{_of(found.of_units, found)}.",
        ]
    on_stream = sum(reason.endswith(_STREAM) for reason in found.left_out.values())
    if on_stream:
        lines.append(
            f"{on_stream} layers are left out because of a residual stream: {found.of_stream:,} "
            f"parameters{_of(found.of_stream, found)} belong to no units because of it."
        )
    return "\n".join(lines)


def _of(count: int, found: Findings) -> str:
    return f" ({100 * count // found.parameters} %)"
