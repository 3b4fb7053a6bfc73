"""State of the expert buffer, in arrays that compiled functions work on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig

from .values import DECAYS, discounts

__all__ = ["BufferState", "clear_state", "create_state"]

#: States of an expert.
EMPTY, FILLING, READY = range(3)

#: Columns of :attr:`BufferState.slots`.
OWNER, FILLS, PREFETCHED, PINS, LOCKED, VALUE, MARK, OLDER, NEWER, TOUCHED = range(10)

#: Bits of ``LOCKED``: by a lock, and for the sake of copies.
BY_LOCK, BY_COPY = 1, 2

#: Columns of :attr:`BufferState.copies` beside the slots of copies 1 and those after it.
NUMBER = 0

#: Columns of :attr:`BufferState.experts`.
STATE, SLOT, PUSHED, RATE, STAMP = range(5)

#: Places of :attr:`BufferState.shape`.
EXPERTS, LANES, SAMPLES, BANKS, LOCKABLE = range(5)

#: Places of :attr:`BufferState.registers`.
POLICY, LOCKS, ROUTE, OLDEST, NEWEST, POINTER, REMEMBERED, PASSES = range(8)


class BufferState(NamedTuple):
    """All that a buffer knows, but for the bytes and the tile-valid bits.

    Parameters
    ----------
    shape : array of ``int64``
        Experts of a layer, lanes of a beat of values, slots that a search looks at in one pass,
        banks, slots that may be locked.
    registers : array of ``int64``
        Policy, slots that are locked, number of the route, least and most recent slot, where the
        next search starts, slot that the last one remembered (-1 for none), its passes.
    slots : array of ``int64``, shape ``[S, 10]``
        Of each slot: key of its expert (-1 for none), whether it is being filled, whether it came
        by a prefetch and was not demanded since, contexts that hold it, what it is locked by; of a
        prefetch its confidence and the visits of its layer at that time; the next slots in the
        order of recency that are older and newer (-1 at the ends), route of its last touch.
    copies : array of ``int64``, shape ``[S, replicas]``
        Of each slot: number of the copy that is there, 0 for an expert itself; of an expert itself
        the slots of copy 1 and those after it (-1 for none).
    experts : array of ``int64``, shape ``[L * E, 5]``
        Of each expert: ``EMPTY``, ``FILLING`` or ``READY``, its slot, whether a prefetch evicted it
        last, its use rate, and the visits of its layer when it was used last.
    pins : array of ``int64``, shape ``[C, L, k]``
        Slot that is pinned at each index, -1 for none.
    chances, reuse : array of ``int64``, shape ``[C, L, E]``
        V and R of each context.
    visited : array of :class:`bool`, shape ``[C, L, lane beats]``
        Whether R of a part of a layer is newer than V.
    visits : array of ``int64``, shape ``[L]``
        Visits of each layer, modulo 1024.
    current : array of ``int64``, shape ``[C]``
        Layer of the latest decision of each context, -1 before the first.
    discounts, decays : array of ``int64``
        Tables of ``values.py``.
    """

    shape: NDArray[np.int64]
    registers: NDArray[np.int64]
    slots: NDArray[np.int64]
    copies: NDArray[np.int64]
    experts: NDArray[np.int64]
    pins: NDArray[np.int64]
    chances: NDArray[np.int64]
    reuse: NDArray[np.int64]
    visited: NDArray[np.bool_]
    visits: NDArray[np.int64]
    current: NDArray[np.int64]
    discounts: NDArray[np.int64]
    decays: NDArray[np.int64]


def create_state(config: DeviceConfig) -> BufferState:
    """An empty buffer, policy LRU."""
    model, contexts = config.model, config.contexts
    values = (contexts, model.layers, model.experts)
    state = BufferState(
        shape=np.array(
            [
                *(model.experts, config.predictor_lanes, config.victim_pass),
                *(config.replicas, config.lockable),
            ],
            np.int64,
        ),
        registers=np.zeros(8, np.int64),
        slots=np.zeros((config.slots, 10), np.int64),
        copies=np.zeros((config.slots, config.replicas), np.int64),
        experts=np.zeros((model.layers * model.experts, 5), np.int64),
        pins=np.zeros((contexts, model.layers, model.top_k), np.int64),
        chances=np.zeros(values, np.int64),
        reuse=np.zeros(values, np.int64),
        visited=np.zeros((contexts, model.layers, config.lane_beats), np.bool_),
        visits=np.zeros(model.layers, np.int64),
        current=np.zeros(contexts, np.int64),
        discounts=np.array(discounts(model.layers), np.int64),
        decays=np.array(DECAYS, np.int64),
    )
    clear_state(state)
    return state


def clear_state(state: BufferState) -> None:
    """Forget all but the policy: slot 0 is the least recent, the last slot the most."""
    policy = state.registers[POLICY]
    for table in (state.registers, state.slots, state.experts, state.chances, state.reuse):
        table[:] = 0
    state.visited[:] = False
    state.visits[:] = 0
    state.current[:] = -1
    state.pins[:] = -1
    state.copies[:] = -1
    state.copies[:, NUMBER] = 0
    slots = len(state.slots)
    order = np.arange(slots)
    state.slots[:, OWNER] = -1
    state.slots[:, OLDER] = order - 1
    state.slots[:, NEWER] = order + 1
    state.slots[-1, NEWER] = -1
    state.slots[:, TOUCHED] = -1
    state.registers[POLICY] = policy
    state.registers[NEWEST] = slots - 1
    state.registers[REMEMBERED] = -1
