"""Layers that are not torch's linear and convolution layers: transposed, home-made, attention written out."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_plasticity as lp
from lightning_plasticity.layer_views import view_of
from lightning_plasticity.units import explore
from lightning_plasticity.units.find import Slots
from units.property_check import holds, invalid
from units.test_find import IMAGE, TOKENS, VECTOR, Function, by_name, modules, randomised


class Conv1D(nn.Module):
    """A linear layer whose weight has its outputs in the second dimension, as GPT-2's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class HomeMade(nn.Module):
    """A linear layer of somebody's own: ``use`` is what it does with its input and its weight."""

    def __init__(self, use, inputs=6, outputs=8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.use = use

    def forward(self, x):
        return self.use(x, self.weight)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return nn.functional.linear(x, self.in_proj_weight[: self.embed_dim])


def with_positions():
    """A parameter that is added is no layer."""
    model = Function(lambda s, x: s.b(F.relu(s.a(x + s.positions * s.scale))), a=nn.Linear(8, 8), b=nn.Linear(8, 2))
    model.positions = nn.Parameter(torch.randn(1, 5, 8))
    model.scale = nn.Parameter(torch.ones(1, 1, 8))
    return model


class Gain(nn.Module):
    """One number for each channel, in a shape of three dimensions."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.gain * x


def test_a_gain_for_each_channel_is_no_layer():
    found = explore(nn.Sequential(nn.Conv2d(3, 4, 3), Gain(4), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGE, {})
    assert [units.name for units in found.units] == ["0"]
    assert "1" not in found.left_out


HOME_MADE = {
    "linear": (lambda x, w: F.linear(x, w), False),
    "at T": (lambda x, w: x @ w.T, False),
    "at t()": (lambda x, w: x @ w.t(), False),
    "einsum": (lambda x, w: torch.einsum("...i,oi->...o", x, w), False),
    "matmul": (lambda x, w: torch.matmul(x, w), True),
    "rearranged": (lambda x, w: (w.T @ x.transpose(-1, -2)).transpose(-1, -2), True),
}


class OwnConvolution(nn.Module):
    """A convolution of somebody's own."""

    def __init__(self, shape, use, **settings):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[0]))
        self.use = use
        vars(self).update(settings)

    def forward(self, x):
        return self.use(self, x)


CONVOLUTIONS = {
    "plain": (lambda s, x: F.conv2d(x, s.weight, s.bias), (5, 3, 3, 3), {}),
    "same size": (lambda s, x: F.conv2d(x, s.weight, s.bias, padding=1), (5, 3, 3, 3), {}),
    "grouped": (lambda s, x: F.conv2d(x, s.weight, s.bias, groups=3), (6, 1, 3, 3), {"groups": 3}),
    "strided": (
        lambda s, x: F.conv2d(x, s.weight, s.bias, s.stride, s.padding),
        (5, 3, 3, 3),
        {"stride": (2, 1), "padding": "valid"},
    ),
    "unfolded": (
        lambda s, x: (
            (s.weight.flatten(1) @ F.unfold(x, 3)).unflatten(2, (x.shape[2] - 2, x.shape[3] - 2))
            + s.bias[:, None, None]
        ),
        (5, 3, 3, 3),
        {},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_home_made_convolutions_are_layers(name):
    torch.manual_seed(0)
    use, shape, settings = CONVOLUTIONS[name]
    own = OwnConvolution(shape, use, **settings)
    last = OwnConvolution((2, shape[0], 1, 1), CONVOLUTIONS["plain"][0])
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), own, nn.ReLU(), last, nn.Flatten(1), nn.LazyLinear(2))
    model(*IMAGE)
    found = explore(randomised(model), IMAGE, {})
    own_units = {} if name == "grouped" else {"2": shape[0]}  # a depthwise one passes on the units before it
    assert {units.name: units.size for units in found.units} == {"0": 3, **own_units, "4": 2}
    assert ("2" in modules(found.units[0].producers)) == (name == "grouped")
    assert (view_of(own).groups, view_of(own).inputs, view_of(own).channel_dim) == (settings.get("groups", 1), 3, -3)
    assert invalid(model, IMAGE, found.units) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda s, x: F.conv2d(x, s.weight - s.weight.mean(), s.bias),
        lambda s, x: F.conv2d(x, s.weight, s.bias, stride=2),  # which it does not say
        lambda s, x: x * s.weight.sum(),
    ],
)
def test_what_does_something_else_than_a_convolution_is_none(use):
    assert view_of(OwnConvolution((5, 3, 3, 3), use)) is None


