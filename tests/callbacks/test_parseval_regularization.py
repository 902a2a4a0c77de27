import numpy as np
import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from lightning_plasticity import ParsevalRegularization
from lightning_plasticity.functional.parseval_regularization import parseval_update


def slow_gradient(matrix: np.ndarray, target: float) -> np.ndarray:
    """Of the squared Frobenius norm of the difference between the smaller product and the target, by autograd."""
    w = torch.from_numpy(matrix).clone().requires_grad_()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    (gram - target * torch.eye(len(gram), dtype=gram.dtype)).square().sum().backward()
    return w.grad.numpy()


@pytest.mark.parametrize("network", [mlp, convolutional])
def test_same_course_as_the_slow_reference_over_300_steps(network):
    model, twin = network(), network()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (model, twin)]
    method = ParsevalRegularization(0.01).attach(model, optimizers[0])
    *hidden, _last = [layer for layer in twin if isinstance(layer, nn.Linear | nn.Conv2d)]

    def reference() -> None:
        for layer in hidden:
            rows = len(layer.weight)
            flat = layer.weight.detach().numpy().reshape(rows, -1)
            flat -= 0.01 * 0.01 * (64 / rows) ** 2 * slow_gradient(flat, 2.0)

    train(model, optimizers[0], method.step, INPUT[network], 300)
    train(twin, optimizers[1], reference, INPUT[network], 300)
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
@pytest.mark.parametrize("rate", [0.01, 1e9])
def test_singular_values_go_to_the_target_without_passing_it(shape, rate):
    torch.manual_seed(0)
    matrix = 2 * torch.randn(shape, dtype=torch.float64)
    before = torch.linalg.svdvals(matrix).square()
    for _ in range(3000):
        matrix = matrix + parseval_update(matrix, rate, target=2.0)
        values = torch.linalg.svdvals(matrix).square()
        assert ((values - 2).sign() * (before - 2).sign() >= 0).logical_or((values - 2).abs() < 1e-9).all()
        before = values
    torch.testing.assert_close(before, torch.full_like(before, 2.0))


def changed(method: ParsevalRegularization, model: nn.Module, x: torch.Tensor) -> set[str]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method.attach(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = model(x)
    (0 * sum(part.sum() for part in (out if isinstance(out, tuple) else (out,)))).backward()
    optimizer.step()
    method.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.policy, self.value = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.norm(self.body(x).relu())
        return self.policy(hidden), self.value(hidden)


def test_hidden_layers_only_unless_told_otherwise():
    x = torch.ones(2, 4)
    assert changed(ParsevalRegularization(), TwoHeads(), x) == {"body.weight"}
    both = {"body.weight", "policy.weight", "value.weight"}
    assert changed(ParsevalRegularization(last_layer=True), TwoHeads(), x) == both
    assert changed(ParsevalRegularization(last_layer=True, exclude="value"), TwoHeads(), x) == both - {"value.weight"}


def test_a_step_goes_no_further_than_its_bound():
    # Of 2 in one row: 2 - 4 * held * (4 - 1) * 2, where held is 1 / (4 * (3 * 4 - 1)) however large the rate is.
    torch.testing.assert_close(parseval_update(torch.tensor([[2.0, 0.0]]), 1.0, 1.0), torch.tensor([[-6 / 11, 0.0]]))


def test_the_pull_of_adamo_and_the_width_that_a_coefficient_is_for():
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    moves = []
    for settings in ({"reference_width": None, "target": 1.0}, {"reference_width": 10, "target": 1.0}):
        model = nn.Linear(5, 5, bias=False)
        model.weight.data = weight.clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = ParsevalRegularization(0.01, last_layer=True, **settings).attach(model, optimizer)
        model.weight.grad = torch.zeros(5, 5)
        optimizer.step()
        method.step()
        moves.append(model.weight.detach() - weight)
    torch.testing.assert_close(moves[0], -0.001 * torch.from_numpy(slow_gradient(weight.numpy(), 1.0)))
    torch.testing.assert_close(moves[1], 4 * moves[0])


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="ParsevalRegularization needs the optimizer"):
        ParsevalRegularization(last_layer=True).attach(mlp())
    only = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="ParsevalRegularization needs weights"):
        ParsevalRegularization().attach(
            only, torch.optim.SGD(only.parameters(), lr=0.1), example_inputs=(torch.ones(1, 6),)
        )


def test_small_changes_count_in_half_precision():
    def course(dtype: torch.dtype) -> float:
        torch.manual_seed(0)
        model = nn.Linear(8, 8, bias=False)
        model.weight.data = (2 * torch.eye(8)).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        method = ParsevalRegularization(1e-4, reference_width=None, last_layer=True).attach(model, optimizer)
        model.weight.grad = torch.zeros_like(model.weight)
        for _ in range(300):
            optimizer.step()
            method.step()
        return model.weight.detach().float().norm().item()

    assert course(torch.bfloat16) == pytest.approx(course(torch.float32), rel=2e-3)
