"""What a user adds to a Trainer: a callback for each method, and the monitor."""

from lightning_plasticity.callbacks.activation_reset import ActivationReset
from lightning_plasticity.callbacks.continual_backprop import ContinualBackprop
from lightning_plasticity.callbacks.direction_aware_shrink import DirectionAwareShrink
from lightning_plasticity.callbacks.hare_and_tortoise import HareAndTortoise
from lightning_plasticity.callbacks.isometry_reinit import IsometryReinit
from lightning_plasticity.callbacks.l2_init import L2Init
from lightning_plasticity.callbacks.layer_reset import LayerReset
from lightning_plasticity.callbacks.monitor import PlasticityMonitor
from lightning_plasticity.callbacks.optimizer_reset import OptimizerReset
from lightning_plasticity.callbacks.parseval_regularization import ParsevalRegularization
from lightning_plasticity.callbacks.partial_reset import PartialReset
from lightning_plasticity.callbacks.redo import ReDo
from lightning_plasticity.callbacks.selective_reinit import SelectiveReinit
from lightning_plasticity.callbacks.self_normalized_reset import SelfNormalizedReset
from lightning_plasticity.callbacks.shrink_and_perturb import ShrinkAndPerturb
from lightning_plasticity.callbacks.soft_weight_rescaling import SoftWeightRescaling
from lightning_plasticity.callbacks.spectral_regularization import SpectralRegularization
from lightning_plasticity.callbacks.weight_clipping import WeightClipping

__all__ = [
    "ActivationReset",
    "ContinualBackprop",
    "DirectionAwareShrink",
    "HareAndTortoise",
    "IsometryReinit",
    "L2Init",
    "LayerReset",
    "OptimizerReset",
    "ParsevalRegularization",
    "PartialReset",
    "PlasticityMonitor",
    "ReDo",
    "SelectiveReinit",
    "SelfNormalizedReset",
    "ShrinkAndPerturb",
    "SoftWeightRescaling",
    "SpectralRegularization",
    "WeightClipping",
]
