"""The golden throttle against cases worked out by hand, and against a cache without prefetches."""

import random
from collections import OrderedDict

import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.records import PrefetchKind, Source
from prestage_hw.contract.registers import THROTTLE_FIELDS
from prestage_sim.model.scheduler import Throttle, kind_of

NEAR, FAR, HINT = PrefetchKind.NEAR, PrefetchKind.FAR, PrefetchKind.HINT


def _throttle(*, slots=8, expert_bytes=2048, **weights):
    model = ModelConfig(name="m", layers=4, experts=16, top_k=2, expert_bytes=expert_bytes)
    config = DeviceConfig(model=model, slots=slots, expert_bytes=expert_bytes, tile_bytes=512)
    throttle = Throttle(config)
    throttle.enable = True
    known = {"useful": 8, "price": 1, "pollution": 8, "wait": 1, "floor": 24, "probe": 10}
    throttle.register = sum(
        value << THROTTLE_FIELDS[name][0] for name, value in {**known, **weights}.items()
    )
    return throttle


def _credits(throttle):
    """Credits of near, far and hint, and which of them are on."""
    credits = []
    for kind in PrefetchKind:
        value = throttle.state >> 8 * kind & 0xFF
        credits.append(value - 256 if value > 127 else value)
    return credits, [bool(throttle.state >> 24 + kind & 1) for kind in PrefetchKind]


def _misses(throttle, count, *, first_slot=0):
    """Misses into slots that were empty."""
    for n in range(count):
        throttle.miss(0, n % 16, slot=first_slot + n, evicted=False, unused=False)


@pytest.mark.parametrize(
    ("source", "deadline", "routes", "kind"),
    [
        (Source.PREDICTOR, 6, 5, NEAR),
        (Source.PREDICTOR, 7, 5, FAR),
        (Source.PREDICTOR, 0, 255, NEAR),
        (Source.PREDICTOR, 1, 255, FAR),
        (Source.HINT, 6, 5, HINT),
        (Source.HINT, 9, 5, HINT),
    ],
)
def test_kinds(source, deadline, routes, kind):
    assert kind_of(source, deadline, routes=routes) == kind


def test_starts_switched_off():
    throttle = _throttle()
    assert _credits(throttle) == ([-25, -25, -25], [False, False, False])
    assert not any(throttle.admits(kind) for kind in PrefetchKind)
    throttle.enable = False
    assert all(throttle.admits(kind) for kind in PrefetchKind)


def test_first_probe_after_sixteen_misses():
    throttle = _throttle(slots=64)
    _misses(throttle, 15)
    assert not throttle.admits(NEAR)
    _misses(throttle, 1, first_slot=15)
    assert throttle.admits(NEAR) and throttle.admits(FAR)
    throttle.prefetch(1, 0, NEAR, slot=20, evicted=False, unused=False)
    # Near waits for 32 now; far has not probed.
    assert not throttle.admits(NEAR) and throttle.admits(FAR)
    _misses(throttle, 31, first_slot=21)
    assert not throttle.admits(NEAR)
    _misses(throttle, 1, first_slot=52)
    assert throttle.admits(NEAR)


def test_useful_probes_switch_on_and_useless_ones_off():
    throttle = _throttle(slots=64)
    credits = []
    for n in range(4):
        throttle.prefetch(1, n, FAR, slot=n, evicted=False, unused=False)
        throttle.used(n)
        credits.append(_credits(throttle)[0][FAR])
    # Each pays 1, and gets 1 + 8 back.
    assert credits == [-17, -9, -1, 7]
    assert _credits(throttle)[1] == [False, True, False]
    for n in range(31):
        assert throttle.admits(FAR)
        throttle.prefetch(2, n % 16, FAR, slot=8 + n, evicted=False, unused=False)
    assert _credits(throttle)[0][FAR] == -24 and throttle.admits(FAR)
    throttle.prefetch(3, 0, FAR, slot=40, evicted=False, unused=False)
    assert _credits(throttle) == ([-25, -25, -25], [False, False, False])


@pytest.mark.parametrize(("returned", "gain"), [(None, 8), (4, 8), (3, 6), (1, 2), (0, 0)])
def test_late_use_saves_less(returned, gain):
    throttle = _throttle()  # four tiles
    throttle.prefetch(1, 0, NEAR, slot=0, evicted=False, unused=False)
    throttle.used(0, returned=returned)
    assert _credits(throttle)[0][NEAR] == -25 + gain


def test_eighths_round_down():
    throttle = _throttle(expert_bytes=1536)  # three tiles
    throttle.prefetch(1, 0, NEAR, slot=0, evicted=False, unused=False)
    throttle.used(0, returned=2)
    # floor(16 / 3) = 5 eighths of 8
    assert _credits(throttle)[0][NEAR] == -20


