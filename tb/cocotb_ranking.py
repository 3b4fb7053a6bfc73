"""Simulation half of the ranking's bench: random layers in lockstep with the golden order.

::

    values, patches ─▶ Ranking ─▶ candidates
        │                             │
        └──▶ ranked() ──▶ compare ◀───┘
"""

import math
import random

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.layouts import RecordLayout
from prestage_hw.predictor.ranking import PatchLayout, Ranking, ValuesLayout
from prestage_sim.model.predictor.ranking import ranked
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


class RankingBench:
    """Drivers of all ports, and the candidates that are expected."""

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.config = config = parameters()["config"]
        self.block = Ranking(config)  # for its stated latencies
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        self.values = StreamSource(dut, "values", ValuesLayout(config=config), stall=stall)
        self.patches = StreamSource(dut, "patches", PatchLayout(config=config), stall=stall)
        candidate = RecordLayout("Candidate", config=config)
        self.candidates = StreamSink(dut, "candidates", candidate, stall=stall)
        self.drivers = (self.values, self.patches, self.candidates)
        self.expected = []

    async def start(self):
        await reset(self.dut, drivers=self.drivers)
        self.expected = []

    def draw(self, spread):
        """A value for each expert, out of so many different ones."""
        pool = [self.random.randrange(256) for _ in range(spread)]
        return [self.random.choice(pool) for _ in range(self.config.model.experts)]

    def send(self, values, *, threshold=0, patches=(), far=0):
        """Send a layer, and expect its candidates."""
        config, draw = self.config, self.random.randrange
        lanes, beats = config.predictor_lanes, config.lane_beats
        layer = {
            "ctx": draw(config.contexts),
            "layer": draw(config.model.layers),
            "deadline": draw(256),
        }
        # Lanes without an expert may hold anything.
        rest = [draw(256) for _ in range(lanes * beats - len(values))]
        for beat in range(beats):
            part = [*values, *rest][beat * lanes : (beat + 1) * lanes]
            last = int(beat == beats - 1)
            self.values.send(
                {
                    **layer,
                    "beat": beat,
                    "values": part,
                    "threshold": threshold,
                    "far": far,
                    "last": last,
                }
            )
        values = list(values)
        steps = []
        for expert, value in patches:
            values[expert] = value
            steps.append({"expert": expert, "value": value, "valid": 1, "go": 0})
            if self.random.random() < 0.2:
                steps.append({"expert": draw(len(values)), "value": 255, "valid": 0, "go": 0})
        if not steps or self.random.random() < 0.3:
            steps.append({"expert": draw(len(values)), "value": 255, "valid": 0, "go": 0})
        steps[-1]["go"] = 1
        self.patches.send(*steps)
        most = (1 if far else 2) * config.model.top_k
        chosen = ranked(values, threshold=threshold, most=most)
        self.expected += [
            {**layer, "expert": expert, "score": value, "source": 0} for expert, value in chosen
        ]
        return len(chosen)

    def send_random(self):
        draw = self.random
        experts = self.config.model.experts
        values = self.draw(draw.choice((1, 2, 4, 256)))
        patches = [
            (draw.randrange(experts), draw.choice((0, 255, draw.randrange(256))))
            for _ in range(draw.choice((0, 0, 1, 4, 16)))
        ]
        if patches and draw.random() < 0.5:  # One group, again and again.
            patches = [(expert % 8 % experts, value) for expert, value in patches]
        threshold = draw.choice((0, 1, 32, 128, 255, draw.choice(values)))
        return self.send(values, threshold=threshold, patches=patches, far=draw.randrange(2))

    async def until_idle(self, limit=100_000):
        await self.values.sent()
        await self.patches.sent()
        for _ in range(limit):
            await FallingEdge(self.dut.clk)
            if str(self.dut.idle.value) == "1":
                break
        else:
            raise AssertionError(f"Ranking must become idle within {limit} cycles")
        await RisingEdge(self.dut.clk)

    def check(self):
        assert self.candidates.received == self.expected


async def _compare(bench, layers):
    for _ in range(layers):
        bench.send_random()
    await bench.until_idle()
    bench.check()


