"""What all methods share in any loop: attached to a model, they act once per real optimizer step, and keep state."""

from __future__ import annotations

import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_plasticity import checks
from lightning_plasticity.distributed import EqualDraws, agree_on_seed, all_ranks_have, any_rank_has, world_size
from lightning_plasticity.editing.editable import check_own_shapes, check_trains, check_whole
from lightning_plasticity.editing.edits import Editor, OptimizerState
from lightning_plasticity.editing.optimizer_state import OPTIMIZER_STATES
from lightning_plasticity.engine.examination import Examination, Question
from lightning_plasticity.engine.forward import ModelHook, forget_compiled_code
from lightning_plasticity.engine.method import Method
from lightning_plasticity.engine.settings import ShowsSettings, without_links
from lightning_plasticity.engine.state import VERSION, check_state, copied, for_checkpoint
from lightning_plasticity.engine.steps import OptimizerSteps, is_joining, those_that_join, unwrapped
from lightning_plasticity.kernels import kernels_on, use_kernels
from lightning_plasticity.names import original
from lightning_plasticity.notices import warn
from lightning_plasticity.shards.modules import shard_again, sharded_modules
from lightning_plasticity.shards.tensors import is_shared_out
from lightning_plasticity.units.calls import arguments_of

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_MANY_CALLS = 100  # of `step` without a step of an optimizer: more than a gradient scaler skips in a row


