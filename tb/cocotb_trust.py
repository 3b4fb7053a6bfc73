"""Simulation half of the bench of hints: random jobs in lockstep with the golden model.

::

    begins, values, routes, hints ─▶ Trust ─▶ patches, hinted
        │                              ▲ clear, bit flips   │
        └──── one after the other ──▶ golden ─▶ compare ◀───┘
"""

import random

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.predictor.ranking import PatchLayout
from prestage_hw.predictor.trust import HintedLayout, OpinionLayout, Trust, TrustValuesLayout
from prestage_sim.model.predictor.trust import Trust as GoldenTrust
from prestage_tb.bench import (
    Stall,
    StreamSink,
    StreamSource,
    assert_no_x,
    cycles,
    parameters,
    reset,
    start_clock,
)

_PLACES = 4
_MEMORIES = ("values", "lists", "entries", "trust")

#: Expert of a golden hint whose stored word is damaged.
_LOST = -1


class DamagedTrust(GoldenTrust):
    """Golden model whose words can be lost as the RTL's are by a flipped bit."""

    def lose(self, memory, *, ctx=0, layer=0, expert=0, index=0, distance=0, score_bin=0):
        lists = self._hints[ctx]
        if memory == "values":
            self._values[ctx][layer][expert] = 0
        elif memory == "trust":
            self.trust[distance][score_bin] = 0
        else:
            for other in [other for other in lists if other % _PLACES == layer % _PLACES]:
                if memory == "lists":
                    del lists[other]
                elif index < len(lists[other]):
                    lists[other][index].expert = _LOST

    def routed(self, ctx, layer, experts):
        lists = self._hints[ctx]
        if layer in lists:
            lists[layer] = [hint for hint in lists[layer] if hint.expert != _LOST]
        super().routed(ctx, layer, experts)

    @property
    def lists(self):
        """Hints by layer, of each context."""
        return self._hints

    def listed(self, ctx, layer):
        """Hints of a layer, lost ones too."""
        return self._hints[ctx].get(layer, [])


class TrustBench:
    """Drivers of all ports, and what the golden model gives for the same jobs."""

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.config = config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        block = Trust(config)
        begin, route = block.begins.payload.shape(), block.routes.payload.shape()
        self.begins = StreamSource(dut, "begins", begin, stall=stall)
        self.values = StreamSource(dut, "values", TrustValuesLayout(config=config), stall=stall)
        self.routes = StreamSource(dut, "routes", route, stall=stall)
        self.hints = StreamSource(dut, "hints", OpinionLayout(config=config), stall=stall)
        self.patches = StreamSink(dut, "patches", PatchLayout(config=config), stall=stall)
        self.hinted = StreamSink(dut, "hinted", HintedLayout(config=config), stall=stall)
        self.sources = (self.begins, self.values, self.routes, self.hints)
        self.drivers = (*self.sources, self.patches, self.hinted)
        dut.clear.value = 0
        self.parity_errors = 0
        self.forget()
        cocotb.start_soon(self._count_errors())

    async def _count_errors(self):
        while True:
            await FallingEdge(self.dut.clk)
            if str(self.dut.rst.value) == "0":
                self.parity_errors += str(self.dut.parity_errors.value) == "1"

    def forget(self):
        """Start over with a golden model as it is after reset."""
        self.golden = DamagedTrust(self.config)
        self.expected_patches = []  # a layer's, and where in them go is said
        self.expected = []

    async def start(self):
        await reset(self.dut, drivers=self.drivers)
        self.forget()
        await self.until_idle()

    async def sent(self):
        for source in self.sources:
            await source.sent()

    async def until_idle(self, limit=100_000):
        await self.sent()
        for _ in range(limit):
            await FallingEdge(self.dut.clk)
            if str(self.dut.idle.value) == "1":
                break
        else:
            raise AssertionError(f"Trust must become idle within {limit} cycles")
        await RisingEdge(self.dut.clk)

    # One method a job: send it and tell the golden model.

    def begin(self, ctx):
        self.begins.send({"ctx": ctx})
        self.golden.begin(ctx)

    def write(self, ctx, layer, values):
        lanes, beats = self.config.predictor_lanes, self.config.lane_beats
        padded = [*values, *(self.random.randrange(256) for _ in range(lanes * beats))]
        for beat in range(beats):
            part = padded[beat * lanes : (beat + 1) * lanes]
            last = int(beat == beats - 1)
            self.values.send(
                {"ctx": ctx, "layer": layer, "beat": beat, "values": part, "last": last}
            )
        new = self.golden.written(ctx, layer, values)
        self.expected_patches.append(
            [
                (hint.expert, new[hint.expert]) if hint.expert != _LOST else None
                for hint in self.golden.listed(ctx, layer)
            ]
        )

    def route(self, ctx, layer, experts):
        self.routes.send({"ctx": ctx, "layer": layer, "experts": list(experts)})
        self.golden.routed(ctx, layer, experts)

    def hint(self, ctx, layer, expert, score):
        deadline = self.random.randrange(256)
        about = {"ctx": ctx, "layer": layer, "expert": expert}
        self.hints.send({**about, "score": score, "deadline": deadline})
        value = self.golden.hint(ctx, layer, expert, score)
        if value is not None:
            near = int(self.golden.listed(ctx, layer)[-1].distance == 0)
            self.expected.append({**about, "value": value, "near": near, "deadline": deadline})
        return value

    async def clear(self):
        await RisingEdge(self.dut.clk)
        self.dut.clear.value = 1
        await RisingEdge(self.dut.clk)
        self.dut.clear.value = 0
        self.golden.clear()

    def check(self):
        """Compare everything so far; nothing may be missing or left over."""
        assert self.hinted.received == self.expected
        layers = [[]]
        for patch in self.patches.received:
            layers[-1].append(patch)
            if patch["go"]:
                layers.append([])
        assert layers.pop() == []
        assert len(layers) == len(self.expected_patches)
        for number, (patches, expected) in enumerate(
            zip(layers, self.expected_patches, strict=True)
        ):
            got = [(p["expert"], p["value"]) if p["valid"] else None for p in patches]
            assert got == (expected or [None]), f"patches of layer {number}"
        self.patches.clear()
        self.hinted.clear()
        self.expected_patches.clear()
        self.expected.clear()


