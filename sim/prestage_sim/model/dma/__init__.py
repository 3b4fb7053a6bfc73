"""Golden model of stage 4: the DMA engine."""

from .axi import BusError, Memory
from .dma import DMA, Completion

__all__ = ["DMA", "BusError", "Completion", "Memory"]
