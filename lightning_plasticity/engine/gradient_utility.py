"""The running average of what weights contribute to the loss, over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.functional.selection import mean_of_all
from lightning_plasticity.functional.selective_reinit import gradient_utilities
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.shards.parts import held_of
from lightning_plasticity.shards.tensors import for_state, gradient, local, shared_out_as


class GradientUtility:
    r"""The average :math:`u \leftarrow \eta u + (1 - \eta) |w \cdot \partial L / \partial w|` of each weight.

    Averages begin at 0, and are corrected for it when they are read. Of a tensor that is shared out among ranks each
    keeps those of its part.

    Args:
        decay_rate: :math:`\eta`; with 0.0 the average is the last value.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
        >>> weight.grad = torch.tensor([0.5, 0.5])
        >>> utility = GradientUtility(0.9)
        >>> utility.update({"weight": weight})
        >>> utility.read("weight")
        tensor([1.0000, 0.5000])
    """

    def __init__(self, decay_rate: float) -> None:
        self._decay_rate = decay_rate
        self._averages: dict[str, Tensor] = {}
        self._updates: dict[str, int] = {}
        self._together = Tensors([])  # averages, and beside them the weights

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the gradients of those weights that have one."""
        found = {name: (weight, gradient(weight)) for name, weight in weights.items()}
        seen = {name: (local(weight), local(grad)) for name, (weight, grad) in found.items() if grad is not None}
        if not seen:
            return
        for name, (weight, _) in seen.items():
            if name not in self._averages:
                wide = torch.promote_types(weight.dtype, torch.float32)
                self._averages[name] = torch.zeros_like(weight, dtype=wide)
            self._updates[name] = self._updates.get(name, 0) + 1
        self._average_in([self._averages[name] for name in seen], *zip(*seen.values(), strict=True))

    def _average_in(self, averages: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if not self._together.are(averages, weights):
            self._together = Tensors(averages, weights)
        found, kernels = Tensors(gradients, weights), self._together.kernels()  # not held: gradients are let go
        if kernels is not None and found.kernels() is kernels:
            kernels.average_utilities(self._together, found, 1 - self._decay_rate)
            return
        utilities = gradient_utilities(weights, gradients)
        same_types = [utility.to(average.dtype) for utility, average in zip(utilities, averages, strict=True)]
        # what is not finite says nothing
        same_types = [torch.where(u * 0 == 0, u, a) for u, a in zip(same_types, averages, strict=True)]
        torch._foreach_lerp_(list(averages), same_types, 1 - self._decay_rate)

    def __contains__(self, name: str) -> bool:
        """Whether a gradient of a tensor of weights has been seen."""
        return name in self._averages

    def read(self, name: str) -> Tensor:
        """The average of a tensor of weights, of which a gradient has been seen."""
        return self._averages[name] / (1 - self._decay_rate ** self._updates[name])

    def renew(self, name: str, mask: Tensor, weight: Tensor) -> None:
        """Forget the record of the masked weights: they get the tensor's mean average."""
        self._averages[name].masked_fill_(mask, mean_of_all(self._averages[name], weight))

    def forget(self, name: str) -> None:
        """Begin the average of a tensor anew."""
        self._averages.pop(name)
        self._updates.pop(name)

    def state_dict(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The averages, shared out as the weights are, and how many steps are in them, for a checkpoint."""
        averages = {name: for_state(shared_out_as(weights[name], a)) for name, a in self._averages.items()}
        return {"averages": averages, "updates": dict(self._updates)}

    def load_state_dict(self, state_dict: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Put back the averages of a checkpoint, or of them what belongs to the parts of these weights."""
        self._averages = {
            name: held_of(average, weights[name]).to(weights[name].device, copy=True)
            for name, average in state_dict["averages"].items()
        }
        self._updates = dict(state_dict["updates"])
