"""Sets of units, and what kernels are told of the layers that read them."""

import torch
from torch import nn

from lightning_plasticity import ContinualBackprop
from lightning_plasticity.engine.unit_sets import reader_shapes


def test_shapes_of_readers() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, (3, 2), groups=2), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 5 * 6, 2)),
    )
    method = ContinualBackprop().attach(network, example_inputs=(torch.zeros(1, 3, 8, 8),))
    # first unit and column, columns of a unit, groups, outputs and inputs of a group, places, whether inputs come first
    assert reader_shapes(method._population.sets).tolist() == [
        [0, 0, 1, 2, 3, 2, 6, False],
        [4, 4, 1, 1, 5, 6, 4, True],
        [10, 10, 30, 1, 2, 150, 1, False],
    ]
