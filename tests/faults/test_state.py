"""Foreign and damaged state: refused with a clear error that leaves everything as it was, or harmless."""

import copy
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract.cases import CASES, Case
from contract.training import Batches, Network, adam, assert_same, seeded, weights
from torch import Tensor
from torch.nn.functional import cross_entropy

every_method = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
pytestmark = pytest.mark.filterwarnings("ignore:.* leaves .* alone where .* not finite:UserWarning")


def run(case: Case, steps: int = 7) -> tuple[Any, Any, Any]:
    model, method = seeded(Network), case.make()
    optimizer = adam(model.parameters())
    method.attach(model, optimizer, (torch.zeros(2, 6),))
    go_on(model, optimizer, method, steps)
    return model, optimizer, method


def go_on(model: Any, optimizer: Any, method: Any, steps: int) -> None:
    for x, y in [*Batches()][:steps]:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        method.step()


def leaves(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a nested state, those that hold others among them."""
    yield path
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    for key, part in parts:
        yield from leaves(part, (*path, key))


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def changed(state: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy with another value at one place."""
    if not path:
        return change(state)
    result = copy.deepcopy(state)
    owner = at(result, path[:-1])
    if isinstance(owner, tuple):
        return changed(
            state, path[:-1], lambda old: tuple(change(x) if i == path[-1] else x for i, x in enumerate(old))
        )
    owner[path[-1]] = change(owner[path[-1]])
    return result


def without(state: Any, path: tuple[Any, ...]) -> Any:
    result = copy.deepcopy(state)
    del at(result, path[:-1])[path[-1]]
    return result


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "None": lambda value: None,
    "a word": lambda value: "x",
    "an object": lambda value: object(),
    "an empty dict": lambda value: {},
    "an empty list": lambda value: [],
    "NaN": lambda value: torch.full_like(value, torch.nan) if is_floating(value) else float("nan"),
    "infinity": lambda value: torch.full_like(value, torch.inf) if is_floating(value) else float("inf"),
    "one entry": lambda value: value.flatten()[:1] if isinstance(value, Tensor) else [value],
    "one more row": lambda value: (
        torch.cat([value, value[:1]]) if isinstance(value, Tensor) and value.ndim else (value,)
    ),
    "one more dimension": lambda value: value.unsqueeze(0) if isinstance(value, Tensor) else {"x": value},
    "a fraction": lambda value: value + 0.5 if type(value) is int else 1.5,
    "less than nothing": lambda value: -3,
}


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def mutants(state: Any) -> Iterator[tuple[str, Any]]:
    for path in leaves(state):
        for name, mutation in MUTATIONS.items():
            yield f"{path} is {name}", changed(state, path, mutation)
        if path and not isinstance(at(state, path[:-1]), tuple):
            yield f"{path} is missing", without(state, path)


def judged(case: Case) -> tuple[int, int]:
    """How many mutations are refused and how many are harmless; raises for one that is neither."""
    model, optimizer, method = run(case)
    good, before = method.state_dict(), weights(model)
    refused = harmless = 0
    for what, state in mutants(good):
        try:
            method.load_state_dict(state)
        except ValueError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            if "lightning_plasticity" not in last.filename:
                raise AssertionError(f"{what}: raised in {last.filename}") from error
            assert_same(method.state_dict(), good)
            refused += 1
            continue
        try:
            go_on(model, optimizer, method, 6)
        except Exception as error:
            raise AssertionError(f"{what} was taken, and the run then failed") from error
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise AssertionError(f"{what} was taken, and the weights are not finite")
        model.load_state_dict(before)
        method.load_state_dict(good)
        harmless += 1
    method.detach()
    return refused, harmless


@every_method
def test_every_field_of_state_mutated(case: Case) -> None:
    """Each mutation is refused by a clear error that changes nothing, or the run goes on finitely."""
    refused, harmless = judged(case)
    assert refused > 20, f"{refused} refused, {harmless} harmless"


class Wider(Network):
    def __init__(self) -> None:
        super().__init__()
        self.net.first = torch.nn.Linear(6, 16)
        self.net.norm = torch.nn.BatchNorm1d(16)
        self.net.second = torch.nn.Linear(16, 12)


BY_LAYER = ("ContinualBackprop", "ActivationReset", "ReDo", "L2Init")


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in BY_LAYER])
def test_another_width_is_refused_and_both_are_named(case: Case) -> None:
    state = run(case)[2].state_dict()
    model, method = seeded(Wider), case.make()
    method.attach(model, adam(model.parameters()), (torch.zeros(2, 6),))
    own = method.state_dict()
    with pytest.raises(ValueError, match=r"must fit it: .* must be of shape .*16.*, got .*12"):
        method.load_state_dict(state)
    assert_same(method.state_dict(), own)


def test_state_of_a_later_version_is_refused() -> None:
    method = run(CASES[0])[2]
    with pytest.raises(ValueError, match=r"'version' must be at most 1, got 2\. Resume with"):
        method.load_state_dict({**method.state_dict(), "version": 2})
