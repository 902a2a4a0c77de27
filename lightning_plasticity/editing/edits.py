"""The only code that writes to parameters, normalisation statistics and optimizer state.

Every edit is made in place, under ``no_grad``, by indexing: a parameter keeps its identity, its storage and its layout.
All is checked before anything is written: an edit that fails has changed nothing. Nothing waits for a device: an index
out of range, and too few values for a mask, are seen beforehand on the CPU only, and reported by PyTorch on CUDA.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity.editing.editable import (
    check_device,
    check_index,
    check_layer,
    check_mask,
    check_norm,
    own_entries,
)
from lightning_plasticity.editing.grad_mode import without_gradients
from lightning_plasticity.editing.initial import copy_to_cpu, reset_on_cpu
from lightning_plasticity.editing.optimizer_state import OptimizerState as OptimizerState
from lightning_plasticity.editing.optimizer_state import write_at
from lightning_plasticity.editing.whole_tensors import WholeEditor
from lightning_plasticity.layer_views import LayerView, layer_at, layers_of
from lightning_plasticity.names import submodule
from lightning_plasticity.shards.layers import bias_by_output, bias_by_row, by_output, held_view, inputs_read, matrix
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.sums import sum_over_shards
from lightning_plasticity.shards.tensors import local

T = TypeVar("T")
_Index: TypeAlias = tuple[Tensor | slice, ...]


class Editor(WholeEditor):
    """Write to a model's weights, and renew the optimizer state of exactly the entries that get new values.

    Where parameters are shared out among ranks (FSDP2, tensor parallelism), every rank makes the same edits, and each
    writes what it holds. Modules, rows, columns and entries are those of the whole network, and what is written there
    is given whole. What concerns all entries of tensors (masks, and values for :meth:`write`, :meth:`add` and others)
    is of the part that the rank holds: of the shape of ``shards.local(tensor)``.

    The state of an entry is found by the parameter's identity, in what has the parameter's shape. It starts from 0,
    except where the optimizer starts elsewhere: Adagrad's ``initial_accumulator_value``, Rprop's learning rate, the
    weight itself where the weight is averaged (ASGD). Step counts belong to whole tensors, and start again only with
    these. State of another shape (Adafactor's factors) stays, and a warning says so once; LBFGS begins anew. Of two
    parameters over the same memory only the one that is named has its state renewed; one parameter that two modules
    share is no such case. :meth:`shift_bias` and :meth:`clamp` renew nothing: what they write is still the same entry.

    Indices are distinct tensors of integers on the parameter's device. They may be empty, as may lists of tensors. To
    replace units of several layers, first :meth:`shift_bias` for all, then :meth:`redraw_rows` and :meth:`reset_norm`
    for all, then :meth:`zero_columns` for all: then biases are shifted by the old weights, a new unit's bias is 0
    whatever was shifted into it, and an outgoing 0 wins over a redrawn row.

    Where parameters are in half precision, :meth:`scale`, :meth:`add` and :meth:`write` keep what rounding takes away,
    in float32, until it counts: changes that are made at every step are too small for it one by one. The other edits
    are made now and then, and are rounded once.

    Args:
        model: The network, in which modules are looked up by their qualified names.
        optimizers: Those that may own its parameters.
        optimizer_state: ``"survivors"``: what an optimizer knows of the size of gradients, such as Adam's second
            moment, becomes the mean of the tensor's other entries. ``"reset"``: all state starts again. ``"keep"``
            leaves all state alone, as methods want that nudge every weight at every step.

    Raises:
        ValueError: If ``optimizer_state`` is none of these. The edits raise it for a module, an index or values
            that do not fit, and ``RuntimeError`` for what :func:`.check_editable` refuses.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> editor = Editor(model, [torch.optim.Adam(model.parameters())])
        >>> unit = torch.tensor([1])
        >>> editor.redraw_rows("0", unit, torch.tensor([[0.5, -0.5]]))
        >>> editor.zero_columns("2", unit)
        >>> model[0].weight[1].tolist(), model[0].bias[1].item(), model[2].weight[0, 1].item()
        ([0.5, -0.5], 0.0, 0.0)
    """

    def __init__(
        self, model: nn.Module, optimizers: Iterable[Optimizer] = (), optimizer_state: OptimizerState = "survivors"
    ) -> None:
        super().__init__(model, optimizers, optimizer_state)
        self._layers: dict[str, LayerView] = {}
        self._initial_norms: dict[str, dict[str, Tensor]] = {}

    @without_gradients
    def redraw_rows(self, module: str, rows: Tensor, values: Tensor) -> None:
        """Set these rows (outputs) of a layer's weight to ``values`` and of its bias, if it has one, to 0."""
        layer = self._layer(module)
        check_index(rows, layer.weight, layer.outputs, module)
        part = by_output(layer, layer.weight)
        shape = (len(rows), *part.shape[1:])
        if values.shape != shape:
            raise ValueError(
                f"redraw_rows needs values of shape {shape} for {len(rows)} rows of {module!r}, "
                f"but their shape is {tuple(values.shape)}."
            )
        check_device(values, layer.weight)
        here, given = part.find(0, rows)
        values = part.take(values[given], *range(1, len(shape)))
        self._assign(layer.weight, (here,), values, math.prod(shape), held_view(layer).by_output)
        self._zero_bias(layer, rows)

    @without_gradients
    def scale_rows(self, module: str, rows: Tensor, factor: float) -> None:
        """Multiply these rows (outputs) of a layer's weight and bias by ``factor``."""
        layer = self._layer(module)
        check_index(rows, layer.weight, layer.outputs, module)
        part = by_output(layer, layer.weight)
        here, _ = part.find(0, rows)
        count = len(rows) * part.shape[1:].numel()
        self._assign(layer.weight, (here,), part.local[here] * factor, count, held_view(layer).by_output)
        if layer.bias is not None:
            bias = bias_by_output(layer, layer.bias)
            here, _ = bias.find(0, rows)
            count = len(rows) * layer.gates
            self._assign(layer.bias, (here,), bias.local[here] * factor, count, held_view(layer).bias_by_output)

    @without_gradients
    def zero_bias(self, module: str, rows: Tensor) -> None:
        """Set these entries of a layer's bias to 0; a layer without bias stays as it is."""
        layer = self._layer(module)
        check_index(rows, layer.weight, layer.outputs, module)
        self._zero_bias(layer, rows)

    def _zero_bias(self, layer: LayerView, rows: Tensor) -> None:
        if layer.bias is not None:
            here, _ = bias_by_output(layer, layer.bias).find(0, rows)
            self._assign(layer.bias, (here,), 0.0, len(rows) * layer.gates, held_view(layer).bias_by_output)

    @without_gradients
    def zero_columns(self, module: str, columns: Tensor) -> None:
        """Set to 0 what a layer multiplies these inputs (features, or channels of a convolution with any groups) by."""
        layer = self._layer(module)
        check_index(columns, layer.weight, layer.inputs, module)
        part = matrix(layer, layer.weight)
        if layer.groups == 1:
            here, _ = part.find(1, columns)
            count = len(columns) * part.shape[0] * part.shape[2:].numel()
            self._assign(layer.weight, (slice(None), here), 0.0, count, held_view(layer).matrix)
            return
        chosen = _reads_one_of(columns, layer)
        mask = chosen.view(*chosen.shape, *(1,) * (len(part.shape) - 2)).expand(part.local.shape)
        torch.where(mask, part.local.new_zeros(()), part.local, out=part.local)
        self._state.renew_masked(layer.weight, mask)

    @without_gradients
    def shift_bias(self, module: str, columns: Tensor, amounts: Tensor) -> None:
        """Add to a layer's bias what these inputs would add to its output if their values were ``amounts``.

        Convolutions sum over the kernel: exact wherever the kernel does not reach into zero padding. With a stride, an
        output of a transposed convolution sees a part of the kernel only: then it is exact on average. A layer without
        bias stays as it is, and so does an entry that would get what is not finite. Optimizer state stays: the bias
        goes on from where it is.
        """
        layer = self._layer(module)
        check_index(columns, layer.weight, layer.inputs, module)
        if amounts.shape != columns.shape:
            raise ValueError(
                f"shift_bias needs one amount for each of {len(columns)} columns of {module!r}, "
                f"but their shape is {tuple(amounts.shape)}."
            )
        if layer.bias is None:
            return
        part = matrix(layer, layer.weight)
        [shift] = sum_over_shards([part.spread(_given_by(columns, amounts, layer), 0)], [layer.weight])
        shift = bias_by_row(layer, layer.bias).take(shift.nan_to_num_(0.0, 0.0, 0.0), 0)
        values = self.remainders.open([layer.bias])
        held_view(layer).bias_by_row(values[0]).add_(shift)
        self.remainders.close([layer.bias], values)

    @without_gradients
    def reset_norm(self, module: str, entries: Tensor | None = None) -> None:
        """Set entries of a normalisation module, or all of it, to the values that its ``reset_parameters()`` gives.

        For PyTorch's own: weight 1, bias 0, running mean 0, running variance 1. Where the weight has several dimensions
        (``LayerNorm``), entries are counted row by row. The values are made once, on the CPU, and kept.
        """
        norm = self._find(module)
        if module not in self._initial_norms:
            self._initial_norms[module] = _initial_norm(norm, module)
        initials = self._initial_norms[module]
        tensors: list[Tensor] = [getattr(norm, name) for name in initials]
        if entries is None:
            self.write(tensors, [part_of(getattr(norm, name)).take(initial) for name, initial in initials.items()])
            return
        for tensor in tensors:
            check_index(entries, tensor, tensor.numel(), module)
        for tensor, initial in zip(tensors, initials.values(), strict=True):
            part, index = part_of(tensor), _unravelled(entries, tensor.shape)
            for dim in range(len(index)):
                here, kept = part.find(dim, index[dim])
                index = [here if d == dim else places[kept] for d, places in enumerate(index)]
            values = part.take(initial.to(tensor.device))[tuple(index)]
            self._assign(tensor, tuple(index), values, len(entries))

    @without_gradients
    def write_masked(self, parameter: Tensor, mask: Tensor, values: Tensor) -> None:
        """Set a parameter to ``values`` (of its shape, or one for all) where ``mask`` is true."""
        check_mask(parameter, mask)
        held = local(parameter)
        shape = tuple(held.shape)
        if values.shape not in ((), shape):
            raise ValueError(
                f"write_masked needs one value or values of shape {shape}, but their shape is {tuple(values.shape)}."
            )
        check_device(values, parameter)
        torch.where(mask, values.to(held.dtype), held, out=held)
        self._state.renew_masked(parameter, mask)

    @without_gradients
    def write_packed(self, parameter: Tensor, mask: Tensor, values: Tensor) -> None:
        """Set the entries of a parameter where ``mask`` is true, in their order, to those of ``values``.

        As ``write_masked``, without values for the entries that stay: ``values`` has one dimension, and as many entries
        as ``mask`` has true ones.
        """
        check_mask(parameter, mask)
        if values.dim() != 1:
            raise ValueError(f"write_packed needs values of one dimension, but their shape is {tuple(values.shape)}.")
        check_device(values, parameter)
        if mask.device.type == "cpu" and len(values) != (count := int(torch.count_nonzero(mask))):
            raise ValueError(f"write_packed needs a value for each of {count} masked entries, but got {len(values)}.")
        local(parameter).masked_scatter_(mask, values.to(parameter.dtype))
        self._state.renew_masked(parameter, mask)

    def _find(self, name: str) -> nn.Module:
        return self._look_up(name, submodule)

    def _look_up(self, name: str, find: Callable[[nn.Module, str], T]) -> T:
        try:
            return find(self._model, name)
        except AttributeError as error:
            raise ValueError(
                f"An edit needs the name of a module in {type(self._model).__name__}, but there is no {name!r}. "
                "Take one from model.named_modules()."
            ) from error

    def _layer(self, name: str) -> LayerView:
        if name not in self._layers:
            view = self._look_up(name, layer_at)
            if view is None:
                raise ValueError(
                    "Editing rows and columns needs a Linear or Conv layer, "
                    f"but {name!r} is a {type(self._find(name)).__name__}. Exclude it."
                )
            check_layer(view, name)
            self._layers[name] = view
        return self._layers[name]

    def _assign(
        self,
        tensor: Tensor,
        index: _Index,
        values: Tensor | float,
        count: int,
        view: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """Writes to entries of the part of a tensor that is here; ``count`` are written on all ranks together."""
        write_at(view(local(tensor)), index, values)
        self._state.renew(tensor, index, count, view)


def _initial_norm(norm: nn.Module, name: str) -> dict[str, Tensor]:
    if layers_of(norm):
        raise ValueError(
            f"reset_norm needs a normalisation module, but {name!r} is a {type(norm).__name__}. Use redraw_rows."
        )
    check_norm(norm, name)
    tensors = own_entries(norm)
    if not tensors:
        return {}
    twin = copy_to_cpu(norm)
    reset_on_cpu(twin, seed=0)
    return {name: getattr(twin, name).detach().to(t.device, t.dtype) for name, t in tensors.items()}


def _given_by(columns: Tensor, amounts: Tensor, layer: LayerView) -> Tensor:
    """What inputs of these amounts add to each row of a layer, before it is added up over shards."""
    part, precise = matrix(layer, layer.weight), torch.promote_types(layer.weight.dtype, torch.float32)
    amounts = amounts.to(precise)
    if layer.groups == 1:  # without the masks, which take most of the time
        here, given = part.find(1, columns)
        used = _sum_of_kernel(part.local.index_select(1, here), precise)
        # Not a product of matrices, which may be TF32.
        shift = (used * (amounts if isinstance(given, slice) else amounts[given])).sum(1)
        return shift if layer.seen_of_kernel == 1.0 else shift * layer.seen_of_kernel
    of_inputs = amounts.new_zeros(layer.inputs).index_copy(0, columns, amounts)
    used = _sum_of_kernel(part.local, precise)
    return torch.where(_reads_one_of(columns, layer), used * of_inputs[inputs_read(layer)], 0.0).sum(1)


def _sum_of_kernel(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """By row and input."""
    return weights.to(dtype) if weights.ndim == 2 else weights.flatten(2).sum(-1, dtype=dtype)


def _reads_one_of(columns: Tensor, layer: LayerView) -> Tensor:
    """Whether each weight that is here, by output and input, is multiplied by one of these inputs."""
    chosen = torch.zeros(layer.inputs, dtype=torch.bool, device=columns.device).index_fill(0, columns, True)
    return chosen[inputs_read(layer)]


def _unravelled(entries: Tensor, shape: torch.Size) -> list[Tensor]:
    # torch.unravel_index copies the shape to the device, and waits for that.
    index: list[Tensor] = []
    for size in reversed(shape):
        index.insert(0, entries % size)
        entries = entries // size
    return index
