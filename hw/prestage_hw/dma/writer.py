"""AXI4 write master: beats of tiles to the memory that holds the slots."""

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import FetchReason
from prestage_hw.layouts import RecordLayout

from .axi import BURST_INCR, EDGE_BYTES, AXI4WriteSignature

__all__ = ["ItemLayout", "SlotWriter"]

# Beats on their way from the segments to ``wdata``: more than the path has registers, and twice as
# many as it takes for a beat that was taken to let the next one start.
_WAITING = 8


def _lowest(bits):
    """Number of the lowest bit that is set."""
    result = 0
    for i in reversed(range(len(bits))):
        result = Mux(bits[i], i, result)
    return result


class ItemLayout(data.StructLayout):
    """What the back end has to say in a cycle: a beat, the end of a tile, or both.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "write": unsigned(1),  # There is a beat,
                "slot": unsigned(config.bits("slot")),
                "beat": unsigned(config.bits("beat")),
                "data": unsigned(config.bits("data")),
                "final": unsigned(1),  # and it or nothing is the last of a tile,
                "completion": RecordLayout("Completion", config=config),  # whose channel counts.
            }
        )


class SlotWriter(wiring.Component):
    """Write the beats of tiles to the slots' memory, and let completions wait for its answers.

    AXI4 wants the beats of a burst one after another, but those of different channels come in
    turns. So the beats of each channel are gathered in a *segment*, and leave as a burst once it is
    full or the tile ends. Segments hold ``burst_beats`` beats and begin at multiples of that in
    their tile, so that no burst crosses a 4 KiB edge. Bursts have one ID: they are answered in
    their order.

    A completion leaves after the answers to all bursts before it. Where one of its tile's has an
    error and the tile would have been whole, it has the reason WRITE and the address of the first
    such burst.

    A beat a cycle is sustained where memory takes one and ``outstanding`` bursts span its latency,
    whatever the order of channels. Addresses and data of a burst wait neither for each other's
    ``ready`` nor for answers.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Attributes
    ----------
    burst_beats : :class:`int`
        Beats of the longest burst.
    segments : :class:`int`
        Bursts that are gathered or wait to leave.
    outstanding : :class:`int`
        Bursts, and completions without a beat, that may wait from the last beat to the answer.
    launch_latency : :class:`int`
        Cycles from a segment's last beat being taken to ``awvalid``, nothing else waiting: 5.
    data_latency : :class:`int`
        The same to ``wvalid``: 10.

    Members
    -------
    items : ``In(stream.Signature(ItemLayout(config=config)))``
        Beats and completions, those of a channel in their order.
    slot_base : ``In(address bits)``
        Address of slot 0, a multiple of 4096. May change while nothing is inside.
    bus : ``Out(AXI4WriteSignature(...))``
        The slots' memory.
    completions : ``Out(stream.Signature(RecordLayout("Completion")))``
        Completions in the order in which they came.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    outstanding = 16
    launch_latency = 5
    data_latency = 10

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self.burst_beats = min(16, config.tile_beats, EDGE_BYTES // config.data_bytes)
        # One for each channel, and two to leave while others are gathered.
        self.segments = 1 << (config.dma_channels + 1).bit_length()
        super().__init__(
            {
                "items": In(stream.Signature(ItemLayout(config=config))),
                "slot_base": In(config.bits("address")),
                "bus": Out(
                    AXI4WriteSignature(
                        address_bits=config.address_bits, data_bits=config.bits("data")
                    )
                ),
                "completions": Out(stream.Signature(RecordLayout("Completion", config=config))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        bus = self.bus
        channels = config.dma_channels
        record = RecordLayout("Completion", config=config)
        within_bits = (self.burst_beats - 1).bit_length()
        segment_bits = (self.segments - 1).bit_length()
        place_bits = config.bits("beat") - within_bits  # Number of a burst in its slot.
        depth = self.outstanding

        def small(name, shape, depth):
            """A memory with one port to write and one to read in the same cycle."""
            m.submodules[name] = ram = memory.Memory(shape=shape, depth=depth, init=[])
            return ram.write_port(), ram.read_port(domain="comb")

        # --- segments: gathered from beats ---
        # Only whole segments are read, so that synthesis need not care for rows that are written.
        m.submodules.rows = rows = memory.Memory(
            shape=config.bits("data"),
            depth=self.segments * self.burst_beats,
            init=[],
            attrs={"no_rw_check": 1},
        )
        rows_write, rows_read = rows.write_port(), rows.read_port()
        segment_layout = data.StructLayout(
            {
                "slot": config.bits("slot"),
                "place": place_bits,
                "segment": segment_bits,
                "length": within_bits,  # Beats - 1.
            }
        )
        gathered_write, gathered_read = small("gathered", segment_layout, channels)
        item = self.items.payload
        channel = item.completion.channel
        taken = Signal()
        opened = Signal(channels)  # Channels that have begun a segment.
        is_open = Signal()
        begins = Signal()
        closes = Signal()
        current = Signal(segment_layout)
        used = Signal(self.segments)
        free = Signal()  # A segment is free: this one.
        free_segment = Signal(segment_bits)
        room = Signal()
        level = Signal(range(depth + 1))  # Entries from here to their answer.
        freed = Signal(self.segments)
        vacant = Signal(self.segments)
        m.d.comb += [
            self.items.ready.eq(free & room),
            taken.eq(self.items.valid & self.items.ready),
            is_open.eq(opened.bit_select(channel, 1)),
            begins.eq(taken & item.write & ~is_open),
            closes.eq(taken & (item.final | item.beat[:within_bits].all())),
            gathered_read.addr.eq(channel),
            gathered_write.addr.eq(channel),
            gathered_write.data.eq(current),
            gathered_write.en.eq(taken & item.write),
            current.eq(gathered_read.data),
            vacant.eq(~used & ~Mux(free, 1 << free_segment, 0)),
        ]
        with m.If(item.write):
            m.d.comb += [
                current.slot.eq(item.slot),
                current.place.eq(item.beat[within_bits:]),
                current.length.eq(item.beat[:within_bits]),
            ]
            with m.If(~is_open):
                m.d.comb += current.segment.eq(free_segment)
        m.d.sync += [
            used.eq((used | Mux(begins, 1 << free_segment, 0)) & ~freed),
            rows_write.addr.eq(Cat(item.beat[:within_bits], current.segment)),
            rows_write.data.eq(item.data),
            rows_write.en.eq(taken & item.write),
        ]
        # The next one is looked for ahead of time.
        with m.If(begins | ~free):
            m.d.sync += [free.eq(vacant.any()), free_segment.eq(_lowest(vacant))]
        for c in range(channels):
            with m.If(taken & (channel == c)):
                m.d.sync += opened[c].eq((opened[c] | item.write) & ~closes)

        # --- addresses: three registers that never wait ---
        entry_layout = data.StructLayout(
            {
                "burst": 1,
                "segment": segment_bits,
                "length": within_bits,
                "final": 1,
                "completion": record,
            }
        )
        entry, later, latest = (Signal(entry_layout, name=n) for n in ("entry", "later", "latest"))
        entry_valid, later_valid, latest_valid = (
            Signal(name=f"{n}_valid") for n in ("entry", "later", "latest")
        )
        slot, place, later_place = (
            Signal(config.bits("slot")),
            Signal(place_bits),
            Signal(place_bits),
        )
        offset = Signal(range(config.slots * config.expert_bytes))
        address = Signal(config.address_bits)
        m.d.sync += [
            entry_valid.eq(closes),
            entry.burst.eq(item.write | is_open),
            entry.segment.eq(current.segment),
            entry.length.eq(current.length),
            entry.final.eq(item.final),
            entry.completion.eq(item.completion),
            slot.eq(current.slot),
            place.eq(current.place),
            later_valid.eq(entry_valid),
            later.eq(entry),
            offset.eq(slot * config.expert_bytes),
            later_place.eq(place),
            latest_valid.eq(later_valid),
            latest.eq(later),
            address.eq(offset + later_place * (self.burst_beats * config.data_bytes)),
        ]

        # --- entries: one after the other asked for, then answered ---
        asks_write, asks_read = small(
            "asks",
            data.StructLayout(
                {
                    "burst": 1,
                    "segment": segment_bits,
                    "length": within_bits,
                    "address": config.address_bits,
                }
            ),
            depth,
        )
        answers_write, answers_read = small(
            "answers",
            data.StructLayout(
                {"burst": 1, "address": config.address_bits, "final": 1, "completion": record}
            ),
            depth,
        )
        write_at, ask_at, answer_at = (
            Signal(range(depth), name=f"{n}_at") for n in ("write", "ask", "answer")
        )
        unasked, unanswered = Signal(range(depth + 1)), Signal(range(depth + 1))
        asks = Signal()
        answered = Signal()
        m.d.comb += [
            asks_write.addr.eq(write_at),
            asks_write.data.burst.eq(latest.burst),
            asks_write.data.segment.eq(latest.segment),
            asks_write.data.length.eq(latest.length),
            asks_write.data.address.eq(self.slot_base + address),
            asks_write.en.eq(latest_valid),
            answers_write.addr.eq(write_at),
            answers_write.data.burst.eq(latest.burst),
            answers_write.data.address.eq(asks_write.data.address),
            answers_write.data.final.eq(latest.final),
            answers_write.data.completion.eq(latest.completion),
            answers_write.en.eq(latest_valid),
            asks_read.addr.eq(ask_at),
            answers_read.addr.eq(answer_at),
        ]
        m.d.sync += [
            write_at.eq(write_at + latest_valid),
            ask_at.eq(ask_at + asks),
            answer_at.eq(answer_at + answered),
            unasked.eq(unasked + latest_valid - asks),
            unanswered.eq(unanswered + asks - answered),
            level.eq(level + closes - answered),
            # From a register: what may come until it is seen has a place.
            room.eq(level <= depth - 3),
        ]

        # --- bursts: the address leaves at once, the beats after those of the burst before ---
        class Burst:
            def __init__(self, name):
                self.valid = Signal(name=f"{name}_valid")
                self.segment = Signal(segment_bits, name=f"{name}_segment")
                self.length = Signal(within_bits, name=f"{name}_length")

        now, following = Burst("now"), Burst("following")
        ask = asks_read.data
        m.d.comb += [
            asks.eq(
                (unasked != 0) & (~ask.burst | (~following.valid & (~bus.awvalid | bus.awready)))
            ),
            bus.awsize.eq(config.data_bytes.bit_length() - 1),
            bus.awburst.eq(BURST_INCR),
        ]
        with m.If(bus.awready):
            m.d.sync += bus.awvalid.eq(0)
        with m.If(asks & ask.burst):
            m.d.sync += [
                bus.awvalid.eq(1),
                bus.awaddr.eq(ask.address),
                bus.awlen.eq(ask.length),
            ]

        row = Signal(within_bits)
        steps = Signal()
        last = Signal()
        unread = Signal(range(_WAITING + 1))
        m.d.comb += [
            steps.eq(now.valid & ~unread[-1]),
            last.eq(row == now.length),
            rows_read.addr.eq(Cat(row, now.segment)),
        ]
        m.d.sync += [
            unread.eq(unread + steps - (bus.wvalid & bus.wready)),
            freed.eq(Mux(steps & last, 1 << now.segment, 0)),
        ]
        with m.If(steps):
            m.d.sync += row.eq(Mux(last, 0, row + 1))
        with m.If(~now.valid | (steps & last)):
            m.d.sync += [
                now.valid.eq(following.valid),
                now.segment.eq(following.segment),
                now.length.eq(following.length),
                following.valid.eq(0),
            ]
        with m.If(asks & ask.burst):
            m.d.sync += [
                following.valid.eq(1),
                following.segment.eq(ask.segment),
                following.length.eq(ask.length),
            ]

        # Block RAM, its register, then a queue: nothing before that ever waits.
        read_valid, read_last = Signal(), Signal()
        word_valid, word_last = Signal(), Signal()
        word = Signal(config.bits("data"), reset_less=True)
        beats_write, beats_read = small(
            "beats", data.StructLayout({"data": config.bits("data"), "last": 1}), _WAITING
        )
        waiting = Signal(range(_WAITING + 1))
        leaves = Signal()
        m.d.comb += [
            leaves.eq((waiting != 0) & (~bus.wvalid | bus.wready)),
            beats_write.data.data.eq(word),
            beats_write.data.last.eq(word_last),
            beats_write.en.eq(word_valid),
            bus.wstrb.eq((1 << config.data_bytes) - 1),
        ]
        m.d.sync += [
            read_valid.eq(steps),
            read_last.eq(last),
            word_valid.eq(read_valid),
            word_last.eq(read_last),
            word.eq(rows_read.data),
            waiting.eq(waiting + word_valid - leaves),
            beats_write.addr.eq(beats_write.addr + word_valid),
            beats_read.addr.eq(beats_read.addr + leaves),
        ]
        with m.If(~bus.wvalid | bus.wready):
            m.d.sync += [
                bus.wvalid.eq(waiting != 0),
                bus.wdata.eq(beats_read.data.data),
                bus.wlast.eq(beats_read.data.last),
            ]

        # --- answers, in the order of the bursts ---
        m.submodules.errors = errors = fifo.SyncFIFOBuffered(width=1, depth=depth)
        owed = Signal(range(depth + 1))  # Bursts without an answer.
        head = answers_read.data
        failed = Signal(channels)
        fails = Signal()
        was_failed = Signal()
        failures_write, failures_read = small("failures", unsigned(config.address_bits), channels)
        place_left = Signal()
        m.d.comb += [
            # There is a place for the answer to every burst.
            bus.bready.eq(1),
            errors.w_data.eq(bus.bresp[1]),
            errors.w_en.eq(bus.bvalid & (owed != 0)),
            place_left.eq(~self.completions.valid | self.completions.ready),
            answered.eq(
                (unanswered != 0) & (~head.burst | errors.r_rdy) & (~head.final | place_left)
            ),
            errors.r_en.eq(answered & head.burst),
            fails.eq(head.burst & errors.r_data),
            was_failed.eq(failed.bit_select(head.completion.channel, 1)),
            failures_read.addr.eq(head.completion.channel),
            failures_write.addr.eq(head.completion.channel),
            failures_write.data.eq(head.address),
            failures_write.en.eq(answered & fails & ~was_failed),
        ]
        m.d.sync += owed.eq(owed + (asks & ask.burst) - errors.w_en)
        for c in range(channels):
            with m.If(answered & (head.completion.channel == c)):
                m.d.sync += failed[c].eq((failed[c] | fails) & ~head.final)
        with m.If(self.completions.ready):
            m.d.sync += self.completions.valid.eq(0)
        with m.If(answered & head.final):
            m.d.sync += [self.completions.valid.eq(1), self.completions.payload.eq(head.completion)]
            with m.If((was_failed | fails) & ~head.completion.failed):
                m.d.sync += [
                    self.completions.payload.failed.eq(1),
                    self.completions.payload.reason.eq(FetchReason.WRITE),
                    self.completions.payload.address.eq(
                        Mux(was_failed, failures_read.data, head.address)
                    ),
                ]
        return m
