"""Kernels for GPUs on tensors of the CPU: run by `test_on_gpu.py` in a process of its own, by Triton's interpreter."""

from functools import partial
from unittest.mock import patch

import torch
from contract.cases import CASES
from contract.training import train_plainly
from contract.training import weights as weights_of
from torch import Tensor

from lightning_plasticity import ContinualBackprop
from lightning_plasticity.editing.edits import Editor
from lightning_plasticity.engine.population import average_in
from lightning_plasticity.kernels import Tensors, choice, on_gpu


def some(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((70, 50), (3,), (1,), (2, 3, 4, 4))]


def check() -> None:
    values, targets, factors = some(0), some(1), torch.tensor([0.3, -2.0, 5.0, 1.0])
    targets[0][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    averages = [value.clone() for value in values]
    for average, target in zip(averages, targets, strict=True):
        average_in(average, slice(None), target, 0.01)
    scaled = [value * factor for value, factor in zip(values, factors, strict=True)]
    targets[0][0, :3] = 0.0
    drawn = [value - 0.013 * (value - target) for value, target in zip(values, targets, strict=True)]
    clamped = [value.clamp(-0.5, 0.5) for value in values]
    editor = Editor(torch.nn.Module(), (), "keep")
    with patch.object(choice, "_found", lambda kind: on_gpu):
        found = [value.clone() for value in values]
        editor.scale(found, factors)
        torch.testing.assert_close(found, scaled, rtol=0, atol=0)
        found = [value.clone() for value in values]
        editor.draw_towards(found, targets, 0.013)
        torch.testing.assert_close(found, drawn)
        found = [value.clone() for value in values]
        editor.clamp(found, 0.5)
        torch.testing.assert_close(found, clamped, rtol=0, atol=0)
        targets[0][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        found = [value.clone() for value in values]
        group = Tensors(found, targets)
        assert group.kernels() is on_gpu
        on_gpu.average_in(group, 0.01)
        torch.testing.assert_close(found, averages)
        weights, gradients = some(2), [value.clone() for value in targets]
        averages = [torch.rand_like(value) for value in values]
        group, beside = Tensors(averages, weights), Tensors(gradients, weights)
        assert group.kernels() is beside.kernels() is on_gpu
        moved = [average.clone() for average in averages]
        for average, weight, gradient in zip(moved, weights, gradients, strict=True):
            average_in(average, slice(None), (weight * gradient).abs(), 0.01)
        on_gpu.average_utilities(group, beside, 0.01)
        torch.testing.assert_close(averages, moved)
        assert Tensors([torch.ones(2, dtype=torch.float64)]).kernels() is None


class ReadTwice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.again = torch.nn.Linear(5, 70), torch.nn.Linear(70, 6)
        self.first, self.second = torch.nn.Linear(70, 6), torch.nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.make(x).relu()
        return self.second((self.first(hidden) + self.again(hidden)).relu())


def check_contributions() -> None:
    convolutional = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 8, 3, groups=2), torch.nn.ReLU()),
        *(torch.nn.ConvTranspose2d(8, 4, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 25, 40)),
        *(torch.nn.ReLU(), torch.nn.Linear(40, 3)),
    )

    def of(found: object, network: torch.nn.Module, *shape: int) -> list[Tensor]:
        with patch.object(choice, "_found", lambda kind: found):
            method = ContinualBackprop(seed=0).attach(network, example_inputs=(torch.zeros(1, *shape),))
            population = method._population
            sizes = torch.rand(population.columns, generator=torch.Generator().manual_seed(0))
            every = range(len(population.sets))
            assert population._read_weights is not None
            assert population._read_weights.kernels() is found
            with torch.no_grad():
                return [population.contribution(every, sizes).clone(), population.contribution(every).clone()]

    twice = ReadTwice()
    torch.testing.assert_close(of(on_gpu, convolutional, 3, 8, 8), of(None, convolutional, 3, 8, 8))
    torch.testing.assert_close(of(on_gpu, twice, 5), of(None, twice, 5))


def activations(channels: int) -> list[tuple[Tensor, int]]:
    """Of all layouts, and of sizes that no block divides, with the dimension of channels."""
    generator = torch.Generator().manual_seed(0)
    some = partial(torch.randn, generator=generator)
    image = some(4, channels, 11, 13)
    return [
        *[(some(rows, channels), -1) for rows in (1, 2, 33, 4500)],
        *[(some(2, channels, 600), -2), (some(channels, 9), -2), (image, -3), (image[:, :, 2:], -3)],
        *[(image.to(memory_format=torch.channels_last), -3), (image.mT, -3), (some(2, channels, 3, 4, 5), -4)],
        *[(some(7, 5, channels), -1), (some(7, 5, channels).transpose(0, 1), -1), (some(9, 20, channels)[:, ::3], -1)],
        *[(some(1, channels).expand(6, channels), -1), (some(channels, 8).T, -1), (some(channels), -1)],
        *[(image.bfloat16(), -3), (some(70, channels).half(), -1)],
    ]


def check_column_sums(channels: int) -> None:
    for x, dim in activations(channels):
        rows = x.double().movedim(dim, -1).reshape(-1, channels)
        total, size = torch.full((channels,), torch.nan), torch.full((channels,), torch.nan)
        without = total.clone()
        add = on_gpu.column_sums(dim, total, size)
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5 * len(rows) ** 0.5, check_dtype=False)
        before = 0
        for times in (1, 2):
            assert add(x, before) == len(rows)
            before += len(rows)
            close(total, times * rows.sum(0))
            close(size, times * rows.abs().sum(0))
            if times == 1:
                assert on_gpu.column_sums(dim, without, None)(x, 0) == len(rows)
                assert torch.equal(without, total)
        total.copy_(-rows[0])
        size.fill_(torch.nan)  # of a single row sizes are told from the total
        add(x, 1)
        close(total, rows.sum(0) - rows[0])
        close(size, rows.abs().sum(0) + rows[0].abs())


