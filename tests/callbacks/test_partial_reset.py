import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from callbacks.test_continual_backprop import ramp
from callbacks.unit_references import ReferencePartialReset
from lightning_plasticity import PartialReset
from lightning_plasticity.functional.partial_reset import reset_shares


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("build", [mlp, convolutional])
def test_same_course_as_the_slow_reference_over_300_steps(build, activation):
    model, twin = build(activation), build(activation)
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.003) for net in (model, twin)]
    example = (torch.zeros(1, *INPUT[build], dtype=torch.float64),)
    method = PartialReset(0.3, 20, init=ramp).attach(model, optimizers[0], example_inputs=example)
    reference = ReferencePartialReset(twin, strength=0.3, every=20, new_weights=ramp)
    train(model, optimizers[0], method.step, INPUT[build], 300)
    train(twin, optimizers[1], reference.step, INPUT[build], 300)
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-7, atol=1e-9)


def test_how_much_is_reset():
    shares = reset_shares(torch.tensor([0.0, 0.9, 1.0, 1.05, 3.0], dtype=torch.float64), 0.015).tolist()
    assert shares[:3] == [0.015] * 3
    assert shares[3] == pytest.approx(0.015 * 2 / (1 + torch.e ** (16 * 0.05)))
    assert shares[4] < 1e-10


def one_reset(model: nn.Module, example: torch.Tensor, **settings) -> tuple[set[str], torch.optim.Optimizer]:
    """The names of the parameters that a reset with the whole strength changes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    method = PartialReset(1.0, 1, **settings).attach(model, optimizer, example_inputs=(example,))
    model(example).square().sum().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}, optimizer


def test_what_is_touched_and_what_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    changed, optimizer = one_reset(model, torch.randn(8, 4))
    assert changed == {"0.weight", "3.weight", "5.weight"}
    assert all(optimizer.state[p]["exp_avg"].any() for p in (model[0].weight, model[5].weight))
    _, optimizer = one_reset(model, torch.randn(8, 4), optimizer_state="reset")
    assert not optimizer.state[model[0].weight]["exp_avg"].any()
    assert optimizer.state[model[0].bias]["exp_avg"].any()


@pytest.mark.parametrize("is_known_before", [True, False])
def test_activations_are_not_added_up(is_known_before):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    examples = {"example_inputs": (torch.zeros(1, 4),)} if is_known_before else {}
    method = PartialReset(0.1, 100).attach(model, optimizer, **examples)
    for _ in range(3):
        model(torch.ones(8, 4)).sum().backward()
        heard = list(method._population.activations._rows)
        optimizer.step()
        method.step()
    assert heard == [0]


def test_grouped_convolutions():
    """A unit's columns are in its own group."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2)
    )
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = -1.0  # the one unit without gradient, so that it alone is reset wholly
    x = torch.randn(16, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = PartialReset(1.0, 1, decay_rate=0.0, sharpness=1e6, exclude="2").attach(model, optimizer, (x[:1],))
    model(x).square().sum().backward()
    sizes = model[0].weight.grad.abs().mean((1, 2, 3))
    before = model[2].weight.detach().clone()
    optimizer.step()
    method.step()
    for i in range(4):
        group, column = divmod(i, 2)
        now, old = (weight[3 * group : 3 * group + 3, column] for weight in (model[2].weight, before))
        is_reset = bool(sizes[i] <= sizes.mean())
        torch.testing.assert_close(now, torch.zeros_like(old) if is_reset else old)
    assert sizes[2] == 0


def test_small_resets_count_in_half_precision():
    def course(dtype: torch.dtype) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        x = torch.ones(2, 4, dtype=dtype)
        method = PartialReset(1e-3, 1, decay_rate=0.99, sharpness=0.0).attach(model, optimizer, (x,))
        for _ in range(300):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            method.step()
        return model[2].weight.detach().float().norm().item()

    assert course(torch.bfloat16) == pytest.approx(course(torch.float32), rel=5e-3)


def test_gradients_that_are_not_finite_tell_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = PartialReset(0.5, 10).attach(model, optimizer, example_inputs=(torch.ones(1, 4),))
    for value, is_known in ((float("nan"), False), (float("inf"), False), (1.0, True)):
        before = method._state()["sets"]["0"]["utility"]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        model[0].weight.grad[0] = 0.0
        optimizer.step()
        model.load_state_dict({name: torch.ones_like(p) for name, p in model.state_dict().items()})
        method.step()
        assert torch.equal(method._state()["sets"]["0"]["utility"], before) != is_known
