"""What reaches what, on networks whose wiring is known."""

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.layers.flow import INPUT, flow_in, normalises, run_with, trace
from lightning_plasticity.units.calls import ForwardCall


def sources(model: nn.Module, *args: Tensor) -> dict[str, set[str]]:
    return {layer.name: set(layer.sources) for layer in trace(model, args, {}).layers}


class Wired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.BatchNorm1d(4)
        self.auxiliary = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(x)
        b = self.b(a.relu().view(-1, 2, 2).transpose(1, 2).flatten(1))
        a += b  # in place
        c = self.c(torch.cat([a[:, :2], x[:, 2:]], 1))
        d = self.d(self.norm(c) * torch.zeros_like(b))  # of which only the shape is used
        outputs = [d, b.mean()]
        if self.training:
            outputs.append(self.auxiliary(c))
        return outputs


def test_names_travel_through_all_that_is_not_a_layer():
    flow = trace(Wired(), (torch.randn(3, 4),), {})
    assert {layer.name: set(layer.sources) for layer in flow.layers} == {
        "a": {INPUT},
        "b": {"a"},
        "c": {"a", "b", INPUT},
        "norm": {"c"},
        "d": {"norm"},
        "auxiliary": {"c"},
    }
    assert [layer.name for layer in flow.layers] == ["a", "b", "c", "norm", "d", "auxiliary"]
    assert [set(names) for names in flow.outputs] == [{"d"}, {"b"}, {"auxiliary"}]
    assert [name for name, module in Wired().named_modules() if normalises(module)] == ["norm"]


class NeedsTargets(Wired):
    def forward(self, x: Tensor) -> list[Tensor]:
        if self.training:
            raise KeyError("targets")
        return super().forward(x)


def test_evaluation_is_enough_where_training_wants_more():
    assert "auxiliary" not in sources(NeedsTargets(), torch.randn(3, 4))


class FunctionNobodyKnows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(FunctionNobodyKnows.apply(self.first(tokens)))


def test_custom_functions_and_tokens():
    assert sources(Odd(), torch.tensor([[1, 2]])) == {"first": set(), "second": {"first"}}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_the_parts_of_a_transformer_layer_are_seen_though_evaluation_would_skip_them():
    assert sources(Encoder(), torch.randn(2, 3, 8)) == {
        "layer.self_attn": {INPUT},
        "layer.norm1": {INPUT, "layer.self_attn"},
        "layer.linear1": {"layer.norm1"},
        "layer.linear2": {"layer.linear1"},
        "layer.norm2": {"layer.norm1", "layer.linear2"},
    }


def test_compiling_a_part_changes_no_name():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), backend="eager"))
    assert sources(model, torch.randn(3, 4)) == {"0.0": {INPUT}, "0.1": {"0.0"}}


def test_everything_is_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 4)
    random = torch.get_rng_state()
    trace(model, (x,), {})
    run_with(model, (torch.ones(3, 4),), {}, {}, training=True)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_draws_are_the_same_in_every_call():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    x = torch.ones(3, 4)
    first, second = (run_with(model, (x,), {}, {}, training=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, run_with(model, (x,), {}, {}, training=False)[0])


@pytest.mark.parametrize("training", [False, True])
def test_other_tensors_in_the_place_of_the_models(training):
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1, eps=1e-12))
    given = {"0.weight": torch.ones(1, 2), "1.running_mean": torch.tensor([3.0])}
    (output,) = run_with(model, (torch.tensor([[1.0, 1.0], [1.0, 5.0]]),), {}, given, training=training)
    torch.testing.assert_close(output, torch.tensor([[-1.0], [1.0]] if training else [[-1.0], [3.0]]))
    assert given["1.running_mean"].item() == 3.0 or training


class CastsByItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_part_is_traced_inside_autocast_where_it_is_called_there(dtype):
    with torch.autocast("cpu", dtype):
        assert sources(CastsByItself(), torch.randn(2, 4, dtype=dtype)) == {"first": {INPUT}, "second": {"first"}}


@pytest.mark.parametrize("mask", [{}, {"mask": torch.ones(2, 4)}])
@pytest.mark.parametrize("continues", [False, True])
def test_a_part_that_is_given_what_another_made_goes_on_from_it(continues: bool, mask: dict[str, Tensor]) -> None:
    class Head(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": Head(4, 2)})
    features = model["body"](torch.randn(2, 4))
    body = flow_in(ForwardCall(model["body"], "body.", (torch.randn(2, 4),), {}))
    head = flow_in(ForwardCall(model["head"], "head.", (features if continues else features.detach(),), mask))
    flow = body.then(head)
    assert (body.continues, head.continues) == (False, continues)
    assert [(layer.name, set(layer.sources)) for layer in flow.layers] == [
        ("body", {INPUT}),
        ("head", {"body" if continues else INPUT}),
    ]
    assert [set(names) for names in flow.outputs] == [{"head"}]


def test_inputs_take_the_type_of_the_weights():
    with torch.autocast("cpu", torch.bfloat16):
        (output,) = run_with(nn.Linear(2, 1), (torch.ones(1, 2, dtype=torch.bfloat16),), {}, {}, training=False)
    assert output.dtype == torch.float32
