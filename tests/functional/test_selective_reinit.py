"""Choices and new values against slow references in plain Python."""

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_plasticity.functional import selection
from lightning_plasticity.functional.selection import below, smallest
from lightning_plasticity.functional.selective_reinit import (
    Case,
    count_due,
    gradient_utilities,
    new_values,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def smallest_slowly(values: Tensor, count: int) -> list[bool]:
    magnitudes = [math.inf if math.isnan(v) else abs(v) for v in values.flatten().tolist()]
    order = sorted(range(len(magnitudes)), key=lambda i: (magnitudes[i], math.isnan(values.flatten()[i]), i))
    return [i in order[:count] for i in range(len(magnitudes))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [3, 2**18])
@given(data=st.data())
def test_smallest(dtype: torch.dtype, piece: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    # Few different values, so that ties are common and lie across the pieces.
    numbers = st.sampled_from([0.0, -0.0, 1e-40, 0.1, -0.1, 0.10001, 1.0, -2.0, math.inf, -math.inf, math.nan])
    values = torch.tensor(data.draw(st.lists(numbers, min_size=4 * rows, max_size=4 * rows)), dtype=dtype)
    values = values.view(rows, 4) if data.draw(st.booleans()) else values.view(4, rows).t()
    count = data.draw(st.integers(0, values.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(selection._PIECE, "cpu", piece)
        mask = smallest(values, count)
    assert mask.shape == values.shape
    assert mask.flatten().tolist() == smallest_slowly(values, count)
    assert mask.sum() == count


@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_of_many(dtype: torch.dtype) -> None:
    values = torch.randn(600_001, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for count in (1, 60_000, 600_000):
        first = torch.sort(values.abs(), stable=True).indices[:count]
        assert torch.equal(smallest(values, count).nonzero().flatten(), first.sort().values)


@given(size=st.integers(1, 10**7), percent=st.integers(0, 10_000))
@example(size=100, percent=2900)  # 0.29 * 100 == 28.999999999999996
def test_count_due(size: int, percent: int) -> None:
    whole, remainder = count_due(percent / 10_000, size)
    exact = Decimal(percent) / 10_000 * size
    assert whole == math.floor(exact)
    assert remainder == pytest.approx(float(exact - math.floor(exact)), abs=1e-8)


@given(fraction=st.floats(0, 1), size=st.integers(1, 10**7))
def test_count_due_of_any_fraction(fraction: float, size: int) -> None:
    whole, remainder = count_due(fraction, size)
    assert 0 <= whole <= size
    assert 0 <= remainder < 1
    assert whole + remainder == pytest.approx(fraction * size, rel=1e-13)


def test_gradient_utilities() -> None:
    weights = [torch.tensor([[1.0, -2.0]]), torch.tensor([3.0])]
    gradients = [torch.tensor([[-0.5, -0.5]]), torch.tensor([0.0])]
    assert [u.tolist() for u in gradient_utilities(weights, gradients)] == [[[0.5, 1.0]], [0.0]]
    assert weights[0].tolist() == [[1.0, -2.0]]


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30),
    st.floats(0, 3, width=32),
    st.booleans(),
)
def test_below(numbers: list[float], threshold: float, relative: bool) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    bound = threshold * math.fsum(map(abs, numbers)) / len(numbers) if relative else threshold
    chosen = below(values, threshold, relative=relative).tolist()
    for number, is_chosen in zip(numbers, chosen, strict=True):
        if not math.isclose(abs(number), bound, rel_tol=1e-12):
            assert is_chosen == (abs(number) < bound)
    assert below(torch.tensor([0.5]), 0.5).tolist() == [False]
    assert below(torch.tensor([0.5, 0.5]), 1.0, relative=True).tolist() == [True, True]
    assert below(torch.zeros(2), 0.1, relative=True).tolist() == [True, True]
    for broken in (math.inf, math.nan):
        assert below(torch.tensor([0.1, broken]), 0.5, relative=True).tolist() == [False, False]


def test_new_values() -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) + 0.5
    mask = smallest(weight, 123)
    noise = torch.randn(123, generator=torch.Generator().manual_seed(7))
    numbers = weight.flatten().tolist()
    remaining = [abs(n) for n, chosen in zip(numbers, mask.flatten().tolist(), strict=True) if not chosen]
    mean = math.fsum(numbers) / 600
    noisy = mean + noise * (math.fsum(remaining) / 477 / 10)

    def values(*settings) -> Tensor:
        return new_values(weight, mask, *settings[:1], torch.Generator().manual_seed(7), *settings[1:])

    assert values("mean").shape == ()
    torch.testing.assert_close(values("mean"), torch.tensor(mean))
    torch.testing.assert_close(values("mean_noise"), noisy)
    torch.testing.assert_close(values("normal"), noise)
    torch.testing.assert_close(values("normal", 0.2), noise * 0.2)
    torch.testing.assert_close(values("normal", 0.0), torch.zeros(123))


def test_noise_where_no_weight_remains() -> None:
    weight = torch.tensor([1.0, 3.0])
    new = new_values(weight, torch.ones(2, dtype=torch.bool), "mean_noise", torch.Generator())
    assert new.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    weight = torch.full((70_000,), 2.0).to(dtype)
    none = torch.zeros(70_000, dtype=torch.bool)
    assert new_values(weight, none, "mean", torch.Generator()).tolist() == 2.0
    one = torch.arange(70_000) == 0
    noise = torch.randn(1, generator=torch.Generator().manual_seed(3))
    new = new_values(weight, one, "mean_noise", torch.Generator().manual_seed(3))
    torch.testing.assert_close(new, 2.0 + noise * 0.2)


def test_new_values_refuse_what_needs_the_initial_distribution() -> None:
    with pytest.raises(ValueError, match="reinit must be 'mean', 'mean_noise' or 'normal' here, got 'init'"):
        new_values(torch.ones(2), torch.ones(2, dtype=torch.bool), "init", torch.Generator())


def test_cases() -> None:
    assert Case.parse("10M") == Case(0.1, "mean")
    assert Case.parse("5MN") == Case(0.05, "mean_noise")
    assert Case.parse("25NS") == Case(0.25, "normal", 0.2)
    assert Case.parse("10N") == Case(0.1, "normal", 1.0)
    assert Case.parse("2.5M") == Case(0.025, "mean")


@pytest.mark.parametrize("text", ["", "M", "10", "10X", "10m", "-5M", "101M", "10 M", "1.M", "10MNS"])
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(ValueError, match=f"one of the codes M, MN, NS and N, .* but case is '{text}'"):
        Case.parse(text)
