# amaranth: UnusedElaboratable=no
"""The whole device against the golden model, over real link bytes.

::

    host ─▶ rx ┌─────┐ bus ─▶ AXI4 memory that holds the experts
    host ◀─ tx │ Top │
               └─────┘ beats ─▶ consumer, which compares bytes with the memory
"""

import random
import zlib
from collections import Counter
from pathlib import Path

import cocotb
import pytest

from prestage_hw.contract import (
    MESSAGES,
    RECORDS,
    REGISTERS,
    DeviceConfig,
    ModelConfig,
)
from prestage_hw.contract.crc import CHECKSUM_TABLE
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.pattern import expert_memory
from prestage_hw.contract.perceptron import perceptron_form
from prestage_hw.contract.records import (
    NO_TOKEN,
    TABLE_BURST,
    ErrorCode,
    Phase,
    Policy,
    PrefetchOutcome,
    Refusal,
    TrafficClass,
)
from prestage_hw.contract.registers import (
    CHANNEL_COUNTERS,
    COUNTERS,
    SHAPE_FIELDS,
    THROTTLE_FIELDS,
    register_by_name,
)
from prestage_hw.contract.statistics import OUTCOME_BITS, STATISTICS_TABLE
from prestage_hw.layouts import RecordLayout
from prestage_hw.top import Top
from prestage_sim.model.top import Top as GoldenTop
from prestage_sim.traces import load_trace
from prestage_tb.axi import DECERR, SLVERR, AXIMemory, AXIWriteMemory
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
from prestage_tb.host import LinkHost

_ROOT = Path(__file__).resolve().parents[1]
_ACKNOWLEDGE_EVERY = 8

#: Registers that hang on time.
_TIMES = ("cycles_low", "cycles_high", "layer_time", "tile_time", "channel_busy", "channel_stall")


class _Host(LinkHost):
    """Host that waits for answers one after the other."""

    def clear(self):
        super().clear()
        self._parsed = 0

    async def wait(self, dut, *, until, limit=200_000):
        """Wait for an answer with the code ``until``; returns all answers since the last wait."""
        for _ in range(limit // 16):
            self.poll()
            fresh = self.answers[self._parsed :]
            if any(code == until for code, _ in fresh):
                self._parsed = len(self.answers)
                return fresh
            await cycles(dut, 16)
        raise AssertionError(f"No answer {until:#x} within {limit} cycles")


class _Bench:
    def __init__(self, dut, *, stall=0.0, latency=20):
        values = parameters()
        self.dut = dut
        self.config = values["config"]
        self.trace = values.get("trace")
        self.random = random.Random(cocotb.RANDOM_SEED)
        self.image = expert_memory(self.config)
        start_clock(dut)
        self.host = _Host(dut, self.config, stall=stall)
        self.drivers = [self.host.rx, self.host.tx]
        self.slots = None
        if self.config.slot_store == "internal":
            # Consumer ports, one a bank.
            count = self.config.replicas
            banks = [f"__{bank}" for bank in range(count)] if count > 1 else [""]
            request, beat = (
                RecordLayout(name, config=self.config) for name in ("ReadRequest", "Beat")
            )
            self.reads = [StreamSource(dut, f"reads{at}", request, stall=stall) for at in banks]
            self.beats = [StreamSink(dut, f"beats{at}", beat, stall=stall) for at in banks]
            self.drivers += [*self.reads, *self.beats]
        else:
            self.slots = AXIWriteMemory(
                dut,
                "slot_bus",
                data_bytes=self.config.data_bytes,
                # Longer than a Ready takes to the host.
                latency=200,
                address_stall=stall,
                data_stall=stall,
                answer_stall=stall,
                outstanding=16,
                burst_beats=16,
            )
            self.slot_base = 0
            cocotb.start_soon(self._watch_slots())
        self.memory = AXIMemory(
            dut,
            data=lambda address, size: self.image[address : address + size].tobytes(),
            data_bytes=self.config.data_bytes,
            address_bits=self.config.address_bits,
            latency=latency,
            address_stall=stall,
            data_stall=stall,
            outstanding=self.config.outstanding_bursts,
            burst_beats=self.config.burst_beats,
        )

    async def reset(self):
        self.host.clear()
        await reset(self.dut, drivers=self.drivers)
        self.host.clear()

    def _check_slot(self, ready):
        """Every byte of a slot in memory is the expert's."""
        size = self.config.data_bytes
        start = self.slot_base + ready["slot"] * self.config.expert_bytes
        data = b"".join(
            self.slots.words[at].to_bytes(size, "little")
            for at in range(start, start + self.config.layer_sizes[ready["layer"]], size)
        )
        spans = self.config.expert_spans(ready["layer"], ready["expert"])
        whole = b"".join(self.image[at : at + length].tobytes() for at, length in spans)
        assert data == whole, ready

    async def _watch_slots(self):
        """Check every Ready as soon as it has come, long before a late write would be done."""
        seen, answers = 0, None
        while True:
            await cycles(self.dut, 4)
            self.host.poll()
            if self.host.answers is not answers:
                seen, answers = 0, self.host.answers
            for ready in self.readies(answers[seen:]):
                self._check_slot(ready)
            seen = len(answers)

    async def check_bytes(self, readies):
        """Every byte of the slots is the expert's."""
        beats = self.config.expert_beats
        for ready in readies:
            if self.slots is not None:
                self._check_slot(ready)
                continue
            bank = ready["slot"] % self.config.replicas
            for beat in range(beats):
                self.reads[bank].send({"slot": ready["slot"], "beat": beat})
            got = await self.beats[bank].receive(beats)
            # Behind the end of an expert that is shorter than its slot nothing is ever valid.
            own = self.config.layer_sizes[ready["layer"]] // self.config.data_bytes
            assert [beat["ok"] for beat in got] == [at < own for at in range(beats)], ready
            data = b"".join(bytes(beat["data"]) for beat in got[:own])
            spans = self.config.expert_spans(ready["layer"], ready["expert"])
            whole = b"".join(self.image[start : start + size].tobytes() for start, size in spans)
            assert data == whole, ready

    async def check_copies(self, copies):
        """Read all copies of an expert at once, each through the port of its bank."""
        beats = self.config.expert_beats
        if self.slots is not None:
            await self.check_bytes(copies)
            return
        for beat in range(beats):
            for copy in copies:
                bank = copy["slot"] % self.config.replicas
                self.reads[bank].send({"slot": copy["slot"], "beat": beat})
        cycles = []
        for copy in copies:
            bank = copy["slot"] % self.config.replicas
            got = await self.beats[bank].receive(beats)
            assert all(beat["ok"] for beat in got), copy
            data = b"".join(bytes(beat["data"]) for beat in got)
            spans = self.config.expert_spans(copy["layer"], copy["expert"])
            whole = b"".join(self.image[start : start + size].tobytes() for start, size in spans)
            assert data == whole, copy
            cycles.append(self.beats[bank].arrival[-beats:])
        return cycles

    def records(self, answers, message):
        """Records of all answers that are such a message."""
        record = MESSAGES[message].record
        code = MESSAGES[message].code
        return [record.unpack(self.config, body) for at, body in answers if at == code]

    def readies(self, answers):
        return self.records(answers, "READY")

    async def drained(self, golden, name, *values):
        """One message on an idle device; its answers must be the golden model's, in any order."""
        message = self.host.post(name, *values)
        self.host.post("SYNC", 1)
        answers = await self.host.wait(self.dut, until=MESSAGES["SYNCED"].code)
        assert answers.pop() == (
            MESSAGES["SYNCED"].code,
            RECORDS["Synced"].pack(self.config, 1),
        )
        expected = golden.handle(*message)
        assert Counter(answers) == Counter(expected), (name, values, answers, expected)
        return answers

    async def compare_registers(self, golden):
        """All counters and all writable registers equal the golden model's."""
        for register in REGISTERS:
            if register.name not in ("table_data", *_TIMES):
                await self.drained(golden, "REGISTER_READ", register.address)
        selected = register_by_name("dma_channel").address
        for channel in range(self.config.dma_channels):
            await self.drained(golden, "REGISTER_WRITE", selected, channel)
            for name in (f"channel_{counter}" for counter in CHANNEL_COUNTERS):
                if name not in _TIMES:
                    address = register_by_name(name).address
                    await self.drained(golden, "REGISTER_READ", address)

    async def compare_tables(self, golden):
        """All words of all tables equal the golden model's."""
        table = 0
        while words := golden.predictor.table_words(table):
            # A few at a time: the device keeps at most a replay memory of unacknowledged answers.
            step = _ACKNOWLEDGE_EVERY * TABLE_BURST - 1
            for start in range(0, words, step):
                count = min(step, words - start)
                await self.drained(golden, "TABLE_READ", table, start, count)
            table += 1
        assert await self.drained(golden, "TABLE_READ", table, 0, 1)

    async def compare_statistics(self, golden):
        """What became of prefetches equals the golden model's, and adds up to the counters."""
        words = golden.scheduler.statistics.words
        step = _ACKNOWLEDGE_EVERY * TABLE_BURST - 1
        for start in range(0, words, step):
            count = min(step, words - start)
            await self.drained(golden, "TABLE_READ", STATISTICS_TABLE, start, count)
        await self.drained(golden, "TABLE_READ", STATISTICS_TABLE, words - 1, 2)
        # It can't be written.
        values = [9] * TABLE_BURST
        await self.drained(golden, "TABLE_WRITE", STATISTICS_TABLE, 0, TABLE_BURST, values)
        await self.drained(golden, "TABLE_READ", STATISTICS_TABLE, 0, TABLE_BURST)
        counts = [golden.scheduler.statistics.read(word) for word in range(words)]
        for name, outcome in (
            ("prefetch_issued", PrefetchOutcome.ISSUED),
            ("useful", PrefetchOutcome.USEFUL),
            ("pollution", PrefetchOutcome.POLLUTING),
        ):
            total = sum(counts[outcome :: 1 << OUTCOME_BITS])
            assert total == golden.counters[name], (name, total)


def _decisions(bench, tokens):
    """Layers' choices, token by token: from the trace if there is one, else random with reuse."""
    model, rng = bench.config.model, bench.random
    if bench.trace is not None:
        experts = load_trace(Path(bench.trace["path"])).experts
        start = rng.randrange(len(experts) - tokens)
        yield from experts[start : start + tokens].tolist()
        return
    favourites = [rng.sample(range(model.experts), model.top_k) for _ in range(model.layers)]
    for _ in range(tokens):
        chosen = []
        for layer in range(model.layers):
            if rng.random() < 0.5:
                favourites[layer] = rng.sample(range(model.experts), model.top_k)
            chosen.append(rng.sample(favourites[layer], model.top_k))
        yield chosen


async def _settle(bench, golden, *, policy, hints=False):
    """Choose how to evict and whether to throttle, and let candidates wait until the predictor is
    at rest.
    """
    weights = sum(
        value << THROTTLE_FIELDS[name][0]
        for name, value in (("useful", 15), ("price", 1), ("pollution", 2), ("floor", 5))
    )
    throttle = bench.random.random() < 0.6
    control = 1 | hints << 1 | 1 << 2 | throttle << 3 | 1 << 4
    for name, value in (("control", control), ("throttle", weights), ("policy", policy)):
        await bench.drained(golden, "REGISTER_WRITE", register_by_name(name).address, value)


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3], policy=list(Policy))
async def drained_pace(dut, stall, policy):
    """At drained pace every answer, byte and counter is the golden model's."""
    bench = _Bench(dut, stall=Stall(stall, burst=(1, 6)))
    config, rng = bench.config, bench.random
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    await _settle(bench, golden, policy=policy)
    tokens = bench.trace["tokens"] if bench.trace else 10
    for token, layers in enumerate(_decisions(bench, tokens)):
        ctx = rng.randrange(config.contexts)
        await bench.drained(golden, "BEGIN_TOKEN", ctx, 1, token)
        for layer, experts in enumerate(layers):
            answers = await bench.drained(golden, "ROUTE", ctx, layer, experts)
            if rng.random() < 0.3:
                await bench.check_bytes(bench.readies(answers))
            await bench.drained(golden, "RELEASE", ctx, layer)
    assert golden.counters["fills"] > 0
    await bench.compare_registers(golden)
    await bench.compare_statistics(golden)
    # They go with the counters.
    await bench.drained(golden, "REGISTER_WRITE", register_by_name("clear").address, 4)
    await bench.compare_statistics(golden)


