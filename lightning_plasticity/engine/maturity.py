"""Ages of units: how many are old enough is known without asking the device, and growing older costs nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity import checks


def whole_and_rest(count: float) -> tuple[int, float]:
    """Splits a fractional count into what is due now and what stays for later."""
    due = math.floor(count)
    return due, count - due


class Maturity:
    """How many units of each set are older than a threshold, and how many replacements are due.

    How many are old enough depends on how many were replaced and when, not on which ones: so it is counted here,
    without reading anything from the device.

    Args:
        sizes: the number of units of each set.
        threshold: a unit is eligible when its age in steps exceeds it.

    Example:
        >>> maturity = Maturity([10], threshold=1)
        >>> maturity.advance([0]), maturity.advance([0])
        ([0], [10])
        >>> maturity.replaced(0, 3), maturity.eligible(0)
        (None, 7)
    """

    def __init__(self, sizes: Sequence[int], threshold: int) -> None:
        self._sizes = list(sizes)
        self._threshold = threshold
        self.steps = [0] * len(sizes)
        self._mature = list(sizes)  # without the young
        self._young: list[deque[tuple[int, int]]] = [deque() for _ in sizes]  # step of replacement, number of units

    def add(self, sizes: Sequence[int]) -> None:
        """More sets, whose units are all of age 0."""
        self._sizes += sizes
        self.steps += [0] * len(sizes)
        self._mature += sizes
        self._young += [deque() for _ in sizes]

    def advance(self, sets: Sequence[int]) -> list[int]:
        """All units of some sets grow one step older; how many of each are eligible now."""
        for i in sets:
            self.steps[i] += 1
        return [self.eligible(i) for i in sets]

    def eligible(self, index: int) -> int:
        """How many units of a set are older than the threshold."""
        now, young = self.steps[index], self._young[index]
        if now <= self._threshold:
            return 0
        while young and now - young[0][0] > self._threshold:
            self._mature[index] += young.popleft()[1]
        return self._mature[index]

    def replaced(self, index: int, count: int) -> None:
        """Some units of a set, all eligible, are new."""
        if count:
            self._young[index].append((self.steps[index], count))
            self._mature[index] -= count

    def state_of(self, index: int) -> dict[str, Any]:
        """Of a set, for the checkpoint."""
        return {"steps": self.steps[index], "young": [list(young) for young in self._young[index]]}

    def restore(self, index: int, state: dict[str, Any]) -> None:
        """A set, from the checkpoint."""
        steps = checks.count("the number of steps", state["steps"])
        young = deque((checks.count("a step", at), checks.count("a count", count)) for at, count in state["young"])
        mature = self._sizes[index] - sum(count for _, count in young)
        checks.count("the number of mature units", mature)
        self.steps[index], self._young[index], self._mature[index] = steps, young, mature


class Ages:
    """The age of each unit, as the step at which it was new.

    Args:
        maturity: counts the steps of each set.
    """

    def __init__(self, maturity: Maturity) -> None:
        self._maturity = maturity
        self._spans: list[slice] = []
        self._new_at = torch.zeros(0, dtype=torch.int64)

    def add(self, spans: Sequence[slice], device: torch.device) -> None:
        """More sets: their places in the flat array over units, after those of the others, and their device."""
        self._spans += spans
        more = torch.zeros(spans[-1].stop - spans[0].start, dtype=torch.int64, device=device)
        self._new_at = torch.cat([self._new_at.to(device), more])

    def now(self) -> Tensor:
        """The ages of all units."""
        steps = self._maturity.steps
        if steps and steps.count(steps[0]) == len(steps):  # the usual case
            return steps[0] - self._new_at
        return torch.cat([self.of(i) for i in range(len(self._spans))])

    def of(self, index: int) -> Tensor:
        """The ages of the units of a set."""
        return self._maturity.steps[index] - self._new_at[self._spans[index]]

    def reset(self, index: int, units: Tensor) -> None:
        """Some units of a set are new."""
        self._new_at[self._spans[index]].index_fill_(0, units, self._maturity.steps[index])

    def restore(self, index: int, ages: Tensor) -> None:
        """The ages of a set, from the checkpoint, after its steps were."""
        self._new_at[self._spans[index]] = self._maturity.steps[index] - ages.to(self._new_at)
