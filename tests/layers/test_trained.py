"""Which weights a step has trained: those that are frozen at first join when they are thawed."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.layers.trained import LayerWeights, each_times
from lightning_plasticity.layers.weights import LayerPatterns, find_parameters, find_weights, weights_in_words

EVERYWHERE = LayerPatterns(("*",), ())


def names_trained(weights, optimizer):
    return [weights.names[weight] for _, group in weights.trained_by(optimizer) for weight in group]


def test_frozen_weights_wait_until_they_are_thawed():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    model["backbone"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["norm"].parameters(), lr=0.5)
    with pytest.warns(UserWarning, match="A method has nothing to do yet, for each of the 1 weights .* 'ModuleDict'"):
        weights = LayerWeights("A method", model, "", EVERYWHERE, [optimizer])
    assert names_trained(weights, optimizer) == []
    model["backbone"].requires_grad_(True)
    optimizer.add_param_group({"params": model["backbone"].parameters()})
    assert names_trained(weights, optimizer) == ["backbone.weight"]


def test_without_an_optimizer_all_that_is_not_frozen_is_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert names_trained(LayerWeights("A method", model, "", EVERYWHERE, []), None) == ["0.weight"]


def test_a_weight_of_two_layers_is_one():
    model = nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight, model[4].weight = model[1].weight, model[0].weight
    assert list(find_weights(model, "", EVERYWHERE)) == ["1.weight", "3.weight"]
    assert list(find_parameters(model, "", EVERYWHERE)) == [
        "0.weight", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias", "4.bias"
    ]  # fmt: skip


def test_what_is_left_out_is_named_once():
    model = nn.Sequential(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 3).requires_grad_(False)))
    assert weights_in_words([model[0][1].weight], model, "") == "1 weights (of 2). Left out: '0.0.weight'."
    assert weights_in_words([model[0][0].weight, model[0][1].weight], model, "") == "2 weights."


def test_no_weights_at_all_are_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    for patterns, left_out in ((LayerPatterns(("*",), ("0",)), []), (EVERYWHERE, list(model.parameters()))):
        with pytest.raises(ValueError, match=r"A method needs weights .* include=\('\*',\).* leaves none that"):
            LayerWeights("A method", model, "", patterns, [], frozenset(left_out))


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("second", [torch.float32, torch.float64])
def test_each_tensor_is_multiplied_by_its_own_factor(is_cpu, second):
    types = torch.float32, second, torch.float32
    tensors = [torch.randn(shape, dtype=of_one) for shape, of_one in zip(((2, 3), (4,), ()), types, strict=True)]
    factors = [torch.tensor(factor, dtype=of_one) for factor, of_one in zip((0.5, -3.0, 7.0), types, strict=True)]
    with patch.object(Tensor, "is_cpu", is_cpu):
        found = each_times(tensors, factors)
        assert each_times([], []) == []
    expected = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
