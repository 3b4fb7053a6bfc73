"""Mid end of the DMA engine: cuts tiles into bursts."""

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config

from .axi import EDGE_BYTES
from .frontend import TileLayout

__all__ = ["BurstLayout", "MidEnd"]


class BurstLayout(data.StructLayout):
    """One read burst.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "address": unsigned(config.bits("address")),
                "length": unsigned(8),  # beats - 1
                "last": unsigned(1),  # the tile's last burst
            }
        )


class MidEnd(wiring.Component):
    """Cut a tile at 4 KiB edges and at the longest burst.

    A burst is as long as the rest of the tile, ``burst_beats`` and the next 4 KiB edge allow. One
    burst leaves each cycle, also from one tile to the next.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    jobs : ``In(stream.Signature(TileLayout(config=config)))``
        Tiles. ``ready`` follows ``bursts.ready`` in the cycle of a tile's last burst.
    bursts : ``Out(stream.Signature(BurstLayout(config=config)))``
        Bursts, in address order.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        super().__init__(
            {
                "jobs": In(stream.Signature(TileLayout(config=config))),
                "bursts": Out(stream.Signature(BurstLayout(config=config))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        low = config.data_bytes.bit_length() - 1
        edge_beats = EDGE_BYTES // config.data_bytes
        most = min(config.burst_beats, config.tile_beats, edge_beats)

        busy = Signal()
        # Counted in beats: the bits below a beat are zero.
        address = Signal(config.address_bits - low)
        remaining = Signal(range(config.tile_beats + 1))
        to_edge = Signal(range(edge_beats + 1))
        beats = Signal(range(most + 1))
        last = Signal()
        longest = Signal(range(most + 1))
        m.d.comb += [
            to_edge.eq(edge_beats - (address & (edge_beats - 1))),
            longest.eq(Mux(to_edge < most, to_edge, most)),
            last.eq(remaining <= longest),
            beats.eq(Mux(last, remaining, longest)),
            self.bursts.valid.eq(busy),
            self.bursts.payload.address.eq(Cat(Const(0, low), address)),
            self.bursts.payload.length.eq(beats - 1),
            self.bursts.payload.last.eq(last),
            self.jobs.ready.eq(~busy | (last & self.bursts.ready)),
        ]
        with m.If(self.jobs.ready):
            m.d.sync += [
                busy.eq(self.jobs.valid),
                address.eq(self.jobs.payload.address >> low),
                remaining.eq(config.tile_beats),
            ]
        with m.Elif(self.bursts.ready):
            m.d.sync += [address.eq(address + beats), remaining.eq(remaining - beats)]
        return m
