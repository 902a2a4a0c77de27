"""What can be edited, parameters that are whole, floating-point and not computed from others, and with what."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_plasticity.distributed import any_rank_has
from lightning_plasticity.layer_views import LayerView, layers_of
from lightning_plasticity.shards.tensors import is_flattened, is_shared_out, local

_FEW = 32  # entries of which Python finds the least and the largest sooner than PyTorch


def check_whole(model: nn.Module, needs: str) -> None:
    """Raise if parameters of a model are sharded; ``needs`` begins the error: who needs them whole."""
    check_own_shapes(model, needs)
    for name, parameter in model.named_parameters():
        if is_shared_out(parameter):
            raise RuntimeError(
                f"{needs} whole parameters on every rank, but {name!r} is sharded (FSDP2 or tensor parallelism, as by "
                "ModelParallelStrategy). Use a strategy that keeps them whole, for instance strategy='ddp'."
            )


def check_own_shapes(model: nn.Module, needs: str) -> None:
    """Raise if parameters of a model have no shape of their own; ``needs`` begins the error: who needs their shapes."""
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise RuntimeError(
                f"{needs} parameters that have a shape, but {name!r} of a lazy module gets one in its first call. "
                "Run one batch through the model first, in a Trainer at the end of configure_model()."
            )
        if is_flattened(parameter):
            by = "DeepSpeed stage 3" if hasattr(parameter, "ds_id") else "FSDP1, as by strategy='fsdp'"
            raise RuntimeError(
                f"{needs} parameters that keep their shapes, but {name!r} is sharded ({by}, makes flat pieces). "
                "Use ModelParallelStrategy, which shards by FSDP2, or strategy='ddp', which keeps parameters whole."
            )


def check_trains(model: nn.Module, optimizers: Iterable[Any]) -> None:
    """Raise if optimizers train copies of a model's parameters, from which the next step would undo every edit.

    An optimizer of something else is none of it, as long as another one trains the model.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        level = optimizer
        while level is not None:  # Lightning's and Fabric's wrappers hold DeepSpeed's, which holds the one it was given
            if any(kind.__module__.startswith("deepspeed.runtime.") for kind in type(level).__mro__):
                raise RuntimeError(
                    "Plasticity methods need an optimizer that trains the model's own parameters, but DeepSpeed, in "
                    f"every stage, trains copies of them ({type(level).__name__}): what is written to the model would "
                    "be lost without a word. Use ModelParallelStrategy, which shards by FSDP2, or strategy='ddp'."
                )
            level = getattr(level, "optimizer", None)
    own = {id(parameter) for parameter in model.parameters()}
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    if trained and own.isdisjoint(trained):
        names = ", ".join(type(getattr(optimizer, "optimizer", optimizer)).__name__ for optimizer in optimizers)
        raise RuntimeError(
            f"Plasticity methods need an optimizer that trains the model's own parameters, but {names} has none of "
            f"those of {type(model).__name__}. If it trains copies of them, as some implementations of mixed precision "
            "do, what is written to the model would be lost: use precision='bf16-mixed' or '16-mixed' instead. "
            "Otherwise give the optimizer and the model that belong together."
        )


def check_editable(target: nn.Module | nn.Parameter, name: str) -> None:
    """Raise if an :class:`.Editor` cannot write to a layer, a normalisation module or a parameter.

    Args:
        target: What is to be edited.
        name: What to call it in the error.

    Raises:
        ValueError: If it is a module of a kind that cannot be edited.
        RuntimeError: If its parameters are computed from others, sharded, quantised or not there yet.

    Example:
        >>> check_editable(nn.Linear(2, 3), "encoder")
        >>> check_editable(nn.ConvTranspose2d(2, 4, 1, groups=2), "decoder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: An edit needs a transposed convolution without groups, but 'decoder' has groups=2. Exclude it.
    """
    if isinstance(target, nn.Parameter):
        check_parameter(target, name)
    elif views := layers_of(target):
        for view in views.values():
            check_layer(view, name)
    else:
        check_norm(target, name)


def is_finite(tensor: Tensor, *beside: Tensor) -> bool:
    """Whether no entry of a tensor, on any rank, is NaN or infinite, told without temporaries of its size.

    Args:
        tensor: the tensor.
        *beside: what else of the part that this rank holds must be finite.

    Example:
        >>> import torch
        >>> is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.tensor([1.0, torch.nan, -torch.inf]))
        (True, False)
    """
    held = [one.detach() for one in (local(tensor), *beside) if one.numel()]
    is_here = all(bool(end.isfinite()) for one in held for end in one.aminmax())  # NaN is in both
    return not any_rank_has(not is_here, local(tensor).device) if is_shared_out(tensor) else is_here


def check_finite(parameters: Mapping[str, Tensor], needs: str) -> None:
    """Raise if a tensor has an entry that is not finite; ``needs`` begins the error."""
    for name, parameter in parameters.items():
        if not is_finite(parameter):
            raise ValueError(
                f"{needs} weights that are finite when it starts, but {name} has NaN or infinity. Go back to a "
                "checkpoint from before that, or leave it out."
            )


