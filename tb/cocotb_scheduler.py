"""Scheduler against a scoreboard and its golden model (the half that runs in the simulator).

::

    commands ───▶ Scheduler ◀──▶ golden buffer (answers lookups after random delays)
    candidates ─▶    │   │ └──▶ its rescans (answered after random delays)
    ready, events ◀──┘   └─────▶ fetches ─▶ memory of random latency ─▶ completions
"""

import random
from collections import Counter, deque

import cocotb
import numpy as np
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
    PrefetchOutcome,
    RescanCode,
    Source,
    ValueKind,
)
from prestage_hw.contract.registers import THROTTLE_FIELDS, register_by_name
from prestage_hw.contract.statistics import statistics_words
from prestage_hw.layouts import RecordLayout
from prestage_hw.scheduler import STROBES, CandidateQueue, Scheduler
from prestage_sim.model.buffer import ExpertBuffer
from prestage_sim.model.dma import DMA as GoldenDMA
from prestage_sim.model.dma import Memory
from prestage_sim.model.scheduler import Budget as GoldenBudget
from prestage_sim.model.scheduler import Copy, Event, PrefetchStatistics, Ready, kind_of
from prestage_sim.model.scheduler import Scheduler as GoldenScheduler
from prestage_sim.model.scheduler import Throttle as GoldenThrottle
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


class Workload:
    """Layers of several contexts with experts that come back, and candidates good and bad."""

    def __init__(self, tb, *, hold=0):
        self.tb = tb
        self.config = tb.config
        self.random = tb.random
        self.layer = [0] * tb.config.contexts
        self.pending = [deque() for _ in range(tb.config.contexts)]
        self.hold = hold

    def experts(self):
        model = self.config.model
        # A few experts are popular, so that hits, merges and redundant candidates are common.
        popular = min(model.experts, 2 * model.top_k)
        chosen = []
        while len(chosen) < model.top_k:
            limit = popular if self.random.random() < 0.6 else model.experts
            expert = self.random.randrange(limit)
            if expert not in chosen:
                chosen.append(expert)
        return chosen

    def candidates(self, ctx, layer):
        model = self.config.model
        popular = min(model.experts, 2 * model.top_k)
        count = self.random.choice((0, 1, 3, model.top_k, popular))
        limit = popular if self.random.random() < 0.6 else model.experts
        experts = self.random.sample(range(limit), count if count < limit else limit)
        return [((layer + 1) % min(model.layers, self.hold + 4), expert) for expert in experts]

    def step(self, ctx):
        """Route one layer of a context, after releasing enough that it may be routed."""
        # Few layers, so that experts come back soon.
        layers = min(self.config.model.layers, self.hold + 4)
        layer = self.layer[ctx]
        self.layer[ctx] = (layer + 1) % layers
        pending = self.pending[ctx]
        while pending and (layer in pending or len(pending) > self.hold):
            self.tb.release(ctx, pending.popleft())
        experts = self.experts()
        # Candidates of a layer that is routed again do not age.
        self.repeat = int(self.random.random() < 0.2)
        self.tb.demand(ctx, layer, experts, repeat=self.repeat)
        pending.append(layer)
        return layer, experts

    def hot(self):
        """An expert that may get copies: few, so that those come that have some."""
        model = self.config.model
        layer = self.random.randrange(min(2, model.layers))
        return layer, self.random.randrange(min(3, model.experts))

    def release_all(self):
        for ctx, pending in enumerate(self.pending):
            while pending:
                self.tb.release(ctx, pending.popleft())


STALLS = {"none": 0.0, "some": 0.3, "long": Stall(0.5, burst=(1, 30))}


@cocotb.test()
@cocotb.parametrize(
    (
        ("stall", "latency", "failing"),
        [
            ("none", (1, 4), 0.0),
            ("none", (20, 120), 0.1),
            ("some", (1, 4), 0.1),
            ("some", (20, 120), 0.0),
            ("long", (1, 4), 0.1),
        ],
    )
)
async def timed(dut, stall, latency, failing):
    """Routes come while earlier ones are under way; the scoreboard checks every cycle."""
    await run_timed(dut, stall, latency, failing)


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS))
async def copies_timed(dut, stall):
    """The same with copies that come and go meanwhile."""
    if parameters()["config"].replicas == 1:
        return
    tb = await run_timed(dut, stall, (5, 60), 0.1)
    codes = ("ALLOCATED_1", "RESIDENT_1", "RESIDENT_0", "REFUSED_1", "REFUSED_0", "FILLING_1")
    for code in codes:
        assert tb.expected[f"copy_{code}"], f"the workload has no {code}"
    hit("scheduler.copies")


async def run_timed(dut, stall, latency, failing):
    config = parameters()["config"]
    base = 16 * config.data_bytes * 3
    tb = TB(
        dut,
        stall=STALLS[stall],
        fetch_stall=STALLS[stall],
        latency=latency,
        failing=failing,
        base=base,
    )
    tb.policy = tb.random.choice(list(Policy))
    dut.cancel_enable.value = int(latency[1] > 4)
    if stall == "some" or failing:
        tb.throttled_at_random()
    if latency[1] <= 4:
        # What is given up is known to the scoreboard only when it ends.
        dut.budget.value = tb.random.randrange(1, 9)
    dut.streaming.value = tb.random.randrange(1 << config.contexts)
    dut.gathering.value = tb.random.randrange(1 << config.contexts)
    await tb.reset()
    work = Workload(tb, hold=1)
    for step in range(60):
        dut.hold.value = int(tb.random.random() < 0.3)
        ctx = tb.random.randrange(config.contexts)
        layer, experts = work.step(ctx)
        await tb.commands.sent()
        for target, expert in work.candidates(ctx, layer):
            tb.candidate(ctx, target, expert)
        if config.replicas > 1 and tb.random.random() < 0.5:
            # Also of what has just been demanded, and may be in flight.
            hot = tb.random.choice([work.hot(), (layer, experts[-1])])
            tb.replicate(ctx, *hot, tb.random.randrange(1, config.replicas + 1))
        if tb.random.random() < 0.2:
            tb.candidate(
                ctx, layer, tb.random.randrange(config.model.experts), deadline=tb.routes[ctx]
            )
        if tb.random.random() < 0.3:
            tb.broken.clear()
        if step % 10 == 9:
            tb.prefetch_tiles = 4
            dut.hold.value = 0
            await tb.idle()
            tb.prefetch_tiles = tb.random.randrange(5)
            dut.prefetch_tiles.value = tb.prefetch_tiles
        else:
            await cycles(dut, tb.random.randrange(1, 150))
    work.release_all()
    dut.hold.value = 0
    await tb.idle()
    names = ["hits", "misses"]
    if stall != "long" and not tb.throttle_enable:
        # Otherwise commands wait nearly always, and candidates behind them.
        names += ["prefetch_issued", "prefetch_redundant", "prefetch_stale"]
    for name in names:
        assert tb.strobes[name], f"the workload has no {name}"
    await tb.check_statistics()
    if tb.expected["urgent"]:
        hit("scheduler.urgent")
    if config.rows and tb.whole:
        hit("scheduler.rows")
    if tb.strobes["fill_errors"] and config.contexts > 1:
        hit("scheduler.timed")
        if len(config.part_bytes) > 1 and tb.whole:
            hit("scheduler.parts")
        if config.layer_bytes and tb.whole == set(config.layer_tiles):
            hit("scheduler.sizes")
    dut._log.info("counters: %s", dict(tb.strobes))
    return tb


