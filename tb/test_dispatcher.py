# amaranth: UnusedElaboratable=no
"""Dispatcher, register bank, counters and accuracy against their golden models.

::

    messages ─▶ dispatcher ─▶ begin, decisions, commands, hints, reads
    replies  ◀─────┤   ▲──────  ready, events, beats
                   └─ register bank ─▶ table_requests    counters ◀─ strobes, accuracy ◀─ candidates
                          └─ profiles ─▶ active, settings
"""

import random
from collections import Counter
from types import SimpleNamespace

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract import MESSAGES, RECORDS, REGISTERS, DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.records import (
    TABLE_BURST,
    ErrorCode,
    Phase,
    Refusal,
    SettingsRefusal,
    Source,
    TrafficClass,
    message_by_code,
)
from prestage_hw.contract.registers import (
    BASES,
    PROFILE_REGISTERS,
    REFUSAL_FIELDS,
    SHAPE_FIELDS,
    base_limits,
    refused_bits,
    register_by_name,
)
from prestage_hw.layouts import RecordLayout
from prestage_hw.link.dispatcher import Dispatcher
from prestage_hw.link.layouts import MessageLayout
from prestage_hw.stats import Accuracy, Counters, Profiles, RegisterBank
from prestage_hw.stats.profiles import ActiveProfileLayout
from prestage_sim.model.dma import Settings as GoldenSettings
from prestage_sim.model.link.dispatcher import Dispatcher as GoldenDispatcher
from prestage_sim.model.stats.counters import ChannelCounters as GoldenChannelCounters
from prestage_sim.model.stats.counters import Counters as GoldenCounters
from prestage_sim.model.stats.registers import RegisterBank as GoldenRegisterBank
from prestage_tb.bench import (
    Signals,
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

_TABLE_WORDS = 40
_ACTIVE = ActiveProfileLayout()
_PROFILE_CHOICE = ("dma_channel", "profile", "profile_select", "refusal")
_OUTPUTS = ("begin", "decisions", "commands", "hints", "reads", "table_requests")
_RECORDS = {
    "begin": "BeginToken",
    "decisions": "RoutingDecision",
    "commands": "Command",
    "hints": "Candidate",
    "reads": "ReadRequest",
    "table_requests": "TableRequest",
    "ready": "Ready",
    "events": "Event",
    "beats": "Beat",
}


class FrontEnd(wiring.Component):
    """Dispatcher and stage 6, wired as in the top."""

    def __init__(self, *, config):
        self.config = config

        def record(name):
            return stream.Signature(RecordLayout(_RECORDS[name], config=config))

        super().__init__(
            {
                "messages": In(stream.Signature(MessageLayout(config=config, to_device=True))),
                "replies": Out(stream.Signature(MessageLayout(config=config, to_device=False))),
                **{name: Out(record(name)) for name in _OUTPUTS},
                **{name: In(record(name)) for name in ("ready", "events", "beats")},
                "candidates": In(stream.Signature(RecordLayout("Candidate", config=config))),
                "table_values": In(stream.Signature(32)),
                "engine_idle": In(1),
                "active": Out(ActiveProfileLayout()),
                "settings": Out(stream.Signature(RecordLayout("ChannelSettings", config=config))),
                "commit": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.dispatcher = dispatcher = Dispatcher(config=config)
        m.submodules.registers = registers = RegisterBank(config=config)
        m.submodules.counters = counters = Counters(config=config)
        m.submodules.accuracy = accuracy = Accuracy(config=config)
        wiring.connect(m, wiring.flipped(self.messages), dispatcher.messages)
        wiring.connect(m, dispatcher.replies, wiring.flipped(self.replies))
        for name in ("begin", "decisions", "commands", "hints", "reads"):
            wiring.connect(m, getattr(dispatcher, name), wiring.flipped(getattr(self, name)))
        for name in ("ready", "events", "beats"):
            wiring.connect(m, wiring.flipped(getattr(self, name)), getattr(dispatcher, name))
        wiring.connect(m, dispatcher.registers, registers.requests)
        wiring.connect(m, registers.values, dispatcher.values)
        wiring.connect(m, dispatcher.phases, registers.phases)
        wiring.connect(m, registers.settings, wiring.flipped(self.settings))
        wiring.connect(m, registers.table_requests, wiring.flipped(self.table_requests))
        wiring.connect(m, wiring.flipped(self.table_values), registers.table_values)
        m.d.comb += [
            registers.table_words.eq(_TABLE_WORDS),
            registers.engine_idle.eq(self.engine_idle),
            dispatcher.engine_idle.eq(self.engine_idle),
            dispatcher.hint_enable.eq(registers.control.profile.hint_enable),
            dispatcher.hint_threshold.eq(registers.control.hint_threshold),
            dispatcher.clear.eq(registers.clear.buffer),
            registers.counters.eq(counters.values),
            counters.clear.eq(registers.clear.counters),
            self.candidates.ready.eq(1),
            self.active.eq(registers.control.profile),
            self.commit.eq(registers.commit),
            registers.boundary.eq(dispatcher.boundary),
            accuracy.candidate_valid.eq(self.candidates.valid),
            accuracy.candidate.eq(self.candidates.p),
            accuracy.begin.eq(dispatcher.begin.valid & dispatcher.begin.ready),
            accuracy.begin_ctx.eq(dispatcher.begin.p.ctx),
            accuracy.command_valid.eq(dispatcher.commands.valid & dispatcher.commands.ready),
            accuracy.command.eq(dispatcher.commands.p),
            accuracy.decision_valid.eq(dispatcher.decisions.valid & dispatcher.decisions.ready),
            accuracy.decision.eq(dispatcher.decisions.p),
        ]
        for strobes in (dispatcher.strobes, accuracy.strobes):
            for name, _ in strobes.shape():
                m.d.comb += counters.strobes[name].eq(strobes[name])
        return m


def _beat(config, slot, beat):
    """What the bench's storage holds: bytes and validity that depend on the place."""
    generator = random.Random(slot * 65536 + beat)
    return generator.randbytes(config.data_bytes), generator.random() < 0.8


class _Recorder:
    """Stages behind the golden dispatcher: they record what reaches them."""

    def __init__(self, config):
        self.config = config
        self.enable = True
        self.expert_base = 0
        self.seen = {name: [] for name in _OUTPUTS}
        self.tables = {}
        self.plan = []  # (layer, expert, source) of the next candidates
        self.throttle = SimpleNamespace(enable=False, register=0, state=0)
        self.statistics = SimpleNamespace(clear=lambda: None)
        self.order = []  # how token starts and decisions follow each other

    # Predictor
    def begin(self, ctx, token, phase):
        self.order.append("begin")
        self.seen["begin"].append({"ctx": ctx, "token": token, "phase": phase})
        return self._planned(ctx)

    def _planned(self, ctx):
        return [(ctx, layer, expert, 1, source, 0) for layer, expert, source in self.plan]

    def decide(self, ctx, layer, experts, stamp):
        self.order.append("decisions")
        self.seen["decisions"].append(
            {"ctx": ctx, "layer": layer, "experts": list(experts), "stamp": stamp}
        )
        return self._planned(ctx)

    def hint(self, ctx, layer, expert, score, deadline):
        self.order.append("hints")
        values = (ctx, layer, expert, score, int(Source.HINT), deadline)
        names = ("ctx", "layer", "expert", "score", "source", "deadline")
        self.seen["hints"].append(dict(zip(names, values, strict=True)))
        return [values]

    def table_words(self, table):
        return _TABLE_WORDS

    def _access(self, write, table, word, value):
        self.seen["table_requests"].append(
            {"write": write, "table": table, "word": word, "value": value}
        )

    def read_table(self, table, word):
        self._access(0, table, word, None)
        return self.tables.get((table, word), 0)

    def write_table(self, table, word, value):
        self._access(1, table, word, value)
        self.tables[table, word] = value

    def clear(self):
        pass

    def values(self):
        return []

    # Scheduler
    def demand(self, ctx, layer, experts, *, repeat):
        for index, expert in enumerate(experts):
            self._command(0, ctx, layer, expert, index, repeat)
        return []

    def _command(self, release, ctx, layer, expert, index, repeat, *, lock=0):
        names = ("release", "lock", "ctx", "layer", "expert", "index", "repeat")
        values = (release, lock, ctx, layer, expert, index, int(repeat))
        self.seen["commands"].append(dict(zip(names, values, strict=True)))

    def release(self, ctx, layer):
        self._command(1, ctx, layer, 0, 0, 0)

    def lock(self, ctx, layer, expert):
        self._command(0, ctx, layer, expert, 0, 0, lock=1)
        return []

    def unlock(self, ctx, layer, expert):
        self._command(1, ctx, layer, expert, 0, 0, lock=1)
        return []

    def wake(self, ctx):
        """Rescans are the scheduler's own."""

    def rescan(self):
        """See above."""

    def offer(self, candidates):
        pass

    # Buffer
    def read_beat(self, slot, beat):
        self.seen["reads"].append({"slot": slot, "beat": beat})
        return _beat(self.config, slot, beat)


class _Golden:
    def __init__(self, config):
        self.counters = GoldenCounters()
        self.recorder = _Recorder(config)
        self.registers = GoldenRegisterBank(
            config,
            self.counters,
            self.recorder,
            self.recorder.throttle,
            GoldenChannelCounters(config),
        )
        self.dispatcher = GoldenDispatcher(
            config,
            counters=self.counters,
            predictor=self.recorder,
            scheduler=self.recorder,
            buffer=self.recorder,
            registers=self.registers,
        )


class _Bench:
    """Clock, streams and the bench's own table and storage."""

    def __init__(self, dut, *, stall):
        self.dut = dut
        self.ports = Signals(dut)
        self.config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        self.messages = StreamSource(
            dut, "messages", MessageLayout(config=self.config, to_device=True), stall=stall
        )
        self.replies = StreamSink(
            dut, "replies", MessageLayout(config=self.config, to_device=False), stall=stall
        )
        self.sinks = {
            name: StreamSink(
                dut, name, RecordLayout(_RECORDS[name], config=self.config), stall=stall
            )
            for name in _OUTPUTS
        }
        self.sources = {
            name: StreamSource(
                dut, name, RecordLayout(_RECORDS[name], config=self.config), stall=stall
            )
            for name in ("ready", "events", "beats")
        }
        self.candidates = StreamSource(
            dut, "candidates", RecordLayout("Candidate", config=self.config)
        )
        self.table_values = StreamSource(dut, "table_values", 32, stall=stall)
        self.settings = StreamSink(
            dut, "settings", RecordLayout("ChannelSettings", config=self.config), stall=stall
        )
        self.drivers = [
            self.settings,
            self.messages,
            self.replies,
            self.candidates,
            self.table_values,
            *self.sinks.values(),
            *self.sources.values(),
        ]
        dut.engine_idle.value = 1
        self.tables = {}
        self.forget()
        cocotb.start_soon(self._watch_profiles())
        cocotb.start_soon(self._serve_tables())
        cocotb.start_soon(self._serve_reads())

    def forget(self):
        """Start afresh, as after a reset."""
        self.dma = GoldenSettings(self.config)
        self.commits = []  # Cycle of each,
        self.actives = []  # and each value of `active`, with the cycle from which it holds.
        self._sent = 0

    @property
    def active(self):
        """What holds of the active profile, by register."""
        fields = _ACTIVE.from_bits(self.ports.number("active"))
        fields = {name: fields[name] for name in _ACTIVE.members}
        control = fields.pop("prefetch_enable") | fields.pop("hint_enable") << 1
        return {"control": control, **fields}

    def active_at(self, cycle):
        """What held when a stream moved in this cycle."""
        return next(active for start, active in reversed(self.actives) if start < cycle)

    async def _watch_profiles(self):
        """Hand settings on as the DMA engine does, which has none to refuse."""
        bits = None
        while True:
            await FallingEdge(self.dut.clk)
            if self.ports.high("rst"):
                self.forget()
                continue
            if not self.actives or self.ports.bits("active") != bits:
                bits = self.ports.bits("active")
                self.actives.append((self.settings.cycle, self.active))
            for write in self.settings.received[self._sent :]:
                assert self.dma.write(write) is SettingsRefusal.NONE, write
            self._sent = len(self.settings.received)
            if self.ports.high("commit"):
                assert not self.settings.offers, "a channel comes too late"
                self.dma.commit(self.actives[-1][1]["dma_lower_credits"])
                self.commits.append(self.settings.cycle)

    async def _serve_tables(self):
        at = 0
        while True:
            await RisingEdge(self.dut.clk)
            received = self.sinks["table_requests"].received
            at = min(at, len(received))
            for request in received[at:]:
                place = (request["table"], request["word"])
                if request["write"]:
                    self.tables[place] = request["value"]
                else:
                    self.table_values.send(self.tables.get(place, 0))
            at = len(received)

    async def _serve_reads(self):
        at = 0
        while True:
            await RisingEdge(self.dut.clk)
            received = self.sinks["reads"].received
            at = min(at, len(received))
            for request in received[at:]:
                data, ok = _beat(self.config, request["slot"], request["beat"])
                self.sources["beats"].send({"data": data, "ok": ok})
            at = len(received)

    def send(self, code, body):
        size = len(self.messages._unpack(0)["body"])
        self.messages.send({"code": code, "body": body.ljust(size, b"\xa5")})

    def answers(self):
        """Replies so far as code and body of the right length."""
        result = []
        for reply in self.replies.received:
            length = message_by_code(reply["code"]).body_bytes(self.config)
            result.append((reply["code"], bytes(reply["body"][:length])))
        return result

    async def settle(self):
        """Wait until all that was sent is done."""
        await self.messages.sent()
        quiet, before = 0, None
        while quiet < 300:
            await RisingEdge(self.dut.clk)
            now = (len(self.replies.received), *(len(s.received) for s in self.sinks.values()))
            quiet = quiet + 1 if now == before else 0
            before = now

    def check(self, golden, *, injected=()):
        """Everything that came out equals what the golden model says."""
        for name, sink in self.sinks.items():
            expected = golden.recorder.seen[name]
            got = sink.received
            if name == "table_requests":
                # A read's value field means nothing.
                got = [{**g, "value": g["value"] if g["write"] else None} for g in got]
            assert got == expected, f"{name}: {got[-3:]} instead of {expected[-3:]}"
        # Sinks stall on their own, so that only streams that wait for each other keep this order.
        arrivals = [
            (cycle, name)
            for name in ("begin", "decisions", "hints")
            for cycle in self.sinks[name].arrival
        ]
        cycles_of = [cycle for cycle, _ in arrivals]
        assert len(set(cycles_of)) == len(cycles_of), "two of three streams moved together"
        assert [name for _, name in sorted(arrivals)] == golden.recorder.order
        profiles = golden.registers.profiles
        assert self.active == profiles.active
        assert self.dma.active == profiles.dma.active
        assert self.dma.lower_credits == profiles.dma.lower_credits
        outside = [answer for answer in self.answers() if answer in injected]
        assert sorted(outside) == sorted(injected)
        own = [answer for answer in self.answers() if answer not in injected]
        for number, (answer, wanted) in enumerate(zip(own, self.expected, strict=False)):
            assert answer == wanted, (number, own[number - 3 : number])
        assert len(own) == len(self.expected)

    expected: list = []


def _message(config, name, *values):
    return MESSAGES[name].code, MESSAGES[name].record.pack(config, *values)


def _shape(**fields):
    return sum(value << SHAPE_FIELDS[name][0] for name, value in fields.items())


def _profile_value(config, rng, name):
    """A value for a register of the profiles, often good."""
    if name in ("profile", "profile_select"):
        return rng.choice([*Phase, *Phase, *Phase, len(Phase), 256, rng.randrange(1 << 32)])
    if name == "dma_channel":
        return rng.choice([*range(config.dma_channels + 1), 1 << 31])
    if name == "dma_lower_credits":
        return rng.choice([*range(config.outstanding_bursts + 2), 32, 1 << 31])
    if name == "dma_shape":
        return _shape(
            enable=rng.random() < 0.8,
            traffic=rng.choice([*TrafficClass] * 5 + [3]),
            weight=rng.choice([*range(1, 16)] * 2 + [0]),
            credits=rng.choice([*range(1, config.outstanding_bursts + 1)] * 3 + [0, 17, 31]),
            burst_beats=rng.choice([1, 2, 4, 8, 16, 32, 64] * 3 + [0, 3, 128, 256, 257]),
        )
    if name in ("dma_row_bytes", "dma_row_stride"):
        beats = rng.randrange(1, config.tile_beats + 1)
        odd = [1, config.tile_bytes + config.data_bytes, 1 << 24, (1 << 32) - config.data_bytes]
        return rng.choice([0, *[beats * config.data_bytes] * 5, *odd])
    if name == "refusal":
        return 0
    odd = rng.random() < 0.1
    if name == "control":
        return rng.randrange(1 << 32 if odd else 64)
    if name == "prefetch_tiles":
        return rng.randrange(6)
    return rng.randrange(1 << 32 if odd else 256)


def _random_message(config, rng):
    """A message that is often wrong in one of the documented ways."""
    model = config.model
    wild = rng.random() < 0.15
    ctx = rng.randrange(config.contexts + 1 if wild else config.contexts)
    layer = rng.randrange(min(model.layers + 3, 256) if wild else model.layers)
    kind = rng.choices(
        ["BEGIN_TOKEN", "ROUTE", "RELEASE", "HINT", "READ", "SYNC", "REGISTER_READ",
         "REGISTER_WRITE", "TABLE_READ", "TABLE_WRITE", "LOCK", "UNKNOWN"],
        [4, 30, 25, 10, 3, 3, 14, 20, 4, 4, 6, 1],
    )[0]  # fmt: skip
    if kind == "BEGIN_TOKEN":
        # 4 and 6 would be PREFILL and VERIFY in the two bits that the predictor gets.
        phase = rng.choice([*Phase] * 4 + [3, 4, 6, rng.randrange(256)])
        return _message(config, kind, ctx, phase, rng.randrange(1 << 32))
    if kind == "ROUTE":
        experts = rng.sample(range(model.experts), model.top_k)
        if rng.random() < 0.1:
            experts[rng.randrange(model.top_k)] = rng.choice([model.experts, 65535, experts[0]])
        return _message(config, kind, ctx, layer, experts)
    if kind == "RELEASE":
        return _message(config, kind, ctx, layer)
    if kind == "LOCK":
        expert = rng.randrange(model.experts + 2 if wild else model.experts)
        return _message(config, kind, ctx, layer, expert, rng.randrange(2))
    if kind == "HINT":
        expert = rng.randrange(model.experts + 2 if wild else model.experts)
        return _message(config, kind, ctx, layer, expert, rng.randrange(256))
    if kind == "READ":
        slot = rng.randrange(config.slots + 1)
        beat = rng.choice([0, config.expert_beats - 3, rng.randrange(1 << 32)])
        return _message(config, kind, slot, beat, rng.randrange(5))
    if kind.startswith("TABLE"):
        # The bench's tables have 40 words.
        count = rng.choice([0, 1, 2, 3, 4, 5, 6, 9] if kind == "TABLE_READ" else [0, 1, 2, 3, 4, 5])
        last = _TABLE_WORDS - count
        word = rng.choice([0, max(0, last), last + 1, rng.randrange(40), 1 << 24, (1 << 32) - 1])
        words = [rng.randrange(1 << 32) for _ in range(TABLE_BURST)]
        values = (rng.randrange(256), word, count)
        return _message(config, kind, *values, *([words] if kind == "TABLE_WRITE" else []))
    if kind == "SYNC":
        return _message(config, kind, rng.randrange(65536))
    # The cycle count has no golden value; a clear of the counters would hide mistakes from the end.
    # While a decision waits, demands of the next one may go by: whether those were predicted is
    # then decided too early.
    registers = [
        r.address
        for r in REGISTERS
        if not r.name.startswith("cycles") and r.name != "demands_predicted"
    ]
    if kind == "REGISTER_READ":
        return _message(config, kind, rng.choice([*registers, 0x7FFF]))
    if kind == "REGISTER_WRITE":
        address = rng.choice([*registers, 0x7FFF])
        value = rng.randrange(1 << 32)
        if address == register_by_name("clear").address:
            value &= 3
        if address == register_by_name("hint_threshold").address:
            value &= 0x7F
        elif rng.random() < 0.8:
            # Mostly what the register holds, but for what its halves or numbers say.
            held = {register_by_name(n).address: b for n, (b, _) in refused_bits(config).items()}
            value &= ~held.get(address, 0)
        if rng.random() < 0.6:
            name = rng.choice([*PROFILE_REGISTERS, *_PROFILE_CHOICE, "profile"])
            address, value = register_by_name(name).address, _profile_value(config, rng, name)
        return _message(config, kind, address, value)
    return 0x33, b""


async def _read_counters(bench, golden, *, but=()):
    """Registers of all counters equal the golden model's."""
    seen = len(bench.replies.received)
    names = [r for r in REGISTERS if r.address >= 0x40 and r.name not in but]
    for register in names:
        bench.send(*_message(bench.config, "REGISTER_READ", register.address))
    await bench.settle()
    values = bench.answers()[seen:]
    for register, (code, body) in zip(names, values, strict=True):
        fields = RECORDS["RegisterValue"].unpack(bench.config, body)
        assert code == MESSAGES["REGISTER_VALUE"].code
        expected = golden.registers.read(register.address)
        assert fields == {"register": register.address, "value": expected}, register.name


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def random_messages(dut, stall):
    """Random messages, right and wrong, give the records and answers of the golden model."""
    bench = _Bench(dut, stall=Stall(stall, burst=(1, 8)))
    config, rng = bench.config, bench.random
    golden = _Golden(config)
    await reset(dut, drivers=bench.drivers)
    bench.expected = []
    injected = []
    wanted = {
        ErrorCode.BAD_CONTEXT,
        ErrorCode.BAD_LAYER,
        ErrorCode.BAD_EXPERT,
        ErrorCode.DUPLICATE_EXPERT,
        ErrorCode.UNRELEASED,
        ErrorCode.UNROUTED,
        ErrorCode.BAD_MESSAGE,
        ErrorCode.BAD_REGISTER,
        ErrorCode.BAD_READ,
        ErrorCode.HINT_PASSED,
        ErrorCode.BAD_TABLE,
    }
    rejected = set()
    count = 0
    while count < 600 or not rejected >= wanted or len(bench.commits) <= 2:
        count += 1
        assert count < 5000, (
            f"{len(bench.commits)} commits, nothing rejected with {wanted - rejected}"
        )
        code, body = _random_message(config, rng)
        bench.send(code, body)
        answers = golden.dispatcher.handle(code, body)
        rejected |= {ErrorCode(b[0]) for c, b in answers if c == MESSAGES["EVENT"].code}
        bench.expected += answers
        if rng.random() < 0.2:
            ready = [rng.randrange(1 << f.bits(config)) for f in RECORDS["Ready"].fields]
            names = [f.name for f in RECORDS["Ready"].fields]
            bench.sources["ready"].send(dict(zip(names, ready, strict=True)))
            injected.append(_message(config, "READY", *ready))
        if rng.random() < 0.1:
            event = {"code": 8, "ctx": 1, "layer": 2, "expert": 3, "address": rng.randrange(65536)}
            bench.sources["events"].send(event)
            injected.append(_message(config, "EVENT", *event.values()))
        if rng.random() < 0.1:
            await cycles(dut, rng.randrange(400))
    await bench.settle()
    bench.check(golden, injected=injected)
    await _read_counters(bench, golden, but=("demands_predicted",))
    hit("profiles.lockstep")
    hit("input.messages")
    assert golden.counters["routes"] > golden.counters["routes_out_of_order"] > 3
    hit("input.order")


@cocotb.test()
async def accuracy(dut):
    """Candidates are compared with the decision that follows."""
    bench = _Bench(dut, stall=0.2)
    config, rng = bench.config, bench.random
    golden = _Golden(config)
    await reset(dut, drivers=bench.drivers)
    model = config.model
    for token in range(6):
        for ctx in range(config.contexts):
            steps = [(0, _message(config, "BEGIN_TOKEN", ctx, 1, token))]
            for layer in range(model.layers):
                # Sometimes a layer is left out: the one after it then has no prediction. Sometimes
                # it is routed several times, as in a chunk of tokens.
                for _ in range(rng.choice((0, 1, 1, 1, 1, 3))):
                    experts = rng.sample(range(model.experts), model.top_k)
                    steps.append((layer + 1, _message(config, "ROUTE", ctx, layer, experts)))
                    steps.append((None, _message(config, "RELEASE", ctx, layer)))
            for following, (code, body) in steps:
                golden.recorder.plan = []
                if following is not None and following < model.layers:
                    some = rng.sample(range(model.experts), rng.randrange(model.experts))
                    for expert in some if following or token % 2 else ():
                        # Hints, layers farther away, and an expert twice do not count.
                        layer = following if rng.random() < 0.8 else model.layers - 1
                        source = rng.choice((Source.PREDICTOR, Source.PREDICTOR, Source.HINT))
                        golden.recorder.plan += rng.choice((1, 1, 2)) * [(layer, expert, source)]
                golden.dispatcher.handle(code, body)
                bench.send(code, body)
                await bench.settle()
                for layer, expert, source in golden.recorder.plan:
                    bench.candidates.send({
                        "ctx": ctx, "layer": layer, "expert": expert,
                        "score": 1, "source": int(source), "deadline": 0,
                    })  # fmt: skip
                await bench.candidates.sent()
    assert golden.counters["candidates"] > golden.counters["candidates_correct"] > 10
    assert golden.counters["demands_predicted"] > golden.counters["candidates_correct"]
    await _read_counters(bench, golden)


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def chunks(dut, stall):
    """Several tokens a layer: the stamp goes on with the layer, hints for it are late at once."""
    bench = _Bench(dut, stall=Stall(stall, burst=(1, 8)))
    config, rng, model = bench.config, bench.random, bench.config.model
    golden = _Golden(config)
    await reset(dut, drivers=bench.drivers)
    bench.expected = []

    def send(name, *values):
        message = _message(config, name, *values)
        bench.send(*message)
        bench.expected += golden.dispatcher.handle(*message)

    send("REGISTER_WRITE", register_by_name("control").address, 3)
    send("REGISTER_WRITE", register_by_name("hint_threshold").address, 0)
    tokens, starts = 3, 4
    for start in range(starts):
        send("BEGIN_TOKEN", 0, rng.choice((Phase.PREFILL, Phase.VERIFY)), start)
        for layer in range(model.layers):
            for _ in range(tokens):
                for wanted in (layer, model.layers - 1):
                    send("HINT", 0, wanted, rng.randrange(model.experts), 200)
                send("ROUTE", 0, layer, rng.sample(range(model.experts), model.top_k))
                send("RELEASE", 0, layer)
    await bench.settle()
    bench.check(golden)
    stamps = [decision["stamp"] for decision in bench.sinks["decisions"].received]
    layers = starts * model.layers
    assert stamps == [step + 1 for step in range(layers) for _ in range(tokens)]
    repeats = [c["repeat"] for c in bench.sinks["commands"].received if not c["release"]]
    once = [0] * model.top_k + [1] * (tokens - 1) * model.top_k
    assert repeats == once * layers
    # The last layer's hints are due when it is routed, however often the others were before.
    due = {h["deadline"] for h in bench.sinks["hints"].received if h["layer"] == model.layers - 1}
    assert due == {model.layers * (start + 1) for start in range(starts)}
    passed = [body for _, body in bench.expected if body[0] == ErrorCode.HINT_PASSED]
    # For the layer itself after its first route, and for the last layer once more.
    assert len(passed) == starts * (model.layers + 1) * (tokens - 1)


@cocotb.test()
async def waits_for_idle(dut):
    """Sync, clear and table accesses wait for the engine; nothing else does."""
    bench = _Bench(dut, stall=0.0)
    config = bench.config
    golden = _Golden(config)
    await reset(dut, drivers=bench.drivers)
    await cycles(dut, 600)
    dut.engine_idle.value = 0
    for step in (
        _message(config, "SYNC", 7),
        _message(config, "REGISTER_READ", register_by_name("table_data").address),
        _message(config, "TABLE_READ", 0, 3, 5),
        _message(config, "TABLE_WRITE", 0, 3, 2, (1, 2, 3, 4)),
        _message(config, "REGISTER_WRITE", register_by_name("clear").address, 7),
    ):
        before = len(bench.replies.received)
        bench.send(*step)
        bench.send(*_message(config, "REGISTER_READ", register_by_name("layers").address))
        await cycles(dut, 300)
        assert len(bench.replies.received) == before, step
        dut.engine_idle.value = 1
        await bench.settle()
        answers = bench.answers()[before:]
        golden.dispatcher.handle(*step)
        code, body = answers[-1]
        assert code == MESSAGES["REGISTER_VALUE"].code
        value = RECORDS["RegisterValue"].unpack(config, body)["value"]
        assert value == config.model.layers
        dut.engine_idle.value = 0


@cocotb.test()
async def reset_in_flight(dut):
    """After a reset at any moment the device starts afresh."""
    bench = _Bench(dut, stall=0.3)
    config, rng = bench.config, bench.random
    for _ in range(8):
        # A switch of profiles waits for a layer boundary while the engine is not idle.
        dut.engine_idle.value = rng.randrange(2)
        for _ in range(20):
            bench.send(*_random_message(config, rng))
        await cycles(dut, rng.randrange(30, 500))
        dut.engine_idle.value = 1
        await reset(dut, drivers=bench.drivers)
        golden = _Golden(config)
        bench.tables.clear()
        bench.expected = []
        for _ in range(15):
            code, body = _random_message(config, rng)
            bench.send(code, body)
            bench.expected += golden.dispatcher.handle(code, body)
        await bench.settle()
        bench.check(golden)
    hit("profiles.reset")


async def _register(bench, *names):
    """Value of a register, or a list of those of several."""
    before = len(bench.replies.received)
    for name in names:
        bench.send(*_message(bench.config, "REGISTER_READ", register_by_name(name).address))
    await bench.settle()
    values = [
        RECORDS["RegisterValue"].unpack(bench.config, body)["value"]
        for code, body in bench.answers()[before:]
        if code == MESSAGES["REGISTER_VALUE"].code
    ]
    assert len(values) == len(names)
    return values if len(names) > 1 else values[0]


async def _access(bench, *steps):
    """Registers that are read, by their names, in one go with writes of names and values."""
    before = len(bench.replies.received)
    for step in steps:
        if isinstance(step, str):
            bench.send(*_message(bench.config, "REGISTER_READ", register_by_name(step).address))
        else:
            _write(bench, *step)
    await bench.settle()
    return [
        RECORDS["RegisterValue"].unpack(bench.config, body)["value"]
        for _, body in bench.answers()[before:]
    ]


def _write(bench, name, value):
    message = _message(bench.config, "REGISTER_WRITE", register_by_name(name).address, value)
    bench.send(*message)


def _write_profiles(bench, golden, rng):
    """Give each profile settings of its own, which take no effect but in the active one."""
    for phase in Phase:
        writes = [("profile_select", phase)]
        for name in PROFILE_REGISTERS:
            if name == "rescan_ahead":
                writes.append((name, rng.randrange(bench.config.most_ahead + 1)))
            elif not name.startswith("dma_"):
                # Bit 5 of control, phases ask for their profiles, stays 0.
                most = {"budget": 8, "prefetch_tiles": 4}.get(name, 31)
                writes.append((name, rng.randrange(1, most + 1)))
        writes.append(("dma_lower_credits", rng.randrange(bench.config.outstanding_bursts + 1)))
        for channel in range(bench.config.dma_channels):
            beats = rng.randrange(1, bench.config.tile_beats + 1)
            shape = {
                "enable": 1,
                "traffic": rng.choice(list(TrafficClass)),
                "weight": rng.randrange(1, 16),
                "credits": rng.randrange(1, bench.config.outstanding_bursts + 1),
                "burst_beats": 1 << rng.randrange(6),
            }
            writes += [("dma_channel", channel), ("dma_shape", _shape(**shape))]
            writes += [("dma_row_bytes", beats * bench.config.data_bytes)]
            writes += [("dma_row_stride", beats * bench.config.data_bytes * 2)]
        for name, value in writes:
            _write(bench, name, value)
            golden.registers.write(register_by_name(name).address, value)


def _phase_of(own, active):
    """Whose profile is active."""
    (phase,) = [phase for phase, values in own.items() if values == active]
    return phase


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def boundaries(dut, stall):
    """While the engine is busy a profile becomes active at layer boundaries only, as a whole."""
    bench = _Bench(dut, stall=Stall(stall, burst=(1, 8)))
    config, rng, model = bench.config, bench.random, bench.config.model
    golden = _Golden(config)
    await reset(dut, drivers=bench.drivers)
    _write_profiles(bench, golden, rng)
    await bench.settle()
    assert golden.registers.profiles.active == bench.active
    assert bench.dma.active == GoldenSettings(config).active, "nothing was committed yet"
    hit("profiles.shadow")
    own = {phase: golden.registers.profiles.profiles[phase].own for phase in Phase}
    channels = {phase: golden.registers.profiles.profiles[phase].channels for phase in Phase}

    dut.engine_idle.value = 0
    await cycles(dut, 10)
    seen = {name: len(bench.sinks[name].received) for name in ("commands", "begin")}
    bench.commits.clear()
    asked = phase = Phase.DECODE
    pending = follow = False
    switches = 0
    tokens = Counter()  # Starts that asked for a profile, and that would have if they counted.
    expected = {"commands": [], "begin": []}  # Active phase with each.
    current = [None] * config.contexts
    for _ in range(150):
        kind = rng.choice(("BEGIN", "ROUTE", "ROUTE", "ROUTE", "AGAIN", "SWITCH", "EDIT", "FOLLOW"))
        ctx = rng.randrange(config.contexts)
        if kind == "SWITCH":
            asked, pending = rng.choice(list(Phase)), True
            _write(bench, "profile", asked)
        elif kind == "EDIT":
            # A write while a switch waits is part of it; channels only, since what else belongs to
            # the active profile holds at once.
            which = rng.choice(list(Phase))
            channel = rng.randrange(config.dma_channels)
            value = rng.randrange(1, config.tile_beats + 1) * config.data_bytes
            for name, number in (
                ("profile_select", which), ("dma_channel", channel), ("dma_row_bytes", value)
            ):  # fmt: skip
                _write(bench, name, number)
                golden.registers.write(register_by_name(name).address, number)
        elif kind == "FOLLOW":
            follow = not follow
            # Bits 0 and 1 belong to the profile that is selected: as they are.
            flags = own[golden.registers.profiles.selected]["control"]
            _write(bench, "control", follow << 5 | flags)
        elif kind == "BEGIN":
            token = rng.choice([*Phase, 3])
            if token != asked and token in list(Phase):
                tokens["follow" if follow else "ignored"] += 1
                if follow:
                    asked, pending = Phase(token), True
            # An unknown phase asks for nothing; a token's start is a boundary all the same.
            switches += pending
            phase, pending = (asked, False) if pending else (phase, False)
            bench.send(*_message(config, "BEGIN_TOKEN", ctx, token, 7))
            expected["begin"].append(phase)
            current[ctx] = None
        else:
            again = kind == "AGAIN" and current[ctx] is not None
            layer = current[ctx] if again else rng.randrange(model.layers)
            if layer != current[ctx]:
                switches += pending
                phase, pending = (asked, False) if pending else (phase, False)
            current[ctx] = layer
            bench.send(*_message(config, "ROUTE", ctx, layer, range(model.top_k)))
            bench.send(*_message(config, "RELEASE", ctx, layer))
            expected["commands"].append(phase)
        if rng.random() < 0.1:
            await cycles(dut, rng.randrange(200))
    await bench.settle()
    for name, phases in expected.items():
        sink = bench.sinks[name]
        moved = [
            (payload, cycle)
            for payload, cycle in zip(
                sink.received[seen[name] :], sink.arrival[seen[name] :], strict=True
            )
            if name == "begin" or (payload["index"] == 0 and not payload["release"])
        ]
        found = [_phase_of(own, bench.active_at(cycle)) for _, cycle in moved]
        assert found == phases, name
    assert len(bench.commits) == switches > 10
    hit("profiles.boundary")
    hit("profiles.follow", *tokens, of=("follow", "ignored"))
    if pending:
        phase = asked
    # Without a boundary a switch waits until the engine is idle.
    dut.engine_idle.value = 1
    await cycles(dut, 8)
    assert bench.active == own[phase]
    dut.engine_idle.value = 0
    await cycles(dut, 8)
    asked = rng.choice([each for each in Phase if each is not phase])
    _write(bench, "profile", asked)
    assert await _register(bench, "profile", "profile_active") == [asked, phase]
    # What is written meanwhile is part of it.
    channel = rng.randrange(config.dma_channels)
    stride = channels[asked][channel].row_stride + config.data_bytes
    for name, number in (
        ("profile_select", asked), ("dma_channel", channel), ("dma_row_stride", stride)
    ):  # fmt: skip
        _write(bench, name, number)
        golden.registers.write(register_by_name(name).address, number)
    await bench.settle()
    assert channels[asked][channel].row_stride == stride
    assert bench.active == own[phase]
    dut.engine_idle.value = 1
    await cycles(dut, 8)
    assert bench.active == own[asked]
    assert await _register(bench, "profile_active") == asked
    assert bench.dma.active == channels[asked]
    hit("profiles.edited")
    lower = own[asked]["dma_lower_credits"]
    assert bench.dma.lower_credits == (lower or config.lower_credits)
    # With nothing under way at once.
    _write(bench, "profile", phase)
    assert await _register(bench, "profile_active") == phase
    assert bench.active == own[phase]
    hit("profiles.idle")


@cocotb.test()
async def refusals(dut):
    """A write that makes no sense changes nothing, and the first one's reason stays."""
    bench = _Bench(dut, stall=0.2)
    config = bench.config
    golden = _Golden(config)
    await reset(dut, drivers=bench.drivers)
    good = {"enable": 1, "traffic": 1, "weight": 1, "credits": 1, "burst_beats": 1}
    credits = config.outstanding_bursts
    beat = config.data_bytes
    cases = [
        ("dma_channel", config.dma_channels, Refusal.CHANNEL),
        ("dma_channel", 1 << 31, Refusal.CHANNEL),
        ("dma_shape", _shape(**{**good, "traffic": 3}), Refusal.TRAFFIC),
        ("dma_shape", _shape(**{**good, "weight": 0}), Refusal.WEIGHT),
        ("dma_shape", _shape(**{**good, "burst_beats": 0}), Refusal.BURST),
        ("dma_shape", _shape(**{**good, "burst_beats": 3}), Refusal.BURST),
        ("dma_shape", _shape(**{**good, "burst_beats": 2 * config.longest_burst}), Refusal.BURST),
        ("dma_shape", _shape(**{**good, "credits": 0}), Refusal.CREDITS),
        ("dma_shape", _shape(**{**good, "credits": credits + 1}), Refusal.CREDITS),
        ("dma_shape", _shape(**{**good, "enable": 0}), Refusal.ENABLE),
        ("budget", 9, Refusal.BUDGET),
        ("budget", 1 << 31, Refusal.BUDGET),
        ("rescan_ahead", config.most_ahead + 1, Refusal.RESCAN),
        ("rescan_ahead", 1 << 31, Refusal.RESCAN),
        ("rescan_least", 0, Refusal.RESCAN),
        ("rescan_least", 256, Refusal.RESCAN),
        ("dma_lower_credits", credits + 1, Refusal.CREDITS),
        ("dma_lower_credits", 1 << 31, Refusal.CREDITS),
        ("dma_row_bytes", 1, Refusal.ROWS),
        ("dma_row_bytes", config.tile_bytes + beat, Refusal.ROWS),
        ("dma_row_stride", beat // 2, Refusal.ROWS),
        ("dma_row_stride", 1 << 24, Refusal.ROWS),
        ("profile", len(Phase), Refusal.PROFILE),
        ("profile_select", len(Phase), Refusal.PROFILE),
        ("profile_select", 1 << 31, Refusal.PROFILE),
        ("dma_shape", _shape(**good) | 1 << 1, Refusal.VALUE),
        ("dma_shape", _shape(**good) | 1 << 31, Refusal.VALUE),
        ("control", 1 << 6, Refusal.VALUE),
        ("clear", 1 << 4 | 7, Refusal.VALUE),
        ("hint_threshold", 256, Refusal.VALUE),
        ("prefetch_tiles", 0, Refusal.VALUE),
        ("prefetch_tiles", 5, Refusal.VALUE),
        ("prefetch_tiles", 9, Refusal.VALUE),
        ("predict_threshold", 256, Refusal.VALUE),
        ("predict_far_threshold", 1 << 31, Refusal.VALUE),
        ("predict_ahead", 300, Refusal.VALUE),
        ("cutoff_layer", 256, Refusal.VALUE),
        ("policy", 3, Refusal.VALUE),
        ("policy", 4, Refusal.VALUE),
        ("throttle", 1 << 23, Refusal.VALUE),
        ("throttle", 1 << 28, Refusal.VALUE),
        ("dma_timeout", 1, Refusal.VALUE),
        ("dma_timeout", 3, Refusal.VALUE),
        ("dma_timeout", 1 << 24, Refusal.VALUE),
        ("expert_base_low", beat // 2, Refusal.BASE),
        ("slot_base_low", 2048, Refusal.BASE),
        ("token_base_low", 2048, Refusal.BASE),
        ("part3_base_high", 1, Refusal.BASE),
    ]
    kept = (
        "profile_active",
        *(
            r.name
            for r in REGISTERS
            if r.access == "rw" and r.name not in ("refusal", "table_data")
        ),
    )
    # What the refused values would become if they were cut to the register's width is not there.
    for name, value in (("cutoff_layer", 7), ("predict_ahead", 5), ("hint_threshold", 9),
                        ("dma_timeout", 400), ("policy", 2), ("prefetch_tiles", 3)):  # fmt: skip
        _write(bench, name, value)
    before = await _register(bench, *kept)
    _write(bench, "dma_lower_credits", credits)
    assert await _register(bench, "refusal") == 0
    _write(bench, "dma_lower_credits", 0)
    bench.commits.clear()
    for name, value, reason in cases:
        fields = {"refused": 1, "register": register_by_name(name).address, "reason": reason}
        expected = sum(int(v) << REFUSAL_FIELDS[f][0] for f, v in fields.items())
        # What is refused later leaves it.
        later = ("profile", 99 if name != "profile" else 1 << 30)
        seen = await _access(bench, (name, value), "refusal", later, "refusal", *kept,
                             ("refusal", 0), "refusal")  # fmt: skip
        assert seen == [expected, expected, *before, 0], (name, value)
        golden.registers.write(register_by_name(name).address, value)
        assert golden.registers.read(register_by_name("refusal").address) == expected
        golden.registers.write(register_by_name("refusal").address, 0)
    # The greatest values that they do hold.
    held = {"control": 63, "hint_threshold": 255, "prefetch_tiles": 4, "predict_ahead": 255,
            "cutoff_layer": 255, "policy": 2, "throttle": 0x0F7F_FFFF,
            "dma_timeout": (1 << 24) - 1}  # fmt: skip
    seen = await _access(bench, *held.items(), *held, "refusal", ("dma_timeout", 4), "dma_timeout",
                         ("control", 1), "refusal")  # fmt: skip
    assert seen == [*held.values(), 0, 4, 0]
    before = await _register(bench, *kept)
    hit("profiles.refused")
    # The phase of a token counts only if it asks for a profile.
    bench.send(*_message(config, "BEGIN_TOKEN", 0, 77, 5))
    assert await _register(bench, "refusal") == 0
    _write(bench, "control", 1 | 1 << 5)
    bench.send(*_message(config, "BEGIN_TOKEN", 0, 3, 5))
    at = register_by_name("profile").address
    expected = 1 << 31 | at << 8 | Refusal.PROFILE
    assert await _register(bench, "refusal") == expected
    before[kept.index("control")] |= 1 << 5
    assert await _register(bench, *kept) == before
    assert not bench.commits
    # A token starts all the same, as one of decoding: not of what the low bits of 4, 5, 6 say.
    for phase in (4, 6, 255):
        bench.send(*_message(config, "BEGIN_TOKEN", 0, phase, 5))
    await bench.settle()
    phases = [token["phase"] for token in bench.sinks["begin"].received]
    assert phases == [Phase.DECODE] * 5
    hit("profiles.unknown_phase")


@cocotb.test()
async def bases(dut):
    """An array begins at a multiple of its step and ends below the top, or where it did before."""
    bench = _Bench(dut, stall=0.2)
    config, rng = bench.config, bench.random
    golden = _Golden(config)
    await reset(dut, drivers=bench.drivers)
    limits = base_limits(config)
    wide = config.address_bits > 32
    starts = dict(zip(BASES, config.part_bases(), strict=False))

    def halves(name, base):
        return (f"{name}_low", base & 0xFFFFFFFF), (f"{name}_high", base >> 32)

    async def try_base(name, base, *, fits):
        low, high = halves(name, base)
        seen = await _access(bench, low, high, low[0], high[0], "refusal", ("refusal", 0))
        for half, value in (low, high, ("refusal", 0)):
            golden.registers.write(register_by_name(half).address, value)
        if fits:
            starts[name] = base
        assert seen[0] | seen[1] << 32 == starts.get(name, 0), (name, hex(base))
        reason = seen[2] & 0xFF
        assert reason == (Refusal.NONE if fits else Refusal.BASE), (name, hex(base))

    sizes = dict(zip(BASES, config.part_bytes, strict=False))
    assert {*limits} == {*sizes, *(["slot_base"] if config.slot_store == "axi" else [])}
    top = 1 << config.address_bits
    for name in BASES:
        if name not in limits:
            await try_base(name, 0, fits=True)
            await try_base(name, 4096, fits=False)
            await try_base(name, 1 << 32, fits=False)
            continue
        step, most = limits[name]
        size = sizes.get(name, 0) * config.model.layers * config.model.experts
        size = size or config.slots * config.expert_bytes
        assert most + size <= top < most + step + size, "the array just ends below the top"
        for base in (most, most - step, step, 0, most):
            await try_base(name, base, fits=True)
        for base in (most + step, top - step, step // 2, most - step // 2):
            await try_base(name, base, fits=False)
        if wide:
            await try_base(name, top, fits=False)
        await try_base(name, step, fits=True)
    hit("profiles.bases")

    # Halves at random. The high one belongs to the low one before it.
    bench.expected = []
    before = len(bench.replies.received)

    def send(name, *values):
        message = _message(config, name, *values)
        bench.send(*message)
        bench.expected += golden.dispatcher.handle(*message)

    refused = 0
    for _ in range(250):
        name = rng.choice([*limits, *limits, *BASES])
        step, most = limits.get(name, (1, 0))
        base = rng.choice([0, step, most, most + step, rng.randrange(top), rng.randrange(top)])
        base -= base % step if rng.random() < 0.9 else 0
        both = halves(name, base)
        for half, value in both if rng.random() < 0.5 else [rng.choice(both)]:
            send("REGISTER_WRITE", register_by_name(half).address, value)
        for each in (*both, ("refusal", 0)):
            send("REGISTER_READ", register_by_name(each[0]).address)
        refused += bool(golden.registers.profiles.refusal)
        send("REGISTER_WRITE", register_by_name("refusal").address, 0)
    await bench.settle()
    assert bench.answers()[before:] == bench.expected
    assert 20 < refused < 230
    names = [name for name in limits if name in sizes]
    assert golden.registers.bases == [
        low | high << 32
        for name in names
        for low, high in [await _register(bench, f"{name}_low", f"{name}_high")]
    ]
    if wide:
        hit("profiles.base_halves")


@cocotb.test()
async def latency(dut):
    """A decision of k experts gives its first command k + 6 cycles after it was queued."""
    bench = _Bench(dut, stall=0.0)
    config = bench.config
    await reset(dut, drivers=bench.drivers)
    await cycles(dut, 600)
    start = bench.sinks["commands"].cycle
    bench.send(*_message(config, "ROUTE", 0, 0, range(config.model.top_k)))
    await bench.sinks["commands"].receive(1)
    assert bench.sinks["commands"].arrival[0] - start == config.model.top_k + 6

    async def time_of(name, *values, sink):
        """Cycles from a message to what comes of it."""
        await bench.settle()
        begun = sink.cycle
        bench.send(*_message(config, name, *values))
        before = len(sink.arrival)
        while len(sink.arrival) == before:
            await RisingEdge(dut.clk)
        return sink.arrival[-1] - begun

    def read(register):
        return time_of("REGISTER_READ", register_by_name(register).address, sink=bench.replies)

    usual = await read("policy")
    assert await read("predict_ahead") - usual == 2 + Profiles.latency - 1
    assert await read("dma_row_stride") - usual == 2 + Profiles.latency - 1
    # A switch waits: its rows are read again.
    dut.engine_idle.value = 0
    _write(bench, "profile", Phase.VERIFY)
    more = config.dma_channels + 2
    assert await read("predict_ahead") - usual == 2 + Profiles.latency - 1 + more
    _write(bench, "control", 1 | 1 << 5)
    begin = bench.sinks["begin"]
    same = await time_of("BEGIN_TOKEN", 0, Phase.VERIFY, 1, sink=begin)
    assert await time_of("BEGIN_TOKEN", 0, Phase.PREFILL, 1, sink=begin) - same == more + 1
    hit("profiles.latency")


_SHAPES = {
    "tiny": TINY_DEVICE,
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=5, experts=60, top_k=3),
        slots=21,
        expert_bytes=1536,
        parts=(1024, 512),
        slot_store="axi",
        contexts=3,
        data_bytes=8,
        predictor="none",
    ),
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_dispatcher(shape):
    config = _SHAPES[shape]
    run_bench(
        lambda: FrontEnd(config=config),
        module=__file__,
        name="front_end",
        parameters={"config": config},
    )
