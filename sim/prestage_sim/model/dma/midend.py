"""Golden model of the DMA engine's mid end."""

from __future__ import annotations

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

    Attributes
    ----------
    wraps : :class:`bool`
        A row went past the top of the address space, which ended the tile.
    done : :class:`bool`
        The last burst was cut.
    """

    def __init__(self, config: DeviceConfig, address: int, beats: int) -> None:
        self.config = config
        self.wraps = False
        self.done = False
        self._at = address
        self._left = beats  # All that is left,
        self._in_row = 0  # and what of it is in this row.
        self._row_start: int | None = None

    def _start_row(self, channel: Channel) -> None:
        config = self.config
        if self._row_start is None:
            if channel.row_bytes == 0:
                self._in_row = self._left
                return
            self._row_start = self._at
        else:
            following = self._row_start + channel.row_stride
            if following >= (1 << config.address_bits) - config.tile_bytes:
                # The beat before is read again, to end the tile.
                self.wraps = True
                self._at = self._row_start
                self._left = self._in_row = 1
                return
            self._row_start = self._at = following
        self._in_row = min(self._left, channel.row_bytes // config.data_bytes)

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
    config: DeviceConfig, address: int, channel: Channel | None = None
) -> tuple[list[tuple[int, int]], bool]:
    """Address and beats of each burst of the tile at ``address``, a multiple of a beat, and whether
    a row of it went past the top of the address space.

    A burst ends at each multiple of the longest one, which no 4 KiB edge lies within. Without a
    channel the settings are those of channel 0 after reset.
    """
    if channel is None:
        channel = Settings(config).active[0]
    cutter = Cutter(config, address, config.tile_beats)
    result = []
    while not cutter.done:
        burst = cutter.next(channel)
        result.append((burst.address, burst.beats))
    return result, cutter.wraps
