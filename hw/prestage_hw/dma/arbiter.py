"""Who is next: strict priority between classes, weighted round robin inside a class."""

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import TrafficClass

__all__ = ["Arbiter"]


class Arbiter(wiring.Component):
    """Choose one of the channels that want to.

    Only channels of the best class that wants to are looked at. Each channel has a number of grants
    left in this turn; the first channel that has some is chosen. If none has, a new turn begins in
    this class: all its channels have as many as their weight.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    wants : ``In(config.dma_channels)``
        Channels that want to, a bit each.
    traffic, weight : ``In(array)``
        Class and weight of each channel.
    take : ``In(1)``
        The choice counts.
    choice : ``Out(config.dma_channels)``
        The chosen channel's bit, 0 if none wants to. In the same cycle as ``wants``.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        channels = config.dma_channels
        super().__init__(
            {
                "wants": In(channels),
                "traffic": In(data.ArrayLayout(unsigned(2), channels)),
                "weight": In(data.ArrayLayout(unsigned(4), channels)),
                "take": In(1),
                "choice": Out(channels),
            }
        )

    def elaborate(self, platform):
        m = Module()
        channels = range(self.config.dma_channels)
        left = [Signal(4, name=f"left_{c}") for c in channels]
        has_left = Signal(len(channels))
        best = Signal(len(channels))
        in_class = {}
        for traffic in TrafficClass:
            in_class[traffic] = Signal(len(channels), name=f"in_{traffic.name.lower()}")
            m.d.comb += in_class[traffic].eq(Cat(self.traffic[c] == traffic for c in channels))
        demand, prefetch, _ = (self.wants & in_class[traffic] for traffic in TrafficClass)
        m.d.comb += [
            has_left.eq(Cat(left[c] != 0 for c in channels)),
            best.eq(Mux(demand.any(), demand, Mux(prefetch.any(), prefetch, self.wants))),
        ]
        # Both choices are made before it is known which one counts.
        anew = Signal()
        kept = best & has_left
        m.d.comb += [
            anew.eq(~kept.any()),
            self.choice.eq(Mux(anew, best & -best, kept & -kept)[: len(channels)]),
        ]
        turn_class = Signal(len(channels))  # Channels of the class that is served.
        m.d.comb += turn_class.eq(
            Mux(
                demand.any(),
                in_class[TrafficClass.DEMAND],
                Mux(
                    prefetch.any(),
                    in_class[TrafficClass.PREFETCH],
                    in_class[TrafficClass.STREAM],
                ),
            )
        )
        with m.If(self.take & self.wants.any()):
            for c in channels:
                base = Mux(anew & turn_class[c], self.weight[c], left[c])
                m.d.sync += left[c].eq(base - self.choice[c])
        return m