@cocotb.test()
async def chunks(dut):
    """Several tokens a layer, as in prefill and verify, with hints for layers to come."""
    bench = _Bench(dut, stall=0.1)
    config, rng, model = bench.config, bench.random, bench.config.model
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    await _settle(bench, golden, policy=rng.choice(list(Policy)), hints=True)
    for token, layers in enumerate(_decisions(bench, 6)):
        ctx = rng.randrange(config.contexts)
        phase = rng.choice((Phase.PREFILL, Phase.VERIFY))
        await bench.drained(golden, "BEGIN_TOKEN", ctx, phase, NO_TOKEN if token % 2 else token)
        for layer, experts in enumerate(layers):
            for _ in range(rng.randrange(1, 4)):
                shift = rng.randrange(model.experts)
                for wanted in range(layer + 1, model.layers):
                    if rng.random() < 0.3:
                        expert = rng.randrange(model.experts)
                        await bench.drained(golden, "HINT", ctx, wanted, expert, 255)
                mine = [(expert + shift) % model.experts for expert in experts]
                answers = await bench.drained(golden, "ROUTE", ctx, layer, mine)
                await bench.check_bytes(bench.readies(answers)[:1])
                await bench.drained(golden, "RELEASE", ctx, layer)
    assert golden.counters["hints"] > 5
    assert golden.counters["prefetch_stale"] == 0
    await bench.compare_registers(golden)
    await bench.compare_statistics(golden)
    if model.layers * model.experts * config.successors <= 1024:
        await bench.compare_tables(golden)


@cocotb.test()
async def hints_and_errors(dut):
    """Hints, memory errors and full buffers at drained pace agree with the golden model."""
    bench = _Bench(dut, stall=0.1)
    config, rng, model = bench.config, bench.random, bench.config.model
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    bad = {(rng.randrange(model.layers), rng.randrange(model.experts)) for _ in range(6)}
    for layer, expert in bad:
        # The second beat from the end, so that the failing burst isn't the first one.
        start, size = config.expert_spans(layer, expert)[-1]
        address = start + size - config.data_bytes * 2
        bench.memory.failing.append((address, address + config.data_bytes, SLVERR))
        golden.memory.failing.append((address, address + config.data_bytes))
    control = register_by_name("control").address
    await bench.drained(golden, "REGISTER_WRITE", control, 7)
    codes = Counter()
    held = []
    for token, layers in enumerate(_decisions(bench, 8)):
        for ctx in range(config.contexts):
            await bench.drained(golden, "BEGIN_TOKEN", ctx, 1, token)
        for layer, experts in enumerate(layers):
            for ctx in range(config.contexts):
                wanted = rng.randrange(layer, model.layers)
                expert = rng.randrange(model.experts)
                score = rng.randrange(256)
                await bench.drained(golden, "HINT", ctx, wanted, expert, score)
                mine = [(expert + ctx) % model.experts for expert in experts]
                answers = await bench.drained(golden, "ROUTE", ctx, layer, mine)
                codes.update(body[0] for code, body in answers if code == MESSAGES["EVENT"].code)
                held.append((ctx, layer))
            # Layers are released late, so that slots run out now and then.
            while held and rng.random() < 0.5:
                await bench.drained(golden, "RELEASE", *held.pop(rng.randrange(len(held))))
        while held:
            await bench.drained(golden, "RELEASE", *held.pop())
    await bench.compare_registers(golden)
    assert codes[ErrorCode.BUS] and codes[ErrorCode.NO_SLOT], codes


