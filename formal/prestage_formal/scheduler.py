# amaranth: UnusedElaboratable=no
"""The scheduler's state machine: it comes back for demands, and candidates start no demand."""

import contextlib

from amaranth import Array, Cat, Elaboratable, Module, Mux, Signal
from amaranth.hdl import Assert, Assume, Cover
from amaranth.lib import wiring

from prestage_hw.contract.records import BufferCode, BufferOp

from .harness import Inside, drive_freely, lemma
from .instances import scheduler_device

__all__ = ["Machine", "ThrottleTakes"]


class _Anything(wiring.Component):
    """A block with the ports of another whose outputs are anything in every cycle."""

    def __init__(self, signature):
        super().__init__(signature)

    def elaborate(self, platform):
        m = Module()
        drive_freely(m, wiring.flipped(self))
        return m


@contextlib.contextmanager
def _anything(module, *names):
    """Put blocks whose outputs are anything in the place of a module's components."""
    kept = {name: getattr(module, name) for name in names}

    def stand_in(block):
        return lambda *, config: _Anything(block(config=config).signature)

    for name, block in kept.items():
        setattr(module, name, stand_in(block))
    try:
        yield
    finally:
        for name, block in kept.items():
            setattr(module, name, block)


class ThrottleTakes(Elaboratable):
    """What the throttle is told is taken in bounded time, once its marks are taken."""

    def elaborate(self, platform):
        from prestage_hw.scheduler.throttle import Throttle

        m = Module()
        block = Throttle(config=scheduler_device())
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        at, steps = inside.states("fsm_state"), inside.signal("steps")
        # Cycles for which it takes nothing, but for those in which it waits for its marks to be
        # taken; a clear begins them anew.
        waited = Signal(8)
        held = at("Settle") & block.marks.valid
        m.d.sync += waited.eq(Mux(block.outcomes.ready | block.clear, 0, waited + ~held))
        waits = inside.signal("clear_waits")
        most = block.latency - 1
        count = len(steps)
        passed = sum(Mux(steps[i], i, 0) for i in range(count))
        # Cycles until it takes something.
        to_come = Signal(8)
        m.d.comb += to_come.eq(
            Mux(at("Clear"), 3, 0)
            + Mux(at("Forget"), 2, 0)
            + Mux(at("Settle"), 1, 0)
            + Mux(at("Count"), 1 + count - passed, 0)
            + Mux(at("Age"), 2 + count, 0)
            + Mux(at("Keep"), 3 + count, 0)
            + Mux(at("Read"), 4 + count, 0)
        )
        m.d.comb += [
            Assert(waited <= most + 4),
            lemma(at()),
            lemma(~at("Count") | ((steps != 0) & ((steps & (steps - 1)) == 0))),
            lemma(waited + to_come + Mux(waits & ~at("Clear", "Forget"), 4, 0) <= most + 4),
            Cover(block.outcomes.ready & (waited == 0) & (block.state.credits[0] < 0)),
            Cover(waited == most),
        ]
        return m


