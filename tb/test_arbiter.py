# amaranth: UnusedElaboratable=no
"""Consumer and link on the read port of the expert buffer: each gets its own beats, in order.

::

    reads, beats           ◀─▶ ┌─────────────┐
                               │ ReadArbiter │ ◀─▶ port_reads, port_beats (a memory of any latency)
    link_reads, link_beats ◀─▶ └─────────────┘
"""

import random
from collections import deque

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from prestage_hw.buffer.arbiter import ReadArbiter
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.layouts import RecordLayout
from prestage_tb.bench import (
    StreamSink,
    StreamSource,
    cycles,
    parameters,
    reset,
    run_bench,
    start_clock,
)


def _beat(config, request):
    value = request["slot"] << 16 | request["beat"]
    return {"data": list(value.to_bytes(config.data_bytes, "little")), "ok": value & 1}


class _Bench:
    def __init__(self, dut, *, stall, latency):
        self.config = parameters()["config"]
        start_clock(dut)
        request = RecordLayout("ReadRequest", config=self.config)
        beat = RecordLayout("Beat", config=self.config)
        self.dut = dut
        self.latency = latency
        self.reads = StreamSource(dut, "reads", request, stall=stall)
        self.link_reads = StreamSource(dut, "link_reads", request, stall=stall)
        self.port_beats = StreamSource(dut, "port_beats", beat, stall=stall)
        self.beats = StreamSink(dut, "beats", beat, stall=stall)
        self.link_beats = StreamSink(dut, "link_beats", beat, stall=stall)
        self.port_reads = StreamSink(dut, "port_reads", request, stall=stall)
        self.drivers = [
            self.reads,
            self.link_reads,
            self.port_beats,
            self.beats,
            self.link_beats,
            self.port_reads,
        ]
        self.wait = deque()
        cocotb.start_soon(self._memory())

    async def _memory(self):
        seen = 0
        while True:
            await RisingEdge(self.dut.clk)
            if len(self.port_reads.received) < seen:  # A reset forgot them.
                seen = 0
                self.wait.clear()
            for request in self.port_reads.received[seen:]:
                self.wait.append((self.port_reads.cycle + self.latency, request))
            seen = len(self.port_reads.received)
            while self.wait and self.wait[0][0] <= self.port_reads.cycle:
                self.port_beats.send(_beat(self.config, self.wait.popleft()[1]))

    def request(self, rng):
        return {
            "slot": rng.randrange(self.config.slots),
            "beat": rng.randrange(self.config.expert_beats),
        }


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4], latency=[0, 5])
async def keeps_readers_apart(dut, stall, latency):
    """Random reads of both sides, the link's one at a time as the dispatcher asks for them."""
    bench = _Bench(dut, stall=stall, latency=latency)
    rng = random.Random(cocotb.RANDOM_SEED)
    await reset(dut, drivers=bench.drivers)
    wanted, link_wanted = [], []

    async def link():
        for _ in range(60):
            request = bench.request(rng)
            link_wanted.append(_beat(bench.config, request))
            bench.link_reads.send(request)
            await bench.link_beats.receive(1)
            await cycles(dut, rng.randrange(1, 12))

    task = cocotb.start_soon(link())
    for _ in range(40):
        requests = [bench.request(rng) for _ in range(rng.randrange(1, 12))]
        wanted += [_beat(bench.config, request) for request in requests]
        bench.reads.send(*requests)
        await cycles(dut, rng.randrange(1, 40))
    await bench.reads.sent()
    await task
    await cycles(dut, 60)
    assert bench.beats.received == wanted
    assert bench.link_beats.received == link_wanted


@cocotb.test()
async def gives_way_after_reset(dut):
    """A reset with reads of both sides under way leaves nothing behind."""
    bench = _Bench(dut, stall=0.3, latency=3)
    rng = random.Random(cocotb.RANDOM_SEED)
    await reset(dut, drivers=bench.drivers)
    for _ in range(10):
        bench.reads.send(*[bench.request(rng) for _ in range(10)])
        bench.link_reads.send(bench.request(rng))
        await cycles(dut, rng.randrange(2, 40))
        await reset(dut, drivers=bench.drivers, count=4)
        request = bench.request(rng)
        bench.link_reads.send(request)
        assert await bench.link_beats.receive(1) == [_beat(bench.config, request)]
        bench.reads.send(request)
        assert await bench.beats.receive(1) == [_beat(bench.config, request)]
        assert len(bench.beats.received) == len(bench.link_beats.received) == 1


def test_arbiter():
    run_bench(
        ReadArbiter(config=TINY_DEVICE),
        module=__file__,
        name="arbiter",
        parameters={"config": TINY_DEVICE},
    )


def test_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        ReadArbiter(config=3)
