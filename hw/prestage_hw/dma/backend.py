"""Back end of the DMA engine: AXI4 reads, writes into slots, completions."""

from amaranth import Array, Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import FetchReason
from prestage_hw.layouts import RecordLayout

from .axi import BURST_INCR, AXI4ReadSignature, AXI4WriteSignature
from .checksum import TapLayout
from .midend import AnswerLayout, BurstLayout, TileLayout
from .order import OrderLists
from .writer import SlotWriter

__all__ = ["BackEnd", "slot_ports"]


def slot_ports(config):
    """Ports on which the beats leave."""
    if config.slot_store == "internal":
        return {"writes": Out(stream.Signature(RecordLayout("BufferWrite", config=config)))}
    return {
        "slot_bus": Out(
            AXI4WriteSignature(address_bits=config.address_bits, data_bits=config.bits("data"))
        ),
        "slot_base": In(config.bits("address")),
    }


def _lowest(bits):
    """Number of the lowest bit that is set."""
    result = 0
    for i in reversed(range(len(bits))):
        result = Mux(bits[i], i, result)
    return result


class BackEnd(wiring.Component):
    """Read bursts, write their beats into slots and report each tile.

    Bursts of one ID come in the order in which they were asked for; those of different IDs come in
    any order, also beat by beat in turns. A burst takes exactly as many beats as were asked for,
    whatever ``rlast`` says. A tile has failed if a beat carries SLVERR or DECERR, or if ``rlast``
    is anywhere but on a burst's last beat; its completion names the first burst where that
    happened. The beats of a failing or aborted tile are written like any others. Beats that nobody
    asked for are dropped.

    When a channel expires, its open tiles are reported as timed out, oldest first. Their bursts are
    *dead* from then on: they keep their credits, and their beats are dropped when they come after
    all.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    tiles : :class:`int`
        Tiles that may be open. At least 1.

    Members
    -------
    open, tile, issue, burst, wrap, wrap_entry, answer, answered, busy : ``In``
        As of :class:`MidEnd`.
    tile_room, tile_entry, burst_room, answer_room, hold : ``Out``
        As of :class:`MidEnd`.
    outstanding, live, returned, quiet, drop : ``Out``
        As of :class:`MidEnd`.
    waiting : ``In(config.dma_channels)``
        Channels with a request that was not begun.
    expire : ``In(config.dma_channels)``
        Strobe: the channel has waited for too long.
    expired : ``Out(config.dma_channels)``
        As of :class:`MidEnd`.
    abort, abort_all, abort_tag : ``In``
        As of :class:`FrontEnd`, for open tiles.
    run, progress : ``Out``
        As of :class:`Watchdog`.
    bus : ``Out(AXI4ReadSignature(...))``
        Memory. At most ``config.outstanding_bursts`` bursts wait for data.
    writes : ``Out(stream.Signature(RecordLayout("BufferWrite")))``
        Beats for the buffer; not with ``config.slot_store`` "axi".
    slot_bus, slot_base : ``Out(AXI4WriteSignature(...))``, ``In(address bits)``
        As ``bus`` and ``slot_base`` of :class:`SlotWriter`; only with "axi".
    completions : ``Out(stream.Signature(RecordLayout("Completion")))``
        One for each tile, after its last beat was taken, or with "axi" written; those of a channel
        in order.
    tap : ``Out(TapLayout(config=config))``
        Beats and ends of tiles as they leave; only with ``config.checksums``.
    wrote : ``Out(config.dma_channels)``
        Strobe: a beat of the channel goes to the buffer.
    stray : ``Out(1)``
        Strobe: a beat that nobody asked for was dropped.
    """

    def __init__(self, *, config, tiles):
        require_config(config)
        if tiles < 1:
            raise ValueError(f"Tile limit must be a positive integer, not {tiles}")
        self.config = config
        self.tiles = tiles
        channels = config.dma_channels
        self.entry_bits = max(1, (tiles - 1).bit_length())
        counts = data.ArrayLayout(unsigned(5), channels)
        super().__init__(
            {
                "open": In(1),
                "tile": In(TileLayout(config=config)),
                "issue": In(1),
                "burst": In(BurstLayout(config=config, entry_bits=self.entry_bits)),
                "wrap": In(1),
                "wrap_entry": In(self.entry_bits),
                "answer": In(1),
                "answered": In(AnswerLayout(config=config)),
                "busy": In(1),
                "tile_room": Out(1),
                "tile_entry": Out(self.entry_bits),
                "burst_room": Out(1),
                "answer_room": Out(1),
                "hold": Out(1),
                "outstanding": Out(counts),
                "live": Out(counts),
                "returned": Out(1),
                "quiet": Out(channels),
                "drop": Out(channels),
                "waiting": In(channels),
                "expire": In(channels),
                "expired": Out(channels),
                "abort": In(1),
                "abort_all": In(1),
                "abort_tag": In(config.bits("tag")),
                "run": Out(1),
                "progress": Out(channels),
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
                "wrote": Out(channels),
                "stray": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        bus = self.bus
        channels = range(config.dma_channels)
        channel_bits = config.bits("channel")
        credits = config.outstanding_bursts
        ids = config.axi_ids

        def small(name, shape, depth):
            """A memory with one port to write and one to read in the same cycle."""
            m.submodules[name] = ram = memory.Memory(shape=shape, depth=depth, init=[])
            return ram.write_port(), ram.read_port(domain="comb")

        # --- address channel ---
        m.submodules.bursts = bursts = OrderLists(lists=ids, entries=credits)
        burst_write, burst_read = small("burst_table", self.burst.shape(), credits)
        read = burst_read.data
        used = Signal(credits)
        place = Signal(range(max(2, credits)))
        taken = Signal(credits)
        freed = Signal(credits)
        freed_place = Signal.like(place)
        arid = Signal(range(max(2, ids)))
        m.d.comb += [
            place.eq(_lowest(~used)),
            arid.eq(Array(c % ids for c in channels)[self.burst.channel] if ids > 1 else 0),
            # There is a place for every credit.
            self.burst_room.eq(~bus.arvalid | bus.arready),
            taken.eq(Mux(self.issue, 1 << place, 0)),
            burst_write.addr.eq(place),
            burst_write.data.eq(self.burst),
            burst_write.en.eq(self.issue),
            bursts.push.eq(self.issue),
            bursts.push_list.eq(arid),
            bursts.push_entry.eq(place),
            # Whether a burst is a single beat is looked at ahead of time.
            bursts.push_mark.eq(self.burst.length == 0),
            bus.arsize.eq(config.data_bytes.bit_length() - 1),
            bus.arburst.eq(BURST_INCR),
        ]
        m.d.sync += used.eq((used | taken) & ~freed)
        with m.If(self.issue):
            m.d.sync += [
                bus.arvalid.eq(1),
                bus.araddr.eq(self.burst.address),
                bus.arlen.eq(self.burst.length),
                bus.arid.eq(arid),
            ]
        with m.Elif(bus.arready):
            m.d.sync += bus.arvalid.eq(0)

        # --- open tiles ---
        m.submodules.tiles = tiles = OrderLists(lists=len(channels), entries=self.tiles)
        tile_write, tile_read = small(
            "tile_table",
            data.StructLayout(
                {key: config.bits(key) for key in ("channel", "tag", "slot", "tile")}
            ),
            self.tiles,
        )
        address_write, address_read = small(
            "tile_addresses", unsigned(config.address_bits), self.tiles
        )
        tile_used = Signal(self.tiles)
        tile_taken = Signal(self.tiles)
        tile_freed = Signal(self.tiles)
        aborted = Signal(self.tiles)
        wrapped = Signal(self.tiles)
        # The next entry is looked for ahead of time.
        m.d.comb += [
            tile_taken.eq(Mux(self.open, 1 << self.tile_entry, 0)),
            tile_write.addr.eq(self.tile_entry),
            tile_write.data.channel.eq(self.tile.channel),
            tile_write.data.tag.eq(self.tile.tag),
            tile_write.data.slot.eq(self.tile.slot),
            tile_write.data.tile.eq(self.tile.tile),
            tile_write.en.eq(self.open),
            tiles.push.eq(self.open),
            tiles.push_list.eq(self.tile.channel),
            tiles.push_entry.eq(self.tile_entry),
            self.quiet.eq(~tiles.filled),
        ]
        m.d.sync += tile_used.eq((tile_used | tile_taken) & ~tile_freed)
        vacant = Signal(self.tiles)
        m.d.comb += vacant.eq(~tile_used & ~Mux(self.tile_room, 1 << self.tile_entry, 0))
        with m.If(self.open | ~self.tile_room):
            m.d.sync += [self.tile_room.eq(vacant.any()), self.tile_entry.eq(_lowest(vacant))]
        for i in range(self.tiles):
            tag = Signal(config.bits("tag"), name=f"tag_{i}")
            with m.If(tile_taken[i]):
                m.d.sync += [
                    tag.eq(self.tile.tag),
                    wrapped[i].eq(0),
                    aborted[i].eq(
                        self.tile.aborted
                        | self.abort_all
                        | (self.abort & (self.abort_tag == self.tile.tag))
                    ),
                ]
            with m.Else():
                with m.If(self.abort_all | (self.abort & (self.abort_tag == tag))):
                    m.d.sync += aborted[i].eq(1)
                with m.If(self.wrap & (self.wrap_entry == i)):
                    m.d.sync += wrapped[i].eq(1)

        # --- data channel: arrival. Two registers, so that ``rready`` is one, too. ---
        beat_layout = data.StructLayout(
            {"data": bus.rdata.shape(), "id": bus.rid.shape(), "bad": 1, "last": 1}
        )
        arrived, spare, offered = (
            Signal(beat_layout, name=n) for n in ("arrived", "spare", "offered")
        )
        arrived_valid = Signal()
        spare_valid = Signal()
        arrived_go = Signal()
        m.d.comb += [
            bus.rready.eq(~spare_valid),
            offered.data.eq(bus.rdata),
            offered.id.eq(bus.rid),
            offered.bad.eq(bus.rresp[1]),
            offered.last.eq(bus.rlast),
        ]
        with m.If(~arrived_valid | arrived_go):
            m.d.sync += [
                arrived_valid.eq(spare_valid | bus.rvalid),
                arrived.eq(Mux(spare_valid, spare, offered)),
                spare_valid.eq(0),
            ]
        with m.Elif(bus.rvalid & ~spare_valid):
            m.d.sync += [spare.eq(offered), spare_valid.eq(1)]

        # --- data channel: the burst that a beat belongs to ---
        count_write, count_read = small("beat_counts", unsigned(8), ids)
        left = Signal(8)
        counting = Signal(ids)  # IDs within a burst,
        ending = Signal(ids)  # and before its last beat.
        known = Signal()
        burst_end = Signal()
        beat = Signal(
            data.StructLayout(
                {
                    "data": bus.rdata.shape(),
                    "bad": 1,
                    "burst_end": 1,
                    "tile_end": 1,
                    "channel": channel_bits,
                    "entry": self.entry_bits,
                    "address": config.address_bits,
                }
            )
        )
        beat_valid = Signal()
        beat_go = Signal()
        m.d.comb += [
            bursts.look_list.eq(arrived.id),
            known.eq(bursts.filled.bit_select(arrived.id, 1)),
            burst_read.addr.eq(bursts.head),
            count_read.addr.eq(arrived.id),
            count_write.addr.eq(arrived.id),
            count_write.data.eq(left - 1),
            left.eq(Mux(counting.bit_select(arrived.id, 1), count_read.data, read.length)),
            burst_end.eq(
                Mux(
                    counting.bit_select(arrived.id, 1),
                    ending.bit_select(arrived.id, 1),
                    bursts.head_mark,
                )
            ),
            arrived_go.eq(~beat_valid | beat_go),
        ]
        # Places become free a cycle later, before anybody could need them.
        m.d.sync += [self.returned.eq(bursts.pop), freed_place.eq(bursts.head)]
        m.d.comb += freed.eq(Mux(self.returned, 1 << freed_place, 0))
        with m.If(arrived_go):
            m.d.sync += [
                beat_valid.eq(arrived_valid & known),
                self.stray.eq(arrived_valid & ~known),
                beat.data.eq(arrived.data),
                beat.bad.eq(arrived.bad | (arrived.last != burst_end)),
                beat.burst_end.eq(burst_end),
                beat.tile_end.eq(burst_end & read.last),
                beat.channel.eq(read.channel),
                beat.entry.eq(read.entry),
                beat.address.eq(read.address),
            ]
            with m.If(arrived_valid & known):
                m.d.comb += count_write.en.eq(1)
                for i in range(ids):
                    with m.If(arrived.id == i):
                        m.d.sync += [counting[i].eq(~burst_end), ending[i].eq(left == 1)]
                with m.If(burst_end):
                    m.d.comb += bursts.pop.eq(1)
        with m.Else():
            m.d.sync += self.stray.eq(0)

        # --- data channel: the tile that it belongs to ---
        position_write, position_read = small(
            "positions", unsigned(max(1, (config.tile_beats - 1).bit_length())), len(channels)
        )
        position = Signal(position_read.data.shape())
        within = Signal(len(channels))  # Channels within a tile.
        failed = Signal(len(channels))
        dead = Signal()
        live = Signal()
        outstanding = [Signal(5, name=f"outstanding_{c}") for c in channels]
        dead_counts = [Signal(5, name=f"dead_{c}") for c in channels]
        has_dead = Signal(len(channels))  # Whose count of dead bursts is not 0.
        live_counts = [Signal(5, name=f"live_{c}") for c in channels]
        expiring = Signal()  # A tile is to be timed out,
        expires = Signal()  # and is in this cycle.
        expiring_channel = Signal(channel_bits)
        expiring_entry = Signal(self.entry_bits)
        looked_up = Signal()
        overdue = Signal(len(channels))
        answering = Signal()
        room = Signal()
        entry = Signal(self.entry_bits)
        channel = Signal(channel_bits)
        was_failed = Signal()
        write_valid = Signal()
        final = Signal()
        completion = Signal(self.completions.payload.shape())
        following = Signal(self.completions.payload.shape())
        ended = Signal(self.completions.payload.shape())
        held = Signal(self.answered.shape())
        held_valid = Signal()
        write = Signal(RecordLayout("BufferWrite", config=config))
        self._leave(m, write_valid=write_valid, write=write, final=final, ended=ended, room=room)
        m.d.comb += [
            dead.eq(has_dead.bit_select(beat.channel, 1)),
            answering.eq(held_valid & room & ~expiring),
            beat_go.eq(beat_valid & room & ~expiring & ~held_valid),
            live.eq(beat_go & ~dead),
            channel.eq(Mux(expiring, expiring_channel, beat.channel)),
            tiles.look_list.eq(channel),
            entry.eq(Mux(expiring, expiring_entry, beat.entry)),
            tiles.pop.eq(expires | (live & beat.tile_end)),
            tile_freed.eq(Mux(tiles.pop, 1 << entry, 0)),
            tile_read.addr.eq(entry),
            address_read.addr.eq(entry),
            was_failed.eq(failed.bit_select(beat.channel, 1)),
            position_read.addr.eq(beat.channel),
            position_write.addr.eq(beat.channel),
            position.eq(Mux(within.bit_select(beat.channel, 1), position_read.data, 0)),
            position_write.data.eq(position + 1),
            position_write.en.eq(live),
            # A tile's first failure replaces its address: steps of the mid end, which write there
            # too, wait for a bad beat to go on.
            self.hold.eq(beat_valid & beat.bad & ~expiring),
            address_write.addr.eq(Mux(self.open, self.tile_entry, beat.entry)),
            address_write.data.eq(Mux(self.open, self.tile.address, beat.address)),
            address_write.en.eq(self.open | (live & beat.bad & ~was_failed)),
        ]
        with m.If(self.answer):
            m.d.sync += [held.eq(self.answered), held_valid.eq(1)]
        with m.Elif(answering):
            m.d.sync += held_valid.eq(0)
        m.d.comb += self.answer_room.eq(~held_valid)

        # How it ended is told from registers. An error that the memory told says more than that the
        # tile was aborted.
        told = Signal(FetchReason)
        bad = Signal()
        was_aborted = Signal()
        was_wrapped = Signal()
        reason = Signal(FetchReason)
        with m.If(told != FetchReason.OK):
            m.d.comb += reason.eq(told)
        with m.Elif(bad):
            m.d.comb += reason.eq(FetchReason.BUS)
        with m.Elif(was_aborted):
            m.d.comb += reason.eq(FetchReason.ABORTED)
        with m.Elif(was_wrapped):
            m.d.comb += reason.eq(FetchReason.ADDRESS)
        m.d.comb += [
            following.tag.eq(tile_read.data.tag),
            following.tile.eq(tile_read.data.tile),
            following.channel.eq(tile_read.data.channel),
            following.address.eq(address_read.data),
        ]
        with m.If(~expiring & beat.bad & ~was_failed):
            m.d.comb += following.address.eq(beat.address)
        with m.If(held_valid & ~expiring):
            m.d.comb += [
                following.tag.eq(held.tag),
                following.tile.eq(held.tile),
                following.channel.eq(held.channel),
                following.address.eq(held.address),
            ]

        with m.If(room):
            m.d.sync += [
                write_valid.eq(live),
                final.eq(expires | answering | (live & beat.tile_end)),
                completion.eq(following),
                bad.eq((was_failed | beat.bad) & ~held_valid),
                was_aborted.eq(aborted.bit_select(entry, 1) & ~held_valid),
                was_wrapped.eq(wrapped.bit_select(entry, 1) & ~held_valid),
                write.slot.eq(tile_read.data.slot),
                # Whole tiles are powers of two, so a beat of the expert is the tile's number above
                # the beat's.
                write.beat.eq(Cat(position, tile_read.data.tile)),
            ]
            m.d.sync += write.data.as_value().eq(beat.data)
            with m.If(expiring):
                m.d.sync += told.eq(FetchReason.TIMEOUT)
            with m.Elif(held_valid):
                m.d.sync += told.eq(held.reason)
            with m.Else():
                m.d.sync += told.eq(FetchReason.OK)
        m.d.comb += [
            ended.eq(completion),
            ended.reason.eq(reason),
            ended.failed.eq(reason != FetchReason.OK),
            self.run.eq(room),
        ]

        # --- time-out: a step of the mid end would still change what is being ended ---
        m.d.comb += [
            overdue.eq(self.expired & tiles.filled),
            expires.eq(
                looked_up & room & ~self.busy & tiles.filled.bit_select(expiring_channel, 1)
            ),
        ]
        goes_on = Signal()
        m.d.comb += goes_on.eq(~expires & tiles.filled.bit_select(expiring_channel, 1))
        m.d.sync += [
            expiring.eq(Mux(expiring, goes_on, overdue.any())),
            expiring_entry.eq(tiles.head),
            # Not if the channel's last open tile has ended meanwhile: its next may be open then.
            looked_up.eq(expiring & goes_on),
        ]
        with m.If(~expiring):
            m.d.sync += expiring_channel.eq(_lowest(overdue))
        for c in channels:
            now = expires & (expiring_channel == c)
            came = beat_go & (beat.channel == c)
            asked = self.issue & (self.burst.channel == c)
            returned = came & beat.burst_end
            m.d.sync += outstanding[c].eq(outstanding[c] + asked - returned)
            with m.If(now):
                m.d.sync += live_counts[c].eq(0)
            with m.Else():
                m.d.sync += live_counts[c].eq(live_counts[c] + asked - (returned & ~dead))
            m.d.comb += [
                self.outstanding[c].eq(outstanding[c]),
                self.live[c].eq(live_counts[c]),
                self.drop[c].eq(now),
                # A channel that asks memory for nothing waits for its turn: what came for others
                # shows that memory answers.
                self.progress[c].eq(
                    came
                    | (beat_go & (outstanding[c] == 0))
                    | (self.answer & (self.burst.channel == c))
                ),
            ]
            m.d.sync += self.wrote[c].eq(live & (beat.channel == c))
            with m.If(now):
                m.d.sync += [
                    dead_counts[c].eq(outstanding[c]),
                    has_dead[c].eq(outstanding[c] != 0),
                    within[c].eq(0),
                    failed[c].eq(0),
                ]
            with m.Elif(live & (beat.channel == c)):
                m.d.sync += [
                    within[c].eq(~beat.tile_end),
                    failed[c].eq((failed[c] | beat.bad) & ~beat.tile_end),
                ]
            with m.Elif(returned):
                m.d.sync += [
                    dead_counts[c].eq(dead_counts[c] - 1),
                    has_dead[c].eq(dead_counts[c] != 1),
                ]
            # Until its last open tile is reported, or the mid end has answered a request that could
            # not begin.
            with m.If(self.expire[c]):
                m.d.sync += self.expired[c].eq(1)
            with m.Elif(
                (self.answer & (self.burst.channel == c))
                | (~tiles.filled[c] & ~self.waiting[c])
                | (now & tiles.single)
            ):
                m.d.sync += self.expired[c].eq(0)
        return m

    def _leave(self, m, *, write_valid, write, final, ended, room):
        """Let a beat, and how a tile ended, leave; ``room`` says that the next may come."""
        if self.config.slot_store == "axi":
            m.submodules.writer = writer = SlotWriter(config=self.config)
            wiring.connect(m, writer.bus, wiring.flipped(self.slot_bus))
            wiring.connect(m, writer.completions, wiring.flipped(self.completions))
            item = writer.items.payload
            m.d.comb += [
                writer.slot_base.eq(self.slot_base),
                writer.items.valid.eq(write_valid | final),
                item.write.eq(write_valid),
                item.slot.eq(write.slot),
                item.beat.eq(write.beat),
                item.data.eq(write.data),
                item.final.eq(final),
                item.completion.eq(ended),
                room.eq(~(write_valid | final) | writer.items.ready),
            ]
            left = write_valid & writer.items.ready, final & writer.items.ready
            self._tap(m, *left, write=write, ended=ended)
            with m.If(writer.items.ready):
                m.d.sync += [write_valid.eq(0), final.eq(0)]
            return
        m.submodules.done = done = fifo.SyncFIFOBuffered(width=ended.shape().size, depth=self.tiles)
        # From a register: what may come in the two cycles until it is seen has a place.
        done_room = Signal()
        m.d.sync += done_room.eq(done.level <= self.tiles - 3)
        m.d.comb += [
            self.writes.valid.eq(write_valid),
            self.writes.payload.eq(write),
            done.w_data.eq(ended),
            done.w_en.eq(final & done_room & (~write_valid | self.writes.ready)),
            self.completions.payload.eq(done.r_data),
            self.completions.valid.eq(done.r_rdy),
            done.r_en.eq(self.completions.ready),
            room.eq((~write_valid | self.writes.ready) & (~final | done_room)),
        ]
        self._tap(m, write_valid & self.writes.ready, done.w_en, write=write, ended=ended)
        with m.If(self.writes.ready):
            m.d.sync += write_valid.eq(0)
        with m.If(done.w_en):
            m.d.sync += final.eq(0)

    def _tap(self, m, beat, final, *, write, ended):
        """Show what leaves."""
        if self.config.checksums:
            m.d.comb += [
                self.tap.beat.eq(beat),
                self.tap.final.eq(final),
                self.tap.channel.eq(ended.channel),
                self.tap.data.eq(write.data),
            ]
