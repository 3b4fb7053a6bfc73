"""Golden model of the DMA engine: what a tile's transfer brings, without its time."""

from __future__ import annotations

from collections.abc import Container

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config

from .axi import BusError, Memory
from .backend import Completion, complete
from .frontend import tile_address
from .midend import bursts

__all__ = ["DMA", "Completion"]


class DMA:
    """Tiles become bursts; a failing burst fails its tile.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.config = config

    def bursts(self, address: int) -> list[tuple[int, int]]:
        """Address and beats of each burst of the tile at ``address``, in order."""
        return bursts(self.config, tile_address(self.config, address))

    def completion(self, address: int, failing: Container[int] = ()) -> Completion:
        """Completion of the tile at ``address``.

        Parameters
        ----------
        address : :class:`int`
            Address of the tile.
        failing : container of :class:`int`
            Addresses of beats that the memory answers with an error.
        """
        size = self.config.data_bytes
        return complete(
            tile_address(self.config, address),
            self.bursts(address),
            lambda at, beats: any(at + beat * size in failing for beat in range(beats)),
        )

    def transfer(self, address: int, memory: Memory) -> tuple[Completion, bytes]:
        """Completion of the tile at ``address`` and its bytes, those of failing bursts as zeros."""
        data = bytearray()
        failed: set[int] = set()
        for at, beats in self.bursts(address):
            size = beats * self.config.data_bytes
            try:
                data += memory.read(at, size)
            except BusError:
                data += bytes(size)
                failed.add(at)
        return self.completion(address, failed), bytes(data)
