"""Golden model of writes to the memory that holds the slots."""

from __future__ import annotations

from prestage_hw.contract import DeviceConfig

from .axi import EDGE_BYTES

__all__ = ["write_bursts"]

#: Beats of the longest burst.
_LONGEST = 16


def write_bursts(
    config: DeviceConfig, slot: int, tile: int, beats: int, *, base: int = 0
) -> list[tuple[int, int]]:
    """Address and beats of each write burst of the first beats of a tile, in order.

    A burst ends at each multiple of 16 beats of the tile, and within 4 KiB.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    slot, tile : :class:`int`
        Where the tile goes.
    beats : :class:`int`
        Beats of it that are written.
    base : :class:`int`
        Address of slot 0.
    """
    longest = min(_LONGEST, EDGE_BYTES // config.data_bytes)
    start = base + slot * config.expert_bytes + tile * config.tile_bytes
    return [
        ((start + at * config.data_bytes) % (1 << config.address_bits), min(longest, beats - at))
        for at in range(0, beats, longest)
    ]
