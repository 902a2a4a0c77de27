"""Keep neural networks able to learn: plasticity methods as Lightning callbacks, measures as torchmetrics metrics."""

from importlib.metadata import PackageNotFoundError, version

from lightning_plasticity.callbacks import (
    ActivationReset,
    ContinualBackprop,
    DirectionAwareShrink,
    HareAndTortoise,
    IsometryReinit,
    L2Init,
    LayerReset,
    OptimizerReset,
    ParsevalRegularization,
    PartialReset,
    PlasticityMonitor,
    ReDo,
    SelectiveReinit,
    SelfNormalizedReset,
    ShrinkAndPerturb,
    SoftWeightRescaling,
    SpectralRegularization,
    WeightClipping,
)
from lightning_plasticity.functional.activation_reset import ActivationStrategy
from lightning_plasticity.units import HiddenUnits, find_units

try:
    __version__ = version("lightning-plasticity")
except PackageNotFoundError:  # used from a checkout that was not installed
    __version__ = "unknown"

__all__ = [
    "ActivationReset",
    "ActivationStrategy",
    "ContinualBackprop",
    "DirectionAwareShrink",
    "HareAndTortoise",
    "HiddenUnits",
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
    "find_units",
]
