"""A callback that measures plasticity in a Trainer or any other loop, and logs numbers and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_plasticity.monitoring.loop import LoopMonitor
from lightning_plasticity.names import original


class PlasticityMonitor(LoopMonitor, Callback):
    """Measures plasticity while a network is trained, and logs it: in a Trainer to all of the Trainer's loggers.

    Each metric is logged as ``plasticity/<measure>``. One that measures features is cloned for each hidden layer, and
    logged as ``plasticity/<measure>/<layer>``; the first name is then the mean over layers. Figures go to TensorBoard,
    Weights & Biases and MLflow, and become PNG files beside a CSV logger. ``values`` holds the last numbers,
    ``history`` all. Between two measurements nothing is computed, kept or sent between ranks, and no layer has a hook;
    a compiled model runs uncompiled in the first training batch and in those that are measured.

    What a metric measures is told by the arguments of its ``update``:

    - ``features``: of the training forwards of the step that is measured, as the next layer reads them; after an
      epoch, of its last two batches, because the very last may be small. With a probe batch: of that batch, in
      evaluation mode.
    - ``model``: after the step, and after plasticity methods have acted; ``UpdateRatio`` also right before it. The
      gradient measures read them before the optimizer does. ``DistanceFromInit`` and ``Balancedness`` compare with the
      start of training.
    - ``model, inputs`` and ``model, inputs, targets``: of the probe batch or the training batch.

    In a plain or Fabric loop it is attached as methods are, and steps after them; ``step`` returns the numbers of a
    measured step, and nothing in between::

        monitor.attach(model, optimizer, logger=fabric)  # or a logger, or none
        for x, y in stream:
            ...
            optimizer.step()
            numbers = monitor.step()
        monitor.detach()

    There only ``every_n_train_steps`` can be told, and metrics that run the model again need a ``probe_batch``, or the
    batch by ``step(batch=(x, y))``.

    On several ranks the values are those of all data together; a probe batch is measured by each rank alone.

    Args:
        metrics: metrics, or metrics by name; None for effective rank, dormant and dead units of each layer, and size,
            norm and distance from the start of the weights. They are only copied. Several monitors of one Trainer, for
            several schedules or modules, need different names.
        every_n_train_steps: measure after every so many training steps. If given, it replaces ``every_n_epochs``.
        every_n_epochs: measure after every so many epochs.
        module: the name of the module inside the LightningModule to measure; None for all of it.
        layers: names or patterns of the layers whose features to measure; None for all hidden layers. A name or pattern
            that fits no layer with hidden units takes the output of each module that it fits; the metrics' ``unit_dim``
            then says where its units are.
        probe_batch: a fixed batch to measure on, inputs or a pair of inputs and targets. Inputs that are a tuple or
            a dict are given to the module as its arguments. None: the training batches, which are then read in the
            same way by metrics that need inputs.
        figures: whether to draw. Matplotlib is needed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_plasticity import PlasticityMonitor
        >>> from lightning_plasticity.metrics import DeadUnits, StableRank
        >>> monitor = PlasticityMonitor([DeadUnits(), StableRank()], every_n_train_steps=100)
        >>> trainer = Trainer(callbacks=[monitor], logger=False)
    """

    def __init__(
        self,
        metrics: Sequence[Metric] | Mapping[str, Metric] | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = 1,
        *,
        module: str | None = None,
        layers: Sequence[str] | str | None = None,
        probe_batch: Any = None,
        figures: bool = True,
    ) -> None:
        super().__init__(
            metrics,
            every_n_train_steps,
            every_n_epochs,
            module=module,
            layers=layers,
            probe_batch=probe_batch,
            figures=figures,
        )
        self._due = False  # whether the batch at hand belongs to a measurement
        # Lightning asks for it around each of its calls.
        self._state_key = self._generate_state_key(
            metrics=sorted(self._measures.prototypes),
            every_n_train_steps=self.schedule.every_n_train_steps,
            every_n_epochs=self.schedule.every_n_epochs,
            module=self.module,
            layers=self.layers,
        )

    # ---- starting and ending

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_free("fit()")
        self._find_scope(original(pl_module))
        self._check_names(trainer)
        self._warn_without_matplotlib(trainer.loggers)

    def _check_names(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PlasticityMonitor) and other is not self:
                for name in self._measures.prototypes.keys() & other._measures.prototypes.keys():
                    raise ValueError(
                        f"Monitors of one Trainer need measures with names of their own, but two would log {name!r}. "
                        f"Name them in one of the two: PlasticityMonitor({{'{name} of the head': {name}()}}, ...)."
                    )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()  # of a fit that an exception ended
        if not self._resumes:  # a new Trainer counts from 0 again
            now = _step(trainer)
            self.history = {name: [r for r in records if r[0] < now] for name, records in self.history.items()}
        batch = self.probe_batch
        if batch is not None:
            # as the Trainer does with a training batch
            batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
        model = original(pl_module)
        self._begin(model, self._find_scope(model), pl_module.device, batch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._steps_seen is None:  # a plain loop goes on
            self._let_go()

    @override
    def _let_go(self) -> None:
        super()._let_go()
        self._due = False

    # ---- when

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        """Whether a batch that is about to be trained on belongs to a measurement."""
        if self.schedule.every_n_train_steps is not None:
            return self.schedule.due_after_step(_step(trainer) + 1)
        steps_left = trainer.max_steps - trainer.global_step if trainer.max_steps >= 0 else math.inf
        # How many batches there are is not always known, but always which one is the last.
        is_near_end = trainer.is_last_batch or min(trainer.num_training_batches - batch_idx, steps_left) <= 2
        return is_near_end and self.schedule.due_after_epoch(trainer.current_epoch)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._due = self._is_due(trainer, batch_idx)
        if self._due and self._session is not None:
            self._session.start_batch(batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._session is not None:
            self._session.before_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due, self._due = self._due, False
        if self._session is not None:
            self._session.end_batch()
        if not due or self.schedule.every_n_train_steps is None:
            return
        if pl_module.automatic_optimization and trainer.fit_loop._should_accumulate():
            return
        self._measure_in(trainer, _step(trainer))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.schedule.due_after_epoch(trainer.current_epoch):
            self._measure_in(trainer, _step(trainer) - 1)  # the last step: the number is that of the next one by now

    def _measure_in(self, trainer: Trainer, step: int) -> None:
        self._measure(step, trainer.precision_plugin.forward_context, trainer.loggers, trainer.is_global_zero)

    @property
    @override
    def state_key(self) -> str:
        return self._state_key


def _step(trainer: Trainer) -> int:
    """The number under which Lightning logs the batch at hand: training steps, whatever the number of optimizers."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step
