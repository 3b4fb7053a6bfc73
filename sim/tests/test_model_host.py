"""Golden model of a device with a host mover, message by message."""

import random
from collections import Counter

import pytest

from prestage_hw.contract import MESSAGES, RECORDS, DeviceConfig, preset
from prestage_hw.contract.records import HOST_MESSAGES, ErrorCode, Phase, Policy
from prestage_hw.contract.registers import register_by_name
from prestage_sim.model.link.mover import Fetch, HostMover
from prestage_sim.model.top import Top
from prestage_tb.coverage import hit

CONFIG = DeviceConfig(
    model=preset("tiny"), slots=7, expert_bytes=1536, contexts=2, mover="host", predictor="st_moe"
)
NAMES = {message.code: name for name, message in MESSAGES.items()}


class Host:
    """A host that has all messages of the device at once, and copies when the test says so."""

    def __init__(self, config=CONFIG, *, seed=0):
        self.config = config
        self.random = random.Random(seed)
        self.mover = HostMover(config)
        self.top = Top(config, self.mover)
        self.asked = []  # FETCH that were not answered
        self.fetches = []
        self.slots = {}  # (slot, tile): layer and expert that were copied there, None meanwhile
        self.answers = []  # (name, fields) of all else
        self.held = {}  # (ctx, layer): {expert: slot} of what is ready
        self.kept = {}  # (layer, expert, copy): slot of what is locked or held
        self.awaited = Counter()

    def post(self, name, *values):
        record = MESSAGES[name].record
        self.take(self.mover.receive(MESSAGES[name].code, record.pack(self.config, *values)))

    def write(self, register, value):
        self.post("REGISTER_WRITE", register_by_name(register).address, value)

    def take(self, messages):
        for code, body in messages:
            name = NAMES[code]
            fields = RECORDS[MESSAGES[name].record.name].unpack(self.config, body)
            if name == "FETCH":
                self.fetch(fields)
            elif name == "READY":
                self.ready(fields)
            self.answers.append((name, fields))
        table = self.top.scheduler._table
        assert not any(table[tag].demand and table[tag].more for tag in table)
        prefetches = sum(not each["demand"] for each in self.asked)
        assert prefetches <= self.top.scheduler.prefetch_tiles
        self.top.buffer.check_invariants()
        for (layer, expert), slot in self.readable():
            self.check(layer, expert, slot)

    def readable(self):
        """What slots must hold: what was ready and not released."""
        for (_, layer), experts in self.held.items():
            for expert, slot in experts.items():
                yield (layer, expert), slot
        for (layer, expert, _), slot in self.kept.items():
            yield (layer, expert), slot

    def check(self, layer, expert, slot):
        for tile in range(self.config.layer_tiles[layer]):
            assert self.slots[slot, tile] == (layer, expert)

    def fetch(self, fetch):
        """The slot is nobody else's, and nothing of another fetch is on its way there."""
        who = fetch["tag"], fetch["serial"]
        for each in self.asked:
            assert each["slot"] != fetch["slot"] or (each["tag"], each["serial"]) == who
        assert fetch["slot"] not in [slot for _, slot in self.readable()]
        self.slots[fetch["slot"], fetch["tile"]] = None
        self.asked.append(fetch)
        self.fetches.append(fetch)

    def ready(self, fields):
        ctx, layer, expert, slot = (fields[n] for n in ("ctx", "layer", "expert", "slot"))
        self.check(layer, expert, slot)
        if (ctx, layer) in self.held and expert in self.awaited_of(ctx, layer):
            self.held[ctx, layer][expert] = slot

    def awaited_of(self, ctx, layer):
        return [key[2] for key in self.awaited if key[:2] == (ctx, layer)]

    def copy(self, fetch, *, failed=False):
        self.asked.remove(fetch)
        if not failed:
            self.slots[fetch["slot"], fetch["tile"]] = fetch["layer"], fetch["expert"]
        self.post("FETCHED", fetch["tag"], fetch["serial"], fetch["tile"], int(failed))

    def finish(self):
        """Copy all, in order, until the device is idle."""
        self.post("SYNC", 1)
        while self.asked:
            self.copy(self.asked[0])
        assert self.pop()[-1][0] == "SYNCED"
        assert self.top.scheduler.idle

    def pop(self):
        answers, self.answers = self.answers, []
        return [each for each in answers if each[0] != "FETCH"]

    def route(self, ctx, layer, experts):
        self.held[ctx, layer] = {}
        self.awaited.update((ctx, layer, expert) for expert in experts)
        self.post("ROUTE", ctx, layer, experts)

    def settle_answers(self):
        """Each of what was awaited is answered once; gives codes of events."""
        codes = Counter()
        for name, fields in self.pop():
            assert name in ("READY", "EVENT", "COPY"), (name, fields)
            if name == "EVENT":
                codes[ErrorCode(fields["code"])] += 1
                assert fields["code"] in (ErrorCode.BUS, ErrorCode.NO_SLOT), fields
            if name != "COPY":
                key = fields["ctx"], fields["layer"], fields["expert"]
                assert self.awaited[key] == 1, f"{name} {fields} is not awaited"
                del self.awaited[key]
        return codes


