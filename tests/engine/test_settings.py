"""A callback shows the settings that it was made with."""

from __future__ import annotations

import copy
import pickle

import pytest
from contract.cases import CASES, Case

from lightning_plasticity import ContinualBackprop, PlasticityMonitor, SelectiveReinit
from lightning_plasticity.metrics import DeadUnits


def test_settings_are_shown() -> None:
    assert repr(ContinualBackprop(1e-3, module="net")) == (
        "ContinualBackprop(replacement_rate=0.001, maturity_threshold=100, decay_rate=0.99, utility='contribution', "
        "init='empirical', compensate_bias=True, module='net', optimizer_state='survivors')"
    )
    assert "case='5M'" in repr(SelectiveReinit.from_case("5M"))
    assert repr(PlasticityMonitor({"dead": DeadUnits()}, 10)) == (
        "PlasticityMonitor(metrics={'dead': DeadUnits()}, every_n_train_steps=10, every_n_epochs=1, figures=True)"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_callback_and_its_copies_show_them(case: Case) -> None:
    method = case.make(module="net")
    assert repr(method).startswith(f"{type(method).__name__}(")
    assert "'net'" in repr(method)
    assert repr(copy.deepcopy(method)) == repr(method)
    assert repr(pickle.loads(pickle.dumps(method))) == repr(method)
