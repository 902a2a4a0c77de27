import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from lightning_plasticity import IsometryReinit
from lightning_plasticity.functional.isometry_reinit import nearest_isometry
from lightning_plasticity.layers.matrices import FUSED, Matrices


def slow_isometry(matrix: np.ndarray, iterations: int | None) -> np.ndarray:
    if iterations is None:
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        return left @ right
    x = matrix.T if matrix.shape[1] > matrix.shape[0] else matrix
    x = x / math.sqrt((x**2).sum())
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * x @ (x.T @ x)
    return x.T if matrix.shape[1] > matrix.shape[0] else x


def slow_reinit(weight: np.ndarray, iterations: int | None) -> np.ndarray:
    """One layer without groups, place by place."""
    new = np.empty_like(weight)
    places = list(np.ndindex(weight.shape[2:]))
    for place in places:
        at = (slice(None), slice(None), *place)
        outputs, inputs = weight.shape[:2]
        new[at] = slow_isometry(weight[at], iterations) * math.sqrt(outputs / inputs) / len(places)
    return new


@pytest.mark.parametrize("network", [mlp, convolutional])
@pytest.mark.parametrize("iterations", [5, 10, None])
def test_same_course_as_the_slow_reference_over_300_steps(network, iterations):
    model, twin = network(), network()
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.003) for net in (model, twin)]
    settings = {"exact": True} if iterations is None else {"iterations": iterations}
    method = IsometryReinit(**settings, every_n_train_steps=50).attach(model, optimizers[0])
    steps = 0

    def reference() -> None:
        nonlocal steps
        steps += 1
        for layer in twin.modules() if steps % 50 == 0 else ():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.data = torch.from_numpy(slow_reinit(layer.weight.detach().numpy(), iterations))
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    optimizers[1].state[layer.weight][key].zero_()

    train(model, optimizers[0], method.step, INPUT[network], 300)
    train(twin, optimizers[1], reference, INPUT[network], 300)
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-8, atol=1e-10)


def deviation(matrix: torch.Tensor) -> float:
    gram = matrix @ matrix.mT if matrix.shape[-1] > matrix.shape[-2] else matrix.mT @ matrix
    return float((gram - torch.eye(len(gram[0]), dtype=gram.dtype)).square().sum())


@pytest.mark.parametrize("shape", [(30, 30), (40, 10), (10, 40), (1, 7), (7, 1)])
def test_the_exact_one_is_an_isometry_and_the_nearest(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    exact = nearest_isometry(matrix, None)
    assert deviation(exact) < 1e-20
    torch.testing.assert_close(nearest_isometry(exact, None), exact)
    torch.testing.assert_close(nearest_isometry(matrix, 100), exact)
    for _ in range(20):
        other = nearest_isometry(exact + 0.3 * torch.randn(shape, dtype=torch.float64), None)
        assert (matrix - exact).norm() <= (matrix - other).norm()


def test_the_published_iteration_leaves_large_matrices_short_of_isometries():
    torch.manual_seed(0)
    matrix = torch.randn(256, 256)
    values = torch.linalg.svdvals(nearest_isometry(matrix, 10))
    assert float((values < 0.99).float().mean()) == pytest.approx(0.37, abs=0.02)
    assert float(torch.linalg.svdvals(nearest_isometry(matrix, 5)).median()) == pytest.approx(0.37, abs=0.02)


def test_matrices_that_are_zero_or_not_finite_stay():
    matrices = torch.stack([torch.zeros(3, 3), torch.full((3, 3), float("nan")), torch.eye(3)])
    matrices[1, 0, 0] = 2.0
    for iterations in (10, None):
        new = nearest_isometry(matrices, iterations, scale=3.0)
        assert torch.equal(new[:2].nan_to_num(nan=7.0), matrices[:2].nan_to_num(nan=7.0))
        torch.testing.assert_close(new[2], 3 * torch.eye(3), rtol=1e-2, atol=1e-2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            OrderedDict(
                embedding=nn.Embedding(10, 8),
                grouped=nn.Conv2d(4, 6, 3, groups=2),
                depthwise=nn.Conv2d(4, 4, 3, groups=4),
                transposed=nn.ConvTranspose2d(4, 6, 2, groups=2),
                norm=nn.LayerNorm(8),
                attention=nn.MultiheadAttention(8, 2),
                qkv=nn.Linear(8, 24),
                head=nn.Linear(8, 3),
            )
        ).double()


def test_what_is_touched_and_what_is_a_matrix():
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    IsometryReinit(exact=True, on_fit_start=True).attach(model)
    parts = {name.removeprefix("parts."): p.detach() for name, p in model.named_parameters()}
    changed = {name for name, p in parts.items() if not torch.equal(p, before[f"parts.{name}"])}
    assert changed == {
        "grouped.weight",
        "transposed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "qkv.weight",
        "head.weight",
    }
    for name in ("attention.in_proj_weight", "qkv.weight"):
        for part in parts[name].split(8):
            assert deviation(part) < 1e-20
    assert deviation(parts["head.weight"] / math.sqrt(3 / 8)) < 1e-20
    for group in parts["grouped.weight"].split(3):
        assert deviation(group[:, :, 1, 2] * 9 / math.sqrt(3 / 2)) < 1e-20
    for group in parts["transposed.weight"].split(2):
        assert deviation(group[:, :, 0, 1].T * 4 / math.sqrt(3 / 2)) < 1e-20


def test_a_fused_layer_of_another_name():
    model = nn.ModuleDict({"projection": nn.Linear(4, 8, bias=False)}).double()
    IsometryReinit(exact=True, on_fit_start=True, fused={"*projection*": 2}).attach(model)
    for part in model["projection"].weight.detach().split(4):
        assert deviation(part) < 1e-20
    with pytest.raises(
        ValueError, match=r"The 8 rows of 'projection.weight' must be shared out evenly .* fused= says 3"
    ):
        IsometryReinit(on_fit_start=True, fused={"*": 3}).attach(model)


@pytest.mark.parametrize("layer", [nn.Linear(3, 6), nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose3d(4, 2, 2)])
def test_matrices_are_put_together_again_as_they_were(layer):
    matrices = Matrices.of(layer, "qkv.weight", layer.weight, FUSED)
    assert torch.equal(matrices.join(matrices.split(layer.weight)), layer.weight)


@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_optimizer_state_of_what_is_written(optimizer_state):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    method = IsometryReinit(every_n_train_steps=1, optimizer_state=optimizer_state).attach(model, optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    method.step()
    assert bool(optimizer.state[model.weight]["exp_avg"].any()) == (optimizer_state == "keep")
    assert optimizer.state[model.bias]["exp_avg"].any()


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="It must be said when to act"):
        IsometryReinit()
    with pytest.raises(ValueError, match=r"fused must be a dict .* got \['qkv'\]"):
        IsometryReinit(on_fit_start=True, fused=["qkv"])
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(ValueError, match=r"not depthwise, but include=\('\*',\) leaves none in Sequential\."):
        IsometryReinit(on_fit_start=True).attach(depthwise)
    with pytest.raises(ValueError, match="got 'nothing'"):
        IsometryReinit(on_fit_start=True, exclude="nothing").attach(mlp())
