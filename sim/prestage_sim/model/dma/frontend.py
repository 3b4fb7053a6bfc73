"""Golden model of the DMA engine's front end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prestage_hw.contract import DeviceConfig

__all__ = ["Transfer", "check", "refused"]


def refused(config: DeviceConfig, address: int, size: int) -> bool:
    """Whether ``size`` bytes at ``address`` are nothing that the engine can move."""
    return bool(
        address % config.data_bytes
        or size % config.data_bytes
        or size > config.tile_bytes
        or address + size > 1 << config.address_bits
    )


@dataclass
class Transfer:
    """A request that waits in its channel.

    Attributes
    ----------
    channel, tag, slot, tile, address : :class:`int`
        As in the request.
    beats : :class:`int`
        Size, in beats.
    refused : :class:`bool`
        Whether it is answered with an address error.
    aborted : :class:`bool`
        Whether it was aborted.
    written : :class:`int`
        Beats that were handed on so far.
    """

    channel: int
    tag: int
    slot: int
    tile: int
    address: int
    beats: int
    refused: bool
    aborted: bool = False
    written: int = 0

    @property
    def null(self) -> bool:
        """Whether it is answered without a transfer."""
        return self.refused or self.aborted or self.beats == 0


def check(config: DeviceConfig, request: Mapping[str, int]) -> Transfer:
    """What becomes of a FetchRequest, given as a mapping."""
    size = request["bytes"] if request["sized"] else config.tile_bytes
    return Transfer(
        channel=request["channel"],
        tag=request["tag"],
        slot=request["slot"],
        tile=request["tile"],
        address=request["address"],
        beats=size // config.data_bytes,
        refused=refused(config, request["address"], size),
    )
