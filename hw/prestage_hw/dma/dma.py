"""DMA engine: requests for tiles in, beats for the buffer and completions out."""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

from .axi import AXI4ReadSignature
from .backend import BackEnd
from .frontend import FrontEnd
from .midend import MidEnd

__all__ = ["DMA"]


class DMA(wiring.Component):
    """Move tiles from an AXI4 memory into slots.

    From a fetch being accepted to ``arvalid`` it takes ``launch_latency`` cycles if nothing else
    waits. Data flows at one beat a cycle, also from tile to tile, while requests, memory and buffer
    keep up. A reset forgets outstanding bursts, so the memory must be reset along with the engine.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    fetches : ``In(stream.Signature(RecordLayout("FetchRequest")))``
        Tiles to fetch. Address bits below a beat are ignored.
    bus : ``Out(AXI4ReadSignature(...))``
        Memory.
    writes : ``Out(stream.Signature(RecordLayout("BufferWrite")))``
        Beats for the buffer.
    completions : ``Out(stream.Signature(RecordLayout("Completion")))``
        One for each fetch, in order, after the tile's last beat was taken.
    idle : ``Out(1)``
        No tile is inside: every fetch accepted so far has had its completion taken.
    """

    #: Cycles from a fetch being accepted to ``arvalid``.
    launch_latency = 3

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        #: Tiles that fit inside: one for each outstanding burst, and four on their way in or out.
        self.tiles = config.outstanding_bursts + 4
        super().__init__(
            {
                "fetches": In(stream.Signature(RecordLayout("FetchRequest", config=config))),
                "bus": Out(
                    AXI4ReadSignature(
                        address_bits=config.address_bits, data_bits=config.bits("data")
                    )
                ),
                "writes": Out(stream.Signature(RecordLayout("BufferWrite", config=config))),
                "completions": Out(stream.Signature(RecordLayout("Completion", config=config))),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.frontend = frontend = FrontEnd(config=self.config, tiles=self.tiles)
        m.submodules.midend = midend = MidEnd(config=self.config)
        m.submodules.backend = backend = BackEnd(config=self.config, tiles=self.tiles)
        wiring.connect(m, wiring.flipped(self.fetches), frontend.fetches)
        wiring.connect(m, midend.bursts, backend.bursts)
        wiring.connect(m, wiring.flipped(self.bus), backend.bus)
        wiring.connect(m, wiring.flipped(self.writes), backend.writes)
        wiring.connect(m, wiring.flipped(self.completions), backend.completions)
        # The back end has room for every tile that the front end admits, so only the mid end can
        # hold one up.
        m.d.comb += [
            midend.jobs.payload.eq(frontend.jobs.payload),
            midend.jobs.valid.eq(frontend.jobs.valid),
            frontend.jobs.ready.eq(midend.jobs.ready),
            backend.tiles_in.payload.eq(frontend.jobs.payload),
            backend.tiles_in.valid.eq(frontend.jobs.valid & midend.jobs.ready),
            frontend.completed.eq(self.completions.valid & self.completions.ready),
            self.idle.eq(frontend.idle),
        ]
        return m
