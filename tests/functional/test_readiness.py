import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_plasticity.functional import optimization_readiness
from lightning_plasticity.metrics import OptimizationReadiness


def data(count: int = 24) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.randn(count, 3).double(), torch.randn(count, 2).double()


def test_the_formula_with_the_gradient_of_each_small_batch():
    model, x, y = data()
    model.eval()

    def gradient(chosen: list[int]) -> tuple[float, np.ndarray]:
        model.zero_grad()
        loss = mse_loss(model(x[chosen]), y[chosen])
        loss.backward()
        return loss.item(), np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])

    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    loss, whole = gradient(list(range(24)))
    squares = [float((gradient(order[i : i + 5])[1] ** 2).sum()) for i in (0, 5, 10)]
    expected = float((whole**2).sum()) ** 2 / (loss * sum(squares) / 3)
    model.zero_grad()
    model.train()
    value = optimization_readiness(model, mse_loss, x, y, batch_size=5, batches=3)
    assert float(value) == pytest.approx(expected, rel=1e-10)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_gradients_that_disagree_lower_it():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    x = torch.ones(8, 1)
    together = optimization_readiness(model, mse_loss, x, torch.ones(8, 1))
    against = optimization_readiness(model, mse_loss, x, torch.tensor([[1.0]] * 5 + [[-1.0]] * 3), batch_size=1)
    assert float(together) == pytest.approx(4.0)
    assert float(against) == pytest.approx(4.0 * 0.25**4)


def test_nothing_to_gain_is_0_and_what_is_not_finite_is_nan():
    model = nn.Linear(1, 1, bias=False)
    x = torch.ones(8, 1)
    assert float(optimization_readiness(model, mse_loss, x, model(x).detach())) == 0
    assert float(optimization_readiness(model, lambda out, _: out.sum() * 0 + 1.0, x, x)) == 0
    assert float(optimization_readiness(model, lambda out, _: torch.ones(()), x, x)) == 0  # no gradient at all
    assert torch.isnan(optimization_readiness(model, mse_loss, x * float("nan"), x))


def test_what_cannot_be_measured_is_refused():
    model, x, y = data(3)
    with pytest.raises(ValueError, match="At least batch_size=4 examples are required at once, got 3"):
        optimization_readiness(model, mse_loss, x, y)
    metric = OptimizationReadiness(mse_loss, batch_size=1)
    metric.update(model, x, y)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="All updates need the same number of parameters, 32, got 12"):
        metric.update(model, x, y)
