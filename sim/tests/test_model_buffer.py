"""Golden model of the expert buffer, against worked cases and a model that scans everything."""

import random

import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig, preset
from prestage_hw.contract.benefit import CONFIDENCE_STEPS
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.records import BufferCode, BufferOp, Policy, RescanCode, ValueKind
from prestage_sim.model.buffer import BufferResult, ExpertBuffer

DEMAND, PREFETCH, FILL, RELEASE, CANCEL, LOCK, UNLOCK, COPY = BufferOp
RESIDENT, FILLING, ALLOCATED, NO_SLOT, OUTBID, REFUSED, _ = BufferCode
LRU, LFU, NEXT_USE = Policy

#: Three slots, one layer more than needed, two tiles an expert: small enough to work out by hand.
SMALL = DeviceConfig(
    model=ModelConfig(name="small", layers=2, experts=5, top_k=2), slots=3, expert_bytes=1024
)

CONFIGS = {
    "small": SMALL,
    "tiny": TINY_DEVICE,
    "barely": DeviceConfig(model=preset("tiny"), slots=8, contexts=4),
    "one-slot": DeviceConfig(
        model=ModelConfig(name="one", layers=1, experts=2, top_k=1), slots=1, expert_bytes=512
    ),
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=3, experts=60, top_k=3),
        slots=17,
        expert_bytes=1536,
        contexts=2,
    ),
    "gpt-oss-20b": DeviceConfig(model=preset("gpt-oss-20b"), slots=192),
}


def result(code, slot=0, **flags):
    return BufferResult(code, slot, **flags)


def fill(buffer, slot):
    """Report all tiles of a slot as arrived."""
    for tile in range(buffer.config.tiles):
        buffer.request(FILL, slot=slot, tile=tile, last=tile == buffer.config.tiles - 1)


# --- worked cases -----------------------------------------------------------------------------


def look(buffer, *, near=True, ahead=2, least=1, cutoff_layer=255):
    """What a rescan finds: layer, expert, confidence, distance."""
    code, *found = buffer.rescan(0, near=near, ahead=ahead, least=least, cutoff_layer=cutoff_layer)
    return tuple(found) if code == RescanCode.FOUND else None


def test_a_rescan_finds_what_is_missing_and_worth_most():
    buffer = ExpertBuffer(SMALL.replace(slots=6), valued=True)
    lanes = buffer.config.predictor_lanes
    pad = [0] * (lanes - 5)
    assert look(buffer) is None
    # Before the first decision layer 0 is next. Confidence 200 has 2 steps, 240 none.
    buffer.values(ValueKind.CHANCE, 0, 0, 0, [9, 200, 30, 200, 0, *pad])
    buffer.values(ValueKind.CHANCE, 0, 1, 0, [0, 0, 0, 240, 0, *pad])
    assert look(buffer) == (1, 3, 240, 2)
    assert look(buffer, ahead=1) == (0, 1, 200, 1)
    assert look(buffer, cutoff_layer=1) == (0, 1, 200, 1)
    assert look(buffer, near=False, cutoff_layer=1) is None
    assert look(buffer, ahead=1, least=201) is None
    assert look(buffer, near=False, ahead=1) is None and look(buffer, ahead=0) is None
    # What has a slot, in flight or not, is not missing.
    slot = buffer.request(PREFETCH, layer=1, expert=3, value=240).slot
    assert look(buffer) == (0, 1, 200, 1)
    buffer.request(CANCEL, slot=slot)
    assert look(buffer) == (1, 3, 240, 2)
    # Layer 0 was routed: half of its reuse value counts, for the next token.
    buffer.request(DEMAND, layer=0, expert=1, index=0)
    buffer.values(ValueKind.REUSE, 0, 0, 0, [0, 255, 0, 255, 0, *pad])
    assert look(buffer) == (1, 3, 240, 1)
    assert look(buffer, near=False) == (0, 3, 127, 2)
    # It keeps no values where none are taken.
    deaf = ExpertBuffer(SMALL)
    deaf.values(ValueKind.CHANCE, 0, 0, 0, [255] * lanes)
    assert look(deaf) is None


