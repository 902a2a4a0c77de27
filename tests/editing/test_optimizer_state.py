"""The first updates of renewed entries, beside a slow Adam that counts the steps of each entry."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_plasticity.editing.edits import Editor

LR, BETAS = 0.01, (0.9, 0.999)
FORMS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}]


class AdamOfEachEntry:
    """Adam, entry by entry: each has moments and a count of its own, and starts again by itself."""

    def __init__(self, size: int) -> None:
        self.first, self.second, self.steps = [0.0] * size, [0.0] * size, [0] * size

    def renew(self, entry: int) -> None:
        self.first[entry] = self.second[entry] = 0.0
        self.steps[entry] = 0

    def updates(self, gradients: list[float]) -> list[float]:
        found = []
        for i, gradient in enumerate(gradients):
            self.steps[i] += 1
            self.first[i] = BETAS[0] * self.first[i] + (1 - BETAS[0]) * gradient
            self.second[i] = BETAS[1] * self.second[i] + (1 - BETAS[1]) * gradient**2
            mean = self.first[i] / (1 - BETAS[0] ** self.steps[i])
            size = math.sqrt(self.second[i] / (1 - BETAS[1] ** self.steps[i]))
            found.append(LR * mean / (size + 1e-8))
        return found


def updates_after_a_renewal(
    mode: Any, gradient_of_new: Callable[[int], float], form: dict[str, Any], steps: int = 300
) -> tuple[torch.Tensor, torch.Tensor]:
    """How entry 0 of 40 moves in each step after it was renewed, in learning rates: ours, and the slow Adam's."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(8, 5, dtype=torch.float64))
    optimizer, slow = torch.optim.Adam([weight], lr=LR, betas=BETAS, **form), AdamOfEachEntry(40)
    ours, theirs = [], []
    for step in range(3000 + steps):
        gradient = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        if step == 3000:
            mask = torch.zeros(8, 5, dtype=torch.bool)
            mask[0, 0] = True
            Editor(nn.Identity(), [optimizer], mode).write_masked(weight, mask, torch.tensor(0.5))
            slow.renew(0)
        if step >= 3000:
            gradient[0, 0] = gradient_of_new(step - 2999)
        weight.grad, before = gradient, weight.detach().clone()
        optimizer.step()
        expected = torch.tensor(slow.updates(gradient.flatten().tolist()), dtype=torch.float64)
        moved = (before - weight.detach()).flatten()
        torch.testing.assert_close(moved[1:], expected[1:], rtol=1e-6, atol=1e-9)  # the others go on as before
        if step >= 3000:
            ours.append(moved[0].item() / LR)
            theirs.append(expected[0].item() / LR)
    return torch.tensor(ours), torch.tensor(theirs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_survivors_move_a_new_entry_by_no_more_than_a_fresh_adam_would(form: dict[str, Any]) -> None:
    """Wherever the new entry's gradients are at most as large as those of the others."""
    constant, fresh = updates_after_a_renewal("survivors", lambda age: 1.0, form)
    torch.testing.assert_close(fresh, torch.ones(300), rtol=1e-6, atol=1e-6)
    assert (constant <= 1.1 * fresh).all()
    ages = torch.arange(1.0, 301.0)
    # (1 - 0.9^a) of a gradient as large as the others' root mean square, which is known to a few percent
    torch.testing.assert_close(constant, 1 - 0.9**ages, rtol=0.1, atol=0.0)
    growing, fresh = updates_after_a_renewal("survivors", lambda age: age / 300, form)
    assert (growing <= fresh).all()
    assert growing[0] < 0.001 < fresh[0]


def test_reset_moves_a_new_entry_by_several_learning_rates() -> None:
    """The count belongs to the tensor: moments that start from 0 are not corrected. This is what survivors are for."""
    constant, _ = updates_after_a_renewal("reset", lambda age: 1.0, FORMS[0])
    ages = torch.arange(1.0, 301.0)
    expected = (1 - 0.9**ages) / (1 - 0.999**ages).sqrt() * math.sqrt(1 - 0.999**3300)
    torch.testing.assert_close(constant, expected, rtol=0.02, atol=0.0)
    assert 6 < constant.max() < 6.6


def test_a_mean_that_is_not_finite_is_not_written() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    for broken in (math.inf, math.nan):
        second.fill_(broken)
        mask = torch.tensor([[True, False], [False, False]])
        editor = Editor(nn.Identity(), [optimizer])
        editor.write_masked(weight, mask, torch.tensor(0.0))
        assert second[0, 0] == 0
        assert not second.flatten()[1:].isfinite().any()