def test_candidates_wait_for_their_entry_and_demands_for_theirs():
    """The table is full of prefetches and demands; what waits goes on in order."""
    config = CONFIG.replace(inflight=4, prefetch_inflight=2, slots=8)
    host = Host(config)
    host.write("control", 2)
    for expert in range(4):
        host.post("HINT", 0, 3, expert, 255)
    assert host.top.counters["prefetch_issued"] == 2
    host.route(0, 0, [1, 2])
    # One tile of a prefetch, then all of both demands.
    assert [fetch["demand"] for fetch in host.asked] == [0] + 2 * config.tiles * [1]
    host.route(1, 0, [1, 5])
    # One joins its expert in flight; the other finds the table full.
    assert host.top.counters["merged"] == 0 and host.top.counters["demands"] == 2
    for fetch in [f for f in host.asked if f["expert"] == 1 and f["demand"]]:
        host.copy(fetch)
    assert host.top.counters["hits"] == 1 and host.top.counters["demands"] == 4
    host.finish()
    assert host.top.counters["fills"] == 7


@pytest.mark.parametrize("cause", ["release", "lock"])
def test_same_context_waits_twice(cause):
    """A layer is released and routed again while its fetch is under way; or locked."""
    host = Host()
    host.write("control", 0)
    host.route(0, 1, [3, 4])
    if cause == "lock":
        host.post("LOCK", 0, 1, 3, 1)
    else:
        host.post("RELEASE", 0, 1)
        host.post("ROUTE", 0, 1, [3, 4])
    host.post("BEGIN_TOKEN", 0, 0, 1)
    while host.asked:
        host.copy(host.asked[-1])
    got = Counter(fields["expert"] for name, fields in host.pop() if name == "READY")
    assert got == ({3: 2, 4: 1} if cause == "lock" else {3: 2, 4: 2})
    assert host.top.counters["demands"] == (2 if cause == "lock" else 4)
    host.finish()


def test_lock_takes_a_prefetch_over():
    host = Host()
    host.write("control", 2)
    host.post("HINT", 0, 1, 3, 255)
    host.post("LOCK", 1, 1, 3, 1)
    assert [(f["tile"], f["demand"]) for f in host.asked] == [(0, 0), (1, 1), (2, 1)]
    while host.asked:
        host.copy(host.asked[-1])
    ((name, fields),) = host.pop()
    assert name == "READY" and fields["ctx"] == 1
    counters = host.top.counters
    assert counters["useful"] == counters["locks"] == 1 and counters["late"] == 0


