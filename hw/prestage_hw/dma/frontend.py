"""Front end of the DMA engine: takes requests and counts the tiles inside."""

from amaranth import Module, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

__all__ = ["FrontEnd", "TileLayout"]


class TileLayout(data.StructLayout):
    """What the back end must know of a tile until its last beat has arrived.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "tag": unsigned(config.bits("tag")),
                "slot": unsigned(config.bits("slot")),
                "tile": unsigned(config.bits("tile")),
                "address": unsigned(config.bits("address")),
            }
        )


class FrontEnd(wiring.Component):
    """Admit a tile when there is room for its completion.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    tiles : :class:`int`
        Tiles that the engine may hold, from their request to their completion being taken. At least
        1.

    Members
    -------
    fetches : ``In(stream.Signature(RecordLayout("FetchRequest")))``
        Requests. Address bits below a beat are ignored.
    jobs : ``Out(stream.Signature(TileLayout(config=config)))``
        Tiles to the mid end, registered.
    completed : ``In(1)``
        A completion was taken.
    idle : ``Out(1)``
        No tile is inside the engine.

    Raises
    ------
    ValueError
        If ``tiles`` is less than 1.
    """

    def __init__(self, *, config, tiles):
        require_config(config)
        if tiles < 1:
            raise ValueError(f"Tile limit must be a positive integer, not {tiles}")
        self.config = config
        self.tiles = tiles
        super().__init__(
            {
                "fetches": In(stream.Signature(RecordLayout("FetchRequest", config=config))),
                "jobs": Out(stream.Signature(TileLayout(config=config))),
                "completed": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        count = Signal(range(self.tiles + 1))
        accept = Signal()
        fetch = self.fetches.payload
        low = self.config.data_bytes.bit_length() - 1
        m.d.comb += [
            self.fetches.ready.eq(~self.jobs.valid & (count != self.tiles)),
            accept.eq(self.fetches.valid & self.fetches.ready),
            self.idle.eq(count == 0),
        ]
        m.d.sync += count.eq(count + accept - self.completed)
        with m.If(accept):
            m.d.sync += [
                self.jobs.valid.eq(1),
                self.jobs.payload.tag.eq(fetch.tag),
                self.jobs.payload.slot.eq(fetch.slot),
                self.jobs.payload.tile.eq(fetch.tile),
                self.jobs.payload.address.eq(fetch.address & ~((1 << low) - 1)),
            ]
        with m.Elif(self.jobs.ready):
            m.d.sync += self.jobs.valid.eq(0)
        return m
