"""Streams, golden buffer, memory and scoreboard of the scheduler's bench.

::

    commands ───▶ Scheduler ◀──▶ golden buffer (answers lookups after random delays)
    candidates ─▶    │   │ └──▶ its rescans (answered after random delays)
    ready, events ◀──┘   └─────▶ fetches ─▶ memory of random latency ─▶ completions
"""

import random
from collections import Counter, deque

import cocotb
from amaranth import unsigned
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract.benefit import CONFIDENCE_STEPS
from prestage_hw.contract.records import (
    BufferCode,
    BufferOp,
    ErrorCode,
    FetchReason,
    Policy,
    PrefetchKind,
    RescanCode,
    Source,
    ValueKind,
)
from prestage_hw.contract.registers import THROTTLE_FIELDS, register_by_name
from prestage_hw.contract.statistics import statistics_words
from prestage_hw.layouts import RecordLayout
from prestage_hw.scheduler import STROBES, Scheduler
from prestage_sim.model.buffer import ExpertBuffer
from prestage_sim.model.dma import DMA as GoldenDMA
from prestage_sim.model.scheduler import Budget as GoldenBudget
from prestage_sim.model.scheduler import Copy, Event, PrefetchStatistics, Ready, kind_of
from prestage_sim.model.scheduler import Throttle as GoldenThrottle
from prestage_tb.bench import (
    Signals,
    StreamSink,
    StreamSource,
    cycles,
    parameters,
    reset,
    start_clock,
)

__all__ = ["TB"]

# Cycles in which what the bench has seen may not yet have reached the choice of the next tile: from
# a lookup's result or a completion being taken to the table, and from the table to ``fetches``.
SLACK = 6

# Counters of candidates that are dropped without a lookup.
LOST = ("prefetch_stale", "prefetch_overflow", "prefetch_throttled", "prefetch_late_dropped")

# Cycles for which the throttle counts an outcome: what follows from the next lookup waits for it.
OUTCOME = 12


class Entry:
    """A fetch as the scoreboard knows it."""

    def __init__(self, *, layer, expert, slot, demand, ctx, cycle, deadline=0):
        self.layer = layer
        self.expert = expert
        self.slot = slot
        self.demand = demand
        self.ctx = ctx
        self.deadline = deadline
        self.waiters = [ctx] if demand else []
        self.since = cycle  # When it took its place in the order.
        self.offered = 0
        self.completed = 0
        self.failed_at = None  # Cycle in which its first failing completion was taken.
        self.failed_address = None
        self.tag = None
        self.kind = None  # Of a prefetch.
        self.stream = False  # It is one of a prefill chunk's.
        self.shared = False  # Candidates of several decisions were for it.
        self.starving = 0  # Demands that found no slot while it was in flight.
        self.given_up = False
        self.copy = None  # Context and number of the copy that it is fetched for.
        self.again = []  # A context that waits twice: its layer was released and routed again.


