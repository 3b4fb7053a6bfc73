"""Expert buffer in lockstep with its golden model (the half that runs in the simulator).

::

       requests ─▶ ExpertBuffer ─▶ results
         values ─▶              ─▶ beats
        rescans ─▶              ─▶ rescanned
         writes ─▶
    host_writes ─▶
          reads ─▶
"""

import random
from collections import Counter, deque

import cocotb
from cocotb.triggers import FallingEdge, ReadWrite, RisingEdge

from prestage_hw.buffer import ExpertBuffer
from prestage_hw.contract.records import (
    RECORDS,
    BufferCode,
    BufferOp,
    Policy,
    RescanCode,
    ValueKind,
)
from prestage_hw.layouts import RecordLayout
from prestage_sim.model.buffer import BufferResult
from prestage_sim.model.buffer import ExpertBuffer as GoldenBuffer
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
from prestage_tb.buffer_points import BufferPoints

DEMAND, PREFETCH, FILL, RELEASE, CANCEL, LOCK, UNLOCK, COPY = BufferOp
RESIDENT, FILLING, ALLOCATED, NO_SLOT, OUTBID, REFUSED, INVALID = BufferCode
LRU, LFU, NEXT_USE = Policy

STALLS = {
    "none": 0.0,
    "light": 0.2,
    "bursts": Stall(0.5, burst=(1, 12)),
}


