"""The layers of a token, one after another."""

from __future__ import annotations

from typing import Any

import numpy as np

from prestage_hw.contract.records import Source

from ..._jit import kernel
from ..._reference import by_reference
from ...model.buffer.buffer import begin_demand, release, take_for_demand
from ...model.buffer.state import EXPERTS, FILLS, OWNER
from ...model.scheduler.queue import is_stale, queue_push
from ...model.scheduler.rescan import wake
from ...model.scheduler.throttle import count_miss, count_use
from ..events import EventKind
from .fetches import append, leave, record, remove, start, sweep, tiles_come
from .links import advance
from .prefetch import take_candidates
from .state import (
    CANCELS,
    CUTOFF,
    DEADLINE,
    DELAY,
    DEMANDED,
    DEMANDS,
    EAGER,
    FREE_AT,
    GIVEN_UP,
    KIND,
    N_CANDIDATES,
    N_DEMANDS,
    N_HITS,
    N_LATE,
    N_LATE_TILES,
    N_MISSES,
    N_POLLUTING,
    N_RIGHT,
    N_USEFUL,
    N_USEFUL_TILES,
    NOW,
    PREFETCHES,
    READY_FIRST,
    RESCANS,
    STEP,
    TILES,
    UNDER_WAY,
    VISIT,
)
from .victims import demand_victim, next_use

__all__ = ["run"]

_ATTENTION, _COMPUTE = int(EventKind.ATTENTION), int(EventKind.COMPUTE)
_STALL, _DRAFT = int(EventKind.STALL), int(EventKind.DRAFT)
_PREDICTOR = int(Source.PREDICTOR)


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
        counts[N_DEMANDS] += 1
        result = begin_demand(buffer, 0, layer, expert, index)
        slot = result[1]
        if slot < 0:
            slot = demand_victim(engine, layer)
            if slot < 0:
                return -1
            counts[N_MISSES] += 1
            leave(engine, slot)
            result = take_for_demand(buffer, 0, layer, expert, index, slot)
            counts[N_POLLUTING] += result[5]
            count_miss(engine.throttle, slot, key, result[3] != 0, result[4] != 0, busy)
            busy = np.int64(-1)
            start(engine, key, slot, True, 0, -1)
        else:
            fetch = engine.fetch_of[slot]
            if result[2]:
                counts[N_USEFUL] += 1
                counts[N_USEFUL_TILES] += engine.spent[slot]
                come = engine.settings[TILES] if fetch < 0 else tiles_come(engine, fetch)
                count_use(engine.throttle, slot, come)
            if fetch < 0:
                counts[N_HITS] += 1
                continue
            row = engine.fetches[fetch]
            if not row[DEMANDED]:
                counts[N_LATE] += 1
                counts[N_LATE_TILES] += engine.spent[slot]
                row[DEMANDED], row[GIVEN_UP] = 1, 0
                engine.registers[UNDER_WAY] -= 1
                if engine.left[fetch, 0]:
                    remove(engine, PREFETCHES, fetch)
                    append(engine, DEMANDS, fetch)
        waiting[count] = slot
        count += 1
    for expert in wanted:
        key = layer * experts + expert
        while next_use(engine, key) <= engine.registers[VISIT]:
            engine.use_next[key] += 1
    if engine.settings[CANCELS]:
        for n in range(engine.lengths[PREFETCHES]):
            row = engine.fetches[engine.lists[PREFETCHES, n]]
            if is_stale(row[DEADLINE], engine.queue.routes[0]):
                row[GIVEN_UP] = 1
        sweep(engine)
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
        if target >= engine.registers[CUTOFF]:
            continue
        deadline = (engine.queue.routes[0] + ahead[n]) % 256
        engine.proposed[target, expert[n]] = True
        # Rescans take the place of the predictor's candidates, not of hints.
        if not engine.settings[RESCANS] or hint[n] != _PREDICTOR:
            queue_push(engine.queue, 0, target, expert[n], score[n], hint[n], deadline)


@kernel
def _tell(engine: Any, layer: Any, values: Any, reuse: Any) -> None:
    """Give the buffer the predictor's values of a layer."""
    buffer = engine.buffer
    table = buffer.reuse[0, layer] if reuse else buffer.chances[0, layer]
    for e in range(values.shape[0]):
        table[e] = values[e]
    buffer.visited[0, layer] = reuse
    wake(engine.rescans, 0)


