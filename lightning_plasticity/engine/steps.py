"""When optimizers really step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class OptimizerSteps:
    """Hooks on optimizers that tell when a step begins, and when it has changed parameters of a part of the model.

    A step counts once, however many batches were accumulated, and not if a gradient scaler skipped it or no parameter
    of that part had a gradient.

    Args:
        optimizers: those to watch.
        scope: the part of the model.
        waits: asked when a step begins: whether ``begins`` is to be called.
        begins: called when a step begins, after the forward passes of its closure if it has one: the last moment at
            which the weights are as before.
        made: called right after a real step.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        scope: nn.Module,
        waits: Callable[[], bool],
        begins: Callable[[], None],
        made: Callable[[Optimizer], None],
    ) -> None:
        self.optimizers = list(optimizers)
        self.misses_parameters = False  # whether steps train parameters that the scope has got since
        self._scope, self._waits, self._begins, self._made = scope, waits, begins, made
        self._parameters = _ids(scope)
        self._sizes = {optimizer: _size(optimizer) for optimizer in optimizers}  # how many parameters each trains
        self._handles: list[RemovableHandle] = []
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self._waits():
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._begins()
            return None

        def first_closure(*given: Any) -> Any:
            result = closure(*given)
            self._begins()  # the forward pass was in the closure
            return result

        return args[:1], {**kwargs, "closure": first_closure}

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and bool(found_inf.any()):
            return  # a fused optimizer under a gradient scaler skips inside its kernel
        if _trains(optimizer, self._parameters):
            self._made(optimizer)
        elif _trains(optimizer, _ids(self._scope)):
            self.misses_parameters = True
        size = _size(optimizer)
        if size != self._sizes[optimizer]:
            self._sizes[optimizer] = size
            more = _ids(self._scope) - self._parameters
            self.misses_parameters |= any(id(p) in more for group in optimizer.param_groups for p in group["params"])


def _trains(optimizer: Optimizer, parameters: set[int]) -> bool:
    """Whether any of the parameters has a gradient: a plain loop, for each step asks, and the first mostly has."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and id(parameter) in parameters:
                return True
    return False


def _size(optimizer: Optimizer) -> int:
    size = 0
    for group in optimizer.param_groups:
        size += len(group["params"])
    return size


def _ids(scope: nn.Module) -> set[int]:
    return {id(parameter) for parameter in scope.parameters()}


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Lightning's and Fabric's wrappers."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise ValueError(f"A torch.optim.Optimizer is required, got {type(optimizer).__name__}.")
    return inner


def those_that_join(*candidates: object) -> list[Any]:
    """Those that can take part in ``torch.distributed.algorithms.Join``: wrapped models and some optimizers."""
    # Not asked of the object itself: of what it does not have, a module makes an error with a message first.
    return [one for one in candidates if "_join_config" in getattr(one, "__dict__", {})]


def is_joining(joinable: Any) -> bool:
    """Whether training goes on inside ``Join``, of one of :func:`those_that_join`."""
    return bool(joinable._join_config.enable)
