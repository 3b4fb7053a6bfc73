"""Union of what a chunk of tokens is predicted to choose, most popular experts first."""

from amaranth import Array, Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Phase, Source
from prestage_hw.layouts import RecordLayout

__all__ = ["ChunkUnion"]

_POPULARITY_BITS = 16


class _RowLayout(data.StructLayout):
    """What is known of an expert of the layer that comes next."""

    def __init__(self):
        super().__init__(
            {
                "popularity": unsigned(_POPULARITY_BITS),
                "deadline": unsigned(8),  # whose popularity it is
                "sent": unsigned(1),
                "valid": unsigned(1),
            }
        )


class ChunkUnion(wiring.Component):
    """Gather the candidates of a chunk's tokens for the next layer, and hand each expert on once.

    In the phases PREFILL and VERIFY the tokens of a chunk are routed one by one through a layer,
    and each brings candidates for the next. An expert's *popularity* is the sum of their
    confidence, which is about how many tokens will choose it. Whenever the scheduler has no
    candidate left, the most popular expert that was not handed on yet follows, the lowest number of
    equals: so the union streams into the buffer in the order of popularity while the layer before
    is computed. With the next layer's first route the rest is forgotten: the demands have come.

    All other candidates pass: those of contexts in the phase DECODE, of hints, and for layers
    farther away.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    i : ``In(stream.Signature(RecordLayout("Candidate")))``
        The predictor's candidates.
    o : ``Out(stream.Signature(RecordLayout("Candidate")))``
        Candidates for the scheduler. The score of a chunk's is its popularity, at most 255.
    token_valid, token : ``In(1)``, ``In(RecordLayout("BeginToken", config=config))``
        A token starts, or a chunk. Only listened to, as ``decision``.
    decision_valid, decision : ``In(1)``, ``In(RecordLayout("RoutingDecision", config=config))``
        The predictor takes a decision.
    wanted : ``In(1)``
        The scheduler has no candidate left.
    hold : ``In(1)``
        1 lets what was gathered wait.
    streaming, gathering : ``Out(config.contexts)``
        Contexts that go through a prefill chunk; through any chunk.
    idle : ``Out(1)``
        No candidate is in the block, nor one gathered that will be handed on.
    """

    #: Cycles from a candidate that passes to ``o.valid``.
    latency = 1

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        #: Cycles from ``wanted`` to ``o.valid`` for the most popular expert of the context whose
        #: turn it is, while no candidate comes. Other contexts take a cycle more each.
        self.search_cycles = config.model.experts + 5
        #: Cycles after a reset in which no candidate is taken.
        self.clear_cycles = config.contexts << config.bits("expert")
        candidate = stream.Signature(RecordLayout("Candidate", config=config))
        super().__init__(
            {
                "i": In(candidate),
                "o": Out(candidate),
                "token_valid": In(1),
                "token": In(RecordLayout("BeginToken", config=config)),
                "decision_valid": In(1),
                "decision": In(RecordLayout("RoutingDecision", config=config)),
                "wanted": In(1),
                "hold": In(1),
                "streaming": Out(config.contexts),
                "gathering": Out(config.contexts),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        contexts = range(config.contexts)
        experts = config.model.experts
        expert_bits = config.bits("expert")

        row = _RowLayout()
        m.submodules.rows = rows = Memory(
            shape=row, depth=config.contexts << expert_bits, init=[], attrs={"no_rw_check": 1}
        )
        read, write = rows.read_port(), rows.write_port()
        # Block RAM is slow out of the clock edge. No reset, so that the register may be its own.
        raw = Signal(row, reset_less=True)

        pending = Signal(config.contexts)  # Something was gathered since the last search in vain.
        target = Array(Signal(range(config.model.layers + 1), name=f"target_{c}") for c in contexts)
        due = Array(Signal(8, name=f"due_{c}") for c in contexts)
        new = Signal(self.i.p.shape())
        collects = Signal()
        sweep = Signal(range(config.contexts << expert_bits))

        # The search: one expert a cycle, two cycles behind the address.
        ctx = Signal(config.bits("ctx"))
        asked = Signal(range(experts + 1))
        looked = Signal(range(experts + 1))
        steps = Signal(2)  # Reads under way.
        found = Signal()
        best = Signal(_POPULARITY_BITS)
        best_expert = Signal(expert_bits)

        m.d.comb += collects.eq(
            self.gathering.bit_select(self.i.p.ctx, 1)
            & (self.i.p.source == Source.PREDICTOR)
            & (self.i.p.layer == target[self.i.p.ctx])
        )
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)

        with m.FSM(init="CLEAR") as fsm:
            with m.State("CLEAR"):
                # A reset does not clear the memory.
                m.d.comb += [write.en.eq(1), write.addr.eq(sweep)]
                m.d.sync += sweep.eq(sweep + 1)
                with m.If(sweep == self.clear_cycles - 1):
                    m.next = "LISTEN"

            with m.State("LISTEN"):
                m.d.comb += self.i.ready.eq(~self.o.valid | self.o.ready)
                m.d.sync += [asked.eq(0), looked.eq(0), steps.eq(0), found.eq(0), best.eq(0)]
                with m.If(self.i.valid & self.i.ready):
                    m.d.sync += new.eq(self.i.p)
                    with m.If(collects):
                        m.next = "ROW"
                    with m.Else():
                        m.d.sync += [self.o.valid.eq(1), self.o.p.eq(self.i.p)]
                with m.Elif(pending.any() & self.wanted & ~self.hold & ~self.o.valid):
                    # Contexts in turn.
                    with m.If(~pending.bit_select(ctx, 1)):
                        m.d.sync += ctx.eq(Mux(ctx == config.contexts - 1, 0, ctx + 1))
                    with m.Else():
                        m.next = "SEARCH"

            with m.State("ROW"):
                m.d.comb += read.addr.eq(Cat(new.expert, new.ctx))
                m.next = "READ"
            with m.State("READ"):
                m.d.sync += raw.eq(read.data)
                m.next = "ADD"
            with m.State("ADD"):
                same = raw.valid & (raw.deadline == new.deadline)
                more = Mux(same, raw.popularity, 0) + Mux(new.score == 0, 1, new.score)
                m.d.comb += [
                    write.en.eq(1),
                    write.addr.eq(Cat(new.expert, new.ctx)),
                    write.data.popularity.eq(
                        Mux(more[_POPULARITY_BITS:].any(), (1 << _POPULARITY_BITS) - 1, more)
                    ),
                    write.data.deadline.eq(new.deadline),
                    write.data.sent.eq(same & raw.sent),
                    write.data.valid.eq(1),
                ]
                # Its layer may have been routed meanwhile.
                with m.If(new.layer == target[new.ctx]):
                    m.d.sync += [
                        due[new.ctx].eq(new.deadline),
                        pending.bit_select(new.ctx, 1).eq(1),
                    ]
                m.next = "LISTEN"

            with m.State("SEARCH"):
                m.d.comb += read.addr.eq(Cat(asked[:expert_bits], ctx))
                m.d.sync += [
                    raw.eq(read.data),
                    steps.eq(Cat(asked != experts, steps[0])),
                ]
                with m.If(asked != experts):
                    m.d.sync += asked.eq(asked + 1)
                with m.If(steps[1]):
                    m.d.sync += looked.eq(looked + 1)
                    with m.If(
                        raw.valid & ~raw.sent & (raw.deadline == due[ctx]) & (raw.popularity > best)
                    ):
                        m.d.sync += [
                            found.eq(1),
                            best.eq(raw.popularity),
                            best_expert.eq(looked),
                        ]
                # A candidate comes first: it may be more popular. So does a route.
                with m.If(self.i.valid | ~pending.bit_select(ctx, 1)):
                    m.next = "LISTEN"
                with m.Elif(looked == experts):
                    m.next = "SEND"

            with m.State("SEND"):
                m.next = "LISTEN"
                with m.If(~found):
                    m.d.sync += pending.bit_select(ctx, 1).eq(0)
                with m.Elif(pending.bit_select(ctx, 1)):
                    m.d.comb += [
                        write.en.eq(1),
                        write.addr.eq(Cat(best_expert, ctx)),
                        write.data.popularity.eq(best),
                        write.data.deadline.eq(due[ctx]),
                        write.data.sent.eq(1),
                        write.data.valid.eq(1),
                    ]
                    m.d.sync += [
                        self.o.valid.eq(1),
                        self.o.p.ctx.eq(ctx),
                        self.o.p.layer.eq(target[ctx]),
                        self.o.p.expert.eq(best_expert),
                        self.o.p.score.eq(Mux(best[8:].any(), 255, best)),
                        self.o.p.source.eq(Source.PREDICTOR),
                        self.o.p.deadline.eq(due[ctx]),
                        ctx.eq(Mux(ctx == config.contexts - 1, 0, ctx + 1)),
                    ]

        # What is listened to comes last, so that it has the last word on `pending`.
        with m.If(self.token_valid):
            m.d.sync += [
                self.gathering.bit_select(self.token.ctx, 1).eq(
                    (self.token.phase == Phase.PREFILL) | (self.token.phase == Phase.VERIFY)
                ),
                self.streaming.bit_select(self.token.ctx, 1).eq(self.token.phase == Phase.PREFILL),
                target[self.token.ctx].eq(0),
                pending.bit_select(self.token.ctx, 1).eq(0),
            ]
        with m.If(self.decision_valid & (target[self.decision.ctx] != self.decision.layer + 1)):
            m.d.sync += [
                target[self.decision.ctx].eq(self.decision.layer + 1),
                pending.bit_select(self.decision.ctx, 1).eq(0),
            ]
        m.d.comb += self.idle.eq(
            fsm.ongoing("LISTEN") & ~pending.any() & ~self.o.valid & ~self.i.valid
        )
        return m
