"""The property that makes a set of hidden units valid, checked on the network itself."""

import math
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_plasticity.layer_views import LayerView, named_layers
from lightning_plasticity.units.channels import is_norm, tensors_in
from lightning_plasticity.units.find import HiddenUnits


def columns(view: LayerView, channels: Tensor):
    """The weights that read each of the given input channels of a linear or (grouped) convolution layer."""
    weight, groups = view.matrix(view.weight), view.groups
    outs, ins = weight.shape[0] // groups, weight.shape[1]
    for channel in channels.tolist():
        group, within = divmod(channel, ins)
        yield weight[group * outs : (group + 1) * outs, within]


@contextmanager
def weights_restored(modules):
    saved = [(p, p.detach().clone()) for m in modules for p in m.parameters(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in saved:
                p.copy_(value)


@contextmanager
def without_mixing_norms(model: nn.Module):
    """Norms through which one channel reaches others become the identity."""
    patched = []
    for module in model.modules():
        if is_norm(module) and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            patched.append(module)
            module.forward = lambda x, *args, **kwargs: x
    try:
        yield
    finally:
        for module in patched:
            del module.forward


@torch.no_grad()
def run(model: nn.Module, inputs):
    torch.manual_seed(0)
    return [output.clone() for output in tensors_in(model(*inputs))]


@torch.no_grad()
def output_change(model: nn.Module, inputs, sets: list[HiddenUnits], repeats: int = 2) -> float:
    """The largest change of the output when noise goes into the producers' rows of units whose columns are zero.

    For a random half of the units of each set, the rest of the set as it is; then for the other half; several times.
    """
    generator = torch.Generator().manual_seed(1)
    layers = named_layers(model)
    touched = {layers[s.module].layer for units in sets for s in (*units.producers, *units.consumers)}
    changes = [torch.zeros(())]
    halves = [[torch.rand(units.size, generator=generator) < 0.5 for units in sets] for _ in range(repeats)]
    for half in (h for chosen in halves for h in (chosen, [~c for c in chosen])):
        with weights_restored(touched):
            zero_columns(layers, sets, half)
            before = run(model, inputs)
            for units, chosen in zip(sets, half, strict=True):
                for slots in units.producers:
                    write_noise(layers[slots.module], slots.entry[chosen[slots.unit]], generator)
            zero_columns(layers, sets, half)  # where a producer of one set consumes another, the zeros stay
            after = run(model, inputs)
        assert before, "the model has no floating-point output"
        changes += [
            (a - b).abs().max().nan_to_num(nan=math.inf) for a, b in zip(after, before, strict=True) if a.numel()
        ]
    return float(max(changes))


def zero_columns(layers, sets: list[HiddenUnits], half: list[Tensor]) -> None:
    for units, chosen in zip(sets, half, strict=True):
        for slots in units.consumers:
            for column in columns(layers[slots.module], slots.entry[chosen[slots.unit]]):
                column.zero_()


def write_noise(view: LayerView, rows: Tensor, generator: torch.Generator) -> None:
    own = [view.by_output(view.weight)] + ([] if view.bias is None else [view.bias_by_output(view.bias)])
    for tensor in own:
        scale = tensor[rows].abs().mean().nan_to_num(1.0) + 1e-3
        tensor[rows] += scale * torch.randn(tensor[rows].shape, generator=generator).to(tensor)


def holds(model: nn.Module, inputs, *sets: HiddenUnits) -> bool:
    """Bitwise for exact sets; for the others with the mixing norms taken out."""
    exact = [units for units in sets if units.exact]
    inexact = [units for units in sets if not units.exact]
    if exact and output_change(model, inputs, exact) != 0.0:
        return False
    with without_mixing_norms(model):
        return not inexact or output_change(model, inputs, inexact) == 0.0


def invalid(model: nn.Module, inputs, sets: list[HiddenUnits]) -> list[str]:
    """The names of sets without the property: all are tested together, and only if that fails one by one."""
    return [] if holds(model, inputs, *sets) else [units.name for units in sets if not holds(model, inputs, units)]
