"""Which prefetch begins next."""

from __future__ import annotations

from typing import Any

import numpy as np

from prestage_hw.contract.records import PrefetchKind, Source

from ..._jit import inner
from ...model.buffer.buffer import find_prefetch_victim, take_for_prefetch
from ...model.buffer.rescan import rescan
from ...model.buffer.state import EMPTY, EXPERTS, OWNER, STATE
from ...model.scheduler.queue import queue_take
from ...model.scheduler.rescan import next_rescan, rescanned, rest
from ...model.scheduler.throttle import count_prefetch, prefetch_kind, throttle_admits
from ..plan import Evict
from .fetches import leave, start
from .state import (
    CUTOFF,
    EVICTION,
    FORESEES,
    LOOK,
    N_ISSUED,
    N_OUTBID,
    N_THROTTLED,
    PREFETCH_LIMIT,
    RESCAN_LEAST,
    RESCANS,
    UNDER_WAY,
    VISIT,
)
from .victims import farthest, least_recent_of_a_layer, next_use

__all__ = ["take_candidates"]

_LAYER_LRU, _BELADY = int(Evict.LAYER_LRU), int(Evict.BELADY)
_PREDICTOR = int(Source.PREDICTOR)
_NEAR, _FAR = int(PrefetchKind.NEAR), int(PrefetchKind.FAR)


@inner
def _prefetch(
    engine: Any, key: Any, score: Any, deadline: Any, kind: Any, strict: Any = False
) -> Any:
    """Begin to prefetch an expert, if it is given a slot; a strict one takes none of its worth."""
    layer, expert = divmod(key, engine.buffer.shape[EXPERTS])
    outbid = False
    if engine.settings[EVICTION] == _BELADY:
        slot = farthest(engine)
    elif engine.settings[EVICTION] == _LAYER_LRU:
        slot = least_recent_of_a_layer(engine, layer)
    else:
        slot, outbid = find_prefetch_victim(engine.buffer, layer, expert, score, strict)
    if slot < 0 or outbid:
        engine.counts[N_OUTBID] += 1
        return False
    leave(engine, slot)
    result = take_for_prefetch(engine.buffer, layer, expert, score, slot)
    engine.counts[N_ISSUED] += 1
    count_prefetch(engine.throttle, slot, key, kind, result[3] != 0, result[4] != 0)
    start(engine, key, slot, False, deadline, kind)
    return True


@inner
def _prefetch_queued(engine: Any) -> Any:
    """Begin to prefetch the best candidate that is given a slot; False if there is none."""
    while True:
        ctx, layer, expert, score, source, deadline = queue_take(engine.queue)
        if ctx < 0:
            return False
        kind = prefetch_kind(source, deadline, engine.queue.routes[ctx])
        if not throttle_admits(engine.throttle, kind):
            engine.counts[N_THROTTLED] += 1
            continue
        key = layer * engine.buffer.shape[EXPERTS] + expert
        if engine.buffer.experts[key, STATE] != EMPTY:
            continue
        if _prefetch(engine, key, score, deadline, kind):
            return True


@inner
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
            slot = farthest(engine)
            if slot < 0:
                return False
            owner = buffer.slots[slot, OWNER]
            if owner >= 0 and next_use(engine, owner) <= visit:
                return False
            _prefetch(engine, key, np.int64(0), np.int64(0), np.int64(0))
            return True
        visit += 1
    registers[LOOK] = visit
    return False


@inner
def _prefetch_rescanned(engine: Any) -> Any:
    """Begin to prefetch the best of what is missing by the latest values; False if none is."""
    settings, routes = engine.settings, engine.queue.routes
    cutoff = engine.registers[CUTOFF]
    if next_rescan(engine.rescans) < 0:
        return False
    near = throttle_admits(engine.throttle, _NEAR)
    most = settings[RESCANS] if throttle_admits(engine.throttle, _FAR) else np.int64(1)
    key, score, ahead = rescan(engine.buffer, 0, near, most, settings[RESCAN_LEAST], cutoff)
    rescanned(engine.rescans, 0, key >= 0)
    if key < 0:
        return False
    deadline = (routes[0] + ahead) % 256
    kind = prefetch_kind(_PREDICTOR, deadline, routes[0])
    if not _prefetch(engine, key, score, deadline, kind, True):
        rest(engine.rescans, 0)
        return False
    return True


@inner
def take_candidates(engine: Any, wanted_first: Any, wanted: Any) -> None:
    """Begin prefetches as long as there is a candidate, and room for one more."""
    while engine.registers[UNDER_WAY] < engine.settings[PREFETCH_LIMIT]:
        if engine.settings[FORESEES]:
            if not _prefetch_foreseen(engine, wanted_first, wanted):
                break
        elif not _prefetch_queued(engine) and not (
            engine.settings[RESCANS] and _prefetch_rescanned(engine)
        ):
            break
