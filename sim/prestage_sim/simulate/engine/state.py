"""State of the event loop, in arrays that compiled functions work on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...model.buffer.state import BufferState
from ...model.scheduler.queue import QueueState
from ...model.scheduler.rescan import RescanState
from ...model.scheduler.throttle import ThrottleState

__all__ = [
    "ARRIVING",
    "AT",
    "BUSY",
    "CANCELS",
    "COUNTED",
    "CUTOFF",
    "DEADLINE",
    "DELAY",
    "DEMANDED",
    "DEMANDS",
    "EAGER",
    "EVENTS",
    "EVICTION",
    "Engine",
    "FORESEES",
    "FREE",
    "FREE_AT",
    "GIVEN_UP",
    "KEY",
    "KIND",
    "LATENCY",
    "LOOK",
    "NOW",
    "N_CANCELLED",
    "N_CANDIDATES",
    "N_DEMANDS",
    "N_DEMAND_TILES",
    "N_HITS",
    "N_ISSUED",
    "N_LATE",
    "N_LATE_TILES",
    "N_MISSES",
    "N_OUTBID",
    "N_POLLUTING",
    "N_RIGHT",
    "N_THROTTLED",
    "N_TILES",
    "N_USEFUL",
    "N_USEFUL_TILES",
    "N_USELESS",
    "N_USELESS_TILES",
    "PREEMPTS",
    "PREFETCHES",
    "PREFETCH_LIMIT",
    "PREFETCH_TILES",
    "READY_FIRST",
    "RECORDED",
    "RECORD_FIRST",
    "RECORD_LAST",
    "RESCANS",
    "RESCAN_LEAST",
    "SOURCE",
    "STEP",
    "TILE",
    "TILES",
    "TOUCHES",
    "UNDER_WAY",
    "VISIT",
]

#: Columns of :attr:`Engine.events`.
RECORDED = 7

#: Columns of :attr:`Engine.fetches`.
KEY, AT, DEMANDED, DEADLINE, KIND, GIVEN_UP, SOURCE = range(7)

#: Rows of :attr:`Engine.lists`, and places of :attr:`Engine.lengths`.
DEMANDS, PREFETCHES, ARRIVING, FREE = range(4)

#: Places of :attr:`Engine.settings`.
(
    EVICTION,
    TILES,
    PREFETCH_LIMIT,
    CANCELS,
    PREEMPTS,
    FORESEES,
    RECORD_FIRST,
    RECORD_LAST,
    RESCANS,
    RESCAN_LEAST,
    READY_FIRST,
    PREFETCH_TILES,
    EAGER,
) = range(13)

#: Columns of :attr:`Engine.links`.
FREE_AT, TILE, LATENCY = range(3)

#: Places of :attr:`Engine.registers`.
STEP, VISIT, LOOK, EVENTS, UNDER_WAY, TOUCHES, CUTOFF = range(7)

#: Places of :attr:`Engine.clock`.
NOW, BUSY, DELAY = range(3)

#: What :attr:`Engine.counts` counts, in its order.
COUNTED = (
    "demands",
    "hits",
    "misses",
    "late",
    "issued",
    "useful",
    "useless",
    "polluting",
    "cancelled",
    "throttled",
    "outbid",
    "tiles_moved",
    "demand_tiles",
    "useful_tiles",
    "useless_tiles",
    "candidates",
    "right",
    "late_tiles",
)
(
    N_DEMANDS,
    N_HITS,
    N_MISSES,
    N_LATE,
    N_ISSUED,
    N_USEFUL,
    N_USELESS,
    N_POLLUTING,
    N_CANCELLED,
    N_THROTTLED,
    N_OUTBID,
    N_TILES,
    N_DEMAND_TILES,
    N_USEFUL_TILES,
    N_USELESS_TILES,
    N_CANDIDATES,
    N_RIGHT,
    N_LATE_TILES,
) = range(len(COUNTED))


class Engine(NamedTuple):
    """All that the event loop knows.

    Parameters
    ----------
    buffer, queue, throttle, rescans
        State of the golden model.
    settings, registers : array of ``int64``
        What stays, and what changes; the names of their places are in this module.
    clock : array of ``float64``
        Now, the time that links were busy, and the predictor's.
    counts : array of ``int64``
        :data:`COUNTED`.
    links : array of ``float64``, shape ``[links, 3]``
        When each link is free, its time for a tile, and its latency.
    stages : array of ``int64``, shape ``[links]``
        Tier that each link takes tiles from: 0 brings them into slots, 1 into tier 0, and so on.
    carried : array of ``int64``, shape ``[links]``
        Fetch whose tile each link took last, -1 before the first.
    fetches : array of ``int64``, shape ``[F, 7]``
        Of each fetch: key of the expert, slot, whether a layer waits for it, deadline, kind,
        whether it is given up, tier that it comes from.
    left : array of ``int64``, shape ``[F, tiers]``
        Tiles of a fetch that no link of that tier has taken yet.
    ends : array of ``float64``, shape ``[F, tiers]``
        When the last tile of a fetch arrives of those that a link of that tier has taken.
    come : array of ``float64``, shape ``[F, tiers, tiles]``
        When each tile arrives that a link of that tier has taken, but for tier 0.
    lists : array of ``int64``, shape ``[4, F]``
        Fetches that wait as demands, those that wait as prefetches, those whose last tile is on its
        way, and places that are free.
    lengths : array of ``int64``
        How many there are in each list.
    spent : array of ``int64``, shape ``[S]``
        Tiles that a prefetch into the slot has taken.
    fetch_of : array of ``int64``, shape ``[S]``
        Fetch into the slot, -1 for none.
    arrived : array of ``float64``, shape ``[S]``
        When the expert in the slot had arrived.
    rooms, filled : array of ``int64``, shape ``[tiers - 1]``
        How many experts each tier but the last holds at most, and now.
    stamps : array of ``int64``, shape ``[tiers - 1, L * E]``
        When an expert was fetched from that tier or put there, -1 where it is not there.
    tier_tiles : array of ``int64``, shape ``[tiers]``
        Tiles that links have taken from each tier.
    proposed : array of :class:`bool`, shape ``[L, E]``
        Whether an expert was proposed for the layer's next visit.
    use_first, use_at, use_next : array of ``int64``
        Visits that use each expert: where its first one is listed, the list, and its next one.
    held : array of ``int64``, shape ``[L]``
        Slots that hold experts of each layer.
    events : array of ``float64``, shape ``[N, 7]``
        Recorded events.
    """

    buffer: BufferState
    queue: QueueState
    throttle: ThrottleState
    rescans: RescanState
    settings: NDArray[np.int64]
    registers: NDArray[np.int64]
    clock: NDArray[np.float64]
    counts: NDArray[np.int64]
    links: NDArray[np.float64]
    stages: NDArray[np.int64]
    carried: NDArray[np.int64]
    fetches: NDArray[np.int64]
    left: NDArray[np.int64]
    ends: NDArray[np.float64]
    come: NDArray[np.float64]
    lists: NDArray[np.int64]
    lengths: NDArray[np.int64]
    spent: NDArray[np.int64]
    fetch_of: NDArray[np.int64]
    arrived: NDArray[np.float64]
    rooms: NDArray[np.int64]
    filled: NDArray[np.int64]
    stamps: NDArray[np.int64]
    tier_tiles: NDArray[np.int64]
    proposed: NDArray[np.bool_]
    use_first: NDArray[np.int64]
    use_at: NDArray[np.int64]
    use_next: NDArray[np.int64]
    held: NDArray[np.int64]
    events: NDArray[np.float64]