def test_rescans_find_what_a_look_at_everything_finds():
    rng = random.Random(5)
    layers, experts = 4, 40
    model = ModelConfig(name="wide", layers=layers, experts=experts, top_k=1)
    buffer = ExpertBuffer(DeviceConfig(model=model, slots=24, expert_bytes=512), valued=True)
    lanes = buffer.config.predictor_lanes
    said = {layer: (ValueKind.CHANCE, [0] * experts) for layer in range(layers)}
    current, found = -1, 0
    for _ in range(1500):
        layer, expert = rng.randrange(layers), rng.randrange(experts)
        if rng.random() < 0.3:
            current = layer
            slot = buffer.request(DEMAND, layer=layer, expert=expert).slot
            fill(buffer, slot)
            buffer.request(RELEASE, layer=layer)
        # Few values, so that they are often equal, or just enough.
        kind = rng.choice((ValueKind.CHANCE, ValueKind.REUSE))
        chosen = rng.sample((0, 1, 2, 3, 24, 25, 48, 49, 130, 200, 254, 255), 3)
        values = rng.choices(chosen, k=experts)
        said[layer] = kind, values
        padded = values + [0] * (-experts % lanes)
        for beat in range(len(padded) // lanes):
            part = padded[beat * lanes : (beat + 1) * lanes]
            buffer.values(kind, 0, layer, beat, part)
        near, ahead = rng.random() < 0.7, rng.randrange(layers)
        least, cutoff = rng.choice((1, 2, 24, 25, 200)), rng.choice((2, 255))
        best = None
        for distance in range(1 if near else 2, ahead + 1):
            at = (current + distance) % layers
            for e in range(experts if at < cutoff else 0):
                value = said[at][1][e] // (2 if said[at][0] == ValueKind.REUSE else 1)
                if value < least or buffer.directory.state[at * experts + e]:
                    continue
                steps = distance + CONFIDENCE_STEPS[value]
                if best is None or (steps, distance, e) < best[:3]:
                    best = steps, distance, e, at, value
        wanted = None if best is None else (best[3], best[2], best[4], best[1])
        assert look(buffer, near=near, ahead=ahead, least=least, cutoff_layer=cutoff) == wanted
        found += wanted is not None
    assert 300 < found < 1400


def test_a_strict_prefetch_is_outbid_by_an_equal():
    buffer = ExpertBuffer(SMALL.replace(slots=2), valued=True)
    buffer.policy = LFU
    for expert in range(2):
        slot = buffer.request(PREFETCH, layer=1, expert=expert, value=50).slot
        fill(buffer, slot)
    assert buffer.request(PREFETCH, layer=1, expert=2, value=50, last=True).code == OUTBID
    assert buffer.request(PREFETCH, layer=1, expert=2, value=51, last=True).code == ALLOCATED
    assert buffer.request(PREFETCH, layer=1, expert=3, value=50).code == ALLOCATED


def test_demands_take_the_least_recent_free_slot():
    buffer = ExpertBuffer(SMALL)
    assert buffer.request(DEMAND, expert=0, index=0) == result(ALLOCATED, 0)
    assert buffer.request(DEMAND, expert=1, index=1) == result(ALLOCATED, 1)
    assert buffer.request(DEMAND, layer=1, expert=0, index=0) == result(ALLOCATED, 2)
    # Slots 0 and 1 are filling and pinned, 2 too.
    assert buffer.request(DEMAND, layer=1, expert=1, index=1) == result(NO_SLOT)
    fill(buffer, 0)
    fill(buffer, 1)
    assert buffer.request(DEMAND, layer=1, expert=1, index=1) == result(NO_SLOT)
    assert buffer.request(RELEASE, layer=0) == result(RESIDENT)
    assert buffer.request(DEMAND, layer=1, expert=1, index=1) == result(ALLOCATED, 0, evicted=True)
    # (0, 0) is gone; it was a demand that evicted it, so this is no pollution. Slot 1 is next.
    assert buffer.request(DEMAND, expert=0, index=0) == result(ALLOCATED, 1, evicted=True)
    buffer.check_invariants()


def test_a_filling_slot_is_not_taken_when_released():
    buffer = ExpertBuffer(SMALL)
    buffer.request(DEMAND, expert=0, index=0)
    buffer.request(RELEASE)
    assert buffer.request(DEMAND, expert=1, index=0) == result(ALLOCATED, 1)
    assert buffer.request(DEMAND, expert=2, index=1) == result(ALLOCATED, 2)
    assert buffer.request(DEMAND, layer=1, expert=2, index=0) == result(NO_SLOT)
    fill(buffer, 0)
    assert buffer.request(DEMAND, layer=1, expert=2, index=0) == result(ALLOCATED, 0, evicted=True)


def test_first_demand_on_a_prefetch_is_flagged_once():
    buffer = ExpertBuffer(SMALL)
    assert buffer.request(PREFETCH, expert=3) == result(ALLOCATED, 0)
    assert buffer.request(PREFETCH, expert=3) == result(FILLING, 0)
    assert buffer.request(DEMAND, expert=3, index=0) == result(FILLING, 0, prefetched=True)
    buffer.request(RELEASE)
    fill(buffer, 0)
    assert buffer.request(DEMAND, expert=3, index=0) == result(RESIDENT, 0)
    buffer.request(RELEASE)
    assert buffer.request(PREFETCH, expert=3) == result(RESIDENT, 0)
    assert buffer.request(PREFETCH, expert=4) == result(ALLOCATED, 1)
    fill(buffer, 1)
    assert buffer.request(DEMAND, expert=4, index=0) == result(RESIDENT, 1, prefetched=True)


def test_a_prefetch_spares_what_the_route_touched():
    buffer = ExpertBuffer(SMALL)
    for expert in range(3):
        buffer.request(PREFETCH, expert=expert)
        fill(buffer, expert)
    # Clearing begins a route, in which all three were touched.
    assert buffer.request(PREFETCH, expert=3) == result(NO_SLOT)
    buffer.request(DEMAND, expert=0, index=0)
    buffer.request(RELEASE)
    # A candidate that is resident touches nothing: the order is 1, 2, 0.
    assert buffer.request(PREFETCH, expert=1) == result(RESIDENT, 1)
    for expert, slot in ((3, 1), (4, 2)):
        assert buffer.request(PREFETCH, expert=expert) == result(
            ALLOCATED, slot, evicted=True, evicted_unused=True
        )
    assert buffer.request(PREFETCH, expert=1) == result(NO_SLOT)
    # A demand takes slot 0 all the same, and a new route makes slot 1 fair game.
    fill(buffer, 1)
    fill(buffer, 2)
    assert buffer.request(DEMAND, expert=1, index=1) == result(
        ALLOCATED, 0, evicted=True, polluted=True
    )
    assert buffer.request(PREFETCH, expert=0) == result(NO_SLOT)
    assert buffer.request(DEMAND, layer=1, expert=3, index=0) == result(
        ALLOCATED, 1, evicted=True, evicted_unused=True
    )
    assert buffer.request(PREFETCH, expert=0) == result(
        ALLOCATED, 2, evicted=True, evicted_unused=True
    )
    buffer.check_invariants()


def test_a_refused_demand_begins_its_route():
    buffer = ExpertBuffer(SMALL)
    buffer.request(DEMAND, expert=0, index=0)
    buffer.request(DEMAND, expert=1, index=1)
    buffer.request(PREFETCH, expert=2)
    assert buffer.request(DEMAND, layer=1, expert=0, index=0) == result(NO_SLOT)
    fill(buffer, 2)
    # Touched in the route before, not in this one.
    assert buffer.request(PREFETCH, expert=3) == result(
        ALLOCATED, 2, evicted=True, evicted_unused=True
    )


def test_pollution_is_a_miss_on_what_a_prefetch_evicted():
    buffer = ExpertBuffer(SMALL)
    for expert in range(3):
        buffer.request(DEMAND, expert=expert, index=0)
        buffer.request(RELEASE)
        fill(buffer, expert)
    assert buffer.request(PREFETCH, expert=3) == result(ALLOCATED, 0, evicted=True)
    fill(buffer, 0)
    assert buffer.request(DEMAND, expert=0, index=0) == result(
        ALLOCATED, 1, evicted=True, polluted=True
    )
    buffer.request(RELEASE)
    fill(buffer, 1)
    # Evicted by a demand: not polluted. The mark of expert 0 was used up.
    assert buffer.request(DEMAND, expert=1, index=0) == result(ALLOCATED, 2, evicted=True)
    # Expert 0 is evicted by a prefetch once more, and counts once more.
    fill(buffer, 2)
    buffer.request(RELEASE)
    assert buffer.request(PREFETCH, expert=2) == result(
        ALLOCATED, 0, evicted=True, evicted_unused=True
    )
    fill(buffer, 0)
    assert buffer.request(PREFETCH, expert=3) == result(ALLOCATED, 1, evicted=True)
    fill(buffer, 1)
    buffer.request(DEMAND, layer=1, expert=0, index=0)
    buffer.request(RELEASE, layer=1)
    assert buffer.request(DEMAND, expert=0, index=0).polluted


def test_tiles_become_valid_one_by_one_and_leave_with_the_expert():
    buffer = ExpertBuffer(SMALL)
    beats = SMALL.expert_beats
    data = bytes(i % 251 for i in range(SMALL.expert_bytes))
    buffer.request(DEMAND, expert=0, index=0)
    buffer.write_expert(0, data)
    assert not any(buffer.read_beat(0, beat)[1] for beat in range(beats))
    buffer.request(FILL, slot=0, tile=0)
    assert [buffer.read_beat(0, beat)[1] for beat in range(beats)] == [True] * 32 + [False] * 32
    buffer.request(FILL, slot=0, tile=1, last=True)
    for beat in range(beats):
        assert buffer.read_beat(0, beat) == (data[beat * 16 : beat * 16 + 16], True)
    buffer.write_beat(0, 33, bytes(16))
    assert buffer.read_beat(0, 33) == (bytes(16), True)
    buffer.request(RELEASE)
    assert buffer.request(DEMAND, expert=1, index=0) == result(ALLOCATED, 1)
    assert buffer.read_beat(0, 0)[1]
    assert buffer.request(DEMAND, layer=1, expert=1, index=0) == result(ALLOCATED, 2)
    assert buffer.request(DEMAND, layer=1, expert=2, index=1) == result(ALLOCATED, 0, evicted=True)
    assert not buffer.read_beat(0, 0)[1]


def test_a_failed_fill_drops_the_expert_and_keeps_the_pins():
    buffer = ExpertBuffer(SMALL)
    buffer.request(DEMAND, expert=0, index=0)
    assert buffer.request(FILL, slot=0, tile=0, failed=True) == result(RESIDENT, 0)
    assert buffer.request(DEMAND, layer=1, expert=0, index=0) == result(ALLOCATED, 1)
    buffer.request(FILL, slot=0, tile=1)
    assert buffer.read_beat(0, SMALL.tile_beats)[1]
    assert buffer.request(FILL, slot=0, tile=1, last=True, failed=True) == result(RESIDENT, 0)
    assert not buffer.read_beat(0, SMALL.tile_beats)[1]
    # The pinned slot 0 can't be taken, so the expert comes to another, and then none is left.
    assert buffer.request(DEMAND, expert=0, index=1) == result(ALLOCATED, 2)
    assert buffer.request(DEMAND, layer=1, expert=3, index=1) == result(NO_SLOT)
    buffer.check_invariants()
    buffer.request(RELEASE)
    assert buffer.request(DEMAND, layer=1, expert=3, index=1) == result(ALLOCATED, 0)
    buffer.check_invariants()


def test_a_fill_of_a_slot_that_is_not_filling_changes_nothing():
    buffer = ExpertBuffer(SMALL)
    assert buffer.request(FILL, slot=2, tile=0, last=True) == result(RESIDENT, 2)
    assert not buffer.read_beat(2, 0)[1]
    buffer.check_invariants()


def test_clear_forgets_all_but_the_data():
    buffer = ExpertBuffer(SMALL)
    buffer.request(DEMAND, expert=0, index=0)
    buffer.write_beat(0, 0, b"\1" * 16)
    fill(buffer, 0)
    buffer.request(PREFETCH, expert=1)
    buffer.clear()
    buffer.check_invariants()
    assert buffer.read_beat(0, 0) == (b"\1" * 16, False)
    assert buffer.request(DEMAND, expert=0, index=0) == result(ALLOCATED, 0)


# --- the second model -------------------------------------------------------------------------


class Slot:
    def __init__(self, touched):
        self.touched = touched
        self.owner = None
        self.filling = self.prefetched = False
        self.tiles = set()


class ScanningBuffer:
    """The same rules with time stamps in place of an order, and scans in place of indices."""

    def __init__(self, config):
        self.config = config
        self.clear()

    def clear(self):
        self.time = self.route_began = 0
        self.slots = [
            Slot(touched=number - self.config.slots) for number in range(self.config.slots)
        ]
        self.pinned = []  # (ctx, layer, index, slot)
        self.evicted_by_prefetch = set()

    def pins(self, slot):
        return sum(pin[3] is slot for pin in self.pinned)

    def touch(self, slot):
        self.time += 1
        slot.touched = self.time

    def request(self, op, **fields):
        return getattr(self, BufferOp(op).name.lower())(**fields)

    def lookup(self, op, layer, expert):
        """The slot of an expert, how it was found, and the flags of an eviction."""
        for slot in self.slots:
            if slot.owner == (layer, expert):
                if op != PREFETCH:
                    self.touch(slot)
                return slot, FILLING if slot.filling else RESIDENT, {}
        free = [slot for slot in self.slots if not self.pins(slot) and not slot.filling]
        if op == PREFETCH:
            free = [slot for slot in free if slot.touched <= self.route_began]
        if not free:
            return None, NO_SLOT, {}
        slot = min(free, key=lambda slot: slot.touched)
        flags = {"evicted": slot.owner is not None, "evicted_unused": slot.prefetched}
        flags["polluted"] = op == DEMAND and (layer, expert) in self.evicted_by_prefetch
        if slot.owner is not None and op == PREFETCH:
            self.evicted_by_prefetch.add(slot.owner)
        self.evicted_by_prefetch.discard((layer, expert))
        slot.owner, slot.filling, slot.tiles = (layer, expert), True, set()
        slot.prefetched = op == PREFETCH
        self.touch(slot)
        return slot, ALLOCATED, flags

    def demand(self, ctx, layer, expert, index):
        if index == 0:
            self.route_began = self.time
        slot, code, flags = self.lookup(DEMAND, layer, expert)
        if slot is None:
            return BufferResult(code)
        self.pinned.append((ctx, layer, index, slot))
        prefetched, slot.prefetched = slot.prefetched, False
        return BufferResult(code, self.slots.index(slot), prefetched, **flags)

    def prefetch(self, layer, expert):
        slot, code, flags = self.lookup(PREFETCH, layer, expert)
        return BufferResult(code, 0 if slot is None else self.slots.index(slot), **flags)

    def fill(self, slot, tile, last, failed):
        number, slot = slot, self.slots[slot]
        if not failed:
            slot.tiles.add(tile)
        if last:
            slot.filling = False
        if last and failed:
            slot.owner, slot.tiles, slot.prefetched = None, set(), False
            if not self.pins(slot):
                touched = [other.touched for other in self.slots]
                slot.touched = min(self.route_began + 1, *touched) - 1
        return BufferResult(RESIDENT, number)

    def release(self, ctx, layer):
        if not any(pin[:2] == (ctx, layer) for pin in self.pinned):
            return BufferResult(REFUSED)
        self.pinned = [pin for pin in self.pinned if pin[:2] != (ctx, layer)]
        return BufferResult(RESIDENT)


class Traffic:
    """Random legal operations in any order that keeps the rules."""

    def __init__(self, config, seed):
        self.config = config
        self.random = random.Random(seed)
        self.forget()

    def forget(self):
        self.routes = {}  # (ctx, layer): experts not yet demanded, with their index
        self.filling = {}  # slot: [next tile, a tile failed]

    def next(self):
        """One operation and its fields; None to clear."""
        model = self.config.model
        while True:
            kind = self.random.random()
            layer = min(int(self.random.expovariate(1)), model.layers - 1)
            if kind < 0.002:
                self.forget()
                return None
            if kind < 0.4:
                key = self.random.randrange(self.config.contexts), layer
                if key not in self.routes:
                    experts = self.random.sample(range(model.experts), model.top_k)
                    self.routes[key] = list(enumerate(experts))
                if self.routes[key]:
                    index, expert = self.routes[key][0]
                    fields = {"ctx": key[0], "layer": layer, "expert": expert, "index": index}
                    return DEMAND, fields
            elif kind < 0.55:
                expert = self.random.randrange(model.experts)
                return PREFETCH, {"layer": layer, "expert": expert}
            elif kind < 0.85 and self.filling:
                slot = self.random.choice(list(self.filling))
                tile, failed = self.filling[slot]
                now = failed or self.random.random() < 0.05
                last = tile == self.config.tiles - 1 or now and self.random.random() < 0.5
                failed = now if last else now and not failed
                return FILL, {"slot": slot, "tile": tile, "last": last, "failed": failed}
            elif kind >= 0.85 and self.routes:
                ctx, layer = self.random.choice(list(self.routes))
                return RELEASE, {"ctx": ctx, "layer": layer}

    def done(self, op, fields, answer):
        """Take note of an answer."""
        if op == DEMAND:
            route = self.routes[fields["ctx"], fields["layer"]]
            if answer.code != NO_SLOT or self.random.random() < 0.3:
                del route[0]
        elif op == FILL:
            slot = self.filling[fields["slot"]]
            slot[0] += 1
            slot[1] |= fields["failed"]
            if fields["last"]:
                del self.filling[fields["slot"]]
        elif op == RELEASE:
            del self.routes[fields["ctx"], fields["layer"]]
        if answer.code == ALLOCATED:
            self.filling[answer.slot] = [0, False]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_second_model(name, seed):
    config = CONFIGS[name]
    buffer, witness = ExpertBuffer(config), ScanningBuffer(config)
    traffic = Traffic(config, seed)
    seen = set()
    for step in range(6000):
        work = traffic.next()
        if work is None:
            buffer.clear()
            witness.clear()
            continue
        op, fields = work
        untouchable = {
            number
            for number, slot in enumerate(witness.slots)
            if slot.filling or witness.pins(slot)
        }
        answer = buffer.request(op, **fields)
        assert answer == witness.request(op, **fields), f"step {step}: {op.name} {fields}"
        if answer.code == ALLOCATED:
            assert answer.slot not in untouchable
        traffic.done(op, fields, answer)
        seen.add((op, answer.code))
        if step % 100 == 0:
            buffer.check_invariants()
            for slot in range(config.slots):
                for tile in range(config.tiles):
                    ok = buffer.read_beat(slot, tile * config.tile_beats)[1]
                    assert ok == (tile in witness.slots[slot].tiles)
    codes = (RESIDENT, FILLING, ALLOCATED, NO_SLOT)
    expected = {(op, code) for op in (DEMAND, PREFETCH) for code in codes}
    if name == "gpt-oss-20b":
        expected -= {(DEMAND, NO_SLOT), (PREFETCH, NO_SLOT)}
    assert seen >= expected | {(FILL, RESIDENT), (RELEASE, RESIDENT)}


# --- copies -----------------------------------------------------------------------------------

#: Two banks of four slots, of which six may be locked or hold copies.
BANKS = DeviceConfig(
    model=ModelConfig(name="banks", layers=2, experts=8, top_k=2),
    slots=8,
    expert_bytes=1024,
    replicas=2,
)


def copy(buffer, number, *, keep=True, expert=0, fetch=True):
    """Hold a copy of an expert of layer 0 or give it back; it is fetched if it is to be."""
    answer = buffer.request(COPY, expert=expert, value=number, last=keep)
    if fetch and answer.code == ALLOCATED:
        fill(buffer, answer.slot)
    buffer.check_invariants()
    return answer


def test_copies_are_in_banks_of_their_own():
    buffer = ExpertBuffer(BANKS)
    buffer.request(DEMAND, expert=3)  # slot 0
    assert copy(buffer, 0) == result(ALLOCATED, 1)
    # Slot 2 is the least recent one of the other bank.
    assert copy(buffer, 1, fetch=False) == result(ALLOCATED, 2)
    assert copy(buffer, 1) == copy(buffer, 1, keep=False) == result(FILLING, 2)
    fill(buffer, 2)
    assert copy(buffer, 1) == result(RESIDENT, 2)
    assert buffer.locked == 2
    # A route goes on finding the expert itself, and nothing evicts either of them.
    assert buffer.request(DEMAND, expert=0, index=1) == result(RESIDENT, 1)
    buffer.request(RELEASE)
    for expert in range(1, 8):
        answer = buffer.request(DEMAND, layer=1, expert=expert)
        fill(buffer, answer.slot)
        buffer.request(RELEASE, layer=1)
        assert answer.slot not in (1, 2)
    # The expert itself is held as long as there are copies.
    assert copy(buffer, 0, keep=False) == result(REFUSED)
    assert copy(buffer, 1, keep=False) == result(RESIDENT, 2)
    assert copy(buffer, 1, keep=False) == result(REFUSED)
    assert copy(buffer, 0, keep=False) == result(RESIDENT, 1)
    assert copy(buffer, 0, keep=False) == result(REFUSED)
    assert buffer.locked == 0
    # The slot of the copy is the next to be taken.
    assert buffer.request(DEMAND, layer=1, expert=0) == result(ALLOCATED, 2)


def test_copies_need_their_expert():
    buffer = ExpertBuffer(BANKS)
    assert copy(buffer, 1) == copy(buffer, 0, keep=False) == result(REFUSED)
    slot = buffer.request(DEMAND, expert=0).slot
    assert copy(buffer, 0) == copy(buffer, 1) == result(FILLING, slot)
    assert copy(buffer, 0, keep=False) == copy(buffer, 1, keep=False) == result(REFUSED)
    fill(buffer, slot)
    assert copy(buffer, 1) == result(REFUSED)
    assert copy(buffer, 0) == result(RESIDENT, slot)
    assert copy(buffer, 1).code == ALLOCATED
    with pytest.raises(ValueError, match="Copy must be between 0 and 1, not 2"):
        buffer.request(COPY, value=2, last=True)
    with pytest.raises(ValueError, match="Operation must be a BufferOp, not <BufferOp.COPY: 7>"):
        ExpertBuffer(TINY_DEVICE).request(COPY, value=0, last=True)


def test_a_copy_that_fails_is_dropped():
    buffer = ExpertBuffer(BANKS)
    copy(buffer, 0)
    answer = copy(buffer, 1, fetch=False)
    buffer.request(FILL, slot=answer.slot, tile=0, last=True, failed=True)
    buffer.check_invariants()
    assert buffer.locked == 1
    assert copy(buffer, 1) == result(ALLOCATED, answer.slot)
    # The expert itself: nothing is held any more.
    answer = copy(buffer, 0, expert=1, fetch=False)
    buffer.request(FILL, slot=answer.slot, tile=0, last=True, failed=True)
    buffer.check_invariants()
    assert buffer.locked == 2
    assert copy(buffer, 1, expert=1) == result(REFUSED)


def test_copies_and_locks_share_a_limit():
    buffer = ExpertBuffer(BANKS)
    for expert in range(3):
        assert [copy(buffer, number, expert=expert).code for number in (0, 1)] == [ALLOCATED] * 2
    assert buffer.locked == BANKS.lockable == 6
    assert copy(buffer, 0, expert=4) == buffer.request(LOCK, expert=4) == result(NO_SLOT)
    # What is held already may be locked, too, and stays when its copies go.
    assert buffer.request(LOCK, expert=0).code == RESIDENT
    for number in (1, 0):
        assert copy(buffer, number, keep=False).code == RESIDENT
    assert buffer.locked == 5
    assert copy(buffer, 0).code == RESIDENT
    assert buffer.request(UNLOCK, expert=0).code == RESIDENT
    buffer.check_invariants()
    assert buffer.locked == 5


@pytest.mark.parametrize("policy", Policy)
def test_a_copy_finds_no_slot_in_a_full_bank(policy):
    buffer = ExpertBuffer(BANKS)
    buffer.policy = policy
    first = copy(buffer, 0).slot
    other = 1 - first % 2
    # All slots of the other bank fill, those of the first one are free.
    slots = [buffer.request(PREFETCH, layer=1, expert=expert).slot for expert in range(1, 8)]
    for slot in set(slots) - {slot for slot in slots if slot % 2 == other}:
        assert buffer.request(CANCEL, slot=slot).code == RESIDENT
    assert copy(buffer, 1) == result(NO_SLOT)
    assert buffer.request(DEMAND, expert=1).code == ALLOCATED


def test_clear_forgets_copies():
    buffer = ExpertBuffer(BANKS)
    copy(buffer, 0)
    copy(buffer, 1, fetch=False)
    buffer.clear()
    buffer.check_invariants()
    assert buffer.locked == 0
    assert copy(buffer, 1) == result(REFUSED)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        ((0, "held", False), "a copy of what is not held"),
        ((1, "copy", 0), "in two slots"),
        ((0, "links", {}), "are not those of the experts"),
        ((2, "held", True), "is held without an owner"),
    ],
)
def test_invariants_know_copies(spoil, match):
    buffer = ExpertBuffer(BANKS)
    copy(buffer, 0)
    copy(buffer, 1)
    slot, name, value = spoil
    setattr(buffer.directory.slots[slot], name, value)
    with pytest.raises(AssertionError, match=match):
        buffer.check_invariants()


