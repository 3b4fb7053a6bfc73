"""Simulation half of the predictors' bench: any predictor in lockstep with its golden twin.

::

    begin, decisions, hints, table_requests ─▶ predictor ─▶ candidates, table_values, values
           │                                      ▲ clear        │
           └──── in the order seen ─────▶ golden ─┴── compare ◀──┘

The golden model is fed with what the predictor took, in the order in which it took it: within one
cycle a table request comes first, then a token start, a decision, a hint, and a clear.
"""

import random

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract.records import Source, ValueKind
from prestage_hw.layouts import RecordLayout
from prestage_hw.predictor import PREDICTORS
from prestage_sim.model.predictor import Settings, create_predictor
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

#: Tables are looked for up to this number, where none has one.
_NO_TABLE = 40
_VALUE_FIELDS = ("kind", "ctx", "layer", "beat")
_CANDIDATE_FIELDS = ("ctx", "layer", "expert", "score", "source", "deadline")


#: What the golden model is told of a transfer.
_CALLS = {
    "begin": ("begin", ("ctx", "token", "phase")),
    "decisions": ("decide", ("ctx", "layer", "experts", "stamp")),
    "hints": ("hint", ("ctx", "layer", "expert", "score", "deadline")),
}


class _Worth:
    """Beats of values: those of reuse since they were compared, of chances the last of each."""

    def __init__(self):
        self.count = 0
        self.reuse = []
        self.chance = {}

    def take(self, kind, *place, values):
        self.count += 1
        if kind == ValueKind.REUSE:
            self.reuse.append((place, values))
        else:
            self.chance[place] = values


