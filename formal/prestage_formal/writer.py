"""The DMA engine's AXI4 write master: the rules of its channels, whatever memory does."""

from amaranth import Array, Cat, Elaboratable, Module, Mux, Signal
from amaranth.asserts import AnySeq
from amaranth.hdl import Assert, Assume, Cover

from .harness import Held, Inside, drive_freely, lemma
from .instances import writer_device

__all__ = ["WriteChannels"]


class WriteChannels(Elaboratable):
    """Any beats of any channels in their order, any answers, asked for or not.

    One burst, whichever the solver likes, is followed from its address to its last beat.
    """

    def elaborate(self, platform):
        from prestage_hw.dma.writer import SlotWriter

        m = Module()
        config = writer_device()
        block = SlotWriter(config=config)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        self._assume(m, block, config)
        bus, local = block.bus, inside.local
        beat_bytes, longest = config.data_bytes, block.burst_beats
        low = beat_bytes.bit_length() - 1

        address = Cat(bus.awaddr, bus.awlen, bus.awsize, bus.awburst, bus.awid)
        asked = Held(m, bus.awvalid, bus.awready, address, name="address")
        # The beat's data is a register like all the rest; leaving it out keeps the proof small.
        sent = Held(m, bus.wvalid, bus.wready, Cat(bus.wlast, bus.wstrb), name="beat")
        started = Signal()
        m.d.sync += started.eq(1)
        announces = Signal()  # An address is offered for the first time.
        leaves = Signal()
        m.d.comb += [
            announces.eq(bus.awvalid & ~asked.waited),
            leaves.eq(bus.wvalid & bus.wready),
        ]

        # Beats that were announced and have not left, before this cycle and with what is new.
        before, announced = Signal(8), Signal(8)
        m.d.comb += announced.eq(before + Mux(announces, bus.awlen + 1, 0))
        m.d.sync += before.eq(announced - leaves)
        # The burst that is followed: beats that leave before its own, and its own that are left.
        follows, ahead, left = Signal(), Signal(8), Signal(8)
        ahead_before, left_before, follows_before = Signal(8), Signal(8), Signal()
        m.d.comb += [follows.eq(follows_before), ahead.eq(ahead_before), left.eq(left_before)]
        with m.If(announces & ~follows_before & AnySeq(1)):
            m.d.comb += [follows.eq(1), ahead.eq(before), left.eq(bus.awlen + 1)]
        m.d.sync += [follows_before.eq(follows), ahead_before.eq(ahead), left_before.eq(left)]
        with m.If(follows & leaves):
            with m.If(ahead != 0):
                m.d.sync += ahead_before.eq(ahead - 1)
            with m.Else():
                m.d.sync += [left_before.eq(left - 1), follows_before.eq(left != 1)]
        mine = follows & bus.wvalid & (ahead == 0)

        place = bus.awaddr[low:12]
        edge = 4096 // beat_bytes
        m.d.comb += [
            Assert(started | (~bus.awvalid & ~bus.wvalid)),
            Assert(asked.kept),
            Assert(sent.kept),
            # Whole beats, within 4 KiB, no longer than 16 beats.
            Assert(~bus.awvalid | (bus.awaddr[:low] == 0)),
            Assert(~bus.awvalid | (place + bus.awlen < edge)),
            Assert(~bus.awvalid | (bus.awlen < longest)),
            Assert(bus.awsize == low),
            Assert(bus.awburst == 1),
            Assert(bus.awid == 0),
            # All bytes of as many beats as were announced, the last one marked.
            Assert(bus.wstrb == (1 << beat_bytes) - 1),
            Assert(~bus.wvalid | (announced != 0)),
            Assert(~mine | (bus.wlast == (left == 1))),
            # An answer is taken at once, so that memory may answer in any cycle.
            Assert(bus.bready),
            Cover(mine & leaves & (left == 3) & bus.awvalid),
            Cover(sent.waited & mine & bus.wlast & leaves & announces),
            Cover(bus.awvalid & (bus.awlen == 3) & (ahead == 2)),
        ]

        # --- lemmas ---
        now, following = local("now"), local("following")
        unread, waiting, row = local("unread"), local("waiting"), local("row")
        read_valid, word_valid = local("read_valid"), local("word_valid")
        beats = inside.rows("beats")
        beats_read, beats_write = local("beats_read"), local("beats_write")
        now_left = Mux(now.valid, now.length - row + 1, 0)
        following_left = Mux(following.valid, following.length + 1, 0)
        m.d.comb += [
            lemma(unread == read_valid + word_valid + waiting + bus.wvalid),
            lemma(unread <= 8),
            lemma(waiting <= 8),
            lemma((beats_read.addr + waiting)[:3] == beats_write.addr),
            lemma(row <= now.length),
            lemma(now.valid | (row == 0)),
            lemma(announced == unread + now_left + following_left),
            lemma(~follows | ((left != 0) & (left <= longest) & (ahead + left <= announced))),
        ]
        # Where its last beat is, or will be.
        last = Signal(8)
        pipeline_end = Signal(8)
        m.d.comb += [last.eq(ahead + left - 1), pipeline_end.eq(unread + now_left)]
        in_now = now.valid & (last + 1 == pipeline_end)
        in_following = (
            following.valid & (ahead == pipeline_end) & (last + 1 == pipeline_end + following_left)
        )
        m.d.comb += lemma(~follows | (last < unread) | in_now | in_following)
        flags = Array(beat.last for beat in beats)
        stages = [
            (bus.wvalid, 0, bus.wlast),
            *(
                (
                    waiting > i,
                    bus.wvalid + i,
                    flags[(beats_read.addr + i)[:3]],
                )
                for i in range(8)
            ),
            (word_valid, bus.wvalid + waiting, local("word_last")),
            (read_valid, bus.wvalid + waiting + word_valid, local("read_last")),
        ]
        for number, (valid, position, is_last) in enumerate(stages):
            at = Signal(8, name=f"position_{number}")
            m.d.comb += [
                at.eq(position),
                lemma(
                    ~(follows & valid & (at >= ahead) & (at <= last)) | (is_last == (at == last))
                ),
            ]
        # Addresses: every burst begins at a multiple of the longest in the slots.
        size = beat_bytes * longest
        unasked, ask_at = local("unasked"), local("ask_at")
        burst = 1 << (size.bit_length() - 1)
        aligned = burst - 1
        depth = block.outstanding
        level, unanswered = local("level"), local("unanswered")
        pipe = [local(f"{name}_valid") for name in ("entry", "later", "latest")]
        m.d.comb += [
            lemma(level == sum(pipe) + unasked + unanswered),
            lemma(level <= depth),
            lemma(~(local("room") & local("closes")) | (level < depth)),
            lemma((ask_at + unasked)[:4] == local("write_at")),
            lemma((local("offset") & aligned) == 0),
            lemma((local("address") & aligned) == 0),
            lemma(~bus.awvalid | ((bus.awaddr & aligned) == 0)),
        ]
        level_before = Signal(8)
        m.d.sync += level_before.eq(level)
        m.d.comb += [
            lemma(~local("room") | (level_before <= depth - 3) | ~started),
            lemma(level <= level_before + 1),
            lemma(started | (level == 0)),
        ]
        for i, ask in enumerate(inside.rows("asks")):
            valid = Signal(name=f"asked_{i}")
            m.d.comb += [
                valid.eq((i - ask_at)[:4] < unasked),
                lemma(~valid | ((ask.address & aligned) == 0)),
            ]
        return m

    def _assume(self, m, block, config):
        """Beats of a channel come in the order of their tile, and its last one ends it."""
        item = block.items.payload
        taken = block.items.valid & block.items.ready
        tile_bits = (config.tile_beats - 1).bit_length()
        channel = item.completion.channel
        position, slot, tile = Signal(tile_bits), Signal.like(item.slot), Signal(8)
        here = []
        for c in range(config.dma_channels):
            registers = [
                Signal(tile_bits, name=f"position_of_{c}"),
                Signal(len(item.slot), name=f"slot_of_{c}"),
                Signal(8, name=f"tile_of_{c}"),
            ]
            here.append(registers)
            with m.If(taken & (channel == c)):
                m.d.sync += [registers[1].eq(item.slot), registers[2].eq(item.beat[tile_bits:])]
                m.d.sync += registers[0].eq(Mux(item.final, 0, registers[0] + item.write))
        m.d.comb += [
            signal.eq(Array(registers[i] for registers in here)[channel])
            for i, signal in enumerate((position, slot, tile))
        ]
        begun = position != 0
        m.d.comb += [
            Assume(channel < config.dma_channels),
            Assume(~block.items.valid | item.write | item.final),
            Assume(~item.write | (item.beat[:tile_bits] == position)),
            Assume(~(item.write & begun) | (item.slot == slot)),
            Assume(~(item.write & begun) | (item.beat[tile_bits:] == tile)),
            Assume(~item.write | ~item.beat[:tile_bits].all() | item.final),
            Assume(block.slot_base[:12] == 0),
        ]
