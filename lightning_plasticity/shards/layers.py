"""Layers whose parameters are shared out: which of their outputs and inputs belong to what this rank holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_plasticity.layer_views import LayerView
from lightning_plasticity.shards.parts import Part, part_of
from lightning_plasticity.shards.tensors import is_shared_out, local


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


def _seen(view: LayerView, tensor: Tensor, see: Callable[[Tensor], Tensor]) -> Part:
    if not is_shared_out(tensor):
        return Part(see(tensor), None)
    part = part_of(tensor).rows(view.rows)  # several rows to an output are not edited where they are shared out
    return part.swapped() if view.transposed else part


def bias_by_output(view: LayerView, tensor: Tensor) -> Part:
    """The part that this rank holds of a tensor of a layer's bias's shape, with the outputs first."""
    return part_of(tensor).rows(view.bias_rows) if is_shared_out(tensor) else Part(view.bias_by_output(tensor), None)


def bias_by_row(view: LayerView, tensor: Tensor) -> Part:
    """The part that this rank holds of a tensor of a layer's bias's shape, of what belongs to the layer's rows."""
    return part_of(tensor).rows(view.bias_rows) if is_shared_out(tensor) else Part(view.bias_by_row(tensor), None)


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
    if part.places(dim) is None:
        return part.local
    assert part.layout is not None
    return part.widen(part.local * part.layout.pieces[dim], dim)
