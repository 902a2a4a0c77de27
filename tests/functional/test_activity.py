import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from lightning_plasticity.functional import (
    dead_units,
    dormant_units,
    duplicate_units,
    linearized_units,
    rarely_active_units,
    saturated_units,
    sign_entropy,
)
from lightning_plasticity.functional.activity import unit_rows

MEASURES = [dead_units, rarely_active_units, dormant_units, saturated_units, sign_entropy, duplicate_units]


def by_numpy(h: np.ndarray, *, eps: float, rate: float, tau: float, margin: float, threshold: float) -> list[float]:
    """The definitions, unit by unit."""
    samples, units = h.shape
    size = np.abs(h).mean(axis=0)
    duplicates = 0
    for i in range(units):
        others = [j for j in range(units) if j != i and h[:, i].std() > 0 and h[:, j].std() > 0]
        duplicates += any(np.corrcoef(h[:, i], h[:, j])[0, 1] > threshold for j in others)
    positive = (h > 0).mean(axis=0)
    return [
        np.mean([np.all(np.abs(h[:, i]) <= eps) for i in range(units)]),
        np.mean([np.count_nonzero(h[:, i]) < rate * samples for i in range(units)]),
        np.mean([size[i] <= tau * size.mean() for i in range(units)]),
        np.mean((h <= -1 + margin) | (h >= 1 - margin)),
        np.mean([entropy([p, 1 - p], base=2) for p in positive]),
        duplicates / units,
    ]


@given(samples=st.integers(2, 40), units=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_values_are_those_of_numpy(samples, units, seed):
    rng = np.random.default_rng(seed)
    # Quarters, and thresholds that they do not meet, so that rounding decides nothing. Some units are rarely active.
    h = rng.integers(-4, 5, (samples, units)) / 4 * (rng.random((samples, units)) < rng.random(units))
    settings = {"eps": 0.25, "rate": 0.3141, "tau": 0.6181, "margin": 0.25, "threshold": 0.7123}
    a = torch.from_numpy(h)
    values = [
        dead_units(a, settings["eps"]),
        rarely_active_units(a, settings["rate"]),
        dormant_units(a, settings["tau"]),
        saturated_units(a, margin=settings["margin"]),
        sign_entropy(a),
        duplicate_units(a, settings["threshold"]),
    ]
    assert [v.item() for v in values] == pytest.approx(by_numpy(h, **settings), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_relative_measures_do_not_depend_on_the_scale(scale):
    torch.manual_seed(0)
    h = torch.randn(50, 6, dtype=torch.float64)
    h[:, 0] *= 0.01
    h[:, 1] = h[:, 2] * 0.5
    assert dormant_units(scale * h).item() == pytest.approx(1 / 6)
    assert duplicate_units(scale * h).item() == pytest.approx(2 / 6)
    assert sign_entropy(scale * h).item() == sign_entropy(h).item()


def test_constant_features():
    h = torch.full((20, 4), 0.7)
    assert dead_units(h).item() == 0
    assert rarely_active_units(h).item() == 0
    assert dormant_units(h).item() == 0
    assert sign_entropy(h).item() == 0
    assert duplicate_units(h).item() == 0  # a constant has no correlation


@pytest.mark.parametrize("offset", [1.0, 1e3, 1e5])
def test_correlation_stands_a_large_mean(offset):
    torch.manual_seed(0)
    h = offset + torch.randn(400, 5, dtype=torch.float64)
    assert duplicate_units(h).item() == 0
    h[:, 4] = h[:, 0] + 1e-3 * torch.randn(400, dtype=torch.float64)
    assert duplicate_units(h).item() == pytest.approx(0.4)


def test_a_constant_that_rounds_is_still_constant():
    h = torch.full((1001, 3), 0.1) * torch.tensor([1.0, 3.0, 7.0])
    h[:, 2] = torch.randn(1001)
    assert duplicate_units(h).item() == 0


def test_opposite_units_are_no_duplicates():
    h = torch.randn(50, 1, dtype=torch.float64)
    assert duplicate_units(torch.cat([h, -h], dim=1)).item() == 0
    assert duplicate_units(torch.cat([h, 2 * h + 3], dim=1)).item() == 1
    assert duplicate_units(h).item() == 0  # no other unit


def test_a_layer_of_zeros_is_dead_and_dormant():
    h = torch.zeros(5, 3)
    assert dead_units(h).item() == rarely_active_units(h).item() == dormant_units(h).item() == 1


def test_one_sample():
    h = torch.tensor([[0.0, 1.0, -1.0, 0.001]])
    assert dead_units(h).item() == rarely_active_units(h).item() == 0.25
    assert dormant_units(h).item() == 0.5
    assert sign_entropy(h).item() == 0
    assert duplicate_units(h).isnan()


def test_dormant_by_size_is_not_dormant_by_frequency():
    """Two definitions of one name: ReDo goes by the mean size, the code of CBP's image experiments by the frequency."""
    small_but_always_active = torch.full((1000, 1), 0.01)
    large_but_rarely_active = torch.zeros(1000, 1)
    large_but_rarely_active[0] = 1000.0
    other = torch.ones(1000, 2)
    small = torch.cat([small_but_always_active, other], dim=1)
    rare = torch.cat([large_but_rarely_active, other], dim=1)
    assert (dormant_units(small).item(), rarely_active_units(small).item()) == (pytest.approx(1 / 3), 0)
    assert (dormant_units(rare).item(), rarely_active_units(rare).item()) == (0, pytest.approx(1 / 3))
    assert dead_units(small).item() == dead_units(rare).item() == 0


def test_dormant_by_activation_is_not_dormant_by_gradient():
    """ReGraMa's definition takes the gradients in place of the activations, and finds other units."""
    h = torch.tensor([[1.0, 1e-6, 1.0]], requires_grad=True)
    (h * torch.tensor([0.0, 1.0, 1.0])).sum().backward()
    for unit, (by_activation, by_gradient) in enumerate([(False, True), (True, False), (False, False)]):
        pair = [unit, 2]  # next to the third unit, which is dormant in no sense
        assert dormant_units(h[:, pair]).item() == by_activation / 2
        assert dormant_units(h.grad[:, pair]).item() == by_gradient / 2


def test_bounds_are_inclusive():
    h = torch.tensor([[0.5, 1.0, 1.5]], dtype=torch.float64)
    assert dead_units(h, eps=0.5).item() == pytest.approx(1 / 3)
    assert dormant_units(h, tau=0.5).item() == pytest.approx(1 / 3)
    assert saturated_units(torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]]), 0, 1, 0.25).item() == pytest.approx(0.8)
    active = torch.zeros(100, 1)
    active[0] = 1
    assert rarely_active_units(active, rate=0.01).item() == 0  # 1 of 100 is not fewer than 1 %


