"""What all methods share: one object for a Trainer, Fabric and a plain loop, that acts once per real optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.examination import Part, Question
from lightning_plasticity.engine.loop import LoopMethod
from lightning_plasticity.engine.steps import unwrapped
from lightning_plasticity.names import original
from lightning_plasticity.units.calls import ForwardCall


class PlasticityCallback(LoopMethod, Callback):
    """Base of all methods.

    In a Trainer it is a callback like any other. In a plain PyTorch or Fabric loop::

        method.attach(model, optimizer, example_inputs=(x,))
        for x, y in stream:
            ...
            optimizer.step()
            method.step()
        method.detach()

    A method acts right after an optimizer has changed weights: once per real step, however many batches were
    accumulated, never for a step that a gradient scaler skipped or in which no parameter of the method's part of the
    model had a gradient.

    Args:
        module: the name of the module inside the model to work on; None for all of it.
        optimizer_state: ``"reset"`` puts the optimizer state of entries that are written back to its initial value,
            ``"keep"`` leaves it.
        seed: of the method's own draws, which are equal on every rank; None takes rank 0's current seed.
        question: what the method must know of each part of the model that training calls, before it can act; None if
            nothing. Callbacks with the same question share the answers.
    """

    def __init__(
        self,
        *,
        module: str | None = None,
        optimizer_state: OptimizerState = "reset",
        seed: int | None = None,
        question: Question | None = None,
    ) -> None:
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed, question=question)
        self._state_key = self._generate_state_key(module=module)  # Lightning asks for it around each of its calls
        self._steps_before = 0  # the batch at hand

    @property
    @override
    def state_key(self) -> str:
        return self._state_key

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_scope(original(pl_module))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: some strategies load the checkpoint after on_fit_start, and a learning-rate finder trains in it.
        if self._trainer is not None:
            self.detach()  # an exception ended the last fit
        if self._model is not None:
            raise RuntimeError(f"{type(self).__name__} is attached to a model already. Call detach() before fit().")
        self._trainer = trainer
        self._attach(pl_module, trainer.optimizers)
        self._steps_before = self.optimizer_steps

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        seen = self._steps_seen
        if seen is not None and (seen.misses_parameters or unwrapped(optimizer) not in seen.optimizers):
            rank_zero_info(f"{type(self).__name__} follows the optimizers and parameters that training has now.")
            self._follow(trainer, pl_module)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on with other optimizers or parameters of the same model, as if they had always been there."""
        examination, stands_in = self._examination, _StandsIn()
        if examination is not None:
            examination.join(stands_in)  # what is known of the model stays
        self.detach()
        self._trainer = trainer
        self._attach(pl_module, trainer.optimizers)
        if examination is not None:
            examination.leave(stands_in)
        self._take_parts()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # What Lightning is asked costs more than most that is done here: it is asked only where the answer counts.
        if self.optimizer_steps != self._steps_before:
            self._steps_before = self.optimizer_steps
        elif pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
            self._skipped()
        # When and under which step Lightning logs is known only to parts of it that are not public.
        if not self._ready or not trainer.loggers or not trainer._logger_connector.should_update_logs:
            return
        if not (pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()):
            self._log(trainer, self._numbers(), trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _log(self, trainer: Trainer, numbers: Mapping[str, Tensor | float], step: int) -> None:
        """Sends numbers to all loggers, under the names of the method and of its part of the model."""
        part = "" if self.module is None else f"/{self.module}"
        named = {f"plasticity/{type(self).__name__}{part}/{key}": float(value) for key, value in numbers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # No more: a callback that saves a checkpoint on exceptions comes later, and other ranks may be gone.
        self._remove_hooks()
        self._skipped()
        self._is_interrupted = True
        if self._examination is not None:
            self._examination.pause()


class _StandsIn:
    """Holds an examination while the method itself lets go of it."""

    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        """Has no use for it."""

    def forget_parts(self) -> None:
        """Has nothing to forget."""
