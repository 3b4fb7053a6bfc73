"""The life of a fetch: it begins, its tiles come, it arrives or is given up."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._jit import inner, kernel
from ...model.buffer.buffer import cancel, fill
from ...model.buffer.recency import touch
from ...model.buffer.state import EXPERTS, OWNER, PREFETCHED
from ...model.scheduler.rescan import wake
from ...model.scheduler.throttle import count_drop
from ..events import EventKind
from ..plan import Evict
from .state import (
    ARRIVING,
    AT,
    DEADLINE,
    DEMANDED,
    DEMANDS,
    EVENTS,
    EVICTION,
    FORESEES,
    FREE,
    GIVEN_UP,
    KEY,
    KIND,
    LOOK,
    N_CANCELLED,
    N_USELESS,
    N_USELESS_TILES,
    NOW,
    PREFETCHES,
    RECORD_FIRST,
    RECORD_LAST,
    SOURCE,
    STEP,
    TILE,
    TILES,
    UNDER_WAY,
)
from .tiers import find_source, forget
from .victims import next_use

__all__ = [
    "append",
    "arrive",
    "finish",
    "is_moving",
    "leave",
    "record",
    "record_key",
    "remove",
    "start",
    "sweep",
    "tiles_come",
]

_LAYER_LRU = int(Evict.LAYER_LRU)
_EVICT, _CANCEL = int(EventKind.EVICT), int(EventKind.CANCEL)


@inner
def record(
    engine: Any, kind: Any, start: Any, end: Any, layer: Any, expert: Any, link: Any
) -> None:
    """Keep an event, if the step is one of those that are recorded."""
    step, at = engine.registers[STEP], engine.registers[EVENTS]
    if step < engine.settings[RECORD_FIRST] or step >= engine.settings[RECORD_LAST]:
        return
    if at == engine.events.shape[0]:
        return
    row = engine.events[at]
    row[0], row[1], row[2], row[3] = kind, start, end, step
    row[4], row[5], row[6] = layer, expert, link
    engine.registers[EVENTS] = at + 1


@inner
def record_key(engine: Any, kind: Any, start: Any, end: Any, key: Any, link: Any) -> None:
    """Keep an event about an expert."""
    experts = engine.buffer.shape[EXPERTS]
    record(engine, kind, start, end, key // experts, key % experts, link)


@inner
def append(engine: Any, which: Any, fetch: Any) -> None:
    """Put a fetch at the end of a list."""
    engine.lists[which, engine.lengths[which]] = fetch
    engine.lengths[which] += 1


@inner
def remove(engine: Any, which: Any, fetch: Any) -> None:
    """Take a fetch out of a list, if it is in it."""
    places = engine.lists[which]
    kept = 0
    for n in range(engine.lengths[which]):
        if places[n] != fetch:
            places[kept] = places[n]
            kept += 1
    engine.lengths[which] = kept


@inner
def leave(engine: Any, slot: Any) -> None:
    """Note who is about to leave a slot."""
    owner = engine.buffer.slots[slot, OWNER]
    if owner < 0:
        return
    engine.held[owner // engine.buffer.shape[EXPERTS]] -= 1
    if engine.settings[FORESEES]:
        engine.registers[LOOK] = min(engine.registers[LOOK], next_use(engine, owner))
    if engine.buffer.slots[slot, PREFETCHED]:
        engine.counts[N_USELESS] += 1
        engine.counts[N_USELESS_TILES] += engine.spent[slot]
    record_key(engine, _EVICT, engine.clock[NOW], engine.clock[NOW], owner, -1)


@inner
def start(engine: Any, key: Any, slot: Any, demanded: Any, deadline: Any, kind: Any) -> Any:
    """Begin to fetch an expert into a slot."""
    engine.lengths[FREE] -= 1
    fetch = engine.lists[FREE, engine.lengths[FREE]]
    row = engine.fetches[fetch]
    row[KEY], row[AT], row[DEMANDED], row[DEADLINE] = key, slot, demanded, deadline
    row[KIND], row[GIVEN_UP], row[SOURCE] = kind, 0, find_source(engine, key)
    for tier in range(engine.left.shape[1]):
        engine.left[fetch, tier] = engine.settings[TILES] if tier <= row[SOURCE] else 0
        engine.ends[fetch, tier] = 0.0
    engine.fetch_of[slot] = fetch
    engine.held[key // engine.buffer.shape[EXPERTS]] += 1
    engine.spent[slot] = 0
    if not demanded:
        engine.registers[UNDER_WAY] += 1
    append(engine, DEMANDS if demanded else PREFETCHES, fetch)
    return fetch


@inner
def finish(engine: Any, fetch: Any) -> None:
    """Forget a fetch."""
    row = engine.fetches[fetch]
    engine.fetch_of[row[AT]] = -1
    if not row[DEMANDED]:
        engine.registers[UNDER_WAY] -= 1
    append(engine, FREE, fetch)


@kernel
def _give_up(engine: Any, fetch: Any) -> None:
    """End a prefetch that its layer did not want; none of its tiles is on its way."""
    row = engine.fetches[fetch]
    remove(engine, PREFETCHES, fetch)
    cancel(engine.buffer, row[AT])
    wake(engine.rescans, -1)
    count_drop(engine.throttle, row[AT])
    engine.held[row[KEY] // engine.buffer.shape[EXPERTS]] -= 1
    for tier in range(row[SOURCE]):
        if engine.left[fetch, tier + 1]:
            forget(engine, tier, row[KEY])
    engine.counts[N_CANCELLED] += 1
    engine.counts[N_USELESS_TILES] += engine.spent[row[AT]]
    if engine.settings[FORESEES]:
        engine.registers[LOOK] = min(engine.registers[LOOK], next_use(engine, row[KEY]))
    record_key(engine, _CANCEL, engine.clock[NOW], engine.clock[NOW], row[KEY], -1)
    finish(engine, fetch)


@inner
def arrive(engine: Any, until: Any) -> None:
    """Let those experts arrive whose last tile has come by then."""
    arriving = engine.lists[ARRIVING]
    kept = 0
    for n in range(engine.lengths[ARRIVING]):
        fetch = arriving[n]
        if engine.ends[fetch, 0] <= until:
            slot = engine.fetches[fetch, AT]
            fill(engine.buffer, slot, True, False)
            if engine.settings[EVICTION] == _LAYER_LRU:
                # What has come is newer than what the same layer found there.
                touch(engine.buffer, slot)
            engine.arrived[slot] = engine.ends[fetch, 0]
            finish(engine, fetch)
        else:
            arriving[kept] = fetch
            kept += 1
    engine.lengths[ARRIVING] = kept


@inner
def is_moving(engine: Any, fetch: Any) -> Any:
    """Whether a tile of a fetch is on its way."""
    for tier in range(engine.fetches[fetch, SOURCE] + 1):
        if engine.ends[fetch, tier] > engine.clock[NOW]:
            return True
    return False


@inner
def sweep(engine: Any) -> None:
    """End the prefetches that are given up and of which no tile is on its way."""
    for n in range(engine.lengths[PREFETCHES] - 1, -1, -1):
        fetch = engine.lists[PREFETCHES, n]
        if engine.fetches[fetch, GIVEN_UP] and not is_moving(engine, fetch):
            _give_up(engine, fetch)


@inner
def tiles_come(engine: Any, fetch: Any) -> Any:
    """Tiles of a fetch that are in its slot."""
    taken = engine.settings[TILES] - engine.left[fetch, 0]
    left = engine.ends[fetch, 0] - engine.clock[NOW]
    if left > 0:
        taken -= min(taken, np.int64(np.ceil(left / engine.links[0, TILE])))
    return taken