@cocotb.test()
@cocotb.parametrize(how=["timeout", "abort"])
async def memory_falls_silent(dut, how):
    """Every demand ends in an error that names its address, and can be repeated."""
    bench = _Bench(dut, stall=0.1)
    config, host, k = bench.config, bench.host, bench.config.model.top_k
    await bench.reset()

    def write(name, value):
        host.post("REGISTER_WRITE", register_by_name(name).address, value)

    async def read(name):
        host.post("REGISTER_READ", register_by_name(name).address)
        (*_, (_, body)) = await host.wait(dut, until=MESSAGES["REGISTER_VALUE"].code)
        return RECORDS["RegisterValue"].unpack(config, body)["value"]

    async def answers(name):
        found = []
        while len(found) < k:
            codes = await host.wait(dut, until=MESSAGES[name].code)
            assert {code for code, _ in codes} == {MESSAGES[name].code}, codes
            found += [RECORDS[MESSAGES[name].record.name].unpack(config, body) for _, body in codes]
        return found

    write("control", 0)
    write("dma_timeout", 3)
    assert await read("dma_timeout") == 0, "no time-out is so short"
    write("dma_timeout", 300 if how == "timeout" else 0)
    layer, experts = 1, bench.random.sample(range(config.model.experts), k)
    bench.memory.silent.append((0, 1 << config.address_bits))
    host.post("BEGIN_TOKEN", 0, Phase.DECODE, 5)
    host.post("ROUTE", 0, layer, experts)
    if how == "abort":
        await cycles(dut, 3000)
        host.poll()
        assert not bench.readies(host.answers), "the memory is silent"
        write("dma_abort", 1)
        await cycles(dut, 500)
        bench.memory.silent.clear()  # What is on the bus has to come before tiles can end.
    events = await answers("EVENT")
    code = ErrorCode.TIMEOUT if how == "timeout" else ErrorCode.ABORTED
    assert {event["code"] for event in events} == {code}
    assert sorted(event["expert"] for event in events) == sorted(experts)
    for event in events:
        spans = config.expert_spans(layer, event["expert"])
        assert any(start <= event["address"] < start + size for start, size in spans), event
    assert await read("fill_errors") == k
    # Of an expert no tile is asked for after one has failed.
    name = "channel_errors" if how == "timeout" else "channel_aborted"
    assert k <= await read(name) <= k * config.tiles

    bench.memory.silent.clear()
    host.post("RELEASE", 0, layer)
    host.post("ROUTE", 0, layer, experts)
    readies = await answers("READY")
    await bench.check_bytes(readies)
    assert await read("channel_tiles") >= k * config.tiles
    assert await read("channel_busy") > 300
    hit("dma.host_timeout" if how == "timeout" else "dma.host_abort")


def _profile_writes(bench, phase):
    """Register writes that give a phase's profile settings at random, all of which make sense."""
    config, rng = bench.config, bench.random
    writes = [
        ("profile_select", phase),
        ("predict_threshold", rng.randrange(160)),
        ("predict_far_threshold", rng.randrange(256)),
        ("predict_ahead", rng.randrange(config.model.layers + 1)),
        ("prefetch_tiles", rng.randrange(1, 5)),
        # No effect at drained pace.
        ("budget", rng.randrange(9)),
        ("rescan_ahead", rng.randrange(config.most_ahead + 1)),
        ("rescan_least", rng.choice([1, 24, rng.randrange(1, 256)])),
        ("cutoff_layer", rng.choice([255, rng.randrange(config.model.layers + 1)])),
        ("dma_lower_credits", rng.randrange(config.outstanding_bursts + 1)),
    ]
    for channel in range(config.dma_channels):
        shape = {
            "enable": channel in config.scheduled_channels or rng.random() < 0.5,
            "traffic": rng.choice(list(TrafficClass)),
            "weight": rng.randrange(1, 16),
            "credits": rng.randrange(1, config.outstanding_bursts + 1),
            # Shorter ones only take time.
            "burst_beats": 1 << rng.randrange(2, config.longest_burst.bit_length()),
        }
        value = sum(int(number) << SHAPE_FIELDS[name][0] for name, number in shape.items())
        writes += [("dma_channel", channel), ("dma_shape", value)]
    return [(register_by_name(name).address, value) for name, value in writes]


@cocotb.test()
@cocotb.parametrize(policy=[Policy.LRU, Policy.NEXT_USE])
async def profiles_drained(dut, policy):
    """Profiles are switched between messages; every answer and counter is the golden model's."""
    bench = _Bench(dut, stall=Stall(0.2, burst=(1, 6)))
    config, rng, model = bench.config, bench.random, bench.config.model
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    for _ in range(4):
        # Which burst fails hangs on how long they are.
        layer, expert = rng.randrange(model.layers), rng.randrange(model.experts)
        # In the last tile: good ones behind a tile that fails count for their channel in the RTL,
        # but are never read in the model.
        address = config.expert_address(layer, expert) + rng.randrange(
            config.layer_sizes[layer] - config.tile_bytes,
            config.layer_sizes[layer],
            config.data_bytes,
        )
        # Other policies look first at the slot that a failing fetch frees, which hangs on time.
        if policy is Policy.LRU:
            bench.memory.failing.append((address, address + config.data_bytes, SLVERR))
            golden.memory.failing.append((address, address + config.data_bytes))

    async def write(name, value):
        await bench.drained(golden, "REGISTER_WRITE", register_by_name(name).address, value)

    await _settle(bench, golden, policy=policy, hints=True)
    control = golden.registers["control"]
    for phase in Phase:
        for address, value in _profile_writes(bench, phase):
            await bench.drained(golden, "REGISTER_WRITE", address, value)
        await write("control", control & ~3 | (1 if phase is Phase.PREFILL else 3))
    await bench.compare_registers(golden)
    switched = Counter()
    for token, layers in enumerate(_decisions(bench, 8)):
        ctx = rng.randrange(config.contexts)
        if token == 4:
            # From now on the phase asks for its profile.
            await write("control", golden.registers["control"] | 1 << 5)
        await bench.drained(golden, "BEGIN_TOKEN", ctx, rng.choice(list(Phase)), token)
        for layer, experts in enumerate(layers):
            switched[golden.registers.profiles.phase] += 1
            for wanted in range(layer, model.layers):
                if wanted == layer or rng.random() < 0.4:
                    expert = rng.randrange(model.experts)
                    await bench.drained(golden, "HINT", ctx, wanted, expert, 255)
            answers = await bench.drained(golden, "ROUTE", ctx, layer, experts)
            if rng.random() < 0.5:
                await bench.check_bytes(bench.readies(answers)[:1])
            if rng.random() < 0.4:
                await write("profile", rng.choice(list(Phase)))
            await bench.drained(golden, "RELEASE", ctx, layer)
    assert len(switched) == len(Phase), switched
    assert golden.counters["hints"] > 2
    await bench.compare_registers(golden)
    hit("profiles.drained")


