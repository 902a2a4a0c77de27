"""Soft Weight Rescaling: exact where it can be, honest where not, and equal to a slow reference."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import streams
from callbacks.layered import VGG, build, cnn, disturb, mlp, outputs, update, without_chance
from callbacks.streams import INPUT, convolutional, train
from lightning_plasticity import SoftWeightRescaling
from lightning_plasticity.callbacks import soft_weight_rescaling
from lightning_plasticity.functional.soft_weight_rescaling import proportionality_error
from lightning_plasticity.kernels import choice

NETWORKS = ["mlp", "cnn", "cnn_bn", *VGG]
RESIDUAL = ["resnet18", "resnet50"]


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def errors_of_one_application(model: nn.Module, x: Tensor, method: SoftWeightRescaling) -> tuple[float, float]:
    """How far from proportional an application after a large update leaves the outputs, in training and evaluation."""
    method.attach(model, example_inputs=(x,))
    update(model)
    before = [outputs(model, x, training) for training in (True, False)]
    norms = [parameter.norm().item() for parameter in model.parameters()]
    method.step()
    assert norms != [parameter.norm().item() for parameter in model.parameters()]
    first, second = (outputs(model, x, training) for training in (True, False))
    return proportionality_error(before[0], first), proportionality_error(before[1], second)


# ---- proportionality


@pytest.mark.parametrize("name", [*NETWORKS, *RESIDUAL])
def test_outputs_stay_proportional(name):
    model, x = build(name)
    without_chance(model)
    with no_warning():
        errors = errors_of_one_application(
            model.double(), x.double(), SoftWeightRescaling(0.5, 0.2, tie_residual=name in RESIDUAL)
        )
    assert max(errors) <= 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_proportional_in_float32_with_the_usual_epsilon(name):
    model, x = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert max(errors_of_one_application(model, x, SoftWeightRescaling(0.5, 0.2))) <= 1e-4


def test_residual_networks_are_not_proportional_untied():
    model, x = build("resnet18")
    with pytest.warns(UserWarning, match="tie_residual=True may help"):
        errors = errors_of_one_application(
            without_chance(model).double(), x.double(), SoftWeightRescaling(0.5, tie_residual=False)
        )
    assert min(errors) > 1e-3


def test_the_literal_algorithm_is_not_proportional():
    model, x = build("cnn_bn")
    model, x = without_chance(model).double(), x.double()
    layers = [model[0], model[1], model[4], model[5], model[9], model[11]]
    initial = [layer.weight.norm().item() for layer in layers]
    update(model)
    before = outputs(model, x, training=True)
    product, previous = 1.0, 1.0
    with torch.no_grad():
        for layer, start in zip(layers, initial, strict=True):
            norm = layer.weight.norm().item()
            factor = (0.5 * start + 0.5 * norm) / norm
            if layer is model[5]:  # the last normalisation layer
                product = previous * factor
            elif layer in (model[9], model[11]):
                product *= factor
            else:
                product = factor
            layer.weight *= factor
            layer.bias *= product
            previous = factor
    assert proportionality_error(before, outputs(model, x, training=True)) > 1e-3


class PreActivation(nn.Module):
    """Residual branches that end in a convolution: the factors in a branch must make up for each other."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList([norm(6) for _ in range(4)])
        self.convolutions = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(4)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in (0, 2):
            y = self.convolutions[i](self.norms[i](x).relu())
            x = x + self.convolutions[i + 1](self.norms[i + 1](y).relu())
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_tied_residual_branches_that_end_in_a_layer(norm):
    model = PreActivation(norm)
    disturb(model)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with no_warning():
        errors = errors_of_one_application(
            without_chance(model).double(), x, SoftWeightRescaling(0.5, tie_residual=True)
        )
    assert max(errors) <= 1e-10


