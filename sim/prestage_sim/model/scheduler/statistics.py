"""Golden model of the statistics of prefetches: what became of them, by layer and kind."""

from __future__ import annotations

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import PrefetchKind, PrefetchOutcome
from prestage_hw.contract.statistics import (
    MOST_COUNTED,
    statistics_word,
    statistics_words,
)

__all__ = ["PrefetchStatistics"]


class PrefetchStatistics:
    """Counters of each layer and kind, which stay at their greatest value.

    Whose prefetch it was is noted for each slot, and for each expert who evicted it last.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self._tiles = config.layer_tiles
        self.words = statistics_words(config)
        self._owners: dict[int, tuple[int, int, PrefetchKind | None]] = {}
        self._evictors: dict[tuple[int, int], tuple[int, PrefetchKind]] = {}
        self.clear()

    def clear(self) -> None:
        """Set all counters to 0. Whose prefetches lie in the buffer stays known."""
        self._values = [0] * self.words

    def read(self, word: int) -> int:
        """A word of the table."""
        return self._values[word] if word < self.words else 0

    def count(self, layer: int, kind: PrefetchKind, outcome: PrefetchOutcome) -> int:
        """One counter."""
        return self._values[statistics_word(layer, kind, outcome)]

    def miss(
        self, layer: int, expert: int, *, slot: int, evicted: bool, unused: bool, polluted: bool
    ) -> None:
        """Count a demand that was given a slot; ``polluted``: a prefetch had evicted its expert."""
        if polluted:
            self._add(*self._evictors[layer, expert], PrefetchOutcome.POLLUTING)
        if evicted:
            self._evict(slot, unused=unused)
        self._owners[slot] = (layer, expert, None)

    def prefetch(
        self,
        layer: int,
        expert: int,
        kind: PrefetchKind,
        *,
        slot: int,
        evicted: bool,
        unused: bool,
    ) -> None:
        """Count a prefetch that was given a slot."""
        self._add(layer, kind, PrefetchOutcome.ISSUED)
        if evicted:
            victim = self._evict(slot, unused=unused)
            self._evictors[victim] = layer, kind
        self._owners[slot] = (layer, expert, kind)

    def copied(self, layer: int, expert: int, *, slot: int, evicted: bool, unused: bool) -> None:
        """Count that a copy was given a slot: it is nobody's prefetch."""
        if evicted:
            self._evict(slot, unused=unused)
        self._owners[slot] = (layer, expert, None)

    def used(self, slot: int, *, returned: int | None = None) -> None:
        """Count a demand for a prefetch that had so many tiles; None stands for all."""
        layer, _, kind = self._owners[slot]
        assert kind is not None
        self._add(layer, kind, PrefetchOutcome.USEFUL)
        if returned is not None and returned < self._tiles[layer]:
            self._add(layer, kind, PrefetchOutcome.LATE)

    def dropped(self, slot: int) -> None:
        """Count a prefetch that was given up, or failed, before a demand came."""
        layer, _, kind = self._owners[slot]
        assert kind is not None
        self._add(layer, kind, PrefetchOutcome.USELESS)

    def _evict(self, slot: int, *, unused: bool) -> tuple[int, int]:
        """An expert gives way."""
        layer, expert, kind = self._owners[slot]
        if unused:
            assert kind is not None
            self._add(layer, kind, PrefetchOutcome.USELESS)
        return layer, expert

    def _add(self, layer: int, kind: PrefetchKind, outcome: PrefetchOutcome) -> None:
        word = statistics_word(layer, kind, outcome)
        self._values[word] = min(self._values[word] + 1, MOST_COUNTED)