def check_what_is_not_finite() -> None:
    x = torch.ones(40, 5)
    x[3, 0], x[4, 1], x[5, 2], x[6, 3], x[7, 3] = torch.nan, torch.inf, -torch.inf, torch.inf, -torch.inf
    total, size = torch.zeros(5), torch.zeros(5)
    on_gpu.column_sums(-1, total, size)(x, 0)
    torch.testing.assert_close([total, size], [x.sum(0), x.abs().sum(0)], rtol=0, atol=0, equal_nan=True)


def check_what_is_left_to_pytorch() -> None:
    def rows(x: Tensor, dim: int = -1, dtype: torch.dtype = torch.float32) -> int:
        total = torch.zeros(4, dtype=dtype)
        added = on_gpu.column_sums(dim, total, None)(x, 0)
        assert added or not total.any()
        return added

    assert rows(torch.ones(3, 4)) == 3
    for x in (torch.ones(3, 4).double(), torch.ones(3, 5), torch.ones(0, 4), torch.ones(3, 4, device="meta")):
        assert rows(x) == 0
    assert rows(torch.ones(3, 4), -3) == rows(torch.ones(3, 4), -1, torch.float64) == 0
    assert rows(torch.ones(4, 6, 8, 4)[::2, ::2, ::2]) == 0  # three dimensions of rows that do not follow each other
    assert rows(torch.ones(4, 6, 8, 4)[:, ::2]) == 4 * 3 * 8
    assert rows(torch.ones(4, 6, 8, 4).as_subclass(type("Own", (Tensor,), {}))) == 0


def check_power_iteration() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (70, 150), (1, 1), (40, 3, 5, 5), (2, 1100), (130, 2), (3, 4), (2, 2)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    matrices[5].zero_()
    matrices[6].fill_(torch.nan)
    lefts = [torch.nn.functional.normalize(torch.randn(len(m), generator=generator), dim=0) for m in matrices]
    group = Tensors(matrices, in_order=True)
    with patch.object(choice, "_found", lambda kind: on_gpu):
        assert group.kernels() is on_gpu
    sigmas, found, rights = on_gpu.power_iteration(group, torch.cat(lefts))
    factors = torch.randn(len(matrices), generator=generator)
    steps = on_gpu.outer_products(group, found, rights, factors)
    of_each = found.split([len(m) for m in matrices]), rights.split([m[0].numel() for m in matrices])
    for m, left, factor, sigma, u, v, step in zip(
        matrices, lefts, factors, sigmas, *of_each, steps.split([m.numel() for m in matrices]), strict=True
    ):
        m = m.flatten(1)
        if not m.isfinite().all() or not m.any():  # it keeps its vector
            torch.testing.assert_close([sigma, u], [m.sum(), left], rtol=0, atol=0, equal_nan=True)
            continue
        right = m.T @ left
        right /= right.norm()
        torch.testing.assert_close(v, right)
        torch.testing.assert_close(sigma, (m @ right).norm())
        torch.testing.assert_close(u, m @ right / (m @ right).norm())
        torch.testing.assert_close(step.view(m.shape), factor * torch.outer(u, v))


def check_scale_from_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.randn(n, side, side, generator=generator) for n, side in ((2, 40), (1, 1), (3, 5))]
    factors = torch.randn(6, generator=generator)
    squares = [square for stack in stacks for square in stack]
    expected = [f * (square - 0.7 * torch.eye(len(square))) for f, square in zip(factors, squares, strict=True)]
    on_gpu.scale_from_diagonal(stacks, 0.7, factors)
    torch.testing.assert_close(squares, expected)


def check_training() -> None:
    """Methods do the same with them and without."""
    sgd = partial(torch.optim.SGD, lr=0.05)
    launched: set[str] = set()
    launch = on_gpu._launch

    def noted(kernel: object, *arguments: object, **constants: object) -> None:
        launched.add(kernel.__name__)
        launch(kernel, *arguments, **constants)

    of_name = {case.name: case for case in CASES}
    for case in [of_name[name] for name in LAUNCHED]:
        launched.clear()
        with patch.object(choice, "_found", lambda kind: None):
            expected = weights_of(train_plainly(case.make(seed=0), sgd))
        here, elsewhere = patch.object(choice, "_found", lambda kind: on_gpu), patch.object(Tensor, "is_cpu", False)
        with here, elsewhere, patch.object(on_gpu, "_launch", noted):
            found = weights_of(train_plainly(case.make(seed=0), sgd))
        assert launched == LAUNCHED[case.name], f"{case.name} launched {launched}"
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# What each method launches in an ordinary training.
LAUNCHED = {
    "ContinualBackprop": {"sum_columns", "contributions", "average_in"},
    "ActivationReset": {"sum_columns", "average_in"},
    "ReDo over steps": {"sum_columns"},
    "SelectiveReinit by gradient": {"average_utilities"},
    "ParsevalRegularization": {"scale_from_diagonal"},
    "SpectralRegularization": {"times_matrices", "directions", "outer_products"},
}


if __name__ == "__main__":
    check_column_sums(3)
    with patch.object(on_gpu, "_SUMMING", 20):  # programs, which run one after the other here
        check_column_sums(70)
    check_what_is_not_finite()
    check_what_is_left_to_pytorch()
    check_power_iteration()
    check_scale_from_diagonal()
    check_training()
    check()
    check_contributions()
    print("all agree")
