"""Which batches of a Trainer's data a running average of gradients passes over."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_plasticity.engine.training_pass import average_gradients, trainers_batches

DATA = TensorDataset(torch.arange(50))


def passed_over(weight: float, **settings: Any) -> list[list[int]]:
    trainer: Any = SimpleNamespace(train_dataloader=DataLoader(DATA, **settings))
    return [batch[0].tolist() for batch in trainers_batches(trainer, weight)]


def in_order(begin: int, size: int) -> list[list[int]]:
    return [[*range(first, min(first + size, 50))] for first in range(begin, 50, size)]


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 1, "shuffle": True}])
@pytest.mark.parametrize(
    ("weight", "count"),
    [
        (1, 1),  # the last one is all of the average
        (0.5, 30),  # of the thirtieth before the end one half to the thirtieth is left
        (0.75, 15),
        (0.1, 50),  # all count
        (5e-324, 50),
    ],
)
def test_batches_count_from_where_on_they_are_more_than_rounding(
    weight: float, count: int, settings: dict[str, Any]
) -> None:
    assert passed_over(weight, **settings) == in_order(50 - count, 1)


def test_batches_are_counted_from_the_end_where_the_last_one_is_smaller() -> None:
    assert passed_over(1, batch_size=8) == in_order(48, 8)
    assert passed_over(0.99, batch_size=8) == in_order(50 - 2 - 4 * 8, 8)
    sampler = BatchSampler(SequentialSampler(DATA), 7, drop_last=False)
    assert passed_over(0.1, batch_sampler=sampler) == in_order(0, 7)


def test_data_that_have_no_size_are_refused() -> None:
    for data in (DataLoader(DATA, batch_size=None), [torch.zeros(1)]):
        trainer: Any = SimpleNamespace(train_dataloader=data)
        with pytest.raises(ValueError, match="must come from one DataLoader with a batch_size"):
            trainers_batches(trainer, 0.5)


def test_the_average_is_of_finite_batches_and_nothing_of_the_pass_remains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double().eval()
    model.seen, model.epochs = [0], 0
    data = [torch.randn(5, 3).double() for _ in range(4)]
    data[1][0] = math.nan
    unused = nn.Parameter(torch.ones(2).double())
    parameters = [*model.parameters(), unused]
    losses: list[bool] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor | None:
        losses.append(model.training)
        model.seen.append(len(losses))
        model.epochs += 1
        return None if batch is data[2] else model(batch).square().mean()

    expected = [torch.zeros_like(p) for p in parameters]
    state = torch.get_rng_state()
    model.train()
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batch in data:
        gradients = (
            None if batch is data[2] else torch.autograd.grad(model(batch).square().mean(), [*model.parameters()])
        )
        if gradients is not None and all(bool(g.isfinite().all()) for g in gradients):
            expected = [0.75 * e + 0.25 * g for e, g in zip(expected, [*gradients, torch.zeros(2)], strict=True)]
    model.load_state_dict(copies)
    model.eval()
    torch.set_rng_state(state)
    before = [torch.ones_like(p) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient
    averages, count = average_gradients(model, parameters, data, loss, 0.25)
    assert count == 2
    assert losses == [True] * 4
    for found, wanted in zip(averages, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), before, strict=True))
    assert not any(module.training for module in model.modules())
    assert (model.seen, model.epochs) == ([0], 0)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, copies[name]), name