@cocotb.test()
@cocotb.parametrize(policy=list(Policy))
async def rescans_drained(dut, policy):
    """What the buffer's values say is prefetched; every answer, byte and counter is the model's."""
    bench = _Bench(dut, stall=Stall(0.2, burst=(1, 6)))
    config, rng, model = bench.config, bench.random, bench.config.model
    golden = GoldenTop(config, bench.image)
    await bench.reset()

    async def write(name, value):
        await bench.drained(golden, "REGISTER_WRITE", register_by_name(name).address, value)

    # What makes no sense is refused, and so is all where there are no values.
    for name, value in (
        ("rescan_ahead", config.most_ahead + 1),
        ("rescan_ahead", 1 << 7),
        ("rescan_least", 0),
        ("rescan_least", 256),
    ):
        await write(name, value)
        refusal = golden.registers.read(register_by_name("refusal").address)
        assert refusal & 0xFF == Refusal.RESCAN, (name, value)
        await bench.drained(golden, "REGISTER_READ", register_by_name("refusal").address)
        await write("refusal", 0)
    await bench.compare_registers(golden)
    if not config.gives_values:
        # The least that a device with values takes was refused.
        hit("scheduler.rescans_device", "no values", of=(*Policy, "refused", "no values"))
        return
    await _settle(bench, golden, policy=policy, hints=True)
    found = Counter()
    for token, layers in enumerate(_decisions(bench, 10)):
        if token % 3 == 0:
            ahead = rng.randrange(1, config.most_ahead + 1) if token else config.most_ahead
            await write("rescan_ahead", ahead)
            await write("rescan_least", rng.choice([1, 24, 100]))
        for ctx in range(config.contexts):
            await bench.drained(golden, "BEGIN_TOKEN", ctx, Phase.DECODE, token % 3)
        for layer, experts in enumerate(layers):
            for ctx in range(config.contexts):
                if rng.random() < 0.3 and layer + 1 < model.layers:
                    expert = rng.randrange(model.experts)
                    await bench.drained(golden, "HINT", ctx, layer + 1, expert, 255)
                mine = [(expert + ctx) % model.experts for expert in experts]
                before = golden.counters["prefetch_issued"]
                answers = await bench.drained(golden, "ROUTE", ctx, layer, mine)
                found["route"] += golden.counters["prefetch_issued"] - before
                if rng.random() < 0.2:
                    await bench.check_bytes(bench.readies(answers))
                before = golden.counters["prefetch_issued"]
                await bench.drained(golden, "RELEASE", ctx, layer)
                found["release"] += golden.counters["prefetch_issued"] - before
    assert found["route"] > 5, found
    await bench.compare_registers(golden)
    await bench.compare_statistics(golden)
    # A cleared buffer has no values left.
    await write("clear", 2)
    await write("rescan_ahead", 0)
    await bench.compare_registers(golden)
    hit("scheduler.rescans_device", policy, "refused", of=(*Policy, "refused", "no values"))


@cocotb.test()
@cocotb.parametrize(policy=[Policy.LRU, Policy.NEXT_USE])
async def locks_drained(dut, policy):
    """Locked experts stay, whatever else is fetched; every answer and counter is the model's."""
    bench = _Bench(dut, stall=0.1)
    config, rng = bench.config, bench.random
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    await _settle(bench, golden, policy=policy)
    if policy is Policy.LRU:
        # Other policies look first at the slot that a failing fetch frees, which hangs on time.
        # Its last beat: good tiles behind a bad one count for their channel in the RTL alone.
        address = config.expert_address(1, 1) + config.layer_sizes[1] - config.data_bytes
        bench.memory.failing.append((address, address + config.data_bytes, SLVERR))
        golden.memory.failing.append((address, address + config.data_bytes))
        # A lock that fails is none.
        for lock, code in ((1, ErrorCode.BUS), (0, ErrorCode.NOT_LOCKED)):
            answers = await bench.drained(golden, "LOCK", 0, 1, 1, lock)
            assert [body[0] for _, body in answers] == [code]
    # Locking twice is no error.
    for lock in (1, 1, 0):
        assert len(await bench.drained(golden, "LOCK", 0, 0, 0, lock)) == lock
    locked = {}
    codes = Counter()
    for token, layers in enumerate(_decisions(bench, 6)):
        await bench.drained(golden, "BEGIN_TOKEN", 0, Phase.DECODE, token)
        for layer, experts in enumerate(layers):
            for _ in range(2):
                # Few experts, so that those come that are locked, or demanded, already.
                at, expert = rng.choice([(1, 2), (layer, rng.randrange(4)), (layer, experts[0])])
                lock = int(rng.random() < 0.6)
                answers = await bench.drained(golden, "LOCK", 0, at, expert, lock)
                for ready in bench.readies(answers):
                    locked[at, expert] = ready
                events = [body[0] for code, body in answers if code == MESSAGES["EVENT"].code]
                codes.update(events)
                if not lock and not events:
                    del locked[at, expert]
            answers = await bench.drained(golden, "ROUTE", 0, layer, experts)
            for ready in bench.readies(answers):
                held = locked.get((layer, ready["expert"]))
                assert held is None or held["slot"] == ready["slot"], (held, ready)
            await bench.drained(golden, "RELEASE", 0, layer)
        await bench.check_bytes(list(locked.values()))
    counters = golden.counters
    assert counters["locks"] > counters["lock_misses"] > 0, counters
    assert codes[ErrorCode.NOT_LOCKED] and codes[ErrorCode.NO_SLOT], codes
    await bench.compare_registers(golden)
    hit("scheduler.locks", policy, of=(Policy.LRU, Policy.NEXT_USE))


@cocotb.test()
@cocotb.parametrize(policy=[Policy.LRU, Policy.NEXT_USE])
async def copies_drained(dut, policy):
    """Copies come and go, and some never come; every answer, byte and counter is the model's."""
    bench = _Bench(dut, stall=0.1)
    config, rng, model = bench.config, bench.random, bench.config.model
    if config.replicas == 1:
        return
    most = config.replicas
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    await _settle(bench, golden, policy=policy)
    # An expert that can never be read, and one of which a later copy can't.
    address = config.expert_address(1, 1) + config.expert_bytes - config.data_bytes
    bad = (address, address + config.data_bytes)

    async def replicate(layer, expert, copies):
        answers = await bench.drained(golden, "REPLICATE", 0, layer, expert, copies)
        golden.buffer.check_invariants()
        found = bench.records(answers, "COPY")
        events = [ErrorCode(event["code"]) for event in bench.records(answers, "EVENT")]
        assert len(answers) == len(found) + len(events)
        banks = {copy["slot"] % most for copy in found}
        assert len(banks) == len(found), found
        return found, events

    bench.memory.failing.append((*bad, SLVERR))
    golden.memory.failing.append(bad)
    found, events = await replicate(1, 1, most)
    assert not found and events.count(ErrorCode.BUS) == 1, events
    assert events.count(ErrorCode.NOT_HELD) == most - 1
    bench.memory.failing.clear()
    golden.memory.failing.clear()
    await bench.drained(golden, "LOCK", 0, 1, 1, 1)
    bench.memory.failing.append((*bad, SLVERR))
    golden.memory.failing.append(bad)
    found, events = await replicate(1, 1, most)
    assert [copy["copy"] for copy in found] == [0] and events == [ErrorCode.BUS] * (most - 1)
    bench.memory.failing.clear()
    golden.memory.failing.clear()
    found, events = await replicate(1, 1, most)
    assert len(found) == most and not events
    arrivals = await bench.check_copies(found)
    # Every bank has given a beat in the same cycles, but for random stalls.
    assert arrivals is None or set(arrivals[0]) & set(arrivals[1]), arrivals
    if config.stores_slots:
        # Over the link, too.
        for copy in found:
            await bench.drained(golden, "READ", copy["slot"], config.expert_beats - 2, 2)
    for copies in (0, most + 1, 255):
        found, events = await replicate(1, 1, copies)
        assert not found and events == [ErrorCode.BAD_COPIES]
    for expert, layer, ctx, code in (
        (model.experts, 0, 0, ErrorCode.BAD_EXPERT),
        (0, model.layers, 0, ErrorCode.BAD_LAYER),
        (0, 0, config.contexts, ErrorCode.BAD_CONTEXT),
    ):
        answers = await bench.drained(golden, "REPLICATE", ctx, layer, expert, 2)
        assert [event["code"] for event in bench.records(answers, "EVENT")] == [code]
    await replicate(1, 1, 1)
    await bench.drained(golden, "LOCK", 0, 1, 1, 0)
    # Few experts, so that those come that have copies.
    hot = [(rng.randrange(model.layers), rng.randrange(model.experts)) for _ in range(3)]
    copies = {}
    seen = Counter()
    if policy is Policy.LRU:
        # Other policies look first at the slot that a failing fetch frees, which hangs on time.
        layer, expert = hot[0]
        at = config.expert_address(layer, expert)
        failing = (at, at + config.data_bytes)
    for token, layers in enumerate(_decisions(bench, 6)):
        await bench.drained(golden, "BEGIN_TOKEN", 0, Phase.DECODE, token)
        if policy is Policy.LRU and token in (2, 4):
            for memory, entry in ((bench.memory, (*failing, SLVERR)), (golden.memory, failing)):
                memory.failing[:] = [] if memory.failing else [entry]
        for layer, experts in enumerate(layers):
            for _ in range(2):
                at = rng.choice([*hot, (layer, experts[0])])
                if rng.random() < 0.2:
                    lock = rng.randrange(2)
                    await bench.drained(golden, "LOCK", 0, *at, lock)
                    continue
                found, events = await replicate(*at, rng.randrange(1, most + 1))
                seen.update(events)
                copies[at] = found
            answers = await bench.drained(golden, "ROUTE", 0, layer, experts)
            for ready in bench.readies(answers):
                held = copies.get((layer, ready["expert"]))
                assert not held or held[0]["slot"] == ready["slot"], (held, ready)
            await bench.drained(golden, "RELEASE", 0, layer)
        for found in copies.values():
            await bench.check_copies(found)
    assert any(copies.values()) and seen[ErrorCode.NO_SLOT], seen
    # A clear ends all of them.
    await bench.drained(golden, "REGISTER_WRITE", register_by_name("clear").address, 2)
    golden.buffer.check_invariants()
    found, _ = await replicate(0, 0, most)
    await bench.check_copies(found)
    await bench.compare_registers(golden)
    hit("buffer.copies")


