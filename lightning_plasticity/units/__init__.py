"""Which hidden units a network has: the weights that make each, and the weights that use it."""

from lightning_plasticity.names import named_modules_as_written, original
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.examining import ForwardError, is_examining
from lightning_plasticity.units.find import Findings, HiddenUnits, Slots, explore, find_units, table

__all__ = [
    "Findings",
    "ForwardCall",
    "ForwardError",
    "HiddenUnits",
    "Slots",
    "explore",
    "find_units",
    "is_examining",
    "named_modules_as_written",
    "original",
    "table",
]