class TwoHeads(nn.Module):
    """Parallel heads, and a batch norm over channels from two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(8)
        self.value, self.policy = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.value(x), self.policy(x)


def test_each_output_of_a_branching_network_is_proportional():
    model = TwoHeads()
    disturb(model)
    without_chance(model).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    method = SoftWeightRescaling(0.5, tie_residual=True).attach(model, example_inputs=(x,))
    update(model)
    before = model.eval()(x)
    method.step()
    for old, new in zip(before, model(x), strict=True):
        assert proportionality_error(old, new) <= 1e-12
    # each with a factor of its own
    assert not torch.allclose(before[0] / model(x)[0], (before[1] / model(x)[1])[:, :1], rtol=1e-3)


# ---- where it cannot be exact


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (vit, (4, 3, 32, 32)),
        (lambda: mlp(nn.Tanh), (4, 5)),
        (Attention, (4, 6, 8)),
        (Recurrent, (4, 6, 8)),
    ],
    ids=["ViT", "tanh", "attention", "LSTM"],
)
def test_it_says_once_that_a_step_changes_the_outputs_and_rescales_all_the_same(make, shape):
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    method = SoftWeightRescaling(1.0)
    with pytest.warns(UserWarning, match="cannot keep this network's outputs proportional") as record:
        method.attach(model, example_inputs=(x,))
    (message,) = [str(warning.message) for warning in record]
    moved, advised = (
        float(re.search(text, message)[1]) for text in (r"by (\S+) of", r"A coefficient of (\S+) instead")
    )
    assert 0.01 < moved < 1
    assert advised == pytest.approx(0.01 / moved, rel=0.1)
    norms = [parameter.norm() for parameter in model.parameters() if parameter.dim() > 1]
    update(model)
    method.step()
    after = [parameter.norm() for parameter in model.parameters() if parameter.dim() > 1]
    if make is not vit:  # whose class token and positions are parameters of no layer
        torch.testing.assert_close(after, norms)
    method.detach()
    with no_warning():  # it has been said
        method.attach(model, example_inputs=(x,))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (vit, (4, 3, 32, 32)),
        (lambda: mlp(nn.GELU), (4, 5)),
        (Recurrent, (4, 6, 8)),
        (lambda: build("resnet18")[0], (4, 3, 32, 32)),
    ],
    ids=["ViT", "GELU", "LSTM", "ResNet-18"],
)
def test_small_changes_are_not_spoken_of(make, shape):
    with no_warning():
        SoftWeightRescaling().attach(make(), example_inputs=(torch.randn(shape),))


class FailsOutsideOfTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.broken = nn.Linear(5, 4), nn.BatchNorm1d(4), False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken and not self.training:
            raise ZeroDivisionError
        return self.norm(self.layer(x))


def test_one_of_the_two_modes_is_enough_to_tell():
    model = FailsOutsideOfTraining()
    model.broken = True
    with no_warning():
        SoftWeightRescaling().attach(model, example_inputs=(torch.randn(3, 5),))
        SoftWeightRescaling().attach(FailsOutsideOfTraining(), example_inputs=(torch.randn(1, 5),))
    other = FailsOutsideOfTraining()
    other.broken = True
    with pytest.warns(UserWarning, match="cannot tell whether .* ZeroDivisionError"):
        SoftWeightRescaling().attach(other, example_inputs=(torch.randn(1, 5),))


# ---- the rule


class Reference:
    """The rule in NumPy, layer by layer, for a network that is a list of layers."""

    def __init__(self, layers: list[nn.Module], coefficient: float) -> None:
        self.layers, self.coefficient, self.largest_change = layers, coefficient, 0.0
        self.initial = [self.norm(layer) for layer in layers]

    @staticmethod
    def norm(layer: nn.Module) -> float:
        return float(np.sqrt((layer.weight.detach().numpy() ** 2).sum()))

    def step(self) -> None:
        product = 1.0
        for layer, initial in zip(self.layers, self.initial, strict=True):
            norm = self.norm(layer)
            factor = (self.coefficient * initial + (1 - self.coefficient) * norm) / norm
            self.largest_change = max(self.largest_change, abs(factor - 1))
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.numpy()[...] *= product
                layer.running_var.numpy()[...] *= product**2
                product = 1.0
            product *= factor
            layer.weight.detach().numpy()[...] *= factor
            layer.bias.detach().numpy()[...] *= product


def test_same_weights_as_the_slow_reference_over_1000_steps():
    model, twin = convolutional(), convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    example = torch.randn(3, *INPUT[convolutional], dtype=torch.float64)
    method = SoftWeightRescaling(0.1).attach(model, optimizer, example_inputs=(example,))
    reference = Reference([layer for layer in twin if hasattr(layer, "weight")], 0.1)
    train(model, optimizer, method.step, INPUT[convolutional], 1000)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.5), reference.step, INPUT[convolutional], 1000)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-6, atol=1e-8, msg=name)
    assert reference.largest_change > 1e-3


def test_coefficient_1_holds_every_norm_where_it_started():
    model = convolutional()
    layers = [layer for layer in model if hasattr(layer, "weight")]
    initial = [layer.weight.norm() for layer in layers]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    example = torch.randn(3, *INPUT[convolutional], dtype=torch.float64)
    method = SoftWeightRescaling(1.0).attach(model, optimizer, example_inputs=(example,))
    train(model, optimizer, method.step, INPUT[convolutional], 50)
    torch.testing.assert_close([layer.weight.norm() for layer in layers], initial, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_coefficient_0_is_bitwise_nothing(tied):
    model, x = build("cnn_bn")
    method = SoftWeightRescaling(0.0, tie_residual=tied).attach(model, example_inputs=(x,))
    update(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_norm_0_stay():
    model = mlp()
    method = SoftWeightRescaling(0.5).attach(model, example_inputs=(torch.randn(3, 5),))
    nn.init.zeros_(model[2].weight)
    method.step()
    assert (model[2].weight == 0).all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_layer_that_starts_at_0_is_pointed_out():
    model = mlp()
    nn.init.zeros_(model[4].weight)
    with pytest.warns(UserWarning, match=r"initial norm, which is 0 for 4\.weight"):
        SoftWeightRescaling().attach(model, example_inputs=(torch.randn(3, 5),))
    with no_warning():
        SoftWeightRescaling(exclude="4").attach(model, example_inputs=(torch.randn(3, 5),))


# ---- the classifier


def factors_of(model: nn.Module, x: Tensor, **settings: object) -> dict[str, float]:
    """By what each weight was multiplied, when every norm had doubled."""
    method = SoftWeightRescaling(0.5, **settings).attach(model, example_inputs=(x,))
    weights = {name: parameter for name, parameter in model.named_parameters() if name.endswith("weight")}
    with torch.no_grad():
        for parameter in weights.values():
            parameter.mul_(2)
    before = {name: parameter.norm().item() for name, parameter in weights.items()}
    method.step()
    return {name: parameter.norm().item() / before[name] for name, parameter in weights.items()}


@pytest.mark.parametrize(
    ("settings", "classifier"),
    [
        ({}, {"11"}),
        ({"classifier": "9"}, {"9"}),
        ({"classifier": ["9", "11"]}, {"9", "11"}),
    ],
)
def test_the_classifier_has_its_own_coefficient(settings, classifier):
    factors = factors_of(cnn(), torch.randn(4, 3, 32, 32), classifier_coefficient=1.0, **settings)
    for name, factor in factors.items():
        layer = name.removesuffix(".weight")
        assert factor == pytest.approx(0.5 if layer in classifier else 0.75)


class TimmLike(nn.Module):
    """As timm's models that learn from a teacher: two classifiers, and another linear layer that is called last."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.head_dist, self.projection = (nn.Linear(4, 4) for _ in range(4))

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.body(x).relu()
        return self.head(x), self.head_dist(x), self.projection(x)


