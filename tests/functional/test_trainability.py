from copy import deepcopy

import pytest
import torch
from torch import nn

from lightning_plasticity.functional import trainability


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


INPUTS = torch.randn(16, 10, generator=torch.Generator().manual_seed(3))
QUICK = {"budget": 150, "learning_rate": 1e-2, "target_loss": 0.3}


def damaged() -> nn.Sequential:
    """All but two units of the last hidden layer are dead for good."""
    model = network()
    with torch.no_grad():
        model[4].bias[2:] = -1000.0
    return model


def by_hand(model: nn.Module, budget: int, learning_rate: float, seed: int = 0) -> list[float]:
    """Losses before each step and after the last, fitting the targets that the probe draws."""
    model = deepcopy(model).train()
    targets = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(budget + 1):
        loss = (model(INPUTS) - targets).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def without_dropout(seed: int) -> nn.Sequential:
    model = network(seed)
    model[3] = nn.Identity()
    return model


def test_values_are_those_of_a_training_loop():
    model, fresh = without_dropout(0), without_dropout(1)
    with torch.no_grad():
        model[4].bias[:20] = -1000.0
    of_model, of_fresh = (by_hand(m, budget=60, learning_rate=1e-2) for m in (model, fresh))
    loss = trainability(model, INPUTS, lambda: fresh, "loss", budget=60, learning_rate=1e-2)
    assert loss.item() == pytest.approx(of_model[-1] / of_fresh[-1], rel=1e-5)
    level = (of_model[-1] + of_model[-2]) / 2
    steps = trainability(model, INPUTS, lambda: fresh, budget=60, learning_rate=1e-2, target_loss=level)
    first = [next(step for step, value in enumerate(losses) if value <= level) for losses in (of_model, of_fresh)]
    assert steps.item() == pytest.approx(first[0] / first[1])


def test_all_parameters_of_both_networks_learn_in_training_mode():
    ready, held = without_dropout(0), without_dropout(0).eval().requires_grad_(False)
    settings = {"measure": "loss", "budget": 20, "learning_rate": 1e-2}
    wanted = trainability(ready, INPUTS, lambda: without_dropout(1), **settings)
    fresh = without_dropout(1).eval().requires_grad_(False)
    assert trainability(held, INPUTS, lambda: fresh, **settings).item() == wanted.item()
    assert not held.training
    assert not any(parameter.requires_grad for parameter in held.parameters())


@pytest.mark.parametrize("measure", ["steps", "loss"])
def test_a_fresh_network_is_near_1_and_a_damaged_one_above(measure):
    assert 0.5 < trainability(network(5), INPUTS, measure=measure, **QUICK).item() < 2
    assert trainability(damaged(), INPUTS, measure=measure, **QUICK).item() > 2


def test_the_budget_bounds_the_steps_of_the_model_and_nan_says_that_the_fresh_one_failed():
    fresh = {"fresh": lambda: without_dropout(1)}
    steps_of_fresh = next(i for i, loss in enumerate(by_hand(without_dropout(1), 150, 1e-2)) if loss <= 0.3)
    hopeless = without_dropout(0)
    with torch.no_grad():
        hopeless[4].bias.fill_(-1000.0)
    assert trainability(hopeless, INPUTS, **fresh, **QUICK).item() == pytest.approx(150 / steps_of_fresh)
    assert trainability(network(), INPUTS, **fresh, **(QUICK | {"target_loss": 1e-30, "budget": 3})).isnan()


def test_nothing_is_changed():
    model = network().train()
    model[1].eval()
    model[0].requires_grad_(False)
    state = deepcopy(model.state_dict())
    random_state, inputs = torch.get_rng_state(), INPUTS.clone()
    first = trainability(model, inputs, budget=5, measure="loss")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True, True, True]
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(inputs, INPUTS)
    torch.rand(5)  # the measure does not depend on the user's random state, also not with dropout
    with torch.inference_mode():
        assert trainability(model, inputs + 0, budget=5, measure="loss").item() == first.item()
    assert trainability(model, inputs, budget=5, measure="loss", seed=1).item() != first.item()


def test_half_precision_is_trained_in_single_precision():
    single = network().bfloat16().float()
    expected = trainability(single, INPUTS.bfloat16().float(), budget=5, measure="loss")
    assert trainability(network().bfloat16(), INPUTS.bfloat16(), budget=5, measure="loss").item() == expected.item()


def test_what_diverged_is_not_a_number():
    model = network()
    with torch.no_grad():
        model[6].weight.fill_(float("nan"))
    assert trainability(model, INPUTS, measure="loss", budget=2).isnan()


class WithOwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_what_cannot_be_made_fresh_asks_for_a_function():
    model = nn.Sequential(nn.Linear(10, 4), WithOwnParameter())
    with pytest.raises(ValueError, match="got WithOwnParameter '1' without it: pass `fresh`"):
        trainability(model, INPUTS, budget=2)
    make = lambda: nn.Sequential(nn.Linear(10, 4), WithOwnParameter())  # noqa: E731
    assert trainability(model, INPUTS, make, "loss", budget=2).isfinite()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="measure must be one of 'steps', 'loss', got 'time'"):
        trainability(network(), INPUTS, measure="time")
    for settings in ({"budget": 0}, {"target_loss": 0.0}, {"learning_rate": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a"):
            trainability(network(), INPUTS, **settings)
    with pytest.raises(ValueError, match="At least one example is required"):
        trainability(network(), INPUTS[:0])
    with pytest.raises(ValueError, match="At least one parameter"):
        trainability(nn.ReLU(), INPUTS)
