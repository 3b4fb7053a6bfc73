# amaranth: UnusedElaboratable=no
"""Queue of candidates against its golden model.

::

    i ─▶ CandidateQueue ─▶ best, valid      routes, routed, enable, cutoff_layer ─▶
                        ◀─ take
"""

import random
from collections import Counter
from pathlib import Path

import cocotb
import pytest
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.benefit import CONFIDENCE_STEPS, LEAST_STEPS
from prestage_hw.contract.records import Source
from prestage_hw.layouts import RecordLayout
from prestage_hw.scheduler import CandidateQueue
from prestage_sim.model.scheduler import CandidateQueue as GoldenQueue
from prestage_tb.bench import (
    Signals,
    StreamSource,
    cycles,
    parameters,
    reset,
    run_bench,
    start_clock,
)
from prestage_tb.coverage import hit

_CONFIGS = {
    "one-context": DeviceConfig(
        model=ModelConfig(name="one", layers=24, experts=16, top_k=2), slots=8
    ),
    # Shares that are no power of two.
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=5, experts=11, top_k=3), slots=13, contexts=3
    ),
}
_FIELDS = ("ctx", "layer", "expert", "score", "source", "deadline")


class _Bench:
    """Stimulus, and a golden queue that follows what happens at the ports."""

    def __init__(self, dut, *, stall=0.0, follow=True):
        self.dut = dut
        self.ports = Signals(dut)
        self.config = parameters()["config"]
        self.longest_wait = CandidateQueue(config=self.config).longest_wait
        self.random = random.Random(cocotb.RANDOM_SEED)
        self.layout = RecordLayout("Candidate", config=self.config)
        start_clock(dut)
        self.i = StreamSource(dut, "i", self.layout, stall=stall)
        self.follow = follow
        dut.take.value = 0
        dut.routed.value = 0
        dut.routes.value = 0
        dut.enable.value = 1
        dut.cutoff_layer.value = 255
        self.forget()
        cocotb.start_soon(self._watch())

    def forget(self):
        self.routes = [0] * self.config.contexts
        self.golden = GoldenQueue(self.config, routes=self.routes)
        self.dut.routes.value = 0
        self.counts = Counter()
        self.pushed = Counter()
        self.taken = []
        self.arriving = []
        self.waited = 0

    async def reset(self):
        await reset(self.dut, drivers=[self.i])
        self.forget()

    async def _watch(self):
        dut = self.dut
        while True:
            await FallingEdge(dut.clk)
            if self.ports.high("rst"):
                continue
            self.counts["stale"] += self.ports.number("stale")
            self.counts["overflow"] += self.ports.number("overflow")
            # Who was taken in with the last edge counts from now on.
            for candidate in self.arriving:
                self.pushed[candidate] += 1
                if self.follow:
                    self.golden.push(candidate)
            self.arriving.clear()
            ready = self.ports.high("i__ready")
            self.waited = 0 if ready else self.waited + 1
            assert self.waited <= self.longest_wait
            if ready and self.ports.high("i__valid"):
                fields = self.i._unpack(self.ports.number("i__payload"))
                self.arriving.append(tuple(fields[name] for name in _FIELDS))

    def best(self):
        fields = self.i._unpack(self.ports.number("best"))
        return tuple(fields[name] for name in _FIELDS)

    def send(self, ctx, ahead, score, *, layer=None, source=Source.PREDICTOR):
        model = self.config.model
        self.i.send(
            {
                "ctx": ctx,
                "layer": self.random.randrange(model.layers) if layer is None else layer,
                "expert": self.random.randrange(model.experts),
                "score": score,
                "source": int(source),
                "deadline": (self.routes[ctx] + ahead) % 256,
            }
        )

    def send_at_random(self, ctx):
        rng = self.random
        ahead = rng.choice((1, 1, 1, 2, 3, rng.randrange(1, 129), rng.randrange(-127, 1)))
        score = rng.choice((rng.randrange(256), 64, 200, 255, 0))
        self.send(ctx, ahead, score, source=rng.choice(list(Source)))

    async def route(self, ctx, *, steps=1):
        """Routing decisions of a context."""
        for _ in range(steps):
            self.dut.routed.value = 1
            await RisingEdge(self.dut.clk)
            self.dut.routed.value = 0
            self.routes[ctx] = (self.routes[ctx] + 1) % 256
            self.dut.routes.value = sum(n << 8 * c for c, n in enumerate(self.routes))

    async def quiet(self):
        """Wait until all that was sent is in its place."""
        still = 0
        for _ in range(200_000):
            await FallingEdge(self.dut.clk)
            rests = self.ports.high("valid") or self.ports.high("empty")
            still = still + 1 if rests and not self.i.pending else 0
            if still == 3:
                return
        raise AssertionError("not quiet")

    async def compare(self):
        await self.quiet()
        best = self.golden.best()
        assert str(self.dut.valid.value) == ("0" if best is None else "1")
        assert str(self.dut.empty.value) == ("1" if best is None else "0")
        if best is not None:
            assert self.best() == best
        await cycles(self.dut, 2)
        assert self.counts["overflow"] == self.golden.overflow

    async def take(self):
        """Take the best, which must be there."""
        assert self.ports.high("valid")
        self.taken.append(self.best())
        if self.follow:
            assert self.golden.take() == self.taken[-1]
        else:
            ctx, deadline = self.taken[-1][0], self.taken[-1][5]
            assert (self.routes[ctx] - deadline) % 256 >= 128, "a stale one was taken"
        self.dut.take.value = 1
        await RisingEdge(self.dut.clk)
        self.dut.take.value = 0

    async def drain(self):
        """Take all that is left, and see that nothing was lost."""
        await self.compare()
        while self.ports.high("valid"):
            await self.take()
            await self.compare()
        assert self.counts["stale"] == self.golden.stale
        assert not len(self.golden)


