"""Golden model of the counters."""

from __future__ import annotations

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import FetchReason
from prestage_hw.contract.registers import CHANNEL_COUNTERS, COUNTERS

__all__ = ["ChannelCounters", "Counters"]


class Counters(dict[str, int]):
    """Counters by name, all of the contract's, unbounded; :meth:`register` gives them as
    registers see them.
    """

    def __init__(self) -> None:
        super().__init__({counter.name: 0 for counter in COUNTERS})

    def clear(self) -> None:
        """Set every counter to 0."""
        for name in self:
            self[name] = 0

    def register(self, name: str) -> int:
        """Counter wrapped to its width."""
        for counter in COUNTERS:
            if counter.name == name:
                return self[name] % (1 << counter.bits)
        raise ValueError(f"Counter must be one of {', '.join(self)}, not {name!r}")


class ChannelCounters:
    """Counters of each DMA channel; those of cycles stay 0.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    """

    def __init__(self, config: DeviceConfig) -> None:
        self._beats = config.tile_beats
        self._counts = [dict.fromkeys(CHANNEL_COUNTERS, 0) for _ in range(config.dma_channels)]

    def clear(self) -> None:
        """Set every counter to 0."""
        for counts in self._counts:
            for name in counts:
                counts[name] = 0

    def moved(self, channel: int, *, tiles: int) -> None:
        """Tiles that came whole."""
        self._counts[channel]["tiles"] += tiles
        self._counts[channel]["beats"] += tiles * self._beats

    def failed(self, channel: int, *, reason: int) -> None:
        """A tile that ended in an error; after one of the bus the rest of it came all the same."""
        self._counts[channel]["errors"] += 1
        if reason == FetchReason.BUS:
            self._counts[channel]["beats"] += self._beats

    def register(self, channel: int, name: str) -> int:
        """Counter wrapped to its width."""
        return self._counts[channel][name] % (1 << 32)