def check_parameter(parameter: Tensor, name: str) -> None:
    """Raise if a parameter cannot be written to."""
    if nn.parameter.is_lazy(parameter):
        raise RuntimeError(f"An edit needs initialised parameters, but {name} has no shape yet. Run one batch first.")
    if is_flattened(parameter):
        raise RuntimeError(
            f"An edit needs parameters that keep their shapes, but {name} is a piece of a flat one. "
            "Use ModelParallelStrategy (FSDP2), or a strategy that keeps a copy on every rank, such as DDP."
        )
    if not parameter.is_floating_point():
        raise RuntimeError(f"An edit needs floating-point parameters, but {name} is {parameter.dtype}. Exclude it.")


def check_layer(view: LayerView, name: str) -> None:
    """Raise if the rows and columns of a layer cannot be written to."""
    layer = view.layer
    if view.transposed and view.groups > 1:
        raise ValueError(
            f"An edit needs a transposed convolution without groups, but {name!r} has groups={view.groups}. Exclude it."
        )
    module = view.weight_path(name).rpartition(".")[0]
    for kind in (view.weight_name, view.bias_name):
        if getattr(layer, kind, None) is not None and kind not in layer._parameters:
            raise RuntimeError(
                f"An edit needs {module}.{kind} to be a parameter, but it is computed from other tensors (by a "
                "parametrization, weight_norm, spectral_norm, pruning or sharding), so that what is written would be "
                "lost. Remove that, as with torch.nn.utils.parametrize.remove_parametrizations, or exclude the module."
            )
    for kind, parameter in layer.named_parameters(recurse=False):
        check_parameter(parameter, f"{module}.{kind}")
    if is_shared_out(view.weight) and view.gates > 1:
        raise RuntimeError(
            f"An edit of an LSTM or a GRU needs whole parameters, but {module}.{view.weight_name} is sharded. Use a "
            "strategy that keeps parameters whole, such as DDP, or exclude the module."
        )
    dimensions = 1 - view.channel_dim
    if view.weight.dim() != dimensions:
        raise RuntimeError(
            f"An edit needs {module}.{view.weight_name} to have {dimensions} dimensions, but its shape is "
            f"{tuple(view.weight.shape)}: it was flattened, perhaps to be sharded. "
            "Use a strategy that keeps parameters whole, such as DDP, or exclude the module."
        )


def check_norm(module: nn.Module, name: str) -> None:
    """Raise if the entries of a normalisation module cannot be reset."""
    kind, has_reset = type(module).__name__, callable(getattr(module, "reset_parameters", None))
    if is_parametrized(module):
        raise RuntimeError(
            f"An edit needs a module with parameters of its own, but {name!r} is parametrized, so that what is written "
            "would be lost. Remove that with torch.nn.utils.parametrize.remove_parametrizations, or exclude the module."
        )
    for tensor_name, parameter in module.named_parameters(recurse=False):
        check_parameter(parameter, f"{name}.{tensor_name}")
    if own_entries(module) and not has_reset:
        raise ValueError(
            f"Resetting a normalisation module needs its reset_parameters(), but {name!r}, a {kind}, has none. "
            "Add one that sets the initial values, or exclude the module."
        )


def check_mask(parameter: Tensor, mask: Tensor) -> None:
    """Raise if a mask does not fit a parameter, or that cannot be written to."""
    check_parameter(parameter, "the parameter")
    shape = tuple(local(parameter).shape)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"A masked edit needs a mask of torch.bool and shape {shape}, "
            f"but it is of {mask.dtype} and shape {tuple(mask.shape)}."
        )


def check_index(index: Tensor, parameter: Tensor, size: int, name: str) -> None:
    """Raise if an index is not one of places from 0 to ``size`` on the parameter's device."""
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != parameter.device:
        raise ValueError(
            f"An edit of {name!r} needs a LongTensor with one dimension on {parameter.device}, "
            f"but got {index.dtype} of shape {tuple(index.shape)} on {index.device}."
        )
    if index.device.type == "cpu" and len(index):  # on CUDA this would wait
        few = index.tolist() if len(index) <= _FEW else [int(bound) for bound in torch.aminmax(index)]
        first, last = min(few), max(few)
        if first < 0 or last >= size:
            raise ValueError(f"An edit of {name!r} needs numbers from 0 to {size - 1}, but got {first} to {last}.")


def check_device(values: Tensor, parameter: Tensor) -> None:
    """Raise if new values, more than a single one, are on another device than the parameter."""
    if values.dim() and values.device != parameter.device:
        raise ValueError(f"An edit needs values on {parameter.device}, but they are on {values.device}.")


def check_pairs(tensors: Sequence[Tensor], others: Sequence[Tensor], edit: str, what: str) -> None:
    """Raise if there is not one of the others, of the shape of the part that is here, for each tensor."""
    wanted, got = [local(tensor).shape for tensor in tensors], [other.shape for other in others]
    if wanted != got:
        raise ValueError(
            f"{edit} needs {what} of the shapes {[tuple(shape) for shape in wanted]}, "
            f"but got {[tuple(shape) for shape in got]}."
        )


def own_entries(norm: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors with a number for each entry: not its counters and shared scalars."""
    own = [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]
    whole = {name: tensor for name, tensor in own if tensor.dim() > 0}
    size = max((tensor.numel() for tensor in whole.values()), default=0)
    return {name: tensor for name, tensor in whole.items() if tensor.numel() == size}
