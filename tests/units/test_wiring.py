"""Which unit feeds what, at the edges: the first and the last unit, part of a layer, and sets of which few hold."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.units import explore
from lightning_plasticity.units.channels import Site
from lightning_plasticity.units.runs import Seen
from lightning_plasticity.units.wiring import _largest_part
from units.property_check import invalid
from units.test_find import IMAGE, TOKENS, VECTOR, Function, by_name, modules, randomised


def network(forward, **sizes: int) -> nn.Module:
    """Linear layers of so many outputs by name, which take what they are given."""
    torch.manual_seed(0)
    return Function(forward, **{name: nn.LazyLinear(size) for name, size in sizes.items()})


def found_in(model: nn.Module, *inputs):
    with torch.no_grad():
        model.eval()(*inputs)  # which tells lazy layers their size
    found = explore(randomised(model), inputs, {})
    assert invalid(model, inputs, found.units) == []
    return found


@pytest.mark.parametrize("bad", [set(bad) for n in range(6) for bad in itertools.combinations(range(5), n)])
@pytest.mark.parametrize("known_to_fail", [False, True])
def test_the_largest_part_is_all_that_hold(bad: set[int], known_to_fail: bool) -> None:
    asked = []

    def holds(part) -> bool:
        asked.append(tuple(part))
        return not bad & set(part)

    if known_to_fail and not bad:
        return
    assert _largest_part(range(5), holds, known_to_fail) == [i for i in range(5) if i not in bad]
    assert len(set(asked)) == len(asked)
    assert ((0, 1, 2, 3, 4) in asked) is not known_to_fail
    assert () not in asked
    if bad == {4}:
        assert asked[-3:] == [(0, 1), (2,), (3,)]  # that the last fails is known from the others


def test_codes_are_kept_for_each_site_however_many_channels_they_have() -> None:
    sizes = {Site("column", str(i)): size for i, size in enumerate([3, 40_000, 30_000, 70_000, 1])}
    seen, expected = Seen(), {site: torch.zeros(size, dtype=torch.int64) for site, size in sizes.items()}
    generator = torch.Generator().manual_seed(0)
    for bit in (0, 1, 5, 40):
        for site, size in sizes.items():
            for _ in range(2):  # in two calls of a layer
                nans = torch.rand(size, generator=generator) < 0.3
                seen.add(site, nans, bit)
                expected[site] |= nans.long() * 2**bit
    assert list(seen) == list(sizes)
    assert all(torch.equal(seen[site], expected[site]) for site in sizes)


@pytest.mark.parametrize("reaches", [[0], [7], [1, 2, 3, 4, 5, 6, 7], [0, 2], [0, 1, 2, 3]])
def test_some_units_of_the_first_layer_reach_the_output(reaches: list[int]) -> None:
    others = [unit for unit in range(8) if unit not in reaches]
    found = found_in(
        network(lambda s, x: (h := s.a(x)) is h and torch.cat([s.b(h[:, others].relu()), h[:, reaches]], 1), a=8, b=2),
        *VECTOR,
    )
    (units,) = found.units
    assert units.producers[0].entry.tolist() == others
    assert units.consumers[0].unit.tolist() == list(range(len(others)))


@pytest.mark.parametrize("unit", range(4))
def test_one_unit_that_is_heard_elsewhere_is_found_out(unit: int) -> None:
    def forward(s, x):
        hidden = s.first(x).relu()
        return s.second(hidden) + s.third(hidden[:, unit : unit + 1].nansum(-1, keepdim=True))

    assert found_in(network(forward, first=8, second=2, third=2), *VECTOR).units == []


def test_units_that_reach_one_of_several_outputs_are_none() -> None:
    found = found_in(network(lambda s, x: (s.b(s.a(x).relu()), {"hidden": s.a(x)}), a=8, b=2), *VECTOR)
    assert found.units == []
    assert found.left_out["a"] == "its units reach the network's output"


def test_the_layer_that_is_called_last_may_feed_one_that_was_called_before() -> None:
    (units,) = found_in(network(lambda s, x: s.first(x) + s.first(s.last(x).relu()), first=6, last=6), *VECTOR).units
    assert (units.name, units.size, modules(units.consumers)) == ("last", 6, ["first"])
    assert units.consumers[0].unit.tolist() == list(range(6))


# ---- gates of a part


def test_half_of_a_layer_is_gated_and_the_units_of_that_half_are_a_set() -> None:
    def forward(s, x):
        value, gate = s.value(x), s.gate(x)
        return s.out(torch.cat([value[:, :4] * gate, value[:, 4:]], 1))

    found = by_name(found_in(network(forward, value=8, gate=4, out=2), *VECTOR).units)
    assert {name: modules(units.producers) for name, units in found.items()} == {
        "value:0": ["value", "gate"],
        "value:1": ["value"],
    }
    assert [units.producers[0].entry.tolist() for units in found.values()] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_gate_that_is_partly_of_two_layers_gates_with_the_rest() -> None:
    def forward(s, x):
        gate = torch.cat([s.left(x) + s.right(x), s.own(x)], 1)
        return s.out(s.value(x) * gate)

    found = found_in(network(forward, value=8, left=4, right=4, own=4, out=2), *VECTOR)
    units = by_name(found.units)
    assert {name: modules(part.producers) for name, part in units.items()} == {
        "value:0": ["value"],
        "value:1": ["value", "own"],
    }
    assert units["value:1"].producers[1].entry.tolist() == [0, 1, 2, 3]
    assert found.left_out["left"] == found.left_out["right"] == "its units reach a product with other units"


def test_a_gate_of_two_values_gates_no_more_than_one() -> None:
    def forward(s, x):
        gate = s.gate(x)
        return s.out(torch.cat([s.left(x) * gate, s.right(x) * gate], 1))

    found = found_in(network(forward, gate=8, left=8, right=8, out=2), *VECTOR)
    assert [modules(units.producers) for units in found.units] == [["right"]]
    assert found.left_out["gate"] == "its units reach a product with other units"


@pytest.mark.parametrize(
    "product",
    [
        lambda v, g: (v * g) * g,
        lambda v, g: v * (g * g),
        lambda v, g: v * g + v,
    ],
)
def test_a_gate_may_gate_its_unit_again(product) -> None:
    model = network(lambda s, x: s.out(product(s.value(x), s.gate(x))), value=8, gate=8, out=2)
    (units,) = found_in(model, *VECTOR).units
    assert modules(units.producers) == ["value", "gate"]


def test_products_with_what_is_no_units_leave_units_alone() -> None:
    large = torch.ones(3, 1, 8)
    model = network(lambda s, x: s.out((large * s.first(x) * 2.0 * large[0]).mean(0) * x.sum()), first=8, out=2)
    (units,) = found_in(model, *VECTOR).units
    assert (units.name, units.size) == ("first", 8)


def test_products_in_examples_without_a_batch() -> None:
    (units,) = found_in(network(lambda s, x: s.out(s.value(x) * s.gate(x)), value=8, gate=8, out=2), VECTOR[0][0]).units
    assert modules(units.producers) == ["value", "gate"]


# ---- norms


def test_the_statistics_of_a_norm_without_weights_are_entries_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    (units,) = explore(randomised(model), IMAGE, {}).units
    assert [(slots.module, slots.entry.tolist(), slots.unit.tolist()) for slots in units.norms] == [
        ("1", [0, 1, 2, 3], [0, 1, 2, 3])
    ]


@pytest.mark.parametrize(("shape", "entries"), [([8], 8), ([5, 8], 40), ([1, 5, 8], 40)])
def test_a_layer_norm_has_an_entry_for_each_place_of_its_shape(shape: list[int], entries: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(shape), nn.ReLU(), nn.Linear(8, 2))
    x = TOKENS[0].expand(2, *TOKENS[0].shape) if len(shape) == 3 else TOKENS[0]
    (units,) = found_in(model, x).units
    (norm,) = units.norms
    assert norm.entry.tolist() == list(range(entries))
    assert norm.unit.tolist() == [entry % 8 for entry in range(entries)]
    assert not units.exact


def test_a_norm_that_is_called_by_name_is_passed() -> None:
    model = Function(
        lambda s, x: s.b(F.relu(s.norm(input=s.a(x)))), a=nn.Linear(6, 8), norm=nn.BatchNorm1d(8), b=nn.Linear(8, 2)
    )
    (units,) = found_in(model, *VECTOR).units
    assert (units.name, units.exact, modules(units.consumers)) == ("a", True, ["b"])


class ScalingNorm(nn.Module):
    """Scales each unit by itself, and gives that in a form of its own."""

    def __init__(self, form) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.form = form

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x):
        return self.form(x * self.weight)


@pytest.mark.parametrize("form", [lambda x: (x, x.new_ones(())), lambda x: x.unsqueeze(1), lambda x: x[:1, :5]])
def test_a_norm_that_gives_another_form_than_it_takes_is_passed(form) -> None:
    def forward(s, x):
        y = s.norm(s.a(x))
        return s.b((y[0] if isinstance(y, tuple) else y).flatten(1).relu())

    model = Function(forward, a=nn.Linear(6, 8), norm=ScalingNorm(form), b=nn.LazyLinear(2))
    (units,) = found_in(model, torch.cat([*VECTOR, *VECTOR])).units
    assert (units.name, units.exact, modules(units.norms)) == ("a", True, ["norm"])
    assert units.norms[0].unit.tolist() == units.consumers[0].unit.tolist()


# ---- which path, and what refuses


def test_training_that_calls_no_more_layers_is_not_looked_at() -> None:
    def forward(s, x):
        hidden = s.a(x).relu()
        return s.b(hidden + hidden.flip(-1) if s.training else hidden)

    model = Function(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 2), never=nn.Linear(2, 2))
    found = explore(randomised(model), VECTOR, {})
    assert [units.name for units in found.units] == ["a"]
    assert found.left_out["never"] == "it is not called in a forward pass"


def test_layers_behind_one_that_cannot_be_used_are_told_as_well() -> None:
    model = Function(
        lambda s, x: s.c(s.b(s.normed(x).relu()).relu()), normed=nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        b=nn.Linear(8, 8), c=nn.Linear(8, 2), never=nn.Linear(2, 2),
    )  # fmt: skip
    found = explore(randomised(model), VECTOR, {})
    assert [units.name for units in found.units] == ["b"]
    assert found.left_out["never"] == "it is not called in a forward pass"


def test_each_layer_that_is_refused_has_its_own_reason() -> None:
    def forward(s, x):
        first, second = s.first(x), s.second(x)
        for name, hidden in (("first", first), ("second", second)):
            if not float(hidden.detach().numpy().sum()) < 1e6:
                raise ValueError(f"{name} is no number")
        return s.out(s.third(x).relu()) + s.out(first) + s.out(second)

    found = found_in(network(forward, first=8, second=8, third=8, out=2), *VECTOR)
    assert [units.name for units in found.units] == ["third"]
    for name in ("first", "second"):
        stops = "the network stops when its units are NaN"
        assert found.left_out[name] == f"{stops} (ValueError: {name} is no number)"


@pytest.mark.parametrize("dim", [1, 2])
def test_layers_that_are_called_by_name(dim: int) -> None:
    model = Function(
        lambda s, x: s.b(input=s.a(input=x).softmax(dim)), a=nn.Linear(8, 6), b=nn.Linear(6, 2)
    )  # fmt: skip
    assert [units.name for units in found_in(model, *TOKENS).units] == (["a"] if dim == 1 else [])
