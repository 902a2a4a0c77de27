"""Training statistics come from training forwards only, each counted once; the user's random state is left alone."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contract.cases import Case

from .training import (
    SCENARIOS,
    LightningNetwork,
    assert_same,
    every_case,
    fit,
    weights,
    with_rate_zero,
)


@every_case
def test_validation_does_not_count(case: Case) -> None:
    method, validated = case.make(), case.make()
    model = fit(method)
    options = {"limit_val_batches": 3, "val_check_interval": 2, "num_sanity_val_steps": 2}
    assert_same(weights(fit(validated, **options)), weights(model))
    assert_same(validated.state_dict(), method.state_dict())


def checkpointed(use_reentrant: bool) -> type[LightningNetwork]:
    class Checkpointed(LightningNetwork):
        """In every second batch runs its second layer once more in the backward pass."""

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            self.saves_memory = batch_idx % 2 == 1
            return super().training_step(batch, batch_idx)

        def forward(self, x: Tensor) -> Tensor:
            if not self.saves_memory:
                return super().forward(x)
            net = self.net
            h = net.activation(net.norm(net.first(x)))
            h = checkpoint(lambda h: net.gate(net.second(h)), h, use_reentrant=use_reentrant)
            return net.head(h)

    return Checkpointed


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_case
def test_activation_checkpointing_counts_once(case: Case, use_reentrant: bool) -> None:
    """Of the two batches that are accumulated one would count twice: if both did, a mean would be none the wiser."""
    method, twin = case.make(), case.make()
    model = fit(twin, module=checkpointed(use_reentrant), accumulate_grad_batches=2)
    assert_same(weights(model), weights(fit(method, accumulate_grad_batches=2)))
    assert_same(twin.state_dict(), method.state_dict())


@every_case
def test_rate_zero_changes_nothing(case: Case) -> None:
    assert_same(weights(fit(with_rate_zero(case))), weights(fit()))


def random_states(run: Callable[[], Any]) -> Any:
    random.seed(3)
    np.random.seed(3)
    run()
    _, keys, *rest = np.random.get_state()
    return [torch.get_rng_state(), random.getstate(), keys.tolist(), rest]


@every_case
def test_users_random_state_is_left_alone(case: Case) -> None:
    assert_same(random_states(lambda: fit(case.make())), random_states(fit))


@every_case
def test_seed_decides(case: Case) -> None:
    """With a seed the user's random state has no part in what a method draws."""

    def run(users_seed: int, **seed: int) -> Any:
        model = LightningNetwork()
        model.load_state_dict(initial)
        torch.manual_seed(users_seed)
        return weights(fit(case.make(**seed), module=model))

    torch.manual_seed(0)
    initial = LightningNetwork().state_dict()
    assert_same(run(1, seed=5), run(2, seed=5))
    assert_same(run(1), run(1, seed=1))


def test_what_cases_leave_out_exists() -> None:
    from contract.cases import CASES

    from . import test_compilers, test_loops, test_precision, test_ranks, test_resume, test_steps  # noqa: F401

    assert {name for case in CASES for name in case.leaves_out} <= SCENARIOS
