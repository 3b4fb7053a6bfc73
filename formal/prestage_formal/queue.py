"""The scheduler's queue of candidates: none is lost in silence, none is shown that is not there."""

from amaranth import Array, Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.asserts import AnyConst
from amaranth.hdl import Assert, Assume, Cover

from prestage_hw.contract.records import Source

from .harness import Inside, drive_freely, lemma
from .instances import queue_device

__all__ = ["Candidates", "Settles"]


class _Queue:
    """The queue, free but for what its docstring asks of those who use it, with a look into it.

    Attributes
    ----------
    block : CandidateQueue
        The block.
    admitted : Value
        A newcomer is taken that is not dropped on entry.
    at : callable
        Whether the state machine is in one of the named states.
    local : callable
        A variable of the block's ``elaborate``.
    """

    def __init__(self, m):
        from prestage_hw.scheduler import queue as rtl

        self.config = config = queue_device()
        self.share = config.candidate_share
        self.contexts = range(config.contexts)
        self.block = block = rtl.CandidateQueue(config=config)
        self.inside = inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        self.local = local = inside.local
        self.state, self.purpose = local("state"), local("purpose")
        self._states, self._purposes = rtl._State, rtl._Purpose
        self.counts = local("counts")
        offered = block.i.payload
        self.admitted = Signal()
        routes_before, routed_before, known = (
            Signal(16, name="routes_before"),
            Signal(name="routed_before"),
            Signal(name="known"),
        )
        routes = Value.cast(block.routes)
        m.d.sync += [routes_before.eq(routes), routed_before.eq(block.routed), known.eq(1)]
        m.d.comb += [
            self.admitted.eq(
                block.i.valid
                & block.i.ready
                & (block.enable | (offered.source != Source.PREDICTOR))
                & (offered.layer < block.cutoff_layer)
            ),
            Assume(~block.take | block.valid),
            Assume(~known | routed_before | (routes == routes_before)),
        ]
        self._frame(m)

    def at(self, *names):
        return Cat(self.state == self._states[name] for name in names).any()

    def aims(self, *names):
        """Whether the pass is for one of these."""
        return Cat(self.purpose == self._purposes[name] for name in names).any()

    def fresh(self, candidate, routes):
        """Whether a candidate's deadline has not come."""
        age = Signal(8)
        self._m.d.comb += age.eq(routes - candidate.deadline)
        return age[7]

    def _frame(self, m):
        """What holds of the counters, whatever the candidates are."""
        self._m = m
        local, at, aims, counts = self.local, self.at, self.aims, self.counts
        share, contexts = self.share, self.contexts
        names = ("ctx", "count", "reads", "writes", "removes", "removed", "total", "again", "waits")
        for name in (*names, "is_shown", "shown_index", "turn", "full", "here", "newcomer", "at"):
            setattr(self, f"{name}_" if name == "at" else name, local(name))
        index_bits = (share - 1).bit_length()
        stored = self.inside.rows("rows")
        self.rows = [[stored[(c << index_bits) + j] for j in range(share)] for c in contexts]
        self.row1 = self.newcomer.shape()(self.inside.signal("read__data"))
        self.all_rows = Array(Value.cast(row) for c in contexts for row in self.rows[c])
        self.valids = valids = [local(f"valid{i}") for i in (1, 2, 3)]
        self.passing = passing = at("PASS")
        self.counts_here = here_now = Signal(range(share + 1), name="counts_here")
        m.d.comb += here_now.eq(Array(counts)[self.ctx])
        #: A row is to be removed that the pass has not come to.
        self.removing = removing = Signal()
        #: Rows that are read next, and that went into the pipeline.
        at1, index2, index3 = self.at_, local("index2"), local("index3")
        m.d.comb += removing.eq(self.removes & at("START", "PASS"))
        gone = Signal()  # The row that is to be removed was left out.
        m.d.comb += gone.eq(
            (self.reads > self.removed)
            & ~(valids[0] & (at1 == self.removed))
            & ~(valids[1] & (index2 == self.removed))
        )
        in_flight = sum(valids)
        m.d.comb += [
            lemma(at(*(state.name for state in self._states))),
            lemma(self.total == sum(counts)),
            *(lemma(count <= share) for count in counts),
            lemma(passing | ~Cat(valids).any()),
            lemma(~passing | (self.count == here_now)),
            lemma(~at("FINISH") | ((self.count == here_now) & (self.reads == self.count))),
            lemma(~at("NEXT") | (self.writes == here_now)),
            lemma(~passing | (self.reads <= self.count)),
            # What was read is written, in a register, or left out.
            lemma(~passing | (self.writes + in_flight <= self.reads)),
            lemma(~(passing & self.removes & gone) | (self.writes + in_flight + 1 <= self.reads)),
            lemma(~at("FINISH", "NEXT") | (self.writes <= self.count)),
            lemma(~(at("FINISH", "NEXT") & self.removes) | (self.writes < self.count)),
            lemma(~at("NEXT") | (self.full == (self.writes == share))),
            # Rows in the registers follow each other.
            lemma(~(passing & valids[0]) | (at1 + 1 == self.reads)),
            lemma(~(passing & valids[1]) | (index2 + 1 + valids[0] == self.reads)),
            lemma(~(passing & valids[2]) | (index3 + 1 + valids[0] + valids[1] == self.reads)),
            lemma(~valids[2] | valids[0] | (self.reads == self.count)),
            lemma(~valids[2] | valids[1] | (self.reads == self.count)),
            lemma(~valids[1] | valids[0] | (self.reads == self.count)),
            lemma(~(removing & at("START")) | (self.removed < here_now)),
            lemma(~(removing & passing) | (self.removed < self.count)),
            # What a pass is for.
            lemma(~at("START", "PASS", "FINISH", "NEXT") | ~aims("FIND") | ~self.removes),
            lemma(~at("START", "PASS", "FINISH", "NEXT") | ~aims("REMOVE") | self.removes),
            lemma(aims("FIND", "REMOVE", "ROOM")),
            lemma(
                ~at("START", "PASS", "FINISH", "NEXT")
                | ~aims("ROOM")
                | (self.ctx == self.newcomer.candidate.ctx)
            ),
            lemma(
                ~at("CHOOSE", "START", "PASS", "FINISH")
                | aims("ROOM")
                | (self.total != 0)
                | at("CHOOSE")
            ),
            # A newcomer's place.
            lemma(~at("INSERT") | (self.here == Array(counts)[self.newcomer.candidate.ctx])),
            lemma(~at("COMPARE") | (self.here == Array(counts)[self.newcomer.candidate.ctx])),
            lemma(~at("INSERT") | (self.full == (self.here == share))),
            lemma(~(at("START", "PASS", "FINISH") & aims("ROOM")) | (here_now == share)),
        ]
        shown_index = self.shown_index
        resting = at("IDLE", "WEIGH", "COMPARE", "INSERT")
        found = (self.writes != 0) & at("PASS", "FINISH", "NEXT")
        m.d.comb += [
            lemma(~(resting & self.is_shown) | (shown_index < Array(counts)[local("shown").ctx])),
            lemma(~found | ((shown_index < self.writes) & (local("worst") < self.writes))),
            lemma(~found | (local("shown").ctx == self.ctx)),
            # Contexts have rows of their own, and what was read is what the row holds.
            lemma(~valids[0] | (Value.cast(self.row1) == self.all_rows[Cat(at1, self.ctx)])),
            *(
                lemma(~valid | (row.candidate.ctx == self.ctx))
                for valid, row in zip(
                    valids, (self.row1, local("row2"), local("row3")), strict=True
                )
            ),
            *(
                lemma(~(j < counts[c]) | (self.rows[c][j].candidate.ctx == c))
                for c in contexts
                for j in range(share)
            ),
            lemma(~at("CHOOSE") | ~self.is_shown),
            lemma(~at("START", "PASS", "FINISH", "NEXT") | aims("ROOM") | ~self.is_shown),
        ]


