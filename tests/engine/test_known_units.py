"""Which of the known units are worked on: those whose layers are thawed, by the optimizer that trains them."""

import pytest
import torch
from callbacks.streams import INPUT, mlp, train
from torch import nn
from units.test_find import Function

from lightning_plasticity import ContinualBackprop


def test_frozen_layers_stay_and_are_worked_on_when_they_are_thawed():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = model[0].weight.clone()
    method = ContinualBackprop(0.5, 0).attach(model, optimizer, example_inputs=(torch.zeros(1, 6).double(),))
    train(model, optimizer, method.step, INPUT[mlp], 5)
    assert torch.equal(model[0].weight, before)
    assert method.replaced > 0
    model[2].requires_grad_(False)
    method.detach()
    method = ContinualBackprop(0.5, 0)
    with pytest.warns(UserWarning, match="has nothing to do yet, .* Frozen, or in no optimizer: '0', '2'"):
        method.attach(model, optimizer, example_inputs=(torch.zeros(1, 6).double(),))
    train(model, optimizer, method.step, INPUT[mlp], 2)
    assert method.replaced == 0
    model[:3].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    train(model, optimizer, method.step, INPUT[mlp], 5)
    assert method.replaced > 0
    assert not torch.equal(model[0].weight, before)


def test_parts_that_are_frozen_at_first_are_taken_in_when_they_are_thawed():
    """The backbone is called as a part and wholly frozen, the head has no hidden units."""
    model = nn.ModuleDict({"backbone": mlp(), "head": nn.Linear(3, 3).double()})
    model["backbone"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["head"].parameters(), lr=0.01)
    method = ContinualBackprop(0.5, 0).attach(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model["head"](model["backbone"](torch.randn(4, 6).double())).square().sum().backward()
        optimizer.step()
        method.step()

    with pytest.warns(UserWarning, match="has nothing to do yet"):
        step()
    saved = method.state_dict()
    step()
    assert method.replaced == 0
    model["backbone"].requires_grad_(True)
    optimizer.add_param_group({"params": model["backbone"].parameters()})
    for _ in range(5):
        step()
    assert method.replaced > 0
    method.load_state_dict(saved)
    assert method.replaced == 0


def test_a_step_of_one_optimizer_counts_for_the_units_that_it_trains():
    model = mlp()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (model[:2], model[2:])]
    method = ContinualBackprop(0.5, 0, compensate_bias=False)
    method.attach(model, optimizers, example_inputs=(torch.zeros(1, 6).double(),))
    first, last = model[0].weight.detach().clone(), model[4].weight.detach().clone()
    train(model, optimizers[0], method.step, INPUT[mlp], 3)
    assert not torch.equal(model[0].weight, first)
    assert torch.equal(model[4].weight, last)
    first = model[0].weight.detach().clone()
    train(model, optimizers[1], method.step, INPUT[mlp], 3)
    assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[4].weight, last)


class Own(nn.Module):
    """A layer of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("module", ["net", None])
def test_what_is_worked_on_is_told_by_names_inside_the_model(module):
    net = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 4), Own())
    model = nn.ModuleDict({"net": net}) if module else net
    method = ContinualBackprop(module=module)
    method.attach(model)
    net(torch.zeros(2, dtype=torch.int64))
    method.step()
    prefix = "net." if module else ""
    assert method._works_on() == (
        f"16 units of 2 layers (of 3). Left out: '{prefix}5'; find_units(model, example, explain=True) says why."
    )


@pytest.mark.parametrize("module", ["net", None])
def test_a_network_of_which_all_is_left_out_is_refused_with_the_reasons(module):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = nn.ModuleDict({"net": net}) if module else net
    where, layer = ("net", "net.0") if module else ("Sequential", "0")
    method = ContinualBackprop(module=module, exclude=["other", layer]).attach(model)
    net(torch.zeros(1, 3))
    message = rf"has none to work on in '{where}'[^\n]*\n  {layer}: it is excluded"
    with pytest.raises(ValueError, match=message):
        method.step()


def test_what_is_left_out_are_layers_their_parts_and_others_with_matrices_but_no_embeddings(caplog) -> None:
    parts = {
        "words": nn.Embedding(7, 6),
        "attention": nn.MultiheadAttention(6, 2, batch_first=True),
        "norm": nn.LayerNorm(6),
        "hidden": nn.Linear(6, 8),
        "out": nn.Linear(8, 6),
        "pair": nn.Bilinear(6, 6, 2),
    }

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(x))
        x = x + self.attention(x, x, x)[0]
        x = x + self.out(self.hidden(x).relu())
        return self.pair(x, x)

    model = Function(forward, **parts)
    with caplog.at_level("INFO"):
        ContinualBackprop().attach(model, None, example_inputs=(torch.zeros(2, 3, dtype=torch.int64),)).detach()
    left_out = "'attention.q_proj', 'attention.k_proj', 'attention.out_proj', 'out' and 1 more"
    assert f"14 units of 2 layers (of 7). Left out: {left_out}; find_units(" in caplog.text
