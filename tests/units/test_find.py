import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults.test_networks import in_one_vector
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.units import __main__ as command
from lightning_plasticity.units import explore, is_examining
from lightning_plasticity.units.examining import quietly, random_states, undisturbed
from lightning_plasticity.units.find import HiddenUnits, Slots, find_units, table
from units.property_check import holds, invalid, output_change


def randomised(model: nn.Module) -> nn.Module:
    """Biases, norms and running statistics away from 0 and 1, so that nothing holds by accident."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_floating_point() and tensor.ndim == 1:
                    noise = torch.rand(tensor.shape, generator=generator)
                    tensor.copy_(noise + 0.5 if "var" in name or name == "weight" else noise - 0.5)
    return model.eval()


def by_name(found: list[HiddenUnits]) -> dict[str, HiddenUnits]:
    return {units.name: units for units in found}


def modules(slots) -> list[str]:
    return [part.module for part in slots]


class Function(nn.Module):
    """A network written as a function of its parts."""

    def __init__(self, forward, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._forward = forward

    def forward(self, *args, **kwargs):
        return self._forward(self, *args, **kwargs)


IMAGE = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
VECTOR = (torch.randn(1, 6, generator=torch.Generator().manual_seed(2)),)
TOKENS = (torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3)),)


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Dropout(), nn.Linear(7, 3))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 2), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.GELU(), nn.Flatten(),
        nn.Linear(24, 5), nn.SiLU(), nn.Linear(5, 2),
    )  # fmt: skip


def grouped_and_shuffled():
    def forward(self, x):
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.b(x)).mean((2, 3)))

    return Function(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 3, groups=2), head=nn.Linear(6, 2))


def depthwise():
    def forward(self, x):
        x = F.relu6(self.norm1(self.expand(x)))
        x = F.relu6(self.norm2(self.spatial(x)))
        return self.head(self.project(x).mean((2, 3)))

    return Function(
        forward,
        expand=nn.Conv2d(3, 8, 1, bias=False), norm1=nn.BatchNorm2d(8),
        spatial=nn.Conv2d(8, 16, 3, groups=8, bias=False), norm2=nn.BatchNorm2d(16),
        project=nn.Conv2d(16, 6, 1), head=nn.Linear(6, 2),
    )  # fmt: skip


def depthwise_on_stream():
    def forward(self, x):
        x = self.stem(x)
        for block in (self.block1, self.block2):
            x = x + block(x)
        return self.head(x.mean((2, 3)))

    def block():
        return nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1), nn.GELU(), nn.Conv2d(12, 8, 1)
        )

    return Function(forward, stem=nn.Conv2d(3, 8, 1), block1=block(), block2=block(), head=nn.Linear(8, 2))


def residual():
    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.norm1(self.conv1(x)))))
        x = F.relu(self.down(x) + self.conv4(F.relu(self.conv3(x))))
        return self.head(x.mean((2, 3)))

    return Function(
        forward,
        stem=nn.Conv2d(3, 8, 3, padding=1), conv1=nn.Conv2d(8, 8, 3, padding=1), norm1=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 8, 3, padding=1), conv3=nn.Conv2d(8, 12, 3), conv4=nn.Conv2d(12, 10, 1),
        down=nn.Conv2d(8, 10, 3), head=nn.Linear(10, 2),
    )  # fmt: skip


def concatenated_and_split():
    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).tanh()
        left, right = torch.cat([a, b], 1).split([10, 4], 1)
        return self.c(left).relu() @ self.mix + self.d(right)

    model = Function(forward, a=nn.Linear(6, 8), b=nn.Linear(6, 6), c=nn.Linear(10, 5), d=nn.Linear(4, 3))
    model.mix = nn.Parameter(torch.randn(5, 3))
    return model


def squeeze_and_excite():
    def forward(self, x):
        x = F.silu(self.norm(self.conv(x)))
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        return self.head(self.out(x * gate.sigmoid()).mean((2, 3)))

    return Function(
        forward,
        conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1),
        out=nn.Conv2d(8, 6, 1), head=nn.Linear(6, 2),
    )  # fmt: skip


def swiglu_of_two():
    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.out(F.silu(self.value(x)) * self.gate(x)))

    return Function(
        forward,
        stem=nn.Linear(6, 6), value=nn.Linear(6, 8), gate=nn.Linear(6, 8), out=nn.Linear(8, 6), head=nn.Linear(6, 2),
    )  # fmt: skip


def geglu_of_one():
    def forward(self, x):
        value, gate = self.both(x).chunk(2, -1)
        return self.out(value * F.gelu(gate))

    return Function(forward, both=nn.Linear(6, 16), out=nn.Linear(8, 3))


def glu_module():
    return nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, 3))


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))


def several_consumers():
    def forward(self, x):
        hidden = F.elu(self.shared(x))
        return {"class": self.first(hidden), "box": [self.second(hidden)]}

    return Function(forward, shared=nn.Linear(6, 8), first=nn.Linear(8, 3), second=nn.Linear(8, 4))


def group_norm():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    )


def one_and_three_dimensions():
    def forward(self, x):
        x = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return self.e(F.relu(self.d(x.unsqueeze(2).unsqueeze(2))).flatten(1))

    return Function(
        forward,
        a=nn.Conv1d(2, 6, 3), b=nn.Conv1d(6, 4, 3), c=nn.Conv1d(4, 4, 1), d=nn.Conv3d(4, 5, 1), e=nn.Linear(20, 2),
    )  # fmt: skip


def one_token_of_a_stream():
    """A norm sees the units of ``last`` at the first position, and those of a stream at the others."""

    def forward(self, x):
        stream = self.embed(x)
        stream = stream + self.block(stream)
        x = torch.cat([self.last(stream[:, :1]), stream[:, 1:]], 1)
        return self.head(self.norm(x)[:, 0])

    return Function(
        forward,
        embed=nn.Linear(8, 8), block=nn.Linear(8, 8), last=nn.Linear(8, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, 3),
    )  # fmt: skip


class RmsNormAct(nn.Module):
    """A norm written in Python, with its activation inside."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.act = nn.GELU()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        return self.act(x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight)