# --- values and policies ----------------------------------------------------------------------

#: Experts of SMALL are 0 to 4 in lanes of eight.
LANES = SMALL.predictor_lanes


def valued(policy, *, slots=3, contexts=1, victim_samples=0):
    config = DeviceConfig(
        model=ModelConfig(name="small", layers=4, experts=5, top_k=1),
        slots=slots,
        contexts=contexts,
        expert_bytes=512,
        victim_samples=victim_samples,
    )
    buffer = ExpertBuffer(config, valued=True)
    buffer.policy = policy
    return buffer


def tell(buffer, kind, layer, **values):
    """Values of experts given as e0=..., e1=...; others 0."""
    row = [0] * LANES
    ctx = values.pop("ctx", 0)
    for name, value in values.items():
        row[int(name[1:])] = value
    buffer.values(kind, ctx, layer, 0, row)


def use(buffer, layer, expert, *, ctx=0):
    """Demand an expert, fetch it if it's missing, and release it."""
    answer = buffer.request(DEMAND, ctx=ctx, layer=layer, expert=expert)
    if answer.code == ALLOCATED:
        fill(buffer, answer.slot)
    assert buffer.request(RELEASE, ctx=ctx, layer=layer) == result(RESIDENT)
    return answer


def residents(buffer):
    experts = buffer.config.model.experts
    return {divmod(slot.owner, experts) for slot in buffer.directory.slots if slot.owner >= 0}


