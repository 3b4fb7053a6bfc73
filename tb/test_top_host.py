# amaranth: UnusedElaboratable=no
"""A whole device with a host mover against the golden model, over real link bytes.

::

    host ─▶ rx ┌─────┐
    host ◀─ tx │ Top │   FETCH ─▶ the bench's copies ─▶ FETCHED
               └─────┘
"""

import random
from collections import Counter
from pathlib import Path

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from prestage_hw.contract import (
    MESSAGES,
    RECORDS,
    REGISTERS,
    DeviceConfig,
    ModelConfig,
    encode_frame,
)
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.records import (
    HOST_MESSAGES,
    LINK_RESET,
    ErrorCode,
    Phase,
    Policy,
)
from prestage_hw.contract.registers import COUNTERS, register_by_name
from prestage_hw.top import Top
from prestage_sim.model.link.mover import Fetch, HostMover
from prestage_sim.model.top import Top as GoldenTop
from prestage_tb.bench import (
    Stall,
    cycles,
    parameters,
    reset,
    run_bench,
    start_clock,
)
from prestage_tb.coverage import hit
from prestage_tb.host import LinkHost

_FETCH, _READY, _EVENT = (MESSAGES[name].code for name in ("FETCH", "READY", "EVENT"))
_ACKNOWLEDGE_EVERY = 8

#: Registers that hang on time, by how their names begin.
_TIMES = ("cycles", "layer_time", "tile_time")