@pytest.mark.parametrize("groups", ["3", None, 2.0, 0, -3, 4, 5])
def test_groups_that_cannot_be_make_no_convolution(groups):
    use = CONVOLUTIONS["grouped"][0]
    assert view_of(OwnConvolution((6, 1, 3, 3), use, groups=groups)) is None
    assert view_of(OwnConvolution((6, 1, 3, 3), use, groups=3)).groups == 3


def test_scales_of_channels_are_no_convolutions():
    scale = OwnConvolution((3, 1, 1), lambda s, x: x * s.weight)
    del scale.bias
    assert view_of(scale) is None


OTHERWISE = {
    "scaled": lambda x, w: F.linear(x, w * 0.5),
    "standardised": lambda x, w: F.linear(x, (w - w.mean()) / w.std()),
    "rounded": lambda x, w: F.linear(x, w.round()),
    "activated": lambda x, w: F.linear(x, w).relu(),
}


@pytest.mark.parametrize("name", HOME_MADE)
@pytest.mark.parametrize("width", [6, 8])  # square as well: then the shape does not tell which way round it is
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_home_made_layers_are_layers(name, width, dtype):
    torch.manual_seed(0)
    use, transposed = HOME_MADE[name]
    sizes = [(width, 6), (5, width)] if not transposed else [(6, width), (width, 5)]
    model = nn.Sequential(HomeMade(use, *sizes[0][::-1]), nn.Tanh(), HomeMade(use, *sizes[1][::-1]), nn.Linear(5, 2))
    inputs = tuple(x.to(dtype) for x in VECTOR)
    found = explore(model.to(dtype), inputs, {}).units
    assert {units.name: units.size for units in found} == {"0": width, "2": 5}
    assert [view_of(model[i]).transposed for i in (0, 2)] == [transposed, transposed]
    assert invalid(model, inputs, found) == []


def test_conv1d_as_gpt2s():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 12), nn.GELU(), Conv1D(12, 8), nn.Tanh(), nn.Linear(8, 2))
    found = explore(model, TOKENS, {}).units
    assert {units.name: units.size for units in found} == {"0": 12, "2": 8}
    assert invalid(model, TOKENS, found) == []


@pytest.mark.parametrize("use", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_home_made_layers_that_do_something_else_are_named(use):
    model = nn.Sequential(HomeMade(use), nn.ReLU(), nn.Linear(8, 2))
    assert view_of(model[0]) is None
    assert "its type is HomeMade" in explore(model, VECTOR, {}).left_out["0"]
    assert "its type is HomeMade" in explore(model, VECTOR, {}, explain=False).left_out["0"]


def test_looking_at_a_module_changes_nothing():
    module = HomeMade(HOME_MADE["matmul"][0])
    weight, state = module.weight, torch.get_rng_state()
    before = weight.detach().clone()
    heard = []
    module.register_forward_hook(lambda *_: heard.append(1))
    assert view_of(module).transposed
    assert module.weight is weight
    assert torch.equal(weight, before)
    assert module.training
    assert heard == []
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("build", "inputs", "layer", "reason"),
    [
        (lambda: OwnAttention(8, 2), TOKENS, "", "its type is OwnAttention"),
        (
            lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose2d(4, 2, 1, groups=2)),
            IMAGE,
            "1",
            "transposed convolution with groups=2",
        ),
    ],
)
def test_layers_of_other_kinds_are_named(build, inputs, layer, reason):
    assert reason in explore(randomised(build()), inputs, {}).left_out[layer]


def test_what_is_no_layer_is_not_named():
    assert explore(with_positions(), TOKENS, {}).left_out == {"b": "its units reach the network's output"}


def test_a_weight_that_is_used_elsewhere_transposed_is_seen():
    model = Function(lambda s, x: F.relu(s.b(F.relu(s.a(x)))) @ s.a.weight, a=nn.Linear(6, 8), b=nn.Linear(8, 8))
    other = Function(lambda s, x: s.b(F.relu(s.a(x))) @ s.a.weight.T, a=nn.Linear(6, 8), b=nn.Linear(8, 6))
    for network in (model, other):
        found = explore(network, VECTOR, {})
        assert found.units == []
        assert "also used outside of it" in found.left_out["a"]


# ---- transposed convolutions


