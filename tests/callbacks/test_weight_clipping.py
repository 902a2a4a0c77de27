import math

import numpy as np
import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from lightning_plasticity import WeightClipping


@pytest.mark.parametrize("network", [mlp, convolutional])
def test_same_course_as_the_slow_reference_over_300_steps(network):
    model, twin = network(), network()
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (model, twin)]
    method = WeightClipping(1.2).attach(model, optimizers[0])
    clipped = 0

    def reference() -> None:
        nonlocal clipped
        for layer in twin.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = 1.2 / math.sqrt(layer.weight[0].numel())
                for tensor in (layer.weight, layer.bias):
                    values = tensor.detach().numpy()
                    for place in zip(*np.where(np.abs(values) > bound), strict=True):
                        values[place] = bound if values[place] > 0 else -bound
                        clipped += 1

    train(model, optimizers[0], method.step, INPUT[network], 300)
    train(twin, optimizers[1], reference, INPUT[network], 300)
    assert clipped > 1000
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-9, atol=1e-12)


def blown_up(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(100.0)
    return model


def largest(model: nn.Module) -> dict[str, float]:
    return {name: round(p.detach().abs().max().item(), 6) for name, p in model.named_parameters()}


def test_what_is_clipped_and_what_stays():
    model = nn.Sequential(
        nn.Embedding(3, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 1, kdim=9, vdim=9), nn.Linear(4, 2)
    )
    WeightClipping().attach(blown_up(model)).step()
    assert largest(model) == {
        "0.weight": 100.0,
        "1.weight": 100.0,
        "1.bias": 100.0,
        "2.q_proj_weight": 0.5,
        "2.k_proj_weight": 0.333333,
        "2.v_proj_weight": 0.333333,
        "2.in_proj_bias": 0.333333,
        "2.out_proj.weight": 0.5,
        "2.out_proj.bias": 0.5,
        "3.weight": 0.5,
        "3.bias": 0.5,
    }
    model = blown_up(nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2)))
    WeightClipping(2.0, biases=False, exclude="1").attach(model).step()
    assert largest(model) == {"0.weight": 1.0, "0.bias": 100.0, "1.weight": 100.0, "1.bias": 100.0}


def test_only_what_the_optimizer_trains_and_its_state_stays():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2))
    optimizers = [torch.optim.Adam(layer.parameters()) for layer in model]
    method = WeightClipping().attach(blown_up(model), optimizers)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    method.step()
    assert largest(model) == {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 100.0, "1.bias": 100.0}
    assert optimizers[0].state[model[0].weight]["exp_avg"].any()


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"WeightClipping needs weights .* include=\('\*',\) leaves none"):
        WeightClipping().attach(nn.Embedding(3, 4))
