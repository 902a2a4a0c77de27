"""Pure functions: the mathematics of the methods and measures."""

from lightning_plasticity.functional.accuracy import accuracy_slope, online_accuracy
from lightning_plasticity.functional.activity import (
    dead_units,
    dormant_units,
    duplicate_units,
    linearized_units,
    rarely_active_units,
    saturated_units,
    sign_entropy,
)
from lightning_plasticity.functional.churn import churn
from lightning_plasticity.functional.gradients import (
    gradient_covariance,
    gradient_dormancy,
    gradient_norm,
    per_sample_gradients,
    summarize_covariance,
    zero_gradient_fraction,
)
from lightning_plasticity.functional.hessian import hessian_spectrum, summarize_spectrum
from lightning_plasticity.functional.ntk import ntk_rank
from lightning_plasticity.functional.rank import effective_rank, feature_rank, stable_rank
from lightning_plasticity.functional.readiness import optimization_readiness
from lightning_plasticity.functional.redundancy import local_redundancy
from lightning_plasticity.functional.sharpness import sharpness
from lightning_plasticity.functional.trainability import trainability
from lightning_plasticity.functional.weights import (
    balancedness,
    distance_from_init,
    isometry_deviation,
    update_ratio,
    weight_magnitude,
    weight_norm,
    weight_norms,
)

__all__ = [
    "accuracy_slope",
    "balancedness",
    "churn",
    "dead_units",
    "distance_from_init",
    "dormant_units",
    "duplicate_units",
    "effective_rank",
    "feature_rank",
    "gradient_covariance",
    "gradient_dormancy",
    "gradient_norm",
    "hessian_spectrum",
    "isometry_deviation",
    "linearized_units",
    "local_redundancy",
    "ntk_rank",
    "online_accuracy",
    "optimization_readiness",
    "per_sample_gradients",
    "rarely_active_units",
    "saturated_units",
    "sharpness",
    "sign_entropy",
    "stable_rank",
    "summarize_covariance",
    "summarize_spectrum",
    "trainability",
    "update_ratio",
    "weight_magnitude",
    "weight_norm",
    "weight_norms",
    "zero_gradient_fraction",
]