def test_failed_and_given_up():
    """Tiles that fail: of a prefetch that a demand has taken over, and of one that is given up."""
    host = Host()
    host.write("control", 2 | 16)
    host.post("HINT", 0, 1, 3, 255)
    host.route(0, 1, [3, 4])
    first = host.asked[0]
    host.copy(first, failed=True)
    while host.asked:
        host.copy(host.asked[-1])
    assert host.settle_answers() == {ErrorCode.BUS: 1}
    host.post("RELEASE", 0, 1)
    del host.held[0, 1]
    host.post("HINT", 0, 2, 3, 255)
    host.route(0, 2, [5, 6])
    (late,) = (fetch for fetch in host.asked if not fetch["demand"])
    host.copy(late, failed=True)
    host.write("control", 0)
    while host.asked:
        host.copy(host.asked[0])
    assert not host.settle_answers()
    counters = host.top.counters
    assert (counters["fill_errors"], counters["prefetch_cancelled"]) == (2, 0)
    host.finish()


def test_slot_is_given_up_for_a_demand():
    """A demand that finds no slot waits for a tile of a prefetch, not for the expert."""
    host = Host(CONFIG.replace(slots=4))
    host.write("control", 2 | 16)
    host.route(1, 0, [1, 2])
    host.route(0, 0, [1, 3])
    while host.asked:
        host.copy(host.asked[0])
    host.post("HINT", 0, 3, 6, 255)
    (tile,) = host.asked
    host.route(0, 1, [0, 4])
    assert host.asked == [tile]
    host.copy(tile)
    assert [(f["expert"], f["slot"], f["demand"]) for f in host.asked] == [(0, tile["slot"], 1)] * 3
    assert host.top.counters["prefetch_cancelled"] == 1
    while host.asked:
        host.copy(host.asked[0])
    assert host.settle_answers() == {ErrorCode.NO_SLOT: 1}
    host.finish()


def test_slot_of_a_copy_is_not_given_up():
    """The prefetch goes, though the copy was begun after it."""
    host = Host(CONFIG.replace(slots=6, replicas=2))
    host.write("control", 2 | 16)
    host.route(1, 0, [1, 2])
    host.route(0, 0, [3, 4])
    while host.asked:
        host.copy(host.asked[0])
    host.post("HINT", 0, 3, 6, 255)
    (tile,) = host.asked
    (free,) = set(range(6)) - {tile["slot"], *host.held[1, 0].values(), *host.held[0, 0].values()}
    first = next(e for e, slot in host.held[1, 0].items() if (slot ^ free) & 1)
    host.post("REPLICATE", 0, 0, first, 2)
    table = host.top.scheduler._table
    assert [(table[tag].slot, table[tag].copy) for tag in table] == [
        (tile["slot"], False),
        (free, True),
    ]
    host.route(0, 1, [0, 4])
    host.copy(tile)
    assert host.top.counters["prefetch_cancelled"] == 1
    assert {f["expert"] for f in host.asked if f["slot"] == tile["slot"]} == {0}
    while host.asked:
        host.copy(host.asked[0])
    copies = [fields for name, fields in host.answers if name == "COPY"]
    assert [(c["copy"], c["slot"]) for c in copies][-1] == (1, free)
    assert host.settle_answers() == {ErrorCode.NO_SLOT: 1}
    host.finish()


@pytest.mark.parametrize("why", ["nobody", "context", "chunk"])
def test_what_others_want_is_not_given_up(why):
    """A prefetch that another context's candidate was for, too, or that a chunk may want."""
    host = Host()
    host.write("control", 2 | 16)
    if why == "chunk":
        host.post("BEGIN_TOKEN", 0, Phase.PREFILL, 1)
    host.post("HINT", 0, 0, 3, 255)
    if why == "context":
        host.post("HINT", 1, 0, 3, 255)
    host.route(0, 0, [5, 6])
    host.copy(host.asked[0])
    while host.asked:
        host.copy(host.asked[-1])
    rest = [f for f in host.fetches if (f["layer"], f["expert"]) == (0, 3)]
    assert len(rest) == (1 if why == "nobody" else 3)
    assert host.top.counters["prefetch_cancelled"] == (why == "nobody")
    if why == "chunk":
        host.post("HINT", 0, 1, 3, 255)
        (tile,) = host.asked
        host.post("RELEASE", 0, 0)
        del host.held[0, 0]
        host.route(0, 1, [5, 6])
        host.route(0, 2, [5, 6])
        host.copy(tile)
        assert host.top.counters["prefetch_cancelled"] == 1
    host.finish()