class TB:
    """Clock, reset, streams, golden model.

    Beats are read all the time. What a read may return is known exactly as long as no operation is
    under way; if one is, the states before and after it are both right.
    """

    # The data outlive the tests of one simulation: what a test that passed has left in the slots.
    left_data = None

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.ports = Signals(dut)
        self.config = config = parameters()["config"]
        valued, host_writes = parameters()["valued"], parameters()["host_writes"]
        self.buffer = ExpertBuffer(config=config, valued=valued, host_writes=host_writes)
        self.golden = GoldenBuffer(config, valued=valued)
        self.random = random.Random(f"{cocotb.RANDOM_SEED}/{stall}")
        self.exact_cycles = stall == 0.0
        self.seen = {}
        self.passes = []
        self.points = BufferPoints(self.golden, passes=self.buffer.passes, exact=self.exact_cycles)
        start_clock(dut)

        def layout(name):
            return RecordLayout(name, config=config)

        self.requests = StreamSource(dut, "requests", layout("BufferRequest"), stall=stall)
        self.results = StreamSink(dut, "results", layout("BufferResult"), stall=stall)
        self.writes = StreamSource(dut, "writes", layout("BufferWrite"), stall=stall)
        self.host_writes = None
        if host_writes:
            self.host_writes = StreamSource(dut, "host_writes", layout("BufferWrite"), stall=stall)
        self.values = StreamSource(dut, "values", layout("ValueBeat"), stall=stall)
        # Consumer ports, one a bank.
        banks = [f"__{bank}" for bank in range(config.replicas)] if config.replicas > 1 else [""]
        self.reads = [
            StreamSource(dut, f"reads{bank}", layout("ReadRequest"), stall=stall) for bank in banks
        ]
        self.beats = [
            StreamSink(dut, f"beats{bank}", layout("Beat"), stall=stall) for bank in banks
        ]
        self.writers = [self.writes, *([self.host_writes] if host_writes else [])]
        self.drivers = [self.requests, self.results, *self.writers]
        self.drivers += [self.values, *self.reads, *self.beats]
        self.rescans_on = False
        self.rescan_seen = Counter()
        self.resets, self.clears = Counter(), Counter()
        if valued:
            self.rescans = StreamSource(dut, "rescans", layout("RescanRequest"), stall=stall)
            self.rescanned = StreamSink(dut, "rescanned", layout("RescanResult"), stall=stall)
            self.drivers += [self.rescans, self.rescanned]
            self.longest = self.buffer._rescan.longest
        dut.clear.value = 0
        self.set_policy(LRU)
        self.forget()
        for bank in range(config.replicas):
            cocotb.start_soon(self._check_beats(bank))
        if valued:
            cocotb.start_soon(self._send_rescans())
            cocotb.start_soon(self._check_rescans())

    #: Times that everything was forgotten.
    forgotten = 0

    def forget(self):
        """Know of no work under way."""
        self.forgotten += 1
        # A rescan under way: its request, the cycle in which it was taken, its answer unless it is
        # disturbed, the cycle in which it was, whether the buffer was cleared meanwhile, and what
        # else there is to say of it.
        self.rescan = None
        self.window = []  # tile-valid bits that reads may still see
        # Reads of each bank: (slot, beat, allowed (ok, data))
        self.pending_of = [deque() for _ in range(self.config.replicas)]
        # For each writer: writes that the golden model has not seen, how many were queued and seen.
        self.queued = {writer: deque() for writer in self.writers}
        self.queued_count = dict.fromkeys(self.writers, 0)
        self.written_count = dict.fromkeys(self.writers, 0)
        self.queued_values = deque()  # values that the golden model has not seen
        self.valued_count = 0

    @property
    def pending(self):
        """All reads that were not answered."""
        return [read for reads in self.pending_of for read in reads]

    def bank(self, slot):
        """Bank of a slot."""
        return slot % self.config.replicas

    async def start(self):
        """Reset, and fill the slots unless their bytes are known."""
        await self.reset()
        if TB.left_data is None:
            for slot in range(self.config.slots):
                for tile in range(self.config.tiles):
                    self.write_tile(slot, tile)
            await self.finish()
        self.golden.storage.data[:] = TB.left_data
        TB.left_data = None

    async def finish(self):
        """Wait for all writes, reads and rescans."""
        await self.rest()
        for writer in self.writers:
            await writer.sent()
        await cycles(self.dut, 3)
        self.settle_writes()
        while self.pending:
            await cycles(self.dut)
        TB.left_data = self.golden.storage.data.copy()

    async def reset(self, *, at_work=False):
        """Reset at any time; ``at_work`` says that something was begun."""
        await RisingEdge(self.dut.clk)
        await ReadWrite()  # The drivers have counted the beats of that edge.
        self.settle_writes()
        if at_work:
            # Values wait for nothing else.
            searches = self.ports.bits("values__ready") == "0"
            self.resets["in a search" if searches else "elsewhere"] += 1
            self.resets["rescan"] += self.rescan is not None
        rescans, self.rescans_on = self.rescans_on, False
        self.forget()
        self.golden.clear()
        self.points.forget()
        await reset(self.dut, drivers=self.drivers)
        await FallingEdge(self.dut.clk)
        waited = 0
        while self.ports.bits("idle") != "1":
            waited += 1
            await FallingEdge(self.dut.clk)
        assert waited == self.buffer.clear_cycles
        self.rescans_on = rescans

    # --- data ---

    def write_tile(self, slot, tile, *, beats=None):
        """Queue beats of a tile, all or a random few; return what to wait for."""
        numbers = range(self.config.tile_beats)
        if beats is not None:
            numbers = self.random.sample(numbers, min(beats, self.config.tile_beats))
        writer = self.random.choice(self.writers)
        for number in numbers:
            beat = tile * self.config.tile_beats + number
            data = self.random.randbytes(self.config.data_bytes)
            self.queued[writer].append((slot, beat, data))
            writer.send({"slot": slot, "beat": beat, "data": data})
            self.queued_count[writer] += 1
        return writer, self.queued_count[writer]

    def settle_writes(self):
        """Tell the golden model of the writes that were taken."""
        assert self.ports.high("writes__ready")
        for writer in self.writers:
            while self.written_count[writer] < writer.sent_count:
                self.golden.write_beat(*self.queued[writer].popleft())
                self.written_count[writer] += 1

    # --- values and policy ---

    def set_policy(self, policy):
        """Switch the policy. No operation may be under way."""
        self.golden.policy = policy
        # 3 stands for predicted next use too.
        self.dut.policy.value = policy if policy != NEXT_USE else self.random.choice([2, 3])

    def send_values(self, *, whole=True):
        """Queue values for experts of some layer, for all or a part of them."""
        config = self.config
        ctx = self.random.randrange(config.contexts)
        layer = self.random.randrange(config.model.layers)
        kind = self.random.choice(list(ValueKind))
        beats = range(config.lane_beats)
        most = self.random.choice([0, 3, 40, 255])
        for beat in beats if whole else [self.random.choice(beats)]:
            lanes = config.predictor_lanes
            values = [min(int(self.random.expovariate(1 / (most + 1))), 255) for _ in range(lanes)]
            self.queued_values.append((kind, ctx, layer, beat, values))
            self.values.send(
                {"kind": kind, "ctx": ctx, "layer": layer, "beat": beat, "values": values}
            )

    def settle_values(self, count=None):
        """Tell the golden model of the values that were taken, or of so many."""
        while self.valued_count < (self.values.sent_count if count is None else count):
            beat = self.queued_values.popleft()
            self.golden.values(*beat)
            self.points.values(beat)
            self.valued_count += 1

    async def finish_values(self):
        """Wait until all values were taken."""
        await self.values.sent()
        await ReadWrite()
        self.settle_values()

    # --- rescans ---

    async def _send_rescans(self):
        """Look for experts again and again, while that is wanted."""
        config, layers = self.config, self.config.model.layers
        while True:
            await FallingEdge(self.dut.clk)
            if self.rescans_on and not self.rescans.pending and self.rescan is None:
                self.rescans.send(
                    {
                        "ctx": self.random.randrange(config.contexts),
                        "near": self.random.random() < 0.8,
                        "ahead": self.random.randrange(min(layers, 12) + 1),
                        "least": self.random.choice([1, 1, 10, 24, 100, 255]),
                        "cutoff_layer": self.random.choice([255, 255, self.random.randrange(255)])
                        if self.random.random() < 0.5
                        else self.random.randrange(layers + 1),
                    }
                )

    async def _check_rescans(self):
        """An answer is that of the model when the request was taken, or says what disturbed it."""
        dut, cycle, offered = self.dut, 0, False
        harmless = (RELEASE, UNLOCK)
        while True:
            await FallingEdge(dut.clk)
            cycle += 1
            if self.ports.bits("rst") != "0":
                offered = False
                continue
            if not offered and self.rescanned.offers:
                offered = True
                self._rescanned(self.rescanned.payload_now(), cycle)
            offered = offered and not self.rescanned.moves
            cleared = self.ports.high("clear")
            if self.rescan is not None:
                assert not self.ports.high("idle"), "idle with a rescan"
                disturbs = {"by a value"} if self.values.moves else set()
                if self.requests.moves:
                    request = self.requests.payload_now()
                    filled = request["op"] == FILL and not request["failed"]
                    if not filled and request["op"] not in harmless:
                        disturbs.add("by an operation")
                if disturbs and self.rescan[3] is None:
                    self.rescan[3] = cycle
                    self.rescan[5] = disturbs
                self.rescan[4] |= cleared
            if self.rescans.moves:
                request = self.rescans.payload_now()
                forgotten = self.forgotten
                await RisingEdge(dut.clk)
                await ReadWrite()  # The drivers have counted the beats of that edge.
                if self.forgotten != forgotten:
                    continue  # A reset came at that edge.
                self.settle_values()
                answer = self.golden.rescan(**request)
                parts = set()
                if self.points.open("rescan"):
                    for part, field, value in (
                        ("cut off", "cutoff_layer", 255),
                        ("least", "least", 1),
                    ):
                        if self.golden.rescan(**{**request, field: value}) != answer:
                            parts.add(part)
                self.rescan = [request, cycle, answer, None, cleared, parts]

    def _rescanned(self, got, cycle):
        """An answer is offered."""
        request, taken, answer, disturbed, cleared, parts = self.rescan
        self.rescan = None
        code = RescanCode(got["code"])
        self.rescan_seen[code.name] += 1
        if code == RescanCode.DISTURBED:
            assert cleared or disturbed == cycle - 1, f"{request}: disturbed by nothing"
        else:
            assert disturbed is None, f"{request}: {got} was disturbed"
        if code != RescanCode.DISTURBED:
            expected = {name: int(value) for name, value in answer._asdict().items()}
            assert got == expected, f"{request}: {got}, not {expected}"
            assert cycle - taken <= self.longest(request["ahead"])
            self.rescan_seen["far"] += got["ahead"] > 1
            if got["ahead"] > 1:
                parts.add("far")
        elif disturbed is None:
            parts = {"by a clear"}
        # A value and an operation at once say nothing of either.
        if code != RescanCode.DISTURBED or len(parts) == 1:
            for part in (*parts, f"{code.name}, {'timed' if self.exact_cycles else 'stalled'}"):
                self.points.see("rescan", part)

    async def rest(self):
        """Wait until nothing is looked for, and begin nothing."""
        self.rescans_on = False
        while parameters()["valued"] and (self.rescans.pending or self.rescan is not None):
            await cycles(self.dut)

    def read(self, slot, beat):
        """Queue a read."""
        allowed = [self.golden.read_beat(slot, beat)]
        tile = beat // self.config.tile_beats
        allowed += [(allowed[0][0], bool(valid[slot] >> tile & 1)) for valid in self.window]
        self.expect(slot, beat, allowed)

    def expect(self, slot, beat, allowed):
        """Queue a read that may have one of these answers."""
        self.pending_of[self.bank(slot)].append((slot, beat, allowed))
        self.reads[self.bank(slot)].send({"slot": slot, "beat": beat})

    def _changed(self):
        for slot, beat, allowed in self.pending:
            allowed.append(self.golden.read_beat(slot, beat))

    async def _check_beats(self, bank):
        while True:
            [beat] = await self.beats[bank].receive(1, limit=None)
            slot, number, allowed = self.pending_of[bank].popleft()
            got = bytes(beat["data"]), bool(beat["ok"])
            if got[1]:
                assert got in allowed, f"slot {slot} beat {number}: {got}, not in {allowed}"
            else:
                assert not all(ok for _, ok in allowed), f"slot {slot} beat {number} is not ok"
            self.points.read(slot, number, allowed, got[1])

    # --- operations ---

    def expected_cycles(self, op, fields):
        """Cycles from request to result by the documentation, before the golden model acts; None
        where it will have to search by value.
        """
        if op in (FILL, CANCEL):
            return self.buffer.fill_latency
        if op == RELEASE:
            return self.buffer.release_latency
        directory = self.golden.directory
        config = self.config
        if op == COPY:
            return self._copy_cycles(**fields)
        if directory.state[directory.key(fields["layer"], fields["expert"])]:
            return self.buffer.lookup_latency
        if op == UNLOCK or (op == LOCK and self.golden.locked >= config.lockable):
            return 4
        return self._walk_cycles(self.buffer.walk_latency, op=op)

    def _walk_cycles(self, base, *, op, bank=None):
        """Cycles of a search by recency; None with other policies."""
        directory, recency = self.golden.directory, self.golden.recency
        if self.golden.policy != LRU:
            return None
        skipped = 0
        for slot in recency:
            if op == PREFETCH and recency.touched(slot):
                break
            held = directory.slots[slot]
            kept = held.pins or held.filling or held.locked or held.held
            if not kept and bank in (None, self.bank(slot)):
                return base + 4 * skipped
            skipped += 1
        return base + 4 * (skipped - 1) if skipped else 4

    def _copy_cycles(self, layer, expert, value, last):
        """The same of a COPY."""
        golden, buffer = self.golden, self.buffer
        directory = golden.directory
        key = directory.key(layer, expert)
        full = golden.locked >= self.config.lockable
        if value >= self.config.replicas:
            return 2
        if directory.state[key] == 0:
            if value or not last or full:
                return 4
            return self._walk_cycles(buffer.walk_latency, op=COPY)
        first = directory.slot_of[key]
        held = directory.slots[first]
        if value == 0 or held.filling or not held.held:
            return buffer.lookup_latency
        if value in held.links:
            return buffer.copy_latency
        if not last or full:
            return buffer.lookup_latency
        return self._walk_cycles(buffer.walk_latency + 5, op=COPY, bank=self.bank(first + value))

    def _golden(self, op, fields):
        """Answer of the golden model, its cycles, and whether it searches by value."""
        before = self.golden.victims
        try:
            took = self.expected_cycles(op, fields)
            answer = self.golden.request(op, **fields)
        except ValueError:
            return BufferResult(INVALID), 2, False
        searched = took is None
        if searched:
            took = self.buffer.search_latency + (before.passes - 1) * self.buffer.pass_cycles
            took += 3 * (op == COPY and fields["value"] != 0)
            took -= 3 * (answer.code in (NO_SLOT, OUTBID))
            self.passes.append(before.passes)
        return answer, took, searched

    async def operate(self, op, *, clear=False, **fields):
        """Do one operation, and clear just after it was taken if wanted."""
        if op == PREFETCH:
            fields.setdefault("value", 0)
            fields.setdefault("last", self.random.random() < 0.5)
        if clear:
            await self.finish_values()
        self.settle_writes()
        self.window.append(list(self.golden.storage.valid))
        record = {field.name: 0 for field in RECORDS["BufferRequest"].fields}
        # Fields that an operation doesn't use are noise.
        for field in RECORDS["BufferRequest"].fields:
            if field.name != "op":
                record[field.name] = self.random.getrandbits(field.bits(self.config))
        record.update({"op": op, **{name: int(value) for name, value in fields.items()}})
        self.requests.send(record)
        await self.requests.sent()
        taken = self.requests.cycle
        self.dut.clear.value = clear
        rescans = self.rescan is not None
        await cycles(self.dut)
        self.dut.clear.value = 0
        early = self.points.open("values_any_time") and self.golden.policy == NEXT_USE
        late = None
        await cycles(self.dut)
        if early:
            await ReadWrite()
            early = self.values.sent_count
        await cycles(self.dut)
        await ReadWrite()
        # Values count up to three cycles after the request's, and no operation changes what is read
        # before.
        if early and early < self.values.sent_count:
            self.settle_values(early)
            late = self.points.before()
        self.settle_values()
        was, valid = self.points.before(), self.window[-1]
        later = self.queued_values[0] if self.queued_values else None
        answer, expected_cycles, searched = self._golden(op, fields)
        self._changed()
        if clear:
            self.window.append(list(self.golden.storage.valid))
            self.golden.clear()
            self._changed()
        [got] = await self.results.receive(1, limit=8 * self.config.slots + 1000)
        expected = {name: int(value) for name, value in answer._asdict().items()}
        assert got == expected, f"{BufferOp(op).name} {fields}: {got}, not {expected}"
        if self.exact_cycles:
            took = self.results.arrival[-1] - taken
            assert took == expected_cycles, f"{op} {fields}: {took}, not {expected_cycles}"
            if rescans:
                self.points.see("rescan", "beside an operation")
        if not clear:
            self.points.after(
                op,
                fields,
                answer,
                was=was,
                valid=valid,
                searched=searched,
                cycles=expected_cycles,
                late=late,
                later=later,
            )
        if clear:
            self.points.forget()
            self.clears["under an operation"] += 1
            await self.until_idle()
        self.window.clear()
        name = BufferOp(op).name
        if op == COPY and fields["value"]:
            name = "FURTHER COPY"
        key = name, answer.code.name
        self.seen[key] = self.seen.get(key, 0) + 1
        return answer

    async def until_idle(self):
        """Wait for the end of clearing."""
        rescans, self.rescans_on = self.rescans_on, False
        for _ in range(4 * self.buffer.clear_cycles + 100):
            await FallingEdge(self.dut.clk)
            if self.ports.high("idle"):
                self.rescans_on = rescans
                return
        raise AssertionError("The buffer must become idle")

    async def clear(self):
        """Clear with no operation under way."""
        await self.finish_values()
        await cycles(self.dut)  # So that the pulse is high at a falling edge.
        self.window.append(list(self.golden.storage.valid))
        self.golden.clear()
        self.points.forget()
        self.clears["idle"] += 1
        self._changed()
        self.dut.clear.value = 1
        await cycles(self.dut)
        self.dut.clear.value = 0
        await FallingEdge(self.dut.clk)
        assert self.ports.bits("idle") == "0"
        await self.until_idle()
        self.window.clear()

    async def fetch(self, slot, *, beats=None):
        """Write and fill all tiles of a slot."""
        for tile in range(self.config.tiles):
            writer, _ = self.write_tile(slot, tile, beats=beats)
            await writer.sent()
            await self.operate(
                FILL, slot=slot, tile=tile, last=tile == self.config.tiles - 1, failed=0
            )

    async def compare_all(self, *, most=4000):
        """Compare the beats of all slots, then let every expert pass through the buffer.

        Where there are more than ``most`` beats, a random choice of them is compared.
        """
        await self.finish()
        places = [
            (slot, beat)
            for slot in range(self.config.slots)
            for beat in range(self.config.expert_beats)
        ]
        if len(places) > most:
            places = self.random.sample(places, most)
        for beats in self.beats:
            beats.clear()
        for place in places:
            self.read(*place)
        while self.pending:
            await cycles(self.dut, 10)
        for bank, beats in enumerate(self.beats):
            mine = [place for place in places if self.bank(place[0]) == bank]
            for place, got in zip(mine, beats.received, strict=True):
                # Also the data of tiles that are not valid.
                assert (bytes(got["data"]), bool(got["ok"])) == self.golden.read_beat(*place)
        for layer in range(self.config.model.layers):
            for expert in range(self.config.model.experts):
                answer = await self.operate(DEMAND, ctx=0, layer=layer, expert=expert, index=0)
                if answer.code == ALLOCATED:
                    await self.fetch(answer.slot, beats=1)
                await self.operate(RELEASE, ctx=0, layer=layer)
                if expert % 8 == 0:
                    other = self.random.randrange(self.config.model.experts)
                    answer = await self.operate(PREFETCH, layer=layer, expert=other)
                    if answer.code == ALLOCATED:
                        await self.fetch(answer.slot, beats=1)
        self.golden.check_invariants()
        await self.finish()


