"""DMA engine in lockstep with its golden model (the half that runs in the simulator).

::

    fetches ─▶ DMA ─▶ writes          every event, in its cycle ─▶ golden Engine
                │  ─▶ completions
               bus ─▶ AXIMemory

With slots in a memory of their own there is slot_bus ─▶ AXIWriteMemory in place of writes.
"""

import random
from collections import Counter, deque

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract.records import FetchReason, SettingsRefusal, TrafficClass
from prestage_hw.dma import DMA
from prestage_hw.dma.dma import ChannelStrobes
from prestage_hw.dma.settings import Settings
from prestage_hw.dma.writer import SlotWriter
from prestage_hw.layouts import RecordLayout
from prestage_sim.model.dma import DMA as GoldenDMA
from prestage_sim.model.dma import Engine
from prestage_sim.model.dma.watchdog import bounds
from prestage_tb.axi import (
    DECERR,
    SLVERR,
    AXIMemory,
    AXIWriteMemory,
    pattern,
    random_address,
)
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

# Cycles from a strobe to the first new ``arvalid`` that it has an effect on.
_COMMITTED = Settings.latency + 2
_ABORTED = 4

# What each bit of a channel's strobes counts, the lowest first.
_STROBES = [name for name, _ in ChannelStrobes()]

# Those that are compared with what completed and was written.
_COUNTED = ("tiles", "beats", "errors", "aborted")


