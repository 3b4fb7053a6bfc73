"""DMA engine: tiles of experts from an AXI4 memory into the buffer's slots.

``frontend`` takes requests, ``midend`` cuts tiles into bursts, ``backend`` speaks AXI4, ``writer``
writes slots that are in a memory, ``dma`` joins them, and ``rom`` is a memory for boards without
one.
"""

from .axi import AXI4ReadSignature, AXI4WriteSignature
from .dma import DMA
from .rom import AXIBlockMemory

__all__ = ["DMA", "AXI4ReadSignature", "AXI4WriteSignature", "AXIBlockMemory"]
