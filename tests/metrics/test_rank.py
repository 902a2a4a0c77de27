import sys

import pytest
import torch

from lightning_plasticity import functional as F
from lightning_plasticity import metrics as M

FUNCTIONS = {M.EffectiveRank: F.effective_rank, M.StableRank: F.stable_rank, M.FeatureRank: F.feature_rank}
RANKS = list(FUNCTIONS)


@pytest.mark.parametrize("metric_class", RANKS)
def test_memory_does_not_grow_with_the_number_of_batches(metric_class):
    metric = metric_class()
    sizes = []
    for _ in range(50):
        metric.update(torch.randn(100, 16))
        sizes.append(sum(state.numel() * state.element_size() for state in metric.metric_state.values()))
        assert all(isinstance(state, torch.Tensor) for state in metric.metric_state.values())
    assert set(sizes) == {16 * 16 * 8 + 3 * 8}
    others = {name: sys.getsizeof(value) for name, value in vars(metric).items()}
    metric.update(torch.randn(10_000, 16))
    assert {name: sys.getsizeof(value) for name, value in vars(metric).items()} == others


@pytest.mark.parametrize("metric_class", RANKS)
@pytest.mark.parametrize("batch", [1, 32, 2000])
@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rank_deficient_features_in_pieces(metric_class, batch, rank, scale):
    torch.manual_seed(0)
    h = scale * torch.randn(2000, rank, dtype=torch.float64) @ torch.randn(rank, 64, dtype=torch.float64)
    metric = metric_class()
    for piece in h.split(batch):
        metric.update(piece)
    assert metric.compute().item() == pytest.approx(FUNCTIONS[metric_class](h).item(), rel=1e-9)


def test_rounding_of_single_precision_is_not_rank():
    """The product has rank 5 up to the rounding of its entries: those singular values are small but not zero."""
    torch.manual_seed(0)
    h = torch.randn(2000, 5) @ torch.randn(5, 64)
    metric = M.EffectiveRank()
    metric.update(h)
    exact = F.effective_rank((h.double() @ torch.linalg.pinv(h.double(), rtol=1e-4)) @ h.double())
    assert metric.compute().item() == pytest.approx(exact.item(), rel=1e-5)


def test_more_units_than_samples():
    torch.manual_seed(0)
    h = torch.randn(10, 200, dtype=torch.float64)
    for metric_class, function in FUNCTIONS.items():
        metric = metric_class()
        for row in h.split(1):
            metric.update(row)
        assert metric.compute().item() == pytest.approx(function(h).item(), rel=1e-10)


def test_zeros_and_one_sample():
    for metric_class in RANKS:
        metric = metric_class()
        metric.update(torch.zeros(4, 3))
        assert metric.compute().item() == 0
        metric.update(torch.tensor([[1.0, 2.0, 3.0]]))
        assert metric.compute().item() == pytest.approx(1, abs=1e-12)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="delta must be a finite number"):
        M.FeatureRank(delta=1.0)
    with pytest.raises(ValueError, match="reduce must be one of"):
        M.StableRank(reduce="sum")
    with pytest.raises(ValueError, match="unit_dim must not be 0"):
        M.EffectiveRank(unit_dim=0)
    with pytest.raises(ValueError, match="need `unit_dim`"):
        M.EffectiveRank().update(torch.zeros(2, 3, 4))
