"""Methods with their authors' settings, and the page that names a test for each row."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, mlp, train
from callbacks.unit_references import ReferenceContinualBackprop
from lightning_plasticity import ContinualBackprop

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("utility", ["adaptable_contribution", "contribution"])
def test_continual_backprop(utility: str) -> None:
    """The same units, and the same draws for them: uniform, and as wide as the authors have it."""
    init = partial(nn.init.kaiming_uniform_, nonlinearity="relu")
    model, twin = mlp(), mlp()
    method = ContinualBackprop(0.004, 20, 0.95, utility, init, compensate_bias=False, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, *INPUT[mlp], dtype=torch.float64),))
    own = type(method.draws)(method.draws._seed)
    drawn = []

    def uniform(weight: torch.Tensor) -> torch.Tensor:
        bound = (2 * 3 / weight.shape[1]) ** 0.5
        values = torch.empty(weight.shape, dtype=weight.dtype).uniform_(-bound, bound, generator=own.generator("cpu"))
        drawn.append(values.abs().max().item() / bound)
        return values

    reference = ReferenceContinualBackprop(
        twin, rate=0.004, maturity=20, decay=0.95, utility=utility, compensate=False, new_weights=uniform
    )
    train(model, optimizer, method.step, INPUT[mlp], 500)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.05), reference.step, INPUT[mlp], 500)
    assert method.replaced == len(drawn) > 10
    assert 0.9 < max(drawn) <= 1.0
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-6, atol=1e-8)


def test_optimizer_state_of_what_continual_backprop_writes() -> None:
    """Of new rows, their biases and their columns it is cleared; the bias that takes over what they gave keeps it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters())
    method = ContinualBackprop(0.1, 3, optimizer_state="reset")
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, 4),))
    while not method.replaced:
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        states = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
        bias = model[2].bias.detach().clone()
        method.step()
    [unit] = (model[2].weight == 0).all(0).nonzero().flatten().tolist()
    for key in ("exp_avg", "exp_avg_sq"):
        for parameter, index in (
            (model[0].weight, unit),
            (model[0].bias, unit),
            (model[2].weight, (slice(None), unit)),
        ):
            expected = states[parameter][key]
            assert expected.any()
            expected[index] = 0.0
            assert torch.equal(optimizer.state[parameter][key], expected)
        assert torch.equal(optimizer.state[model[2].bias][key], states[model[2].bias][key])
    assert not torch.equal(model[2].bias, bias)


def test_the_page_names_tests_that_exist_and_every_method() -> None:
    page = (ROOT / "docs" / "as_published.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 30
    for file, test in named:
        texts = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert any(f"\ndef {test}(" in text for text in texts), f"{file}::{test}"
    methods = (ROOT / "lightning_plasticity" / "callbacks" / "__init__.py").read_text()
    for method in set(re.findall(r'^    "(\w+)",', methods, re.M)) - {"PlasticityMonitor", "ActivationStrategy"}:
        assert f"`{method}`" in page, method
