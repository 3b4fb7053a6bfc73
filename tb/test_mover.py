# amaranth: UnusedElaboratable=no
"""The host mover between a link, a dispatcher and a scheduler that the bench plays.

::

    messages ─▶ ┌───────────┐ ─▶ commands
    replies  ◀─ │ HostMover │ ◀─ answers
    resets   ─▶ └───────────┘
        fetches ─▶     ─▶ completions
"""

import random

import cocotb
import pytest
from amaranth import Module, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.buffer import ExpertBuffer
from prestage_hw.contract import MESSAGES, RECORDS, DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.records import ErrorCode, FetchReason, message_by_code
from prestage_hw.engine import Engine
from prestage_hw.layouts import RecordLayout
from prestage_hw.link.layouts import MessageLayout
from prestage_hw.link.mover import HostMover
from prestage_hw.top import Top
from prestage_sim.model.link.mover import Fetch
from prestage_sim.model.link.mover import HostMover as GoldenMover
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

_DEPTH = 6


class _FetchLayout(data.StructLayout):
    """A fetch with its expert, which the scheduler shows beside it."""

    def __init__(self, *, config):
        super().__init__(
            {
                "request": RecordLayout("FetchRequest", config=config),
                "layer": unsigned(config.bits("layer")),
                "expert": unsigned(config.bits("expert")),
            }
        )