def norm_with_activation():
    return nn.Sequential(nn.Linear(6, 8), RmsNormAct(8), nn.Linear(8, 3))


NETWORKS = {
    "norm_with_activation": (norm_with_activation, VECTOR, {"0"}),
    "one_token_of_a_stream": (one_token_of_a_stream, TOKENS, {"last"}),
    "mlp": (mlp, VECTOR, {"0", "2"}),
    "convolutional": (convolutional, IMAGE, {"0", "4", "8"}),
    "grouped_and_shuffled": (grouped_and_shuffled, IMAGE, {"a", "b"}),
    "depthwise": (depthwise, IMAGE, {"expand", "project"}),
    "depthwise_on_stream": (depthwise_on_stream, IMAGE, {f"block{b}.{i}" for b in (1, 2) for i in (0, 1)}),
    "residual": (residual, IMAGE, {"conv1", "conv3"}),
    "concatenated_and_split": (concatenated_and_split, VECTOR, {"a", "b:0", "b:1"}),
    "squeeze_and_excite": (squeeze_and_excite, IMAGE, {"conv", "down", "out"}),
    "swiglu_of_two": (swiglu_of_two, VECTOR, {"value"}),
    "geglu_of_one": (geglu_of_one, VECTOR, {"both"}),
    "glu_module": (glu_module, VECTOR, {"0"}),
    "transformer": (
        transformer,
        TOKENS,
        {f"0.layers.{i}.{name}" for i in (0, 1) for name in ("linear1", "self_attn.v_proj")},
    ),
    "several_consumers": (several_consumers, VECTOR, {"shared"}),
    "group_norm": (group_norm, IMAGE, {"0", "3"}),
    "one_and_three_dimensions": (
        one_and_three_dimensions,
        (torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(4)),),
        {"a", "b", "c", "d"},
    ),
}


