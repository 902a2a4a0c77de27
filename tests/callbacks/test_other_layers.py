"""Layers that hold their weights another way round are treated as the layers that do the same."""

import logging

import pytest
import torch
from torch import nn

from lightning_plasticity import (
    ActivationReset,
    ContinualBackprop,
    DirectionAwareShrink,
    IsometryReinit,
    L2Init,
    ParsevalRegularization,
    PartialReset,
    ReDo,
    SelectiveReinit,
    SoftWeightRescaling,
    SpectralRegularization,
    WeightClipping,
)

METHODS = {
    "ContinualBackprop": lambda: ContinualBackprop(0.05, maturity_threshold=3),
    "ContinualBackprop by weight": lambda: ContinualBackprop(0.05, maturity_threshold=3, utility="weight"),
    "ContinualBackprop by adaptation": lambda: ContinualBackprop(0.05, maturity_threshold=3, utility="adaptation"),
    "ActivationReset": lambda: ActivationReset("relu", maturity_threshold=3, max_weight=0.3),
    "ReDo": lambda: ReDo(0.5, every_n_train_steps=4),
    "ReDo by gradient": lambda: ReDo(0.5, every_n_train_steps=4, score="gradient"),
    "PartialReset": lambda: PartialReset(0.5, every_n_train_steps=4, init="empirical"),
}
# Those on weights, whichever unit they belong to. No draws: these depend on how a weight lies in memory.
ON_WEIGHTS = {
    "DirectionAwareShrink": lambda: DirectionAwareShrink(
        every_n_train_steps=4,
        data=[(torch.linspace(-1, 1, 32).view(8, 4), 0.5)],
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
    ),
    "IsometryReinit": lambda: IsometryReinit(every_n_train_steps=4),
    "L2Init": lambda: L2Init(0.3),
    "ParsevalRegularization": lambda: ParsevalRegularization(0.5),
    "SelectiveReinit": lambda: SelectiveReinit(0.3, every_n_train_steps=4, reinit="mean"),
    "SelectiveReinit by gradient": lambda: SelectiveReinit(
        0.3, every_n_train_steps=4, reinit="mean", utility="gradient"
    ),
    "SoftWeightRescaling": lambda: SoftWeightRescaling(0.5),
    "WeightClipping": lambda: WeightClipping(0.5),
}


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 10, 1), nn.ReLU(), nn.Conv2d(10, 2, 1))


def transposed() -> nn.Sequential:
    model = convolutions()
    for i in (0, 2, 4):
        like = nn.ConvTranspose2d(model[i].in_channels, model[i].out_channels, 1)
        like.load_state_dict({"weight": model[i].weight.transpose(0, 1), "bias": model[i].bias})
        model[i] = like
    return model


class Conv1D(nn.Module):
    """A linear layer whose weight has its outputs in the second dimension, as GPT-2's."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.weight.detach().t().clone())
        self.bias = nn.Parameter(like.bias.detach().clone())

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2))


def home_made() -> nn.Sequential:
    model = linear()
    for i in (0, 2, 4):
        model[i] = Conv1D(model[i])
    return model


def train(model: nn.Module, method=None) -> list[torch.Tensor]:
    """Weights with the outputs first, and the optimizer's memory of them, after some steps."""
    x, y = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)), 0.5
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    if method is not None:
        method.attach(model, optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if method is not None:
            method.step()
    if method is not None:
        method.detach()
    found = []
    for layer in (model[0], model[2], model[4]):
        is_transposed = isinstance(layer, (nn.ConvTranspose2d, Conv1D))
        for tensor in (layer.weight, optimizer.state[layer.weight]["exp_avg_sq"]):
            found.append(tensor.detach().transpose(0, 1) if is_transposed else tensor.detach())
        found.append(layer.bias.detach())
    return found


def compiled_one_by_one() -> nn.Sequential:
    model = convolutions()
    return nn.Sequential(*(torch.compile(layer, backend="eager") for layer in model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, while it compiles
@pytest.mark.parametrize("name", METHODS)
def test_layers_that_are_compiled_one_by_one_like_others(name):
    expected = train(convolutions(), METHODS[name]())
    torch.testing.assert_close(train(compiled_one_by_one(), METHODS[name]()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_transposed_convolutions_like_convolutions(name):
    plain = train(convolutions())
    expected = train(convolutions(), METHODS[name]())
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(plain, expected, strict=True))
    torch.testing.assert_close(train(transposed(), METHODS[name]()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init", ["empirical", "kaiming_uniform"])
def test_home_made_layers_like_linear_ones_with_each_distribution(init):
    expected = train(linear(), ContinualBackprop(0.05, maturity_threshold=3, init=init))
    given = train(home_made(), ContinualBackprop(0.05, maturity_threshold=3, init=init))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*METHODS, *ON_WEIGHTS])
def test_home_made_layers_like_linear_ones(name):
    make = (METHODS | ON_WEIGHTS)[name]
    plain = train(linear())
    expected = train(linear(), make())
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(plain, expected, strict=True))
    torch.testing.assert_close(train(home_made(), make()), expected, rtol=1e-4, atol=1e-6)


def test_spectral_regularization_holds_the_norm_of_home_made_layers():
    model = home_made()
    with torch.no_grad():
        model[2].weight.mul_(5)
    start = torch.linalg.matrix_norm(model[2].weight, 2)
    train(model, SpectralRegularization(1.0))
    assert torch.linalg.matrix_norm(model[2].weight, 2) < 0.9 * start


def test_a_fused_weight_with_inputs_first_is_shared_out_by_columns():
    class Fused(nn.Sequential):
        def forward(self, x):
            query, key, value = self.qkv(x).chunk(3, -1)
            return query * key.sigmoid() + value

    model = Fused()
    model.qkv = Conv1D(nn.Linear(4, 12))
    IsometryReinit(exact=True, on_fit_start=True).attach(model, torch.optim.SGD(model.parameters(), 0.1))
    for part in model.qkv.weight.detach().chunk(3, 1):
        torch.testing.assert_close(part.T @ part, torch.eye(4))
    torch.manual_seed(0)
    model.qkv = Conv1D(nn.Linear(4, 13))
    with pytest.raises(ValueError, match=r"The 13 rows of 'qkv\.weight' must be shared out evenly"):
        IsometryReinit(on_fit_start=True).attach(model, torch.optim.SGD(model.parameters(), 0.1))


class Routed(nn.Module):
    """A layer, and a weight that no method on layers knows how to take."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.experts = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x):
        hidden = self.inner(x).relu()
        return self.head(torch.einsum("bi,eio->bo", hidden, self.experts))


@pytest.mark.parametrize("name", sorted({*ON_WEIGHTS, "SpectralRegularization"} - {"L2Init"}))
def test_a_line_says_which_weights_are_left_out(name, caplog):
    lines = []
    for model in (Routed(), linear()):
        method = ON_WEIGHTS.get(name, SpectralRegularization)()
        with caplog.at_level(logging.INFO):
            method.attach(model, torch.optim.SGD(model.parameters(), 0.1), (torch.zeros(2, 4),)).detach()
        lines.append(caplog.records[-1].getMessage())
    is_parseval = name == "ParsevalRegularization"  # which leaves the last layer out
    assert f"works on {2 - is_parseval} weights (of 3). Left out: 'experts'" in lines[0]
    assert f"works on {3 - is_parseval} weights{' (of 3)' * is_parseval}." in lines[1]
