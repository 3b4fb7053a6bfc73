"""The event loop: time on the link and in the layers, around the golden model's own rules.

A layer takes part of its time until its routing is known, then its experts are computed as they
come. Meanwhile links bring experts tile by tile. What a slot is given to, which candidate goes
next, and which kinds of prefetches are switched off say the compiled functions of
:mod:`prestage_sim.model`; nothing of that is here. All functions work on one :class:`Engine`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract.records import Source

from .._jit import kernel
from ..model.buffer.buffer import (
    begin_demand,
    cancel,
    fill,
    find_demand_victim,
    find_prefetch_victim,
    release,
    take_for_demand,
    take_for_prefetch,
)
from ..model.buffer.state import (
    EMPTY,
    EXPERTS,
    FILLS,
    LOCKED,
    NEWER,
    OLDEST,
    OWNER,
    PINS,
    PREFETCHED,
    STATE,
    BufferState,
)
from ..model.scheduler.queue import QueueState, is_stale, queue_push, queue_take
from ..model.scheduler.rescan import rescan
from ..model.scheduler.throttle import (
    ThrottleState,
    count_drop,
    count_miss,
    count_prefetch,
    count_use,
    prefetch_kind,
    throttle_admits,
)
from .events import EventKind
from .plan import Evict

__all__ = ["COUNTED", "RECORDED", "Engine", "run"]

#: Columns of :attr:`Engine.events`.
RECORDED = 7

_LAYER_LRU, _BELADY = int(Evict.LAYER_LRU), int(Evict.BELADY)
_PREDICTOR = int(Source.PREDICTOR)
_ATTENTION, _COMPUTE, _DEMAND_TILE, _PREFETCH_TILE, _STALL, _EVICT, _CANCEL = map(int, EventKind)

#: Columns of :attr:`Engine.fetches`.
KEY, AT, DEMANDED, DEADLINE, KIND, TO_START, GIVEN_UP = range(7)

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
) = range(12)

#: Columns of :attr:`Engine.links`.
FREE_AT, TILE, LATENCY = range(3)

#: Places of :attr:`Engine.registers`.
STEP, VISIT, LOOK, EVENTS, UNDER_WAY = range(5)

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
    _DEMANDS,
    _HITS,
    _MISSES,
    _LATE,
    _ISSUED,
    _USEFUL,
    _USELESS,
    _POLLUTING,
    _CANCELLED,
    _THROTTLED,
    _OUTBID,
    _TILES,
    _DEMAND_TILES,
    _USEFUL_TILES,
    _USELESS_TILES,
    _CANDIDATES,
    _RIGHT,
    _LATE_TILES,
) = range(len(COUNTED))

_NEVER = np.int64(1) << 60


class Engine(NamedTuple):
    """All that the event loop knows.

    Parameters
    ----------
    buffer, queue, throttle
        State of the golden model.
    settings, registers : array of ``int64``
        What stays, and what changes; the names of their places are in this module.
    clock : array of ``float64``
        Now, the time that links were busy, and the predictor's.
    counts : array of ``int64``
        :data:`COUNTED`.
    links : array of ``float64``, shape ``[links, 3]``
        When each link is free, its time for a tile, and its latency.
    carried : array of ``int64``, shape ``[links]``
        Fetch whose tile each link took last, -1 before the first.
    fetches : array of ``int64``, shape ``[F, 7]``
        Of each fetch: key of the expert, slot, whether a layer waits for it, deadline, kind, tiles
        that no link has taken yet, whether it is given up.
    ends : array of ``float64``, shape ``[F]``
        When the last tile of a fetch arrives of those that a link has taken.
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
    settings: NDArray[np.int64]
    registers: NDArray[np.int64]
    clock: NDArray[np.float64]
    counts: NDArray[np.int64]
    links: NDArray[np.float64]
    carried: NDArray[np.int64]
    fetches: NDArray[np.int64]
    ends: NDArray[np.float64]
    lists: NDArray[np.int64]
    lengths: NDArray[np.int64]
    spent: NDArray[np.int64]
    fetch_of: NDArray[np.int64]
    arrived: NDArray[np.float64]
    proposed: NDArray[np.bool_]
    use_first: NDArray[np.int64]
    use_at: NDArray[np.int64]
    use_next: NDArray[np.int64]
    held: NDArray[np.int64]
    events: NDArray[np.float64]


