"""The modules of a network under the names that its author gave them, whatever wraps them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# What torch.compile, Fabric and activation checkpointing call the module inside their wrappers. These wrappers answer
# for the module inside them, so that ``get_submodule`` finds its parts under the names without the wrapper's.
_WRAPPED = ("_orig_mod", "_original_module", "_checkpoint_wrapped_module")


def original(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile``, of data parallelism, of Fabric and of checkpointing."""
    while True:
        inside = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else _inside(model)
        if inside is None:
            return model
        model = inside


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a name that :func:`named_modules_as_written` gives; an ``AttributeError`` if there is none."""
    return original(model.get_submodule(name))


def named_modules_as_written(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a network as ``named_modules()`` gives them, but without the wrappers of ``torch.compile``.

    The module that is wrapped (by ``torch.compile``, Fabric or activation checkpointing, wherever it sits) stands for
    its wrapper and comes under the wrapper's name; what the wrapper calls it (``_orig_mod``) is in no name. The network
    itself has the name ``prefix``, empty by default. ``submodule`` finds a module by such a name.

    Example:
        >>> import torch
        >>> model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2))))
        >>> [name for name, _ in named_modules_as_written(model)]
        ['', '0', '0.0']
        >>> [name for name, _ in named_modules_as_written(nn.Linear(2, 2))]
        ['']
    """
    yield from _walk(model, prefix, set())


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    while (inside := _inside(module)) is not None:
        module = inside
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def _inside(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper stands for, None where the module is no wrapper."""
    return next((module._modules[key] for key in _WRAPPED if key in module._modules), None)
