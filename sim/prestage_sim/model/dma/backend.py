"""Golden model of the DMA engine's back end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from prestage_hw.contract.records import FetchReason

from .frontend import Transfer
from .midend import Cutter

__all__ = ["Completion", "OpenBurst", "OpenTile", "complete"]


class Completion(NamedTuple):
    """How a tile ended: why, and the first burst that failed, else the tile's own address."""

    reason: FetchReason
    address: int

    @property
    def failed(self) -> bool:
        """Whether the tile has not arrived."""
        return self.reason is not FetchReason.OK


def complete(
    address: int, bursts: Iterable[tuple[int, int]], fails: Callable[[int, int], bool]
) -> Completion:
    """Completion of the tile at ``address``.

    Parameters
    ----------
    address : :class:`int`
        Address of the tile.
    bursts : iterable of pairs of :class:`int`
        Address and beats of its bursts.
    fails : callable
        Whether the burst with this address and so many beats has an error.
    """
    for at, beats in bursts:
        if fails(at, beats):
            return Completion(FetchReason.BUS, at)
    return Completion(FetchReason.OK, address)


@dataclass
class OpenTile:
    """A tile of which bursts were asked for.

    Attributes
    ----------
    transfer : :class:`Transfer`
        Its request.
    cutter : :class:`Cutter`
        Where its bursts have come to.
    beats : :class:`int`
        Beats that came.
    failed_at : :class:`int` or None
        Address of its first burst that failed.
    """

    transfer: Transfer
    cutter: Cutter
    beats: int = 0
    failed_at: int | None = None

    def ending(self) -> Completion:
        """How it ends with the beats that came."""
        if self.failed_at is not None:
            return Completion(FetchReason.BUS, self.failed_at)
        reason = FetchReason.OK
        if self.transfer.aborted:
            reason = FetchReason.ABORTED
        elif self.cutter.wraps:
            reason = FetchReason.ADDRESS
        return Completion(reason, self.transfer.address)


@dataclass
class OpenBurst:
    """A burst whose last beat has not come.

    Attributes
    ----------
    tile : :class:`OpenTile`
        Its tile.
    address, beats : :class:`int`
        Its place.
    last : :class:`bool`
        Whether it is the tile's last.
    dead : :class:`bool`
        Whether nobody waits for it any more.
    """

    tile: OpenTile
    address: int
    beats: int
    last: bool
    dead: bool = field(default=False)
    taken: int = field(default=0)
