"""The table of what became of prefetches, by layer and kind."""

from __future__ import annotations

from .params import DeviceConfig
from .records import PrefetchKind, PrefetchOutcome

__all__ = [
    "COUNT_BITS",
    "MOST_COUNTED",
    "OUTCOME_BITS",
    "KIND_BITS",
    "STATISTICS_TABLE",
    "statistics_word",
    "statistics_words",
]

#: Number of the table. It can only be read, and is cleared with the counters.
STATISTICS_TABLE = 254

#: Width of a counter, in bits. Counters stay at their greatest value.
COUNT_BITS = 16

#: Greatest value of a counter.
MOST_COUNTED = (1 << COUNT_BITS) - 1

#: Bits of a word's number that say which outcome and which kind it counts. Words for outcomes and
#: kinds that there are not read 0.
OUTCOME_BITS, KIND_BITS = 3, 2


def statistics_word(layer: int, kind: PrefetchKind, outcome: PrefetchOutcome) -> int:
    """Number of the word that counts this outcome of prefetches for a layer of a kind."""
    return (layer << KIND_BITS | kind) << OUTCOME_BITS | outcome


def statistics_words(config: DeviceConfig) -> int:
    """Words of the table."""
    return config.model.layers << KIND_BITS + OUTCOME_BITS
