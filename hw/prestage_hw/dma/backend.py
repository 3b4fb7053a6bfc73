"""Back end of the DMA engine: AXI4 reads, writes into slots, completions."""

from amaranth import Cat, Module, Signal, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

from .axi import BURST_INCR, AXI4ReadSignature
from .frontend import TileLayout
from .midend import BurstLayout

__all__ = ["BackEnd"]


class BackEnd(wiring.Component):
    """Read bursts, write their beats into slots and report each tile.

    A burst takes exactly as many beats as were asked for, whatever ``rlast`` says. A tile has
    failed if a beat carries SLVERR or DECERR, or if ``rlast`` is anywhere but on a burst's last
    beat; its completion names the first burst where that happened. The beats of a failing tile are
    written like any others.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    tiles : :class:`int`
        Tiles that the engine may hold: completions for as many are kept. At least 1.

    Members
    -------
    tiles_in : ``In(stream.Signature(TileLayout(config=config)))``
        Tiles, in the order of their bursts.
    bursts : ``In(stream.Signature(BurstLayout(config=config)))``
        Bursts. ``ready`` follows ``bus.arready`` while an address waits.
    bus : ``Out(AXI4ReadSignature(...))``
        Memory. At most ``config.outstanding_bursts`` bursts wait for data.
    writes : ``Out(stream.Signature(RecordLayout("BufferWrite")))``
        Beats for the buffer.
    completions : ``Out(stream.Signature(RecordLayout("Completion")))``
        One for each tile, in order, after its last beat was taken.
    """

    def __init__(self, *, config, tiles):
        require_config(config)
        if tiles < 1:
            raise ValueError(f"Tile limit must be a positive integer, not {tiles}")
        self.config = config
        self.tiles = tiles
        super().__init__(
            {
                "tiles_in": In(stream.Signature(TileLayout(config=config))),
                "bursts": In(stream.Signature(BurstLayout(config=config))),
                "bus": Out(
                    AXI4ReadSignature(
                        address_bits=config.address_bits, data_bits=config.bits("data")
                    )
                ),
                "writes": Out(stream.Signature(RecordLayout("BufferWrite", config=config))),
                "completions": Out(stream.Signature(RecordLayout("Completion", config=config))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        bus = self.bus

        # Small and shallow: these map to distributed RAM and show their head in the cycle after a
        # write.
        m.submodules.outstanding = outstanding = fifo.SyncFIFO(
            width=self.bursts.payload.shape().size, depth=config.outstanding_bursts
        )
        m.submodules.open_tiles = open_tiles = fifo.SyncFIFO(
            width=self.tiles_in.payload.shape().size, depth=self.tiles
        )
        m.submodules.done = done = fifo.SyncFIFOBuffered(
            width=self.completions.payload.shape().size, depth=self.tiles
        )
        burst = data.View(BurstLayout(config=config), outstanding.r_data)
        tile = data.View(TileLayout(config=config), open_tiles.r_data)

        # Address channel. A credit is a place in ``outstanding``.
        launch = Signal()
        m.d.comb += [
            self.bursts.ready.eq(outstanding.w_rdy & (~bus.arvalid | bus.arready)),
            launch.eq(self.bursts.valid & self.bursts.ready),
            outstanding.w_data.eq(self.bursts.payload),
            outstanding.w_en.eq(launch),
            open_tiles.w_data.eq(self.tiles_in.payload),
            open_tiles.w_en.eq(self.tiles_in.valid),
            self.tiles_in.ready.eq(open_tiles.w_rdy),
            bus.arsize.eq(config.data_bytes.bit_length() - 1),
            bus.arburst.eq(BURST_INCR),
            bus.arid.eq(0),
        ]
        with m.If(launch):
            m.d.sync += [
                bus.arvalid.eq(1),
                bus.araddr.eq(self.bursts.payload.address),
                bus.arlen.eq(self.bursts.payload.length),
            ]
        with m.Elif(bus.arready):
            m.d.sync += bus.arvalid.eq(0)

        # Data channel. Two registers, so that ``rready`` does not follow ``writes.ready``.
        beat_layout = data.StructLayout(
            {"write": self.writes.payload.shape(), "final": unsigned(1)}
        )
        out, spare, arriving = (Signal(beat_layout, name=n) for n in ("out", "spare", "arriving"))
        out_valid = Signal()
        spare_valid = Signal()
        take = Signal()
        in_burst = Signal(8)
        in_tile = Signal(range(config.tile_beats))
        burst_end = Signal()
        tile_end = Signal()
        bad = Signal()
        failed = Signal()
        failed_address = Signal(config.address_bits)
        m.d.comb += [
            bus.rready.eq(~spare_valid & outstanding.r_rdy & open_tiles.r_rdy),
            take.eq(bus.rvalid & bus.rready),
            burst_end.eq(in_burst == burst.length),
            tile_end.eq(burst_end & burst.last),
            bad.eq(bus.rresp[1] | (bus.rlast != burst_end)),
            outstanding.r_en.eq(take & burst_end),
            open_tiles.r_en.eq(take & tile_end),
            arriving.write.slot.eq(tile.slot),
            # Whole tiles are powers of two, so a beat of the expert is the tile's number above the
            # beat's.
            arriving.write.beat.eq(Cat(in_tile, tile.tile)),
            arriving.write.data.as_value().eq(bus.rdata),
            arriving.final.eq(tile_end),
            self.writes.valid.eq(out_valid),
            self.writes.payload.eq(out.write),
        ]
        with m.If(~out_valid | self.writes.ready):
            m.d.sync += [
                out_valid.eq(spare_valid | take),
                spare_valid.eq(0),
            ]
            with m.If(spare_valid):
                m.d.sync += out.eq(spare)
            with m.Else():
                m.d.sync += out.eq(arriving)
        with m.Elif(take):
            m.d.sync += [spare.eq(arriving), spare_valid.eq(1)]

        # A tile is at least eight beats and the two registers hold at most two, so one tile at a
        # time is about to complete.
        completion = Signal(self.completions.payload.shape())
        with m.If(take):
            m.d.sync += [in_burst.eq(in_burst + 1), in_tile.eq(in_tile + 1)]
            with m.If(burst_end):
                m.d.sync += in_burst.eq(0)
            with m.If(bad & ~failed):
                m.d.sync += [failed.eq(1), failed_address.eq(burst.address)]
            with m.If(tile_end):
                m.d.sync += [
                    failed.eq(0),
                    completion.tag.eq(tile.tag),
                    completion.tile.eq(tile.tile),
                    completion.failed.eq(failed | bad),
                    completion.address.eq(tile.address),
                ]
                with m.If(failed):
                    m.d.sync += completion.address.eq(failed_address)
                with m.Elif(bad):
                    m.d.sync += completion.address.eq(burst.address)
        m.d.comb += [
            done.w_data.eq(completion),
            done.w_en.eq(out_valid & self.writes.ready & out.final),
            self.completions.payload.eq(done.r_data),
            self.completions.valid.eq(done.r_rdy),
            done.r_en.eq(self.completions.ready),
        ]
        return m
