"""Golden model of the DMA engine's mid end."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from prestage_hw.contract import DeviceConfig

from .settings import Channel, Settings

__all__ = ["Burst", "Cutter", "bursts"]


class Burst(NamedTuple):
    """One read burst of a tile."""

    address: int
    beats: int
    last: bool


class Cutter:
    """Cut a tile into bursts, one at a time, with the settings of the moment.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    address : :class:`int`
        Address of the tile.
    beats : :class:`int`
        Its size, at least 1.
    tile : :class:`int`
        Its number, which says how rows lie where the configuration has some.

    Attributes
    ----------
    wraps : :class:`bool`
        A row went past the top of the address space, which ended the tile.
    done : :class:`bool`
        The last burst was cut.
    """

    def __init__(self, config: DeviceConfig, address: int, beats: int, *, tile: int = 0) -> None:
        self.config = config
        self._rows = None
        if config.rows:
            part = bisect_right(config.first_tiles, tile) - 1
            self._rows = config.part_rows[part]
            position = (tile - config.first_tiles[part]) * config.tile_bytes
            self._before = position % self._rows.row_bytes  # Bytes of the first row before it.
        self.wraps = False
        self.done = False
        self._at = address
        self._left = beats  # All that is left,
        self._in_row = 0  # and what of it is in this row.
        self._row_start: int | None = None

    def _start_row(self, channel: Channel) -> None:
        config = self.config
        row_bytes, row_stride = channel.row_bytes, channel.row_stride
        if self._rows is not None:
            row_bytes, row_stride = self._rows[:2]
        if self._row_start is None:
            if self._rows is not None:
                self._row_start = (self._at - self._before) % (1 << config.address_bits)
                rest = row_bytes - self._before
                self._in_row = min(self._left, rest // config.data_bytes)
                return
            if row_bytes == 0:
                self._in_row = self._left
                return
            self._row_start = self._at
        else:
            following = self._row_start + row_stride
            if following >= (1 << config.address_bits) - config.tile_bytes:
                # The beat before is read again, to end the tile.
                self.wraps = True
                self._at = self._row_start
                self._left = self._in_row = 1
                return
            self._row_start = self._at = following
        self._in_row = min(self._left, row_bytes // config.data_bytes)

    def next(self, channel: Channel, *, aborted: bool = False) -> Burst:
        """The next burst: one beat, the last, if the tile was aborted."""
        size = self.config.data_bytes
        if not self._in_row:
            self._start_row(channel)
        if aborted:
            self.done = True
            return Burst(self._at, 1, True)
        longest = channel.burst_beats
        beats = min(self._in_row, longest - self._at // size % longest)
        burst = Burst(self._at, beats, beats == self._left)
        self._at += beats * size
        self._in_row -= beats
        self._left -= beats
        self.done = burst.last
        return burst


def bursts(
    config: DeviceConfig, address: int, channel: Channel | None = None, *, tile: int = 0
) -> tuple[list[tuple[int, int]], bool]:
    """Address and beats of each burst of the tile at ``address``, a multiple of a beat, and whether
    a row of it went past the top of the address space. ``tile`` is its number in the expert.

    A burst ends at each multiple of the longest one, which no 4 KiB edge lies within. Without a
    channel the settings are those of channel 0 after reset.
    """
    if channel is None:
        channel = Settings(config).active[0]
    cutter = Cutter(config, address, config.tile_beats, tile=tile)
    result = []
    while not cutter.done:
        burst = cutter.next(channel)
        result.append((burst.address, burst.beats))
    return result, cutter.wraps
