"""Golden model of the checksums of experts."""

from __future__ import annotations

import zlib

from prestage_hw.contract import DeviceConfig

__all__ = ["Checksums"]


class Checksums:
    """CRC-32 of each expert, as :func:`zlib.crc32` has it; none is loaded at first.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    """

    def __init__(self, config: DeviceConfig) -> None:
        self._experts = config.model.experts
        self._sums: list[int | None] = [None] * (config.model.layers * config.model.experts)
        self.words = len(self._sums) if config.checksums else 0

    def good(self, layer: int, expert: int, data: bytes) -> bool:
        """Whether an expert's bytes have its checksum, if one was loaded."""
        wanted = self._sums[layer * self._experts + expert]
        return wanted is None or zlib.crc32(data) == wanted

    def read(self, word: int) -> int:
        """Checksum of an expert, 0 where none was loaded."""
        return (self._sums[word] or 0) if word < self.words else 0

    def write(self, word: int, value: int) -> None:
        """Load the checksum of an expert."""
        if word < self.words:
            self._sums[word] = value

    def clear(self) -> None:
        """Unload all."""
        self._sums = [None] * len(self._sums)
