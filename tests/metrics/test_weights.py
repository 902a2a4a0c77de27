import pytest
import torch
from torch import nn

from lightning_plasticity import functional as F
from lightning_plasticity import metrics as M

from .cases import network


def trained(model: nn.Module, steps: int = 1) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("make", [M.DistanceFromInit, M.Balancedness, M.UpdateRatio])
def test_the_reference_is_kept_by_reset_and_is_not_the_live_model(make):
    model, metric = network(0), make()
    metric.update(model)
    start = network(0)
    metric.reset()
    metric.update(trained(model))
    expected = {
        M.DistanceFromInit: lambda: F.distance_from_init(model, start),
        M.UpdateRatio: lambda: F.update_ratio(model, start),
        M.Balancedness: lambda: F.balancedness(F.weight_norms(model), F.weight_norms(start)),
    }[make]()
    assert expected > 0
    assert metric.compute().item() == expected.item()


@pytest.mark.parametrize("make", [M.DistanceFromInit, M.Balancedness, M.UpdateRatio])
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_the_reference_is_always_in_a_checkpoint(make):
    model, metric, resumed = network(0), make(), make()
    metric.update(model)
    resumed.load_state_dict(metric.state_dict())
    trained(model)
    metric.reset()
    metric.update(model)
    resumed.update(model)
    assert resumed.compute().item() == metric.compute().item() > 0


def test_the_first_update_measures_no_step():
    metric, model = M.UpdateRatio(), network(0)
    metric.update(model)
    assert metric.compute().isnan()
    assert metric(trained(model)).item() > 0
    assert metric(model).item() == 0  # nothing happened since
    with pytest.raises(ValueError, match="UpdateRatio needs dist_sync_on_step=False, got True"):
        M.UpdateRatio(dist_sync_on_step=True)


def test_norms_of_each_layer():
    metric, model = M.WeightNorm(), network(0)
    assert metric.per_layer() == {}
    metric.update(model)
    layers = metric.per_layer()
    assert layers == F.weight_norms(model)
    assert metric.compute().item() == pytest.approx(sum(n.item() ** 2 for n in layers.values()) ** 0.5, rel=1e-12)
    metric.update({name: 3 * p for name, p in model.named_parameters() if p.ndim >= 2})
    for name, norm in metric.per_layer().items():
        assert norm.item() == pytest.approx(2 * layers[name].item(), rel=1e-12)  # the mean over updates
    resumed = M.WeightNorm()
    metric.persistent(True)
    resumed.load_state_dict(metric.state_dict())
    assert resumed.per_layer() == metric.per_layer()


def test_another_model_is_refused():
    other = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3))
    for make, message in (
        (M.DistanceFromInit, "same names and shapes"),
        (M.UpdateRatio, "same names and shapes"),
        (M.Balancedness, "same names and shapes"),
        (M.WeightNorm, r"same weights, 0\.weight, 3\.weight, got 0\.weight, 1\.weight"),
    ):
        metric = make()
        metric.update(network(0))
        with pytest.raises(ValueError, match=message):
            metric.update(other)


def test_scaling_all_layers_alike_keeps_the_balance():
    metric, model = M.Balancedness(), network(0)
    metric.update(model)
    with torch.no_grad():
        for p in model.parameters():
            p *= 2
    metric.reset()
    metric.update(model)
    assert metric.compute().item() == pytest.approx(0, abs=1e-12)
