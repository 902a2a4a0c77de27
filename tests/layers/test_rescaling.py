"""What is asked of a network to tell whether its outputs stay proportional."""

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.layers.flow import trace
from lightning_plasticity.layers.rescaling import change_of_outputs, plan


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden + self.branch(hidden).relu())


def change(model: nn.Module, tie_streams: bool = False, keep_biases: bool = False) -> float:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).double()
    rescaling = plan(model, trace(model, (x,), {}), tie_streams=tie_streams, keep_biases=keep_biases)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = change_of_outputs(model, (x,), {}, rescaling)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def test_the_epsilon_of_a_norm_goes_along_and_comes_back() -> None:
    """However much of what a norm divides by it is."""
    torch.manual_seed(0)
    first, second = nn.BatchNorm1d(8, eps=0.75), nn.LayerNorm(8, eps=1.5)
    layers = nn.Linear(4, 8), nn.Linear(8, 8), first, nn.ReLU(), nn.Linear(8, 8), second, nn.Linear(8, 2)
    assert change(nn.Sequential(*layers).double()) == 0.0
    assert (first.eps, second.eps) == (0.75, 1.5)


@pytest.mark.parametrize("tied", [False, True])
def test_only_tied_branches_stay_proportional(tied: bool) -> None:
    torch.manual_seed(0)
    found = change(Residual().double(), tie_streams=tied)
    assert found == 0.0 if tied else 1e-3 < found < 0.2


def test_kept_biases_change_the_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    assert change(model) == 0.0
    assert 1e-3 < change(model, keep_biases=True) < 0.2


def test_without_weights_there_is_nothing_to_rescale() -> None:
    found = plan(nn.ReLU(), trace(nn.ReLU(), (torch.ones(1, 2),), {}), tie_streams=True)
    assert (found.weights, found.targets, found.norms) == ({}, [], [])
    assert not found.groups.numel()
    assert not found.exponents.numel()
