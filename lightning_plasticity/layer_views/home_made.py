"""Linear and convolution layers of other people's, told by what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


@dataclass(frozen=True)
class Kind:
    """What a module does: whether its weight has the inputs in its first dimension, and its groups."""

    transposed: bool
    groups: int


_known: WeakKeyDictionary[nn.Module, Kind | None] = WeakKeyDictionary()


def home_made(module: nn.Module) -> Kind | None:
    """What a module that is no layer of torch's does with its weight, None where that is no layer's work.

    It is tried with made-up numbers. A convolution says by its attributes which stride, padding, dilation and groups it
    has, where it has others than the usual ones.
    """
    if not _could_be_layer(module):
        return None
    if module not in _known:
        _known[module] = _kind_of(module)
    return _known[module]


def _could_be_layer(module: nn.Module) -> bool:
    weight, own = module._parameters.get("weight"), {key for key, p in module._parameters.items() if p is not None}
    if weight is None or nn.parameter.is_lazy(weight) or not 2 <= weight.ndim <= 5 or not weight.is_floating_point():
        return False
    alone = not module._buffers and not any(True for _ in module.children())
    return alone and own <= {"weight", "bias"} and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


@torch.no_grad()
def _kind_of(module: nn.Module) -> Kind | None:
    generator = torch.Generator().manual_seed(0)

    def quarters(*shape: int) -> Tensor:  # whose products and sums float32 holds without rounding in any order
        weight = own["weight"]
        return torch.randint(-7, 8, shape, generator=generator).div(4).to(weight.device, weight.dtype)

    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    numbers = {key: nn.Parameter(quarters(*parameter.shape), requires_grad=False) for key, parameter in own.items()}
    training = module.training
    module._parameters.update(numbers)
    module.training = False
    try:
        with torch.autocast(numbers["weight"].device.type, enabled=False), torch.random.fork_rng(devices=[]):
            attempts = _attempts(module, numbers["weight"], numbers.get("bias"))
            return next((kind for kind, shape, compute in attempts if _does(module, quarters(*shape), compute)), None)
    finally:
        module._parameters.update(own)
        module.training = training


def _attempts(
    module: nn.Module, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Kind, tuple[int, ...], Callable[[Tensor], Tensor]]]:
    """What it may do: the shape of an input for it, and what it then gives."""
    if weight.ndim == 2:
        for transposed in (False, True):
            rows = weight.transpose(0, 1) if transposed else weight
            yield Kind(transposed, 1), (1, 3, rows.shape[1]), partial(functional.linear, weight=rows, bias=bias)
        return
    groups = getattr(module, "groups", 1)
    if not isinstance(groups, int) or groups < 1:
        return
    usual = [0, tuple(size // 2 for size in weight.shape[2:])]
    for padding in [module.padding] if hasattr(module, "padding") else usual:
        settings = {"stride": getattr(module, "stride", 1), "padding": padding, "groups": groups}
        settings["dilation"] = getattr(module, "dilation", 1)
        compute = partial(_CONVOLUTIONS[weight.ndim], weight=weight, bias=bias, **settings)
        yield Kind(False, groups), (1, weight.shape[1] * groups, *(2 * k + 3 for k in weight.shape[2:])), compute


def _does(module: nn.Module, x: Tensor, compute: Callable[[Tensor], Tensor]) -> bool:
    try:
        given, expected = module.forward(x), compute(x)  # without hooks
    except Exception:  # it wants something else than one tensor
        return False
    precision = 8 * torch.finfo(x.dtype).eps
    fits = isinstance(given, Tensor) and given.shape == expected.shape
    return fits and torch.allclose(given, expected, rtol=precision, atol=precision)
