"""Stream helpers: nothing is lost, doubled or reordered."""

from amaranth import Elaboratable, Module, Signal
from amaranth.asserts import AnySeq
from amaranth.hdl import Assert, Cover

from .harness import Held, Inside, drive_freely, lemma

__all__ = ["TwoBeatsOrder"]


class TwoBeatsOrder(Elaboratable):
    """One beat, whichever the solver likes, is followed through :class:`TwoBeats`."""

    def elaborate(self, platform):
        from prestage_hw.predictor.two_beats import TwoBeats

        m = Module()
        block = TwoBeats(4)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        incoming, outgoing = block.incoming, block.outgoing
        came = incoming.valid & incoming.ready
        went = outgoing.valid & outgoing.ready

        level = Signal(4)
        followed = Signal()
        value = Signal(4)
        ahead = Signal(4)
        m.d.sync += level.eq(level + came - went)
        with m.If(~followed & came & AnySeq(1)):
            m.d.sync += [
                followed.eq(1),
                value.eq(incoming.payload),
                ahead.eq(level - went),
            ]
        with m.Elif(followed & went):
            m.d.sync += [ahead.eq(ahead - 1), followed.eq(ahead != 0)]

        spare, spare_valid = inside.local("spare"), inside.local("spare_valid")
        held = Held(m, outgoing.valid, outgoing.ready, outgoing.payload, name="outgoing")
        m.d.comb += [
            Assert(held.kept),
            # What is inside is offered, and comes when all that came before it has left.
            Assert(outgoing.valid == (level != 0)),
            Assert(~(followed & outgoing.valid & (ahead == 0)) | (outgoing.payload == value)),
            lemma(level == outgoing.valid + spare_valid),
            lemma(~spare_valid | outgoing.valid),
            lemma(~followed | (ahead < level)),
            lemma(~(followed & (ahead == 1)) | (spare == value)),
            Cover(followed & (ahead == 1)),
            Cover(followed & (ahead == 0) & went & (value == 9)),
        ]
        return m
