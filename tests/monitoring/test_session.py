"""What is measured at one moment."""

from contextlib import nullcontext

import torch
from torch import nn

from lightning_plasticity import metrics as M
from lightning_plasticity.monitoring.measures import Measures
from lightning_plasticity.monitoring.session import Session


def test_layers_that_this_rank_has_not_called_have_metrics_too_for_ranks_add_up_in_step() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    measures = Measures({"dead": M.DeadUnits()}, synchronize=True)
    session = Session(measures, model, model, "", None, None)
    session.examine((torch.ones(2, 3),), {})
    assert session.measure(nullcontext) == ({}, {})
    assert measures.updates() == {("dead", "0"): 0, ("dead", "2"): 0}
    session.close()