class PredictorBench:
    """Drivers of all ports, and the golden model that follows them."""

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)

        def layout(name):
            return RecordLayout(name, config=self.config)

        self.begin = StreamSource(dut, "begin", layout("BeginToken"), stall=stall)
        self.decisions = StreamSource(dut, "decisions", layout("RoutingDecision"), stall=stall)
        self.requests = StreamSource(dut, "table_requests", layout("TableRequest"), stall=stall)
        self.hints = StreamSource(dut, "hints", layout("Candidate"), stall=stall)
        self.candidates = StreamSink(dut, "candidates", layout("Candidate"), stall=stall)
        self.worth = StreamSink(dut, "values", layout("ValueBeat"), stall=stall)
        self.values = StreamSink(dut, "table_values", 32, stall=stall)
        self.sources = (self.requests, self.begin, self.decisions, self.hints)
        self.drivers = (*self.sources, self.candidates, self.values, self.worth)
        dut.clear.value = 0
        dut.threshold.value = Settings.threshold
        dut.far_threshold.value = Settings.far_threshold
        dut.ahead.value = Settings.ahead
        dut.table_select.value = 0
        #: Whether the golden model is fed and compared; it knows of no faults.
        self.lockstep = True
        self.forget()
        cocotb.start_soon(self._follow())

    def forget(self):
        """Start over with a golden model as it is after reset."""
        self.golden = create_predictor(self.config)
        self.offered = {source.name: [] for source in self.sources}
        self.seen = dict.fromkeys(self.offered, 0)
        self.expected = []
        self.expected_values = []
        self.expected_worth = []
        self._worth = _Worth(), _Worth()
        self.cleared = False

    async def start(self):
        await reset(self.dut, drivers=self.drivers)
        self.forget()
        await self.until_idle()

    def send(self, source, payload):
        self.offered[source.name].append(payload)
        source.send(payload)

    def send_begin(self, ctx):
        # Some tokens come again, some are unknown.
        token = self.random.choice((0xFFFFFFFF, self.random.getrandbits(32), *range(1, 7)))
        self.send(self.begin, {"ctx": ctx, "phase": self.random.randrange(3), "token": token})

    def send_decision(self, ctx, layer, experts, stamp):
        payload = {"ctx": ctx, "layer": layer, "experts": list(experts), "stamp": stamp & 0xFF}
        self.send(self.decisions, payload)

    def send_hint(self, ctx, layer, expert, deadline, *, score=None):
        names = (*_CANDIDATE_FIELDS[:4], "deadline", "source")
        score = self.random.randrange(256) if score is None else score
        values = (ctx, layer, expert, score, deadline & 0xFF, int(Source.HINT))
        self.send(self.hints, dict(zip(names, values, strict=True)))

    def send_read(self, table, word):
        payload = {"write": 0, "table": table, "word": word, "value": self.random.getrandbits(32)}
        self.send(self.requests, payload)

    def send_write(self, table, word, value):
        self.send(self.requests, {"write": 1, "table": table, "word": word, "value": value})

    async def sent(self):
        for source in self.sources:
            await source.sent()

    async def until_idle(self, limit=200_000):
        """Wait until everything is sent and done; the golden model has then been compared."""
        await self.sent()
        for _ in range(limit):
            await FallingEdge(self.dut.clk)
            if str(self.dut.idle.value) == "1":
                break
        else:
            raise AssertionError(f"Predictor must become idle within {limit} cycles")
        await RisingEdge(self.dut.clk)

    def tables(self):
        """Numbers of the tables that have words."""
        return [table for table in range(_NO_TABLE) if self.golden.table_words(table)]

    async def compare_tables(self):
        """Read all tables and one word beyond each; compare them with the golden model."""
        await self.until_idle()
        for table in self.tables():
            self.dut.table_select.value = table
            await cycles(self.dut, 2)
            await FallingEdge(self.dut.clk)
            words = self.golden.table_words(table)
            assert int(self.dut.table_words.value) == words
            await RisingEdge(self.dut.clk)
            for word in range(words + 1):
                self.send_read(table, word)
        self.dut.table_select.value = _NO_TABLE
        await self.until_idle(limit=2_000_000)
        assert int(self.dut.table_words.value) == 0
        self.check()

    def check(self):
        """Compare everything so far; nothing may be missing or left over."""
        assert self.candidates.received == self.expected
        assert self.values.received == self.expected_values
        self._compare_worth()

    def _apply(self, name, payload):
        if name == "table_requests":
            if payload["write"]:
                self.golden.write_table(payload["table"], payload["word"], payload["value"])
            else:
                value = self.golden.read_table(payload["table"], payload["word"])
                self.expected_values.append(value)
        else:
            call, names = _CALLS[name]
            ranked = getattr(self.golden, call)(*(payload[name] for name in names))
            self.expected += [dict(zip(_CANDIDATE_FIELDS, c, strict=True)) for c in ranked]
            self.expected_worth += self.golden.values()

    def _compare_worth(self):
        """Compare reuse values in their order, and of chances those that hold in the end.

        What came since the last comparison, that is: what came before is in ``_worth``.
        """
        received, expected = self.worth.received, self.expected_worth
        ours, theirs = self._worth
        for beat in received[ours.count :]:
            ours.take(*(beat[name] for name in _VALUE_FIELDS), values=tuple(beat["values"]))
        for *fields, values in expected[theirs.count :]:
            theirs.take(*fields, values=values)
        assert ours.reuse == theirs.reuse, "REUSE values differ"
        assert ours.chance == theirs.chance, "CHANCE values differ"
        ours.reuse.clear()
        theirs.reuse.clear()
        assert len(received) <= len(expected), "values that nobody predicted"

    async def _follow(self):
        falling, ports = FallingEdge(self.dut.clk), Signals(self.dut)
        compared, compared_lengths = 0, None
        while True:
            await falling
            if ports.bits("rst") != "0":
                self.cleared = False
                compared, compared_lengths = 0, None
                continue
            if not self.lockstep:
                continue
            for source in self.sources:
                while self.seen[source.name] < source.sent_count:
                    self._apply(source.name, self.offered[source.name][self.seen[source.name]])
                    self.seen[source.name] += 1
            if self.cleared:
                self.golden.clear()
            self.cleared = ports.high("clear")
            received = self.candidates.received
            while compared < len(received):
                assert received[compared] == self.expected[compared], (
                    f"candidate {compared} must be {self.expected[compared]},"
                    f" not {received[compared]}"
                )
                compared += 1
            idle = ports.bits("idle")
            assert idle in "01"
            if idle == "1":
                assert len(received) == len(self.expected), "idle with candidates to come"
                lists = self.worth.received, self.expected_worth
                lists += self.values.received, self.expected_values
                lengths = tuple(map(len, lists))
                if lengths != compared_lengths:
                    # What is as long as the last time is as it was.
                    assert self.values.received == self.expected_values, "idle with values to come"
                    self._compare_worth()
                    compared_lengths = lengths


