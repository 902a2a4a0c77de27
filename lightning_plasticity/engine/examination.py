"""What the parts of a model are made of, seen in their first training calls: once, for all callbacks of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_plasticity.distributed import all_ranks_have, gather_objects, largest_over_ranks, world_size
from lightning_plasticity.engine.forward import (
    ModelHook,
    allow_compiled_code,
    forget_compiled_code,
    in_backward,
    is_redirected,
    run_eagerly,
)
from lightning_plasticity.layer_views import layers_of
from lightning_plasticity.names import named_modules_as_written, original, submodule
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.examining import is_examining, undisturbed

Question: TypeAlias = Callable[[ForwardCall], Any]


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a model that training has called.

    Attributes:
        name: inside the model; empty for all of it.
        found: the answer to the question: plain data, which can be sent to other ranks, with names inside the model.
        called: the names of the modules that a call of this part calls.
    """

    name: str
    found: Any
    called: frozenset[str]


class Listener(Protocol):
    """What is told of parts."""

    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        """A part is called for the first time, and the call is about to go on. None: that was another time."""

    def forget_parts(self) -> None:
        """Other ranks have seen other parts: all that count will be told again."""


class Examination:
    """Asks one question of each part of a model, inside its first training call.

    A part is what training calls: the model as a whole, a child of it, or a module anywhere inside. All that a part
    calls belongs to it. Modules that no part has called yet wait with a hook, however late training comes to call them.
    A part that cannot be examined is examined in the parts that it calls.

    Everybody who asks the same question of the same model shares one examination: see :meth:`of`.

    Args:
        model: the whole model; names are counted from it.
        scope: the module in it to examine.
        name: the name of this module; empty for the model itself.
        question: what to ask: a function of the module's first call, which runs it on an example.
    """

    @classmethod
    def of(cls, model: nn.Module, scope: nn.Module, name: str, question: Question) -> Examination:
        """The examination that all share who ask this question of this part of a model."""
        key = (id(model), name, question)  # an examination that is shared keeps its model alive, and so its id
        found = _shared.get(key)
        if found is None:
            found = _shared[key] = cls(model, scope, name, question)
        return found

    def __init__(self, model: nn.Module, scope: nn.Module, name: str, question: Question) -> None:
        self._model, self._scope, self._name, self._question = model, scope, name, question
        self.parts: list[Part] = []  # those that all ranks have agreed on, in the order of their calls
        self.failed: dict[str, Exception] = {}  # why parts could not be examined as a whole
        self.is_settled = True  # whether there is nothing to agree on
        self._new: list[Part] = []  # seen by this rank since ranks last agreed
        self._listeners: list[Listener] = []
        self._called: set[str] | None = None  # by the part that is being examined
        self._hooks: dict[str, RemovableHandle] = {}

    # ---- who listens

    def join(self, listener: Listener) -> None:
        """Tells of all parts that are known, and of others as they are called."""
        if not self._listeners:
            self._wait()
            self.is_settled = False
            run_eagerly(self)  # a compiler would compile each piece between hooks, and all again when they are gone
        self._listeners.append(listener)
        for part in (*self.parts, *self._new):
            listener.hear_of(part, None)

    def leave(self, listener: Listener) -> None:
        """Tells no more; with the last listener all is forgotten."""
        self._listeners = [other for other in self._listeners if other is not listener]
        if not self._listeners:
            self._drop(list(self._hooks))
            allow_compiled_code(self)
            self.parts, self._new, self.failed, self.is_settled = [], [], {}, True

    def pause(self) -> None:
        """Waits for no more calls, until somebody joins again."""
        self._drop(list(self._hooks))
        allow_compiled_code(self)

    # ---- waiting for calls

    def _wait(self, names: Container[str] | None = None) -> None:
        """Waits for the first call of the modules of these names, or of all."""
        for name, module in named_modules_as_written(self._scope, self._name):
            if next(module.parameters(), None) is None or (names is not None and name not in names):
                continue
            hook = ModelHook(torch.compiler.disable(partial(self._before_call, name)))  # type: ignore[no-untyped-call]
            # prepended, to run before hooks that change the arguments
            self._hooks[name] = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._hooks:
                self._hooks.pop(name).remove()

    def _before_call(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._called is not None:
            self._called |= {name, *_called_with(module, name)}
            return
        if is_examining() or not module.training or in_backward() or is_redirected(module):
            return
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return  # a target network, or one that is still frozen
        call = ForwardCall(original(module), f"{name}." if name else "", args, kwargs)
        if call.is_empty:
            return  # of an empty batch nothing can be seen: the next call is examined
        self._drop([name])
        if self._is_known_in_parts(name):
            return  # what is left of it is examined when it is called
        self.examine(name, call)

    def _is_known_in_parts(self, name: str) -> bool:
        return any(is_inside(called, name) for part in (*self.parts, *self._new) for called in part.called)

    def examine(self, name: str, call: ForwardCall) -> None:
        """Asks the question of a call that is about to go on."""
        self._called = {name, *_called_with(call.module, name)}
        try:
            found = self._question(call)
        except Exception as error:  # its parts are examined as the call goes on; an error of the user's comes again
            self.failed[name] = error
            return
        finally:
            called, self._called = frozenset(self._called), None
        self._drop(called)
        part = Part(name, found, called)
        self._new.append(part)
        self.is_settled = False
        forget_compiled_code()
        for listener in self._listeners:
            listener.hear_of(part, call)

    def examine_example(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Asks the question of what the scope is called with when the model is called with an example."""
        if self._is_known_in_parts(self._name):
            return  # others have asked before
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        if not self._name:
            calls.append((tuple(args), dict(kwargs)))
        else:
            note = torch.compiler.disable(lambda _, args, kwargs: calls.append((args, kwargs)))  # type: ignore[no-untyped-call]
            handle = self._scope.register_forward_pre_hook(note, with_kwargs=True)
            try:
                with undisturbed(self._model), torch.no_grad():
                    self._model.eval()(*args, **kwargs)
            finally:
                handle.remove()
        if not calls:
            raise ValueError(
                f"module={self._name!r} must name a module that is called when the model is called with "
                "example_inputs, but it was not. Name another, or leave example_inputs out: then the first training "
                "call is examined."
            )
        prefix = f"{self._name}." if self._name else ""
        self.examine(self._name, ForwardCall(original(self._scope), prefix, *calls[0]))
        if self._name in self.failed:
            raise self.failed[self._name]
        allow_compiled_code(self)

    # ---- agreement

    def is_over(self, count: int) -> bool:
        """Whether there are no more parts than so many, nothing to agree on, and no module that waits for a call."""
        return not self._hooks and self.is_settled and len(self.parts) == count

    def settle(self) -> None:
        """Agrees over ranks on the parts that were seen. All ranks must call it, before an optimizer's step.

        Where all have seen the same nothing more than numbers are sent; otherwise rank 0's parts count, and what only
        others have seen. As long as modules wait for their first call this asks in each step; then never again.
        """
        if self.is_settled:
            return
        allow_compiled_code(self)
        if world_size() == 1:
            self.parts, self._new, self.is_settled = [*self.parts, *self._new], [], True
            return
        device = next((p.device for p in self._scope.parameters()), torch.device("cpu"))
        found = largest_over_ranks(2 if self._new else 1 if self.waiting() else 0, device)
        if found == 2:
            own = [(part.name, part.found, sorted(part.called)) for part in self._new]
            if all_ranks_have(own, device):
                self.parts += self._new
            else:
                self._take_over(gather_objects(self._new))
            self._new = []
            found = largest_over_ranks(1 if self.waiting() else 0, device)
        # Parts that were frozen when ranks last agreed are thawed on all ranks together, and called on all of them.
        self.is_settled = found == 0

    def _take_over(self, seen: Sequence[Sequence[Part]]) -> None:
        for part in [part for of_rank in seen for part in of_rank]:
            if not any(part.called & known.called for known in self.parts):
                self.parts.append(part)
                self._drop(part.called)
        known_now = {name for part in self.parts for name in part.called}
        self._wait({name for part in self._new for name in part.called} - known_now)  # as the other ranks do
        for listener in self._listeners:
            listener.forget_parts()
            for part in self.parts:
                listener.hear_of(part, None)

    def waiting(self) -> list[str]:
        """The names of trained layers with weights that no part has called."""
        return [
            name
            for name in self._hooks
            if any(p.requires_grad and p.ndim > 1 for p in submodule(self._model, name).parameters(recurse=False))
        ]


_shared: weakref.WeakValueDictionary[tuple[int, str, Question], Examination] = weakref.WeakValueDictionary()


def _called_with(module: nn.Module, name: str) -> list[str]:
    """The names of modules inside that a module uses without calling them, as torch's attention does."""
    return [f"{name}.{part}".lstrip(".") for part, view in layers_of(module).items() if view.caller is not None]


def is_inside(name: str, whole: str) -> bool:
    """Whether a module is another one or part of it, told by their names."""
    return not whole or name == whole or name.startswith(f"{whole}.")
