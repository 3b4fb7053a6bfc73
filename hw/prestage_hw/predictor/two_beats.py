"""Two registers between blocks that lie far apart."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["TwoBeats"]


class TwoBeats(wiring.Component):
    """Take beats as long as one of two registers is free, whatever the other side does.

    Neither ``ready`` nor ``valid`` nor a payload depends on an input in the same cycle. A beat
    takes one cycle; one beat passes each cycle.

    Parameters
    ----------
    layout : shape
        What a beat consists of.

    Members
    -------
    incoming : ``In(stream.Signature(layout))``
        Beats.
    outgoing : ``Out(stream.Signature(layout))``
        The same, in their order.
    """

    def __init__(self, layout):
        super().__init__(
            {"incoming": In(stream.Signature(layout)), "outgoing": Out(stream.Signature(layout))}
        )

    def elaborate(self, platform):
        m = Module()
        spare, spare_valid = Signal.like(self.incoming.payload), Signal()
        m.d.comb += self.incoming.ready.eq(~spare_valid)
        with m.If(self.outgoing.ready | ~self.outgoing.valid):
            m.d.sync += [
                self.outgoing.valid.eq(spare_valid | self.incoming.valid),
                self.outgoing.payload.eq(Mux(spare_valid, spare, self.incoming.payload)),
                spare_valid.eq(0),
            ]
        with m.Elif(self.incoming.ready):
            m.d.sync += [spare.eq(self.incoming.payload), spare_valid.eq(self.incoming.valid)]
        return m
