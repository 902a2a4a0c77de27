import numpy as np
import pytest
import torch
from torch import nn

from lightning_plasticity.functional import ntk_rank


def test_the_rank_of_the_kernel_that_autograd_gives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(12, 4).double()
    rows = []
    for example in x:
        gradients = torch.autograd.grad(model(example[None]).sum(), list(model.parameters()))
        rows.append(np.concatenate([g.numpy().ravel() for g in gradients]))
    values = np.linalg.eigvalsh(np.array(rows) @ np.array(rows).T)[::-1]
    shares = values / values.sum()
    for energy in (0.5, 0.9, 0.99):
        needed = next(k for k in range(1, 13) if shares[:k].sum() >= energy)
        assert int(ntk_rank(model, x, energy=energy)) == needed
    kept = shares[shares > 1e-14]
    entropy = -(kept * np.log(kept)).sum()
    assert float(ntk_rank(model, x, "effective")) == pytest.approx(np.exp(entropy), rel=1e-6)


def test_special_cases():
    dead = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    dead[0].bias.data.fill_(-100.0)
    assert float(ntk_rank(dead, torch.randn(4, 2))) == 0
    assert float(ntk_rank(dead, torch.randn(4, 2), "effective")) == 0
    model = nn.Linear(3, 1, bias=False)
    assert float(ntk_rank(model, torch.eye(3), energy=1.0)) == 3
    assert float(ntk_rank(model, torch.eye(3), "effective")) == pytest.approx(3)
    # the gradient of a linear layer is its input
    assert torch.isnan(ntk_rank(model, torch.full((2, 3), float("nan"))))
    with pytest.raises(ValueError, match="at least one"):
        ntk_rank(model, torch.zeros(0, 3))
    with pytest.raises(ValueError, match="summary must be one of 'energy', 'effective', got 'stable'"):
        ntk_rank(model, torch.eye(3), "stable")
