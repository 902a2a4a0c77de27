"""The matrices of a weight against loops over its entries."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.layers.matrices import FUSED, Matrices


class HomeMade(nn.Module):
    """A layer that computes with its weight by itself."""

    def __init__(self, compute: Any, *shape: int, groups: int = 1) -> None:
        super().__init__()
        self.compute, self.groups = compute, groups
        self.weight = nn.Parameter(torch.ones(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, groups=self.groups) if self.groups > 1 else self.compute(x, self.weight)


LAYERS: dict[str, tuple[nn.Module, str, int]] = {  # each with a name of its weight, and how many parts it has
    "Linear": (nn.Linear(3, 4), "0.weight", 1),
    "queries, keys and values": (nn.Linear(3, 6), "0.qkv.weight", 3),
    "convolution": (nn.Conv1d(2, 3, 4), "0.weight", 1),
    "groups": (nn.Conv2d(4, 6, (3, 2), groups=2), "0.weight", 2),
    "depthwise": (nn.Conv1d(4, 8, 3, groups=4), "0.weight", 4),
    "depthwise in two groups": (nn.Conv3d(2, 2, 2, groups=2), "0.weight", 2),
    "one channel": (nn.Conv2d(1, 3, 2), "0.weight", 1),
    "transposed": (nn.ConvTranspose2d(2, 3, 2), "0.weight", 1),
    "transposed in groups": (nn.ConvTranspose1d(6, 4, 3, groups=2), "0.weight", 2),
    "inputs first": (HomeMade(torch.matmul, 3, 4), "0.weight", 1),
    "inputs first, fused": (HomeMade(torch.matmul, 2, 6), "0.qkv.weight", 3),
    "home-made": (HomeMade(F.linear, 3, 4), "0.weight", 1),
    "home-made convolution": (HomeMade(F.conv1d, 4, 3, 2), "0.weight", 1),
    "home-made convolution in groups": (HomeMade(F.conv1d, 4, 3, 2, groups=2), "0.weight", 2),
    "home-made in three dimensions": (HomeMade(F.conv3d, 6, 2, 2, 1, 3, groups=3), "0.weight", 3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_falls_into_a_matrix_for_each_part_and_place(kind: str) -> None:
    layer, name, parts = LAYERS[kind]
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight = torch.arange(float(weight.numel())).view(weight.shape)
    matrices = Matrices.of(layer, name, weight, FUSED)
    kernel = list(product(*map(range, weight.shape[2:])))
    expected = []
    for part, place in product(range(parts), kernel):
        if kind.startswith("transposed"):  # inputs are in the first dimension, in groups
            size = len(weight) // parts
            rows = [[weight[(part * size + i, o, *place)] for i in range(size)] for o in range(weight.shape[1])]
        else:
            by_output = weight.T if kind.startswith("inputs first") else weight
            size = len(by_output) // parts
            rows = [[*by_output[(slice(part * size + o, part * size + o + 1), ..., *place)][0]] for o in range(size)]
        expected.append(torch.tensor(rows))
    assert torch.equal(matrices.split(weight), torch.stack(expected))
    assert torch.equal(matrices.join(matrices.split(weight)), weight)
    assert matrices.places == len(kernel)
    assert matrices.is_depthwise == kind.startswith("depthwise")


@pytest.mark.parametrize("parts", [0, -1, 4])
def test_parts_that_rows_cannot_be_shared_out_to_are_refused(parts: int) -> None:
    layer = nn.Linear(2, 6)
    with pytest.raises(ValueError, match=rf"The 6 rows of 'a' must be shared out evenly .* fused= says {parts}\."):
        Matrices.of(layer, "a", layer.weight, {"b": 1, "a": parts, "*": 2})
    assert Matrices.of(layer, "c", layer.weight, {"b": 1, "a": parts, "*": 2}).parts == 2