@cocotb.test()
async def rows_drained(dut):
    """Tiles gathered from rows at a stride, on some channels only, are the golden model's."""
    bench = _Bench(dut, stall=0.1)
    config, rng, model = bench.config, bench.random, bench.config.model
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    row = config.data_bytes * rng.randrange(1, config.tile_beats)
    for channel in range(min(2, config.dma_channels)):
        for name, value in (
            ("dma_channel", channel),
            ("dma_row_bytes", row),
            ("dma_row_stride", row + config.data_bytes),
            ("profile", Phase.DECODE),
        ):
            await bench.drained(golden, "REGISTER_WRITE", register_by_name(name).address, value)
        for layer in range(2):
            experts = rng.sample(range(model.experts), model.top_k)
            answers = await bench.drained(golden, "ROUTE", 0, layer, experts)
            for ready in bench.readies(answers)[:1]:
                beats = config.layer_sizes[layer] // config.data_bytes
                for beat in range(0, beats, 5):
                    count = min(5, beats - beat)
                    await bench.drained(golden, "READ", ready["slot"], beat, count)
            await bench.drained(golden, "RELEASE", 0, layer)
    await bench.compare_registers(golden)


@cocotb.test()
@cocotb.parametrize(profiles=[False, True])
async def timed_pace(dut, profiles):
    """Routes come when they like: each gets k readies or errors, and the bytes are right. The same
    while profiles are switched under way.
    """
    bench = _Bench(dut, stall=0.05, latency=60)
    config, rng, model = bench.config, bench.random, bench.config.model
    host = bench.host
    await bench.reset()

    asked = Phase.DECODE
    follow = False
    active = []  # What profile_active must read, in order.

    def boundary():
        """Ask which profile is active, right behind a layer boundary."""
        if profiles:
            host.post("REGISTER_READ", register_by_name("profile_active").address)
            active.append(asked)

    def switch():
        """Change a profile, or ask for one, without waiting for anything."""
        nonlocal asked, follow
        if not profiles:
            return
        phase = rng.choice(list(Phase))
        for address, value in _profile_writes(bench, phase) if rng.random() < 0.2 else ():
            host.post("REGISTER_WRITE", address, value)
        if rng.random() < 0.2:
            # Candidates of hints as well, and the phase of tokens.
            follow = not follow
            flags = 1 | 1 << 1 | 1 << 4 | follow << 5
            host.post("REGISTER_WRITE", register_by_name("control").address, flags)
        if rng.random() < 0.6:
            asked = phase
            host.post("REGISTER_WRITE", register_by_name("profile").address, phase)

    for phase in Phase if profiles else ():
        flags = 1 | (phase is not Phase.PREFILL) << 1 | 1 << 4
        for address, value in (
            *_profile_writes(bench, phase),
            (register_by_name("control").address, flags),
        ):
            host.post("REGISTER_WRITE", address, value)
    for _ in range(3):
        layer, expert = rng.randrange(model.layers), rng.randrange(model.experts)
        address = config.expert_address(layer, expert)
        bench.memory.failing.append((address, address + config.data_bytes, DECERR))

    routes = 0
    locked = []  # Experts that were asked to be locked, and not unlocked since.
    locks = Counter()  # Answers to that which have not come, by (context, layer, expert).
    met = 0  # Locks of experts that routes waited for.
    waiting = {}  # (ctx, layer) -> experts that are not answered yet
    seen = 0
    ready_layers = []

    def lock():
        """Lock an expert, or unlock one, without waiting for anything."""
        nonlocal met
        if locked and rng.random() < 0.4:
            host.post("LOCK", 0, *locked.pop(0), 0)
        elif len(locked) < config.slots - config.contexts * model.top_k:
            ctx, place = (
                rng.randrange(config.contexts),
                (rng.randrange(model.layers), rng.randrange(model.experts)),
            )
            under_way = sorted((at, e) for (_, at), experts in waiting.items() for e in experts)
            if under_way and rng.random() < 0.5:
                place = rng.choice(under_way)
            if place not in locked and not failing(*place):
                met += place in under_way
                host.post("LOCK", ctx, *place, 1)
                locked.append(place)
                locks[ctx, *place] += 1

    def failing(layer, expert):
        address = config.expert_address(layer, expert)
        return any(start == address for start, *_ in bench.memory.failing)

    def answered(fields):
        """Whether a READY is for the route, not for the lock of its expert: if both are awaited the
        first to come is the lock's, since both count on the same slot.
        """
        key = fields["ctx"], fields["layer"], fields["expert"]
        if locks[key]:
            locks[key] -= 1
            return False
        waiting[key[:2]].remove(key[2])
        return True

    async def answers_to(key):
        nonlocal seen
        for _ in range(20_000):
            host.poll()
            for code, body in host.answers[seen:]:
                if code == MESSAGES["READY"].code:
                    fields = RECORDS["Ready"].unpack(config, body)
                    routed = answered(fields)
                    await bench.check_bytes([fields] if routed and rng.random() < 0.2 else [])
                elif code == MESSAGES["EVENT"].code:
                    fields = RECORDS["Event"].unpack(config, body)
                    assert fields["code"] in (ErrorCode.BUS, ErrorCode.NO_SLOT), fields
                    waiting[fields["ctx"], fields["layer"]].remove(fields["expert"])
                else:
                    assert code == MESSAGES["REGISTER_VALUE"].code
                    assert RECORDS["RegisterValue"].unpack(config, body)["value"] == active.pop(0)
            seen = len(host.answers)
            if not waiting[key]:
                return
            await cycles(dut, 16)
        raise AssertionError(f"{key} was never answered: {waiting}")

    for token, layers in enumerate(_decisions(bench, 8)):
        for ctx in range(config.contexts):
            phase = rng.choice(list(Phase)) if profiles else Phase.DECODE
            host.post("BEGIN_TOKEN", ctx, phase, token)
            asked = phase if follow else asked
            boundary()
        for layer, experts in enumerate(layers):
            for ctx in range(config.contexts):
                mine = [(expert + ctx) % model.experts for expert in experts]
                waiting[ctx, layer] = set(mine)
                switch()
                if rng.random() < 0.3:
                    lock()
                # Without a predictor, too, there is something to prefetch.
                for wanted in range(layer, model.layers) if profiles else ():
                    host.post("HINT", ctx, wanted, rng.randrange(model.experts), 255)
                host.post("ROUTE", ctx, layer, mine)
                boundary()
                routes += 1
                ready_layers.append((ctx, layer))
                if rng.random() < 0.5:
                    await cycles(dut, rng.randrange(300))
            while ready_layers:
                key = ready_layers.pop(0)
                await answers_to(key)
                host.post("RELEASE", *key)
    host.post("SYNC", 9)
    await host.wait(dut, until=MESSAGES["SYNCED"].code)
    host.poll()
    for code, body in host.answers[seen:]:
        if code == MESSAGES["READY"].code:
            answered(RECORDS["Ready"].unpack(config, body))
    assert all(not experts for experts in waiting.values())
    assert not any(locks.values()), locks

    counters = {}
    for counter in COUNTERS:
        name = counter.name if counter.bits == 32 else f"{counter.name}_low"
        host.post("REGISTER_READ", register_by_name(name).address)
        answers = await host.wait(dut, until=MESSAGES["REGISTER_VALUE"].code)
        counters[counter.name] = RECORDS["RegisterValue"].unpack(config, answers[-1][1])["value"]
    c = counters
    assert c["routes"] == c["releases"] == routes
    assert c["demands"] == routes * model.top_k
    assert c["hits"] + c["misses"] + c["late"] + c["merged"] + c["refused"] == c["demands"]
    ended = c["fills"] + c["fill_errors"] + c["prefetch_cancelled"]
    assert ended == c["misses"] + c["lock_misses"] + c["prefetch_issued"]
    assert c["locks"] >= c["lock_misses"] > 0
    if met:
        hit("scheduler.locks_timed")
    assert c["useful"] + c["useless"] <= c["prefetch_issued"]
    assert c["demand_bytes"] + c["prefetch_bytes"] >= c["fills"] * min(config.layer_sizes)
    assert c["link_errors"] == c["link_replays"] == c["rejected"] == 0
    if profiles:
        assert c["prefetch_issued"] > 10 and c["fills"] > 50
        host.post("REGISTER_READ", register_by_name("refusal").address)
        answers = await host.wait(dut, until=MESSAGES["REGISTER_VALUE"].code)
        assert RECORDS["RegisterValue"].unpack(config, answers[-1][1])["value"] == 0
        hit("profiles.traffic")