def test_commands_wait_behind_one_that_waits():
    """Messages that bring more commands than there is room for wait, and all come in order."""
    host = Host()
    host.write("control", 0)
    host.route(0, 0, [1, 2])
    host.route(1, 0, [3, 4])
    host.route(1, 1, [5, 6])
    host.route(0, 1, [0, 7])  # has one slot
    posted = 0
    for layer in range(2, 4):
        for ctx in range(2):
            host.route(ctx, layer, [1, 2])
            posted += 1
    for n in range(20):
        host.post("LOCK", 0, 0, n % 8, 0)
    assert host.top.scheduler.command_room < CONFIG.model.top_k
    host.post("REGISTER_READ", register_by_name("device_id").address)
    assert "REGISTER_VALUE" not in [name for name, _ in host.pop()]
    for _ in range(HOST_MESSAGES):
        host.post("BEGIN_TOKEN", 0, 0, 1)
    assert host.answers[-1][1]["code"] == ErrorCode.OVERRUN
    while host.asked:
        host.copy(host.asked[0])
    names = Counter(name for name, _ in host.pop())
    assert names["REGISTER_VALUE"] == 1 and names["READY"] == 7
    assert host.top.counters["refused"] == 9


_WORLDS = {
    "st_moe": CONFIG,
    "whole": CONFIG.replace(expert_bytes=1536, tile_bytes=1536, slots=6),
    "copies": CONFIG.replace(replicas=2, slots=8),
    "sizes": CONFIG.replace(layer_bytes=(512, 1536, 1024, 1536), inflight=4, prefetch_inflight=2),
    "values": CONFIG.replace(predictor="perceptron", contexts=3),
}


@pytest.mark.parametrize("world", _WORLDS)
@pytest.mark.parametrize("seed", range(2))
def test_random(world, seed):
    """Tiles end in any order at any time; see :class:`Host` for what must hold meanwhile."""
    config = _WORLDS[world]
    host = Host(config, seed=f"{world} {seed}")
    rng, model = host.random, config.model
    clear = register_by_name("clear").address
    layers = [0] * config.contexts
    favourites = [rng.sample(range(model.experts), model.top_k) for _ in range(model.layers)]
    host.write("control", 1 | 2 | 16 | seed << 3)
    host.write("prefetch_tiles", rng.randrange(1, 5))
    if world == "values":
        host.write("policy", Policy.NEXT_USE)
        host.write("rescan_ahead", 3)
        host.write("predict_threshold", 16)
    codes, routes = Counter(), 0
    for step in range(900):
        for _ in range(rng.choice((0, 0, 1, 4))):
            if host.asked:
                host.copy(rng.choice(host.asked), failed=rng.random() < 0.02)
        codes += host.settle_answers()
        ctx = rng.randrange(config.contexts)
        waits = any(key[0] == ctx for key in host.awaited)
        mine = [key for key in host.held if key[0] == ctx]
        if mine and not waits and rng.random() < 0.8:
            del host.held[mine[0]]
            host.post("RELEASE", *mine[0])
        elif not mine and rng.random() < 0.7:
            layer = layers[ctx]
            if layer == 0:
                phase = rng.choice((Phase.DECODE, Phase.DECODE, Phase.PREFILL, Phase.VERIFY))
                host.post("BEGIN_TOKEN", ctx, phase, rng.randrange(50))
            if rng.random() < 0.3:
                favourites[layer] = rng.sample(range(model.experts), model.top_k)
            host.route(ctx, layer, favourites[layer])
            routes += 1
            if rng.random() < 0.8:
                layers[ctx] = (layer + 1) % model.layers
        if rng.random() < 0.2 and not mine:
            layer = layers[ctx] + rng.randrange(model.layers - layers[ctx])
            host.post("HINT", ctx, layer, rng.randrange(model.experts), rng.randrange(128, 256))
            host.answers = [
                (name, fields)
                for name, fields in host.answers
                if name != "EVENT" or fields["code"] != ErrorCode.HINT_PASSED
            ]
        if rng.random() < 0.02 and config.lockable and not host.awaited and world != "copies":
            layer, expert = rng.randrange(model.layers), rng.randrange(model.experts)
            _lock(host, layer, expert)
        if world == "copies" and rng.random() < 0.02:
            _replicate(host, rng.randrange(model.layers), rng.randrange(model.experts))
        if step % 300 == 299:
            host.asked.clear()
            host.take(host.mover.restart())
        if step == 600 and world != "copies":
            while host.asked:
                host.copy(host.asked[0])
            codes += host.settle_answers()
            host.held.clear()
            host.kept.clear()
            host.post("REGISTER_WRITE", clear, 2)
    while host.asked:
        host.copy(host.asked[-1])
    codes += host.settle_answers()
    assert not host.awaited
    host.finish()
    counters = host.top.counters
    ways = sum(counters[name] for name in ("hits", "misses", "late", "merged", "refused"))
    assert ways == counters["demands"] == routes * model.top_k
    assert counters["fills"] > 100 and counters["fill_errors"] and codes[ErrorCode.BUS]
    assert counters["useful"] and counters["hits"]
    if world == "st_moe" and not seed:
        assert counters["late"] and counters["merged"] and counters["prefetch_cancelled"]
    hit("mover.random")


