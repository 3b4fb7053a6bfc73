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
        Class and weight of each channel. A class counts from the cycle after.
    take : ``In(1)``
        The choice counts. Not in two cycles in a row: the grants are counted in the cycle after.
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
        kept = Signal(len(channels))
        # From a register, since the choice is what the engine's clock hangs on.
        in_class = {t: Signal(len(channels), name=f"in_{t.name.lower()}") for t in TrafficClass}
        for traffic, bits in in_class.items():
            m.d.sync += bits.eq(Cat(self.traffic[c] == traffic for c in channels))
        demand = self.wants & in_class[TrafficClass.DEMAND]
        prefetch = self.wants & in_class[TrafficClass.PREFETCH]
        m.d.comb += [
            has_left.eq(Cat(left[c] != 0 for c in channels)),
            best.eq(Mux(demand.any(), demand, Mux(prefetch.any(), prefetch, self.wants))),
            kept.eq(best & has_left),
            # Both choices are made before it is known which one counts.
            self.choice.eq(Mux(kept.any(), kept & -kept, best & -best)[: len(channels)]),
        ]

        chosen = Signal(len(channels))
        anew = Signal()
        m.d.sync += [
            chosen.eq(Mux(self.take, self.choice, 0)),
            anew.eq(~kept.any()),
        ]
        turn = Signal(len(channels))  # Channels of the class that was served.
        for bits in in_class.values():
            with m.If((chosen & bits).any()):
                m.d.comb += turn.eq(bits)
        with m.If(chosen.any()):
            for c in channels:
                base = Mux(anew & turn[c], self.weight[c], left[c])
                m.d.sync += left[c].eq(base - chosen[c])
        return m
