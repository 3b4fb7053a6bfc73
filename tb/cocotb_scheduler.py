"""Scheduler against a scoreboard and its golden model (the half that runs in the simulator)."""

import random
from collections import Counter, deque

import cocotb
import numpy as np

from prestage_hw.contract.records import (
    BufferOp,
    ErrorCode,
    FetchReason,
    Policy,
    PrefetchKind,
    PrefetchOutcome,
    RescanCode,
    Source,
)
from prestage_hw.scheduler import STROBES, CandidateQueue, Scheduler
from prestage_sim.model.buffer import ExpertBuffer
from prestage_sim.model.dma import DMA as GoldenDMA
from prestage_sim.model.dma import Memory
from prestage_sim.model.scheduler import Event, Ready
from prestage_sim.model.scheduler import Scheduler as GoldenScheduler
from prestage_tb.bench import Stall, cycles, parameters
from prestage_tb.coverage import hit
from prestage_tb.scheduler_scoreboard import TB


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
    if min(config.layer_tiles[1:3]) < 2:
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
    if fails != "never" and parameters()["config"].rows:
        return  # Half a tile is not half of its addresses.
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


async def pin_all_but(tb, free):
    """Demands pin all slots but so many; the last layer that they are of."""
    left = tb.config.slots - free
    for layer, ctx, experts in places(tb.config):
        tb.demand(ctx, layer, experts[:left])
        left -= len(experts[:left])
        await tb.idle()
        if not left:
            break
    assert tb.taken_slots() == tb.config.slots - free
    return layer


@cocotb.test()
@cocotb.parametrize(cancel=[False, True])
async def demand_waits_for_a_slot(dut, cancel):
    """With every slot pinned or filling a demand waits, then takes the slot of a prefetch."""
    tb = TB(dut, latency=(3, 9))
    config = tb.config
    dut.cancel_enable.value = int(cancel)
    await tb.reset()
    model = config.model
    # The last layer stays free for what comes.
    assert await pin_all_but(tb, 1) < model.layers - 1
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
    assert await pin_all_but(tb, 2) < layer
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
    if parameters()["config"].replicas == 1:
        return
    tb = TB(dut, latency=(3, 9))
    config = tb.config
    model = config.model
    layer = model.layers - 1
    dut.cancel_enable.value = 1
    await tb.reset()
    assert await pin_all_but(tb, 2) < layer
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
