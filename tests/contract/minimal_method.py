"""The least method that uses everything the base class offers, to test the base class with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity.distributed import gather_over_ranks, share_of_this_rank, sum_over_ranks
from lightning_plasticity.editing.initial import InitialDistribution
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.examination import Part
from lightning_plasticity.engine.forward import in_backward
from lightning_plasticity.engine.known_units import units_in
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.examining import is_examining
from lightning_plasticity.units.find import HiddenUnits


@dataclass
class Watched:
    """A set of hidden units and what was seen of it on this rank."""

    units: HiddenUnits
    layer: str  # that makes the units
    consumers: list[str]
    average: Tensor  # running average of the mean size of each unit's output
    heard: Tensor  # sizes of outputs, added up since the last step
    examples: int = 0
    steps: int = 0


class NoisyUnits(PlasticityCallback):
    """Redraws the unit with the least average output of each set, every few steps of the optimizer that owns the set.

    Args:
        every_n_steps: how often; None for never.
        common: arguments of every method.
    """

    def __init__(self, every_n_steps: int | None, **common: Any) -> None:
        super().__init__(question=units_in, **common)
        self.every_n_steps = every_n_steps
        self._watched: list[Watched] = []

    @override
    def attach(self, *args: Any, **kwargs: Any) -> "NoisyUnits":
        return super().attach(*args, **kwargs)

    @override
    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        for units in part.found.units:
            layer = self.model.get_submodule(units.producers[0].module)
            zeros = torch.zeros(units.size, device=layer.weight.device)
            watched = Watched(
                units,
                units.producers[0].module,
                [slots.module for slots in units.consumers],
                average=zeros,
                heard=zeros.clone(),
            )
            self._watched.append(watched)
            self.keep(layer.register_forward_hook(self.uncompiled(self._hear(watched))))

    def _hear(self, watched: Watched) -> Callable[[nn.Module, Any, Tensor], None]:
        def hear(_: nn.Module, args: Any, output: Tensor) -> None:
            if self.scope_is_training and not in_backward() and not is_examining():
                watched.heard += output.detach().abs().sum(0, dtype=torch.float32)
                watched.examples += len(output)

        return hear

    @override
    def _skipped(self) -> None:
        for watched in self._watched:
            watched.heard.zero_()
            watched.examples = 0

    @override
    def forget_parts(self) -> None:
        self._watched = []

    @override
    def _start(self) -> None:
        if not self._watched:
            raise ValueError(f"{type(self).__name__} found no hidden units.")
        self._initial = InitialDistribution(self.model, ())
        self._grow()
        self.replaced = 0

    @override
    def _grow(self) -> None:
        self._initial.add([f"{watched.layer}.weight" for watched in self._watched])

    @override
    def _stop(self) -> None:
        self._watched = []

    @override
    def _works_on(self) -> str:
        return f"{sum(watched.units.size for watched in self._watched)} units."

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        for watched in self._watched:
            weight = self.model.get_submodule(watched.layer).weight
            assert isinstance(weight, Tensor)
            if self.optimizer_of(weight) is not optimizer:
                continue
            if watched.examples:  # on another rank the batch may have been empty
                mean = watched.heard / watched.examples
                watched.average.lerp_(torch.where(mean.isfinite(), mean, watched.average), 0.1)
            watched.heard.zero_()
            watched.examples = 0
            watched.steps += 1
            if self.every_n_steps is not None and watched.steps % self.every_n_steps == 0:
                self._redraw(watched)

    def _redraw(self, watched: Watched) -> None:
        (average,) = sum_over_ranks([watched.average])
        unit = average.argmin()
        producer = watched.units.producers[0]
        rows = producer.entry[producer.unit == unit]
        generator = self.draws.generator(average.device)
        values = self._initial.draw(f"{watched.layer}.weight", generator, rows)
        self.editor.redraw_rows(watched.layer, rows, values)
        for name, slots in zip(watched.consumers, watched.units.consumers, strict=True):
            self.editor.zero_columns(name, slots.entry[slots.unit == unit])
        watched.average[unit] = watched.average.mean()
        self.replaced += 1

    @override
    def _state(self) -> dict[str, Any]:
        gathered = gather_over_ranks([x for watched in self._watched for x in (watched.average, watched.heard)])
        return {
            "averages": gathered[::2],
            "heard": gathered[1::2],
            "examples": [watched.examples for watched in self._watched],
            "steps": [watched.steps for watched in self._watched],
            "initial": self._initial.state_dict(),
            "replaced": self.replaced,
        }

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        for i, watched in enumerate(self._watched):
            watched.average = share_of_this_rank(state["averages"][i])
            watched.heard += share_of_this_rank(state["heard"][i])  # the first forward pass was heard before
            watched.examples += state["examples"][i]
            watched.steps = state["steps"][i]
        self._initial.load_state_dict(state["initial"])
        self.replaced = state["replaced"]

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        return {"replaced": float(self.replaced)}
