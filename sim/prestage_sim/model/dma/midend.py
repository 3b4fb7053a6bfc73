"""Golden model of the DMA engine's mid end."""

from __future__ import annotations

from prestage_hw.contract import DeviceConfig

from .axi import EDGE_BYTES

__all__ = ["bursts"]


def bursts(config: DeviceConfig, address: int) -> list[tuple[int, int]]:
    """Address and beats of each burst of the tile at ``address``, a multiple of a beat.

    Each burst is as long as the rest of the tile, ``burst_beats`` and the next 4 KiB edge allow.
    """
    space = 1 << config.address_bits
    end = address + config.tile_bytes
    result = []
    while address < end:
        stop = min(
            end,
            address + config.burst_beats * config.data_bytes,
            address // EDGE_BYTES * EDGE_BYTES + EDGE_BYTES,
        )
        result.append((address % space, (stop - address) // config.data_bytes))
        address = stop
    return result
