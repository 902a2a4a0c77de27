import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from lightning_plasticity.functional import sharpness
from lightning_plasticity.functional.sharpness import largest_eigenvalue

from .test_gradients import Attention, convolutional, images


def full_spectrum(model: nn.Module, loss_fn, inputs: Tensor, targets: Tensor) -> Tensor:
    """Eigenvalues of the whole Hessian, ascending."""
    model.eval()
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        pieces = (v.view(shape) for v, shape in zip(vector.split(sizes), shapes, strict=True))
        return loss_fn(functional_call(model, dict(zip(names, pieces, strict=True)), (inputs,)), targets)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.linalg.eigvalsh(hessian(loss, flat))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_it_is_the_largest_eigenvalue_of_the_hessian(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), activation, nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 3, (20,))
    expected = full_spectrum(model, cross_entropy, x, y)[-1]
    value = sharpness(model, cross_entropy, x, y, max_iterations=200, tolerance=1e-8)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    # The error of an eigenvalue is far below the residual of its vector.
    assert sharpness(model, cross_entropy, x, y).item() == pytest.approx(expected.item(), rel=1e-4)
    assert sharpness(model.float(), cross_entropy, x.float(), y).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_larger_negative_curvature_is_not_taken_for_it():
    model = nn.Linear(3, 1, bias=False).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.squeeze(1).square() * target).sum() / 2

    curvatures = torch.tensor([-10.0, 2.0, 1.0]).double()
    value = sharpness(model, loss, torch.eye(3).double(), curvatures)
    assert value.item() == pytest.approx(2, rel=1e-10)
    negative = sharpness(model, loss, torch.eye(3).double(), torch.tensor([-10.0, -2.0, -3.0]).double())
    assert negative.item() == pytest.approx(-2, rel=1e-10)


def test_a_linear_loss_has_none():
    model = nn.Linear(3, 1)
    assert sharpness(model, lambda output, target: output.sum(), torch.ones(2, 3), torch.ones(2)).item() == 0
    # Curved in form, flat in value.
    flat = sharpness(model, lambda output, target: (0 * output.square()).sum(), torch.ones(2, 3), torch.ones(2))
    assert flat.item() == 0


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_loss_is_the_scale_of_the_value(scale):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 2).double(), torch.randn(9, 4).double(), torch.randn(9, 2).double()
    one = sharpness(model, mse_loss, x, y, tolerance=1e-8).item()
    scaled = sharpness(model, lambda o, t: scale * mse_loss(o, t), x, y, tolerance=1e-8)
    assert scaled.item() == pytest.approx(scale * one, rel=1e-9)


def test_attention_has_curvature():
    torch.manual_seed(0)
    model, x, y = Attention().double(), torch.randn(6, 7, 8).double(), torch.randint(0, 5, (6,))
    value = sharpness(model, cross_entropy, x, y, max_iterations=300, tolerance=1e-6)
    assert value.item() == pytest.approx(full_spectrum(model, cross_entropy, x, y)[-1].item(), rel=1e-9)


def test_the_model_is_left_as_it_was():
    model, (x, y) = convolutional().train(), images(4)
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    value = sharpness(model, cross_entropy, x, y)
    assert not value.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(after, state[name]) for name, after in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.inference_mode():
        assert sharpness(model, cross_entropy, x + 0, y + 0).item() == value.item()


def test_nan_stays_nan():
    model, x = nn.Linear(2, 1), torch.tensor([[1.0, float("nan")]])
    assert sharpness(model, mse_loss, x, torch.ones(1, 1)).isnan()


def test_what_did_not_converge_is_said():
    torch.manual_seed(0)
    matrix = torch.randn(200, 200, dtype=torch.float64)
    matrix = matrix + matrix.T
    start = torch.randn(200, dtype=torch.float64)
    with pytest.warns(UserWarning, match="must converge in 3 iterations, got .* raise `max_iterations` or `tolerance`"):
        value = largest_eigenvalue(lambda v: matrix @ v, start, max_iterations=3)
    assert value < torch.linalg.eigvalsh(matrix)[-1]


@pytest.mark.parametrize("seed", range(5))
def test_lanczos_without_reorthogonalisation_finds_the_largest(seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.randn(60, generator=generator, dtype=torch.float64)
    eigenvalues[:2] = torch.tensor([20.0, 19.99])  # the first converge long before the end, and come again
    matrix = basis * eigenvalues @ basis.T
    start = torch.randn(60, generator=generator, dtype=torch.float64)
    value = largest_eigenvalue(lambda v: matrix @ v, start, max_iterations=300, tolerance=1e-10)
    assert value.item() == pytest.approx(20, rel=1e-10)


def test_what_cannot_be_measured_is_refused():
    model, x, y = nn.Linear(3, 2), torch.ones(4, 3), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"The loss must be a scalar, got shape \(4, 2\)"):
        sharpness(model, lambda output, target: output - target, x, y)
    with pytest.raises(ValueError, match="same number of examples"):
        sharpness(model, mse_loss, x, y[:2])
    for settings in ({"max_iterations": 0}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a"):
            sharpness(model, mse_loss, x, y, **settings)
    with pytest.raises(ValueError, match="requires a gradient"):
        sharpness(model.requires_grad_(False), mse_loss, x, y)