def test_pollution_only_while_the_prefetch_lies_about():
    throttle = _throttle(slots=2)
    throttle.miss(0, 0, slot=0, evicted=False, unused=False)
    throttle.miss(0, 1, slot=1, evicted=False, unused=False)
    throttle.prefetch(1, 5, HINT, slot=0, evicted=True, unused=False)  # expert 0 goes
    credit = _credits(throttle)[0][HINT]
    # No eviction since that of expert 0, one hint unused: without it, expert 0 would be there.
    throttle.miss(0, 0, slot=1, evicted=True, unused=False)  # expert 1 goes
    assert _credits(throttle)[0] == [-25, -25, credit - 8]
    # One eviction since that of expert 0; the hint goes itself, and is charged no more.
    throttle.miss(0, 2, slot=0, evicted=True, unused=True)
    throttle.miss(0, 1, slot=1, evicted=True, unused=False)
    assert _credits(throttle)[0] == [-25, -25, credit - 8]


def test_dropped_prefetches_are_charged_no_more():
    throttle = _throttle(slots=2)
    throttle.miss(0, 0, slot=0, evicted=False, unused=False)
    throttle.prefetch(1, 5, HINT, slot=0, evicted=True, unused=False)
    throttle.dropped(0)
    throttle.miss(0, 0, slot=1, evicted=False, unused=False)
    assert _credits(throttle)[0][HINT] == -26  # the price alone


def test_waiting_is_charged_to_the_kind_in_front():
    throttle = _throttle(wait=3)
    throttle.miss(0, 0, slot=0, evicted=False, unused=False, waits_for=FAR)
    assert _credits(throttle)[0] == [-25, -28, -25]


def test_credits_saturate():
    throttle = _throttle(price=15, floor=127, useful=15)
    for n in range(9):
        throttle.prefetch(0, n, NEAR, slot=n % 8, evicted=n >= 8, unused=n >= 8)
    assert _credits(throttle)[0][NEAR] == -128
    for n in range(20):
        throttle.prefetch(1, n % 16, FAR, slot=n % 8, evicted=True, unused=n < 8)
        throttle.used(n % 8)
    assert _credits(throttle)[0][FAR] == 127


def test_used_probes_come_sooner_again():
    throttle = _throttle(slots=256, useful=0)
    for _ in range(3):
        throttle.prefetch(1, 0, NEAR, slot=0, evicted=False, unused=False)
    throttle.used(0)
    # Apart by 2 ** 7 after three, by 2 ** 5 after one that was used.
    _misses(throttle, 31, first_slot=1)
    assert not throttle.admits(NEAR)
    _misses(throttle, 1, first_slot=40)
    assert throttle.admits(NEAR)


def test_clear_forgets():
    throttle = _throttle(slots=2)
    throttle.miss(0, 0, slot=0, evicted=False, unused=False)
    throttle.prefetch(1, 5, HINT, slot=0, evicted=True, unused=False)
    throttle.clear()
    assert _credits(throttle) == ([-25, -25, -25], [False, False, False])
    throttle.prefetch(1, 6, HINT, slot=1, evicted=False, unused=False)
    throttle.miss(0, 0, slot=0, evicted=False, unused=False)
    # The eviction of expert 0 is from before.
    assert _credits(throttle)[0][HINT] == -26


@pytest.mark.parametrize("rate", [0.1, 0.5, 2])
@pytest.mark.parametrize("seed", range(3))
def test_charges_what_a_cache_without_prefetches_would_have_kept(seed, rate):
    """Useless prefetches into an LRU buffer: nobody is charged for what would be gone anyway."""
    slots, generator = 16, random.Random(seed)
    # One slot more, to give credit back through.
    throttle = _throttle(slots=slots + 1, useful=1, pollution=1, price=0, wait=0)
    buffer, alone = OrderedDict(), OrderedDict()  # who is in which slot, in the order of use

    def take(key):
        """Slot of a newcomer, and whether somebody left it, unused."""
        if len(buffer) < slots:
            buffer[key] = len(buffer)
            return {"slot": buffer[key], "evicted": False, "unused": False}
        left, slot = buffer.popitem(last=False)
        buffer[key] = slot
        return {"slot": slot, "evicted": True, "unused": left[0] == 3}

    charged = caused = wrongly = 0
    for _ in range(4000):
        key = (generator.randrange(3), int(16 * generator.random() ** 2))
        hit_alone = key in alone
        alone[key] = None
        alone.move_to_end(key)
        if len(alone) > slots:
            alone.popitem(last=False)
        if key in buffer:
            buffer.move_to_end(key)
        else:
            before = _credits(throttle)[0][NEAR]
            throttle.miss(*key, **take(key))
            cost = before - _credits(throttle)[0][NEAR]
            charged += cost
            caused += hit_alone
            wrongly += cost and not hit_alone
            if cost:  # Given back, so that it never saturates.
                throttle.prefetch(3, 0, NEAR, slot=slots, evicted=False, unused=False)
                throttle.used(slots)
        for _ in range(int(generator.random() < rate) + int(rate)):
            useless = (3, generator.randrange(16))
            if useless not in buffer:
                throttle.prefetch(*useless, NEAR, **take(useless))
    assert wrongly == 0
    assert caused > 100
    # What prefetches evict in turn is counted as well: the more of them, the less is charged.
    assert charged > {0.1: 0.75, 0.5: 0.55, 2: 0.3}[rate] * caused
