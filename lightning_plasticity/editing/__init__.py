"""All that writes: to weights, to the statistics of normalisation layers and to the state of optimizers."""

from lightning_plasticity.editing.editable import check_editable
from lightning_plasticity.editing.edits import Editor, OptimizerState
from lightning_plasticity.editing.initial import Init, InitialDistribution, Initializer

__all__ = [
    "Editor",
    "Init",
    "InitialDistribution",
    "Initializer",
    "OptimizerState",
    "check_editable",
]
