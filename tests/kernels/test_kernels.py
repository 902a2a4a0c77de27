"""Kernels do what PyTorch's operations do: each against these, on every layout that it takes."""

import os
import subprocess
import sys

import pytest
import torch
from callbacks.streams import INPUT, convolutional, mlp
from contract.training import assert_same
from torch import Tensor, nn

from lightning_plasticity import ContinualBackprop
from lightning_plasticity.editing.edits import Editor
from lightning_plasticity.engine.gradient_utility import GradientUtility
from lightning_plasticity.engine.population import average_in
from lightning_plasticity.functional.soft_weight_rescaling import log_rescaling_factors
from lightning_plasticity.kernels import Tensors, kernels_on, use_kernels

kernels = kernels_on("cpu")
pytestmark = pytest.mark.skipif(kernels is None, reason="needs Numba")
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def on_again():
    yield
    use_kernels(True)


def some(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def together(*tensors: Tensor, beside: tuple[Tensor, ...] = ()) -> Tensors:
    group = Tensors(tensors, beside)
    assert group.kernels() is kernels
    return group


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(found.dtype).eps, atol=1e-12)


@both_types
@pytest.mark.parametrize(("shape", "inner"), [((5, 7), 1), ((1, 7), 1), ((3, 7, 4), 4), ((7, 6), 6), ((2, 3, 7), 1)])
@pytest.mark.parametrize("rows_before", [0, 1, 2])
def test_sums_of_columns(dtype, shape, inner, rows_before):
    x, total, size = some(*shape, dtype=dtype), some(7, dtype=dtype, seed=1), some(7, dtype=dtype, seed=2)
    rows = x.double().movedim(shape.index(7), -1).reshape(-1, 7) if inner > 1 else x.double().reshape(-1, 7)
    before = {0: (0.0, 0.0), 1: (total.double(), total.double().abs()), 2: (total.double(), size.double())}[rows_before]
    expected = (before[0] + rows.sum(0)).to(dtype), (before[1] + rows.abs().sum(0)).to(dtype)
    dim, without = shape.index(7) - len(shape), some(7, dtype=dtype, seed=1)
    assert kernels.column_sums(dim, total, size)(x, rows_before) == len(rows)
    close(total, expected[0])
    close(size, expected[1])
    kernels.column_sums(dim, without, None)(x, rows_before)
    assert torch.equal(without, total)


def test_what_is_not_summed_by_kernels():
    def rows(x: Tensor) -> int:
        return kernels.column_sums(-1, torch.zeros(4), None)(x, 0)

    assert rows(torch.ones(2, 4)) == 2
    for x in (torch.ones(4, 2).T, torch.ones(2, 4).double(), torch.ones(2, 4).half(), torch.ones(2, 4, device="meta")):
        assert rows(x) == 0
    large = torch.ones(kernels.LARGE // 4 + 1, 4)
    torch.set_num_threads(2)
    try:
        assert rows(large) == 0
        assert rows(large[1:]) == len(large) - 1
    finally:
        torch.set_num_threads(1)
    assert rows(large) == len(large)


@both_types
def test_averages(dtype):
    averages, values = (
        [some(9, dtype=dtype), some(3, dtype=dtype)],
        [some(9, dtype=dtype, seed=1), some(3, dtype=dtype)],
    )
    values[0][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = [average.clone() for average in averages]
    for average, value in zip(expected, values, strict=True):
        average_in(average, slice(None), value, 0.01)
    kernels.average_in(together(*averages, beside=(*values,)), 0.01)
    for average, other in zip(averages, expected, strict=True):
        close(average, other)
    kernels.average_in(together(averages[1], beside=(values[1],)), 1.0)
    assert torch.equal(averages[1], values[1])


@both_types
def test_averages_of_utilities(dtype):
    (averages, weights, gradients) = ([some(9, dtype=dtype, seed=s), some(3, dtype=dtype, seed=s)] for s in (0, 1, 2))
    gradients[0][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = []
    for average, weight, gradient in zip(averages, weights, gradients, strict=True):
        moved = 0.9 * average + 0.1 * (weight * gradient).abs()
        expected.append(torch.where(gradient.isfinite(), moved, average))
    group = together(*averages, beside=(*weights,))
    kernels.average_utilities(group, together(*gradients, beside=(*weights,)), 0.1)
    for average, other in zip(averages, expected, strict=True):
        close(average, other)


@pytest.mark.parametrize("laid_out", ["alike", "otherwise"])
def test_gradients_may_be_laid_out_otherwise(laid_out):
    weight = nn.Parameter(some(3, 4))
    gradient = some(3, 4, seed=1)
    weight.grad = gradient if laid_out == "alike" else gradient.T.contiguous().T
    utility = GradientUtility(0.5)
    utility.update({"weight": weight})
    close(utility.read("weight"), (weight * gradient).abs().detach())
    utility.forget("weight")
    weight.grad = 3 * weight.grad
    utility.update({"weight": weight})
    close(utility.read("weight"), 3 * (weight * gradient).abs().detach())


def in_groups() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)),
    )


