"""DMA engine in lockstep with its golden model (the half that runs in the simulator).

::

    fetches ─▶ DMA ─▶ writes
                │  ─▶ completions
               bus ─▶ AXIMemory
"""

import random

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.dma import DMA
from prestage_hw.layouts import RecordLayout
from prestage_sim.model.dma import DMA as GoldenDMA
from prestage_tb.axi import DECERR, SLVERR, AXIMemory, pattern, random_address
from prestage_tb.bench import (
    Stall,
    StreamSink,
    StreamSource,
    cycles,
    parameters,
    reset,
    start_clock,
)


class TB:
    """Clock, reset, streams, memory, scoreboard."""

    def __init__(
        self, dut, *, stall=0.0, fault=None, latency=4, bytes_per_cycle=None, memory_stall=None
    ):
        self.dut = dut
        self.config = config = parameters()["config"]
        self.golden = GoldenDMA(config)
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        if memory_stall is None:
            memory_stall = stall
        self.fetches = StreamSource(
            dut, "fetches", RecordLayout("FetchRequest", config=config), stall=stall
        )
        self.writes = StreamSink(
            dut, "writes", RecordLayout("BufferWrite", config=config), stall=stall
        )
        self.completions = StreamSink(
            dut, "completions", RecordLayout("Completion", config=config), stall=stall
        )
        self.memory = AXIMemory(
            dut,
            data_bytes=config.data_bytes,
            address_bits=config.address_bits,
            latency=latency,
            bytes_per_cycle=bytes_per_cycle,
            address_stall=memory_stall,
            data_stall=memory_stall,
            outstanding=config.outstanding_bursts,
            burst_beats=config.burst_beats,
            fault=fault,
        )
        self.failing = set()
        self.launched = []
        cocotb.start_soon(self._watch())

    async def _watch(self):
        """Check ``idle`` in every cycle and note when tiles come in and addresses go out."""
        inside = 0
        cycle = 0
        waits = False
        self.accepted = []
        dut = self.dut
        while True:
            await FallingEdge(dut.clk)
            if str(dut.rst.value) != "0":
                inside = 0
                await RisingEdge(dut.clk)
                continue
            assert str(dut.idle.value) == str(int(inside == 0)), f"{inside} tiles are inside"
            if str(dut.bus__arvalid.value) == "1" and not waits:
                self.launched.append(cycle)
            waits = str(dut.bus__arvalid.value) == "1" and str(dut.bus__arready.value) == "0"
            came = str(dut.fetches__valid.value) == "1" and str(dut.fetches__ready.value) == "1"
            went = (
                str(dut.completions__valid.value) == "1"
                and str(dut.completions__ready.value) == "1"
            )
            if came:
                self.accepted.append(cycle)
            inside += came - went
            await RisingEdge(dut.clk)
            cycle += 1

    def fetch(self, address):
        """A request for a tile at ``address``, with random numbers otherwise."""
        config = self.config
        return {
            "tag": self.random.randrange(config.inflight),
            "demand": self.random.randrange(2),
            "slot": self.random.randrange(config.slots),
            "tile": self.random.randrange(config.tiles),
            "address": address,
        }

    def address(self):
        config = self.config
        return random_address(
            self.random,
            address_bits=config.address_bits,
            tile_bytes=config.tile_bytes,
            data_bytes=config.data_bytes,
        )

    def break_a_beat(self, address):
        """Let the memory answer an error for a random beat of the tile."""
        at, beats = self.random.choice(self.golden.bursts(address))
        beat = at + self.random.randrange(beats) * self.config.data_bytes
        self.failing.add(beat)
        response = self.random.choice((SLVERR, DECERR))
        self.memory.failing.append((beat, beat + self.config.data_bytes, response))

    async def check(self, fetches):
        """Wait for what ``fetches`` must bring and compare all of it with the golden model."""
        config, golden = self.config, self.golden
        bursts = [burst for f in fetches for burst in golden.bursts(f["address"])]
        first_burst = len(self.memory.transfers)
        first_write = len(self.writes.received)
        first_completion = len(self.completions.received)
        self.fetches.send(*fetches)
        completions = await self.completions.receive(len(fetches), limit=len(fetches) * 20_000)
        await cycles(self.dut, 3)
        transfers = self.memory.transfers[first_burst:]
        assert [(t.address, t.beats) for t in transfers] == bursts
        writes = self.writes.received[first_write:]
        arrival = self.writes.arrival[first_write:]
        assert len(writes) == len(fetches) * config.tile_beats
        at = 0
        for n, (fetch, completion) in enumerate(zip(fetches, completions, strict=True)):
            expected = golden.completion(fetch["address"], self.failing)
            assert completion == {
                "tag": fetch["tag"],
                "tile": fetch["tile"],
                "failed": int(expected.failed),
                "address": expected.address,
            }, f"tile {n}"
            data = b"".join(
                pattern(address, beats * config.data_bytes)
                for address, beats in golden.bursts(fetch["address"])
            )
            for beat in range(config.tile_beats):
                assert writes[at] == {
                    "slot": fetch["slot"],
                    "beat": fetch["tile"] * config.tile_beats + beat,
                    "data": list(data[beat * config.data_bytes : (beat + 1) * config.data_bytes]),
                }, f"tile {n}, beat {beat}"
                at += 1
            taken = self.completions.arrival[first_completion + n]
            assert taken > arrival[at - 1], f"tile {n} was complete before its last write"
        assert str(self.dut.idle.value) == "1"