class RandomJobs:
    """Tokens of several contexts, layer by layer, with all that may happen besides."""

    def __init__(self, bench):
        self.bench = bench
        self.random = bench.random
        model = bench.config.model
        self.layers, self.experts, self.top_k = model.layers, model.experts, model.top_k
        self.at = [0] * bench.config.contexts

    def values(self):
        pool = [self.random.randrange(256) for _ in range(3)] + [0, 255]
        return [self.random.choice(pool) for _ in range(self.experts)]

    def hints(self, ctx, layer, count, right=()):
        for _ in range(count):
            expert = self.random.randrange(self.experts)
            if right and self.random.random() < 0.6:
                expert = self.random.choice(right)
            # Few bins, so that they learn.
            score = self.random.choice((255, 250, 128, self.random.randrange(256)))
            self.bench.hint(ctx, layer, expert, score)

    def jobs(self):
        """The jobs of one random step, each a function."""
        draw, bench = self.random, self.bench
        ctx = draw.randrange(len(self.at))
        layer = self.at[ctx]
        if layer == 0 or draw.random() < 0.04:
            layer = 0
            yield lambda: bench.begin(ctx)
            for ahead in range(min(self.layers, 6)):
                yield lambda ahead=ahead: bench.write(ctx, ahead, self.values())
                yield lambda ahead=ahead: self.hints(ctx, ahead, draw.choice((0, 0, 1, 3)))
        choice = draw.sample(range(self.experts), self.top_k)
        if draw.random() < 0.6:
            count = draw.choice((1, self.top_k, 3 * self.top_k))
            yield lambda: self.hints(ctx, layer, count, choice)
        if draw.random() < 0.5:
            yield lambda: bench.write(ctx, layer, self.values())
        if draw.random() < 0.1:
            far = draw.randrange(self.layers)
            yield lambda: self.hints(ctx, far, 2)
        if draw.random() < 0.97:
            yield lambda: bench.route(ctx, layer, choice)
        following = (layer + 1) % self.layers
        if following and draw.random() < 0.8:
            yield lambda: bench.write(ctx, following, self.values())
        self.at[ctx] = following

    async def run(self, steps):
        for _ in range(steps):
            for job in self.jobs():
                job()
                await self.bench.sent()
                if self.random.random() < 0.05:
                    await cycles(self.bench.dut, self.random.randrange(40))
        await self.bench.until_idle()
        self.bench.check()


