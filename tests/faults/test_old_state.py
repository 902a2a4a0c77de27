"""State as version 0.1.0 saved it: it loads, and the run goes on as it did there.

`old_state.pt` was written by this file, run with the last commit of that version: `python test_old_state.py`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_plasticity as lp

SAVED = Path(__file__).with_name("old_state.pt")
MAKE: dict[str, Callable[[], Any]] = {
    "ContinualBackprop": partial(lp.ContinualBackprop, 0.2, 1, optimizer_state="reset", seed=3),
    "ActivationReset": partial(
        lp.ActivationReset, lp.ActivationStrategy(0.2, 0.2, -0.5, 0.5), maturity_threshold=1, seed=3
    ),
    "ReDo": partial(lp.ReDo, 0.6, 3, score_steps=2, seed=3),
    "SoftWeightRescaling": partial(lp.SoftWeightRescaling, 0.1, seed=3),
    "ShrinkAndPerturb": partial(lp.ShrinkAndPerturb, 0.9, 0.1, every_n_train_steps=4, seed=3),
    "L2Init": partial(lp.L2Init, 0.1, seed=3),
    "LayerReset": partial(lp.LayerReset, 1, every_n_train_steps=4, seed=3),
    "SelectiveReinit": partial(lp.SelectiveReinit, 0.3, "mean_noise", every_n_train_steps=4, seed=3),
    "SelectiveReinit by gradient": partial(
        lp.SelectiveReinit, 0.3, utility="gradient", decay_rate=0.9, every_n_train_steps=4, seed=3
    ),
    "HareAndTortoise": partial(lp.HareAndTortoise, 0.9, every_n_train_steps=4, seed=3),
    "IsometryReinit": partial(lp.IsometryReinit, every_n_train_steps=4, seed=3),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double()


def train(model: nn.Module, method: Any, first: int, last: int) -> None:
    """Some steps of plain descent, which has no state: what an edit does to that of others has changed since."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method.attach(model, optimizer, (torch.zeros(2, 3, dtype=torch.float64),))
    for step in range(first, last):
        x = torch.sin(torch.arange(12.0, dtype=torch.float64) * (step + 1)).view(4, 3)
        optimizer.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()
        method.step()
    method.detach()


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write() -> None:
    runs = {}
    for name, make in MAKE.items():
        model, method = network(), make()
        train(model, method, 0, 6)
        begin, state = copied(model), method.state_dict()
        train(model, method, 6, 12)
        runs[name] = {"begin": begin, "state": state, "end": copied(model)}
    torch.save(runs, SAVED)


@pytest.mark.parametrize("name", MAKE)
def test_a_run_of_version_0_1_0_goes_on(name: str) -> None:
    run = torch.load(SAVED, weights_only=True)[name]
    assert "version" not in run["state"]
    model, method = network(), MAKE[name]()
    model.load_state_dict(run["begin"])
    method.load_state_dict(run["state"])
    train(model, method, 6, 12)
    assert method.optimizer_steps == 12
    for key, tensor in copied(model).items():
        torch.testing.assert_close(tensor, run["end"][key])


if __name__ == "__main__":
    write()