class Harness(wiring.Component):
    """A mover with all that belongs to a fetch in one stream, and a strobe of the dispatcher."""

    def __init__(self, *, config, depth):
        self.config = config
        self.depth = depth
        to_device = stream.Signature(MessageLayout(config=config, to_device=True))
        to_host = stream.Signature(MessageLayout(config=config, to_device=False))
        super().__init__(
            {
                "messages": In(to_device),
                "commands": Out(to_device),
                "answers": In(to_host),
                "replies": Out(to_host),
                "fetches": In(stream.Signature(_FetchLayout(config=config))),
                "completions": Out(stream.Signature(RecordLayout("Completion", config=config))),
                "resets": In(1),
                "timeout": In(24),
                "rejected": Out(1),
                "others_rejected": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.mover = mover = HostMover(config=self.config, depth=self.depth)
        for name in ("messages", "answers"):
            wiring.connect(m, wiring.flipped(getattr(self, name)), getattr(mover, name))
        for name in ("commands", "replies", "completions"):
            wiring.connect(m, getattr(mover, name), wiring.flipped(getattr(self, name)))
        m.d.comb += [
            mover.fetches.valid.eq(self.fetches.valid),
            mover.fetches.p.eq(self.fetches.p.request),
            mover.fetch_layer.eq(self.fetches.p.layer),
            mover.fetch_expert.eq(self.fetches.p.expert),
            self.fetches.ready.eq(mover.fetches.ready),
            mover.resets.eq(self.resets),
            mover.timeout.eq(self.timeout),
            mover.others_rejected.eq(self.others_rejected),
            self.rejected.eq(mover.rejected),
            self.idle.eq(mover.idle),
        ]
        if self.config.host_writes:
            m.d.comb += mover.writes.ready.eq(1)
        return m


class _Bench:
    """Streams, a scheduler that wants tiles, and a host that is told of them."""

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.config = config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        to_device = MessageLayout(config=config, to_device=True)
        to_host = MessageLayout(config=config, to_device=False)
        self.messages = StreamSource(dut, "messages", to_device, stall=stall)
        self.commands = StreamSink(dut, "commands", to_device, stall=stall)
        self.answers = StreamSource(dut, "answers", to_host, stall=stall)
        self.replies = StreamSink(dut, "replies", to_host, stall=stall)
        self.fetches = StreamSource(dut, "fetches", _FetchLayout(config=config), stall=stall)
        self.completions = StreamSink(
            dut, "completions", RecordLayout("Completion", config=config), stall=stall
        )
        self.drivers = [
            self.messages,
            self.commands,
            self.answers,
            self.replies,
            self.fetches,
            self.completions,
        ]
        dut.resets.value = 0
        dut.timeout.value = 0
        dut.others_rejected.value = 0
        self.strobes = 0
        self.forget()
        cocotb.start_soon(self._count())

    async def _count(self):
        while True:
            await FallingEdge(self.dut.clk)
            if str(self.dut.rst.value) == "0":
                self.strobes += str(self.dut.rejected.value) == "1"

    def forget(self):
        self.strobes = 0
        self.entries = {}  # tag: (layer, expert, slot, address) of the fetch that it stands for
        self.wanted = {}  # (tag, tile) of what the scheduler wants: demand
        self.asked = {}  # (tag, tile) of FETCHes that came: (serial, demand)
        self.stale = []  # (tag, serial, tile) of FETCHED that must be refused
        self._seen = 0
        self.passed = []  # replies that are the dispatcher's
        self.events = []  # (code, expert, address)

    async def reset(self):
        await reset(self.dut, drivers=self.drivers)
        self.forget()

    def want(self, tag, *, tiles=None, demand=1):
        """Let the scheduler want tiles of a fresh expert as entry ``tag``."""
        config, rng = self.config, self.random
        layer, expert = rng.randrange(config.model.layers), rng.randrange(config.model.experts)
        address = rng.randrange(1 << config.address_bits - 1) // 64 * 64
        self.entries[tag] = (layer, expert, rng.randrange(config.slots), address)
        self.more(tag, range(config.tiles if tiles is None else tiles), demand=demand)

    def more(self, tag, tiles, *, demand=1):
        config = self.config
        layer, expert, slot, address = self.entries[tag]
        for tile in tiles:
            request = {
                "tag": tag,
                "demand": demand,
                "slot": slot,
                "tile": tile,
                "address": (address + tile * config.tile_bytes) % (1 << config.address_bits),
                "channel": 0,
                "sized": 0,
                "bytes": 0,
            }
            self.wanted[tag, tile] = demand
            self.fetches.send({"request": request, "layer": layer, "expert": expert})

    def post(self, name, *values):
        """Let the host send a message."""
        body = MESSAGES[name].record.pack(self.config, *values)
        self.post_raw(MESSAGES[name].code, body)

    def post_raw(self, code, body=b""):
        size = len(self.messages._unpack(0)["body"])
        self.messages.send({"code": code, "body": body.ljust(size, b"\xa5")})

    def answer(self, name, *values):
        """Let the dispatcher send an answer."""
        body = MESSAGES[name].record.pack(self.config, *values)
        size = len(self.answers._unpack(0)["body"])
        self.answers.send({"code": MESSAGES[name].code, "body": body.ljust(size, b"\x5a")})

    def poll(self):
        """Sort replies; check each FETCH. Returns those that came."""
        config = self.config
        fresh = []
        for reply in self.replies.received[self._seen :]:
            self._seen += 1
            message = message_by_code(reply["code"])
            body = bytes(reply["body"][: message.body_bytes(config)])
            fields = message.record.unpack(config, body)
            if message.name == "FETCH":
                place = fields["tag"], fields["tile"]
                assert self.wanted.pop(place) == fields["demand"], fields
                assert place not in self.asked
                layer, expert, slot, _ = self.entries[fields["tag"]]
                assert (fields["layer"], fields["expert"], fields["slot"]) == (layer, expert, slot)
                self.asked[place] = fields["serial"]
                fresh.append((*place, fields["serial"]))
            elif message.name == "EVENT":
                assert fields["ctx"] == fields["layer"] == 0
                self.events.append((fields["code"], fields["expert"], fields["address"]))
            else:
                self.passed.append((message.name, *fields.values()))
        return fresh

    def expected_completion(self, tag, tile, failed):
        config = self.config
        address = self.entries[tag][3] + tile * config.tile_bytes
        return {
            "tag": tag,
            "tile": tile,
            "failed": int(failed),
            "address": address % (1 << config.address_bits),
            "channel": 0,
            "reason": int(FetchReason.BUS if failed else FetchReason.OK),
        }

    async def fetch(self, tag, **options):
        """Want an expert and wait for its FETCHes: their serial."""
        self.want(tag, **options)
        while any(t == tag for t, _ in self.wanted):
            await RisingEdge(self.dut.clk)
            self.poll()
        return self.asked[tag, 0]

    async def settle(self, quiet=60):
        """Wait until nothing moves."""
        still, before = 0, None
        for _ in range(20_000):
            if still == quiet:
                return
            await RisingEdge(self.dut.clk)
            self.poll()
            now = tuple(d.sent_count if isinstance(d, StreamSource) else len(d.received)
                        for d in self.drivers)  # fmt: skip
            still = still + 1 if now == before else 0
            before = now
        raise AssertionError("Bench must come to rest")


#: When a FETCHED comes for the second time.
_TWICE = ("twice", "entry used again")


def _synced(config, number):
    return MESSAGES["SYNC"].code, RECORDS["Sync"].pack(config, number)


def _numbers(bench):
    """Tags of the SYNCs that reached the dispatcher."""
    return [
        RECORDS["Sync"].unpack(bench.config, bytes(c["body"][:2]))["tag"]
        for c in bench.commands.received
        if c["code"] == MESSAGES["SYNC"].code
    ]


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def traffic(dut, stall):
    """Everything at once: each fetch leaves once and comes back once, the rest passes in order."""
    bench = _Bench(dut, stall=Stall(stall, burst=(1, 8)))
    config, rng = bench.config, bench.random
    await bench.reset()
    expected, bad, synced, answered, outstanding = [], [], 0, 0, []
    used = []  # FETCHED that were sent
    codes = set()  # of those that say how a copy ended
    kinds = set()  # of those that are refused
    ended = {}  # tag: tiles that came back
    fetches = 0
    for step in range(2500):
        await RisingEdge(dut.clk)
        outstanding += bench.poll()
        free = [t for t in range(config.inflight) if t not in bench.entries]
        if step < 2200 and free and rng.random() < 0.05:
            tag = rng.choice(free)
            ended[tag] = 0
            fetches += 1
            bench.want(tag, demand=rng.randrange(2))
        # At most as many as there is room for, whatever the dispatcher does.
        if rng.random() < 0.1 and synced - len(bench.commands.received) < _DEPTH:
            bench.post("SYNC", synced)
            synced += 1
        if rng.random() < 0.1:
            bench.answer("SYNCED", answered)
            answered += 1
        if outstanding and rng.random() < 0.2 and bench.messages.pending < 3:
            tag, tile, serial = outstanding.pop(rng.randrange(len(outstanding)))
            failed = rng.choice((0, 0, 0, 1, 128, 255))
            codes.add(failed)
            bench.post("FETCHED", tag, serial, tile, failed)
            expected.append(bench.expected_completion(tag, tile, failed != 0))
            used.append((tag, serial, tile))
            ended[tag] += 1
            if ended[tag] == config.tiles:
                # The entry may be used again at once.
                await bench.messages.sent()
                del bench.entries[tag]
                bench.asked = {p: s for p, s in bench.asked.items() if p[0] != tag}
        elif rng.random() < 0.05 and bench.messages.pending < 3:
            known = {(t, s, i) for t, i, s in outstanding}
            wrong = rng.choice(
                (
                    (rng.randrange(256), rng.randrange(65536), rng.randrange(65536)),
                    (rng.randrange(config.inflight), 0xFFFF, rng.randrange(config.tiles)),
                    *used[-3:],
                    # Beyond the last entry or tile, where what counts bits might see another.
                    *((t + (1 << config.bits("tag")), s, i) for t, i, s in outstanding[:1]),
                    *((t, s, i + (1 << config.bits("tile"))) for t, i, s in outstanding[:1]),
                    *((config.inflight, s, i) for _, i, s in outstanding[:1]),
                    *((t, s, config.tiles) for t, _, s in outstanding[:1]),
                )
            )
            if wrong not in known:
                bench.post("FETCHED", *wrong, 0)
                if wrong[0] >= config.inflight or wrong[2] >= config.tiles:
                    kinds.add("out of range")
                elif wrong in used:
                    kinds.add("twice")
                elif (wrong[0], wrong[2]) in {(t, i) for t, i, _ in outstanding}:
                    kinds.add("other fetch")
                elif wrong[0] not in bench.entries:
                    kinds.add("unused entry")
                bad.append((ErrorCode.BAD_FETCHED, wrong[0], wrong[2]))
    await bench.settle()
    assert fetches > 30
    assert bench.completions.received == expected
    assert sorted(bench.events) == sorted(bad) and len(bad) > 20
    assert bench.events == bad
    assert bench.strobes == len(bad)
    assert _numbers(bench) == list(range(synced))
    assert bench.passed == [("SYNCED", n) for n in range(answered)]
    assert any(c["failed"] for c in expected)
    if stall:
        hit("mover.traffic")
    hit("mover.unknown", *kinds - {"twice"}, of=("out of range", "other fetch", "unused entry"))
    hit("mover.failed", *codes - {0}, of=(1, 128, 255))
    hit("mover.twice", *kinds & {"twice"}, of=_TWICE)


@cocotb.test()
async def reused_entries(dut):
    """What belongs to an earlier fetch of the same entry, tile and slot is refused."""
    bench = _Bench(dut)
    await bench.reset()
    first = await bench.fetch(1)
    tiles = range(bench.config.tiles)
    for tile in tiles:
        bench.post("FETCHED", 1, first, tile, 0)
    await bench.settle()
    bench.asked.clear()
    second = await bench.fetch(1)
    assert second != first
    for tile in tiles:
        bench.post("FETCHED", 1, first, tile, 0)
        bench.post("FETCHED", 1, second, tile, 0)
    await bench.settle()
    assert bench.events == [(ErrorCode.BAD_FETCHED, 1, tile) for tile in tiles]
    assert len(bench.completions.received) == 2 * len(tiles)
    # Two entries that take turns keep their own number.
    bench.asked.clear()
    bench.want(0, tiles=1)
    bench.want(2, tiles=1)
    bench.more(0, tiles[1:])
    bench.more(2, tiles[1:])
    await bench.settle()
    serials = [{s for (t, _), s in bench.asked.items() if t == tag} for tag in (0, 2)]
    assert [len(s) for s in serials] == [1, 1] and serials[0] != serials[1]
    hit("mover.twice", "entry used again", of=_TWICE)


@cocotb.test()
async def overtaking(dut):
    """FETCHED get through whatever else waits; what finds no room is refused."""
    bench = _Bench(dut)
    config = bench.config
    await bench.reset()
    bench.commands.paused = True
    await cycles(dut, 2)
    serial = await bench.fetch(3)
    for number in range(_DEPTH):
        bench.post("SYNC", number)
    bench.post("FETCHED", 3, serial, 0, 0)
    await bench.settle()
    assert bench.completions.received == [bench.expected_completion(3, 0, False)]
    assert not bench.events
    hit("mover.overtake")
    # One waits in the register before the dispatcher.
    for number in range(_DEPTH, _DEPTH + 4):
        bench.post("SYNC", number)
    for tile in range(1, config.tiles):
        bench.post("FETCHED", 3, serial, tile, 1)
    await bench.settle()
    refused = len(bench.events)
    assert refused == 3
    assert bench.events == [(ErrorCode.OVERRUN, 0, MESSAGES["SYNC"].code)] * refused
    assert len(bench.completions.received) == config.tiles
    bench.commands.paused = False
    await bench.settle()
    assert _numbers(bench) == list(range(_DEPTH + 1))
    assert bench.strobes == refused
    hit("mover.overrun")


@cocotb.test()
async def strobes(dut):
    """No rejection is lost while the dispatcher counts its own, and none is in the same cycle."""
    bench = _Bench(dut)
    await bench.reset()
    rng = bench.random
    for _ in range(40):
        bench.post("FETCHED", 0, 0, 0, 0)
    both = 0
    while len(bench.events) < 40:
        dut.others_rejected.value = rng.randrange(2)
        await FallingEdge(dut.clk)
        both += str(dut.rejected.value) == "1" and str(dut.others_rejected.value) == "1"
        await RisingEdge(dut.clk)
        bench.poll()
    dut.others_rejected.value = 0
    await bench.settle()
    assert both == 0
    assert bench.strobes == 40
    hit("mover.counted")


@cocotb.test()
async def fairness(dut):
    """Fetches and answers take turns, and events go first."""
    bench = _Bench(dut)
    config = bench.config
    await bench.reset()
    bench.replies.paused = True
    await cycles(dut, 4)
    for tag in range(config.inflight):
        bench.want(tag)
    count = config.inflight * config.tiles
    for number in range(count):
        bench.answer("SYNCED", number)
    bench.post("FETCHED", 200, 0, 0, 0)
    await cycles(dut, 100)
    bench.replies.paused = False
    await bench.settle()
    names = [message_by_code(r["code"]).name for r in bench.replies.received]
    event = names.index("EVENT")
    assert event <= 1
    names.pop(event)
    # The first may have been loaded before there was a choice.
    turns = names[1 : 2 * count - 2]
    assert all(a != b for a, b in zip(turns, turns[1:], strict=False)), names
    hit("mover.fair")


async def _restart(bench):
    """Restart the link as it does: a strobe in a cycle in which no reply is taken."""
    dut = bench.dut
    bench.replies.paused = True
    await cycles(dut, 2)
    dut.resets.value = 1
    await RisingEdge(dut.clk)
    dut.resets.value = 0
    bench.poll()


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3])
async def restarts(dut, stall):
    """A restart of the link fails what was sent, and only that."""
    bench = _Bench(dut, stall=Stall(stall, burst=(1, 20)))
    config, rng = bench.config, bench.random
    await bench.reset()
    await cycles(dut, 40)
    spared = 0
    for _ in range(50):
        tags = rng.sample(range(config.inflight), rng.randrange(1, config.inflight))
        for tag in tags:
            bench.want(tag)
        await cycles(dut, rng.randrange(1, rng.choice((5, 60))))
        bench.poll()
        done = rng.sample(sorted(bench.asked), len(bench.asked) // 3)
        for place in done:
            bench.post("FETCHED", place[0], bench.asked[place], place[1], 0)
        # A link hands on what came before its restart, without a pause.
        if stall or rng.random() < 0.5:
            await bench.messages.sent()
        await _restart(bench)
        sent = set(bench.asked)
        again = rng.random() < 0.3
        if again:
            await cycles(dut, rng.randrange(1, 8))
            await _restart(bench)
        failed_before = dict.fromkeys(bench.asked)
        bench.replies.paused = False
        # Longer than two looks at all tiles take.
        await bench.settle(250)
        # What came afterwards is for the new host; it answers all of that.
        late = [place for place in bench.asked if place not in failed_before]
        spared += bool(late)
        for place in late:
            bench.post("FETCHED", place[0], bench.asked[place], place[1], 0)
        await bench.settle()
        outcome = {}
        for completion in bench.completions.received:
            place = completion["tag"], completion["tile"]
            assert place not in outcome
            outcome[place] = completion["failed"]
            assert completion == bench.expected_completion(*place, completion["failed"])
        for place in sent:
            assert outcome.pop(place) == (place not in done), place
        assert outcome == dict.fromkeys(late, 0)
        assert not bench.events and not bench.wanted
        bench.asked.clear()
        bench.completions.clear()
    assert spared > 5
    hit("mover.restart")


@cocotb.test()
async def restart_in_any_cycle(dut):
    """A FETCH that has been loaded when the link restarts is answered, and no other is."""
    bench = _Bench(dut)
    await bench.reset()
    await cycles(dut, 200)
    for delay in range(8):
        for busy in (False, True):
            bench.replies.paused = True
            await cycles(dut, 3)
            if busy:
                bench.post("FETCHED", 255, 0, 0, 0)  # The mover looks it up meanwhile.
            bench.want(1, tiles=2)
            await cycles(dut, delay)
            dut.resets.value = 1
            await RisingEdge(dut.clk)
            dut.resets.value = 0
            bench.replies.paused = False
            await bench.settle(250)
            assert sorted(bench.asked) == [(1, 0), (1, 1)]
            # The first was loaded or not; either way both go to the new host.
            assert not bench.completions.received
            for tile in range(2):
                bench.post("FETCHED", 1, bench.asked[1, tile], tile, 0)
            await bench.settle()
            assert len(bench.completions.received) == 2
            assert len(bench.events) == busy
            bench.asked.clear()
            bench.events.clear()
            bench.completions.clear()
    hit("mover.restart")


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def timeouts(dut, stall):
    """Fetches expire after the time without any progress, each by itself and all tiles together."""
    bench = _Bench(dut, stall=Stall(stall, burst=(1, 8)))
    config, rng = bench.config, bench.random
    await bench.reset()
    timeout = 2000
    slack = 5 * (config.tiles * 4 + 200)
    dut.timeout.value = timeout
    late = []
    for _ in range(3):
        tags = rng.sample(range(config.inflight), min(3, config.inflight))
        serials = {tag: await bench.fetch(tag, tiles=rng.randrange(1, config.tiles + 1))
                   for tag in tags}  # fmt: skip
        device = _Wants(bench, tags)
        golden = GoldenMover(config)
        golden.connect(device)
        golden.restart()
        left = {place for place in bench.asked if place[0] in tags}
        last = dict.fromkeys(tags, 0)  # when something came of it, or was asked for
        # One of them makes progress now and then, and so outlives the others.
        kept = tags[0]
        first = len(bench.completions.received)
        now = 0
        expired = set()
        while left or len(bench.completions.received) < first + len(device.ended):
            await RisingEdge(dut.clk)
            bench.poll()
            now += 1
            assert now < 40 * timeout
            mine = sorted(place for place in left if place[0] == kept)
            if len(mine) > 1 and now - last[kept] >= 3 * timeout // 4:
                bench.post("FETCHED", kept, serials[kept], mine[0][1], 0)
                tag, tile = mine[0]
                fetched = RECORDS["Fetched"].pack(config, tag, golden._serials[tag], tile, 0)
                golden.receive(MESSAGES["FETCHED"].code, fetched)
                left.remove(mine[0])
                last[kept] = now
            seen = {(c["tag"], c["tile"]) for c in bench.completions.received[first:]}
            for tag in tags:
                if tag not in expired and seen & {p for p in left if p[0] == tag}:
                    # Its FETCHes left up to some hundred cycles before it was looked at.
                    assert timeout - 400 <= now - last[tag] <= 5 * timeout // 4 + slack
                    expired.add(tag)
                    golden.expire(tag)
                    late += [(tag, serials[tag], p[1]) for p in left if p[0] == tag]
                    left = {p for p in left if p[0] != tag}
        assert expired == set(tags)
        await bench.settle()
        got = bench.completions.received[first:]
        for tag in tags:
            ended = [(c["tile"], c["reason"]) for c in got if c["tag"] == tag]
            assert ended == [(tile, reason) for t, tile, reason in device.ended if t == tag]
        assert all(bool(c["failed"]) == (c["reason"] != FetchReason.OK) for c in got)
        for each in late:
            bench.post("FETCHED", *each, 0)
        await bench.settle()
        assert bench.events == [(ErrorCode.BAD_FETCHED, t, tile) for t, _, tile in late]
        assert len(bench.completions.received) == first + len(got)
        bench.asked.clear()
        bench.events.clear()
        late.clear()
    # Without a time-out a fetch may take for ever.
    dut.timeout.value = 0
    await bench.fetch(0, tiles=1)
    before = len(bench.completions.received)
    await cycles(dut, 4 * timeout)
    assert len(bench.completions.received) == before
    hit("mover.timeout")


class _Wants:
    """A device that wants the tiles that the bench was asked for, and notes how they end."""

    def __init__(self, bench, tags):
        self.left = [
            (tag, Fetch(*bench.entries[tag][:3], tile, True))
            for tag, tile in sorted(bench.asked)
            if tag in tags
        ]
        self.ended = []

    def next_fetch(self):
        return self.left.pop(0) if self.left else None

    def written(self, tag, tile):
        return True

    def complete(self, tag, tile, reason):
        self.ended.append((tag, tile, reason))
        return []


@cocotb.test()
async def latency(dut):
    """Cycles as stated."""
    bench = _Bench(dut)
    await bench.reset()
    await cycles(dut, 200)
    assert str(dut.idle.value) == "1"

    async def valid(name):
        count = 0
        while str(getattr(dut, f"{name}__valid").value) != "1":
            await FallingEdge(dut.clk)
            count += 1
        return count

    bench.want(0, tiles=1)
    await valid("fetches")
    assert await valid("replies") == HostMover.fetch_latency
    await bench.settle()
    serial = bench.asked[0, 0]
    # One that failed need not have been written, and is asked about all the same.
    bench.post("FETCHED", 0, serial, 0, int(bench.config.host_writes))
    await valid("messages")
    assert await valid("completions") == parameters()["fetched_latency"]
    await bench.settle()
    bench.post("SYNC", 1)
    await valid("messages")
    assert await valid("commands") == HostMover.message_latency
    assert str(dut.idle.value) == "0"
    await bench.settle()
    assert str(dut.idle.value) == "1"
    hit("mover.latency")


@cocotb.test()
async def resets(dut):
    """After a reset nothing is outstanding."""
    bench = _Bench(dut, stall=0.2)
    config, rng = bench.config, bench.random
    await bench.reset()
    for _ in range(8):
        for tag in range(config.inflight):
            bench.want(tag)
        for number in range(rng.randrange(_DEPTH)):
            bench.post("SYNC", number)
        await cycles(dut, rng.randrange(20, 200))
        bench.poll()
        asked = dict(bench.asked)
        for (tag, tile), serial in list(asked.items())[::2]:
            bench.post("FETCHED", tag, serial, tile, 0)
        await cycles(dut, rng.randrange(1, 30))
        await bench.reset()
        for (tag, tile), serial in asked.items():
            bench.post("FETCHED", tag, serial, tile, 0)
        await bench.settle(150)
        assert sorted(bench.events) == sorted((ErrorCode.BAD_FETCHED, *place) for place in asked)
        assert not bench.completions.received and not bench.commands.received
        bench.events.clear()
        serial = await bench.fetch(0)
        bench.post("FETCHED", 0, serial, 0, 0)
        await bench.settle()
        assert bench.completions.received == [bench.expected_completion(0, 0, False)]
        await bench.reset()
    hit("mover.reset")


_SHAPES = {
    "tiny": TINY_DEVICE.replace(mover="host"),
    # Tiles of an odd size, entries that are no power of two.
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=3, experts=12, top_k=3),
        slots=11,
        expert_bytes=123_459,
        tile_bytes=41_153,
        contexts=3,
        inflight=5,
        address_bits=32,
        mover="host",
    ),
    # Slots in the device; what else there is to them is tested in the whole device.
    "writes": TINY_DEVICE.replace(mover="host", host_writes=True),
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_mover(shape):
    config = _SHAPES[shape]
    run_bench(
        lambda: Harness(config=config, depth=_DEPTH),
        module=__file__,
        name="mover",
        parameters={
            "config": config,
            "fetched_latency": HostMover(config=config).fetched_latency,
        },
        testcase="latency" if config.host_writes else None,
    )


def test_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        HostMover(config=3)
    with pytest.raises(ValueError, match="Mover must be the host, not 'dma'"):
        HostMover(config=TINY_DEVICE)
    config = _SHAPES["tiny"]
    with pytest.raises(ValueError, match="Host writes need slots in the device, not elsewhere"):
        ExpertBuffer(config=config, host_writes=True)
    with pytest.raises(ValueError, match="Engine must have a DMA engine, not the mover 'host'"):
        Engine(config=config)
    assert set(Top(config=config).signature.members) == {"rx", "tx", "idle"}
    ports = {"rx", "tx", "idle", "host_writes", "reads", "beats"}
    assert set(Top(config=config.replace(host_writes=True)).signature.members) == ports
    with pytest.raises(TypeError, match="Queue depth must be an integer, not 'x'"):
        HostMover(config=config, depth="x")
    with pytest.raises(ValueError, match="Queue depth must be a positive integer, not 0"):
        HostMover(config=config, depth=0)