def test_lfu_evicts_what_was_used_least_often():
    buffer = valued(LFU)
    for expert in (0, 0, 1, 1, 2, 0, 1):
        use(buffer, 0, expert)
    assert residents(buffer) == {(0, 0), (0, 1), (0, 2)}
    # LRU would give up expert 0 now.
    use(buffer, 0, 3)
    assert residents(buffer) == {(0, 0), (0, 1), (0, 3)}


def test_use_rates_decay_with_the_visits_of_their_layer():
    buffer = valued(LFU)
    victims = buffer.victims
    use(buffer, 0, 0)
    assert victims.keep(LFU, 0, 0, 0) == 16 << 4
    use(buffer, 1, 1)  # another layer's visits don't count
    assert victims.keep(LFU, 0, 0, 0) == 16 << 4
    use(buffer, 0, 1)
    assert victims.keep(LFU, 0, 0, 0) == 15 << 4
    for _ in range(63):
        use(buffer, 0, 1)
    assert victims.keep(LFU, 0, 0, 0) == 0
    # Rounding down twice lets the rate of what is always used settle there.
    assert victims.keep(LFU, 0, 1, 0) == 129 << 4


def test_next_use_evicts_what_is_worth_least():
    buffer = valued(NEXT_USE)
    for expert in (0, 1, 2):
        use(buffer, 0, expert)
    tell(buffer, ValueKind.CHANCE, 0, e0=10, e1=90, e2=40)
    use(buffer, 1, 0)
    assert residents(buffer) == {(0, 1), (0, 2), (1, 0)}
    # Expert 1 of layer 0 was not chosen this time, and R says that it won't be soon.
    tell(buffer, ValueKind.REUSE, 0, e1=5, e2=200)
    tell(buffer, ValueKind.CHANCE, 1, e0=100)
    use(buffer, 1, 1)
    assert residents(buffer) == {(0, 2), (1, 0), (1, 1)}


