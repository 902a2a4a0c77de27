"""Every edit against a slow reference that walks over single entries: layers, layouts, types, optimizers at random."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_plasticity.editing.editable import check_editable
from lightning_plasticity.editing.edits import Editor, OptimizerState
from lightning_plasticity.editing.optimizer_reset import reset_optimizer

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, 0.1, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.5),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.5, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.1, t0=1),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.1),
}
STARTS = {("Adagrad", "sum"): 0.5, ("Rprop", "step_size"): 0.1}
COUNTS = {"step": 0.0, "mu_product": 1.0, "eta": 0.1, "mu": 1.0}
SIZES = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum"}
MODES = ["survivors", "reset", "keep"]
EXACT = {"rtol": 0.0, "atol": 0.0}
TOLERANCE = {"survivors": {"rtol": 0.01, "atol": 1e-7}, "reset": EXACT, "keep": EXACT}  # a mean is rounded to bfloat16
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "transposed", "part of a buffer"]


def lay_out(parameter: nn.Parameter, layout: str) -> None:
    data = parameter.data
    if layout == "channels_last" and data.dim() in (4, 5):
        parameter.data = data.to(memory_format=torch.channels_last if data.dim() == 4 else torch.channels_last_3d)
    elif layout == "transposed" and data.dim() >= 2:
        parameter.data = data.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "part of a buffer":
        buffer = torch.full((data.numel() + 2,), 7.0, dtype=data.dtype)
        parameter.data = buffer[1:-1].view(data.shape).copy_(data)


def train(model: nn.Module, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Any:
    """Three real steps with random gradients, so that all optimizer state exists and is in use."""
    optimizer = make_optimizer(list(model.parameters()))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape).to(parameter)
        optimizer.step()
    return optimizer


class Reference:
    """What everything was before an edit, and what the edit may change in it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, mode: str = "reset") -> None:
        self.mode = mode
        self.model, self.optimizer = model, optimizer
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.before = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.places = {name: (id(t), t.data_ptr(), t.stride()) for name, t in self.tensors.items()}
        self.states_before = {id(p): copy.deepcopy(state) for p, state in optimizer.state.items()}
        self.random_state = torch.get_rng_state()

    def check(self, written: dict[str, dict[tuple[int, ...], float]], whole: Sequence[str] = ()) -> None:
        """``written``: for each tensor's name, the entries that must have changed, and to what; ``whole``: all are."""
        assert torch.equal(self.random_state, torch.get_rng_state())
        assert {id(p) for p in self.optimizer.state} == set(self.states_before)
        for name, tensor in self.tensors.items():
            assert (id(tensor), tensor.data_ptr(), tensor.stride()) == self.places[name]
            expected = self.before[name].clone()
            for entry, value in written.get(name, {}).items():
                expected[entry] = value
            assert torch.equal(tensor.detach(), expected), name
            for key, state in self.optimizer.state.get(tensor, {}).items():
                before = self.states_before[id(tensor)].get(key, torch.full_like(state, math.inf))  # ages are new
                if isinstance(before, Tensor) and before.shape == tensor.shape and before.dim() > 0:
                    before = self.expected_state(key, before, expected, list(written.get(name, {})), name in whole)
                elif name in whole and key in COUNTS:
                    before = COUNTS[key]
                got, before = torch.as_tensor(state), torch.as_tensor(before, dtype=torch.as_tensor(state).dtype)
                torch.testing.assert_close(got, before, **TOLERANCE[self.mode], msg=f"{name} {key}: {got}, {before}")

    def expected_state(
        self, key: str, before: Tensor, weight: Tensor, renewed: list[tuple[int, ...]], whole: bool
    ) -> Tensor:
        if self.mode == "keep" or not renewed:
            return before
        start = STARTS.get((type(self.optimizer).__name__, key), 0.0)
        if self.mode == "survivors" and key in SIZES and not whole:
            survivors = [before[entry].item() for entry in entries(before.shape) if entry not in renewed]
            start = math.fsum(survivors) / len(survivors) if survivors else before.double().mean().item()
        after = before.clone()
        for entry in renewed:
            after[entry] = weight[entry] if key == "ax" else start
        return after


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    transposed = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    kind = draw(st.sampled_from([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed]))
    bias = draw(st.booleans())
    groups = 1 if kind in (nn.Linear, *transposed) else draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    if kind is nn.Linear:
        layer: nn.Module = nn.Linear(inputs, outputs, bias=bias)
    else:
        layer = kind(inputs, outputs, draw(st.integers(1, 2)), groups=groups, bias=bias)
    layer.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(LAYOUTS))
    for parameter in layer.parameters():
        lay_out(parameter, layout)
    return layer


def some_of(data: st.DataObject, size: int) -> Tensor:
    chosen = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size))
    return torch.tensor(chosen, dtype=torch.int64)


