"""Measures of plasticity as torchmetrics metrics."""

from lightning_plasticity.metrics.accuracy import OnlineAccuracy, TaskAccuracy
from lightning_plasticity.metrics.activity import (
    DeadUnits,
    DormantUnits,
    DuplicateUnits,
    LinearizedUnits,
    RarelyActiveUnits,
    SaturatedUnits,
    SignEntropy,
)
from lightning_plasticity.metrics.churn import Churn
from lightning_plasticity.metrics.gradients import (
    GradientCovariance,
    GradientDormancy,
    GradientNorm,
    ZeroGradientFraction,
)
from lightning_plasticity.metrics.hessian import HessianSpectrum
from lightning_plasticity.metrics.ntk import NTKRank
from lightning_plasticity.metrics.rank import EffectiveRank, FeatureRank, StableRank
from lightning_plasticity.metrics.readiness import OptimizationReadiness
from lightning_plasticity.metrics.redundancy import LocalRedundancy
from lightning_plasticity.metrics.sharpness import Sharpness
from lightning_plasticity.metrics.trainability import TrainabilityProbe
from lightning_plasticity.metrics.weights import (
    Balancedness,
    DistanceFromInit,
    IsometryDeviation,
    UpdateRatio,
    WeightMagnitude,
    WeightNorm,
)

__all__ = [
    "Balancedness",
    "Churn",
    "DeadUnits",
    "DistanceFromInit",
    "DormantUnits",
    "DuplicateUnits",
    "EffectiveRank",
    "FeatureRank",
    "GradientCovariance",
    "GradientDormancy",
    "GradientNorm",
    "HessianSpectrum",
    "IsometryDeviation",
    "LinearizedUnits",
    "LocalRedundancy",
    "NTKRank",
    "OnlineAccuracy",
    "OptimizationReadiness",
    "RarelyActiveUnits",
    "SaturatedUnits",
    "Sharpness",
    "SignEntropy",
    "StableRank",
    "TaskAccuracy",
    "TrainabilityProbe",
    "UpdateRatio",
    "WeightMagnitude",
    "WeightNorm",
    "ZeroGradientFraction",
]