@cocotb.test()
async def follows_golden(dut):
    """Newcomers, takes and routing decisions, one thing at a time."""
    bench = _Bench(dut)
    await bench.reset()
    contexts, share = bench.config.contexts, bench.config.candidate_share
    for step in range(8):
        burst = bench.random.choice((1, 2, 5, share // 2)) if step % 4 else share * 3 // 2
        ctx = bench.random.randrange(contexts)
        for _ in range(burst):
            bench.send_at_random(ctx)
        await bench.compare()
        for _ in range(bench.random.choice((0, 1, 2, min(burst, 20)))):
            if not bench.ports.high("valid"):
                break
            await bench.take()
            await bench.compare()
        for _ in range(bench.random.choice((0, 1, 1, 3))):
            await bench.route(bench.random.randrange(contexts))
            await bench.compare()
    assert bench.golden.overflow and bench.counts["stale"]
    await bench.drain()
    hit("queue.lockstep")


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5])
async def takes_while_newcomers_come(dut, stall):
    """What is taken at any moment is the best of all that have come."""
    bench = _Bench(dut, stall=stall)
    await bench.reset()
    contexts = bench.config.contexts
    for _ in range(12):
        for _ in range(bench.random.randrange(1, 20)):
            bench.send_at_random(bench.random.randrange(contexts))
        for _ in range(bench.random.randrange(300)):
            await FallingEdge(dut.clk)
            if bench.ports.high("valid") and bench.random.random() < 0.3:
                await bench.take()
        await bench.quiet()
        await bench.route(bench.random.randrange(contexts))
    await bench.drain()
    assert len(bench.taken) > 25


@cocotb.test()
async def routes_at_any_moment(dut):
    """Nothing is lost or doubled, and nothing stale is taken."""
    bench = _Bench(dut, stall=0.4, follow=False)
    await bench.reset()
    contexts, share = bench.config.contexts, bench.config.candidate_share
    for step in range(12):
        for _ in range(contexts * (share + 20) if step % 3 == 0 else bench.random.choice((3, 20))):
            bench.send_at_random(bench.random.randrange(contexts))
        for _ in range(bench.random.randrange(400)):
            await FallingEdge(dut.clk)
            if step % 3 and bench.random.random() < 0.05:
                await bench.route(bench.random.randrange(contexts))
            elif bench.ports.high("valid") and bench.random.random() < 0.2:
                await bench.take()
    await bench.quiet()
    while bench.ports.high("valid"):
        await bench.take()
        await bench.quiet()
    await cycles(dut, 3)
    assert bench.ports.high("empty")
    assert not Counter(bench.taken) - bench.pushed
    lost = bench.counts["stale"] + bench.counts["overflow"]
    assert bench.pushed.total() == len(bench.taken) + lost
    assert bench.counts["stale"] and bench.counts["overflow"] and bench.taken
    hit("queue.conserved")