class LoopMethod(ShowsSettings, Method, ABC):
    """A method that is attached to a model: :class:`.PlasticityCallback` without the hooks of a Trainer.

    Args:
        module, optimizer_state, seed, question: see :class:`.PlasticityCallback`.
    """

    def __init__(
        self,
        *,
        module: str | None = None,
        optimizer_state: OptimizerState = "reset",
        seed: int | None = None,
        question: Question | None = None,
    ) -> None:
        super().__init__()
        self.module = checks.optional(checks.word, "module", module)
        self.optimizer_state: OptimizerState = checks.choice("optimizer_state", optimizer_state, OPTIMIZER_STATES)
        self.seed = checks.optional(checks.seed, "seed", seed)
        self.question = question
        self.optimizer_steps = 0  # real steps of all optimizers that train the scope
        self.optimizers: list[Optimizer] = []
        self.draws: EqualDraws
        self.editor: Editor
        self._model: nn.Module | None = None
        self._joinables: list[Any] = []  # what was attached, where `Join` can end its steps before those of others
        self._scope: nn.Module | None = None
        self._trainer: Trainer | None = None
        self._handles: list[RemovableHandle] = []
        self._sharded: list[FSDPModule] = []
        self._examination: Examination | None = None
        self._parts = 0  # how many parts the method has begun to work on
        self._steps_seen: OptimizerSteps | None = None
        self._stepped: list[Optimizer] = []
        self._calls_without_step = 0  # of `step`, in a row
        self._left_alone: set[str] = set()  # what has been said of
        self._ready = False  # from `_start` to `detach`
        self._is_interrupted = False  # an exception has ended the fit, and what is remembered may still be saved
        self._saved: dict[str, Any] | None = None  # state that waits to be restored
        self._saved_of: weakref.ref[nn.Module] | None = None  # the model that it is of; None for a checkpoint's

    @property
    @abstractmethod
    def state_key(self) -> str:
        """What tells the state of this method from that of others."""

    # ---- a plain loop

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> Self:
        """Starts to work on a model outside of a Trainer.

        Args:
            model: the network; compiled, data-parallel and Fabric wrappers are looked through.
            optimizer: the optimizer or optimizers that train it. Without one, every call of ``step`` counts.
            example_inputs: what the model is called with: ``(x,)`` for ``model(x)``, a dict for keywords, or a pair of
                both, ``((x,), {"mask": mask})``. Without it, the first training call of each part serves as example.
        """
        example = None if example_inputs is None else arguments_of(example_inputs)
        if self._model is not None:
            raise RuntimeError(f"{type(self).__name__} is attached to a model already. Call detach() first.")
        optimizers = (
            [] if optimizer is None else [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
        )
        try:
            self._attach(model, optimizers)
            self._joinables = those_that_join(model, *self.optimizers)
            if self._examination is not None and example is not None:
                self._examination.examine_example(*example)
                self._take_parts()
        except BaseException:
            self._let_go()
            raise
        return self

    def step(self) -> None:
        """Acts once for each real optimizer step since the last call. To be called after ``optimizer.step()``.

        Where no optimizer has stepped, as when a gradient scaler has skipped it, what was heard since is forgotten.
        For that a loop that leaves a batch out calls ``step()`` before its ``continue``: otherwise the forward pass
        counts for the next step, as one of several batches that are accumulated does, unless it was not finite.
        """
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__}.step() needs a model. Call attach(model, optimizer) first.")
        if self._sharded:
            shard_again(self._sharded)
        stepped: Sequence[Optimizer | None] = self._stepped if self.optimizers else [None]
        self._stepped = []
        if self._trainer is None:
            self._check_steps(bool(stepped))
        if not stepped:
            self._skipped()  # a gradient scaler has found gradients that are not finite
        for optimizer in stepped:
            if optimizer is None:
                self._take_parts()
            if not self._ready:
                raise self._nothing_seen()
            self.optimizer_steps += 1
            records_gradients = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)  # as torch.no_grad(), which takes ten times as long
            try:
                self._after_step(optimizer)
            finally:
                torch._C._set_grad_enabled(records_gradients)

    def _check_steps(self, has_stepped: bool) -> None:
        """In a plain loop: whether the optimizers and parameters that were attached are still those that train."""
        if self._steps_seen is not None and self._steps_seen.misses_parameters:
            raise RuntimeError(
                f"{type(self).__name__} needs the parameters that it was attached to, but the optimizer trains others, "
                "which the model has got since. Call detach() and attach(model, optimizer) again."
            )
        if any(map(is_joining, self._joinables)):
            raise RuntimeError(
                f"{type(self).__name__} needs all ranks to make the same steps, but `Join` lets some end before "
                "others. Give all ranks as many batches, as DistributedSampler does, and train without Join."
            )
        self._calls_without_step = 0 if has_stepped else self._calls_without_step + 1
        if self._calls_without_step == _MANY_CALLS:
            warn(
                f"{type(self).__name__}.step() was called {_MANY_CALLS} times in a row, and none of its optimizers has "
                "made a step in between. If another optimizer trains the model now, call detach() and attach() again."
            )

    def detach(self) -> None:
        """Removes all hooks. What the method remembers stays, and goes on when it is attached to the same model again.

        In a distributed run all ranks must call it.
        """
        if self._ready:
            self._saved, self._saved_of = self._own_state(), weakref.ref(self.model)
        self._let_go()

    def _let_go(self) -> None:
        self._remove_hooks()
        if self._examination is not None:
            self._examination.leave(self)
        self._stop()
        self._model = self._scope = self._trainer = self._examination = None
        self._parts = 0
        self._ready = self._is_interrupted = False
        self.optimizers, self._sharded, self._joinables = [], [], []
        for name in ("draws", "editor"):
            vars(self).pop(name, None)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if "editor" in vars(self):
            self.editor.close()
        if self._steps_seen is not None:
            self._steps_seen.remove()

    # ---- what methods use

    @property
    def model(self) -> nn.Module:
        """The whole network that the method is attached to."""
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a model.")
        return self._model

    @property
    def scope(self) -> nn.Module:
        """The part of the model that ``module=`` names."""
        if self._scope is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a model.")
        return self._scope

    @property
    def scope_is_training(self) -> bool:
        """Whether the scope is in training mode, the only one in which what hooks hear counts for statistics."""
        return self._scope is not None and self._scope.training

    @property
    def prefix(self) -> str:
        """What the names of the scope's parts begin with inside the model."""
        return "" if self.module is None else f"{self.module}."

    def keep(self, handle: RemovableHandle) -> None:
        """Takes care of a hook: it is removed when the method is detached."""
        self._handles.append(handle)

    def uncompiled(self, hook: Callable[..., None]) -> ModelHook:
        """A hook that compilers leave alone: they would guard on all it reads, and compile anew when that changes."""
        return ModelHook(torch.compiler.disable(hook))  # type: ignore[no-untyped-call]

    def leave_alone(self, name: str, what: str) -> None:
        """Says, once for each part of the model, that nothing is decided by what is not finite."""
        if name not in self._left_alone:
            self._left_alone.add(name)
            warn(
                f"{type(self).__name__} leaves {name!r} alone where {what} are not finite. If that does not pass, "
                "train with a smaller learning rate or clip gradients."
            )

    def not_called(self) -> list[str]:
        """The names of trained layers that training has not called yet."""
        return [] if self._examination is None else self._examination.waiting()

    def optimizer_of(self, parameter: Tensor) -> Optimizer | None:
        """The optimizer that owns a parameter, found by identity."""
        for optimizer in self.optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        return None

    # ---- attaching

    def _attach(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        model = original(model)
        self._sharded = sharded_modules(model)
        shard_again(self._sharded)
        optimizers = list(optimizers)
        self._scope = self._find_scope(model)
        check_trains(model, optimizers)
        self._model = model
        if self._saved_of is not None and self._saved_of() is not model:
            self._saved = self._saved_of = None  # what was learnt of another model does not apply
            self.optimizer_steps = 0
        self.optimizers = [unwrapped(optimizer) for optimizer in optimizers]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        if any(map(is_shared_out, model.parameters())) and not all_ranks_have(shapes, device):
            raise RuntimeError(
                f"{type(self).__name__} needs the same network on every rank, each with its part of every parameter, "
                "but ranks have other parameters, as in pipeline parallelism. Shard it by FSDP2 or tensor parallelism."
            )
        # With the same seed, different methods, and the same on different modules, draw different numbers.
        seed = agree_on_seed(self.seed, device) ^ zlib.crc32(self.state_key.encode())
        self.draws = EqualDraws(seed)
        if world_size() > 1 and any_rank_has(kernels_on(device.type) is None, device):
            use_kernels(False)  # with them on some ranks only, these would part from the others by rounding
        self.editor = Editor(model, self.optimizers, self.optimizer_state)
        self._stepped.clear()
        self._steps_seen = OptimizerSteps(
            self.optimizers, self.scope, self._waits_for_parts, self._take_parts, self._note_step
        )
        if self.question is None:
            self._begin()
        else:
            self._examination = Examination.of(model, self.scope, self.module or "", self.question)
            self._examination.join(self)
        forget_compiled_code()

    def _find_scope(self, model: nn.Module) -> nn.Module:
        """Looks at a model, before anything is changed, for what cannot work."""
        if self.works_on_parts:
            check_own_shapes(model, "Plasticity methods need")
        else:
            check_whole(model, f"{type(self).__name__} needs")
        if self.module is None:
            return model
        try:
            return model.get_submodule(self.module)
        except AttributeError as error:
            names = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"module= must name a module of {type(model).__name__}, got {self.module!r}. "
                f"Its children are: {names}; model.named_modules() lists all."
            ) from error

    @torch.no_grad()
    def _begin(self) -> None:
        self._start()
        self._ready = True
        if self._saved is not None:
            saved, self._saved, self._saved_of = self._saved, None, None
            self._load(saved)
        self._announce()

    def _announce(self) -> None:
        waiting = self.not_called()
        rank_zero_info(
            f"{type(self).__name__} works on {self._works_on()}"
            + (f" Not called yet, and taken in when training calls it: {checks.few(waiting)}." if waiting else "")
        )

    @torch.no_grad()
    def _take_parts(self) -> None:
        """Begins to work on the parts of the model that were examined since the last time, equal on all ranks."""
        if self._examination is None:
            return
        self._examination.settle()
        if len(self._examination.parts) > self._parts:
            self._parts = len(self._examination.parts)
            shard_again(self._sharded)
            if self._ready:
                self._grow()
                self._announce()
            else:
                self._begin()

    def _waits_for_parts(self) -> bool:
        return self._examination is not None and not (self._ready and self._examination.is_over(self._parts))

    def _note_step(self, optimizer: Optimizer) -> None:
        self._stepped.append(optimizer)
        if self._trainer is not None:
            self.step()

    def _nothing_seen(self) -> Exception:
        """The error for a step before which no part of the model could be examined."""
        failed = {} if self._examination is None else self._examination.failed
        if not failed:
            return RuntimeError(
                f"{type(self).__name__} needs to see a forward pass in training mode before the first optimizer "
                "step, but the model was not called as a module. Call it as self(x) or self.net(x) in "
                "training_step, name the part that is called with module=, or give example_inputs to attach()."
            )
        name, error = next(iter(failed.items()))
        what = f"{name!r}" if name else f"the {type(self.model).__name__}"
        raised = RuntimeError(
            f"{type(self).__name__} of lightning_plasticity could not examine {what} on the inputs of its first "
            f"training call, nor any part of it: {error} Name a part that can run on an example with module=."
        )
        raised.__cause__ = error
        return raised

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that the method must remember, for a checkpoint. In a distributed run all ranks must call it.

        Where parameters are shared out among ranks, what is as large as they are is whole on rank 0 and None on others.
        """
        return for_checkpoint(self._own_state())

    def _own_state(self) -> dict[str, Any]:
        """What ``state_dict`` gives, but of what is shared out each rank has its part, which is in use."""
        if not self._ready:
            return dict(self._saved or {})
        shard_again(self._sharded)
        state = {
            "version": VERSION,
            "optimizer_steps": self.optimizer_steps,
            "draws": self.draws.state_dict(),
            "method": self._state(),
        }
        remainders = self.editor.remainders.state_dict()
        return {**state, "remainders": remainders} if remainders else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave: at once, or when the method is attached next."""
        if not state_dict:
            return
        if self._is_interrupted:
            self._let_go()  # this is for the model that is trained next
        if not self._ready:
            self._saved, self._saved_of = state_dict, None
            return
        self._skipped()
        self._load(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Takes state whole, or raises and is as before."""
        own = copied(self._own_state())
        check_state(type(self).__name__, state_dict, own)
        try:
            self._take_state(state_dict)
        except Exception as error:
            self._skipped()
            self._take_state(own)
            raise ValueError(
                f"{type(self).__name__} cannot load this state: {error} Resume with the model and the settings of "
                "the run that saved it. Nothing was changed."
            ) from error

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        self.optimizer_steps = state_dict["optimizer_steps"]
        self.draws.load_state_dict(state_dict["draws"])
        self.editor.remainders.load_state_dict(state_dict.get("remainders", {}))
        self._restore(state_dict["method"])

    # ---- copies

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies, pickled or not: they are attached to nothing, and go on from here when they are attached."""
        return super().__reduce_ex__(protocol) if self._model is None else (_itself, (self._unattached(),))

    def _unattached(self) -> Self:
        args, kwargs = self._arguments
        twin = type(self)(*args, **kwargs)
        settings = vars(twin).keys() - {"optimizers"}
        vars(twin).update({name: vars(self)[name] for name in settings if not name.startswith("_")})
        twin.load_state_dict(copied(self._own_state()))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled; a copy has no other model to confuse with this one.
        return {**without_links(vars(self)), "_saved_of": None}


def _itself(method: LoopMethod) -> LoopMethod:
    return method
