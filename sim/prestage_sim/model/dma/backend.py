"""Golden model of the DMA engine's back end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

__all__ = ["Completion", "complete"]


class Completion(NamedTuple):
    """How a tile ended: the first burst that failed, else the tile's own address."""

    failed: bool
    address: int


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
            return Completion(True, at)
    return Completion(False, address)
