"""Modules whose parameters are shared out among ranks by FSDP2, and whether their layers are split, too."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn

from lightning_plasticity.shards.tensors import is_shared_out

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule


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
