"""What became of prefetches, counted by layer and kind."""

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.checks import require_integer
from prestage_hw.contract.params import require_config
from prestage_hw.contract.statistics import COUNT_BITS, KIND_BITS, OUTCOME_BITS, statistics_words
from prestage_hw.layouts import RecordLayout

__all__ = ["MarkLayout", "MarksLayout", "PrefetchStatistics"]


class MarkLayout(data.StructLayout):
    """What became of a prefetch.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "valid": unsigned(1),
                # Number of the counter.
                "outcome": unsigned(OUTCOME_BITS),
                "kind": unsigned(KIND_BITS),
                "layer": unsigned(config.bits("layer")),
            }
        )


class MarksLayout(data.StructLayout):
    """What one outcome is in the statistics.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        mark = MarkLayout(config=config)
        super().__init__({"first": mark, "second": mark})


class PrefetchStatistics(wiring.Component):
    """Count what became of prefetches, in a block RAM with a word for each layer, kind and outcome.

    A counter stays at its greatest value. Marks are counted one after the other, each in five
    cycles, so that ``marks`` waits for ``latency`` cycles after each transfer.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    count_bits : :class:`int`
        Width of a counter, in bits, at most 32.

    Members
    -------
    marks : ``In(stream.Signature(MarksLayout(config=config)))``
        What became of prefetches.
    requests : ``In(stream.Signature(RecordLayout("TableRequest", config=config)))``
        Accesses to the table; waits while marks are counted. Writes are ignored.
    values : ``Out(stream.Signature(32))``
        One value for each read; 0 for a word that there is not.
    clear : ``In(1)``
        A pulse sets all counters to 0, in a cycle each, like the reset.
    idle : ``Out(1)``
        Nothing is being counted or cleared.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If ``count_bits`` is out of its range.
    """

    #: Cycles from marks being taken until the next may be.
    latency = 13

    def __init__(self, *, config, count_bits=COUNT_BITS):
        require_config(config)
        require_integer("Counter width", count_bits, low=1, high=32)
        self.config = config
        self.count_bits = count_bits
        super().__init__(
            {
                "marks": In(stream.Signature(MarksLayout(config=config))),
                "requests": In(stream.Signature(RecordLayout("TableRequest", config=config))),
                "values": Out(stream.Signature(32)),
                "clear": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        words = statistics_words(self.config)
        # Nothing is read in the cycle of its write.
        m.submodules.counts = counts = Memory(
            shape=unsigned(self.count_bits), depth=words, init=[], attrs={"no_rw_check": 1}
        )
        read, write = counts.read_port(), counts.write_port()
        # Block RAM is slow out of the clock edge. No reset, so that the register may be its own. It
        # is far away, too: what is added to has come a cycle before.
        raw = Signal(self.count_bits, reset_less=True)
        count = Signal(self.count_bits, reset_less=True)
        total = Signal(self.count_bits, reset_less=True)  # with what is counted
        sweep = Signal(range(words))
        now = Signal(MarksLayout(config=self.config))
        word = Signal(range(words))
        # What is read next: the block RAM is far from what decides.
        address = Signal(range(words), reset_less=True)
        second = Signal()  # The second mark is being counted.
        beyond = Signal()
        steps = Signal(3)  # A read is on its way.
        clears = Signal()
        request = self.requests.payload
        takes = Signal()

        mark = Mux(second, now.second.as_value(), now.first.as_value())
        shown = data.View(MarkLayout(config=self.config), mark)
        m.d.comb += [
            word.eq(Cat(shown.outcome, shown.kind, shown.layer)),
            read.addr.eq(address),
            read.en.eq(1),
            write.addr.eq(word),
            write.data.eq(total),
        ]
        m.d.sync += [
            raw.eq(read.data),
            count.eq(raw),
            total.eq(count + ~count.all()),
            steps.eq(steps << 1),
        ]
        with m.If(self.values.ready):
            m.d.sync += self.values.valid.eq(0)
        with m.If(steps[-1]):
            m.d.sync += [self.values.valid.eq(1), self.values.payload.eq(Mux(beyond, 0, raw))]

        with m.FSM(init="Clear") as fsm:
            with m.State("Clear"):
                m.d.comb += [write.en.eq(1), write.addr.eq(sweep), write.data.eq(0)]
                m.d.sync += sweep.eq(sweep + 1)
                with m.If(sweep == words - 1):
                    m.d.sync += sweep.eq(0)
                    m.next = "Idle"
            with m.State("Idle"):
                m.d.sync += address.eq(request.word)
                m.d.comb += [
                    self.marks.ready.eq(~clears),
                    self.requests.ready.eq(
                        ~clears & ~self.marks.valid & (steps == 0) & ~self.values.valid
                    ),
                    takes.eq(self.requests.valid & self.requests.ready & ~request.write),
                ]
                m.d.sync += [now.eq(self.marks.payload), second.eq(0)]
                with m.If(takes):
                    m.d.sync += [steps[0].eq(1), beyond.eq(request.word >= words)]
                with m.If(clears):
                    m.d.sync += clears.eq(0)
                    m.next = "Clear"
                with m.Elif(self.marks.valid):
                    m.next = "Choose"
            with m.State("Choose"):
                m.d.sync += address.eq(word)
                m.next = "Read"
            with m.State("Read"):
                m.next = "Keep"
            with m.State("Keep"):
                m.next = "Arrive"
            with m.State("Arrive"):
                m.next = "Add"
            with m.State("Add"):
                m.next = "Write"
            with m.State("Write"):
                m.d.comb += write.en.eq(shown.valid)
                m.d.sync += second.eq(1)
                m.next = "Choose"
                with m.If(second):
                    m.next = "Idle"

        with m.If(self.clear):
            m.d.sync += clears.eq(1)
        m.d.comb += self.idle.eq(
            fsm.ongoing("Idle") & ~clears & (steps == 0) & ~self.values.valid & ~self.marks.valid
        )
        return m