class TB:
    """Clock, reset, streams, memory, and the model that follows every cycle."""

    def __init__(
        self,
        dut,
        *,
        stall=0.0,
        memory_stall=None,
        fault=None,
        latency=4,
        bytes_per_cycle=None,
        reorder=0.0,
    ):
        self.dut = dut
        self.ports = Signals(dut)
        self.config = config = parameters()["config"]
        self.golden = GoldenDMA(config)
        self.random = random.Random(cocotb.RANDOM_SEED)
        self.channels = range(config.dma_channels)
        start_clock(dut)
        if memory_stall is None:
            memory_stall = stall
        self.fetches = StreamSource(
            dut, "fetches", RecordLayout("FetchRequest", config=config), stall=stall
        )
        self.writes = self.slots = None
        if config.slot_store == "internal":
            self.writes = StreamSink(
                dut, "writes", RecordLayout("BufferWrite", config=config), stall=stall
            )
        else:
            self.slots = AXIWriteMemory(
                dut,
                "slot_bus",
                data_bytes=config.data_bytes,
                latency=self.random.choice((1, 3, 20)) if stall else 8,
                address_stall=stall,
                data_stall=stall,
                answer_stall=stall,
                # With one that wants the data first no rate is promised.
                data_first=bool(stall) and self.random.random() < 0.5,
                outstanding=SlotWriter.outstanding,
                burst_beats=16,
            )
            self.slot_base = self.random.randrange(16) * 4096
            dut.slot_base.value = self.slot_base
        self.completions = StreamSink(
            dut, "completions", RecordLayout("Completion", config=config), stall=stall
        )
        self.settings = StreamSource(
            dut, "settings", RecordLayout("ChannelSettings", config=config), stall=stall
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
            reorder=reorder,
        )
        for name in (
            *("commit", "abort", "abort_all", "abort_tag", "timeout", "lower_credits"),
            "urgent",
        ):
            getattr(dut, name).value = 0
        self.check_rows = True  # Settings of rows hold for all that is inside.
        self.cycle = 0
        self.forget()
        cocotb.start_soon(self._watch())

    def forget(self):
        """Begin anew, after a reset."""
        self.engine = Engine(self.config)
        if self.slots is not None:
            self.engine.slot_base = self.slot_base
            self._answered = len(self.slots.transfers)
            self._stored = len(self.slots.beats)
        self.inside = 0
        self.accepted = []  # Cycle and request of each fetch.
        self.launched = []  # Cycle, channel, address and beats of each burst.
        self.completed = []  # Cycle, request and record of each completion.
        self.expected = deque()  # Writes to come.
        self.written = Counter()  # Beats by request.
        self.counts = Counter()
        self.strobes = Counter()
        self.refusals = []
        self.strays = 0
        self._effects = []
        self._offered = None
        self._expired = 0
        self._told = 0
        self._relaxed_until = 0
        self.begun = []  # Requests of which a burst was asked for.
        self.responses = set()  # Errors that came with beats of tiles.
        self.aborts = {"tag": [], "all": []}  # Requests that were aborted.
        self.most_lower = 0  # Bursts below demand that were outstanding at once.

    async def _watch(self):
        dut = self.dut
        await RisingEdge(dut.clk)
        while True:
            await FallingEdge(dut.clk)
            if self.ports.bits("rst") != "0":
                self.forget()
            else:
                self._follow()
            await RisingEdge(dut.clk)
            self.cycle += 1

    def _follow(self):
        """Tell the model what happens in this cycle, and compare."""
        engine, config = self.engine, self.config
        assert self.ports.high("idle") == (self.inside == 0), f"{self.inside} tiles are inside"
        for effect in [e for e in self._effects if e[0] <= self.cycle]:
            self._effects.remove(effect)
            effect[1]()
        expired = self.ports.number("expired")
        for channel in self.channels:
            if (self._expired & ~expired) >> channel & 1:
                self._expire(channel)
        self._told &= expired
        self._expired = expired
        # Bursts, as soon as they are offered.
        if self.ports.high("bus__arvalid"):
            if self._offered is None:
                burst = tuple(self.ports.number(f"bus__{m}") for m in ("arid", "araddr", "arlen"))
                channel = engine.issue(burst[0], burst[1], burst[2] + 1)
                self.launched.append((self.cycle, channel, burst[1], burst[2] + 1))
                self.begun.append(engine.bursts[burst[0]][-1].tile.transfer)
                self._check_credits(channel)
            self._offered = None if self.ports.high("bus__arready") else True
        # Beats, as soon as they are taken.
        if self.ports.high("bus__rvalid") and self.ports.high("bus__rready"):
            write = engine.beat(
                self.ports.number("bus__rid"),
                error=self.ports.number("bus__rresp") >= 2,
                last=self.ports.high("bus__rlast"),
            )
            if write is not None:
                self.responses.add(self.ports.number("bus__rresp"))
                self.expected.append(write)
                if self.slots is not None:
                    self.written[id(write.transfer)] += 1
                    self.counts["beats", write.transfer.channel] += 1
        if self.slots is not None:
            self._follow_slots()
        elif self.ports.moves("writes"):
            got = self.writes.payload_now()
            assert self.expected, f"no beat may be written, but {got} was"
            write = self.expected.popleft()
            assert got == {
                "slot": write.slot,
                "beat": write.beat % (1 << config.bits("beat")),
                "data": list(pattern(write.address, config.data_bytes)),
            }
            self.written[id(write.transfer)] += 1
            self.counts["beats", write.transfer.channel] += 1
        if self.ports.moves("completions"):
            record = self.completions.payload_now()
            if record["reason"] == FetchReason.TIMEOUT and expired >> record["channel"] & 1:
                self._expire(record["channel"])
            transfer = engine.complete(record)
            if record["reason"] in (FetchReason.OK, FetchReason.BUS):
                taken = self.written[id(transfer)] if self.slots is None else transfer.written
                assert taken == transfer.beats or transfer.null or transfer.aborted, (
                    f"{record} came after {taken} of {transfer.beats} beats"
                )
            name = {FetchReason.OK: "tiles", FetchReason.ABORTED: "aborted"}
            self.counts[name.get(record["reason"], "errors"), transfer.channel] += 1
            self.completed.append((self.cycle, transfer, record))
            self.inside -= 1
        if self.ports.moves("fetches"):
            request = self.fetches.payload_now()
            self.accepted.append((self.cycle, engine.accept(request)))
            self.inside += 1
        if self.ports.moves("settings"):
            self.refusals.append(engine.settings.write(self.settings.payload_now()))
        if self.ports.high("commit"):
            shadow, lower = list(engine.settings.shadow), self.ports.number("lower_credits")

            def commit():
                engine.settings.active = shadow
                engine.settings.lower_credits = lower or config.lower_credits
                self._relaxed_until = self.cycle + 4

            self._effect(_COMMITTED, commit)
        if self.ports.high("abort") or self.ports.high("abort_all"):
            tag = None if self.ports.high("abort_all") else self.ports.number("abort_tag")
            meant = engine.requests(tag)
            self.aborts["all" if tag is None else "tag"] += meant
            self._effect(_ABORTED, lambda: engine.abort(meant))
        self.strays += self.ports.high("stray")
        strobes = self.ports.number("strobes")
        for at in range(strobes.bit_length()):
            channel, field = divmod(at, len(_STROBES))
            self.strobes[_STROBES[field], channel] += strobes >> at & 1

    def _follow_slots(self):
        """Tell the model which writes were answered, and keep what they wrote."""
        slots = self.slots
        for transfer in slots.transfers[self._answered :]:
            self._answered += 1
            last = transfer.address + transfer.beats * self.config.data_bytes
            error = any(first < last and transfer.address < end for first, end, _ in slots.failing)
            self.engine.answer(transfer.address, transfer.beats, error=error)

    def check_slots(self):
        """Everything that the model let be written was, once, and nothing else."""
        config = self.config
        expected = Counter(
            (
                self.slot_base + write.slot * config.expert_bytes + write.beat * config.data_bytes,
                int.from_bytes(pattern(write.address, config.data_bytes), "little"),
            )
            for write in self.expected
        )
        assert Counter(self.slots.beats[self._stored :]) == expected
        assert not self.engine.unclaimed and not self.slots.waiting

    def _effect(self, delay, action):
        self._effects.append((self.cycle + delay, action))

    def _expire(self, channel):
        """Tell the model once, at the latest when the channel is over it."""
        if not self._told >> channel & 1:
            self._told |= 1 << channel
            self.engine.expire(channel)

    def _check_credits(self, channel):
        """A burst that is new must have had a credit."""
        if self.cycle < self._relaxed_until:
            return
        settings = self.engine.settings
        held = Counter(
            burst.tile.transfer.channel
            for bursts in self.engine.bursts
            for burst in bursts
            if not burst.dead
        )
        assert held[channel] <= settings.active[channel].credits
        if settings.active[channel].traffic != TrafficClass.DEMAND:
            lower = sum(
                count
                for c, count in held.items()
                if settings.active[c].traffic != TrafficClass.DEMAND
            )
            assert lower <= settings.lower_credits, f"{lower} bursts are below demand"
            self.most_lower = max(self.most_lower, lower)

    # --- what to do ---

    def fetch(self, address, *, channel=0, size=None, tag=None):
        """A request for a tile at ``address``, with random numbers otherwise."""
        config = self.config
        return {
            "tag": self.random.randrange(config.inflight) if tag is None else tag,
            "demand": self.random.randrange(2),
            "slot": self.random.randrange(config.slots),
            "tile": self.random.randrange(config.tiles),
            "address": address,
            "channel": channel,
            "sized": int(size is not None),
            "bytes": self.random.randrange(config.tile_bytes) if size is None else size,
        }

    def address(self):
        config = self.config
        address = random_address(
            self.random,
            address_bits=config.address_bits,
            tile_bytes=config.tile_bytes,
            data_bytes=config.data_bytes,
        )
        return address // config.data_bytes * config.data_bytes

    def spread(self, address, channel):
        """An address in the channel's own part of memory.

        Channels may share an ID, so that only the address tells whose burst it is.
        """
        config = self.config
        part = 1 << (config.address_bits - (config.dma_channels - 1).bit_length())
        return min(address % part, part - config.tile_bytes) + channel * part

    def size(self):
        """None for a whole tile, or a number of bytes."""
        config = self.config
        if self.random.random() < 0.6:
            return None
        beats = self.random.choice((0, 1, 2, 3, self.random.randrange(config.tile_beats + 1)))
        return beats * config.data_bytes

    def any_fetch(self, **keywords):
        """A request of any kind: of each fault sometimes."""
        config, r = self.config, self.random
        channel = r.choice(self.channels)
        fetch = self.fetch(
            self.spread(self.address(), channel), channel=channel, size=self.size(), **keywords
        )
        fault = r.random()
        if fault < 0.03:
            fetch["address"] += r.randrange(1, config.data_bytes)
        elif fault < 0.06:
            fetch.update(sized=1, bytes=r.randrange(config.tile_bytes) | 1)
        elif fault < 0.09:
            fetch["address"] = (
                (1 << config.address_bits)
                - r.randrange(config.tile_beats) * config.data_bytes
                - config.data_bytes
            )
        return fetch

    def break_a_beat(self, fetch):
        """Let the memory answer an error for a random beat of the tile."""
        bursts = self.golden.bursts(fetch["address"], tile=fetch["tile"])
        if not bursts:
            return
        at, beats = self.random.choice(bursts)
        beat = at + self.random.randrange(beats) * self.config.data_bytes
        response = self.random.choice((SLVERR, DECERR))
        self.memory.failing.append((beat, beat + self.config.data_bytes, response))

    async def done(self, count=None, *, limit=None):
        """Wait until everything that was sent is complete; check that all of it has come."""
        count = count or 1
        limit = limit or 2000 + count * 5000
        while self.fetches.pending or self.inside:
            await RisingEdge(self.dut.clk)
            limit -= 1
            assert limit, f"{self.inside} tiles are still inside"
        await cycles(self.dut, 8)
        assert not self.engine.inside
        if self.slots is not None:
            self.check_slots()
        else:
            assert not self.expected
            assert str(self.dut.writes__valid.value) == "0"
        for name in _COUNTED:
            for channel in self.channels:
                assert self.strobes[name, channel] == self.counts[name, channel], (name, channel)
        hit("dma.counters", *{name for name, _ in self.counts}, of=_COUNTED)

    async def run(self, fetches):
        """Send requests and wait for them; gives the records of their completions."""
        first = len(self.completed)
        self.fetches.send(*fetches)
        await self.done(len(fetches))
        return [record for _, _, record in self.completed[first:]]

    async def pulse(self, name, **values):
        """Set an input for one cycle."""
        for key, value in values.items():
            getattr(self.dut, key).value = value
        getattr(self.dut, name).value = 1
        await RisingEdge(self.dut.clk)
        getattr(self.dut, name).value = 0

    def channel_settings(self, channel, **changes):
        """Settings of a channel as after reset, but for what is given."""
        config = self.config
        traffic = TrafficClass.PREFETCH
        if channel == 0:
            traffic = TrafficClass.DEMAND
        elif channel == config.dma_channels - 1 >= 2:
            traffic = TrafficClass.STREAM
        return {
            "channel": channel,
            "enable": 1,
            "traffic": traffic,
            "weight": 1,
            "burst_beats": config.longest_burst,
            "credits": config.outstanding_bursts,
            "row_bytes": 0,
            "row_stride": 0,
            **changes,
        }

    async def configure(self, *settings, lower_credits=0):
        """Write settings and commit them."""
        self.settings.send(*settings)
        await self.settings.sent()
        await self.pulse("commit", lower_credits=lower_credits)
        await cycles(self.dut, 6)


