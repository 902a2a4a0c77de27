"""What methods stand on: when an optimizer has stepped, which units there are, how active and how old they are."""

from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.forward import ForwardCall
from lightning_plasticity.engine.population import Population
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback

__all__ = [
    "ForwardCall",
    "PlasticityCallback",
    "Population",
    "Schedule",
    "ScheduledCallback",
]
