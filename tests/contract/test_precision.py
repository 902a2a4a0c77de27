"""Methods act in low precision, too."""

from pathlib import Path

import pytest
import torch

from contract.cases import Case

from .test_resume import MID_EPOCH, Saves, checkpoint
from .training import BATCHES, EPOCHS, LightningNetwork, assert_acted, assert_same, every_case, fit, weights


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@every_case
def test_low_precision(case: Case, precision: str) -> None:
    method, again = case.make(), case.make()
    model = fit(method, precision=precision)
    assert_acted(model, fit(precision=precision))
    assert method.optimizer_steps == BATCHES * EPOCHS
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert_same(weights(fit(again, precision=precision)), weights(model))


@every_case
def test_resume_in_half_precision(case: Case, tmp_path: Path) -> None:
    method, resumed = case.make(), case.make()
    model = fit(method, Saves(tmp_path), precision="bf16-true")
    path = checkpoint(tmp_path, MID_EPOCH)
    other = fit(resumed, module=lambda: LightningNetwork(), ckpt_path=path, precision="bf16-true")
    assert_same(weights(other), weights(model))
    assert_same(resumed.state_dict(), method.state_dict())
