"""The DMA engine's queues of requests: first in, first out, and what they say of each request."""

from amaranth import Array, Cat, Elaboratable, Module, Mux, Signal
from amaranth.asserts import AnyConst, AnySeq
from amaranth.hdl import Assert, Assume, Cover

from .harness import Inside, drive_freely, lemma
from .instances import dma_device

__all__ = ["RequestQueues"]


class RequestQueues(Elaboratable):
    """One request of one channel, whichever the solver likes, is followed through its queue."""

    def elaborate(self, platform):
        from prestage_hw.dma.frontend import FrontEnd

        m = Module()
        config = dma_device()
        block = FrontEnd(config=config)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        local, channels, depth = inside.local, config.dma_channels, config.dma_queue_depth
        fetch = block.fetches.payload
        came = block.fetches.valid & block.fetches.ready
        levels, incoming_to = Array(local("levels")), local("incoming_to")
        # Only a request that is in its queue is taken out.
        m.d.comb += [
            Assume(~block.pop | (levels[block.channel] != 0)),
            Assume(~block.fetches.valid | (fetch.channel < channels)),
        ]
        counts = [Signal(4, name=f"count_{c}") for c in range(channels)]
        for c in range(channels):
            m.d.sync += counts[c].eq(
                counts[c] + (came & (fetch.channel == c)) - (block.pop & (block.channel == c))
            )
            m.d.comb += [
                Assert(counts[c] <= depth),
                Assert(block.waiting[c] == (counts[c] != 0)),
                Assert(block.room[c] == (counts[c] != depth)),
                lemma(counts[c] == levels[c] + incoming_to[c]),
                lemma(inside.signal(f"filled_{c}") == (levels[c] != 0)),
            ]

        chosen = Signal(config.bits("channel"))
        m.d.comb += chosen.eq(AnyConst(len(chosen)))
        popped = block.pop & (block.channel == chosen)
        followed, ahead = Signal(), Signal(4)
        request = Signal(fetch.shape())
        aborted = Signal()
        count = Array(counts)[chosen]
        with m.If(~followed & came & (fetch.channel == chosen) & AnySeq(1)):
            m.d.sync += [
                followed.eq(1),
                ahead.eq(count - popped),
                request.eq(fetch),
                aborted.eq(0),
            ]
        with m.Elif(followed & popped):
            m.d.sync += [ahead.eq(ahead - 1), followed.eq(ahead != 0)]
        # From the cycle after it came.
        hit = followed & (block.abort_all | (block.abort & (block.abort_tag == request.tag)))
        with m.If(hit):
            m.d.sync += aborted.eq(1)

        # What the specification says of the request.
        part = config.data_bytes - 1
        low = config.data_bytes.bit_length() - 1
        size = Signal(16)
        end = Signal(config.address_bits + 2)
        m.d.comb += [
            size.eq(Mux(request.sized, request.bytes, config.tile_bytes)),
            end.eq(request.address + size),
        ]
        is_empty = size == 0
        refused = (
            ((request.address & part) != 0)
            | ((size & part) != 0)
            | (size > config.tile_bytes)
            | ((end > 1 << config.address_bits) & ~is_empty)
        )
        first = block.first
        shown = followed & (ahead == 0) & (block.channel == chosen) & (levels[chosen] != 0)
        same = (
            (first.tag == request.tag)
            & (first.slot == request.slot)
            & (first.tile == request.tile)
            & (first.address == request.address)
        )
        null = block.null.bit_select(chosen, 1)
        m.d.comb += [
            # It comes when those before it have gone, as it was.
            Assert(~shown | same),
            Assert(~shown | (first.refused == refused) | is_empty),
            Assert(~shown | refused | is_empty | (first.left == (size >> low) - 1)),
            Assert(~shown | (block.first_aborted == aborted)),
            Assert(~shown | (block.first_empty == is_empty)),
            Assert(~shown | (null == (aborted | refused | is_empty))),
            Cover(shown & aborted & popped),
            Cover(followed & (ahead == 1) & refused),
            Cover(shown & ~refused & request.sized & (first.left == 2)),
        ]
        self._lemmas(m, inside, config, chosen, followed, ahead, request, aborted, is_empty)
        return m

    @staticmethod
    def _lemmas(m, inside, config, chosen, followed, ahead, request, aborted, is_empty):
        local = inside.local
        channels, depth = range(config.dma_channels), config.dma_queue_depth
        levels = local("levels")
        incoming, incoming_to = local("incoming"), local("incoming_to")
        low = config.data_bytes.bit_length() - 1
        part = config.data_bytes - 1
        left = (Mux(request.sized, request.bytes >> low, config.tile_beats) - 1)[
            : len(incoming.left)
        ]
        misfits = ((request.address & part) != 0) | (
            request.sized & (((request.bytes & part) != 0) | (request.bytes > config.tile_bytes))
        )
        last = (request.address >> low) + left
        refused = misfits | (last[config.address_bits - low] & ~is_empty)
        rows = inside.rows("queue")

        def is_request(row):
            return (
                (row.tag == request.tag)
                & (row.slot == request.slot)
                & (row.tile == request.tile)
                & (row.address == request.address)
                & (row.left == left)
            )

        for c in channels:
            read_at, write_at = local("read_at")[c], local("write_at")[c]
            mine = followed & (chosen == c)
            waits = mine & (ahead == levels[c])
            aborts, empties, nulls = (
                inside.signal(f"{name}_{c}") for name in ("aborted", "empty", "null")
            )
            m.d.comb += [
                lemma((read_at + levels[c])[: len(read_at)] == write_at),
                lemma(~mine | (ahead < levels[c] + incoming_to[c])),
                lemma(~incoming_to[c] | (local("incoming_channel") == c)),
                lemma(~incoming_to[c] | local("incoming_valid")),
                lemma(levels[c] + incoming_to[c] <= depth),
                # It is on its way,
                lemma(~waits | (incoming_to[c] & is_request(incoming))),
                lemma(~waits | (incoming.refused == misfits)),
                lemma(~waits | ((local("incoming_empty") == is_empty) & ~aborted)),
            ]
            for i in range(depth):
                # or in its place.
                here = Signal(name=f"here_{c}_{i}")
                row = rows[c * depth + i]
                tag = inside.signal(f"tag_{c}_{i}")
                m.d.comb += [
                    here.eq(mine & ~waits & ((read_at + ahead)[: len(read_at)] == i)),
                    lemma(~here | (is_request(row) & (row.refused == refused))),
                    lemma(~here | ((tag == request.tag) & (aborts[i] == aborted))),
                    lemma(~here | (empties[i] == is_empty)),
                    lemma(~here | (nulls[i] == (aborted | refused | is_empty))),
                ]
        m.d.comb += lemma(Cat(incoming_to).any() == local("incoming_valid"))
