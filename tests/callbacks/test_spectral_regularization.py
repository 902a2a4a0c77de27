import numpy as np
import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from lightning_plasticity import SpectralRegularization
from lightning_plasticity.functional.spectral_regularization import (
    lengths_and_directions,
    outer,
    spectral_step,
    times_columns,
    times_rows,
)
from lightning_plasticity.shards.parts import part_of


@pytest.mark.parametrize("network", [mlp, convolutional])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_same_course_as_the_slow_reference_over_300_steps(network, power):
    model, twin = network(), network()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (model, twin)]
    method = SpectralRegularization(0.05, power=power).attach(model, optimizers[0])
    rate = 0.01 * 0.05
    left = {name: u.numpy().copy() for name, u in method.state_dict()["method"]["left"].items()}

    def pull(vector: np.ndarray, target: float) -> None:
        distance = vector - target
        squared = float((distance**2).sum())
        vector -= rate * 2 * power * squared ** (power - 1) * distance

    def reference() -> None:
        for name, layer in twin.named_children():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                weight = layer.weight.detach().numpy().reshape(len(layer.weight), -1)
                v = weight.T @ left[f"{name}.weight"]
                v /= np.sqrt((v**2).sum())
                sigma = np.sqrt(((weight @ v) ** 2).sum())
                u = weight @ v / sigma
                left[f"{name}.weight"] = u
                weight -= rate * 2 * power * sigma ** (power - 1) * (sigma**power - 1) * np.outer(u, v)
            elif isinstance(layer, nn.BatchNorm2d):
                pull(layer.weight.detach().numpy(), 1.0)
            if getattr(layer, "bias", None) is not None:
                pull(layer.bias.detach().numpy(), 0.0)

    train(model, optimizers[0], method.step, INPUT[network], 300)
    train(twin, optimizers[1], reference, INPUT[network], 300)
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-8, atol=1e-10)


def at_rest(model: nn.Module, rate: float, steps: int, **settings) -> None:
    """Steps without gradients, so that the method alone moves the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = SpectralRegularization(rate, **settings).attach(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(steps):
        optimizer.step()
        method.step()


@pytest.mark.parametrize("start", [0.3, 5.0])
@pytest.mark.parametrize("rate", [0.01, 1e6])
def test_the_largest_singular_value_goes_to_1_however_large_the_rate(start, rate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=start)
        model[0].weight *= start / torch.linalg.matrix_norm(model[0].weight, 2)
    at_rest(model, rate, 2000)
    # values below the largest one stay until they are the largest
    assert float(torch.linalg.matrix_norm(model[0].weight.detach(), 2)) == pytest.approx(1.0, abs=0.05)
    for distance in (model[1].weight - 1, model[1].bias, model[0].bias):
        assert distance.detach().norm().item() <= 0.2


def test_what_is_drawn_and_what_stays():
    def changed(**settings) -> set[str]:
        model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        with torch.no_grad():
            model[2].weight *= 2
            model[2].bias += 1
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        at_rest(model, 0.01, 1, **settings)
        return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    weights = {"1.weight", "3.weight"}
    assert changed() == weights | {"1.bias", "3.bias", "2.weight", "2.bias"}
    assert changed(norms=False) == weights | {"1.bias", "3.bias"}
    assert changed(biases=False, norms=False) == weights
    assert changed(biases=False, norms=False, include=["1", "3"], exclude="3") == {"1.weight"}


def test_power_iteration_finds_the_largest_singular_value():
    torch.manual_seed(0)
    matrix, left = torch.randn(5, 7, dtype=torch.float64), torch.nn.functional.normalize(torch.ones(5).double(), dim=0)

    def iterate(matrix: torch.Tensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, [right] = lengths_and_directions([times_columns(part_of(matrix), left)])
        [sigma], [left] = lengths_and_directions([times_rows(part_of(matrix), right)])
        return sigma, left, right

    for _ in range(500):
        sigma, left, right = iterate(matrix, left)
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrix, 2))
    torch.testing.assert_close(left @ matrix @ right, sigma)
    torch.testing.assert_close(outer(part_of(matrix), left, right), torch.outer(left, right))
    sigma, left, right = iterate(torch.zeros(5, 7, dtype=torch.float64), left)
    assert not sigma
    assert not left.any()
    assert not right.any()
    assert not spectral_step(sigma, 0.1)


def test_a_matrix_of_zeros_keeps_its_vector():
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SpectralRegularization(0.1).attach(model, optimizer)
    before = method.state_dict()["method"]["left"]["weight"]
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    method.step()
    assert torch.equal(method.state_dict()["method"]["left"]["weight"], before)
    assert torch.linalg.vector_norm(before).item() == pytest.approx(1.0)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="SpectralRegularization needs the optimizer"):
        SpectralRegularization().attach(mlp())
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = SpectralRegularization(exclude="4").attach(model, optimizer).state_dict()
    method = SpectralRegularization().attach(model, optimizer)
    with pytest.raises(ValueError, match=r"only one of the two has \['4.weight'\]"):
        method.load_state_dict(state)


def test_small_changes_count_in_half_precision():
    def course(dtype: torch.dtype) -> list[float]:
        model = nn.Linear(1, 1)
        model.weight.data, model.bias.data = torch.full((1, 1), 2.0, dtype=dtype), torch.full((1,), 2.0, dtype=dtype)
        at_rest(model, 1e-4, 300)
        return [model.weight.item(), model.bias.item()]

    assert course(torch.bfloat16) == pytest.approx(course(torch.float32), rel=4e-3)
