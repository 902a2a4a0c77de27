"""When a step of an optimizer begins, when it was made, and of which parameters."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.engine.steps import OptimizerSteps, is_joining, those_that_join


class Watched:
    """A network of two layers, of which the first is watched, and what was told of its optimizer."""

    def __init__(self, is_fused: bool = False) -> None:
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        groups = [{"params": [parameter]} for parameter in self.model.parameters()]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, fused=is_fused)
        self.told: list[Any] = []
        self.waits = True
        self.before = self.weight()
        self.steps = OptimizerSteps([self.optimizer], self.model[0], lambda: self.waits, self.begin, self.told.append)

    def weight(self) -> Tensor:
        return self.model[0].weight.detach().clone()

    def begin(self) -> None:
        assert torch.equal(self.weight(), self.before), "nothing has changed yet"
        self.told.append("begins")

    def closure(self) -> Tensor:
        self.told.append("forward")
        loss = self.model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss


@pytest.mark.parametrize("way", ["none", "positional", "keyword"])
def test_a_step_begins_after_the_forward_pass_and_before_weights_change(way: str) -> None:
    watched = Watched()
    if way == "none":
        watched.closure()
        assert watched.optimizer.step() is None
    else:
        step = watched.optimizer.step
        loss = step(watched.closure) if way == "positional" else step(closure=watched.closure)
        assert loss.shape == ()
    assert watched.told == ["forward", "begins", watched.optimizer]
    assert not torch.equal(watched.weight(), watched.before)
    watched.waits = False
    watched.optimizer.step(watched.closure)
    assert watched.told[3:] == ["forward", watched.optimizer]
    watched.steps.remove()
    watched.optimizer.step(watched.closure)
    assert watched.told[5:] == ["forward"]


@pytest.mark.parametrize(("found_inf", "counts"), [(None, True), (0.0, True), (1.0, False)])
def test_a_step_that_a_fused_optimizer_skips_inside_does_not_count(found_inf: float | None, counts: bool) -> None:
    watched = Watched(is_fused=True)
    watched.closure()
    watched.optimizer.found_inf = None if found_inf is None else torch.tensor([found_inf])
    watched.optimizer.step()
    assert torch.equal(watched.weight(), watched.before) != counts
    assert watched.told[2:] == [watched.optimizer] * counts


def test_only_steps_with_gradients_of_the_watched_part_count() -> None:
    watched = Watched()
    watched.optimizer.step()
    watched.model[1](torch.ones(1, 2)).sum().backward()
    watched.optimizer.step()
    assert watched.told == ["begins", "begins"]
    watched.model[0].bias.grad = torch.ones(2)
    watched.optimizer.step()
    assert watched.told[3:] == [watched.optimizer]
    assert not watched.steps.misses_parameters


@pytest.mark.parametrize("is_inside", [True, False])
def test_parameters_that_the_part_has_got_since_are_missed_once_they_are_trained(is_inside: bool) -> None:
    watched = Watched()
    (watched.model[0] if is_inside else watched.model[1]).more = nn.Linear(2, 2)
    watched.optimizer.step(watched.closure)
    assert not watched.steps.misses_parameters, "they are not trained"
    watched.optimizer.add_param_group({"params": list(watched.model[0 if is_inside else 1].more.parameters())})
    watched.before = watched.weight()
    watched.optimizer.step(watched.closure)
    assert watched.steps.misses_parameters == is_inside
    watched.before = watched.weight()
    watched.optimizer.step(watched.closure)
    assert watched.steps.misses_parameters == is_inside


def test_parameters_that_stand_in_the_place_of_others_are_missed() -> None:
    watched = Watched()
    watched.model[0].weight = nn.Parameter(watched.weight())
    watched.model[0].bias.requires_grad_(False)
    watched.optimizer.param_groups[0]["params"] = [watched.model[0].weight]
    watched.optimizer.step(watched.closure)
    assert watched.steps.misses_parameters
    assert watched.told == ["forward", "begins"]


def test_what_can_join_is_told_by_its_settings() -> None:
    joins, plain = SimpleNamespace(_join_config=SimpleNamespace(enable=False)), nn.Linear(1, 1)
    assert those_that_join(plain, joins, object()) == [joins]
    assert not is_joining(joins)
    joins._join_config.enable = True
    assert is_joining(joins)
