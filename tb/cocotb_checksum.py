"""Checksums of experts (the half that runs in the simulator).

::

    beats of all channels in turns ─▶ tap ┌───────────┐
    completions ────────────────────────▶ │ Checksums │ ─▶ completions, failed where zlib says so
    start, table ───────────────────────▶ └───────────┘
"""

import random
import zlib
from collections import Counter, deque

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract.records import FetchReason
from prestage_hw.dma.checksum import Checksums, TapLayout
from prestage_hw.layouts import RecordLayout
from prestage_sim.model.dma.checksum import Checksums as Golden
from prestage_tb.bench import (
    Signals,
    Stall,
    StreamSink,
    StreamSource,
    cycles,
    parameters,
    reset,
    start_clock,
)
from prestage_tb.coverage import hit

# Completions that may wait for their turn in the DMA engine.
_PENDING = 16


class Fetch:
    """An expert in flight."""

    def __init__(self, number, data, address):
        self.number = number
        self.data = data
        self.address = address
        self.good = 0  # Tiles that have come whole.


class TB:
    """Clock, reset, streams, and what must come out."""

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.ports = Signals(dut)
        self.config = config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        record = RecordLayout("Completion", config=config)
        self.ended = StreamSource(dut, "ended", record, stall=stall)
        self.completions = StreamSink(dut, "completions", record, stall=stall)
        self.requests = StreamSource(
            dut, "requests", RecordLayout("TableRequest", config=config), stall=stall
        )
        self.values = StreamSink(dut, "values", 32, stall=stall)
        self.layout = dict(TapLayout(config=config))
        for name in ("tap", "start", "clear"):
            getattr(dut, name).value = 0
        self.experts = config.model.layers * config.model.experts
        self.forget()

    def forget(self):
        self.golden = Golden(self.config)
        self.expected = []
        self.sent = 0

    async def reset(self):
        await reset(self.dut, drivers=[self.ended, self.completions, self.requests, self.values])
        self.forget()
        await self.cleared()

    async def cleared(self):
        """Wait for the table to be cleared: a row a cycle."""
        for _ in range(self.experts + 4):
            await RisingEdge(self.dut.clk)
        assert self.ports.high("idle")

    def tap(self, **fields):
        """Value of the tap for the next cycle."""
        self.dut.tap.value = sum(
            int(value) << self.layout[name].offset for name, value in fields.items()
        )

    def load(self, number, value):
        """Load a checksum."""
        self.golden.write(number, value)
        self.requests.send({"write": 1, "table": 255, "word": number, "value": value})

    async def start(self, tag, fetch):
        dut = self.dut
        dut.start.value = 1
        dut.start_tag.value = tag
        dut.start_number.value = fetch.number
        dut.start_address.value = fetch.address
        if self.config.layer_bytes:
            dut.start_last_tile.value = self.tiles(fetch) - 1
        await RisingEdge(dut.clk)
        dut.start.value = 0

    def end(self, tag, fetch, tile, channel, reason):
        """A tile's completion, and what must become of it."""
        config = self.config
        completion = {
            "tag": tag,
            "tile": tile,
            "failed": int(reason != FetchReason.OK),
            "address": self.random.getrandbits(config.address_bits),
            "channel": channel,
            "reason": int(reason),
        }
        self.ended.send(completion)
        self.sent += 1
        if reason == FetchReason.OK:
            fetch.good += 1
            layer, expert = divmod(fetch.number, config.model.experts)
            if fetch.good == self.tiles(fetch) and not self.golden.good(layer, expert, fetch.data):
                completion = {
                    **completion,
                    "failed": 1,
                    "reason": int(FetchReason.CRC),
                    "address": fetch.address,
                }
        self.expected.append(completion)

    async def move(self, fetches, *, channels=None, gaps=0.0, failing=0.0):
        """Let all beats of these fetches (by tag) pass, channels in turns."""
        config, r = self.config, self.random
        size, beats = config.data_bytes, config.tile_beats
        channels = config.dma_channels if channels is None else channels
        queues = [deque() for _ in range(channels)]
        for tag, fetch in fetches.items():
            await self.start(tag, fetch)
            for tile in range(self.tiles(fetch)):
                queues[r.randrange(channels)].append((tag, fetch, tile))
        if channels > 1:
            for queue in queues:
                r.shuffle(queue)
        at = [0] * channels
        while any(queues):
            if (gaps and r.random() < gaps) or self.sent - len(
                self.completions.received
            ) > _PENDING:
                self.tap()
                await RisingEdge(self.dut.clk)
                continue
            channel = r.choice([c for c in range(channels) if queues[c]])
            tag, fetch, tile = queues[channel][0]
            start = tile * config.tile_bytes + at[channel] * size
            word = int.from_bytes(fetch.data[start : start + size], "little")
            at[channel] += 1
            last = at[channel] == beats
            reason = FetchReason.OK
            if failing and r.random() < failing / beats:
                # It may end at any beat then.
                reason, last = r.choice((FetchReason.BUS, FetchReason.TIMEOUT)), True
            together = not last or r.random() < 0.7
            self.tap(beat=1, final=last and together, channel=channel, data=word)
            await RisingEdge(self.dut.clk)
            if last and not together:
                # The end may come after the beat.
                for _ in range(r.randrange(3)):
                    self.tap()
                    await RisingEdge(self.dut.clk)
                self.tap(final=1, channel=channel, data=r.getrandbits(8 * size))
                await RisingEdge(self.dut.clk)
            if last:
                at[channel] = 0
                queues[channel].popleft()
                self.end(tag, fetch, tile, channel, reason)
        self.tap()

    async def done(self):
        """Wait for all completions and compare them."""
        got = []
        while len(got) < len(self.expected):
            got += await self.completions.receive(1)
        assert got == self.expected
        self.expected.clear()
        await cycles(self.dut, 3)
        assert self.ports.high("idle")
        return Counter(FetchReason(record["reason"]) for record in got)

    def fetch(self, number=None):
        """A fetch of an expert with random bytes."""
        config, r = self.config, self.random
        number = r.randrange(self.experts) if number is None else number
        size = config.layer_sizes[number // config.model.experts]
        return Fetch(number, r.randbytes(size), r.getrandbits(config.address_bits))

    def tiles(self, fetch):
        """Tiles of the expert that a fetch is about."""
        return self.config.layer_tiles[fetch.number // self.config.model.experts]


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3, Stall(0.5, burst=(1, 40))])
async def experts(dut, stall):
    """Experts with a good, a wrong and no checksum, tiles in any order over all channels."""
    tb = TB(dut, stall=stall)
    config = tb.config
    await tb.reset()
    reasons = Counter()
    sizes = set()  # Tiles of experts that were told from others.
    rounds = max(3, 1500 // (config.expert_beats * config.inflight))
    for _ in range(rounds):
        numbers = tb.random.sample(range(tb.experts), min(config.inflight, tb.experts))
        fetches = {tag: tb.fetch(number) for tag, number in enumerate(numbers)}
        for fetch in fetches.values():
            kind = tb.random.random()
            if kind < 0.5:
                tb.load(fetch.number, zlib.crc32(fetch.data))
            elif kind < 0.75:
                tb.load(fetch.number, zlib.crc32(fetch.data) ^ 1 << tb.random.randrange(32))
                sizes.add(tb.tiles(fetch))
        await tb.requests.sent()
        await tb.move(fetches, gaps=0.2 if stall else 0.0, failing=0.2)
        reasons += await tb.done()
    assert reasons[FetchReason.CRC] and reasons[FetchReason.OK] and reasons[FetchReason.BUS]
    hit("checksum.experts")
    if config.dma_channels > 1 and config.tiles > 1:
        # Beats of channels, and tiles of experts, in any order then.
        hit("checksum.order")
    if sizes == {1, 2, 3}:
        hit("checksum.sizes")


@cocotb.test()
async def every_bit(dut):
    """One wrong bit anywhere in an expert is found."""
    tb = TB(dut)
    config = tb.config
    await tb.reset()
    good = tb.fetch(1)
    tb.load(1, zlib.crc32(good.data))
    await tb.requests.sent()
    bits = range(8 * len(good.data))
    if len(bits) * config.expert_beats > 140_000:
        # A small expert of another shape has them all.
        bits = tb.random.sample(bits, 40_000 // config.expert_beats)
    batch = []
    for n, bit in enumerate(bits):
        data = bytearray(good.data)
        data[bit // 8] ^= 1 << bit % 8
        batch.append(Fetch(1, bytes(data), good.address))
        if len(batch) == config.inflight or n == len(bits) - 1:
            await tb.move(dict(enumerate(batch)), channels=1)
            reasons = await tb.done()
            assert reasons[FetchReason.CRC] == len(batch)
            batch.clear()
    await tb.move({0: Fetch(1, good.data, good.address)}, channels=1)
    assert FetchReason.CRC not in await tb.done()
    if len(bits) == 8 * len(good.data):
        hit("checksum.every_bit")


@cocotb.test()
async def table(dut):
    """What is loaded reads back; a clear and a reset unload it."""
    tb = TB(dut, stall=0.2)
    r = tb.random
    await tb.reset()

    async def compare():
        words = [*range(tb.experts), tb.experts, 0xFFFFFF]
        for word in words:
            tb.requests.send({"write": 0, "table": 255, "word": word, "value": r.getrandbits(32)})
        assert await tb.values.receive(len(words)) == [tb.golden.read(word) for word in words]

    for _ in range(3):
        for number in r.sample(range(tb.experts), tb.experts // 2):
            tb.load(number, r.choice((0, 0xFFFFFFFF, r.getrandbits(32))))
        # Beyond the end nothing is written.
        tb.requests.send({"write": 1, "table": 255, "word": tb.experts, "value": 1})
        await tb.requests.sent()
        await compare()
    hit("checksum.table")
    fetch = tb.fetch(2)
    tb.load(2, zlib.crc32(fetch.data) ^ 1)
    await tb.requests.sent()
    await tb.move({0: fetch})
    assert (await tb.done())[FetchReason.CRC] == 1
    await cycles(dut, 5)
    dut.clear.value = 1
    await RisingEdge(dut.clk)
    dut.clear.value = 0
    tb.golden.clear()
    await RisingEdge(dut.clk)
    assert str(dut.idle.value) == "0"
    await tb.cleared()
    await compare()
    await tb.move({0: Fetch(2, fetch.data, 0)})
    assert FetchReason.CRC not in await tb.done()
    hit("checksum.clear")


@cocotb.test()
async def timing(dut):
    """The stated latencies; tiles back to back are never held up by more than that."""
    tb = TB(dut)
    config = tb.config
    await tb.reset()

    async def watch():
        taken, told = [], []
        while True:
            await FallingEdge(dut.clk)
            watch.cycle += 1
            if str(dut.ended__valid.value) == "1" == str(dut.ended__ready.value):
                taken.append(watch.cycle)
            if str(dut.completions__valid.value) == "1":
                told.append(watch.cycle)
                watch.delays.append(told[-1] - taken[len(told) - 1])

    watch.cycle, watch.delays = 0, []
    cocotb.start_soon(watch())
    block = Checksums(config=config)
    fetches = {0: tb.fetch(), 1: tb.fetch()}
    await tb.move(fetches, channels=1)
    await tb.done()
    expected = [
        block.latency + 3 * (tile + 1 == tb.tiles(fetch))
        for fetch in fetches.values()
        for tile in range(tb.tiles(fetch))
    ]
    assert watch.delays == expected, (watch.delays, expected)
    watch.delays.clear()
    fetch = tb.fetch()
    await tb.start(0, fetch)
    tb.tap(final=1, channel=0)
    await RisingEdge(dut.clk)
    tb.tap()
    await cycles(dut, 8)
    tb.end(0, fetch, 0, 0, FetchReason.ABORTED)
    await tb.done()
    assert watch.delays == [Checksums.fail_latency]
    # At full rate completions pile up only by the last tile's extra cycles.
    if config.tile_beats >= 8:
        before = len(tb.completions.received)
        start = watch.cycle
        fetches = {tag: tb.fetch() for tag in range(config.inflight)}
        await tb.move(fetches, channels=1)
        count = sum(tb.tiles(fetch) for fetch in fetches.values())
        while len(tb.completions.received) < before + count:
            await RisingEdge(dut.clk)
        took = watch.cycle - start
        assert took <= count * max(config.tile_beats * 1.5 + 3, block.latency + 3) + 60
        await tb.done()
        hit("checksum.timing")


@cocotb.test()
async def reset_in_flight(dut):
    """After a reset at any moment nothing of before counts."""
    tb = TB(dut, stall=0.2)
    for _ in range(6):
        await tb.reset()
        fetches = {tag: tb.fetch(tag) for tag in range(3)}
        for fetch in fetches.values():
            tb.load(fetch.number, zlib.crc32(fetch.data) ^ tb.random.randrange(2))
        await tb.requests.sent()
        await tb.move(fetches)
        await tb.done()
        # Left in the middle.
        task = cocotb.start_soon(tb.move({tag: tb.fetch() for tag in range(3)}))
        await cycles(dut, tb.random.randrange(1, 3 * tb.config.expert_beats))
        task.cancel()
        tb.tap()
        dut.start.value = 0
    hit("checksum.reset")