class TB:
    """Clock, reset, streams, and a scoreboard that looks at every cycle."""

    def __init__(self, dut, *, stall=0.0, fetch_stall=0.0, latency=(1, 1), failing=0.0, base=0):
        self.dut = dut
        self.ports = Signals(dut)
        self.config = config = parameters()["config"]
        self.weigh_latency = Scheduler(config=config).weigh_latency
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)

        def source(name, record, **options):
            return StreamSource(dut, name, RecordLayout(record, config=config), **options)

        def sink(name, record, **options):
            return StreamSink(dut, name, RecordLayout(record, config=config), **options)

        self.commands = source("commands", "Command", stall=stall)
        self.candidates = source("candidates", "Candidate", stall=stall)
        self.requests = sink("buffer_requests", "BufferRequest", stall=stall)
        self.results = source("buffer_results", "BufferResult", stall=stall)
        self.fetches = sink("fetches", "FetchRequest", stall=fetch_stall)
        self.completions = source("completions", "Completion", stall=stall)
        self.ready = sink("ready", "Ready", stall=stall)
        self.events = sink("events", "Event", stall=stall)
        self.streams = [
            self.commands,
            self.candidates,
            self.requests,
            self.results,
            self.fetches,
            self.completions,
            self.ready,
            self.events,
        ]
        self.copies = self.copied = None
        if config.replicas > 1:
            self.copies = source("copies", "CopyCommand", stall=stall)
            self.copied = sink("copied", "Copy", stall=stall)
            self.streams += [self.copies, self.copied]
        self.rescans = self.rescanned = None
        self.rescan_ahead, self.rescan_least = 0, 24
        if parameters().get("valued"):
            self.rescans = sink("rescans", "RescanRequest", stall=stall)
            self.rescanned = source("rescanned", "RescanResult")
            self.streams += [self.rescans, self.rescanned]
            dut.valued.value = 0
            dut.rescan_ahead.value = 0
            dut.rescan_least.value = 24
        self.latency = latency
        self.failing = failing
        self.base = base
        # The parts' arrays follow each other, the last part's first.
        sizes = config.array_bytes
        self.bases = [base + sum(sizes[part + 1 :]) for part in range(len(sizes))]
        if len(sizes) > 1:
            dut.part_bases.value = sum(
                each << at * config.address_bits for at, each in enumerate(self.bases[1:])
            )
        self.broken = []  # Address ranges of the memory that fail, and why.
        self.reason = FetchReason.BUS
        self.golden_dma = GoldenDMA(config)
        self.prefetch_tiles = 1
        dut.expert_base.value = self.bases[0]
        dut.prefetch_tiles.value = 1
        dut.enable.value = 1
        dut.cutoff_layer.value = 255
        dut.hold.value = 0
        dut.alone.value = 0
        dut.cancel_enable.value = 0
        self.throttle_enable = False
        self.throttle_weights = register_by_name("throttle").reset
        dut.throttle_enable.value = 0
        dut.throttle_weights.value = self.throttle_weights
        dut.clear.value = 0
        dut.clear_statistics.value = 0
        dut.streaming.value = 0
        dut.gathering.value = 0
        dut.budget.value = 0
        self.table = StreamSource(
            dut, "statistics_requests", RecordLayout("TableRequest", config=config), stall=stall
        )
        self.words = StreamSink(dut, "statistics_values", unsigned(32), stall=stall)
        self.streams += [self.table, self.words]
        self.held_for = 0  # Cycles for which candidates have been held.
        self.policy = Policy.LRU
        self.cycle = 0
        self.hold_memory = False
        self.forget()
        cocotb.start_soon(self._watch())

    def forget(self):
        """Start afresh, as after a reset."""
        config = self.config
        self.buffer = ExpertBuffer(config, valued=True)
        self.buffer.policy = self.policy
        self.throttle = GoldenThrottle(config)
        self.throttle.enable = self.throttle_enable
        self.throttle.register = self.throttle_weights
        self.statistics = PrefetchStatistics(config)
        self.budget = GoldenBudget(config)
        self.asked = None  # A rescan under way: its answer, and when that comes.
        self.told = None  # What was found last, and the cycle from which on it does not count.
        self.tried = set()  # Contexts whose find was given no slot since they were woken.
        self.charged = False  # A demand of this decision was charged for waiting.
        self.last_kind = None  # Kind of the prefetch tile that was offered last.
        self.strobes = Counter()
        self.expected = Counter()  # What the strobes must have counted in the end.
        self.memory_queue = deque()
        self.inflight = {}  # Entry by slot.
        self.answers = []
        self.open_demands = deque()  # Commands that were not looked up yet: (command, cycle).
        self.unanswered = []  # Demands that wait: (ctx, layer, expert).
        self.due = deque()  # Answers that must come next on ``ready``, and on ``events``.
        self.due_events = deque()
        self.due_copied = deque()
        self.open_copies = deque()  # Copies that were not decided yet.
        self.copy_waits = False  # The first of them waits until a fetch ends.
        self.queued = deque()  # Candidates that were not looked up yet.
        self.routes = [0] * config.contexts
        self.request = None
        self.last_result = None
        self.lookups = []
        self.log = {}
        self.retrying = None
        self.undecided = None  # An entry of a demand whose result was taken, but not counted yet.
        self.offered_now = None
        self.fill_queue = deque()  # Completions taken whose FILL has not come.
        self.shown = 0
        self.channels = set()  # of the DMA engine that were used
        self.urgent_off = 0  # Cycles for which ``urgent`` has not been what it must become.
        self.whole = set()  # Tiles of experts that came whole.

    async def reset(self):
        self.forget()
        await reset(self.dut, drivers=self.streams)
        self.forget()
        # The statistics are cleared; until then outcomes wait.
        for _ in range(statistics_words(self.config) + 10):
            await RisingEdge(self.dut.clk)
            if str(self.dut.idle.value) == "1":
                return
        raise AssertionError("not idle after a reset")

    # --- stimulus ---

    def demand(self, ctx, layer, experts, *, repeat=0):
        command = {"release": 0, "lock": 0, "ctx": ctx, "layer": layer, "repeat": repeat}
        self.commands.send(*({**command, "expert": e, "index": i} for i, e in enumerate(experts)))

    def release(self, ctx, layer):
        command = {"release": 1, "lock": 0, "ctx": ctx, "layer": layer, "repeat": 0}
        self.commands.send({**command, "expert": 0, "index": 0})

    def replicate(self, ctx, layer, expert, copies):
        """What a REPLICATE becomes."""
        least = copies if copies > 1 else 0
        command = {"ctx": ctx, "layer": layer, "expert": expert}
        for number in reversed(range(least, self.config.replicas)):
            self.copies.send({**command, "copy": number, "keep": 0})
        for number in range(least):
            self.copies.send({**command, "copy": number, "keep": 1})

    def candidate(self, ctx, layer, expert, *, deadline=None, source=Source.PREDICTOR, score=None):
        if deadline is None:
            deadline = (self.sent_routes(ctx) + 1) % 256
        self.candidates.send(
            {
                "ctx": ctx,
                "layer": layer,
                "expert": expert,
                "score": self.random.randrange(256) if score is None else score,
                "source": int(source),
                "deadline": deadline,
            }
        )

    def rescan(self, ahead, *, least=24):
        """Write the registers of rescans. Nobody wakes of that."""
        self.tried.update(range(self.config.contexts))
        self.rescan_ahead, self.rescan_least = ahead, least
        self.dut.rescan_ahead.value = ahead
        self.dut.rescan_least.value = least

    def rescanning(self):
        """Whether rescans take the place of the predictor's candidates."""
        return self.rescan_ahead and str(self.dut.enable.value) == "1"

    def draw_values(self, ctx):
        """Values of some layer."""
        config = self.config
        values = [
            min(int(self.random.expovariate(1 / 40)), 255) for _ in range(config.predictor_lanes)
        ]
        beat = self.random.randrange(config.lane_beats)
        kind = self.random.choice(list(ValueKind))
        return kind, ctx, self.random.randrange(config.model.layers), beat, values

    async def come(self, *values):
        """The buffer takes values."""
        await RisingEdge(self.dut.clk)
        self.buffer.values(*values)
        self._disturb()
        self.tried.discard(values[1])
        self.dut.valued.value = 1 << values[1]
        await RisingEdge(self.dut.clk)
        self.dut.valued.value = 0

    def sent_routes(self, ctx):
        """Routes of a context that the scheduler has looked up, plus those on their way."""
        waiting = sum(
            1
            for c in [*(c for c, _ in self.open_demands), *self._unsent()]
            if not c["release"] and c["index"] == 0 and not c["repeat"] and c["ctx"] == ctx
        )
        return self.routes[ctx] + waiting

    def _unsent(self):
        return [self.commands._unpack(bits) for bits in self.commands._queue]

    def quiet(self):
        """Nothing is under way as far as the bench can see."""
        return not (
            self.commands.pending
            or self.candidates.pending
            or self.open_demands
            or self.unanswered
            or self.inflight
            or self.memory_queue
            or self.request
            or self.due
            or self.due_events
            or self.open_copies
            or self.asked
            or (self.copies is not None and self.copies.pending)
        )

    async def idle(self, limit=200_000):
        """Wait until all is done; ``idle`` must follow at once."""
        for _ in range(limit):
            await RisingEdge(self.dut.clk)
            if self.quiet() and str(self.dut.idle.value) == "1":
                break
        else:
            raise AssertionError(
                f"not idle: {self.open_demands} {self.unanswered} {self.inflight} {self.queued}"
            )
        await cycles(self.dut, 2)
        assert self.quiet() and str(self.dut.idle.value) == "1"
        assert str(self.dut.demanding.value) == "0"
        for name in STROBES:
            if name not in LOST:
                assert self.strobes[name] == self.expected[name], (
                    f"{name} is {self.strobes[name]}, not {self.expected[name]}"
                )
        assert int(self.dut.throttle_state.value) == self.throttle.state
        assert int(self.dut.layer_time.value) == self.budget.layer_time
        assert int(self.dut.tile_time.value) == self.budget.tile_time
        assert self._lost() == self.expected["skipped"] + len(self.queued)
        if not (
            self.strobes["prefetch_overflow"]
            or self.throttle_enable
            or self.strobes["prefetch_late_dropped"]
        ):
            for candidate, _ in self.queued:
                assert self.stale(candidate), f"lost candidate {candidate}"
        self.expected["skipped"] += len(self.queued)
        self.queued.clear()
        self.buffer.check_invariants()
        for ctx in range(self.config.contexts if self.rescanning() else 0):
            found = self.buffer.rescan(ctx, **self._rescan_fields())
            assert found.code == RescanCode.NOTHING or ctx in self.tried, f"{ctx} sleeps: {found}"

    def _lost(self):
        """Candidates that were dropped without a lookup."""
        return sum(self.strobes[name] for name in LOST)

    def throttled(self, **fields):
        """Switch the throttle on with these weights, all others 0; a reset must follow."""
        self.throttle_enable = True
        self.throttle_weights = sum(
            value << THROTTLE_FIELDS[name][0] for name, value in fields.items()
        )
        self.dut.throttle_enable.value = 1
        self.dut.throttle_weights.value = self.throttle_weights

    def throttled_at_random(self):
        """Weights with which kinds are soon switched on and off."""
        self.throttled(
            useful=self.random.randrange(4, 16),
            price=self.random.randrange(4),
            pollution=self.random.randrange(16),
            wait=self.random.randrange(4),
            floor=self.random.choice((2, 10, 24, 40, 127)),
            probe=self.random.randrange(8),
        )

    def taken_slots(self):
        """Slots that demands have taken."""
        return sum(
            op == BufferOp.DEMAND and result.code == BufferCode.ALLOCATED
            for op, _, result in self.lookups
        )

    def stale(self, candidate):
        return (self.routes[candidate["ctx"]] - candidate["deadline"]) % 256 < 128

    # --- scoreboard ---

    def _rescan_fields(self):
        """What a rescan has to ask for now."""
        far = self.throttle.admits(PrefetchKind.FAR)
        return {
            "near": self.throttle.admits(PrefetchKind.NEAR),
            "ahead": self.rescan_ahead if far else 1,
            "least": self.rescan_least,
            "cutoff_layer": self.dut.cutoff_layer.value.to_unsigned(),
        }

    def _disturb(self, *, goes=False):
        """What the buffer says, or has just said, of its values counts no more."""
        if self.asked is not None:
            self.asked = {"code": int(RescanCode.DISTURBED)}, 0
        # What was found is missing still when another expert goes.
        if not goes and self.told is not None and self.told[1] is None:
            self.told[1] = self.cycle

    def _serve_rescans(self):
        """Answer a rescan, and take the next."""
        if self.asked is not None and self.cycle >= self.asked[1]:
            fields = dict.fromkeys(("code", "layer", "expert", "value", "ahead"), 0)
            fields |= {name: int(value) for name, value in self.asked[0].items()}
            self.asked = None
            self.rescanned.send(fields)
            self.told = [fields, None] if fields["code"] == RescanCode.FOUND else None
            self.expected[f"rescan_{RescanCode(fields['code']).name}"] += 1
        request = self._taken(self.rescans)
        if request is not None:
            assert self.asked is None, "one rescan at a time"
            answer = self.buffer.rescan(**request)
            self.asked_ctx = request["ctx"]
            self.asked = answer._asdict(), self.cycle + self.random.choice((1, 4, 30))

    def _found(self, request):
        """The find that is looked up: it must be the last one, and nothing may have changed."""
        assert self.told is not None, "nothing was found"
        found, gone = self.told
        self.told = None
        slack = SLACK + (self.weigh_latency if self.budgeted() else 0)
        assert gone is None or self.shown - gone <= slack, "what was found counts no more"
        for name, value in (("layer", "layer"), ("expert", "expert"), ("value", "value")):
            assert request[name] == found[value]
        assert request["ctx"] == self.asked_ctx
        if not self.throttle_enable and not self.strobes["prefetch_overflow"]:
            waiting = [c for c, at in self.queued if not self.stale(c) and self.shown - at > 20]
            assert not waiting, "what waits in the queue goes first"
        return self._candidate_of(found)

    def _candidate_of(self, found):
        """What a rescan has found, as a candidate."""
        ctx = self.asked_ctx
        return {
            "ctx": ctx,
            "layer": found["layer"],
            "expert": found["expert"],
            "score": found["value"],
            "source": int(Source.PREDICTOR),
            "deadline": (self.routes[ctx] + found["ahead"]) % 256,
        }

    def tiles(self, entry):
        """Tiles of an expert in flight."""
        return self.config.layer_tiles[entry.layer]

    def tile_address(self, layer, expert, tile):
        """Address of a tile of an expert."""
        return self.config.tile_addresses(layer, expert, bases=self.bases)[tile]

    def _taken(self, stream):
        """Payload of a stream if it is taken in this cycle."""
        return stream.payload_now() if stream.moves else None

    async def _watch(self):
        while True:
            await FallingEdge(self.dut.clk)
            self.cycle += 1
            if self.ports.bits("rst") != "0":
                continue
            strobes = self.ports.number("strobes")
            for n in range(strobes.bit_length()):
                if strobes >> n & 1:
                    name = STROBES[n]
                    self.strobes[name] += 1
                    self.log[name] = self.cycle
                    if name == "prefetch_late_dropped":
                        self._dropped_late()
                    if name == "demands" and self.undecided is not None:
                        self._decided()
            self._watch_idle()
            self._watch_offer()
            self._watch_urgent()
            self.held_for = self.held_for + 1 if self.ports.high("hold") else 0
            if not self.requests.offers:
                self.shown = self.cycle + 1  # The cycle in which a request shows next.
            fetch = self._taken(self.fetches)
            if fetch is not None:
                self._fetched(fetch)
            self._serve_memory()
            completion = self._taken(self.completions)
            if completion is not None:
                self._completed(completion)
            answer = self._taken(self.ready)
            if answer is not None:
                self._answered(Ready(**answer), self.due)
            answer = self._taken(self.events)
            if answer is not None:
                self._answered(Event(**answer), self.due_events)
            if self.copies is not None:
                answer = self._taken(self.copied)
                if answer is not None:
                    self._answered(Copy(**answer), self.due_copied)
            result = self._taken(self.results)
            if result is not None:
                self._result(result)
            request = self._taken(self.requests)
            if request is not None:
                self._requested(request)
            command = self._taken(self.commands)
            if command is not None:
                self.open_demands.append((command, self.cycle))
                self.log["command"] = self.cycle
                if not command["release"]:
                    self.unanswered.append((command["ctx"], command["layer"], command["expert"]))
            copy = None if self.copies is None else self._taken(self.copies)
            if copy is not None:
                self.open_copies.append(copy)
                if copy["keep"]:
                    self.unanswered.append((copy["ctx"], copy["layer"], copy["expert"]))
            if self.rescans is not None:
                self._serve_rescans()
            candidate = self._taken(self.candidates)
            proposes = self.ports.high("enable") and not self.rescan_ahead
            if (
                candidate is not None
                and (proposes or candidate["source"] != Source.PREDICTOR)
                and candidate["layer"] < self.ports.number("cutoff_layer")
            ):
                self.queued.append((candidate, self.cycle))

    def _watch_idle(self):
        looked_up = self.request is not None and self.request["op"] == BufferOp.DEMAND
        if (
            looked_up
            or self.retrying is not None
            or any(not c["release"] and self.cycle - at > 2 for c, at in self.open_demands)
        ):
            assert self.ports.high("demanding"), "a demand waits"
        if self.ports.high("idle"):
            assert not (self.open_demands or self.unanswered or self.inflight), "idle too early"
            assert not (self.request or self.memory_queue or self.due or self.due_events)
            assert not (self.open_copies or self.due_copied)
            lost = self._lost()
            assert lost == self.expected["skipped"] + len(self.queued), "idle with candidates"
            for stream in (self.requests, self.fetches, self.ready, self.events):
                assert not stream.offers

    def _watch_offer(self):
        """A tile that is newly offered must be the right one."""
        if "ready" not in self.log and self.ready.offers:
            self.log["ready"] = self.cycle
        if not self.fetches.offers:
            self.offered_now = None
            return
        if self.offered_now is not None:
            return
        fetch = self.offered_now = self.fetches.payload_now()
        self.channels.add(fetch["channel"])
        entry = self.inflight[fetch["slot"]]
        prefetches = self.config.stream_channel if entry.stream else 1
        assert fetch["channel"] == (0 if fetch["demand"] else prefetches)
        self.log.setdefault("fetch", self.cycle)
        entry = self.inflight[fetch["slot"]]
        config = self.config
        address = self.tile_address(entry.layer, entry.expert, fetch["tile"])
        assert fetch["address"] == address % (1 << config.address_bits)
        assert fetch["tile"] == entry.offered, "an entry's tiles must come in order"
        assert entry.tag in (None, fetch["tag"])
        others = [e.tag for e in self.inflight.values() if e is not entry]
        assert fetch["tag"] not in others, "two fetches share an entry"
        entry.tag = fetch["tag"]
        assert entry.failed_at is None or self.cycle - entry.failed_at <= SLACK, (
            "a failed entry must get no further tiles"
        )
        waiting = [
            e
            for e in self.inflight.values()
            if e.demand
            and e.offered < config.layer_tiles[e.layer]
            and e.failed_at is None
            and e is not self.undecided
            and self.cycle - e.since > SLACK
        ]
        if fetch["demand"]:
            assert entry.demand
            for other in waiting:
                assert other is entry or other.since > entry.since, (
                    "tiles of demands must go out in the order of the demands"
                )
        else:
            assert not waiting, "a prefetch tile was offered while a demand's tiles wait"
            late = entry.demand and entry is not self.undecided
            assert not late or self.cycle - entry.since <= SLACK
            under_way = sum(not f["demand"] for f, *_ in self.memory_queue)
            assert all(
                f["demand"] or f["channel"] == fetch["channel"] for f, *_ in self.memory_queue
            ), "prefetch tiles of two channels are under way"
            assert under_way < max(1, self.prefetch_tiles), "too many prefetch tiles with the DMA"
            self.last_kind = entry.kind
        entry.offered += 1

    def _watch_urgent(self):
        """A channel is urgent while a tile of a prefetch is on its way that a demand waits for."""
        tiles = [f for f, *_ in self.memory_queue]
        if self.offered_now is not None:
            tiles.append(self.offered_now)
        wanted = 0
        for fetch in tiles:
            entry = self.inflight[fetch["slot"]]
            if not fetch["demand"] and entry.demand:
                wanted |= 1 << fetch["channel"]
        urgent = self.ports.number("urgent")
        # It follows from what the table knows: a result, or a completion, some cycles later.
        self.urgent_off = 0 if urgent == wanted else self.urgent_off + 1
        if self.urgent_off:
            assert self.urgent_off <= 2 * SLACK + OUTCOME, f"urgent is {urgent:b}, not {wanted:b}"
        elif wanted:
            self.expected["urgent"] += 1

    def _fetched(self, fetch):
        self.budget.fetched(now=self.cycle)
        failing = False
        address = fetch["address"]
        for burst, beats in self.golden_dma.bursts(address, tile=fetch["tile"]):
            end = burst + beats * self.config.data_bytes
            if any(first < end and burst < last for first, last in self.broken):
                failing, address = True, burst
                break
        completion = {
            "tag": fetch["tag"],
            "tile": fetch["tile"],
            "failed": int(failing),
            "address": address,
            "channel": fetch["channel"],
            "reason": int(self.reason if failing else FetchReason.OK),
        }
        due = self.cycle + self.random.randint(*self.latency)
        if self.memory_queue:
            due = max(due, self.memory_queue[-1][2])
        self.memory_queue.append((fetch, completion, due))

    def _serve_memory(self):
        if self.hold_memory or self.completions.pending:
            return
        if self.memory_queue and self.memory_queue[0][2] <= self.cycle:
            self.completions.send(self.memory_queue[0][1])

    def _completed(self, completion):
        fetch, expected, _ = self.memory_queue.popleft()
        assert completion == expected
        self.budget.completed(failed=bool(completion["failed"]), now=self.cycle)
        self.log["completion"] = self.cycle
        self.log.pop("ready", None)
        entry = self.inflight[fetch["slot"]]
        entry.completed += 1
        if completion["failed"]:
            if entry.failed_at is None:
                entry.failed_at = self.cycle
                entry.failed_address = completion["address"]
        elif entry.failed_at is None:
            self.expected["demand_bytes" if fetch["demand"] else "prefetch_bytes"] += 1
        self.fill_queue.append((entry, completion))

    def _answered(self, answer, due):
        assert due, f"nobody waits for {answer}"
        assert answer == due[0]
        due.popleft()
        self.unanswered.remove((answer.ctx, answer.layer, answer.expert))
        self.answers.append(answer)

    def _requested(self, request):
        """The scheduler asks the buffer; the golden buffer answers."""
        assert self.request is None, "one request at a time"
        self.request = request
        op = BufferOp(request["op"])
        key = (request["ctx"], request["layer"], request["expert"])
        if op == BufferOp.FILL:
            entry, completion = self.fill_queue.popleft()
            done = entry.completed == entry.offered and (
                entry.offered == self.tiles(entry) or entry.failed_at is not None
            )
            if request["last"] and not done:
                self._may_be_given_up(entry)
                entry.given_up = done = True
            failed = completion["failed"] or (
                done and (entry.failed_at is not None or entry.given_up)
            )
            assert request["slot"] == entry.slot
            assert request["tile"] == completion["tile"]
            assert (request["last"], request["failed"]) == (int(done), int(failed))
        else:
            assert not self.fill_queue, "a completion goes before everything else"
        if op == BufferOp.CANCEL:
            self._may_be_given_up(self.inflight[request["slot"]])
        if op in (BufferOp.DEMAND, BufferOp.RELEASE):
            self.log["lookup"] = self.cycle
            if self.retrying is not None:
                assert key == self.retrying and op == BufferOp.DEMAND
                assert request["index"] == self.retrying_index
            else:
                command, _ = self.open_demands.popleft()
                assert bool(command["release"]) == (op == BufferOp.RELEASE)
                assert key[:2] == (command["ctx"], command["layer"])
                if op == BufferOp.DEMAND:
                    assert key[2] == command["expert"]
                    assert request["index"] == command["index"]
                    if request["index"] == 0 and not command["repeat"]:
                        self.routes[request["ctx"]] = (self.routes[request["ctx"]] + 1) % 256
                        self.budget.routed(request["ctx"], now=self.shown - 1)
            if op == BufferOp.DEMAND:
                assert len(self.inflight) < self.config.inflight
        if op == BufferOp.PREFETCH:
            assert self.retrying is None
            weighing = self.weigh_latency if self.budgeted() else 0
            assert all(self.shown - since <= 4 + weighing for _, since in self.open_demands), (
                "a command goes before a candidate"
            )
            prefetches = sum(not e.demand for e in self.inflight.values())
            assert prefetches < self.config.prefetch_inflight
            assert len(self.inflight) <= self.config.inflight - 2
            # Only what a rescan has found must be worth more than what leaves its slot.
            if request["last"]:
                candidate = self._found(request)
            else:
                candidate = self._best_of(key, request["value"])
            self.found_looked_up = bool(request["last"])
            self.candidate_looked_up = candidate
            kind = self.kind_of(candidate)
            assert self.throttle.admits(kind), f"{kind} is switched off"
            if self.budgeted():
                asked = self.shown - self.weigh_latency - 2
                assert not self.late(candidate, asked), "a candidate was late"
            held_for = self.held_for - (self.cycle - self.shown)  # when the request was first shown
            assert held_for <= SLACK + (self.weigh_latency if self.budgeted() else 0), (
                "a candidate was looked up while candidates are held"
            )
            if str(self.dut.alone.value) == "1":
                assert not self.inflight, "a candidate was looked up with a fetch in flight"
        if op == BufferOp.COPY:
            self._copy_requested(request)
        if op not in (BufferOp.FILL, BufferOp.RELEASE, BufferOp.UNLOCK) or request["failed"]:
            self._disturb(goes=op in (BufferOp.FILL, BufferOp.CANCEL))
        names = ("ctx", "layer", "expert", "index", "slot", "tile", "value")
        fields = {name: request[name] for name in names}
        result = self.buffer.request(
            op, **fields, last=bool(request["last"]), failed=bool(request["failed"])
        )
        self.results.send({name: int(value) for name, value in result._asdict().items()})
        self.lookups.append((op, key, result))

    def _result(self, result):
        """The answer of the buffer was taken: what must follow from it?"""
        request, self.request = self.request, None
        op, code = BufferOp(request["op"]), BufferCode(result["code"])
        ctx, layer, expert = (request[n] for n in ("ctx", "layer", "expert"))
        slot = result["slot"]
        expected = self.expected
        self.log["result"] = self.cycle
        if op == BufferOp.FILL:
            if request["last"]:
                entry = self.inflight.pop(request["slot"])
                if entry.failed_at is not None:
                    expected["fill_errors"] += 1
                elif entry.given_up:
                    expected["prefetch_cancelled"] += 1
                else:
                    expected["fills"] += 1
                    self.whole.add(self.tiles(entry))
                prefetch = not entry.demand and entry.copy is None
                if prefetch and (entry.failed_at is not None or entry.given_up):
                    self._dropped(entry.slot)
                if prefetch and entry.failed_at is not None:
                    self.tried.update(range(self.config.contexts))
                self.copy_waits = False
                for waiter in sorted(entry.waiters):
                    self._answer(entry, waiter)
                for waiter in entry.again:
                    self._answer(entry, waiter)
                if entry.copy is not None and entry.failed_at is not None:
                    self._answer(entry, entry.copy[0])
                elif entry.copy is not None:
                    ctx, number = entry.copy
                    self.due_copied.append(Copy(ctx, entry.layer, entry.expert, number, entry.slot))
            return
        if op == BufferOp.RELEASE:
            self.tried.clear()
            return
        if op == BufferOp.CANCEL:
            assert code == BufferCode.RESIDENT
            expected["prefetch_cancelled"] += 1
            self._dropped(self.inflight.pop(request["slot"]).slot)
            self.copy_waits = False
            return
        expected["evictions"] += result["evicted"]
        expected["useless"] += result["evicted_unused"]
        if op == BufferOp.COPY:
            self._copy_answered(request, result)
            return
        if op == BufferOp.PREFETCH:
            if self.found_looked_up and code == BufferCode.ALLOCATED:
                # Who leaves its slot wakes nobody; its own context stays awake.
                self.tried.update({*range(self.config.contexts)} - {ctx})
            elif self.found_looked_up:
                self.tried.add(ctx)
            else:
                self.tried.update(range(self.config.contexts))
            if code == BufferCode.ALLOCATED:
                expected["prefetch_issued"] += 1
                candidate = self.candidate_looked_up
                kind = self.kind_of(candidate)
                for told in (self.throttle, self.statistics):
                    told.prefetch(
                        layer,
                        expert,
                        kind,
                        slot=slot,
                        evicted=result["evicted"],
                        unused=result["evicted_unused"],
                    )
                self._start(layer, expert, slot, demand=False, ctx=ctx)
                self.inflight[slot].deadline = candidate["deadline"]
                self.inflight[slot].kind = kind
                streaming = int(self.dut.streaming.value) >> ctx & 1
                self.inflight[slot].stream = bool(streaming) and kind == PrefetchKind.NEAR
            elif code == BufferCode.NO_SLOT:
                expected["prefetch_no_slot"] += 1
            elif code == BufferCode.OUTBID:
                expected["prefetch_outbid"] += 1
            else:
                expected["prefetch_redundant"] += 1
                if code == BufferCode.FILLING:
                    entry = self.inflight[slot]
                    decision = self.candidate_looked_up["ctx"], self.candidate_looked_up["deadline"]
                    entry.shared |= decision != (entry.ctx, entry.deadline)
            return
        self.tried.update(range(self.config.contexts))
        expected["useful"] += result["prefetched"]
        if result["prefetched"]:
            entry = self.inflight.get(slot)
            returned = None if entry is None else entry.completed
            self.throttle.used(slot, returned=returned)
            self.statistics.used(slot, returned=returned)
        if request["index"] == 0:
            self.charged = False
        expected["pollution"] += result["polluted"]
        self.retrying = None
        if code == BufferCode.NO_SLOT and self.inflight:
            self.retrying = (ctx, layer, expert)
            self.retrying_index = request["index"]
            expected["waits"] += 1
            for entry in self.inflight.values():
                entry.starving += 1
            return
        expected["demands"] += 1
        if code == BufferCode.RESIDENT:
            expected["hits"] += 1
            self.due.append(Ready(ctx, layer, expert, slot))
        elif code == BufferCode.ALLOCATED:
            expected["misses"] += 1
            waits_for = self._waits_for()
            self.throttle.miss(
                layer,
                expert,
                slot=slot,
                evicted=result["evicted"],
                unused=result["evicted_unused"],
                waits_for=waits_for,
            )
            self.statistics.miss(
                layer,
                expert,
                slot=slot,
                evicted=result["evicted"],
                unused=result["evicted_unused"],
                polluted=result["polluted"],
            )
            self.charged |= waits_for is not None
            self._start(layer, expert, slot, demand=True, ctx=ctx)
            self.undecided = self.inflight[slot]
        elif code == BufferCode.NO_SLOT:
            expected["refused"] += 1
            self.due_events.append(Event(ErrorCode.NO_SLOT, ctx, layer, expert, 0))
        else:
            entry = self.inflight[slot]
            assert (entry.layer, entry.expert) == (layer, expert)
            expected["merged" if entry.demand else "late"] += 1
            if not entry.demand:
                entry.demand = True
                entry.since = self.cycle
                self.undecided = entry
            if ctx in entry.waiters:
                entry.again = [ctx]
            else:
                entry.waiters.append(ctx)

    def _copy_requested(self, request):
        """A copy is held or given back: is it the next one, and may it be?"""
        command = self.open_copies[0]
        for name, value in (("layer", "layer"), ("expert", "expert"), ("copy", "value")):
            assert request[value] == command[name]
        assert request["last"] == command["keep"]
        assert self.retrying is None
        assert all(self.shown - since <= 4 for _, since in self.open_demands), (
            "a command goes before a copy"
        )
        assert not self.copy_waits, "asked again before a fetch has ended"
        assert all(e.copy is None for e in self.inflight.values()), "one copy at a time"
        assert sum(not e.demand for e in self.inflight.values()) < self.config.prefetch_inflight
        assert len(self.inflight) <= self.config.inflight - 2

    def _copy_answered(self, request, result):
        """What must follow from the buffer's answer to a COPY."""
        command = self.open_copies[0]
        code, slot = BufferCode(result["code"]), result["slot"]
        ctx, layer, expert = (command[n] for n in ("ctx", "layer", "expert"))
        self.expected[f"copy_{code.name}_{command['keep']}"] += 1
        if code == BufferCode.FILLING or (code == BufferCode.NO_SLOT and self.inflight):
            assert self.inflight
            self.copy_waits = True
            return
        self.open_copies.popleft()
        if code == BufferCode.ALLOCATED:
            flags = {"evicted": result["evicted"], "unused": result["evicted_unused"]}
            self.throttle.copied(layer, expert, slot=slot, **flags)
            self.statistics.copied(layer, expert, slot=slot, **flags)
            self._start(layer, expert, slot, demand=False, ctx=ctx)
            self.inflight[slot].copy = ctx, command["copy"]
        elif not command["keep"]:
            pass
        elif code == BufferCode.RESIDENT:
            self.due_copied.append(Copy(ctx, layer, expert, command["copy"], slot))
        else:
            refused = code == BufferCode.REFUSED
            error = ErrorCode.NOT_HELD if refused else ErrorCode.NO_SLOT
            self.due_events.append(Event(error, ctx, layer, expert, 0))

    def late(self, candidate, asked):
        """Whether a candidate was late in the cycle in which the budget was asked."""
        tiles = sum(
            (self.tiles(e) if e.failed_at is None else e.offered) - e.completed
            for e in self.inflight.values()
        )
        ctx = candidate["ctx"]
        deadline = (candidate["deadline"] - self.routes[ctx]) % 256
        eighths = self.dut.budget.value.to_unsigned()
        return self.budget.late(
            ctx, deadline, left=tiles, budget=eighths, now=asked, layer=candidate["layer"]
        )

    def budgeted(self):
        """Candidates that would come late are dropped."""
        return self.dut.budget.value.to_unsigned() and str(self.dut.alone.value) == "0"

    def _dropped_late(self):
        assert self.budgeted(), "a candidate was dropped without a budget"
        asked = self.cycle - self.weigh_latency - 1
        if self.told is not None and not self.queued:
            assert self.late(self._candidate_of(self.told[0]), asked), "what was found is not late"
            self.told = None
            self.tried.add(self.asked_ctx)
            self.expected["skipped"] += 1
            return
        assert any(self.late(c, asked) for c, _ in self.queued if not self.stale(c)), (
            "a candidate was dropped that was not late"
        )

    async def check_statistics(self, *, words=24):
        """Compare counters of the table with the model's: all that are not 0, and some others."""
        count = self.statistics.words
        wanted = [word for word in range(count) if self.statistics.read(word)]
        wanted += [self.random.randrange(count) for _ in range(words)] + [count - 1, count]
        for word in wanted:
            self.table.send({"write": 0, "table": 0, "word": word, "value": 0})
        assert await self.words.receive(len(wanted)) == [self.statistics.read(w) for w in wanted]

    def _dropped(self, slot):
        self.throttle.dropped(slot)
        self.statistics.dropped(slot)

    def _best_of(self, key, score):
        """The candidate that is looked up, taken from those that wait; it must be the best."""
        ours = [
            (candidate, since)
            for candidate, since in self.queued
            if candidate["ctx"] == key[0] and not self.stale(candidate)
        ]
        candidate, since = min(
            (
                (candidate, since)
                for candidate, since in ours
                if key == tuple(candidate[n] for n in ("ctx", "layer", "expert"))
                and candidate["score"] == score
            ),
            key=lambda waiting: self.steps_left(waiting[0]),
        )
        if not (
            self.strobes["prefetch_overflow"]
            or self.throttle_enable
            or self.dut.budget.value.to_unsigned()
        ):
            for other, other_since in ours:
                better = (self.steps_left(other), other_since) < (self.steps_left(candidate), since)
                # It was chosen when its lookup began.
                assert not better or self.shown - other_since <= SLACK, "not the best candidate"
        self.queued.remove((candidate, since))
        return candidate

    def steps_left(self, candidate):
        ahead = (candidate["deadline"] - self.routes[candidate["ctx"]]) % 256
        return ahead + CONFIDENCE_STEPS[candidate["score"]]

    def kind_of(self, candidate):
        return kind_of(
            candidate["source"], candidate["deadline"], routes=self.routes[candidate["ctx"]]
        )

    def _decided(self):
        """The demand whose result was taken last has its place in the order from now on."""
        assert self.cycle - self.undecided.since <= SLACK + OUTCOME, "a demand's result waits"
        self.undecided.since = self.cycle
        self.undecided = None

    def _may_be_given_up(self, entry):
        """It is a prefetch in part, of which nothing is on its way, and its deadline has come."""
        assert str(self.dut.cancel_enable.value) == "1"
        assert entry.copy is None, "a copy is never given up"
        assert not entry.demand and entry.completed == entry.offered < self.tiles(entry)
        age = (self.routes[entry.ctx] - entry.deadline) % 256
        gathering = self.ports.number("gathering") >> entry.ctx & 1
        if age >= 128 or entry.shared or (gathering and age == 0):
            assert entry.starving, "given up too early"
            self.expected["spared"] += 1

    def _waits_for(self):
        """Kind of the prefetch tile that a demand finds before it, once a decision."""
        offered = [] if self.offered_now is None else [self.offered_now]
        under_way = any(not f["demand"] for f in [*offered, *(f for f, *_ in self.memory_queue)])
        return self.last_kind if under_way and not self.charged else None

    def _start(self, layer, expert, slot, *, demand, ctx):
        assert slot not in self.inflight, "a transfer into the slot is in flight"
        self.inflight[slot] = Entry(
            layer=layer, expert=expert, slot=slot, demand=demand, ctx=ctx, cycle=self.cycle
        )
        if self.random.random() < self.failing:
            spans = self.config.expert_spans(layer, expert, bases=self.bases)
            at, size = self.random.choice(spans)
            first = at + self.random.randrange(0, size, self.config.data_bytes)
            self.broken.append((first, first + self.config.data_bytes))

    def _answer(self, entry, ctx):
        if entry.failed_at is None:
            self.due.append(Ready(ctx, entry.layer, entry.expert, entry.slot))
        else:
            self.due_events.append(
                Event(
                    ErrorCode[self.reason.name],
                    ctx,
                    entry.layer,
                    entry.expert,
                    entry.failed_address,
                )
            )