def test_keep_value_by_hand():
    buffer = valued(NEXT_USE)
    use(buffer, 1, 4)
    victims = buffer.victims
    tell(buffer, ValueKind.CHANCE, 3, e0=100)
    # Distance 2, no use, no R: 2 * 100 in 1/512.
    assert victims.keep(NEXT_USE, 3, 0, 0) == 200 * round(256 * (63 / 64) ** 2) >> 5
    tell(buffer, ValueKind.REUSE, 3, e0=64)
    assert victims.keep(NEXT_USE, 3, 0, 0) == 64 * round(256 * (63 / 64) ** 2) >> 5
    tell(buffer, ValueKind.CHANCE, 3, e0=100)
    worth = 200 + (156 * 13 * 64 >> 12)
    assert victims.keep(NEXT_USE, 3, 0, 0) == worth * round(256 * (63 / 64) ** 2) >> 5
    # The layer under way comes round at once, or a whole token later if it was visited.
    tell(buffer, ValueKind.CHANCE, 1, e0=100)
    assert victims.keep(NEXT_USE, 1, 0, 0) == 200 * 255 >> 5
    tell(buffer, ValueKind.REUSE, 1, e0=100)
    assert victims.keep(NEXT_USE, 1, 0, 0) == 100 * round(256 * (63 / 64) ** 4) >> 5


