"""Recording the initial distribution, and drawing from it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_plasticity.editing.initial import Init, InitialDistribution

INITS: list[Any] = ["empirical", "quantiles", "kaiming_uniform", "reset_parameters", nn.init.xavier_uniform_]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.full((2, 3), 0.5))
        self.linear = nn.Linear(6, 4)
        self.convolution = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)


@settings(max_examples=60, deadline=None)
@given(
    init=st.sampled_from(INITS),
    name=st.sampled_from(["linear.weight", "convolution.weight"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    rows=st.none() | st.lists(st.integers(0, 3), unique=True),
    seed=st.integers(0, 2**40),
)
def test_draws_depend_on_the_generator_alone(
    init: Init, name: str, dtype: torch.dtype, rows: list[int] | None, seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net().to(dtype)
    initial = InitialDistribution(net, [name], init)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    chosen = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    draws = []
    for user_seed in (1, 2):
        torch.manual_seed(user_seed)
        state = torch.get_rng_state()
        draws.append(initial.draw(name, generator(seed), chosen))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1])
    parameter = net.get_parameter(name)
    assert draws[0].dtype == dtype
    assert draws[0].shape == (parameter.shape if rows is None else (len(rows), *parameter.shape[1:]))
    assert not draws[0].requires_grad
    if rows is None:
        assert not torch.equal(draws[0], initial.draw(name, generator(seed + 1)))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("init", INITS)
def test_one_generator_gives_new_values_each_time(init: Init) -> None:
    initial, source = InitialDistribution(nn.Linear(3, 2), ["weight"], init), generator()
    assert not torch.equal(initial.draw("weight", source), initial.draw("weight", source))


def test_empirical_draws_have_the_recorded_mean_and_deviation_whatever_initialised_the_model() -> None:
    layer = nn.Linear(300, 300)
    with torch.no_grad():
        nn.init.trunc_normal_(layer.weight, 0.1, 0.02, generator=generator())
    initial = InitialDistribution(layer, ["weight"])
    mean, std = layer.weight.mean().item(), layer.weight.std(correction=0).item()
    assert math.isclose(initial.mean("weight"), mean, rel_tol=1e-6)
    nn.init.constant_(layer.weight, 7.0)  # training goes on
    draw = initial.draw("weight", generator(1))
    # Five standard errors of the mean and of the standard deviation.
    assert abs(draw.mean().item() - mean) < 5 * std / 300
    assert abs(draw.std().item() - std) < 5 * std / 300 / math.sqrt(2)


@pytest.mark.parametrize("name", ["position", "norm.weight", "norm.bias"])
def test_a_constant_is_drawn_as_that_constant(name: str) -> None:
    net = Net()
    draw = InitialDistribution(net, [name]).draw(name, generator())
    assert torch.equal(draw, net.get_parameter(name))


def test_half_precision_is_drawn_in_single_precision() -> None:
    layer = nn.Linear(50, 40)
    initial, half = (
        InitialDistribution(each, ["weight"], "kaiming_uniform") for each in (layer, nn.Linear(50, 40).half())
    )
    assert torch.equal(initial.draw("weight", generator()).half(), half.draw("weight", generator()))


@pytest.mark.parametrize("init", ["kaiming_uniform", "reset_parameters"])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(3, 2, 2)]
)
def test_pytorchs_initialisation_is_drawn(make: Callable[[], Any], init: Init) -> None:
    layer = make()
    bound = 1 / math.sqrt(layer.weight[0].numel())
    initial = InitialDistribution(layer, ["weight", "bias"], init)
    source = generator()
    for name in ("weight", "bias"):
        draws = torch.stack([initial.draw(name, source).flatten() for _ in range(2000)])
        assert draws.abs().max() <= bound
        assert draws.abs().max() > 0.99 * bound
        assert math.isclose(draws.std().item(), bound / math.sqrt(3), rel_tol=0.02)


def test_kaiming_uniform_is_what_a_fresh_layer_gets() -> None:
    initial = InitialDistribution(nn.Conv2d(4, 6, 3, groups=2), ["weight"], "kaiming_uniform")
    torch.manual_seed(5)
    fresh = nn.Conv2d(4, 6, 3, groups=2).weight.detach()
    torch.testing.assert_close(initial.draw("weight", generator(5)), fresh)


class OwnReset(nn.Module):
    """It resets a part of its own, and its hook refers to something that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 2), 5.0))
        self.register_parameter("bias", None)
        self.register_buffer("nothing", None)
        self.register_buffer("count", torch.tensor(2))
        self.part = nn.Linear(2, 2)
        self.absent = None
        self.register_module("none", None)
        self.register_forward_hook(functools.partial(self._hook, generator()))

    def _hook(self, *_: Any) -> None:
        raise AssertionError("a draw runs no forward")

    def reset_parameters(self) -> None:
        assert self.weight.dtype == torch.float32
        nn.init.normal_(self.weight, 3.0, 0.1)
        nn.init.zeros_(self.part.weight)
        self.count.zero_()


