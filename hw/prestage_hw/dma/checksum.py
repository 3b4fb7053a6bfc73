"""Checksums of experts, computed from their beats as they pass."""

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.crc import inverted, power, remainder, times_x
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import FetchReason
from prestage_hw.layouts import RecordLayout

from .writer import SlotWriter

__all__ = ["Checksums", "TapLayout", "TileSums"]


class TapLayout(data.StructLayout):
    """What the back end does in a cycle: a beat leaves, a tile ends, or both.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "beat": unsigned(1),
                "final": unsigned(1),
                "channel": unsigned(config.bits("channel")),
                "data": unsigned(config.bits("data")),
            }
        )


def _linear(outputs, width):
    """For each bit of a result which of ``width`` input bits it sums up.

    ``outputs[i]`` is the result for input bit i alone.
    """
    return [[i for i in range(width) if outputs[i] >> bit & 1] for bit in range(32)]


def _apply(rows, value):
    """Result of a linear function."""
    return Cat(Cat(value[i] for i in row).xor() if row else Const(0, 1) for row in rows)


class TileSums(wiring.Component):
    """Remainders of tiles, from beats that come in any order of channels.

    A beat passes through three registers: the sums within its words, their sum, and the remainder
    of its channel's tile so far. One beat a cycle.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    tap : ``In(TapLayout(config=config))``
        Beats, and ends of tiles: at most ``depth`` without their sum taken.
    sums : ``Out(stream.Signature(32))``
        A remainder for each end of a tile, in their order.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        tiles = max(4, 1 << (config.outstanding_bursts - 1).bit_length())
        self.depth = max(tiles, SlotWriter.outstanding) + 4
        super().__init__({"tap": In(TapLayout(config=config)), "sums": Out(stream.Signature(32))})

    def elaborate(self, platform):
        m = Module()
        config = self.config
        size = config.data_bytes
        words = size // 4

        # What follows a word within its beat moves its sum on.
        def word_rows(word):
            after = bytes(size - 4 * word - 4)
            return _linear(
                [remainder((1 << i).to_bytes(4, "little") + after) for i in range(32)], 32
            )

        step_rows = _linear([remainder(bytes(size), 1 << i) for i in range(32)], 32)

        tap = Signal(TapLayout(config=config))
        first = [Signal(32, name=f"word_{word}") for word in range(words)]
        m.d.sync += tap.eq(self.tap)
        stages = data.StructLayout({"beat": 1, "final": 1, "channel": config.bits("channel")})
        first_tap = Signal(stages)
        second_tap = Signal(stages)
        second = Signal(32)
        for word, total in enumerate(first):
            m.d.sync += total.eq(_apply(word_rows(word), tap.data[32 * word : 32 * word + 32]))
        for name in ("beat", "final", "channel"):
            m.d.sync += [first_tap[name].eq(tap[name]), second_tap[name].eq(first_tap[name])]
        total = first[0]
        for each in first[1:]:
            total = total ^ each
        m.d.sync += second.eq(total)

        # Channels within a tile, and their remainders.
        m.submodules.states = states = memory.Memory(
            shape=unsigned(32), depth=config.dma_channels, init=[]
        )
        write, read = states.write_port(), states.read_port(domain="comb")
        within = Signal(config.dma_channels)
        state, following = Signal(32), Signal(32)
        m.submodules.ended = ended = fifo.SyncFIFOBuffered(width=32, depth=self.depth)
        m.d.comb += [
            read.addr.eq(second_tap.channel),
            state.eq(Mux(within.bit_select(second_tap.channel, 1), read.data, 0)),
            following.eq(Mux(second_tap.beat, _apply(step_rows, state) ^ second, state)),
            write.addr.eq(second_tap.channel),
            write.data.eq(following),
            write.en.eq(second_tap.beat),
        ]
        for c in range(config.dma_channels):
            with m.If((second_tap.beat | second_tap.final) & (second_tap.channel == c)):
                m.d.sync += within[c].eq(~second_tap.final)
        m.d.sync += [ended.w_en.eq(second_tap.final), ended.w_data.eq(following)]
        m.d.comb += [
            self.sums.payload.eq(ended.r_data),
            self.sums.valid.eq(ended.r_rdy),
            ended.r_en.eq(self.sums.ready),
        ]
        return m