def _lock(host, layer, expert):
    """Lock an expert, or unlock what was locked."""
    for key in list(host.kept):
        del host.kept[key]
        host.post("LOCK", 0, *key[:2], 0)
        return
    host.post("LOCK", 0, layer, expert, 1)
    while host.asked:
        host.copy(host.asked[-1])
    (answer,) = host.pop()
    if answer[0] == "READY":
        host.kept[layer, expert, 0] = answer[1]["slot"]


def _replicate(host, layer, expert):
    """Hold two copies of an expert, or give back what was held."""
    for key in list(host.kept):
        host.kept = {}
        host.post("REPLICATE", 0, *key[:2], 1)
        return
    host.post("REPLICATE", 0, layer, expert, 2)
    codes = host.pop()
    while host.asked:
        host.copy(host.asked[-1])
    answers = codes + host.pop()
    copies = [fields for name, fields in answers if name == "COPY"]
    host.kept = {(layer, expert, fields["copy"]): fields["slot"] for fields in copies}
    host.answers = [each for each in answers if each[0] != "COPY" and each[1].get("code") != 7]


def test_callable_and_messages_ask_for_the_same():
    """A host that copies at once, asked by messages or called: answers and counters are equal."""
    rng = random.Random(4)
    called, counted = [], []
    top = Top(CONFIG, lambda fetch: called.append(fetch) or True)
    host = Host()
    for step in range(200):
        layer = step % CONFIG.model.layers
        experts = rng.sample(range(CONFIG.model.experts), CONFIG.model.top_k)
        for name, values in (("ROUTE", (0, layer, experts)), ("RELEASE", (0, layer))):
            top.handle(MESSAGES[name].code, MESSAGES[name].record.pack(CONFIG, *values))
            host.post(name, *values)
            while host.asked:
                host.copy(host.asked[0])
    names = ("layer", "expert", "slot", "tile")
    counted = [Fetch(*(f[n] for n in names), bool(f["demand"])) for f in host.fetches]
    # Called, each tile ends before the next is chosen.
    assert Counter(called) == Counter(counted)
    assert top.counters == host.top.counters and top.counters["prefetch_issued"] > 50
