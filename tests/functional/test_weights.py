import numpy as np
import pytest
import torch
from torch import nn

from lightning_plasticity.functional import (
    balancedness,
    distance_from_init,
    isometry_deviation,
    update_ratio,
    weight_magnitude,
    weight_norm,
    weight_norms,
)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))


def flat(model: nn.Module, only_weights: bool = False) -> np.ndarray:
    chosen = [p for p in model.parameters() if p.ndim >= 2 or not only_weights]
    return np.concatenate([p.detach().double().numpy().ravel() for p in chosen])


def test_values_are_those_of_numpy():
    now, start = network(0), network(1)
    w, theta, theta_0 = flat(now, only_weights=True), flat(now), flat(start)
    assert weight_magnitude(now).item() == pytest.approx(np.abs(w).mean(), rel=1e-12)
    assert weight_norm(now).item() == pytest.approx(np.linalg.norm(w), rel=1e-12)
    distance = np.linalg.norm(theta - theta_0)
    assert distance_from_init(now, start).item() == pytest.approx(distance, rel=1e-12)
    assert distance_from_init(now, start, relative=True).item() == pytest.approx(distance / np.linalg.norm(theta_0))
    assert update_ratio(now, start).item() == pytest.approx(distance / np.linalg.norm(theta_0), rel=1e-12)


def test_weights_are_matrices_and_kernels_only():
    assert list(weight_norms(network())) == ["0.weight", "3.weight"]
    assert weight_norms({"bias": torch.ones(4)})["bias"].item() == 2  # named tensors are taken as they are


def test_named_tensors_may_be_a_mapping_or_pairs():
    model = network()
    for source in (dict(model.named_parameters()), model.named_parameters(), list(model.named_parameters())):
        assert weight_norm(source).item() == pytest.approx(np.linalg.norm(flat(model)), rel=1e-12)


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert weight_norm(model).item() == pytest.approx(model[0].weight.double().norm().item(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_beyond_single_precision_do_not_overflow_or_vanish(scale):
    weights = {"w": torch.full((10, 10), scale)}
    assert weight_norm(weights).item() == pytest.approx(10 * scale, rel=1e-6)
    assert distance_from_init(weights, {"w": torch.zeros(10, 10)}).item() == pytest.approx(10 * scale, rel=1e-6)


def test_low_precision_is_accumulated_in_float64():
    w = torch.rand(300, 300).half()
    assert weight_magnitude({"w": w}).item() == pytest.approx(np.abs(w.double().numpy()).mean(), rel=1e-12)
    assert weight_norm({"w": w}).item() == pytest.approx(np.linalg.norm(w.double().numpy()), rel=1e-12)
    moved = {"w": torch.tensor([1.0, 1.0]).bfloat16()}
    start = {"w": torch.tensor([1.0, 0.9921875])}  # as single precision: the difference needs more digits than bfloat16
    assert distance_from_init(moved, start).item() == 0.0078125


def test_balancedness_is_the_largest_change_of_any_ratio():
    norms, start = {"a": 2.0, "b": 3.0, "c": 5.0}, {"a": 2.0, "b": 4.0, "c": 1.0}
    expected = max(abs(norms[i] / norms[j] - start[i] / start[j]) for i in norms for j in norms if i != j)
    as_tensors = [{name: torch.tensor(value) for name, value in each.items()} for each in (norms, start)]
    assert balancedness(*as_tensors).item() == pytest.approx(expected, rel=1e-6)
    assert balancedness(as_tensors[1], as_tensors[1]).item() == 0


def test_balancedness_ignores_a_common_factor():
    start = weight_norms(network())
    assert balancedness({name: 3 * n for name, n in start.items()}, start).item() == pytest.approx(0, abs=1e-12)


def test_zeros():
    zeros, ones = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    assert weight_magnitude(zeros).item() == weight_norm(zeros).item() == 0
    assert update_ratio(ones, zeros).isinf()
    assert update_ratio(zeros, zeros).isnan()
    assert balancedness(weight_norms(zeros), weight_norms(ones)).isnan()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value):
    bad, good = {"a": torch.tensor([[1.0, value]])}, {"a": torch.tensor([[1.0, 2.0]])}
    for result in (weight_magnitude(bad), weight_norm(bad), distance_from_init(bad, good), update_ratio(bad, good)):
        assert not result.isfinite()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="At least one parameter with an entry is required, got none"):
        weight_norm(nn.ReLU())
    with pytest.raises(ValueError, match="weight matrix or kernel is required, got only weight, bias"):
        weight_magnitude(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="same names and shapes as at the start, got changes in 3\\.bias, 3\\.weight"):
        distance_from_init(nn.Sequential(*list(network())[:3], nn.Linear(4, 6)), network())
    with pytest.raises(ValueError, match="at least two weights, got 1"):
        balancedness({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0)})


def test_isometry_deviation_matrix_by_matrix():
    torch.manual_seed(0)
    weights = {"tall": torch.randn(6, 3), "wide": torch.randn(3, 6), "kernel": torch.randn(4, 2, 3)}
    expected, any_scale = [], []
    for weight in weights.values():
        values = torch.linalg.svdvals(weight.flatten(1).double()).square()
        expected.append((values - 1).square().sum())
        any_scale.append((values / values.mean() - 1).square().sum())
    torch.testing.assert_close(isometry_deviation(weights), torch.stack(expected).mean())
    torch.testing.assert_close(isometry_deviation(weights, any_scale=True), torch.stack(any_scale).mean())
    assert isometry_deviation({"w": torch.zeros(2, 2)}, any_scale=True).item() == 2
    assert isometry_deviation({"w": torch.full((2, 2), float("nan"))}).isnan()
    with pytest.raises(ValueError, match=r"Matrices or kernels are required, got 'b' of shape \(3,\)"):
        isometry_deviation({"b": torch.zeros(3)})
