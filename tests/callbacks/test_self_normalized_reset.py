import logging

import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from callbacks.test_continual_backprop import record_choices
from callbacks.unit_references import ReferenceSelfNormalizedReset
from lightning_plasticity import SelfNormalizedReset
from lightning_plasticity.functional.self_normalized_reset import (
    bin_of,
    count_silences,
    longest_of,
    new_thresholds,
)


def waves(tensor: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """New weights without chance, other ones for each unit."""
    return torch.arange(tensor.numel(), dtype=tensor.dtype).sin().view(tensor.shape)


def rarely_firing(build) -> nn.Sequential:
    model = build()
    if build is convolutional:
        model[1] = nn.Identity()  # the reference leaves norms alone
    for layer in model[:-1]:
        if isinstance(layer, nn.Linear):
            torch.nn.init.constant_(layer.bias, -0.7)
    return model


@pytest.mark.parametrize("most", [6, 31])
@pytest.mark.parametrize("build", [mlp, convolutional])
def test_same_units_at_the_same_steps_as_the_slow_reference(build, most):
    model, twin = rarely_firing(build), rarely_firing(build)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (model, twin)]
    method = SelfNormalizedReset(0.1, every_n_train_steps=40, min_silence=2, max_silence=most, init=waves)
    method.attach(model, optimizers[0], example_inputs=(torch.zeros(1, *INPUT[build], dtype=torch.float64),))
    choices = record_choices(method)
    reference = ReferenceSelfNormalizedReset(twin, significance=0.1, every=40, least=2, most=most, new_weights=waves)
    train(model, optimizers[0], method.step, INPUT[build], 300)
    train(twin, optimizers[1], reference.step, INPUT[build], 300)
    assert [chosen for chosen in choices if chosen] == reference.history
    assert len(reference.history) > 3
    assert method._thresholds.tolist() == [t for of_layer in reference.threshold for t in of_layer]
    assert len(set(method._thresholds.tolist())) > 2
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-6, atol=1e-8)


def test_bins_are_exact_up_to_31_steps_and_then_a_sixteenth_wide():
    silences = torch.arange(100_000)
    bins = bin_of(silences)
    assert bins[:32].tolist() == list(range(32))
    assert set(bins.diff().tolist()) == {0, 1}  # none is left out
    longest = longest_of(bins)
    assert (longest >= silences).all()
    assert ((longest - silences) * 16 <= silences).all()
    assert torch.equal(bin_of(longest), bins)
    assert torch.equal(bin_of(longest + 1), bins + 1)


def test_silences_of_several_steps_are_counted_as_step_by_step():
    heard = torch.randint(3, (40, 25), generator=torch.Generator().manual_seed(0))
    silences, histogram = torch.arange(25), torch.zeros(25, 8, dtype=torch.int32)
    counted = count_silences(silences, histogram, heard)
    for step in heard:
        silences, histogram = count_silences(silences, histogram, step[None])
    slow, table = list(range(25)), torch.zeros(25, 8, dtype=torch.int32)
    for step in heard.tolist():
        for unit, what in enumerate(step):
            if what == 2:
                table[unit, min(slow[unit], 7)] += 1
            slow[unit] = {0: slow[unit], 1: slow[unit] + 1, 2: 0}[what]
    assert counted[0].tolist() == silences.tolist() == slow
    assert torch.equal(counted[1], histogram)
    assert torch.equal(histogram, table)
    assert table[:, 7].any()  # the last bin has what is longer


def test_thresholds_never_leave_their_bounds_and_zeros_do_not_count():
    histogram = torch.zeros(4, 16, dtype=torch.int32)
    histogram[:, 0] = 1000  # fired in a row, which is no silence
    histogram[1, 1], histogram[2, 15], histogram[3, 5] = 5, 5, 5
    new = new_thresholds(torch.tensor([6, 6, 6, 5]), histogram, 0.08, 3, 11)
    assert new.tolist() == [6, 3, 11, 10]