@pytest.mark.parametrize("parameters", [lambda model: model, in_one_vector], ids=["", "in one vector"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_set_has_the_property_and_the_right_ones_are_found(name, parameters):
    torch.manual_seed(0)
    build, inputs, expected = NETWORKS[name]
    model = parameters(randomised(build()))
    found = find_units(model, *inputs)
    assert {units.name for units in found} == expected
    assert invalid(model, inputs, found) == []


def test_the_property_check_can_fail():
    torch.manual_seed(0)
    model = randomised(mlp())
    first, second = find_units(model, *VECTOR)
    columns = first.consumers[0]
    wrong = HiddenUnits(
        "2", 7, second.producers, (), (Slots("2", columns.entry[:7], columns.unit[:7]),), "tanh", exact=True
    )
    assert not holds(model, VECTOR, wrong)
    shuffled = Slots("2", first.consumers[0].entry, first.consumers[0].unit.roll(1))
    wrong = HiddenUnits("0", first.size, first.producers, (), (shuffled,), "relu", exact=True)
    assert not holds(model, VECTOR, wrong)


def test_a_mixing_norm_makes_a_set_inexact_and_is_alone_to_blame():
    torch.manual_seed(0)
    model = randomised(group_norm())
    found = by_name(find_units(model, *IMAGE))
    assert not found["0"].exact
    assert found["3"].exact
    assert output_change(model, IMAGE, [found["0"]]) > 0
    assert holds(model, IMAGE, found["0"])


def test_a_mixing_norm_that_others_pass_too_makes_a_set_inexact():
    (last,) = find_units(randomised(one_token_of_a_stream()), *TOKENS)
    assert not last.exact


def test_only_the_units_that_pass_a_mixing_norm_are_inexact():
    def forward(s, x):
        return s.stream(x) + s.head(F.relu(s.normed(s.apart(x[:, 0])))).unsqueeze(1)

    model = Function(
        forward, stream=one_token_of_a_stream(), apart=nn.Linear(8, 6), normed=nn.BatchNorm1d(6), head=nn.Linear(6, 3)
    )
    found = find_units(randomised(model), *TOKENS)
    assert {units.name: units.exact for units in found} == {"stream.last": False, "apart": True}
    assert invalid(model, TOKENS, found) == []


def test_units_that_are_heard_where_no_norm_mixes_are_none():
    def forward(s, x):
        hidden = F.relu(s.normed(s.first(x)))
        return s.second(hidden) + s.third(hidden.nansum(-1, keepdim=True))

    model = Function(
        forward, first=nn.Linear(6, 8), normed=nn.BatchNorm1d(8), second=nn.Linear(8, 2), third=nn.Linear(1, 2)
    )
    assert find_units(randomised(model), *VECTOR) == []


def test_units_before_a_norm_that_refuses_nan():
    class CheckedNorm(RmsNormAct):
        def forward(self, x):
            if x.isnan().any():
                raise ValueError("not a number")
            return super().forward(x)

    (units,) = find_units(randomised(nn.Sequential(nn.Linear(6, 8), CheckedNorm(8), nn.Linear(8, 3))), *VECTOR)
    assert (units.size, units.exact, modules(units.consumers)) == (8, False, ["2"])


def test_a_norm_that_holds_its_activation():
    (units,) = find_units(randomised(norm_with_activation()), *VECTOR)
    assert (units.exact, units.activation, modules(units.norms)) == (False, "gelu", ["1"])


def test_slots_of_flatten_norm_and_depthwise():
    found = by_name(find_units(randomised(convolutional()), *IMAGE))
    flat = found["4"].consumers[0]
    assert flat.module == "8"
    assert flat.unit.tolist() == [unit for unit in range(6) for _ in range(4)]
    assert flat.entry.tolist() == list(range(24))
    assert modules(found["0"].norms) == ["1"]
    assert [found[name].activation for name in ("0", "4", "8")] == ["leaky_relu", "gelu", "silu"]
    assert all(units.exact for units in found.values())  # a norm of each channel by itself mixes none

    expand = by_name(find_units(randomised(depthwise()), *IMAGE))["expand"]
    assert modules(expand.producers) == ["expand", "spatial"]
    assert modules(expand.norms) == ["norm1", "norm2"]
    assert modules(expand.consumers) == ["project"]
    assert expand.consumers[0].unit.tolist() == [unit for unit in range(8) for _ in range(2)]
    assert expand.activation == "relu6"


def test_slots_of_gates():
    gated = by_name(find_units(randomised(squeeze_and_excite()), *IMAGE))["conv"]
    assert modules(gated.producers) == ["conv", "up"]
    assert modules(gated.consumers) == ["down", "out"]
    assert gated.activation == "silu"
    (both,) = find_units(randomised(geglu_of_one()), *VECTOR)
    assert both.producers[0].entry.tolist() == list(range(8))
    assert both.producers[1].entry.tolist() == list(range(8, 16))
    assert both.producers[1].unit.tolist() == list(range(8))
    assert both.activation == "gelu"


def test_channels_that_are_wired_differently_are_sets_of_their_own():
    found = by_name(find_units(randomised(concatenated_and_split()), *VECTOR))
    assert found["b:0"].producers[0].entry.tolist() == [0, 1]
    assert found["b:0"].consumers[0].entry.tolist() == [8, 9]
    assert found["b:1"].producers[0].entry.tolist() == [2, 3, 4, 5]
    assert modules(found["b:1"].consumers) == ["d"]


def two_layers(forward, width=8):
    return lambda: Function(forward, a=nn.Linear(6, width), b=nn.Linear(width, 2))


def two_towers():
    """Two layers feed the same columns of a third, in two calls of it."""
    return Function(
        lambda s, x: s.c(F.relu(s.a(x))) + s.c(F.relu(s.b(x))),
        a=nn.Linear(6, 8), b=nn.Linear(6, 8), c=nn.Linear(8, 2),
    )  # fmt: skip


def bilinear():
    return Function(lambda s, x: s.b(s.a(x), x), a=nn.Linear(8, 8), b=nn.Bilinear(8, 8, 4))


def weight_normalised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("build", "inputs", "layer", "reason"),
    [
        (mlp, VECTOR, "5", "output"),
        (residual, IMAGE, "conv2", "residual stream"),
        (residual, IMAGE, "stem", "residual stream"),
        (bilinear, TOKENS, "a", "Bilinear"),
        (weight_normalised, VECTOR, "0", "computed"),
        (two_layers(lambda s, x: s.b(s.a(x) @ torch.ones(8, 8))), VECTOR, "a", "mixed"),
        (two_layers(lambda s, x: s.b((s.a(x) > 0).float())), VECTOR, "a", "decision"),
        (two_towers, VECTOR, "a", "'c' uses them in 2 calls"),
        (two_layers(lambda s, x: s.b(x), width=6), VECTOR, "a", "not called"),
        (two_layers(lambda s, x: s.b(s.a(x)) + s.a.weight.sum()), VECTOR, "a", "also used outside"),
        (two_layers(lambda s, x: s.b(s.a(x) + s.a.weight.sum())), VECTOR, "a", "also used outside"),
    ],
)
@pytest.mark.parametrize("parameters", [lambda model: model, in_one_vector], ids=["", "in one vector"])
def test_each_layer_left_out_has_a_reason(build, inputs, layer, reason, parameters, capsys):
    model = parameters(randomised(build()))
    found = find_units(model, *inputs, explain=True)
    assert layer not in by_name(found)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [layer])
    assert reason in line