@cocotb.test()
async def follows_golden(dut):
    """Random jobs and stalls; values, order, trust and random numbers."""
    bench = TrustBench(dut, stall=Stall(0.3, burst=(1, 7)))
    await bench.start()
    jobs = RandomJobs(bench)
    steps = parameters()["steps"]
    await jobs.run(steps)
    for driver in bench.drivers:
        driver.stall = 0
    for _ in range(3):
        await jobs.run(steps)
    if bench.config.perceptron.hints:
        # Values that depend on learning must be compared, and chance decides how soon they do.
        for _ in range(20):
            if sum(map(abs, sum(bench.golden.trust, []))) > 40:
                break
            await jobs.run(steps)
        else:
            raise AssertionError("the jobs must move the trust")
    assert bench.parity_errors == 0
    assert_no_x(dut.idle, dut.parity_errors)


@cocotb.test()
async def restarts_in_mid_flight(dut):
    """A reset at any moment leaves nothing behind."""
    bench = TrustBench(dut, stall=0.2)
    for _ in range(6):
        await bench.start()
        jobs = RandomJobs(bench)
        await jobs.run(5)
        for job in jobs.jobs():
            job()
        await cycles(dut, bench.random.randrange(1, 120))
    await bench.start()
    await RandomJobs(bench).run(10)
    assert bench.parity_errors == 0


