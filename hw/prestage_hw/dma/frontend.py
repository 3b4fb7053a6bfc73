"""Front end of the DMA engine: checks requests and queues them, a queue a channel."""

from amaranth import Array, Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

__all__ = ["FrontEnd", "RowLayout", "TransferLayout"]


class RowLayout(data.StructLayout):
    """Where a tile begins in the rows of its part, with ``config.gathers``.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        longest = max(rows.row_bytes for rows in config.part_rows) // config.data_bytes
        super().__init__(
            {
                "part": unsigned(max(1, (len(config.part_rows) - 1).bit_length())),
                "before": unsigned((longest - 1).bit_length()),  # Beats of its row before it.
                "left": unsigned((config.tile_beats - 1).bit_length()),  # Those of it - 1.
            }
        )

    @staticmethod
    def all_tiles(config):
        """Where each tile of an expert begins, as initial values."""
        low = config.data_bytes.bit_length() - 1
        found = []
        for part, (size, rows) in enumerate(zip(config.part_bytes, config.part_rows, strict=True)):
            row = rows.row_bytes >> low
            for at in range(0, size >> low, config.tile_beats):
                left = min(row - at % row, config.tile_beats) - 1
                found.append({"part": part, "before": at % row, "left": left})
        return found


class TransferLayout(data.StructLayout):
    """A request that was checked.

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
                "left": unsigned((config.tile_beats - 1).bit_length()),  # Beats - 1.
                "refused": unsigned(1),
                # Of its first row, and how many beats come after that one.
                **(
                    {
                        "row": RowLayout(config=config),
                        "after": unsigned((config.tile_beats - 1).bit_length()),
                    }
                    if config.gathers
                    else {}
                ),
            }
        )


