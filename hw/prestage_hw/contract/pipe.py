"""What a device looks like from the host: a pair of byte streams, and what a simulated one adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .params import DeviceConfig

__all__ = ["TRANSFER_DTYPE", "Pipe", "SimulatedPipe", "slot_tiles"]

#: One read burst as the memory saw it, with the cycles of its address and of its last beat.
TRANSFER_DTYPE = np.dtype(
    [("start", "<u8"), ("end", "<u8"), ("address", "<u8"), ("bytes", "<u4"), ("failed", "<u4")]
)


@runtime_checkable
class Pipe(Protocol):
    """Byte streams to and from a device."""

    def exchange(self, data: bytes, *, frames: int = 1, limit: float | None = None) -> bytes:
        """Send ``data`` and return what came back.

        Parameters
        ----------
        data : :class:`bytes`
            Bytes for the device, any number of whole frames.
        frames : :class:`int`
            Return once this many frames have ended in what comes back; 0 returns as soon as
            ``data`` is sent.
        limit : :class:`float` or None
            Give up waiting after this time: clock cycles on a simulated device, microseconds on a
            board. None stands for a default of the device's own.
        """

    def close(self) -> None:
        """Release the device. A second call does nothing."""


@runtime_checkable
class SimulatedPipe(Pipe, Protocol):
    """A simulated device, which has a memory, a clock and a consumer port of its own."""

    @property
    def cycles(self) -> int:
        """Clock cycles since reset; 0 for ever on a device without a clock."""

    @property
    def clocked(self) -> bool:
        """True if the device has a clock, so that timed pace makes sense."""

    def run(self, cycles: int) -> bytes:
        """Let ``cycles`` clock cycles pass; returns the bytes that came back meanwhile."""

    def read_slot(self, slot: int, *, size: int | None = None) -> bytes:
        """The first ``size`` bytes of a slot, or all, through the consumer port.

        Raises ``OSError`` if a tile of them isn't valid.
        """

    def compare(
        self, slots: Sequence[int], layers: Sequence[int], experts: Sequence[int]
    ) -> list[int]:
        """Compare every byte of experts in slots, read through the consumer port, with memory.

        Returns the positions (indices into ``slots``) that differ or hold an invalid tile: empty if
        all is well.
        """

    def transfers(self) -> NDArray[np.void]:
        """Bursts so far as an array of :data:`TRANSFER_DTYPE`, oldest first.

        At least the last 65,536 are kept. The array is empty on a device without a clock.
        """


def slot_tiles(config: DeviceConfig, size: int | None) -> int:
    """Tiles that the first ``size`` bytes of a slot are; None stands for a whole slot.

    Raises
    ------
    ValueError
        If a slot doesn't have so many whole tiles.
    """
    if size is None:
        return config.tiles
    if not 0 < size <= config.expert_bytes or size % config.tile_bytes:
        raise ValueError(
            f"Size must be a whole number of {config.tile_bytes}-byte tiles, at most"
            f" {config.expert_bytes} bytes, not {size}"
        )
    return size // config.tile_bytes
