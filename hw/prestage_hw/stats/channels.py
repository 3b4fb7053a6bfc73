"""Counters of each DMA channel."""

from amaranth import Array, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.registers import CHANNEL_COUNTERS
from prestage_hw.dma.dma import ChannelStrobes

__all__ = ["ChannelCounters", "CounterAddressLayout"]

#: Binary logarithm of the rows of a channel.
_COUNTER_BITS = (len(CHANNEL_COUNTERS) - 1).bit_length()


class CounterAddressLayout(data.StructLayout):
    """Which counter: its number in :data:`CHANNEL_COUNTERS`, and the channel."""

    def __init__(self, *, config):
        super().__init__({"counter": _COUNTER_BITS, "channel": range(config.dma_channels)})


class ChannelCounters(wiring.Component):
    """Count the strobes of DMA channels in one memory of 32-bit words.

    What strobes tell waits in a few bits a counter until its row's turn, of which there is one in
    ``8 * config.dma_channels`` cycles; after ``latency`` cycles every strobe shows. Counters wrap.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    strobes : ``In(ArrayLayout(ChannelStrobes(), config.dma_channels))``
        As of :class:`prestage_hw.dma.DMA`.
    clear : ``In(1)``
        Set all counters to 0; they are after ``latency`` cycles.
    address : ``In(CounterAddressLayout(config=config))``
        Counter to show; numbers past the last counter show anything.
    value : ``Out(32)``
        Its value, a cycle later.
    latency : :class:`int`
        Cycles.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self._rows = config.dma_channels << _COUNTER_BITS
        self.latency = self._rows + 3
        super().__init__(
            {
                "strobes": In(data.ArrayLayout(ChannelStrobes(), config.dma_channels)),
                "clear": In(1),
                "address": In(CounterAddressLayout(config=config)),
                "value": Out(32),
            }
        )

    def elaborate(self, platform):
        m = Module()
        rows = self._rows
        m.submodules.totals = totals = Memory(shape=32, depth=rows, init=[])
        show = totals.read_port()
        read = totals.read_port()
        write = totals.write_port()
        m.d.comb += [show.addr.eq(self.address.as_value()), self.value.eq(show.data)]

        # A row is read, its waiting strobes are taken in the next cycle, and both are added and
        # stored in the one after; it has its turn again long after that.
        turn = Signal(range(rows))
        taken = Signal(range(rows))
        stored = Signal(range(rows))
        total, amount = Signal(32), Signal(rows.bit_length())
        left = Signal(range(rows + 1), init=rows)  # rows to be cleared
        clearing = Signal()
        m.d.comb += [
            read.addr.eq(turn),
            write.addr.eq(stored),
            write.data.eq(total + amount),
            write.en.eq(1),
        ]
        m.d.sync += [
            turn.eq(Mux(turn == rows - 1, 0, turn + 1)),
            taken.eq(turn),
            stored.eq(taken),
            clearing.eq(left != 0),
            total.eq(Mux(clearing, 0, read.data)),
        ]
        with m.If(left != 0):
            m.d.sync += left.eq(left - 1)

        waiting = []
        for channel in range(self.config.dma_channels):
            for number, name in enumerate(CHANNEL_COUNTERS):
                count = Signal(rows.bit_length(), name=f"{name}_{channel}")
                strobe = self.strobes[channel][name]
                with m.If(self.clear):
                    m.d.sync += count.eq(0)
                with m.Elif(taken == (channel << _COUNTER_BITS | number)):
                    m.d.sync += count.eq(strobe)
                with m.Else():
                    m.d.sync += count.eq(count + strobe)
                waiting.append(count)
            unused = (1 << _COUNTER_BITS) - len(CHANNEL_COUNTERS)
            waiting += [0] * unused
        m.d.sync += amount.eq(Array(waiting)[taken])
        with m.If(self.clear):
            m.d.sync += [left.eq(rows), amount.eq(0), total.eq(0)]
        return m
