"""Who is next: strict priority between classes, weighted round robin inside a class."""

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config

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
        Class and weight of each channel. A class counts two cycles later.
    take : ``In(1)``
        The choice counts. Not in the two cycles after that: grants are counted meanwhile.
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
        count = len(channels)
        left = [Signal(4, name=f"left_{c}") for c in channels]
        has_left = Signal(count)
        m.d.comb += has_left.eq(Cat(left[c] != 0 for c in channels))
        # The engine's clock hangs on the choice, so that everything but the wishes is compared
        # ahead of time: who goes before whom.
        for c in channels:
            before = Signal(count, name=f"before_{c}")
            for d in channels:
                if d == c:
                    continue
                # With as much right, the lower number.
                rights = (has_left[d] | ~has_left[c]) if d < c else (has_left[d] & ~has_left[c])
                m.d.sync += before[d].eq(
                    (self.traffic[d] < self.traffic[c])
                    | ((self.traffic[d] == self.traffic[c]) & rights)
                )
            m.d.comb += self.choice[c].eq(self.wants[c] & ~(self.wants & before).any())

        chosen = Signal(count)
        m.d.sync += chosen.eq(Mux(self.take, self.choice, 0))
        # Who is chosen without a grant begins a turn of its class. Whose turn that would be is
        # known from the cycle of the choice: nothing is counted then.
        for c in channels:
            renews = Signal(count, name=f"renews_{c}")  # if that channel is chosen
            for d in channels:
                m.d.sync += renews[d].eq(~has_left[d] & (self.traffic[d] == self.traffic[c]))
            base = Mux((chosen & renews).any(), self.weight[c], left[c])
            m.d.sync += left[c].eq(base - chosen[c])
        return m
