"""What the monitor stands on: the features it reads, the metrics it keeps, the pictures it draws."""

from lightning_plasticity.monitoring.features import FeatureReader
from lightning_plasticity.monitoring.loop import LoopMonitor
from lightning_plasticity.monitoring.measures import Measures
from lightning_plasticity.monitoring.pictures import Record, picture

__all__ = [
    "FeatureReader",
    "LoopMonitor",
    "Measures",
    "Record",
    "picture",
]
