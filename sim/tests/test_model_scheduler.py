"""Golden model of the scheduler."""

import random
import zlib
from collections import Counter

import pytest

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.pattern import expert_memory, expert_pattern
from prestage_hw.contract.records import ErrorCode, Source
from prestage_sim.model.buffer import ExpertBuffer
from prestage_sim.model.scheduler import Event, Ready, Scheduler
from prestage_sim.model.scheduler.scheduler import Memory

CONFIG = DeviceConfig(
    model=preset("tiny"), slots=4, expert_bytes=1024, address_bits=32, data_bytes=4, contexts=2
)


def create(config=CONFIG, *, failing=()):
    counters = Counter()
    scheduler = Scheduler(
        config,
        buffer=ExpertBuffer(config),
        memory=Memory(expert_memory(config), failing=failing),
        counters=counters,
    )
    return scheduler, counters


def contents(scheduler, slot):
    """Bytes of a slot, None where a tile is not valid."""
    config = scheduler.config
    beats = [scheduler.buffer.read_beat(slot, beat) for beat in range(config.expert_beats)]
    return b"".join(data for data, _ in beats) if all(ok for _, ok in beats) else None


def candidate(ctx, layer, expert, *, deadline, source=Source.PREDICTOR):
    return ctx, layer, expert, 9, int(source), deadline


def test_miss_then_hit():
    scheduler, counters = create()
    answers = scheduler.demand(0, 1, [5, 2])
    assert answers == [Ready(0, 1, 5, 0), Ready(0, 1, 2, 1)]
    for answer in answers:
        expected = expert_pattern(1, answer.expert, size=CONFIG.expert_bytes).tobytes()
        assert contents(scheduler, answer.slot) == expected
    scheduler.release(0, 1)
    assert scheduler.demand(0, 1, [7, 2]) == [Ready(0, 1, 2, 1), Ready(0, 1, 7, 2)]
    assert counters == {
        "demands": 4,
        "misses": 3,
        "hits": 1,
        "fills": 3,
        "demand_bytes": 3 * 1024,
        "pollution": 0,
    }


def test_prefetch_is_useful():
    scheduler, counters = create()
    scheduler.demand(0, 0, [0, 1])
    scheduler.offer([candidate(0, 1, 3, deadline=2)])
    assert scheduler.demand(0, 1, [3, 4])[0] == Ready(0, 1, 3, 2)
    assert counters["prefetch_issued"] == counters["useful"] == counters["hits"] == 1
    assert counters["prefetch_bytes"] == 1024


def test_candidates_that_are_dropped():
    scheduler, counters = create()
    scheduler.demand(0, 0, [0, 1])
    # Slots 0 and 1 are pinned, 2 and 3 are free: of three new candidates one finds no slot.
    scheduler.offer([candidate(0, 1, e, deadline=2) for e in (1, 2, 3)])
    assert (counters["prefetch_issued"], counters["prefetch_no_slot"]) == (2, 1)
    scheduler.offer([candidate(0, 1, 2, deadline=2), candidate(0, 0, 1, deadline=2)])
    assert counters["prefetch_redundant"] == 2
    scheduler.offer([candidate(0, 1, 5, deadline=1), candidate(0, 1, 5, deadline=129)])
    # 128 routes ahead is the farthest deadline that is not stale.
    assert (counters["prefetch_stale"], counters["prefetch_no_slot"]) == (1, 2)
    # Of another context, which has not routed anything yet.
    scheduler.offer([candidate(1, 1, 5, deadline=0)])
    assert counters["prefetch_stale"] == 2


def test_disabled_predictor():
    scheduler, counters = create()
    scheduler.enable = False
    scheduler.offer(
        [
            candidate(0, 1, 3, deadline=1),
            candidate(0, 1, 4, deadline=1, source=Source.HINT),
        ]
    )
    assert counters["prefetch_issued"] == 1
    assert scheduler.demand(0, 1, [3, 4])[0] == Ready(0, 1, 4, 0)


