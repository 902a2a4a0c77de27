"""State of methods on units as version 0.1.0 saved it: flat arrays over all sets, told apart by their order alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.engine.unit_sets import UnitSet

_OF_ALL = ("initial", "replaced", "scaled")
_AVERAGES = ("utility", "activation")


def by_name(state: dict[str, Any], sets: Sequence[UnitSet]) -> dict[str, Any]:
    """The same state in today's form, by the names of sets. State in that form already stays as it is."""
    if "sets" in state:
        return state
    size, columns = sets[-1].span.stop, sets[-1].columns.stop
    if state["heard"]["sums"].shape[-1] != columns:
        raise ValueError(
            "The checkpoint must be of a network with the same hidden units, but its units have "
            f"{state['heard']['sums'].shape[-1]} columns, and those found now have {columns}. Resume with the run's "
            "model and settings."
        )
    steps = state["steps"] if "steps" in state else state["maturity"]["steps"]
    young = state["maturity"]["young"] if "maturity" in state else [[] for _ in sets]
    age = state.get("age")
    if age is None:
        age = torch.cat([torch.full((s.units.size,), done) for s, done in zip(sets, steps, strict=True)])
    parts = {}
    for i, unit_set in enumerate(sets):
        first, last = unit_set.readers[0].number, unit_set.readers[-1].number

        def cut(values: Tensor, unit_set: UnitSet = unit_set) -> Tensor:
            return values[:, unit_set.span if values.shape[1] == size else unit_set.columns]

        parts[unit_set.name] = {
            "averages": {name: cut(state[name]) for name in _AVERAGES if name in state},
            "age": age[unit_set.span],
            "maturity": {"steps": steps[i], "young": young[i]},
            "heard": {
                "sums": state["heard"]["sums"][:, :, unit_set.columns],
                "rows": state["heard"]["rows"][:, first : last + 1],
            },
            "earned": _earned(state, i),
        }
    return {"sets": parts, **{key: state[key] for key in _OF_ALL if key in state}}


def _earned(state: dict[str, Any], index: int) -> Any:
    """What a set has earned: a number, or those for low and high activations."""
    earned = state.get("earned", [])
    if earned and isinstance(earned[0], list):
        return [part[index] for part in earned]
    return earned[index] if earned else 0.0
