"""Bounded queue of prefetch candidates that loses newcomers rather than block."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source
from prestage_hw.layouts import RecordLayout

__all__ = ["CandidateQueue"]


class CandidateQueue(wiring.Component):
    """Hold candidates in the order of arrival.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device; ``config.candidate_depth`` candidates fit.

    Members
    -------
    i : ``In(stream.Signature(RecordLayout("Candidate")))``
        Newcomers. Always ready.
    o : ``Out(stream.Signature(RecordLayout("Candidate")))``
        Oldest candidate.
    enable : ``In(1)``
        0 drops candidates of the predictor on entry.
    cutoff_layer : ``In(8)``
        Candidates for this layer and those above are dropped on entry; 255: none are.
    overflow : ``Out(1)``
        A newcomer was lost to a full queue, in the cycle before.
    empty : ``Out(1)``
        The queue holds nothing.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self.layout = RecordLayout("Candidate", config=config)
        super().__init__(
            {
                "i": In(stream.Signature(self.layout)),
                "o": Out(stream.Signature(self.layout)),
                "enable": In(1),
                "cutoff_layer": In(8),
                "overflow": Out(1),
                "empty": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        depth = self.config.candidate_depth
        # A row is read in the cycle after its write at the earliest, so synthesis need not care for
        # what is read while it is written.
        m.submodules.rows = rows = Memory(
            shape=self.layout, depth=depth, init=[], attrs={"no_rw_check": 1}
        )
        write, read = rows.write_port(), rows.read_port()
        # Registers before the queue: what is wanted goes to all of it.
        arrived = Signal(self.layout)
        wanted = Signal()
        count = Signal(range(depth + 1))  # of those that wait, the oldest too
        stored = Signal(range(depth + 1))  # those that are still to be read
        shown = Signal()  # the memory shows one
        # The oldest is in a register of its own, since block RAM is slow out of the clock edge. It
        # has no reset, so that it may be the block RAM's own.
        oldest = Signal(self.layout, reset_less=True)
        moves = Signal()
        full = Signal()
        m.d.sync += [
            arrived.eq(self.i.payload),
            wanted.eq(
                self.i.valid
                & (self.enable | (self.i.payload.source != Source.PREDICTOR))
                # No device has a layer 255.
                & (self.i.payload.layer < self.cutoff_layer)
            ),
        ]
        m.d.comb += [
            self.i.ready.eq(1),
            full.eq(count == depth),
            write.data.eq(arrived),
            write.en.eq(wanted & ~full),
            self.overflow.eq(wanted & full),
            self.empty.eq((count == 0) & ~wanted),
            moves.eq(~self.o.valid | self.o.ready),
            read.en.eq((stored != 0) & (~shown | moves)),
            self.o.payload.eq(oldest),
        ]
        m.d.sync += [
            count.eq(count + write.en - (self.o.valid & self.o.ready)),
            stored.eq(stored + write.en - read.en),
            shown.eq(read.en | (shown & ~moves)),
        ]
        for port in (write, read):
            with m.If(port.en):
                m.d.sync += port.addr.eq(Mux(port.addr == depth - 1, 0, port.addr + 1))
        with m.If(moves):
            m.d.sync += [oldest.eq(read.data), self.o.valid.eq(shown)]
        return m