class _Host(LinkHost):
    """Host that copies, and keeps fetches apart from all other answers."""

    def __init__(self, dut, *, stall=0.0):
        super().__init__(dut, parameters()["config"], stall=stall)
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        self.drivers = [self.rx, self.tx]
        self.broken = set()  # (layer, expert, tile) that can't be copied

    def clear(self):
        super().clear()
        self.fetches = []  # all that came, oldest first
        self.asked = []  # those that were not answered
        self.slots = {}  # (slot, tile): (layer, expert) of what was copied there
        self.resets_done = 0

    async def reset(self):
        await reset(self.dut, drivers=self.drivers)
        self.clear()

    def restart(self):
        """Restart the link; what is on its way to the host is lost."""
        self.rx.send(0, *encode_frame(LINK_RESET, sequence=7, acknowledge=0))

    def restarted(self):
        super().restarted()
        self.resets_done += 1
        self.asked.clear()

    def take(self, code, body):
        if code == _FETCH:
            fetch = RECORDS["Fetch"].unpack(self.config, body)
            self.fetches.append(fetch)
            self.asked.append(fetch)
            return
        super().take(code, body)
        if code == _READY:
            self.check(RECORDS["Ready"].unpack(self.config, body))

    def check(self, ready):
        """The slot holds what it is said to."""
        for tile in range(self.config.layer_tiles[ready["layer"]]):
            assert self.slots[ready["slot"], tile] == (ready["layer"], ready["expert"]), ready

    def copy(self, fetch):
        """Copy a tile, or fail to, and say so."""
        place = fetch["layer"], fetch["expert"], fetch["tile"]
        failed = place in self.broken
        if not failed:
            self.slots[fetch["slot"], fetch["tile"]] = place[:2]
        self.post("FETCHED", fetch["tag"], fetch["serial"], fetch["tile"], int(failed))

    def serve(self):
        """Copy all that was asked for, in order."""
        while self.asked:
            self.copy(self.asked.pop(0))

    async def step(self, *, serve=True):
        await cycles(self.dut, 16)
        self.poll()
        if serve:
            self.serve()

    async def wait(self, code, *, serve=True, limit=300_000):
        """All other answers up to the first with that code."""
        for _ in range(limit // 16):
            codes = [c for c, _ in self.answers]
            if code in codes:
                end = codes.index(code) + 1
                taken, self.answers = self.answers[:end], self.answers[end:]
                return taken
            await self.step(serve=serve)
        raise AssertionError(f"No answer {code:#x} within {limit} cycles")

    async def drained(self, golden, name, *values):
        """One message on an idle device; its answers must be the golden model's, in any order."""
        message = self.post(name, *values)
        self.post("SYNC", 1)
        answers = await self.wait(MESSAGES["SYNCED"].code)
        answers.pop()
        expected = golden.handle(*message)
        assert Counter(answers) == Counter(expected), (name, values, answers, expected)
        return answers

    async def read(self, name):
        self.post("REGISTER_READ", register_by_name(name).address)
        *_, (_, body) = await self.wait(MESSAGES["REGISTER_VALUE"].code)
        return RECORDS["RegisterValue"].unpack(self.config, body)["value"]

    async def compare_registers(self, golden):
        """All counters and all writable registers equal the golden model's."""
        for register in REGISTERS:
            if register.name.startswith(_TIMES) or register.name == "table_data":
                continue
            await self.drained(golden, "REGISTER_READ", register.address)

    async def refused(self, *fetched):
        """Send a FETCHED and see that it is refused."""
        self.post("FETCHED", *fetched, 0)
        *_, (_, body) = await self.wait(_EVENT)
        event = RECORDS["Event"].unpack(self.config, body)
        assert event["code"] == ErrorCode.BAD_FETCHED
        assert (event["expert"], event["address"]) == (fetched[0], fetched[2])


class _GoldenHost:
    """What the golden model's fetches are, and which of them fail."""

    def __init__(self, host):
        self.host = host
        self.fetches = []

    def __call__(self, fetch):
        self.fetches.append(fetch)
        return (fetch.layer, fetch.expert, fetch.tile) not in self.host.broken


def _same_fetches(host, golden):
    """The device has asked for what the model has; of a fetch that fails, at least for that."""
    got = Counter(
        Fetch(f["layer"], f["expert"], f["slot"], f["tile"], bool(f["demand"]))
        for f in host.fetches
    )
    expected = Counter(golden.fetches)
    assert not expected - got
    broken = {place[:2] for place in host.broken}
    assert all(f[:2] in broken for f in got - expected), got - expected
    host.fetches.clear()
    golden.fetches.clear()


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3], policy=list(Policy))
async def drained_pace(dut, stall, policy):
    """At drained pace every answer, fetch and counter is the golden model's."""
    host = _Host(dut, stall=Stall(stall, burst=(1, 6)))
    config, rng, model = host.config, host.random, host.config.model
    copies = _GoldenHost(host)
    golden = GoldenTop(config, copies)
    await host.reset()
    # With other policies it hangs on time which slot a failing fetch frees for whom.
    if policy is Policy.LRU:
        layers = [rng.randrange(model.layers) for _ in range(5)]
        host.broken = {
            (layer, rng.randrange(model.experts), rng.randrange(config.layer_tiles[layer]))
            for layer in layers
        }
    throttle = rng.randrange(2)
    control = 1 | 1 << 1 | 1 << 2 | throttle << 3 | 1 << 4
    for name, value in (("control", control), ("policy", policy), ("expert_base_low", 4096)):
        await host.drained(golden, "REGISTER_WRITE", register_by_name(name).address, value)
    codes = Counter()
    favourites = [rng.sample(range(model.experts), model.top_k) for _ in range(model.layers)]
    for token in range(6):
        ctx = rng.randrange(config.contexts)
        await host.drained(golden, "BEGIN_TOKEN", ctx, Phase.DECODE, token)
        for layer in range(model.layers):
            if rng.random() < 0.5:
                favourites[layer] = rng.sample(range(model.experts), model.top_k)
            if rng.random() < 0.3:
                values = (ctx, layer, rng.randrange(model.experts), 255)
                await host.drained(golden, "HINT", *values)
            answers = await host.drained(golden, "ROUTE", ctx, layer, favourites[layer])
            codes.update(body[0] for code, body in answers if code == _EVENT)
            await host.drained(golden, "RELEASE", ctx, layer)
            _same_fetches(host, copies)
    assert golden.counters["fills"] > 10
    assert golden.counters["prefetch_issued"] > (0 if throttle else 5)
    if policy is Policy.LRU:
        assert golden.counters["fill_errors"] and set(codes) <= {ErrorCode.BUS}
    # Slots are not in the device.
    answers = await host.drained(golden, "READ", 0, 0, 1)
    assert [body[0] for _, body in answers] == [ErrorCode.BAD_READ]
    hit("mover.reads")
    await host.compare_registers(golden)
    hit("mover.drained", policy, of=list(Policy))


