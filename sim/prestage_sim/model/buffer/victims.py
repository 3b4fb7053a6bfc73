"""Which expert has to go: use rates, the predictor's values, and the search for a victim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import Policy, ValueKind

from .directory import Directory, SlotState
from .values import DECAYS, discounts, keep_value, rate_after_use, use_rate

__all__ = ["Search", "Victims", "victim_samples"]

#: Visits of a layer are counted modulo this.
_VISITS = 1024

#: Of them a prefetch remembers as many bits as this modulus needs.
_MARKS = 16


def victim_samples(config: DeviceConfig) -> int:
    """Slots that a search looks at in one pass."""
    return min(config.slots, max(8, 32 // config.contexts))


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
    directory : :class:`Directory`
        Where they are.
    valued : :class:`bool`
        Whether the predictor gives values; else those that come are ignored.

    Attributes
    ----------
    samples : :class:`int`
        Slots that a search looks at in one pass.
    chances, reuse : array of :class:`int`, shape ``[C, L, E]``
        V and R of each context.
    visited : array of :class:`bool`, shape ``[C, L, lane beats]``
        Whether R of a part of a layer is newer than V.
    passes : :class:`int`
        Passes over ``samples`` slots that the latest search took.
    """

    def __init__(self, config: DeviceConfig, directory: Directory, *, valued: bool) -> None:
        self.config = config
        self.directory = directory
        self.valued = valued
        self.samples = victim_samples(config)
        self._discounts = np.array(discounts(config.model.layers), np.int64)
        self._decays = np.array(DECAYS, np.int64)
        self.clear()

    def clear(self) -> None:
        """Forget all values and uses."""
        model, contexts = self.config.model, self.config.contexts
        shape = (contexts, model.layers, model.experts)
        self.chances = np.zeros(shape, np.int64)
        self.reuse = np.zeros(shape, np.int64)
        self.visited = np.zeros((contexts, model.layers, self.config.lane_beats), np.bool_)
        self.visits = [0] * model.layers
        self._rates = [(0, 0)] * (model.layers * model.experts)
        #: Layer of the latest decision of each context that had one.
        self.current: dict[int, int] = {}
        self.passes = 0
        self._pointer = 0
        self._remembered = -1

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

    def demand(self, ctx: int, layer: int, expert: int, *, first: bool) -> None:
        """Count a demand; the first one of a decision counts a visit of its layer."""
        key = self.directory.key(layer, expert)
        rate, stamp = self._rates[key]
        age = (self.visits[layer] - stamp) % _VISITS + first
        if first:
            self.visits[layer] = (self.visits[layer] + 1) % _VISITS
            self.current[ctx] = layer
        rate = int(rate_after_use(rate, age, self._decays))
        self._rates[key] = rate, self.visits[layer]

    def mark(self, layer: int) -> int:
        """What a prefetch for that layer remembers of its visits."""
        return self.visits[layer] % _MARKS

    def freed(self, slot: int) -> None:
        """Look at a slot that became free first."""
        self._remembered = slot

    def keep(self, policy: int, layer: int, expert: int, probation: int) -> int:
        """Worth of an expert.

        Parameters
        ----------
        policy : :class:`int`
            Anything but LRU.
        layer, expert : :class:`int`
            Which.
        probation : :class:`int`
            Confidence of a prefetch that waits for its layer; 0 for any other expert.
        """
        key = self.directory.key(layer, expert)
        rate, stamp = self._rates[key]
        age = (self.visits[layer] - stamp) % _VISITS
        rate = int(use_rate(rate, age, self._decays))
        if policy == Policy.LFU:
            return max(rate, probation) << 4
        best = 0
        for ctx, current in self.current.items():
            distance = (layer - current) % self.config.model.layers
            visited = bool(self.visited[ctx, layer, expert // self.config.predictor_lanes])
            chance = 0 if visited else int(self.chances[ctx, layer, expert])
            if probation and distance == 0:
                distance = self.config.model.layers
            worth = keep_value(
                max(chance, probation),
                int(self.reuse[ctx, layer, expert]),
                rate,
                visited and not probation,
                distance,
                self._discounts,
            )
            best = max(best, int(worth))
        return best

    def worth(self, policy: int, slot: SlotState) -> int:
        """Worth of what a slot holds; -1 for a free slot."""
        if slot.owner < 0:
            return -1
        layer, expert = divmod(slot.owner, self.config.model.experts)
        waits = slot.prefetched and slot.mark == self.mark(layer)
        return self.keep(policy, layer, expert, slot.value if waits else 0)

    def search(
        self,
        policy: int,
        candidate: tuple[int, int, int] | None = None,
        *,
        bank: int | None = None,
    ) -> Search:
        """Find the slot of least worth.

        Parameters
        ----------
        policy : :class:`int`
            Anything but LRU.
        candidate : tuple of :class:`int` or None
            Layer, expert and confidence of a prefetch that has to be worth as much.
        bank : :class:`int` or None
            Bank whose slots alone may be taken.
        """
        slots = self.directory.slots
        best: tuple[int, int] | None = None
        second: tuple[int, int] | None = None
        self.passes = 0
        most = -(-self.config.slots // self.samples)
        todo = [self._remembered] if self._remembered >= 0 else []
        while self.passes < most and best is None:
            self.passes += 1
            todo += [(self._pointer + n) % self.config.slots for n in range(self.samples)]
            self._pointer = (self._pointer + self.samples) % self.config.slots
            for number in todo:
                slot = slots[number]
                if slot.pins or slot.filling or slot.locked or slot.held:
                    continue
                if bank is not None and number % self.config.replicas != bank:
                    continue
                entry = self.worth(policy, slot), number
                if best is None or entry[0] < best[0]:
                    best, second = entry, best
                elif number != best[1] and (second is None or entry[0] < second[0]):
                    second = entry
            todo = []
        if best is None:
            self._remembered = -1
            return Search(-1, False)
        outbid = candidate is not None and best[0] > self.keep(policy, *candidate)
        kept = best if outbid else second
        self._remembered = kept[1] if kept else -1
        return Search(best[1], outbid)