@kernel
def run(
    engine: Any,
    waiting: Any,
    begin: Any,
    end: Any,
    wanted_first: Any,
    wanted: Any,
    work: Any,
    attention: Any,
    lead: Any,
    cutoff: Any,
    ends: Any,
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
    wanted_first, wanted : array of :class:`int`
        First demand of each visit of a layer, and experts.
    work : array of :class:`float`
        Time of computing each of them.
    attention, lead : array of :class:`float`
        Time of each step's layers until their routing is known, and before the first layer.
    cutoff : array of :class:`int`
        Layer from which on nothing is prefetched, of each step.
    ends : array of :class:`float`
        Where the time goes at which each step ends.
    horizons, chances, reuse : arrays
        What the predictor says, see :class:`Values`; without horizons nothing.
    offset, ahead, proposed, score, hint : arrays
        What is proposed, see :class:`Candidates`.
    """
    engine = by_reference(engine)
    layers = engine.held.shape[0]
    counts, clock, buffer = engine.counts, engine.clock, engine.buffer
    nobody = waiting[:0]
    for step in range(begin, end):
        engine.registers[STEP], engine.registers[CUTOFF] = step, cutoff[step]
        if horizons.shape[0]:
            for layer in range(layers):
                _tell(engine, layer, chances[0, step, layer], False)
        _offer(engine, step, -1, offset, ahead, proposed, score, hint)
        if lead[step] > 0:
            now = clock[NOW]
            advance(engine, now + lead[step], nobody, 0, wanted_first, wanted)
            record(engine, _DRAFT, now, clock[NOW], -1, -1, -1)
        for layer in range(layers):
            visit = step * layers + layer
            now = clock[NOW]
            advance(engine, now + attention[step], nobody, 0, wanted_first, wanted)
            record(engine, _ATTENTION, now, clock[NOW], layer, -1, -1)
            engine.registers[VISIT] = visit
            these = wanted[wanted_first[visit] : wanted_first[visit + 1]]
            times = work[wanted_first[visit] : wanted_first[visit + 1]]
            for e in range(engine.proposed.shape[1]):
                if engine.proposed[layer, e]:
                    counts[N_CANDIDATES] += 1
                    engine.proposed[layer, e] = False
                    for expert in these:
                        if expert == e:
                            counts[N_RIGHT] += 1
            now = clock[NOW]
            count = _route(engine, layer, these, waiting)
            if count < 0:
                return False
            if horizons.shape[0]:
                _tell(engine, layer, reuse[step, layer], True)
                for h in range(1, horizons.shape[0]):
                    if layer + horizons[h] < layers:
                        target = layer + horizons[h]
                        _tell(engine, target, chances[h, step, target], False)
            if clock[DELAY] > 0:
                advance(engine, now + clock[DELAY], nobody, 0, wanted_first, wanted)
            _offer(engine, step, layer, offset, ahead, proposed, score, hint)
            if engine.settings[EAGER]:
                take_candidates(engine, wanted_first, wanted)
            ready_first = engine.settings[READY_FIRST] != 0
            for index in range(these.shape[0] if ready_first else 0):
                slot = buffer.pins[0, layer, index]
                if engine.fetch_of[slot] < 0:
                    expert_time = times[index]
                    record(engine, _COMPUTE, now, now + expert_time, layer, these[index], -1)
                    now += expert_time
            while count:
                first = -1
                for n in range(count):
                    if not buffer.slots[waiting[n], FILLS] and (
                        first < 0 or engine.arrived[waiting[n]] < engine.arrived[waiting[first]]
                    ):
                        first = n
                if first < 0:
                    if not advance(engine, np.inf, waiting, count, wanted_first, wanted):
                        return False
                    continue
                slot = waiting[first]
                count -= 1
                for n in range(first, count):
                    waiting[n] = waiting[n + 1]
                expert = buffer.slots[slot, OWNER] % buffer.shape[EXPERTS]
                if engine.arrived[slot] > now:
                    record(engine, _STALL, now, engine.arrived[slot], layer, expert, -1)
                    now = engine.arrived[slot]
                if not ready_first:
                    continue
                index = 0
                while these[index] != expert:
                    index += 1
                expert_time = times[index]
                record(engine, _COMPUTE, now, now + expert_time, layer, expert, -1)
                now += expert_time
            for index in range(0 if ready_first else these.shape[0]):
                expert_time = times[index]
                record(engine, _COMPUTE, now, now + expert_time, layer, these[index], -1)
                now += expert_time
            advance(engine, max(now, clock[NOW]), nobody, 0, wanted_first, wanted)
            release(buffer, 0, layer)
            wake(engine.rescans, -1)
        ends[step] = clock[NOW]
    return True
