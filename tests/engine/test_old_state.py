"""State of version 0.1.0: flat arrays over units and over columns, taken apart by set."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_plasticity import ContinualBackprop
from lightning_plasticity.engine.old_state import by_name
from lightning_plasticity.engine.unit_sets import UnitSet


class Network(nn.Module):
    """Units of two sets: three with two columns each, and four that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flat = nn.Conv2d(1, 3, 2), nn.Linear(6, 4)
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.flat(self.conv(x).relu().flatten(1)).relu()
        return self.left(hidden) + self.right(hidden)


@pytest.fixture
def sets() -> list[UnitSet]:
    return ContinualBackprop().attach(Network(), example_inputs=(torch.zeros(1, 1, 2, 3),))._population.sets


def of_ranks(size: int) -> torch.Tensor:
    """Of two ranks."""
    return torch.arange(2 * size).view(2, size)


UNITS, COLUMNS, READERS = 3 + 4, 3 * 2 + 4 + 4, 3


def old(**more: Any) -> dict[str, Any]:
    heard = {"sums": of_ranks(2 * COLUMNS).view(2, 2, COLUMNS), "rows": of_ranks(READERS)}
    return {"heard": heard, "utility": of_ranks(UNITS), "activation": of_ranks(COLUMNS), **more}


def test_arrays_are_cut_where_sets_meet(sets: list[UnitSet]) -> None:
    maturity = {"steps": [5, 6], "young": [[[1, 2]], [[3, 4]]]}
    state = by_name(old(maturity=maturity, age=torch.arange(UNITS), earned=[0.25, 0.5], replaced=9, other=0), sets)
    assert state.keys() == {"sets", "replaced"}
    assert state["replaced"] == 9
    conv, flat = state["sets"]["conv"], state["sets"]["flat"]
    assert conv["averages"]["utility"].tolist() == [[0, 1, 2], [7, 8, 9]]
    assert flat["averages"]["utility"].tolist() == [[3, 4, 5, 6], [10, 11, 12, 13]]
    assert conv["averages"]["activation"].tolist() == [[*range(6)], [*range(14, 20)]]
    assert flat["averages"]["activation"].tolist() == [[*range(6, 14)], [*range(20, 28)]]
    assert (conv["age"].tolist(), flat["age"].tolist()) == ([0, 1, 2], [3, 4, 5, 6])
    assert conv["maturity"] == {"steps": 5, "young": [[1, 2]]}
    assert flat["maturity"] == {"steps": 6, "young": [[3, 4]]}
    assert conv["heard"]["sums"].tolist() == [
        [[*range(n, n + 6)] for n in (0, 14)],
        [[*range(n, n + 6)] for n in (28, 42)],
    ]
    assert flat["heard"]["sums"][1, 1].tolist() == [*range(48, 56)]
    assert conv["heard"]["rows"].tolist() == [[0], [3]]
    assert flat["heard"]["rows"].tolist() == [[1, 2], [4, 5]]
    assert (conv["earned"], flat["earned"]) == (0.25, 0.5)


def test_what_units_of_low_and_of_high_activation_have_earned_is_told_by_set(sets: list[UnitSet]) -> None:
    state = by_name(old(steps=[5, 6], earned=[[0.1, 0.2], [0.3, 0.4]]), sets)
    assert [state["sets"][name]["earned"] for name in ("conv", "flat")] == [[0.1, 0.3], [0.2, 0.4]]


def test_a_single_set_has_earned_what_is_said_of_it(sets: list[UnitSet]) -> None:
    heard = {"sums": torch.zeros(2, 2, 6), "rows": of_ranks(1)}
    for earned, expected in (([0.25], 0.25), ([[0.25], [0.5]], [0.25, 0.5]), ([], 0.0)):
        state = by_name({"heard": heard, "steps": [5], "earned": earned}, sets[:1])
        assert state["sets"]["conv"]["earned"] == expected


def test_units_without_ages_are_as_old_as_their_set(sets: list[UnitSet]) -> None:
    state = by_name(old(steps=[5, 6]), sets)
    assert [state["sets"][name]["age"].tolist() for name in ("conv", "flat")] == [[5] * 3, [6] * 4]
    assert [state["sets"][name]["maturity"] for name in ("conv", "flat")] == [
        {"steps": 5, "young": []},
        {"steps": 6, "young": []},
    ]
    assert [state["sets"][name]["earned"] for name in ("conv", "flat")] == [0.0, 0.0]


def test_todays_state_stays_as_it_is_and_that_of_other_units_is_refused(sets: list[UnitSet]) -> None:
    today: dict[str, Any] = {"sets": {}}
    assert by_name(today, sets) is today
    with pytest.raises(ValueError, match="its units have 14 columns, and those found now have 6"):
        by_name(old(steps=[5, 6]), sets[:1])
