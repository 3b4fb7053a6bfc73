# amaranth: UnusedElaboratable=no
"""Simulation half of the heads' bench: a head in lockstep with its golden twin.

::

    predicts, learns, table_requests ─▶ head ─▶ values, table_values
           │                             ▲ clear     │
           └── in the order seen ─▶ golden ── compare ◀

The golden functions take the histories that sets are gathered from. The bench goes the other way:
it makes up sets, and lays them into histories so that the golden model finds just these. Jobs are
applied in the order of their transfers, predictions first within one cycle.
"""

import random
from pathlib import Path

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract.perceptron import FEATURES
from prestage_hw.layouts import RecordLayout
from prestage_hw.predictor.linear import LinearHead
from prestage_sim.model.predictor.linear import (
    NOW,
    OLD,
    clear_head,
    create_head,
    head_learn,
    head_predict,
)
from prestage_sim.traces import load_trace
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

_GROUP = 8
_BANK_WORDS = 2048


class GoldenHead:
    """The golden functions with the sets of one job at a time, and what was saved for learning."""

    def __init__(self, config, head, number):
        self.config, self.head, self.number = config, head, number
        golden = create_head(config, head, number=number)
        layers, features, _ = golden.diagonal.shape
        # Lanes beyond the last expert keep what is written to them.
        padded = np.zeros((layers, features, config.lane_beats * config.predictor_lanes), np.int16)
        self.golden = golden._replace(diagonal=padded)
        model = config.model
        self.layers, self.experts, self.top_k = model.layers, model.experts, model.top_k
        self.lanes, self.beats = config.predictor_lanes, config.lane_beats
        shape = (config.contexts, model.layers, self.beats * self.lanes)
        self.saved, self.latest = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        #: Damaged parts of the words of each memory: groups of lanes, with their feature.
        self.damaged = {"rows": {}, "diagonals": {}, "saved": {}, "next": {}}
        self.repaired = 0
        entries = config.perceptron.list_entries
        self.index_bits = 0
        if entries:
            self.index_bits = max(1, (-(-self.experts // entries) - 1).bit_length())
        self.row_words = len(self.golden.weights) if head.rows or head.crosses else 0

    def clear(self):
        clear_head(self.golden, number=self.number)
        self.saved[:] = 0
        self.latest[:] = 0
        for damaged in self.damaged.values():
            damaged.clear()

    def exists(self, layer, name):
        """Whether a set can be known at a layer at all."""
        source = {"A": 0, "C": -1, "D": -2, "Bn": 1, "Bp": -1}.get(name, 0)
        if name in ("A", "C", "D"):
            source -= self.head.horizon
        return 0 <= layer + source < self.layers

    def _histories(self, layer, sets, now):
        """Arrays in which the golden model finds these sets."""
        shape = (self.layers, self.top_k)
        this, prev, before = (np.full(shape, -1, np.int16) for _ in range(3))
        memo = np.full((6, *shape), -1, np.int16)
        h = self.head.horizon
        if self.head.is_reuse:
            near, far = (this, prev) if now else (prev, before)
            places = {"B": (near, 0), "Bp": (near, -1), "G": (far, 0), "Bn": (far, 1)}
            places["S"] = (memo[4 if now else 3], 0)
        else:
            places = {"A": (this, -h), "C": (this, -h - 1), "D": (this, -h - 2)}
            places |= {"B": (prev, 0), "Bn": (prev, 1), "Bp": (prev, -1), "G": (before, 0)}
            places |= {name: (memo[n], 0) for n, name in enumerate(("T", "T2", "Q", "S"))}
        for name, chosen in sets.items():
            if chosen is not None and name in places:
                array, offset = places[name]
                array[layer + offset] = chosen
        return this, prev, before, memo

    def _base(self, ctx):
        return ctx * self.layers if self.config.perceptron.banked else 0

    def _words(self, ctx, layer, sets):
        """Words of rows that a job reads, in their order."""
        entries = self.config.perceptron.list_entries
        beats = entries // self.lanes if entries else self.beats
        rows = []
        banks = len(self.golden.diagonal)
        at = self._base(ctx) + layer
        expert_bits = self.config.bits("expert")
        cross_rows = self.config.perceptron.cross_rows
        for f, name in enumerate(self.head.rows):
            if sets[name] is not None:
                rows += [(f * banks + at << expert_bits) + s for s in sets[name]]
        for x, cross in enumerate(self.head.crosses):
            first, second = sets["A"], sets["A" if cross == "AA" else cross[1]]
            if first is None or second is None:
                continue
            if cross == "AA":
                pairs = [
                    sorted((first[i], first[j]))
                    for i in range(min(3, self.top_k))
                    for j in range(i)
                ]
            else:
                pairs = [(a, b) for a in first[:2] for b in second[:2]]
            region = (len(self.head.rows) * banks << expert_bits) + (x * banks + at) * cross_rows
            rows += [region + (157 * a + 1265 * b) % cross_rows for a, b in pairs]
        return [row * beats + beat for row in rows for beat in range(beats)]

    def _read(self, ctx, layer, sets, *, written):
        """Count damaged words among those that a job reads; what is written is whole again."""
        count = 0
        base = (self._base(ctx) + layer) * self.beats
        for name, words in (
            ("rows", self._words(ctx, layer, sets)),
            ("diagonals", range(base, base + self.beats)),
        ):
            for word in words:
                if word in self.damaged[name]:
                    count += 1
                    if written:
                        del self.damaged[name][word]
                        self.repaired += 1
        return count

    def flip(self, name, at, bit):
        """Flip a bit of a memory's word; False if its group is damaged already or without use."""
        groups = -(-self.lanes // _GROUP)
        if name == "rows":
            entry = self.head.weight_bits + self.index_bits
            stage = self.lanes * entry
            part = bit // entry // _GROUP if bit < stage else max(0, bit - stage - 2)
            lanes = slice(part * _GROUP, (part + 1) * _GROUP)
        elif name == "diagonals":
            weights = self.golden.diagonal.shape[1] * self.lanes * self.head.weight_bits
            part = divmod(bit - weights, groups)
            if bit < weights:
                feature, lane = divmod(bit // self.head.weight_bits, self.lanes)
                part = (feature, lane // _GROUP)
        else:
            part = 0
            ctx, layer, beat = self._place(at)
            if layer >= self.layers or beat >= self.beats or ctx >= self.config.contexts:
                return False
        if part in self.damaged[name].get(at, ()):
            return False
        self.damaged[name].setdefault(at, set()).add(part)
        # Until it is written anew, the group reads as 0.
        if name == "rows":
            self.golden.weights[at, lanes] = 0
            if self.index_bits:
                self.golden.places[at, lanes] = 0
            if part == 0:
                self.golden.maturity[at] = 0
        elif name == "diagonals":
            layer, beat = divmod(at, self.beats)
            first = beat * self.lanes + part[1] * _GROUP
            last = min(first + _GROUP, (beat + 1) * self.lanes)
            self.golden.diagonal[layer, part[0], first:last] = 0
        return True

    def _place(self, at):
        """Context, layer and beat of a word of saved values."""
        rest, beat = divmod(at, 1 << (self.beats - 1).bit_length())
        return *divmod(rest, 1 << self.config.bits("layer")), beat

    def _bad_beats(self, name, ctx, layer):
        """Damaged words of saved values of a job."""
        return {at for at in self.damaged[name] if self._place(at)[:2] == (ctx, layer)}

    def predict(self, ctx, layer, sets, *, extra):
        """Beats of values as they come out, and how many damaged words were read."""
        values = np.zeros(self.beats * self.lanes, np.int64)
        now = NOW if self.head.is_reuse else OLD
        histories = self._histories(layer, sets, now)
        found = np.zeros(self.experts, np.int64)
        head_predict(self.golden, self._base(ctx), layer, now, *histories, found)
        values[: self.experts] = found
        if not extra:
            name = "next" if self.head.is_reuse else "saved"
            (self.latest if self.head.is_reuse else self.saved)[ctx, layer] = values
            for at in self._bad_beats(name, ctx, layer):
                del self.damaged[name][at]
        shown = values >> 2 if self.head.is_reuse else values
        beats = shown.reshape(self.beats, self.lanes).tolist()
        count = self._read(ctx, layer, sets, written=False)
        return [
            {"ctx": ctx, "layer": layer, "beat": beat, "values": part, "extra": int(extra)}
            for beat, part in enumerate(beats)
        ], count

    def learn(self, ctx, layer, sets, used, *, skip):
        """Learn; returns how many damaged words were read."""
        old = self.saved[ctx, layer].copy()
        chosen = np.zeros(self.experts, np.bool_)
        chosen[list(used)] = True
        bad = {name: self._bad_beats(name, ctx, layer) for name in ("saved", "next")}
        count = len(bad["saved"]) + len(bad["next"])
        if self.head.is_reuse:
            new = self.latest[ctx, layer]
            self.saved[ctx, layer] = new
            # The damage goes along with the word.
            for at in bad["saved"] - bad["next"]:
                del self.damaged["saved"][at]
            for at in bad["next"]:
                self.damaged["saved"][at] = {0}
            if skip:
                return count
            targets = np.where(chosen, 1024, 13 * new[: self.experts] // 16)
        else:
            targets = np.where(chosen, 256, 0)
        values = old[: self.experts].copy()
        for at in bad["saved"] | bad["next"]:
            beat = self._place(at)[2]
            part = slice(beat * self.lanes, (beat + 1) * self.lanes)
            values[part] = targets[part]
        histories = self._histories(layer, sets, OLD)
        head_learn(self.golden, self._base(ctx), layer, *histories, values, targets, chosen)
        return count + self._read(ctx, layer, sets, written=True)

    # --- tables, as the specification cuts them

    def words(self, table):
        return (self.row_words, len(self.golden.diagonal) * self.beats)[table]

    def stored(self, table, at):
        """A stored word without parity, and its width in bits."""
        bits, weights = self.head.weight_bits, 0
        if table == 0:
            width = bits + self.index_bits
            for lane in range(self.lanes):
                entry = int(self.golden.weights[at, lane]) & (1 << bits) - 1
                if self.index_bits:
                    entry |= int(self.golden.places[at, lane]) << bits
                weights |= entry << lane * width
            return weights | int(self.golden.maturity[at]) << self.lanes * width, (
                self.lanes * width + 2
            )
        layer, beat = divmod(at, self.beats)
        count = self.golden.diagonal.shape[1]
        for n in range(count * self.lanes):
            expert = beat * self.lanes + n % self.lanes
            weight = int(self.golden.diagonal[layer, n // self.lanes, expert])
            weights |= (weight & (1 << bits) - 1) << n * bits
        return weights, count * self.lanes * bits

    def store(self, table, at, word):
        """Put a stored word back."""
        bits = self.head.weight_bits
        half = 1 << bits - 1

        def weight(at):
            return ((word >> at & 2 * half - 1) ^ half) - half

        if table == 0:
            width = bits + self.index_bits
            for lane in range(self.lanes):
                self.golden.weights[at, lane] = weight(lane * width)
                if self.index_bits:
                    index = word >> lane * width + bits & (1 << self.index_bits) - 1
                    self.golden.places[at, lane] = index
            self.golden.maturity[at] = min(word >> self.lanes * width & 3, 2)
            return
        layer, beat = divmod(at, self.beats)
        for n in range(self.golden.diagonal.shape[1] * self.lanes):
            expert = beat * self.lanes + n % self.lanes
            self.golden.diagonal[layer, n // self.lanes, expert] = weight(n * bits)

    def chunks(self, table):
        bits = self.lanes * (self.head.weight_bits + self.index_bits) + 2
        if table:
            bits = self.golden.diagonal.shape[1] * self.lanes * self.head.weight_bits
        return -(-bits // 32)

    def table_words(self, table):
        return self.words(table) * self.chunks(table) if table < 2 else 0

    def is_damaged(self, table, word):
        """Whether a table word lies in a damaged word."""
        if word >= self.table_words(table):
            return False
        return word // self.chunks(table) in self.damaged[("rows", "diagonals")[table]]

    def read_table(self, table, word):
        if word >= self.table_words(table):
            return 0
        at, chunk = divmod(word, self.chunks(table))
        return self.stored(table, at)[0] >> 32 * chunk & 0xFFFFFFFF

    def write_table(self, table, word, value):
        if word < self.table_words(table):
            at, chunk = divmod(word, self.chunks(table))
            self.damaged[("rows", "diagonals")[table]].pop(at, None)
            old, bits = self.stored(table, at)
            new = old & ~(0xFFFFFFFF << 32 * chunk) | value << 32 * chunk
            self.store(table, at, new & (1 << bits) - 1)


class LinearBench:
    """Drivers of all ports, and the golden head that follows them."""

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.ports = Signals(dut)
        self.config = parameters()["config"]
        self.number = parameters()["number"]
        self.head = self.config.perceptron.heads[self.number]
        self.random = random.Random(cocotb.RANDOM_SEED)
        # Only its shape and its promises are of interest here.
        self.shape = LinearHead(self.config, head=self.head, number=self.number)
        start_clock(dut)

        def layout(name):
            return getattr(self.shape, name).payload.shape()

        self.predicts = StreamSource(dut, "predicts", layout("predicts"), stall=stall)
        self.learns = StreamSource(dut, "learns", layout("learns"), stall=stall)
        requests = RecordLayout("TableRequest", config=self.config)
        self.requests = StreamSource(dut, "table_requests", requests, stall=stall)
        self.values = StreamSink(dut, "values", layout("values"), stall=stall)
        self.table_values = StreamSink(dut, "table_values", 32, stall=stall)
        # In the order in which transfers of one cycle count.
        self.sources = (self.predicts, self.learns, self.requests)
        self.drivers = (*self.sources, self.values, self.table_values)
        dut.clear.value = 0
        self.golden = GoldenHead(self.config, self.head, self.number)
        self.forget()
        cocotb.start_soon(self._follow())

    def forget(self):
        """Start over with a golden head as it is after reset."""
        self.golden.clear()
        self.offered = {source.name: [] for source in self.sources}
        self.seen = dict.fromkeys(self.offered, 0)
        self.expected, self.expected_table = [], []
        self.parity_errors, self.expected_parity_errors = 0, 0
        self.cleared = False

    async def start(self):
        await reset(self.dut, drivers=self.drivers)
        self.forget()
        await self.until_idle()

    def set_stall(self, stall):
        for driver in self.drivers:
            driver.stall = stall

    # --- jobs

    def choice(self):
        """A choice of distinct experts; few of them are frequent."""
        experts, k = self.config.model.experts, self.config.model.top_k
        pool = list(range(min(experts, 2 * k + 1)))
        if len(pool) < k or self.random.random() < 0.3:
            pool = list(range(experts))
        return self.random.sample(pool, k)

    def sets(self, layer, *, known=0.8):
        """Sets by name; None is unknown."""
        return {
            name: self.choice()
            if self.golden.exists(layer, name) and self.random.random() < known
            else None
            for name in FEATURES
        }

    def _payload(self, sets):
        noise = [self.random.randrange(self.config.model.experts) for _ in self.choice()]
        return [
            {
                "experts": sets[name] if sets[name] is not None else noise,
                "valid": sets[name] is not None,
            }
            for name in FEATURES
        ]

    def place(self):
        """A context and a layer; mostly few layers, so that their weights learn."""
        layers = self.config.model.layers
        ctx = self.random.randrange(self.config.contexts)
        near = self.random.random() < 0.7
        return ctx, self.random.randrange(min(2, layers) if near else layers)

    def predict(self, ctx, layer, sets, *, extra=False):
        payload = {"ctx": ctx, "layer": layer, "sets": self._payload(sets), "extra": extra}
        self.offered["predicts"].append((ctx, layer, sets, extra))
        self.predicts.send(payload)

    def learn(self, ctx, layer, sets, used, *, skip=False):
        payload = {"ctx": ctx, "layer": layer, "sets": self._payload(sets), "used": used}
        self.offered["learns"].append((ctx, layer, sets, used, skip))
        self.learns.send({**payload, "skip": skip})

    def read(self, table, word):
        payload = {"write": 0, "table": table, "word": word, "value": self.random.getrandbits(32)}
        self.offered["table_requests"].append(payload)
        self.requests.send(payload)

    def write(self, table, word, value):
        payload = {"write": 1, "table": table, "word": word, "value": value}
        self.offered["table_requests"].append(payload)
        self.requests.send(payload)

    def active_words(self, sets):
        return self.shape.active_words({name for name, ids in sets.items() if ids is not None})

    # --- following

    async def sent(self):
        for source in self.sources:
            await source.sent()

    async def until_idle(self, limit=400_000):
        """Wait until everything is sent, done and compared."""
        await self.sent()
        for _ in range(limit):
            await FallingEdge(self.dut.clk)
            if self.ports.high("idle"):
                break
        else:
            raise AssertionError(f"Head must become idle within {limit} cycles")
        await RisingEdge(self.dut.clk)
        assert_no_x(self.dut.parity_errors)
        self.check()

    def check(self):
        """Compare everything so far; nothing may be missing or left over."""
        assert self.values.received == self.expected
        assert self.table_values.received == self.expected_table
        assert self.parity_errors == self.expected_parity_errors, (
            f"parity errors must be {self.expected_parity_errors}, not {self.parity_errors}"
        )

    async def compare_tables(self, *, most=150):
        """Compare stored words, all or some of a large table, and words beyond the end."""
        await self.until_idle()
        for table in (0, 1):
            count = self.golden.table_words(table)
            assert count == self.shape.table_words[table]
            words = range(count) if count <= most else self.random.sample(range(count), most)
            for word in (*words, count, count + 1, (1 << 24) - 1):
                self.read(table, word)
        self.read(2, 0)
        await self.until_idle()

    def _apply(self, name, job):
        if name == "predicts":
            ctx, layer, sets, extra = job
            beats, damaged = self.golden.predict(ctx, layer, sets, extra=extra)
            self.expected += beats
            self.expected_parity_errors += damaged
        elif name == "learns":
            ctx, layer, sets, used, skip = job
            self.expected_parity_errors += self.golden.learn(ctx, layer, sets, used, skip=skip)
        elif job["write"]:
            self.expected_parity_errors += self.golden.is_damaged(job["table"], job["word"])
            self.golden.write_table(job["table"], job["word"], job["value"])
        else:
            self.expected_parity_errors += self.golden.is_damaged(job["table"], job["word"])
            self.expected_table.append(self.golden.read_table(job["table"], job["word"]))

    async def _follow(self):
        falling = FallingEdge(self.dut.clk)
        compared = 0
        while True:
            await falling
            if self.ports.bits("rst") != "0":
                self.cleared = False
                compared = 0
                continue
            for source in self.sources:
                jobs = self.offered[source.name]
                while self.seen[source.name] < source.sent_count:
                    self._apply(source.name, jobs[self.seen[source.name]])
                    self.seen[source.name] += 1
            if self.cleared:
                self.golden.clear()
            self.cleared = self.ports.high("clear")
            self.parity_errors += self.ports.high("parity_errors")
            received = self.values.received
            while compared < len(received):
                assert received[compared] == self.expected[compared], (
                    f"beat {compared} must be {self.expected[compared]}, not {received[compared]}"
                )
                compared += 1
            if self.ports.high("idle"):
                assert len(received) == len(self.expected), "idle with values to come"


async def _run_jobs(bench, count):
    """Random predictions and learnings."""
    for _ in range(count):
        ctx, layer = bench.place()
        sets = bench.sets(layer, known=bench.random.choice((0.2, 0.8, 1.0)))
        kind = bench.random.random()
        if kind < 0.6:
            bench.predict(ctx, layer, sets, extra=bench.random.random() < 0.2)
        if kind > 0.4:
            bench.learn(ctx, layer, sets, bench.choice(), skip=bench.random.random() < 0.1)
        if bench.random.random() < 0.5:
            await bench.sent()
        if bench.random.random() < 0.2:
            await cycles(bench.dut, bench.random.randrange(100))


@cocotb.test()
async def follows_golden(dut):
    """Random jobs without and with stalls, table reads in between, whole tables at the end."""
    bench = LinearBench(dut)
    await bench.start()
    jobs = parameters()["jobs"]
    for stall in (0.0, 0.4, Stall(0.7, burst=(1, 60))):
        bench.set_stall(stall)
        for _ in range(5):
            await _run_jobs(bench, jobs // 15)
            for table in (0, 1, 7):
                bench.read(table, bench.random.randrange(bench.golden.table_words(table) + 4))
    bench.set_stall(0.0)
    await bench.compare_tables()
    weights = bench.golden.golden.diagonal
    for _ in range(20):
        if (weights > 3).any() and (weights < 0).any():
            break
        # Chance has taught little so far.
        await _run_jobs(bench, jobs // 3)
        await bench.compare_tables()
    else:
        raise AssertionError("the jobs must teach something")
    if bench.golden.row_words:
        rows = bench.golden.golden
        assert rows.weights.any() and (rows.maturity == 1).any()
    assert_no_x(dut.idle, dut.values__valid)


@cocotb.test()
async def follows_golden_on_trace(dut):
    """Real routing: sets as a single context gathers them, tokens by id for T and T2."""
    bench = LinearBench(dut)
    await bench.start()
    trace = load_trace(Path(parameters()["trace"]))
    head, layers = bench.head, bench.config.model.layers
    memo = {}
    tokens = trace.experts.tolist()
    for t in range(parameters()["tokens"]):
        this, prev, before = (tokens[t - n] if t >= n else None for n in range(3))
        seen = memo.get(int(trace.token[t]), (None, None))

        def at(token, layer):
            return token[layer] if token is not None and 0 <= layer < layers else None

        for layer in range(head.horizon, layers):
            sets = dict.fromkeys(FEATURES)
            for n, name in enumerate("ACD"):
                sets[name] = at(this, layer - head.horizon - n)
            sets |= {"B": at(prev, layer), "Bn": at(prev, layer + 1), "Bp": at(prev, layer - 1)}
            sets |= {"G": at(before, layer), "T": at(seen[0], layer), "T2": at(seen[1], layer)}
            bench.predict(0, layer, sets)
            bench.learn(0, layer, sets, this[layer])
        memo[int(trace.token[t])] = (this, seen[0])
        await bench.until_idle()
    await bench.compare_tables(most=3000)
    assert (bench.golden.golden.maturity > 0).sum() > 20


@cocotb.test()
async def keeps_loaded_tables(dut):
    """Any words written, the odd stage and the most negative weight too; then jobs."""
    bench = LinearBench(dut)
    await bench.start()
    for rounds in range(2):
        for table in (0, 1):
            count = bench.golden.table_words(table)
            some = range(count) if count < 150 else bench.random.sample(range(count), 150)
            for word in (*some, count, (1 << 24) - 1):
                value = bench.random.getrandbits(32)
                bench.write(table, word, bench.random.choice((value, 0, 0x80808080, 0xFFFFFFFF)))
        bench.write(2, 0, 0xFFFFFFFF)
        if rounds == 0:
            await bench.compare_tables()
        await bench.until_idle()
        await _run_jobs(bench, 40)
        await bench.until_idle()
    await bench.compare_tables()


@cocotb.test()
async def clears_in_mid_run(dut):
    """A clear waits for what was accepted, then forgets everything."""
    bench = LinearBench(dut, stall=0.2)
    await bench.start()
    for _ in range(4):
        await _run_jobs(bench, 10)
        bench.read(1, 0)
        await cycles(dut, bench.random.randrange(1, 150))
        dut.clear.value = 1
        await RisingEdge(dut.clk)
        dut.clear.value = 0
        await _run_jobs(bench, 3)
        await bench.until_idle()
    for delay in range(12):
        layer = bench.config.model.layers - 1
        sets = bench.sets(layer, known=1.0)
        bench.learn(0, layer, sets, bench.choice())
        await bench.sent()
        await cycles(dut, delay)
        dut.clear.value = 1
        await RisingEdge(dut.clk)
        dut.clear.value = 0
        await bench.until_idle()
    bench.set_stall(0.0)
    first = len(bench.table_values.received)
    await bench.compare_tables()
    assert not any(bench.table_values.received[first:])


@cocotb.test()
async def restarts_in_mid_flight(dut):
    """Reset at any moment: everything under way is dropped and the tables are empty."""
    bench = LinearBench(dut)
    await bench.start()
    for _ in range(12):
        bench.set_stall(bench.random.choice((0.0, 0.5)))
        jobs = cocotb.start_soon(_run_jobs(bench, bench.random.randrange(2, 12)))
        await cycles(dut, bench.random.randrange(20, 300))
        jobs.cancel()
        await bench.start()
        assert not bench.values.received
    bench.set_stall(0.0)
    await _run_jobs(bench, 20)
    await bench.compare_tables()


async def _cycle_of(bench, signal, value, *, start, limit=3000):
    """Cycles from ``start`` until a signal has a value."""
    while True:
        await FallingEdge(bench.dut.clk)
        if str(signal.value) == value:
            return bench.predicts.cycle - start
        assert bench.predicts.cycle < start + limit


@cocotb.test()
async def is_as_fast_as_promised(dut):
    """Latencies are exact, from one set known to all, for predictions and learnings."""
    bench = LinearBench(dut)
    await bench.start()
    layers = bench.config.model.layers
    for known in (0.0, 0.3, 0.6, 1.0, 1.0):
        layer = min(layers - 1, bench.random.randrange(layers) if known < 1 else 3)
        sets = bench.sets(layer, known=known)
        words = bench.active_words(sets)
        await bench.until_idle()
        bench.predict(0, layer, sets)
        await bench.sent()
        began = bench.predicts.cycle - 1  # the transfer
        count = len(bench.values.received)
        while len(bench.values.received) < count + bench.golden.beats:
            await RisingEdge(dut.clk)
        await FallingEdge(dut.clk)
        arrival = bench.values.arrival[-bench.golden.beats :]
        assert arrival[-1] - 1 - began == bench.shape.predict_cycles(words), words
        assert arrival[-1] - arrival[0] == bench.golden.beats - 1
        await bench.until_idle()
        bench.learn(0, layer, sets, bench.choice())
        await bench.sent()
        began = bench.learns.cycle - 1
        took = await _cycle_of(bench, dut.idle, "1", start=began)
        promised = bench.shape.learn_cycles(words)
        if bench.head.crosses:
            # Conjunctions that hash to one row wait for each other.
            assert promised <= took <= promised + 8 * 3 * 4
        else:
            assert took == promised, words
        await RisingEdge(dut.clk)


@cocotb.test()
async def sustains_its_rate(dut):
    """Predictions that wait follow each other as promised."""
    bench = LinearBench(dut)
    await bench.start()
    layers, beats = bench.config.model.layers, bench.golden.beats
    for known in (0.0, 0.5, 1.0):
        layer = min(layers - 1, bench.random.randrange(layers) if known < 1 else 3)
        sets = bench.sets(layer, known=known)
        await bench.until_idle()
        first = len(bench.values.received)
        for _ in range(5):
            bench.predict(0, layer, sets)
        await bench.until_idle()
        ends = bench.values.arrival[first + beats - 1 :: beats]
        gaps = {b - a for a, b in zip(ends, ends[1:], strict=False)}
        assert gaps == {bench.shape.predict_interval(bench.active_words(sets))}


@cocotb.test()
async def predicts_while_it_learns(dut):
    """A prediction of another layer is as fast as ever, one of the same layer waits its turn."""
    bench = LinearBench(dut)
    await bench.start()
    layers, contexts = bench.config.model.layers, bench.config.contexts
    banked = bench.config.perceptron.banked
    beats = bench.golden.beats
    overtook = 0
    for _ in range(40):
        for _ in range(bench.random.choice((1, 1, 2))):
            learned, own = bench.random.randrange(layers), bench.random.randrange(contexts)
            bench.learn(own, learned, bench.sets(learned, known=1.0), bench.choice())
        await bench.sent()
        most = bench.shape.learn_cycles(bench.active_words(bench.sets(learned, known=1.0)))
        await cycles(dut, bench.random.randrange(most))
        busy = str(dut.idle.value) == "0"
        ctx, layer = bench.random.randrange(contexts), bench.random.randrange(layers)
        blocked = {(job[0] if banked else 0, job[1]) for job in bench.offered["learns"][-2:]}
        sets = bench.sets(layer, known=1.0)
        bench.predict(ctx, layer, sets)
        await bench.sent()
        began = bench.predicts.cycle - 1
        count = len(bench.values.received)
        while len(bench.values.received) < count + beats:
            await RisingEdge(dut.clk)
        await FallingEdge(dut.clk)
        took = bench.values.arrival[-1] - 1 - began
        least = bench.shape.predict_cycles(bench.active_words(sets))
        assert took >= least
        if (ctx if banked else 0, layer) not in blocked:
            assert took == least
            overtook += busy and str(dut.idle.value) == "0"
        await bench.until_idle()
    assert overtook or layers * contexts < 3
    await bench.compare_tables()


@cocotb.test()
async def survives_flipped_bits(dut):
    """Bits flip in every memory: what they spoil reads as 0, is counted, and learns anew."""
    bench = LinearBench(dut)
    await bench.start()
    golden = bench.golden
    memories = {"diagonals": [dut.diagonals], "saved": [dut.saved]}
    if bench.head.is_reuse:
        memories["next"] = [dut.next]
    if golden.row_words > _BANK_WORDS:
        count = -(-golden.row_words // _BANK_WORDS)
        memories["rows"] = [getattr(dut, f"rows{n}") for n in range(count)]
    elif golden.row_words:
        memories["rows"] = [dut.rows]
    flips = 0
    for _ in range(40):
        await _run_jobs(bench, 6)
        await bench.until_idle()
        for name, handle in memories.items():
            for _ in range(3):
                if name == "rows":
                    # Rather a word that holds something.
                    full = np.flatnonzero(golden.golden.weights.any(axis=1))
                    at = bench.random.choice(full) if len(full) else 0
                else:
                    at = bench.random.randrange(sum(len(bank) for bank in handle))
                word = handle[int(at) // _BANK_WORDS][int(at) % _BANK_WORDS]
                bit = bench.random.randrange(len(word))
                if golden.flip(name, int(at), bit):
                    word.value = int(word.value) ^ 1 << bit
                    await RisingEdge(dut.clk)
                    flips += 1
        for table in (0, 1):
            words = golden.table_words(table)
            if words:
                bench.read(table, bench.random.randrange(words))
                bench.write(table, bench.random.randrange(words), 0)
    await bench.compare_tables(most=400)
    assert flips > 80 and bench.parity_errors > 40
    assert golden.repaired > 20, "learning must write damaged words anew"
