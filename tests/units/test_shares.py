"""How much of a network belongs to units, counted entry by entry."""

import math

import pytest
import torch
from torch import nn

from lightning_plasticity.layer_views import named_layers
from lightning_plasticity.units import explore
from lightning_plasticity.units.find import table
from units.property_check import columns
from units.test_combined import attention, classifier
from units.test_find import IMAGE, NETWORKS, TOKENS, VECTOR, Function, residual


def halves():
    """Half of each hidden layer goes to the output, and half of what the second reads is the input."""

    def forward(s, x):
        h = s.first(x)
        y = s.second(torch.cat([h[:, :4].relu(), x], 1))
        return torch.cat([s.last(y[:, :4].relu()), h[:, 4:], y[:, 4:]], 1)

    return Function(forward, first=nn.Linear(6, 8), second=nn.Linear(10, 8), last=nn.Linear(4, 2))


CASES = {
    **{
        name: (NETWORKS[name][0], NETWORKS[name][1])
        for name in ("convolutional", "grouped_and_shuffled", "group_norm", "swiglu_of_two")
    },
    "recurrent": (lambda: classifier(nn.GRU, 12, num_layers=2, bidirectional=True), TOKENS),
    "attention": (attention, TOKENS),
    "halves": (halves, VECTOR),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ConvTranspose2d(5, 2, 2)), IMAGE),
}


def mark(model, found):
    """Makes NaN of all entries that belong to units, and ones of the others."""
    layers = named_layers(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        for units in found.units:
            for slots in units.producers:
                view = layers[slots.module]
                view.by_output(view.weight)[slots.entry] = math.nan
                if view.bias is not None:
                    view.bias_by_output(view.bias)[slots.entry] = math.nan
            for slots in units.consumers:
                for column in columns(layers[slots.module], slots.entry):
                    column.fill_(math.nan)
            for slots in units.norms:
                for p in model.get_submodule(slots.module).parameters():
                    p[slots.entry] = math.nan


@pytest.mark.parametrize("name", CASES)
def test_entries_are_counted_once(name):
    build, inputs = CASES[name]
    model = build()
    found = explore(model, inputs, {})
    mark(model, found)
    assert found.of_units == sum(int(p.isnan().sum()) for p in model.parameters())
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_what_a_residual_stream_keeps_out_is_said():
    model = residual()
    found = explore(model, IMAGE, {})
    streams = [name for name, reason in found.left_out.items() if "residual stream" in reason]
    assert streams == ["stem", "conv2", "conv4", "down"]
    *_, units, stream = table(found).splitlines()
    assert units.startswith(f"{found.of_units:,} of {found.parameters:,} parameters belong to units (")
    assert stream.startswith(f"4 layers are left out because of a residual stream: {found.of_stream:,} parameters (")
    mark(model, found)
    kept_out = [int((~p.isnan()).sum()) for name in streams for p in model.get_submodule(name).parameters()]
    assert 0 in kept_out  # of the weights that read units all belong to these
    assert found.of_stream == sum(kept_out)
