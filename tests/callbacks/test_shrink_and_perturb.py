from functools import partial

import pytest
import torch
from torch import nn

from lightning_plasticity import ShrinkAndPerturb
from lightning_plasticity.functional.shrink_and_perturb import shrink_and_perturb


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 30))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, method: ShrinkAndPerturb) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    method.step()


def test_the_formula():
    values, fresh = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    before = [value.clone() for value in values]
    mixed = shrink_and_perturb(values, fresh, 0.6, 0.3)
    torch.testing.assert_close(mixed, [0.6 * value + 0.3 * new for value, new in zip(values, fresh, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_all_trained_parameters_are_mixed_with_draws_from_where_they_began():
    torch.manual_seed(0)
    model = network()
    model[3].bias.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    started = {name: (p.mean().item(), p.std().item()) for name, p in model.named_parameters()}
    method = ShrinkAndPerturb(0.5, 0.25, every_n_train_steps=3, seed=1).attach(model, optimizer)
    step(model, optimizer, method)
    step(model, optimizer, method)
    optimizer.zero_grad()
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method.step()
    for name, parameter in model.named_parameters():
        if name == "3.bias":
            assert torch.equal(parameter, before[name])
            continue
        fresh = (parameter.detach() - 0.5 * before[name]) / 0.25
        mean, std = started[name]
        error = 5 * std / fresh.numel() ** 0.5 + 1e-4
        assert fresh.mean().item() == pytest.approx(mean, abs=error)
        assert fresh.std().item() == pytest.approx(std, abs=error)
        assert all(not state.any() for state in optimizer.state[parameter].values() if state.dim())


def test_a_nudge_keeps_the_state_of_the_optimizer():
    def chosen(**settings):
        return ShrinkAndPerturb(**settings).optimizer_state

    assert chosen(on_fit_start=True) == chosen(shrink=0.89, every_n_train_steps=2) == "reset"
    assert chosen(shrink=0.9, every_n_epochs=1) == chosen(shrink=0.5, every_n_train_steps=1) == "keep"
    assert chosen(shrink=0.99, on_fit_start=True, optimizer_state="reset") == "reset"


def test_the_soft_form_moves_weights_as_the_optimizer_does_without_it():
    """Noise in the gradients is averaged out over steps, unless moments begin anew at each of them."""

    def mean_size_of_updates(method: ShrinkAndPerturb | None) -> float:
        torch.manual_seed(0)
        layer = nn.Linear(40, 30)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        if method is not None:
            method.attach(layer, optimizer)
        sizes = []
        for _ in range(300):
            layer.weight.grad = torch.randn(layer.weight.shape)
            before = layer.weight.detach().clone()
            optimizer.step()
            sizes.append((layer.weight - before).abs().mean().item() / 1e-3)
            if method is not None:
                method.step()
        return sum(sizes[100:]) / 200

    plain = mean_size_of_updates(None)
    soft = mean_size_of_updates(ShrinkAndPerturb(1 - 1e-5, 1e-5, every_n_train_steps=1))
    assert soft == pytest.approx(plain, rel=1e-3)
    assert plain < 0.3


def test_draws_are_new_each_time_and_equal_for_equal_seeds():
    def perturbations(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = network()
        method = ShrinkAndPerturb(0.0, 1.0, every_n_train_steps=1, seed=seed).attach(model)
        found = []
        for _ in range(2):
            method.step()
            found.append(model[0].weight.detach().clone())
        return found

    first, second = perturbations(1)
    assert not torch.equal(first, second)
    assert torch.equal(torch.stack(perturbations(1)), torch.stack([first, second]))
    assert not torch.equal(perturbations(2)[0], first)


def test_of_a_trained_model_the_modules_own_initial_values():
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    ShrinkAndPerturb(0.0, 1.0, on_fit_start=True, init="reset_parameters").attach(model)
    assert model[0].weight.abs().max() <= 0.1 + 1e-6
    assert model[0].weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert (model[1].weight == 1).all()
    assert (model[1].bias == 0).all()


def test_what_is_excluded_or_trained_by_another_optimizer_stays():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in model]
    method = ShrinkAndPerturb(every_n_train_steps=1, exclude=["0.*", "1.bias"]).attach(model, optimizers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for optimizer, expected in zip(optimizers, (set(), {"1.weight"}), strict=True):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        method.step()
        assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == expected


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="It must be said when to act"):
        ShrinkAndPerturb()
    with pytest.raises(ValueError, match=r"shrink must be a finite number, at least 0, got -0\.1"):
        ShrinkAndPerturb(-0.1, every_n_epochs=1)
    with pytest.raises(ValueError, match="perturb must be a finite number, at least 0"):
        ShrinkAndPerturb(perturb=-0.1, every_n_epochs=1)
    with pytest.raises(ValueError, match="ShrinkAndPerturb needs parameters to work on"):
        ShrinkAndPerturb(every_n_train_steps=1, exclude="*").attach(network())


def test_a_blend_with_the_saved_start():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    starts = [p.detach().clone() for p in model.parameters()]
    method = ShrinkAndPerturb(0.2, 0.8, every_n_train_steps=3, init="start").attach(model, optimizer)
    for _ in range(2):
        step(model, optimizer, method)
    state = method.state_dict()
    method.detach()
    resumed = ShrinkAndPerturb(0.2, 0.8, every_n_train_steps=3, init="start")
    other = ShrinkAndPerturb(every_n_train_steps=3, init="start", exclude="0.weight")
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"only one of the two kept the start of \['0.weight'\]"):
        other.attach(model, optimizer)
    resumed.load_state_dict(state)
    resumed.attach(model, optimizer)  # weights that have moved on are not the start
    optimizer.zero_grad()
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    resumed.step()
    for parameter, old, start in zip(model.parameters(), before, starts, strict=True):
        torch.testing.assert_close(parameter.detach(), 0.2 * old + 0.8 * start)


def test_noise_on_all_weights_at_every_step():
    """Dohare et al.'s form, beside weight decay in the optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(100, 100)
    before = model.weight.detach().clone()
    noise = partial(nn.init.normal_, std=0.01)
    ShrinkAndPerturb(1.0, 1.0, every_n_train_steps=1, init=noise, optimizer_state="keep").attach(model).step()
    assert (model.weight.detach() - before).std().item() == pytest.approx(0.01, rel=0.05)
