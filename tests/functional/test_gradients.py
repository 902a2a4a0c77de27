import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention

from lightning_plasticity.functional import (
    gradient_covariance,
    gradient_dormancy,
    gradient_norm,
    per_sample_gradients,
    summarize_covariance,
    zero_gradient_fraction,
)
from lightning_plasticity.functional.gradients import cosine_matrix, read_gradients


def convolutional(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(width * 4, 5),
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.project(tokens).chunk(3, dim=-1))
        return self.head(scaled_dot_product_attention(q, k, v).squeeze(1).mean(dim=1))


def images(n: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def by_loop(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """One backward pass for each example."""
    model.eval()
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        cross_entropy(model(x[None]), y[None]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, None])
def test_the_fast_way_agrees_with_the_loop(chunk_size):
    model, (x, y) = convolutional().double(), images(10)
    model[1].running_mean.normal_()
    fast = per_sample_gradients(model, cross_entropy, x.double(), y, chunk_size)
    slow = by_loop(model, x.double(), y)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    unit = slow / slow.norm(dim=1, keepdim=True)
    covariance = gradient_covariance(model, cross_entropy, x.double(), y, chunk_size)
    torch.testing.assert_close(covariance, unit @ unit.T, rtol=1e-10, atol=1e-12)
    assert covariance.max() <= 1


def test_attention_is_differentiated_per_sample():
    torch.manual_seed(0)
    model, x, y = Attention().double(), torch.randn(6, 7, 8, dtype=torch.float64), torch.randint(0, 5, (6,))
    fast = per_sample_gradients(model, cross_entropy, x, y)
    torch.testing.assert_close(fast, by_loop(model, x, y), rtol=1e-9, atol=1e-11)


def test_a_module_with_two_names_and_a_shared_weight_count_once_and_stay_what_they_are():
    torch.manual_seed(0)
    shared, other = nn.Linear(5, 5), nn.Linear(5, 5)
    other.weight = shared.weight
    model, x, y = (
        nn.Sequential(shared, nn.Tanh(), other, nn.Tanh(), shared).double(),
        torch.randn(6, 5).double(),
        torch.arange(6) % 5,
    )
    own = dict(model.named_parameters())
    fast = per_sample_gradients(model, cross_entropy, x, y)
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert fast.shape == (6, 25 + 5 + 5)
    torch.testing.assert_close(fast, by_loop(model, x, y), rtol=1e-9, atol=1e-11)


def test_frozen_parameters_are_left_out():
    model, (x, y) = convolutional(), images(3)
    model[0].requires_grad_(False)
    assert per_sample_gradients(model, cross_entropy, x, y).shape == (3, 2 * 4 + 16 * 5 + 5)
    with pytest.raises(ValueError, match="a parameter that requires a gradient, got none"):
        gradient_covariance(model.requires_grad_(False), cross_entropy, x, y)


def test_the_model_is_left_as_it_was():
    model, (x, y) = convolutional().train(), images(4)
    model[1].eval()
    cross_entropy(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    gradient_covariance(model, cross_entropy, x, y)
    with pytest.raises(RuntimeError, match="from the loss"):
        gradient_covariance(model, failing_loss, x, y)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def failing_loss(output: Tensor, target: Tensor) -> Tensor:
    raise RuntimeError("from the loss")


def test_works_where_gradients_are_turned_off():
    model, (x, y) = convolutional(), images(4)
    expected = gradient_covariance(model, cross_entropy, x, y)
    with torch.no_grad():
        assert torch.equal(gradient_covariance(model, cross_entropy, x, y), expected)
    with torch.inference_mode():
        assert torch.equal(gradient_covariance(model, cross_entropy, x + 0, y + 0), expected)


def test_low_precision_is_normalised_in_single_precision():
    model = nn.Linear(6, 2).bfloat16()
    x, y = torch.randn(4, 6).bfloat16(), torch.randn(4, 2).bfloat16()
    gradients = per_sample_gradients(model, mse_loss, x, y)
    assert gradients.dtype == torch.float32
    unit = gradients.double() / gradients.double().norm(dim=1, keepdim=True)
    covariance = gradient_covariance(model, mse_loss, x, y)
    torch.testing.assert_close(covariance, unit @ unit.T, rtol=1e-5, atol=1e-6)


def test_closed_forms():
    model, ones = nn.Linear(3, 1, bias=False), torch.ones(3, 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:  # its gradient is the input
        return (output * target).sum()

    assert torch.equal(gradient_covariance(model, loss, 5 * torch.eye(3), ones), torch.eye(3).double())
    alike = torch.tensor([[1.0, 2.0, 2.0], [2.0, 4.0, 4.0], [-3.0, -6.0, -6.0]])
    expected = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]).double()
    torch.testing.assert_close(gradient_covariance(model, loss, alike, ones), expected, rtol=1e-6, atol=0)
    tiny = gradient_covariance(model, loss, 1e-30 * alike, ones)
    torch.testing.assert_close(tiny, expected, rtol=1e-6, atol=0)


def test_an_example_without_gradient_has_a_row_of_zeros_and_one_with_nan_a_row_of_nan():
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum()

    covariance = gradient_covariance(model, loss, x, torch.ones(3, 1))
    assert covariance.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert summarize_covariance(covariance).item() == pytest.approx(1 / 3)
    for value in (float("nan"), float("inf")):
        covariance = gradient_covariance(model, loss, x, torch.tensor([[1.0], [1.0], [value]]))
        assert covariance[2].isnan().all()
        assert not covariance[:2, :2].isnan().any()
        assert all(summarize_covariance(covariance, summary).isnan() for summary in ("mean", "negative", "least"))


def test_summaries_leave_out_the_diagonal():
    covariance = torch.tensor([[1.0, -0.5, 0.25], [-0.5, 1.0, -0.125], [0.25, -0.125, 1.0]])
    assert summarize_covariance(covariance).item() == pytest.approx(-0.125)
    assert summarize_covariance(covariance, "negative").item() == pytest.approx(2 / 3)
    assert summarize_covariance(covariance, "least").item() == -0.5
    assert summarize_covariance(torch.ones(1, 1)).isnan()  # one example has no pair
    with pytest.raises(ValueError, match="summary must be one of 'mean', 'negative', 'least', got 'median'"):
        summarize_covariance(covariance, "median")


def test_the_product_of_many_columns_is_taken_in_parts(monkeypatch):
    directions = torch.randn(5, 100)
    directions /= directions.norm(dim=1, keepdim=True)
    whole = cosine_matrix(directions)
    monkeypatch.setattr("lightning_plasticity.functional.gradients._COLUMNS_AT_ONCE", 7)
    torch.testing.assert_close(cosine_matrix(directions), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (torch.zeros(0, 3), torch.zeros(0)),
        (torch.zeros(4, 3), torch.zeros(3)),
        (torch.tensor(1.0), torch.tensor(1.0)),
    ],
)
def test_inputs_need_targets(inputs, targets):
    with pytest.raises(ValueError, match="must hold the same number of examples, at least one"):
        gradient_covariance(nn.Linear(3, 1), mse_loss, inputs, targets)