def test_shared_weights_are_left_out_with_the_other_owner_named(capsys):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    assert find_units(model, *VECTOR, explain=True) == []
    assert "shares its weight with 2.weight" in capsys.readouterr().out


def test_a_standardised_weight_is_no_consumer():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = (self.weight - self.weight.mean()) / self.weight.std()
            return F.conv2d(x, weight, self.bias)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Standardised(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert find_units(randomised(model), *IMAGE) == []


def test_auxiliary_heads_of_training_count_as_consumers():
    def forward(self, x):
        hidden = F.relu(self.a(x))
        return (self.b(hidden), self.aux(hidden)) if self.training else self.b(hidden)

    model = Function(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 2), aux=nn.Linear(8, 2))
    (units,) = find_units(model.eval(), *VECTOR)
    assert modules(units.consumers) == ["b", "aux"]


def test_inputs_and_outputs_of_many_kinds():
    class Batch(dict):
        pass

    def forward(self, batch, *, scale=1.0):
        hidden = F.relu(self.a(batch["x"]) + self.c(batch["y"][0])) * scale
        return (Batch(logits=self.b(hidden)), 3, None)

    model = Function(forward, a=nn.Linear(6, 8, bias=False), b=nn.Linear(8, 2), c=nn.Linear(6, 8))
    assert find_units(model, {"x": VECTOR[0], "y": [VECTOR[0]]}) == []  # a and c are added
    single = Function(lambda s, batch: Batch(y=s.b(F.relu(s.a(batch["x"])))), a=nn.Linear(6, 8), b=nn.Linear(8, 2))
    assert by_name(find_units(single, {"x": VECTOR[0]})).keys() == {"a"}


def test_inputs_by_name():
    model = Function(lambda s, x, *, scale: s.b(F.relu(s.a(x))) * scale, a=nn.Linear(6, 8), b=nn.Linear(8, 2))
    assert by_name(find_units(model, x=VECTOR[0], scale=2.0)).keys() == {"a"}
    assert by_name(find_units(model, *VECTOR, scale=2.0)).keys() == {"a"}