@cocotb.test()
async def orders_by_benefit(dut):
    """Every step of confidence is worth as much as a layer; of equals the first goes first."""
    bench = _Bench(dut)
    await bench.reset()
    bench.send(0, 1 + LEAST_STEPS, 255, layer=0)
    bench.send(0, 1, 0, layer=1)
    bench.send(0, 1, 0, layer=2)
    for score, steps in ((255, 0), (223, 1), (64, 10), (1, 41)):
        assert CONFIDENCE_STEPS[score] == steps
        bench.send(0, 1, score, layer=3)
    order = []
    await bench.compare()
    while bench.ports.high("valid"):
        order.append((bench.best()[1], bench.best()[3]))
        await bench.take()
        await bench.compare()
    assert order == [(3, 255), (3, 223), (3, 64), (3, 1), (0, 255), (1, 0), (2, 0)]
    # A layer nearer is one step; the last step is reached with the farthest deadline.
    bench.send(0, 2, 255, layer=0)
    bench.send(0, 1, 223, layer=1)
    bench.send(0, 128, 0, layer=2)
    await bench.compare()
    assert bench.best()[1] == 0
    await bench.drain()
    hit("queue.order")


@cocotb.test()
async def contexts_take_turns(dut):
    """One with many candidates gets as many turns as one with few, and no more than its places."""
    bench = _Bench(dut)
    await bench.reset()
    contexts, share = bench.config.contexts, bench.config.candidate_share
    for _ in range(share + 5):
        bench.send(0, 1, 255)
    for ctx in range(1, contexts):
        for _ in range(3):
            bench.send(ctx, 3, 10)
    await bench.compare()
    assert bench.counts["overflow"] == 5
    for _ in range(3 * contexts):
        await bench.take()
        await bench.compare()
    assert [candidate[0] for candidate in bench.taken] == 3 * list(range(contexts))
    hit("queue.fair")


@cocotb.test()
async def loses_the_worst(dut):
    """A full queue: who is better replaces the worst, who is not is lost."""
    bench = _Bench(dut)
    await bench.reset()
    share = bench.config.candidate_share
    for n in range(share):
        bench.send(0, 1, 100 + n % 7)
    bench.send(0, 1, 100)
    bench.send(0, 1, 255)
    bench.send(0, 5, 50)
    await bench.compare()
    assert bench.counts["overflow"] == 3
    assert bench.best()[3] == 255
    # Those that are stale make room.
    await bench.route(0)
    for _ in range(share):
        bench.send(0, 1, 7)
    await bench.compare()
    assert bench.counts == {"stale": share, "overflow": 3}
    hit("queue.full")


@cocotb.test()
async def newcomers_in_the_stated_cycles(dut):
    bench = _Bench(dut)
    await bench.reset()
    await bench.quiet()
    for _ in range(9):
        bench.send(0, 1, 99)
    moments = []
    for cycle in range(100):
        await FallingEdge(dut.clk)
        if bench.ports.high("i__valid") and bench.ports.high("i__ready"):
            moments.append(cycle)
    steps = {later - first for first, later in zip(moments[1:], moments[2:], strict=False)}
    assert len(moments) == 9 and steps == {CandidateQueue.insert_cycles}
    await bench.drain()


@cocotb.test()
async def unwanted_on_entry(dut):
    """Low ``enable`` lets hints in only, the cut-off layer nothing from there on."""
    bench = _Bench(dut, follow=False)
    await bench.reset()
    dut.enable.value = 0
    dut.cutoff_layer.value = 2
    for layer in range(4):
        for source in Source:
            bench.send(0, 1, 200, layer=layer, source=source)
    await bench.quiet()
    while bench.ports.high("valid"):
        await bench.take()
        await bench.quiet()
    assert [(c[1], c[4]) for c in bench.taken] == [(0, Source.HINT), (1, Source.HINT)]


@cocotb.test()
async def resets(dut):
    """A reset at any moment leaves nothing behind."""
    bench = _Bench(dut, stall=0.2)
    contexts = bench.config.contexts
    await bench.reset()
    for _ in range(4):
        for _ in range(40):
            bench.send_at_random(bench.random.randrange(contexts))
        await cycles(dut, bench.random.randrange(400))
        await bench.reset()
        await bench.compare()
        for _ in range(5):
            bench.send_at_random(bench.random.randrange(contexts))
        await bench.drain()


@pytest.mark.parametrize("name", _CONFIGS)
def test_queue(name):
    run_bench(
        CandidateQueue(config=_CONFIGS[name]),
        module=Path(__file__),
        name="queue",
        parameters={"config": _CONFIGS[name]},
    )
