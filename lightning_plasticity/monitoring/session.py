"""What a monitor measures of one model while it is trained; when it does is not known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_plasticity import checks
from lightning_plasticity.distributed import sum_over_ranks
from lightning_plasticity.engine.examination import Examination
from lightning_plasticity.engine.forward import in_backward
from lightning_plasticity.engine.known_units import units_in
from lightning_plasticity.metrics.base import ReferencedMetric
from lightning_plasticity.monitoring.features import FeatureReader, call_with, inputs_and_targets_of, inputs_of
from lightning_plasticity.monitoring.measures import Measures
from lightning_plasticity.names import original
from lightning_plasticity.shards.modules import shard_again, sharded_modules
from lightning_plasticity.shards.tensors import is_shared_out
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.examining import is_examining, undisturbed
from lightning_plasticity.units.together import as_if_alone

Values = dict[str, dict[str, float]]


class Session:
    """Keeps the measures of a model up to date, from the start of training to its end.

    Args:
        measures: the metrics.
        model: the whole model; names are counted from it.
        scope: the module in it to measure.
        name: the name of this module; empty for the model itself.
        layers: names or patterns of the layers whose features to measure; None for all hidden layers.
        probe_batch: a batch on the model's device to measure on in place of the training batches; None for these.
    """

    def __init__(
        self,
        measures: Measures,
        model: nn.Module,
        scope: nn.Module,
        name: str,
        layers: list[str] | None,
        probe_batch: Any,
    ) -> None:
        self._measures, self._model, self._scope = measures, model, scope
        self._sharded = sharded_modules(model)
        shard_again(self._sharded)
        if any(map(is_shared_out, model.parameters())):
            measures.check_take_parts()
        self._listens = False  # whether the batch at hand belongs to a measurement
        self._has_announced = False  # which layers are read
        self._batch = probe_batch  # for metrics that need inputs
        self._reader: FeatureReader | None = None
        self._examination: Examination | None = None
        self._probe: ForwardCall | None = None
        for metric in [*measures.of("model"), *measures.of("step")]:
            if isinstance(metric, ReferencedMetric) and metric._reference is None:
                metric.update(scope)
                metric.reset()  # keeps the reference
        if probe_batch is not None:
            self._probe = call_with(original(scope), f"{name}." if name else "", probe_batch)
        if measures.has("features"):
            self._reader = FeatureReader(model, scope, name, layers, self._hears, self._receive)
            if self._probe is None:
                self._examination = Examination.of(model, scope, name, units_in)
                self._examination.join(self._reader)
            else:
                _add_probed(self._reader, self._probe, name)
                self._announce()

    def close(self) -> None:
        """Lets go of the model."""
        if self._reader is not None:
            self._reader.stop()
            if self._examination is not None:
                self._examination.leave(self._reader)

    # ---- the batches that are measured

    def start_batch(self, batch: Any) -> None:
        """A batch that belongs to a measurement is about to be trained on."""
        self._listens = True
        shard_again(self._sharded)
        if self._examination is not None and self._reader is not None:
            self._reader.start()
        if self._batch is None and self._measures.has("inputs", "batch"):
            self._batch = batch  # None where it becomes known later
        for metric in self._measures.of("step"):
            metric.update(self._scope)
            metric.reset()  # keeps the weights before this step

    def examine(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Finds the layers whose features to read by an example, before the first training call."""
        if self._examination is not None:
            self._examination.examine_example(args, kwargs)

    def take_batch(self, batch: Any) -> None:
        """The batch that was trained on, for metrics that run the model on it; a probe batch stays in its place."""
        if self._batch is None and self._measures.has("inputs", "batch"):
            if batch is None:
                raise ValueError(
                    "PlasticityMonitor has measures that run the model on a batch, and none was given. Give the one "
                    "that was trained on to step(batch=(inputs, targets)), or a fixed one to "
                    "PlasticityMonitor(probe_batch=...)."
                )
            self._batch = batch

    def forget(self) -> None:
        """Forgets the features and gradients that were read, for no step has followed them."""
        self._measures.forget("features", "gradients")

    def before_step(self) -> None:
        """An optimizer is about to step, in any batch."""
        if self._examination is not None:
            self._examination.settle()
            if self._examination.parts and not self._has_announced:
                self._announce()
        for metric in self._measures.of("gradients") if self._listens else ():
            metric.update(self._scope)

    def end_batch(self) -> None:
        """A batch is over, any one."""
        self._listens = False
        if self._reader is not None:
            self._reader.stop()

    def _announce(self) -> None:
        self._has_announced = True
        if self._reader is not None and self._reader.layers:
            layers = list(self._reader.layers)
            rank_zero_info(f"PlasticityMonitor reads the features of {len(layers)} layers: {checks.few(layers)}.")

    def _hears(self) -> bool:
        """Whether a layer that is called while the reader listens is to be read."""
        if self._probe is not None:
            return True
        return self._listens and self._scope.training and not in_backward() and not is_examining()

    def _receive(self, layer: str, features: Tensor) -> None:
        assert self._reader is not None
        for metric in self._measures.of("features", layer, self._reader.layers[layer]):
            metric.update(features)

    # ---- a measurement

    def measure(self, forward_context: Callable[[], AbstractContextManager[Any]]) -> tuple[Values, dict[str, Tensor]]:
        """Takes the values, by measure and layer, and the matrices that some of them sum up.

        Args:
            forward_context: the context in which the probe batch is run.
        """
        shard_again(self._sharded)
        if self._reader is not None:
            self._reader.check({} if self._examination is None else self._examination.failed)
            for layer, unit_dim in self._reader.layers.items():
                self._measures.of("features", layer, unit_dim)  # also those that only other ranks have called
        if self._probe is not None or self._measures.has("inputs", "batch"):
            self._run_model(forward_context)
        for metric in [*self._measures.of("model"), *self._measures.of("step")]:
            metric.update(self._scope)
        return self._measures.take(self._updates())

    def _run_model(self, forward_context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Measures what takes forward passes of its own, which leave no trace and which no plasticity method counts."""
        with undisturbed(self._scope), as_if_alone(self._model):
            self._scope.eval()
            if self._probe is not None and self._reader is not None:
                self._reader.start()
                with torch.no_grad(), forward_context():
                    self._probe.module(*self._probe.args, **self._probe.kwargs)
                self._reader.stop()
            if self._batch is not None:
                for metric in self._measures.of("inputs"):
                    metric.update(self._scope, inputs_of(self._batch))
                for metric in self._measures.of("batch"):
                    metric.update(self._scope, *inputs_and_targets_of(self._batch))
        if self._probe is None:
            self._batch = None

    def _updates(self) -> dict[tuple[str, str], int]:
        """How often each metric was updated: on all ranks, if they measure different data."""
        counts = self._measures.updates()
        if self._probe is not None:
            return counts
        (total,) = sum_over_ranks([torch.tensor(list(counts.values()), device=self._measures.device)])
        return dict(zip(counts, total.tolist(), strict=True))


def _add_probed(reader: FeatureReader, probe: ForwardCall, name: str) -> None:
    try:
        reader.add(units_in(probe), name)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{type(probe.module).__name__} cannot be called with probe_batch. Give what its forward takes, or "
            f"name the part of it that has a forward with module=. {error}"
        ) from error
