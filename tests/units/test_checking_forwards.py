"""Networks whose own code looks at its values: samples them, checks them, refuses what is not finite."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Distribution, Normal
from torch.nn import functional as F

from lightning_plasticity.units import ForwardError, explore, find_units
from units.property_check import invalid
from units.test_find import VECTOR, Function, by_name, modules, randomised


def parts(width=8):
    return {"a": nn.Linear(6, width), "b": nn.Linear(width, width), "c": nn.Linear(width, 3)}


def network(forward):
    return Function(forward, **parts())


def discrete_policy(s, x):
    logits = s.c(F.relu(s.b(F.relu(s.a(x)))))
    policy = Categorical(logits=logits)
    action = policy.sample()
    return logits, policy.log_prob(action), policy.entropy(), action


def strict_policy(s, x):
    return Categorical(F.softmax(s.c(F.relu(s.b(F.relu(s.a(x))))), -1), validate_args=True).probs


def continuous_policy(s, x):
    y = s.c(F.relu(s.b(F.relu(s.a(x)))))
    policy = Normal(y, F.softplus(y))
    return policy.log_prob(policy.sample())


def drawn_by_multinomial(s, x):
    probabilities = F.softmax(s.c(F.relu(s.b(F.relu(s.a(x))))), -1)
    return probabilities, torch.multinomial(probabilities, 1), torch.bernoulli(probabilities)


def asserted_finite(s, x):
    hidden = F.relu(s.a(x))
    assert torch.isfinite(hidden).all()
    hidden = F.relu(s.b(hidden))
    if hidden.isnan().any() or torch.isinf(hidden).any():
        raise ValueError("diverged")
    y = s.c(hidden)
    assert not y.isnan().any()
    assert not np.isnan(y.sum().item())
    return y


def drawn_elsewhere(s, x):
    hidden = F.relu(s.b(F.relu(s.a(x))))
    drawn = np.random.rand() + random.random() + s.numpy.random() + s.python.random()
    return s.c(hidden) + drawn + torch.rand(1, generator=s.torch)


def with_generators():
    model = network(drawn_elsewhere)
    model.torch, model.numpy, model.python = torch.Generator(), np.random.default_rng(0), random.Random(0)
    return model


class ActorAndCritic(nn.Module):
    """The critic sees what the actor did: layers are called after the check."""

    def __init__(self):
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.critic, self.value = nn.Linear(8, 7), nn.Linear(7, 1)

    def forward(self, x):
        hidden = F.relu(self.body(x))
        policy = Normal(self.mean(hidden), self.scale(hidden).exp(), validate_args=True)
        action = policy.sample()
        return policy.log_prob(action), self.value(torch.tanh(self.critic(torch.cat([x, action], -1))))


@pytest.mark.parametrize(
    "forward",
    [discrete_policy, strict_policy, continuous_policy, drawn_by_multinomial, asserted_finite],
)
def test_units_are_found_where_values_are_sampled_and_checked(forward, monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", True)  # the default, which some packages change
    torch.manual_seed(0)
    model = randomised(network(forward))
    found = find_units(model, *VECTOR)
    assert {units.name for units in found} == {"a", "b"}
    assert all(units.exact for units in found)
    assert invalid(model, VECTOR, found) == []
    assert Distribution._validate_args


def test_layers_after_a_check_are_seen_too():
    torch.manual_seed(0)
    model = randomised(ActorAndCritic())
    found = explore(model, VECTOR, {})
    assert {units.name for units in found.units} == {"body", "critic"}
    assert modules(by_name(found.units)["body"].consumers) == ["mean", "scale"]
    assert invalid(model, VECTOR, found.units) == []
    for name in ("mean", "scale"):
        assert "the network stops when its units are NaN (ValueError: Expected parameter" in found.left_out[name]
        assert explore(model, VECTOR, {}, explain=False).left_out[name] == found.left_out[name]


def test_every_random_state_is_put_back_and_the_same_in_every_run():
    model = with_generators()
    states = (model.torch.get_state(), model.numpy.bit_generator.state, model.python.getstate())
    assert all(units.exact for units in find_units(model, *VECTOR))
    assert {units.name for units in find_units(model, *VECTOR)} == {"a", "b"}
    assert torch.equal(states[0], model.torch.get_state())
    assert states[1:] == (model.numpy.bit_generator.state, model.python.getstate())


def test_a_check_that_cannot_be_answered_leaves_its_layer_out():
    def forward(s, x):
        hidden = F.relu(s.a(x))
        assert (hidden >= 0).all(), "negative"
        return s.c(F.relu(s.b(hidden)))

    found = explore(randomised(network(forward)), VECTOR, {})
    assert {units.name for units in found.units} == {"b"}
    assert "the network stops when its units are NaN (AssertionError: negative" in found.left_out["a"]


def test_a_check_of_noise_leaves_its_layer_out():
    def forward(s, x):
        hidden = F.relu(s.a(x))
        assert not (hidden < 0).any(), "negative"  # which NaN is not, but noise is
        return s.c(F.relu(s.b(hidden)))

    found = explore(randomised(network(forward)), VECTOR, {})
    assert {units.name for units in found.units} == {"b"}
    assert found.left_out["a"] == "its units reach a decision (lt)"


def test_an_error_that_the_network_itself_expects_is_left_to_it():
    def forward(s, x):
        hidden = F.relu(s.a(x))
        try:
            x = x.view(-1, 4, 4)
        except RuntimeError:
            x = x + 1
        return s.c(F.relu(s.b(hidden)))

    model = randomised(network(forward))
    found = explore(model, VECTOR, {})
    assert {units.name for units in found.units} == {"a", "b"}
    assert found.left_out == {"c": "its units reach the network's output"}


def test_a_check_that_spares_no_run_is_told():
    def forward(s, x):
        hidden = s.a(x)
        if 0 < int((hidden != hidden).sum()) < 8:
            raise RuntimeError("some of them")
        return s.c(F.relu(s.b(F.relu(hidden))))

    with pytest.raises(ValueError, match=r"lightning_plasticity cannot examine Function.*some of them.*module=") as e:
        find_units(randomised(network(forward)), *VECTOR)
    assert isinstance(e.value.__cause__, RuntimeError)


@pytest.mark.parametrize("replace", [torch.nan_to_num, torch.Tensor.nan_to_num_])
def test_replacing_nan_hides_no_unit(replace):
    found = find_units(randomised(network(lambda s, x: s.c(F.relu(s.b(F.relu(replace(s.a(x)))))))), *VECTOR)
    assert {units.name for units in found} == {"a", "b"}
    found = explore(randomised(network(lambda s, x: replace(s.c(F.relu(s.b(F.relu(s.a(x)))))))), VECTOR, {})
    assert found.left_out["c"] == "its units reach the network's output"


def test_nan_in_the_data_is_still_replaced():
    x = VECTOR[0].clone()
    x[0, 2] = torch.nan
    for replace in (torch.nan_to_num, lambda x: torch.where(x.isnan(), torch.zeros(()), x)):
        model = randomised(network(lambda s, x, replace=replace: s.c(F.relu(s.b(F.relu(s.a(replace(x))))))))
        assert {units.name for units in find_units(model, x)} == {"a", "b"}


def test_the_users_own_error_is_the_cause():
    def forward(s, x):
        raise KeyError("targets")

    with pytest.raises(ForwardError, match=r"lightning_plasticity cannot examine Function.*'targets'.*module=") as e:
        find_units(network(forward), *VECTOR)
    assert isinstance(e.value.__cause__, KeyError)


def test_a_network_that_runs_in_training_only():
    def forward(s, x):
        if not s.training:
            raise NotImplementedError
        return s.c(F.relu(s.b(F.relu(s.a(x)))))

    assert {units.name for units in find_units(network(forward), *VECTOR)} == {"a", "b"}