def entries(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for size in shape:
        found = [(*entry, i) for entry in found for i in range(size)]
    return found


def is_transposed(layer: Any) -> bool:
    return isinstance(layer, nn.modules.conv._ConvTransposeNd)


def outputs_first(layer: Any, entry: tuple[int, ...]) -> tuple[int, ...]:
    """An entry of a layer's weight with the output before the input, or the other way round."""
    return (entry[1], entry[0], *entry[2:]) if is_transposed(layer) else entry


def inputs_of(layer: Any, entry: tuple[int, ...]) -> int:
    """The input column that a weight's entry multiplies."""
    if is_transposed(layer):
        return entry[0]
    groups = getattr(layer, "groups", 1)
    outputs, width = layer.weight.shape[:2]
    return entry[0] // (outputs // groups) * width + entry[1]


@settings(max_examples=400, deadline=None)
@given(layer=layers(), name=st.sampled_from(sorted(OPTIMIZERS)), mode=st.sampled_from(MODES), data=st.data())
def test_edits_of_rows_and_columns(layer: Any, name: str, mode: Any, data: st.DataObject) -> None:
    edit = data.draw(st.sampled_from(["redraw_rows", "scale_rows", "zero_bias", "zero_columns", "shift_bias"]))
    model = nn.Sequential(nn.Identity(), layer)
    optimizer = train(model, OPTIMIZERS[name])
    weight, bias = layer.weight, layer.bias
    if edit == "shift_bias":
        # Small whole numbers, which every dtype adds without rounding in any order.
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randint(-2, 3, parameter.shape))
    reference = Reference(model, optimizer, "keep" if edit == "shift_bias" else mode)
    editor = Editor(model, [optimizer], mode)
    written: dict[str, dict[tuple[int, ...], float]] = {"1.weight": {}, "1.bias": {}}
    columns_count = weight.shape[1] * getattr(layer, "groups", 1)
    if is_transposed(layer):
        columns_count = len(weight)
    rows = weight.shape[1:2] + weight.shape[:1] + weight.shape[2:] if is_transposed(layer) else weight.shape
    chosen = some_of(data, columns_count if edit in ("zero_columns", "shift_bias") else rows[0])

    if edit == "redraw_rows":
        values = torch.arange(len(chosen) * math.prod(rows[1:]), dtype=torch.float64).view(len(chosen), *rows[1:])
        editor.redraw_rows("1", chosen, values)
        for k, row in enumerate(chosen.tolist()):
            for rest in entries(rows[1:]):
                written["1.weight"][outputs_first(layer, (row, *rest))] = values[(k, *rest)].item()
            if bias is not None:
                written["1.bias"][(row,)] = 0.0
    elif edit == "scale_rows":
        editor.scale_rows("1", chosen, -0.25)
        for row in chosen.tolist():
            for rest in entries(rows[1:]):
                place = outputs_first(layer, (row, *rest))
                written["1.weight"][place] = (reference.before["1.weight"][place] * -0.25).item()
            if bias is not None:
                written["1.bias"][(row,)] = (reference.before["1.bias"][row] * -0.25).item()
    elif edit == "zero_bias":
        editor.zero_bias("1", chosen)
        if bias is not None:
            written["1.bias"] = {(row,): 0.0 for row in chosen.tolist()}
    elif edit == "zero_columns":
        editor.zero_columns("1", chosen)
        for entry in entries(weight.shape):
            if inputs_of(layer, entry) in chosen.tolist():
                written["1.weight"][entry] = 0.0
    else:
        amounts = torch.randint(-2, 3, (len(chosen),)).to(weight.dtype)
        reference.random_state = torch.get_rng_state()
        editor.shift_bias("1", chosen, amounts)
        amount_of = dict(zip(chosen.tolist(), amounts.tolist(), strict=True))
        for entry in entries(weight.shape) if bias is not None else []:
            if inputs_of(layer, entry) in amount_of:
                row = outputs_first(layer, entry)[0]
                old = written["1.bias"].get((row,), reference.before["1.bias"][row].item())
                product = amount_of[inputs_of(layer, entry)] * reference.before["1.weight"][entry].item()
                written["1.bias"][(row,)] = old + product
    reference.check(written)