def test_useless_and_pollution():
    scheduler, counters = create()
    scheduler.demand(0, 0, [0, 1])
    scheduler.release(0, 0)
    scheduler.demand(0, 1, [0, 1])
    # The prefetches take the slots of layer 0, which nobody holds.
    scheduler.offer([candidate(0, 2, e, deadline=3) for e in (6, 7)])
    assert counters["evictions"] == 2
    scheduler.release(0, 1)
    scheduler.demand(0, 0, [0, 1])
    scheduler.release(0, 0)
    assert counters["pollution"] == 2
    scheduler.demand(0, 3, [0, 1])
    assert counters["useless"] == 2


def test_all_slots_pinned():
    scheduler, counters = create()
    scheduler.demand(0, 0, [0, 1])
    scheduler.demand(0, 1, [0, 1])
    assert scheduler.demand(1, 1, [3, 0]) == [
        Event(ErrorCode.NO_SLOT, 1, 1, 3, 0),
        Ready(1, 1, 0, 2),
    ]
    assert counters["refused"] == 1


def test_refused_after_what_is_in_flight():
    """A demand without a slot waits until nothing is in flight."""
    scheduler, counters = create()
    scheduler.demand(0, 0, [0, 1])
    scheduler.demand(0, 1, [0])
    assert scheduler.demand(1, 1, [5, 3]) == [
        Ready(1, 1, 5, 3),
        Event(ErrorCode.NO_SLOT, 1, 1, 3, 0),
    ]
    assert counters["refused"] == 1 and counters["fills"] == 4


def test_bus_error():
    address = CONFIG.expert_address(1, 2)
    scheduler, counters = create(failing=[(address + 700, address + 701)])
    answers = scheduler.demand(0, 1, [2, 3])
    # 512-byte tiles of 64-beat bursts: the second tile's first burst spans bytes 512 to 767.
    assert answers == [
        Event(ErrorCode.BUS, 0, 1, 2, address + 512),
        Ready(0, 1, 3, 1),
    ]
    assert counters["fill_errors"] == 1 and counters["fills"] == 1
    assert counters["demand_bytes"] == 1024 + 512
    assert contents(scheduler, 0) is None
    scheduler.release(0, 1)
    scheduler.memory.failing.clear()
    assert isinstance(scheduler.demand(0, 1, [2, 3])[0], Ready)


def test_failing_prefetch_tells_nobody():
    scheduler, counters = create(failing=[(0, 1)])
    scheduler.offer([candidate(0, 0, 0, deadline=1)])
    assert counters["fill_errors"] == 1 and counters["prefetch_bytes"] == 0


def test_expert_base():
    scheduler, _ = create()
    scheduler.expert_base = CONFIG.expert_bytes
    slot = scheduler.demand(0, 0, [3, 4])[0].slot
    assert contents(scheduler, slot) == expert_pattern(0, 4, size=CONFIG.expert_bytes).tobytes()