def test_lightning_module_and_compiled_module():
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)

    assert {units.name for units in find_units(Module(), *VECTOR)} == {"net.0", "net.2"}
    compiled = torch.compile(mlp(), backend="eager")
    assert {units.name for units in find_units(compiled, *VECTOR)} == {"0", "2"}
    inner = nn.Sequential(torch.compile(nn.Linear(6, 9), backend="eager"), nn.ReLU(), nn.Linear(9, 6))
    nested = nn.Sequential(torch.compile(inner, backend="eager"), torch.compile(mlp(), backend="eager"))
    found = find_units(nested, *VECTOR)
    assert {units.name for units in found} == {"0.0", "0.2", "1.0", "1.2"}
    assert modules(found[0].consumers) == ["0.2"]
    assert isinstance(nested.get_submodule("0.0"), nn.Module)
    assert nested.get_submodule("0.2").weight is inner[2].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model, inputs = randomised(convolutional()).to(dtype), tuple(x.to(dtype) for x in IMAGE)
    found = find_units(model, *inputs)
    assert {units.name for units in found} == {"0", "4", "8"}
    assert invalid(model, inputs, found) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "convolutional", "squeeze_and_excite", "swiglu_of_two", "transformer"])
def test_a_part_is_probed_inside_autocast_where_it_is_called_there(name, dtype):
    build, inputs, expected = NETWORKS[name]
    model = randomised(build())
    with torch.autocast("cpu", dtype):
        found = find_units(model, *(x.to(dtype) for x in inputs))
    assert {units.name for units in found} == expected
    assert invalid(model, inputs, found) == []


def test_probing_inside_autocast_leaves_no_cast_of_a_weight():
    model = mlp().eval()

    def gradients(examines: bool) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            before = model[0](VECTOR[0])  # its weight's cast is kept already
            if examines:
                find_units(model, VECTOR[0].bfloat16())
            (model(VECTOR[0]).sum() + before.sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    def casts_kept() -> bool:
        return torch.is_autocast_cache_enabled()

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)
    heard = []
    model[0].register_forward_hook(lambda *_: heard.append(casts_kept()))
    find_units(model, *VECTOR)
    assert not any(heard)
    assert casts_kept()


def test_channels_last_and_batches():
    model = randomised(residual()).to(memory_format=torch.channels_last)
    inputs = (torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last),)
    found = find_units(model, *inputs)
    assert {units.name for units in found} == {"conv1", "conv3"}
    assert invalid(model, inputs, found) == []


