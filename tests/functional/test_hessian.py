import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_plasticity.functional import hessian_spectrum, sharpness, summarize_spectrum
from lightning_plasticity.functional.hessian import lanczos_eigenvalues

from .test_sharpness import full_spectrum


def network(activation: nn.Module) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), activation, nn.Linear(4, 3)).double()
    return model, torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 3, (20,))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_with_as_many_steps_as_parameters_it_is_the_whole_spectrum(activation):
    """With its zeros: of the biases before batch norm, of directions that scale two layers against each other."""
    model, x, y = network(activation)
    expected = full_spectrum(model, cross_entropy, x, y).flip(0)
    for steps in (len(expected), 10_000):
        spectrum = hessian_spectrum(model, cross_entropy, x, y, steps)
        torch.testing.assert_close(spectrum, expected, rtol=1e-8, atol=1e-10)
    single = hessian_spectrum(model.float(), cross_entropy, x.float(), y, 10_000)
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-5)


def test_with_fewer_steps_the_ends_of_the_spectrum_are_exact_first():
    model, x, y = network(nn.Tanh())
    expected = full_spectrum(model, cross_entropy, x, y).flip(0)
    spectrum = hessian_spectrum(model, cross_entropy, x, y, 25)
    assert len(spectrum) == 25
    assert spectrum[:5].tolist() == pytest.approx(expected[:5].tolist(), rel=1e-6)
    assert spectrum[-1].item() == pytest.approx(expected[-1].item(), rel=1e-6)
    assert spectrum[0].item() == pytest.approx(float(sharpness(model, cross_entropy, x, y, tolerance=1e-6)), rel=1e-9)


@pytest.mark.parametrize("values", [[3.0] * 6, [0.0] * 6, [5.0, 5.0, -2.0, -2.0, 0.0, 0.0], [1.0]])
def test_eigenvalues_that_occur_several_times_are_all_there(values):
    torch.manual_seed(0)
    size = len(values)
    turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    matrix = turn @ torch.diag(torch.tensor(values).double()) @ turn.T
    found = lanczos_eigenvalues(lambda v: matrix @ v, torch.randn(size, dtype=torch.float64), size)
    torch.testing.assert_close(found, torch.tensor(values).double().sort(descending=True).values, rtol=0, atol=1e-12)


def test_memory_that_was_not_written_is_not_read():
    """Under this setting of PyTorch it holds NaN; here each product leads nowhere new."""
    torch.use_deterministic_algorithms(True)
    try:
        found = lanczos_eigenvalues(lambda v: 3.0 * v, torch.ones(4, dtype=torch.float64), 4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.tolist() == pytest.approx([3.0] * 4)


def test_summaries():
    spectrum = torch.tensor([6.0, 3.0, 0.5, 0.0, -0.5])
    assert [summarize_spectrum(spectrum, "energy", share).item() for share in (0.6, 0.61, 0.9, 0.95, 1.0)] == [
        1, 2, 2, 3, 4,
    ]  # fmt: skip
    assert summarize_spectrum(spectrum, "negative").item() == pytest.approx(0.05)
    shares = torch.tensor([0.6, 0.3, 0.05, 0.05]).double()
    assert summarize_spectrum(spectrum, "effective").item() == pytest.approx(
        float((-shares * shares.log()).sum().exp())
    )
    for summary in ("energy", "effective", "negative"):
        assert summarize_spectrum(torch.zeros(3), summary).item() == 0
        assert summarize_spectrum(torch.tensor([1.0, float("nan")]), summary).isnan()
    with pytest.raises(ValueError, match=r"a vector of eigenvalues, got shape \(2, 2\): pass what hessian_spectrum"):
        summarize_spectrum(torch.ones(2, 2))


def test_a_linear_loss_is_flat_and_one_that_is_not_finite_is_none():
    model = nn.Linear(3, 1)
    flat = hessian_spectrum(model, lambda output, target: output.sum(), torch.ones(2, 3), torch.ones(2))
    assert flat.tolist() == [0.0] * 4
    model.weight.data.fill_(float("nan"))
    spectrum = hessian_spectrum(model, lambda output, _: output.pow(3).sum(), torch.ones(2, 3), torch.ones(2))
    assert [value != value for value in spectrum.tolist()] == [True]


def test_it_leaves_the_model_as_it_was_and_repeats_itself():
    model, x, y = network(nn.ReLU())
    model.append(nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first = hessian_spectrum(model, cross_entropy, x, y, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, hessian_spectrum(model, cross_entropy, x, y, 8))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
