import pytest
import torch

from lightning_plasticity import metrics as M


def test_a_unit_is_dead_only_if_it_is_in_every_batch():
    metric = M.DeadUnits()
    metric.update(torch.tensor([[0.0, 0.0, 1.0]]))
    assert metric.compute().item() == pytest.approx(2 / 3)
    metric.update(torch.tensor([[0.0, -1.0, 0.0]]))
    assert metric.compute().item() == pytest.approx(1 / 3)


def test_batches_count_by_their_samples():
    metric = M.RarelyActiveUnits(rate=0.5)
    metric.update(torch.tensor([[1.0]]))
    metric.update(torch.zeros(9, 1))
    assert metric.compute().item() == 1  # active on 1 of 10 samples, though on half of the batches


def test_counts_stay_exact_beyond_single_precision():
    metric = M.SignEntropy()
    metric.update(torch.ones(1, 1))
    metric.positive = metric.positive + 2.0**24
    metric.samples = metric.samples + 2**25
    metric.update(torch.ones(1, 1))
    assert metric.positive.item() == 2**24 + 2
    assert metric.samples.item() == 2**25 + 2


def test_one_sample_has_no_correlation():
    metric = M.DuplicateUnits()
    metric.update(torch.randn(1, 4))
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: M.DeadUnits(eps=-1.0), "eps must be a finite number, at least 0,"),
        (lambda: M.RarelyActiveUnits(rate=2.0), "rate must be a finite number, at least 0 and at most 1,"),
        (lambda: M.DormantUnits(tau=-0.1), "tau must be a finite number, at least 0,"),
        (lambda: M.SaturatedUnits(low=0.0, high=0.0), "low < high"),
        (lambda: M.DuplicateUnits(threshold=-2.0), "threshold must be a finite number, at least -1 and at most 1,"),
    ],
)
def test_settings_are_checked_when_the_metric_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
