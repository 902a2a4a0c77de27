"""Modules that hold several layers: torch's recurrent networks and cells, and its attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_plasticity.layer_views.view import Given, LayerView, view_of
from lightning_plasticity.names import named_modules_as_written, submodule

_GATES = {"LSTM": 4, "GRU": 3}  # a plain recurrent network has none
_ACTIVATIONS = {"RNN_RELU": "relu"}
_CELLS = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU", nn.RNNCell: "RNN"}
_KNOWN = [vars(kind)["forward"] for kind in (nn.LSTM, nn.GRU, nn.RNN, *_CELLS, nn.MultiheadAttention)]


def layers_of(module: nn.Module) -> dict[str, LayerView]:
    """The layers that a module is or holds, by what to add to its name; empty where it has none.

    - An ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` holds for each of its layers ``ih_l0``, which reads its inputs, and
      ``hh_l0``, which reads its own units; with projections also ``hr_l0``. The other direction ends in ``_reverse``.
    - A cell holds ``ih`` and ``hh``.
    - An ``nn.MultiheadAttention`` holds ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Example:
        >>> list(layers_of(nn.LSTM(2, 3))), list(layers_of(nn.Linear(2, 3)))
        (['ih_l0', 'hh_l0'], [''])
        >>> view = layers_of(nn.LSTM(2, 3))["ih_l0"]
        >>> view.outputs, view.inputs, tuple(view.by_output(view.weight).shape)
        (3, 2, (3, 2, 4))
    """
    if (view := view_of(module)) is not None:
        return {"": view}
    # a subclass with a forward of its own may do anything
    if type(module).forward not in _KNOWN:
        return {}
    if isinstance(module, nn.RNNBase):
        return {view.part: view for view in _recurrent_layers(module)}
    if isinstance(module, nn.RNNCellBase):
        return {kind: _cell_layer(module, kind) for kind in ("ih", "hh")}
    assert isinstance(module, nn.MultiheadAttention)
    return _projections(module)


def named_layers(model: nn.Module) -> dict[str, LayerView]:
    """All layers of a network by their names, in the order of its modules."""
    found: dict[str, LayerView] = {}
    for name, module in named_modules_as_written(model):
        for part, view in layers_of(module).items():
            found.setdefault(f"{name}.{part}".strip("."), view)
    return found


def layer_at(model: nn.Module, name: str) -> LayerView | None:
    """The layer of a name that :func:`named_layers` gives; None if what is there is none.

    Raises:
        AttributeError: If there is nothing of this name.
    """
    owner, _, part = name.rpartition(".")
    held = layers_of(submodule(model, owner))
    return held[part] if part and part in held else layers_of(submodule(model, name)).get("")


# ---- recurrent networks


def _recurrent_layers(module: nn.RNNBase) -> Iterator[LayerView]:
    directions = 2 if module.bidirectional else 1
    for number in range(module.num_layers * directions):
        layer, is_reverse = divmod(number, directions)
        suffix = f"l{layer}{'_reverse' if is_reverse else ''}"
        below = range(directions * (layer - 1), directions * layer)
        yield _gated(module, module.mode, f"ih_{suffix}", _first if layer == 0 else partial(_units_of, module, below))
        yield _gated(module, module.mode, f"hh_{suffix}", partial(_units_of, module, [number]))
        if module.proj_size:
            part = f"hr_{suffix}"
            yield LayerView(
                module, part=part, weight_name=f"weight_{part}", bias_name="", given=partial(_cells_of, number)
            )


def _cell_layer(module: nn.RNNCellBase, part: str) -> LayerView:
    mode = next(mode for kind, mode in _CELLS.items() if isinstance(module, kind))
    if isinstance(module, nn.RNNCell) and module.nonlinearity == "relu":
        mode = "RNN_RELU"
    return _gated(module, mode, part, _first if part == "ih" else _given_back)


def _gated(module: nn.Module, mode: str, part: str, given: Given) -> LayerView:
    return LayerView(
        module,
        part=part,
        weight_name=f"weight_{part}",
        bias_name=f"bias_{part}",
        gates=_GATES.get(mode, 1),
        adds_to=part.replace("hh", "ih") if part.startswith("hh") else None,
        activation=_ACTIVATIONS.get(mode, "tanh"),
        given=given,
    )


def _tensor(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _first(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    return _tensor(args[0] if args else kwargs["input"])


def _units_of(
    module: nn.RNNBase, numbers: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> Tensor:
    """The units of some layers and directions: of the last layer all, of those within their last, which is shown."""
    sequence, states = output
    last = states[0] if isinstance(states, tuple) else states
    directions = 2 if module.bidirectional else 1
    if numbers[0] < len(last) - directions:
        return torch.cat([last[number] for number in numbers], -1)
    return _tensor(sequence).chunk(directions, -1)[numbers[0] % directions]


def _cells_of(number: int, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """Cells before their output gates and projection, as far as they are shown."""
    return torch.tanh(output[1][1][number])


def _given_back(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """A cell's units, which it is given in its next call."""
    units = output[0] if isinstance(output, tuple) else output
    assert isinstance(units, Tensor)
    return units


# ---- attention


def _projections(module: nn.MultiheadAttention) -> dict[str, LayerView]:
    fused, width = module._qkv_same_embed_dim, module.embed_dim
    views: dict[str, LayerView] = {}
    for place, name in enumerate(("query", "key", "value")):
        part = f"{name[0]}_proj"
        third = slice(place * width, (place + 1) * width)
        views[part] = LayerView(
            module,
            part=part,
            weight_name="in_proj_weight" if fused else f"{part}_weight",
            bias_name="in_proj_bias",
            rows=third if fused else slice(None),
            bias_rows=third,
            given=partial(_argument, place, name),
        )
    # Its input is not shown: values before attention has averaged them stand for it.
    views["out_proj"] = LayerView(module.out_proj, given=partial(_values, views["v_proj"]), caller=module)
    return views


def _argument(place: int, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    x = args[place] if len(args) > place else kwargs[name]
    assert isinstance(x, Tensor)
    return x


def _values(view: LayerView, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    x, weight, bias = _argument(2, "value", args, kwargs, output), view.matrix(_whole(view.weight)), view.bias
    bias = None if bias is None else _whole(bias)
    return nn.functional.linear(x, weight, None if bias is None else view.bias_by_row(bias)).detach()


def _whole(tensor: Tensor) -> Tensor:
    """A parameter that FSDP2 may have shared out again after the call that has just been made."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
