# amaranth: UnusedElaboratable=no
"""Budget of the scheduler against its golden model, which is told the cycles.

::

    routes, tiles, questions ─▶ Budget ─▶ means, answers
"""

import random
from pathlib import Path

import cocotb
import pytest
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.scheduler import Budget
from prestage_sim.model.scheduler import Budget as GoldenBudget
from prestage_tb.bench import parameters, reset, run_bench, start_clock
from prestage_tb.coverage import hit

_CONFIGS = {
    "tiny": TINY_DEVICE,
    # More tiles than a deadline has bits for, contexts that are no power of two.
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=5, experts=11, top_k=3),
        slots=13,
        expert_bytes=512 * 37,
        tile_bytes=512,
        contexts=3,
        inflight=9,
        layer_bytes=tuple(512 * tiles for tiles in (37, 1, 12, 20, 7)),
    ),
}

#: Fewer than the device's, so that what is too long ago comes up.
_TIME_BITS = 13

_STROBES = ("routed", "fetched", "completed", "ask")


class _Bench:
    """What a scheduler tells, at random, a cycle at a time."""

    def __init__(self, dut):
        self.dut = dut
        self.config = parameters()["config"]
        self.block = Budget(config=self.config, time_bits=_TIME_BITS)
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        for name in (*_STROBES, "failed", "ctx", "ask_ctx", "ask_deadline", "left", "clear"):
            getattr(dut, name).value = 0
        dut.budget.value = 0
        if self.config.layer_bytes:
            dut.ask_layer.value = 0
        self.now = 0
        self.forget()
        cocotb.start_soon(self._watch())

    def forget(self):
        self.golden = GoldenBudget(self.config, time_bits=_TIME_BITS)
        self.busy = 0
        self.expected = {}  # late by the cycle of the answer

    async def _watch(self):
        while True:
            await FallingEdge(self.dut.clk)
            if str(self.dut.rst.value) == "0":
                answered = str(self.dut.answered.value) == "1"
                assert answered == (self.now in self.expected), "an answer at the wrong time"
                if answered:
                    late = self.expected.pop(self.now)
                    assert (str(self.dut.late.value) == "1") == late

    async def reset(self):
        await reset(self.dut)
        self.forget()

    async def cycle(self, **inputs):
        """One cycle with these inputs; strobes that are not named are 0."""
        dut, golden = self.dut, self.golden
        for name in _STROBES:
            getattr(dut, name).value = int(name in inputs)
        budget = dut.budget.value.to_unsigned()
        if "completed" in inputs:
            dut.failed.value = int(inputs["completed"])
            golden.completed(failed=inputs["completed"], now=self.now)
            self.busy -= 1
        if "fetched" in inputs:
            golden.fetched(now=self.now)
            self.busy += 1
        if "routed" in inputs:
            dut.ctx.value = inputs["routed"]
            golden.routed(inputs["routed"], now=self.now)
        if "ask" in inputs:
            ctx, deadline, left = inputs["ask"]
            layer = self.random.randrange(self.config.model.layers)
            if self.config.layer_bytes:
                dut.ask_layer.value = layer
            dut.ask_ctx.value, dut.ask_deadline.value, dut.left.value = ctx, deadline, left
            late = golden.late(ctx, deadline, left=left, budget=budget, now=self.now, layer=layer)
            self.expected[self.now + self.block.latency] = late
        await RisingEdge(dut.clk)
        self.now += 1

    async def pause(self, count):
        """Cycles in which nothing happens."""
        await self.cycle()
        for _ in range(count - 1):
            await RisingEdge(self.dut.clk)
            self.now += 1

    def compare(self):
        assert int(self.dut.layer_time.value) == self.golden.layer_time
        assert int(self.dut.tile_time.value) == self.golden.tile_time

    async def run(self, count, *, layer, tile):
        """Random traffic with about these times. Answers of both kinds are wanted."""
        rng, config = self.random, self.config
        answers = set()
        for _ in range(count):
            ctx = rng.randrange(config.contexts)
            await self.cycle(routed=ctx)
            await self.pause(3)
            end = self.now + rng.randrange(layer // 2 + 4, 3 * layer // 2 + 5)
            while self.now < end:
                what = {}
                if self.busy and rng.random() < 0.7:
                    what["completed"] = rng.random() < 0.1
                if self.busy < config.inflight * config.tiles and rng.random() < 0.6:
                    what["fetched"] = True
                await self.cycle(**what)
                await self.pause(rng.randrange(tile // 2 + 1, 2 * tile + 2))
                if rng.random() < 0.4:
                    self.dut.budget.value = rng.randrange(1, 16)
                    await self.pause(2)
                    self.compare()
                    # Around what comes in time.
                    deadline = rng.choice((1, 1, 2, 3, 128))
                    most = config.inflight * config.tiles
                    near = deadline * self.golden.layer_time // (self.golden.tile_time or 1)
                    left = min(max(0, near + rng.randrange(-6, 4)), most)
                    await self.cycle(ask=(rng.randrange(config.contexts), deadline, left))
                    answers.add(self.expected[self.now - 1 + self.block.latency])
                    await self.pause(self.block.latency)
        return answers


@cocotb.test()
@cocotb.parametrize((("layer", "tile"), [(300, 6), (900, 40), (60, 1)]))
async def follows_golden(dut, layer, tile):
    """Means and answers, from nothing on and after resets and clears."""
    bench = _Bench(dut)
    answers = set()
    for turn in range(3):
        await bench.reset()
        answers |= await bench.run(20, layer=layer, tile=tile)
        if turn == 1:
            dut.clear.value = 1
            await bench.cycle()
            dut.clear.value = 0
            bench.golden.clear()
            await bench.pause(3)
            bench.compare()
            assert int(dut.layer_time.value) == 0
            answers |= await bench.run(10, layer=layer, tile=tile)
    assert answers == {False, True}
    hit("budget.lockstep", "traffic", of=("traffic", "pauses"))
    # The moment of each was compared.
    hit("budget.latency")


@cocotb.test()
async def long_pauses(dut):
    """Decisions too far apart are no layer, one cycle less is; what is older is unknown."""
    bench = _Bench(dut)
    await bench.reset()
    dut.budget.value = 8
    await bench.run(3, layer=100, tile=4)
    limit = 1 << _TIME_BITS
    for gap in (limit - 1, limit, 2 * limit - 5):
        await bench.cycle(routed=0)
        await bench.pause(20)
        before = bench.golden.layer_time
        await bench.pause(gap - 21 - 2 * bench.block.latency)
        await bench.cycle(ask=(0, 1, 0))
        late = bench.expected[bench.now - 1 + bench.block.latency]
        assert late == (gap - 2 * bench.block.latency < limit)
        await bench.pause(2 * bench.block.latency - 1)
        await bench.cycle(routed=0)
        await bench.pause(4)
        bench.compare()
        assert (bench.golden.layer_time != before) == (gap < limit)
    hit("budget.lockstep", "pauses", of=("traffic", "pauses"))


@pytest.mark.parametrize("name", ["odd", pytest.param("tiny", marks=pytest.mark.soak)])
def test_budget(name):
    run_bench(
        Budget(config=_CONFIGS[name], time_bits=_TIME_BITS),
        module=Path(__file__),
        name="budget_block",
        parameters={"config": _CONFIGS[name]},
    )


def test_bad_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        Budget(config=3)
    with pytest.raises(ValueError, match="Width of times must be between 4 and 32, not 3"):
        Budget(config=TINY_DEVICE, time_bits=3)
