import numpy as np
import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
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


def slow_aim(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The initial value of the same rank, found weight by weight."""
    aim = np.empty_like(values)
    ordered = sorted(start.flatten().tolist())
    for rank, place in enumerate(sorted(np.ndindex(values.shape), key=lambda place: values[place])):
        aim[place] = ordered[rank]
    return aim


@pytest.mark.parametrize("network", [mlp, convolutional])
@pytest.mark.parametrize("every", [1, 7])
def test_sorted_same_course_as_the_slow_reference_over_300_steps(network, every):
    model, twin = network(), network()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.02) for net in (model, twin)]
    starts = [parameter.detach().numpy().copy() for parameter in twin.parameters()]
    method = L2Init(0.1, match="sorted", every_n_train_steps=every).attach(model, optimizers[0])
    steps = 0

    def reference() -> None:
        nonlocal steps
        steps += 1
        for parameter, start in zip(twin.parameters(), starts, strict=True) if steps % every == 0 else ():
            value = parameter.detach().numpy()
            value -= 0.02 * 0.1 * every * (value - slow_aim(value, start))

    train(model, optimizers[0], method.step, INPUT[network], 300)
    train(twin, optimizers[1], reference, INPUT[network], 300)
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-8, atol=1e-10)
    distance = sum(((p.detach().numpy() - slow_aim(p.detach().numpy(), s)) ** 2).sum() for p, s in zip(
        model.parameters(), starts, strict=True
    ))  # fmt: skip
    assert float(method._numbers()["distance_from_initial"]) == pytest.approx(distance**0.5)


def test_sorted_does_not_mind_where_a_weight_is():
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = L2Init(0.5, match="sorted").attach(model, optimizer)
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0))
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.zeros(4, 5), torch.zeros(4)
    optimizer.step()
    method.step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("match", ["position", "sorted"])
def test_in_the_loss_same_course_as_autograd_over_300_steps(match):
    model, twin = convolutional(), convolutional()
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.003) for net in (model, twin)]
    starts = [parameter.detach().clone() for parameter in twin.parameters()]
    method = L2Init(0.05, match=match, decoupled=False, norms=False).attach(model, optimizers[0])

    def with_penalty(optimizer, args, kwargs):
        loss = torch.zeros((), dtype=torch.float64)
        for (name, parameter), start in zip(twin.named_parameters(), starts, strict=True):
            if name.startswith("1."):  # batch norm
                continue
            aim = start
            if match == "sorted":
                aim = torch.from_numpy(slow_aim(parameter.detach().numpy(), start.numpy()))
            loss = loss + 0.05 / 2 * (parameter - aim).square().sum()
        loss.backward()

    optimizers[1].register_step_pre_hook(with_penalty)
    train(model, optimizers[0], method.step, INPUT[convolutional], 300)
    train(twin, optimizers[1], lambda: None, INPUT[convolutional], 300)
    for parameter, slow in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-7, atol=1e-9)


def test_in_the_loss_and_decoupled_are_the_same_with_plain_sgd():
    models = [mlp(), mlp()]
    for model, decoupled in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        method = L2Init(1e-6, decoupled=decoupled).attach(model, optimizer)
        train(model, optimizer, method.step, INPUT[mlp], 50)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fused", [False, True])
def test_in_the_loss_with_a_gradient_scaler_and_with_closures(fused):
    def course(scaled: bool, closure: bool) -> nn.Module:
        model = mlp().float()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        method = L2Init(0.1, decoupled=False).attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=64.0)
        for step in range(20):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))

            def loss(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                value = model(x).square().mean()
                scaler.scale(value).backward()
                return value

            if closure:
                optimizer.step(loss)
            else:
                loss()
                scaler.step(optimizer)
                scaler.update()
            method.step()
        return model

    plain = course(scaled=False, closure=False)
    for other in (course(scaled=True, closure=False), course(scaled=False, closure=True)):
        for one, two in zip(plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two)


def test_norms_may_be_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = L2Init(norms=False).attach(model, optimizer)
    assert set(method.state_dict()["method"]["initial"]) == {"0.weight", "0.bias"}


def test_settings_that_do_not_go_together_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match=r"decoupled=False needs every_n_train_steps=1.* got 2"):
        L2Init(decoupled=False, every_n_train_steps=2)
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    L2Init(decoupled=False).attach(model, optimizer)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="needs dense gradients, but one of an embedding with sparse=True is not"):
        optimizer.step()
