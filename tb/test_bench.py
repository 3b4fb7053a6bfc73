# amaranth: UnusedElaboratable=no
"""The bench helpers themselves, on a buffered queue and on components that break the rules."""

import random

import cocotb
import pytest
from amaranth import Module, Signal, signed, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract import PRESETS, DeviceConfig
from prestage_hw.layouts import RecordLayout
from prestage_tb import bench
from prestage_tb.bench import (
    Stall,
    StreamSink,
    StreamSource,
    assert_no_x,
    cycles,
    parameters,
    reset,
    run_bench,
    start_clock,
)

LAYOUT = data.StructLayout(
    {
        "expert": unsigned(5),
        "offset": signed(4),
        "bytes": data.ArrayLayout(8, 3),
        "ids": data.ArrayLayout(unsigned(3), 2),
    }
)


class Queue(wiring.Component):
    """Buffered queue; ``fault`` breaks one rule of streams on purpose."""

    def __init__(self, *, layout=LAYOUT, depth=4, fault=None):
        self.layout = data.StructLayout({"all": layout})
        self.depth = depth
        self.fault = fault
        super().__init__({"i": In(stream.Signature(layout)), "o": Out(stream.Signature(layout))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.queue = queue = fifo.SyncFIFOBuffered(width=self.layout.size, depth=self.depth)
        wiring.connect(m, wiring.flipped(self.i), queue.w_stream)
        count = Signal(3)
        m.d.sync += count.eq(count + 1)
        m.d.comb += [
            self.o.payload.eq(queue.r_data),
            self.o.valid.eq(queue.r_rdy),
            queue.r_en.eq(self.o.ready & self.o.valid),
        ]
        if self.fault == "drops":
            m.d.comb += self.o.valid.eq(queue.r_rdy & (count != 7))
        if self.fault == "changes":
            m.d.comb += self.o.payload.as_value()[0].eq(queue.r_data[0] ^ (count == 7))
        if self.fault == "loses":
            m.d.comb += queue.r_en.eq((self.o.ready | (count == 7)) & self.o.valid)
        return m


def random_payload(generator):
    return {
        "expert": generator.randrange(32),
        "offset": generator.randrange(-8, 8),
        "bytes": [generator.randrange(256) for _ in range(3)],
        "ids": [generator.randrange(8) for _ in range(2)],
    }


@cocotb.test()
async def passes_in_order(dut):
    start_clock(dut)
    source = StreamSource(dut, "i", LAYOUT, stall=parameters()["idle"])
    sink = StreamSink(dut, "o", LAYOUT, stall=Stall(parameters()["backpressure"], burst=(1, 9)))
    await reset(dut)
    generator = random.Random(cocotb.RANDOM_SEED)
    payloads = [random_payload(generator) for _ in range(200)]
    source.send(*payloads)
    assert await sink.receive(200) == payloads
    await source.sent()
    assert source.sent_count == 200
    assert_no_x(dut.o__valid, dut.i__ready)


@cocotb.test()
async def full_rate_without_stalls(dut):
    start_clock(dut)
    source = StreamSource(dut, "i", LAYOUT)
    sink = StreamSink(dut, "o", LAYOUT)
    await reset(dut)
    generator = random.Random(cocotb.RANDOM_SEED)
    source.send(*[random_payload(generator) for _ in range(50)])
    await sink.receive(50)
    assert sink.arrival[-1] - sink.arrival[0] == 49


@cocotb.test()
async def forgets_in_reset(dut):
    start_clock(dut)
    source = StreamSource(dut, "i", LAYOUT)
    sink = StreamSink(dut, "o", LAYOUT, stall=[True] * 40)
    await reset(dut)
    generator = random.Random(cocotb.RANDOM_SEED)
    source.send(*[random_payload(generator) for _ in range(10)])
    await cycles(dut, 20)
    await reset(dut, drivers=[source, sink])
    last = random_payload(generator)
    source.send(last)
    assert await sink.receive(1) == [last]
    await cycles(dut, 20)
    assert sink.received == [last]


@cocotb.test()
async def waits_no_longer_than_asked(dut):
    start_clock(dut)
    sink = StreamSink(dut, "o", LAYOUT)
    await reset(dut)
    with pytest.raises(AssertionError, match="must give 1 payloads within 30 cycles, but gave 0"):
        await sink.receive(1, limit=30)


@cocotb.test()
async def gets_a_configuration(dut):
    config = parameters()["config"]
    start_clock(dut)
    layout = RecordLayout("Data", config=config)
    source = StreamSource(dut, "i", layout, stall=0.2)
    sink = StreamSink(dut, "o", layout, stall=0.2)
    await reset(dut)
    payload = {"slot": 3, "beat": 17, "data": list(range(config.data_bytes)), "ok": 1}
    source.send(payload)
    assert await sink.receive(1) == [payload]


QUEUE_TESTS = [
    "passes_in_order",
    "full_rate_without_stalls",
    "forgets_in_reset",
    "waits_no_longer_than_asked",
]


@pytest.mark.parametrize("idle, backpressure", [(0.0, 0.0), (0.5, 0.2), (0.1, 0.8)])
def test_queue(idle, backpressure):
    run_bench(
        Queue,
        module=__file__,
        name="queue",
        parameters={"idle": idle, "backpressure": backpressure},
        testcase=QUEUE_TESTS,
    )


@pytest.mark.parametrize(
    "fault, message",
    [
        ("drops", "valid must not fall"),
        ("changes", "payload must not change"),
        ("loses", "(payload must not change|valid must not fall)"),
    ],
)
def test_broken_rules_are_found(fault, message):
    with pytest.raises(AssertionError, match=message):
        run_bench(
            Queue(fault=fault),
            module=__file__,
            name=f"queue_{fault}",
            parameters={"idle": 0.0, "backpressure": 0.8},
            testcase="passes_in_order",
        )


def test_configuration_passes_through():
    config = DeviceConfig(model=PRESETS["tiny"], slots=8)
    run_bench(
        Queue(layout=RecordLayout("Data", config=config)),
        module=__file__,
        name="queue_data",
        parameters={"config": config},
        testcase="gets_a_configuration",
    )


def test_seeds_outlive_new_fields(monkeypatch):
    """A field of the configuration that has its default does not count."""
    drawn = []
    for replaced in ("_to_verilog", "_build"):
        monkeypatch.setattr(bench, replaced, lambda *_, **__: None)
    monkeypatch.setattr(bench, "_run", lambda *_, seed, **__: drawn.append(seed))
    monkeypatch.delenv("COCOTB_RANDOM_SEED", raising=False)
    config = DeviceConfig(model=PRESETS["tiny"], slots=8)

    def run(**parameters):
        run_bench(Queue(), module=__file__, name="queue", parameters=parameters)

    run(config=config)
    *older, _ = DeviceConfig.__dataclass_fields__.items()
    monkeypatch.setattr(DeviceConfig, "__dataclass_fields__", dict(older))
    run(config=config)
    run(config=config.replace(slots=9))
    assert drawn[0] == drawn[1] != drawn[2]


def test_unknown_simulator():
    with pytest.raises(
        ValueError, match=r"^Simulator must be one of verilator, icarus, not 'vcs'$"
    ):
        run_bench(Queue, module=__file__, name="queue", sim="vcs")


def test_share_of_stalls():
    for probability, burst in ((0.3, (1, 1)), (0.9, (1, 1)), (0.5, (4, 20)), (0.95, (2, 3))):
        pauses = Stall(probability, burst=burst).generate(random.Random(1))
        share = sum(next(pauses) for _ in range(50_000)) / 50_000
        assert abs(share - probability) < 0.03
