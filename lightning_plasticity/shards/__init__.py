"""Tensors and layers that FSDP2 or tensor parallelism shares out among ranks: what this rank holds of them."""

from lightning_plasticity.shards.parts import Part, part_of
from lightning_plasticity.shards.sums import sum_over_shards
from lightning_plasticity.shards.tensors import is_shared_out, local, shared_out_as, whole

__all__ = [
    "Part",
    "is_shared_out",
    "local",
    "part_of",
    "shared_out_as",
    "sum_over_shards",
    "whole",
]
