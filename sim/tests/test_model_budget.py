"""The golden budget and statistics against cases worked out by hand."""

import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.records import PrefetchKind, PrefetchOutcome
from prestage_hw.contract.statistics import MOST_COUNTED, statistics_word, statistics_words
from prestage_sim.model.scheduler import Budget, PrefetchStatistics
from prestage_sim.model.scheduler.budget import due_tiles

NEAR, FAR, HINT = PrefetchKind.NEAR, PrefetchKind.FAR, PrefetchKind.HINT
ISSUED, USEFUL, LATE = PrefetchOutcome.ISSUED, PrefetchOutcome.USEFUL, PrefetchOutcome.LATE
USELESS, POLLUTING = PrefetchOutcome.USELESS, PrefetchOutcome.POLLUTING

CONFIG = DeviceConfig(
    model=ModelConfig(name="m", layers=3, experts=8, top_k=2),
    slots=8,
    expert_bytes=2048,
    tile_bytes=512,
    contexts=2,
)


def test_means():
    """Eight times the mean loses an eighth, rounded down, and gains the time."""
    budget = Budget(CONFIG)
    assert budget.layer_time == budget.tile_time == 0
    budget.routed(0, now=100)
    assert budget.layer_time == 0
    budget.routed(1, now=150)  # another context's
    budget.routed(0, now=201)
    assert budget.layer_time == 101
    budget.routed(1, now=450)
    assert budget.layer_time == (8 * 101 - 101 + 300) // 8 == 125
    # From the start, then from one end to the next; one that failed does not count.
    budget.fetched(now=1000)
    budget.fetched(now=1005)
    budget.completed(failed=False, now=1040)
    assert budget.tile_time == 40
    budget.completed(failed=True, now=1050)
    assert budget.tile_time == 40
    budget.fetched(now=2000)
    budget.completed(failed=False, now=2008)
    assert budget.tile_time == (320 - 40 + 8) // 8 == 36
    budget.clear()
    assert budget.layer_time == budget.tile_time == 0


def test_long_pauses():
    budget = Budget(CONFIG)
    limit = 1 << 24
    budget.routed(0, now=0)
    budget.routed(0, now=limit)
    assert budget.layer_time == 0
    budget.routed(0, now=2 * limit - 1)
    assert budget.layer_time == limit - 1
    budget.fetched(now=0)
    budget.completed(failed=False, now=5 * limit)
    assert budget.tile_time == limit - 1


@pytest.mark.parametrize(
    ("budget", "tiles"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (7, 4), (8, 4), (15, 4)]
)
def test_due_tiles(budget, tiles):
    assert due_tiles(CONFIG, budget) == tiles


def test_late():
    """Layers of 100 cycles, tiles of 10: the rule at its edges."""
    budget = Budget(CONFIG)
    budget.routed(0, now=0)
    assert not budget.late(0, 1, left=0, budget=8, now=500)  # no mean of a tile
    budget.fetched(now=0)
    budget.completed(failed=False, now=10)
    assert not budget.late(0, 1, left=0, budget=8, now=500)  # none of a layer
    budget.routed(0, now=100)
    assert not budget.late(0, 1, left=0, budget=8, now=160)  # 40 cycles are left
    assert budget.late(0, 1, left=0, budget=8, now=161)
    assert not budget.late(0, 1, left=0, budget=4, now=180)
    assert budget.late(0, 1, left=1, budget=4, now=180)
    assert not budget.late(0, 2, left=10, budget=8, now=160)
    assert not budget.late(0, 1, left=99, budget=0, now=999)  # off
    assert not budget.late(1, 1, left=99, budget=8, now=160)  # never routed
    assert not budget.late(0, 1, left=99, budget=8, now=100 + (1 << 24))


def test_statistics():
    """Each fate of a prefetch, for the layer that it was for."""
    statistics = PrefetchStatistics(CONFIG)
    empty = {"evicted": False, "unused": False}
    statistics.prefetch(1, 4, NEAR, slot=0, **empty)
    statistics.used(0)
    statistics.prefetch(2, 5, FAR, slot=1, **empty)
    statistics.used(1, returned=3)
    statistics.prefetch(2, 6, HINT, slot=2, **empty)
    statistics.dropped(2)
    # A hint evicts a demand's expert, which is missed; the hint's is evicted unused by that.
    statistics.miss(0, 1, slot=3, **empty, polluted=False)
    statistics.prefetch(2, 7, HINT, slot=3, evicted=True, unused=False)
    statistics.miss(0, 1, slot=3, evicted=True, unused=True, polluted=True)
    count = statistics.count
    assert [count(1, NEAR, o) for o in PrefetchOutcome] == [1, 1, 0, 0, 0]
    assert [count(2, FAR, o) for o in PrefetchOutcome] == [1, 1, 1, 0, 0]
    assert [count(2, HINT, o) for o in PrefetchOutcome] == [2, 0, 0, 2, 1]
    words = range(statistics_words(CONFIG))
    assert sum(statistics.read(word) for word in words) == 10
    assert statistics.read(statistics_word(2, HINT, POLLUTING)) == 1
    assert statistics.read(len(words)) == 0
    statistics.clear()
    assert not any(statistics.read(word) for word in words)


def test_counters_stay_at_their_greatest():
    statistics = PrefetchStatistics(CONFIG)
    for _ in range(MOST_COUNTED + 2):
        statistics.prefetch(0, 0, NEAR, slot=0, evicted=False, unused=False)
    assert statistics.count(0, NEAR, ISSUED) == MOST_COUNTED == 65_535
    assert not any(statistics.count(0, NEAR, o) for o in (USEFUL, LATE, USELESS))