class Candidates(Elaboratable):
    """One candidate, whichever the solver likes, is followed; all that are inside are counted.

    Nothing in the queue looks at the number of an expert, so that one that no other candidate has
    makes a candidate known again.
    """

    def elaborate(self, platform):
        m = Module()
        q = _Queue(m)
        block, local, at, aims = q.block, q.local, q.at, q.aims
        config, share, contexts = q.config, q.share, q.contexts
        mark = Signal(config.bits("expert"))
        m.d.comb += mark.eq(AnyConst(len(mark)))
        layout = block.i.payload.shape()
        followed = Signal(layout)
        came, present = Signal(), Signal()
        offered = block.i.payload
        is_marked = offered.expert == mark
        m.d.comb += Assume(~(q.admitted & is_marked) | ~came)
        with m.If(q.admitted & is_marked):
            m.d.sync += [came.eq(1), followed.eq(offered)]

        row2, row3, newcomer = local("row2"), local("row3"), q.newcomer
        rows, row1 = q.rows, q.row1
        at1, index2 = q.at_, local("index2")
        holding = at("WEIGH", "COMPARE", "INSERT") | (
            aims("ROOM") & at("START", "PASS", "FINISH", "NEXT")
        )
        under = [at("PASS", "FINISH") & (q.ctx == c) for c in contexts]

        def there(c, j):
            """Whether a row holds a candidate that will stay."""
            removed = q.removes & (q.removed == j)
            return Mux(
                under[c],
                (j < q.writes) | ((j >= q.reads) & (j < q.count) & ~removed),
                (j < q.counts[c]) & ~(at("START") & (q.ctx == c) & removed),
            )

        places = [
            (q.waits, local("arrived")),
            (holding, newcomer.candidate),
            (q.valids[0] & ~(q.removes & (at1 == q.removed)), row1.candidate),
            (q.valids[1] & ~(q.removes & (index2 == q.removed)), row2.candidate),
            (q.valids[2], row3.candidate),
            *((there(c, j), rows[c][j].candidate) for c in contexts for j in range(share)),
        ]
        copies, held = Signal(4), Signal(4)
        flags = []
        for i, (valid, candidate) in enumerate(places):
            flag, here = Signal(name=f"copy_{i}"), Signal(name=f"here_{i}")
            m.d.comb += [here.eq(valid), flag.eq(here & (candidate.expert == mark))]
            flags.append((here, flag))
            m.d.comb += lemma(~flag | (Value.cast(candidate) == Value.cast(followed)))
        m.d.comb += [
            held.eq(sum(here for here, _ in flags)),
            copies.eq(sum(flag for _, flag in flags)),
        ]

        # --- who leaves, and why ---
        stale, overflow = local("stale"), local("overflow")
        worst, loses = local("worst"), local("loses")
        lost = Signal()  # The followed one is, to a full queue,
        late = Signal()  # or since its deadline has come.
        marked_worst = Array(row.candidate.expert == mark for c in contexts for row in rows[c])[
            Cat(worst, q.ctx)
        ]
        m.d.comb += [
            lost.eq(overflow & Mux(loses, newcomer.candidate.expert == mark, marked_worst)),
            late.eq(
                stale
                & Mux(
                    at("INSERT"), newcomer.candidate.expert == mark, row3.candidate.expert == mark
                )
            ),
        ]
        taken = block.take & (block.best.expert == mark)
        with m.If(q.admitted & is_marked):
            m.d.sync += present.eq(1)
        with m.Elif(taken | lost | late):
            m.d.sync += present.eq(0)
        # Its deadline has come since it has.
        came_due = Signal()
        routes_of = Array(block.routes[c] for c in contexts)
        due = present & ~q.fresh(followed, routes_of[followed.ctx])
        m.d.sync += came_due.eq(came_due | due)
        level = Signal(4)
        m.d.sync += level.eq(level + q.admitted - block.take - block.stale - block.overflow)

        # --- claims ---
        shown = block.best
        is_best = block.valid & (shown.expert == mark)
        m.d.comb += [
            # What is shown has come, is as it came, and has not left.
            Assert(~is_best | (present & (Value.cast(shown) == Value.cast(followed)))),
            # It is inside once, and leaves once: it is taken, its deadline comes, or it is lost.
            Assert(copies == present),
            Assert(~lost | present),
            Assert(~late | present),
            # Nothing is lost or doubled in silence.
            Assert(~block.empty | (level == 0)),
            Assert(~block.valid | (level != 0)),
            Assert(level == held + block.stale + block.overflow),
            # What is shown is not stale, and only what is stale is dropped as such.
            Assert(~block.valid | q.fresh(shown, routes_of[shown.ctx])),
            Assert(~late | came_due),
            # A candidate is lost only if its context's places are taken.
            Assert(~overflow | (Array(q.counts)[newcomer.candidate.ctx] == share)),
            # A row is not read in the cycle of its write.
            Assert(
                ~(local("write").en & at("PASS") & (q.reads != q.count))
                | (local("write").addr != local("read").addr)
            ),
            Cover(is_best & (level == 3)),
            Cover(lost & loses),
            Cover(lost & ~loses),
            Cover(late & at("PASS")),
        ]
        self._lemmas(m, q, present, came)
        in_row = Cat(flag for _, flag in flags[2:]).any()
        its_pass = in_row & (followed.ctx == q.ctx) & at("PASS")
        m.d.comb += [
            lemma(~its_pass | came_due | q.fresh(followed, local("routes"))),
            lemma(
                ~(at("COMPARE", "INSERT") & local("newcomer_late"))
                | (newcomer.candidate.expert != mark)
                | came_due
            ),
            lemma(~came_due | came),
            lemma(
                ~(at("START", "PASS", "FINISH", "NEXT") & aims("ROOM")) | ~local("newcomer_late")
            ),
        ]
        return m

    def _lemmas(self, m, q, present, came):
        local, at, _aims, block = q.local, q.at, q.aims, q.block
        row3, newcomer = local("row3"), q.newcomer
        shown, shown_index = local("shown"), q.shown_index
        routes, contexts = local("routes"), q.contexts
        routes_of = Array(block.routes[c] for c in contexts)
        shown_row = newcomer.shape()(Signal(newcomer.shape().size, name="shown_row"))
        pass_row = newcomer.shape()(Signal(newcomer.shape().size, name="pass_row"))
        m.d.comb += [
            Value.cast(shown_row).eq(q.all_rows[Cat(shown_index, shown.ctx)]),
            Value.cast(pass_row).eq(q.all_rows[Cat(shown_index, q.ctx)]),
        ]
        resting = at("IDLE", "WEIGH", "COMPARE", "INSERT")
        found = (q.writes != 0) & at("PASS", "FINISH", "NEXT")
        m.d.comb += [
            lemma(~present | came),
            lemma(~(resting & q.is_shown) | (Value.cast(shown_row.candidate) == Value.cast(shown))),
            lemma(~found | (Value.cast(pass_row.candidate) == Value.cast(shown))),
            # Deadlines.
            lemma(~at("PASS", "FINISH", "NEXT") | q.again | (routes == routes_of[q.ctx])),
            lemma(~q.valids[2] | (local("fresh3") == q.fresh(row3.candidate, routes))),
            lemma(~found | q.fresh(shown, routes)),
            lemma(~(resting & q.is_shown & ~q.again) | q.fresh(shown, routes_of[shown.ctx])),
            lemma(
                ~at("COMPARE", "INSERT")
                | q.again
                | (
                    local("newcomer_late")
                    == ~q.fresh(newcomer.candidate, routes_of[newcomer.candidate.ctx])
                )
            ),
        ]


