"""Modules that hold several layers: recurrent networks, cells, torch's attention. And layers called several times."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lightning_plasticity as lp
from lightning_plasticity.editing import Editor
from lightning_plasticity.layer_views import layer_at, layers_of, named_layers
from lightning_plasticity.units import explore
from lightning_plasticity.units.find import Slots
from units.property_check import holds, invalid
from units.test_find import TOKENS, VECTOR, Function, by_name, modules, randomised
from units.test_other_layers import generator, u_net

NETWORKS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN, "ReLU": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}


def classifier(kind, outputs, forward=lambda s, x: s.head(s.rnn(s.embed(x))[0]), **settings):
    return randomised(
        Function(
            forward, embed=nn.Linear(8, 5), rnn=kind(5, 6, batch_first=True, **settings), head=nn.Linear(outputs, 2)
        )
    )


def used_by(units):
    return {units.name: modules(units.consumers) for units in units}


# ---- recurrent networks


@pytest.mark.parametrize("name", NETWORKS)
def test_units_of_every_layer_and_direction(name):
    torch.manual_seed(0)
    model = classifier(NETWORKS[name], 12, num_layers=2, bidirectional=True)
    found = explore(model, TOKENS, {}).units
    inner, outer = ["rnn.ih_l1", "rnn.ih_l1_reverse"], ["head"]
    assert used_by(found) == {
        "embed": ["rnn.ih_l0", "rnn.ih_l0_reverse"],
        "rnn.ih_l0": ["rnn.hh_l0", *inner],
        "rnn.ih_l0_reverse": ["rnn.hh_l0_reverse", *inner],
        "rnn.ih_l1": ["rnn.hh_l1", *outer],
        "rnn.ih_l1_reverse": ["rnn.hh_l1_reverse", *outer],
    }
    backward = by_name(found)["rnn.ih_l1_reverse"]
    assert modules(backward.producers) == ["rnn.ih_l1_reverse", "rnn.hh_l1_reverse"]
    assert backward.consumers[1].entry.tolist() == list(range(6, 12))
    assert backward.activation == ("relu" if name == "ReLU" else "tanh")
    assert all(units.exact for units in found)
    assert invalid(model, TOKENS, found) == []


def test_projections_are_units_beside_the_cells():
    torch.manual_seed(0)
    model = classifier(nn.LSTM, 4, proj_size=4, num_layers=2)
    found = explore(model, TOKENS, {}).units
    assert used_by(found) == {
        "embed": ["rnn.ih_l0"],
        "rnn.ih_l0": ["rnn.hr_l0"],
        "rnn.hr_l0": ["rnn.hh_l0", "rnn.ih_l1"],
        "rnn.ih_l1": ["rnn.hr_l1"],
        "rnn.hr_l1": ["rnn.hh_l1", "head"],
    }
    assert [units.size for units in found] == [5, 6, 4, 6, 4]
    assert invalid(model, TOKENS, found) == []


def last_state(s, x):
    return s.head(s.rnn(s.embed(x))[1][0][-1])


def packed(s, x):
    sequence = pack_padded_sequence(s.embed(x), torch.tensor([x.shape[1] - 1]), batch_first=True, enforce_sorted=False)
    return s.head(pad_packed_sequence(s.rnn(sequence)[0], batch_first=True)[0])


def one_by_one(s, x):
    """The states of a call are those of the call before."""
    states = (x.new_zeros(1, len(x), 6), x.new_zeros(1, len(x), 6))
    for token in s.embed(x).unbind(1):
        output, states = s.rnn(token.unsqueeze(1), states)
    return s.head(output)


@pytest.mark.parametrize("forward", [last_state, packed, one_by_one])
def test_however_it_is_called(forward):
    torch.manual_seed(0)
    model = classifier(nn.LSTM, 6, forward)
    found = explore(model, TOKENS, {}).units
    assert used_by(found) == {"embed": ["rnn.ih_l0"], "rnn.ih_l0": ["rnn.hh_l0", "head"]}
    assert invalid(model, TOKENS, found) == []


def encoder_and_decoder(kind, **settings):
    def forward(s, x):
        _, states = s.encoder(x)
        return s.head(s.decoder(x, states)[0])

    parts = {name: kind(8, 6, batch_first=True, **settings) for name in ("encoder", "decoder")}
    return randomised(Function(forward, **parts, head=nn.Linear(settings.get("proj_size", 6), 2)))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_units_that_go_on_from_others_state_belong_to_them(name):
    torch.manual_seed(0)
    model = encoder_and_decoder(NETWORKS[name])
    (units,) = explore(model, TOKENS, {}).units
    assert units.name == "encoder.ih_l0"
    assert modules(units.producers) == ["encoder.ih_l0", "encoder.hh_l0", "decoder.ih_l0", "decoder.hh_l0"]
    assert modules(units.consumers) == ["encoder.hh_l0", "decoder.hh_l0", "head"]
    assert invalid(model, TOKENS, [units]) == []


def test_projected_units_and_cells_go_on_from_their_like():
    torch.manual_seed(0)
    model = encoder_and_decoder(nn.LSTM, proj_size=4)
    found = explore(model, TOKENS, {}).units
    assert used_by(found) == {
        "encoder.ih_l0": ["encoder.hr_l0", "decoder.hr_l0"],
        "encoder.hr_l0": ["encoder.hh_l0", "decoder.hh_l0", "head"],
    }
    assert invalid(model, TOKENS, found) == []


@pytest.mark.parametrize("both", [False, True])
def test_states_that_a_layer_makes(both):
    def forward(s, x):
        start = s.start(x[:, 0]).unsqueeze(0)
        return s.head(s.rnn(x, (start, start if both else start * 0 + 1))[0])

    torch.manual_seed(0)
    model = Function(forward, start=nn.Linear(8, 6), rnn=nn.LSTM(8, 6, batch_first=True), head=nn.Linear(6, 2))
    (units,) = explore(randomised(model), TOKENS, {}).units
    assert units.name == "start"
    assert modules(units.producers) == ["start", "rnn.ih_l0", "rnn.hh_l0"]
    assert invalid(model, TOKENS, [units]) == []


def test_states_of_two_kinds_are_told():
    """Units that go on from one layer's in one call, and from another's in the next."""

    def forward(s, x):
        return s.head(s.rnn(x, s.a(x[:, 0]).unsqueeze(0))[0]) + s.head(s.rnn(x, s.b(x[:, 0]).unsqueeze(0))[0])

    parts = {"a": nn.Linear(8, 6), "b": nn.Linear(8, 6), "rnn": nn.GRU(8, 6, batch_first=True)}
    found = explore(randomised(Function(forward, **parts, head=nn.Linear(6, 2))), TOKENS, {})
    assert set(by_name(found.units)) == {"rnn.ih_l0"}
    assert found.left_out["a"] == found.left_out["b"] == "its units reach the state of 'rnn.ih_l0'"


def test_cells_that_are_seen_from_outside_are_no_units():
    model = classifier(nn.LSTM, 6, lambda s, x: s.rnn(s.embed(x))[1][1])
    found = explore(model, TOKENS, {})
    assert set(by_name(found.units)) == {"embed"}
    assert found.left_out["rnn.ih_l0"] == "its units reach the network's output"
    assert found.left_out["rnn.hh_l0"] == "its units reach the network's output"


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("given", [False, True])
def test_cells(name, given):
    def forward(s, x):
        states = [s.cell(x[:, 0])] if not given else [s.cell(x[:, 0], None)]
        for t in range(1, x.shape[1]):
            states.append(s.cell(x[:, t], states[-1]))
        return s.head(torch.stack([h[0] if isinstance(h, tuple) else h for h in states], 1))

    torch.manual_seed(0)
    model = randomised(Function(forward, cell=CELLS[name](8, 6), head=nn.Linear(6, 2)))
    found = explore(model, TOKENS, {}).units
    assert used_by(found) == {"cell.ih": ["cell.hh", "head"]}
    assert modules(found[0].producers) == ["cell.ih", "cell.hh"]
    assert invalid(model, TOKENS, found) == []


def test_the_check_sees_units_and_recurrent_columns_that_are_mistaken():
    torch.manual_seed(0)
    model = classifier(nn.GRU, 6)
    units = by_name(explore(model, TOKENS, {}).units)["rnn.ih_l0"]
    recurrent, head = units.consumers
    assert holds(model, TOKENS, units)
    for wrong in (Slots(recurrent.module, recurrent.entry, recurrent.unit.roll(1)), None):
        consumers = (head,) if wrong is None else (wrong, head)
        assert not holds(model, TOKENS, replace(units, consumers=consumers))


# ---- torch's attention


def attention(forward=lambda s, x: s.attention(x, x, x), **settings):
    def whole(s, x):
        x = s.embed(x)
        return s.head(x + forward(s, x)[0])

    return randomised(
        Function(
            whole, embed=nn.Linear(8, 8), head=nn.Linear(8, 2),
            attention=nn.MultiheadAttention(8, 2, batch_first=True, **settings),
        )
    )  # fmt: skip


ATTENTIONS = {
    "self": attention,
    "cross": lambda: attention(lambda s, x: s.attention(x, key=x.flip(1), value=x.flip(2))),
    "sizes": lambda: attention(lambda s, x: s.attention(x, x[..., :5], x[..., :3]), kdim=5, vdim=3),
    "no bias": lambda: attention(bias=False),
    "more keys": lambda: attention(add_bias_kv=True, add_zero_attn=True),
    "without weights": lambda: attention(lambda s, x: s.attention(x, x, x, need_weights=False)),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_of_torchs_attention(name):
    torch.manual_seed(0)
    model = ATTENTIONS[name]()
    found = explore(model, TOKENS, {})
    assert used_by(found.units) == {"attention.v_proj": ["attention.out_proj"]}
    assert found.units[0].exact
    assert invalid(model, TOKENS, found.units) == []
    for part in ("q_proj", "k_proj"):
        assert found.left_out[f"attention.{part}"] == "its units reach the scores of attention, which mix them"


def test_heads_are_units_with_their_queries_and_keys_too():
    torch.manual_seed(0)
    model = attention()
    [values] = explore(model, TOKENS, {}).units
    heads = values.grouped(4)
    assert heads.size == 2
    assert invalid(model, TOKENS, [heads]) == []
    rows = torch.arange(8)
    scores = tuple(Slots(f"attention.{part}", rows, rows // 4) for part in ("q_proj", "k_proj"))
    whole = replace(heads, producers=(*heads.producers, *scores))
    assert invalid(model, TOKENS, [whole]) == []
    assert invalid(model, TOKENS, [replace(values, producers=(*values.producers, Slots(scores[0].module, rows, rows)))])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = lp.ContinualBackprop(0.5, 1, units=[whole], compensate_bias=False).attach(model, optimizer)
    before = model.attention.in_proj_weight.detach().clone()
    for _ in range(2):
        model(*TOKENS).sum().backward()
        optimizer.step()
        method.step()
    renewed = (model.attention.in_proj_weight != before).all(1).view(3, 2, 4)  # of queries, keys and values: heads
    assert sorted(renewed.flatten(2).all(2)[0].tolist()) == [False, True]
    assert torch.equal(renewed.all(2), renewed.any(2))
    assert torch.equal(renewed[0], renewed[1])
    assert torch.equal(renewed[0], renewed[2])
    assert torch.equal((model.attention.out_proj.weight == 0).all(0), renewed[0].flatten())


def test_groups_must_divide_the_units():
    [values] = explore(attention(), TOKENS, {}).units
    with pytest.raises(ValueError, match=r"The 8 units of 'attention.v_proj' are no whole number of groups of 3"):
        values.grouped(3)
    with pytest.raises(ValueError, match="size"):
        values.grouped(0)


def test_torchs_transformer():
    torch.manual_seed(0)
    model = randomised(Function(lambda s, x: s.t(x, x + 1), t=nn.Transformer(8, 2, 1, 1, 16, batch_first=True)))
    found = explore(model, TOKENS, {}).units
    names = {
        *(f"t.{coder}.layers.0.{part}" for coder in ("encoder", "decoder") for part in ("self_attn.v_proj", "linear1")),
        "t.decoder.layers.0.multihead_attn.v_proj",
    }
    assert {units.name for units in found} == names
    assert invalid(model, TOKENS, found) == []


# ---- layers called several times


def again_and_again(s, x):
    x = s.embed(x)
    for _ in range(3):
        x = x + s.down(F.gelu(s.up(x)))
    return s.head(x)


def siamese(s, x):
    return s.down(F.relu(s.up(x))) - s.down(F.relu(s.up(x.flip(-1))))


@pytest.mark.parametrize("forward", [again_and_again, siamese])
def test_layers_called_several_times(forward):
    torch.manual_seed(0)
    parts = {"embed": nn.Linear(6, 6), "up": nn.Linear(6, 9), "down": nn.Linear(9, 6), "head": nn.Linear(6, 2)}
    model = randomised(Function(forward, **parts))
    found = explore(model, VECTOR, {}).units
    assert used_by(found) == {"up": ["down"]}
    assert invalid(model, VECTOR, found) == []


def test_a_layer_whose_units_go_another_way_in_one_of_its_calls_has_none():
    forward = lambda s, x: s.down(F.relu(s.up(x))) + s.up(x.flip(-1)).sum(-1, keepdim=True)  # noqa: E731
    model = randomised(Function(forward, up=nn.Linear(6, 9), down=nn.Linear(9, 6)))
    found = explore(model, VECTOR, {})
    assert found.units == []
    assert "output" in found.left_out["up"]


# ---- where the entries are


def gates(weight, unit, size):
    return [weight[gate * size + unit] for gate in range(len(weight) // size)]


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_edits_of_a_recurrent_network_against_a_loop(name):
    torch.manual_seed(0)
    model = Function(None, rnn=NETWORKS[name](3, 4).double())
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model.rnn(torch.randn(5, 2, 3).double())[0].square().sum().backward()
    optimizer.step()
    expected = {key: p.detach().clone() for key, p in model.rnn.named_parameters()}
    moments = {key: optimizer.state[p]["exp_avg"].clone() for key, p in model.rnn.named_parameters()}
    editor = Editor(model, [optimizer], "reset")
    units = torch.tensor([2, 0])
    for kind, inputs in (("ih", 3), ("hh", 4)):
        size = len(gates(expected[f"weight_{kind}_l0"], 0, 4))
        values = torch.randn(2, inputs, size).double() if size > 1 else torch.randn(2, inputs).double()
        editor.redraw_rows(f"rnn.{kind}_l0", units, values)
        for i, unit in enumerate(units.tolist()):
            for gate in range(size):
                row = values[i, :, gate] if size > 1 else values[i]
                expected[f"weight_{kind}_l0"][gate * 4 + unit] = row
                expected[f"bias_{kind}_l0"][gate * 4 + unit] = 0.0
                moments[f"weight_{kind}_l0"][gate * 4 + unit] = 0.0
                moments[f"bias_{kind}_l0"][gate * 4 + unit] = 0.0
    amounts = torch.tensor([0.5, -2.0]).double()
    editor.shift_bias("rnn.hh_l0", units, amounts)
    for row in range(len(expected["bias_hh_l0"])):
        for unit, amount in zip(units.tolist(), amounts.tolist(), strict=True):
            expected["bias_hh_l0"][row] += expected["weight_hh_l0"][row, unit] * amount
    editor.zero_columns("rnn.hh_l0", units)
    for row in range(len(expected["weight_hh_l0"])):
        for unit in units.tolist():
            expected["weight_hh_l0"][row, unit] = moments["weight_hh_l0"][row, unit] = 0.0
    editor.scale_rows("rnn.ih_l0", torch.tensor([1]), 3.0)
    for gate in range(len(expected["bias_ih_l0"]) // 4):
        for key in ("weight_ih_l0", "bias_ih_l0"):
            expected[key][gate * 4 + 1] *= 3.0
            moments[key][gate * 4 + 1] = 0.0
    for key, p in model.rnn.named_parameters():
        torch.testing.assert_close(p.detach(), expected[key], rtol=0, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], moments[key], rtol=0, atol=0)


@pytest.mark.parametrize("edit", ["redraw_rows", "scale_rows", "zero_bias"])
def test_gates_of_new_units_get_the_mean_of_what_adam_knows_of_the_others(edit):
    model = Function(None, rnn=nn.LSTM(3, 4).double())
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model.rnn(torch.randn(5, 2, 3).double())[0].square().sum().backward()
    optimizer.step()
    written = {"redraw_rows": (torch.zeros(2, 3, 4),), "scale_rows": (0.5,), "zero_bias": ()}[edit]
    before = {key: optimizer.state[p]["exp_avg_sq"].clone() for key, p in model.rnn.named_parameters()}
    getattr(Editor(model, [optimizer]), edit)("rnn.ih_l0", torch.tensor([2, 0]), *written)
    rows = torch.tensor([0, 2] * 4) + torch.arange(0, 16, 4).repeat_interleave(2)
    for key in ("bias_ih_l0",) if edit == "zero_bias" else ("weight_ih_l0", "bias_ih_l0"):
        others = before[key][torch.isin(torch.arange(16), rows, invert=True)]
        before[key][rows] = others.mean()
    for key, p in model.rnn.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], before[key], rtol=1e-12, atol=0)


def test_edits_of_torchs_attention_touch_a_third():
    torch.manual_seed(0)
    model = attention()
    before = model.attention.in_proj_weight.detach().clone()
    model.attention.in_proj_bias.data.fill_(1.0)
    Editor(model).redraw_rows("attention.v_proj", torch.tensor([3]), torch.full((1, 8), 7.0))
    changed = (model.attention.in_proj_weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [19]
    assert (model.attention.in_proj_bias == 0).nonzero().flatten().tolist() == [19]


@pytest.mark.parametrize(
    ("module", "gates", "activation"),
    [
        (nn.RNN(2, 3), 1, "tanh"),
        (nn.RNN(2, 3, nonlinearity="relu"), 1, "relu"),
        (nn.RNNCell(2, 3), 1, "tanh"),
        (nn.RNNCell(2, 3, nonlinearity="relu"), 1, "relu"),
        (nn.GRU(2, 3), 3, "tanh"),
        (nn.GRUCell(2, 3), 3, "tanh"),
        (nn.LSTM(2, 3), 4, "tanh"),
        (nn.LSTMCell(2, 3), 4, "tanh"),
    ],
)
def test_recurrent_layers_say_their_gates_and_their_activation(module, gates, activation):
    views = layers_of(module)
    assert len(views) == 2
    assert {(view.gates, view.activation, view.outputs) for view in views.values()} == {(gates, activation, 3)}
    assert [view.inputs for view in views.values()] == [2, 3]


def test_weights_that_are_used_beside_the_module_that_holds_them_are_left_out():
    model = classifier(nn.GRU, 6, lambda s, x: s.head(s.rnn(s.embed(x))[0] + s.rnn.weight_ih_l0.sum()))
    reason = "its parameters are also used outside of it (by sum)"
    found = explore(model, TOKENS, {})
    assert found.left_out["rnn.ih_l0"] == found.left_out["rnn.hh_l0"] == reason


def test_every_layer_is_found_by_its_name():
    model = nn.Sequential(nn.LSTM(2, 3, 2), nn.TransformerEncoderLayer(4, 2, 8), nn.ReLU())
    for name, view in named_layers(model).items():
        at = layer_at(model, name)
        assert (at.part, at.weight_name, at.rows, at.gates) == (view.part, view.weight_name, view.rows, view.gates)
        assert model.get_parameter(view.weight_path(name)) is view.weight
    assert layer_at(model, "2") is None
    with pytest.raises(AttributeError):
        layer_at(model, "0.hh_l2")
    assert list(layers_of(nn.LSTM(2, 3))) == list(named_layers(nn.LSTM(2, 3))) == ["ih_l0", "hh_l0"]


# ---- methods


def heard(view, module, *inputs):
    given = []
    handle = view.hear(given.append, as_hook=lambda hook: hook)
    output = module(*inputs)
    handle.remove()
    return given[0], output


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_layers_inside_a_module_are_given():
    torch.manual_seed(0)
    rnn, x = nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)
    views = layers_of(rnn)
    assert heard(views["ih_l0"], rnn, x)[0] is x
    given, (sequence, (last, _)) = heard(views["hh_l1_reverse"], rnn, x)
    assert torch.equal(given, sequence[..., 4:])
    assert torch.equal(heard(views["ih_l1"], rnn, x)[0], torch.cat([last[0], last[1]], -1))
    assert torch.equal(heard(views["hh_l0_reverse"], rnn, x)[0], last[1])
    ragged = pack_padded_sequence(x, torch.tensor([5, 2]))
    assert len(heard(views["hh_l1"], rnn, ragged)[0]) == len(heard(views["ih_l0"], rnn, ragged)[0]) == 7
    projected = nn.LSTM(3, 4, proj_size=2)
    given, (_, (_, cells)) = heard(layers_of(projected)["hr_l0"], projected, x)
    assert torch.equal(given, cells[0].tanh())
    cell, x = nn.GRUCell(3, 4), torch.randn(2, 3)
    given, output = heard(layers_of(cell)["hh"], cell, x)
    assert given is output
    attend, x = nn.MultiheadAttention(4, 2), torch.randn(3, 1, 4)
    given, _ = heard(layers_of(attend)["out_proj"], attend, x, x, 2 * x)
    torch.testing.assert_close(given, F.linear(2 * x, attend.in_proj_weight[8:], attend.in_proj_bias[8:]))


STRATEGY = lp.ActivationStrategy(0.2, 0.9, 0.2, 0.9)
METHODS = {
    "ContinualBackprop": lambda: lp.ContinualBackprop(0.1, 2, seed=0),
    "ReDo": lambda: lp.ReDo(0.9, 2, seed=0),
    "ActivationReset": lambda: lp.ActivationReset(
        lp.ActivationStrategy(0.2, 0.9, 0.2, 0.9), maturity_threshold=1, seed=0
    ),
    "PartialReset": lambda: lp.PartialReset(0.5, 2, seed=0),
    "SelectiveReinit": lambda: lp.SelectiveReinit(0.1, every_n_train_steps=2, seed=0),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build", [lambda: classifier(nn.LSTM, 12, num_layers=2, bidirectional=True), attention])
def test_methods_train_on_them(name, build):
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    method = METHODS[name]().attach(model, optimizer, example_inputs=TOKENS)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 5, 8)).square().mean().backward()
        optimizer.step()
        before = [p.detach().clone() for p in model.parameters()]
        method.step()
    assert all(p.isfinite().all() for p in model.parameters())
    changed = {key for (key, p), b in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, b)}
    assert changed & {
        "rnn.weight_hh_l1",
        "attention.in_proj_weight",
        *(["head.weight"] if name == "SelectiveReinit" else []),
    }


def test_a_module_that_holds_layers_may_be_the_whole_network():
    found = explore(nn.LSTM(8, 4, 2), (torch.randn(5, 1, 8),), {})
    assert used_by(found.units) == {}
    assert set(found.left_out.values()) == {"its units reach the network's output"}  # by the last states


# ---- exactly the entries of the units that are replaced


def graph():
    geometric = pytest.importorskip("torch_geometric.nn", reason="needs torch-geometric")
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    first, second = geometric.GCNConv(8, 12), geometric.GCNConv(12, 2)
    return Function(lambda s, x: s.b(F.relu(s.a(x, edges)), edges), a=first, b=second)


REPLACED = {
    "LSTM": (lambda: classifier(nn.LSTM, 12, num_layers=2, bidirectional=True), (2, 5, 8)),
    "GRU": (lambda: classifier(nn.GRU, 6), (2, 5, 8)),
    "projections": (lambda: classifier(nn.LSTM, 4, proj_size=4), (2, 5, 8)),
    "attention": (attention, (2, 5, 8)),
    "generator": (generator, (4, 6, 1, 1)),
    "U-Net": (u_net, (2, 3, 8, 8)),
    "graph": (graph, (4, 8)),
}


RECURRENT = ("LSTM", "GRU", "projections")
REPLACING = {
    "ContinualBackprop": lambda: lp.ContinualBackprop(0.2, 1, compensate_bias=False, optimizer_state="reset", seed=0),
    "ReDo": lambda: lp.ReDo(0.9, 2, optimizer_state="reset", seed=0),
}


def in_training(name, method):
    """A network, its optimizer, and what goes on to take a step of training."""
    torch.manual_seed(0)
    build, shape = REPLACED[name]
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    example = torch.randn(shape) if name == "graph" else torch.randn(1, *shape[1:])
    method.attach(model, optimizer, example_inputs=(example,))

    def step():
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()

    return model, optimizer, step


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", REPLACING)
@pytest.mark.parametrize("name", REPLACED)
def test_the_optimizer_forgets_exactly_the_entries_of_replaced_units(name, kind):
    method = REPLACING[kind]()
    model, optimizer, step = in_training(name, method)
    chosen = {}
    replace_units = method._population.replace
    method._population.replace = lambda which, *args, **kwargs: (
        chosen.update(which), replace_units(which, *args, **kwargs)
    )  # fmt: skip
    layers = named_layers(model)
    written = 0
    for _ in range(6):
        step()
        before = {p: (p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for p in model.parameters()}
        chosen.clear()
        method.step()
        masks = {p: torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()}
        for number, units in chosen.items():
            unit_set = method._population.sets[number].units
            for part, mark in ((unit_set.producers, rows_of), (unit_set.consumers, columns_of)):
                for slots in part:
                    mark(layers[slots.module], slots.entry[torch.isin(slots.unit, units)].tolist(), masks)
            for slots in unit_set.norms:
                for p in model.get_submodule(slots.module).parameters():
                    masks[p][slots.entry[torch.isin(slots.unit, units)]] = True
        for p, (value, average) in before.items():
            assert torch.equal(p[~masks[p]], value[~masks[p]])
            assert torch.equal(optimizer.state[p]["exp_avg"], average.masked_fill(masks[p], 0.0))
            written += int(masks[p].sum())
    assert written


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", REPLACED)
def test_the_optimizer_forgets_exactly_the_weights_that_selective_reinit_draws_anew(name):
    every = "all" if name in RECURRENT else "weights"
    method = lp.SelectiveReinit(
        0.2, every_n_train_steps=2, reinit="normal", parameters=every, optimizer_state="reset", seed=0
    )
    model, optimizer, step = in_training(name, method)
    for number in range(4):
        step()
        before = {p: (p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for p in model.parameters()}
        method.step()
        for p, (value, average) in before.items():
            assert torch.equal(optimizer.state[p]["exp_avg"], average.masked_fill(p.detach() != value, 0.0))
        drawn = [int((p.detach() != value).sum()) for p, (value, _) in before.items() if p.ndim > 1]
        shares = [count / p.numel() for count, p in zip(drawn, (p for p in before if p.ndim > 1), strict=True)]
        assert all(abs(share - 0.2) < 0.1 for share in shares) if number % 2 else not any(drawn)


def rows_of(view, entries, masks):
    """Every row of every unit, by the layouts that torch documents."""
    weight, bias, first = view.weight, view.bias, view.rows.start or 0
    for entry in entries:
        for gate in range(view.gates):
            row = first + gate * view.outputs + entry
            if view.transposed:
                masks[weight][:, row] = True
            else:
                masks[weight][row] = True
            if bias is not None:
                masks[bias][(view.bias_rows.start or 0) + gate * view.outputs + entry] = True


def columns_of(view, entries, masks):
    for entry in entries:
        if view.transposed:
            masks[view.weight][entry] = True
        else:
            masks[view.weight][view.rows, entry] = True