def test_parts_of_an_expert_lie_in_arrays_of_their_own():
    config = CONFIG.replace(parts=(512, CONFIG.expert_bytes - 512))
    counters = Counter()
    memory = bytes(n // 512 % 256 for n in range(1 << 16))
    scheduler = Scheduler(
        config, buffer=ExpertBuffer(config), memory=Memory(memory), counters=counters
    )
    scheduler.bases = [512, 40 * 512]
    slot = scheduler.demand(0, 0, [3, 4])[0].slot
    second = 40 + 3 * (config.tiles - 1)
    tiles = [4, *range(second, second + config.tiles - 1)]
    assert contents(scheduler, slot) == b"".join(bytes([tile] * 512) for tile in tiles)
    # What fails in the second part is told with its address there.
    scheduler.memory.failing.append(((second + 1 - config.tiles) * 512, second * 512))
    scheduler.release(0, 0)
    (event,) = [e for e in scheduler.demand(0, 0, [2, 5]) if isinstance(e, Event)]
    assert event.address == (second + 1 - config.tiles) * 512


def test_address_space_wraps():
    """An expert may lie across the end of the address space."""
    config = CONFIG.replace(address_bits=16)
    counters = Counter()
    memory = bytes(n // 512 for n in range(1 << 16))
    scheduler = Scheduler(
        config, buffer=ExpertBuffer(config), memory=Memory(memory), counters=counters
    )
    scheduler.expert_base = (1 << 16) - 512
    assert scheduler.demand(0, 0, [0, 1]) == [Ready(0, 0, 0, 0), Ready(0, 0, 1, 1)]
    assert contents(scheduler, 0) == bytes([127] * 512 + [0] * 512)
    assert counters["fills"] == 2


def test_bad_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        Scheduler(None, buffer=None, memory=None, counters={})
    scheduler, _ = create()
    with pytest.raises(ValueError, match="Experts of a decision must be distinct, but 3 repeats"):
        scheduler.demand(0, 0, [3, 3])


@pytest.mark.parametrize("seed", range(4))
def test_random_decisions_are_answered_with_the_right_bytes(seed):
    """Every demand is answered once, and what is ready holds the expert."""
    generator = random.Random(seed)
    scheduler, counters = create()
    model = CONFIG.model
    for step in range(200):
        ctx, layer = step % 2, step // 2 % model.layers
        experts = generator.sample(range(model.experts), model.top_k)
        answers = scheduler.demand(ctx, layer, experts)
        assert Counter(a.expert for a in answers) == Counter(experts)
        for answer in answers:
            expected = expert_pattern(layer, answer.expert, size=CONFIG.expert_bytes).tobytes()
            assert contents(scheduler, answer.slot) == expected
        scheduler.offer(
            [
                candidate(ctx, (layer + 1) % model.layers, e, deadline=(step // 2 + 2) % 256)
                for e in generator.sample(range(model.experts), 3)
            ]
        )
        scheduler.release(ctx, layer)
        scheduler.buffer.check_invariants()
    assert counters["demands"] == counters["hits"] + counters["misses"]
    assert counters["useful"] and counters["prefetch_redundant"] and counters["evictions"]


#: Layers whose experts have two, one, three and one tile.
SIZES = CONFIG.replace(expert_bytes=1536, layer_bytes=(1024, 512, 1536, 512), checksums=True)


def test_layers_of_different_sizes():
    scheduler, counters = create(SIZES)
    moved = 0
    for layer, size in enumerate(SIZES.layer_bytes):
        for answer in scheduler.demand(0, layer, [5, 7]):
            valid = scheduler.buffer.storage.valid[answer.slot]
            assert valid == (1 << size // 512) - 1
            held = b"".join(
                scheduler.buffer.read_beat(answer.slot, beat)[0] for beat in range(size // 4)
            )
            assert held == expert_pattern(layer, answer.expert, size=size).tobytes()
            # What lies behind its end is not valid.
            assert size == 1536 or not scheduler.buffer.read_beat(answer.slot, size // 4)[1]
        moved += 2 * size
        assert counters["demand_bytes"] == moved
        scheduler.release(0, layer)
    scheduler.offer([candidate(0, 2, 1, deadline=5)])
    assert counters["prefetch_bytes"] == 1536
    scheduler.offer([candidate(0, 3, 1, deadline=5)])
    assert counters["prefetch_bytes"] == 1536 + 512


def test_errors_of_layers_of_different_sizes():
    last = SIZES.expert_address(2, 3) + 1024
    scheduler, counters = create(SIZES, failing=[(last + 4, last + 8)])
    assert scheduler.demand(0, 2, [3]) == [Event(ErrorCode.BUS, 0, 2, 3, last)]
    assert (counters["demand_bytes"], counters["fill_errors"]) == (1024, 1)
    assert [type(answer) for answer in scheduler.demand(0, 1, [7])] == [Ready]
    # The right sum of a short expert, then a wrong one.
    for wrong in (0, 1):
        size = SIZES.layer_bytes[3]
        value = zlib.crc32(expert_pattern(3, 2, size=size).tobytes()) ^ wrong
        scheduler.checksums.write(3 * 8 + 2, value)
        scheduler.buffer.clear()
        (answer,) = scheduler.demand(0, 3, [2])
        assert isinstance(answer, Event if wrong else Ready), answer
    assert answer == Event(ErrorCode.CHECKSUM, 0, 3, 2, SIZES.expert_address(3, 2))
