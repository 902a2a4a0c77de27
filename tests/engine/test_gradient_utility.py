"""The running average of what weights contribute to the loss, against its formula."""

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.engine.gradient_utility import GradientUtility
from lightning_plasticity.kernels import choice


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize("decay_rate", [0.0, 0.75])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_averages_of_weights_that_have_gradients(
    dtype: torch.dtype, decay_rate: float, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_is_on", with_kernels)
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(3, 4).to(dtype)) for name in "abc"}
    utility = GradientUtility(decay_rate)
    utility.update(weights)  # nothing has a gradient
    assert not any(name in utility for name in weights)
    seen = {name: torch.zeros(3, 4).double() for name in weights}
    counts = dict.fromkeys(weights, 0)
    for having in ("ab", "ab", "a", "abc"):
        for name, weight in weights.items():
            weight.grad = torch.randn(3, 4).to(dtype) if name in having else None
        utility.update(weights)
        for name in having:
            contribution = (weights[name].double() * weights[name].grad.double()).abs().detach()
            seen[name] = decay_rate * seen[name] + (1 - decay_rate) * contribution
            counts[name] += 1
        for name in weights:
            assert (name in utility) == (counts[name] > 0)
            if counts[name]:
                found = utility.read(name)
                assert found.dtype == torch.promote_types(dtype, torch.float32)
                torch.testing.assert_close(
                    found.double(),
                    seen[name] / (1 - decay_rate ** counts[name]),
                    rtol=1e-2 if dtype.itemsize == 2 else 1e-5,
                    atol=1e-7,
                )
    twin = GradientUtility(decay_rate)
    state = utility.state_dict(weights)
    twin.load_state_dict(state, weights)
    assert state["updates"] == counts
    for method in (utility, twin):
        method.update(weights)
    assert all(torch.equal(utility.read(name), twin.read(name)) for name in weights)


@pytest.mark.parametrize("with_kernels", [False, True])
def test_what_is_not_finite_says_nothing(with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_is_on", with_kernels)
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    utility = GradientUtility(0.5)
    for gradient in ([1.0, 1.0, 1.0], [torch.nan, torch.inf, 0.0]):
        weight.grad = torch.tensor(gradient)
        utility.update({"a": weight})
    close(utility.read("a"), torch.tensor([0.5, 1.0, 0.75]) / 0.75)


def test_renewed_weights_get_the_mean_and_a_forgotten_tensor_begins_anew() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 6.0]))
    weight.grad = torch.ones(3)
    utility = GradientUtility(0.5)
    utility.update({"a": weight})
    utility.renew("a", torch.tensor([False, False, True]), weight)
    close(utility.read("a"), torch.tensor([1.0, 2.0, 3.0]))
    utility.forget("a")
    assert "a" not in utility
    utility.update({"a": weight})
    close(utility.read("a"), torch.tensor([1.0, 2.0, 6.0]))
