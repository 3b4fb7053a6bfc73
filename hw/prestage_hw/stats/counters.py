"""One counter for each strobe."""

from amaranth import Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.registers import COUNTERS

__all__ = ["Counters"]

#: Counters that go up by a tile's size instead of one.
_BYTE_COUNTERS = ("demand_bytes", "prefetch_bytes")


class Counters(wiring.Component):
    """Count strobes. A strobe shows in its counter one cycle later; counters wrap.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    strobes : ``In(StructLayout)``
        One bit for each of :data:`prestage_hw.contract.registers.COUNTERS`.
    clear : ``In(1)``
        Set all counters to 0.
    values : ``Out(StructLayout)``
        The counters.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        super().__init__(
            {
                "strobes": In(data.StructLayout({counter.name: 1 for counter in COUNTERS})),
                "clear": In(1),
                "values": Out(data.StructLayout({c.name: c.bits for c in COUNTERS})),
            }
        )

    def elaborate(self, platform):
        m = Module()
        for counter in COUNTERS:
            step = self.config.tile_bytes if counter.name in _BYTE_COUNTERS else 1
            # A register of its own instead of a slice of the wide output: simulators then update
            # only what counts.
            value = Signal(counter.bits, name=counter.name)
            m.d.comb += self.values[counter.name].eq(value)
            with m.If(self.clear):
                m.d.sync += value.eq(0)
            with m.Elif(self.strobes[counter.name]):
                m.d.sync += value.eq(value + step)
        return m
