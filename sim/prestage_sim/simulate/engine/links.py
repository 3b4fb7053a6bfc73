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
    SOURCE,
    TILE,
    TILES,
)

__all__ = ["advance", "next_fetch"]

_DEMAND_TILE, _PREFETCH_TILE = int(EventKind.DEMAND_TILE), int(EventKind.PREFETCH_TILE)


@kernel
def _tile_comes(engine: Any, link: Any, fetch: Any) -> Any:
    """When the next tile of a fetch that a link may take is there; infinity for none."""
    tier = engine.stages[link]
    left = engine.left[fetch, tier]
    if left == 0:
        return np.inf
    if engine.fetches[fetch, SOURCE] == tier:
        return 0.0
    tile = engine.settings[TILES] - left
    if engine.left[fetch, tier + 1] >= left:
        return np.inf
    return engine.come[fetch, tier + 1, tile]


@inner
def next_fetch(engine: Any, link: Any, wanted_first: Any, wanted: Any) -> Any:
    """Fetch that a link takes a tile of next; -1 for none."""
    sweep(engine)
    before = engine.carried[link]
    if not engine.settings[PREEMPTS] and before >= 0:
        row = engine.fetches[before]
        come = _tile_comes(engine, link, before) <= engine.clock[NOW]
        if not row[DEMANDED] and not row[GIVEN_UP] and come:
            for n in range(engine.lengths[PREFETCHES]):
                if engine.lists[PREFETCHES, n] == before:
                    return before
    if engine.settings[EAGER]:
        take_candidates(engine, wanted_first, wanted)
    for n in range(engine.lengths[DEMANDS]):
        fetch = engine.lists[DEMANDS, n]
        if _tile_comes(engine, link, fetch) <= engine.clock[NOW]:
            return fetch
    take_candidates(engine, wanted_first, wanted)
    if engine.settings[PREFETCH_TILES]:
        coming = np.int64(0)
        for which in (PREFETCHES, ARRIVING):
            for n in range(engine.lengths[which]):
                fetch = engine.lists[which, n]
                if not engine.fetches[fetch, DEMANDED]:
                    taken = engine.settings[TILES] - engine.left[fetch, 0]
                    coming += taken - tiles_come(engine, fetch)
        if coming >= engine.settings[PREFETCH_TILES]:
            return np.int64(-1)
    for n in range(engine.lengths[PREFETCHES]):
        fetch = engine.lists[PREFETCHES, n]
        come = _tile_comes(engine, link, fetch) <= engine.clock[NOW]
        if not engine.fetches[fetch, GIVEN_UP] and come:
            return fetch
    return np.int64(-1)


@kernel
def _take_tile(engine: Any, link: Any, fetch: Any) -> None:
    """Let a link take a tile of a fetch."""
    row, begin = engine.fetches[fetch], engine.links[link, FREE_AT]
    tier, end = engine.stages[link], begin + engine.links[link, TILE]
    come = end + engine.links[link, LATENCY]
    engine.links[link, FREE_AT] = end
    engine.carried[link] = fetch
    engine.ends[fetch, tier] = max(engine.ends[fetch, tier], come)
    engine.left[fetch, tier] -= 1
    engine.tier_tiles[tier] += 1
    kind = _DEMAND_TILE if row[DEMANDED] else _PREFETCH_TILE
    record_key(engine, kind, begin, end, row[KEY], link)
    if tier:
        engine.come[fetch, tier, engine.settings[TILES] - engine.left[fetch, tier] - 1] = come
        return
    engine.clock[BUSY] += engine.links[link, TILE]
    engine.counts[N_TILES] += 1
    if row[DEMANDED]:
        engine.counts[N_DEMAND_TILES] += 1
    else:
        engine.spent[row[AT]] += 1
    if engine.left[fetch, 0] == 0:
        remove(engine, DEMANDS if row[DEMANDED] else PREFETCHES, fetch)
        append(engine, ARRIVING, fetch)


@kernel
def _wake(engine: Any, link: Any) -> Any:
    """When a link that finds nothing to take may find something, if nothing arrives before.

    Infinity stands for the end of the next tile that any other link takes.
    """
    begin = engine.links[link, FREE_AT]
    later = np.inf
    for n in range(engine.lengths[PREFETCHES]):
        fetch = engine.lists[PREFETCHES, n]
        for tier in range(engine.fetches[fetch, SOURCE] + 1):
            if engine.ends[fetch, tier] > begin:
                later = min(later, engine.ends[fetch, tier])
    for other in range(engine.links.shape[0]):
        if engine.links[other, FREE_AT] > begin:
            later = min(later, engine.links[other, FREE_AT])
    if engine.stamps.shape[0]:
        for which in (DEMANDS, PREFETCHES):
            for n in range(engine.lengths[which]):
                come = _tile_comes(engine, link, engine.lists[which, n])
                if come > begin:
                    later = min(later, come)
    return later


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
            # Of those that are free at the same time the one that the others wait for.
            earlier = links[other, FREE_AT] < links[link, FREE_AT]
            same = links[other, FREE_AT] == links[link, FREE_AT]
            if earlier or (same and engine.stages[other] > engine.stages[link]):
                link = other
        begin = links[link, FREE_AT]
        arrival = np.inf
        for n in range(engine.lengths[ARRIVING]):
            arrival = min(arrival, engine.ends[engine.lists[ARRIVING, n], 0])
        if arrival == begin == np.inf:
            return False
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
            for other in range(links.shape[0]):
                if links[other, FREE_AT] == np.inf:
                    links[other, FREE_AT] = links[link, FREE_AT]
            continue
        later = min(arrival, until, _wake(engine, link))
        links[link, FREE_AT] = later
    clock[NOW] = until
    return True