async def _quiet(host, fetches):
    """Let the device go on until it waits for the host: answers and fetches that came."""
    await host.rx.sent()
    still = 0
    while still < 24:
        before = len(host.answers), len(host.fetches)
        await host.step(serve=False)
        still = still + 1 if (len(host.answers), len(host.fetches)) == before else 0
    answers, host.answers = Counter(host.answers), []
    fetched, host.fetches = host.fetches, []
    host.asked.clear()
    for fetch in fetched:
        fetches[fetch["tag"], fetch["tile"]] = fetch
    return answers, fetched


@cocotb.test()
@cocotb.parametrize(throttle=[0, 1])
async def quiet_pace(dut, throttle):
    """Copies under way, but one thing at a time: fetches, answers and counters are the model's.

    Candidates are hints, since with several at once it hangs on time which is taken first.
    """
    host = _Host(dut)
    config, rng, model = host.config, host.random, host.config.model
    mover = HostMover(config)
    golden = GoldenTop(config, mover)
    await host.reset()
    ours, theirs = {}, {}  # outstanding fetches of device and model, by entry and tile
    held, experts = {}, {}
    codes = Counter()

    def known(fetch):
        return tuple(value for name, value in fetch.items() if name != "serial")

    async def same(message, message_of_golden=None):
        expected, asked = Counter(), []
        for code, body in mover.receive(*(message_of_golden or message)):
            if code == _FETCH:
                fetch = RECORDS["Fetch"].unpack(config, body)
                theirs[fetch["tag"], fetch["tile"]] = fetch
                asked.append(known(fetch))
            else:
                expected[code, body] += 1
        answers, fetched = await _quiet(host, ours)
        assert answers == expected, (message, answers, expected)
        assert Counter(map(known, fetched)) == Counter(asked), (message, fetched, asked)
        for code, body in answers:
            codes[code] += 1
            name = "Ready" if code == _READY else "Event"
            fields = RECORDS[name].unpack(config, body)
            if name == "Ready" or fields["code"] == ErrorCode.BUS:
                experts[fields["ctx"], fields["layer"]].discard(fields["expert"])

    async def post(name, *values):
        await same(host.post(name, *values))

    async def copy(failed):
        place = rng.choice(list(ours))
        ends = []
        for fetches in (ours, theirs):
            fetch = fetches.pop(place)
            ends.append((*(fetch[n] for n in ("tag", "serial", "tile")), int(failed)))
        if not failed:
            host.slots[fetch["slot"], fetch["tile"]] = fetch["layer"], fetch["expert"]
        code, record = MESSAGES["FETCHED"].code, MESSAGES["FETCHED"].record
        await same(host.post("FETCHED", *ends[0]), (code, record.pack(config, *ends[1])))

    for name, value in (
        ("control", 2 | throttle << 3 | 1 << 4),
        ("prefetch_tiles", rng.randrange(1, 4)),
    ):
        await post("REGISTER_WRITE", register_by_name(name).address, value)
    layers = [0] * config.contexts
    for _ in range(250):
        ctx = rng.randrange(config.contexts)
        if ours and rng.random() < 0.6:
            await copy(rng.random() < 0.03)
        elif ctx in held and not experts[held[ctx]]:
            await post("RELEASE", *held.pop(ctx))
        elif rng.random() < 0.5:
            layer = rng.randrange(layers[ctx], model.layers)
            await post("HINT", ctx, layer, rng.randrange(model.experts), rng.randrange(200, 256))
        elif ctx not in held:
            if layers[ctx] == 0:
                await post("BEGIN_TOKEN", ctx, rng.choice((0, 0, 1)), 5)
            held[ctx] = ctx, layers[ctx]
            chosen = rng.sample(range(model.experts), model.top_k)
            coming = [f["expert"] for f in ours.values() if f["layer"] == layers[ctx]]
            if coming and coming[0] not in chosen and rng.random() < 0.7:
                chosen[-1] = coming[0]
            experts[held[ctx]] = set(chosen)
            await post("ROUTE", *held[ctx], chosen)
            layers[ctx] = (layers[ctx] + 1) % model.layers
    while ours:
        await copy(False)
    await host.compare_registers(golden)
    counters = golden.counters
    for name in ("late", "prefetch_cancelled", "prefetch_issued", "fills"):
        assert counters[name] or throttle, name
    hit("mover.quiet")


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.2])
async def any_order(dut, stall):
    """Contexts at will, copies that end at any time in any order."""
    host = _Host(dut, stall=stall)
    config, rng, model = host.config, host.random, host.config.model
    await host.reset()
    prefetch_tiles = rng.randrange(1, 4)
    host.post("REGISTER_WRITE", register_by_name("prefetch_tiles").address, prefetch_tiles)
    host.post("REGISTER_WRITE", register_by_name("control").address, 1 | 1 << 4)
    layers = [0] * config.contexts  # next of each context
    held = {}  # (ctx, layer): experts that are awaited, {expert: slot} of those that came
    answered = failed = behind = 0
    begun = 0
    for step in range(12_000):
        await RisingEdge(dut.clk)
        host.poll()
        host.broken = {
            (f["layer"], f["expert"], f["tile"]) for f in host.asked if rng.random() < 0.02
        }
        assert sum(not f["demand"] for f in host.asked) <= prefetch_tiles
        if host.asked and host.rx.pending < 60 and rng.random() < 0.1:
            # Tiles of an expert that others still read are never asked for.
            host.copy(host.asked.pop(rng.randrange(len(host.asked))))
        for code, body in host.answers:
            assert code in (_READY, _EVENT)
            name = "Ready" if code == _READY else "Event"
            fields = RECORDS[name].unpack(config, body)
            awaited, arrived = held[fields["ctx"], fields["layer"]]
            awaited.remove(fields["expert"])
            answered += 1
            if code == _READY:
                arrived[fields["expert"]] = fields["slot"]
            else:
                assert fields["code"] == ErrorCode.BUS, fields
                failed += 1
        host.answers.clear()
        for (_, layer), (_, arrived) in held.items():
            for expert, slot in arrived.items():
                host.check({"layer": layer, "expert": expert, "slot": slot})
        for key in [k for k, (awaited, _) in held.items() if not awaited]:
            if rng.random() < 0.05:
                host.post("RELEASE", *key)
                del held[key]
        ctx = rng.randrange(config.contexts)
        if step < 11_000 and rng.random() < 0.02 and not any(k[0] == ctx for k in held):
            layer = layers[ctx]
            if layer == 0:
                host.post("BEGIN_TOKEN", ctx, Phase.DECODE, rng.randrange(50))
            experts = rng.sample(range(model.experts), model.top_k)
            host.post("ROUTE", ctx, layer, experts)
            behind += any(not f["demand"] for f in host.asked)
            held[ctx, layer] = set(experts), {}
            layers[ctx] = (layer + 1) % model.layers
            begun += model.top_k
    host.broken = set()
    host.post("SYNC", 2)
    await host.wait(MESSAGES["SYNCED"].code)
    for key in held:
        host.post("RELEASE", *key)
    assert answered <= begun and begun > 30 and failed
    counts = {c.name: await host.read(c.name) for c in COUNTERS if c.bits == 32}
    assert counts["demands"] == begun
    assert counts["hits"] + counts["misses"] + counts["late"] + counts["merged"] == begun
    assert counts["rejected"] == counts["link_errors"] == 0
    assert behind
    hit("mover.out_of_order")
    if config.layer_bytes:
        hit("mover.sizes")


