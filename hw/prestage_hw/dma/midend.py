"""Mid end of the DMA engine: chooses a channel and cuts its tile into bursts."""

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import FetchReason, TrafficClass

from .arbiter import Arbiter
from .frontend import RowLayout, TransferLayout
from .settings import ActiveLayout

__all__ = ["AnswerLayout", "BurstLayout", "MidEnd", "TileLayout"]


class TileLayout(data.StructLayout):
    """A tile whose transfer begins.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "channel": unsigned(config.bits("channel")),
                "tag": unsigned(config.bits("tag")),
                "slot": unsigned(config.bits("slot")),
                "tile": unsigned(config.bits("tile")),
                "address": unsigned(config.bits("address")),
                "aborted": unsigned(1),
            }
        )


class BurstLayout(data.StructLayout):
    """One read burst.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    entry_bits : :class:`int`
        Width of a tile's number among the open ones, in bits.
    """

    def __init__(self, *, config, entry_bits):
        super().__init__(
            {
                "address": unsigned(config.bits("address")),
                "length": unsigned(8),  # beats - 1
                "last": unsigned(1),  # the tile's last burst
                "channel": unsigned(config.bits("channel")),
                "entry": unsigned(entry_bits),
            }
        )


class AnswerLayout(data.StructLayout):
    """A completion without a transfer.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "channel": unsigned(config.bits("channel")),
                "tag": unsigned(config.bits("tag")),
                "tile": unsigned(config.bits("tile")),
                "address": unsigned(config.bits("address")),
                "reason": unsigned(3),
            }
        )