class Checksums(wiring.Component):
    """Compare each expert that has arrived with its checksum.

    The checksum is the CRC-32 of the expert's bytes in their order in the slot, as
    :func:`zlib.crc32` computes it. Tiles of an expert may come in any order and over several
    channels: the remainder of each is multiplied by x to the power of the bits after it in the
    expert, bit by bit, and added up. The last tile's completion then fails with the reason CRC and
    the expert's address, unless the sum is that of the table. An expert without an entry in the
    table is not checked.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Attributes
    ----------
    latency : :class:`int`
        Cycles by which it holds up the completion of a tile that is whole, and cycles from one such
        completion to the next: no more than a tile of 8 beats or more takes. An expert's last tile
        takes 3 more.
    fail_latency : :class:`int`
        The same for one that has failed: 2.

    Members
    -------
    tap : ``In(TapLayout(config=config))``
        As of :class:`TileSums`.
    ended : ``In(stream.Signature(RecordLayout("Completion")))``
        Completions of the DMA engine.
    completions : ``Out(stream.Signature(RecordLayout("Completion")))``
        The same, of experts with a wrong sum as failed.
    start, start_tag, start_number, start_address, start_last_tile : ``In``
        Strobe: the fetch of the expert with this number begins with this tag, before its first
        tile; address of its first byte; number of its last tile, only where experts differ in size.
    requests : ``In(stream.Signature(RecordLayout("TableRequest")))``
        Accesses to the table while nothing is in flight. A word is a checksum; a write makes the
        expert be checked, one that is not reads as 0.
    values : ``Out(stream.Signature(32))``
        One value for each read.
    clear : ``In(1)``
        Strobe: no expert is checked any more. Takes as many cycles as there are experts, like the
        reset.
    idle : ``Out(1)``
        No clearing and no completion is in the block.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    fail_latency = 2

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        #: Bits that are multiplied in a cycle.
        self.step = next(s for s in (1, 2, 4, 8) if s == 8 or 32 // s + 4 <= config.tile_beats)
        self.latency = 32 // self.step + 4
        record = stream.Signature(RecordLayout("Completion", config=config))
        numbers = range(config.model.layers * config.model.experts)
        super().__init__(
            {
                "tap": In(TapLayout(config=config)),
                "ended": In(record),
                "completions": Out(record),
                "start": In(1),
                "start_tag": In(config.bits("tag")),
                "start_number": In(numbers),
                "start_address": In(config.bits("address")),
                **({"start_last_tile": In(config.bits("tile"))} if config.layer_bytes else {}),
                "requests": In(stream.Signature(RecordLayout("TableRequest", config=config))),
                "values": Out(stream.Signature(32)),
                "clear": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        experts = config.model.layers * config.model.experts
        m.submodules.tiles = tiles = TileSums(config=config)
        m.d.comb += tiles.tap.eq(self.tap)

        # --- table ---
        # What is read in the cycle of its write is not looked at.
        m.submodules.table = table = memory.Memory(
            shape=data.StructLayout({"sum": 32, "loaded": 1}),
            depth=experts,
            init=[],
            attrs={"no_rw_check": 1},
        )
        table_read, table_write = table.read_port(), table.write_port()
        entry = Signal(table_read.data.shape(), reset_less=True)
        clearing = Signal(init=1)
        row = Signal(range(experts))
        looked_up = Signal(range(experts))
        request = self.requests.payload
        reading = Signal(3)  # A read is on its way through block RAM and register.
        m.d.sync += entry.eq(table_read.data)
        m.d.comb += [
            self.requests.ready.eq(~clearing & ~reading.any() & ~self.values.valid),
            table_read.addr.eq(
                Mux(self.requests.valid & self.requests.ready, request.word, looked_up)
            ),
            table_write.addr.eq(Mux(clearing, row, request.word)),
            table_write.data.sum.eq(Mux(clearing, 0, request.value)),
            table_write.data.loaded.eq(~clearing),
            table_write.en.eq(
                clearing
                | (
                    self.requests.valid
                    & self.requests.ready
                    & request.write
                    & (request.word < experts)
                )
            ),
        ]
        beyond = Signal()
        with m.If(self.requests.valid & self.requests.ready & ~request.write):
            m.d.sync += [reading.eq(1), beyond.eq(request.word >= experts)]
        with m.Else():
            m.d.sync += reading.eq((reading << 1)[:3])
        with m.If(self.values.ready):
            m.d.sync += self.values.valid.eq(0)
        with m.If(reading[1]):
            m.d.sync += [
                self.values.valid.eq(1),
                self.values.payload.eq(Mux(entry.loaded & ~beyond, entry.sum, 0)),
            ]
        with m.If(clearing):
            m.d.sync += row.eq(row + 1)
            with m.If(row == experts - 1):
                m.d.sync += [clearing.eq(0), row.eq(0)]
        with m.If(self.clear):
            m.d.sync += [clearing.eq(1), row.eq(0)]

        # --- what each fetch is about, and what its tiles add up to ---
        def small(name, shape):
            """A memory with one port to write and one to read in the same cycle."""
            m.submodules[name] = ram = memory.Memory(shape=shape, depth=config.inflight, init=[])
            return ram.write_port(), ram.read_port(domain="comb")

        about_write, about_read = small(
            "about",
            data.StructLayout({"number": len(self.start_number), "address": config.address_bits}),
        )
        count_shape = unsigned(config.tiles.bit_length())
        total_write, total_read = small(
            "totals", data.StructLayout({"sum": 32, "tiles": count_shape})
        )
        begun = Signal(config.inflight)
        tag = Signal(config.bits("tag"))
        m.d.comb += [
            about_write.addr.eq(self.start_tag),
            about_write.data.number.eq(self.start_number),
            about_write.data.address.eq(self.start_address),
            about_write.en.eq(self.start),
            about_read.addr.eq(tag),
            total_read.addr.eq(tag),
            total_write.addr.eq(tag),
        ]

        # --- x to the power of the bits after a tile ---
        after = [
            power(8 * (config.expert_bytes - (tile + 1) * config.tile_bytes))
            for tile in range(config.tiles)
        ]
        m.submodules.factors = factors = memory.Memory(
            shape=unsigned(32), depth=config.tiles, init=after
        )
        factor_read = factors.read_port()
        whole, ending = config.tiles, inverted(config.expert_bytes)
        place = self.ended.payload.tile
        if config.layer_bytes:
            m.submodules.lasts = lasts = memory.Memory(
                shape=unsigned(config.bits("tile")), depth=config.inflight, init=[]
            )
            last_write = lasts.write_port()
            last_ended, last = lasts.read_port(domain="comb"), lasts.read_port(domain="comb")
            m.d.comb += [
                last_write.addr.eq(self.start_tag),
                last_write.data.eq(self.start_last_tile),
                last_write.en.eq(self.start),
                last_ended.addr.eq(self.ended.payload.tag),
                last.addr.eq(tag),
            ]
            # Each expert's last tile has nothing behind it, as the last one of the largest.
            place = place + (config.tiles - 1 - last_ended.data)
            whole, ending = last.data + 1, Signal(32)
            # Known long before the expert's last tile has been multiplied.
            for each in sorted(set(config.layer_tiles)):
                with m.If(last.data == each - 1):
                    m.d.sync += ending.eq(inverted(each * config.tile_bytes))
        m.d.comb += factor_read.addr.eq(place)

        # --- one completion after the other ---
        completion = Signal(self.completions.payload.shape())
        left = Signal(32)  # Bits of the tile's remainder that were not multiplied, highest first.
        factor = Signal(32)  # What the highest of them stands for.
        product = Signal(32)
        steps = Signal(range(32 // self.step))
        total, count = Signal(32), Signal(count_shape)
        wrong = Signal()
        sums_product, sums_factor = product, factor
        for i in range(self.step):
            sums_product = sums_product ^ Mux(left[31 - i], sums_factor, 0)
            sums_factor = (sums_factor >> 1)[:32] ^ Mux(sums_factor[0], times_x(1), 0)
        is_begun = Signal()
        m.d.comb += [
            tag.eq(completion.tag),
            is_begun.eq(begun.bit_select(tag, 1)),
            total.eq(product ^ Mux(is_begun, total_read.data.sum, 0)),
            count.eq(Mux(is_begun, total_read.data.tiles, 0) + 1),
            total_write.data.sum.eq(total),
            total_write.data.tiles.eq(count),
        ]
        with m.If(self.completions.ready):
            m.d.sync += self.completions.valid.eq(0)
        added = Signal()
        leaves = Signal()
        m.d.comb += leaves.eq(~self.completions.valid | self.completions.ready)
        with m.FSM() as fsm:
            with m.State("Idle"):
                m.d.comb += [
                    self.ended.ready.eq(tiles.sums.valid & leaves),
                    tiles.sums.ready.eq(self.ended.valid & leaves),
                ]
                m.d.sync += [
                    completion.eq(self.ended.payload),
                    left.eq(tiles.sums.payload),
                    product.eq(0),
                    wrong.eq(0),
                    steps.eq(0),
                ]
                with m.If(self.ended.valid & self.ended.ready):
                    m.next = "Read"
                    with m.If(self.ended.payload.failed):
                        m.next = "Tell"
            with m.State("Read"):
                m.d.sync += factor.eq(factor_read.data)
                m.next = "Multiply"
            with m.State("Multiply"):
                m.d.sync += [
                    product.eq(sums_product),
                    factor.eq(sums_factor),
                    left.eq(left << self.step),
                    steps.eq(steps + 1),
                ]
                with m.If(steps == 32 // self.step - 1):
                    m.next = "Add"
            with m.State("Add"):
                m.d.comb += [total_write.en.eq(1), added.eq(1)]
                m.d.sync += [product.eq(total), looked_up.eq(about_read.data.number)]
                m.next = "Tell"
                with m.If(count == whole):
                    m.next = "Look up"
            with m.State("Look up"):
                m.next = "Wait"
            with m.State("Wait"):
                m.d.sync += product.eq(product ^ ending)
                m.next = "Compare"
            with m.State("Compare"):
                m.d.sync += wrong.eq(entry.loaded & ~clearing & (entry.sum != product))
                m.next = "Tell"
            with m.State("Tell"):
                m.d.sync += [
                    self.completions.valid.eq(1),
                    self.completions.payload.eq(completion),
                ]
                with m.If(wrong):
                    m.d.sync += [
                        self.completions.payload.failed.eq(1),
                        self.completions.payload.reason.eq(FetchReason.CRC),
                        self.completions.payload.address.eq(about_read.data.address),
                    ]
                m.next = "Idle"
        for i in range(config.inflight):
            with m.If(self.start & (self.start_tag == i)):
                m.d.sync += begun[i].eq(0)
            with m.Elif(added & (tag == i)):
                m.d.sync += begun[i].eq(1)
        m.d.comb += self.idle.eq(
            ~clearing
            & fsm.ongoing("Idle")
            & ~self.ended.valid
            & ~self.completions.valid
            & ~reading.any()
        )
        return m
