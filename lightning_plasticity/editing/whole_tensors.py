"""Edits of whole parameters and buffers: set, scaled, drawn towards others, held within bounds."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity.editing.editable import check_pairs
from lightning_plasticity.editing.grad_mode import without_gradients
from lightning_plasticity.editing.optimizer_state import EntryState, OptimizerState
from lightning_plasticity.editing.remainders import Remainders
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.shards.tensors import local


class WholeEditor:
    """The edits of an :class:`.Editor` that concern all entries of tensors.

    Args:
        model, optimizers, optimizer_state: see :class:`.Editor`.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer], optimizer_state: OptimizerState) -> None:
        self._model = model
        self._state = EntryState(optimizers, optimizer_state)
        self._state.follow()
        self.remainders = Remainders(model)
        self._groups: dict[tuple[int, ...], Tensors] = {}  # of tensors that are written together

    def close(self) -> None:
        """Remove the hooks that look after new entries in the steps that follow an edit."""
        self._state.close()

    @without_gradients
    def precise(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What whole parameters or buffers are: copies in float32, with what was kept, of those in half precision."""
        return self.remainders.read(tensors)

    @without_gradients
    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Set whole parameters or buffers to ``values``. What float32 values have beyond half precision is kept."""
        check_pairs(tensors, values, "write", "values")
        if tensors:
            torch._foreach_copy_([local(tensor) for tensor in tensors], list(values))
            self.remainders.close(tensors, values)
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

    @without_gradients
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

    @without_gradients
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
