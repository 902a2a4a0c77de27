"""When forward passes count, and when compiled code may run."""

from __future__ import annotations

import sys
import weakref
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from typing_extensions import override

_reasons_to_run_eagerly: set[int] = set()
_eager = ExitStack()


class ModelHook(partial[None]):
    """A hook on a module of a model, which does nothing in a copy of the model, pickled or not.

    Made of a function, which is called without a call in between: each layer calls its hooks at every step.
    """

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return ModelHook, (_do_nothing,)


def _do_nothing(*_: Any) -> None:
    pass


def run_eagerly(reason: object) -> None:
    """Runs compiled models uncompiled, in all of the process, until this reason (and every other one) is gone."""
    if not _reasons_to_run_eagerly:
        _eager.enter_context(torch.compiler.set_stance("force_eager"))
    if id(reason) not in _reasons_to_run_eagerly:
        _reasons_to_run_eagerly.add(id(reason))
        weakref.finalize(reason, _forget_reason, id(reason))  # whoever is gone without a word has none any more


def allow_compiled_code(reason: object) -> None:
    """Takes a reason to run uncompiled back, if it was given."""
    _forget_reason(id(reason))


def _forget_reason(number: int) -> None:
    if number in _reasons_to_run_eagerly:
        _reasons_to_run_eagerly.remove(number)
        if not _reasons_to_run_eagerly:
            _eager.close()


def forget_compiled_code() -> None:
    """Compiled code does not see hooks that are added after it was made: it is made anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def compiler_is_near() -> bool:
    """Whether a compiler looks at what Python runs now, to compile it."""
    return get_eval_frame_callback() is not None


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
