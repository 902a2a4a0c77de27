"""What to multiply by which layers' factors, so that a network's outputs change by a common factor only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_plasticity.editing.editable import check_editable
from lightning_plasticity.functional.soft_weight_rescaling import proportionality_error, tie
from lightning_plasticity.layers.flow import INPUT, Flow, normalises, run_with
from lightning_plasticity.names import submodule
from lightning_plasticity.units.together import example_of_all


@dataclass(frozen=True)
class Target:
    """A tensor to be multiplied by the weights' factors, each to the power of its entry in ``exponents``."""

    name: str
    tensor: Tensor
    exponents: Tensor


@dataclass(frozen=True)
class Rescaling:
    """Weights whose norms are watched, and all that is multiplied.

    Attributes:
        weights: by name, in the order of the forward pass.
        targets: the weights themselves, in the same order, then biases and running statistics.
        groups: the weights that share a factor, see ``functional.soft_weight_rescaling.joint_norms``.
        exponents: of the groups' factors, a row for each target.
        norms: the normalisation layers, and the exponents of what their inputs are multiplied by.
    """

    weights: dict[str, nn.Parameter]
    targets: list[Target]
    groups: Tensor
    exponents: Tensor
    norms: list[tuple[nn.Module, Tensor]]


@dataclass(frozen=True)
class _Pair:
    """A weight and the bias that is added to what it gives."""

    name: str
    weight: nn.Parameter
    bias_name: str
    bias: nn.Parameter | None


def plan(
    model: nn.Module,
    flow: Flow,
    is_excluded: Callable[[str], bool] = lambda name: False,
    *,
    tie_streams: bool,
    keep_biases: bool = False,
) -> Rescaling:
    """Says for each weight, bias and running statistic of the called layers what it is to be multiplied by.

    A layer's output grows by the factor of its weight and by what its input has grown, and so must its bias. What a
    normalisation layer gives grows by its own factor only; its running mean follows its input, and its running variance
    the square. Where several layers meet in an input, the last one called counts, or, with ``tie_streams``, all must
    have grown alike.

    Args:
        model: the network, in which the flow's names are looked up.
        flow: the layers, and what reaches them.
        is_excluded: names of layers that stay as they are.
        tie_streams: give layers that meet common factors.
        keep_biases: leave all biases as they are, so that outputs do not stay proportional.

    Raises:
        ValueError: if a bias would have to be multiplied by two things at once, or a frozen one by anything.
        RuntimeError: if a weight is computed from other tensors.
    """
    modules = {layer.name: submodule(model, layer.name) for layer in flow.layers}
    stages = {name: [] if is_excluded(name) else _stages(name, module) for name, module in modules.items()}
    weights = _distinct_weights(pair for found in stages.values() for stage in found for pair in stage)
    if not weights:
        return Rescaling({}, [], torch.tensor([]), torch.tensor([]), [])
    one = torch.eye(len(weights), dtype=torch.float64)
    column = {id(weight): i for i, weight in enumerate(weights.values())}
    targets = {id(weight): Target(name, weight, one[i]) for i, (name, weight) in enumerate(weights.items())}
    growth = {INPUT: one.new_zeros(len(weights))}  # of each layer's output
    norms = []
    met: set[tuple[int, int]] = set()
    for layer in flow.layers:
        of_input = growth[_last(layer.sources, growth)]
        module, is_norm = modules[layer.name], normalises(modules[layer.name])
        growth[layer.name] = torch.zeros_like(of_input) if is_norm else of_input
        for stage in stages[layer.name]:
            before = growth[layer.name]
            for pair in stage:
                growth[layer.name] = before + one[column[id(pair.weight)]]
                shared = (id(pair.weight), id(pair.bias))
                if shared in met:
                    continue  # one layer in two modules: its bias goes by the first, as that of one called twice
                met.add(shared)
                _add(targets, pair.bias_name, None if keep_biases else pair.bias, growth[layer.name])
        if is_norm and not is_excluded(layer.name):
            norms.append((module, of_input))
            _add(targets, f"{layer.name}.running_mean", module._buffers.get("running_mean"), of_input)
            _add(targets, f"{layer.name}.running_var", module._buffers.get("running_var"), 2 * of_input)
    is_frozen = torch.tensor([not weight.requires_grad for weight in weights.values()])
    groups, spread = one, one
    if tie_streams:
        groups, spread = tie(torch.stack([*_meetings(flow, growth), *one[is_frozen], torch.zeros_like(one[0])]))
    tied = [Target(target.name, target.tensor, target.exponents @ spread) for target in targets.values()]
    _refuse_frozen_biases(tied[len(weights) :], groups[:, ~is_frozen].any(1))
    tied = [target for i, target in enumerate(tied) if i < len(weights) or bool(target.exponents.any())]
    return Rescaling(
        weights,
        tied,
        groups,
        torch.stack([target.exponents for target in tied]),
        [(norm, exponents @ spread) for norm, exponents in norms],
    )


def _distinct_weights(pairs: Iterable[_Pair]) -> dict[str, nn.Parameter]:
    """By name; a weight that several layers share only once."""
    first: dict[int, _Pair] = {}
    for pair in pairs:
        first.setdefault(id(pair.weight), pair)
    return {pair.name: pair.weight for pair in first.values()}


