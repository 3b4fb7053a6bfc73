"""Table of the experts that are being fetched, and the choice of the next tile."""

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import Rows, require_config
from prestage_hw.layouts import RecordLayout

__all__ = ["EntryLayout", "InflightTable"]


class EntryLayout(data.StructLayout):
    """What a fetch is about; it does not change while the fetch is in flight.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "layer": unsigned(config.bits("layer")),
                "expert": unsigned(config.bits("expert")),
                "slot": unsigned(config.bits("slot")),
                # Of each part; without rows as if the tiles before it lay there, too.
                "addresses": data.ArrayLayout(config.bits("address"), len(config.part_bytes)),
                "ctx": unsigned(config.bits("ctx")),  # of a prefetch, as the next two
                "deadline": unsigned(8),
                "kind": unsigned(2),
                # Number of the expert's last tile, where experts differ.
                **({"last_tile": unsigned(config.bits("tile"))} if config.layer_bytes else {}),
            }
        )


class InflightTable(wiring.Component):
    """Remember each expert in flight and offer its tiles, demands first.

    Tiles of demands leave in the order in which the entries became demands, one entry's tiles in
    order. A tile of a prefetch is offered only while no demand has tiles left and fewer than
    ``prefetch_tiles`` prefetch tiles are on their way. A failed entry gets no further tiles, a
    cancelled one only if a demand comes for it. Demands go to the DMA engine's first channel,
    prefetches to its second, those of a prefill chunk to ``config.stream_channel``. The prefetch
    tiles that are on their way are of one channel: else those of the lower class might wait for
    those of the other for ever, and a demand with them.

    At most one of ``allocate``, ``wait``, ``cancel``, ``complete`` and ``free`` may be 1 in a
    cycle. All but ``allocate`` mean the entry ``tag``; what they change is seen from the next cycle
    on.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    fetches : ``Out(stream.Signature(RecordLayout("FetchRequest")))``
        Tiles.
    fetch_layer, fetch_expert : ``Out``
        Expert that ``fetches`` offers a tile of; only with a host mover.
    prefetch_tiles : ``In(3)``
        Most prefetch tiles on their way; 0 counts as 1, or a prefetch would never end.
    occupied, prefetching, demand_room, prefetch_room : ``Out(1)``
        Something is in flight; a prefetch is; an entry is free for a demand; for a prefetch, which
        leaves one for a demand and keeps to ``config.prefetch_inflight``.
    allocate : ``In(1)``
        Start the fetch of ``entry`` as entry ``free_tag``, a demand with ``waiters`` or a prefetch.
    entry, waiters, demand, stream : ``In``
        What is allocated; ``stream`` is 1 for a prefill chunk's prefetch. ``waiters`` has one bit a
        context; ``wait`` adds them, too.
    free_tag : ``Out``
        Entry that ``allocate`` takes, from the second cycle after an ``allocate`` or ``free`` on.
    tag : ``In``
        Entry that the other ports are about.
    row : ``Out(EntryLayout(config=config))``
        What entry ``tag`` is about.
    row_demand, row_waiters : ``Out``
        Class and waiting contexts of entry ``tag``.
    row_last, row_failed, row_address, row_reason : ``Out``
        Nothing of entry ``tag`` is on its way nor will be; a tile failed; address and
        :class:`FetchReason` of its first failure.
    row_cancelled, row_returned : ``Out``
        Entry ``tag`` was cancelled, and is no demand; tiles that came back.
    row_idle, row_disposable : ``Out``
        None of the tiles of entry ``tag`` is on its way; it is a prefetch with tiles left.
    row_shared : ``Out``
        Candidates of several decisions were for entry ``tag``.
    keeps, kept_tag : ``In``
        Entry ``kept_tag`` fetches a copy: it is no prefetch to be spared. Only with replicas.
    spare, spare_tag : ``Out``
        There is a prefetch with tiles left, and the one that was allocated last, a cycle after that
        changed.
    cancelling : ``Out(1)``
        An entry was cancelled and is there still, a cycle after that changed.
    left : ``Out``
        Tiles of all entries that did not come back and will, two cycles after they changed.
    urgent : ``Out(config.dma_channels)``
        Channel whose tiles on their way were requested for a prefetch and are waited for by now:
        its entry became a demand.
    waits, waits_kind : ``Out``
        A prefetch's tile is on its way; kind of the one that left last.
    wait : ``In(1)``
        Add ``waiters`` and make the entry a demand.
    cancel : ``In(1)``
        No more tiles of the entry.
    share : ``In(1)``
        Another candidate was for the entry.
    complete : ``In(1)``
        Tile ``tile`` came back, ``failed`` or not, with ``address`` and ``reason``.
    tile, failed, address, reason : ``In``
        See ``complete``.
    complete_demand : ``Out(1)``
        The tile was requested for a demand.
    free : ``In(1)``
        The entry is done.
    hold : ``In(1)``
        No tile is offered. Must be 1 whenever one of those five is, and may be so more often: it
        is what the offer can wait for, while those come late in a cycle.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self.entry_layout = EntryLayout(config=config)
        tag_bits = config.bits("tag")
        subject = {
            "fetch_layer": Out(config.bits("layer")),
            "fetch_expert": Out(config.bits("expert")),
        }
        copy = {"keeps": In(1), "kept_tag": In(tag_bits)}
        super().__init__(
            {
                **(subject if config.mover == "host" else {}),
                **(copy if config.replicas > 1 else {}),
                "fetches": Out(stream.Signature(RecordLayout("FetchRequest", config=config))),
                "prefetch_tiles": In(3),
                "occupied": Out(1),
                "prefetching": Out(1),
                "demand_room": Out(1),
                "prefetch_room": Out(1),
                "allocate": In(1),
                "entry": In(self.entry_layout),
                "waiters": In(config.contexts),
                "demand": In(1),
                "stream": In(1),
                "free_tag": Out(tag_bits),
                "tag": In(tag_bits),
                "row": Out(self.entry_layout),
                "row_demand": Out(1),
                "row_waiters": Out(config.contexts),
                "row_last": Out(1),
                "row_failed": Out(1),
                "row_address": Out(config.bits("address")),
                "row_reason": Out(3),
                "row_cancelled": Out(1),
                "row_returned": Out(range(config.tiles + 1)),
                "row_idle": Out(1),
                "row_disposable": Out(1),
                "row_shared": Out(1),
                "spare": Out(1),
                "spare_tag": Out(tag_bits),
                "cancelling": Out(1),
                "left": Out(range(config.inflight * config.tiles + 1)),
                "urgent": Out(config.dma_channels),
                "waits": Out(1),
                "waits_kind": Out(2),
                "wait": In(1),
                "cancel": In(1),
                "share": In(1),
                "complete": In(1),
                "tile": In(config.bits("tile")),
                "failed": In(1),
                "address": In(config.bits("address")),
                "reason": In(3),
                "complete_demand": Out(1),
                "free": In(1),
                "hold": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        count = config.inflight
        everything = (1 << count) - 1
        tile_shape = range(config.tiles + 1)

        valid = Signal(count)
        demand = Signal(count)
        failed = Signal(count)
        cancelled = Signal(count)
        shared = Signal(count)
        more = Signal(count)  # Tiles are left to offer.
        # older[i][j]: entry j took its place in the order before entry i.
        older = [Signal(count, name=f"older_{i}") for i in range(count)]
        issued = [Signal(tile_shape, name=f"issued_{i}") for i in range(count)]
        returned = [Signal(tile_shape, name=f"returned_{i}") for i in range(count)]
        # Part that the next tile is of.
        parts = len(config.part_bytes)
        part = [Signal(range(parts), name=f"part_{i}") for i in range(count)]
        waiters = [Signal(config.contexts, name=f"waiters_{i}") for i in range(count)]
        prefetches = Signal(range(count + 1))  # Entries of the class prefetch.
        under_way = Signal(3)  # Prefetch tiles offered,
        taken_over = Signal(3)  # those among them whose entry is a demand's by now.

        # Written when an entry starts.
        m.submodules.entries = entries = memory.Memory(
            shape=self.entry_layout, depth=count, init=[]
        )
        entry_write = entries.write_port()
        entry_read = entries.read_port(domain="comb")
        offer_read = entries.read_port(domain="comb")
        # Tiles below this number were requested for a prefetch. Written when an entry starts or is
        # promoted.
        m.submodules.promotions = promotions = memory.Memory(
            shape=unsigned(len(issued[0])), depth=count, init=[]
        )
        promotion_write = promotions.write_port()
        promotion_read = promotions.read_port(domain="comb")
        # Written by an entry's first failure.
        m.submodules.failures = failures = memory.Memory(
            shape=data.StructLayout({"address": config.address_bits, "reason": 3}),
            depth=count,
            init=[],
        )
        failure_write = failures.write_port()
        failure_read = failures.read_port(domain="comb")

        # --- rooms ---
        entries_used = Signal(range(count + 1))
        m.d.sync += entries_used.eq(entries_used + self.allocate - self.free)
        m.d.comb += [
            self.occupied.eq(entries_used != 0),
            self.prefetching.eq(prefetches != 0),
            self.demand_room.eq(entries_used != count),
            self.prefetch_room.eq(
                (entries_used < count - 1) & (prefetches < config.prefetch_inflight)
            ),
        ]
        # The lowest, looked for ahead of time: an allocation comes cycles after the change before.
        free_tag = Const(0, len(self.free_tag))
        for i in reversed(range(count)):
            free_tag = Mux(valid[i], free_tag, i)
        m.d.sync += self.free_tag.eq(free_tag)

        # --- row ---
        row_more = Signal()
        row_issued = Signal(tile_shape)
        row_returned = Signal(tile_shape)
        m.d.comb += [
            entry_read.addr.eq(self.tag),
            promotion_read.addr.eq(self.tag),
            failure_read.addr.eq(self.tag),
            self.row.eq(entry_read.data),
            self.row_address.eq(failure_read.data.address),
            self.row_reason.eq(failure_read.data.reason),
            self.row_demand.eq(demand.bit_select(self.tag, 1)),
            self.row_failed.eq(failed.bit_select(self.tag, 1)),
            self.row_waiters.eq(Array(waiters)[self.tag]),
            row_more.eq(more.bit_select(self.tag, 1)),
            row_issued.eq(Array(issued)[self.tag]),
            row_returned.eq(Array(returned)[self.tag]),
            self.row_idle.eq(row_issued == row_returned),
            self.row_last.eq(self.row_idle & ~row_more),
            self.row_cancelled.eq(cancelled.bit_select(self.tag, 1)),
            self.row_returned.eq(row_returned),
            self.row_shared.eq(shared.bit_select(self.tag, 1)),
            self.row_disposable.eq(
                valid.bit_select(self.tag, 1) & row_more & ~self.row_demand & ~self.row_cancelled
            ),
            self.waits.eq(under_way != 0),
            self.complete_demand.eq(self.tile >= promotion_read.data),
        ]

        # --- what could be given up ---
        # The youngest: it has got the least so far, and of those that waited together the best went
        # first.
        may_go = Signal(count)
        spare_tag = Signal(config.bits("tag"))
        disposable = valid & more & ~demand & ~cancelled
        if config.replicas > 1:
            disposable &= ~(self.keeps << self.kept_tag)
        m.d.comb += may_go.eq(disposable)
        for i in range(count):
            younger = Cat(older[j][i] for j in range(count))
            with m.If(may_go[i] & ~(may_go & younger).any()):
                m.d.comb += spare_tag.eq(i)
        m.d.sync += [
            self.spare.eq(may_go.any()),
            self.spare_tag.eq(spare_tag),
            self.cancelling.eq((valid & cancelled).any()),
        ]

        # --- tiles yet to come ---
        left_change = Signal(range(-config.tiles, config.tiles + 1))
        unissued = Signal(tile_shape)
        row_tiles = new_tiles = config.tiles
        if config.layer_bytes:
            row_tiles, new_tiles = self.row.last_tile + 1, self.entry.last_tile + 1
        m.d.comb += unissued.eq(row_tiles - row_issued)
        m.d.sync += [left_change.eq(0), self.left.eq(self.left + left_change)]
        with m.If(self.allocate):
            m.d.sync += left_change.eq(new_tiles)
        with m.Elif(self.complete):
            m.d.sync += left_change.eq(-1 - Mux(self.failed & row_more, unissued, 0))
        with m.Elif(self.cancel):
            m.d.sync += left_change.eq(-unissued)
        with m.Elif(self.wait & self.row_cancelled & ~self.row_failed):
            m.d.sync += left_change.eq(unissued)

        # --- choice of the next tile ---
        want_demand = Signal(count)
        want = Signal(count)
        fits = Signal(count)  # Its channel is that of the prefetch tiles on their way.
        best = Signal(count)
        best_tag = Signal(config.bits("tag"))
        m.d.comb += [
            want_demand.eq(more & demand),
            want.eq(
                Mux(
                    want_demand.any(),
                    want_demand,
                    Mux((under_way == 0) | (under_way < self.prefetch_tiles), more, 0),
                )
            ),
        ]
        for i in range(count):
            m.d.comb += best[i].eq(want[i] & fits[i] & ~(want & older[i]).any())
            with m.If(best[i]):
                m.d.comb += best_tag.eq(i)

        if config.dma_channels > 2:
            streams = Signal(count)
            streaming = Signal()  # So were the prefetch tiles that left last.
            m.d.comb += fits.eq(
                demand | ~(streams ^ streaming.replicate(count)) | (under_way == 0).replicate(count)
            )
        else:
            m.d.comb += fits.eq(everything)

        # The choice passes through two registers: which entry, then what is known of it. It counts
        # if nothing has changed since it was made.
        chosen = Signal(count)
        chosen_tag = Signal(config.bits("tag"))
        stands = Signal()
        prepared = Signal(count)
        prepared_tag = Signal(config.bits("tag"))
        prepared_slot = Signal(config.bits("slot"))
        prepared_kind = Signal(2)
        prepared_address = Signal(config.bits("address"))
        prepared_tile = Signal(tile_shape)
        prepared_part = Signal(range(parts))
        next_part = Signal(range(parts))
        prepared_demand = Signal()
        prepared_last = config.tiles - 1
        if config.layer_bytes:
            prepared_last = Signal(config.bits("tile"))
            m.d.sync += prepared_last.eq(offer_read.data.last_tile)
        prepared_offset = prepared_tile * config.tile_bytes
        prefetch_channel = Signal(config.bits("channel"))
        target = Signal(count)  # Entry that changes, one bit.
        ready = Signal()
        load = Signal()
        changing = Signal()
        m.d.comb += [
            offer_read.addr.eq(chosen_tag),
            changing.eq(self.allocate | self.wait | self.cancel | self.complete | self.free),
            load.eq(ready & ~self.fetches.valid & ~self.hold),
        ]
        m.d.sync += [
            chosen.eq(best),
            chosen_tag.eq(best_tag),
            stands.eq(~changing & ~load),
            prepared.eq(chosen),
            prepared_tag.eq(chosen_tag),
            prepared_slot.eq(offer_read.data.slot),
            prepared_kind.eq(offer_read.data.kind),
            prepared_address.eq(
                offer_read.data.addresses[Array(part)[chosen_tag] if parts > 1 else 0]
            ),
            prepared_tile.eq(Array(issued)[chosen_tag]),
            prepared_part.eq(Array(part)[chosen_tag]),
            prepared_demand.eq((chosen & demand).any()),
            ready.eq(chosen.any() & stands & ~changing & ~load),
        ]
        if config.rows:
            prepared_offset = self._follow_rows(
                m,
                tag=chosen_tag,
                loaded=prepared_tag,
                tile=prepared_tile,
                part=prepared_part,
                load=load,
            )
        with m.If(self.fetches.ready):
            m.d.sync += self.fetches.valid.eq(0)
        with m.If(~self.fetches.valid):
            m.d.sync += [
                self.fetches.payload.tag.eq(prepared_tag),
                self.fetches.payload.demand.eq(prepared_demand),
                self.fetches.payload.channel.eq(Mux(prepared_demand, 0, prefetch_channel)),
                self.fetches.payload.slot.eq(prepared_slot),
                self.fetches.payload.tile.eq(prepared_tile),
                self.fetches.payload.address.eq(prepared_address + prepared_offset),
            ]
        m.d.comb += prefetch_channel.eq(min(1, config.dma_channels - 1))
        urgent_channel = 1 << min(1, config.dma_channels - 1)
        if config.dma_channels > 2:
            # Tiles that are on their way are of one channel.
            urgent_channel = Mux(streaming, 1 << config.stream_channel, urgent_channel)
            prepared_stream = Signal()
            m.d.sync += prepared_stream.eq((chosen & streams).any())
            with m.If(prepared_stream):
                m.d.comb += prefetch_channel.eq(config.stream_channel)
            with m.If(load & ~prepared_demand):
                m.d.sync += streaming.eq(prepared_stream)
            with m.If(self.allocate):
                m.d.sync += streams.eq(Mux(self.stream, streams | target, streams & ~target))
        if config.mover == "host":
            prepared_layer = Signal(config.bits("layer"))
            prepared_expert = Signal(config.bits("expert"))
            m.d.sync += [
                prepared_layer.eq(offer_read.data.layer),
                prepared_expert.eq(offer_read.data.expert),
            ]
            with m.If(~self.fetches.valid):
                m.d.sync += [
                    self.fetch_layer.eq(prepared_layer),
                    self.fetch_expert.eq(prepared_expert),
                ]
        m.d.comb += next_part.eq(prepared_part)
        for at, first in enumerate(config.first_tiles):
            if at:
                with m.If(prepared_tile == first - 1):
                    m.d.comb += next_part.eq(at)
        with m.If(load):
            m.d.sync += self.fetches.valid.eq(1)
            with m.If(prepared_tile == prepared_last):
                m.d.sync += more.eq(more & ~prepared)
            with m.If(~prepared_demand):
                m.d.sync += [under_way.eq(under_way + 1), self.waits_kind.eq(prepared_kind)]
            for i in range(count):
                with m.If(prepared[i]):
                    m.d.sync += [issued[i].eq(prepared_tile + 1), part[i].eq(next_part)]

        m.d.sync += self.urgent.eq(Mux(taken_over != 0, urgent_channel, 0))

        # --- changes ---
        m.d.comb += [
            target.eq(1 << Mux(self.allocate, self.free_tag, self.tag)),
            entry_write.addr.eq(self.free_tag),
            entry_write.data.eq(self.entry),
            entry_write.en.eq(self.allocate),
            failure_write.addr.eq(self.tag),
            failure_write.data.address.eq(self.address),
            failure_write.data.reason.eq(self.reason),
            failure_write.en.eq(self.complete & self.failed & ~self.row_failed),
            promotion_write.addr.eq(Mux(self.allocate, self.free_tag, self.tag)),
            promotion_write.data.eq(
                Mux(self.allocate, Mux(self.demand, 0, config.tiles), row_issued)
            ),
            promotion_write.en.eq(self.allocate | (self.wait & ~self.row_demand)),
        ]
        with m.If(self.allocate):
            m.d.sync += [
                valid.eq(valid | target),
                demand.eq(Mux(self.demand, demand | target, demand & ~target)),
                failed.eq(failed & ~target),
                cancelled.eq(cancelled & ~target),
                shared.eq(shared & ~target),
                more.eq(more | target),
                prefetches.eq(prefetches + ~self.demand),
            ]
        with m.If(self.wait):
            m.d.sync += [demand.eq(demand | target), cancelled.eq(cancelled & ~target)]
            with m.If(self.row_cancelled & (row_issued != row_tiles) & ~self.row_failed):
                m.d.sync += more.eq(more | target)
            with m.If(~self.row_demand):
                m.d.sync += [
                    prefetches.eq(prefetches - 1),
                    taken_over.eq(taken_over + (row_issued - row_returned)[:3]),
                ]
        with m.If(self.share):
            m.d.sync += shared.eq(shared | target)
        with m.If(self.cancel):
            m.d.sync += [cancelled.eq(cancelled | target), more.eq(more & ~target)]
        with m.If(self.complete):
            with m.If(self.failed):
                m.d.sync += [failed.eq(failed | target), more.eq(more & ~target)]
            with m.If(~self.complete_demand):
                m.d.sync += under_way.eq(under_way - 1)
                with m.If(self.row_demand):
                    m.d.sync += taken_over.eq(taken_over - 1)
        with m.If(self.free):
            m.d.sync += valid.eq(valid & ~target)
            with m.If(~self.row_demand):
                m.d.sync += prefetches.eq(prefetches - 1)
        for i in range(count):
            with m.If(target[i] & (self.allocate | (self.wait & ~self.row_demand))):
                # The youngest from now on.
                m.d.sync += older[i].eq(everything & ~(1 << i))
            with m.Elif(self.allocate | (self.wait & ~self.row_demand)):
                m.d.sync += older[i].eq(older[i] & ~target)
            with m.If(target[i] & self.allocate):
                m.d.sync += [
                    issued[i].eq(0),
                    part[i].eq(0),
                    returned[i].eq(0),
                    waiters[i].eq(self.waiters),
                ]
            with m.If(target[i] & self.wait):
                m.d.sync += waiters[i].eq(waiters[i] | self.waiters)
            with m.If(target[i] & self.complete):
                m.d.sync += returned[i].eq(returned[i] + 1)
        return m

    def _follow_rows(self, m, *, tag, loaded, tile, part, load):
        """Where a tile lies in its part, in bytes, in the cycle after ``tag`` names its entry.

        That of each entry's next tile is kept: rows may have any size, and a tile begin anywhere in
        one. With ``load`` entry ``loaded`` goes on, whose ``tile`` of this ``part`` is offered.
        """
        config = self.config
        low = config.data_bytes.bit_length() - 1
        # All of them are counted in beats.
        parts = [Rows(*(each >> low for each in rows)) for rows in config.part_rows]
        ends = [
            (size >> low) // rows.row_bytes * rows.row_stride
            for size, rows in zip(config.part_bytes, parts, strict=True)
        ]
        place = data.StructLayout(
            {
                "offset": unsigned((max(ends) - 1).bit_length()),
                "within": unsigned((max(rows.row_bytes for rows in parts) - 1).bit_length()),
            }
        )
        m.submodules.places = places = memory.Memory(shape=place, depth=config.inflight, init=[])
        write = places.write_port()
        read = places.read_port(domain="comb")
        now, following = Signal(place), Signal(place)
        moved = Signal(len(now.within) + 1)
        m.d.sync += now.eq(read.data)
        m.d.comb += [
            read.addr.eq(tag),
            write.addr.eq(Mux(self.allocate, self.free_tag, loaded)),
            write.data.eq(Mux(self.allocate, Const(0, place.size), following.as_value())),
            write.en.eq(self.allocate | load),
        ]
        for number, rows in enumerate(parts):
            whole, rest = divmod(config.tile_beats, rows.row_bytes)
            step = whole * rows.row_stride + rest
            gap = rows.row_stride - rows.row_bytes
            with m.If(part == number):
                m.d.comb += [
                    moved.eq(now.within + rest),
                    following.offset.eq(now.offset + step),
                    following.within.eq(moved),
                ]
                with m.If(moved >= rows.row_bytes):
                    m.d.comb += [
                        following.offset.eq(now.offset + step + gap),
                        following.within.eq(moved - rows.row_bytes),
                    ]
        for first in config.first_tiles[1:]:
            with m.If(tile == first - 1):
                m.d.comb += following.eq(0)
        return now.offset << low
