# amaranth: UnusedElaboratable=no
"""Statistics of prefetches against their golden model.

::

    marks ─▶ PrefetchStatistics ◀─▶ requests, values
"""

import random
from pathlib import Path

import cocotb
import pytest
from amaranth import unsigned
from cocotb.triggers import RisingEdge

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.records import PrefetchKind, PrefetchOutcome
from prestage_hw.contract.statistics import statistics_word, statistics_words
from prestage_hw.layouts import RecordLayout
from prestage_hw.scheduler import PrefetchStatistics
from prestage_hw.scheduler.statistics import MarksLayout
from prestage_tb.bench import (
    StreamSink,
    StreamSource,
    cycles,
    parameters,
    reset,
    run_bench,
    start_clock,
)
from prestage_tb.coverage import hit

#: Narrow, so that counters fill up.
_COUNT_BITS = 4

_CONFIGS = {
    "tiny": TINY_DEVICE,
    "odd": DeviceConfig(model=ModelConfig(name="odd", layers=5, experts=11, top_k=3), slots=13),
}


class _Bench:
    """Marks and reads at random, with a table beside it."""

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        self.marks = StreamSource(dut, "marks", MarksLayout(config=self.config), stall=stall)
        self.requests = StreamSource(
            dut, "requests", RecordLayout("TableRequest", config=self.config), stall=stall
        )
        self.values = StreamSink(dut, "values", unsigned(32), stall=stall)
        dut.clear.value = 0
        self.words = statistics_words(self.config)
        self.counts = [0] * self.words

    async def reset(self):
        await reset(self.dut, drivers=[self.marks, self.requests, self.values])
        self.counts = [0] * self.words
        await self.idle()

    async def clear(self):
        self.dut.clear.value = 1
        await cycles(self.dut, 1)
        self.dut.clear.value = 0
        self.counts = [0] * self.words
        await cycles(self.dut, 1)
        assert str(self.dut.idle.value) == "0"

    async def idle(self):
        for _ in range(10_000):
            await RisingEdge(self.dut.clk)
            if str(self.dut.idle.value) == "1" and not self.marks.pending:
                return
        raise AssertionError("not idle")

    def mark(self):
        """One outcome; few words, so that they fill up."""
        fields = {}
        for name in ("first", "second"):
            layer = self.random.choice((0, self.config.model.layers - 1))
            kind = self.random.choice(list(PrefetchKind))
            outcome = self.random.choice(list(PrefetchOutcome))
            valid = int(self.random.random() < 0.6)
            fields[name] = {"valid": valid, "layer": layer, "kind": kind, "outcome": outcome}
            if valid:
                word = statistics_word(layer, kind, outcome)
                self.counts[word] = min(self.counts[word] + 1, (1 << _COUNT_BITS) - 1)
        self.marks.send(fields)

    async def compare(self):
        wanted = [*range(self.words), self.words, (1 << 24) - 1]
        for word in wanted:
            self.requests.send({"write": 0, "table": 3, "word": word, "value": 0})
        values = await self.values.receive(len(wanted))
        assert values == [*self.counts, 0, 0]


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def counts(dut, stall):
    """All words after bursts of marks, writes that change nothing, clears and resets."""
    bench = _Bench(dut, stall=stall)
    await bench.reset()
    for turn in range(6):
        for _ in range(bench.random.randrange(60, 120)):
            bench.mark()
        if turn == 3:
            await cycles(dut, bench.random.randrange(300))
            await bench.reset()
        await bench.idle()
        for word in range(4):
            bench.requests.send({"write": 1, "table": 3, "word": word, "value": 7})
        await bench.requests.sent()
        await bench.compare()
        if turn == 2:
            assert max(bench.counts) == (1 << _COUNT_BITS) - 1, "no counter is full"
        if turn == 4:
            await bench.clear()
            await bench.idle()
            await bench.compare()
    hit("statistics.lockstep")


@cocotb.test()
async def latency(dut):
    """Marks back to back are taken at the stated pace."""
    bench = _Bench(dut)
    await bench.reset()
    taken = []
    for _ in range(10):
        bench.mark()
    for cycle in range(200):
        await RisingEdge(dut.clk)
        if str(dut.marks__valid.value) == "1" and str(dut.marks__ready.value) == "1":
            taken.append(cycle)
    assert len(taken) == 10
    assert {b - a for a, b in zip(taken, taken[1:], strict=False)} == {PrefetchStatistics.latency}
    await bench.compare()


@pytest.mark.parametrize("name", ["odd", pytest.param("tiny", marks=pytest.mark.soak)])
def test_statistics(name):
    run_bench(
        PrefetchStatistics(config=_CONFIGS[name], count_bits=_COUNT_BITS),
        module=Path(__file__),
        name="statistics",
        parameters={"config": _CONFIGS[name]},
    )


def test_bad_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        PrefetchStatistics(config=3)
    with pytest.raises(ValueError, match="Counter width must be between 1 and 32, not 33"):
        PrefetchStatistics(config=TINY_DEVICE, count_bits=33)