STALLS = {
    "none": 0.0,
    "some": 0.3,
    "long": Stall(0.5, burst=(1, 40)),
}


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS), latency=[1, 30])
async def lockstep(dut, stall, latency):
    tb = TB(dut, stall=STALLS[stall], latency=latency)
    await reset(dut)
    count = max(4, 1200 // tb.config.tile_beats)
    fetches = [tb.fetch(tb.address()) for _ in range(count)]
    for fetch in fetches:
        if tb.random.random() < 0.4:
            # Several, so that the first failing burst is not always the only one.
            for _ in range(tb.random.choice((1, 4))):
                tb.break_a_beat(fetch["address"])
    await tb.check(fetches)


@cocotb.test()
async def address_wraps(dut):
    """A tile at the end of the address space goes on at its start."""
    tb = TB(dut, stall=0.2)
    await reset(dut)
    config = tb.config
    await tb.check([tb.fetch((1 << config.address_bits) - config.tile_bytes // 2)])


@cocotb.test()
@cocotb.parametrize(kind=["early", "missing"])
async def rlast_in_the_wrong_place(dut, kind):
    """A burst with a wrong ``rlast`` fails its tile and no other."""
    broken = set()

    def fault(address, beat, beats):
        last = beat == beats - 1
        if address in broken:
            last = False if kind == "missing" else beat in (beats // 2, beats - 1)
            if kind == "early" and beats == 1:
                last = False
        return 0, last

    tb = TB(dut, stall=0.2, fault=fault)
    await reset(dut)
    fetches = [tb.fetch(tb.address()) for _ in range(12)]
    for fetch in fetches[1::3]:
        address, beats = tb.random.choice(tb.golden.bursts(fetch["address"]))
        if kind == "missing" or beats > 2:
            broken.add(address)
            tb.failing.add(address)
    await tb.check(fetches)


@cocotb.test()
async def launch_latency(dut):
    """From a fetch being accepted to ``arvalid``."""
    tb = TB(dut)
    await reset(dut)
    await cycles(dut, 5)
    await tb.check([tb.fetch(0)])
    latency = tb.launched[0] - tb.accepted[0]
    dut._log.info("launch latency: %d cycles", latency)
    assert latency == DMA.launch_latency <= 4


@cocotb.test()
async def no_bubbles(dut):
    """Data flows without a gap from tile to tile if the credits cover the memory's latency."""
    tb = TB(dut, latency=2)
    await reset(dut)
    config = tb.config
    start = 4096 - config.data_bytes * 3
    count = max(6, 600 // config.tile_beats)
    await tb.check([tb.fetch(start + n * config.tile_bytes) for n in range(count)])
    beats = tb.memory.beat_cycles
    gaps = [b - a - 1 for a, b in zip(beats, beats[1:], strict=False) if b != a + 1]
    shortest = min(t.beats for t in tb.memory.transfers)
    covered = config.outstanding_bursts * min(config.burst_beats, config.tile_beats)
    dut._log.info("gaps: %s, shortest burst %d beats", gaps, shortest)
    # An address is on its way for 4 cycles: credit back, address register, the memory's latency.
    if covered >= 16 and config.outstanding_bursts >= 4:
        assert not gaps


@cocotb.test()
@cocotb.parametrize(latency=[8, 32, 64, 128])
async def utilisation(dut, latency):
    """Share of cycles with a beat, against what the credits allow."""
    tb = TB(dut, latency=latency)
    await reset(dut)
    config = tb.config
    count = max(12, (2000 if config.outstanding_bursts > 1 else 400) // config.tile_beats)
    await tb.check([tb.fetch(n * config.tile_bytes) for n in range(count)])
    beats = tb.memory.beat_cycles
    share = len(beats) / (beats[-1] - beats[0] + 1)
    burst = tb.memory.transfers[0].beats
    # A burst's credit comes back with its last beat; the next address is out three cycles later.
    bound = min(1.0, config.outstanding_bursts * burst / (latency + burst + 3))
    dut._log.info(
        "utilisation: %d B tiles, %d B beats, %d-beat bursts, latency %d: %.3f of %.3f",
        config.tile_bytes,
        config.data_bytes,
        burst,
        latency,
        share,
        bound,
    )
    assert share >= 0.97 * bound


@cocotb.test()
async def bandwidth_of_the_memory(dut):
    """A slow memory is kept busy all the time."""
    config = parameters()["config"]
    tb = TB(dut, latency=8, bytes_per_cycle=config.data_bytes / 4)
    await reset(dut)
    await tb.check([tb.fetch(n * config.tile_bytes) for n in range(4)])
    beats = tb.memory.beat_cycles
    assert beats[-1] - beats[0] >= (len(beats) - 1) * 4
    if config.outstanding_bursts > 1:
        # With one credit the memory's latency shows after each burst.
        assert beats[-1] - beats[0] <= (len(beats) - 1) * 4.2 + 4


@cocotb.test()
async def completions_wait(dut):
    """Tiles that nobody collects stop the engine without harm; then all come, in order."""
    tb = TB(dut)
    await reset(dut)
    tb.completions.paused = True
    tiles = tb.config.outstanding_bursts + 4
    count = tiles + 6
    fetches = [tb.fetch(tb.address()) for _ in range(count)]
    task = cocotb.start_soon(tb.check(fetches))
    await cycles(dut, count * (tb.config.tile_beats + 20) * 2)
    assert len(tb.accepted) == tiles
    tb.completions.paused = False
    await task


@cocotb.test()
async def reset_in_flight(dut):
    """After a reset at any moment nothing of before comes out."""
    tb = TB(dut, stall=0.2, latency=6)
    await reset(dut)
    for _ in range(12):
        for _ in range(6):
            fetch = tb.fetch(tb.address())
            if tb.random.random() < 0.3:
                tb.break_a_beat(fetch["address"])
            tb.fetches.send(fetch)
        await cycles(dut, tb.random.randrange(1, 150))
        await reset(dut, drivers=[tb.fetches, tb.writes, tb.completions])
        assert str(dut.writes__valid.value) in "0"
        await tb.check([tb.fetch(tb.address()) for _ in range(2)])
