"""Lists of the DMA engine: each is a queue."""

from amaranth import Array, Const, Elaboratable, Module, Signal
from amaranth.hdl import Assert, Assume, Cover

from .harness import Inside, drive_freely, lemma

__all__ = ["OrderListsQueues"]


class OrderListsQueues(Elaboratable):
    """:class:`OrderLists` beside a queue for each list, written down plainly."""

    lists = 2
    entries = 4

    def elaborate(self, platform):
        from prestage_hw.dma.order import OrderLists

        m = Module()
        block = OrderLists(lists=self.lists, entries=self.entries)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        links = inside.rows("links")

        queues = [
            [Signal(2, name=f"queue_{i}_{j}") for j in range(self.entries)]
            for i in range(self.lists)
        ]
        counts = [Signal(3, name=f"count_{i}") for i in range(self.lists)]
        used = Const(0, 1)
        for queue, count in zip(queues, counts, strict=True):
            for j, entry in enumerate(queue):
                used = used | ((j < count) & (entry == block.push_entry))
        looked_at = Array(counts)[block.look_list]
        # Those who use the lists keep to what their docstring asks for.
        m.d.comb += [
            Assume(~(block.push & used)),
            Assume(~(block.pop & (looked_at == 0))),
        ]
        for i, (queue, count) in enumerate(zip(queues, counts, strict=True)):
            pushed = block.push & (block.push_list == i)
            popped = block.pop & (block.look_list == i)
            m.d.sync += count.eq(count + pushed - popped)
            for j, entry in enumerate(queue):
                following = queue[j + 1] if j + 1 < self.entries else Const(0, 2)
                with m.If(pushed & (count - popped == j)):
                    m.d.sync += entry.eq(block.push_entry)
                with m.Elif(popped):
                    m.d.sync += entry.eq(following)

            looking = block.look_list == i
            m.d.comb += [
                lemma(count <= self.entries),
                Assert(block.filled[i] == (count != 0)),
                Assert(~(looking & (count != 0)) | (block.head == queue[0])),
                Assert(~(looking & (count != 0)) | (block.single == (count == 1))),
                # Where the queue lies in the registers and the memory.
                lemma((count == 0) | (inside.signal(f"head_{i}") == queue[0])),
                Cover(count == self.entries),
                Cover(looking & block.pop & (count == 1) & block.push & (block.push_list == i)),
            ]
            for j, entry in enumerate(queue):
                last = count == j + 1
                m.d.comb += lemma(~last | (inside.signal(f"tail_{i}") == entry))
                if j + 1 < self.entries:
                    chained = Array(links)[entry] == queue[j + 1]
                    m.d.comb += lemma(~(count > j + 1) | chained)
        # An entry is in one place at most.
        places = [
            (j < count, entry)
            for queue, count in zip(queues, counts, strict=True)
            for j, entry in enumerate(queue)
        ]
        for a, (valid_a, entry_a) in enumerate(places):
            for valid_b, entry_b in places[:a]:
                m.d.comb += lemma(~(valid_a & valid_b & (entry_a == entry_b)))
        return m
