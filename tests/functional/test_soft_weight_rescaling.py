"""The paper's theorems, over random updates, and the algebra of factors in common."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plasticity.functional.soft_weight_rescaling import (
    joint_norms,
    log_rescaling_factor,
    log_rescaling_factors,
    proportionality_error,
    tie,
)

numbers = st.floats(0.01, 100)
coefficients = st.floats(1e-4, 1)


def factor(norm: float, initial: float, coefficient: float) -> float:
    values = (torch.tensor([value], dtype=torch.float64) for value in (norm, initial, coefficient))
    return log_rescaling_factors(*values).exp().item()


@pytest.mark.parametrize("norm", [2.0, 1e-3, 0.0, math.nan, math.inf, 1e300])
def test_of_python_s_numbers_it_is_the_same(norm):
    assert math.exp(log_rescaling_factor(norm, 1.5, 0.7)) == pytest.approx(factor(norm, 1.5, 0.7), rel=1e-12)


@given(numbers, coefficients, st.floats(0, 1000), st.lists(st.floats(-1, 1), min_size=1, max_size=300))
def test_norms_stay_bounded_whatever_the_updates(initial, coefficient, largest_change, updates):
    norm, bound = initial, math.sqrt(largest_change) / coefficient + initial
    for update in updates:
        norm = math.sqrt(max(norm**2 + update * largest_change, 0.0))
        norm *= factor(norm, initial, coefficient)
        assert norm <= bound * (1 + 1e-9)


def test_the_bound_is_about_tight():
    norm = 1.0
    for _ in range(5_000):
        norm = math.sqrt(norm**2 + 4.0)
        norm *= factor(norm, 1.0, 0.01)
    # far below sqrt(B) / lambda + n = 201, for the change of the norm itself shrinks as the norm grows
    assert 10 < norm < 201


@given(numbers, numbers, st.floats(0, 1), st.lists(st.tuples(numbers, numbers), min_size=1, max_size=50))
def test_applying_it_never_takes_two_layers_further_out_of_balance(first, second, coefficient, updates):
    start = first / second
    for one, other in updates:
        before = abs(one / other - start)
        one *= factor(one, first, coefficient)
        other *= factor(other, second, coefficient)
        assert abs(one / other - start) <= before + 1e-9 * (start + before)


@given(numbers, numbers, st.floats(0, 1))
def test_the_factor_is_that_of_the_paper(norm, initial, coefficient):
    expected = (coefficient * initial + (1 - coefficient) * norm) / norm
    assert factor(norm, initial, coefficient) == pytest.approx(expected, rel=1e-12)


@given(numbers, st.floats(0, 1))
def test_exactly_1_where_nothing_is_to_be_done(norm, coefficient):
    assert factor(norm, norm, coefficient) == 1.0
    assert factor(norm, 1.0, 0.0) == 1.0
    assert factor(0.0, norm, coefficient) == 1.0


def test_a_factor_of_0_leaves_the_others_finite():
    logs = log_rescaling_factors(torch.ones(2), torch.zeros(2), torch.tensor([1.0, 0.5]))
    assert logs.isfinite().all()
    assert logs.exp().tolist() == pytest.approx([torch.finfo(torch.float32).eps, 0.5])


def test_joint_norms_are_those_of_the_tensors_together():
    tensors = [torch.randn(3), torch.randn(4), torch.randn(2)]
    norms = torch.stack([tensor.norm() for tensor in tensors])
    groups = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    expected = torch.stack([torch.cat([tensors[0], tensors[2]]).norm(), tensors[1].norm()])
    torch.testing.assert_close(joint_norms(norms, groups), expected)


constraints = st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.0, 1.0]), min_size=5, max_size=5), min_size=1, max_size=4)


@given(constraints)
def test_tied_factors_meet_the_constraints_and_change_as_little_as_they_can(rows):
    matrix = torch.tensor(rows, dtype=torch.float64)
    groups, spread = tie(matrix)
    assert (groups.sum(0) == 1).all()  # every layer is in one group
    wanted = torch.randn(len(groups), dtype=torch.float64)
    given_ = spread @ wanted
    assert (matrix @ given_).abs().max() < 1e-9
    # nearest: what was taken away is a combination of the constraints, so that it stands on all that meets them
    of_groups = torch.linalg.lstsq(groups.T, given_.unsqueeze(1)).solution.squeeze(1)
    free = torch.linalg.svd(matrix @ groups.T)[2]
    free = free[torch.linalg.matrix_rank(matrix @ groups.T) :]
    assert (free @ (wanted - of_groups)).abs().max() < 1e-8 if len(free) else True


def test_equal_factors_are_one_group_also_over_several_constraints():
    groups, spread = tie(torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1], [0, 1, -1, 0]], dtype=torch.float64))
    assert groups.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert spread.tolist() == [[1.0]] * 4


@given(st.floats(0.1, 10))
def test_multiples_are_proportional_and_others_not(multiple):
    before = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert proportionality_error(before, multiple * before) < 1e-15
    across = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)  # stands on it
    assert proportionality_error(before, before + across) == pytest.approx(math.sqrt(5 / 19))
    assert proportionality_error(before, torch.zeros(3)) == 0.0
