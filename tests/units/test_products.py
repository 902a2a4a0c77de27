"""Where units meet: products of many shapes, gates, softmaxes and scores of attention one after the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.units import explore
from units.property_check import invalid
from units.test_find import TOKENS, VECTOR, Function, by_name, modules, randomised

MEETS = "its units reach a product with other units"


def gated(product, gate_is_first: bool = False, width: int = 8) -> nn.Module:
    """``last`` reads a product of the units of two layers, of which either may be the first that is called."""

    def forward(s, x):
        if gate_is_first:
            gate = s.gate(x)
            value = s.value(x)
        else:
            value, gate = s.value(x), s.gate(x)
        return s.last(product(value.tanh(), gate.sigmoid()))

    torch.manual_seed(0)
    return Function(forward, value=nn.Linear(6, 8), gate=nn.Linear(6, width), last=nn.LazyLinear(2))


def found_in(model: nn.Module, *inputs):
    with torch.no_grad():
        model(*inputs)  # which tells lazy layers their size
    found = explore(randomised(model), inputs, {})
    assert invalid(model, inputs, found.units) == []
    return found


PRODUCTS = {
    "*": lambda v, g: v * g,
    "the other way round": lambda v, g: g * v,
    "in place": lambda v, g: v.mul_(g),
    "*=": lambda v, g: v.__imul__(g),
    "multiply": torch.multiply,
    "mul": torch.mul,
}


@pytest.mark.parametrize("gate_is_first", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_unit_of_a_gate_belongs_to_the_unit_it_gates(name: str, gate_is_first: bool) -> None:
    (units,) = found_in(gated(PRODUCTS[name], gate_is_first), *VECTOR).units
    names = ["gate", "value"] if name == "the other way round" else ["value", "gate"]
    assert modules(units.producers) == names
    for slots in (*units.producers, *units.consumers):
        assert (slots.entry.tolist(), slots.unit.tolist()) == (list(range(8)), list(range(8)))
    assert units.activation == ("sigmoid" if name == "the other way round" else "tanh")


@pytest.mark.parametrize(
    ("product", "width", "units", "used"),
    [
        (lambda v, g: (v.unsqueeze(-1) * g.unsqueeze(-2)).flatten(-2), 5, "value", 5),
        (lambda v, g: (v.unsqueeze(-2) * g.unsqueeze(-1)).flatten(-2), 5, "value", 5),
        (lambda v, g: (v.unsqueeze(-1) * g.unsqueeze(-2)).flatten(-2), 8, "value", 8),
        (lambda v, g: (v[0] * g[0, :, None]).flatten(), 5, "value", 5),  # more dimensions than the value has
        (lambda v, g: v * g, 1, "value", 1),
        (lambda v, g: v * (g[:, :4, None] + g[:, None, 4:]).flatten(1, 2)[:, :8], 8, "value", 1),
        (lambda v, g: (v[:, None, :4] * (g[:, :4, None] + g[:, None, 4:])).flatten(1), 8, None, 0),
        (lambda v, g: (v[:, None, :, None] * (g[:, :4, None, None] + g[:, None, None, 4:])).flatten(1), 8, None, 0),
        (lambda v, g: v * g.flip(-1), 8, "both", 1),
    ],
)  # fmt: skip
def test_a_gate_belongs_to_units_only_where_each_has_its_own(product, width, units, used) -> None:
    found = found_in(gated(product, width=width), *VECTOR)
    if units == "both":
        (both,) = found.units
        assert [slots.unit.tolist() for slots in both.producers] == [list(range(8)), list(range(7, -1, -1))]
    elif units is None:
        assert found.units == []
    else:
        assert [unit_set.name for unit_set in found.units] == [units]
        assert modules(found.units[0].producers) == [units]
        assert sorted(found.units[0].consumers[0].unit.tolist()) == sorted([*range(8)] * used)
        assert found.left_out["gate"] == MEETS


@pytest.mark.parametrize(
    "glu",
    [nn.GLU(1), lambda x: F.glu(x, 1), lambda x: F.glu(x, dim=-2), lambda x: torch.ops.aten.glu(x, 1)],
)
def test_halves_of_any_dimension_gate_each_other(glu) -> None:
    model = Function(lambda s, x: s.b(glu(s.a(x))), a=nn.Conv1d(5, 8, 1), b=nn.Conv1d(4, 2, 1))
    (units,) = found_in(model, *TOKENS).units
    assert [slots.entry.tolist() for slots in units.producers] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("glu", [F.glu, torch.ops.aten.glu])
def test_halves_of_the_last_dimension_gate_each_other_if_no_other_is_named(glu) -> None:
    (units,) = found_in(Function(lambda s, x: s.b(glu(s.a(x))), a=nn.Linear(8, 8), b=nn.Linear(4, 2)), *TOKENS).units
    assert [slots.entry.tolist() for slots in units.producers] == [[0, 1, 2, 3], [4, 5, 6, 7]]


# ---- softmaxes and scores

SOFTMAXES = {
    "softmax(1)": lambda x: x.softmax(1),
    "softmax(dim)": lambda x: torch.softmax(x, dim=1),
    "functional": lambda x: F.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-2).exp(),
    "softmin": lambda x: F.softmin(x, 1),
}


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("attends", ["module", "function", "by name"])
def test_each_softmax_and_each_score_is_told_from_the_one_before(attends: str, name: str) -> None:
    """A softmax over positions mixes no units, though scores and a softmax that do mix come right behind it."""

    def forward(s, x):
        x = s.b(SOFTMAXES[name](s.a(x)))
        if attends == "module":
            x = s.attention(x, x, x)[0]
        else:
            q, k, v = s.query(x), s.key(x), s.value(x)
            x = (
                F.scaled_dot_product_attention(q, k, v)
                if attends == "function"
                else F.scaled_dot_product_attention(q, k, value=v)
            )
        x = s.d(SOFTMAXES[name](s.c(x)))
        return s.head(s.e(x).softmax(-1))

    torch.manual_seed(0)
    linears = {part: nn.Linear(8, 8) for part in ("a", "b", "query", "key", "value", "c", "d", "e")}
    model = Function(forward, **linears, attention=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 2))
    found = found_in(model, *TOKENS)
    prefix, own = ("attention.", {"attention.v_proj", "attention.out_proj"}) if attends == "module" else ("", {"value"})
    assert by_name(found.units).keys() == {"a", "b", "c", "d", *own}
    assert found.left_out["e"] == "its units reach a softmax, which mixes them"
    for layer in ("q_proj", "k_proj") if attends == "module" else ("query", "key"):
        assert found.left_out[prefix + layer] == "its units reach the scores of attention, which mix them"


# ---- activation functions

ARGUMENTS = {"prelu": (torch.tensor([0.25]),), "threshold": (0.0, 0.0), "hardtanh": (-1.0, 1.0)}
ACTIVATIONS = [
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
    *("softplus", "softsign", "tanh", "sigmoid", "hardtanh", "hardsigmoid", "tanhshrink", "hardshrink"),
    *("softshrink", "logsigmoid", "threshold"),
    *("relu_", "leaky_relu_", "rrelu_", "elu_", "selu_", "celu_", "hardtanh_", "threshold_"),
]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions_are_named(name: str) -> None:
    kind = name.rstrip("_")
    model = Function(
        lambda s, x: s.b(getattr(F, name)(s.a(x), *ARGUMENTS.get(kind, ()))), a=nn.Linear(6, 8), b=nn.Linear(8, 2)
    )
    (units,) = found_in(model, *VECTOR).units
    assert (units.name, units.activation, units.exact) == ("a", kind, True)


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (F.relu6, "relu6"),
        (nn.ReLU6(), "relu6"),
        (nn.ReLU6(inplace=True), "relu6"),
        (lambda x: F.hardtanh(x, 0.0, 6.0), "relu6"),
        (lambda x: F.hardtanh(x, min_val=0.5), "relu6"),
        (lambda x: F.hardtanh_(x, 0.0, 6.0), "relu6"),
        (lambda x: F.hardtanh_(x, min_val=0.0), "relu6"),
        (lambda x: F.hardtanh_(x, -2.0, 2.0), "hardtanh"),
        (lambda x: F.hardtanh_(x), "hardtanh"),
        (F.hardtanh, "hardtanh"),
        (nn.Hardtanh(-0.5, 3.0), "hardtanh"),
        (F.relu_, "relu"),
        (nn.Threshold(0.0, 0.0), "threshold"),
        (nn.LogSigmoid(), "logsigmoid"),
        (torch.Tensor.sigmoid_, "sigmoid"),
        (lambda x: F.relu(x).tanh(), "tanh"),
        (lambda x: x.exp(), None),
    ],
)
def test_the_last_activation_function_is_named(function, activation: str | None) -> None:
    model = Function(lambda s, x: s.b(function(s.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 2))
    (units,) = found_in(model, *VECTOR).units
    assert units.activation == activation
