"""Hare & Tortoise: slow weights follow the fast ones, which go back to them every so often."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.distributed import gather_over_ranks
from lightning_plasticity.editing.editable import check_editable, check_finite
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback
from lightning_plasticity.engine.state import for_checkpoint
from lightning_plasticity.functional.hare_and_tortoise import follow
from lightning_plasticity.functional.weights import norm
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.shards.modules import shard_again
from lightning_plasticity.shards.parts import held_of
from lightning_plasticity.shards.sums import sum_over_shards
from lightning_plasticity.shards.tensors import for_state, is_shared_out, local

Weights: TypeAlias = Literal["slow", "fast"]


class HareAndTortoise(ScheduledCallback):
    r"""Hare & Tortoise: slow weights follow the trained, fast ones, which go back to them every so often.

    .. math::
        \text{after every step:} \quad s \leftarrow d \, s + (1 - d) f \qquad
        \text{every so often:} \quad f \leftarrow s

    All parameters count, and all buffers but counters and masks. The slow ones, at the cost of a copy of the model in
    float32, begin as the fast ones, and are saved in the checkpoint. Validation during a fit is done with the slow
    weights. Afterwards ``slow_state`` gives them, and in a plain loop ``with method.slow_weights():`` puts them into
    the model for a while. Lightning's ``WeightAveraging`` averages alike, but never hands the average back.

    The authors hand over every 10 epochs, the first time after the very first epoch, train each task with a new
    optimizer, and keep its state through the hand-over. Adam then still remembers where the fast weights were going:
    ``optimizer_state="reset"`` lets it forget. Of several optimizers each one's steps count for what it trains.

    Args:
        decay: :math:`d`.
        every_n_epochs: hand over after every so many epochs, when the next one begins.
        every_n_train_steps: hand over after every so many optimizer steps.
        evaluate: what validation during a fit is done with, ``"slow"`` or ``"fast"``.
        module: the name of the module inside the model to work on; None for all of it.
        optimizer_state: ``"keep"``, as published, or ``"reset"`` to let the optimizer begin anew at each hand-over.
        seed: accepted as by all methods; nothing is drawn.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> model.weight.data.fill_(1.0)
        tensor([[1.]])
        >>> method = HareAndTortoise(0.75, every_n_train_steps=2).attach(model)
        >>> for weight in (2.0, 3.0):
        ...     model.weight.data.fill_(weight)  # by a step of training
        ...     method.step()
        ...     print(model.weight.item(), method.slow_state()["weight"].item())
        tensor([[2.]])
        2.0 1.25
        tensor([[3.]])
        1.6875 1.6875

    Reference:
        Lee et al., "Slow and steady wins the race: maintaining plasticity with Hare and Tortoise networks", ICML 2024;
        arXiv 2406.02596.
    """

    works_on_parts = True

    def __init__(
        self,
        decay: float = 0.999,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        evaluate: Weights = "slow",
        module: str | None = None,
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        schedule = Schedule(every_n_train_steps, every_n_epochs)
        super().__init__(schedule, module=module, optimizer_state=optimizer_state, seed=seed)
        self.decay = checks.number("decay", decay, least=0, below=1)
        self.evaluate: Weights = checks.choice("evaluate", evaluate, get_args(Weights))
        self._fast: dict[str, Tensor] = {}  # the model's own
        self._slow: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}  # those among the fast ones
        self._together: Tensors | None = None  # those of the last step
        self._aside: dict[str, Tensor] = {}  # copies of the fast ones, while the model has the slow ones

    @override
    def _start(self) -> None:
        parameters = {self.prefix + name: p for name, p in self.scope.named_parameters() if p.is_floating_point()}
        if not parameters:
            raise ValueError(
                f"HareAndTortoise needs parameters to average, but there are none (module={self.module!r}). "
                "Name another part of the model with module=."
            )
        for name, parameter in parameters.items():
            check_editable(parameter, name)
        check_finite(parameters, "HareAndTortoise needs")
        self._buffers = {self.prefix + name: b for name, b in self.scope.named_buffers() if b.is_floating_point()}
        self._fast = parameters | self._buffers
        self._slow = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in self._fast.items()
        }

    @override
    def _works_on(self) -> str:
        return f"{len(self._fast) - len(self._buffers)} parameters and {len(self._buffers)} buffers."

    @override
    def _stop(self) -> None:
        self._fast, self._slow, self._buffers, self._together = {}, {}, {}, None

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        own = None if len(self.optimizers) < 2 else self._not_of_others(optimizer)
        names = [name for name, tensor in self._fast.items() if own is None or tensor in own]
        slow, fast = ([local(of_all[name]) for name in names] for of_all in (self._slow, self._fast))
        if self._together is None or not self._together.are(slow, fast):
            self._together = Tensors(slow, fast)
        kernels = self._together.kernels()
        if kernels is not None:
            kernels.average_in(self._together, 1 - self.decay)
        else:
            follow(slow, fast, self.decay)
        super()._after_step(optimizer)

    def _not_of_others(self, optimizer: Optimizer | None) -> set[Tensor]:
        others = [other for other in self.optimizers if other is not optimizer]
        theirs = {p for other in others for group in other.param_groups for p in group["params"]}
        return {tensor for tensor in self._fast.values() if tensor not in theirs}

    @override
    def _act(self) -> None:
        trained = self._due()  # a target network is left to who moves it
        names = [name for name, tensor in self._fast.items() if name in self._buffers or id(tensor) in trained]
        self.editor.write(
            [self._fast[name] for name in names], [local(self._slow[name]).to(self._fast[name].dtype) for name in names]
        )

    # ---- the slow weights

    def slow_state(self) -> dict[str, Tensor]:
        """The slow parameters and buffers by their names in the model, for ``load_state_dict(..., strict=False)``.

        Copies, in float32 at least; also once the method is detached. Where parameters are shared out among ranks they
        are as well, as in the model's ``state_dict()``.
        """
        saved: dict[str, Tensor] = {} if self._saved is None else self._saved["method"]["slow"]
        return {name: tensor.clone() for name, tensor in (self._slow or saved).items()}

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Lets the model have the slow weights, and gives it the fast ones back at the end."""
        self._put_slow()
        try:
            yield
        finally:
            self._put_fast()

    @torch.no_grad()
    def _put_slow(self) -> None:
        if not self._slow:
            raise RuntimeError("HareAndTortoise has no slow weights before it is attached. Call attach(model) first.")
        self._aside = {name: tensor.detach().clone() for name, tensor in self._fast.items()}
        self._put(self._slow)

    def _put_fast(self) -> None:
        self._put(self._aside)
        self._aside = {}

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        """Not through the editor: nothing is renewed, and training is not to notice."""
        shard_again(self._sharded)
        for name, tensor in tensors.items():
            local(self._fast[name]).copy_(local(tensor))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ready and self.evaluate == "slow":
            self._put_slow()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_fast()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_fast()
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A checkpoint that is saved in the middle of validation: what training goes on with is the fast weights.
        if not self._aside:
            return
        shard_again(self._sharded)
        weights = checkpoint["state_dict"]
        is_by_parts = any(map(is_shared_out, weights.values()))
        fast = self._aside if is_by_parts else for_checkpoint(self._aside)
        known = {tensor: name for name, tensor in self._fast.items()}
        parameters, buffers = self.model.named_parameters, self.model.named_buffers
        for name, tensor in itertools.chain(parameters(remove_duplicate=False), buffers(remove_duplicate=False)):
            if tensor in known and name in weights:
                weights[name] = fast[known[tensor]]

    # ---- checkpoints

    @override
    def _state(self) -> dict[str, Any]:
        # Statistics of batches differ from rank to rank: those of rank 0 are saved, as they are of the model.
        differing = [name for name, buffer in self._buffers.items() if not is_shared_out(buffer)]
        of_rank_0 = gather_over_ranks([self._slow[name] for name in differing])
        buffers = {name: gathered[0].clone() for name, gathered in zip(differing, of_rank_0, strict=True)}
        slow = {name: buffers[name] if name in buffers else for_state(tensor) for name, tensor in self._slow.items()}
        return super()._state() | {"slow": slow}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        slow: dict[str, Tensor] = state["slow"]
        if slow.keys() != self._slow.keys():
            raise ValueError(
                "HareAndTortoise must resume with the parameters and buffers of its checkpoint, but only one of the "
                f"two has {sorted(slow.keys() ^ self._slow.keys())}. Resume with the run's model and settings."
            )
        super()._restore(state)
        for name, tensor in slow.items():
            local(self._slow[name]).copy_(held_of(tensor, self._slow[name]))

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        fast = self._fast.values()
        squares = [norm(local(f).double() - local(s)).square() for f, s in zip(fast, self._slow.values(), strict=True)]
        return {"distance_to_slow": torch.stack(sum_over_shards(squares, [*fast])).sum().sqrt()}
