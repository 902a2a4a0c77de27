"""Which part of a tensor this rank holds, for parameters that FSDP2 or tensor parallelism has shared out among ranks.

A whole tensor is the simplest case, a part that is all of it: whoever writes through parts has one path for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_plasticity.distributed import sum_over_ranks, world_size
from lightning_plasticity.layer_views import LayerView

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


# FSDP1 with flat and with original parameters, and DeepSpeed stage 3.
_MARKS_OF_FLATTENING = ("_is_flat_param", "_fsdp_flattened", "ds_id")


def is_flattened(parameter: Tensor) -> bool:
    """Whether a parameter is a piece of a flat one, which does not know its shape."""
    return any(hasattr(parameter, mark) for mark in _MARKS_OF_FLATTENING)


def is_shared_out(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``, of which each rank may hold only a part.

    Example:
        >>> is_shared_out(torch.zeros(2))
        False
    """
    return dist.is_available() and isinstance(tensor, DTensor)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of a model that FSDP2 shards.

    Example:
        >>> sharded_modules(nn.Linear(1, 1))
        []
    """
    return [module for module in model.modules() if isinstance(module, FSDPModule)] if dist.is_available() else []


def splits_layers(model: nn.Module) -> bool:
    """Whether tensor parallelism splits layers of a model: then what one of its modules gives out may be a piece.

    FSDP2 alone cuts each parameter along one dimension of its mesh, and puts it together for the call.

    Example:
        >>> splits_layers(nn.Linear(1, 1))
        False
    """
    cuts = [
        sum(not placement.is_replicate() for placement in parameter.placements)
        for parameter in model.parameters()
        if is_shared_out(parameter)
    ]
    return max(cuts, default=0) > (1 if sharded_modules(model) else 0)


def shard_again(modules: Iterable[FSDPModule]) -> None:
    """Lets FSDP2 let go of the whole parameters that it keeps after a forward pass without a backward pass.

    So it does for the outermost module, as in validation. They stand in the place of the model's own parameters, so
    that who looks for those finds others, and what is written to those is not seen in the next forward pass.
    """
    for module in modules:
        module.reshard()


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the part of a rank lies in the whole.

    Attributes:
        shape: of the whole.
        places: for each dimension the indices in the whole of what the part has there, in order; None where it has all.
        pieces: for each dimension into how many pieces it is cut; a piece is a run of indices.
        piece: for each dimension which of these the part has, counted in the order of the whole.
    """

    shape: torch.Size
    places: tuple[Tensor | None, ...]
    pieces: tuple[int, ...]
    piece: tuple[int, ...]

    @cached_property
    def run(self) -> tuple[int, int]:
        """At which row of the whole the part begins, and how many rows it has."""
        rows = self.places[0]
        return (0, self.shape[0]) if rows is None else (int(rows[0]) if len(rows) else 0, len(rows))

    @cached_property
    def lookups(self) -> tuple[Tensor | None, ...]:
        """For each dimension the place in the part of each index of the whole, -1 where another rank has it."""
        return tuple(
            None if place is None else torch.full((size,), -1, device=place.device).index_copy(0, place, _count(place))
            for size, place in zip(self.shape, self.places, strict=True)
        )


def _rows_of(layout: Layout, rows: slice) -> Layout:
    first, last, _ = rows.indices(layout.shape[0])
    return _run_of(layout, first, last)


@lru_cache(maxsize=4096)
def _run_of(layout: Layout, first: int, last: int) -> Layout:
    """Where the part lies in the tensor that consists of these rows of the whole."""
    places = layout.places[0]
    inside = None if places is None else places[(places >= first) & (places < last)] - first
    return replace(layout, shape=torch.Size((last - first, *layout.shape[1:])), places=(inside, *layout.places[1:]))


