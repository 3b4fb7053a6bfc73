"""Bounded queue of prefetch candidates that shows the one with the greatest expected benefit."""

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.benefit import CONFIDENCE_STEPS, LEAST_STEPS
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source
from prestage_hw.layouts import RecordLayout

__all__ = ["CandidateQueue"]


class _State(enum.Enum, shape=unsigned(4)):
    IDLE = 0
    WEIGH = 1  # A newcomer: when is its turn?
    COMPARE = 2
    INSERT = 3
    CHOOSE = 4  # Whose candidates are to be looked through?
    START = 5
    PASS = 6
    FINISH = 7
    NEXT = 8  # What was the pass for?


class _Purpose(enum.Enum, shape=unsigned(2)):
    FIND = 0  # the best
    REMOVE = 1  # the one that was taken
    ROOM = 2  # to make room for a newcomer


class CandidateQueue(wiring.Component):
    """Keep each context's candidates in the order of arrival, and show the best.

    A candidate is the better the fewer steps it has left: its distance, in routing decisions of its
    context until its deadline, and the steps of :data:`CONFIDENCE_STEPS`. Of equals the first to
    come is better. Contexts with candidates take turns.

    The places are shared out evenly among contexts. Who comes when all of its context's are taken
    replaces the worst if it is better, and is lost if not. Candidates whose deadline has come are
    dropped before that, and are never shown.

    A newcomer takes ``insert_cycles``. After a ``take`` or ``routed`` the candidates are looked
    through, one a cycle; when there is no room for a newcomer, those of its context are, up to
    twice. Newcomers wait meanwhile, for at most ``longest_wait`` cycles.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device; each context has ``config.candidate_share`` places.

    Members
    -------
    i : ``In(stream.Signature(RecordLayout("Candidate")))``
        Newcomers.
    best : ``Out(RecordLayout("Candidate"))``
        The best of all that have come.
    valid : ``Out(1)``
        ``best`` is there. Unlike a stream's, it may fall, and ``best`` change, before it is taken:
        it is low while anything comes or is looked through.
    take : ``In(1)``
        Removes ``best``. Only while ``valid``.
    routes : ``In(data.ArrayLayout(8, config.contexts))``
        Routing decisions of each context, modulo 256.
    routed : ``In(1)``
        A pulse in the cycle before ``routes`` changes.
    enable : ``In(1)``
        0 drops candidates of the predictor on entry.
    cutoff_layer : ``In(8)``
        Candidates for this layer and those above are dropped on entry; 255: none are.
    overflow : ``Out(1)``
        A candidate was lost because its context's places were taken.
    stale : ``Out(1)``
        A candidate was dropped because its deadline has come.
    empty : ``Out(1)``
        The queue holds nothing, and has nothing to do.
    """

    #: Cycles from one newcomer to the next if there is room.
    insert_cycles = 4

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self.layout = RecordLayout("Candidate", config=config)
        share, contexts = config.candidate_share, config.contexts
        #: Most cycles for which ``i`` is not ready.
        self.longest_wait = 3 * (share + 8) + contexts * (share + 10) + 2 * self.insert_cycles
        super().__init__(
            {
                "i": In(stream.Signature(self.layout)),
                "best": Out(self.layout),
                "valid": Out(1),
                "take": In(1),
                "routes": In(data.ArrayLayout(8, contexts)),
                "routed": In(1),
                "enable": In(1),
                "cutoff_layer": In(8),
                "overflow": Out(1),
                "stale": Out(1),
                "empty": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        share, contexts = config.candidate_share, config.contexts
        place = range(share)
        row_layout = data.StructLayout({"candidate": self.layout, "due": 8})
        ctx_shape = unsigned(config.bits("ctx"))

        # A context's candidates fill the lowest rows of its own. A row is never read in the cycle
        # of its write: a pass writes behind what it has read.
        index_bits = len(Signal(place))
        m.submodules.rows = rows = Memory(
            shape=row_layout, depth=contexts << index_bits, init=[], attrs={"no_rw_check": 1}
        )
        write, read = rows.write_port(), rows.read_port()
        counts = [Signal(range(share + 1), name=f"count_{c}") for c in range(contexts)]
        total = Signal(range(share * contexts + 1))
        turn = Signal(ctx_shape)  # Context that goes first.

        def after(ctx):
            """The next context."""
            return Mux(ctx == contexts - 1, 0, ctx + 1)

        state = Signal(_State)
        is_idle = Signal()
        m.d.comb += is_idle.eq(state == _State.IDLE)

        # --- newcomers ---
        arrived = Signal(self.layout)
        waits = Signal()  # ``arrived`` does.
        newcomer = Signal(row_layout)
        steps = Signal(range(LEAST_STEPS + 1))
        newcomer_late, newcomer_turns = Signal(), Signal(ctx_shape)
        newcomer_left = Signal(8)
        here = Signal(range(share + 1))  # Candidates of its context.
        full = Signal()
        m.d.comb += self.i.ready.eq(~waits)
        with m.If(self.i.ready):
            m.d.sync += [
                arrived.eq(self.i.payload),
                waits.eq(
                    self.i.valid
                    & (self.enable | (self.i.payload.source != Source.PREDICTOR))
                    # No device has a layer 255.
                    & (self.i.payload.layer < self.cutoff_layer)
                ),
            ]
        m.d.sync += steps.eq(Array(Const(n, len(steps)) for n in CONFIDENCE_STEPS)[arrived.score])

        # --- what is shown ---
        shown = Signal(self.layout, reset_less=True)
        is_shown = Signal()
        shown_index, shown_left = Signal(place), Signal(8)
        shown_turns = Signal(ctx_shape)
        again = Signal()  # It may not be the best any more.
        m.d.comb += [
            self.best.eq(shown),
            self.valid.eq(is_shown & is_idle & ~waits & ~again),
            self.empty.eq((total == 0) & is_idle & ~waits & ~again & ~self.stale & ~self.overflow),
        ]
        better = Signal()
        m.d.comb += better.eq(Cat(newcomer_left, newcomer_turns) < Cat(shown_left, shown_turns))

        # --- passes over a context's rows ---
        purpose = Signal(_Purpose)
        ctx = Signal(ctx_shape)
        routes = Signal(8)
        removes = Signal()
        removed = Signal(place)  # index
        count = Signal(range(share + 1))
        reads, writes = Signal(range(share + 1)), Signal(range(share + 1))
        # What was read goes through two registers: the row, then what is left of it.
        valid1, valid2, valid3 = Signal(), Signal(), Signal()
        row2, row3 = Signal(row_layout, reset_less=True), Signal(row_layout)
        index2, index3, at = Signal(place), Signal(place), Signal(place)
        fresh3, left3 = Signal(), Signal(8)
        age2, left2 = Signal(8), Signal(8)
        worst, worst_left = Signal(place), Signal(8)
        loses = Signal()
        others = Signal()
        done = Signal()
        m.d.comb += [
            read.addr.eq(Cat(reads[:index_bits], ctx) if contexts > 1 else reads[:index_bits]),
            read.en.eq(1),
            age2.eq(routes - row2.candidate.deadline),
            left2.eq(row2.due - routes),
            done.eq((reads == count) & ~valid1 & ~valid2 & ~valid3),
        ]
        m.d.sync += [
            valid1.eq((state == _State.PASS) & (reads != count)),
            at.eq(reads),
            valid2.eq(valid1),
            row2.eq(read.data),
            index2.eq(at),
            # Routes since the deadline, modulo 256: below 128 the layer was routed already.
            valid3.eq(valid2 & ~(removes & (index2 == removed))),
            fresh3.eq(age2[7]),
            left3.eq(left2),
            row3.eq(row2),
            index3.eq(index2),
        ]
        keeps = Signal()
        m.d.comb += keeps.eq(valid3 & fresh3)
        insert = Signal()
        insert_ctx = newcomer.candidate.ctx
        write_index = Mux(insert, here[:index_bits], writes[:index_bits])
        write_ctx = Mux(insert, insert_ctx, ctx)
        m.d.comb += [
            write.addr.eq(Cat(write_index, write_ctx) if contexts > 1 else write_index),
            write.data.eq(Mux(insert, newcomer, row3)),
            write.en.eq(insert | keeps),
        ]
        with m.If(keeps):
            m.d.sync += writes.eq(writes + 1)
            with m.If((writes == 0) | (left3 < shown_left)):
                m.d.sync += [
                    shown.eq(row3.candidate),
                    shown_left.eq(left3),
                    shown_index.eq(writes),
                ]
            with m.If((writes == 0) | (left3 >= worst_left)):
                m.d.sync += [worst.eq(writes), worst_left.eq(left3)]
        stale, overflow = Signal(), Signal()
        m.d.comb += stale.eq(valid3 & ~fresh3)
        m.d.sync += [self.stale.eq(stale), self.overflow.eq(overflow)]

        with m.Switch(state):
            with m.Case(_State.IDLE):
                with m.If(self.take):
                    m.d.sync += [
                        turn.eq(after(shown.ctx)),
                        ctx.eq(shown.ctx),
                        removes.eq(1),
                        removed.eq(shown_index),
                        purpose.eq(_Purpose.REMOVE),
                        is_shown.eq(0),
                        state.eq(_State.START),
                    ]
                with m.Elif(waits):
                    m.d.sync += [
                        newcomer.candidate.eq(arrived),
                        waits.eq(0),
                        state.eq(_State.WEIGH),
                    ]
                with m.Elif(again):
                    m.d.sync += [
                        again.eq(0),
                        is_shown.eq(0),
                        ctx.eq(turn),
                        state.eq(_State.CHOOSE),
                    ]

            with m.Case(_State.WEIGH):
                age = Signal(8)
                m.d.comb += age.eq(self.routes[insert_ctx] - newcomer.candidate.deadline)
                m.d.sync += [
                    newcomer.due.eq(newcomer.candidate.deadline + steps),
                    newcomer_late.eq(~age[7]),
                    newcomer_turns.eq(
                        Mux(
                            insert_ctx >= turn,
                            insert_ctx - turn,
                            insert_ctx + contexts - turn,
                        )
                    ),
                    here.eq(Array(counts)[insert_ctx]),
                    state.eq(_State.COMPARE),
                ]

            with m.Case(_State.COMPARE):
                m.d.sync += [
                    newcomer_left.eq(newcomer.due - self.routes[insert_ctx]),
                    full.eq(here == share),
                    state.eq(_State.INSERT),
                ]

            with m.Case(_State.INSERT):
                m.d.sync += state.eq(_State.IDLE)
                with m.If(newcomer_late):
                    m.d.comb += stale.eq(1)
                with m.Elif(full):
                    m.d.sync += [
                        ctx.eq(insert_ctx),
                        removes.eq(0),
                        purpose.eq(_Purpose.ROOM),
                        state.eq(_State.START),
                    ]
                with m.Else():
                    m.d.comb += insert.eq(1)
                    m.d.sync += total.eq(total + 1)
                    for c in range(contexts):
                        with m.If(insert_ctx == c):
                            m.d.sync += counts[c].eq(here + 1)
                    with m.If(~is_shown | better):
                        m.d.sync += [
                            is_shown.eq(1),
                            shown.eq(newcomer.candidate),
                            shown_index.eq(here),
                            shown_left.eq(newcomer_left),
                            shown_turns.eq(newcomer_turns),
                        ]

            with m.Case(_State.CHOOSE):
                m.d.sync += [removes.eq(0), purpose.eq(_Purpose.FIND)]
                with m.If(total == 0):
                    m.d.sync += state.eq(_State.IDLE)
                with m.Elif(Array(counts)[ctx] == 0):
                    m.d.sync += ctx.eq(after(ctx))
                with m.Else():
                    m.d.sync += state.eq(_State.START)

            with m.Case(_State.START):
                m.d.sync += [
                    routes.eq(self.routes[ctx]),
                    count.eq(Array(counts)[ctx]),
                    reads.eq(0),
                    writes.eq(0),
                    state.eq(_State.PASS),
                ]

            with m.Case(_State.PASS):
                with m.If(reads != count):
                    m.d.sync += reads.eq(reads + 1)
                m.d.sync += newcomer_left.eq(newcomer.due - routes)
                with m.If(done):
                    m.d.sync += state.eq(_State.FINISH)

            with m.Case(_State.FINISH):
                m.d.sync += [
                    total.eq(total - count + writes),
                    loses.eq(newcomer_left >= worst_left),
                    full.eq(writes == share),
                    shown_turns.eq(Mux(ctx >= turn, ctx - turn, ctx + contexts - turn)),
                    state.eq(_State.NEXT),
                ]
                for c in range(contexts):
                    with m.If(ctx == c):
                        m.d.sync += counts[c].eq(writes)

            with m.Case(_State.NEXT):
                m.d.comb += others.eq(total != writes)
                with m.Switch(purpose):
                    with m.Case(_Purpose.ROOM):
                        # What is shown may lie in another row now.
                        m.d.sync += [again.eq(1), is_shown.eq(0), removes.eq(1), removed.eq(worst)]
                        with m.If(~full):
                            m.d.sync += [here.eq(writes), state.eq(_State.INSERT)]
                        with m.Else():
                            m.d.comb += overflow.eq(1)
                            m.d.sync += state.eq(Mux(loses, _State.IDLE, _State.START))
                    with m.Case(_Purpose.REMOVE):
                        with m.If(others):
                            m.d.sync += [ctx.eq(turn), state.eq(_State.CHOOSE)]
                        with m.Else():
                            m.d.sync += [is_shown.eq(writes != 0), state.eq(_State.IDLE)]
                    with m.Default():
                        with m.If(writes == 0):
                            m.d.sync += [ctx.eq(after(ctx)), state.eq(_State.CHOOSE)]
                        with m.Else():
                            m.d.sync += [is_shown.eq(1), state.eq(_State.IDLE)]

        with m.If(self.routed & ((total != 0) | waits | ~is_idle)):
            m.d.sync += again.eq(1)
        return m
