"""Averages of units and of columns, of some sets and of all, and over ranks."""

import pytest
import torch

from engine.test_population import Network, some_sets
from lightning_plasticity import ContinualBackprop
from lightning_plasticity.engine import unit_callback


def filled() -> ContinualBackprop:
    """A method whose averages are anything."""
    torch.manual_seed(0)
    method = ContinualBackprop().attach(Network().double(), example_inputs=(torch.zeros(1, 1, 4, 4).double(),))
    for average in method._averages.values():
        average.normal_()
    return method


@some_sets
def test_averages_of_some_sets_move_and_those_of_others_stay(sets: list[int]) -> None:
    method = filled()
    places = dict(zip(("utility", "activation"), method._population.places(sets), strict=True))
    before = {name: average.clone() for name, average in method._averages.items()}
    values = {name: torch.randn_like(before[name][place]) for name, place in places.items()}
    method._average_in(sets, values, 0.25)
    for name, place in places.items():
        expected = before[name].clone()
        expected[place] = 0.75 * before[name][place] + 0.25 * values[name]
        torch.testing.assert_close(method._averages[name], expected, rtol=1e-12, atol=1e-15)


@some_sets
def test_means_over_ranks_are_of_the_sets_that_are_asked_of(sets: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    method = filled()
    own = [method._averages["utility"].clone(), method._averages["activation"].clone()]
    assert all(map(torch.equal, method._means_over_ranks(sets), own))
    monkeypatch.setattr(unit_callback, "world_size", lambda: 4)
    monkeypatch.setattr(unit_callback, "sum_over_ranks", lambda tensors: [8 * tensor for tensor in tensors])
    means = method._means_over_ranks(sets)
    for mean, of_rank, place in zip(means, own, method._population.places(sets), strict=True):
        expected = of_rank.clone()
        expected[place] *= 2
        assert torch.equal(mean, expected)
    assert torch.equal(method._averages["utility"], own[0])


@pytest.mark.parametrize(("ranks", "kept"), [(1, 1), (8, 8), (9, 1)])
def test_a_checkpoint_has_what_each_of_few_ranks_has_and_the_mean_of_more(
    ranks: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = filled()
    own = method._averages["utility"].clone()
    monkeypatch.setattr(unit_callback, "world_size", lambda: ranks)
    monkeypatch.setattr(unit_callback, "gather_over_ranks", lambda tensors: [torch.stack([t] * ranks) for t in tensors])
    monkeypatch.setattr(unit_callback, "sum_over_ranks", lambda tensors: [3 * ranks * t for t in tensors])
    sets = method._state()["sets"]
    utility = torch.cat([state["averages"]["utility"] for state in sets.values()], 1)
    assert utility.shape == (kept, len(own))
    torch.testing.assert_close(utility[-1], own if ranks < 9 else 3 * own, rtol=1e-12, atol=1e-15)
    assert utility.dtype == own.dtype
    assert {state["heard"]["rows"].dtype for state in sets.values()} == {torch.int64}
