import math
import re

import pytest
import torch
from torch import nn

from lightning_plasticity.functional import churn
from lightning_plasticity.metrics import Churn


def test_the_divergence_entry_by_entry():
    torch.manual_seed(0)
    before, after = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    expected = 0.0
    for p, q in zip(before.tolist(), after.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (p, q))
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 4
    assert float(churn(before, after)) == pytest.approx(expected)
    assert float(churn(before, before)) == 0
    assert float(churn(before, after + 5.0)) == pytest.approx(expected)


def test_a_class_that_was_impossible_adds_nothing():
    before, after = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    assert float(churn(before, after)) == pytest.approx(math.log(2))
    assert float(churn(after, before)) == math.inf


def test_classes_are_in_the_last_dimension_and_all_before_it_are_examples():
    before, after = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    assert float(churn(before, after)) == pytest.approx(float(churn(before.view(8, 3), after.view(8, 3))))
    row = before[0, 0], after[0, 0]
    assert float(churn(*row)) == pytest.approx(float(churn(*(one.unsqueeze(0) for one in row))))
    assert float(churn(torch.tensor([1.0]), torch.tensor([3.0]), "values")) == 4


def test_what_cannot_be_compared_is_refused():
    for before, after in (((2, 3), (2, 2)), ((0, 3), (0, 3)), ((), ())):
        with pytest.raises(ValueError, match=re.escape(f"got shapes {before} and {after}")):
            churn(torch.zeros(before), torch.zeros(after))
    metric, model = Churn(), nn.Linear(2, 3)
    metric.update(model, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"All updates must have the same inputs.*probe_batch"):
        metric.update(model, torch.ones(1, 2))
    with pytest.raises(ValueError, match="Churn needs dist_sync_on_step=False"):
        Churn(dist_sync_on_step=True)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="The model must give a tensor, got"):
        Churn().update(Pair(), torch.zeros(1, 2))


def test_inputs_and_outputs_are_kept_by_reset_and_in_the_state():
    metric, model, x = Churn("values"), nn.Linear(1, 1, bias=False), torch.ones(2, 1)
    model.weight.data.fill_(1.0)
    metric.update(model, x)
    metric.reset()
    other = Churn("values")
    other.load_state_dict(metric.state_dict())
    model.weight.data.fill_(3.0)
    for each in (metric, other):
        each.update(model, x)
        assert float(each.compute()) == 4.0