class RandomRouting:
    """Routing of several contexts, mostly layer by layer, with repeats and jumps.

    Experts come from a small pool that moves slowly, so that rows are hit, missed and replaced.
    """

    def __init__(self, bench):
        self.bench = bench
        self.random = bench.random
        model = bench.config.model
        self.layers, self.experts, self.top_k = model.layers, model.experts, model.top_k
        self.next_layer = [0] * bench.config.contexts
        self.stamps = [self.random.randrange(256) for _ in self.next_layer]
        self.pool = list(range(min(self.experts, 2 * self.top_k + 1)))

    def send(self):
        """Send one decision, with a token start before it where a token starts."""
        ctx = self.random.randrange(self.bench.config.contexts)
        layer = self.next_layer[ctx]
        if self.random.random() < 0.08:
            layer = self.random.randrange(self.layers)
        began = layer == 0 or self.random.random() < 0.03
        if began:
            for _ in range(self.random.choice((1, 1, 2))):
                self.bench.send_begin(ctx)
        if self.random.random() < 0.3:
            at = self.random.randrange(len(self.pool))
            self.pool[at] = self.random.randrange(self.experts)
        pool = sorted(set(self.pool))
        while len(pool) < self.top_k:
            pool = sorted({*pool, self.random.randrange(self.experts)})
        self.stamps[ctx] += 1
        self.next_layer[ctx] = (layer + 1) % self.layers
        choice = self.random.sample(pool, self.top_k)
        self.bench.send_decision(ctx, layer, choice, self.stamps[ctx])
        for _ in range(self.random.choice((0, 0, 0, 1, 4))):
            expert, layer = self.random.randrange(self.experts), self.random.randrange(self.layers)
            self.bench.send_hint(ctx, layer, expert, self.stamps[ctx] + self.random.randrange(9))


async def _route(bench, routing, count):
    for _ in range(count):
        # Streams are independent: waiting now and then keeps most token starts in front of their
        # decision.
        routing.send()
        if bench.random.random() < 0.7:
            await bench.sent()