@cocotb.test()
@cocotb.parametrize(
    (
        ("stall", "failing", "full"),
        [
            ("none", False, False),
            ("none", True, True),
            ("some", False, True),
            ("some", True, False),
            ("long", True, True),
        ],
    )
)
async def drained(dut, stall, failing, full):
    """At drained pace all counters and the order of the answers are the golden model's."""
    await run_drained(dut, stall, failing, full)


@cocotb.test()
@cocotb.parametrize((("stall", "failing"), [("none", False), ("some", True)]))
async def copies_drained(dut, stall, failing):
    """The same with copies between the decisions."""
    if parameters()["config"].replicas > 1:
        tb = await run_drained(dut, stall, failing, False)
        for code in ("ALLOCATED_1", "RESIDENT_0"):
            assert tb.expected[f"copy_{code}"], f"the workload has no {code}"
        if failing and tb.strobes["prefetch_throttled"]:
            hit("scheduler.copies_drained")


async def run_drained(dut, stall, failing, full):
    config = parameters()["config"]
    tb = TB(
        dut,
        stall=STALLS[stall],
        fetch_stall=STALLS[stall],
        # A slot that a failing fetch frees is the next to be taken: the model has it come back
        # after the decision's lookups.
        latency=(400, 420) if failing else (1, 60),
        base=config.data_bytes,
    )
    if not failing and config.slots >= 2 * config.contexts * config.model.top_k:
        # How often a demand that waits for a slot asks again hangs on time.
        tb.policy = tb.random.choice(list(Policy))
    if stall != "none":
        tb.throttled_at_random()
    dut.cancel_enable.value = 1
    await tb.reset()
    model = config.model
    size = tb.base + config.memory_bytes
    if failing:
        for _ in range(model.layers * model.experts // 8):
            first = tb.random.randrange(size // config.data_bytes) * config.data_bytes
            tb.broken.append((first, first + config.data_bytes))
    counters = Counter()
    golden_buffer = ExpertBuffer(config)
    golden_buffer.policy = tb.policy
    golden = GoldenScheduler(
        config,
        buffer=golden_buffer,
        memory=Memory(np.zeros(size, np.uint8), failing=tb.broken),
        counters=counters,
    )
    golden.bases = list(tb.bases)
    golden.throttle.enable = tb.throttle_enable
    golden.throttle.register = tb.throttle_weights
    # With many layers unreleased every slot is pinned in the end, and demands are refused.
    hold = config.slots // model.top_k + 1 if full else 1
    work = Workload(tb, hold=min(hold, model.layers - 1))
    # No candidate takes the slot of another that was to fail.
    dut.alone.value = int(failing or tb.policy != Policy.LRU)
    for step in range(80 if model.layers < 10 else 60):
        ctx = tb.random.randrange(config.contexts)
        before = list(work.pending[ctx])
        first = len(tb.answers)
        layer, experts = work.step(ctx)
        for old in before[: len(before) + 1 - len(work.pending[ctx])]:
            golden.release(ctx, old)
        expected = golden.demand(ctx, layer, experts, repeat=bool(work.repeat))
        await tb.commands.sent()
        candidates = [
            (
                ctx,
                target,
                expert,
                tb.random.randrange(256),
                Source.PREDICTOR,
                (tb.sent_routes(ctx) + tb.random.choice((0, 1, 1, 1))) % 256,
            )
            for target, expert in work.candidates(ctx, layer)
        ]
        # All are there before the first is served.
        dut.hold.value = 1
        for c in candidates:
            tb.candidate(ctx, c[1], c[2], score=c[3], deadline=c[5])
        golden.offer(candidates)
        await tb.candidates.sent()
        dut.hold.value = 0
        await tb.idle()
        if config.replicas > 1 and tb.random.random() < 0.6:
            wanted = (ctx, *work.hot(), tb.random.randrange(1, config.replicas + 1))
            tb.replicate(*wanted)
            expected = [*expected, *golden.replicate(*wanted)]
            await tb.copies.sent()
            await tb.idle()
        answers = tb.answers[first:]
        check_order(answers, expected)
        for name in STROBES:
            unit = config.tile_bytes if name.endswith("bytes") else 1
            assert tb.strobes[name] * unit == counters[name], f"{name} after step {step}"
        assert int(dut.throttle_state.value) == golden.throttle.state
    for op, count in Counter(op for op, _, _ in tb.lookups).items():
        dut._log.info("%s: %d", op.name, count)
    dut._log.info("counters: %s", dict(tb.strobes))
    if full and hold <= model.layers - 1:
        assert tb.strobes["refused"]
    if failing:
        assert tb.strobes["fill_errors"]
    assert [golden.statistics.read(w) for w in range(golden.statistics.words)] == [
        tb.statistics.read(w) for w in range(tb.statistics.words)
    ]
    await tb.check_statistics()
    assert list(tb.buffer.recency) == list(golden_buffer.recency)
    for name in ("state", "pins", "evicted_by_prefetch"):
        ours = getattr(tb.buffer.directory, name)
        assert ours == getattr(golden_buffer.directory, name), name
    hit("scheduler.drained", *seen_drained(tb), of=DRAINED)
    return tb


#: What runs at drained pace have to differ in.
DRAINED = (*Policy, "throttle off", "throttled", "failing")


def seen_drained(tb):
    """Those of :data:`DRAINED` that a run has shown."""
    seen = [tb.policy] if tb.strobes["evictions"] else []
    if not tb.throttle_enable:
        seen.append("throttle off")
    if tb.strobes["prefetch_throttled"] and tb.strobes["prefetch_issued"]:
        seen.append("throttled")
    if tb.strobes["fill_errors"]:
        seen.append("failing")
    return seen


def check_order(answers, expected):
    """``answers`` must be an order that the golden model's docstring allows."""
    assert Counter(answers) == Counter(expected)
    events = [a for a in answers if isinstance(a, Event)]
    assert events == [a for a in expected if isinstance(a, Event)]


@cocotb.test()
async def latencies(dut):
    """Cycles beside the buffer's, and all of what they lead to."""
    tb = TB(dut)
    await tb.reset()
    await cycles(dut, 5)

    def passed(first, last):
        return tb.log[last] - tb.log[first]

    # The golden buffer answers one cycle after the request is taken.
    b = 1
    tb.hold_memory = True
    tb.demand(0, 0, [3])
    while "fetch" not in tb.log:
        await cycles(dut, 1)
    assert passed("lookup", "result") == b
    miss = passed("command", "fetch") - b
    tb.hold_memory = False
    await tb.idle()
    fill = passed("completion", "ready") - b
    tb.release(0, 0)
    await tb.idle()
    tb.log.clear()
    tb.demand(0, 0, [3])
    await tb.idle()
    resident = passed("command", "ready") - b
    dut._log.info("latency without the buffer's: hit %d, miss %d, fill %d", resident, miss, fill)
    assert (resident, miss, fill) == (
        Scheduler.hit_latency,
        Scheduler.miss_latency,
        Scheduler.fill_latency,
    )
    hit("scheduler.latencies")


@cocotb.test()
async def demand_promotes_a_prefetch(dut):
    """A demand for a prefetch that is partly fetched takes over the rest of its tiles."""
    tb = TB(dut, latency=(5, 5))
    await tb.reset()
    config = tb.config
    tb.hold_memory = True
    tb.candidate(0, 1, 5, deadline=1)
    await cycles(dut, 60)
    assert [f["demand"] for f, *_ in tb.memory_queue] == [0]
    tb.demand(0, 1, [5])
    await cycles(dut, 60)
    tiles = config.layer_tiles[1]
    assert [f["demand"] for f, *_ in tb.memory_queue] == [0] + [1] * (tiles - 1)
    tb.hold_memory = False
    await tb.idle()
    assert [type(a) for a in tb.answers] == [Ready]
    assert tb.strobes == {
        "prefetch_issued": 1,
        "demands": 1,
        "late": 1,
        "useful": 1,
        "prefetch_bytes": 1,
        "fills": 1,
        **({"demand_bytes": tiles - 1} if tiles > 1 else {}),
    }
    if tiles > 1:
        assert tb.channels == {0, 1}
        hit("scheduler.promote")


@cocotb.test()
@cocotb.parametrize((("tiles_out", "wanted"), [(1, False), (1, True), (0, False)]))
async def routed_layer_gives_up(dut, tiles_out, wanted):
    """What a decision did not want gets no more tiles, unless a demand comes for it after all."""
    tb = TB(dut, latency=(5, 5))
    config = tb.config
    if config.layer_tiles[1] < (2 if tiles_out else 3):
        return  # An expert of so few tiles is never given up like that.
    dut.cancel_enable.value = 1
    await tb.reset()
    tb.hold_memory = True
    tb.candidate(0, 1, config.model.experts - 1, deadline=1)
    await cycles(dut, 60)
    assert len(tb.memory_queue) == 1
    if not tiles_out:
        # The second tile must not leave before the demands do.
        tb.fetches.paused = True
        tb.hold_memory = False
        await cycles(dut, 60)
        assert not tb.memory_queue and tb.offered_now is not None
        tb.hold_memory = True
    tb.demand(0, 1, list(range(config.model.top_k)))
    await cycles(dut, 200)
    tb.fetches.paused = False
    if wanted:
        tb.release(0, 1)
        tb.demand(0, 1, [config.model.experts - 1])
        await cycles(dut, 60)
    tb.hold_memory = False
    await tb.idle()
    assert tb.strobes["prefetch_cancelled"] == int(not wanted)
    assert tb.strobes["prefetch_bytes"] == (1 if tiles_out else 2)
    assert tb.strobes["late"] == int(wanted)
    assert len(tb.answers) == config.model.top_k + int(wanted)
    assert all(isinstance(answer, Ready) for answer in tb.answers)
    # It may be fetched anew.
    again = 2 if wanted else 1
    tb.candidate(0, again, config.model.experts - 1)
    await tb.idle()
    assert tb.strobes["prefetch_issued"] == 2
    if wanted:
        hit("scheduler.give_up_wanted")
    else:
        hit("scheduler.give_up", tiles_out, of=(0, 1))


@cocotb.test()
async def a_chunk_keeps_its_prefetches(dut):
    """A layer's first route leaves them to the chunk's other tokens; the next layer's does not."""
    tb = TB(dut, latency=(5, 5))
    config = tb.config
    if config.layer_tiles[1] < 2:
        return
    ctx = config.contexts - 1
    dut.cancel_enable.value = 1
    dut.gathering.value = 1 << ctx
    await tb.reset()
    experts = list(range(config.model.top_k))
    # So that no demand waits for memory.
    for layer in range(1, 4):
        tb.demand(ctx, layer, experts)
        tb.release(ctx, layer)
        await tb.idle()
    for late in (False, True):
        tb.hold_memory = True
        before = tb.strobes["prefetch_cancelled"]
        layer = 2 if late else 1
        tb.candidate(ctx, layer, config.model.experts - 1)
        await cycles(dut, 60)
        tb.demand(ctx, layer, experts)
        tb.release(ctx, layer)
        await cycles(dut, 200)
        tb.demand(ctx, layer + late, experts, repeat=int(not late))
        tb.release(ctx, layer + late)
        await cycles(dut, 300)
        tb.hold_memory = False
        await tb.idle()
        assert tb.strobes["prefetch_cancelled"] - before == late
    hit("scheduler.chunk_keeps")


@cocotb.test()
async def candidates_share_a_fetch(dut):
    """What two contexts are predicted to choose comes, though one of them does not."""
    tb = TB(dut, latency=(5, 5))
    config = tb.config
    if config.contexts < 2 or config.layer_tiles[1] < 2:
        return
    dut.cancel_enable.value = 1
    for shared in (False, True):
        await tb.reset()
        tb.hold_memory = True
        tb.candidate(0, 1, config.model.experts - 1)
        await cycles(dut, 60)
        # The same decision's once more changes nothing.
        tb.candidate(int(shared), 1, config.model.experts - 1)
        await cycles(dut, 60)
        assert tb.strobes["prefetch_redundant"] == 1
        tb.demand(0, 1, list(range(config.model.top_k)))
        await cycles(dut, 200)
        tb.hold_memory = False
        await tb.idle()
        assert tb.strobes["prefetch_cancelled"] == (not shared)
    hit("scheduler.candidates_share")


@cocotb.test()
async def gives_up_at_any_moment(dut):
    """Tiles leave and come back around the moment at which an entry is looked at."""
    tb = TB(dut, latency=(1, 40), fetch_stall=0.5)
    config = tb.config
    dut.cancel_enable.value = 1
    ended = set()
    for _ in range(120):
        # Forgets what the last round fetched.
        tb.prefetch_tiles = tb.random.randrange(1, 5)
        dut.prefetch_tiles.value = tb.prefetch_tiles
        await tb.reset()
        layer = tb.random.randrange(1, config.model.layers)
        for expert in range(config.model.top_k, config.model.experts):
            tb.candidate(0, layer, expert, deadline=(tb.routes[0] + 1) % 256)
        await cycles(dut, tb.random.randrange(60 * config.tiles))
        tb.demand(0, layer, list(range(config.model.top_k)))
        await tb.idle()
        ended.add(tb.strobes["prefetch_cancelled"] > 0)
    assert ended == ({False, True} if config.tiles > 1 else {False})


@cocotb.test()
async def throttle_switches_off_and_on(dut):
    """Useless prefetches switch their kind off; it probes, and useful probes switch it on."""
    tb = TB(dut, latency=(1, 3))
    config = tb.config
    model = config.model
    tb.throttled(useful=8, price=4, pollution=8, wait=1, floor=24, probe=4)
    await tb.reset()
    k = model.top_k

    async def layer(experts, candidates, *, at):
        tb.demand(0, at, experts)
        await tb.idle()
        tb.release(0, at)
        for expert in candidates:
            tb.candidate(0, (at + 1) % model.layers, expert)
        await tb.idle()

    def issued():
        return tb.strobes["prefetch_issued"]

    def experts(step):
        first = step * k % (model.experts - k)
        return list(range(first, first + k))

    # At first it may only probe, after 16 misses, though every candidate proves right.
    steps = 0
    while not tb.throttle.state >> 24 & 1:
        await layer(experts(steps), experts(steps + 1)[:1], at=steps % model.layers)
        steps += 1
        assert steps < 400
    assert tb.strobes["prefetch_throttled"] and 1 <= issued() < tb.strobes["prefetch_throttled"]
    # Now every candidate goes through; wrong ones switch it off again.
    before = issued()
    while tb.throttle.state >> 24 & 1:
        wrong = [e for e in range(model.experts) if e not in experts(steps + 1)][:1]
        await layer(experts(steps), wrong, at=steps % model.layers)
        steps += 1
        assert steps < 800
    assert issued() > before
    before = tb.strobes["prefetch_throttled"]
    await layer(experts(steps), experts(steps + 1), at=steps % model.layers)
    assert tb.strobes["prefetch_throttled"] > before
    # A clear forgets all.
    await cycles(dut, 2)
    dut.clear.value = 1
    await cycles(dut, 1)
    dut.clear.value = 0
    tb.throttle.clear()
    await cycles(dut, 6)
    assert int(dut.throttle_state.value) == tb.throttle.state
    hit("scheduler.throttle")


async def paced(tb, *, cycles_a_layer, layers):
    """Route layers at a steady pace, and then let one more begin."""
    config = tb.config
    for layer in range(layers + 1):
        tb.demand(0, layer % config.model.layers, list(range(config.model.top_k)))
        tb.release(0, layer % config.model.layers)
        if layer < layers:
            await cycles(tb.dut, cycles_a_layer)


#: In eighths of an expert; what is more counts as a whole one.
BUDGETS = [0, 1, 4, 8, 15]


@cocotb.test()
@cocotb.parametrize(budget=BUDGETS)
async def drops_what_comes_late(dut, budget):
    """What would come late is dropped: by the budget, the deadline, and what is in flight."""
    latency = 40
    tb = TB(dut, latency=(latency, latency))
    config = tb.config
    pace = latency * config.tiles * (config.model.top_k + 4)
    await tb.reset()
    expert = config.model.experts - 1
    # Without a mean nothing is late.
    dut.budget.value = budget
    tb.candidate(0, 2, expert, deadline=1)
    await tb.idle()
    await paced(tb, cycles_a_layer=pace, layers=6)
    await tb.idle()
    assert pace <= tb.budget.layer_time <= pace + 9
    assert tb.strobes["prefetch_late_dropped"] == 0 and tb.strobes["prefetch_issued"] == 1
    # All of it comes in time, some of it, none.
    eighths = -(-config.tiles * min(budget, 8) // 8)
    for at in (pace // 2, pace - latency * config.tiles * 3 // 4, pace - 20, pace + 50):
        tb.demand(0, 3, list(range(config.model.top_k)))
        tb.release(0, 3)
        await tb.commands.sent()
        began = tb.cycle
        while tb.cycle - began < at:
            await cycles(dut, 1)
        before = tb.strobes["prefetch_late_dropped"]
        left = tb.budget.layer_time - (tb.cycle - began)
        issued = tb.strobes["prefetch_issued"]
        # For the layer after next there is time.
        tb.candidate(0, 0, expert - 1, deadline=tb.routes[0] + 2, score=0)
        tb.candidate(0, 1, expert - 2, deadline=tb.routes[0] + 1, score=255)
        await tb.idle()
        late = budget > 0 and eighths * tb.budget.tile_time > left
        assert tb.strobes["prefetch_late_dropped"] - before == int(late), (at, left)
        if at == pace - 20:
            assert late == (budget > 0)
        assert tb.strobes["prefetch_issued"] - issued <= 2
        await tb.reset()
        dut.budget.value = 0
        tb.candidate(0, 2, expert, deadline=1)
        await tb.idle()
        await paced(tb, cycles_a_layer=pace, layers=6)
        await tb.idle()
        dut.budget.value = budget
    # One at a time there is no budget.
    dut.alone.value = 1
    await cycles(dut, pace)
    tb.candidate(0, 1, expert - 3, deadline=tb.routes[0] + 1)
    await tb.idle()
    assert tb.strobes["prefetch_late_dropped"] == 0
    hit("scheduler.budget", budget, of=BUDGETS)


@cocotb.test()
async def statistics_by_layer(dut):
    """One prefetch of each fate, each counted for its layer and kind; cleared with the counters."""
    tb = TB(dut, latency=(2, 2))
    config = tb.config
    experts = config.model.experts
    await tb.reset()
    near, hint = PrefetchKind.NEAR, PrefetchKind.HINT
    # Useful in time; useful but late, as a hint; of no use, since it fails.
    tb.candidate(0, 1, experts - 1, deadline=1)
    await tb.idle()
    tb.demand(0, 1, [experts - 1])
    await tb.idle()
    tb.hold_memory = True
    tb.candidate(0, 2, experts - 1, deadline=2, source=Source.HINT)
    await cycles(dut, 80)
    tb.demand(0, 2, [experts - 1])
    await cycles(dut, 40)
    tb.hold_memory = False
    await tb.idle()
    address = tb.tile_address(3, experts - 1, 0)
    tb.broken.append((address, address + config.data_bytes))
    tb.candidate(0, 3, experts - 1)
    await tb.idle()
    tb.broken.clear()
    count = tb.statistics.count
    assert count(3, near, PrefetchOutcome.ISSUED) == count(3, near, PrefetchOutcome.USELESS) == 1
    assert count(1, near, PrefetchOutcome.ISSUED) == count(1, near, PrefetchOutcome.USEFUL) == 1
    assert count(2, hint, PrefetchOutcome.USEFUL) == count(2, hint, PrefetchOutcome.LATE) == 1
    assert not count(1, near, PrefetchOutcome.LATE) and not count(1, near, PrefetchOutcome.USELESS)
    await tb.check_statistics()
    dut.clear_statistics.value = 1
    await cycles(dut, 1)
    dut.clear_statistics.value = 0
    await cycles(dut, 1)
    assert str(dut.idle.value) == "0"
    tb.statistics.clear()
    await tb.idle()
    await tb.check_statistics()
    # One that evicts what is demanded next.
    await tb.reset()
    count = tb.statistics.count
    for number in range(config.slots):
        layer, expert = divmod(number, experts)
        tb.demand(0, layer, [expert])
        tb.release(0, layer)
        await tb.idle()
    last = config.model.layers - 1
    tb.candidate(0, last, experts - 1)
    await tb.idle()
    tb.demand(0, 0, [0])
    await tb.idle()
    assert count(last, near, PrefetchOutcome.POLLUTING) == 1
    await tb.check_statistics()
    hit("scheduler.statistics")


@cocotb.test()
async def chunks_use_the_stream_channel(dut):
    """Only near candidates of the predictor's, of contexts in a chunk; a demand takes them over."""
    tb = TB(dut, latency=(30, 30))
    config = tb.config
    last = config.contexts - 1
    dut.streaming.value = 1 << last
    tb.prefetch_tiles = 4
    dut.prefetch_tiles.value = 4
    await tb.reset()
    experts = config.model.experts
    tb.hold_memory = True
    tb.candidate(last, 1, experts - 1, deadline=1, score=255)  # of the chunk
    await cycles(dut, 60)
    tb.candidate(last, 1, experts - 2, deadline=2)  # far
    tb.candidate(last, 1, experts - 3, deadline=1, source=Source.HINT)
    await cycles(dut, 300)
    channels = {f["channel"] for f, *_ in tb.memory_queue}
    assert len(channels) == 1 and len(tb.memory_queue) <= 4
    tb.demand(last, 1, list(range(config.model.top_k - 1)) + [experts - 1])
    await cycles(dut, 300)
    tb.hold_memory = False
    await tb.idle()
    assert tb.channels == {0, 1, config.stream_channel}
    if config.stream_channel > 1:
        hit("scheduler.stream")


@cocotb.test()
async def promoted_prefetch_goes_behind_earlier_demands(dut):
    """An entry's place in the order counts from when it became a demand."""
    tb = TB(dut)
    await tb.reset()
    config = tb.config
    tb.hold_memory = True
    tb.candidate(0, 0, 5, deadline=1)
    await cycles(dut, 60)
    tb.fetches.paused = True
    tb.demand(0, 0, [3, 5])
    await cycles(dut, 60)
    tb.fetches.paused = False
    tiles = config.layer_tiles[0]
    await cycles(dut, 20 + 4 * tiles)
    slots = {e.expert: e.slot for e in tb.inflight.values()}
    assert [f["slot"] for f, *_ in tb.memory_queue] == (
        [slots[5]] + [slots[3]] * tiles + [slots[5]] * (tiles - 1)
    )
    tb.hold_memory = False
    await tb.idle()
    if tiles > 1:
        hit("scheduler.order")


@cocotb.test()
async def demand_waits_for_one_tile(dut):
    """Behind a prefetch with one tile out, a demand's first tile is the next that goes out."""
    tb = TB(dut)
    await tb.reset()
    tb.hold_memory = True
    for expert in range(tb.config.prefetch_inflight):
        tb.candidate(0, 1, expert, deadline=1)
    await cycles(dut, 40 * tb.config.prefetch_inflight)
    assert len(tb.memory_queue) == 1
    tb.demand(0, 0, list(range(tb.config.model.top_k)))
    await cycles(dut, 120)
    # Prefetches may hold so many entries that some demands wait for one.
    demands = min(tb.config.model.top_k, tb.config.inflight - tb.config.prefetch_inflight)
    assert [f["demand"] for f, *_ in tb.memory_queue] == [0] + [1] * (
        tb.config.layer_tiles[0] * demands
    )
    tb.hold_memory = False
    await tb.idle()
    hit("scheduler.one_tile")


@cocotb.test()
@cocotb.parametrize(fails=["never", "BUS", "TIMEOUT", "ABORTED", "ADDRESS"])
async def contexts_share_a_fetch(dut, fails):
    """All contexts that wait for an expert are answered, ascending, if it arrives or fails."""
    tb = TB(dut, latency=(3, 9))
    if fails != "never":
        tb.reason = FetchReason[fails]
    config = tb.config
    await tb.reset()
    tb.hold_memory = True
    address = tb.tile_address(1, 2, 0)
    if fails != "never":
        tb.broken.append((address + config.tile_bytes // 2, address + config.tile_bytes))
    for ctx in reversed(range(config.contexts)):
        tb.demand(ctx, 1, [2])
    await cycles(dut, 40 * config.contexts)
    tb.hold_memory = False
    await tb.idle()
    assert [a.ctx for a in tb.answers] == list(range(config.contexts))
    assert tb.strobes["merged"] == config.contexts - 1
    if fails != "never":
        assert all(a.code == ErrorCode[fails] for a in tb.answers)
        first = next(
            at
            for at, beats in GoldenDMA(config).bursts(address)
            if at + beats * config.data_bytes > address + config.tile_bytes // 2
        )
        assert all(a.address == first for a in tb.answers)
        assert tb.strobes["fill_errors"] == 1 and tb.strobes["fills"] == 0
        hit("scheduler.reasons")
    if config.contexts > 1:
        how = "comes" if fails == "never" else "fails"
        hit("scheduler.merge", how, of=("comes", "fails"))


@cocotb.test()
async def routed_again_while_in_flight(dut):
    """A layer released before its expert came and routed again gets an answer for each demand."""
    tb = TB(dut, latency=(3, 9))
    await tb.reset()
    tb.hold_memory = True
    tb.demand(0, 1, [2])
    tb.release(0, 1)
    tb.demand(0, 1, [2])
    await cycles(dut, 100)
    tb.hold_memory = False
    await tb.idle()
    assert [a[:3] for a in tb.answers] == [(0, 1, 2)] * 2
    assert tb.strobes["merged"] == 1 and tb.strobes["misses"] == 1
    hit("scheduler.again")


def places(config):
    """Decisions that demand different experts: (layer, context, experts)."""
    k = config.model.top_k
    for layer in range(config.model.layers):
        for ctx in range(min(config.contexts, config.model.experts // k)):
            yield layer, ctx, list(range(ctx * k, ctx * k + k))


@cocotb.test()
@cocotb.parametrize(cancel=[False, True])
async def demand_waits_for_a_slot(dut, cancel):
    """With every slot pinned or filling a demand waits, then takes the slot of a prefetch."""
    tb = TB(dut, latency=(3, 9))
    config = tb.config
    dut.cancel_enable.value = int(cancel)
    await tb.reset()
    model = config.model
    left = config.slots - 1
    for layer, ctx, experts in places(config):
        tb.demand(ctx, layer, experts[:left])
        left -= len(experts[:left])
        await tb.idle()
        if not left:
            break
    # The last layer stays free for what comes.
    assert tb.taken_slots() == config.slots - 1 and layer < model.layers - 1
    tb.hold_memory = True
    layer = model.layers - 1
    tb.candidate(0, layer, model.experts - 1, deadline=tb.routes[0] + 1)
    await cycles(dut, 60)
    assert len(tb.inflight) == 1
    tb.demand(0, layer, [model.experts - 2])
    tb.candidate(0, layer, model.experts - 3, deadline=tb.routes[0] + 2)
    await cycles(dut, 100)
    assert tb.retrying and tb.expected["waits"] == 1
    tb.hold_memory = False
    await tb.idle()
    assert tb.answers[-1][:3] == (0, layer, model.experts - 2)
    tiles = config.layer_tiles[layer]
    assert tb.expected["waits"] == (1 if cancel else tiles)
    assert tb.strobes["prefetch_cancelled"] == (cancel and tiles > 1)
    assert tb.strobes["refused"] == 0
    hit("scheduler.no_slot", "waits", of=("waits", "refused"))
    if cancel and tiles > 1:
        hit("scheduler.spares_a_slot")


@cocotb.test()
async def demand_takes_the_slot_of_the_youngest(dut):
    """Of several prefetches the one that was begun last goes, and at once if no tile is out."""
    tb = TB(dut, latency=(3, 9))
    config = tb.config
    model = config.model
    layer = model.layers - 1
    if config.layer_tiles[layer] < 2 or config.prefetch_inflight < 2:
        return
    dut.cancel_enable.value = 1
    await tb.reset()
    left = config.slots - 2
    for at, ctx, experts in places(config):
        tb.demand(ctx, at, experts[:left])
        left -= len(experts[:left])
        await tb.idle()
        if not left:
            break
    assert tb.taken_slots() == config.slots - 2 and at < layer
    tb.hold_memory = True
    deadline = (tb.routes[0] + 1) % 256
    for expert in (model.experts - 1, model.experts - 2):
        tb.candidate(0, layer, expert, deadline=deadline)
        await cycles(dut, 60)
    assert len(tb.inflight) == 2
    tb.demand(0, layer, [model.experts - 3])
    await cycles(dut, 200)
    # The second one had no tile with the memory, which answers nothing: its slot is free at once.
    assert tb.expected["waits"] == 1 and tb.retrying is None
    assert {e.expert for e in tb.inflight.values()} == {model.experts - 1, model.experts - 3}
    assert tb.strobes["prefetch_cancelled"] == 1
    tb.hold_memory = False
    await tb.idle()
    assert tb.answers[-1][:3] == (0, layer, model.experts - 3)
    hit("scheduler.spares_the_youngest")


@cocotb.test()
async def demand_leaves_a_copy_its_slot(dut):
    """A prefetch goes though a copy was begun after it, which is never given up."""
    tb = TB(dut, latency=(3, 9))
    config = tb.config
    model = config.model
    layer = model.layers - 1
    dut.cancel_enable.value = 1
    await tb.reset()
    left = config.slots - 2
    for at, ctx, experts in places(config):
        tb.demand(ctx, at, experts[:left])
        left -= len(experts[:left])
        await tb.idle()
        if not left:
            break
    assert tb.taken_slots() == config.slots - 2 and at < layer
    pinned = {result.slot: key for _, key, result in tb.lookups}
    tb.hold_memory = True
    tb.candidate(0, layer, model.experts - 1, deadline=(tb.routes[0] + 1) % 256)
    await cycles(dut, 60)
    (prefetch,) = tb.inflight
    # The copy is to come into the bank of the last free slot.
    (free,) = set(range(config.slots)) - {prefetch, *pinned}
    _, held, expert = next(key for slot, key in pinned.items() if (slot ^ free) & 1)
    tb.replicate(0, held, expert, 2)
    await cycles(dut, 200)
    assert list(tb.inflight) == [prefetch, free] and tb.inflight[free].copy
    assert tb.inflight[free].offered < config.layer_tiles[held]
    tb.demand(0, layer, [model.experts - 2])
    await cycles(dut, 100)
    assert tb.retrying and tb.expected["waits"] == 1
    tb.hold_memory = False
    await tb.idle()
    assert tb.strobes["prefetch_cancelled"] == 1 and tb.strobes["refused"] == 0
    assert [a[:3] for a in tb.answers[-2:]] == [
        (0, layer, model.experts - 2),
        (0, held, expert),
    ], "a demand goes before a copy"
    assert prefetch in {r.slot for _, key, r in tb.lookups if key == (0, layer, model.experts - 2)}
    hit("scheduler.spares_no_copy")


@cocotb.test()
async def every_slot_pinned(dut):
    """With nothing in flight a demand without a slot is refused; its route's others go on."""
    tb = TB(dut, latency=(3, 9))
    config = tb.config
    await tb.reset()
    model = config.model
    left = config.slots
    for layer, ctx, experts in places(config):
        tb.demand(ctx, layer, experts[:left])
        left -= len(experts[:left])
        await tb.idle()
        if not left:
            break
    assert tb.taken_slots() == config.slots and layer < model.layers - 1
    layer = model.layers - 1
    first = len(tb.answers)
    tb.demand(0, layer, list(range(model.top_k)))
    await tb.idle()
    assert tb.answers[first:] == [
        Event(ErrorCode.NO_SLOT, 0, layer, expert, 0) for expert in range(model.top_k)
    ]
    assert tb.strobes["refused"] == model.top_k
    hit("scheduler.no_slot", "refused", of=("waits", "refused"))


@cocotb.test()
async def queue_overflows(dut):
    """Candidates beyond their context's places are lost and counted; the others are served."""
    tb = TB(dut)
    config = tb.config
    await tb.reset()
    tb.hold_memory = True
    extra = 7
    model = config.model
    places = config.candidate_share + config.prefetch_inflight
    for n in range(places + extra):
        if n < config.prefetch_inflight:
            tb.candidate(0, 1, n, deadline=1)
            await cycles(dut, 40)
        else:
            tb.candidate(0, n % model.layers, n % model.experts, deadline=1)
    await tb.candidates.sent()
    await cycles(dut, CandidateQueue(config=config).longest_wait)
    assert tb.strobes["prefetch_overflow"] == extra
    assert str(dut.idle.value) == "0"
    tb.hold_memory = False
    await tb.idle()
    served = sum(
        tb.strobes[n] for n in ("prefetch_issued", "prefetch_redundant", "prefetch_no_slot")
    )
    assert served == places
    hit("scheduler.overflow")


@cocotb.test()
async def enable_low(dut):
    """Only hints enter while ``enable`` is 0."""
    tb = TB(dut)
    await tb.reset()
    dut.enable.value = 0
    await cycles(dut, 1)
    for expert in range(4):
        tb.candidate(0, 1, expert, deadline=1, source=expert % 2, score=9)
    await tb.idle()
    assert tb.strobes["prefetch_issued"] == 2
    assert [key for op, key, _ in tb.lookups if op == BufferOp.PREFETCH] == [(0, 1, 1), (0, 1, 3)]
    dut.enable.value = 1
    hit("scheduler.enable")


@cocotb.test()
async def cutoff(dut):
    """Candidates for the cut-off layer and those above are dropped, hints too."""
    tb = TB(dut)
    await tb.reset()
    config = tb.config
    last = config.model.layers - 1
    for layer in (0, 1, 2, last, last + 1, 255):
        dut.cutoff_layer.value = layer
        await cycles(dut, 1)
        tb.lookups.clear()
        expected = []
        for target in {0, 1, 2, last}:
            for source in (Source.PREDICTOR, Source.HINT):
                expert = tb.random.randrange(config.model.experts)
                tb.candidate(0, target, expert, deadline=1, source=int(source), score=9)
                if target < layer:
                    expected.append((0, target, expert))
        await tb.idle()
        assert [key for op, key, _ in tb.lookups if op == BufferOp.PREFETCH] == expected, layer
    dut.cutoff_layer.value = 255
    hit("profiles.cutoff")


@cocotb.test()
async def stale_candidates(dut):
    """A deadline up to 127 routes back is stale; one that lies ahead, up to 128 routes, is not."""
    tb = TB(dut, latency=(1, 3))
    await tb.reset()
    config = tb.config
    generator = random.Random(7)
    for _ in range(300):
        # Contexts are counted apart, modulo 256.
        ctx = generator.randrange(config.contexts)
        tb.demand(ctx, 0, [0])
        tb.release(ctx, 0)
    await tb.idle()
    for ctx in range(config.contexts):
        for ahead in (-127, -1, 0, 1, 2, 127, 128):
            before = tb.strobes["prefetch_stale"]
            tb.candidate(
                ctx,
                1,
                generator.randrange(config.model.experts),
                deadline=(tb.routes[ctx] + ahead) % 256,
            )
            await tb.idle()
            assert tb.strobes["prefetch_stale"] - before == (ahead <= 0)
    # Deadlines that far apart lie on either side of where counts wrap.
    hit("scheduler.stale")


async def _rescan_while_busy(tb, *, proposals, budgets=(0,)):
    """Routes and values at any moment, and candidates with ``proposals``; budgets when idle."""
    dut, config, rng = tb.dut, tb.config, tb.random
    tb.policy = rng.choice(list(Policy))
    dut.cancel_enable.value = 1
    dut.streaming.value = rng.randrange(1 << config.contexts)
    await tb.reset()
    work = Workload(tb, hold=1)
    for step in range(80):
        # Also on and off while anything is under way.
        if rng.random() < 0.2:
            tb.rescan(rng.choice((0, 1, 3, 3)), least=rng.choice((1, 24, 200)))
        dut.hold.value = int(rng.random() < 0.2)
        ctx = rng.randrange(config.contexts)
        layer, _ = work.step(ctx)
        if rng.random() < 0.3:
            await tb.commands.sent()
        for target, expert in work.candidates(ctx, layer) if proposals else ():
            if rng.random() < 0.3:
                tb.candidate(ctx, target, expert, source=rng.choice(list(Source)))
        for _ in range(rng.randrange(3)):
            await cycles(dut, rng.choice((1, 1, 20, 80)))
            await tb.come(*tb.draw_values(rng.randrange(config.contexts)))
        if step % 10 == 9:
            dut.hold.value = 0
            await tb.idle()
            dut.budget.value = rng.choice(budgets)
        else:
            await cycles(dut, rng.randrange(1, 150))
    work.release_all()
    dut.hold.value = 0
    await tb.idle()
    await tb.check_statistics()


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS))
async def rescans_timed(dut, stall):
    """Rescans find what is prefetched, while routes, values and hints come at any moment."""
    tb = TB(dut, stall=STALLS[stall], fetch_stall=STALLS[stall], latency=(1, 40), failing=0.05)
    if tb.rescans is None:
        return
    await _rescan_while_busy(tb, proposals=True)
    for code in RescanCode:
        assert tb.expected[f"rescan_{code.name}"], f"the workload has no {code.name}"
    hit("scheduler.rescans")


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS))
async def rescans_with_a_budget(dut, stall):
    """What a rescan finds is dropped where it would come late, and its context rests."""
    tb = TB(dut, stall=STALLS[stall], fetch_stall=STALLS[stall], latency=(1, 40))
    if tb.rescans is None:
        return
    await _rescan_while_busy(tb, proposals=False, budgets=(0, 1, 4, 8))
    late = tb.strobes["prefetch_late_dropped"]
    assert late and tb.expected["rescan_FOUND"] > late, "all or nothing came too late"
    hit("scheduler.rescans_late")


@cocotb.test()
@cocotb.parametrize(stall=list(STALLS))
async def rescans_drained(dut, stall):
    """At drained pace all that comes out of rescans is the golden model's."""
    failing = stall == "some"
    latency = (400, 420) if failing else (1, 60)
    tb = TB(dut, stall=STALLS[stall], fetch_stall=STALLS[stall], latency=latency)
    if tb.rescans is None:
        return
    config, rng = tb.config, tb.random
    # LRU where fetches fail: how often a demand that waits for a slot asks again hangs on time.
    tb.policy = {"none": Policy.NEXT_USE, "some": Policy.LRU, "long": Policy.LFU}[stall]
    if stall == "long":
        tb.throttled_at_random()
    dut.cancel_enable.value = 1
    dut.alone.value = 1
    await tb.reset()
    for _ in range(4 if failing else 0):
        first = tb.random.randrange(config.memory_bytes // config.data_bytes) * config.data_bytes
        tb.broken.append((first, first + config.data_bytes))
    counters = Counter()
    golden_buffer = ExpertBuffer(config, valued=True)
    golden_buffer.policy = tb.policy
    golden = GoldenScheduler(
        config,
        buffer=golden_buffer,
        memory=Memory(np.zeros(config.memory_bytes, np.uint8), failing=tb.broken),
        counters=counters,
    )
    golden.bases = list(tb.bases)
    golden.throttle.enable = tb.throttle_enable
    golden.throttle.register = tb.throttle_weights
    work = Workload(tb, hold=1)
    for step in range(60):
        if step % 8 == 0:
            tb.rescan(rng.choice((0, 1, 2, 3)), least=rng.choice((1, 24, 100)))
            golden.rescan_ahead, golden.rescan_least = tb.rescan_ahead, tb.rescan_least
            golden.enable = rng.random() < 0.9
            dut.enable.value = int(golden.enable)
            golden.cutoff_layer = rng.choice((255, 255, rng.randrange(config.model.layers + 1)))
            dut.cutoff_layer.value = golden.cutoff_layer
        ctx = rng.randrange(config.contexts)
        pending = work.pending[ctx]
        while len(pending) > 1 or work.layer[ctx] in pending:
            layer = pending.popleft()
            tb.release(ctx, layer)
            await tb.commands.sent()
            golden.release(ctx, layer)
            await tb.idle()
        first = len(tb.answers)
        dut.hold.value = 1
        layer, experts = work.step(ctx)
        expected = golden.demand(ctx, layer, experts, repeat=bool(work.repeat))
        await tb.commands.sent()
        candidates = [
            (
                *(ctx, target, expert, rng.randrange(256)),
                rng.choice(list(Source)),
                (tb.sent_routes(ctx) + 1) % 256,
            )
            for target, expert in work.candidates(ctx, layer)
        ]
        for c in candidates:
            tb.candidate(ctx, c[1], c[2], score=c[3], source=c[4], deadline=c[5])
        await tb.candidates.sent()
        await cycles(dut, 200)
        for _ in range(rng.randrange(4)):
            values = tb.draw_values(rng.choice((ctx, rng.randrange(config.contexts))))
            await tb.come(*values)
            golden_buffer.values(*values)
            golden.wake(values[1])
        await cycles(dut, 2)
        dut.hold.value = 0
        golden.offer(candidates)
        golden.rescan()
        await tb.idle()
        check_order(tb.answers[first:], expected)
        for name in STROBES:
            unit = config.tile_bytes if name.endswith("bytes") else 1
            assert tb.strobes[name] * unit == counters[name], f"{name} after step {step}"
        assert int(dut.throttle_state.value) == golden.throttle.state
    await tb.check_statistics()
    assert tb.expected["rescan_FOUND"] and not tb.expected["rescan_DISTURBED"]
    assert list(tb.buffer.recency) == list(golden_buffer.recency)
    for name in ("state", "pins", "evicted_by_prefetch"):
        ours = getattr(tb.buffer.directory, name)
        assert ours == getattr(golden_buffer.directory, name), name
    hit("scheduler.rescans_drained", *seen_drained(tb), of=DRAINED)


@cocotb.test()
async def reset_in_flight(dut):
    """After a reset at any moment nothing of before comes out and all works."""
    tb = TB(dut, stall=0.2, fetch_stall=0.2, latency=(1, 40), failing=0.1)
    config = tb.config
    await tb.reset()
    work = Workload(tb)
    busy = 0
    for _ in range(10):
        for _ in range(3):
            ctx = tb.random.randrange(config.contexts)
            layer, _ = work.step(ctx)
            for target, expert in work.candidates(ctx, layer):
                tb.candidate(ctx, target, expert)
        await cycles(dut, tb.random.randrange(1, 200))
        busy += bool(tb.inflight)
        await tb.reset()
        work = Workload(tb)
        work.step(0)
        await tb.idle()
        assert len(tb.answers) == config.model.top_k
    assert busy > 2, "resets came when hardly anything was in flight"
    hit("scheduler.reset")
