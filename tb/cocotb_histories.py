"""Histories of the perceptron predictor against their golden model; run by ``test_histories.py``.

::

    routes, requests, table_requests, begins ─▶ histories ─▶ sets, table_values
           │                                        ▲ clear        │
           └──────── in the order seen ─▶ golden ───┴── compare ◀──┘

Within one cycle a route comes first, then a request, a table access, and a token start.
"""

import random

import cocotb
import numpy as np
from amaranth.lib import data
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract.records import NO_TOKEN, Phase
from prestage_hw.layouts import RecordLayout
from prestage_hw.predictor.histories import (
    TABLES,
    Histories,
    HistoryRequestLayout,
    HistoryRouteLayout,
)
from prestage_hw.predictor.sets import SETS, SetLayout
from prestage_hw.predictor.tokens import TableAccessLayout
from prestage_sim.model.predictor import histories as golden
from prestage_tb.axi import AXIWritableMemory, pattern
from prestage_tb.bench import (
    Signals,
    Stall,
    StreamSink,
    StreamSource,
    assert_no_x,
    cycles,
    parameters,
    reset,
    start_clock,
)


class HistoriesBench:
    """Drivers of all ports, and the golden model that follows them."""

    def __init__(self, dut, stall=0.0):
        self.dut = dut
        self.ports = Signals(dut)
        self.config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        config = self.config
        sets = data.ArrayLayout(SetLayout(config), len(SETS))
        begins = RecordLayout("BeginToken", config=config)
        self.routes = StreamSource(dut, "routes", HistoryRouteLayout(config), stall=stall)
        self.requests = StreamSource(dut, "requests", HistoryRequestLayout(config), stall=stall)
        accesses = TableAccessLayout(len(TABLES))
        self.accesses = StreamSource(dut, "table_requests", accesses, stall=stall)
        self.begins = StreamSource(dut, "begins", begins, stall=stall)
        self.sets = StreamSink(dut, "sets", sets, stall=stall)
        self.values = StreamSink(dut, "table_values", 32, stall=stall)
        #: In the order in which transfers of one cycle take effect.
        self.sources = (self.routes, self.requests, self.accesses, self.begins)
        self.drivers = (*self.sources, self.sets, self.values)
        dut.clear.value = 0
        self.memory = None
        if config.perceptron.token_store == "memory":
            # Whatever the memory holds at first, nothing of it may be found.
            dut.base.value = self.random.getrandbits(config.address_bits - 8)
            self.memory = AXIWritableMemory(
                dut,
                data=pattern,
                data_bytes=config.data_bytes,
                address_bits=config.address_bits,
                latency=9,
                burst_beats=config.burst_beats,
                address_stall=stall or 0.2,
                data_stall=stall or 0.2,
            )
        self.rows = [golden.Histories(config).tables[1 + n].shape[0] for n in range(len(TABLES))]
        self.forget()
        cocotb.start_soon(self._follow())

    def forget(self):
        """Start the golden model afresh."""
        self.golden = golden.Histories(self.config)
        self.offered = {source.name: [] for source in self.sources}
        self.seen = dict.fromkeys(self.offered, 0)
        self.expected = []
        self.expected_values = []
        self.cleared = False
        self.errors = 0
        #: Faults were put in: parity errors may be told.
        self.faulty = False

    async def start(self):
        """Reset, with a new golden model."""
        await reset(self.dut, drivers=self.drivers)
        self.forget()

    def send(self, source, payload):
        self.offered[source.name].append(payload)
        source.send(payload)

    def begin(self, ctx, token, phase=Phase.DECODE):
        self.send(self.begins, {"ctx": ctx, "phase": int(phase), "token": token})

    def route(self, ctx, layer, experts):
        self.send(self.routes, {"ctx": ctx, "layer": layer, "experts": list(experts)})

    def ask(self, ctx, layer, horizon=0, reuse=0, now=0):
        base = (layer - horizon) % (1 << self.config.bits("layer"))
        payload = {"ctx": ctx, "layer": layer, "base": base, "horizon": horizon}
        payload |= {"reuse": reuse, "now": now}
        self.send(self.requests, payload)

    def access(self, table, word, value=None):
        payload = {"table": table, "word": word, "write": int(value is not None)}
        self.send(self.accesses, {**payload, "value": value or 0})

    async def sent(self):
        for source in self.sources:
            await source.sent()

    async def until_idle(self, limit=200_000):
        """Wait until everything is sent and done; the golden model has then been compared."""
        await self.sent()
        for _ in range(limit):
            await FallingEdge(self.dut.clk)
            if self.ports.high("idle"):
                break
        else:
            raise AssertionError(f"Histories must become idle within {limit} cycles")
        await RisingEdge(self.dut.clk)

    async def compare_all(self):
        """Ask for everything that is known, and read the tables and a word beyond each."""
        await self.until_idle()
        heads = self.config.perceptron.heads
        for ctx in range(self.config.contexts):
            for layer in range(self.config.model.layers):
                for head in heads:
                    for now in (0, 1) if head.is_reuse else (0,):
                        self.ask(ctx, layer, head.horizon, int(head.is_reuse), now)
        for table in range(len(TABLES)):
            words = self.golden.table_words(table)
            for word in (*range(words), words, (1 << 24) - 1):
                self.access(table, word)
        await self.until_idle(limit=2_000_000)
        self.check()

    def check(self):
        """Nothing may be missing or left over; what came was compared when it came."""
        assert len(self.sets.received) == len(self.expected)
        assert self.values.received == self.expected_values
        # Parity of what lies behind the memory port at first is anything.
        assert self.faulty or self.memory or not self.errors

    def _apply(self, name, payload):
        if name == "routes":
            self.golden.route(payload["ctx"], payload["layer"], payload["experts"])
        elif name == "requests":
            keywords = {key: payload[key] for key in ("horizon", "reuse", "now")}
            keywords.update(reuse=bool(payload["reuse"]), now=bool(payload["now"]))
            sets = self.golden.sets(payload["ctx"], payload["layer"], **keywords)
            self.expected.append(sets.tolist())
        elif name == "begins":
            self.golden.begin(payload["ctx"], payload["token"], payload["phase"])
        elif payload["write"]:
            self.golden.write_table(payload["table"], payload["word"], payload["value"])
        else:
            value = self.golden.read_table(payload["table"], payload["word"])
            self.expected_values.append(value)

    async def _follow(self):
        falling = FallingEdge(self.dut.clk)
        compared = values = 0
        unknown = [-1] * self.config.model.top_k
        while True:
            await falling
            if self.ports.bits("rst") != "0":
                self.cleared = False
                compared = values = 0
                continue
            for source in self.sources:
                while self.seen[source.name] < source.sent_count:
                    self._apply(source.name, self.offered[source.name][self.seen[source.name]])
                    self.seen[source.name] += 1
            if self.cleared:
                self.golden.clear()
            self.cleared = self.ports.high("clear")
            while compared < len(self.sets.received):
                sets = [
                    s["experts"] if s["valid"] else unknown for s in self.sets.received[compared]
                ]
                for name, got, wanted in zip(SETS, sets, self.expected[compared], strict=True):
                    assert got == wanted, f"answer {compared}: {name} must be {wanted}, not {got}"
                compared += 1
            while values < len(self.values.received):
                got, wanted = self.values.received[values], self.expected_values[values]
                assert got == wanted, f"value {values} must be {wanted:#x}, not {got:#x}"
                values += 1
            self.errors += self.ports.high("parity_errors")
            assert self.memory is None or self.ports.bits("bus_errors") == "0"
            idle = self.ports.bits("idle")
            assert idle in "01"
            if idle == "1":
                assert compared == len(self.expected), "idle with sets to come"
                assert values == len(self.expected_values), "idle with values to come"


