"""A callback that measures plasticity in a Trainer, and logs numbers and pictures."""

from __future__ import annotations

import importlib.util
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_whole
from lightning_plasticity.engine.schedule import Schedule
from lightning_plasticity.engine.settings import ShowsSettings, without_links
from lightning_plasticity.monitoring.features import inputs_and_targets_of
from lightning_plasticity.monitoring.measures import Measures, mean_and_layers, named
from lightning_plasticity.monitoring.pictures import Record, picture, send_figure, send_numbers
from lightning_plasticity.monitoring.session import Session
from lightning_plasticity.names import named_modules_as_written, original


class PlasticityMonitor(ShowsSettings, Callback):
    """Measures plasticity while a Trainer trains, and logs it to all of the Trainer's loggers.

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
        super().__init__()
        if every_n_train_steps is None and every_n_epochs is None:
            raise ValueError("It must be said when to measure: set every_n_train_steps or every_n_epochs, got neither.")
        by_default = every_n_train_steps is not None and every_n_epochs == 1
        self.schedule = Schedule(every_n_train_steps, None if by_default else every_n_epochs)
        self.module = checks.optional(checks.word, "module", module)
        self.layers = None if layers is None else list(checks.words("layers", layers))
        self.probe_batch = probe_batch
        self.figures = checks.flag("figures", figures)
        self.values: dict[str, float] = {}
        self.history: dict[str, list[Record]] = {}
        self._measures = Measures(named(metrics), synchronize=probe_batch is None)
        if self.layers is not None and not self._measures.has("features"):
            raise ValueError(
                f"layers= needs a metric that measures features, got {', '.join(self._measures.prototypes)}."
            )
        if probe_batch is not None and self._measures.has("batch"):
            inputs_and_targets_of(probe_batch)
        self._session: Session | None = None  # of the fit that is going on
        self._due = False  # whether the batch at hand belongs to a measurement
        self._measured: weakref.ref[nn.Module] | None = None  # the model of the last fit
        self._resumes = False  # from a checkpoint
        # Lightning asks for it around each of its calls.
        self._state_key = self._generate_state_key(
            metrics=sorted(self._measures.prototypes),
            every_n_train_steps=self.schedule.every_n_train_steps,
            every_n_epochs=self.schedule.every_n_epochs,
            module=self.module,
            layers=self.layers,
        )

    def attach(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: in a loop of one's own there is nobody who says when to measure, and where to log."""
        raise RuntimeError(
            "PlasticityMonitor measures in a Trainer, got attach(), as methods have it for other loops. There, update "
            "the metrics yourself: EffectiveRank().update(features), WeightMagnitude().update(model)."
        )

    # ---- starting and ending

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_scope(original(pl_module))
        self._check_names(trainer)
        if self.figures and trainer.loggers and not _can_draw():
            warnings.warn(
                "PlasticityMonitor draws no figures, because matplotlib is not installed. Install it with "
                "`pip install lightning-plasticity[plot]`, or set figures=False.",
                stacklevel=2,
            )

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
        model = original(pl_module)
        if self._measured is not None and self._measured() is not model:
            self._measures.clear()  # what was kept of another model does not apply
            self.history = {}
        self._measured = weakref.ref(model)
        if not self._resumes:  # a new Trainer counts from 0 again
            now = _step(trainer)
            self.history = {name: [r for r in records if r[0] < now] for name, records in self.history.items()}
        self._resumes = False
        self._measures.device = pl_module.device
        batch = self.probe_batch
        if batch is not None:
            # as the Trainer does with a training batch
            batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
        scope = self._find_scope(model)
        self._session = Session(self._measures, model, scope, self.module or "", self.layers, batch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session, self._due = None, False

    def _find_scope(self, model: nn.Module) -> nn.Module:
        check_whole(model, "PlasticityMonitor needs")
        modules = dict(named_modules_as_written(model))
        if (self.module or "") not in modules:
            raise ValueError(
                f"module= must name a module of {type(model).__name__}, got {self.module!r}. "
                f"Its children are: {', '.join(name for name, _ in model.named_children())}."
            )
        return modules[self.module or ""]

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
        self._measure(trainer, _step(trainer))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.schedule.due_after_epoch(trainer.current_epoch):
            self._measure(trainer, _step(trainer) - 1)  # the last step: the number is that of the next one by now

    def _measure(self, trainer: Trainer, step: int) -> None:
        assert self._session is not None
        values, matrices = self._session.measure(trainer.precision_plugin.forward_context)
        self.values = mean_and_layers(values)
        for name, by_layer in values.items():
            self.history.setdefault(name, []).append((step, by_layer))
        if trainer.is_global_zero:
            self._log(trainer, values, matrices, step)

    def _log(
        self,
        trainer: Trainer,
        values: Mapping[str, Mapping[str, float]],
        matrices: Mapping[str, Tensor],
        step: int,
    ) -> None:
        draws = self.figures and _can_draw()
        for logger in trainer.loggers:
            send_numbers(logger, self.values, step)
            for name in values if draws else ():
                metric = self._measures.prototypes[name]
                figure = picture(name, metric, self.history[name], matrices.get(name))
                send_figure(logger, name, figure, step)

    # ---- checkpoints

    @property
    @override
    def state_key(self) -> str:
        return self._state_key

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "metrics": self._measures.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumes, self._measured = True, None  # what comes from a checkpoint is of the model that is trained next
        self.history = {name: list(records) for name, records in state_dict["history"].items()}
        self._measures.load_state_dict(state_dict["metrics"])

    def __getstate__(self) -> dict[str, Any]:
        # A copy, pickled or not, has no part in the fit that goes on, and no other model to confuse with this one.
        return {**without_links(vars(self)), "_session": None, "_measured": None}


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _step(trainer: Trainer) -> int:
    """The number under which Lightning logs the batch at hand: training steps, whatever the number of optimizers."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step
