"""Layers whose parameters may be shared out: which of their values belong to which outputs and inputs."""

import torch
from torch import nn

from lightning_plasticity.layer_views import layers_of
from lightning_plasticity.shards.layers import by_output


def test_each_gate_of_a_whole_layer_is_of_the_same_outputs() -> None:
    view = layers_of(nn.LSTM(2, 3))["ih_l0"]
    part = by_output(view, view.weight)
    assert torch.equal(part.local, view.weight.view(4, 3, 2).movedim(0, -1))
    assert part.layout is None