def change_of_outputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rescaling: Rescaling) -> float:
    """How far the outputs are from proportional to what they were, when every norm had changed by up to 10 %.

    The larger of the changes in training and in evaluation, or 0 where neither is more than rounding may be. A network
    that runs in one of the two only is judged by that; what it raises where it runs in neither is raised.
    """
    precision = 16 * max(torch.finfo(weight.dtype).eps for weight in rescaling.weights.values())
    args, kwargs = example_of_all(model, (args, kwargs))
    changes: list[float] = []
    failure: Exception | None = None
    # In training a batch's own statistics magnify rounding. Batch norm refuses one example there, and evaluation may
    # want other inputs.
    for training, tolerance in ((True, 1e-2), (False, 1e-4)):
        try:
            change = _change_of_outputs(model, args, kwargs, rescaling, training)
        except Exception as error:
            failure = error
        else:
            changes.append(change if change > max(tolerance, precision) else 0.0)
    if failure is not None and not changes:
        raise failure
    return max(changes)


def _change_of_outputs(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rescaling: Rescaling, training: bool
) -> float:
    logs = torch.empty(len(rescaling.groups), dtype=torch.float64).uniform_(
        -0.1, 0.1, generator=torch.Generator().manual_seed(0)
    )
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    rescaled = {
        names[id(target.tensor)]: target.tensor * float((target.exponents @ logs).exp()) for target in rescaling.targets
    }
    before = run_with(model, args, kwargs, {}, training=training)
    # Each norm's epsilon goes along for the moment: it is what the change of outputs is measured up to.
    norms = [(norm, exponents) for norm, exponents in rescaling.norms if isinstance(getattr(norm, "eps", None), float)]
    epsilons = [norm.eps for norm, _ in norms]
    try:
        for norm, exponents in norms:
            norm.eps = norm.eps * float((2 * exponents @ logs).exp())  # type: ignore[assignment, operator]
        after = run_with(model, args, kwargs, rescaled, training=training)
    finally:
        for (norm, _), epsilon in zip(norms, epsilons, strict=True):
            norm.eps = epsilon
    return max((proportionality_error(*pair) for pair in zip(before, after, strict=True)), default=0.0)


def _last(sources: frozenset[str], growth: dict[str, Tensor]) -> str:
    """The source that was called last; a layer that is called twice may be a source of itself, which is passed over."""
    return next((name for name in reversed(growth) if name in sources), INPUT)


def _meetings(flow: Flow, growth: dict[str, Tensor]) -> Iterator[Tensor]:
    """Differences that must be 0 if all that meets in an input or in an output has grown alike."""
    # What a layer that is called twice gives to itself cannot have grown as the rest, and is passed over.
    for sources in (*(layer.sources - {layer.name} for layer in flow.layers), *flow.outputs):
        first, *others = [name for name in growth if name in sources] or [INPUT]
        for other in others:
            yield growth[other] - growth[first]


def _add(targets: dict[int, Target], name: str, tensor: Tensor | None, exponents: Tensor) -> None:
    if tensor is None:
        return
    target = targets.setdefault(id(tensor), Target(name, tensor, exponents))
    if not torch.equal(target.exponents, exponents):
        raise ValueError(
            f"A bias must belong to one layer, but {name!r} is also {target.name!r}, and the two would have to be "
            "rescaled differently. Give each layer its own, or exclude both layers."
        )


def _refuse_frozen_biases(targets: Sequence[Target], is_trained: Tensor) -> None:
    for target in targets:
        is_frozen = isinstance(target.tensor, nn.Parameter) and not target.tensor.requires_grad
        if is_frozen and bool(target.exponents[is_trained].any()):
            raise ValueError(
                f"{target.name!r} is frozen, but would have to be rescaled together with the trained layers before it, "
                "lest the network's outputs change. Train it, or exclude its layer and accept that."
            )


def _stages(name: str, module: nn.Module) -> list[list[_Pair]]:
    """A layer's weights: those of one stage side by side, those of the next after it."""
    stages = [list(_pairs(name, module))]
    if isinstance(module, nn.MultiheadAttention):  # uses this layer's parameters without calling it
        stages.append(list(_pairs(f"{name}.out_proj".lstrip("."), module.out_proj)))
    return stages


def _pairs(name: str, module: nn.Module) -> Iterator[_Pair]:
    computed = [key for key, value in vars(module).items() if isinstance(value, Tensor) and "weight" in key]
    if is_parametrized(module) or computed:
        raise RuntimeError(
            f"Soft Weight Rescaling needs weights that are parameters, but those of {name!r} are computed from other "
            "tensors (by a parametrization, weight_norm, spectral_norm or pruning), so that what is written would be "
            "lost. Remove that, as with torch.nn.utils.parametrize.remove_parametrizations, or exclude the layer."
        )
    for key, parameter in module._parameters.items():
        if "weight" in key and parameter is not None:
            bias = key.replace("weight", "bias")
            prefix = f"{name}." if name else ""
            check_editable(parameter, prefix + key)
            yield _Pair(prefix + key, parameter, prefix + bias, module._parameters.get(bias))