def one_unit(value: float, activation: nn.Module) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, value, 1.0]))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def steps(method, model, optimizer, count: int, x: torch.Tensor) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        method.step()


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(), nn.LeakyReLU(), nn.SiLU()], ids=lambda a: type(a).__name__
)
def test_a_unit_that_is_never_positive_is_replaced_when_it_has_been_silent_for_long_enough(activation):
    model, optimizer = one_unit(-1.0, activation)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.randn(300, 2)
    method = SelfNormalizedReset(max_silence=10, seed=0).attach(model, optimizer, example_inputs=(x,))
    steps(method, model, optimizer, 9, x)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    steps(method, model, optimizer, 1, x)
    assert method.replaced == 1
    assert model[0].bias.tolist() == [1.0, 0.0, 1.0]
    assert (model[2].weight == 0).all(0).tolist() == [False, True, False]
    assert torch.equal(model[2].bias, before["2.bias"])


def test_a_unit_that_fires_on_one_example_of_many_is_not_silent():
    model, optimizer = one_unit(-1.0, nn.GELU())
    with torch.no_grad():
        model[0].weight[1, 0] = 1.0
    x = torch.cat([torch.full((1, 2), 1.1), -torch.ones(2000, 2)])
    method = SelfNormalizedReset(min_silence=1, max_silence=5).attach(model, optimizer, example_inputs=(x,))
    steps(method, model, optimizer, 12, x)
    assert method.replaced == 0
    steps(method, model, optimizer, 5, x[1:])
    assert method.replaced == 1


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Softsign()])
def test_units_that_are_never_silent_are_left_out(activation, caplog):
    model = nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"units of .* are never silent"):
        SelfNormalizedReset().attach(model, optimizer, example_inputs=(torch.ones(1, 2),))
    model = nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.INFO):
        SelfNormalizedReset().attach(model, optimizer, example_inputs=(torch.ones(1, 2),))
    assert "works on 4 units of 1 layers (of 3). Left out: '0', '4'" in caplog.text


def test_ordinary_steps_do_not_look(monkeypatch):
    """Ranks talk, and the device is waited for, only when the unit nearest to its threshold can be due."""
    model, optimizer = one_unit(-1.0, nn.ReLU())
    x = torch.randn(8, 2)
    method = SelfNormalizedReset(max_silence=300, seed=0).attach(model, optimizer, example_inputs=(x,))
    looks = []
    count = method._count
    monkeypatch.setattr(method, "_count", lambda: (looks.append(method.optimizer_steps), count()))
    steps(method, model, optimizer, 310, x)
    assert looks == [1, 129, 257, 300, 428][:4]
    assert method.replaced == 1


def test_what_is_not_finite_and_what_is_not_called_is_neither_fired_nor_silent():
    model, optimizer = one_unit(-1.0, nn.ReLU())
    x = torch.randn(8, 2)
    method = SelfNormalizedReset(min_silence=1, max_silence=5).attach(model, optimizer, example_inputs=(x,))
    steps(method, model, optimizer, 2, x)
    weight = model[0].weight.detach().clone()
    model[0].weight.data.fill_(float("nan"))
    steps(method, model, optimizer, 4, x)
    model[0].weight.data.copy_(weight)
    for _ in range(4):
        optimizer.step()
        method.step()  # no forward
    assert method._state()["sets"]["0"]["silences"].tolist() == [0, 2, 0]
    assert method.replaced == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"significance": 0.0}, "significance must be .* above 0"),
        ({"significance": 1.0}, "significance must be .* below 1"),
        ({"every_n_train_steps": 0}, "every_n_train_steps"),
        ({"min_silence": 0}, "min_silence"),
        ({"max_silence": 0}, "max_silence"),
        ({"min_silence": 8, "max_silence": 7}, "min_silence must be at most max_silence, which is 7, got 8"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfNormalizedReset(**settings)