def test_the_greatest_keep_value_of_the_contexts_counts():
    buffer = valued(NEXT_USE, contexts=2)
    victims = buffer.victims
    tell(buffer, ValueKind.CHANCE, 2, e0=50)
    buffer.values(ValueKind.CHANCE, 1, 2, 0, [90] + [0] * (LANES - 1))
    assert victims.keep(NEXT_USE, 2, 0, 0) == 0  # no context is under way
    use(buffer, 2, 1)
    assert victims.keep(NEXT_USE, 2, 0, 0) == 100 * 255 >> 5
    use(buffer, 2, 1, ctx=1)
    assert victims.keep(NEXT_USE, 2, 0, 0) == 180 * 255 >> 5


def test_a_prefetch_has_to_be_worth_its_victim():
    buffer = valued(NEXT_USE)
    for expert in (0, 1, 2):
        use(buffer, 0, expert)
    tell(buffer, ValueKind.CHANCE, 0, e0=100, e1=150, e2=200)
    assert buffer.request(PREFETCH, layer=1, expert=0, value=60) == result(OUTBID)
    assert residents(buffer) == {(0, 0), (0, 1), (0, 2)}
    taken = buffer.request(PREFETCH, layer=1, expert=0, value=140)
    assert taken == result(ALLOCATED, 0, evicted=True)
    # Without a value it takes whatever is found.
    fill(buffer, 0)
    assert buffer.request(PREFETCH, layer=1, expert=1).code == ALLOCATED


