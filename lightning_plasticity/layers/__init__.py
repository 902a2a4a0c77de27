"""Which layers a network calls and in which order, and what follows when their weights are changed."""

from lightning_plasticity.layers.flow import CalledLayer, Flow, trace
from lightning_plasticity.layers.matrices import Matrices
from lightning_plasticity.layers.rescaling import Rescaling, plan
from lightning_plasticity.layers.trained import LayerWeights
from lightning_plasticity.layers.weights import (
    LayerPatterns,
    find_bias,
    find_biases,
    find_norm_parameters,
    find_parameters,
    find_weights,
    has_inputs_first,
    weights_in_words,
)

__all__ = [
    "CalledLayer",
    "Flow",
    "LayerPatterns",
    "LayerWeights",
    "Matrices",
    "Rescaling",
    "find_bias",
    "find_biases",
    "find_norm_parameters",
    "find_parameters",
    "find_weights",
    "has_inputs_first",
    "plan",
    "trace",
    "weights_in_words",
]
