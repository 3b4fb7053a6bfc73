"""Bounded queue of prefetch candidates that loses newcomers rather than block."""

from amaranth import Module, Signal
from amaranth.lib import fifo, stream, wiring
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
        m.submodules.fifo = queue = fifo.SyncFIFOBuffered(
            width=self.layout.size, depth=self.config.candidate_depth
        )
        # Registers before the queue: what is wanted goes to all of it.
        arrived = Signal(self.layout)
        wanted = Signal()
        count = Signal(range(self.config.candidate_depth + 1))  # of those that wait, the oldest too
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
            full.eq(count == self.config.candidate_depth),
            queue.w_data.eq(arrived),
            queue.w_en.eq(wanted & ~full),
            self.overflow.eq(wanted & full),
            self.empty.eq((count == 0) & ~wanted),
            queue.r_en.eq(~self.o.valid | self.o.ready),
        ]
        m.d.sync += count.eq(count + queue.w_en - (self.o.valid & self.o.ready))
        # The oldest is in a register of its own, since block RAM is slow out of the clock edge. It
        # has no reset, so that it may be the block RAM's own.
        oldest = Signal(self.layout, reset_less=True)
        m.d.comb += self.o.payload.eq(oldest)
        with m.If(queue.r_en):
            m.d.sync += [oldest.eq(queue.r_data), self.o.valid.eq(queue.r_rdy)]
        return m
