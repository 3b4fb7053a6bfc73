"""Which slot gives way: the golden buffer's rules, and two that it does not have."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._jit import inner
from ...model.buffer.buffer import find_demand_victim
from ...model.buffer.state import EXPERTS, FILLS, LOCKED, NEWER, OLDEST, OWNER, PINS
from ..plan import Evict
from .state import EVICTION, VISIT

__all__ = ["demand_victim", "farthest", "least_recent_of_a_layer", "next_use"]

_LAYER_LRU, _BELADY = int(Evict.LAYER_LRU), int(Evict.BELADY)

_NEVER = np.int64(1) << 60


@inner
def next_use(engine: Any, key: Any) -> Any:
    """Visit that uses an expert next."""
    at = engine.use_next[key]
    return engine.use_at[at] if at < engine.use_first[key + 1] else _NEVER


@inner
def farthest(engine: Any) -> Any:
    """Slot that may be taken whose expert is used last, a free one before any; -1 for none."""
    slots = engine.buffer.slots
    best, most = np.int64(-1), np.int64(-1)
    for slot in range(slots.shape[0]):
        if slots[slot, PINS] or slots[slot, FILLS] or slots[slot, LOCKED]:
            continue
        if slots[slot, OWNER] < 0:
            return np.int64(slot)
        use = next_use(engine, slots[slot, OWNER])
        if use > most:
            best, most = np.int64(slot), use
    return best


@inner
def least_recent_of_a_layer(engine: Any, layer: Any) -> Any:
    """Least recent slot of a layer, a free one before any; -1 for none.

    Where all that the layer has is in use or on its way, it is that of the layer that holds most;
    of equals, the one that was routed last, which has longest until it comes round again.
    """
    state, held = engine.buffer, engine.held
    slots, experts = state.slots, state.shape[EXPERTS]
    layers = held.shape[0]
    own, other, most = np.int64(-1), np.int64(-1), np.int64(-1)
    slot = state.registers[OLDEST]
    while slot >= 0:
        if not (slots[slot, PINS] or slots[slot, FILLS] or slots[slot, LOCKED]):
            owner = slots[slot, OWNER]
            if owner < 0:
                return slot
            # What the decision wants itself stays.
            if next_use(engine, owner) > engine.registers[VISIT]:
                if owner // experts == layer:
                    if own < 0:
                        own = slot
                else:
                    since = (layer - owner // experts) % layers
                    worth = held[owner // experts] * layers + layers - since
                    if worth > most:
                        other, most = slot, worth
        slot = slots[slot, NEWER]
    return own if own >= 0 else other


@inner
def demand_victim(engine: Any, layer: Any) -> Any:
    """Slot for a demand of a layer; -1 for none."""
    if engine.settings[EVICTION] == _BELADY:
        return farthest(engine)
    if engine.settings[EVICTION] == _LAYER_LRU:
        return least_recent_of_a_layer(engine, layer)
    return find_demand_victim(engine.buffer)