def generator():
    """As a DCGAN's."""
    return nn.Sequential(
        nn.ConvTranspose2d(6, 16, 4, 1, 0, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def u_net():
    def forward(s, x):
        skip = F.relu(s.norm(s.down(x)))
        deep = F.relu(s.deep(F.max_pool2d(skip, 2)))
        return s.head(F.relu(s.merge(torch.cat([skip, s.up(deep, output_size=skip.shape[-2:])], 1))))

    return Function(
        forward,
        down=nn.Conv2d(3, 6, 3, padding=1), norm=nn.BatchNorm2d(6), deep=nn.Conv2d(6, 12, 3, padding=1),
        up=nn.ConvTranspose2d(12, 5, 2, stride=2), merge=nn.Conv2d(11, 7, 3, padding=1), head=nn.Conv2d(7, 2, 1),
    )  # fmt: skip


def one_and_three_dimensions():
    def forward(s, x):
        return s.d(F.relu(s.c(F.relu(s.b(F.relu(s.a(x)))).unsqueeze(2).unsqueeze(2))).flatten(1))

    return Function(
        forward,
        a=nn.ConvTranspose1d(2, 6, 3), b=nn.ConvTranspose1d(6, 4, 3, stride=2),
        c=nn.ConvTranspose3d(4, 5, 1), d=nn.Linear(5 * 15, 2),
    )  # fmt: skip


TRANSPOSED = {
    "generator": (generator, (torch.randn(1, 6, 1, 1),), {"0", "3"}),
    "u_net": (u_net, IMAGE, {"down", "deep", "up", "merge"}),
    "one_and_three_dimensions": (one_and_three_dimensions, (torch.randn(1, 2, 5),), {"a", "b", "c"}),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name):
    torch.manual_seed(0)
    build, inputs, expected = TRANSPOSED[name]
    model = randomised(build())
    found = explore(model, inputs, {}).units
    assert {units.name for units in found} == expected
    assert all(units.exact for units in found)
    assert invalid(model, inputs, found) == []


def test_the_check_sees_rows_and_columns_of_a_transposed_convolution_that_are_mistaken():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ReLU(), nn.ConvTranspose2d(5, 2, 2)))
    (units,) = explore(model, IMAGE, {}).units
    columns = units.consumers[0]
    shifted = replace(units, consumers=(Slots(columns.module, columns.entry, columns.unit.roll(1)),))
    assert holds(model, IMAGE, units)
    assert not holds(model, IMAGE, shifted)


# ---- attention


def attention(scores_and_values, heads=2, width=8, key_heads=2):
    """Self-attention with projections of its own; ``scores_and_values`` is what it does with query, key and value."""
    size = width // heads

    def forward(s, x):
        x = s.norm(s.embed(x))
        q, k, v = (project(x).unflatten(-1, (-1, size)).transpose(-2, -3) for project in (s.query, s.key, s.value))
        k, v = (t.repeat_interleave(heads // key_heads, 1) for t in (k, v))
        y = scores_and_values(q, k, v).transpose(-2, -3).flatten(-2)
        return s.head(x + s.out(y))

    return Function(
        forward,
        embed=nn.Linear(width, width), norm=nn.LayerNorm(width),
        query=nn.Linear(width, width), key=nn.Linear(width, size * key_heads),
        value=nn.Linear(width, size * key_heads), out=nn.Linear(width, width), head=nn.Linear(width, 2),
    )  # fmt: skip


def written_out(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def causal(q, k, v):
    scores = q @ k.transpose(-1, -2)
    mask = torch.ones(scores.shape[-2:]).tril().bool()
    return F.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1) @ v


ATTENTIONS = {
    "written out": written_out,
    "causal": causal,
    "torch's": F.scaled_dot_product_attention,
    "torch's, causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "torch's, by name": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
}


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("attend", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_values_of_attention_are_units(attend, key_heads):
    torch.manual_seed(0)
    model = randomised(attention(attend, key_heads=key_heads))
    found = explore(model, TOKENS, {})
    assert {units.name for units in found.units} == {"value"}
    (value,) = found.units
    assert value.exact
    assert modules(value.consumers) == ["out"]
    assert len(value.consumers[0].entry) == 8
    assert invalid(model, TOKENS, found.units) == []
    for name in ("query", "key"):
        assert "its units reach " in found.left_out[name]
        assert found.left_out[name].endswith(("which mixes them", "which mix them"))


def test_values_of_a_fused_projection():
    def forward(s, x):
        q, k, v = s.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return s.head(s.out(written_out(q, k, v).transpose(1, 2).flatten(2)))

    model = Function(forward, qkv=nn.Linear(8, 24), out=nn.Linear(8, 6), head=nn.Linear(6, 2))
    found = explore(randomised(model), TOKENS, {}).units
    assert {units.name: units.size for units in found} == {"qkv": 8, "out": 6}
    assert by_name(found)["qkv"].producers[0].entry.tolist() == list(range(16, 24))
    assert invalid(model, TOKENS, found) == []


def test_a_softmax_of_each_channel_by_itself_mixes_nothing():
    """Attention over positions, with scores for each channel."""

    def forward(s, x):
        hidden = s.a(x)
        return s.b((hidden.softmax(1)).sum(1))

    model = randomised(Function(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 2)))
    found = explore(model, TOKENS, {}).units
    assert {units.name for units in found} == {"a"}
    assert invalid(model, TOKENS, found) == []


# ---- layers beside others, and weights that are computed


def test_units_of_an_adapter_are_its_inner_ones():
    """LoRA adds the product of two small matrices to a frozen layer: the two layers together make each output."""
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)).eval()
    found = explore(adapted, VECTOR, {})
    first = "base_model.model.0"
    assert {units.name: modules(units.consumers) for units in found.units} == {
        f"{first}.lora_A.default": [f"{first}.lora_B.default"]
    }
    assert "added to those of other layers" in found.left_out[f"{first}.base_layer"]
    assert invalid(adapted, VECTOR, found.units) == []