@kernel
def _record(
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


@kernel
def _record_key(engine: Any, kind: Any, start: Any, end: Any, key: Any, link: Any) -> None:
    """Keep an event about an expert."""
    experts = engine.buffer.shape[EXPERTS]
    _record(engine, kind, start, end, key // experts, key % experts, link)


@kernel
def _append(engine: Any, which: Any, fetch: Any) -> None:
    """Put a fetch at the end of a list."""
    engine.lists[which, engine.lengths[which]] = fetch
    engine.lengths[which] += 1


@kernel
def _remove(engine: Any, which: Any, fetch: Any) -> None:
    """Take a fetch out of a list, if it is in it."""
    places = engine.lists[which]
    kept = 0
    for n in range(engine.lengths[which]):
        if places[n] != fetch:
            places[kept] = places[n]
            kept += 1
    engine.lengths[which] = kept


@kernel
def _next_use(engine: Any, key: Any) -> Any:
    """Visit that uses an expert next."""
    at = engine.use_next[key]
    return engine.use_at[at] if at < engine.use_first[key + 1] else _NEVER


@kernel
def _farthest(engine: Any) -> Any:
    """Slot that may be taken whose expert is used last, a free one before any; -1 for none."""
    slots = engine.buffer.slots
    best, most = np.int64(-1), np.int64(-1)
    for slot in range(slots.shape[0]):
        if slots[slot, PINS] or slots[slot, FILLS] or slots[slot, LOCKED]:
            continue
        if slots[slot, OWNER] < 0:
            return np.int64(slot)
        use = _next_use(engine, slots[slot, OWNER])
        if use > most:
            best, most = np.int64(slot), use
    return best


@kernel
def _least_recent_of_a_layer(engine: Any) -> Any:
    """Least recent slot of those layers that hold most beyond an equal share; -1 for none."""
    state = engine.buffer
    slots, experts = state.slots, state.shape[EXPERTS]
    best, most = np.int64(-1), np.int64(-1)
    slot = state.registers[OLDEST]
    while slot >= 0:
        if not (slots[slot, PINS] or slots[slot, FILLS] or slots[slot, LOCKED]):
            if slots[slot, OWNER] < 0:
                return slot
            held = engine.held[slots[slot, OWNER] // experts]
            # What the decision wants itself stays.
            if held > most and _next_use(engine, slots[slot, OWNER]) > engine.registers[VISIT]:
                best, most = slot, held
        slot = slots[slot, NEWER]
    return best


@kernel
def _demand_victim(engine: Any) -> Any:
    """Slot for a demand; -1 for none."""
    if engine.settings[EVICTION] == _BELADY:
        return _farthest(engine)
    if engine.settings[EVICTION] == _LAYER_LRU:
        return _least_recent_of_a_layer(engine)
    return find_demand_victim(engine.buffer)


@kernel
def _leave(engine: Any, slot: Any) -> None:
    """Note who is about to leave a slot."""
    owner = engine.buffer.slots[slot, OWNER]
    if owner < 0:
        return
    engine.held[owner // engine.buffer.shape[EXPERTS]] -= 1
    if engine.settings[FORESEES]:
        engine.registers[LOOK] = min(engine.registers[LOOK], _next_use(engine, owner))
    if engine.buffer.slots[slot, PREFETCHED]:
        engine.counts[_USELESS] += 1
        engine.counts[_USELESS_TILES] += engine.spent[slot]
    _record_key(engine, _EVICT, engine.clock[NOW], engine.clock[NOW], owner, -1)


@kernel
def _start(engine: Any, key: Any, slot: Any, demanded: Any, deadline: Any, kind: Any) -> Any:
    """Begin to fetch an expert into a slot."""
    engine.lengths[FREE] -= 1
    fetch = engine.lists[FREE, engine.lengths[FREE]]
    row = engine.fetches[fetch]
    row[KEY], row[AT], row[DEMANDED], row[DEADLINE] = key, slot, demanded, deadline
    row[KIND], row[TO_START], row[GIVEN_UP] = kind, engine.settings[TILES], 0
    engine.ends[fetch] = 0.0
    engine.fetch_of[slot] = fetch
    engine.held[key // engine.buffer.shape[EXPERTS]] += 1
    engine.spent[slot] = 0
    if not demanded:
        engine.registers[UNDER_WAY] += 1
    _append(engine, DEMANDS if demanded else PREFETCHES, fetch)
    return fetch


@kernel
def _finish(engine: Any, fetch: Any) -> None:
    """Forget a fetch."""
    row = engine.fetches[fetch]
    engine.fetch_of[row[AT]] = -1
    if not row[DEMANDED]:
        engine.registers[UNDER_WAY] -= 1
    _append(engine, FREE, fetch)


@kernel
def _give_up(engine: Any, fetch: Any) -> None:
    """End a prefetch that its layer did not want; none of its tiles is on its way."""
    row = engine.fetches[fetch]
    _remove(engine, PREFETCHES, fetch)
    cancel(engine.buffer, row[AT])
    count_drop(engine.throttle, row[AT])
    engine.held[row[KEY] // engine.buffer.shape[EXPERTS]] -= 1
    engine.counts[_CANCELLED] += 1
    engine.counts[_USELESS_TILES] += engine.spent[row[AT]]
    if engine.settings[FORESEES]:
        engine.registers[LOOK] = min(engine.registers[LOOK], _next_use(engine, row[KEY]))
    _record_key(engine, _CANCEL, engine.clock[NOW], engine.clock[NOW], row[KEY], -1)
    _finish(engine, fetch)


@kernel
def _fill(engine: Any, until: Any) -> None:
    """Let those experts arrive whose last tile has come by then."""
    arriving = engine.lists[ARRIVING]
    kept = 0
    for n in range(engine.lengths[ARRIVING]):
        fetch = arriving[n]
        if engine.ends[fetch] <= until:
            slot = engine.fetches[fetch, AT]
            fill(engine.buffer, slot, True, False)
            engine.arrived[slot] = engine.ends[fetch]
            _finish(engine, fetch)
        else:
            arriving[kept] = fetch
            kept += 1
    engine.lengths[ARRIVING] = kept


@kernel
def _prefetch(engine: Any, key: Any, score: Any, deadline: Any, kind: Any) -> Any:
    """Begin to prefetch an expert, if it is given a slot."""
    layer, expert = divmod(key, engine.buffer.shape[EXPERTS])
    outbid = False
    if engine.settings[EVICTION] == _BELADY:
        slot = _farthest(engine)
    elif engine.settings[EVICTION] == _LAYER_LRU:
        slot = _least_recent_of_a_layer(engine)
    else:
        slot, outbid = find_prefetch_victim(engine.buffer, layer, expert, score)
    if slot < 0 or outbid:
        engine.counts[_OUTBID] += 1
        return False
    _leave(engine, slot)
    result = take_for_prefetch(engine.buffer, layer, expert, score, slot)
    engine.counts[_ISSUED] += 1
    count_prefetch(engine.throttle, slot, key, kind, result[3] != 0, result[4] != 0)
    _start(engine, key, slot, False, deadline, kind)
    return True


@kernel
def _prefetch_queued(engine: Any) -> Any:
    """Begin to prefetch the best candidate that is given a slot; False if there is none."""
    while True:
        ctx, layer, expert, score, source, deadline = queue_take(engine.queue)
        if ctx < 0:
            return False
        kind = prefetch_kind(source, deadline, engine.queue.routes[ctx])
        if not throttle_admits(engine.throttle, kind):
            engine.counts[_THROTTLED] += 1
            continue
        key = layer * engine.buffer.shape[EXPERTS] + expert
        if engine.buffer.experts[key, STATE] != EMPTY:
            continue
        if _prefetch(engine, key, score, deadline, kind):
            return True


@kernel
def _prefetch_foreseen(engine: Any, wanted_first: Any, wanted: Any) -> Any:
    """Begin to prefetch what is missing and used next, before what has to go; False if none is."""
    registers, buffer = engine.registers, engine.buffer
    layers = engine.held.shape[0]
    visit = max(registers[LOOK], registers[VISIT] + 1)
    while visit < wanted_first.shape[0] - 1:
        for n in range(wanted_first[visit], wanted_first[visit + 1]):
            key = visit % layers * buffer.shape[EXPERTS] + wanted[n]
            if buffer.experts[key, STATE] != EMPTY:
                continue
            registers[LOOK] = visit
            slot = _farthest(engine)
            if slot < 0:
                return False
            owner = buffer.slots[slot, OWNER]
            if owner >= 0 and _next_use(engine, owner) <= visit:
                return False
            _prefetch(engine, key, np.int64(0), np.int64(0), np.int64(0))
            return True
        visit += 1
    registers[LOOK] = visit
    return False


@kernel
def _prefetch_rescanned(engine: Any) -> Any:
    """Begin to prefetch the best of what is missing by the latest values; False if none is."""
    settings, routes = engine.settings, engine.queue.routes
    key, score, ahead = rescan(engine.buffer, 0, settings[RESCANS], settings[RESCAN_LEAST])
    if key < 0:
        return False
    deadline = (routes[0] + ahead) % 256
    kind = prefetch_kind(_PREDICTOR, deadline, routes[0])
    if not throttle_admits(engine.throttle, kind):
        engine.counts[_THROTTLED] += 1
        return False
    return _prefetch(engine, key, score, deadline, kind)


@kernel
def _sweep(engine: Any) -> None:
    """End the prefetches that are given up and of which no tile is on its way."""
    for n in range(engine.lengths[PREFETCHES] - 1, -1, -1):
        fetch = engine.lists[PREFETCHES, n]
        if engine.fetches[fetch, GIVEN_UP] and engine.ends[fetch] <= engine.clock[NOW]:
            _give_up(engine, fetch)


@kernel
def _tiles_come(engine: Any, fetch: Any) -> Any:
    """Tiles of a fetch that are in its slot."""
    taken = engine.settings[TILES] - engine.fetches[fetch, TO_START]
    left = engine.ends[fetch] - engine.clock[NOW]
    if left > 0:
        taken -= min(taken, np.int64(np.ceil(left / engine.links[0, TILE])))
    return taken


@kernel
def _next_fetch(engine: Any, link: Any, wanted_first: Any, wanted: Any) -> Any:
    """Fetch that a link takes a tile of next; -1 for none."""
    _sweep(engine)
    before = engine.carried[link]
    if not engine.settings[PREEMPTS] and before >= 0:
        row = engine.fetches[before]
        if not row[DEMANDED] and not row[GIVEN_UP] and row[TO_START] > 0:
            for n in range(engine.lengths[PREFETCHES]):
                if engine.lists[PREFETCHES, n] == before:
                    return before
    if engine.lengths[DEMANDS]:
        return engine.lists[DEMANDS, 0]
    while engine.registers[UNDER_WAY] < engine.settings[PREFETCH_LIMIT]:
        if engine.settings[FORESEES]:
            if not _prefetch_foreseen(engine, wanted_first, wanted):
                break
        elif engine.settings[RESCANS]:
            if not _prefetch_rescanned(engine):
                break
        elif not _prefetch_queued(engine):
            break
    if engine.settings[PREFETCH_TILES]:
        coming = np.int64(0)
        for which in (PREFETCHES, ARRIVING):
            for n in range(engine.lengths[which]):
                fetch = engine.lists[which, n]
                if not engine.fetches[fetch, DEMANDED]:
                    taken = engine.settings[TILES] - engine.fetches[fetch, TO_START]
                    coming += taken - _tiles_come(engine, fetch)
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
    engine.counts[_TILES] += 1
    if row[DEMANDED]:
        engine.counts[_DEMAND_TILES] += 1
    else:
        engine.spent[row[AT]] += 1
    kind = _DEMAND_TILE if row[DEMANDED] else _PREFETCH_TILE
    _record_key(engine, kind, begin, begin + tile, row[KEY], link)
    if row[TO_START] == 0:
        _remove(engine, DEMANDS if row[DEMANDED] else PREFETCHES, fetch)
        _append(engine, ARRIVING, fetch)


@kernel
def _advance(
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
            _fill(engine, arrival)
            for n in range(count):
                if not engine.buffer.slots[waiting[n], FILLS]:
                    return True
            continue
        if begin >= until:
            break
        clock[NOW] = begin
        fetch = _next_fetch(engine, link, wanted_first, wanted)
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


@kernel
def _route(engine: Any, layer: Any, wanted: Any, waiting: Any) -> Any:
    """Look up the demands of a layer: how many of them are waited for, -1 if one found no slot."""
    buffer, counts, clock = engine.buffer, engine.counts, engine.clock
    experts = buffer.shape[EXPERTS]
    engine.queue.routes[0] = (engine.queue.routes[0] + 1) % 256
    busy = np.int64(-1)
    for link in range(engine.links.shape[0]):
        if engine.links[link, FREE_AT] > clock[NOW] and engine.carried[link] >= 0:
            row = engine.fetches[engine.carried[link]]
            if not row[DEMANDED]:
                busy = row[KIND]
    count = 0
    for index in range(wanted.shape[0]):
        expert = np.int64(wanted[index])
        key = layer * experts + expert
        counts[_DEMANDS] += 1
        result = begin_demand(buffer, 0, layer, expert, index)
        slot = result[1]
        if slot < 0:
            slot = _demand_victim(engine)
            if slot < 0:
                return -1
            counts[_MISSES] += 1
            _leave(engine, slot)
            result = take_for_demand(buffer, 0, layer, expert, index, slot)
            counts[_POLLUTING] += result[5]
            count_miss(engine.throttle, slot, key, result[3] != 0, result[4] != 0, busy)
            busy = np.int64(-1)
            _start(engine, key, slot, True, 0, -1)
        else:
            fetch = engine.fetch_of[slot]
            if result[2]:
                counts[_USEFUL] += 1
                counts[_USEFUL_TILES] += engine.spent[slot]
                come = engine.settings[TILES] if fetch < 0 else _tiles_come(engine, fetch)
                count_use(engine.throttle, slot, come)
            if fetch < 0:
                counts[_HITS] += 1
                continue
            row = engine.fetches[fetch]
            if not row[DEMANDED]:
                counts[_LATE] += 1
                counts[_LATE_TILES] += engine.spent[slot]
                row[DEMANDED], row[GIVEN_UP] = 1, 0
                engine.registers[UNDER_WAY] -= 1
                if row[TO_START]:
                    _remove(engine, PREFETCHES, fetch)
                    _append(engine, DEMANDS, fetch)
        waiting[count] = slot
        count += 1
    for expert in wanted:
        key = layer * experts + expert
        while _next_use(engine, key) <= engine.registers[VISIT]:
            engine.use_next[key] += 1
    if engine.settings[CANCELS]:
        for n in range(engine.lengths[PREFETCHES]):
            row = engine.fetches[engine.lists[PREFETCHES, n]]
            if is_stale(row[DEADLINE], engine.queue.routes[0]):
                row[GIVEN_UP] = 1
        _sweep(engine)
    return count


@kernel
def _offer(
    engine: Any, step: Any, layer: Any, offset: Any, ahead: Any, expert: Any, score: Any, hint: Any
) -> None:
    """Queue what is proposed at the start of a step (layer -1), or once a layer was routed."""
    layers = engine.held.shape[0]
    at = step * (layers + 1) + layer + 1
    for n in range(offset[at], offset[at + 1]):
        target = (layer + ahead[n]) % layers
        deadline = (engine.queue.routes[0] + ahead[n]) % 256
        engine.proposed[target, expert[n]] = True
        if not engine.settings[RESCANS]:
            queue_push(engine.queue, 0, target, expert[n], score[n], hint[n], deadline)


@kernel
def _tell(buffer: Any, layer: Any, values: Any, reuse: Any) -> None:
    """Give the buffer the predictor's values of a layer."""
    table = buffer.reuse[0, layer] if reuse else buffer.chances[0, layer]
    for e in range(values.shape[0]):
        table[e] = values[e]
    buffer.visited[0, layer] = reuse


@kernel
def run(
    engine: Any,
    waiting: Any,
    begin: Any,
    end: Any,
    wanted_first: Any,
    wanted: Any,
    weight: Any,
    attention: Any,
    compute: Any,
    horizons: Any,
    chances: Any,
    reuse: Any,
    offset: Any,
    ahead: Any,
    proposed: Any,
    score: Any,
    hint: Any,
) -> Any:
    """Run some steps; False if a demand found no slot.

    Parameters
    ----------
    engine : :class:`Engine`
        What it works on.
    begin, end : :class:`int`
        First step, and the one after the last.
    wanted_first, wanted, weight : array of :class:`int`
        First demand of each visit of a layer, experts, and how many tokens chose them.
    attention : array of :class:`float`
        Time of each step's layers until their routing is known.
    compute : array of :class:`float`
        Time of an expert by the number of tokens that chose it.
    horizons, chances, reuse : arrays
        What the predictor says, see :class:`Values`; without horizons nothing.
    offset, ahead, proposed, score, hint : arrays
        What is proposed, see :class:`Candidates`.
    """
    layers = engine.held.shape[0]
    counts, clock, buffer = engine.counts, engine.clock, engine.buffer
    nobody = waiting[:0]
    for step in range(begin, end):
        engine.registers[STEP] = step
        if horizons.shape[0]:
            for layer in range(layers):
                _tell(buffer, layer, chances[0, step, layer], False)
        _offer(engine, step, -1, offset, ahead, proposed, score, hint)
        for layer in range(layers):
            visit = step * layers + layer
            now = clock[NOW]
            _advance(engine, now + attention[step], nobody, 0, wanted_first, wanted)
            _record(engine, _ATTENTION, now, clock[NOW], layer, -1, -1)
            engine.registers[VISIT] = visit
            these = wanted[wanted_first[visit] : wanted_first[visit + 1]]
            weights = weight[wanted_first[visit] : wanted_first[visit + 1]]
            for e in range(engine.proposed.shape[1]):
                if engine.proposed[layer, e]:
                    counts[_CANDIDATES] += 1
                    engine.proposed[layer, e] = False
                    for expert in these:
                        if expert == e:
                            counts[_RIGHT] += 1
            now = clock[NOW]
            count = _route(engine, layer, these, waiting)
            if count < 0:
                return False
            if horizons.shape[0]:
                _tell(buffer, layer, reuse[step, layer], True)
                for h in range(1, horizons.shape[0]):
                    if layer + horizons[h] < layers:
                        target = layer + horizons[h]
                        _tell(buffer, target, chances[h, step, target], False)
            if clock[DELAY] > 0:
                _advance(engine, now + clock[DELAY], nobody, 0, wanted_first, wanted)
            _offer(engine, step, layer, offset, ahead, proposed, score, hint)
            ready_first = engine.settings[READY_FIRST] != 0
            for index in range(these.shape[0] if ready_first else 0):
                slot = buffer.pins[0, layer, index]
                if engine.fetch_of[slot] < 0:
                    expert_time = compute[weights[index]]
                    _record(engine, _COMPUTE, now, now + expert_time, layer, these[index], -1)
                    now += expert_time
            while count:
                first = -1
                for n in range(count):
                    if not buffer.slots[waiting[n], FILLS] and (
                        first < 0 or engine.arrived[waiting[n]] < engine.arrived[waiting[first]]
                    ):
                        first = n
                if first < 0:
                    if not _advance(engine, np.inf, waiting, count, wanted_first, wanted):
                        return False
                    continue
                slot = waiting[first]
                count -= 1
                for n in range(first, count):
                    waiting[n] = waiting[n + 1]
                expert = buffer.slots[slot, OWNER] % buffer.shape[EXPERTS]
                if engine.arrived[slot] > now:
                    _record(engine, _STALL, now, engine.arrived[slot], layer, expert, -1)
                    now = engine.arrived[slot]
                if not ready_first:
                    continue
                index = 0
                while these[index] != expert:
                    index += 1
                expert_time = compute[weights[index]]
                _record(engine, _COMPUTE, now, now + expert_time, layer, expert, -1)
                now += expert_time
            for index in range(0 if ready_first else these.shape[0]):
                expert_time = compute[weights[index]]
                _record(engine, _COMPUTE, now, now + expert_time, layer, these[index], -1)
                now += expert_time
            _advance(engine, max(now, clock[NOW]), nobody, 0, wanted_first, wanted)
            release(buffer, 0, layer)
    return True
