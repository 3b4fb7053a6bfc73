"""Time-out of the DMA engine's channels."""

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config

__all__ = ["Watchdog"]


class Watchdog(wiring.Component):
    """Tell which channels have waited for too long.

    One counter serves all channels: it ticks four times in ``cycles``, and a channel that waits
    without progress over five ticks has expired. So that takes at least ``cycles`` and at most a
    quarter more, rounded up to whole ticks.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    count : :class:`int` or None
        What is watched, as many; None stands for the DMA engine's channels.

    Members
    -------
    cycles : ``In(24)``
        Cycles, at least 4; less switches the watchdog off.
    run : ``In(1)``
        Cycles in which it is 0 do not count.
    pending : ``In(count)``
        Channels that wait.
    progress : ``In(count)``
        Channels for which something came.
    expired : ``Out(count)``
        Strobe of a channel that has waited for too long; its time begins anew.
    """

    #: Ticks without progress.
    ticks = 5

    def __init__(self, *, config, count=None):
        require_config(config)
        self.config = config
        self.count = channels = config.dma_channels if count is None else count
        super().__init__(
            {
                "cycles": In(24),
                "run": In(1),
                "pending": In(channels),
                "progress": In(channels),
                "expired": Out(channels),
            }
        )

    def elaborate(self, platform):
        m = Module()
        passed = Signal(22)
        tick = Signal()
        quarter = Signal(22)
        m.d.sync += [quarter.eq(self.cycles >> 2), tick.eq(0)]
        with m.If(self.run):
            m.d.sync += passed.eq(passed + 1)
            with m.If(passed + 1 >= quarter):
                m.d.sync += [passed.eq(0), tick.eq(quarter != 0)]
        for c in range(self.count):
            age = Signal(range(self.ticks), name=f"age_{c}")
            m.d.sync += self.expired[c].eq(0)
            with m.If(~self.pending[c] | self.progress[c]):
                m.d.sync += age.eq(0)
            with m.Elif(tick):
                m.d.sync += age.eq(age + 1)
                with m.If(age == self.ticks - 1):
                    m.d.sync += [age.eq(0), self.expired[c].eq(1)]
        return m
