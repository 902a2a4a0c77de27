import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from callbacks.unit_references import ReferenceActivationReset
from lightning_plasticity.callbacks.activation_reset import ActivationReset
from lightning_plasticity.functional.activation_reset import RELU, TANH, ActivationStrategy, strategy_for

OFTEN = ActivationStrategy(low_rate=0.004, high_rate=0.003, low_scale=-0.5, high_scale=0.5)


def attached(method, model, shape, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, *shape, dtype=torch.float64),))
    return optimizer


@pytest.mark.parametrize("build", [mlp, convolutional])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_all_weights_agree_with_the_slow_reference(build, activation):
    model, twin = build(activation), build(activation)
    method = ActivationReset(OFTEN, decay_rate=0.95, maturity_threshold=20, max_weight=0.4)
    optimizer = attached(method, model, INPUT[build])
    layers = len(method._population.sets)
    reference = ReferenceActivationReset(
        twin, strategies=[(0.004, 0.003, -0.5, 0.5)] * layers, maturity=20, decay=0.95, max_weight=0.4
    )
    train(model, optimizer, method.step, INPUT[build], 2000)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.05), reference.step, INPUT[build], 2000)
    for parameter, slow in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-6, atol=1e-8)
    counts = {end: sum(len(units) for _, e, units in reference.history if e == end) for end in ("low", "high")}
    assert (method.scaled_low, method.scaled_high) == (counts["low"], counts["high"])
    assert counts["low"] > counts["high"] > 50


def test_a_reset_that_is_just_earned_is_made_at_once():
    """Of low activations first: those units are no longer among the ones that earn resets of high ones."""
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    method = ActivationReset(ActivationStrategy(0.2, 0.25, -0.5, 0.5), maturity_threshold=0)
    optimizer = attached(method, model, (2,))
    for count in (1, 2, 3):  # each step earns a fifth of 5 units, and a quarter of the 4 others
        model(torch.ones(3, 2).double()).sum().backward()
        optimizer.step()
        method.step()
        assert (method.scaled_low, method.scaled_high) == (count, count)


def test_the_strategy_follows_the_activation():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 5),
        nn.Sigmoid(), nn.Linear(5, 2),
    ).double()  # fmt: skip
    method = ActivationReset()
    attached(method, model, (4,))
    assert method._strategies == [RELU, TANH, RELU, TANH]
    method = ActivationReset("tanh")
    attached(method, model, (4,))
    assert method._strategies == [TANH] * 4
    method = ActivationReset({"2": OFTEN, "6": "relu"})
    attached(method, model, (4,))
    assert method._strategies == [RELU, OFTEN, RELU, RELU]


@pytest.mark.parametrize(
    ("activation", "strategy"),
    [("relu", RELU), ("leaky_relu", RELU), ("elu", RELU), ("tanh", TANH), ("softsign", TANH), (None, RELU)],
)
def test_automatic_strategies(activation, strategy):
    assert strategy_for(activation) is strategy


def test_published_strategies():
    assert ActivationStrategy(1e-4, 1e-5, -0.5, 0.5) == RELU
    assert ActivationStrategy(1e-6, 1e-5, 0.5, 0.2) == TANH


def test_outgoing_weights_stay_and_state_is_cleared():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    method = ActivationReset(ActivationStrategy(0.1, 0.0, -0.5, 0.5), maturity_threshold=0)
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, 6).double(),))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    method.step()
    (row,) = (model[0].weight != before["0.weight"]).any(1).nonzero().flatten().tolist()
    assert torch.equal(model[0].weight[row], before["0.weight"][row] * -0.5)
    assert torch.equal(model[0].bias[row], before["0.bias"][row] * -0.5)
    assert (optimizer.state[model[0].weight]["momentum_buffer"][row] == 0).all()
    assert (optimizer.state[model[0].weight]["momentum_buffer"] != 0).any(1).sum() == 11
    assert torch.equal(model[4].weight, before["4.weight"])


def test_no_clamp_without_max_weight():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = 50.0
    for max_weight, expected in ((None, 50.0), (10.0, 10.0)):
        method = ActivationReset(max_weight=max_weight)
        optimizer = attached(method, model, (6,), lr=0.0)
        model(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
        method.step()
        assert model[0].weight[0, 0].item() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "elu"}, "strategy must be"),
        ({"strategy": {"0": "elu"}}, "strategy must be"),
        ({"decay_rate": -0.1}, "decay_rate"),
        ({"maturity_threshold": -1}, "maturity_threshold"),
        ({"max_weight": 0.0}, "max_weight"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActivationReset(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2.0, 0, 1, 1), "low_rate"), ((0, -1, 1, 1), "high_rate"), ((0, 0, float("nan"), 1), "low_scale")],
)  # fmt: skip
def test_bad_strategies_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActivationStrategy(*arguments)


def test_a_strategy_for_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"no layer with hidden units\. They are: 0, 2"):
        attached(ActivationReset({"fc1": "relu"}), mlp(), (6,))