def turned() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(147, 3))


@both_types
@pytest.mark.parametrize("build", [mlp, convolutional, in_groups, turned])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_contributions(dtype, build, layout):
    model = build().to(dtype).to(memory_format=layout)
    kernels_read_it = layout is torch.contiguous_format or build is mlp

    def of(are_on: bool) -> list[Tensor]:
        use_kernels(are_on)
        x = some(2, *(INPUT | {in_groups: (2, 8, 8), turned: (2, 8, 8)})[build], dtype=dtype)
        population = ContinualBackprop(seed=0).attach(model, example_inputs=(x,))._population
        sizes = some(population.columns, dtype=dtype).abs()
        every = range(len(population.sets))
        assert (population._read_weights.kernels() is not None) == (are_on and kernels_read_it)
        with torch.no_grad():
            return [population.contribution(every, sizes).clone(), population.contribution(every).clone()]

    for found, expected in zip(of(True), of(False), strict=True):
        close(found, expected)


@both_types
def test_clamp_is_the_same_to_the_last_bit(dtype):
    tensors = [some(40, 50, dtype=dtype), some(7, dtype=dtype), some(2, 3, 4, 4, dtype=dtype)]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    tensors[0][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = [tensor.clamp(-limit, limit) for tensor, limit in zip(tensors, (0.3, 0.1, 2.0), strict=True)]
    kernels.clamp(together(*tensors), [0.3, 0.1, 2.0])
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


@both_types
def test_norms_and_scaling(dtype):
    tensors = [some(30, 5, dtype=dtype), some(3, dtype=dtype)]
    norms = torch.empty(2, dtype=dtype)
    kernels.norms(together(*tensors), norms)
    close(norms, torch.stack([tensor.double().norm() for tensor in tensors]).to(dtype))
    factors = torch.tensor([0.3, -2.0], dtype=dtype)
    expected = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    kernels.scale(together(*tensors), torch.stack([factors, torch.zeros_like(factors)], 1)[:, 0])  # not side by side
    assert_same(tensors, expected)


@both_types
@pytest.mark.parametrize("of_factors", [torch.float32, torch.float64])
def test_what_factors_make_too_large(dtype, of_factors):
    large = torch.finfo(dtype).max
    infinite, last_of_all = torch.full((3,), torch.inf, dtype=dtype), torch.tensor([1.0, -large / 4.1], dtype=dtype)
    group = together(infinite, some(3, dtype=dtype), last_of_all)
    for last, is_too_large in ((4.0, False), (4.2, True), (-9.0, False)):  # factors are positive
        apart = torch.tensor([[9.0, 0.0], [9.0, 0.0], [last, 0.0]], dtype=of_factors)[:, 0]
        assert kernels.overflow(group, apart) is is_too_large


@both_types
def test_rescaling_factors(dtype):
    weights = [some(30, 5, dtype=dtype), some(3, dtype=dtype), torch.zeros(2, dtype=dtype), torch.ones(1, dtype=dtype)]
    weights[3].fill_(torch.inf)
    norms = torch.stack([weight.norm() for weight in weights])
    coefficients, initial = torch.tensor([0.1, 1.0, 0.5, 0.5], dtype=dtype), norms * torch.tensor([2.0, 0.0, 1.0, 1.0])
    initial[2:] = 1.0
    exponents, factors = some(5, 4, dtype=dtype), torch.empty(5, dtype=dtype)
    kernels.rescaling_factors(together(*weights), initial.to(dtype), coefficients, exponents, factors)
    logs = log_rescaling_factors(norms, initial.to(dtype), coefficients)
    precision = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(factors, (exponents * logs).sum(1).exp(), rtol=precision, atol=0)


@both_types
def test_pull_is_the_same_to_the_last_bit(dtype):
    tensors, targets = (
        [some(30, 5, dtype=dtype), some(3, dtype=dtype)],
        [some(30, 5, dtype=dtype, seed=1), some(3, dtype=dtype)],
    )
    twins = [tensor.clone() for tensor in tensors]
    Editor(nn.Module(), (), "keep").draw_towards(tensors, targets, 0.013)
    use_kernels(False)
    Editor(nn.Module(), (), "keep").draw_towards(twins, targets, 0.013)
    assert_same(tensors, twins)


def test_autograd_knows_what_kernels_write():
    layer = nn.Linear(2, 2)
    loss = layer(layer(torch.ones(1, 2, requires_grad=True))).sum()
    Editor(layer, (), "keep").clamp([layer.weight], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_that_have_moved_are_found_again():
    weight = nn.Parameter(torch.ones(3))
    group = together(weight)
    weight.data = torch.full((3,), 5.0)
    assert group.kernels() is kernels
    kernels.clamp(group, [2.0])
    assert weight.tolist() == [2.0, 2.0, 2.0]
    weight.data = weight.data.bfloat16()
    assert group.kernels() is None


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.ones(2), torch.ones(2).double()],
        [torch.ones(2).half()],
        [torch.ones(2, 3).T[:1]],
        [torch.ones(4)[::2]],
        [torch.ones(2, device="meta")],
        [],
    ],
)
def test_what_kernels_leave_to_pytorch(tensors):
    assert Tensors(tensors).kernels() is None


