"""Ages of units and how many are old enough, against a list of ages."""

import random

import pytest
import torch

from lightning_plasticity.engine.maturity import Ages, Maturity

SIZES = [4, 7, 1]


class Counted:
    """Three sets, of which the last two come later, and beside them the plain ages."""

    def __init__(self, threshold: int) -> None:
        self.threshold, self.plain = threshold, [[0] * size for size in SIZES[:1]]
        self.maturity = Maturity([], threshold)
        self.ages = Ages(self.maturity)
        self.maturity.add(SIZES[:1])
        self.ages.add([slice(0, 4)], torch.device("cpu"))

    def add(self) -> None:
        self.maturity.add(SIZES[1:])
        self.ages.add([slice(4, 11), slice(11, 12)], torch.device("cpu"))
        self.plain += [[0] * size for size in SIZES[1:]]

    def old_enough(self, index: int) -> list[int]:
        return [unit for unit, age in enumerate(self.plain[index]) if age > self.threshold]

    def step(self, sets: list[int], replaced: dict[int, list[int]]) -> None:
        for index in sets:
            self.plain[index] = [age + 1 for age in self.plain[index]]
        assert self.maturity.advance(sets) == [len(self.old_enough(index)) for index in sets]
        for index, units in replaced.items():
            chosen = [unit for unit in units if unit in self.old_enough(index)]
            self.maturity.replaced(index, len(chosen))
            self.ages.reset(index, torch.tensor(chosen, dtype=torch.int64))
            for unit in chosen:
                self.plain[index][unit] = 0
        self.check()

    def check(self) -> None:
        for index, ages in enumerate(self.plain):
            assert self.maturity.eligible(index) == len(self.old_enough(index))
            assert self.ages.of(index).tolist() == ages
        assert self.ages.now().tolist() == [age for ages in self.plain for age in ages]


@pytest.mark.parametrize("threshold", [0, 1, 3])
@pytest.mark.parametrize("all_step", [True, False])
def test_ages_and_how_many_are_old_enough(threshold: int, all_step: bool) -> None:
    draw, counted = random.Random(0), Counted(threshold)
    for step in range(40):
        if step == 2:
            counted.add()
        sets = [i for i in range(len(counted.plain)) if all_step or draw.random() < 0.6]
        counted.step(sets, {i: draw.sample(range(SIZES[i]), draw.randint(0, SIZES[i])) for i in sets})
        if step % 7 == 5:
            twin = Counted(threshold)
            twin.add()
            for i in range(3):
                twin.maturity.restore(i, counted.maturity.state_of(i))
                twin.ages.restore(i, counted.ages.of(i))
            twin.plain = counted.plain
            twin.check()
            counted = twin


def test_what_cannot_have_been_is_refused() -> None:
    maturity = Maturity([3], 1)
    for state in ({"steps": -1, "young": []}, {"steps": 5, "young": [[1, 4]]}, {"steps": 5, "young": [[1, -1]]}):
        with pytest.raises(ValueError, match="must be a whole number, at least 0"):
            maturity.restore(0, state)
        assert maturity.state_of(0) == {"steps": 0, "young": []}
    maturity.restore(0, {"steps": 5, "young": [[4, 2], [5, 1]]})
    assert maturity.eligible(0) == 0
