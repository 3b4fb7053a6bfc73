"""Two readers on the consumer port of the expert buffer."""

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

__all__ = ["ReadArbiter"]

#: More reads than the storage can hold between request and beat.
_MOST_OUTSTANDING = 15


class ReadArbiter(wiring.Component):
    """Share the consumer port between the consumer and the link.

    The port belongs to one of them at a time and changes hands only when no beat is outstanding, so
    beats need no tag. It costs the consumer no cycle
    while the link doesn't read.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    reads, beats : ``In(stream of ReadRequest)``, ``Out(stream of Beat)``
        The consumer.
    link_reads, link_beats : ``In(stream of ReadRequest)``, ``Out(stream of Beat)``
        The link.
    port_reads, port_beats : ``Out(stream of ReadRequest)``, ``In(stream of Beat)``
        The buffer.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        request = stream.Signature(RecordLayout("ReadRequest", config=config))
        beat = stream.Signature(RecordLayout("Beat", config=config))
        super().__init__(
            {
                "reads": In(request),
                "beats": Out(beat),
                "link_reads": In(request),
                "link_beats": Out(beat),
                "port_reads": Out(request),
                "port_beats": In(beat),
            }
        )

    def elaborate(self, platform):
        m = Module()
        link_owns = Signal()
        outstanding = Signal(range(_MOST_OUTSTANDING + 1))
        room = Signal()
        m.d.comb += room.eq(outstanding != _MOST_OUTSTANDING)

        asked = self.port_reads.valid & self.port_reads.ready
        answered = self.port_beats.valid & self.port_beats.ready
        with m.If(asked & ~answered):
            m.d.sync += outstanding.eq(outstanding + 1)
        with m.Elif(answered & ~asked):
            m.d.sync += outstanding.eq(outstanding - 1)

        # The link asks for one beat at a time, so it hands the port back after each.
        with m.If(~link_owns):
            with m.If(self.link_reads.valid & (outstanding == 0) & ~self.reads.valid):
                m.d.sync += link_owns.eq(1)
        with m.Elif(self.link_beats.valid & self.link_beats.ready):
            m.d.sync += link_owns.eq(0)

        m.d.comb += [
            self.beats.p.eq(self.port_beats.p),
            self.link_beats.p.eq(self.port_beats.p),
        ]
        with m.If(link_owns):
            m.d.comb += [
                self.port_reads.p.eq(self.link_reads.p),
                self.port_reads.valid.eq(self.link_reads.valid),
                self.link_reads.ready.eq(self.port_reads.ready),
                self.link_beats.valid.eq(self.port_beats.valid),
                self.port_beats.ready.eq(self.link_beats.ready),
            ]
        with m.Else():
            m.d.comb += [
                self.port_reads.p.eq(self.reads.p),
                self.port_reads.valid.eq(self.reads.valid & room),
                self.reads.ready.eq(self.port_reads.ready & room),
                self.beats.valid.eq(self.port_beats.valid),
                self.port_beats.ready.eq(self.beats.ready),
            ]
        return m