def test_compensation_in_a_transposed_convolution_with_a_stride() -> None:
    """What constant inputs give is kept on average over positions, away from the border."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1)
    x = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 6, 6)
    before = layer(x)[..., 2:-2, 2:-2].mean((2, 3))
    editor, columns = Editor(layer), torch.tensor([0, 2])
    editor.shift_bias("", columns, torch.tensor([1.0, 0.5]))
    editor.zero_columns("", columns)
    torch.testing.assert_close(layer(x)[..., 2:-2, 2:-2].mean((2, 3)), before)


@pytest.mark.parametrize("weight_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias_type", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("amount", [math.nan, math.inf, -math.inf])
def test_a_shift_that_is_not_finite_leaves_its_bias_alone(
    weight_type: torch.dtype, bias_type: torch.dtype, amount: float
) -> None:
    layer = nn.Linear(2, 3)
    layer.weight.data = torch.tensor([[1.0, 2.0], [amount, 2.0], [-3.0, 0.5]], dtype=weight_type)
    layer.bias.data = torch.tensor([0.5, 1.5, -1.0], dtype=bias_type)
    place = layer.bias.data_ptr()
    Editor(layer).shift_bias("", torch.tensor([0, 1]), torch.tensor([2.0, 4.0], dtype=weight_type))
    assert layer.bias.tolist() == [10.5, 1.5, -5.0]
    assert (layer.bias.dtype, layer.bias.data_ptr()) == (bias_type, place)


class ShiftedNorm(nn.Module):
    """A norm of somebody else's: its weight starts at 0 and has axes to broadcast; one scalar serves all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.temperature = nn.Parameter(torch.tensor([3.0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        torch.rand(1)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch without affine": lambda: nn.BatchNorm1d(4, affine=False),
    "batch without statistics": lambda: nn.BatchNorm3d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer": lambda: nn.LayerNorm(4),
    "layer without bias": lambda: nn.LayerNorm((2, 3), bias=False),
    "layer over three axes": lambda: nn.LayerNorm((2, 3, 2)),
    "group": lambda: nn.GroupNorm(2, 4),
    "RMS": lambda: nn.RMSNorm((2, 2)),
    "another": lambda: ShiftedNorm(4),
    "nothing to write": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "nothing to write or to reset": nn.Identity,
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(NORMS)),
    name=st.sampled_from(sorted(OPTIMIZERS)),
    mode=st.sampled_from(MODES),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_reset_norm(kind: str, name: str, mode: Any, layout: str, dtype: torch.dtype, data: st.DataObject) -> None:
    norm = NORMS[kind]().to(dtype)
    model = nn.ModuleDict({"norm": norm, "other": nn.Linear(2, 2)})
    for parameter in norm.parameters():
        lay_out(parameter, layout)
    optimizer = train(model, OPTIMIZERS[name])
    for buffer in norm.buffers():
        buffer.copy_(torch.full(buffer.shape, 5.0))
    reference = Reference(model, optimizer, mode)
    size = max((t.numel() for t in [*norm.parameters(), *norm.buffers()]), default=1)
    chosen = some_of(data, size)
    editor = Editor(model, [optimizer], mode)
    if mode != "survivors":  # where all are chosen, the mean of all would be another after this
        editor.reset_norm("norm", chosen[:1])
    editor.reset_norm("norm", chosen)

    weight_starts_at = 0.0 if kind == "another" else 1.0
    starts = {"weight": weight_starts_at, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    written: dict[str, dict[tuple[int, ...], float]] = {}
    for tensor_name, start in starts.items():
        tensor = getattr(norm, tensor_name, None)
        if tensor is not None:
            places = entries(tensor.shape)
            written[f"norm.{tensor_name}"] = {places[k]: start for k in chosen.tolist()}
    reference.check(written)


@settings(max_examples=200, deadline=None)
@given(
    layer=layers(),
    name=st.sampled_from(sorted(OPTIMIZERS)),
    form=st.sampled_from(["one value", "all values", "packed"]),
    mode=st.sampled_from(MODES),
    data=st.data(),
)
def test_masked_edits(layer: Any, name: str, form: str, mode: Any, data: st.DataObject) -> None:
    optimizer = train(layer, OPTIMIZERS[name])
    reference = Reference(layer, optimizer, mode)
    places = entries(layer.weight.shape)
    chosen = [places[k] for k in some_of(data, len(places)).tolist()]
    mask = torch.zeros(layer.weight.shape, dtype=torch.bool)
    values = torch.arange(len(places), dtype=torch.float64).view(layer.weight.shape)
    for place in chosen:
        mask[place] = True
    editor = Editor(layer, [optimizer], mode)
    if form == "packed":
        editor.write_packed(layer.weight, mask, values[mask])
    else:
        editor.write_masked(layer.weight, mask, torch.tensor(3.0) if form == "one value" else values)
    reference.check({"weight": {place: 3.0 if form == "one value" else values[place].item() for place in chosen}})


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["survivors", "reset"])
def test_edits_of_whole_tensors(name: str, dtype: torch.dtype, mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, groups=1), nn.BatchNorm2d(3), nn.Linear(3, 2)).to(dtype)
    model[0].to(memory_format=torch.channels_last)
    optimizer = train(model, OPTIMIZERS[name])
    editor = Editor(model, [optimizer], mode)
    edited = {"0.weight": model[0].weight, "2.bias": model[2].bias, "1.running_var": model[1].running_var}
    factors = torch.tensor([0.5, -2.0, 3.0])
    news = [torch.ones_like(tensor) for tensor in edited.values()]
    edits: list[tuple[Callable[[], None], Callable[[Tensor, Tensor], Tensor]]] = [
        (lambda: editor.scale(list(edited.values()), factors), lambda old, factor: old * factor),
        (lambda: editor.scale(list(edited.values()), -0.25), lambda old, _: old * -0.25),
        (lambda: editor.add(list(edited.values()), news, -0.25), lambda old, _: old - 0.25),
        (lambda: editor.write(list(edited.values()), news), lambda old, _: torch.ones_like(old)),
    ]
    for apply, expected in edits:
        train_on(model, optimizer)
        reference = Reference(model, optimizer, mode)
        apply()
        reference.check(
            {
                tensor_name: {
                    place: expected(reference.before[tensor_name][place], factor).item()
                    for place in entries(tensor.shape)
                }
                for (tensor_name, tensor), factor in zip(edited.items(), factors, strict=True)
            },
            whole=list(edited),
        )


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter)
    optimizer.step()