@cocotb.test()
async def late_copies(dut):
    """What comes twice, after a clear or after a reset changes nothing."""
    host = _Host(dut)
    config, model = host.config, host.config.model
    await host.reset()
    experts = list(range(model.top_k))
    clear = register_by_name("clear").address

    async def served(*, until=_READY):
        """Wait for the fetches of a route, and answer them: FETCHED that may come again."""
        answers = []
        while sum(code == until for code, _ in answers) < model.top_k:
            answers += await host.wait(until)
        old = list(host.fetches)
        host.fetches.clear()
        return [(f["tag"], f["serial"], f["tile"]) for f in old]

    host.post("ROUTE", 0, 0, experts)
    old = await served()
    assert len(old) >= model.top_k * config.layer_tiles[0]
    for fetched in old:
        await host.refused(*fetched)
    # A clear forgets the slots, but not what belongs to whom.
    host.post("REGISTER_WRITE", clear, 2)
    await host.refused(*old[0])
    host.slots.clear()
    host.post("ROUTE", 0, 0, experts)
    for _ in range(40):
        await host.step(serve=False)
    assert {f["expert"] for f in host.asked if f["demand"]} == set(experts)
    for fetched in old:
        host.post("FETCHED", *fetched, 0)
    for _ in range(80):
        await host.step(serve=False)
    assert [body[0] for _, body in host.answers] == [ErrorCode.BAD_FETCHED] * len(old)
    host.answers.clear()
    await served()
    assert await host.read("hits") == 0 and await host.read("misses") == 2 * model.top_k
    # Copies of before a reset.
    host.post("ROUTE", 0, 1, experts)
    for _ in range(60):
        await host.step(serve=False)
    old = [(f["tag"], f["serial"], f["tile"]) for f in host.asked]
    assert old
    await host.reset()
    await cycles(dut, 400)
    for fetched in old:
        await host.refused(*fetched)
    host.post("ROUTE", 0, 1, experts)
    await served()
    assert await host.read("misses") == model.top_k
    assert await host.read("rejected") == len(old)
    hit("mover.late")


