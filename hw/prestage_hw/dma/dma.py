"""DMA engine: requests for tiles in, beats for the buffer and completions out."""

from amaranth import Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import FetchReason
from prestage_hw.contract.registers import CHANNEL_COUNTERS
from prestage_hw.layouts import RecordLayout

from .axi import AXI4ReadSignature
from .backend import BackEnd, slot_ports
from .checksum import TapLayout
from .frontend import FrontEnd
from .midend import MidEnd
from .settings import Settings
from .watchdog import Watchdog
from .writer import SlotWriter

__all__ = ["DMA", "ChannelStrobes"]


class ChannelStrobes(data.StructLayout):
    """What a channel's counters count: :data:`prestage_hw.contract.registers.CHANNEL_COUNTERS`."""

    def __init__(self):
        super().__init__(dict.fromkeys(CHANNEL_COUNTERS, 1))


class DMA(wiring.Component):
    """Move tiles from an AXI4 memory into slots, over several channels.

    From a fetch being accepted to ``arvalid`` it takes ``launch_latency`` cycles if nothing else
    waits and its channel is not set to rows. Data flows at one beat a cycle, also from tile to tile
    and between channels, while requests, memory and buffer keep up and bursts have three beats or
    more: a burst leaves at most every third cycle. A reset forgets outstanding bursts, so the
    memory must be reset along with the engine.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    fetches : ``In(stream.Signature(RecordLayout("FetchRequest")))``
        Tiles to fetch. ``ready`` says whether the offered request's channel has room.
    room : ``Out(config.dma_channels)``
        Channels whose queue has room.
    bus : ``Out(AXI4ReadSignature(...))``
        Memory. Channel c has ID c modulo ``config.axi_ids``.
    writes : ``Out(stream.Signature(RecordLayout("BufferWrite")))``
        Beats for the buffer; not with ``config.slot_store`` "axi".
    slot_bus : ``Out(AXI4WriteSignature(...))``
        Memory that holds the slots; only with "axi".
    slot_base : ``In(address bits)``
        Address of slot 0 in it, a multiple of 4096; only with "axi". May change while ``idle``.
    completions : ``Out(stream.Signature(RecordLayout("Completion")))``
        One for each fetch, after the tile's last beat was taken, or with "axi" after the answers to
        all its writes; those of a channel in order.
    tap : ``Out(TapLayout(config=config))``
        Beats and ends of tiles as they leave, for :class:`Checksums`; only with
        ``config.checksums``.
    settings, commit, lower_credits, refused, refusal
        As of :class:`prestage_hw.dma.settings.Settings`.
    abort, abort_tag : ``In``
        Strobe: abort all tiles with this tag whose fetch was accepted until this cycle, this
        included.
    abort_all : ``In(1)``
        Strobe: abort all tiles.
    urgent : ``In(config.dma_channels)``
        Channels with a tile that a demand waits for by now: from the third cycle on their turn
        comes as if they were of the class demand. ``lower_credits`` limits their bursts all the
        same.
    timeout : ``In(24)``
        Cycles that a channel waits for memory before its open tiles fail, at least 4; 0 for ever.
    strobes : ``Out(ArrayLayout(ChannelStrobes(), config.dma_channels))``
        For each channel, what happened in the cycle before.
    stray : ``Out(1)``
        Strobe: the memory sent a beat that nobody asked for; it was dropped.
    expired : ``Out(config.dma_channels)``
        Channels that have waited for too long and whose tiles are being failed.
    idle : ``Out(1)``
        No tile is inside: every fetch accepted so far has had its completion taken.
    """

    #: Cycles from a fetch being accepted to ``arvalid``.
    launch_latency = 4

    #: Cycles from a burst's last beat to the ``arvalid`` of one that waits for its credit.
    credit_latency = 7

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        #: Tiles that may be open: at least one for each outstanding burst.
        self.tiles = max(4, 1 << (config.outstanding_bursts - 1).bit_length())
        channels = config.dma_channels
        super().__init__(
            {
                "fetches": In(stream.Signature(RecordLayout("FetchRequest", config=config))),
                "room": Out(channels),
                "bus": Out(
                    AXI4ReadSignature(
                        address_bits=config.address_bits,
                        data_bits=config.bits("data"),
                        id_bits=config.bits("axi_id"),
                    )
                ),
                **slot_ports(config),
                "completions": Out(stream.Signature(RecordLayout("Completion", config=config))),
                **({"tap": Out(TapLayout(config=config))} if config.checksums else {}),
                "settings": In(stream.Signature(RecordLayout("ChannelSettings", config=config))),
                "commit": In(1),
                "lower_credits": In(5),
                "refused": Out(1),
                "refusal": Out(3),
                "abort": In(1),
                "abort_tag": In(config.bits("tag")),
                "abort_all": In(1),
                "urgent": In(channels),
                "timeout": In(24),
                "strobes": Out(data.ArrayLayout(ChannelStrobes(), channels)),
                "stray": Out(1),
                "expired": Out(channels),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        channels = range(config.dma_channels)
        m.submodules.settings = settings = Settings(config=config)
        m.submodules.frontend = frontend = FrontEnd(config=config)
        m.submodules.midend = midend = MidEnd(config=config, tiles=self.tiles)
        m.submodules.backend = backend = BackEnd(config=config, tiles=self.tiles)
        m.submodules.watchdog = watchdog = Watchdog(config=config)
        wiring.connect(m, wiring.flipped(self.fetches), frontend.fetches)
        wiring.connect(m, wiring.flipped(self.bus), backend.bus)
        if config.slot_store == "internal":
            wiring.connect(m, wiring.flipped(self.writes), backend.writes)
        else:
            wiring.connect(m, wiring.flipped(self.slot_bus), backend.slot_bus)
            m.d.comb += backend.slot_base.eq(self.slot_base)
        wiring.connect(m, wiring.flipped(self.completions), backend.completions)
        wiring.connect(m, wiring.flipped(self.settings), settings.settings)

        if config.checksums:
            m.d.comb += self.tap.eq(backend.tap)

        # Aborts reach every place in the same cycle, so that no tile slips from one to the next in
        # between.
        abort, abort_all = Signal(), Signal()
        abort_tag = Signal.like(self.abort_tag)
        m.d.sync += [
            abort.eq(self.abort),
            abort_all.eq(self.abort_all),
            abort_tag.eq(self.abort_tag),
        ]
        for block in (frontend, midend, backend):
            m.d.comb += [
                block.abort.eq(abort),
                block.abort_all.eq(abort_all),
                block.abort_tag.eq(abort_tag),
            ]

        m.d.comb += [
            settings.commit.eq(self.commit),
            settings.lower_credits.eq(self.lower_credits),
            self.refused.eq(settings.refused),
            self.refusal.eq(settings.refusal),
            self.room.eq(frontend.room),
            frontend.channel.eq(midend.channel),
            frontend.pop.eq(midend.pop),
            midend.active.eq(settings.active),
            midend.lower_credits.eq(settings.active_lower_credits),
            midend.urgent.eq(self.urgent),
            midend.expired.eq(backend.expired),
            backend.waiting.eq(frontend.waiting),
            backend.expire.eq(watchdog.expired),
            watchdog.cycles.eq(self.timeout),
            watchdog.run.eq(backend.run),
            watchdog.progress.eq(backend.progress),
            self.stray.eq(backend.stray),
            self.expired.eq(backend.expired),
        ]
        for name in ("waiting", "startable", "null", "first", "first_aborted", "first_empty"):
            m.d.comb += getattr(midend, name).eq(getattr(frontend, name))
        for name in (
            *("tile_room", "tile_entry", "burst_room", "answer_room", "hold", "outstanding"),
            *("live", "returned", "quiet", "drop"),
        ):
            m.d.comb += getattr(midend, name).eq(getattr(backend, name))
        for name in (
            *("open", "tile", "issue", "burst", "wrap", "wrap_entry", "answer", "answered", "busy"),
        ):
            m.d.comb += getattr(backend, name).eq(getattr(midend, name))

        enabled = Cat(settings.active[c].enable for c in channels)
        m.d.comb += watchdog.pending.eq(~backend.quiet | (frontend.waiting & enabled))

        # --- counting ---
        came = Signal()
        went = Signal()
        written = SlotWriter.outstanding + 1 if config.slot_store == "axi" else 0
        most = len(channels) * config.dma_queue_depth + 2 * self.tiles + 5 + written
        inside = Signal(range(most + 1))
        m.d.comb += [
            came.eq(self.fetches.valid & self.fetches.ready),
            went.eq(self.completions.valid & self.completions.ready),
            self.idle.eq(inside == 0),
        ]
        m.d.sync += inside.eq(inside + came - went)
        for c in channels:
            strobes = self.strobes[c]
            mine = went & (self.completions.payload.channel == c)
            reason = self.completions.payload.reason
            wants = (
                frontend.waiting[c] & ~frontend.null[c] & settings.active[c].enable
            ) | midend.begun[c]
            m.d.sync += [
                strobes.tiles.eq(mine & (reason == FetchReason.OK)),
                strobes.errors.eq(
                    mine & (reason != FetchReason.OK) & (reason != FetchReason.ABORTED)
                ),
                strobes.aborted.eq(mine & (reason == FetchReason.ABORTED)),
                strobes.beats.eq(backend.wrote[c]),
                strobes.busy.eq(frontend.waiting[c] | ~backend.quiet[c]),
                strobes.stall.eq(wants & ~(midend.busy & (midend.channel == c))),
            ]
        return m