class Settles(Elaboratable):
    """A newcomer is taken, and a candidate offered, in bounded time."""

    def elaborate(self, platform):
        m = Module()
        q = _Queue(m)
        block, at, aims = q.block, q.at, q.aims
        share, contexts = q.share, q.contexts
        # Cycles of a pass with its first and last states.
        whole = share + 7
        reading = Signal(8)
        m.d.comb += reading.eq(
            Mux(
                q.reads != q.count,
                q.count - q.reads + 4,
                Mux(q.valids[0], 4, Mux(q.valids[1], 3, Mux(q.valids[2], 2, 1))),
            )
        )
        of_pass = Signal(8)
        with m.If(at("START")):
            m.d.comb += of_pass.eq(whole)
        with m.Elif(at("PASS")):
            m.d.comb += of_pass.eq(reading + 2)
        with m.Elif(at("FINISH")):
            m.d.comb += of_pass.eq(2)
        with m.Elif(at("NEXT")):
            m.d.comb += of_pass.eq(1)
        filled = [count != 0 for count in q.counts]
        others = sum(filled[c] & (q.ctx != c) for c in contexts)
        lap = len(contexts) * (whole + 1) + 2  # From CHOOSE, at most.
        room = 2 * whole + 2  # From INSERT, at most.
        until_idle = Signal(8)
        with m.Switch(q.state):
            for name, cycles in (
                ("WEIGH", room + 2),
                ("COMPARE", room + 1),
                ("INSERT", Mux(q.full, room, 1)),
                (
                    "CHOOSE",
                    sum(filled) * (whole + 1) + 1 + (~Array(filled)[q.ctx] & (q.total != 0)),
                ),
            ):
                with m.Case(q._states[name]):
                    m.d.comb += until_idle.eq(cycles)
            with m.Case(*(q._states[n] for n in ("START", "PASS", "FINISH", "NEXT"))):
                with m.If(aims("ROOM")):
                    m.d.comb += until_idle.eq(of_pass + 1 + Mux(q.removes, 0, whole))
                with m.Elif(aims("FIND")):
                    m.d.comb += until_idle.eq(of_pass + others * (whole + 1) + 1)
                with m.Else():
                    m.d.comb += until_idle.eq(of_pass + lap)
        # Cycles for which a newcomer has not been taken.
        waited = Signal(8)
        m.d.sync += waited.eq(Mux(block.i.ready, 0, waited + 1))
        most = block.longest_wait
        # The same while it and others before it have room.
        plain = Signal(4)
        easy = at("IDLE", "WEIGH", "COMPARE", "INSERT")
        m.d.sync += plain.eq(Mux(q.waits & easy, plain + 1, 0))
        # Cycles in which nothing came, was taken, or was routed.
        quiet = Signal(8)
        busy = block.i.valid | block.take | block.routed
        settles = 3 * whole + 4 + room + 3 + lap + 1
        with m.If(busy):
            m.d.sync += quiet.eq(0)
        with m.Elif(quiet != settles + 2):
            m.d.sync += quiet.eq(quiet + 1)
        to_come = Signal(8)
        makes_room = at("WEIGH", "COMPARE", "INSERT") | (
            aims("ROOM") & at("START", "PASS", "FINISH", "NEXT")
        )
        m.d.comb += to_come.eq(
            until_idle + Mux(q.waits, room + 3, 0) + Mux(q.again | q.waits | makes_room, lap + 1, 0)
        )
        settled = at("IDLE") & ~q.waits & ~q.again
        m.d.comb += [
            Assert(waited <= most),
            Assert(plain <= block.insert_cycles),
            Assert((quiet <= settles) | block.valid | block.empty),
            lemma(block.i.ready == ~q.waits),
            lemma((plain == 0) | ~at("WEIGH") | ~q.waits),
            lemma((plain <= 1) | ~at("COMPARE") | ~q.waits),
            lemma((plain <= 2) | ~at("INSERT") | ~q.waits),
            lemma((plain <= 3) | ~at("IDLE") | ~q.waits),
            lemma(~q.waits | (waited + until_idle + 1 <= most)),
            lemma(until_idle <= 3 * whole + 4),
            lemma(settled | (quiet + to_come <= settles)),
            lemma(~settled | (q.is_shown == (q.total != 0))),
            lemma(
                ~at("IDLE", "WEIGH", "COMPARE", "INSERT") | q.again | (q.is_shown == (q.total != 0))
            ),
            Cover((quiet == 30) & block.valid),
            Cover(q.waits & (waited == 20)),
        ]
        return m