@cocotb.test()
async def clear_waits(dut):
    """A clear of the buffer lets copies end first."""
    host = _Host(dut)
    model = host.config.model
    await host.reset()
    experts = list(range(model.top_k))
    host.post("ROUTE", 0, 0, experts)
    host.post("REGISTER_WRITE", register_by_name("clear").address, 2)
    host.post("REGISTER_READ", register_by_name("fills").address)
    for _ in range(400):
        await host.step(serve=False)
    assert host.asked and not host.answers, "the clear must not be over"
    answers = await host.wait(MESSAGES["REGISTER_VALUE"].code)
    assert [code for code, _ in answers[:-1]].count(_READY) == model.top_k
    host.slots.clear()
    host.fetches.clear()
    host.post("ROUTE", 0, 0, experts)
    for _ in experts:
        await host.wait(_READY)
    assert {f["expert"] for f in host.fetches} >= set(experts)
    hit("mover.clear")


@cocotb.test()
async def times_out(dut):
    """A host that does not answer: the fetch fails in time, and late answers change nothing."""
    host = _Host(dut)
    config, model = host.config, host.config.model
    await host.reset()
    timeout = 3000
    host.post("REGISTER_WRITE", register_by_name("dma_timeout").address, timeout)
    host.post("REGISTER_WRITE", register_by_name("control").address, 2)
    experts = list(range(model.top_k))
    host.post("HINT", 0, 2, experts[-1], 255)
    host.post("ROUTE", 0, 1, experts)
    for _ in range(60):
        await host.step(serve=False)
    # Of the first expert the last tile is missing, of the others nothing.
    asked = list(host.asked)
    demands = [f for f in asked if f["demand"]]
    missing = max(f["tile"] for f in demands if f["expert"] == experts[0])
    for fetch in demands:
        if fetch["expert"] == experts[0] and fetch["tile"] != missing:
            host.asked.remove(fetch)
            host.copy(fetch)
    host.post("SYNC", 3)
    left = [(f["tag"], f["serial"], f["tile"]) for f in host.asked]
    host.asked.clear()
    answers = await host.wait(MESSAGES["SYNCED"].code, serve=False, limit=20 * timeout)
    events = [RECORDS["Event"].unpack(config, body) for code, body in answers if code == _EVENT]
    assert {e["expert"] for e in events} == set(experts) and len(events) == model.top_k
    for event in events:
        tile = missing if event["expert"] == experts[0] else 0
        address = config.expert_address(1, event["expert"]) + tile * config.tile_bytes
        assert (event["code"], event["layer"], event["address"]) == (ErrorCode.TIMEOUT, 1, address)
    for fetched in left:
        await host.refused(*fetched)
    assert await host.read("fill_errors") == model.top_k + 1
    # The device goes on; a host that answers is never too late.
    host.post("RELEASE", 0, 1)
    host.post("ROUTE", 0, 1, experts)
    for _ in experts:
        await host.wait(_READY)
    assert await host.read("fill_errors") == model.top_k + 1
    hit("mover.timeout")


