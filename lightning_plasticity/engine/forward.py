"""The first training call of a model: what a method learns the model's structure from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.units.find import original

T = TypeVar("T")


@dataclass(frozen=True)
class ForwardCall:
    """A call of a module: ``prefix`` is its name inside the model, with a final dot unless it is the model itself."""

    module: nn.Module
    prefix: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on_one_example(self, examine: Callable[[tuple[Any, ...], Mapping[str, Any]], T]) -> T:
        """``examine(args, kwargs)`` with the batch cut to one example, or with all where the module refuses one."""
        sizes = {x.shape[0] for x in _tensors((self.args, self.kwargs)) if x.ndim}
        if len(sizes) == 1 and sizes != {1}:
            try:
                return examine(_first_example(self.args), _first_example(self.kwargs))
            except Exception:  # what a network raises on a batch of one is its own affair; the whole batch decides
                pass
        return examine(self.args, self.kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _first_example(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[:1] if value.ndim else value
    if isinstance(value, Mapping):
        return {key: _first_example(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_first_example(item) for item in value)
    return value


class FirstCalls:
    """Examines a module inside its first training call, or the children of a model where they are called one by one.

    Args:
        module: the module.
        name: its name inside the model; empty for the model itself, only whose children may be called by themselves.
        examine: is given each first call, before the call goes on.
        too_late: is given the name of a child that is first called after :meth:`finish`.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        examine: Callable[[ForwardCall], None],
        too_late: Callable[[str], None],
    ) -> None:
        self._name, self._examine, self._too_late = name, examine, too_late
        self._finished = False
        self.any_seen = False
        candidates = {name: module}
        if not name:
            candidates |= {
                child_name: child for child_name, child in module.named_children() if list(child.parameters())
            }
        self._handles = {
            # prepended, to run before hooks that change the arguments
            name: module.register_forward_pre_hook(self._hook(name), with_kwargs=True, prepend=True)
            for name, module in candidates.items()
        }

    def finish(self) -> None:
        """Stops waiting for the whole; children that were not called yet are too late from now on."""
        self._finished = True
        self._stop_waiting(self._name)

    def remove(self) -> None:
        """Removes all hooks."""
        self._stop_waiting(*self._handles)

    def _stop_waiting(self, *names: str) -> None:
        for name in names:
            if name in self._handles:
                self._handles.pop(name).remove()

    def _hook(self, name: str) -> Callable[..., None]:
        hook: Callable[..., None] = torch.compiler.disable(partial(self._before_call, name))  # type: ignore[no-untyped-call]
        return hook

    def _before_call(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or in_backward() or is_redirected(module):
            return
        is_whole = name == self._name
        if is_whole and self.any_seen:
            return  # some children were called by themselves before: they are examined one by one
        self._stop_waiting(*self._handles if is_whole else [name])
        if self._finished:
            self._too_late(name)
            return
        self.any_seen = True
        self._examine(ForwardCall(original(module), f"{name}." if name else "", args, kwargs))
        forget_compiled_code()


def forget_compiled_code() -> None:
    """Compiled code does not see hooks that are added after it was made: it is made anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def in_backward() -> bool:
    """Whether this code runs inside a backward pass, as the second forward of activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def is_redirected(module: nn.Module) -> bool:
    """Whether a call of this module really calls its ``training_step``.

    Lightning and Fabric do so to get a method through the forward of a wrapper such as ``DistributedDataParallel``: for
    that one call they put a function of their own in place of ``forward``.
    """
    forward = vars(module).get("forward")
    return getattr(forward, "__module__", "").split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")