@cocotb.test()
async def clears_everything(dut):
    """``clear`` acts after what was accepted, whatever that is, and leaves nothing."""
    bench = TrustBench(dut)
    await bench.start()
    jobs = RandomJobs(bench)
    for _ in range(8):
        await jobs.run(parameters()["steps"] // 10)
        for job in list(jobs.jobs())[: bench.random.randrange(1, 4)]:
            job()
            await bench.sent()
        await bench.clear()
        # Nothing but zeros: a hint shows both the values and the trust.
        model = bench.config.model
        for layer in range(min(4, model.layers)):
            for expert in range(min(model.experts, model.top_k)):
                assert not bench.hint(0, layer, expert, bench.random.randrange(256))
        await bench.until_idle()
        bench.check()
    assert bench.parity_errors == 0


@cocotb.test()
async def takes_jobs_in_order(dut):
    """Jobs of the same cycle: token start, values, route, hint."""
    bench = TrustBench(dut)
    await bench.start()
    jobs = RandomJobs(bench)
    for _ in range(60):
        await jobs.run(1)
        bench.begin(0)
        bench.write(0, 0, jobs.values())
        bench.route(0, 0, range(jobs.top_k))
        bench.hint(0, jobs.layers - 1, 0, 255)
        # All are offered in one cycle; later ones wait.
        await bench.until_idle()
        bench.check()


@cocotb.test()
async def is_idle_only_when_done(dut):
    """``idle`` is low while a job, part of a layer or an output waits."""
    bench = TrustBench(dut)
    await bench.start()
    jobs = RandomJobs(bench)
    for output, job in (
        (bench.patches, lambda: bench.write(0, 0, jobs.values())),
        (bench.hinted, lambda: bench.hint(0, 0, 0, 255)),
    ):
        if output is bench.hinted and not bench.config.perceptron.hints:
            continue
        output.paused = True
        await cycles(dut, 2)
        job()
        await cycles(dut, 60)
        assert str(dut.idle.value) == "0"
        output.paused = False
        await bench.until_idle()
        bench.check()


async def _time(bench, source, job):
    """Cycles from the transfer of a job until the next one is taken, and until each answer."""
    answers = {sink: len(sink.arrival) for sink in (bench.patches, bench.hinted)}
    job()
    await source.sent()
    start = source.cycle
    # A token start of the last context tells when the next job is taken.
    bench.begin(bench.config.contexts - 1)
    await bench.begins.sent()
    free = bench.begins.cycle - start
    await bench.until_idle()
    return free, *(
        [cycle - start for cycle in sink.arrival[count:]] for sink, count in answers.items()
    )


@cocotb.test()
async def is_as_fast_as_promised(dut):
    """Latencies of all jobs, for every number of hints."""
    bench = TrustBench(dut)
    await bench.start()
    jobs = RandomJobs(bench)
    assert bench.config.contexts > 1
    most = min(2 * jobs.top_k, jobs.experts)
    for n in range(most + 1):
        free, patches, _ = await _time(bench, bench.begins, lambda: bench.begin(0))
        assert free == (5 if bench.config.model.layers > 2 else 3)
        for i in range(n):
            free, _, hinted = await _time(bench, bench.hints, lambda i=i: bench.hint(0, 1, i, 255))
            assert hinted == [i + 8 if i else 7]
            assert free == hinted[0]
        free, _, hinted = await _time(bench, bench.hints, lambda: bench.hint(0, 1, 0, 255))
        if n:
            assert hinted == []
            assert free <= n + 3
            bench.golden.hint(0, 1, 0, 255)
        free, patches, _ = await _time(
            bench, bench.values, lambda: bench.write(0, 1, jobs.values())
        )
        count = max(n, 1)
        assert patches == list(range(8, count + 8))
        assert free == count + 7
        free, *_ = await _time(bench, bench.routes, lambda: bench.route(0, 1, range(jobs.top_k)))
        assert free == 2 * count + 3
        free, patches, _ = await _time(
            bench, bench.values, lambda: bench.write(0, 1, jobs.values())
        )
        # Of several beats the first ones look the list up.
        assert (free, patches) == (2, [2 if bench.config.lane_beats == 1 else 1])
    bench.check()


def _flip(bench, jobs, memory):
    """Flip a bit of a memory, and make the golden model lose what it was part of."""
    config, draw = bench.config, bench.random.randrange
    ctx = draw(config.contexts)
    layer = bench.random.choice((jobs.at[ctx], draw(config.model.layers)))
    expert = draw(config.model.experts)
    index, distance, score_bin = draw(2 * config.model.top_k), draw(4), draw(8)
    listed = [(c, m) for c, lists in enumerate(bench.golden.lists) for m in lists]
    if listed and memory in ("lists", "entries"):
        ctx, layer = bench.random.choice(listed)
        index = draw(len(bench.golden.listed(ctx, layer)))
    place_bits = min(2, config.bits("layer"))
    place = ctx << place_bits | layer % _PLACES
    lanes, part, width = config.predictor_lanes, 0, len(getattr(bench.dut, memory)[0])
    match memory:
        case "values":
            beats = 1 << (config.lane_beats - 1).bit_length()
            word = (ctx << config.bits("layer") | layer) * beats + expert // lanes
            part, width = expert % lanes * 9, 9
        case "lists":
            word = place
        case "entries":
            word = place << (2 * config.model.top_k - 1).bit_length() | index
        case "trust":
            word = distance << 3 | score_bin
    words = getattr(bench.dut, memory)
    old = int(words[word].value)
    if (old >> part & ((1 << width) - 1)).bit_count() % 2:
        return  # Parity does not see a second flip.
    words[word].value = old ^ 1 << part + draw(width)
    bench.golden.lose(
        memory,
        ctx=ctx,
        layer=layer,
        expert=expert,
        index=index,
        distance=distance,
        score_bin=score_bin,
    )


@cocotb.test()
async def survives_bit_flips(dut):
    """A flipped bit in any memory is told when it is read, and costs that word alone."""
    bench = TrustBench(dut)
    await bench.start()
    jobs = RandomJobs(bench)
    steps = parameters()["steps"]
    for memory in _MEMORIES:
        await jobs.run(steps)
        before = bench.parity_errors
        for _ in range(steps):
            for _ in range(3 if memory != "values" else max(3, jobs.experts // 4)):
                _flip(bench, jobs, memory)
                await RisingEdge(dut.clk)  # the word has its new value
            await jobs.run(1)
        told = bench.parity_errors - before
        dut._log.info("%s: %d parity errors", memory, told)
        assert told > 0
        await bench.clear()
        await bench.until_idle()
    before = bench.parity_errors
    await jobs.run(steps)
    assert bench.parity_errors == before
