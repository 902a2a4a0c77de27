"""A network whose parameters are shared out among ranks, run by all of them as if each were alone with the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_plasticity.shards.tensors import is_shared_out, whole
from lightning_plasticity.units.probing import GLANCES


class _WholeParameters(TorchFunctionMode):
    """Functions get parameters whole: each is put together for the one call that uses it, and then let go."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in GLANCES or name == "untyped_storage":  # which tells parameters apart
            return func(*args, **kwargs)
        return func(*_with_whole(args), **_with_whole(kwargs))


def _with_whole(value: Any) -> Any:
    if isinstance(value, Tensor):
        return whole(value.detach()) if is_shared_out(value) else value
    if isinstance(value, Mapping):
        return {key: _with_whole(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_whole(item) for item in value)
    return value


@contextmanager
def as_if_alone(model: nn.Module) -> Iterator[None]:
    """Runs of a network with shared-out parameters give what the whole one gives; others are left as they are.

    All ranks must make the same runs, on the same example. Where FSDP2 and tensor parallelism have set hooks, these
    rest meanwhile: nothing of theirs is touched. A rank holds one whole parameter at a time.
    """
    if not any(is_shared_out(tensor) for tensor in (*model.parameters(), *model.buffers())):
        yield
        return
    hooks: list[dict[int, Any]] = [
        of_kind for module in model.modules() for of_kind in (module._forward_pre_hooks, module._forward_hooks)
    ]
    before = [dict(of_kind) for of_kind in hooks]
    for of_kind in hooks:
        for number in [number for number, hook in of_kind.items() if _is_of_torch_distributed(hook)]:
            del of_kind[number]
    try:
        with _WholeParameters():
            yield
    finally:
        for of_kind, all_before in zip(hooks, before, strict=True):
            of_kind.clear()
            of_kind.update(all_before)


def _is_of_torch_distributed(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def example_of_all(model: nn.Module, value: Any) -> Any:
    """The example of rank 0 on every rank, where parameters are shared out; otherwise each rank's own."""
    if not any(map(is_shared_out, model.parameters())):
        return value
    device = next(model.parameters()).device

    def packed(x: Any) -> Any:
        return _Packed(x.detach().cpu(), x.device.type) if isinstance(x, Tensor) else x

    def unpacked(x: Any) -> Any:
        return x.values.to(device if x.kind == device.type else x.kind) if isinstance(x, _Packed) else x

    message = [tree_map(packed, value)]
    dist.broadcast_object_list(message, src=0, device=None if device.type == "cpu" else device)
    return tree_map(unpacked, message[0])


@dataclass(frozen=True)
class _Packed:
    """A tensor that travels, which would by itself arrive on the sender's device."""

    values: Tensor
    kind: str