def test_tensors_that_are_large_together_are_left_to_several_threads():
    halves = torch.ones(kernels.LARGE // 2 + 1), torch.ones(kernels.LARGE // 2)
    torch.set_num_threads(2)
    try:
        assert Tensors(halves).kernels() is None
        assert Tensors([halves[1], halves[1]]).kernels() is kernels  # as many as one thread may have
    finally:
        torch.set_num_threads(1)
    assert Tensors(halves).kernels() is kernels


def test_what_is_beside_must_be_laid_out_alike():
    assert Tensors([torch.ones(2, 3)], [torch.ones(3, 2).T]).kernels() is None


def test_turned_off():
    use_kernels(False)
    assert Tensors([torch.ones(2)]).kernels() is None


@pytest.mark.parametrize(
    ("value", "expected"), [("off", "False"), ("on", "True"), ("no", "must be 'on' or 'off', got 'no'")]
)
def test_turned_off_from_outside(value, expected):
    code = "from lightning_plasticity.kernels import kernels_are_on; print(kernels_are_on())"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "LIGHTNING_PLASTICITY_KERNELS": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in run.stdout + run.stderr


def test_tensors_are_the_same_only_if_each_is():
    a, b, c = some(2), some(3), some(3)
    group = Tensors([a, b], [c, b])
    assert group.are([a, b], [c, b])
    assert not group.are([a, b])
    assert not group.are([a], [c, b])
    assert not group.are([a, b, c], [c, b])
    assert not group.are([a, b.clone()], [c, b])
    assert not group.are([a, b], [c, b.clone()])