class RandomTokens:
    """Tokens of several contexts, side by side: known and unknown ids, ids that share an entry,
    some the tag too; layers mostly in order, some never routed, some twice.
    """

    def __init__(self, bench):
        self.bench = bench
        self.random = bench.random
        self.config = bench.config
        rows = max(bench.rows)
        self.ids = [3, 3 + rows, 3 + (rows << 16), 4, 5, 5 + 7 * rows, 1 << 31, NO_TOKEN]
        self.next_layer = [self.config.model.layers] * self.config.contexts

    def step(self):
        """Send a token start or a route, and a few requests."""
        generator, model = self.random, self.config.model
        ctx = generator.randrange(self.config.contexts)
        layer = self.next_layer[ctx]
        if layer >= model.layers or generator.random() < 0.03:
            phase = generator.choice((Phase.DECODE,) * 4 + (Phase.VERIFY, Phase.PREFILL))
            token = generator.choice(self.ids)
            if generator.random() < 0.05:
                token = generator.getrandbits(32)
            self.bench.begin(ctx, token, phase)
            self.next_layer[ctx] = 0
        else:
            for _ in range(generator.choice((0, 1, 1, 1, 1, 1, 1, 2))):
                self.bench.route(ctx, layer, generator.sample(range(model.experts), model.top_k))
            self.next_layer[ctx] = layer + 1
        for _ in range(generator.choice((0, 1, 2, 4))):
            head = generator.choice(self.config.perceptron.heads)
            layer = generator.randrange(model.layers)
            now = generator.randrange(2) if head.is_reuse else 0
            self.bench.ask(
                generator.randrange(self.config.contexts), layer, head.horizon, head.is_reuse, now
            )
        for _ in range(generator.choice((0,) * 12 + (1, 3))):
            table = generator.randrange(len(TABLES))
            self.bench.access(table, generator.randrange(self.bench.golden.table_words(table) + 2))


