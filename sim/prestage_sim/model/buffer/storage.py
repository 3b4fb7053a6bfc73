"""The experts' bytes and which tiles of them are valid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig

__all__ = ["Storage"]

_Bytes = bytes | bytearray | memoryview | NDArray[np.uint8]


class Storage:
    """Bytes of every slot and the valid bits of its tiles.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are stored.

    Attributes
    ----------
    data : array of uint8, slots x expert_bytes
        All bytes; none where slots are the host's.
    valid : list of :class:`int`
        Tile-valid bits of each slot, tile 0 lowest.
    """

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config
        # Those behind an AXI4 write port are kept here, too: nobody else models that memory.
        kept = config.mover == "dma" or config.stores_slots
        size = config.expert_bytes if kept else 0
        self.data = np.zeros((config.slots, size), dtype=np.uint8)
        self.valid = [0] * config.slots

    def clear(self) -> None:
        """Make all tiles invalid. The data stay."""
        self.valid = [0] * self.config.slots

    def write_beat(self, slot: int, beat: int, data: _Bytes) -> None:
        """Write one beat.

        Raises
        ------
        ValueError
            If the slot or beat is out of range, or the data is not one beat long.
        """
        start = self._start(slot, beat)
        width = self.config.data_bytes
        if len(data) != width:
            raise ValueError(f"Beat must be {width} bytes, not {len(data)}")
        self.data[slot, start : start + width] = np.frombuffer(data, dtype=np.uint8)

    def write_expert(self, slot: int, data: _Bytes) -> None:
        """Write all beats of an expert; what lies behind it in the slot stays.

        Raises
        ------
        ValueError
            If the slot is out of range or the data is not one expert long.
        """
        self._start(slot, 0)
        if len(data) not in self.config.layer_sizes:
            sizes = " or ".join(map(str, sorted(set(self.config.layer_sizes))))
            raise ValueError(f"Expert must be {sizes} bytes, not {len(data)}")
        self.data[slot, : len(data)] = np.frombuffer(data, dtype=np.uint8)

    def read_beat(self, slot: int, beat: int) -> tuple[bytes, bool]:
        """Bytes of a beat, and whether its tile is valid.

        Raises
        ------
        ValueError
            If the slot or beat is out of range.
        """
        start = self._start(slot, beat)
        tile = beat // self.config.tile_beats
        data = self.data[slot, start : start + self.config.data_bytes]
        return data.tobytes(), bool(self.valid[slot] >> tile & 1)

    def _start(self, slot: int, beat: int) -> int:
        """Offset of a beat in its slot, in bytes."""
        if not 0 <= slot < self.config.slots:
            raise ValueError(f"Slot must be between 0 and {self.config.slots - 1}, not {slot}")
        if not 0 <= beat < self.config.expert_beats:
            raise ValueError(
                f"Beat must be between 0 and {self.config.expert_beats - 1}, not {beat}"
            )
        return beat * self.config.data_bytes
