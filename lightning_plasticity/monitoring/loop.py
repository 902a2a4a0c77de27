"""The monitor in any loop: attached to a model, it measures after every so many steps, and keeps what it measured."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import Self

from lightning_plasticity import checks
from lightning_plasticity.distributed import world_size
from lightning_plasticity.editing.editable import check_own_shapes, check_trains
from lightning_plasticity.engine.schedule import Schedule
from lightning_plasticity.engine.settings import ShowsSettings, without_links
from lightning_plasticity.engine.state import for_checkpoint
from lightning_plasticity.engine.steps import OptimizerSteps, unwrapped
from lightning_plasticity.monitoring.features import inputs_and_targets_of
from lightning_plasticity.monitoring.measures import Measures, mean_and_layers, named
from lightning_plasticity.monitoring.pictures import Record, picture, send_figure, send_numbers
from lightning_plasticity.monitoring.session import Session
from lightning_plasticity.names import named_modules_as_written, original
from lightning_plasticity.notices import warn
from lightning_plasticity.units.calls import arguments_of


class LoopMonitor(ShowsSettings):
    """Measures a model that is trained: :class:`.PlasticityMonitor` without the hooks of a Trainer.

    Args:
        metrics, every_n_train_steps, every_n_epochs, module, layers, probe_batch, figures: see
            :class:`.PlasticityMonitor`.
    """

    def __init__(
        self,
        metrics: Sequence[Metric] | Mapping[str, Metric] | None,
        every_n_train_steps: int | None,
        every_n_epochs: int | None,
        *,
        module: str | None,
        layers: Sequence[str] | str | None,
        probe_batch: Any,
        figures: bool,
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
        self._session: Session | None = None  # of the fit, or the loop, that is going on
        self._measured: weakref.ref[nn.Module] | None = None  # the model of the last one
        self._resumes = False  # from a checkpoint
        # of a plain loop
        self._steps = 0
        self._steps_seen: OptimizerSteps | None = None
        self._has_stepped = False  # since `step` was last called
        self._loggers: Sequence[Any] = ()

    # ---- a plain loop

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        logger: Any = None,
    ) -> Self:
        """Starts to measure a model outside of a Trainer.

        Args:
            model: the network; compiled, data-parallel and Fabric wrappers are looked through.
            optimizer: the optimizer or optimizers that train it. Without one, every call of ``step`` counts.
            example_inputs: what the model is called with, as methods take it. Without it, the first training call of
                each part serves as example.
            logger: where numbers and figures go: a ``Fabric``, whose loggers are meant, a logger of Lightning's or
                anything with its ``log_metrics(numbers, step=step)``, or several of these. None: nowhere; ``step``
                returns the numbers.
        """
        example = None if example_inputs is None else arguments_of(example_inputs)
        self._check_free("attach()")
        if self.schedule.every_n_epochs is not None:
            raise ValueError(
                "every_n_epochs needs a Trainer, which counts epochs, got PlasticityMonitor.attach() with "
                f"every_n_epochs={self.schedule.every_n_epochs}. Use every_n_train_steps in a plain loop."
            )
        loggers = _loggers_of(logger)
        optimizers = [] if optimizer is None else optimizer if isinstance(optimizer, Sequence) else [optimizer]
        model = original(model)
        check_trains(model, list(optimizers))
        self._warn_without_matplotlib(loggers)
        if self._is_of_another(model):
            self._steps = 0
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        batch = None if self.probe_batch is None else move_data_to_device(self.probe_batch, device)
        try:
            scope = self._find_scope(model)
            self._begin(model, scope, device, batch)
            assert self._session is not None
            if example is not None:
                self._session.examine(*example)
            self._loggers = loggers
            self._steps_seen = OptimizerSteps(
                [unwrapped(o) for o in optimizers], scope, lambda: True, self._session.before_step, self._note_step
            )
            self._listen_if_due()
        except BaseException:
            self._let_go()
            raise
        return self

    def step(self, batch: Any = None) -> dict[str, float]:
        """Counts a training step, and measures if it is due. To be called after ``optimizer.step()`` and all methods.

        Where no optimizer has stepped, as when a gradient scaler has skipped it, what was read since is forgotten.

        Args:
            batch: the batch that was trained on, inputs or a pair of inputs and targets; only metrics that run the
                model again need it, and these not if there is a ``probe_batch``.

        Returns:
            The numbers by name, if this step was measured; otherwise nothing, an empty dict. They are logged under the
            step's number as ``enumerate`` gives it: the first is 0.
        """
        if self._session is None or self._steps_seen is None:
            raise RuntimeError("PlasticityMonitor.step() needs a model. Call attach(model, optimizer) first.")
        if not self._steps_seen.optimizers:
            self._session.before_step()
            self._has_stepped = True
        if not self._has_stepped:
            self._session.forget()
            return {}
        self._has_stepped = False
        self._steps += 1
        self._session.end_batch()
        is_due = self.schedule.due_after_step(self._steps)
        if is_due:
            self._session.take_batch(batch)
            is_first_rank = world_size() == 1 or dist.get_rank() == 0
            self._measure(self._steps - 1, nullcontext, self._loggers, is_first_rank)  # counted as a Trainer does
        self._listen_if_due()
        return dict(self.values) if is_due else {}

    def detach(self) -> None:
        """Lets go of the model. What was measured stays, and counting goes on when it is attached to it again."""
        self._let_go()

    def _note_step(self, optimizer: Optimizer) -> None:
        self._has_stepped = True

    def _listen_if_due(self) -> None:
        if self._session is not None and self.schedule.due_after_step(self._steps + 1):
            self._session.start_batch(None)

    # ---- any loop

    def _check_free(self, what: str) -> None:
        if self._steps_seen is not None:
            raise RuntimeError(f"PlasticityMonitor is attached to a model already. Call detach() before {what}.")

    def _is_of_another(self, model: nn.Module) -> bool:
        """Whether what is kept is of another model, where it then does not apply."""
        return self._measured is not None and self._measured() is not model

    def _begin(self, model: nn.Module, scope: nn.Module, device: torch.device, probe_batch: Any) -> None:
        if self._is_of_another(model):
            self._measures.clear()
            self.history = {}
        self._measured, self._resumes = weakref.ref(model), False
        self._measures.device = device
        self._session = Session(self._measures, model, scope, self.module or "", self.layers, probe_batch)

    def _let_go(self) -> None:
        if self._session is not None:
            self._session.close()
        if self._steps_seen is not None:
            self._steps_seen.remove()
        self._session = self._steps_seen = None
        self._has_stepped, self._loggers = False, ()

    def _find_scope(self, model: nn.Module) -> nn.Module:
        check_own_shapes(model, "PlasticityMonitor needs")
        modules = dict(named_modules_as_written(model))
        if (self.module or "") not in modules:
            raise ValueError(
                f"module= must name a module of {type(model).__name__}, got {self.module!r}. "
                f"Its children are: {', '.join(name for name, _ in model.named_children())}."
            )
        return modules[self.module or ""]

    def _measure(
        self,
        step: int,
        forward_context: Callable[[], AbstractContextManager[Any]],
        loggers: Sequence[Any],
        is_first_rank: bool,
    ) -> None:
        assert self._session is not None
        values, matrices = self._session.measure(forward_context)
        self.values = mean_and_layers(values)
        for name, by_layer in values.items():
            self.history.setdefault(name, []).append((step, by_layer))
        if is_first_rank:
            self._log(loggers, values, matrices, step)

    def _log(
        self,
        loggers: Sequence[Any],
        values: Mapping[str, Mapping[str, float]],
        matrices: Mapping[str, Tensor],
        step: int,
    ) -> None:
        draws = self.figures and _can_draw()
        for logger in loggers:
            send_numbers(logger, self.values, step)
            for name in values if draws else ():
                metric = self._measures.prototypes[name]
                figure = picture(name, metric, self.history[name], matrices.get(name))
                send_figure(logger, name, figure, step)

    def _warn_without_matplotlib(self, loggers: Sequence[Any]) -> None:
        if self.figures and loggers and not _can_draw():
            warn(
                "PlasticityMonitor draws no figures, because matplotlib is not installed. Install it with "
                "`pip install lightning-plasticity[plot]`, or set figures=False."
            )

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was measured, and what metrics keep, for a checkpoint. In a distributed run all ranks must call it.

        Where parameters are shared out among ranks, what is as large as they are is whole on rank 0 and None on others.
        """
        metrics = for_checkpoint(self._measures.state_dict())
        return {"history": self.history, "metrics": metrics, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave, when a fit or a loop begins next."""
        self._resumes, self._measured = True, None  # what comes from a checkpoint is of the model that is trained next
        self.history = {name: list(records) for name, records in state_dict["history"].items()}
        self._measures.load_state_dict(state_dict["metrics"])
        self._steps = state_dict.get("steps", 0)  # which older checkpoints lack

    def __getstate__(self) -> dict[str, Any]:
        # A copy, pickled or not, has no part in the fit that goes on, and no other model to confuse with this one.
        alone = {"_session": None, "_measured": None, "_steps_seen": None, "_has_stepped": False, "_loggers": ()}
        return {**without_links(vars(self)), **alone}


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _loggers_of(logger: Any) -> list[Any]:
    """The loggers that are given: of a Fabric, several, one or none."""
    # By name: `lightning` and `lightning_fabric` have classes of their own.
    if any(base.__name__ == "Fabric" for base in type(logger).__mro__):
        return list(logger.loggers)
    given = [] if logger is None else list(logger) if isinstance(logger, (list, tuple)) else [logger]
    for one in given:
        if not callable(getattr(one, "log_metrics", None)):
            raise ValueError(
                "logger must be a Fabric, or something with log_metrics(numbers, step=step) as Lightning's loggers "
                f"have it, or a list of these, got {checks.shown(one)}. Or leave it out, and log what step() returns."
            )
    return given