def _count(places: Tensor) -> Tensor:
    return torch.arange(len(places), device=places.device)


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a tensor that this rank holds: a block of it, some indices of each dimension.

    Attributes:
        local: its values, in the memory of the tensor: what is written here is written to the tensor.
        layout: where it lies in the whole; None where it is the whole.

    Example:
        >>> layout = Layout(torch.Size([4, 2]), (torch.tensor([2, 3]), None), pieces=(2, 1), piece=(1, 0))
        >>> part = Part(torch.zeros(2, 2), layout)  # as the second of two ranks has it under FSDP2
        >>> part.find(0, torch.tensor([3, 0]))  # of rows 3 and 0 it has the first: in its own row 1
        (tensor([1]), tensor([0]))
        >>> part.take(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), 0).tolist(), part.spread(torch.ones(2), 0).tolist()
        ([[2.0], [3.0]], [0.0, 0.0, 1.0, 1.0])
    """

    local: Tensor
    layout: Layout | None

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.local.shape if self.layout is None else self.layout.shape

    @property
    def shards(self) -> int:
        """Of how many different parts the whole consists: 1 where every rank has all."""
        return 1 if self.layout is None else math.prod(self.layout.pieces)

    @property
    def share(self) -> float:
        """By what a value that each rank computes from its part is multiplied, so that the sum over all ranks is right.

        Every part is held by as many ranks, the world divided by the number of parts, and counts once.
        """
        return self.shards / world_size()

    def swapped(self) -> Part:
        """With the first two dimensions exchanged."""
        if self.layout is None:
            return Part(self.local.transpose(0, 1), None)
        first, second, *others = self.layout.shape
        (a, b, *rest), (x, y, *more), (i, j, *same) = self.layout.places, self.layout.pieces, self.layout.piece
        shape = torch.Size((second, first, *others))
        swapped = Layout(shape, (b, a, *rest), (y, x, *more), (j, i, *same))
        return Part(self.local.transpose(0, 1), swapped)

    def held_rows(self, rows: slice) -> slice:
        """Where in the part those of some rows of the whole tensor are that it has."""
        first, last, _ = rows.indices(self.shape[0])
        begin, count = (0, len(self.local)) if self.layout is None else self.layout.run
        inside = min(max(first - begin, 0), count)
        return slice(inside, max(min(last - begin, count), inside))

    def rows(self, rows: slice) -> Part:
        """The part of the tensor that consists of some rows of this one."""
        if rows == slice(None):
            return self
        return Part(self.local[self.held_rows(rows)], None if self.layout is None else _rows_of(self.layout, rows))

    def places(self, dim: int) -> Tensor | None:
        """The indices in the whole of what the part has in a dimension; None where it has all."""
        return None if self.layout is None else self.layout.places[dim]

    def find(self, dim: int, indices: Tensor) -> tuple[Tensor, Tensor | slice]:
        """Those of some indices of a dimension that are here: their places in the part, and among those given.

        Where all are here, ``(indices, slice(None))``. Otherwise this waits for the device.
        """
        lookup = None if self.layout is None else self.layout.lookups[dim]
        if lookup is None:
            return indices, slice(None)
        found = lookup[indices]
        here = (found >= 0).nonzero().squeeze(1)
        return found[here], here

    def take(self, values: Tensor, *dims: int) -> Tensor:
        """Of values over the whole of some dimensions, those that belong to the part.

        Args:
            values: in these dimensions as long as the whole tensor; a value for each of its entries if none is given.
            *dims: which dimensions, by their number in the tensor and in ``values`` alike.
        """
        for dim in dims or range(len(self.shape)):
            places = self.places(dim)
            values = values if places is None else values.index_select(dim, places.to(values.device))
        return values

    def widen(self, values: Tensor, *dims: int) -> Tensor:
        """From values over the part to values over the whole of some dimensions: 0 where others have them.

        What :meth:`take` takes again.
        """
        for dim in dims:
            places = self.places(dim)
            if places is not None:
                shape = [*values.shape]
                shape[dim] = self.shape[dim]
                values = values.new_zeros(shape).index_copy(dim, places, values)
        return values

    def spread(self, values: Tensor, dim: int) -> Tensor:
        """From one value for each place of the part in a dimension to one for each index of the whole: 0 elsewhere."""
        places = self.places(dim)
        if places is None:
            return values
        assert self.layout is not None
        return values.new_zeros(self.layout.shape[dim]).index_copy(0, places, values)


def part_of(tensor: Tensor) -> Part:
    """The part of a tensor that this rank holds; all of it for one that is not shared out.

    No rank talks. FSDP2, tensor parallelism and both together are understood, with parts of any size, and empty ones.

    Raises:
        RuntimeError: If the tensor is a sum of which each rank holds one term, so that no rank holds any entry.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> part_of(weight).local is weight
        True
    """
    if not is_shared_out(tensor):
        return Part(tensor, None)
    held = local(tensor)
    return Part(held, _layout(tensor.shape, tensor.placements, tensor.device_mesh, held.device))


def by_output(view: LayerView, tensor: Tensor) -> Part:
    """The part that this rank holds of a tensor of a layer's weight's shape, with the outputs first, then the inputs.

    Example:
        >>> from lightning_plasticity.layer_views import view_of
        >>> view = view_of(torch.nn.ConvTranspose2d(2, 3, 4))
        >>> by_output(view, view.weight).shape
        torch.Size([3, 2, 4, 4])
    """
    return _seen(view, tensor, view.by_output)


def matrix(view: LayerView, tensor: Tensor) -> Part:
    """The part that this rank holds of a tensor of a layer's weight's shape, with the rows first, then the inputs."""
    return _seen(view, tensor, view.matrix)


def bias_by_output(view: LayerView, tensor: Tensor) -> Part:
    """The part that this rank holds of a tensor of a layer's bias's shape, with the outputs first."""
    return part_of(tensor).rows(view.bias_rows) if is_shared_out(tensor) else Part(view.bias_by_output(tensor), None)


def bias_by_row(view: LayerView, tensor: Tensor) -> Part:
    """The part that this rank holds of a tensor of a layer's bias's shape, of what belongs to the layer's rows."""
    return part_of(tensor).rows(view.bias_rows) if is_shared_out(tensor) else Part(view.bias_by_row(tensor), None)


