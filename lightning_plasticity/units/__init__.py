"""Which hidden units a network has: the weights that make each, and the weights that use it."""

from lightning_plasticity.units.find import Findings, HiddenUnits, Slots, explore, find_units, original, table

__all__ = [
    "Findings",
    "HiddenUnits",
    "Slots",
    "explore",
    "find_units",
    "original",
    "table",
]
