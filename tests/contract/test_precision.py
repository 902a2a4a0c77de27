"""Methods act in low precision, too."""

import pytest
import torch

from contract.cases import Case

from .training import BATCHES, EPOCHS, assert_acted, assert_same, every_case, fit, weights


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
