"""Networks and optimizers that methods got wrong: shared layers, optimizers without matrices, LBFGS."""

from typing import Any

import pytest
import torch
from contract.cases import CASES, Case
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_plasticity import OptimizerReset, SoftWeightRescaling, functional

every_method = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))


def shared(activation: type[nn.Module]) -> nn.Sequential:
    """One layer at two places, which has two names."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(6, 6), activation(), layer, activation(), layer, activation(), nn.Linear(6, 2))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("has_example", [True, False])
@pytest.mark.filterwarnings("ignore:SoftWeightRescaling cannot keep")
def test_a_layer_at_two_places_is_still_itself_after_it_was_examined(
    activation: type[nn.Module], has_example: bool
) -> None:
    model = shared(activation)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = SoftWeightRescaling(0.1).attach(model, optimizer, (torch.randn(2, 6),) if has_example else None)
    for step in range(4):
        optimizer.zero_grad()
        mse_loss(model(torch.randn(8, 6)), torch.zeros(8, 2)).backward()
        if step == 0:
            assert all(torch.equal(p, values[name]) for name, p in parameters.items())
        optimizer.step()
        method.step()
        now = dict(model.named_parameters(remove_duplicate=False))
        assert all(now[name] is p for name, p in parameters.items())
    method.detach()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.filterwarnings("ignore:SoftWeightRescaling cannot keep")
def test_one_layer_in_two_modules(activation: type[nn.Module]) -> None:
    """Two modules with one weight and one bias: these are rescaled once, as those of a module at two places."""
    model = shared(activation)
    model[4] = nn.Linear(6, 6)
    model[4].weight, model[4].bias = model[2].weight, model[2].bias
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = SoftWeightRescaling(1.0).attach(model, optimizer, (torch.randn(2, 6),))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model[0].weight *= 2
        model[2].weight *= 4
    mse_loss(model(torch.randn(8, 6)), torch.zeros(8, 2)).backward()
    optimizer.step()
    method.step()
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(model.get_parameter(name), before[name])
    torch.testing.assert_close(model[2].bias, before["2.bias"] / 8)
    assert model[4].weight is model[2].weight
    assert model[4].bias is model[2].bias


def test_a_bias_of_two_weights_is_refused() -> None:
    model = perceptron()
    model[2].bias = model[0].bias
    with pytest.raises(ValueError, match=r"A bias must belong to one layer, but '2.bias' is also '0.bias'.*Give each"):
        SoftWeightRescaling(0.1).attach(model, torch.optim.SGD(model.parameters(), 0.1), (torch.zeros(2, 6),))


def test_gradients_of_examples_leave_a_shared_layer_itself() -> None:
    model, x, y = shared(nn.Tanh), torch.randn(5, 6), torch.randn(5, 2)
    parameters = list(model.parameters())
    rows = functional.per_sample_gradients(model, mse_loss, x, y)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    for i, row in enumerate(rows):
        gradients = torch.autograd.grad(mse_loss(model(x[i : i + 1]), y[i : i + 1]), parameters)
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in gradients]))


def train(model: nn.Module, optimizers: list[Any], case: Case, steps: int = 12) -> list[float]:
    method = case.make()
    method.attach(model, optimizers, (torch.zeros(2, 6),))
    generator, losses = torch.Generator().manual_seed(0), []
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, 3, generator=generator)

    def closure() -> Tensor:
        model.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        for optimizer in optimizers:
            losses.append(float(optimizer.step(closure).detach()))
            method.step()
    method.detach()
    assert all(p.isfinite().all() for p in model.parameters())
    return losses


@every_method
@pytest.mark.parametrize("matrices_first", [True, False])
def test_an_optimizer_without_a_matrix(case: Case, matrices_first: bool) -> None:
    model = perceptron()
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], 0.01, momentum=0.9)
    vectors = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, [matrices, vectors] if matrices_first else [vectors, matrices], case)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@every_method
def test_lbfgs_does_not_diverge(case: Case) -> None:
    """What it remembers of the loss does not hold after an edit: its steps were of any size, up to infinity."""
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, line_search_fn="strong_wolfe")
    losses = train(model, [optimizer], case, steps=30)
    assert max(losses) < 30 * losses[0], losses


def in_one_vector(model: nn.Sequential) -> nn.Sequential:
    """Its parameters become views of one vector."""
    parameters = list(model.parameters())
    vector_to_parameters(parameters_to_vector(parameters).detach().clone(), parameters)
    return model


@every_method
def test_parameters_that_are_views_of_one_vector_are_parameters_like_others(case: Case) -> None:
    models = perceptron(), in_one_vector(perceptron())
    losses = [train(model, [torch.optim.Adam(model.parameters(), 0.01)], case, steps=30) for model in models]
    assert losses[0] == losses[1]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    assert len({p.untyped_storage().data_ptr() for p in models[1].parameters()}) == 1


@every_method
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_without_a_shape_are_refused_by_name(case: Case) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(RuntimeError, match=r"'2.weight' of a lazy module.* Run one batch through the model first"):
        case.make().attach(model, optimizer, (torch.zeros(2, 6),))
    model(torch.zeros(2, 6))
    case.make().attach(model, optimizer, (torch.zeros(2, 6),)).detach()


@every_method
def test_complex_weights_are_refused(case: Case) -> None:
    kinds = {"dtype": torch.complex128}
    model = nn.Sequential(nn.Linear(6, 12, **kinds), nn.Tanh(), nn.Linear(12, 3, **kinds))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    method = case.make()
    if isinstance(method, OptimizerReset):
        return  # which writes no weight
    with pytest.raises((ValueError, RuntimeError), match=r"floating-point parameters.*complex128|none|no hidden units"):
        method.attach(model, optimizer, (torch.zeros(2, 6, **kinds),))
