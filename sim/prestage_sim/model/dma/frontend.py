"""Golden model of the DMA engine's front end."""

from __future__ import annotations

from prestage_hw.contract import DeviceConfig

__all__ = ["tile_address"]


def tile_address(config: DeviceConfig, address: int) -> int:
    """Address that is fetched for ``address``: of a whole beat, within the memory's space."""
    return address % (1 << config.address_bits) // config.data_bytes * config.data_bytes
