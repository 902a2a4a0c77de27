import pytest
import torch

from lightning_plasticity import metrics as M


def test_every_task_counts_the_same_whatever_its_length():
    metric, online = M.TaskAccuracy(), M.OnlineAccuracy()
    for task, right in ((0, [1] * 90 + [0] * 10), (1, [0] * 10)):
        predictions, targets = torch.tensor(right), torch.ones(len(right), dtype=torch.long)
        metric.update(predictions, targets, task)
        online.update(predictions, targets)
    assert metric.compute().item() == pytest.approx((0.9 + 0) / 2)
    assert online.compute().item() == pytest.approx(90 / 110)


def test_tasks_may_come_in_any_order_and_be_left_out():
    metric, slope = M.TaskAccuracy(), M.TaskAccuracy(summary="slope")
    for task in (3, 0, 3):
        for each in (metric, slope):
            each.update(torch.tensor([1, task == 0]), torch.tensor([1, 1]), task)
    torch.testing.assert_close(metric.per_task().nan_to_num(-1), torch.tensor([1, -1, -1, 0.5], dtype=torch.float64))
    assert metric.compute().item() == 0.75
    assert slope.compute().item() == pytest.approx(-0.5 / 3)
    metric.reset()
    metric.update(torch.tensor([1]), torch.tensor([1]), 0)
    assert metric.per_task().tolist() == [1]


def test_a_falling_accuracy_has_a_negative_slope():
    slope = M.TaskAccuracy(summary="slope")
    for task in range(5):
        slope.update((torch.arange(100) >= 10 * task).long(), torch.ones(100, dtype=torch.long), task)
    assert slope.compute().item() == pytest.approx(-0.1)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="task must be a whole number, at least 0, got -1"):
        M.TaskAccuracy().update(torch.tensor([1]), torch.tensor([1]), -1)
    with pytest.raises(ValueError, match="summary must be one of 'mean', 'slope', got 'last'"):
        M.TaskAccuracy(summary="last")
    with pytest.raises(ValueError, match="integer targets"):
        M.OnlineAccuracy().update(torch.tensor([0.5]), torch.tensor([1]))