def test_a_timm_models_own_classifier_counts():
    factors = factors_of(nn.Sequential(TimmLike()), torch.randn(4, 4), classifier_coefficient=1.0)
    assert [round(factor, 4) for factor in factors.values()] == [0.75, 0.5, 0.5, 0.75]


def test_without_a_classifier_of_its_own_the_last_linear_layer_counts():
    import timm

    model = timm.create_model("resnet18", num_classes=0, zero_init_last=False)  # the classifier is the identity
    model = nn.Sequential(model, nn.Linear(512, 3))
    with pytest.warns(UserWarning, match="cannot keep"):
        factors = factors_of(model, torch.randn(2, 3, 32, 32), classifier_coefficient=1.0)
    assert {name for name, factor in factors.items() if round(factor, 3) == 0.5} == {"1.weight"}


# ---- what is not plain: right, or refused


def attach(model: nn.Module, x: Tensor, **settings: object) -> SoftWeightRescaling:
    return SoftWeightRescaling(0.5, **settings).attach(model, example_inputs=(x,))


def test_tied_weights_are_one_layer():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    model[2].weight = model[0].weight
    with no_warning():
        errors = errors_of_one_application(model, torch.randn(4, 5).double(), SoftWeightRescaling(0.5))
    assert max(errors) <= 1e-12


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("between", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("with_example", [False, True])
def test_a_layer_that_is_called_twice_is_rescaled_once_and_goes_on_learning(between, with_example, tied):
    torch.manual_seed(0)
    shared, x = nn.Linear(5, 5), torch.randn(4, 5)
    model, own = nn.Sequential(shared, between(), shared), dict(shared.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot keep this network's outputs proportional")
        method = SoftWeightRescaling(1.0, tie_residual=tied).attach(model, optimizer, (x,) if with_example else None)
        norm, losses = shared.weight.norm().item(), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            method.step()
    assert all(tensor is own[name] for name, tensor in shared.named_parameters())
    assert losses[-1] < losses[0]
    assert shared.weight.norm().item() == pytest.approx(norm)


class HalfShared(nn.Module):
    """Two recurrent layers: what reads the input is one, what reads the state is each one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.RNN(5, 5, nonlinearity="relu"),
            nn.RNN(5, 5, nonlinearity="relu"),
            nn.Linear(5, 2),
        )
        self.second.weight_ih_l0, self.second.bias_ih_l0 = self.first.weight_ih_l0, self.first.bias_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0])


def test_a_layer_that_is_shared_in_part_has_the_rest_rescaled():
    model = HalfShared()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot keep this network's outputs proportional")
        method = SoftWeightRescaling(1.0).attach(model, example_inputs=(torch.randn(3, 2, 5),))
    update(model)
    before = {name: parameter.norm().item() for name, parameter in model.named_parameters()}
    method.step()
    grown = {name: parameter.norm().item() / before[name] for name, parameter in model.named_parameters()}
    both = grown["first.weight_hh_l0"] * grown["second.weight_hh_l0"]
    assert abs(both - 1) > 0.01
    assert grown["second.bias_hh_l0"] == pytest.approx(both)


def test_a_shared_bias_is_refused():
    model = mlp()
    model[2].bias = model[0].bias
    with pytest.raises(ValueError, match=r"'2\.bias' is also '0\.bias'"):
        attach(model, torch.randn(4, 5))
    attach(model, torch.randn(4, 5), exclude=["0", "2"])


def test_frozen_layers_before_the_trained_ones_stay_bitwise():
    model, x = build("cnn_bn")
    for parameter in model[:6].parameters():
        parameter.requires_grad_(False)
    method = attach(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update(model[6:])
    method.step()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if int(name.split(".")[0]) < 6}


class Averaged(nn.Module):
    """A network and its moving average in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = mlp(), mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.online(x), self.target(x)


@pytest.mark.parametrize("is_in_optimizer", [False, True])
@pytest.mark.parametrize("lr_drop", [None, 0.5])
def test_what_others_move_is_left_to_them(is_in_optimizer, lr_drop):
    """A target network is frozen, or belongs to no optimizer: what it is set to stays, until it is trained."""
    model = Averaged()
    if is_in_optimizer:
        model.target.requires_grad_(False)
    optimizer = torch.optim.SGD((model if is_in_optimizer else model.online).parameters(), lr=0.1)
    method = SoftWeightRescaling(0.5, rebase_on_lr_drop=lr_drop).attach(model, optimizer)

    def step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        optimizer.zero_grad()
        sum(y.square().sum() for y in model(torch.randn(4, 5))).backward()
        optimizer.step()
        with torch.no_grad():
            for parameter in model.target.parameters():
                parameter.mul_(1.1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        method.step()
        return before, model.state_dict()

    before, after = step()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"online.{name}" for name, _ in model.online.named_parameters()}
    if is_in_optimizer:
        model.target.requires_grad_(True)
    else:
        optimizer.add_param_group({"params": model.target.parameters()})
    before, after = step()
    assert not torch.equal(before["target.0.weight"], after["target.0.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_bias_after_a_trained_layer_is_refused(tied):
    model = mlp()
    model[4].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'4\.bias' is frozen"):
        attach(model, torch.randn(4, 5), tie_residual=tied)
    with no_warning():
        SoftWeightRescaling(1e-3, exclude="4").attach(model, example_inputs=(torch.randn(4, 5),))
    model[4].bias = None
    attach(model, torch.randn(4, 5), tie_residual=tied)


def test_a_frozen_norm_on_a_tied_stream_holds_the_others():
    model = PreActivation(nn.BatchNorm2d)
    disturb(model)
    model.stem.requires_grad_(False)
    method = attach(model, torch.randn(4, 3, 8, 8), tie_residual=True)
    stem = model.stem.weight.clone()
    x = torch.randn(4, 3, 8, 8)
    update(model.convolutions)
    before = outputs(model, x, training=False)
    method.step()
    assert torch.equal(model.stem.weight, stem)
    assert proportionality_error(before, outputs(model, x, training=False)) < 1e-5


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 5)
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_layer_that_is_never_called_stays():
    model = Unused()
    before = model.unused.weight.clone()
    method = attach(model, torch.randn(4, 5))
    update(model)
    changed = model.unused.weight.clone()
    method.step()
    assert torch.equal(model.unused.weight, changed)
    assert not torch.equal(before, changed)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(8, affine=False),
        lambda: nn.LayerNorm(8, elementwise_affine=False),
        lambda: nn.BatchNorm1d(8, track_running_stats=False),
        lambda: nn.GroupNorm(2, 8),
        lambda: nn.RMSNorm(8),
        lambda: nn.LayerNorm(8, bias=False),
    ],
)
def test_norms_of_every_kind_begin_the_product_anew(norm):
    model = nn.Sequential(nn.Linear(5, 8), norm(), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-40
    disturb(nn.Sequential(*[layer for layer in model if not isinstance(layer, nn.ReLU)]))
    with no_warning():
        errors = errors_of_one_application(model.double(), torch.randn(6, 5).double(), SoftWeightRescaling(0.5))
    assert max(errors) <= 1e-12


def test_a_local_response_norm_normalises_no_scale():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2), nn.Conv2d(4, 4, 3))
    method = attach(model, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        model[0].weight.mul_(2)
        bias = model[2].bias.clone()
    method.step()
    factor = 0.75  # (1/2 + 2/2) / 2 of the first layer; the second's norm is as it was
    torch.testing.assert_close(model[2].bias, factor * bias)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        old_weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_weights_that_are_computed_are_refused_or_excluded(change):
    model = mlp()
    change(model[2])
    with pytest.raises(RuntimeError, match=r"those of '2' are computed from other tensors"):
        attach(model, torch.randn(4, 5))
    with no_warning():
        SoftWeightRescaling(1e-3, exclude="2").attach(model, example_inputs=(torch.randn(4, 5),))


@pytest.mark.parametrize("model", [nn.Sequential(nn.PReLU()), nn.Sequential(nn.BatchNorm1d(5, affine=False))])
def test_a_network_without_weights_is_refused(model):
    with pytest.raises(ValueError, match="needs layers with weights, and the forward pass calls none"):
        attach(model, torch.randn(4, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficient": 1.1}, "coefficient must be a finite number, at least 0 and at most 1, got 1.1"),
        ({"classifier_coefficient": -0.1}, "classifier_coefficient must be a finite number, at least 0 and at most 1"),
        ({"classifier": "head"}, "needs a classifier_coefficient of its own"),
        ({"rebase_on_lr_drop": 1.0}, "rebase_on_lr_drop must be a finite number, above 0 and below 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftWeightRescaling(**settings)


@pytest.mark.parametrize("classifier", ["nothing", "1"])
def test_a_classifier_without_weights_is_refused(classifier):
    with pytest.raises(ValueError, match="needs a classifier with weights"):
        attach(mlp(), torch.randn(4, 5), classifier_coefficient=0.1, classifier=classifier)


# ---- several parts


def test_modules_that_are_called_one_by_one_are_one_network():
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(4, 3)}).double()
    x = torch.randn(6, 5, dtype=torch.float64)

    def forward() -> Tensor:
        return model["head"](model["body"](x).relu())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SoftWeightRescaling(0.5).attach(model, optimizer)
    with no_warning():
        forward().square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        before = forward()
        method.step()
        assert not torch.equal(before, forward())
        assert proportionality_error(before, forward()) <= 1e-12


def test_each_optimizers_steps_rescale_what_it_trains():
    model = nn.Sequential(mlp(), nn.ReLU(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)]
    method = SoftWeightRescaling(1.0).attach(model, optimizers, example_inputs=(x,))
    norms = [parameter.norm() for parameter in (model[0][0].weight, model[2].weight)]
    update(model)
    head = model[2].weight.clone()
    before = model(x)
    before.sum().backward()
    optimizers[0].param_groups[0]["lr"] = 0.0
    optimizers[0].step()
    method.step()
    torch.testing.assert_close(model[0][0].weight.norm(), norms[0])
    assert torch.equal(model[2].weight, head)
    assert proportionality_error(before, model(x)) <= 1e-12
    optimizers[1].step()
    method.step()
    torch.testing.assert_close(model[2].weight.norm(), norms[1])


def test_an_optimizer_of_nothing_that_is_rescaled_changes_nothing():
    model = nn.Sequential(mlp(), nn.PReLU())
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    method = SoftWeightRescaling(1.0).attach(model, optimizers, example_inputs=(torch.randn(4, 5),))
    model(torch.randn(4, 5)).sum().backward()
    optimizers[1].step()
    before = [parameter.clone() for parameter in model.parameters()]
    method.step()
    assert method.optimizer_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("are_kernels_used", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_that_would_overflow_are_refused_before_anything_is_written(are_kernels_used, dtype, monkeypatch):
    monkeypatch.setattr(choice, "_is_on", are_kernels_used)
    model = mlp(layers=4).to(dtype)
    method = SoftWeightRescaling(1.0).attach(model, example_inputs=(torch.randn(4, 5, dtype=dtype),))
    [share] = method._shares.values()
    assert (share.followers.kernels() is not None) == (are_kernels_used and dtype == torch.float32)
    largest = torch.finfo(dtype).max
    with torch.no_grad():
        model[2].weight.mul_(0.5)
        model[4].bias[1] = -0.4 * largest  # goes by the second layer, which doubles: as large as can be
        method.step()
        assert model[4].bias[1] == -0.8 * largest or dtype == torch.bfloat16
        assert model.state_dict()["4.bias"].isfinite().all()
        model[2].weight.mul_(0.5)
        before = deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="needs weights that nothing else shrinks"):
            method.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        model[4].bias[1] = torch.inf  # of the user's own making
        method.step()


# ---- the learning rate


def train_with_drops(model: nn.Module, method: SoftWeightRescaling, rates: list[float], optimizer=None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=rates[0])
    method.attach(model, optimizer, example_inputs=(torch.randn(4, 5),))
    for i, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(torch.ones(4, 5) * (i + 1)).square().sum().backward()
        optimizer.step()
        method.step()


@pytest.mark.parametrize(("rates", "is_rebased"), [([0.01, 0.01, 0.005], True), ([0.01, 0.01, 0.006], False)])
def test_norms_are_taken_anew_where_the_rate_drops(rates, is_rebased):
    torch.manual_seed(0)
    model = mlp()
    initial = model[0].weight.norm()
    method = SoftWeightRescaling(0.0, rebase_on_lr_drop=0.5)
    train_with_drops(model, method, rates[:2])
    before_drop = model[0].weight.norm()
    state = method.state_dict()
    method.coefficient = 1.0  # from now on every norm is held where the method believes it began
    method.detach()
    resumed = SoftWeightRescaling(1.0, rebase_on_lr_drop=0.5)
    resumed.load_state_dict(state)
    train_with_drops(model, resumed, rates[2:])
    torch.testing.assert_close(model[0].weight.norm(), before_drop if is_rebased else initial)
    assert not torch.allclose(before_drop, initial)


def initial_norms(method):
    return torch.stack([norms[0] for norms in method.state_dict()["method"]["norms"].values()])


def test_a_rate_of_0_is_no_drop_again_and_again():
    model = mlp()
    method = SoftWeightRescaling(0.0, rebase_on_lr_drop=0.5)
    train_with_drops(model, method, [0.01, 0.0, 0.0])
    rebased = initial_norms(method)
    update(model)
    for _ in range(2):  # in the second the norms before the step are others
        model(torch.ones(4, 5)).sum().backward()
        method.optimizers[0].step()
        method.step()
    assert torch.equal(initial_norms(method), rebased)


def test_following_the_rate_needs_an_optimizer():
    with pytest.raises(ValueError, match="rebase_on_lr_drop needs an optimizer"):
        attach(mlp(), torch.randn(4, 5), rebase_on_lr_drop=0.5)


def test_a_checkpoint_of_other_layers_is_refused():
    state = attach(mlp(), torch.randn(4, 5)).state_dict()
    method = attach(mlp(layers=4), torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"only one of the two has \['6\.weight'\]"):
        method.load_state_dict(state)


# ---- cost


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_costs_as_many_calls_for_100_layers_as_for_10(tied, monkeypatch):
    monkeypatch.setattr(soft_weight_rescaling, "_FEW", 0)  # as on a GPU
    calls = {}
    for layers in (10, 100):
        model = mlp(layers=layers)
        method = attach(model, torch.randn(4, 5), tie_residual=tied)
        with CountCalls() as counted:
            method.step()
        calls[layers] = counted.names
    assert calls[10] == calls[100]
    assert len(calls[10]) <= 20
    assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & {name.split(".")[0] for name in calls[10]}


def test_python_s_numbers_give_the_factors_that_tensors_give(monkeypatch):
    factors = {}
    for few in (0, 100):
        monkeypatch.setattr(soft_weight_rescaling, "_FEW", few)
        torch.manual_seed(0)
        model = mlp()
        method = attach(model, torch.randn(4, 5))
        with torch.no_grad():
            model[0].weight.mul_(2)
            model[2].weight.zero_()
            model[4].weight.mul_(0.5)
        method.step()
        [share] = method._shares.values()
        assert (share.terms is None) == (few == 0)
        factors[few] = share.factors
    assert factors[0].min() < 1 < factors[0].max()
    torch.testing.assert_close(factors[100], factors[0])


def test_what_is_logged():
    model = mlp()
    method = attach(model, torch.randn(4, 5))
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[4].weight.mul_(0.5)
    assert {name: round(float(value), 4) for name, value in method._numbers().items()} == {
        "largest_norm_ratio": 2.0,
        "smallest_norm_ratio": 0.5,
    }


@pytest.mark.parametrize("network", [streams.mlp, streams.convolutional])
def test_biases_kept_is_the_projection_of_nap_over_300_steps(network):
    model, twin = network(), network()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.02) for net in (model, twin)]
    shape = streams.INPUT[network]
    method = SoftWeightRescaling(1.0, biases="keep")
    method.attach(model, optimizers[0], example_inputs=(torch.randn(4, *shape, dtype=torch.float64),))
    norms = {name: p.detach().norm().item() for name, p in twin.named_parameters() if name.endswith("weight")}

    @torch.no_grad()
    def reference() -> None:
        for name, parameter in twin.named_parameters():
            if name in norms:
                parameter *= norms[name] / parameter.norm().item()

    streams.train(model, optimizers[0], method.step, shape, 300)
    streams.train(twin, optimizers[1], reference, shape, 300)
    for (name, parameter), slow in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-6, atol=1e-8)
        assert name not in norms or parameter.detach().norm().item() == pytest.approx(norms[name])
