import pytest
import torch
from torch import nn

from lightning_plasticity import functional as F
from lightning_plasticity import metrics as M

from .cases import CASES, network


def test_the_matrix_is_of_all_examples_since_the_reset():
    updates = CASES["GradientCovariance"].updates(0)
    metric = M.GradientCovariance()
    assert metric.matrix().shape == (0, 0)
    for arguments in updates:
        metric.update(*arguments)
    model, inputs, targets = updates[0][0], *(torch.cat(parts) for parts in list(zip(*updates, strict=True))[1:])
    expected = F.gradient_covariance(model, nn.functional.cross_entropy, inputs, targets)
    torch.testing.assert_close(metric.matrix(), expected, rtol=1e-10, atol=1e-12)
    assert metric.compute().item() == F.summarize_covariance(metric.matrix()).item()
    metric.reset()
    assert metric.matrix().shape == (0, 0)


def test_parameters_must_stay_the_same():
    metric, (model, x, y) = M.GradientCovariance(), CASES["GradientCovariance"].updates(0)[0]
    metric.update(model, x, y)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="same number of parameters, 63, got 33: use one metric for each model"):
        metric.update(model, x, y)
    with pytest.raises(ValueError, match="summary must be"):
        M.GradientCovariance(summary="median")


@pytest.mark.parametrize("make", [M.GradientNorm, M.ZeroGradientFraction])
def test_gradients_are_read_where_they_are(make):
    metric, model = make(), network(0)
    with pytest.raises(ValueError, match="measure after `backward`"):
        metric.update(model)
    model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    metric = make()
    metric.update(model)
    value = metric.compute()
    model.zero_grad()
    assert value.isfinite()


def test_settings_are_checked_when_the_metric_is_made():
    with pytest.raises(ValueError, match="max_iterations must be"):
        M.Sharpness(max_iterations=0)
    with pytest.raises(ValueError, match="budget must be"):
        M.TrainabilityProbe(budget=0)
