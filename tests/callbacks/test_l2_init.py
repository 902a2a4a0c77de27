import numpy as np
import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, mlp, train
from lightning_plasticity import L2Init
from lightning_plasticity.functional.l2_init import l2_init_update


def test_same_weights_as_the_slow_reference_over_1000_steps_with_a_changing_rate():
    model, twin = mlp(), mlp()
    groups = [{"params": list(net[0].parameters()), "lr": 0.02} for net in (model, twin)]
    optimizers = [
        torch.optim.SGD([group, {"params": list(net[2:].parameters())}], lr=0.05)
        for group, net in zip(groups, (model, twin), strict=True)
    ]
    initial = [parameter.detach().numpy().copy() for parameter in twin.parameters()]
    method = L2Init(0.1).attach(model, optimizers[0])

    def reference() -> None:
        first, rest = (group["lr"] for group in optimizers[1].param_groups)
        for i, (parameter, start) in enumerate(zip(twin.parameters(), initial, strict=True)):
            value = parameter.detach().numpy()
            value -= (first if i < 2 else rest) * 0.1 * (value - start)

    def decay(optimizer):
        def each_step(step: int) -> None:
            optimizer.param_groups[1]["lr"] *= 0.999

        return each_step

    train(model, optimizers[0], method.step, INPUT[mlp], 1000, each_step=decay(optimizers[0]))
    train(twin, optimizers[1], reference, INPUT[mlp], 1000, each_step=decay(optimizers[1]))
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-8, atol=1e-10)
    plain = mlp()
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), lambda: None, INPUT[mlp], 1000)
    moved = [np.abs(net[0].weight.detach().numpy() - initial[0]).mean() for net in (model, plain)]
    assert moved[0] < 0.9 * moved[1]


def test_a_rate_that_is_a_tensor():
    values, initial = [torch.tensor([3.0])], [torch.tensor([1.0])]
    assert l2_init_update(values, initial, torch.tensor(0.25))[0].item() == -0.5
    model = nn.Linear(2, 1)
    start = model.weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5), foreach=False, capturable=False)
    method = L2Init(1.0).attach(model, optimizer)
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    stepped = model.weight.detach().clone()
    method.step()
    torch.testing.assert_close(model.weight, stepped - 0.5 * (stepped - start))


def test_what_is_excluded_or_trained_by_another_optimizer_stays():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = [torch.optim.SGD(model[:2].parameters(), lr=1.0), torch.optim.SGD(model[2].parameters(), lr=1.0)]
    method = L2Init(0.5, exclude=["*bias", "1.*"]).attach(model, optimizers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model[0].weight.grad = torch.zeros(2, 2)
    optimizers[0].step()
    method.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"0.weight"}
    torch.testing.assert_close(model[0].weight, before["0.weight"] - 0.5)


def test_a_frozen_parameter_in_the_optimizer_is_left_to_who_moves_it():
    model = nn.ModuleDict({"online": nn.Linear(2, 2), "target": nn.Linear(2, 2).requires_grad_(False)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = L2Init(0.5).attach(model, optimizer)
    model["target"].weight += 1
    averaged = model["target"].weight.clone()
    model["online"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    stepped = model["online"].weight.detach().clone()
    method.step()
    assert torch.equal(model["target"].weight, averaged)
    assert not torch.equal(model["online"].weight, stepped)


def test_a_parameter_that_joins_the_optimizer_later_is_drawn_to_where_it_began():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    start = model[0].weight.clone()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=1.0)
    method = L2Init(1.0).attach(model, optimizer)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, start)
    method.step()
    torch.testing.assert_close(model[0].weight, start)


def test_what_is_logged():
    model = nn.Linear(2, 1, bias=False)
    method = L2Init().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model.weight += torch.tensor([3.0, 4.0])
    assert float(method._numbers()["distance_from_initial"]) == pytest.approx(5.0)


def test_what_cannot_work_is_refused():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="coefficient must be a finite number, at least 0, got -1"):
        L2Init(-1)
    with pytest.raises(ValueError, match="L2Init needs the optimizer"):
        L2Init().attach(model)
    with pytest.raises(ValueError, match="L2Init needs parameters that the optimizer trains"):
        L2Init(exclude="*").attach(model, optimizer)
    state = L2Init().attach(model, optimizer).state_dict()
    method = L2Init(exclude="bias").attach(model, optimizer)
    with pytest.raises(ValueError, match=r"only one of the two has \['bias'\]"):
        method.load_state_dict(state)