def test_the_model_is_as_it_was():
    torch.manual_seed(0)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("unset", torch.full((2,), torch.nan))

        def forward(self, x):
            self.calls += 1
            np.random.rand()
            random.random()
            return x + 0 * torch.rand_like(x)

    model = nn.Sequential(convolutional(), Counting())
    model[0].train()
    model[0][1].eval()
    model[0][0].register_forward_hook(lambda *_: None)
    model[0][0].weight.requires_grad_(False)
    model[0](torch.randn(4, 3, 8, 8)).sum().backward()

    def state():
        return {
            "parameters": {n: (id(p), p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()},
            "values": {n: t.clone() for n, t in model.state_dict().items()},
            "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
            "training": [m.training for m in model.modules()],
            "hooks": [
                (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
            ],
            "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]],
            "fast_path": torch.backends.mha.get_fastpath_enabled(),
            "grad": torch.is_grad_enabled(),
        }

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_units(model, *IMAGE)
    torch.testing.assert_close(state(), before, rtol=0, atol=0, equal_nan=True)


def test_hooks_can_tell_that_a_network_is_being_examined():
    model, heard = mlp(), []
    model[0].register_forward_hook(lambda *_: heard.append(is_examining()))
    find_units(model, *VECTOR)
    assert heard
    assert all(heard)
    with undisturbed(model), undisturbed(model[0]):
        assert is_examining()
    model(*VECTOR)
    with pytest.raises(KeyError), undisturbed(model):
        raise KeyError
    model(*VECTOR)
    assert heard[-2:] == [False, False]


def test_quietly_all_parts_of_a_transformer_layer_are_called(monkeypatch):
    layer, called = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), []
    monkeypatch.setattr(layer.linear1, "forward", lambda x: called.append(x) or x.new_zeros(*x.shape[:-1], 16))
    with torch.no_grad():
        layer(*TOKENS)
    assert not called  # otherwise one function computes them all
    with quietly():
        layer(*TOKENS)
    assert len(called) == 1


def test_random_states_of_accelerators_are_put_back_each_where_it_was(monkeypatch):
    states = {("cuda", 0): 10, ("cuda", 1): 11, ("mps",): 12}

    def of(device):
        def place(index):
            return device.type, *(x.index for x in index)

        return SimpleNamespace(
            get_rng_state=lambda *index: states[place(index)],
            set_rng_state=lambda state, *index: states.update({place(index): state}),
        )

    monkeypatch.setattr(torch, "get_device_module", of)
    kinds = ("cpu", "meta", "cuda:0", "cuda:1", "mps", "cuda:1")
    parameters = [SimpleNamespace(device=torch.device(kind)) for kind in kinds]
    put_back = random_states(SimpleNamespace(parameters=lambda: parameters, modules=lambda: []))
    before = dict(states)
    states.update(dict.fromkeys(states, 0))
    put_back()
    assert states == before


def test_a_layer_that_is_the_whole_network_has_no_name(capsys):
    shared = nn.Linear(6, 6)
    shared.again = nn.Linear(6, 6)
    shared.again.weight = shared.weight
    assert find_units(shared, *VECTOR, explain=True) == []
    assert explore(nn.Linear(6, 2), VECTOR, {}).left_out == {"": "its units reach the network's output"}
    assert "shares its weight with again.weight" in capsys.readouterr().out


def test_time_grows_with_the_logarithm_of_the_channels():
    def runs(width):
        model = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)), nn.Linear(width, 2)
        )
        return explore(model, (torch.zeros(1, width),), {}, explain=False).runs

    narrow, wide = runs(8), runs(8 * 64)
    assert wide <= narrow + 8  # 64 times the channels: six more bits, and a few for equal numbers of ones


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(6, 2), (torch.full((1, 6), torch.nan),), "NaN for the example"),
        (nn.LazyLinear(3), VECTOR, "lazy module"),
        (nn.Linear(6, 2, device="meta"), VECTOR, "meta device"),
        (nn.Linear(5, 2), VECTOR, "does not run on the example"),
    ],
)
def test_what_cannot_be_probed_is_refused(model, inputs, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about lazy modules
        with pytest.raises(ValueError, match=message):
            find_units(model, *inputs)


def test_flat_parameters_are_refused():
    model = mlp()
    model[0].weight._is_flat_param = True
    with pytest.raises(ValueError, match=r"keep their shapes, but '0.weight' is sharded .* shard it by FSDP2"):
        find_units(model, *VECTOR)


def test_a_torchscript_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(mlp().eval(), VECTOR)
    with pytest.raises(ValueError, match="TorchScript"):
        find_units(scripted, *VECTOR)


def test_the_table_is_printed(capsys):
    def forward(s, x):
        x = s.stem(x)
        hidden = s.norm(F.relu(s.first(x)) * s.gate(x))
        return s.last(x + s.on_the_stream(hidden)) + s.other(hidden)

    model = Function(
        forward, stem=nn.Linear(6, 6), first=nn.Linear(6, 12), gate=nn.Linear(6, 12), norm=nn.LayerNorm(12),
        on_the_stream=nn.Linear(12, 6), last=nn.Linear(6, 2), other=nn.Linear(12, 2),
    )  # fmt: skip
    find_units(randomised(model), *VECTOR, explain=True)
    assert capsys.readouterr().out == (
        "layer  units  with  norms  used by               activation  exact\n"
        "first  12     gate  norm   on_the_stream, other  relu        no\n"
        "\n"
        "left out:\n"
        "  stem           its units are added to those of other layers before 'last' uses them (a residual stream)\n"
        "  on_the_stream  its units are added to those of other layers before 'last' uses them (a residual stream)\n"
        "  last           its units reach the network's output\n"
        "  other          its units reach the network's output\n"
        "\n"
        "288 of 352 parameters belong to units (81 %).\n"
        "2 layers are left out because of a residual stream: 48 parameters (13 %) belong to no units because of it.\n"
    )
    find_units(nn.Sequential(nn.Linear(6, 8), nn.Flatten(), nn.Linear(8, 2)), *VECTOR)
    assert capsys.readouterr().out == ""
    assert table(explore(nn.Identity(), VECTOR, {})) == "layer  units  with  norms  used by  activation  exact"


def test_the_table_of_a_named_model(capsys):
    pytest.importorskip("torchvision", reason="needs torchvision: pip install lightning-plasticity[vision]")
    command.main(["resnet18", "--size", "64"])
    out = capsys.readouterr().out
    assert "layer1.0.conv1" in out
    assert "residual stream" in out
    with pytest.raises(SystemExit, match="model name"):
        command.main(["no_such_model"])
