"""Which weights of layers a step of an optimizer has trained, for methods that nudge them after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity.layers.weights import LayerPatterns, find_weights
from lightning_plasticity.notices import warn_on_rank_zero

K = TypeVar("K")


def by_groups(function: Callable[[Tensor, K], Tensor], tensors: Sequence[Tensor], keys: Sequence[K]) -> list[Tensor]:
    """What a function makes of each tensor: on an accelerator as many operations as groups do for all.

    Args:
        function: of the tensors of one shape, type, device and key in one tensor, as its first dimension, and the key.
        tensors: any.
        keys: one for each tensor.

    Example:
        >>> import torch
        >>> by_groups(torch.mul, [torch.ones(2), torch.ones(1), torch.zeros(2)], [3.0, 2.0, 3.0])
        [tensor([3., 3.]), tensor([2.]), tensor([0., 0.])]
    """
    results = [*tensors]
    for places in groups_of(tensors, keys):
        batch = stacked([tensors[place] for place in places])
        for place, result in zip(places, function(batch, keys[places[0]]).unbind(), strict=True):
            results[place] = result
    return results


def groups_of(tensors: Sequence[Tensor], keys: Sequence[Any]) -> list[list[int]]:
    """The places of tensors of one shape, type, device and key each.

    Example:
        >>> import torch
        >>> groups_of([torch.ones(2), torch.ones(1), torch.zeros(2)], [0, 0, 0])
        [[0, 2], [1]]
    """
    groups: dict[Any, list[int]] = {}
    for place, (tensor, key) in enumerate(zip(tensors, keys, strict=True)):
        groups.setdefault((tensor.shape, tensor.dtype, tensor.device, key), []).append(place)
    return [*groups.values()]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape in one, a view of it where there is only one.

    Example:
        >>> import torch
        >>> stacked([torch.ones(2)])
        tensor([[1., 1.]])
    """
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack([*tensors])


def each_times(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor times its own factor, a tensor of no dimension: on an accelerator a few operations do all.

    Example:
        >>> import torch
        >>> each_times([torch.ones(2), torch.ones(1)], [torch.tensor(3.0), torch.tensor(2.0)])
        [tensor([3., 3.]), tensor([2.])]
    """
    kinds = {(tensor.dtype, tensor.device) for tensor in (*tensors, *factors)}
    if not tensors or tensors[0].is_cpu or len(kinds) > 1:
        return list(torch._foreach_mul(list(tensors), list(factors))) if tensors else []
    sizes = tuple(tensor.numel() for tensor in tensors)
    each = torch.stack(list(factors))[_numbers(sizes, tensors[0].device)]
    products = torch.cat([tensor.flatten() for tensor in tensors]) * each
    return [own.view(tensor.shape) for own, tensor in zip(torch.split(products, list(sizes)), tensors, strict=True)]


@lru_cache(maxsize=64)
def _numbers(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """For each entry of tensors of these sizes the number of its tensor."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)


@lru_cache(maxsize=64)
def numbers_on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    """Some numbers as a tensor, made once: to copy them at every step would take an operation.

    Example:
        >>> import torch
        >>> numbers_on(torch.device("cpu"), (1.0, 2.0))
        tensor([1., 2.])
    """
    return torch.tensor(numbers, device=device)


class LayerWeights:
    """The weights of linear, convolution and attention layers that a method works on.

    Frozen ones are among them: they may be unfrozen, and join an optimizer, while training goes on.

    Args:
        method: the method's name, for errors.
        model: the network.
        scope: the name of the module in it to search, empty for all of it.
        patterns: which layers are meant.
        optimizers: those that train the network. Without any, all weights that require gradients are trained.
        leaves_out: parameters that the method does not work on.

    Raises:
        ValueError: If there are none.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> import torch
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> weights = LayerWeights("A method", model, "", LayerPatterns(("*",), ()), [optimizer])
        >>> [(rate, [weights.names[weight] for weight in trained]) for rate, trained in weights.trained_by(optimizer)]
        [(0.5, ['0.weight'])]
    """

    def __init__(
        self,
        method: str,
        model: nn.Module,
        scope: str,
        patterns: LayerPatterns,
        optimizers: Sequence[Optimizer],
        leaves_out: Set[Tensor] = frozenset(),
    ) -> None:
        found = find_weights(model, scope, patterns)
        self.names = {weight: name for name, weight in found.items() if weight not in leaves_out}
        where = scope or type(model).__name__
        if not self.names:
            raise ValueError(
                f"{method} needs weights of linear, convolution or attention layers, but {patterns} leaves none that "
                f"it works on in {where!r}. Change include=, exclude= or module=."
            )
        trained: Sequence[Optimizer | None] = optimizers or [None]
        if not any(weights for optimizer in trained for _, weights in self.trained_by(optimizer)):
            warn_on_rank_zero(
                f"{method} has nothing to do yet, for each of the {len(self.names)} weights that it works on in "
                f"{where!r} is frozen or belongs to no optimizer. It begins with those that are unfrozen and handed to "
                "an optimizer while training goes on."
            )

    def trained_by(self, optimizer: Optimizer | None) -> Iterator[tuple[Tensor | float, list[nn.Parameter]]]:
        """The weights in each group of an optimizer with the group's learning rate, where there are any."""
        whole: dict[str, Any] = {"params": list(self.names), "lr": 1.0}
        groups = [whole] if optimizer is None else optimizer.param_groups
        for group in groups:
            weights = [p for p in group["params"] if p in self.names and p.requires_grad]
            if weights:
                yield group["lr"], weights
