"""What is a layer's output and what its input, wherever in its module's parameters these lie."""

from lightning_plasticity.layer_views.combined import layer_at, layers_of, named_layers
from lightning_plasticity.layer_views.view import TORCH_LAYERS, LayerView, view_of

__all__ = ["TORCH_LAYERS", "LayerView", "layer_at", "layers_of", "named_layers", "view_of"]