class Experts(nn.Module):
    """Each token goes to one of three experts, chosen by its first number."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)
        )  # fmt: skip
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen = (tokens[:, 0] > 0).long() + (tokens[:, 0] > 100)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            here = (chosen == number).nonzero().squeeze(1)
            if len(here):
                out.index_add_(0, here, expert(tokens[here]))
        return self.head(out)


def test_experts_that_are_called_on_parts_of_the_batch():
    torch.manual_seed(0)
    model = randomised(Experts())
    found = explore(model, TOKENS, {})
    called = {f"experts.{i}.0" for i in (0, 1)}
    assert called == {units.name for units in found.units}
    assert found.left_out["experts.2.0"] == "it is not called in a forward pass"
    assert invalid(model, TOKENS, found.units) == []


def test_experts_that_training_calls_later_are_found_then():
    torch.manual_seed(0)
    model = Experts().train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    method = lp.ContinualBackprop(0.1, 2, seed=0).attach(model, optimizer, example_inputs=TOKENS)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 5, 8) + (200.0 if step == 3 else 0.0)).square().mean().backward()
        optimizer.step()
        method.step()
    assert {unit_set.name for unit_set in method._population.sets} == {f"experts.{i}.0" for i in range(3)}
    assert method.replaced


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_computed_weights_have_their_reason(norm):
    normed = getattr(nn.utils.parametrizations, norm)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), normed(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    found = explore(randomised(model), VECTOR, {})
    assert found.units == []
    assert "a column of it cannot be set to 0 by itself" in found.left_out["2"]
    assert "'2', which is left out" in found.left_out["0"]


def test_functions_that_only_want_the_shape_of_units_decide_nothing():
    """As graph networks do, to add up what arrives at each node."""

    def forward(s, x):
        hidden = F.relu(s.a(x))
        index = torch.zeros(len(x), 1, dtype=torch.long).expand_as(hidden)
        index = index + torch.zeros_like(hidden, dtype=torch.long) + hidden.new_zeros(1, dtype=torch.long)
        return s.b(torch.zeros_like(hidden).scatter_add(0, index, hidden))

    model = randomised(Function(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 2)))
    found = explore(model, VECTOR, {})
    assert {units.name for units in found.units} == {"a"}
    assert invalid(model, VECTOR, found.units) == []


def test_a_weight_beside_a_buffer_or_a_part_is_no_linear_layer():
    own, with_buffer, with_part = (HomeMade(lambda x, w: F.linear(x, w)) for _ in range(3))
    with_buffer.register_buffer("scale", torch.ones(8))
    with_part.inner = nn.Identity()
    assert view_of(own) is not None
    assert view_of(with_buffer) is None
    assert view_of(with_part) is None


def test_units_of_a_layer_norm_over_channels_and_positions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), nn.ReLU(), nn.Conv2d(4, 2, 3))
    (units,) = explore(randomised(model), (torch.randn(2, 3, 8, 8),), {}).units
    (norm,) = units.norms
    assert norm.entry.tolist() == list(range(4 * 36))
    assert norm.unit.tolist() == [unit for unit in range(4) for _ in range(36)]
