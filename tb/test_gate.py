# amaranth: UnusedElaboratable=no
"""The gate before the slots that a host writes, in lockstep with its golden model.

::

    port ─▶ ┌───────────┐
    link ─▶ │ WriteGate │ ─▶ o
            └───────────┘
      changes ─▶   ─▶ told, whole, refused
"""

import random
from collections import deque

import cocotb
import pytest
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.layouts import RecordLayout
from prestage_hw.link.gate import WriteGate
from prestage_sim.model.link.gate import WriteGate as GoldenGate
from prestage_tb.bench import (
    Stall,
    StreamSink,
    StreamSource,
    cycles,
    parameters,
    reset,
    run_bench,
    start_clock,
)
from prestage_tb.coverage import hit

#: Cycles after which a beat that was taken has certainly been judged, unless ``o`` waits.
_JUDGED = 12


class _Bench:
    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.config = config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        layout = RecordLayout("BufferWrite", config=config)
        self.port = StreamSource(dut, "port", layout, stall=stall)
        self.link = StreamSource(dut, "link", layout, stall=stall)
        self.o = StreamSink(dut, "o", layout, stall=stall)
        for name in ("astray", "changes", "opens", "slot", "tile", "asks"):
            getattr(dut, name).value = 0
        self.passed, self.refused, self.strobes = [], 0, 0
        self.golden = GoldenGate(config)
        self.golden.connect(lambda *beat: self.passed.append(beat), self._refuse)
        cocotb.start_soon(self._count())

    def _refuse(self):
        self.refused += 1

    async def _count(self):
        while True:
            await FallingEdge(self.dut.clk)
            self.strobes += str(self.dut.refused.value) == "1"

    async def reset(self):
        await reset(self.dut, drivers=[self.port, self.link, self.o])
        await cycles(self.dut, WriteGate(config=self.config).clear_cycles + 2)

    async def change(self, opens, slot, tile):
        dut = self.dut
        dut.changes.value, dut.opens.value = 1, int(opens)
        dut.slot.value, dut.tile.value = slot, tile
        await RisingEdge(dut.clk)
        dut.changes.value = 0
        (self.golden.open if opens else self.golden.close)(slot, tile)

    async def ask(self, slot, tile):
        """Whether a tile is whole; the cycles until that was told."""
        dut = self.dut
        dut.asks.value, dut.asked_slot.value, dut.asked_tile.value = 1, slot, tile
        for count in range(1000):  # Beats of the link go first.
            await FallingEdge(dut.clk)
            told, whole = str(dut.told.value) == "1", str(dut.whole.value) == "1"
            await RisingEdge(dut.clk)
            if told:
                dut.asks.value = 0
                return whole, count
        raise AssertionError("The gate must tell")

    def beat(self, slot, beat):
        return {"slot": slot, "beat": beat, "data": self.random.randbytes(self.config.data_bytes)}

    def write(self, source, beat):
        source.send(beat)
        return self.golden.write(*beat.values())


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def follows_golden(dut, stall):
    bench = _Bench(dut, stall=Stall(stall, burst=(1, 4)))
    config, rng, golden = bench.config, bench.random, bench.golden
    await bench.reset()
    tiles = [(slot, tile) for slot in range(config.slots) for tile in range(config.tiles)]
    few = rng.sample(tiles, 4)
    under_way = deque()  # [tile, cycle from which on it is judged]
    asked = whole = rests = 0
    queued = {bench.port: 0, bench.link: 0}
    awaited = deque()  # beats that were not taken: tile, source, its number
    for step in range(6000):
        await RisingEdge(dut.clk)
        waiting = deque()
        while awaited:
            tile, source, number = awaited.popleft()
            if source.sent_count >= number:
                under_way.append((tile, step + _JUDGED))
            else:
                waiting.append((tile, source, number))
        awaited = waiting
        if bench.link.pending:
            rests = step + _JUDGED  # Beats of the port wait for those of the link.
        while under_way and max(under_way[0][1], rests) <= step:
            under_way.popleft()
        busy = {tile for tile, _ in under_way} | {tile for tile, *_ in awaited}
        # What waits at ``o`` may be of any tile.
        quiet = not stall or not awaited and not under_way
        free = [tile for tile in few if tile not in busy]
        if quiet and free and rng.random() < 0.05:
            slot, tile = rng.choice(free)
            await bench.change((slot, tile) not in golden._missing, slot, tile)
        elif quiet and free and rng.random() < 0.05:
            place = rng.choice(free)
            told, _ = await bench.ask(*place)
            assert told == golden.whole(*place), place
            asked += 1
            whole += told
        burst = rng.choice((1, 1, config.tile_beats))
        source = rng.choice((bench.port, bench.port, bench.link))
        # With pauses, so that the block comes to rest now and then.
        if source.pending < 3 and rng.random() < 0.3 and step % 100 < 50 and step < 5800:
            slot, tile = rng.choice(few)
            first = rng.randrange(config.tile_beats)
            for at in range(burst):
                beat = tile * config.tile_beats + (first + at) % config.tile_beats
                place = slot, beat
                if rng.random() < 0.05:
                    # Anywhere, also where there is nothing.
                    place = (
                        rng.randrange(1 << config.bits("slot")),
                        rng.randrange(1 << config.bits("beat")),
                    )
                bench.write(source, bench.beat(*place))
                queued[source] += 1
                awaited.append(((place[0], place[1] // config.tile_beats), source, queued[source]))
    await cycles(dut, 60)
    assert str(dut.idle.value) == "1"
    passed = sorted((b["slot"], b["beat"], bytes(b["data"])) for b in bench.o.received)
    assert passed == sorted(bench.passed)
    assert bench.strobes == bench.refused > 50 and len(passed) > 500
    assert whole and whole < asked
    hit("mover.gate")


@cocotb.test()
async def rate(dut):
    """A beat a cycle; two cycles more for another tile, and after a change."""
    bench = _Bench(dut)
    config = bench.config
    await bench.reset()
    for slot in range(2):
        await bench.change(True, slot, 0)
    for slot in (0, 1):
        for beat in range(config.tile_beats):
            bench.write(bench.port, bench.beat(slot, beat))
    await bench.port.sent()
    await cycles(dut, 10)
    gaps = [b - a for a, b in zip(bench.o.arrival, bench.o.arrival[1:], strict=False)]
    count = config.tile_beats - 1
    assert gaps == [1] * count + [3] + [1] * count
    assert bench.strobes == 0
    # Asked about at once; what is known is told in the same cycle.
    assert await bench.ask(1, 0) == (True, 0)
    assert await bench.ask(0, 0) == (True, 2)
    await bench.change(False, 0, 0)
    assert await bench.ask(0, 0) == (False, 2)
    # A beat that is out of range of the fields is refused whatever the fields say.
    dut.astray.value = 1
    bench.link.send(bench.beat(1, 0))
    await bench.link.sent()
    dut.astray.value = 0
    await cycles(dut, 10)
    assert bench.strobes == 1 and len(bench.o.received) == 2 * config.tile_beats
    hit("mover.gate_rate")


_SHAPES = {
    "tiny": TINY_DEVICE.replace(mover="host", host_writes=True),
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=3, experts=12, top_k=3),
        slots=11,
        expert_bytes=1536,
        contexts=2,
        data_bytes=64,
        mover="host",
        host_writes=True,
    ),
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_gate(shape):
    config = _SHAPES[shape]
    run_bench(
        lambda: WriteGate(config=config),
        module=__file__,
        name="gate",
        parameters={"config": config},
    )


def test_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        WriteGate(config=3)