class Scheduler:
    """Legal work for the buffer in random order; the tiles of a slot come in their order."""

    def __init__(self, tb, *, clear=0.0, reset=0.0, beats=2):
        self.tb = tb
        self.values = True
        self.random = tb.random
        self.clear = clear
        self.reset = reset
        self.beats = beats
        self.forget()

    def forget(self):
        self.routes = {}  # (ctx, layer): demands to come
        self.filling = {}  # slot: [tile, failed, writer and writes to wait for, tiles]
        self.holders = {}  # slot: number of pins
        self.locked = set()  # (layer, expert)

    async def run(self, steps):
        tb, config = self.tb, self.tb.config
        tb.rescans_on = True
        for step in range(steps):
            self._start_tiles()
            for _ in range(self.random.randrange(4)):
                if len(tb.pending) < 20:
                    self._read()
            layer = min(int(self.random.expovariate(0.7)), config.model.layers - 1)
            # So many that some always wait: one may be taken in any cycle that allows it.
            while tb.values.pending < 8 and self.values:
                tb.send_values(whole=self.random.random() < 0.5)
            if step % 40 == 0:
                # Without a change of values the prefetches in probation and use rates decide.
                self.values = self.random.random() < 0.5
                tb.set_policy(self.random.choice([LRU, LFU, NEXT_USE, NEXT_USE]))
            kind = self.random.random()
            if kind < self.clear:
                await tb.clear()
                self.forget()
            elif kind < self.clear + self.reset:
                await self._reset()
            elif kind < 0.4:
                await self._demand(self.random.randrange(config.contexts), layer)
            elif kind < 0.55:
                expert = self.random.randrange(config.model.experts)
                value = self.random.choice([0, 1, 30, 200, self.random.randrange(256)])
                answer = await tb.operate(PREFETCH, layer=layer, expert=expert, value=value)
                self._allocated(answer, layer)
            elif kind < 0.58:
                await self._cancel()
            elif kind < 0.61:
                await self._lock(layer)
            elif kind < 0.75 and config.replicas > 1:
                await self._copy(layer)
            elif kind < 0.63:
                await self._out_of_range()
            elif kind < 0.85:
                await self._fill()
            else:
                await self._release()
            if step % 64 == 0:
                tb.golden.check_invariants()

    def _read(self):
        """Read any slot, the latest ones of fills more often."""
        config = self.tb.config
        slot = self.random.randrange(config.slots)
        if self.filling and self.random.random() < 0.5:
            slot = self.random.choice(list(self.filling))
        self.tb.read(slot, self.random.randrange(config.expert_beats))

    def _start_tiles(self):
        for slot, entry in self.filling.items():
            if entry[2] is None:
                beats = None if self.random.random() < 0.05 else self.random.randint(1, self.beats)
                entry[2] = self.tb.write_tile(slot, entry[0], beats=beats)

    def _allocated(self, answer, layer):
        if answer.code == ALLOCATED:
            assert answer.slot not in self.filling, "a filling slot was taken"
            assert not self.holders.get(answer.slot), "a pinned slot was taken"
            # Experts of different layers have different sizes.
            tiles = self.tb.config.tiles - layer % self.tb.config.tiles
            self.filling[answer.slot] = [0, False, None, tiles]

    async def _demand(self, ctx, layer):
        model = self.tb.config.model
        key = ctx, layer
        if key not in self.routes:
            experts = self.random.sample(range(model.experts), model.top_k)
            self.routes[key] = list(enumerate(experts)), []
        todo, held = self.routes[key]
        # Mostly the whole route at once, as the scheduler does; sometimes others come between.
        while todo:
            index, expert = todo[0]
            answer = await self.tb.operate(DEMAND, ctx=ctx, layer=layer, expert=expert, index=index)
            self._allocated(answer, layer)
            if answer.code != NO_SLOT:
                held.append(answer.slot)
                self.holders[answer.slot] = self.holders.get(answer.slot, 0) + 1
                del todo[0]
            elif self.filling and self.random.random() < 0.7:
                return  # tried again later
            else:
                del todo[0]
            if self.random.random() < 0.2:
                return

    async def _fill(self):
        tb = self.tb
        there = [
            slot
            for slot, (_, _, wait, _) in self.filling.items()
            if wait is not None and wait[0].sent_count >= wait[1]
        ]
        if not there or self.random.random() < 0.05:
            await self._fill_idle()
            return
        slot = self.random.choice(there)
        entry = self.filling[slot]
        tile, failed_before, _, tiles = entry
        failed = self.random.random() < 0.06
        last = tile == tiles - 1 or (failed or failed_before) and self.random.random() < 0.5
        entry[:] = [tile + 1, failed or failed_before, None, tiles]
        if last:
            failed = entry[1]
            del self.filling[slot]
        clear = self.random.random() < self.clear
        await tb.operate(FILL, slot=slot, tile=tile, last=last, failed=failed, clear=clear)
        if clear:
            self.forget()

    async def _fill_idle(self):
        """Fill what isn't filling, which changes nothing."""
        config = self.tb.config
        slots = [slot for slot in range(config.slots) if slot not in self.filling]
        if not slots:
            await cycles(self.tb.dut)
            return
        await self.tb.operate(
            FILL,
            slot=self.random.choice(slots),
            tile=self.random.randrange(config.tiles),
            last=self.random.random() < 0.8,
            failed=self.random.random() < 0.5,
        )

    async def _cancel(self):
        """Cancel a fill that waits for no write, or what is no fill at all."""
        tb = self.tb
        slots = [
            slot
            for slot, (_, _, wait, _) in self.filling.items()
            if wait is None or wait[0].sent_count >= wait[1]
        ]
        if not slots or self.random.random() < 0.2:
            slots = [slot for slot in range(tb.config.slots) if slot not in self.filling]
        if slots:
            slot = self.random.choice(slots)
            answer = await tb.operate(CANCEL, slot=slot)
            if answer.code == RESIDENT:
                assert not self.holders.get(slot), "a pinned slot was cancelled"
                del self.filling[slot]

    async def _lock(self, layer):
        tb = self.tb
        if self.locked and self.random.random() < 0.5:
            layer, expert = self.random.choice(sorted(self.locked))
            self.locked.discard((layer, expert))
            await tb.operate(UNLOCK, layer=layer, expert=expert)
            return
        expert = self.random.randrange(tb.config.model.experts)
        if self.random.random() < 0.1:
            await tb.operate(UNLOCK, layer=layer, expert=expert)
            self.locked.discard((layer, expert))
            return
        answer = await tb.operate(LOCK, layer=layer, expert=expert)
        self._allocated(answer, layer)
        if answer.code != NO_SLOT:
            self.locked.add((layer, expert))

    async def _copy(self, layer):
        """Hold or give back copies, mostly of experts that are there or held already."""
        tb, model = self.tb, self.tb.config.model
        slots = [slot for slot in tb.golden.directory.slots if slot.owner >= 0 and not slot.copy]
        held = [slot for slot in slots if slot.held]
        expert = self.random.randrange(model.experts)
        if slots and self.random.random() < 0.9:
            owner = self.random.choice(held if held and self.random.random() < 0.7 else slots).owner
            layer, expert = divmod(owner, model.experts)
        # Room for further copies comes and goes.
        full = tb.golden.locked > tb.config.lockable - 2
        keep = self.random.random() < (0.2 if full else 0.8)
        numbers = [self.random.randrange(tb.config.replicas)]
        if self.random.random() < 0.5:
            # All in order, as the scheduler asks for them.
            numbers = list(range(tb.config.replicas))[:: 1 if keep else -1]
        for number in numbers:
            answer = await tb.operate(COPY, layer=layer, expert=expert, value=number, last=keep)
            self._allocated(answer, layer)
            if answer.code == RESIDENT and not keep and number:
                assert not self.holders.get(answer.slot), "a pinned slot was dropped"

    async def _out_of_range(self):
        """Use a number that is too great, if the fields can hold one."""
        config, model = self.tb.config, self.tb.config.model
        kinds = {
            "ctx": (config.contexts, (DEMAND, RELEASE)),
            "layer": (model.layers, (DEMAND, PREFETCH, RELEASE, LOCK, UNLOCK)),
            "expert": (model.experts, (DEMAND, PREFETCH, LOCK, UNLOCK, COPY)),
            "index": (model.top_k, (DEMAND,)),
            "slot": (config.slots, (FILL, CANCEL)),
            "tile": (config.tiles, (FILL,)),
        }
        used = dict.fromkeys(kinds, 0)
        name = self.random.choice(list(kinds))
        least, ops = kinds[name]
        most = 1 << config.bits(name)
        if least == most:
            return
        used[name] = self.random.randrange(least, most)
        op = self.random.choice(ops)
        if op == COPY:
            used = {"layer": used["layer"], "expert": used["expert"], "value": 0, "last": 1}
        answer = await self.tb.operate(op, **used)
        assert answer.code == INVALID

    async def _release(self):
        if not self.routes or self.random.random() < 0.1:
            ctx = self.random.randrange(self.tb.config.contexts)
            layer = self.random.randrange(self.tb.config.model.layers)
            if (ctx, layer) not in self.routes:
                await self.tb.operate(RELEASE, ctx=ctx, layer=layer)
            return
        ctx, layer = self.random.choice(list(self.routes))
        _, held = self.routes.pop((ctx, layer))
        for slot in held:
            self.holders[slot] -= 1
        clear = self.random.random() < self.clear
        await self.tb.operate(RELEASE, ctx=ctx, layer=layer, clear=clear)
        if clear:
            self.forget()

    async def _reset(self):
        """Reset with a request, writes and reads under way."""
        tb = self.tb
        layer = self.random.randrange(tb.config.model.layers)
        op = self.random.choice([DEMAND, PREFETCH, RELEASE, LOCK])
        for _ in range(3):
            tb.send_values()
        record = dict.fromkeys((field.name for field in RECORDS["BufferRequest"].fields), 0)
        tb.requests.send({**record, "op": op, "layer": layer})
        for _ in range(4):
            self._read()
        await cycles(tb.dut, self.random.choice([self.random.randrange(9), 40]))
        await tb.reset(at_work=True)
        self.forget()

    async def release_all(self):
        """Finish all fills and release all routes and locks."""
        while self.filling:
            self._start_tiles()
            await self._fill()
        while self.routes:
            await self._release()
        for layer, expert in sorted(self.locked):
            await self.tb.operate(UNLOCK, layer=layer, expert=expert)
        experts = self.tb.config.model.experts
        held = [slot for slot in self.tb.golden.directory.slots if slot.held and not slot.copy]
        for slot in held:
            layer, expert = divmod(slot.owner, experts)
            for number in reversed(range(self.tb.config.replicas)):
                await self.tb.operate(COPY, layer=layer, expert=expert, value=number, last=False)
        assert all(not slot.held for slot in self.tb.golden.directory.slots)
        await self.tb.finish_values()


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS))
async def keeps_in_step(dut, stall):
    tb = TB(dut, stall=STALLS[stall])
    await tb.start()
    scheduler = Scheduler(tb)
    await scheduler.run(parameters()["steps"])
    await scheduler.release_all()
    await tb.compare_all()
    points = tb.points
    if stall == "none":
        return
    part = {"light": "light stalls", "bursts": "bursts of stalls"}[stall]
    ops = set(BufferOp) - ({COPY} if tb.config.replicas == 1 else set())
    if points.done == ops and points.policies == set(Policy) and len(points.kinds) > 1:
        points.see("lockstep", part)
    if tb.seen.get(("FURTHER COPY", "ALLOCATED")):
        points.see("copy", part)


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS))
async def clears_and_resets_at_any_time(dut, stall):
    tb = TB(dut, stall=STALLS[stall])
    await tb.start()
    scheduler = Scheduler(tb, clear=0.01, reset=0.01)
    await scheduler.run(parameters()["steps"] // 2)
    scheduler.clear = scheduler.reset = 0.0
    await scheduler.release_all()
    await tb.compare_all()
    for name in tb.clears:
        tb.points.see("clear", name)
    for name in ("in a search", "elsewhere"):
        if tb.resets[name]:
            tb.points.see("reset", name)
    if tb.resets["rescan"]:
        tb.points.see("rescan", "reset")
    if tb.clears and tb.resets and tb.seen.get(("FURTHER COPY", "ALLOCATED")):
        tb.points.see("copy", "clears")


@cocotb.test()
async def lasts(dut):
    """Long run without stalls."""
    tb = TB(dut)
    await tb.start()
    scheduler = Scheduler(tb, beats=1)
    await scheduler.run(4 * parameters()["steps"])
    await scheduler.release_all()
    await tb.compare_all(most=100_000)
    codes = (RESIDENT, FILLING, ALLOCATED, NO_SLOT)
    expected = {(op.name, code.name) for op in (DEMAND, PREFETCH) for code in codes}
    if tb.config.slots > 100:
        expected -= {("DEMAND", "NO_SLOT"), ("PREFETCH", "NO_SLOT")}
    expected |= {("FILL", "RESIDENT"), ("RELEASE", "RESIDENT"), ("RELEASE", "REFUSED")}
    expected |= {("CANCEL", "REFUSED"), ("UNLOCK", "REFUSED")}
    if tb.config.slots > 1:
        expected |= {("CANCEL", "RESIDENT")}
    if 1 < tb.config.slots < 100:
        expected |= {("PREFETCH", "OUTBID")}
    if tb.config.slots > tb.config.contexts * tb.config.model.top_k:
        expected |= {("LOCK", "ALLOCATED"), ("UNLOCK", "RESIDENT")}
    if tb.config.replicas > 1:
        codes = (RESIDENT, FILLING, ALLOCATED, NO_SLOT, REFUSED)
        expected |= {(name, code.name) for name in ("COPY", "FURTHER COPY") for code in codes}
    assert tb.seen.keys() >= expected, expected - tb.seen.keys()
    if tb.points.policies == set(Policy):
        tb.points.see("cycles")
    if parameters()["valued"]:
        expected = {code.name for code in RescanCode}
        if tb.config.model.layers > 1:
            expected.add("far")
        assert {name for name, count in tb.rescan_seen.items() if count} >= expected, tb.rescan_seen


async def count_strobes(tb, counts):
    """Count the strobes of every cycle."""
    names = list(tb.buffer.strobes.shape().members)
    while True:
        await FallingEdge(tb.dut.clk)
        bits = int(tb.dut.strobes.value)
        for number, name in enumerate(names):
            counts[name] = counts.get(name, 0) + (bits >> number & 1)


@cocotb.test()
async def strobes_with_every_refusal(dut):
    tb = TB(dut, stall=0.2)
    await tb.start()
    counts = {}
    cocotb.start_soon(count_strobes(tb, counts))
    scheduler = Scheduler(tb, beats=1)
    await scheduler.run(parameters()["steps"])
    await cycles(dut, 3)
    codes = {"outbid": OUTBID, "refused": REFUSED, "invalid": INVALID}
    expected = {
        name: sum(count for (_, code), count in tb.seen.items() if code == wanted.name)
        for name, wanted in codes.items()
    }
    expected["cancelled"] = tb.seen.get(("CANCEL", "RESIDENT"), 0)
    assert counts == expected
    assert expected["refused"] > 0
    if all(expected.values()):
        tb.points.see("strobes")
    await scheduler.release_all()
    await tb.finish()


@cocotb.test()
async def cancels_nothing_that_is_locked(dut):
    tb = TB(dut)
    await tb.start()
    answer = await tb.operate(PREFETCH, layer=0, expert=1)
    locked = await tb.operate(LOCK, layer=0, expert=1)
    free = tb.config.slots > tb.config.contexts * tb.config.model.top_k
    assert locked.code == (FILLING if free else NO_SLOT)
    refused = await tb.operate(CANCEL, slot=answer.slot)
    assert refused.code == (REFUSED if free else RESIDENT)
    if free:
        await tb.fetch(answer.slot)
        await tb.operate(UNLOCK, layer=0, expert=1)
    await tb.finish()


@cocotb.test()
async def locks_as_many_as_may_be(dut):
    """One lock or copy more is refused, and every demand still finds a slot."""
    tb = TB(dut)
    config, model = tb.config, tb.config.model
    experts = [(layer, expert) for layer in range(model.layers) for expert in range(model.experts)]
    tb.random.shuffle(experts)
    if len(experts) <= config.lockable + 2 or config.lockable == 0:
        return
    await tb.start()
    tb.set_policy(tb.random.choice(list(Policy)))
    missing, fetched = ({"layer": layer, "expert": expert} for layer, expert in experts[:2])
    answer = await tb.operate(PREFETCH, **fetched)
    await tb.fetch(answer.slot, beats=1)
    for layer, expert in experts[2:][: config.lockable]:
        answer = await tb.operate(LOCK, layer=layer, expert=expert)
        assert answer.code == ALLOCATED
    for which in (missing, fetched):
        answer = await tb.operate(LOCK, **which)
        assert answer.code == NO_SLOT
        if config.replicas > 1:
            answer = await tb.operate(COPY, **which, value=0, last=True)
            assert answer.code == NO_SLOT
    for ctx in range(config.contexts):
        for index in range(model.top_k):
            layer = ctx % model.layers
            # Of any other context's route, too.
            expert = (ctx // model.layers * model.top_k + index) % model.experts
            answer = await tb.operate(DEMAND, ctx=ctx, layer=layer, expert=expert, index=index)
            assert answer.code != NO_SLOT
    await tb.finish()


@cocotb.test()
async def keeps_prefetches_by_their_confidence(dut):
    """Until they are demanded, or a route of their layer has begun."""
    tb = TB(dut)
    config, model = tb.config, tb.config.model
    experts = [
        (layer, expert) for layer in range(1, model.layers) for expert in range(model.experts)
    ]
    if config.slots < 4 or len(experts) < config.slots + 4:
        return
    await tb.start()
    tb.random.shuffle(experts)

    async def prefetch(layer, expert, value, *, last=False):
        answer = await tb.operate(PREFETCH, layer=layer, expert=expert, value=value, last=last)
        if answer.code == ALLOCATED:
            await tb.operate(FILL, slot=answer.slot, tile=0, last=1, failed=0)
        return answer

    # By policy LRU every slot is taken, wherever a search would look.
    early = [(await prefetch(0, expert, 80)).slot for expert in range(2)]
    for _ in range(config.slots - 2):
        answer = await prefetch(*experts.pop(), 40)
        assert answer.code == ALLOCATED and not answer.evicted
    tb.set_policy(LFU)
    assert (await prefetch(*experts[-1], 39)).code == OUTBID
    assert (await prefetch(*experts[-1], 40, last=True)).code == OUTBID
    answer = await prefetch(*experts.pop(), 40)
    assert answer.code == ALLOCATED and answer.evicted_unused and answer.slot not in early
    # Layer 0 passes, and one of its experts is used.
    answer = await tb.operate(DEMAND, ctx=0, layer=0, expert=0, index=0)
    assert answer.code == RESIDENT and answer.prefetched
    await tb.operate(RELEASE, ctx=0, layer=0)
    taken = set()
    for _ in early:
        for _ in range(tb.buffer.passes + 1):  # until the search has come round to them
            answer = await prefetch(*experts[-1], 20, last=True)
            if answer.code == ALLOCATED:
                break
        taken.add(answer.slot)
        experts.pop()
    assert taken == set(early)
    await tb.finish()


@cocotb.test()
async def finds_a_victim_in_bounded_cycles(dut):
    """Also where all slots but one are pinned or filling; values wait no longer than that."""
    tb = TB(dut)
    await tb.start()
    config, buffer = tb.config, tb.buffer
    waited = longest = 0

    async def watch():
        nonlocal waited, longest
        while True:
            await FallingEdge(dut.clk)
            waited = 0 if str(dut.values__ready.value) == "1" else waited + 1
            longest = max(longest, waited)

    tb.set_policy(NEXT_USE)
    cocotb.start_soon(watch())
    experts = [
        (layer, expert)
        for layer in range(config.model.layers)
        for expert in range(config.model.experts)
    ]
    tb.random.shuffle(experts)
    filling = []
    while len(filling) < config.slots and experts:
        layer, expert = experts.pop()
        answer = await tb.operate(PREFETCH, layer=layer, expert=expert)
        assert answer.code == ALLOCATED
        filling.append(answer.slot)
    assert sorted(filling) == sorted(set(filling))
    waiting = False
    if experts and len(filling) == config.slots:
        layer, expert = experts.pop()
        for _ in range(12):
            tb.send_values()
        refused = await tb.operate(PREFETCH, layer=layer, expert=expert)
        assert refused.code == NO_SLOT
        assert tb.passes[-1] == buffer.passes
        # More were queued than it takes before it searches.
        waiting = tb.values.pending > 0
        await tb.finish_values()
        await tb.operate(CANCEL, slot=filling.pop())
        await tb.operate(PREFETCH, layer=layer, expert=expert)
    bound = buffer.search_latency + (buffer.passes - 1) * buffer.pass_cycles
    assert 0 < longest < bound
    if (
        waiting
        and parameters()["valued"]
        and longest >= (buffer.passes - 1) * buffer.pass_cycles > 0
    ):
        tb.points.see("values_bounded")
    # Within 50 cycles of its beginning where one slot of the pass may be taken.
    assert config.contexts > 2 or buffer.search_latency - buffer.lookup_latency <= 50
    cocotb.log.info(f"victim after {buffer.search_latency} cycles, at most {bound}")
    await tb.finish()


@cocotb.test()
async def reads_a_beat_in_every_cycle(dut):
    tb = TB(dut)
    await tb.start()
    answer = await tb.operate(DEMAND, ctx=0, layer=0, expert=1, index=0)
    await tb.fetch(answer.slot)
    bank = tb.bank(answer.slot)
    tb.beats[bank].clear()
    beats = tb.config.expert_beats
    # Writes go on in another slot meanwhile.
    other = await tb.operate(PREFETCH, layer=0, expert=0)
    before = sum(writer.sent_count for writer in tb.writers)
    if other.code == ALLOCATED:
        for tile in range(tb.config.tiles):
            tb.write_tile(other.slot, tile)
    for beat in range(beats):
        tb.read(answer.slot, beat)
    while tb.reads[bank].sent_count < 1:
        await cycles(dut)
    await tb.reads[bank].sent()
    last = tb.reads[bank].cycle
    written = sum(writer.sent_count for writer in tb.writers) - before
    while tb.pending:
        await cycles(dut)
    start = last - (beats - 1) + tb.buffer.read_latency
    assert tb.beats[bank].arrival == list(range(start, start + beats))
    assert all(beat["ok"] for beat in tb.beats[bank].received)
    if written > beats // 2:
        tb.points.see("reads_sustained")
    await tb.finish()


@cocotb.test()
async def holds_beats_under_backpressure(dut):
    """Nothing is lost where ``beats`` stands still for long."""
    tb = TB(dut)
    await tb.start()
    answer = await tb.operate(DEMAND, ctx=0, layer=0, expert=1, index=0)
    await tb.fetch(answer.slot)
    beats, held = tb.beats[tb.bank(answer.slot)], 0
    got = len(beats.received)
    for wait in range(12):
        beats.paused = True
        for beat in range(8):
            tb.read(answer.slot, (beat * 5 + wait) % tb.config.expert_beats)
        await cycles(dut, wait + 1)
        held += beats.offers
        beats.paused = False
        await cycles(dut, 1 + wait % 3)
    await tb.finish()
    assert len(beats.received) == got + 12 * 8
    if held:
        tb.points.see("reads_held")


@cocotb.test()
async def reads_out_of_range_are_not_ok(dut):
    tb = TB(dut)
    await tb.start()
    config = tb.config
    for expert in range(config.model.top_k):
        answer = await tb.operate(DEMAND, ctx=0, layer=0, expert=expert, index=expert)
        await tb.fetch(answer.slot)
    places = [(slot, 0) for slot in range(config.slots, 1 << config.bits("slot"))]
    places += [(0, beat) for beat in range(config.expert_beats, 1 << config.bits("beat"))]
    got = sum(len(beats.received) for beats in tb.beats)
    for slot, beat in places:
        tb.expect(slot, beat, [(b"", False)])
    # Ports know only the slots of their bank.
    for bank in range(1, config.replicas):
        tb.pending_of[bank].append((0, 0, [(b"", False)]))
        tb.reads[bank].send({"slot": 0, "beat": 0})
    await tb.finish()
    expected = got + len(places) + config.replicas - 1
    assert sum(len(beats.received) for beats in tb.beats) == expected
    if places and places[0][0] and places[-1][1]:
        # Slots and beats, of which either may have no such numbers.
        tb.points.see("reads_out_of_range")


@cocotb.test()
async def refuses_what_is_out_of_range(dut):
    """Every number that is too great, in every operation that uses it, changes nothing."""
    tb = TB(dut)
    await tb.start()
    scheduler = Scheduler(tb)
    await scheduler.run(40)
    await tb.finish_values()
    config, model, rng = tb.config, tb.config.model, tb.random
    limits = {
        "ctx": config.contexts,
        "layer": model.layers,
        "expert": model.experts,
        "index": model.top_k,
        "slot": config.slots,
        "tile": config.tiles,
    }
    uses = {
        DEMAND: ("ctx", "layer", "expert", "index"),
        PREFETCH: ("layer", "expert"),
        FILL: ("slot", "tile"),
        RELEASE: ("ctx", "layer"),
        CANCEL: ("slot",),
        LOCK: ("layer", "expert"),
        UNLOCK: ("layer", "expert"),
        COPY: ("layer", "expert"),
    }
    others = {COPY: {"value": 0, "last": 1}, FILL: {"last": 1, "failed": 1}}
    tried = set()
    valid = list(tb.golden.storage.valid)
    for op, fields in uses.items():
        cases = [
            {name: number}
            for name in fields
            # All of them, or the first and the last few.
            for number in sorted(
                {*range(limits[name], 1 << config.bits(name))[:2]}
                | {*range(limits[name], 1 << config.bits(name))[-2:]}
            )
        ]
        if op == COPY:
            # Where nothing has copies there is no such operation.
            cases = [*cases, {"value": config.replicas}, {"value": 255}]
            cases += [{}] if config.replicas == 1 else []
        for case in cases:
            used = {name: rng.randrange(limits[name]) for name in fields}
            was = tb.points.before()
            answer = await tb.operate(op, **{**used, **others.get(op, {}), **case})
            assert answer.code == INVALID, f"{op.name} {case}"
            assert tb.points.same(was) and tb.golden.storage.valid == valid
            tried |= {(op, name) for name in case or {"op": 0}}
    wanted = {(op, name) for op, fields in uses.items() for name in fields}
    if config.replicas == 1:
        wanted = {each for each in wanted if each[0] != COPY} | {(COPY, "op")}
    # What it may have changed would be seen.
    await scheduler.run(40)
    await scheduler.release_all()
    await tb.finish()
    if tried >= {each for each in wanted if each[0] != COPY}:
        tb.points.see("out_of_range")
    if config.replicas > 1 and tried >= {each for each in wanted if each[0] == COPY} | {
        (COPY, "value")
    }:
        tb.points.see("copy_out_of_range")


@cocotb.test()
async def takes_writes_of_both_ports(dut):
    """Beats of the host wait for those of the DMA, which never do."""
    tb = TB(dut)
    config = tb.config
    if tb.host_writes is None:
        return
    await tb.start()
    slots = []
    for expert in range(2):
        answer = await tb.operate(PREFETCH, layer=0, expert=expert)
        assert answer.code == ALLOCATED
        slots.append(answer.slot)
    beats = config.expert_beats
    sent = [writer.sent_count for writer in tb.writers]
    for slot, writer in zip(slots, tb.writers, strict=True):
        for beat in range(beats):
            data = tb.random.randbytes(config.data_bytes)
            tb.queued[writer].append((slot, beat, data))
            writer.send({"slot": slot, "beat": beat, "data": data})
            tb.queued_count[writer] += 1
    # The host's come last, each in a cycle of its own.
    await cycles(dut, 2 + beats)
    await ReadWrite()
    assert tb.writes.pending == 0, "beats of the DMA have waited"
    waited = tb.host_writes.pending
    await cycles(dut, waited + 1)
    await ReadWrite()
    assert tb.host_writes.pending == 0
    assert [writer.sent_count - was for writer, was in zip(tb.writers, sent, strict=True)] == [
        beats
    ] * 2
    for slot in slots:
        for tile in range(config.tiles):
            await tb.operate(FILL, slot=slot, tile=tile, last=tile == config.tiles - 1, failed=0)
    for slot in slots:
        for beat in range(beats):
            tb.read(slot, beat)
            assert tb.pending_of[tb.bank(slot)][-1][2][0][1]
    await tb.finish()
    if waited >= beats - 2:
        tb.points.see("host_writes")


@cocotb.test()
async def refuses_copies_without_room(dut):
    """No slot of a copy's bank may be taken, or as many as may be are locked; others are free."""
    tb = TB(dut)
    config = tb.config
    if config.replicas == 1:
        return
    await tb.start()
    experts = [
        (layer, expert)
        for layer in range(config.model.layers)
        for expert in range(config.model.experts)
    ]
    for policy in Policy:
        tb.set_policy(policy)
        layer, expert = experts[0]
        first = await tb.operate(COPY, layer=layer, expert=expert, value=0, last=True)
        await tb.fetch(first.slot, beats=1)
        filling = []
        for layer, expert in experts[1:]:
            answer = await tb.operate(PREFETCH, layer=layer, expert=expert)
            if answer.code == NO_SLOT:
                break
            filling.append(answer.slot)
        for slot in filling:
            if tb.bank(slot) == tb.bank(first.slot):
                await tb.operate(CANCEL, slot=slot)
        layer, expert = experts[0]
        answer = await tb.operate(COPY, layer=layer, expert=expert, value=1, last=True)
        assert answer.code == NO_SLOT
        for slot in filling:
            if tb.bank(slot) != tb.bank(first.slot):
                await tb.operate(CANCEL, slot=slot)
        answer = await tb.operate(COPY, layer=layer, expert=expert, value=1, last=True)
        assert answer.code == ALLOCATED
        await tb.fetch(answer.slot, beats=1)
        await tb.clear()
    await tb.finish()


@cocotb.test()
async def reads_all_banks_in_the_same_cycle(dut):
    """Every copy of an expert has its bytes, and each bank gives a beat in every cycle."""
    tb = TB(dut)
    config, buffer = tb.config, tb.buffer
    if config.replicas == 1:
        return
    await tb.start()
    slots = []
    for number in range(config.replicas):
        answer = await tb.operate(COPY, layer=0, expert=1, value=number, last=True)
        assert answer.code == ALLOCATED
        await tb.fetch(answer.slot)
        slots.append(answer.slot)
    assert sorted(map(tb.bank, slots)) == list(range(config.replicas))
    for beats in tb.beats:
        beats.clear()
    for beat in range(config.expert_beats):
        for slot in slots:
            tb.read(slot, beat)
    await cycles(dut)
    while tb.pending:
        await cycles(dut)
    arrivals = [beats.arrival for beats in tb.beats]
    start = arrivals[0][0]
    assert arrivals == [list(range(start, start + config.expert_beats))] * config.replicas
    assert all(beat["ok"] for beats in tb.beats for beat in beats.received)
    # No port gives the beats of other banks.
    for slot in slots:
        for bank in range(config.replicas):
            if bank != tb.bank(slot):
                tb.pending_of[bank].append((slot, 0, [(b"", False)]))
                tb.reads[bank].send({"slot": slot, "beat": 0})
    await tb.finish()
    tb.points.see("banks_read")
    # One copy fewer: its slot is nobody's, and the others stay.
    gone = config.replicas - 1
    await tb.operate(COPY, layer=0, expert=1, value=gone, last=False)
    for slot in slots:
        tb.read(slot, 0)
        assert tb.pending_of[tb.bank(slot)][-1][2][0][1] == (slot != slots[gone])
    await tb.finish()
    tb.golden.check_invariants()
    assert buffer.read_latency == 6


@cocotb.test()
async def copies_come_and_go(dut):
    """Most slots may be taken, so that the bank and the policy choose among many."""
    tb = TB(dut)
    config, rng = tb.config, tb.random
    if config.replicas == 1:
        return
    await tb.start()
    chosen = set()
    for step in range(parameters()["steps"] // 2):
        if step % 8 == 0:
            tb.set_policy(rng.choice([LRU, LFU, NEXT_USE]))
        layer = rng.randrange(2)
        if rng.random() < 0.4:
            expert = rng.randrange(config.model.experts)
            answer = await tb.operate(DEMAND, ctx=0, layer=layer, expert=expert, index=0)
        else:
            number = rng.randrange(config.replicas)
            keep = rng.random() < 0.6
            expert = rng.randrange(3)
            answer = await tb.operate(COPY, layer=layer, expert=expert, value=number, last=keep)
            if number and answer.code == ALLOCATED:
                chosen.add((tb.golden.policy, answer.slot))
        if answer.code == ALLOCATED and rng.random() < 0.1:
            await tb.operate(FILL, slot=answer.slot, tile=0, last=1, failed=1)
        elif answer.code == ALLOCATED:
            await tb.fetch(answer.slot, beats=1)
        await tb.operate(RELEASE, ctx=0, layer=layer)
        tb.golden.check_invariants()
    # Every policy has chosen, and not always the same slots.
    assert {policy for policy, _ in chosen} == set(Policy)
    assert len({slot for _, slot in chosen}) > 2, chosen
    await tb.finish()