@cocotb.test()
async def copies_timed(dut):
    """Copies come and go under traffic: each is answered, its bytes stay, and no slot is lost."""
    bench = _Bench(dut, stall=0.05, latency=60)
    config, rng, model = bench.config, bench.random, bench.config.model
    if config.replicas == 1:
        return
    host = bench.host
    await bench.reset()
    control = register_by_name("control").address
    host.post("REGISTER_WRITE", control, 1 | 1 << 1 | 1 << 4)
    host.post("REGISTER_WRITE", register_by_name("policy").address, rng.choice(list(Policy)))
    # Routes are of the other contexts, so that everybody's events are known.
    mine = config.contexts - 1
    hot = [(layer, expert) for layer in range(2) for expert in range(3)]
    broken = config.expert_address(1, 1)
    bench.memory.failing.append((broken, broken + config.data_bytes, DECERR))
    asked = {}  # expert: copies that were asked for and not all answered
    answers = {}  # expert: copies and events that have come
    held = {}  # expert: copies that are there
    waiting = {}  # (ctx, layer): experts that are not answered yet
    seen = 0
    codes = Counter()

    def replicate():
        at = rng.choice(hot)
        if at in asked:
            return
        copies = rng.randrange(1, config.replicas + 1)
        kept = [copy for copy in held.pop(at, []) if copies > 1 and copy["copy"] < copies]
        host.post("REPLICATE", mine, *at, copies)
        if copies > 1:
            asked[at], answers[at] = copies, []
            # Those that stay may be read all the time.
            held[at] = kept

    async def take():
        """Take the answers that have come."""
        nonlocal seen
        host.poll()
        for code, body in host.answers[seen:]:
            seen += 1
            if code == MESSAGES["SYNCED"].code:
                continue
            if code == MESSAGES["COPY"].code:
                fields = RECORDS["Copy"].unpack(config, body)
            elif code == MESSAGES["READY"].code:
                fields = RECORDS["Ready"].unpack(config, body)
            else:
                assert code == MESSAGES["EVENT"].code, code
                fields = RECORDS["Event"].unpack(config, body)
                codes[ErrorCode(fields["code"])] += 1
            at = fields["layer"], fields["expert"]
            if fields["ctx"] != mine:
                waiting[fields["ctx"], at[0]].remove(at[1])
                if code == MESSAGES["READY"].code and rng.random() < 0.2:
                    await bench.check_bytes([fields])
                continue
            answers[at].append(fields)
            if len(answers[at]) == asked[at]:
                del asked[at]
                held[at] = [answer for answer in answers[at] if "copy" in answer]
                assert [copy["copy"] for copy in held[at]] == sorted(
                    copy["copy"] for copy in held[at]
                )
                assert len({copy["slot"] % config.replicas for copy in held[at]}) == len(held[at])
                await bench.check_copies(held[at])

    for token, layers in enumerate(_decisions(bench, 10)):
        for ctx in range(mine):
            host.post("BEGIN_TOKEN", ctx, Phase.DECODE, token)
        for layer, experts in enumerate(layers):
            for ctx in range(mine):
                chosen = [(expert + ctx) % model.experts for expert in experts]
                waiting[ctx, layer] = set(chosen)
                for _ in range(rng.randrange(3)):
                    replicate()
                for wanted in range(layer, model.layers):
                    host.post("HINT", ctx, wanted, rng.randrange(model.experts), 255)
                host.post("ROUTE", ctx, layer, chosen)
            for _ in range(20_000 // 16):
                await take()
                if not any(waiting.values()):
                    break
                await cycles(dut, 16)
            assert not any(waiting.values()), waiting
            for ctx in range(mine):
                host.post("RELEASE", ctx, layer)
        if rng.random() < 0.5:
            for copies in held.values():
                await bench.check_copies(copies)
    host.post("SYNC", 9)
    await host.wait(dut, until=MESSAGES["SYNCED"].code, limit=400_000)
    await take()
    assert not asked, asked
    assert codes[ErrorCode.BUS] and codes[ErrorCode.NOT_HELD], codes
    for copies in held.values():
        await bench.check_copies(copies)
    # Given back, all slots are there again.
    bench.memory.failing.clear()
    for at in hot:
        host.post("REPLICATE", mine, *at, 1)
    host.post("SYNC", 10)
    await host.wait(dut, until=MESSAGES["SYNCED"].code)
    everyone = [(at, expert) for at in range(model.layers) for expert in range(model.experts)]
    for at in rng.sample(everyone, config.lockable):
        host.post("LOCK", mine, *at, 1)
        host.post("SYNC", 11)
        [ready, _] = await host.wait(dut, until=MESSAGES["SYNCED"].code)
        await bench.check_bytes(bench.readies([ready]))
        assert ready[0] == MESSAGES["READY"].code
    host.post("REGISTER_READ", register_by_name("prefetch_cancelled").address)
    (*_, (_, body)) = await host.wait(dut, until=MESSAGES["REGISTER_VALUE"].code)
    if RECORDS["RegisterValue"].unpack(config, body)["value"]:
        hit("buffer.copies_timed")


@cocotb.test()
async def tables_and_reads(dut):
    """Tables load and read back through registers, and slots read over the link."""
    bench = _Bench(dut, stall=0.0)
    config, rng = bench.config, bench.random
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    for table in (0, 1):
        address = register_by_name("table_address").address
        await bench.drained(golden, "REGISTER_WRITE", address, table << 24)
        data = register_by_name("table_data").address
        for _ in range(min(64, golden.predictor.table_words(table))):
            word = rng.randrange(config.model.experts) | rng.randrange(8) << 16
            golden.handle(*bench.host.post("REGISTER_WRITE", data, word))
        words = golden.predictor.table_words(table)
        for word in range(0, min(64, words), TABLE_BURST):
            count = min(rng.randrange(1, TABLE_BURST + 1), words - word)
            values = [rng.randrange(config.model.experts + 1) | 7 << 16 for _ in range(TABLE_BURST)]
            golden.handle(*bench.host.post("TABLE_WRITE", table, word, count, values))
        await bench.drained(golden, "TABLE_READ", table, max(0, words - 5), min(5, words))
        await bench.drained(golden, "TABLE_WRITE", table, words, 1, [0] * TABLE_BURST)
    for layer in range(min(3, config.model.layers)):
        experts = rng.sample(range(config.model.experts), config.model.top_k)
        answers = await bench.drained(golden, "ROUTE", 0, layer, experts)
        beats = config.layer_sizes[layer] // config.data_bytes
        count = min(5, beats)
        for ready in bench.readies(answers)[:2]:
            await bench.drained(golden, "READ", ready["slot"], beats - count, count)
            if beats < config.expert_beats and config.stores_slots:
                # What lies behind the expert's end in its slot is not valid.
                bench.host.post("READ", ready["slot"], beats - 1, 2)
                bench.host.post("SYNC", 1)
                got = await bench.host.wait(dut, until=MESSAGES["SYNCED"].code)
                assert [
                    RECORDS["Data"].unpack(config, body)["ok"]
                    for code, body in got
                    if code == MESSAGES["DATA"].code
                ] == [1, 0]
                refused = await bench.drained(
                    golden, "READ", ready["slot"], config.expert_beats - 1, 2
                )
                events = bench.records(refused, "EVENT")
                assert [event["code"] for event in events] == [ErrorCode.BAD_READ]
                # Through the consumer port, too.
                await bench.check_bytes([ready])
                hit("buffer.sizes_device")
    if config.model.layers * config.model.experts * config.successors <= 1024:
        await bench.compare_tables(golden)
    await bench.drained(golden, "REGISTER_WRITE", register_by_name("clear").address, 7)
    await bench.compare_registers(golden)
    answers = await bench.drained(golden, "ROUTE", 0, 0, range(config.model.top_k))
    await bench.check_bytes(bench.readies(answers))


@cocotb.test()
async def reset_in_flight(dut):
    """A reset at any moment gives a fresh device."""
    bench = _Bench(dut, stall=0.2, latency=40)
    config, rng = bench.config, bench.random
    await bench.reset()
    for _ in range(4):
        for layer in range(3):
            experts = rng.sample(range(config.model.experts), config.model.top_k)
            bench.host.post("ROUTE", 0, layer, experts)
        await cycles(dut, rng.randrange(200, 2500))
        await bench.reset()
        golden = GoldenTop(config, bench.image)
        for layer in range(2):
            experts = rng.sample(range(config.model.experts), config.model.top_k)
            answers = await bench.drained(golden, "ROUTE", 0, layer, experts)
            await bench.check_bytes(bench.readies(answers))
        await bench.compare_registers(golden)


@cocotb.test()
async def wrong_bits(dut):
    """Experts with a wrong bit in memory are never ready, where their checksum was loaded."""
    bench = _Bench(dut, stall=0.1)
    config, rng, model = bench.config, bench.random, bench.config.model
    if not config.checksums:
        return
    spans = {
        (layer, expert): config.expert_spans(layer, expert)
        for layer in range(model.layers)
        for expert in range(model.experts)
    }
    sums = [
        zlib.crc32(b"".join(bench.image[at : at + size].tobytes() for at, size in each))
        for each in spans.values()
    ]
    bench.image = bench.image.copy()
    bad = rng.sample(sorted(spans), 10)
    for key in bad:
        at, size = rng.choice(spans[key])
        bench.image[at + rng.randrange(size)] ^= 1 << rng.randrange(8)
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    # A few have no checksum, and some others a wrong one.
    unchecked = set(rng.sample(range(len(sums)), 4))
    for number in rng.sample(range(len(sums)), 2):
        sums[number] ^= 1 << rng.randrange(32)
    for number, value in enumerate(sums):
        if number not in unchecked:
            values = [value, *(rng.getrandbits(32) for _ in range(TABLE_BURST - 1))]
            golden.handle(*bench.host.post("TABLE_WRITE", CHECKSUM_TABLE, number, 1, values))
    await bench.drained(golden, "TABLE_READ", CHECKSUM_TABLE, 0, len(sums) // 2)
    await bench.drained(golden, "TABLE_READ", CHECKSUM_TABLE, len(sums) // 2, len(sums) // 2)
    await bench.drained(golden, "TABLE_READ", CHECKSUM_TABLE, len(sums) - 1, 2)
    # One candidate at a time: the slot that a failing one frees is the next to be taken.
    await bench.drained(golden, "REGISTER_WRITE", register_by_name("control").address, 7)
    codes = Counter()
    for token, layers in enumerate(_decisions(bench, 6)):
        await bench.drained(golden, "BEGIN_TOKEN", 0, 1, token)
        for layer, experts in enumerate(layers):
            for wanted, expert in rng.sample(bad, 2):
                if wanted >= layer:
                    await bench.drained(golden, "HINT", 0, wanted, expert, 255)
            answers = await bench.drained(golden, "ROUTE", 0, layer, experts)
            codes.update(body[0] for code, body in answers if code == MESSAGES["EVENT"].code)
            await bench.check_bytes(
                [
                    ready
                    for ready in bench.readies(answers)
                    if ready["layer"] * model.experts + ready["expert"] not in unchecked
                ][:1]
            )
            await bench.drained(golden, "RELEASE", 0, layer)
    assert codes[ErrorCode.CHECKSUM] and golden.counters["prefetch_issued"] > 3
    assert golden.counters["checksum_errors"] > codes[ErrorCode.CHECKSUM]
    await bench.compare_registers(golden)
    # Without checksums they are ready again.
    await bench.drained(golden, "REGISTER_WRITE", register_by_name("clear").address, 8)
    await bench.drained(golden, "TABLE_READ", CHECKSUM_TABLE, 0, 4)
    before = golden.counters["checksum_errors"]
    for layer, expert in bad[:3]:
        experts = [expert, (expert + 1) % model.experts]
        await bench.drained(golden, "ROUTE", 0, layer, experts)
        await bench.drained(golden, "RELEASE", 0, layer)
    assert golden.counters["checksum_errors"] == before
    where = config.slot_store if len(config.part_bytes) == 1 else "parts"
    hit("checksum.device", where, of=("internal", "axi", "parts"))
    if config.layer_bytes:
        hit("checksum.device_sizes")


@cocotb.test()
async def promoted_rows(dut):
    """A demand takes over a prefetch: its tiles leave over two channels, with the rows of both."""
    bench = _Bench(dut, latency=60)
    config, rng, model, host = bench.config, bench.random, bench.config.model, bench.host
    if not config.rows:
        return
    await bench.reset()
    host.post("REGISTER_WRITE", register_by_name("control").address, 2)
    promoted = 0
    for token in range(model.layers * 2):
        layer = token % model.layers
        experts = [token // model.layers * 2, token // model.layers * 2 + 1]
        before = len(bench.memory.transfers)
        host.post("BEGIN_TOKEN", 0, Phase.DECODE, token)
        host.post("HINT", 0, layer, experts[0], 255)
        await cycles(dut, rng.randrange(80, config.expert_beats))
        host.post("ROUTE", 0, layer, experts)
        readies = []
        while len(readies) < model.top_k:
            answers = await host.wait(dut, until=MESSAGES["READY"].code)
            readies += bench.readies(answers)
        await bench.check_bytes(readies)
        spans = config.expert_spans(layer, experts[0])
        over = {
            transfer.identifier
            for transfer in bench.memory.transfers[before:]
            if any(at <= transfer.address < at + size for at, size in spans)
        }
        promoted += over == {0, 1}
        host.post("RELEASE", 0, layer)
    assert promoted >= 3, promoted
    hit("dma.part_rows_promoted")


@cocotb.test()
async def any_order(dut):
    """Layers in any order: every demand is served, and those out of order are counted."""
    bench = _Bench(dut, stall=0.1)
    config, rng, model = bench.config, bench.random, bench.config.model
    if config.predictor == "none":
        return
    golden = GoldenTop(config, bench.image)
    await bench.reset()
    await _settle(bench, golden, policy=Policy.NEXT_USE, hints=True)
    last = [-1] * config.contexts
    below = 0
    for step in range(40):
        ctx = rng.randrange(config.contexts)
        if rng.random() < 0.15:
            await bench.drained(golden, "BEGIN_TOKEN", ctx, rng.choice(list(Phase)), step)
            last[ctx] = -1
        layer = rng.randrange(model.layers)
        below += layer < last[ctx]
        last[ctx] = layer
        experts = rng.sample(range(model.experts), model.top_k)
        answers = await bench.drained(golden, "ROUTE", ctx, layer, experts)
        readies = bench.readies(answers)
        assert sorted(ready["expert"] for ready in readies) == sorted(experts)
        if step % 8 == 0:
            await bench.check_bytes(readies)
        if layer < model.layers - 1:
            above = rng.randrange(layer + 1, model.layers)
            await bench.drained(golden, "HINT", ctx, above, rng.randrange(model.experts), 200)
        await bench.drained(golden, "RELEASE", ctx, layer)
    assert golden.counters["routes_out_of_order"] == below > 2
    await bench.compare_registers(golden)
    if config.predictor == "st_moe":  # Others have long tables.
        await bench.compare_tables(golden)
    hit("input.order_device")


@cocotb.test()
async def slot_memory_fails(dut):
    """A slot that can't be written is never ready; the error names the expert and where."""
    bench = _Bench(dut, stall=0.1)
    if bench.slots is None:
        return
    config, rng, model = bench.config, bench.random, bench.config.model
    await bench.reset()
    bench.slot_base = 0x5000
    for name, value in (("slot_base_low", 0x5000), ("slot_base_high", 0)):
        bench.host.post("REGISTER_WRITE", register_by_name(name).address, value)
    bad = {}
    for slot in rng.sample(range(config.slots), 3):
        tile, beat = divmod(rng.randrange(config.expert_beats), config.tile_beats)
        at = bench.slot_base + slot * config.expert_bytes + tile * config.tile_bytes
        burst = at + beat // 16 * 16 * config.data_bytes
        bench.slots.failing.append((burst, burst + config.data_bytes, rng.choice((SLVERR, DECERR))))
        bad[slot] = burst
    failed = set()
    for layer in range(model.layers):
        experts = rng.sample(range(model.experts), model.top_k)
        bench.host.post("ROUTE", 0, layer, experts)
        bench.host.post("SYNC", 1)
        answers = await bench.host.wait(dut, until=MESSAGES["SYNCED"].code)
        readies = bench.readies(answers)
        await bench.check_bytes(readies)
        assert not {ready["slot"] for ready in readies} & {*bad}
        told = [ready["expert"] for ready in readies]
        for code, body in answers:
            if code == MESSAGES["EVENT"].code:
                event = RECORDS["Event"].unpack(config, body)
                assert event["code"] == ErrorCode.SLOT_MEMORY and event["layer"] == layer
                assert event["address"] in bad.values()
                failed.add(event["address"])
                told.append(event["expert"])
        assert sorted(told) == sorted(experts)
        bench.host.post("RELEASE", 0, layer)
    assert failed
    hit("dma.slots_in_memory")


# Layers whose experts have three, one, four and two tiles.
_SIZES = TINY_DEVICE.replace(expert_bytes=2048, layer_bytes=(1536, 512, 2048, 1024), checksums=True)

_SHAPES = {
    "tiny": TINY_DEVICE,
    "tiny-none": TINY_DEVICE.replace(predictor="none"),
    # Few rows by token, so that tables are read in no time.
    "tiny-perceptron": TINY_DEVICE.replace(
        predictor="perceptron", perceptron=perceptron_form("lite").replace(token_rows=16)
    ),
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=3, experts=12, top_k=3),
        slots=11,
        expert_bytes=1536,
        contexts=3,
        data_bytes=16,
        successors=5,
        address_bits=32,
    ),
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_top(shape):
    """Random routing on small shapes, all tests."""
    config = _SHAPES[shape]
    run_bench(
        lambda: Top(config=config), module=__file__, name="top", parameters={"config": config}
    )


def test_parts():
    """Experts that lie in two parts and have checksums: whole, or refused with their address.

    Tiles break the rows of the first part; those of the second follow each other expert by expert.
    """
    config = TINY_DEVICE.replace(
        expert_bytes=2048,
        parts=(1536, 512),
        rows=((96, 160), (64, 8 * 64, 64)),
        checksums=True,
    )
    run_bench(
        lambda: Top(config=config),
        module=__file__,
        name="top",
        parameters={"config": config},
        testcase=[
            f"drained_pace/stall=0.3/policy={Policy.LRU.name}",
            "hints_and_errors",
            "wrong_bits",
            "promoted_rows",
        ],
    )


@pytest.mark.parametrize(
    "testcase",
    [
        [
            f"drained_pace/stall=0.3/policy={Policy.LRU.name}",
            "hints_and_errors",
            "tables_and_reads",
            "wrong_bits",
        ],
        pytest.param(
            [
                f"drained_pace/stall=0.0/policy={Policy.NEXT_USE.name}",
                "rows_drained",
                "timed_pace/profiles=True",
            ],
            marks=pytest.mark.soak,
        ),
    ],
    ids=["some", "more"],
)
def test_sizes(testcase):
    """Layers whose experts differ in size, with checksums."""
    run_bench(
        lambda: Top(config=_SIZES),
        module=__file__,
        name="top",
        parameters={"config": _SIZES},
        testcase=testcase,
    )


@pytest.mark.soak
def test_sizes_in_memory():
    """The same with slots behind an AXI4 write port."""
    config = _SIZES.replace(slot_store="axi")
    run_bench(
        lambda: Top(config=config),
        module=__file__,
        name="top",
        parameters={"config": config},
        testcase=[
            f"drained_pace/stall=0.3/policy={Policy.NEXT_USE.name}",
            "hints_and_errors",
            "wrong_bits",
        ],
    )


def test_slots_in_memory():
    """Slots behind an AXI4 write port: right there at each Ready, at any pace."""
    config = TINY_DEVICE.replace(slot_store="axi", checksums=True)
    run_bench(
        lambda: Top(config=config),
        module=__file__,
        name="top",
        parameters={"config": config},
        testcase=[
            f"drained_pace/stall=0.3/policy={Policy.NEXT_USE.name}",
            "hints_and_errors",
            "reset_in_flight",
            "slot_memory_fails",
            "wrong_bits",
            "tables_and_reads",
        ],
    )


_COPY_SHAPES = {
    "two": TINY_DEVICE.replace(replicas=2, slots=10),
    "four": TINY_DEVICE.replace(replicas=4, slots=16, contexts=3, predictor="none"),
    "memory": TINY_DEVICE.replace(replicas=2, slot_store="axi"),
}


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=pytest.mark.soak if s != "two" else ()) for s in _COPY_SHAPES],
)
def test_copies(shape):
    """Experts in several banks."""
    config = _COPY_SHAPES[shape]
    run_bench(
        lambda: Top(config=config),
        module=__file__,
        name="top",
        parameters={"config": config},
        testcase=[
            *(f"copies_drained/policy={policy.name}" for policy in (Policy.LRU, Policy.NEXT_USE)),
            "copies_timed",
            *(["timed_pace/profiles=False", "reset_in_flight"] if shape != "two" else []),
        ],
    )