async def _run(bench, tokens, count):
    for _ in range(count * (bench.config.model.layers + 1)):
        tokens.step()
        if bench.random.random() < 0.7:
            await bench.sent()


@cocotb.test()
async def follows_golden(dut):
    """Random tokens without and with stalls, everything that is known at the end."""
    bench = HistoriesBench(dut)
    await bench.start()
    tokens = RandomTokens(bench)
    for stall in (0.0, 0.4, Stall(0.7, burst=(1, 60))):
        for driver in bench.drivers:
            driver.stall = stall
        await _run(bench, tokens, parameters()["tokens"] // 3)
    for driver in bench.drivers:
        driver.stall = 0.0
    await bench.compare_all()
    assert_no_x(dut.idle, dut.parity_errors)
    # Each set that some head looks at was known now and then.
    features = bench.config.perceptron.features()
    for number, name in enumerate(SETS):
        known = sum(sets[number][0] >= 0 for sets in bench.expected)
        assert (known > 0) == (name in features), name


@cocotb.test()
async def keeps_loaded_tables(dut):
    """Words of tables from outside, wrong experts and padding too; then tokens."""
    bench = HistoriesBench(dut)
    await bench.start()
    tokens = RandomTokens(bench)
    model, bits = bench.config.model, bench.config.bits("expert")
    for rounds in range(3):
        for table, rows in enumerate(bench.rows):
            words = bench.golden.table_words(table)
            for word in range(words):
                value = bench.random.getrandbits(32)
                if word < rows:
                    # Entries of the ids in use, tags of some of them.
                    value = value & 0xFFFE0000 | 1 << 16 | bench.random.randrange(2)
                elif rounds and (1 << bits) > model.experts:
                    # Lower ids exist more often.
                    value &= bench.random.getrandbits(32)
                bench.access(table, word, value)
            bench.access(table, words, 0xFFFFFFFF)
        bench.access(0, (1 << 24) - 1, 0xFFFFFFFF)
        await bench.until_idle(limit=1_000_000)
        await bench.compare_all()
        await _run(bench, tokens, 12)
        await bench.until_idle()
    await bench.compare_all()


@cocotb.test()
async def clears_in_mid_run(dut):
    """A clear waits for what was accepted, then forgets everything."""
    bench = HistoriesBench(dut, stall=0.2)
    await bench.start()
    tokens = RandomTokens(bench)
    for _ in range(6):
        await _run(bench, tokens, 8)
        await cycles(dut, bench.random.randrange(1, 60))
        dut.clear.value = 1
        await RisingEdge(dut.clk)
        dut.clear.value = 0
        tokens.step()
        await bench.until_idle()
    dut.clear.value = 1
    await RisingEdge(dut.clk)
    dut.clear.value = 0
    await bench.compare_all()
    assert not any(bench.values.received[-bench.golden.table_words(0) - 2 :])


@cocotb.test()
async def restarts_in_mid_flight(dut):
    """Reset at any moment: everything under way is dropped and nothing is known."""
    bench = HistoriesBench(dut)
    await bench.start()
    for _ in range(10):
        tokens = RandomTokens(bench)
        for _ in range(bench.random.randrange(20, 60)):
            tokens.step()
        await cycles(dut, bench.random.randrange(10, 600))
        await bench.start()
        assert not bench.sets.received
    await bench.compare_all()
    assert not any(bench.values.received)
    await _run(bench, RandomTokens(bench), 12)
    await bench.compare_all()


@cocotb.test()
async def is_as_fast_as_promised(dut):
    """Answers after ``latency`` cycles, one every four; token starts within ``begin_cycles``."""
    bench = HistoriesBench(dut)
    await bench.start()
    component = Histories(bench.config)
    model = bench.config.model
    for token in (1, 2, 1, 2, 1):
        bench.begin(0, token)
        await bench.begins.sent()
        start = bench.begins.cycle
        bench.ask(0, 0)
        await bench.requests.sent()
        taken = bench.requests.cycle - start
        dut._log.info(f"cycles of a token start {taken}, at most {component.begin_cycles}")
        for layer in range(model.layers):
            bench.route(0, layer, range(model.top_k))
        await bench.until_idle()
        # With a token and its pair found, the last of them is the slowest.
        assert bench.memory or taken <= component.begin_cycles + 1
    if any(rows > 1 for rows in bench.rows) and not bench.memory:
        assert taken > 0.8 * component.begin_cycles
    before = len(bench.sets.arrival)
    count = 20
    for layer in range(count):
        bench.ask(0, layer % model.layers)
    while bench.requests.pending == count:
        await RisingEdge(dut.clk)
    start = bench.sets.cycle
    await bench.until_idle()
    arrival = [cycle - start for cycle in bench.sets.arrival[before:]]
    assert arrival[0] == component.latency <= 4
    assert arrival[-1] <= component.latency + 4 * (count - 1)


def _memories(dut):
    """Memory words of each kind, by name: the copies of a memory, and its path in the design."""
    found = {}
    for name in ("this", "prev", "before", "token", "pair", "successor", "next"):
        copies = [getattr(dut, f"{name}{n}") for n in range(2) if hasattr(dut, f"{name}{n}")]
        if copies:
            found[name] = copies
    for name in TABLES:
        if hasattr(dut, f"{name}_table"):
            table = getattr(dut, f"{name}_table")
            found[f"{name} tags"], found[f"{name} rows"] = [table.tags], [table.row_words0]
    return {**found, "ids": [dut.tokens]}


def _flip(bench, name, copies, hit):
    """Flip a bit of a memory, and make the golden model forget what it was part of.

    ``hit`` are the places that were hit before: parity does not see a second flip.
    """
    config, reference, generator = bench.config, bench.golden, bench.random
    layer_bits, set_bits = config.bits("layer"), SetLayout(config).size + 1
    ctx, layer = generator.randrange(config.contexts), generator.randrange(config.model.layers)
    word, part = ctx << layer_bits | layer, 0
    kind, _, what = name.partition(" ")
    if what:
        table = TABLES.index(kind)
        # An entry in use, if there is one.
        used = np.flatnonzero(reference.tables.tags[table] >= 0).tolist()
        entry = generator.choice(used or [0])
        word = entry if what == "tags" else entry * config.model.layers + layer
    elif name == "ids":
        word = ctx
    if name in ("token", "token rows"):
        part = generator.randrange(2)
    width = {"ids": 68, "tags": 18}.get(what or name, set_bits)
    if (word, part) in hit:
        return
    hit.add((word, part))
    mask = 1 << generator.randrange(width) + part * set_bits
    for copy in copies:
        copy[word].value = int(copy[word].value) ^ mask
    if what == "tags":
        reference.tables.tags[table, entry] = -1
    elif what == "rows":
        reference.tables[1 + table][entry, part, layer] = -1
    elif name == "ids":
        reference.forget_ids(ctx)
    elif name in ("this", "prev", "before"):
        getattr(reference, name)[ctx, layer] = -1
    else:
        row = {"token": part, "pair": 2, "successor": 3, "next": 4}[name]
        reference.memo[ctx, row, layer] = -1


@cocotb.test()
async def forgets_words_of_bad_parity(dut):
    """A flipped bit in any memory is told, and what it was part of becomes unknown."""
    bench = HistoriesBench(dut)
    await bench.start()
    tokens = RandomTokens(bench)
    memories = _memories(dut)
    for name, copies in memories.items():
        await _run(bench, tokens, 8)
        await bench.until_idle()
        bench.check()
        bench.faulty = True
        hit = set()
        for _ in range(6):
            _flip(bench, name, copies, hit)
            await RisingEdge(dut.clk)
            if name != "ids":
                await bench.compare_all()
            await _run(bench, tokens, 2)
            await bench.until_idle()
        told = bench.errors
        dut._log.info(f"{name}: {told} parity errors")
        # All is mended when no token is left that was there at the time.
        dut.clear.value = 1
        await RisingEdge(dut.clk)
        dut.clear.value = 0
        await bench.until_idle()
        bench.errors, bench.faulty = 0, False
        # Some devices look at a memory only to copy it to another one.
        assert told or name.partition(" ")[0] not in (*Histories(bench.config).memories, "ids")
    await bench.compare_all()


@cocotb.test()
async def follows_golden_on_trace(dut):
    """The first tokens of a real trace, with the requests of a predictor."""
    bench = HistoriesBench(dut)
    await bench.start()
    with np.load(parameters()["trace"]) as trace:
        experts = trace["experts"][: parameters()["tokens"]].tolist()
        ids = trace["token"][: parameters()["tokens"]].astype(np.uint32).tolist()
    layers = bench.config.model.layers
    for token, chosen in zip(ids, experts, strict=True):
        await bench.until_idle()
        bench.begin(0, token)
        await bench.sent()
        for layer in range(layers):
            bench.ask(0, layer)
        for layer, choice in enumerate(chosen):
            await bench.until_idle()
            bench.route(0, layer, choice)
            await bench.sent()
            bench.ask(0, layer, reuse=1, now=1)
            bench.ask(0, layer, reuse=1)
            for head in bench.config.perceptron.heads:
                if head.horizon and layer + head.horizon < layers:
                    bench.ask(0, layer + head.horizon, head.horizon)
    await bench.until_idle(limit=1_000_000)
    found = sum(sets[SETS.index("T")][0] >= 0 for sets in bench.expected)
    assert found > len(bench.expected) // 20
    await bench.compare_all()