class Machine(Elaboratable):
    """Any commands, any candidates, any throttle; the buffer keeps to what is proven of it.

    The queue of candidates and the throttle give anything at all: whatever they do, a demand is
    not held up by more than what is said here.
    """

    def elaborate(self, platform):
        from prestage_hw.scheduler import scheduler as rtl

        m = Module()
        config = self.config = scheduler_device()
        with _anything(rtl, "CandidateQueue", "Throttle"):
            block = rtl.Scheduler(config=config)
            inside = self.inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        local = inside.local
        state = local("state")

        def at(*names):
            return Cat(state == rtl._State[name] for name in names).any()

        table, throttle, queue = local("table"), local("throttle"), local("queue")
        commands, command = local("commands"), local("command")
        entries, tiles = range(config.inflight), config.tiles
        result, request = block.buffer_results, block.buffer_requests
        op, code = local("op"), result.payload.code

        # --- what the others keep to ---
        asked, age = Signal(), Signal(2)  # The buffer works on a request; cycles since it came.
        with m.If(request.valid & request.ready):
            m.d.sync += [asked.eq(1), age.eq(1)]
        with m.Elif(result.valid & result.ready):
            m.d.sync += asked.eq(0)
        with m.Elif(age != 2):
            m.d.sync += age.eq(age + 1)
        valid = inside.local("valid", part="InflightTable")
        demand = inside.local("demand", part="InflightTable")
        more = inside.local("more", part="InflightTable")
        issued = inside.local("issued", part="InflightTable")
        returned = inside.local("returned", part="InflightTable")
        rows = inside.rows("table.entries")
        filling = Array(inside.rows("filling"))
        filled, cancels, spares = local("filled"), local("cancels"), local("spares")
        looks_up = Cat(
            op == o for o in (BufferOp.DEMAND, BufferOp.LOCK, BufferOp.PREFETCH)
        ).any() & ~(filled | cancels)
        fills = [valid[i] & (rows[i].slot == result.payload.slot) for i in entries]
        # Tiles that the DMA engine has taken and not given back.
        away = [[Signal(name=f"away_{i}_{j}") for j in range(tiles)] for i in entries]
        fetch, completion = block.fetches, block.completions
        came = completion.valid & completion.ready
        for i in entries:
            for j in range(tiles):
                mine = (fetch.payload.tag == i) & (fetch.payload.tile == j)
                back = (completion.payload.tag == i) & (completion.payload.tile == j)
                with m.If(fetch.valid & fetch.ready & mine):
                    m.d.sync += away[i][j].eq(1)
                with m.Elif(came & back):
                    m.d.sync += away[i][j].eq(0)
        is_away = Array(Array(row) for row in away)[completion.payload.tag][completion.payload.tile]
        # Cycles for which the throttle has taken nothing.
        untaken = Signal(8)
        most = 15
        m.d.sync += untaken.eq(Mux(throttle.outcomes.ready, 0, untaken + 1))
        m.d.comb += [
            Assume(~result.valid | (asked & (age == 2))),
            Assume(~request.ready | ~asked),
            Assume(~(result.valid & looks_up & (code == BufferCode.FILLING)) | Cat(fills).any()),
            Assume(~(result.valid & looks_up & (code == BufferCode.ALLOCATED)) | ~Cat(fills).any()),
            Assume(~completion.valid | is_away),
            Assume(untaken <= most),
            # As after reset: no candidate is weighed.
            Assume(block.budget == 0),
            lemma(~local("budgeted")),
            lemma(~local("weighs")),
        ]

        # --- claims ---
        # Cycles of work on one thing that nobody outside holds up.
        worked = Signal(8)
        slow = (
            (at("RESULT") & ~result.valid)
            | (at("HIT") & block.ready.valid)
            | (at("REFUSE") & block.events.valid)
            | (at("ANSWER") & (block.ready.valid | block.events.valid))
        )
        with m.If(at("DISPATCH")):
            m.d.sync += worked.eq(0)
        with m.Elif(~slow):
            m.d.sync += worked.eq(worked + 1)
        longest = 2 * most + 15
        # Cycles since nothing changed in the table for three: so long a tile needs to be offered.
        low, since = Signal(3), Signal(8)
        calm = Signal()
        m.d.sync += low.eq(Mux(table.hold, 0, Mux(low == 4, 4, low + 1)))
        m.d.comb += calm.eq(~table.hold & (low >= 2))
        m.d.sync += since.eq(Mux(calm, 0, since + 1))
        waiting, held, retry = local("waiting"), local("held"), local("retry")
        scans = local("scans")
        stays = at("DISPATCH") & ~came
        wants = waiting | held | (commands.level != 0)
        served = commands.r_en | (waiting & retry & ~held)
        unready = Signal(3)
        m.d.sync += unready.eq(Mux((commands.level != 0) & ~commands.r_rdy, unready + 1, 0))
        # The queue's first command takes a cycle to its end.
        comes = ~waiting & ~held & ~commands.r_rdy
        to_come = [more[i] | (issued[i] != returned[i]) for i in entries]
        # What was taken last from the commands.
        last = Signal(command.shape())
        with m.If(commands.r_en):
            m.d.sync += last.eq(command)
        of_command = Mux(
            last.lock,
            Mux(last.release, BufferOp.UNLOCK, BufferOp.LOCK),
            Mux(last.release, BufferOp.RELEASE, BufferOp.DEMAND),
        )
        asks = request.payload
        speculative = Cat(
            asks.op == o for o in (BufferOp.PREFETCH, BufferOp.CANCEL, BufferOp.FILL)
        ).any()
        m.d.comb += [
            # The machine comes back to what waits.
            Assert(at("DISPATCH") | (worked <= longest)),
            # A command is served, or something is in flight that it waits for.
            Assert(~(stays & wants) | served | table.occupied | comes),
            Assert(unready <= 1),
            # What is in flight has tiles to come.
            *(Assert(~(at("DISPATCH") & valid[i]) | to_come[i]) for i in entries),
            # Nothing is begun for a candidate, and nothing looked at, while a command waits.
            Assert(~queue.take | ((commands.level == 0) & ~waiting & ~held)),
            # The table is left alone for long enough.
            Assert(since <= 7 + 3 * config.inflight),
            # Invariant 6: what is demanded, locked or released was so by a command.
            Assert(
                ~request.valid
                | speculative
                | (
                    (asks.op == of_command)
                    & (asks.ctx == last.ctx)
                    & (asks.layer == last.layer)
                    & (asks.expert == last.expert)
                )
            ),
            Cover(at("MERGE") & (op == BufferOp.DEMAND)),
            Cover(stays & waiting & ~retry),
            Cover(since == 8),
            Cover(at("FREE")),
        ]

        # --- lemmas ---
        tag, pending = local("tag"), local("pending")
        outcome_valid = local("outcome_valid")
        held_tag = local("held_tag")
        answers = sum(pending) + Mux(held & (held_tag == tag), 2, 0)
        decides = 1 + Mux(outcome_valid, most + 1 - untaken, 0)
        rank = Signal(8)
        after = 6
        # A demand that finds no slot may have a prefetch given up.
        gives_up = most + 4 + after
        with m.Switch(state):
            for names, cycles in (
                (("FREE", "HIT", "REFUSE", "MERGE", "ALLOCATE"), 1),
                (("ANSWER",), answers + 2),
                (
                    ("DECIDE",),
                    decides + Mux(filled, answers + 2, Mux(cancels, 2, gives_up)),
                ),
                (("RESULT",), most + 3 + Mux(filled | cancels, after, gives_up)),
                (("FILL", "GIVE_UP"), gives_up),
                (("RETURN", "SCAN"), gives_up + 1),
                (("LOOKUP",), most + 4 + gives_up),
                (("JUDGE",), most + 5 + gives_up),
                (("SCREEN",), most + 6 + gives_up),
            ):
                with m.Case(*(rtl._State[name] for name in names)):
                    m.d.comb += rank.eq(cycles)
        m.d.comb += [
            lemma(at("DISPATCH") | (worked + rank <= longest + 1)),
            lemma(~at("RESULT") | (request.valid | asked)),
            lemma(at("RESULT") | (~request.valid & ~asked)),
            lemma(~(request.valid & asked)),
            lemma(age != 3),
            # Low hold.
            lemma(low <= 4),
            lemma(~at("DISPATCH") | calm | (since <= 2 + 3 * (config.inflight - scans) + low)),
            lemma(~at("SCAN") | calm | (since <= 3 + 3 * (config.inflight - 1 - scans))),
            lemma(~at("SCAN", "GIVE_UP") | spares | (scans < config.inflight)),
            lemma(~(at("GIVE_UP") & spares) | (since <= 1)),
            lemma(scans <= config.inflight),
            lemma(~at("SCAN", "LOOKUP", "SCREEN") | (low >= 1)),
            lemma(~at("GIVE_UP") | spares | (since <= 4 + 3 * (config.inflight - 1 - scans))),
            lemma(~at("RETURN") | (since <= 4 + 3 * config.inflight)),
            lemma(~at("FILL") | (since <= 5 + 3 * config.inflight)),
            lemma(~at("SCREEN", "LOOKUP", "JUDGE") | (since <= 5 + 3 * config.inflight)),
            lemma(~at("JUDGE") | (low >= 2)),
            lemma(~at("RESULT") | (low >= 2) | (since <= 5 + 3 * config.inflight + low)),
            lemma(since <= 7 + 3 * config.inflight),
            lemma(~(at("RESULT") & asked & (age == 2)) | (low >= 2)),
            lemma(~(at("RESULT") & asked) | (low >= 1)),
            lemma(~at("DECIDE", "HIT", "REFUSE", "ANSWER") | ((low >= 2) & (since <= 1))),
            lemma(~at("MERGE", "ALLOCATE", "FREE") | (since == 0)),
        ]
        used = inside.local("entries_used", part="InflightTable")
        row_live = valid.bit_select(tag, 1)
        to_come_here = Array(to_come)[tag]
        commanded = (
            (op == of_command)
            & (local("ctx") == last.ctx)
            & (local("layer") == last.layer)
            & (local("expert") == last.expert)
        )
        # What the buffer said.
        said, told = local("result"), local("filling_read").data
        owned = [valid[i] & (rows[i].slot == said.slot) for i in entries]
        decides_it = at("DECIDE") & looks_up
        m.d.comb += [
            lemma(~at("ALLOCATE", "MERGE", "HIT") | looks_up),
            lemma(~at("ALLOCATE") | ~Cat(owned).any()),
            lemma(~(decides_it & (said.code == BufferCode.ALLOCATED)) | ~Cat(owned).any()),
            lemma(~(decides_it & (said.code == BufferCode.FILLING)) | Cat(owned).any()),
            lemma(~(decides_it & (said.code == BufferCode.FILLING)) | (told == filling[said.slot])),
            lemma(~at("ALLOCATE") | (used != config.inflight)),
            lemma(~(at("LOOKUP", "RESULT", "DECIDE") & looks_up) | (used != config.inflight)),
            lemma(~at("SCREEN", "JUDGE") | (used != config.inflight)),
        ]
        offer_waits = fetch.valid
        m.d.comb += [
            lemma(used == sum(valid)),
            lemma(~held | valid.bit_select(held_tag, 1)),
            lemma(~held | (sum(local("held_ctx")) == 1)),
            # Whether the entry that is worked on has ended.
            lemma(~at("ANSWER", "FREE") | ~to_come_here),
            lemma(~(at("RESULT", "DECIDE") & filled) | (to_come_here == ~local("last"))),
            lemma(
                ~(at("RESULT", "DECIDE") & cancels)
                | (row_live & ~to_come_here & ~demand.bit_select(tag, 1))
            ),
            lemma(~held | demand.bit_select(held_tag, 1)),
            # What is served is what was commanded.
            lemma(~waiting | (local("wanted") & (used != config.inflight))),
            lemma(~at("SCREEN", "JUDGE") | (op == BufferOp.PREFETCH)),
            lemma(
                ~(at("LOOKUP") | (at("RESULT", "DECIDE") & ~filled & ~cancels) | waiting)
                | (op == BufferOp.PREFETCH)
                | commanded
            ),
            lemma(~(at("FREE") & held) | (held_tag != tag)),
            lemma(~(waiting & at("RESULT", "DECIDE")) | filled | cancels),
            lemma(~(filled & cancels)),
            lemma(~cancels | at("RESULT", "DECIDE", "FREE", "DISPATCH")),
            lemma(~spares | at("GIVE_UP", "RESULT", "DECIDE", "FREE", "DISPATCH")),
            lemma(~(spares & at("RESULT", "DECIDE")) | cancels),
            lemma(~(spares & at("GIVE_UP", "RESULT", "DECIDE")) | waiting),
            lemma(~(waiting & at("GIVE_UP")) | spares),
            lemma(~at("RETURN", "FILL", "ANSWER", "FREE", "MERGE") | row_live),
            lemma(~(at("RESULT", "DECIDE") & filled) | row_live),
            lemma(~filled | at("RESULT", "DECIDE", "ANSWER", "FREE", "DISPATCH")),
            lemma(~(waiting & ~retry) | table.occupied),
            lemma(
                ~(waiting & ~retry)
                | at("DISPATCH", "RETURN", "GIVE_UP", "FREE")
                | (at("RESULT", "DECIDE") & cancels)
            ),
            lemma(
                ~waiting
                | at("DISPATCH", "RETURN", "FILL", "RESULT", "DECIDE", "ANSWER", "FREE", "LOOKUP")
                | at("GIVE_UP")
            ),
        ]
        failed = inside.local("failed", part="InflightTable")
        cancelled = inside.local("cancelled", part="InflightTable")
        waiters = inside.local("waiters", part="InflightTable")
        older = inside.local("older", part="InflightTable")
        # An order: of two one is older, and there is no ring.
        for i in entries:
            for j in entries:
                both = valid[i] & valid[j]
                if i == j:
                    m.d.comb += lemma(~valid[i] | ~older[i][i])
                    continue
                m.d.comb += lemma(~both | (older[i][j] != older[j][i]))
                for k in entries:
                    if k not in (i, j):
                        ring = both & valid[k] & older[i][j] & older[j][k]
                        m.d.comb += lemma(~ring | older[i][k])
        for i in entries:
            offered = offer_waits & (fetch.payload.tag == i)
            on_way = sum(away[i]) + offered + (at("RETURN") & (tag == i))
            of_entry = at("RESULT", "DECIDE") & (filled | cancels)
            ending = (at("RETURN", "FILL", "ANSWER", "FREE") | of_entry) & (tag == i)
            m.d.comb += [
                lemma(~valid[i] | (issued[i] == returned[i] + on_way)),
                lemma(valid[i] | (~Cat(away[i]).any() & ~offered)),
                lemma(issued[i] <= tiles),
                lemma(~valid[i] | to_come[i] | ending),
                lemma(more[i] == (valid[i] & ~failed[i] & ~cancelled[i] & (issued[i] != tiles))),
                lemma(~valid[i] | ~cancelled[i] | ~demand[i]),
                lemma(~valid[i] | demand[i] | (waiters[i] == 0)),
                lemma(~valid[i] | (filling[rows[i].slot] == i)),
            ]
            for j in range(tiles):
                is_offered = offered & (fetch.payload.tile == j)
                m.d.comb += [
                    lemma(~away[i][j] | (j < issued[i])),
                    lemma(~is_offered | (~away[i][j] & (issued[i] == j + 1))),
                ]
            for k in range(i):
                m.d.comb += lemma(~(valid[i] & valid[k]) | (rows[i].slot != rows[k].slot))
        return m
