"""Golden model of stage 4: the DMA engine."""

from .arbiter import Arbiter
from .axi import BusError, Memory
from .dma import DMA, Completion, Engine, Mismatch, Write
from .settings import Channel, Settings

__all__ = [
    "DMA",
    "Arbiter",
    "BusError",
    "Channel",
    "Completion",
    "Engine",
    "Memory",
    "Mismatch",
    "Settings",
    "Write",
]