def test_probation_ends_when_the_layer_is_routed():
    buffer = valued(NEXT_USE)
    use(buffer, 0, 0)
    assert buffer.request(PREFETCH, layer=1, expert=1, value=140).code == ALLOCATED
    assert buffer.request(PREFETCH, layer=1, expert=2, value=160).code == ALLOCATED
    fill(buffer, 1)
    fill(buffer, 2)
    tell(buffer, ValueKind.CHANCE, 0, e0=255)
    # No weaker candidate takes the place of a prefetch that waits.
    assert buffer.request(PREFETCH, layer=1, expert=3, value=139) == result(OUTBID)
    assert buffer.request(PREFETCH, layer=1, expert=3, value=140).code == ALLOCATED
    fill(buffer, 1)
    # Used: it counts by its use rate; not used in time: it counts for nothing.
    first = buffer.request(DEMAND, layer=1, expert=2)
    assert first == result(RESIDENT, 2, prefetched=True)
    buffer.request(RELEASE, layer=1)
    assert buffer.victims.worth(NEXT_USE, buffer.directory.slots[1]) == 0
    assert buffer.victims.worth(NEXT_USE, buffer.directory.slots[2]) > 0
    taken = buffer.request(PREFETCH, layer=2, expert=0, value=1)
    assert taken == result(ALLOCATED, 1, evicted=True, evicted_unused=True)


def test_searches_go_round_and_remember_the_runner_up():
    assert valued(NEXT_USE, slots=20).victims.samples == 20
    buffer = valued(NEXT_USE, slots=20, victim_samples=8)
    victims = buffer.victims
    assert victims.samples == 8
    experts = [(layer, expert) for layer in range(4) for expert in range(5)]
    for layer, expert in experts:
        use(buffer, layer, expert)
    where = {slot.owner: number for number, slot in enumerate(buffer.directory.slots)}
    assert len(where) == 20
    buffer.clear()
    for number, slot in enumerate(buffer.directory.slots):
        slot.owner = number
    victims.current[0] = 0
    chances = [50] * 20
    chances[3], chances[6], chances[9] = 20, 30, 40
    victims.chances[0] = [[chances[5 * layer + e] for e in range(5)] for layer in range(4)]
    # Slots 0 to 7, then 8 to 15 beside slot 6, then 16 to 3 beside slot 9.
    assert victims.search(NEXT_USE).slot == 3
    assert victims.search(NEXT_USE).slot == 6
    assert victims.search(NEXT_USE).slot == 3
    # A pass in which no slot may be taken is followed by another.
    for number, slot in enumerate(buffer.directory.slots):
        slot.pins = number != 9
    assert victims.search(NEXT_USE).slot == 9
    for slot in buffer.directory.slots:
        slot.pins = 1
    assert victims.search(NEXT_USE).slot == -1
    assert victims.passes == 3


def test_what_is_freed_is_looked_at_first():
    buffer = valued(LFU)
    for expert in (0, 1):
        use(buffer, 0, expert)
    slot = buffer.request(PREFETCH, layer=1, expert=0, value=9).slot
    assert buffer.request(CANCEL, slot=slot) == result(RESIDENT, slot)
    assert buffer.request(PREFETCH, layer=2, expert=0, value=1) == result(ALLOCATED, slot)


def test_a_slot_that_is_dropped_is_the_least_recent():
    """By recency a prefetch that is given up costs no place, even while its route goes on."""
    buffer = ExpertBuffer(SMALL)
    for number in range(SMALL.slots - 1):
        fill(buffer, buffer.request(DEMAND, layer=0, expert=number, index=0).slot)
        buffer.request(RELEASE, layer=0)
    slot = buffer.request(PREFETCH, layer=1, expert=0).slot
    assert list(buffer.recency)[-1] == slot
    assert buffer.request(CANCEL, slot=slot) == result(RESIDENT, slot)
    assert list(buffer.recency)[0] == slot and not buffer.recency.touched(slot)
    assert buffer.request(PREFETCH, layer=1, expert=1) == result(ALLOCATED, slot)


# --- cancel, locks, refusals ------------------------------------------------------------------


def test_only_a_prefetch_in_flight_is_cancelled():
    buffer = ExpertBuffer(SMALL)
    slot = buffer.request(PREFETCH, expert=0).slot
    buffer.request(FILL, slot=slot, tile=0)
    assert buffer.read_beat(slot, 0)[1]
    assert buffer.request(CANCEL, slot=slot) == result(RESIDENT, slot)
    assert not buffer.read_beat(slot, 0)[1]
    assert buffer.request(CANCEL, slot=slot) == result(REFUSED)
    # A fill that arrives late changes nothing.
    buffer.request(FILL, slot=slot, tile=1, last=True)
    assert residents(buffer) == set()
    slot = buffer.request(PREFETCH, expert=0).slot
    buffer.request(DEMAND, expert=0)
    assert buffer.request(CANCEL, slot=slot) == result(REFUSED)
    fill(buffer, slot)
    assert buffer.request(CANCEL, slot=slot) == result(REFUSED)
    buffer.check_invariants()
    slot = buffer.request(PREFETCH, expert=1).slot
    assert buffer.request(LOCK, expert=1) == result(FILLING, slot, prefetched=True)
    assert buffer.request(CANCEL, slot=slot) == result(REFUSED)
    buffer.check_invariants()
    # The prefetch was used by the lock; a demand doesn't use it once more.
    assert buffer.request(LOCK, expert=1) == result(FILLING, slot)
    assert buffer.request(DEMAND, ctx=0, layer=0, expert=1, index=1) == result(FILLING, slot)