def test_clamp_keeps_optimizer_state() -> None:
    layer = nn.Linear(3, 2)
    optimizer = train(layer, OPTIMIZERS["Adam"])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-3.0, 0.5, 3.0], [2.0, -2.0, 0.0]]))
    states = copy.deepcopy(optimizer.state_dict()["state"])
    Editor(layer, [optimizer]).clamp([layer.weight, layer.bias], 2.0)
    assert layer.weight.tolist() == [[-2.0, 0.5, 2.0], [2.0, -2.0, 0.0]]
    torch.testing.assert_close(optimizer.state_dict()["state"], states, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon yet")
def test_several_optimizers_and_parameters_in_none() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    muon = torch.optim.Muon([model[0].weight], 0.1)
    adam = torch.optim.Adam([model[0].bias, model[1].weight], 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    muon.step()
    adam.step()
    editor = Editor(model, iter([muon, adam]), "reset")
    editor.redraw_rows("0", torch.tensor([1]), torch.ones(1, 3))
    editor.scale_rows("1", torch.tensor([0]), 0.0)
    for optimizer, parameter, key in [
        (muon, model[0].weight, "momentum_buffer"),
        (adam, model[0].bias, "exp_avg"),
        (adam, model[1].weight, "exp_avg_sq"),
    ]:
        state, row = optimizer.state[parameter][key], 0 if parameter is model[1].weight else 1
        assert not state[row].any()
        assert state[1 - row].all()
    assert model[1].bias[0] == 0
    assert all(parameter is not model[1].bias for parameter in [*muon.state, *adam.state])


def test_keep_leaves_state_alone() -> None:
    layer = nn.Linear(3, 2)
    optimizer = train(layer, OPTIMIZERS["Adam"])
    states = copy.deepcopy(optimizer.state_dict()["state"])
    editor = Editor(layer, [optimizer], optimizer_state="keep")
    editor.redraw_rows("", torch.tensor([0]), torch.ones(1, 3))
    editor.scale([layer.weight], 0.5)
    assert layer.weight[0].tolist() == [0.5, 0.5, 0.5]
    torch.testing.assert_close(optimizer.state_dict()["state"], states, rtol=0, atol=0)


def test_nothing_is_added_to_an_optimizer_that_has_not_stepped() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    Editor(layer, [optimizer]).zero_columns("", torch.tensor([0]))
    assert len(optimizer.state) == 0


def test_a_parameter_without_dimensions_keeps_its_step_count() -> None:
    parameter = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.NAdam([parameter])
    parameter.grad = torch.tensor(1.0)
    optimizer.step()
    kept = {key: optimizer.state[parameter][key].clone() for key in ("step", "mu_product")}
    Editor(nn.Identity(), [optimizer]).write_masked(parameter, torch.tensor(True), torch.tensor(1.0))
    assert parameter == 1.0
    assert optimizer.state[parameter]["exp_avg"] == 0
    assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in kept.items())


def test_rprop_starts_again_from_a_learning_rate_that_is_a_tensor() -> None:
    layer = nn.Linear(3, 2)
    optimizer = train(layer, lambda p: torch.optim.Rprop(p, torch.tensor(0.25), foreach=False))
    Editor(layer, [optimizer]).zero_columns("", torch.tensor([1]))
    step_size = optimizer.state[layer.weight]["step_size"]
    assert step_size[:, 1].tolist() == [0.25, 0.25]
    assert (step_size[:, [0, 2]] != 0.25).any()


@pytest.mark.parametrize("key", ["z", "x0", "lookahead_slow_buff"])
def test_copies_of_the_weight_follow_it(key: str) -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = train(layer, OPTIMIZERS["SGD momentum"])
    optimizer.state[layer.weight][key] = torch.full((2, 3), 9.0)
    Editor(layer, [optimizer]).redraw_rows("", torch.tensor([1]), torch.ones(1, 3))
    assert optimizer.state[layer.weight][key].tolist() == [[9.0, 9.0, 9.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "RMSprop"])
def test_no_stale_momentum_comes_back(name: str) -> None:
    """Columns that were set to 0 stay 0 in a step without gradient."""
    layer = nn.Linear(8, 2)
    optimizer = train(layer, OPTIMIZERS[name])
    Editor(layer, [optimizer]).zero_columns("", torch.arange(4))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not layer.weight[:, :4].any()
    assert layer.weight[:, 4:].all()


def adafactor(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters)


def integers(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters)
    for parameter in parameters:
        optimizer.state[parameter]["row_var"] = torch.full(parameter.shape, 3, dtype=torch.uint8)
    return optimizer


def lists(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters)
    for parameter in parameters:
        optimizer.state[parameter]["row_var"] = {"factors": [torch.ones(3, 3)]}
    return optimizer


@pytest.mark.parametrize(("make", "optimizer_name"), [(adafactor, "Adafactor"), (integers, "SGD"), (lists, "SGD")])
def test_state_of_another_form_is_said_once(make: Any, optimizer_name: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = train(layer, make)
    states = copy.deepcopy(optimizer.state[layer.weight])
    editor = Editor(layer, [optimizer])
    with pytest.warns(UserWarning, match=f"state 'row_var' of {optimizer_name} has no entry for each weight") as caught:
        editor.zero_columns("", torch.tensor([0]))
    assert len(caught) == 1
    editor.zero_columns("", torch.tensor([1]))
    torch.testing.assert_close(optimizer.state[layer.weight], states, rtol=0, atol=0)


@pytest.mark.parametrize("value", [None, 3, "a word", [0.9, 0.999], {"rate": 0.5}, (torch.tensor(1.0), None)], ids=str)
def test_state_that_is_of_no_entries_stays_without_a_word(value: Any) -> None:
    layer = nn.Linear(3, 2)
    optimizer = train(layer, OPTIMIZERS["SGD momentum"])
    optimizer.state[layer.weight]["kept"] = value
    Editor(layer, [optimizer]).zero_columns("", torch.tensor([0]))
    assert reset_optimizer(optimizer, [layer.weight]) == 1
    assert optimizer.state[layer.weight]["kept"] is value
    assert not optimizer.state[layer.weight]["momentum_buffer"].any()


@pytest.mark.parametrize("mode", ["survivors", "reset", "keep"])
def test_edits_of_nothing(mode: OptimizerState) -> None:
    layer = nn.Linear(1, 2)
    layer.weight = nn.Parameter(torch.ones(2, 0))
    optimizer = train(layer, OPTIMIZERS["Adam"])
    editor, all_rows = Editor(layer, [optimizer], mode), torch.tensor([0, 1])
    editor.redraw_rows("", all_rows, torch.ones(2, 0))
    editor.scale_rows("", all_rows[:0], 2.0)
    editor.zero_columns("", all_rows[:0])
    editor.write_masked(layer.weight, torch.ones(2, 0, dtype=torch.bool), torch.tensor(1.0))
    editor.clamp([], 1.0)
    assert not layer.bias.any()
    assert all(state.isfinite().all() for of_one in optimizer.state.values() for state in of_one.values())


@pytest.mark.parametrize("mode", ["survivors", "reset", "keep"])
def test_lbfgs_begins_anew_after_an_edit_of_its_parameters(mode: OptimizerState) -> None:
    layer, stranger = nn.Linear(3, 2), nn.Linear(3, 2)
    model = nn.ModuleList([layer, stranger])
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=3)
    editor = Editor(model, [optimizer], mode)
    edits: list[Callable[[str], None]] = [
        lambda name: editor.zero_bias(name, torch.tensor([0])),
        lambda name: editor.write_masked(
            model.get_submodule(name).weight, torch.eye(2, 3, dtype=torch.bool), torch.tensor(1.0)
        ),
        lambda name: editor.scale([model.get_submodule(name).weight], 0.9),
        lambda name: editor.add([model.get_submodule(name).bias], [torch.ones(2)]),
        lambda name: editor.clamp([model.get_submodule(name).weight], 1e-3),
    ]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    for edit in edits:
        optimizer.step(closure)
        edit("1")
        assert optimizer.state
        edit("0")
        assert not optimizer.state
    optimizer.step(closure)
    editor.clamp(list(layer.parameters()), 1e6)
    assert optimizer.state, "nothing was beyond the limit"


@pytest.mark.parametrize("limit", [1.0, 2.0])
def test_lbfgs_begins_anew_where_a_part_of_its_weight_is_cut_down(limit: float) -> None:
    layer = nn.Linear(2, 2)
    layer.empty = nn.Parameter(torch.ones(0))
    layer.weight.data = torch.tensor([[2.0, -2.0], [3.0, 0.5]])
    optimizer = torch.optim.LBFGS(layer.parameters())
    optimizer.state[layer.weight]["func_evals"] = 1
    editor = Editor(layer, [optimizer])
    editor.clamp([layer.empty, layer.weight[0]], limit)  # entries at the limit stay
    assert bool(optimizer.state) == (limit == 2.0)
    assert layer.weight.tolist() == [[limit, -limit], [3.0, 0.5]]


def test_wrapped_optimizers_after_their_state_was_loaded() -> None:
    layer = nn.Linear(3, 2)
    adam = train(layer, OPTIMIZERS["Adam"])
    fabric = Fabric(accelerator="cpu", devices=1)
    _, in_fabric = fabric.setup(layer, adam)
    for wrapped in (LightningOptimizer(adam), in_fabric):
        adam.load_state_dict(copy.deepcopy(adam.state_dict()))
        train_on(layer, adam)
        Editor(layer, [wrapped]).zero_columns("", torch.tensor([1]))
        state = adam.state[layer.weight]["exp_avg"]
        assert not state[:, 1].any()
        assert state[:, 0].all()


@pytest.mark.parametrize("name", ["lookahead_sgd", "madgrad", "adafactor"])
def test_optimizers_of_timm(name: str) -> None:
    """A row that was written stays as written through steps without gradient, because none of its state is old."""
    timm_optim = pytest.importorskip("timm.optim")
    layer = nn.Linear(3, 2)
    optimizer = timm_optim.create_optimizer_v2(layer, opt=name, lr=0.1, weight_decay=0.0, momentum=0.9)
    for _ in range(3):
        train_on(layer, optimizer)
    Editor(layer, [optimizer]).redraw_rows("", torch.tensor([1]), torch.full((1, 3), 5.0))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(6):  # Lookahead returns to its slow weights at every sixth
        optimizer.step()
    assert layer.weight[1].tolist() == [5.0, 5.0, 5.0]
    assert layer.bias[1] == 0.0


def test_tied_parameters_are_one() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = train(model, OPTIMIZERS["Adam"])
    Editor(model, [optimizer]).redraw_rows("0", torch.tensor([1]), torch.ones(1, 3))
    assert model[1].weight is model[0].weight
    assert model[1].weight[1].tolist() == [1.0, 1.0, 1.0]
    assert not optimizer.state[model[1].weight]["exp_avg"][1].any()


def test_neighbours_in_a_shared_buffer_are_not_written() -> None:
    buffer = torch.full((12,), 7.0)
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = buffer[3:9].view(2, 3)
    Editor(layer).redraw_rows("", torch.tensor([0, 1]), torch.zeros(2, 3))
    assert buffer.tolist() == [7.0] * 3 + [0.0] * 6 + [7.0] * 3


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped convolution"])
def test_replacing_a_constant_unit_leaves_the_output_where_it_was(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)).double()
        x = torch.randn(5, 3).double()
    else:
        groups = 2 if "grouped" in kind else 1
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=groups)).double()
        x = torch.randn(2, 3, 8, 8).double()
    unit = torch.tensor([2])
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 0.75
    before = model(x)
    editor = Editor(model)
    editor.shift_bias("2", unit, torch.tensor([0.75]))
    editor.redraw_rows("0", unit, torch.randn(1, *model[0].weight.shape[1:]))
    editor.zero_columns("2", unit)
    torch.testing.assert_close(model(x), before)