def _run_trace(path, *, preset, tokens, sizes=(512,)):
    trace = load_trace(path)
    _, layers, top_k = trace.experts.shape
    model = ModelConfig(name=preset, layers=layers, experts=trace.experts_per_layer, top_k=top_k)
    config = DeviceConfig(
        model=model,
        slots=max(top_k, layers * model.experts // 4),
        expert_bytes=max(sizes),
        layer_bytes=tuple(sizes[layer % len(sizes)] for layer in range(layers)),
    )
    run_bench(
        lambda: Top(config=config),
        module=__file__,
        name="top",
        parameters={"config": config, "trace": {"path": str(path), "tokens": tokens}},
        testcase=[f"drained_pace/stall=0.0/policy={Policy.NEXT_USE.name}"],
    )


def test_top_tinymoe():
    """The project's own trace."""
    _run_trace(_ROOT / "models/tinymoe/traces/tinymoe__code.npz", preset="tinymoe", tokens=6)


@pytest.mark.soak
def test_top_tinymoe_sizes():
    """The same with experts of different sizes."""
    path = _ROOT / "models/tinymoe/traces/tinymoe__code.npz"
    _run_trace(path, preset="tinymoe", tokens=6, sizes=(1024, 512, 1536))


@pytest.mark.extra
def test_top_gpt_oss():
    """A large model's trace."""
    path = _ROOT.parent / "shared/traces/gpt-oss-20b__cs.npz"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the project")
    _run_trace(path, preset="gpt-oss-20b", tokens=4)