def _seen(view: LayerView, tensor: Tensor, see: Callable[[Tensor], Tensor]) -> Part:
    if not is_shared_out(tensor):
        return Part(see(tensor), None)
    part = part_of(tensor).rows(view.rows)  # several rows to an output are not edited where they are shared out
    return part.swapped() if view.transposed else part


def held_view(view: LayerView) -> LayerView:
    """A layer as it sees what this rank holds of its weight and its bias, and tensors of the same shapes.

    Example:
        >>> from lightning_plasticity.layer_views import view_of
        >>> view = view_of(torch.nn.Linear(2, 3))
        >>> held_view(view) is view
        True
    """
    if not is_shared_out(view.weight) or view.rows == view.bias_rows == slice(None):
        return view
    bias_rows = view.bias_rows if view.bias is None else part_of(view.bias).held_rows(view.bias_rows)
    return replace(view, rows=part_of(view.weight).held_rows(view.rows), bias_rows=bias_rows)


def own_here(view: LayerView) -> list[Tensor]:
    """A layer's weight and its bias; where it has only some rows of them, what this rank holds of these.

    Example:
        >>> from lightning_plasticity.layer_views import view_of
        >>> [tensor.shape for tensor in own_here(view_of(torch.nn.Linear(2, 3)))]
        [torch.Size([3, 2]), torch.Size([3])]
    """
    held = held_view(view)
    if held is view:
        return view.own()
    weight = local(view.weight)[held.rows]
    return [weight] if view.bias is None else [weight, held.bias_by_row(local(view.bias))]


