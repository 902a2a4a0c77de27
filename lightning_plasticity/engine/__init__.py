"""What methods stand on: when an optimizer has stepped, which units there are, how active and how old they are."""

from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.examination import Examination, Part
from lightning_plasticity.engine.population import Population
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback
from lightning_plasticity.engine.unit_callback import UnitCallback

__all__ = [
    "Examination",
    "Part",
    "PlasticityCallback",
    "Population",
    "Schedule",
    "ScheduledCallback",
    "UnitCallback",
]
