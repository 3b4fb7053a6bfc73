"""Which expert has to go: use rates, the predictor's values, and the search for a victim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import Policy, ValueKind

from ..._jit import inlined, kernel
from .directory import SlotState
from .state import (
    BANKS,
    EXPERTS,
    FILLS,
    LANES,
    LOCKED,
    MARK,
    OWNER,
    PASSES,
    PINS,
    POINTER,
    PREFETCHED,
    RATE,
    REMEMBERED,
    SAMPLES,
    STAMP,
    VALUE,
    BufferState,
)
from .values import keep_value, rate_after_use, use_rate

__all__ = [
    "Search",
    "Victims",
    "count_demand",
    "expert_keep",
    "find_victim",
    "layer_mark",
    "slot_worth",
]

#: Visits of a layer are counted modulo this.
_VISITS = 1024

#: Of them a prefetch remembers as many bits as this modulus needs.
_MARKS = 16

_LFU = int(Policy.LFU)


@kernel
def count_demand(state: Any, ctx: Any, layer: Any, expert: Any, first: Any) -> None:
    """Count a demand; the first one of a decision counts a visit of its layer."""
    visits = state.visits
    key = layer * state.shape[EXPERTS] + expert
    age = (visits[layer] - state.experts[key, STAMP]) % _VISITS
    if first:
        age += 1
        visits[layer] = (visits[layer] + 1) % _VISITS
        state.current[ctx] = layer
    state.experts[key, RATE] = rate_after_use(state.experts[key, RATE], age, state.decays)
    state.experts[key, STAMP] = visits[layer]


@inlined
def layer_mark(state: Any, layer: Any) -> Any:
    """What a prefetch for that layer remembers of its visits."""
    return state.visits[layer] % _MARKS


@inlined
def _divided(number: Any, by: Any) -> Any:
    """Quotient and rest, both of what is not negative: signs would take more than the division."""
    quotient = np.int64(np.uint64(number) // np.uint64(by))
    return quotient, number - quotient * by


@inlined
def expert_keep(state: Any, policy: Any, layer: Any, expert: Any, probation: Any) -> Any:
    """Worth of an expert.

    Parameters
    ----------
    state : :class:`BufferState`
        The buffer.
    policy : :class:`int`
        Anything but LRU.
    layer, expert : :class:`int`
        Which.
    probation : :class:`int`
        Confidence of a prefetch that waits for its layer; 0 for any other expert.
    """
    used = state.experts[layer * state.shape[EXPERTS] + expert]
    age = (state.visits[layer] - used[STAMP]) % _VISITS
    rate = use_rate(used[RATE], age, state.decays)
    if policy == _LFU:
        return max(rate, probation) << 4
    layers = state.visits.shape[0]
    best = np.int64(0)
    for ctx in range(state.current.shape[0]):
        current = state.current[ctx]
        if current < 0:
            continue
        distance = layer - current
        if distance < 0:
            distance += layers
        beats = state.visited[ctx, layer]
        # A division takes as long as all else here.
        beat = 0 if beats.shape[0] == 1 else expert // state.shape[LANES]
        visited = beats[beat]
        chance = state.chances[ctx, layer, expert]
        chance = np.int64(0) if visited else chance
        if probation and distance == 0:
            distance = layers
        worth = keep_value(
            max(chance, probation),
            state.reuse[ctx, layer, expert],
            rate,
            visited and not probation,
            distance,
            state.discounts,
        )
        best = max(best, worth)
    return best


@inlined
def slot_worth(state: Any, policy: Any, slot: Any) -> Any:
    """Worth of what a slot holds; -1 for a free slot."""
    held = state.slots[slot]
    if held[OWNER] < 0:
        return np.int64(-1)
    layer, expert = _divided(held[OWNER], state.shape[EXPERTS])
    probation = np.int64(0)
    if held[PREFETCHED] and held[MARK] == layer_mark(state, layer):
        probation = held[VALUE]
    return expert_keep(state, policy, layer, expert, probation)


@kernel
def find_victim(
    state: Any,
    policy: Any,
    layer: Any,
    expert: Any,
    value: Any,
    bank: Any = -1,
    strict: Any = False,
) -> Any:
    """Find the slot of least worth: -1 for none, and whether it is worth more than the candidate.

    Parameters
    ----------
    state : :class:`BufferState`
        The buffer.
    policy : :class:`int`
        Anything but LRU.
    layer, expert, value : :class:`int`
        A prefetch that has to be worth as much, and its confidence; 0 for none.
    bank : :class:`int`
        Bank whose slots alone may be taken; -1 for all.
    strict : :class:`bool`
        A victim of the candidate's own worth outbids it, too.
    """
    slots, registers = state.slots, state.registers
    banks = state.shape[BANKS]
    count, samples = slots.shape[0], state.shape[SAMPLES]
    best = second = np.int64(-1)
    best_worth = second_worth = np.int64(0)
    passes = 0
    number = registers[REMEMBERED]
    first = number >= 0
    while passes < (count + samples - 1) // samples and best < 0:
        passes += 1
        place = registers[POINTER]
        for n in range(-1 if first else 0, samples):
            if n >= 0:
                number = place
                place = place + 1 if place + 1 < count else 0
            held = slots[number]
            if held[PINS] or held[FILLS] or held[LOCKED]:
                continue
            if bank >= 0 and number % banks != bank:
                continue
            worth = slot_worth(state, policy, number)
            if best < 0 or worth < best_worth:
                second, second_worth = best, best_worth
                best, best_worth = number, worth
            elif number != best and (second < 0 or worth < second_worth):
                second, second_worth = number, worth
        registers[POINTER] = place
        first = False
    registers[PASSES] = passes
    if best < 0:
        registers[REMEMBERED] = -1
        return best, False
    outbid = False
    if value > 0:
        most = expert_keep(state, policy, layer, expert, value)
        outbid = best_worth > most or (strict and best_worth == most)
    registers[REMEMBERED] = best if outbid else second
    return best, outbid


class Search(NamedTuple):
    """End of a search.

    Parameters
    ----------
    slot : :class:`int`
        The victim; -1 where no slot may be taken.
    outbid : :class:`bool`
        Whether the victim is worth more than the candidate.
    """

    slot: int
    outbid: bool


class Victims:
    """Rank the experts in the slots, and search for the one that has to go.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are ranked.
    state : :class:`BufferState`
        The buffer.
    valued : :class:`bool`
        Whether the predictor gives values; else those that come are ignored.
    """

    def __init__(self, config: DeviceConfig, state: BufferState, *, valued: bool) -> None:
        self.config = config
        self.valued = valued
        self._state = state

    @property
    def samples(self) -> int:
        """Slots that a search looks at in one pass."""
        return int(self._state.shape[SAMPLES])

    @property
    def passes(self) -> int:
        """Passes over that many slots that the latest search took."""
        return int(self._state.registers[PASSES])

    @property
    def chances(self) -> NDArray[np.int64]:
        """V, shape ``[C, L, E]``."""
        return self._state.chances

    @property
    def reuse(self) -> NDArray[np.int64]:
        """R, shape ``[C, L, E]``."""
        return self._state.reuse

    @property
    def visited(self) -> NDArray[np.bool_]:
        """Whether R of a part of a layer is newer than V, shape ``[C, L, lane beats]``."""
        return self._state.visited

    @property
    def current(self) -> NDArray[np.int64]:
        """Layer of the latest decision of each context, -1 before the first."""
        return self._state.current

    def values(self, kind: int, ctx: int, layer: int, beat: int, values: Sequence[int]) -> None:
        """Take a beat of values."""
        if not self.valued:
            return
        lanes = self.config.predictor_lanes
        first = beat * lanes
        last = min(first + lanes, self.config.model.experts)
        table = self.reuse if kind == ValueKind.REUSE else self.chances
        table[ctx, layer, first:last] = values[: last - first]
        self.visited[ctx, layer, beat] = kind == ValueKind.REUSE

    def keep(self, policy: int, layer: int, expert: int, probation: int) -> int:
        """Worth of an expert: :func:`expert_keep`."""
        return int(expert_keep(self._state, int(policy), layer, expert, probation))

    def worth(self, policy: int, slot: SlotState) -> int:
        """Worth of what a slot holds; -1 for a free slot."""
        return int(slot_worth(self._state, int(policy), slot.number))

    def search(self, policy: int, candidate: tuple[int, int, int] | None = None) -> Search:
        """Find the slot of least worth.

        Parameters
        ----------
        policy : :class:`int`
            Anything but LRU.
        candidate : tuple of :class:`int` or None
            Layer, expert and confidence of a prefetch that has to be worth as much.
        """
        layer, expert, value = candidate or (0, 0, 0)
        slot, outbid = find_victim(self._state, int(policy), layer, expert, value)
        return Search(int(slot), bool(outbid))