# ---- the arrangement of features -------------------------------------------------------------------------------------


def test_positions_are_samples_or_averaged():
    h = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    rows = unit_rows(h, unit_dim=1)
    assert rows.shape == (90, 4)
    torch.testing.assert_close(rows, h.permute(0, 2, 3, 1).reshape(90, 4))
    torch.testing.assert_close(unit_rows(h, unit_dim=1, reduce="mean"), h.mean(dim=(2, 3)))
    tokens = torch.randn(3, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(unit_rows(tokens, unit_dim=-1), tokens.reshape(21, 4))
    torch.testing.assert_close(unit_rows(tokens, unit_dim=2, reduce="mean"), tokens.mean(dim=1))
    matrix = torch.randn(3, 4)
    for unit_dim in (None, 1, -1):
        for reduce in (None, "mean"):
            torch.testing.assert_close(unit_rows(matrix, unit_dim, reduce), matrix)


def test_positions_of_half_precision_are_averaged_in_float64():
    h = torch.rand(2, 3, 5000).half()
    torch.testing.assert_close(unit_rows(h, 1, "mean"), h.double().mean(dim=2), rtol=1e-12, atol=0)


def test_features_keep_their_graph_and_values():
    h = torch.randn(4, 3, requires_grad=True)
    before = h.detach().clone()
    for measure in MEASURES:
        assert not measure(h).requires_grad
    assert torch.equal(h, before)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("features", "settings", "message"),
    [
        (torch.zeros(0, 3), {}, "at least one of each, got shape"),
        (torch.zeros(3, 0), {}, "at least one of each, got shape"),
        (torch.zeros(3), {}, "pass the activations of at least one sample"),
        (torch.zeros(3, 2, dtype=torch.long), {}, "floating-point numbers"),
        (torch.zeros(3, 2, 4), {}, "need `unit_dim`"),
        (torch.zeros(3, 2, 4), {"unit_dim": 0}, "must not be 0"),
        (torch.zeros(3, 2, 4), {"unit_dim": -3}, "a dimension of the features other than 0"),
        (torch.zeros(3, 2, 4), {"unit_dim": 3}, "a dimension of the features other than 0"),
        (torch.zeros(3, 2), {"reduce": "sum"}, "reduce must be one of None, 'mean'"),
    ],
)
def test_features_that_cannot_be_arranged_are_refused(measure, features, settings, message):
    with pytest.raises(ValueError, match=message):
        measure(features, **settings)


@pytest.mark.parametrize(
    ("measure", "settings", "message"),
    [
        (dead_units, {"eps": -0.1}, "eps must be a finite number, at least 0,"),
        (rarely_active_units, {"rate": 1.5}, "rate must be a finite number, at least 0 and at most 1,"),
        (dormant_units, {"tau": float("nan")}, "tau must be a finite number, at least 0,"),
        (duplicate_units, {"threshold": 2.0}, "threshold must be a finite number, at least -1 and at most 1,"),
        (saturated_units, {"low": 1.0, "high": 0.0}, "low < high"),
        (saturated_units, {"margin": 1.0}, "margin=1.0: pass the activation's bounds"),
        (saturated_units, {"margin": -0.1}, "margin=-0.1"),
    ],
)
def test_settings_are_checked(measure, settings, message):
    with pytest.raises(ValueError, match=message):
        measure(torch.ones(2, 2), **settings)


def test_a_margin_may_be_anything_below_half_the_distance_between_the_bounds():
    features = torch.tensor([[1.0, 3.0, 4.25, 6.0]])  # between bounds of 2 and 6, whose middle is 4
    for margin, share in ((0, 0.5), (1.0, 0.75), (1.74, 0.75), (1.75, 1.0), (1.99, 1.0)):
        assert saturated_units(features, low=2, high=6, margin=margin).item() == share
    for settings in ({"margin": 2.0}, {"low": 6.0, "margin": 0.0}):
        with pytest.raises(ValueError, match="low < high and 0 <= margin"):
            saturated_units(features, **{"low": 2.0, "high": 6.0, **settings})


def test_linearized_units_unit_by_unit():
    torch.manual_seed(0)
    features = torch.randn(20, 7)
    features[:, [1, 4]] = features[:, [1, 4]].abs() + 0.1
    features[:, 5] = features[:, 5].abs() + 0.1
    features[3, 5] = 0.0
    always = [all(value > 0 for value in unit) for unit in features.T.tolist()]
    assert always.count(True) == 2
    assert linearized_units(features).item() == pytest.approx(2 / 7)
    features[0, 0] = float("nan")
    assert linearized_units(features).isnan()