@cocotb.test()
async def follows_golden(dut):
    """Random layers, patches, ties, thresholds and stalls."""
    bench = RankingBench(dut, stall=Stall(0.3, burst=(1, 9)))
    await bench.start()
    await _compare(bench, parameters()["layers"])
    # A layer proposes at most k experts or twice as many; thresholds leave a good part of them.
    assert len(bench.expected) > parameters()["layers"] * bench.config.model.top_k / 2
    for driver in bench.drivers:
        driver.stall = 0
    await _compare(bench, parameters()["layers"])
    assert_no_x(dut.idle, dut.candidates__payload)


@cocotb.test()
async def restarts_in_mid_flight(dut):
    """A reset at any moment leaves nothing behind."""
    bench = RankingBench(dut, stall=0.2)
    for _ in range(12):
        await bench.start()
        await FallingEdge(dut.clk)
        assert str(dut.idle.value) == "1"
        for _ in range(4):
            bench.send_random()
        await cycles(dut, bench.random.randrange(4, 160))
    await bench.start()
    await _compare(bench, 10)


@cocotb.test()
async def is_busy_until_all_is_taken(dut):
    """``idle`` falls with the first beat and rises when the last candidate is taken."""
    bench = RankingBench(dut)
    await bench.start()
    beats = bench.config.lane_beats
    bench.patches.paused = True
    for count in (0, 1):
        bench.candidates.paused = True
        bench.send([255] * count + [0] * (bench.config.model.experts - count), threshold=1)
        taken = bench.values.sent_count
        while bench.values.sent_count < taken + beats:
            await RisingEdge(dut.clk)
            if bench.values.sent_count > taken:
                await FallingEdge(dut.clk)
                assert str(dut.idle.value) == "0"
        await cycles(dut, 5)
        assert str(dut.values__ready.value) == "0"
        bench.patches.paused = False
        await cycles(dut, 40)
        assert int(dut.idle.value) == (count == 0)
        bench.candidates.paused = False
        await cycles(dut, 12)
        assert str(dut.idle.value) == "1"
        bench.check()
        bench.patches.paused = True


@cocotb.test()
async def is_as_fast_as_promised(dut):
    """First candidate after go, distance of candidates, next layer; whatever is patched."""
    bench = RankingBench(dut)
    await bench.start()
    first, following = bench.block.first_candidate_cycles, bench.block.next_candidate_cycles
    experts, lanes = bench.config.model.experts, bench.config.predictor_lanes
    if experts <= 128:
        # Groups of 8 that share a bank take turns; more than four of them are a cycle farther away.
        # To compare more than four groups at first takes a cycle more.
        groups = math.ceil(experts / 8)
        turns, slow = math.ceil(groups / max(1, lanes // 8)), int(groups > 4)
        assert (first, following) == (5 + int(turns > 4) + slow, 4)
    worst_first = worst_following = worst_free = 0
    for _ in range(40):
        start = len(bench.candidates.received)
        count = bench.send_random()
        await bench.patches.sent()  # told one cycle after the transfer
        go = bench.candidates.cycle
        # One more layer waits for the candidates to be over.
        if count:
            await bench.candidates.receive(count)
        bench.send(bench.draw(2), threshold=0)
        arrival = bench.candidates.arrival[start:]
        before = bench.values.sent_count
        while bench.values.sent_count == before:
            await RisingEdge(dut.clk)
        free = bench.values.cycle - (arrival[-1] if count else go + first)
        await bench.until_idle()
        bench.check()
        bench.candidates.clear()
        bench.expected = []
        if count:
            worst_first = max(worst_first, arrival[0] - go)
        steps = [later - one for one, later in zip(arrival, arrival[1:], strict=False)]
        worst_following = max([worst_following, *steps])
        worst_free = max(worst_free, free)
    dut._log.info(
        "first candidate after %d cycles, next after %d, free after %d",
        worst_first,
        worst_following,
        worst_free,
    )
    assert worst_first == first
    assert worst_following == following
    assert worst_free <= following
