"""The only code that writes to parameters, normalisation statistics and optimizer state.

Every edit is made in place, under ``no_grad``, by indexing: a parameter keeps its identity, its storage and its layout.
All is checked before anything is written: an edit that fails has changed nothing. Nothing waits for a device: an index
out of range, and too few values for a mask, are seen beforehand on the CPU only, and reported by PyTorch on CUDA.
"""

import math
from collections.abc import Callable, Iterable, Sequence
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
    check_pairs,
    own_entries,
)
from lightning_plasticity.editing.initial import copy_to_cpu, reset_on_cpu
from lightning_plasticity.editing.optimizer_state import EntryState
from lightning_plasticity.editing.optimizer_state import OptimizerState as OptimizerState
from lightning_plasticity.editing.remainders import Remainders
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.layer_views import LayerView, layer_at, layers_of
from lightning_plasticity.names import submodule
from lightning_plasticity.shards import (
    bias_by_output,
    by_output,
    inputs_read,
    local,
    matrix,
    part_of,
    sum_over_shards,
)

T = TypeVar("T")
_Index: TypeAlias = tuple[Tensor | slice, ...]


class Editor:
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
        self._model = model
        self._state = EntryState(optimizers, optimizer_state)
        self._state.follow()
        self.remainders = Remainders(model)
        self._layers: dict[str, LayerView] = {}
        self._groups: dict[tuple[int, ...], Tensors] = {}  # of tensors that are written together
        self._initial_norms: dict[str, dict[str, Tensor]] = {}

    def close(self) -> None:
        """Remove the hooks that look after new entries in the steps that follow an edit."""
        self._state.close()

    @torch.no_grad()
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
        self._assign(layer.weight, (here,), values, math.prod(shape), layer.by_output)
        self.zero_bias(module, rows)

    @torch.no_grad()
    def scale_rows(self, module: str, rows: Tensor, factor: float) -> None:
        """Multiply these rows (outputs) of a layer's weight and bias by ``factor``."""
        layer = self._layer(module)
        check_index(rows, layer.weight, layer.outputs, module)
        part = by_output(layer, layer.weight)
        here, _ = part.find(0, rows)
        count = len(rows) * part.shape[1:].numel()
        self._assign(layer.weight, (here,), part.local[here] * factor, count, layer.by_output)
        if layer.bias is not None:
            bias = bias_by_output(layer, layer.bias)
            here, _ = bias.find(0, rows)
            count = len(rows) * layer.gates
            self._assign(layer.bias, (here,), bias.local[here] * factor, count, layer.bias_by_output)

    @torch.no_grad()
    def zero_bias(self, module: str, rows: Tensor) -> None:
        """Set these entries of a layer's bias to 0; a layer without bias stays as it is."""
        layer = self._layer(module)
        check_index(rows, layer.weight, layer.outputs, module)
        if layer.bias is not None:
            bias = bias_by_output(layer, layer.bias)
            here, _ = bias.find(0, rows)
            zero, count = bias.local.new_zeros(()), len(rows) * layer.gates
            self._assign(layer.bias, (here,), zero, count, layer.bias_by_output)

    @torch.no_grad()
    def zero_columns(self, module: str, columns: Tensor) -> None:
        """Set to 0 what a layer multiplies these inputs (features, or channels of a convolution with any groups) by."""
        layer = self._layer(module)
        check_index(columns, layer.weight, layer.inputs, module)
        part = matrix(layer, layer.weight)
        zero = part.local.new_zeros(())
        if layer.groups == 1:
            here, _ = part.find(1, columns)
            count = len(columns) * part.shape[0] * part.shape[2:].numel()
            self._assign(layer.weight, (slice(None), here), zero, count, layer.matrix)
            return
        chosen = _reads_one_of(columns, layer)
        mask = chosen.view(*chosen.shape, *(1,) * (len(part.shape) - 2)).expand(part.local.shape)
        torch.where(mask, zero, part.local, out=part.local)
        self._state.renew_masked(layer.weight, mask)

    @torch.no_grad()
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
        precise = torch.promote_types(layer.weight.dtype, torch.float32)
        part = matrix(layer, layer.weight)
        if layer.groups == 1:  # without the masks, which take most of the time
            here, given = part.find(1, columns)
            used = part.local[:, here].unsqueeze(-1).flatten(2).sum(-1, dtype=precise)
            # Not a product of matrices, which may be TF32.
            shift = (used * amounts[given].to(precise)).sum(1) * layer.seen_of_kernel
        else:
            chosen = _reads_one_of(columns, layer)
            given = amounts.new_zeros(layer.inputs, dtype=precise).index_copy(0, columns, amounts.to(precise))
            used = part.local.unsqueeze(-1).flatten(2).sum(-1, dtype=precise)
            shift = torch.where(chosen, used * given[inputs_read(layer)], 0.0).sum(1)
        [shift] = sum_over_shards([part.spread(shift, 0)], [layer.weight])
        bias = part_of(layer.bias)
        shift = bias.take(torch.where(shift.isfinite(), shift, 0.0), 0)
        shifted = bias.local.to(torch.promote_types(precise, layer.bias.dtype), copy=True)
        layer.bias_by_row(shifted).add_(shift)
        self._set([layer.bias], [shifted])

    @torch.no_grad()
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

    @torch.no_grad()
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

    @torch.no_grad()
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

    @torch.no_grad()
    def precise(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What whole parameters or buffers are: copies in float32, with what was kept, of those in half precision."""
        return self.remainders.read(tensors)

    @torch.no_grad()
    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Set whole parameters or buffers to ``values``. What float32 values have beyond half precision is kept."""
        check_pairs(tensors, values, "write", "values")
        if tensors:
            self._set(tensors, values)
            self._state.renew_whole(tensors)

    def scale(self, tensors: Sequence[Tensor], factors: Tensor | float) -> None:
        """Multiply whole parameters or buffers by a number, or each by its own entry of a tensor of one dimension."""
        if isinstance(factors, Tensor) and factors.shape != (len(tensors),):
            raise ValueError(
                f"scale needs one number, or a tensor with an entry for each of {len(tensors)} tensors, "
                f"but got one of shape {tuple(factors.shape)}."
            )
        if not tensors:
            return
        group = self._group(tensors)
        kernels = group.kernels()
        if kernels is not None and isinstance(factors, Tensor) and factors.dtype == tensors[0].dtype:
            kernels.scale(group, factors)
            group.written()
            self._state.renew_whole(tensors)
        else:
            each = list(factors.unbind()) if isinstance(factors, Tensor) else factors
            self._change(tensors, lambda values: torch._foreach_mul_(values, each))

    def add(self, tensors: Sequence[Tensor], amounts: Sequence[Tensor], factor: float = 1.0) -> None:
        """Add ``factor * amounts`` to whole parameters or buffers."""
        check_pairs(tensors, amounts, "add", "amounts")
        if tensors:
            self._change(tensors, lambda values: torch._foreach_add_(values, list(amounts), alpha=factor))

    def draw_towards(self, tensors: Sequence[Tensor], targets: Sequence[Tensor], rate: Tensor | float) -> None:
        """Take from whole parameters or buffers the ``rate``-fold of their distance from ``targets``, which stay."""
        check_pairs(tensors, targets, "draw_towards", "targets")
        if not tensors:
            return
        group = self._group(tensors, targets)
        kernels = group.kernels()
        if kernels is not None and isinstance(rate, float):
            kernels.pull(group, rate)
            group.written()
            self._state.renew_whole(tensors)
            return

        def draw(values: list[Tensor]) -> None:
            amounts = torch._foreach_sub(values, [local(target) for target in targets])
            torch._foreach_mul_(amounts, -rate)
            torch._foreach_add_(values, amounts)

        self._change(tensors, draw)

    def clamp(self, tensors: Sequence[Tensor], limits: Sequence[float] | float) -> None:
        """Bring every entry into ``[-limit, limit]``, one limit for all or one for each tensor, which may be a view.

        Optimizer state stays: a bound renews nothing.
        """
        if not tensors:
            return
        each = [limits] * len(tensors) if isinstance(limits, float | int) else list(limits)
        group = self._group(tensors)
        kernels = None if self._state.has_lbfgs else group.kernels()
        if kernels is not None:
            kernels.clamp(group, each)
            group.written()
        else:
            self._clamp(tensors, [local(tensor) for tensor in tensors], each)

    @torch.no_grad()
    def _clamp(self, tensors: Sequence[Tensor], held: Sequence[Tensor], limits: Sequence[float]) -> None:
        if self._state.has_lbfgs:  # which has to know of it, where anything is beyond the limit
            pairs = zip(tensors, held, limits, strict=True)
            changed = [t for t, own, limit in pairs if own.numel() and own.abs().amax() > limit]
            self._state.restart_lbfgs([t if t._base is None else t._base for t in changed])
        if held[0].is_cpu:  # one pass over each instead of two
            for values, limit in zip(held, limits, strict=True):
                values.clamp_(-limit, limit)
        else:
            torch._foreach_clamp_min_(list(held), [-limit for limit in limits])
            torch._foreach_clamp_max_(list(held), list(limits))

    @torch.no_grad()
    def _change(self, tensors: Sequence[Tensor], change: Callable[[list[Tensor]], None]) -> None:
        """Changes whole tensors in place, by their values in float32 where they are in half precision."""
        values = self.remainders.open(tensors)
        change(values)
        self.remainders.close(tensors, values)
        self._state.renew_whole(tensors)

    def _group(self, tensors: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> Tensors:
        key = (id(tensors[0]), len(tensors))
        group = self._groups.get(key)
        if group is None or not group.are(tensors, beside):
            group = self._groups[key] = Tensors(tensors, beside)
        return group

    def _set(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        torch._foreach_copy_([local(tensor) for tensor in tensors], list(values))
        self.remainders.close(tensors, values)

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
        self, tensor: Tensor, index: _Index, values: Tensor, count: int, view: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        """Writes to entries of the part of a tensor that is here; ``count`` are written on all ranks together."""
        view(local(tensor))[index] = values.to(tensor.dtype)
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