STALLS = {
    "none": 0.0,
    "some": 0.3,
    "long": Stall(0.5, burst=(1, 40)),
}


def interleaved(tb):
    """Whether beats of one burst came between those of another."""
    spans = sorted((t.start, t.end) for t in tb.memory.transfers)
    return any(b[0] < a[1] for a, b in zip(spans, spans[1:], strict=False))


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS), reorder=[0.0, 0.1, 0.6])
async def lockstep(dut, stall, reorder):
    tb = TB(dut, stall=STALLS[stall], latency=30 if reorder == 0.1 else 3, reorder=reorder)
    await reset(dut)
    count = max(20, 1600 // tb.config.tile_beats)
    fetches = [tb.any_fetch() for _ in range(count)]
    for fetch in fetches:
        if tb.random.random() < 0.2:
            # Several, so that the first failing burst is not always the only one.
            for _ in range(tb.random.choice((1, 4))):
                tb.break_a_beat(fetch)
    records = await tb.run(fetches)
    hit("dma.lockstep", stall, of=STALLS)
    if any(
        t.address // 4096 != (t.address + t.beats * tb.config.data_bytes - 1) // 4096
        for _, t in tb.accepted
        if not t.refused
    ):
        hit("dma.edges")
    reasons = Counter(record["reason"] for record in records)
    if reasons[FetchReason.BUS]:
        for code, name in ((SLVERR, "dma.slverr"), (DECERR, "dma.decerr")):
            if code in tb.responses:
                hit(name)
    order = [t.identifier for t in sorted(tb.memory.transfers, key=lambda t: t.start)]
    if reorder and order != [t.identifier for t in tb.memory.transfers]:
        hit("dma.out_of_order")
    if interleaved(tb):
        assert reorder
        hit("dma.interleaved")
    if any(0 < t.beats < tb.config.tile_beats for _, t in tb.accepted if not t.null):
        hit("dma.short")


@cocotb.test()
async def refused(dut):
    """What can't be moved is answered in its turn, with its address and without a burst."""
    tb = TB(dut, stall=0.2)
    await reset(dut)
    config = tb.config
    top = 1 << config.address_bits
    beat = config.data_bytes
    cases = [
        ("dma.unaligned_address", tb.fetch(0x1000 + beat - 1), FetchReason.ADDRESS),
        ("dma.unaligned_size", tb.fetch(0x1000, size=beat + 1), FetchReason.ADDRESS),
        ("dma.address_wrap", tb.fetch(top - config.tile_bytes + beat), FetchReason.ADDRESS),
        ("dma.top_of_space", tb.fetch(top - config.tile_bytes), FetchReason.OK),
        ("dma.top_of_space", tb.fetch(top - beat, size=beat), FetchReason.OK),
        ("dma.zero_length", tb.fetch(0x1000, size=0), FetchReason.OK),
        ("dma.zero_length", tb.fetch(top - beat, size=0), FetchReason.OK),
    ]
    limit = (1 << config.bits("tile_bytes")) - beat
    if limit > config.tile_bytes:
        cases.append(("dma.too_long", tb.fetch(0, size=limit), FetchReason.ADDRESS))
        cases.append(
            ("dma.too_long", tb.fetch(0, size=config.tile_bytes + beat), FetchReason.ADDRESS)
        )
    for name, fetch, reason in cases:
        for channel in tb.channels:
            before = len(tb.launched)
            fetch = {**fetch, "channel": channel}
            (record,) = await tb.run([fetch])
            assert record["reason"] == reason, name
            assert record["address"] == fetch["address"]
            if reason != FetchReason.OK or fetch["sized"] and fetch["bytes"] == 0:
                assert len(tb.launched) == before
            hit(name)
    # In turn with others.
    fetches = [{**tb.random.choice(cases)[1], "channel": 0} for _ in range(20)]
    await tb.run([f for fetch in fetches for f in (fetch, tb.fetch(tb.address()))])


@cocotb.test()
@cocotb.parametrize(kind=["early", "missing"])
async def rlast_in_the_wrong_place(dut, kind):
    """A burst with a wrong ``rlast`` fails its tile and no other."""
    broken = set()

    def fault(address, beat, beats):
        last = beat == beats - 1
        if address in broken:
            last = False if kind == "missing" else beat in (beats // 2, beats - 1)
        return 0, last

    tb = TB(dut, stall=0.2, fault=fault, reorder=0.3)
    await reset(dut)
    channels = [tb.random.choice(tb.channels) for _ in range(16)]
    fetches = [tb.fetch(tb.spread(tb.address(), c), channel=c) for c in channels]
    for fetch in fetches[1::3]:
        address, beats = tb.random.choice(tb.golden.bursts(fetch["address"], tile=fetch["tile"]))
        if kind == "missing" or beats > 2:
            broken.add(address)
    records = await tb.run(fetches)
    failing = sum(record["reason"] == FetchReason.BUS for record in records)
    if broken:
        assert failing
        hit(f"dma.rlast_{kind}")


@cocotb.test()
async def stray_beats(dut):
    """Beats that nobody asked for are dropped."""
    tb = TB(dut, stall=0.2)
    await reset(dut)
    await cycles(dut, 2)
    for _ in range(5):
        for identifier in range(1 << tb.config.bits("axi_id")):
            tb.memory.send_stray(identifier, response=tb.random.choice((0, SLVERR)))
        await cycles(dut, 40)
        await tb.run([tb.fetch(tb.address())])
    assert tb.strays == 5 << tb.config.bits("axi_id")
    hit("dma.stray_beat")


@cocotb.test()
async def channels_overtake(dut):
    """A channel whose memory is silent holds no other one up."""
    tb = TB(dut)
    config = tb.config
    await reset(dut)
    if config.axi_ids < 2 or config.outstanding_bursts < 2:
        return
    await tb.configure(*(tb.channel_settings(c, traffic=0, credits=1) for c in tb.channels))
    tb.memory.silent.append((0, config.tile_bytes))
    slow = tb.fetch(0, channel=0, tag=1)
    fast = [tb.fetch(0x4000 + n * config.tile_bytes, channel=1, tag=2) for n in range(4)]
    tb.fetches.send(slow, *fast)
    for _ in range(config.tile_beats * 8 + 200):
        await RisingEdge(dut.clk)
    assert [record["tag"] for _, _, record in tb.completed] == [2] * 4
    tb.memory.silent.clear()
    await tb.done()
    hit("dma.channels_overtake")


def row_settings(tb, channel):
    """Random rows of a whole number of beats, not longer than a tile."""
    config, size = tb.config, tb.config.data_bytes
    beats = tb.random.choice((1, 2, 3, 5, 8, tb.random.randrange(1, config.tile_beats + 1)))
    return tb.channel_settings(
        channel,
        row_bytes=beats * size,
        row_stride=tb.random.randrange(1, min((1 << 24) // size, 4000)) * size,
    )


@cocotb.test()
@cocotb.parametrize(stall=["none", "some"])
async def rows(dut, stall):
    """Tiles that are gathered from rows, on some channels."""
    tb = TB(dut, stall=STALLS[stall], reorder=0.2)
    await reset(dut)
    config = tb.config
    seen = set()
    for _ in range(4):
        settings = [
            row_settings(tb, c) if tb.random.random() < 0.8 else tb.channel_settings(c)
            for c in tb.channels
        ]
        if not config.rows:
            await tb.configure(*settings)
        count = max(5, 400 // config.tile_beats)
        fetches = [tb.any_fetch() for _ in range(count)]
        for fetch in fetches:
            # Room for the rows, but for some.
            if tb.random.random() < 0.9:
                fetch["address"] %= 1 << (config.address_bits - 1)
        first = len(tb.completed)
        await tb.run(fetches)
        for _, transfer, record in () if config.rows else tb.completed[first:]:
            row = settings[transfer.channel]["row_bytes"] // config.data_bytes
            if row and record["reason"] == FetchReason.OK and transfer.beats > row:
                seen.add("broken" if transfer.beats % row else "whole")
    if not config.rows:
        hit("dma.rows", *seen, of=("whole", "broken"))
        return
    # Each tile of an expert over each channel, at its own address: the beats are the expert's.
    whole = [
        at
        for start, size in config.expert_spans(1, 3)
        for at in range(start, start + size, config.data_bytes)
    ]
    for channel in tb.channels:
        for tile, address in enumerate(config.tile_addresses(1, 3)):
            first = len(tb.launched)
            await tb.run([{**tb.fetch(address, channel=channel), "tile": tile}])
            beats = [
                at + n * config.data_bytes
                for _, _, at, count in tb.launched[first:]
                for n in range(count)
            ]
            assert beats == whole[tile * config.tile_beats :][: config.tile_beats], tile
    hit("dma.part_rows")


@cocotb.test()
async def rows_wrap(dut):
    """Rows that go past the top of the address space."""
    tb = TB(dut, stall=0.2)
    await reset(dut)
    config = tb.config
    size = config.data_bytes
    top = 1 << config.address_bits
    if config.rows:
        # The last tile of the third part has rows behind each other as below.
        tile = config.first_tiles[3] - 1
        rows = config.part_rows[2]
        for below in (1, 3):
            fetch = {**tb.fetch(top - config.tile_bytes - below * rows.row_stride), "tile": tile}
            first = len(tb.launched)
            (record,) = await tb.run([fetch])
            assert record["reason"] == FetchReason.ADDRESS
            assert record["address"] == fetch["address"]
            # The rows, and a beat of the last one again.
            assert [b[3] for b in tb.launched[first:]] == [rows.row_bytes // size] * below + [1]
        # A row that would begin below address 0 is none either.
        tile = config.first_tiles[1] - 1
        fetch = {**tb.fetch(0), "tile": tile}
        (record,) = await tb.run([fetch])
        assert record["reason"] == FetchReason.ADDRESS
        hit("dma.part_rows_wrap")
        return
    await tb.configure(tb.channel_settings(0, row_bytes=size * 2, row_stride=config.tile_bytes))
    for rows_below in range(1, 4):
        fetch = tb.fetch(top - (rows_below + 1) * config.tile_bytes)
        (record,) = await tb.run([fetch])
        assert record["reason"] == FetchReason.ADDRESS
        assert record["address"] == fetch["address"]
    hit("dma.rows_wrap")


@cocotb.test()
@cocotb.parametrize(stall=["none", "some", "long"])
async def aborts(dut, stall):
    """Tags, or all, are aborted at random moments under traffic."""
    tb = TB(dut, stall=STALLS[stall], latency=12, reorder=0.2)
    await reset(dut)
    config = tb.config
    # Aligned, so that a burst of one beat is always the one that ends an aborted tile.
    if config.longest_burst < 2:
        return
    rounds = 7
    for number in range(rounds):
        for _ in range(10):
            channel = tb.random.choice(tb.channels)
            address = tb.spread(tb.random.randrange(1 << config.address_bits) >> 13 << 13, channel)
            tb.fetches.send(tb.fetch(address, channel=channel))
        # The last round is left alone: whole tiles after aborted ones.
        for _ in range(3 if number < rounds - 1 else 0):
            await cycles(dut, tb.random.randrange(1, 120))
            if tb.random.random() < 0.7:
                await tb.pulse("abort", abort_tag=tb.random.randrange(config.inflight))
            else:
                await tb.pulse("abort_all")
        await tb.done(10)
    reasons = Counter(record["reason"] for _, _, record in tb.completed)
    assert reasons[FetchReason.ABORTED] and set(reasons) == {FetchReason.OK, FetchReason.ABORTED}
    begun = {id(t) for t in tb.begun}
    aborted = {id(t) for _, t, r in tb.completed if r["reason"] == FetchReason.ABORTED}
    by_tag, by_all = ({id(t) for t in tb.aborts[how]} for how in ("tag", "all"))
    for name, found in (("tag", by_tag - by_all), ("all", by_all - by_tag)):
        # Some with a burst, and some that waited.
        if found & aborted & begun and found & aborted - begun:
            hit(f"dma.abort_{name}")
    if aborted - begun:
        hit("dma.abort_queued")


@cocotb.test()
async def time_out(dut):
    """The memory is silent, then late; others go on, and the engine stays usable."""
    tb = TB(dut, latency=3)
    await reset(dut)
    config = tb.config
    # Longer than the memory takes for a tile of each channel.
    limit = 300 + 8 * config.tile_beats
    dut.timeout.value = limit
    least, most = bounds(limit)
    slack = 20
    silent = (0x8000, 0x8000 + 3 * config.tile_bytes)
    tb.memory.silent.append(silent)
    # Every tile of channel 0 that is begun fails after the time, then those that waited.
    count = 3
    start = tb.cycle
    tb.fetches.send(*(tb.fetch(0x8000 + n * config.tile_bytes) for n in range(count)))
    others = [c for c in tb.channels if c % config.axi_ids != 0]
    # Bursts that are never answered must not take all credits.
    alone = config.outstanding_bursts > count * -(-config.tile_beats // config.longest_burst)
    if others and alone:
        fetches = [tb.fetch(tb.spread(n << 14, c), channel=c) for n, c in enumerate(others * 3)][:6]
        tb.fetches.send(*fetches)
    await tb.done(limit=(most + slack) * (count + 1) + 20_000)
    failed = [c for c in tb.completed if c[2]["reason"] == FetchReason.TIMEOUT]
    assert [r["address"] for _, _, r in failed] == [
        0x8000 + n * config.tile_bytes for n in range(count)
    ]
    assert len(tb.completed) - len(failed) == (min(6, 3 * len(others)) if others and alone else 0)
    if others and alone:
        hit("dma.timeout_of_one")
    first = failed[0][0] - start
    assert least <= first <= most + slack + config.tile_beats * 8, first
    hit("dma.timeout")
    if {id(t) for _, t, _ in failed} - {id(t) for t in tb.begun}:
        hit("dma.timeout_of_queued")
    # Late beats go nowhere.
    before = sum(tb.written.values())
    assert tb.memory.waiting
    tb.memory.silent.clear()
    while tb.memory.waiting:
        await RisingEdge(dut.clk)
    await cycles(dut, 10)
    assert sum(tb.written.values()) == before
    hit("dma.late_beats")
    again = [tb.fetch(tb.spread(0x8000, c), channel=c) for c in tb.channels]
    records = await tb.run(again)
    assert all(record["reason"] == FetchReason.OK for record in records)
    hit("dma.retry_after_timeout")
    # Nothing expires while memory answers, however slow the buffer is.
    if tb.writes is None:
        return
    tb.writes.stall = Stall(0.8, burst=(limit, 2 * limit))
    await tb.run(again[:2])


@cocotb.test()
async def waits_for_its_turn(dut):
    """A tile that higher classes leave no turn is not late, for as long as memory answers them;
    an urgent channel gets its turn.
    """
    tb = TB(dut, latency=3)
    await reset(dut)
    config = tb.config
    burst_beats = min(config.longest_burst, max(1, config.tile_beats // 8))
    bursts = config.tile_beats // burst_beats
    if config.dma_channels < 2 or bursts < 4 or config.outstanding_bursts < 2:
        return
    low, high = config.dma_channels - 1, 0
    # So that the memory always has bursts of the demands to answer.
    await tb.configure(
        tb.channel_settings(high, traffic=TrafficClass.DEMAND, burst_beats=burst_beats),
        tb.channel_settings(low, traffic=TrafficClass.STREAM, burst_beats=burst_beats),
        lower_credits=1,
    )
    limit = 40 + 8 * config.tile_beats
    dut.timeout.value = limit
    _, most = bounds(limit)
    tb.fetches.send(tb.fetch(tb.spread(0x10000, low), channel=low))
    while not any(burst[1] == low for burst in tb.launched):
        await RisingEdge(dut.clk)
    number = 0

    async def saturate(until):
        nonlocal number
        for _ in range(20 * (most + config.tile_beats * bursts)):
            if until():
                return
            if tb.fetches.pending < 2:
                address = tb.spread(number % 8 * config.tile_bytes, high)
                tb.fetches.send(tb.fetch(address, channel=high))
                number += 1
            await RisingEdge(dut.clk)
        raise AssertionError("a channel has starved")

    def bursts_of(channel):
        return sum(burst[1] == channel for burst in tb.launched)

    await saturate(lambda: number > 2 * config.dma_queue_depth)
    begun, start = bursts_of(low), tb.cycle
    assert begun < bursts, "the tile has its last burst out"
    await saturate(lambda: tb.cycle - start > 2 * most)
    assert bursts_of(low) == begun, "a lower class was given a turn"
    assert not [c for c in tb.completed if c[2]["channel"] == low]
    hit("dma.waits_for_its_turn")
    # From now on somebody waits for it: the channels of the class take turns.
    dut.urgent.value = 1 << low
    await cycles(dut, 8)
    first = len(tb.launched)
    await saturate(lambda: any(c[2]["channel"] == low for c in tb.completed))
    served = [burst[1] for burst in tb.launched[first:]]
    last = max(at for at, channel in enumerate(served) if channel == low)
    assert served[: last + 1].count(low) == bursts - begun
    # With one burst below demand at a time, each waits for the one before to come.
    assert last + 1 <= (bursts - begun + 1) * (config.outstanding_bursts + 1)
    dut.urgent.value = 0
    await tb.done(number + 1)
    assert all(record["reason"] == FetchReason.OK for _, _, record in tb.completed)
    hit("dma.urgent")


@cocotb.test()
async def address_stuck(dut):
    """``arready`` stays low past the time-out."""
    tb = TB(dut, latency=3)
    await reset(dut)
    dut.timeout.value = 200 + 8 * tb.config.tile_beats
    tb.memory.address_paused = True
    records = await tb.run([tb.fetch(tb.spread(tb.address(), c), channel=c) for c in tb.channels])
    assert all(record["reason"] == FetchReason.TIMEOUT for record in records)
    assert str(dut.bus__arvalid.value) == "1"
    tb.memory.address_paused = False
    await cycles(dut, 2 * tb.config.tile_beats + 50)
    records = await tb.run([tb.fetch(tb.spread(tb.address(), c), channel=c) for c in tb.channels])
    assert all(record["reason"] == FetchReason.OK for record in records)
    hit("dma.address_stuck")


@cocotb.test()
async def settings_refused(dut):
    tb = TB(dut, stall=0.2)
    await reset(dut)
    config = tb.config
    size = config.data_bytes
    good = tb.channel_settings(0)
    cases = [
        (SettingsRefusal.TRAFFIC, {"traffic": 3}),
        (SettingsRefusal.WEIGHT, {"weight": 0}),
        (SettingsRefusal.BURST, {"burst_beats": 0}),
        (SettingsRefusal.BURST, {"burst_beats": config.longest_burst * 2 % 512 or 3}),
        (SettingsRefusal.BURST, {"burst_beats": 3}),
        (SettingsRefusal.CREDITS, {"credits": 0}),
        (SettingsRefusal.CREDITS, {"credits": config.outstanding_bursts + 1}),
        (SettingsRefusal.ROWS, {"row_bytes": size + 1}),
        (SettingsRefusal.ROWS, {"row_stride": size - 1}),
        (SettingsRefusal.ROWS, {"row_bytes": config.tile_bytes + size}),
        (SettingsRefusal.NONE, {"weight": 15}),
    ]
    if config.dma_channels < 1 << config.bits("channel"):
        cases.append((SettingsRefusal.CHANNEL, {"channel": config.dma_channels}))
    if config.rows:
        # They are told twice.
        cases.append((SettingsRefusal.ROWS, {"row_bytes": size}))
    for reason, change in cases:
        tb.settings.send({**good, **change})
        await tb.settings.sent()
        await cycles(dut, 1)
        await FallingEdge(dut.clk)
        assert tb.refusals[-1] == reason
        assert int(dut.refused.value) == (reason != SettingsRefusal.NONE), reason
        assert int(dut.refusal.value) == reason
        await FallingEdge(dut.clk)
        assert int(dut.refused.value) == 0
        assert int(dut.refusal.value) == reason
    await tb.pulse("commit")
    await tb.run([tb.any_fetch() for _ in range(10)])
    if config.rows:
        hit("dma.rows_told_twice")
    else:
        hit("dma.settings_refused", *(reason for reason, _ in cases), of=SettingsRefusal)


@cocotb.test()
@cocotb.parametrize(stall=["none", "some"])
async def reconfigured(dut, stall):
    """Settings change at random moments under traffic; nothing is lost."""
    tb = TB(dut, stall=STALLS[stall], latency=10, reorder=0.2)
    await reset(dut)
    config, r = tb.config, tb.random
    count = max(40, 2500 // config.tile_beats)
    tb.fetches.send(*(tb.any_fetch() for _ in range(count)))
    longest = config.longest_burst.bit_length()
    disabled = 0
    while tb.fetches.pending or tb.inside:
        for channel in r.sample(list(tb.channels), r.randint(1, config.dma_channels)):
            enable = r.random() < 0.8
            disabled += not enable
            tb.settings.send(
                tb.channel_settings(
                    channel,
                    enable=int(enable),
                    traffic=r.randrange(3),
                    weight=r.randrange(1, 16),
                    burst_beats=1 << r.randrange(longest),
                    credits=r.randint(1, config.outstanding_bursts),
                )
            )
            await cycles(dut, r.randrange(30))
        await tb.pulse("commit", lower_credits=r.randint(0, config.outstanding_bursts))
        await cycles(dut, r.randrange(1, 150))
        if disabled > 200:
            break
    await tb.configure(*(tb.channel_settings(c) for c in tb.channels))
    await tb.done(count)
    assert len(tb.completed) == count
    hit("dma.reconfigured")


@cocotb.test()
async def shadow_and_disabled(dut):
    tb = TB(dut, latency=10)
    await reset(dut)
    config = tb.config
    fetches = [tb.fetch(n * config.tile_bytes) for n in range(config.dma_queue_depth)]
    tb.settings.send(tb.channel_settings(0, enable=0))
    await tb.settings.sent()
    await tb.run(fetches)
    hit("dma.shadow")
    await tb.pulse("commit")
    await cycles(dut, 5)
    before = len(tb.launched)
    tb.fetches.send(*fetches)
    await cycles(dut, 200)
    assert len(tb.launched) == before and tb.inside == len(fetches)
    await tb.configure(tb.channel_settings(0, credits=1))
    # What is begun ends.
    while len(tb.launched) == before:
        await RisingEdge(dut.clk)
    await tb.configure(tb.channel_settings(0, enable=0))
    await cycles(dut, 100 + 3 * config.tile_beats)
    ended = 0 < tb.inside < len(fetches)
    assert ended or config.tile_beats < 64
    await tb.configure(tb.channel_settings(0))
    await tb.done(len(fetches))
    if ended:
        hit("dma.disabled")


@cocotb.test()
async def credits(dut):
    """The most bursts that a channel has outstanding are its credits; see ``_check_credits``."""
    tb = TB(dut, latency=60)
    await reset(dut)
    config = tb.config
    size = min(config.tile_beats, 24) * config.data_bytes
    for limit in {1, 2, config.outstanding_bursts}:
        if limit > config.outstanding_bursts:
            continue
        await tb.configure(tb.channel_settings(0, credits=limit, burst_beats=1))
        most = 0
        tb.fetches.send(*(tb.fetch(n * config.tile_bytes, size=size) for n in range(2)))
        while tb.fetches.pending or tb.inside:
            await RisingEdge(dut.clk)
            most = max(most, tb.engine.outstanding)
        assert most == limit
    hit("dma.credits")


@cocotb.test()
async def demand_first(dut):
    """A demand among saturating prefetches waits for a tile of lower class at most."""
    tb = TB(dut, latency=20)
    await reset(dut)
    config = tb.config
    if config.dma_channels < 2:
        return
    rounds = 6
    others = [c for c in tb.channels if c]
    size = config.data_bytes
    space = (1 << config.address_bits) // config.tile_bytes
    worst = 0
    for n in range(rounds):
        tb.fetches.send(
            *(
                tb.fetch(
                    (0x40 + n * 32 + i) % space * config.tile_bytes,
                    channel=others[i % len(others)],
                )
                for i in range(len(others) * config.dma_queue_depth)
            )
        )
        await cycles(dut, 60 + tb.random.randrange(60 + config.tile_beats))
        while tb.fetches.pending:
            await RisingEdge(dut.clk)
        tb.fetches.send(tb.fetch(n * config.tile_bytes, channel=0))
        seen = len(tb.accepted)
        while len(tb.accepted) == seen:
            await RisingEdge(dut.clk)
        accepted = tb.accepted[-1][0]
        await tb.done(20)
        first = next(b for b in tb.launched if b[0] > accepted and b[1] == 0)
        # Beats of lower class that came between, and so were before it at the memory.
        starts = {t.address: t for t in tb.memory.transfers}
        demand = starts[first[2]]
        offset = tb.cycle - tb.memory.cycle
        between = sum(accepted - offset < at <= demand.start for at in tb.memory.beat_cycles)
        worst = max(worst, between)
    dut._log.info("demand waits for %d of at most %d beats", worst, config.tile_beats)
    assert worst <= config.tile_beats + 1
    assert worst * size <= config.tile_bytes + size
    if worst:
        hit("dma.demand_first")
    # Of both classes below demand, at the settings after reset.
    if tb.most_lower == config.lower_credits and config.dma_channels > 2:
        hit("dma.lower_credits")


@cocotb.test()
async def classes_and_weights(dut):
    """Saturated channels: strict priority between classes, shares by weight within one."""
    tb = TB(dut, latency=2)
    await reset(dut)
    config = tb.config
    if config.dma_channels < 2 or config.tile_beats < 8 or config.longest_burst < 4:
        return
    weights = [1 + 2 * c for c in tb.channels]
    settings = [
        tb.channel_settings(c, traffic=1, weight=weights[c], burst_beats=4, enable=0)
        for c in tb.channels
    ]
    await tb.configure(*settings, lower_credits=config.outstanding_bursts)
    tb.fetches.send(
        *(
            tb.fetch((c * 64 + n) * config.tile_bytes, channel=c)
            for n in range(config.dma_queue_depth)
            for c in tb.channels
        )
    )
    await tb.fetches.sent()
    # Full queues begin at once.
    for setting in settings:
        setting["enable"] = 1
    first = len(tb.launched)
    await tb.configure(*settings, lower_credits=config.outstanding_bursts)
    await tb.done(len(tb.channels) * 4)
    shares = Counter(b[1] for b in tb.launched[first : first + 3 * sum(weights)])
    if min(config.outstanding_bursts, config.tile_beats * config.dma_queue_depth // 4) >= 8:
        for c in tb.channels:
            least = min(3 * weights[c], config.tile_beats * config.dma_queue_depth // 4)
            assert abs(shares[c] - least) <= 2 + least // 5, (shares, weights)
        hit("dma.weights")
    # All classes: a lower one gets nothing while a higher one has bursts to send.
    order = [c % 3 for c in tb.channels]
    settings = [tb.channel_settings(c, traffic=order[c], enable=0) for c in tb.channels]
    await tb.configure(*settings, lower_credits=config.outstanding_bursts)
    tb.fetches.send(
        *(
            tb.fetch((c * 64 + n) * config.tile_bytes, channel=c)
            for n in range(config.dma_queue_depth)
            for c in tb.channels
        )
    )
    await tb.fetches.sent()
    for setting in settings:
        setting["enable"] = 1
    first = len(tb.launched)
    await tb.configure(*settings, lower_credits=config.outstanding_bursts)
    await tb.done(len(tb.channels) * 4)
    served = [order[b[1]] for b in tb.launched[first:]]
    assert served == sorted(served)
    if len(set(served)) == len(TrafficClass):
        hit("dma.classes")


@cocotb.test()
async def launch_latency(dut):
    """From a fetch being accepted to ``arvalid``."""
    tb = TB(dut)
    await reset(dut)
    await cycles(dut, 5)
    for channel in tb.channels:
        await tb.run([tb.fetch(0, channel=channel)])
        latency = next(b[0] for b in tb.launched if b[1] == channel) - tb.accepted[-1][0]
        dut._log.info("launch latency: %d cycles", latency)
        assert latency == DMA.launch_latency <= 4
    hit("dma.launch")


@cocotb.test()
async def no_bubbles(dut):
    """Data flows without a gap from tile to tile if the credits cover the memory's latency."""
    tb = TB(dut, latency=2)
    await reset(dut)
    config = tb.config
    start = 4096 - config.data_bytes * 8
    count = max(6, 600 // config.tile_beats)
    await tb.run([tb.fetch(start + n * config.tile_bytes) for n in range(count)])
    beats = tb.memory.beat_cycles
    gaps = [b - a - 1 for a, b in zip(beats, beats[1:], strict=False) if b != a + 1]
    shortest = min(t.beats for t in tb.memory.transfers)
    covered = config.outstanding_bursts * min(config.longest_burst, config.tile_beats)
    dut._log.info("gaps: %s, shortest burst %d beats", gaps, shortest)
    if covered >= 20 and config.outstanding_bursts >= 4 and shortest >= 3:
        assert not gaps
        hit("dma.no_bubbles")


#: Of memory, in cycles.
LATENCIES = [8, 32, 64, 128]


@cocotb.test()
@cocotb.parametrize(latency=LATENCIES)
async def utilisation(dut, latency):
    """Share of cycles with a beat, against what the credits allow."""
    tb = TB(dut, latency=latency)
    await reset(dut)
    config = tb.config
    count = max(12, (2000 if config.outstanding_bursts > 1 else 400) // config.tile_beats)
    await tb.run([tb.fetch(n * config.tile_bytes) for n in range(count)])
    beats = tb.memory.beat_cycles
    share = len(beats) / (beats[-1] - beats[0] + 1)
    burst = tb.memory.transfers[0].beats
    # A burst's credit comes back with its last beat; a burst leaves every third cycle at most.
    bound = min(
        1.0,
        burst / 3,
        config.outstanding_bursts * burst / (latency + burst + DMA.credit_latency - 1),
    )
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
    hit("dma.utilisation", latency, of=LATENCIES)


@cocotb.test()
async def bandwidth_of_the_memory(dut):
    """A slow memory is kept busy all the time."""
    config = parameters()["config"]
    tb = TB(dut, latency=8, bytes_per_cycle=config.data_bytes / 4)
    await reset(dut)
    await tb.run([tb.fetch(n * config.tile_bytes) for n in range(4)])
    beats = tb.memory.beat_cycles
    assert beats[-1] - beats[0] >= (len(beats) - 1) * 4
    if config.outstanding_bursts > 1:
        # With one credit the memory's latency shows after each burst.
        assert beats[-1] - beats[0] <= (len(beats) - 1) * 4.2 + 4
        hit("dma.slow_memory")


@cocotb.test()
async def completions_wait(dut):
    """Tiles that nobody collects stop the engine without harm; then all come."""
    tb = TB(dut)
    await reset(dut)
    config = tb.config
    tb.completions.paused = True
    count = config.dma_channels * config.dma_queue_depth + 30
    fetches = [tb.any_fetch() for _ in range(count)]
    tb.fetches.send(*fetches)
    await cycles(dut, 16 * (config.tile_beats + 20))
    before = tb.inside
    await cycles(dut, 10 * config.tile_beats)
    assert tb.inside == before and tb.fetches.pending
    tb.completions.paused = False
    await tb.done(count)
    hit("dma.completions_wait")


@cocotb.test()
async def queue_full(dut):
    """A full queue stops its own channel only."""
    tb = TB(dut)
    await reset(dut)
    config = tb.config
    depth = config.dma_queue_depth
    await tb.configure(*(tb.channel_settings(c, enable=0) for c in tb.channels))
    for full in tb.channels:
        tb.fetches.send(
            *(tb.fetch(tb.spread(n * config.tile_bytes, full), channel=full) for n in range(depth))
        )
        await tb.fetches.sent()
        await cycles(dut, 2)
        assert int(dut.room.value) == (1 << config.dma_channels) - (2 << full)
    await tb.configure(*(tb.channel_settings(c) for c in tb.channels))
    await tb.done(depth * config.dma_channels)
    if config.dma_channels > 1:
        hit("dma.queue_full")


@cocotb.test()
async def reset_in_flight(dut):
    """After a reset at any moment nothing of before comes out."""
    tb = TB(dut, stall=0.2, latency=6, reorder=0.2)
    await reset(dut)
    drivers = [tb.fetches, tb.completions, tb.settings]
    if tb.writes is not None:
        drivers.append(tb.writes)
    busy = 0
    for _ in range(12):
        for _ in range(6):
            fetch = tb.any_fetch()
            if tb.random.random() < 0.3:
                tb.break_a_beat(fetch)
            tb.fetches.send(fetch)
        tb.settings.send(tb.channel_settings(0, credits=1))
        await cycles(dut, tb.random.randrange(1, 150))
        if tb.random.random() < 0.3:
            await tb.pulse("abort_all")
        if tb.random.random() < 0.3:
            await tb.pulse("commit")
        busy += tb.engine.outstanding > 0
        await reset(dut, drivers=drivers)
        if tb.writes is not None:
            assert str(dut.writes__valid.value) in "0"
        await tb.run([tb.any_fetch() for _ in range(3)])
    if busy > 2:
        hit("dma.reset")


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS), reorder=[0.0, 0.6])
async def write_errors(dut, stall, reorder):
    """Errors of the slots' memory fail the tile, with the first burst's address, and no other."""
    tb = TB(dut, stall=STALLS[stall], reorder=reorder)
    if tb.slots is None:
        return
    await reset(dut)
    config = tb.config
    fetches = [tb.any_fetch() for _ in range(60)]
    for fetch in tb.random.sample(fetches, 20):
        size = config.tile_bytes
        start = tb.slot_base + fetch["slot"] * config.expert_bytes + fetch["tile"] * size
        at = start + tb.random.randrange(0, size, config.data_bytes)
        response = tb.random.choice((SLVERR, DECERR))
        tb.slots.failing.append((at, at + config.data_bytes, response))
    for fetch in tb.random.sample(fetches, 10):
        tb.break_a_beat(fetch)
    records = await tb.run(fetches)
    reasons = Counter(record["reason"] for record in records)
    assert reasons[FetchReason.WRITE] and reasons[FetchReason.BUS] and reasons[FetchReason.OK]
    hit("dma.write_error")
    if interleaved(tb):
        hit("dma.write_interleaved")
    # Nothing of it is left.
    tb.slots.failing.clear()
    tb.memory.failing.clear()
    records = await tb.run([tb.fetch(n * config.tile_bytes, channel=n % 2) for n in range(6)])
    assert all(record["reason"] == FetchReason.OK for record in records)


@cocotb.test()
async def writes_wait_for_answers(dut):
    """No tile completes before the last of its writes was answered, and no time-out counts that."""
    tb = TB(dut)
    if tb.slots is None:
        return
    await reset(dut)
    config = tb.config
    tb.slots.paused = True
    count = config.dma_channels * config.dma_queue_depth
    # Longer than the last channel waits for its turn.
    timeout = 3 * count * config.tile_beats
    dut.timeout.value = timeout
    tb.fetches.send(
        *(
            tb.fetch(tb.spread(n << 13, n % config.dma_channels), channel=n % config.dma_channels)
            for n in range(count)
        )
    )
    await cycles(dut, 2 * timeout)
    assert tb.inside == count and not tb.completed
    tb.slots.paused = False
    await tb.done(count)
    assert all(r["reason"] == FetchReason.OK for _, _, r in tb.completed)
    dut.timeout.value = 0
    hit("dma.write_answers")


#: Cycles after which writes are answered.
ANSWERS = [8, 100]


@cocotb.test()
@cocotb.parametrize(reorder=[0.0, 1.0], latency=ANSWERS)
async def write_rate(dut, reorder, latency):
    """Beats of all channels in turns are written at the rate at which they come."""
    tb = TB(dut, latency=2, reorder=reorder)
    if tb.slots is None:
        return
    await reset(dut)
    config = tb.config
    tb.slots.latency = latency
    count = max(16, 1600 // config.tile_beats)
    # At the credits that read a beat a cycle, and without a choice between classes.
    await tb.configure(*(tb.channel_settings(c, traffic=TrafficClass.DEMAND) for c in tb.channels))
    await tb.run(
        [
            tb.fetch(tb.spread(n << 13, n % config.dma_channels), channel=n % config.dma_channels)
            for n in range(count)
        ]
    )
    beats = tb.slots.beat_cycles
    share = len(beats) / (beats[-1] - beats[0] + 1)
    dut._log.info("writes: %.3f beats a cycle", share)
    assert share >= 0.97
    if interleaved(tb):
        hit("dma.write_rate", latency, of=ANSWERS)


@cocotb.test()
async def write_latency(dut):
    """From the last beat of a write burst to its address and its data."""
    tb = TB(dut, latency=10)
    if tb.slots is None:
        return
    await reset(dut)
    size = tb.config.data_bytes
    for beats in (1, 4, 16):
        await cycles(dut, 5)
        tb.fetches.send(tb.fetch(0, size=beats * size))
        seen = {}
        while len(seen) < 3:
            await FallingEdge(dut.clk)
            for name in ("bus__r", "slot_bus__aw", "slot_bus__w"):
                if tb.ports.high(f"{name}valid") and (
                    name != "bus__r" or tb.ports.high("bus__rlast")
                ):
                    seen.setdefault(name, tb.cycle)
        await tb.done()
        to_writer = 3  # From a beat being taken to the writer.
        assert seen["slot_bus__aw"] - seen["bus__r"] == to_writer + SlotWriter.launch_latency
        assert seen["slot_bus__w"] - seen["bus__r"] == to_writer + SlotWriter.data_latency
