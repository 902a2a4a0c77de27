import pytest
import torch

from callbacks.streams import INPUT, convolutional, mlp, train
from callbacks.test_continual_backprop import ramp, record_choices
from callbacks.unit_references import ReferenceGradientReDo, ReferenceReDo
from lightning_plasticity.callbacks.redo import ReDo
from lightning_plasticity.functional.redo import dormancy_scores


@pytest.mark.parametrize("score_steps", [1, 3, 10])
@pytest.mark.parametrize("build", [mlp, convolutional])
def test_same_units_at_the_same_steps_as_the_slow_reference(build, score_steps):
    model, twin = build(), build()
    if build is convolutional:  # the reference leaves norms alone
        model[1], twin[1] = torch.nn.Identity(), torch.nn.Identity()
    method = ReDo(0.4, every_n_train_steps=10, init=ramp, score_steps=score_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, *INPUT[build], dtype=torch.float64),))
    choices = record_choices(method)
    reference = ReferenceReDo(twin, threshold=0.4, every=10, new_weights=ramp, score_steps=score_steps)
    train(model, optimizer, method.step, INPUT[build], 1000)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), reference.step, INPUT[build], 1000)
    expected = [{i: tuple(units) for i, units in enumerate(chosen) if units} for chosen in reference.history]
    assert choices == expected
    assert method.replaced == sum(len(units) for chosen in choices for units in chosen.values()) > 0
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-6, atol=1e-8)


def test_a_silent_layer_is_all_dormant_and_divides_nothing_by_zero():
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = ReDo(0.0, 1).attach(model, optimizer, example_inputs=(torch.zeros(1, 6).double(),))
    x = torch.randn(8, 6, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    method.step()
    assert (model[0].bias == 0).all()
    assert (model[2].weight == 0).all()
    assert dormancy_scores(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("score_steps", "expected"),
    [
        (1, [False, False, True, False, False, False, True, False]),
        (3, [True, True, True, False, True, True, True, False]),
    ],
)
def test_only_the_steps_that_decide_are_read(score_steps, expected):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = ReDo(0.0, 4, score_steps=score_steps)
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, 6).double(),))
    listening = []
    activations = method._population.activations
    train(model, optimizer, method.step, INPUT[mlp], 8, lambda _: listening.append(activations.listening))
    assert listening == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, "threshold"),
        ({"every_n_train_steps": 0}, "every_n_train_steps"),
        ({"score_steps": 0}, "score_steps"),
        ({"score_steps": 1001}, "score_steps"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReDo(**arguments)


@pytest.mark.parametrize("score_steps", [1, 3])
@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.GELU])
@pytest.mark.parametrize("build", [mlp, convolutional])
def test_by_gradient_same_units_at_the_same_steps_as_the_slow_reference(build, activation, score_steps):
    model, twin = build(activation), build(activation)
    if build is convolutional:  # the reference leaves norms alone
        model[1], twin[1] = torch.nn.Identity(), torch.nn.Identity()
    method = ReDo(0.6, every_n_train_steps=10, init=ramp, score="gradient", score_steps=score_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, *INPUT[build], dtype=torch.float64),))
    choices = record_choices(method)
    reference = ReferenceGradientReDo(twin, threshold=0.6, every=10, new_weights=ramp, score_steps=score_steps)
    train(model, optimizer, method.step, INPUT[build], 300)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), reference.step, INPUT[build], 300)
    assert choices == [{i: tuple(units) for i, units in enumerate(chosen) if units} for chosen in reference.history]
    assert method.replaced == sum(len(units) for chosen in choices for units in chosen.values()) > 0
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-6, atol=1e-8)


def test_by_gradient_no_activations_are_read_and_what_has_no_gradient_is_not_judged():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = ReDo(0.5, 1, score="gradient").attach(model, optimizer, example_inputs=(torch.zeros(1, 6).double(),))
    assert not method._population.activations.listening
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model[4].bias.grad = torch.zeros(3).double()
    optimizer.step()
    method.step()
    assert method.replaced == 0
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
