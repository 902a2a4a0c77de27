"""The strategies of the activation-adapted reset."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_plasticity import checks

_BOUNDED = frozenset(["tanh", "sigmoid", "softsign", "hardtanh", "hardsigmoid"])


@dataclass(frozen=True)
class ActivationStrategy:
    """How often units at the two ends of the ranking by mean activation are scaled, and by what.

    Attributes:
        low_rate: the share of mature units per step that is taken from the low end.
        high_rate: the same at the high end.
        low_scale: what the incoming weights and bias of a unit from the low end are multiplied by.
        high_scale: the same at the high end.
    """

    low_rate: float
    high_rate: float
    low_scale: float
    high_scale: float

    def __post_init__(self) -> None:
        for name, bounds in {"low_rate": (0, 1), "high_rate": (0, 1), "low_scale": (), "high_scale": ()}.items():
            least, most = bounds or (None, None)
            # the class is frozen for others
            object.__setattr__(self, name, checks.number(name, getattr(self, name), least=least, most=most))


RELU = ActivationStrategy(low_rate=1e-4, high_rate=1e-5, low_scale=-0.5, high_scale=0.5)
# Of the thesis's two candidates for these rates the better one on permuted MNIST: see examples/benchmarks/README.md.
TANH = ActivationStrategy(low_rate=1e-6, high_rate=1e-5, low_scale=0.5, high_scale=0.2)


def strategy_for(activation: str | None) -> ActivationStrategy:
    """The strategy for an activation function: that for tanh if it is bounded on both sides, otherwise that for ReLU.

    Example:
        >>> strategy_for("sigmoid") is TANH, strategy_for("gelu") is RELU, strategy_for(None) is RELU
        (True, True, True)
    """
    return TANH if activation in _BOUNDED else RELU
