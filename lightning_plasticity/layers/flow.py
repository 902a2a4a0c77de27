"""Which layers' outputs reach which layers' inputs, without passing another layer: seen by running a network once.

A dispatch mode keeps, for each piece of memory, the names of the layers whose outputs went into it. Every operation
hands on what its inputs carry; a layer hands on its own name alone. So activations, pooling, reshapes, sums and
concatenation are looked through, whatever they are called and wherever they happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_plasticity.functional.substitution import call_with
from lightning_plasticity.layer_views.home_made import home_made
from lightning_plasticity.names import named_modules_as_written
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.channels import is_norm, tensors_in
from lightning_plasticity.units.examining import quietly, undisturbed
from lightning_plasticity.units.together import as_if_alone, example_of_all

INPUT = "(input)"  # what the network's own inputs carry

_WITH_WEIGHTS = (
    nn.Linear,
    _ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class CalledLayer:
    """A layer with weights, or a normalisation layer, and the layers whose outputs reach its input in the same call.

    ``sources`` are names of layers called before it, and ``INPUT``.
    """

    name: str
    sources: frozenset[str]


@dataclass(frozen=True)
class Flow:
    """The layers of a network in the order of their first calls, and what reaches each tensor that it returns.

    ``continues`` is whether its inputs had come through a network themselves.
    """

    layers: tuple[CalledLayer, ...]
    outputs: tuple[frozenset[str], ...]
    continues: bool = False

    def then(self, other: Flow) -> Flow:
        """This flow and one that is called after it, whose inputs may be what this one gives."""
        given = self.outputs[-1] if self.outputs and other.continues else frozenset([INPUT])

        def joined(sources: frozenset[str]) -> frozenset[str]:
            return (sources - {INPUT}) | given if INPUT in sources else sources

        layers = (CalledLayer(layer.name, joined(layer.sources)) for layer in other.layers)
        return Flow((*self.layers, *layers), tuple(joined(sources) for sources in other.outputs))


def flow_in(call: ForwardCall) -> Flow:
    """The flow in what is called, with names inside the model."""
    flow = call.on_one_example(lambda args, kwargs: trace(call.module, args, kwargs, call.prefix.rstrip(".")))
    return replace(flow, continues=any(x.requires_grad for x in tensors_in((call.args, call.kwargs))))


def trace(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "") -> Flow:
    """Runs a network on an example, without gradients, and leaves it as it was.

    A part that is called inside autocast is traced inside autocast, with the inputs that it has there.
    Layers that are called in training only, such as auxiliary heads, are seen as well where the network can be run so.

    Args:
        model: the network.
        args: its inputs.
        kwargs: its keyword inputs.
        name: what names of layers begin with.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> flow = trace(model, (torch.zeros(1, 2),), {})
        >>> [(layer.name, set(layer.sources)) for layer in flow.layers]
        [('0', {'(input)'}), ('2', {'0'})]
    """
    args, kwargs = example_of_all(model, (tuple(args), dict(kwargs)))
    with undisturbed(model), as_if_alone(model):
        try:
            # containers take training's path, while what would change or draw something evaluates
            for module in model.modules():
                module.training = not (normalises(module) or next(module.children(), None) is None)
            return _run_traced(model, args, kwargs, name)
        except Exception:  # training may want what no example has, for instance targets
            return _run_traced(model.eval(), args, kwargs, name)


def run_with(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Mapping[str, Tensor], *, training: bool
) -> list[Tensor]:
    """What the network returns with other tensors in the place of the named ones.

    Draws are the same in every call, for every random state is put back. Where parameters are shared out among ranks,
    all must run it, on the same inputs, and the other tensors may be shared out as well.

    It runs in the precision of its weights, without autocasting, so that what it returns is as precise as can be.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))

    def cast(x: Tensor) -> Tensor:
        return x.to(parameter.dtype) if x.is_floating_point() else x

    autocast = torch.autocast(parameter.device.type, enabled=False)
    with undisturbed(model), as_if_alone(model), quietly(), autocast:
        given = tree_map_only(Tensor, cast, (tuple(args), dict(kwargs)))
        return list(tensors_in(call_with(model.train(training), tensors, *given)))


def _run_traced(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], prefix: str) -> Flow:
    tracer = _Tracer()
    handles = []
    for name, module in named_modules_as_written(model, prefix):
        if isinstance(module, _WITH_WEIGHTS) or normalises(module) or home_made(module) is not None:
            handles.append(module.register_forward_pre_hook(tracer.before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(tracer.after(name)))
    try:
        with quietly(), tracer:
            tracer.mark((args, kwargs), frozenset([INPUT]))
            outputs = model(*args, **kwargs)
            return Flow(
                tuple(CalledLayer(name, frozenset(sources)) for name, sources in tracer.sources.items()),
                tuple(tracer.carried(x) for x in tensors_in(outputs)),
            )
    finally:
        for handle in handles:
            handle.remove()


def normalises(module: nn.Module) -> bool:
    """Whether a module normalises, so that the scale of its input does not reach its output."""
    return is_norm(module) and not isinstance(module, nn.LocalResponseNorm)  # which does not take the scale away


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what each storage carries. By storage, so that views and writes in place need no care."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._carried: dict[int, frozenset[str]] = {}
        self.sources: dict[str, set[str]] = {}  # in the order of first calls

    def carried(self, value: Any) -> frozenset[str]:
        """The names that the tensors in a value carry."""
        return frozenset().union(*(self._carried.get(_storage(x), frozenset()) for x in tensors_in(value)))

    def mark(self, value: Any, names: frozenset[str]) -> None:
        """Lets the tensors in a value carry these names only."""
        for x in tensors_in(value):
            self._carried[_storage(x)] = names

    def before(self, name: str) -> Any:
        """The hook on a layer's input."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.sources.setdefault(name, set()).update(self.carried((args, kwargs)))

        return hook

    def after(self, name: str) -> Any:
        """The hook on a layer's output."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.mark(output, frozenset([name]))

        return hook

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        only_the_shape = func.__name__.startswith("new_") or "_like" in func.__name__
        names = frozenset() if only_the_shape else self.carried((args, kwargs))
        before = {_storage(x) for x in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        # A list of tensors may be written in place without being returned.
        written = args if func.__name__.startswith("_foreach") else ()
        for x in (*tensors_in(result), *tensors_in(written)):
            storage = _storage(x)
            # The memory of a tensor that is gone may come back as a new one's: only what was an input keeps its names.
            kept = self._carried.get(storage, frozenset()) if storage in before else frozenset()
            self._carried[storage] = names | kept
        return result


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