@pytest.mark.parametrize("policy", Policy)
def test_locked_experts_stay(policy):
    buffer = valued(policy)
    assert buffer.request(LOCK, layer=2, expert=4) == result(ALLOCATED, 0)
    fill(buffer, 0)
    assert buffer.request(LOCK, layer=2, expert=4) == result(RESIDENT, 0)
    for layer in range(4):
        for expert in range(4):
            use(buffer, layer, expert)
    assert (2, 4) in residents(buffer)
    # One slot has to be left to each demand at a time.
    assert buffer.request(LOCK, layer=3, expert=3).code == RESIDENT
    assert buffer.request(LOCK, layer=0, expert=0) == result(NO_SLOT)
    assert buffer.request(LOCK, layer=3, expert=2) == result(NO_SLOT)
    assert buffer.request(UNLOCK, layer=2, expert=4) == result(RESIDENT, 0)
    assert buffer.request(UNLOCK, layer=2, expert=4) == result(REFUSED)
    assert buffer.request(UNLOCK, layer=0, expert=0) == result(REFUSED)
    buffer.check_invariants()


def test_a_failed_fill_of_a_locked_expert_ends_the_lock():
    buffer = valued(LRU)
    slot = buffer.request(LOCK, layer=0, expert=0).slot
    buffer.request(FILL, slot=slot, last=True, failed=True)
    assert buffer.locked == 0
    assert buffer.request(UNLOCK, layer=0, expert=0) == result(REFUSED)
    buffer.check_invariants()


def test_a_release_without_a_pin_is_refused():
    buffer = ExpertBuffer(SMALL)
    assert buffer.request(RELEASE, layer=1) == result(REFUSED)
    buffer.request(DEMAND, layer=1, expert=0)
    assert buffer.request(RELEASE, layer=0) == result(REFUSED)
    assert buffer.request(RELEASE, layer=1) == result(RESIDENT)
    assert buffer.request(RELEASE, layer=1) == result(REFUSED)


def test_refuses_bad_values():
    buffer = valued(LRU)
    with pytest.raises(ValueError, match="Layer must be between 0 and 3, not 4"):
        tell(buffer, ValueKind.CHANCE, 4)
    with pytest.raises(ValueError, match="Context must be between 0 and 0, not 1"):
        tell(buffer, ValueKind.CHANCE, 0, ctx=1)
    with pytest.raises(ValueError, match="Beat must be between 0 and 0, not 1"):
        buffer.values(ValueKind.CHANCE, 0, 0, 1, [0] * LANES)
    with pytest.raises(ValueError, match="Values must be 8 in number, not 1"):
        buffer.values(ValueKind.CHANCE, 0, 0, 0, [0])
    with pytest.raises(ValueError, match="Value must be between 0 and 255, not 256"):
        buffer.request(PREFETCH, value=256)


# --- invariants and refusals ------------------------------------------------------------------


def test_invariants_notice_damage():
    def damaged(damage):
        buffer = ExpertBuffer(SMALL)
        buffer.request(DEMAND, expert=0, index=0)
        buffer.request(PREFETCH, expert=1)
        fill(buffer, 1)
        buffer.check_invariants()
        damage(buffer)
        with pytest.raises(AssertionError):
            buffer.check_invariants()

    damaged(lambda buffer: setattr(buffer.directory.slots[2], "owner", 0))
    damaged(lambda buffer: setattr(buffer.directory.slots[0], "owner", 4))
    damaged(lambda buffer: setattr(buffer.directory.slots[0], "owner", -1))
    damaged(lambda buffer: setattr(buffer.directory.slots[1], "filling", True))
    damaged(lambda buffer: setattr(buffer.directory.slots[1], "pins", 1))
    damaged(lambda buffer: setattr(buffer.directory.slots[2], "prefetched", True))
    damaged(lambda buffer: buffer.directory.pins.clear())
    damaged(lambda buffer: buffer.directory.state.__setitem__(9, 1))
    damaged(lambda buffer: buffer.directory.slot_of.__setitem__(0, 1))
    damaged(lambda buffer: buffer.directory.evicted_by_prefetch.add(0))
    damaged(lambda buffer: buffer.storage.valid.__setitem__(2, 1))


@pytest.mark.parametrize(
    ("op", "fields", "message"),
    [
        (DEMAND, {"layer": 2}, "Layer must be between 0 and 1, not 2"),
        (PREFETCH, {"expert": 5}, "Expert must be between 0 and 4, not 5"),
        (PREFETCH, {"expert": -1}, "Expert must be between 0 and 4, not -1"),
        (DEMAND, {"ctx": 1}, "Context must be between 0 and 0, not 1"),
        (RELEASE, {"ctx": 1}, "Context must be between 0 and 0, not 1"),
        (DEMAND, {"index": 2}, "Index must be between 0 and 1, not 2"),
        (FILL, {"slot": 3}, "Slot must be between 0 and 2, not 3"),
        (FILL, {"tile": 2}, "Tile must be between 0 and 1, not 2"),
        (7, {}, "Operation must be a BufferOp, not 7"),
    ],
)
def test_refuses_what_is_out_of_range(op, fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertBuffer(SMALL).request(op, **fields)


def test_refuses_a_demand_before_the_release():
    buffer = ExpertBuffer(SMALL)
    buffer.request(DEMAND, expert=0, index=0)
    with pytest.raises(
        ValueError, match="Context 0 must release layer 0 before it demands index 0"
    ):
        buffer.request(DEMAND, expert=1, index=0)


def test_refuses_bad_data():
    buffer = ExpertBuffer(SMALL)
    with pytest.raises(ValueError, match="Slot must be between 0 and 2, not 3"):
        buffer.read_beat(3, 0)
    with pytest.raises(ValueError, match="Beat must be between 0 and 63, not 64"):
        buffer.write_beat(0, 64, bytes(16))
    with pytest.raises(ValueError, match="Beat must be 16 bytes, not 15"):
        buffer.write_beat(0, 0, bytes(15))
    with pytest.raises(ValueError, match="Expert must be 1024 bytes, not 512"):
        buffer.write_expert(0, bytes(512))
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        ExpertBuffer(3)