class FrontEnd(wiring.Component):
    """Check requests and keep ``config.dma_queue_depth`` of them for each channel.

    A request is refused if its address or its size is no whole number of beats, if it is longer
    than a tile, or if it goes past the top of the address space. It takes its turn like any other
    and is answered without a transfer, and so is one of no bytes.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    fetches : ``In(stream.Signature(RecordLayout("FetchRequest")))``
        Requests. ``ready`` says whether the offered request's channel has room.
    room : ``Out(config.dma_channels)``
        Channels that have room.
    abort, abort_all, abort_tag : ``In``
        Requests with this tag, or all that are in the queues, are aborted.
    waiting, null : ``Out(config.dma_channels)``
        Channels that have a request; those whose first one moves nothing: it was refused or
        aborted, or has no bytes. Of a request that comes to an empty queue ``null`` tells a cycle
        later, with ``first``.
    startable : ``Out(config.dma_channels)``
        Channels whose first request may move something: like ``waiting`` without ``null``, but told
        without looking at ``null``, which has the last word.
    channel : ``In``
        Channel whose first request is shown as ``first``, with ``first_aborted`` and
        ``first_empty``.
    pop : ``In(1)``
        Remove it.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        channels = config.dma_channels
        super().__init__(
            {
                "fetches": In(stream.Signature(RecordLayout("FetchRequest", config=config))),
                "room": Out(channels),
                "abort": In(1),
                "abort_all": In(1),
                "abort_tag": In(config.bits("tag")),
                "waiting": Out(channels),
                "startable": Out(channels),
                "null": Out(channels),
                "channel": In(config.bits("channel")),
                "first": Out(TransferLayout(config=config)),
                "first_aborted": Out(1),
                "first_empty": Out(1),
                "pop": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        channels, depth = config.dma_channels, config.dma_queue_depth
        low = config.data_bytes.bit_length() - 1
        fetch = self.fetches.payload
        layout = TransferLayout(config=config)

        # One memory holds all queues, a depth after the other.
        m.submodules.queue = queue = memory.Memory(shape=layout, depth=channels * depth, init=[])
        queue_write = queue.write_port()
        queue_read = queue.read_port(domain="comb")
        write_at = Array(Signal(range(depth), name=f"write_at_{c}") for c in range(channels))
        read_at = Array(Signal(range(depth), name=f"read_at_{c}") for c in range(channels))
        levels = [Signal(range(depth + 1), name=f"level_{c}") for c in range(channels)]

        # --- checks: sizes before a register, the end of the transfer after it ---
        offered = Signal(channels)
        accept = Signal()
        part_of_beat = (1 << low) - 1
        incoming = Signal(layout)
        incoming_channel = Signal(config.bits("channel"))
        incoming_valid = Signal()
        incoming_to = Signal(channels)
        incoming_empty = Signal()
        m.d.comb += [
            offered.eq(1 << fetch.channel),
            self.fetches.ready.eq((self.room & offered).any()),
            accept.eq(self.fetches.valid & self.fetches.ready),
        ]
        m.d.sync += [
            incoming_valid.eq(accept),
            incoming_to.eq(Mux(accept, offered, 0)),
            incoming_channel.eq(fetch.channel),
            incoming_empty.eq(fetch.sized & (fetch.bytes == 0)),
            incoming.tag.eq(fetch.tag),
            incoming.slot.eq(fetch.slot),
            incoming.tile.eq(fetch.tile),
            incoming.address.eq(fetch.address),
            incoming.left.eq(Mux(fetch.sized, (fetch.bytes >> low) - 1, config.tile_beats - 1)),
            incoming.refused.eq(
                (fetch.address & part_of_beat).any()
                | (
                    fetch.sized
                    & ((fetch.bytes & part_of_beat).any() | (fetch.bytes > config.tile_bytes))
                )
            ),
        ]
        last_beat = Signal(config.address_bits - low + 1)
        refused = Signal()
        hit = Signal()
        m.d.comb += [
            last_beat.eq((incoming.address >> low) + incoming.left),
            refused.eq(incoming.refused | (last_beat[-1] & ~incoming_empty)),
            hit.eq(self.abort_all | (self.abort & (self.abort_tag == incoming.tag))),
            queue_write.addr.eq(Cat(write_at[incoming_channel], incoming_channel)),
            queue_write.data.eq(incoming),
            queue_write.data.refused.eq(refused),
            queue_write.en.eq(incoming_valid),
            queue_read.addr.eq(Cat(read_at[self.channel], self.channel)),
            self.first.eq(queue_read.data),
        ]

        if config.gathers:
            # A tile's number says where it lies, which is looked up while it is checked.
            m.submodules.rows = rows = memory.Memory(
                shape=RowLayout(config=config),
                depth=config.tiles,
                init=RowLayout.all_tiles(config),
            )
            row_read = rows.read_port()
            row = row_read.data
            more = Signal()
            m.d.comb += [
                row_read.addr.eq(fetch.tile),
                more.eq(incoming.left > row.left),
                queue_write.data.row.eq(row),
                queue_write.data.row.left.eq(Mux(more, row.left, incoming.left)),
                queue_write.data.after.eq(Mux(more, incoming.left - row.left, 0)),
            ]

        # --- queues ---
        firsts_aborted = Signal(channels)
        firsts_empty = Signal(channels)
        for c in range(channels):
            pushed = incoming_to[c]
            popped = self.pop & (self.channel == c)
            aborted = Signal(depth, name=f"aborted_{c}")
            empty = Signal(depth, name=f"empty_{c}")
            null = Signal(depth, name=f"null_{c}")
            m.d.sync += levels[c].eq(levels[c] + pushed - popped)
            filled = Signal(name=f"filled_{c}")
            with m.If(pushed):
                m.d.sync += filled.eq(1)
            with m.Elif(popped & (levels[c] == 1)):
                m.d.sync += filled.eq(0)
            m.d.comb += [
                self.waiting[c].eq(filled | incoming_to[c]),
                self.room[c].eq(
                    (levels[c] != depth) & ~((levels[c] == depth - 1) & incoming_to[c])
                ),
                firsts_aborted[c].eq(aborted.bit_select(read_at[c], 1)),
                firsts_empty[c].eq(empty.bit_select(read_at[c], 1)),
                self.null[c].eq(filled & null.bit_select(read_at[c], 1)),
            ]
            # From registers, but for the request that comes to an empty queue. What follows a
            # request that was taken is not known at once.
            movable = Signal(name=f"movable_{c}")
            m.d.sync += movable.eq(filled & ~popped & ~null.bit_select(read_at[c], 1))
            m.d.comb += self.startable[c].eq(movable | (incoming_to[c] & ~filled))
            with m.If(popped):
                m.d.sync += read_at[c].eq(read_at[c] + 1)
            with m.If(pushed):
                m.d.sync += write_at[c].eq(write_at[c] + 1)
            for i in range(depth):
                tag = Signal(config.bits("tag"), name=f"tag_{c}_{i}")
                with m.If(pushed & (write_at[c] == i)):
                    m.d.sync += [
                        tag.eq(incoming.tag),
                        aborted[i].eq(hit),
                        empty[i].eq(incoming_empty),
                        null[i].eq(incoming_empty | refused | hit),
                    ]
                with m.Elif(self.abort_all | (self.abort & (tag == self.abort_tag))):
                    m.d.sync += [aborted[i].eq(1), null[i].eq(1)]
        m.d.comb += [
            self.first_aborted.eq(firsts_aborted.bit_select(self.channel, 1)),
            self.first_empty.eq(firsts_empty.bit_select(self.channel, 1)),
        ]
        return m
