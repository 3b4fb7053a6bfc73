"""Tiles on the links, one at a time on each."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._jit import inner, kernel
from ...model.buffer.state import FILLS
from ..events import EventKind
from .fetches import append, arrive, record_key, remove, sweep, tiles_come
from .prefetch import take_candidates
from .state import (
    ARRIVING,
    AT,
    BUSY,
    DEMANDED,
    DEMANDS,
    EAGER,
    FREE_AT,
    GIVEN_UP,
    KEY,
    LATENCY,
    N_DEMAND_TILES,
    N_TILES,
    NOW,
    PREEMPTS,
    PREFETCH_TILES,
    PREFETCHES,
    TILE,
    TILES,
    TO_START,
)

__all__ = ["advance", "next_fetch"]

_DEMAND_TILE, _PREFETCH_TILE = int(EventKind.DEMAND_TILE), int(EventKind.PREFETCH_TILE)


@inner
def next_fetch(engine: Any, link: Any, wanted_first: Any, wanted: Any) -> Any:
    """Fetch that a link takes a tile of next; -1 for none."""
    sweep(engine)
    before = engine.carried[link]
    if not engine.settings[PREEMPTS] and before >= 0:
        row = engine.fetches[before]
        if not row[DEMANDED] and not row[GIVEN_UP] and row[TO_START] > 0:
            for n in range(engine.lengths[PREFETCHES]):
                if engine.lists[PREFETCHES, n] == before:
                    return before
    if engine.settings[EAGER]:
        take_candidates(engine, wanted_first, wanted)
    if engine.lengths[DEMANDS]:
        return engine.lists[DEMANDS, 0]
    take_candidates(engine, wanted_first, wanted)
    if engine.settings[PREFETCH_TILES]:
        coming = np.int64(0)
        for which in (PREFETCHES, ARRIVING):
            for n in range(engine.lengths[which]):
                fetch = engine.lists[which, n]
                if not engine.fetches[fetch, DEMANDED]:
                    taken = engine.settings[TILES] - engine.fetches[fetch, TO_START]
                    coming += taken - tiles_come(engine, fetch)
        if coming >= engine.settings[PREFETCH_TILES]:
            return np.int64(-1)
    for n in range(engine.lengths[PREFETCHES]):
        fetch = engine.lists[PREFETCHES, n]
        if not engine.fetches[fetch, GIVEN_UP]:
            return fetch
    return np.int64(-1)


@kernel
def _take_tile(engine: Any, link: Any, fetch: Any) -> None:
    """Let a link take a tile of a fetch."""
    row, begin = engine.fetches[fetch], engine.links[link, FREE_AT]
    tile = engine.links[link, TILE]
    engine.links[link, FREE_AT] = begin + tile
    engine.clock[BUSY] += tile
    engine.carried[link] = fetch
    engine.ends[fetch] = max(engine.ends[fetch], begin + tile + engine.links[link, LATENCY])
    row[TO_START] -= 1
    engine.counts[N_TILES] += 1
    if row[DEMANDED]:
        engine.counts[N_DEMAND_TILES] += 1
    else:
        engine.spent[row[AT]] += 1
    kind = _DEMAND_TILE if row[DEMANDED] else _PREFETCH_TILE
    record_key(engine, kind, begin, begin + tile, row[KEY], link)
    if row[TO_START] == 0:
        remove(engine, DEMANDS if row[DEMANDED] else PREFETCHES, fetch)
        append(engine, ARRIVING, fetch)


@inner
def advance(
    engine: Any, until: Any, waiting: Any, count: Any, wanted_first: Any, wanted: Any
) -> Any:
    """Let links work until then, or until one of the slots has arrived that are waited for.

    What begins at that very moment is left to the next call: a demand goes before it.
    """
    clock, links = engine.clock, engine.links
    for link in range(links.shape[0]):
        links[link, FREE_AT] = max(links[link, FREE_AT], clock[NOW])
    while True:
        link = 0
        for other in range(1, links.shape[0]):
            if links[other, FREE_AT] < links[link, FREE_AT]:
                link = other
        begin = links[link, FREE_AT]
        arrival = np.inf
        for n in range(engine.lengths[ARRIVING]):
            arrival = min(arrival, engine.ends[engine.lists[ARRIVING, n]])
        if arrival <= begin and arrival <= until:
            clock[NOW] = max(clock[NOW], arrival)
            arrive(engine, arrival)
            for n in range(count):
                if not engine.buffer.slots[waiting[n], FILLS]:
                    return True
            continue
        if begin >= until:
            break
        clock[NOW] = begin
        fetch = next_fetch(engine, link, wanted_first, wanted)
        if fetch >= 0:
            _take_tile(engine, link, fetch)
            continue
        later = min(arrival, until)
        for n in range(engine.lengths[PREFETCHES]):
            fetch = engine.lists[PREFETCHES, n]
            if engine.ends[fetch] > begin:
                later = min(later, engine.ends[fetch])
        for other in range(links.shape[0]):
            if links[other, FREE_AT] > begin:
                later = min(later, links[other, FREE_AT])
        if later == np.inf:
            return False
        links[link, FREE_AT] = later
    clock[NOW] = until
    return True
