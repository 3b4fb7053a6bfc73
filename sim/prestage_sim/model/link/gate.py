"""Golden model of the gate: which of the host's writes reach a slot."""

from __future__ import annotations

from collections.abc import Callable

from prestage_hw.contract.params import DeviceConfig, require_config
from prestage_hw.contract.records import RECORDS

__all__ = ["WriteGate"]


class WriteGate:
    """Let through what the host writes to tiles that it was asked for, and count their beats.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose slots the host writes.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self._config = config
        self._missing: dict[tuple[int, int], int] = {}  # beats of each open tile, by slot and tile
        self._write: Callable[[int, int, bytes], None] | None = None
        self._refuse: Callable[[], None] | None = None

    def connect(self, write: Callable[[int, int, bytes], None], refuse: Callable[[], None]) -> None:
        """Say who takes beats, by slot and number, and who counts those that are dropped."""
        self._write = write
        self._refuse = refuse

    def open(self, slot: int, tile: int) -> None:
        """The host was asked for a tile."""
        self._missing[slot, tile] = self._config.tile_beats

    def close(self, slot: int, tile: int) -> None:
        """The tile was reported, or is given up."""
        self._missing.pop((slot, tile), None)

    def whole(self, slot: int, tile: int) -> bool:
        """Whether as many beats of an open tile were let through as it has."""
        return self._missing.get((slot, tile)) == 0

    def write(self, slot: int, beat: int, data: bytes) -> bool:
        """Take one beat of the host; False if it is dropped."""
        assert self._write is not None and self._refuse is not None
        place = slot, beat // self._config.tile_beats
        if place not in self._missing:
            self._refuse()
            return False
        self._missing[place] = max(0, self._missing[place] - 1)
        self._write(slot, beat, data)
        return True

    def receive(self, body: bytes) -> None:
        """Take the body of a WRITE."""
        slot, beat, data = RECORDS["BufferWrite"].unpack(self._config, body).values()
        assert isinstance(slot, int) and isinstance(beat, int) and isinstance(data, tuple)
        self.write(slot, beat, bytes(data))