def test_reset_parameters_works_on_a_copy() -> None:
    module = OwnReset().bfloat16()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    initial = InitialDistribution(module, ["weight"], "reset_parameters")
    draw = initial.draw("weight", generator())
    assert draw.dtype == torch.bfloat16
    assert ((draw - 3.0).abs() < 0.6).all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert torch.equal(initial.draw("weight", generator(), torch.tensor([2])), draw[2:])


class Untrained(nn.Module):
    """Its weight needs no gradients, so that it may write to it as to any tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2), requires_grad=False)

    def reset_parameters(self) -> None:
        self.weight.fill_(4.0)


def test_reset_parameters_of_a_module_that_is_not_trained() -> None:
    drawn = InitialDistribution(Untrained(), ["weight"], "reset_parameters").draw("weight", generator())
    assert torch.equal(drawn, torch.full((3, 2), 4.0))


def test_a_function_fills_or_returns_the_whole_tensor() -> None:
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    seen: list[Tensor] = []

    def ramp(tensor: Tensor, *, generator: torch.Generator) -> Tensor:
        seen.append(tensor)
        return torch.arange(16.0, requires_grad=True).view(4, 4)

    rows = torch.tensor([3, 0])
    initial = InitialDistribution(layer, ["weight"], ramp)
    draw = initial.draw("weight", generator(), rows)
    assert torch.equal(draw, torch.arange(16.0).view(4, 4)[rows].bfloat16())
    assert seen[0].dtype == torch.float32
    assert not seen[0].any()
    assert not draw.requires_grad
    truncated = functools.partial(nn.init.trunc_normal_, std=0.02, a=-0.03, b=0.03)
    draw = InitialDistribution(layer, ["weight"], truncated).draw("weight", generator())
    assert 0 < draw.float().abs().max() <= 0.0301


def test_a_function_may_return_the_same_tensor_each_time() -> None:
    fixed = torch.ones(2, 3)
    initial = InitialDistribution(nn.Linear(3, 2), ["weight"], lambda tensor, generator: fixed)
    initial.draw("weight", generator()).zero_()
    assert fixed.all()


def test_the_moments_are_those_of_the_values_even_of_a_single_one() -> None:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(3.0)
    assert InitialDistribution(layer, ["weight"]).state_dict() == {"moments": {"weight": (3.0, 0.0)}}
    layer.weight.data = torch.tensor([[0.0, 2.0]])
    assert InitialDistribution(layer, ["weight"]).state_dict() == {"moments": {"weight": (1.0, 1.0)}}


@pytest.mark.parametrize("fill", [nn.init.uniform_, nn.init.normal_])
def test_quantiles_give_the_distribution_itself(fill: Any) -> None:
    """By the largest distance between the distribution functions, which is that of Kolmogorov and Smirnov."""
    layer = nn.Linear(300, 300)
    fill(layer.weight, generator=generator())
    started = layer.weight.detach().flatten().sort().values
    initial = InitialDistribution(layer, ["weight"], "quantiles")
    nn.init.zeros_(layer.weight)  # training goes on
    drawn = initial.draw("weight", generator(1)).flatten().sort().values
    assert drawn[0] >= started[0]
    assert drawn[-1] <= started[-1]
    rank = torch.searchsorted(started, drawn) / len(started)
    assert (rank - torch.arange(1, 90_001) / 90_000).abs().max() < 1.95 / math.sqrt(90_000) + 1 / 257  # 1 in 1000
    resumed = InitialDistribution(layer, ["weight"], "quantiles")
    resumed.load_state_dict(initial.state_dict())
    assert torch.equal(resumed.draw("weight", generator(1)).flatten().sort().values, drawn)


def test_quantiles_of_few_and_of_equal_values() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, 3.0]])
    nn.init.constant_(layer.bias, 0.25)
    initial = InitialDistribution(layer, ["weight", "bias"], "quantiles")
    drawn = torch.cat([initial.draw("weight", generator(seed)).flatten() for seed in range(200)])
    assert 1.0 <= drawn.min() < 1.1 < 2.9 < drawn.max() <= 3.0
    assert initial.draw("bias", generator()).item() == 0.25


@pytest.mark.parametrize("count", [2, 3, 257, 1000])
def test_quantiles_of_evenly_spaced_values_are_what_chance_gives(count: int) -> None:
    layer = nn.Linear(count, 1).double()
    layer.weight.data = torch.linspace(1.0, 3.0, count, dtype=torch.float64).flip(0).view(1, count)
    drawn = InitialDistribution(layer, ["weight"], "quantiles").draw("weight", generator())
    chance = torch.rand(1, count, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(drawn, 1 + 2 * chance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mean", "is_told"), [(2.5, False), (-2.5, False), (2.625, True), (-2.625, True)])
def test_a_mean_is_told_where_it_is_further_from_0_than_five_standard_errors(mean: float, is_told: bool) -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[mean - 1, mean + 1], [mean + 1, mean - 1]])
    assert InitialDistribution(layer, ["weight"]).mean("weight") == (mean if is_told else 0.0)


def test_mean() -> None:
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, 0.25)
    assert InitialDistribution(layer, ["weight"]).mean("weight") == 0.25
    assert InitialDistribution(layer, ["weight"], "reset_parameters").mean("weight") == 0.25
    assert InitialDistribution(layer, ["weight"], "kaiming_uniform").mean("weight") == 0.0


def test_the_mean_is_that_of_the_distribution_and_not_of_the_values_drawn() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(200, 30)
    assert layer.weight.mean() != 0
    assert InitialDistribution(layer, ["weight"]).mean("weight") == 0.0
    with torch.no_grad():
        layer.weight += 0.01  # 19 standard errors
    assert InitialDistribution(layer, ["weight"]).mean("weight") == pytest.approx(0.01, abs=5 * 0.041 / math.sqrt(6000))


def test_a_resumed_run_draws_what_the_first_would_have(tmp_path: Any) -> None:
    first = Net()
    initial = InitialDistribution(first, ["linear.weight", "norm.weight"])
    torch.save(initial.state_dict(), tmp_path / "state.pt")
    trained = Net()
    nn.init.constant_(trained.norm.weight, 4.0)
    resumed = InitialDistribution(trained, ["norm.weight", "linear.weight"])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.state_dict() == initial.state_dict()
    for name in ("linear.weight", "norm.weight"):
        assert torch.equal(resumed.draw(name, generator()), initial.draw(name, generator()))


def test_the_recorded_state_is_not_shared() -> None:
    initial = InitialDistribution(nn.Linear(3, 2), ["weight"])
    state = initial.state_dict()
    state["moments"].clear()
    assert initial.state_dict()["moments"].keys() == {"weight"}


def test_bad_input_is_refused() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"init must be a function or one of .* got 'xavier'"):
        InitialDistribution(net, [], "xavier")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"there is no 'linear.scale'. Take a name from"):
        InitialDistribution(net, ["linear.scale"])
    with pytest.raises(ValueError, match=r"there is no 'missing.weight'"):
        InitialDistribution(net, ["missing.weight"])
    for name in ("norm.weight", "position"):
        with pytest.raises(ValueError, match=rf"'kaiming_uniform' needs the weight or bias of a layer .* '{name}'"):
            InitialDistribution(net, [name], "kaiming_uniform")
    with pytest.raises(ValueError, match="'position' belongs to a Net, which has none"):
        InitialDistribution(net, ["position"], "reset_parameters")
    for init, returned in ((lambda tensor, generator: tensor[:1], r"\(1, 6\)"), (lambda tensor, generator: 1, "1")):
        with pytest.raises(ValueError, match=rf"of shape \(4, 6\) for 'linear.weight', but returned {returned}\."):
            InitialDistribution(net, ["linear.weight"], init)
    with pytest.raises(ValueError, match=r"fill 'linear.bias' of shape \(4,\).* raised ValueError\('Fan in and fan"):
        InitialDistribution(net, ["linear.weight", "linear.bias"], nn.init.kaiming_uniform_)
    with pytest.raises(ValueError, match=r"must give finite values, but for 'linear.weight' of shape \(4, 6\)"):
        InitialDistribution(net, ["linear.weight"], lambda tensor, generator: tensor / 0)
    calls = []

    def other_shape_later(tensor, generator):
        calls.append(tensor)
        return tensor if len(calls) == 1 else tensor[:1]

    initial = InitialDistribution(net, ["linear.weight"], other_shape_later)
    with pytest.raises(ValueError, match=r"a tensor of shape \(4, 6\) for 'linear.weight', but .* \(1, 6\)"):
        initial.draw("linear.weight", generator())
    initial = InitialDistribution(net, ["linear.weight"])
    with pytest.raises(KeyError, match=r"linear.bias"):
        initial.draw("linear.bias", generator())
    other = InitialDistribution(net, ["linear.weight", "linear.bias"])
    with pytest.raises(ValueError, match=r"only one of them has \['linear.bias'\]"):
        initial.load_state_dict(other.state_dict())