@cocotb.test()
async def follows_golden(dut):
    """Random routing without and with stalls, table traffic in between, whole tables at the end."""
    bench = PredictorBench(dut)
    await bench.start()
    routing = RandomRouting(bench)
    for stall in (0.0, 0.4, Stall(0.7, burst=(1, 60))):
        for driver in bench.drivers:
            driver.stall = stall
        for _ in range(6):
            await _route(bench, routing, parameters()["decisions"] // 18)
            for table in (*bench.tables(), _NO_TABLE, 255):
                word = bench.random.randrange(bench.golden.table_words(table) + 8)
                bench.send_read(table, word)
    for driver in bench.drivers:
        driver.stall = 0.0
    await bench.until_idle()
    own = [c for c in bench.expected if c["source"] == Source.PREDICTOR]
    assert bool(own) == (bench.config.predictor != "none" and bench.config.model.layers > 1)
    assert len(own) < len(bench.expected)
    await bench.compare_tables()
    assert_no_x(dut.idle, dut.table_words)


@cocotb.test()
async def keeps_loaded_tables(dut):
    """Every word written, padding and beyond too; wrong experts, duplicates; then routing."""
    bench = PredictorBench(dut)
    await bench.start()
    experts = bench.config.model.experts
    routing = RandomRouting(bench)
    for rounds in range(3):
        for table in bench.tables():
            words = bench.golden.table_words(table)
            some = range(words) if words < 1500 else bench.random.sample(range(words), 1500)
            for word in (*some, words, words + 1, (1 << 24) - 1):
                # Few experts, mostly valid, so that rows hold duplicates and scores saturate.
                expert = bench.random.randrange(min(experts, 3))
                if bench.random.random() < 0.1:
                    expert = bench.random.choice((experts - 1, experts, experts + 1, 0xFFFF))
                valid = bench.random.random() < 0.9
                noise = bench.random.getrandbits(13) << 19
                value = expert | bench.random.choice((3, 3, 1)) << 16 | valid << 18 | noise
                bench.send_write(table, word, value)
        bench.send_write(_NO_TABLE, 0, 0x40000)
        await bench.until_idle(limit=1_000_000)
        if rounds == 0:
            await bench.compare_tables()
        await _route(bench, routing, 30)
        await bench.until_idle()
    await bench.compare_tables()


@cocotb.test()
async def clears_in_mid_run(dut):
    """A clear waits for what was accepted, then forgets everything."""
    bench = PredictorBench(dut, stall=0.2)
    await bench.start()
    routing = RandomRouting(bench)
    for _ in range(5):
        await _route(bench, routing, 25)
        bench.send_read(0, bench.random.randrange(64))
        await cycles(dut, bench.random.randrange(1, 150))
        dut.clear.value = 1
        await RisingEdge(dut.clk)
        dut.clear.value = 0
        routing.send()
        await bench.until_idle()
    for driver in bench.drivers:
        driver.stall = 0.0
    dut.clear.value = 1
    await RisingEdge(dut.clk)
    dut.clear.value = 0
    await bench.compare_tables()
    assert not any(bench.values.received[-bench.golden.table_words(0) :])
    # A decision that was taken just before is forgotten, however far it has come.
    for delay in range(5):
        bench.send_decision(0, 0, range(bench.config.model.top_k), delay)
        await bench.sent()
        await cycles(dut, delay)
        dut.clear.value = 1
        await RisingEdge(dut.clk)
        dut.clear.value = 0
        await bench.until_idle()
        bench.send_read(1, 0)
    await bench.until_idle()
    # The previous layer is forgotten too: a history from outside does not make up for it.
    layers, top_k = bench.config.model.layers, bench.config.model.top_k
    bench.send_decision(0, 0, range(top_k), 1)
    await bench.sent()
    dut.clear.value = 1
    await RisingEdge(dut.clk)
    dut.clear.value = 0
    await bench.until_idle()
    for index in range(top_k):
        bench.send_write(1, index, index | 1 << 18)
    await bench.until_idle()
    bench.send_decision(0, min(1, layers - 1), range(top_k), 2)
    await bench.compare_tables()


@cocotb.test()
async def restarts_in_mid_flight(dut):
    """Reset at any moment: everything under way is dropped and the tables are empty."""
    bench = PredictorBench(dut)
    await bench.start()
    for _ in range(8):
        routing = RandomRouting(bench)
        for _ in range(bench.random.randrange(4, 30)):
            routing.send()
        await cycles(dut, bench.random.randrange(20, 3000))
        await bench.start()
        assert not bench.candidates.received
    await bench.compare_tables()
    assert not any(bench.values.received)
    await _route(bench, RandomRouting(bench), 60)
    await bench.compare_tables()


@cocotb.test()
async def takes_token_starts_first(dut):
    """A token start and a decision in the same cycle: the decision belongs to the new token."""
    bench = PredictorBench(dut)
    await bench.start()
    layers, top_k = bench.config.model.layers, bench.config.model.top_k
    for experts in (range(top_k), range(1, top_k + 1)):
        for layer in range(layers):
            if layer == min(1, layers - 1):
                bench.send_begin(0)  # cuts the pair of layers 0 and 1
            bench.send_decision(0, layer, [e % bench.config.model.experts for e in experts], layer)
            await bench.until_idle()
    await bench.compare_tables()


@cocotb.test()
async def is_busy_while_an_output_waits(dut):
    """One candidate, or one value, that nobody takes keeps ``idle`` low, as the bench checks."""
    bench = PredictorBench(dut)
    await bench.start()
    bench.send_write(0, 0, 3 << 16 | 1 << 18)
    await bench.until_idle()
    bench.candidates.paused = bench.values.paused = True
    bench.send_decision(0, 0, range(bench.config.model.top_k), 0)
    await bench.sent()
    await cycles(dut, 500)
    bench.candidates.paused = False
    await bench.until_idle()
    bench.candidates.paused = True
    bench.send_hint(0, 1, 0, 1, score=255)  # of a layer to come, and sure enough to come out
    await bench.sent()
    await cycles(dut, 100)
    assert str(dut.idle.value) == "0"
    bench.candidates.paused = False
    await bench.until_idle()
    assert bench.candidates.received[-1]["source"] == Source.HINT
    bench.send_read(1, 0)
    await bench.sent()
    await cycles(dut, 100)
    bench.values.paused = False
    await bench.until_idle()
    bench.check()


@cocotb.test()
async def is_as_fast_as_promised(dut):
    """Cycles of a decision in about the costliest state of the tables, against the bounds."""
    bench = PredictorBench(dut)
    await bench.start()
    config, model = bench.config, bench.config.model
    predictor = PREDICTORS[config.predictor](config)
    successors, top_k, experts = config.successors, model.top_k, model.experts
    if config.predictor != "st_moe":
        return  # the bench of the perceptron has its own bounds
    # Rows of layers 0 and 1 hold different experts at confidence 3 (candidates) and 0 (replaced
    # while learning).
    expert_bits, successor_bits = (experts - 1).bit_length(), (successors - 1).bit_length()
    choice = list(range(top_k))
    for layer in range(min(2, model.layers - 1)):
        for source in range(top_k):
            for position in range(successors):
                word = ((layer << expert_bits | source) << successor_bits) + position
                confidence = 3 if layer else 0
                other = (top_k + source * successors + position) % experts
                bench.send_write(0, word, other | confidence << 16 | 1 << 18)
    bench.send_begin(0)
    await bench.until_idle()
    bench.send_decision(0, min(2, model.layers - 1), choice, 0)
    await bench.until_idle()
    bench.send_decision(0, 0, choice, 1)
    await bench.until_idle()
    before = len(bench.candidates.received)
    bench.send_decision(0, min(1, model.layers - 1), choice, 2)
    await bench.decisions.sent()
    start = bench.candidates.cycle
    await bench.until_idle()
    arrival = [cycle - start for cycle in bench.candidates.arrival[before:]]
    assert arrival
    free = bench.candidates.cycle - start
    dut._log.info(
        f"cycles first={arrival[0]} last={arrival[-1]} free={free} candidates={len(arrival)}"
        f" bounds {predictor.first_candidate_cycles} {predictor.last_candidate_cycles}"
        f" {predictor.decision_cycles}"
    )
    assert arrival[0] <= predictor.first_candidate_cycles
    assert arrival[-1] <= predictor.last_candidate_cycles
    assert free <= predictor.decision_cycles
    # A bound that nothing comes near says nothing.
    assert free > 0.6 * predictor.decision_cycles


@cocotb.test()
async def follows_golden_on_trace(dut):
    """The first tokens of a real trace, then the whole tables."""
    bench = PredictorBench(dut)
    await bench.start()
    with np.load(parameters()["trace"]) as trace:
        experts = trace["experts"][: parameters()["tokens"]].tolist()
    stamp = 0
    for token in experts:
        await bench.until_idle()
        bench.send_begin(0)
        await bench.sent()
        for layer, choice in enumerate(token):
            stamp += 1
            bench.send_decision(0, layer, choice, stamp)
    await bench.until_idle(limit=1_000_000)
    assert len(bench.expected) > len(experts)
    await bench.compare_tables()