class MidEnd(wiring.Component):
    """Choose a channel every third cycle and do one step of its tile.

    A step is a burst, which ends at the tile's (or row's) last beat and at the next multiple of the
    channel's longest burst, so that none crosses a 4 KiB edge; the turn to the next row; or the
    answer to a request that moves nothing, once its channel has no open tile. An aborted tile ends
    with a burst of one beat. Bursts of different channels may follow each other, so that a demand
    waits for no tile to end.

    The rows of a tile are those of its part, with ``config.gathers``, or else those that its
    channel is set to.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    tiles : :class:`int`
        Tiles that may be open. At least 1.

    Members
    -------
    active, lower_credits : ``In``
        As of :class:`Settings`.
    urgent : ``In(config.dma_channels)``
        Channels whose turn comes as if they were of the class demand.
    waiting, startable, null, first, first_aborted, first_empty : ``In``
        As of :class:`FrontEnd`.
    channel, pop : ``Out``
        As of :class:`FrontEnd`. In a step ``channel`` is the channel it is for.
    abort, abort_all, abort_tag : ``In``
        As of :class:`FrontEnd`, for tiles that were begun.
    tile_room, tile_entry : ``In``
        A tile may be opened, as this entry.
    burst_room : ``In(1)``
        A burst may leave in the next cycle.
    answer_room : ``In(1)``
        An answer may leave in the next cycle.
    hold : ``In(1)``
        No step may be done in this cycle.
    outstanding, live : ``In(array)``
        Bursts of each channel that are outstanding, and those among them that somebody waits for.
    returned : ``In(1)``
        A burst's last beat came, of any channel.
    quiet : ``In(config.dma_channels)``
        Channels without an open tile.
    expired : ``In(config.dma_channels)``
        Channels whose tiles are timed out: what waits is answered so.
    drop : ``In(config.dma_channels)``
        Forget the open tile of these channels.
    busy : ``Out(1)``
        A step is being done. Steps that ``hold`` holds up stay.
    open, tile : ``Out``
        Strobe and tile: it is opened as ``tile_entry``.
    issue, burst : ``Out``
        Strobe and burst.
    wrap, wrap_entry : ``Out``
        Strobe: a row of this open tile would go past the top of the address space.
    answer, answered : ``Out``
        Strobe and answer.
    begun : ``Out(config.dma_channels)``
        Channels with bursts to come of an open tile.
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
                "active": In(data.ArrayLayout(ActiveLayout(config=config), channels)),
                "lower_credits": In(5),
                "urgent": In(channels),
                "waiting": In(channels),
                "startable": In(channels),
                "null": In(channels),
                "first": In(TransferLayout(config=config)),
                "first_aborted": In(1),
                "first_empty": In(1),
                "channel": Out(config.bits("channel")),
                "pop": Out(1),
                "abort": In(1),
                "abort_all": In(1),
                "abort_tag": In(config.bits("tag")),
                "tile_room": In(1),
                "tile_entry": In(self.entry_bits),
                "burst_room": In(1),
                "answer_room": In(1),
                "hold": In(1),
                "outstanding": In(counts),
                "live": In(counts),
                "returned": In(1),
                "quiet": In(channels),
                "expired": In(channels),
                "drop": In(channels),
                "busy": Out(1),
                "open": Out(1),
                "tile": Out(TileLayout(config=config)),
                "issue": Out(1),
                "burst": Out(BurstLayout(config=config, entry_bits=self.entry_bits)),
                "wrap": Out(1),
                "wrap_entry": Out(self.entry_bits),
                "answer": Out(1),
                "answered": Out(AnswerLayout(config=config)),
                "begun": Out(channels),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        channels = range(config.dma_channels)
        low = config.data_bytes.bit_length() - 1
        at_bits = config.address_bits - low
        left_bits = (config.tile_beats - 1).bit_length()
        gathers = config.gathers

        # Where a tile has come to, counted in beats.
        m.submodules.places = places = memory.Memory(
            shape=data.StructLayout(
                {
                    "at": unsigned(at_bits),
                    "left": unsigned(left_bits),  # Of the row or the tile, - 1.
                    "entry": unsigned(self.entry_bits),
                }
            ),
            depth=len(channels),
            init=[],
        )
        place_write = places.write_port()
        place_read = places.read_port(domain="comb")
        # The same for rows.
        m.submodules.rows = rows = memory.Memory(
            shape=data.StructLayout(
                {
                    "start": unsigned(at_bits),
                    "left": unsigned(left_bits),
                    **({"part": RowLayout(config=config)["part"].shape} if gathers else {}),
                }
            ),
            depth=len(channels),
            init=[],
        )
        row_write = rows.write_port()
        row_read = rows.read_port(domain="comb")
        more = Signal(len(channels))  # Rows follow.
        turning = Signal(len(channels))  # The next row does.
        aborted = Signal(len(channels))
        tags = Array(Signal(config.bits("tag"), name=f"tag_{c}") for c in channels)

        # --- choice, every other cycle ---
        m.submodules.arbiter = arbiter = Arbiter(config=config)
        read = Signal()  # First cycle of a step: what it needs is read,
        step = Signal()  # then it is done.
        fresh = Signal()
        null = Signal()
        turn = Signal()
        credit = Signal(len(channels))  # There are credits for a burst of the channel.
        all_outstanding = Signal(5)
        lower = Signal(len(channels))
        lower_room = Signal()
        pending, lower_pending = Signal(), Signal()
        wants = Signal(len(channels))
        wants_null = Signal(len(channels))
        wants_turn = Signal(len(channels))
        done = Signal()
        prepared = Signal()  # The next row is known.
        m.d.comb += done.eq(step & ~self.hold & (~turn | prepared))
        for c in channels:
            settings = self.active[c]
            # Tiles of configured rows begin with a burst of the first one, the others with a turn.
            turns = 0 if gathers else settings.rows
            begins = Signal(name=f"begins_{c}")
            m.d.comb += [
                begins.eq(self.startable[c] & settings.enable & self.tile_room),
                wants_turn[c].eq(Mux(self.begun[c], turning[c], begins & turns) & ~self.expired[c]),
                wants[c].eq(
                    wants_null[c]
                    | (
                        ~self.expired[c]
                        & Mux(
                            self.begun[c],
                            turning[c] | (self.burst_room & credit[c]),
                            begins & (turns | (self.burst_room & credit[c])),
                        )
                    )
                ),
                # Its bursts go on counting as below demand, and so does their limit.
                arbiter.traffic[c].eq(Mux(self.urgent[c], TrafficClass.DEMAND, settings.traffic)),
                arbiter.weight[c].eq(settings.weight),
            ]
            m.d.sync += credit[c].eq(
                (self.outstanding[c] + (pending & (self.channel == c)) < settings.credits)
                & (all_outstanding + pending < config.outstanding_bursts)
                & (~lower[c] | lower_room)
            )
            # Only a step for the channel, or an answer, can change this.
            m.d.sync += wants_null[c].eq(
                self.waiting[c]
                & ~self.begun[c]
                & (self.null[c] | self.expired[c])
                & self.quiet[c]
                & self.answer_room
                & ~(step & (null | (self.channel == c)))
            )
        # A burst counts from its choice on, so that the next choice knows of it.
        m.d.comb += [
            pending.eq(read | (step & ~null & ~turn)),
            # Not a demand's: bursts of demands back to back would leave an urgent channel no turn.
            lower_pending.eq(pending & lower.bit_select(self.channel, 1)),
        ]
        m.d.sync += [
            lower.eq(Cat(self.active[c].traffic != TrafficClass.DEMAND for c in channels)),
            lower_room.eq(
                sum((Mux(lower[c], self.live[c], 0) for c in channels), lower_pending)
                < self.lower_credits
            ),
        ]
        m.d.sync += all_outstanding.eq(all_outstanding + self.issue - self.returned)
        m.d.comb += [
            arbiter.wants.eq(wants),
            arbiter.take.eq(~read & ~step),
            self.busy.eq(read | step),
        ]
        chosen = Signal(len(channels))
        chosen_null = Signal(len(channels))
        chosen_turn = Signal(len(channels))
        fresh_now = Signal()
        null_now = Signal()
        m.d.comb += [
            fresh_now.eq((chosen & ~self.begun).any()),
            null_now.eq((chosen & chosen_null).any()),
        ]
        with m.If(read):
            # A request that was chosen as it came in may turn out to move nothing.
            m.d.sync += [
                read.eq(0),
                step.eq(~(fresh_now & ~null_now & self.null.bit_select(self.channel, 1))),
                fresh.eq(fresh_now),
                null.eq(null_now),
                turn.eq((chosen & chosen_turn).any()),
            ]
        with m.Elif(~step):
            m.d.sync += [
                read.eq(wants.any()),
                chosen.eq(arbiter.choice),
                chosen_null.eq(wants_null),
                chosen_turn.eq(wants_turn),
            ]
            number = 0
            for c in channels:
                number |= Mux(arbiter.choice[c], c, 0)
            m.d.sync += self.channel.eq(number)
        with m.Elif(done):
            m.d.sync += step.eq(0)

        # --- the step ---
        channel = self.channel
        settings = Signal(ActiveLayout(config=config))
        place = place_read.data
        first = Signal(TransferLayout(config=config))
        at_read = Signal(at_bits)
        at = Signal(at_bits)
        left = Signal(left_bits)
        entry = Signal(self.entry_bits)
        mask = Signal(8)
        stride = Signal(settings.stride.shape() if not gathers else at_bits)
        this_row_left = Signal(left_bits)
        cut = Signal()
        # Beats that fit before the next multiple of the longest burst, - 1.
        fits = Signal(8)
        rest = Signal(range(-256, config.tile_beats))
        ends = Signal()
        has_more = Signal()
        first_left, row_beats, row_stride = self.first.left, settings.row_left, settings.stride
        rows_follow = ~fresh_now & more.bit_select(channel, 1)
        if gathers:
            first_left = self.first.row.left
            row_beats, row_stride = self._rows_of(row_read.data.part)
            rows_follow = Mux(fresh_now, self.first.after.any(), more.bit_select(channel, 1))
        m.d.comb += [
            settings.eq(self.active[channel]),
            place_read.addr.eq(channel),
            row_read.addr.eq(channel),
            at_read.eq(Mux(fresh_now, self.first.address >> low, place.at)),
        ]
        with m.If(read):
            m.d.sync += [
                first.eq(self.first),
                at.eq(at_read),
                fits.eq(~at_read[:8] & settings.mask),
                left.eq(Mux(fresh_now, first_left, place.left)),
                entry.eq(Mux(fresh_now, self.tile_entry, place.entry)),
                cut.eq(Mux(fresh_now, self.first_aborted, aborted.bit_select(channel, 1))),
                has_more.eq(rows_follow),
                mask.eq(settings.mask),
                stride.eq(row_stride),
                this_row_left.eq(row_beats),
            ]
        m.d.comb += [
            place_write.addr.eq(channel),
            rest.eq(left - fits - 1),
            ends.eq(rest < 0),
            self.pop.eq(done & fresh),
            self.open.eq(done & fresh & ~null),
            self.tile.channel.eq(channel),
            self.tile.tag.eq(first.tag),
            self.tile.slot.eq(first.slot),
            self.tile.tile.eq(first.tile),
            self.tile.address.eq(first.address),
            self.tile.aborted.eq(self.first_aborted),
            self.issue.eq(done & ~null & ~turn),
            self.burst.address.eq(Cat(Const(0, low), at)),
            self.burst.length.eq(Mux(cut, 0, Mux(ends, left, fits))),
            self.burst.last.eq(cut | (ends & ~has_more)),
            self.burst.channel.eq(channel),
            self.burst.entry.eq(entry),
            self.answer.eq(done & null),
            self.answered.channel.eq(channel),
            self.answered.tag.eq(first.tag),
            self.answered.tile.eq(first.tile),
            self.answered.address.eq(first.address),
        ]
        with m.If(self.first_aborted):
            m.d.comb += self.answered.reason.eq(FetchReason.ABORTED)
        with m.Elif(first.refused):
            m.d.comb += self.answered.reason.eq(FetchReason.ADDRESS)
        with m.Elif(self.first_empty):
            m.d.comb += self.answered.reason.eq(FetchReason.OK)
        with m.Else():
            m.d.comb += self.answered.reason.eq(FetchReason.TIMEOUT)

        # A tile of rows has its first one set up like those that follow, in two cycles, unless the
        # configuration tells which they are: then its place came with the request. A row that
        # is not wholly below the last tile of the address space is taken as one past its top; its
        # tile ends with a beat of the row before.
        old_start = Signal(at_bits)
        next_row = Signal(at_bits + 1)
        too_high = Signal()
        row_start = Signal(at_bits)
        row_left = Signal(left_bits)
        row_rest = Signal(left_bits)
        row_after = Signal(range(-config.tile_beats, config.tile_beats))
        rest_before = Mux(fresh, first.left, row_read.data.left)
        m.d.sync += [
            old_start.eq(Mux(fresh, first.address >> low, row_read.data.start)),
            next_row.eq(row_read.data.start + stride),
            row_left.eq(this_row_left),
            row_rest.eq(rest_before),
            row_after.eq(rest_before - this_row_left - 1),
            prepared.eq(step & turn & ~done),
            self.wrap.eq(done & turn & too_high),
            self.wrap_entry.eq(entry),
        ]
        m.d.comb += [
            row_write.addr.eq(channel),
            too_high.eq(~fresh & (next_row[-1] | next_row[left_bits:-1].all())),
            row_start.eq(Mux(fresh | too_high, old_start, next_row[:-1])),
            row_write.data.start.eq(row_start),
            row_write.data.left.eq(row_after),
            row_write.en.eq(done & turn),
            place_write.en.eq(done & ~null),
            place_write.data.entry.eq(entry),
        ]
        with m.If(turn):
            m.d.comb += [
                place_write.data.at.eq(row_start),
                place_write.data.left.eq(Mux(too_high, 0, Mux(row_after < 0, row_rest, row_left))),
            ]
        with m.Else():
            m.d.comb += [
                # All bursts but a tile's last end at a multiple of the longest burst.
                place_write.data.at.eq((at | mask) + 1),
                place_write.data.left.eq(rest),
            ]

        if gathers:
            # The first row is taken to begin where it does, not where the tile does.
            with m.If(fresh):
                m.d.comb += [
                    row_write.data.start.eq((first.address >> low) - first.row.before),
                    row_write.data.left.eq(first.after - 1),
                    row_write.data.part.eq(first.row.part),
                    row_write.en.eq(self.open),
                ]
            with m.Else():
                m.d.comb += row_write.data.part.eq(row_read.data.part)

        kept = Signal(len(channels))
        m.d.comb += kept.eq(self.begun & ~self.drop)
        m.d.sync += self.begun.eq(kept)
        for c in channels:
            hit = self.abort_all | (self.abort & (self.abort_tag == tags[c]))
            with m.If(hit):
                m.d.sync += aborted[c].eq(1)
            with m.If(done & (channel == c)):
                with m.If(turn):
                    m.d.sync += [self.begun[c].eq(1), turning[c].eq(0)]
                    m.d.sync += more[c].eq((row_after >= 0) & ~too_high)
                with m.Elif(~null):
                    m.d.sync += [
                        self.begun[c].eq(~self.burst.last),
                        turning[c].eq(ends & has_more & ~cut),
                    ]
                    with m.If(fresh):
                        m.d.sync += more[c].eq(has_more if gathers else 0)
                with m.If(self.open):
                    m.d.sync += [
                        tags[c].eq(first.tag),
                        aborted[c].eq(
                            self.first_aborted
                            | self.abort_all
                            | (self.abort & (self.abort_tag == first.tag))
                        ),
                    ]
        return m

    def _rows_of(self, part):
        """Beats that a tile may have of a part's row, - 1, and beats from a row to the next."""
        config = self.config
        low = config.data_bytes.bit_length() - 1
        beats = [min(rows.row_bytes >> low, config.tile_beats) - 1 for rows in config.part_rows]
        strides = [rows.row_stride >> low for rows in config.part_rows]
        return Array(beats)[part], Array(strides)[part]
