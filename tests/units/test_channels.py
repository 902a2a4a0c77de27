"""What probing takes for a norm, for the entries of one, for a weight, and for the tensors of a call."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.layers.weights import find_norm_parameters
from lightning_plasticity.units.channels import is_norm, map_tensors, norm_dims, tensors_in, weights_of


class OwnNorm(nn.Module):
    """A norm of somebody's own, with as many entries as its shape says."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class OwnNorm2d(OwnNorm):
    pass


class NormThatCannotBeReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("module", "shape", "dim"),
    [
        (nn.BatchNorm1d(4), (2, 4), -1),
        (nn.BatchNorm1d(4), (2, 4, 4), -2),
        (nn.BatchNorm2d(4, affine=False), (2, 4, 4, 4), -3),  # its statistics are entries too
        (nn.BatchNorm2d(4, affine=False, track_running_stats=False), (2, 4, 4, 4), None),
        (nn.InstanceNorm1d(4, affine=True), (2, 4, 4), -2),
        (nn.InstanceNorm1d(4), (2, 4, 4), None),
        (nn.GroupNorm(2, 4), (2, 4, 5, 5), -3),
        (nn.LayerNorm(4), (2, 4), -1),
        (nn.LayerNorm(4), (2, 4, 4), -1),
        (nn.LayerNorm(4, elementwise_affine=False), (2, 4), None),
        (nn.LayerNorm([4, 5]), (2, 4, 5), -1),
        (OwnNorm(4), (2, 4, 5), -2),
        (OwnNorm(4), (2, 4, 5, 5), -3),
        (OwnNorm(4), (2, 5, 4), -1),
        (OwnNorm(4), (2, 4, 5, 4), -1),
        (OwnNorm(4), (4, 5), None),  # channels come second where there are positions behind them
        (OwnNorm(4), (2, 5, 6), None),
        (OwnNorm(4, 5), (2, 5, 4), None),
        (OwnNorm2d(4), (2, 4, 5, 4), -3),
        (OwnNorm2d(4), (2, 5, 5, 4), -1),
        (NormThatCannotBeReset(), (2, 4), None),
    ],
)
def test_the_dimension_over_the_entries_of_a_norm(module: nn.Module, shape: tuple[int, ...], dim: int | None) -> None:
    assert norm_dims(module, torch.zeros(shape)) == dim


class HoldsA(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


class NormHolding(HoldsA):
    pass


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: a norm with its activation in it, which here has a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LocalResponseNorm(2), True),
        (BatchNormAct(4), True),
        (OwnNorm(4), True),
        (NormHolding(nn.GELU()), True),
        (NormHolding(nn.Linear(2, 2)), False),
        (NormHolding(HoldsA(nn.Linear(2, 2))), False),
        (HoldsA(nn.GELU()), False),
    ],
)
def test_what_is_a_norm(module: nn.Module, expected: bool) -> None:
    assert is_norm(module) is expected


def test_parameters_of_a_norm_are_its_own_and_not_those_of_what_it_holds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct(4))
    assert list(find_norm_parameters(model, "")) == ["1.weight", "1.bias"]


def test_weights_have_entries_in_two_dimensions_and_are_trained() -> None:
    module = HoldsA(nn.Linear(3, 3))
    shapes = {
        "a": (2, 2),
        "b": (2, 1, 2),
        "c": (3, 4, 5),
        "row": (1, 4),
        "gain": (4, 1, 1),
        "bias": (4,),
        "one": (1, 1),
    }
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.ones(shape)))
    module.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    found = weights_of(module)
    assert [name for name in shapes if any(p is getattr(module, name) for p in found)] == ["a", "b", "c"]
    assert len(found) == 3


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None
    kind: type = nn.Module


def test_floating_point_tensors_are_found_in_whatever_holds_them() -> None:
    floats = [torch.full((), float(i)) for i in range(6)] + [torch.zeros((), dtype=torch.complex64)]
    integer = torch.ones((), dtype=torch.long)
    held = [
        floats[0], (floats[1], integer, 3, 2.5, "text", None), {"a": {"b": floats[2]}, "c": Output},
        OrderedDict(x=floats[3]), Output(floats[4], None), {floats[5]}, object(), floats[6],
    ]  # fmt: skip
    assert [id(x) for x in tensors_in(held)] == [id(x) for x in floats]


def test_floating_point_tensors_are_changed_where_functions_take_them() -> None:
    x, integer = torch.ones(()), torch.ones((), dtype=torch.long)
    changed = map_tensors(lambda tensor: tensor + 1, [x, (x, integer, "text"), {"a": [x]}, torch.Size([2])])
    assert changed == [2.0, (2.0, integer, "text"), {"a": [2.0]}, torch.Size([2])]
    assert [type(part) for part in changed] == [Tensor, tuple, dict, torch.Size]
    assert changed[1][1] is integer