@cocotb.test()
async def flood(dut):
    """A host that answers no fetch until it has sent as much as there is room for."""
    host = _Host(dut)
    model = host.config.model
    await host.reset()
    device_id = register_by_name("device_id").address
    experts = list(range(model.top_k))
    host.post("ROUTE", 0, 0, experts)
    host.post("SYNC", 1)
    for _ in range(HOST_MESSAGES - 1):
        host.post("REGISTER_READ", device_id)
    for _ in range(300):
        await host.step(serve=False)
    assert host.asked and not host.answers
    await host.wait(MESSAGES["SYNCED"].code)
    for _ in range(HOST_MESSAGES - 1):
        await host.wait(MESSAGES["REGISTER_VALUE"].code)
    assert await host.read("rejected") == 0
    hit("mover.flood")


@cocotb.test()
async def wire_restarts(dut):
    """The host restarts the link while it has copies under way, or before it has heard of them."""
    host = _Host(dut)
    rng, model = host.random, host.config.model
    await host.reset()
    events = 0
    for round_ in range(6):
        layer = round_ % model.layers
        experts = rng.sample(range(model.experts), model.top_k)
        host.post("ROUTE", 0, layer, experts)
        for _ in range(rng.randrange(1, 60)):
            await cycles(dut, 8)
            host.poll()
        await host.rx.sent()
        host.restart()
        done = host.resets_done
        while host.resets_done == done:
            await cycles(dut, 4)
            host.poll()
        host.answers.clear()
        host.post("SYNC", 9)
        answers = await host.wait(MESSAGES["SYNCED"].code)
        events += sum(code == _EVENT for code, _ in answers)
        for code, body in answers:
            if code == _EVENT:
                assert body[0] == ErrorCode.BUS
        assert not host.asked
        # The new host is served.
        host.post("RELEASE", 0, layer)
        other = (layer + 1) % model.layers
        host.fetches.clear()
        host.post("ROUTE", 0, other, experts)
        for _ in experts:
            await host.wait(_READY)
        host.post("RELEASE", 0, other)
    assert events > 2
    assert await host.read("rejected") == 0
    hit("mover.wire_restart")


_SHAPES = {
    "tiny": TINY_DEVICE.replace(mover="host"),
    "whole": DeviceConfig(
        model=ModelConfig(name="odd", layers=3, experts=12, top_k=3),
        slots=11,
        expert_bytes=123_457,
        tile_bytes=123_457,
        contexts=3,
        inflight=5,
        successors=5,
        address_bits=32,
        mover="host",
    ),
    # Tiles of an odd size, of which layers' experts have two, three and one.
    "sizes": DeviceConfig(
        model=ModelConfig(name="odd", layers=3, experts=12, top_k=3),
        slots=11,
        expert_bytes=4383,
        tile_bytes=1461,
        layer_bytes=(2922, 4383, 1461),
        contexts=3,
        address_bits=32,
        mover="host",
    ),
}


#: Tests of the other shapes; the first has all.
_SOME = [
    "drained_pace/stall=0.3/policy=LRU",
    "drained_pace/stall=0.0/policy=NEXT_USE",
    "any_order/stall=0.2",
    "wire_restarts",
]


@pytest.mark.parametrize("shape", ["tiny", "whole", pytest.param("sizes", marks=pytest.mark.soak)])
def test_top_host(shape):
    config = _SHAPES[shape]
    run_bench(
        lambda: Top(config=config),
        module=__file__,
        name="top_host",
        parameters={"config": config},
        testcase=None if shape == "tiny" else _SOME,
    )


def test_host_writes():
    """Slots in the device, which the host writes; nothing is a power of two."""
    config = DeviceConfig(
        model=ModelConfig(name="odd", layers=3, experts=12, top_k=3),
        slots=11,
        expert_bytes=1536,
        layer_bytes=(1024, 1536, 512),
        contexts=2,
        address_bits=32,
        mover="host",
        host_writes=True,
    )
    run_bench(
        lambda: Top(config=config),
        module=Path(__file__).with_name("cocotb_host_writes.py"),
        name="top_host",
        parameters={"config": config},
    )
