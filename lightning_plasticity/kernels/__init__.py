"""Kernels that do in one call, for all layers, what an ordinary step needs, with the same results as PyTorch."""

from lightning_plasticity.kernels.choice import kernels_are_on, kernels_on, use_kernels
from lightning_plasticity.kernels.tensors import Tensors

__all__ = ["Tensors", "kernels_are_on", "kernels_on", "use_kernels"]