def test_fifty_images_of_a_network_with_100000_weights_take_less_than_a_second():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(512, 180), nn.ReLU(), nn.Linear(180, 10)),
    )
    assert 99_000 < sum(p.numel() for p in model.parameters()) < 101_000
    inputs, targets = images(50, size=32)
    before = time.process_time()  # of this process: other work on the machine does not count
    covariance = gradient_covariance(model, cross_entropy, inputs, targets)
    assert time.process_time() - before < 1
    slow = by_loop(model, inputs, targets)
    slow /= slow.norm(dim=1, keepdim=True)
    torch.testing.assert_close(covariance, (slow @ slow.T).double(), rtol=1e-4, atol=1e-5)


# ---- all gradients of a batch ----------------------------------------------------------------------------------------


def test_norm_and_zeros_are_those_of_all_entries():
    gradients = [torch.tensor([0.0, 3.0, 0.0]), torch.tensor([[4.0]]), torch.zeros(0), torch.tensor(0.0)]
    assert gradient_norm(gradients).item() == 5
    assert zero_gradient_fraction(gradients).item() == pytest.approx(3 / 5)
    assert gradient_norm([torch.full((10, 10), 1e-30)]).item() == pytest.approx(1e-29, rel=1e-6)
    assert gradient_norm([torch.full((300, 300), 60000.0).half()]).item() == pytest.approx(300 * 60000, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value):
    gradients = [torch.tensor([0.0, 0.0]), torch.tensor([0.0, value])]
    assert not gradient_norm(gradients).isfinite()
    assert zero_gradient_fraction(gradients).isnan()


def test_gradients_must_be_there():
    for measure in (gradient_norm, zero_gradient_fraction):
        with pytest.raises(ValueError, match="At least one gradient with an entry is required, got none"):
            measure([])
    with pytest.raises(ValueError, match="measure after `backward` and before `zero_grad`"):
        read_gradients(nn.Linear(2, 2).parameters())


def test_gradient_dormancy_row_by_row():
    torch.manual_seed(0)
    gradients = [torch.randn(5, 3), torch.randn(4), torch.randn(6, 2, 3, 3)]
    gradients[0][2] *= 1e-4
    gradients[2][:2] *= 1e-4
    chosen = []
    for gradient in (gradients[0], gradients[2]):
        sizes = [row.abs().double().mean().item() for row in gradient]
        chosen += [size / (sum(sizes) / len(sizes) + 1e-9) <= 0.01 for size in sizes]
    assert chosen.count(True) == 3
    assert gradient_dormancy(gradients).item() == pytest.approx(3 / 11)
    assert gradient_dormancy([torch.zeros(2, 2)]).item() == 1
    tiny = [torch.full((2, 2), 2e-9)]  # 2e-9 / (2e-9 + 1e-9)
    assert [gradient_dormancy(tiny, tau=tau).item() for tau in (0.66, 0.67)] == [0, 1]
    assert gradient_dormancy([torch.full((2, 2), float("nan"))]).isnan()
    with pytest.raises(ValueError, match="At least one gradient of a weight matrix or kernel is required"):
        gradient_dormancy([torch.zeros(2)])
