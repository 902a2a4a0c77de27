import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_plasticity.functional import local_redundancy


def test_it_is_the_trace_of_the_fisher_information_on_average():
    """Many copies of one input: their mean over drawn targets comes near the mean over all classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(1, 2).double()
    shares = model(x).softmax(-1).detach()[0]
    trace = 0.0
    for label in range(3):
        gradients = torch.autograd.grad(cross_entropy(model(x), torch.tensor([label])), list(model.parameters()))
        trace += float(shares[label] * sum(g.square().sum() for g in gradients))
    assert float(local_redundancy(model, x.expand(4000, 2), chunk_size=None)) == pytest.approx(trace, rel=0.05)


def test_values_with_noise():
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.full((4000, 1), 3.0).double()
    # the gradient is x times the noise over its variance
    assert float(local_redundancy(model, x, "values", noise=0.5, chunk_size=None)) == pytest.approx(9 / 0.25, rel=0.06)


def test_it_repeats_itself_leaves_random_state_and_needs_no_gradients_of_the_model():
    model, x = nn.Linear(2, 3), torch.randn(6, 2)
    state = torch.get_rng_state()
    first = local_redundancy(model, x)
    assert torch.equal(first, local_redundancy(model, x))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.weight.grad is None
    assert torch.isnan(local_redundancy(model, x * float("nan")))


def test_outputs_that_are_no_matrix_are_refused():
    with pytest.raises(ValueError, match=r"a matrix with a row for each example, got \(2, 2, 3\)"):
        local_redundancy(nn.Linear(2, 3), torch.zeros(2, 2, 2))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x), x

    with pytest.raises(ValueError, match="a matrix with a row for each example, got tuple"):
        local_redundancy(Pair(), torch.zeros(2, 2))