def inputs_read(view: LayerView) -> Tensor:
    """Which of a layer's inputs each weight that is here is multiplied by: by row and column, or one row for all.

    Example:
        >>> from lightning_plasticity.layer_views import view_of
        >>> inputs_read(view_of(torch.nn.Conv1d(4, 2, 1, groups=2)))
        tensor([[0, 1],
                [2, 3]])
    """
    part, width = matrix(view, view.weight), view.inputs // view.groups
    rows, columns = (
        torch.arange(part.shape[dim], device=part.local.device) if (places := part.places(dim)) is None else places
        for dim in (0, 1)
    )
    if view.groups == 1:
        return columns.unsqueeze(0)
    return (rows // (view.outputs // view.groups) * width).unsqueeze(1) + columns


def heard_by_all(x: Tensor, dim: int) -> Tensor:
    """What a layer is given, with all channels, so that its mean over all ranks is the mean over examples.

    Where tensor parallelism splits the channels, those that others are given are 0, and the own ones count as many
    times as there are pieces.

    Args:
        x: the rank's own examples.
        dim: the dimension of channels.

    Example:
        >>> x = torch.ones(2, 3)
        >>> heard_by_all(x, -1) is x
        True
    """
    part = part_of(x)
    dim %= x.ndim
    places = part.places(dim)
    if places is None:
        return part.local
    assert part.layout is not None
    shape = list(part.local.shape)
    shape[dim] = part.shape[dim]
    return part.local.new_zeros(shape).index_copy(dim, places, part.local * part.layout.pieces[dim])


def local(tensor: Tensor) -> Tensor:
    """The values of a tensor that this rank holds, in the tensor's memory.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> local(weight) is weight
        True
    """
    if not is_shared_out(tensor):
        return tensor
    with torch.no_grad():  # without which this would be a copy for the backward pass
        return tensor.to_local()


def gradient(parameter: Tensor) -> Tensor | None:
    """A parameter's gradient, shared out as the parameter is.

    Under sequence parallelism each rank has a term of it: then the terms are added up, and all ranks must call this.

    Example:
        >>> gradient(torch.zeros(2, requires_grad=True)) is None
        True
    """
    found = parameter.grad
    if found is None or not is_shared_out(found) or not any(each.is_partial() for each in found.placements):
        return found
    assert is_shared_out(parameter), "what every rank holds for itself has a gradient of its own"
    return found.redistribute(placements=parameter.placements)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks, which must all call this; one that is not shared out as it is.

    Each rank then holds all of it: for one layer at a time, and only where parts do not do.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> whole(weight) is weight
        True
    """
    return tensor.full_tensor() if is_shared_out(tensor) else tensor


def shared_out_as(tensor: Tensor, held: Tensor) -> Tensor:
    """A tensor of which this rank holds ``held``, and which is shared out as another; ``held`` where that is whole.

    No rank talks.

    Example:
        >>> shared_out_as(torch.zeros(2), torch.ones(2))
        tensor([1., 1.])
    """
    if not is_shared_out(tensor):
        return held
    where = tensor.device_mesh, tensor.placements
    return DTensor.from_local(held, *where, run_check=False, shape=tensor.shape, stride=tensor.stride())


def for_state(tensor: Tensor) -> Tensor:
    """A tensor that is remembered, as state has it: a copy, or itself where it is shared out.

    Such are put together for a checkpoint, or copied, one by one, by who asks for the state.

    Example:
        >>> for_state(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor if is_shared_out(tensor) else tensor.clone()


def held_of(values: Tensor, tensor: Tensor) -> Tensor:
    """Of values for all entries of a tensor, those that belong to the part that this rank holds.

    Args:
        values: whole, as in a checkpoint, or shared out as the tensor.
        tensor: which may be shared out.

    Example:
        >>> held_of(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    return local(values) if is_shared_out(values) else part_of(tensor).take(values)


def sum_over_shards(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums that each rank has taken over its part of a tensor, put together to those over the whole tensor.

    All ranks must call this, with values of the same shapes and types in one order. All values of one type travel in a
    single message to all ranks, whatever the layouts; where no tensor is shared out nothing is sent. A part that
    several ranks hold counts once, and sums of integers are exact.

    Args:
        values: each computed from the part of a tensor, 0 where that is empty.
        tensors: for each value the tensor.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> sum_over_shards([part_of(weight).local.sum()], [weight])
        [tensor(3.)]
    """
    parts = [part_of(tensor) for tensor in tensors]
    shared = [i for i, part in enumerate(parts) if part.shards > 1]
    if not shared:
        return list(values)
    sums = sum_over_ranks([values[i] for i in shared])
    together = {i: _of_one_copy(total, world_size() // parts[i].shards) for i, total in zip(shared, sums, strict=True)}
    return [together.get(i, value) for i, value in enumerate(values)]


def whole_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Euclidean norms of whole tensors. Where some are shared out all ranks must call this, and send one message.

    Example:
        >>> whole_norms([torch.tensor([3.0, 4.0]), torch.zeros(0)], torch.float32)
        tensor([5., 0.])
    """
    held = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors], dtype=dtype))
    if not any(map(is_shared_out, tensors)):
        return held
    squares = sum_over_shards(list(held.double().square().unbind()), tensors)  # where float32 would overflow
    return torch.stack(squares).sqrt().to(dtype)


def _of_one_copy(total: Tensor, copies: int) -> Tensor:
    return total / copies if total.is_floating_point() else total // copies


@lru_cache(maxsize=4096)
def _layout(shape: torch.Size, placements: tuple[Any, ...], mesh: Any, device: torch.device) -> Layout | None:
    """Where the part of this rank lies; None where it has all."""
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"Parameters that are shared out among ranks must be split or copied, but one of shape {tuple(shape)} is "
            f"placed as {placements}: each rank holds a term of a sum. Redistribute it as Shard or Replicate."
        )
    places: list[Tensor | None] = [None] * len(shape)
    pieces, piece = [1] * len(shape), [0] * len(shape)
    coordinates = mesh.get_coordinate()
    # FSDP2 splits what tensor parallelism has left, and marks that by a split factor: it comes last, from the right.
    plain = [i for i, placement in enumerate(placements) if not hasattr(placement, "split_factor")]
    strided = [i for i in reversed(range(len(placements))) if i not in plain]
    for i in (*plain, *strided):
        dim = getattr(placements[i], "dim", None)
        if dim is None or mesh.size(i) == 1:
            continue
        dim %= len(shape)
        before = places[dim]
        held = torch.arange(shape[dim], device=device) if before is None else before
        chunks = torch.chunk(held, mesh.size(i))  # fewer than asked for where there is too little: the others are empty
        places[dim] = chunks[coordinates[i]] if coordinates[i] < len(chunks) else held[:0]
        pieces[dim] *= mesh.size(i)
        piece[dim] = piece[dim] * mesh.size(i) + coordinates[i]
    return Layout(shape, tuple(places), tuple(pieces), tuple(piece)) if math.prod(pieces) > 1 else None