def test_small_shifts_of_a_bias_in_half_precision_add_up() -> None:
    layer = nn.Linear(1, 1, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    editor = Editor(layer)
    for _ in range(100):  # each time less than half of the 0.0078 above 1 that bfloat16 has
        editor.shift_bias("", torch.tensor([0]), torch.tensor([0.001]))
    assert abs(layer.bias.item() - 1.1) < 0.004


def test_a_replaced_unit_has_bias_zero_whatever_was_shifted_into_it() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    editor, unit = Editor(model), torch.tensor([1])
    for consumer in ("1", "2"):
        editor.shift_bias(consumer, unit, torch.tensor([1.5]))
    for producer in ("0", "1"):
        editor.redraw_rows(producer, unit, torch.ones(1, model.get_submodule(producer).in_features))
    for consumer in ("1", "2"):
        editor.zero_columns(consumer, unit)
    assert model[1].bias[1] == 0
    assert model[1].weight[1].tolist() == [1.0, 0.0, 1.0]


def test_nothing_depends_on_values() -> None:
    """On the meta device there are no values: an edit that read one, to wait for it or to branch on it, would fail."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv2d(4, 6, 2, groups=2))
    editor = Editor(model, [optimizer := train(model, OPTIMIZERS["Adagrad"])])
    editor.reset_norm("1", torch.tensor([0]))
    model.to("meta")
    for parameter, state in optimizer.state.items():
        state["sum"] = torch.empty_like(parameter)
    index = torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError):
        index.sum().item()
    editor.redraw_rows("0", index, torch.empty(2, 3, device="meta"))
    editor.scale_rows("2", index, 0.5)
    editor.reset_norm("1", index)
    editor.zero_columns("2", index)
    editor.shift_bias("2", index, torch.empty(2, device="meta"))
    weight = model[2].weight
    mask = torch.empty_like(weight, dtype=torch.bool)
    editor.write_masked(weight, mask, torch.empty_like(weight))
    editor.write_packed(weight, mask, torch.empty(1, device="meta"))
    editor.write([weight], [weight])
    editor.add([weight], [weight])
    editor.scale([weight], torch.empty(1, device="meta"))
    editor.clamp([weight], 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", [{"capturable": True}, {"fused": True}, {"foreach": True}])
def test_no_edit_waits_for_the_gpu(form: dict[str, bool]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv2d(4, 6, 2, groups=2)).cuda()
    optimizer = train(model, lambda p: torch.optim.Adam(p, 0.1, **form))
    editor, index = Editor(model, [optimizer]), torch.tensor([0, 2], device="cuda")
    editor.reset_norm("1", index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        editor.shift_bias("2", index, torch.ones(2, device="cuda"))
        editor.redraw_rows("0", index, torch.ones(2, 3, device="cuda"))
        editor.scale_rows("2", index, 0.5)
        editor.reset_norm("1", index)
        editor.zero_columns("2", index)
        editor.write_masked(model[0].weight, model[0].weight > 0, model[0].weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not model[2].weight[:3, 0].any()
    assert not optimizer.state[model[0].weight]["exp_avg"][index].any()


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def sharded(mark: str) -> nn.Module:
    layer = nn.Linear(3, 2)
    setattr(layer.weight, mark, 1)
    return layer


def flattened() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.ones(6))
    return layer


def quantised() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    return layer


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates it, but models still use it
        return nn.utils.weight_norm(nn.Linear(3, 2))


def parametrized_norm() -> nn.Module:
    norm = nn.LayerNorm(3)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 1, groups=2), ValueError, "without groups, but .* has groups=2"),
    "no reset_parameters": (Other, ValueError, r"needs its reset_parameters\(\), but 'part', a Other, has none"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), RuntimeError, "part.weight"),
    "old weight norm": (old_weight_norm, RuntimeError, "is computed from other tensors"),
    "pruned bias": (lambda: prune.identity(nn.Linear(3, 2), "bias"), RuntimeError, "part.bias"),
    "parametrized norm": (parametrized_norm, RuntimeError, "'part' is parametrized"),
    "lazy": (lambda: nn.LazyLinear(3), RuntimeError, "Run one batch first"),
    "lazy norm": (nn.LazyBatchNorm1d, RuntimeError, "Run one batch first"),
    "FSDP": (lambda: sharded("_is_flat_param"), RuntimeError, "a piece of a flat one"),
    "DeepSpeed": (lambda: sharded("ds_id"), RuntimeError, "a piece of a flat one"),
    "flattened": (flattened, RuntimeError, "2 dimensions, but its shape is \\(6,\\)"),
    "quantised": (quantised, RuntimeError, "torch.int8"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_edited_is_refused(case: str) -> None:
    make, error, match = REFUSED[case]
    model = nn.ModuleDict({"part": make()})
    index = torch.tensor([0])
    with pytest.raises(error, match=match):
        check_editable(model["part"], "part")
    editor = Editor(model)
    is_norm = not isinstance(model["part"], nn.Linear)
    with pytest.raises(error):
        editor.reset_norm("part", index) if is_norm else editor.zero_columns("part", index)


def test_what_can_be_edited_is_not_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv3d(2, 2, 1, groups=2), nn.BatchNorm1d(2), nn.RMSNorm(2), nn.ReLU())
    for name, module in model.named_children():
        check_editable(module, name)
    for name, parameter in model.named_parameters():
        check_editable(parameter, name)


def test_bad_input_is_refused() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    editor, row = Editor(model), torch.tensor([0])
    weight = model["layer"].weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"must be one of \('survivors', 'reset', 'keep'\), but is 'clear'"):
        Editor(model, optimizer_state="clear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no 'missing'"):
        editor.zero_columns("missing", row)
    with pytest.raises(ValueError, match="'norm' is a LayerNorm"):
        editor.redraw_rows("norm", row, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"'layer' is a Linear\. Use redraw_rows"):
        editor.reset_norm("layer", row)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) for 1 rows of 'layer', but their shape is \(3,\)"):
        editor.redraw_rows("layer", row, torch.ones(3))
    for index in (torch.tensor([True, False]), torch.tensor([[0]]), torch.tensor(0), row.to("meta")):
        for edit in (
            lambda index: editor.zero_columns("layer", index),
            lambda index: editor.scale_rows("layer", index, 2.0),
            lambda index: editor.zero_bias("layer", index),
            lambda index: editor.reset_norm("norm", index),
            lambda index: editor.redraw_rows("layer", index, torch.ones(1, 3)),
            lambda index: editor.shift_bias("layer", index, torch.ones(1)),
        ):
            with pytest.raises(ValueError, match="needs a LongTensor with one dimension on cpu"):
                edit(index)
    with pytest.raises(ValueError, match="one amount for each of 1 columns"):
        editor.shift_bias("layer", row, torch.ones(2))
    with pytest.raises(ValueError, match=r"mask of torch.bool and shape \(2, 3\)"):
        editor.write_masked(weight, torch.ones(2, 3), weight)
    with pytest.raises(ValueError, match=r"mask of torch.bool and shape \(2, 3\)"):
        editor.write_masked(weight, torch.ones(3, dtype=torch.bool), weight)
    with pytest.raises(ValueError, match=r"one value or values of shape \(2, 3\), but their shape is \(3,\)"):
        editor.write_masked(weight, torch.ones(2, 3, dtype=torch.bool), torch.ones(3))
    with pytest.raises(ValueError, match=r"mask of torch.bool and shape \(2, 3\)"):
        editor.write_packed(weight, torch.ones(6, dtype=torch.bool), torch.ones(6))
    with pytest.raises(ValueError, match=r"values of one dimension, but their shape is \(2, 3\)"):
        editor.write_packed(weight, torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def failing_edits(model: nn.Module) -> dict[str, tuple[Callable[[Editor], None], str]]:
    """Edits of which a part could be made before the fault shows."""
    two, mask = torch.tensor([0, 2]), torch.ones(2, 3, dtype=torch.bool)
    weight, bias = model["layer"].weight, model["layer"].bias
    fits, short, away = torch.ones(2, 3), torch.ones(3), torch.ones(2, 3, device="meta")
    return {
        "a row that is not there": (lambda e: e.redraw_rows("layer", two, fits), "from 0 to 1, but got 0 to 2"),
        "a negative row": (lambda e: e.scale_rows("layer", two - 1, 2.0), "from 0 to 1, but got -1 to 1"),
        "a bias that is not there": (lambda e: e.zero_bias("layer", two), "from 0 to 1"),
        "a column that is not there": (lambda e: e.zero_columns("layer", two + 1), "from 0 to 2, but got 1 to 3"),
        "a group that is not there": (lambda e: e.zero_columns("grouped", two + 2), "from 0 to 3, but got 2 to 4"),
        "an input that is not there": (lambda e: e.shift_bias("layer", two + 1, short[:2]), "from 0 to 2"),
        "an entry that is not there": (lambda e: e.reset_norm("norm", two), "from 0 to 1, but got 0 to 2"),
        "rows on another device": (lambda e: e.redraw_rows("layer", two // 2, away), "on cpu, but they are on meta"),
        "values on another device": (lambda e: e.write_masked(weight, mask, away), "on cpu, but they are on meta"),
        "too few values": (lambda e: e.write_packed(weight, mask, torch.ones(5)), "each of 6 masked .* got 5"),
        "too many values": (lambda e: e.write_packed(weight, mask, torch.ones(7)), "each of 6 masked .* got 7"),
        "a value too few": (lambda e: e.write([weight, bias], [fits]), r"write needs values of .*\[\(2, 3\), \(2,\)\]"),
        "a shape": (lambda e: e.write([weight, bias], [fits, torch.ones(1)]), r"but got \[\(2, 3\), \(1,\)\]"),
        "a target's shape": (lambda e: e.draw_towards([weight, bias], [fits, short], 0.5), r"needs targets .*\(3,\)\]"),
        "an amount's shape": (lambda e: e.add([weight, bias], [fits, short]), r"add needs amounts .*\(3,\)\]"),
        "a factor too few": (lambda e: e.scale([weight, bias], torch.tensor([2.0])), r"for each of 2 tensors.*\(1,\)"),
        "a factor's shape": (lambda e: e.scale([weight, bias], fits), r"one of shape \(2, 3\)"),
    }


@pytest.mark.parametrize("case", sorted(failing_edits(nn.ModuleDict({"layer": nn.Linear(3, 2)}))))
def test_an_edit_that_fails_has_changed_nothing(case: str) -> None:
    grouped, norm = nn.Conv1d(4, 2, 1, groups=2), nn.BatchNorm1d(2)
    model = nn.ModuleDict({"layer": nn.Linear(3, 2), "grouped": grouped, "norm": norm})
    optimizer = train(model, OPTIMIZERS["Adam"])
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()["state"]))
    edit, message = failing_edits(model)[case]
    with pytest.raises(ValueError, match=message):
        edit(Editor(model, [optimizer]))
    torch.testing.assert_close((dict(model.state_dict()), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


def test_edits_of_nothing_do_nothing() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(3, 2), "norm": nn.BatchNorm1d(2)})
    optimizer = train(model, OPTIMIZERS["Adam"])
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()["state"]))
    editor, none, weight = Editor(model, [optimizer]), torch.tensor([], dtype=torch.int64), model["layer"].weight
    editor.write([], [])
    editor.add([], [])
    editor.scale([], 0.0)
    editor.scale([], torch.ones(0))
    editor.clamp([], 0.0)
    editor.redraw_rows("layer", none, torch.ones(0, 3))
    editor.scale_rows("layer", none, 0.0)
    editor.zero_bias("layer", none)
    editor.zero_columns("layer", none)
    editor.shift_bias("layer", none, torch.ones(0))
    editor.reset_norm("norm", none)
    editor.write_masked(weight, torch.zeros(2, 3, dtype=torch.bool), torch.tensor(5.0))
    editor.write_packed(weight, torch.zeros(2, 3, dtype=torch.bool), torch.ones(0))
    torch.testing.assert_close((dict(model.state_dict()), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
