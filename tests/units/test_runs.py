"""How a network is run to find its units: what stands in for products, what is told meanwhile, how much is run."""

import logging
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.units import network as network_module
from lightning_plasticity.units.examining import undisturbed
from lightning_plasticity.units.find import explore, find_units
from lightning_plasticity.units.nans import NaNs, all_nan_along, any_nan, clean, nan_along, nan_channels, ones_for_nan
from lightning_plasticity.units.network import Network
from lightning_plasticity.units.runs import _digest
from lightning_plasticity.units.stand_ins import StandIns, attended
from lightning_plasticity.units.wiring import Wiring, codewords
from units.property_check import invalid

NAN, INF = float("nan"), float("inf")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def wiring_of(model: nn.Module, *inputs: Tensor) -> Wiring:
    with undisturbed(model):
        return Wiring(Network(model, inputs, {}))


class Function(nn.Module):
    """A forward function of some parts."""

    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# ---- NaN


def some_nans() -> Tensor:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    x[:, 1], x[0, 2, 3], x[1, 3], x[2, 0, 0], x[2, 0, 1] = NAN, NAN, -INF, INF, -INF
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize(
    "x", [some_nans(), torch.zeros(2, 3), torch.zeros(0, 3), torch.tensor(NAN), torch.tensor([NAN, INF])]
)
def test_nan_is_told_as_isnan_tells_it(x: Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    nans = x.isnan()
    assert any_nan(x) == bool(nans.any())
    assert torch.equal(clean(x), torch.where(nans, torch.zeros((), dtype=dtype), x))
    for dim in range(x.ndim):
        others = [d for d in range(x.ndim) if d != dim]
        expected = nans.movedim(dim, 0).flatten(1).any(1) if others else nans
        assert torch.equal(nan_channels(x, dim), expected)
        assert torch.equal(nan_along(x, [dim]), nans.any(dim, keepdim=True))
        if x.numel():
            assert torch.equal(all_nan_along(x, [dim]), nans.all(dim, keepdim=True))


def test_a_one_for_each_nan() -> None:
    assert ones_for_nan(torch.tensor([NAN, -INF, 0.0, 2.0])).tolist() == [1.0, -INF, 0.0, 2.0]


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("whole", [True, False])
def test_nans_are_compared_and_repeated(dim: int | None, whole: bool) -> None:
    x = torch.zeros(3, 4)
    x[:, 2] = NAN
    if not whole:
        x[0, 1] = NAN
    nans = NaNs(x, dim)
    other = torch.ones(3, 4)
    assert nans.any
    assert not nans.are_exceeded_by(x)
    assert not nans.are_exceeded_by(other)
    assert torch.equal(nans.put_into(other).isnan(), x.isnan())
    other[1, 0] = NAN
    assert nans.are_exceeded_by(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_digest_hears_every_bit_and_every_place(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    others = [x.flip(1), x.flip(0), x.view(5, 3).t()]
    for place in range(x.numel()):
        for bit in range(8 * x.element_size() - 1):
            other = x.clone()
            other.view(-1).view(integers)[place] ^= 1 << bit
            others.append(other)
    assert all(_digest(other) != _digest(x) for other in others)
    assert _digest(x.t().contiguous().t()) == _digest(x)


# ---- what stands in for products


def test_a_stand_in_has_the_form_of_the_result_and_can_be_written_to() -> None:
    result = torch.randn(2, 3, 70, 70).to(memory_format=torch.channels_last)
    stand_ins = StandIns()
    stand_ins.keep("call", result)
    first, second = stand_ins.give("call"), stand_ins.give("call")
    assert first is not None
    assert second is not None
    assert stand_ins.give("other call") is None
    assert (first.shape, first.stride(), first.dtype) == (result.shape, result.stride(), result.dtype)
    first.zero_()
    assert 0.5 < float(second.std()) < 2


def test_attention_hands_on_whole_channels_and_no_others() -> None:
    result, value = torch.ones(1, 2, 5, 3), torch.ones(1, 2, 4, 3)
    assert attended(result, value) is result
    value[0, 1, :, 2] = NAN
    reached = attended(result, value)
    assert reached is not None
    assert reached.isnan().sum() == 5
    assert bool(reached[0, 1, :, 2].isnan().all())
    value[0, 0, 0, 0] = NAN  # one key alone: which queries hear of it only the real thing tells
    assert attended(result, value) is None


def test_products_are_computed_a_few_times_only() -> None:
    model = mlp()
    computed = 0

    class Counts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal computed
            computed += func._schema.name in ("aten::addmm", "aten::mm")
            return func(*args, **(kwargs or {}))

    with Counts():
        found = explore(model, (torch.zeros(1, 4),), {}, explain=False)
    assert found.runs >= 15
    assert computed == 3


def routed(self: nn.Module, x: Tensor) -> Tensor:
    """A product decides which of two layers is called."""
    hidden = self.first(x).relu()
    return self.second(hidden) + (self.yes if self.gate(x).sum() > 0 else self.no)(x)


def picked(self: nn.Module, x: Tensor) -> Tensor:
    """Scores decide which rows go on."""
    hidden = self.first(x).relu()
    return self.second(hidden[self.gate(x).softmax(-1)[:, 0].topk(1).indices])


def branches() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "first": nn.Linear(4, 8),
        "second": nn.Linear(8, 2),
        "gate": nn.Linear(4, 2),
        "yes": nn.Linear(4, 2),
        "no": nn.Linear(4, 2),
    }


@pytest.mark.parametrize("function", [routed, picked])
def test_nothing_stands_in_where_numbers_decide(function) -> None:
    model, x = Function(function, **branches()), torch.randn(3, 4)
    assert not wiring_of(model, x).network.stand_ins._kept
    found = find_units(model, x)
    assert [units.name for units in found] == ["first"]
    assert invalid(model, (x,), found) == []


def halves(self: nn.Module, x: Tensor) -> Tensor:
    left, right = self.first(x).chunk(2, -1)
    return self.second(torch.cat([left, right.relu()], -1))


def turned(self: nn.Module, x: Tensor) -> Tensor:
    """By 90 degrees, as rotary embeddings do it."""
    numbers = torch.view_as_complex(self.first(x).unflatten(-1, (4, 2)))
    real, imaginary = (torch.view_as_real(part).flatten(-2) for part in (numbers * 1j).split(2, -1))
    return self.second(torch.cat([real, imaginary], -1))


@pytest.mark.parametrize("function", [halves, turned])
def test_products_are_stood_in_for_where_parts_of_what_is_computed_go_on(function) -> None:
    assert wiring_of(Function(function, **branches()), torch.randn(3, 4)).network.stand_ins._kept


def test_nothing_stands_in_where_it_would_make_nan() -> None:
    """Only the last outputs are large enough for the root, and what stands in repeats the first."""
    model = Function(
        lambda self, x: self.second((self.first(x)[:, 5000:] - 50).sqrt()),
        first=nn.Linear(1, 6000), second=nn.Linear(1000, 2),
    )  # fmt: skip
    with torch.no_grad():
        model.first.bias.copy_(torch.arange(6000) // 4096 * 100)
    x = torch.zeros(1, 1)
    assert not wiring_of(model, x).network.stand_ins._kept
    (units,) = find_units(model, x)
    assert units.size == 1000


def test_nothing_stands_in_where_it_would_make_nan_behind_the_last_layer() -> None:
    model = Function(
        lambda self, x: (self.second(self.first(x).relu())[:, 5000:] - 50).sqrt(),
        first=nn.Linear(1, 8), second=nn.Linear(8, 6000),
    )  # fmt: skip
    with torch.no_grad():
        model.second.bias.copy_(torch.arange(6000) // 4096 * 100)
    x = torch.zeros(1, 1)
    assert not wiring_of(model, x).network.stand_ins._kept
    assert [units.name for units in find_units(model, x)] == ["first"]


def test_noise_is_heard_at_a_layer_though_what_it_computes_is_not_used() -> None:
    """Sums that leave NaN out let units reach another layer unseen by NaN."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden) + self.third(hidden.nansum(-1, keepdim=True))

    torch.manual_seed(0)
    model = Function(forward, first=nn.Linear(4, 8), second=nn.Linear(8, 2), third=nn.Linear(1, 2))
    assert find_units(model, torch.randn(3, 4)) == []


# ---- how much is run


@pytest.mark.parametrize("size", [1, 2, 3, 7, 252, 253, 5000])
def test_codewords_are_different_and_of_one_weight(size: int) -> None:
    words = codewords(size)
    ones = torch.stack([words >> bit & 1 for bit in range(20)]).sum(0)
    assert len(words) == size == len(words.unique())
    assert bool((words.diff() > 0).all())
    assert len(ones.unique()) == 1


def test_depthwise_convolutions_do_not_double_the_runs() -> None:
    def block() -> list[nn.Module]:
        return [nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU(), nn.Conv2d(32, 16, 1)]

    torch.manual_seed(0)
    with_depthwise = explore(nn.Sequential(*block(), *block()), (torch.zeros(1, 16, 9, 9),), {}, explain=False)
    without = explore(
        nn.Sequential(*(m for m in (*block(), *block()) if getattr(m, "groups", 1) == 1)),
        (torch.zeros(1, 16, 9, 9),),
        {},
        explain=False,
    )
    assert [len(units.producers) for units in with_depthwise.units] == [2, 1, 2]
    assert without.runs < with_depthwise.runs <= without.runs + 7


class Branches(nn.Module):
    """Blocks that add up what comes of two ways, one after the other: the units before each sum are left out."""

    def __init__(self, blocks: int, add=torch.add) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add = add
        self.parts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(6, 6) for name in ("stem", "left", "right", "out")}) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            stem = part["stem"](x).relu()
            x = part["out"](self.add(stem, part["right"](part["left"](stem).relu())).relu())
        return x


def test_proofs_and_reasons_of_parts_that_cannot_meet_share_runs() -> None:
    few, many = (explore(Branches(blocks), (torch.randn(2, 6),), {}) for blocks in (2, 12))
    assert many.runs <= few.runs + 4  # four more codewords' bits
    for index in range(12):
        after = f"before 'parts.{index}.out' uses them (a residual stream)"
        assert many.left_out[f"parts.{index}.stem"] == f"its units are added to those of other layers {after}"
        assert many.left_out[f"parts.{index}.right"] == f"its units are added to those of other layers {after}"
    assert {units.name for units in many.units} == {
        *(f"parts.{index}.left" for index in range(12)),
        *(f"parts.{index}.out" for index in range(11)),
    }


class Unseen(torch.autograd.Function):
    """A sum that no mode for torch's functions sees."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        return torch.tensor(a.numpy() + b.numpy())


def test_ways_that_the_survey_does_not_see_change_nothing() -> None:
    x = torch.randn(2, 6)
    seen, unseen = (explore(Branches(3, add), (x,), {}) for add in (torch.add, Unseen.apply))
    assert [units.name for units in unseen.units] == [units.name for units in seen.units]
    assert unseen.left_out == seen.left_out


# ---- what is told


def test_who_waits_is_told_what_is_done(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count(0, 3)
    monkeypatch.setattr(network_module, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    with caplog.at_level(logging.INFO):
        find_units(mlp(), torch.zeros(1, 4))
    lines = [text for record in caplog.records if "hidden units" in (text := record.getMessage())]
    assert lines == [
        "Finding the hidden units of Sequential, which is done once: its forward pass runs on the example to see "
        "whether it decides anything by the numbers (run 2, 6 s so far).",
        "Finding the hidden units of Sequential, which is done once: its forward pass runs on the example to see "
        "which unit reaches which weight (run 9, 27 s so far).",
    ]


def test_who_does_not_wait_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        find_units(mlp(), torch.zeros(1, 4))
    assert "hidden units" not in caplog.text
