"""Lists of the DMA engine: each is a queue."""

from amaranth import Array, Cat, Elaboratable, Module, Signal
from amaranth.hdl import Assert, Assume, Cover

from .harness import Inside, drive_freely, lemma

__all__ = ["OrderListsQueues", "Queues"]


class Queues:
    """A queue for each list of an :class:`OrderLists`, written down plainly.

    Parameters
    ----------
    m : Module
        Harness.
    inside : :class:`Inside`
        Block with the lists.
    lists, entries : :class:`int`
        Parameters of the lists.
    prefix : :class:`str`
        Where the lists are in the block, with a dot at its end.

    Attributes
    ----------
    counts : list of Value
        Entries in each list.
    queues : list of list of Value
        The entries.
    """

    def __init__(self, m, inside, *, lists, entries, prefix=""):
        self.prefix = prefix
        self.inside = inside
        bits = max(1, (entries - 1).bit_length())
        label = prefix.replace(".", "_")
        self.queues = [
            [Signal(bits, name=f"{label}queue_{i}_{j}") for j in range(entries)]
            for i in range(lists)
        ]
        self.counts = [Signal(range(entries + 2), name=f"{label}count_{i}") for i in range(lists)]
        push, pop = self.port("push"), self.port("pop")
        for i, (queue, count) in enumerate(zip(self.queues, self.counts, strict=True)):
            pushed = push & (self.port("push_list") == i)
            popped = pop & (self.port("look_list") == i)
            m.d.sync += count.eq(count + pushed - popped)
            for j, entry in enumerate(queue):
                with m.If(pushed & (count - popped == j)):
                    m.d.sync += entry.eq(self.port("push_entry"))
                with m.Elif(popped):
                    m.d.sync += entry.eq(queue[j + 1] if j + 1 < entries else 0)
        self._lie(m)

    def port(self, name):
        """The lists' port."""
        return self.inside.signal(f"{self.prefix}{name}")

    def holds(self, value):
        """Whether an entry is in one of the lists."""
        return Cat(valid & (entry == value) for valid, entry in self.places()).any()

    def places(self):
        """Every place of the queues: whether it is filled, and its entry."""
        return [
            (j < count, entry)
            for queue, count in zip(self.queues, self.counts, strict=True)
            for j, entry in enumerate(queue)
        ]

    def _lie(self, m):
        """Where the queues lie in the registers and the memory of the lists."""
        inside, prefix = self.inside, self.prefix
        links = inside.rows(f"{prefix}links")
        for i, (queue, count) in enumerate(zip(self.queues, self.counts, strict=True)):
            m.d.comb += [
                lemma(count <= len(queue)),
                lemma((count == 0) | (inside.signal(f"{prefix}head_{i}") == queue[0])),
                lemma(self.port("filled")[i] == (count != 0)),
            ]
            for j, entry in enumerate(queue):
                last = count == j + 1
                m.d.comb += [
                    lemma(~last | (inside.signal(f"{prefix}tail_{i}") == entry)),
                    lemma(~(j < count) | (entry < len(links))),
                ]
                if j + 1 < len(queue):
                    chained = Array(links)[entry] == queue[j + 1]
                    m.d.comb += lemma(~(count > j + 1) | chained)
        # An entry is in one place at most.
        places = self.places()
        for a, (valid_a, entry_a) in enumerate(places):
            for valid_b, entry_b in places[:a]:
                m.d.comb += lemma(~(valid_a & valid_b & (entry_a == entry_b)))


class OrderListsQueues(Elaboratable):
    """:class:`OrderLists` beside its queues."""

    lists = 2
    entries = 4

    def elaborate(self, platform):
        from prestage_hw.dma.order import OrderLists

        m = Module()
        block = OrderLists(lists=self.lists, entries=self.entries)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        model = Queues(m, inside, lists=self.lists, entries=self.entries)
        # Those who use the lists keep to what their docstring asks for.
        m.d.comb += [
            Assume(~(block.push & model.holds(block.push_entry))),
            Assume(~(block.pop & (Array(model.counts)[block.look_list] == 0))),
        ]
        for i, (queue, count) in enumerate(zip(model.queues, model.counts, strict=True)):
            looking = block.look_list == i
            m.d.comb += [
                Assert(block.filled[i] == (count != 0)),
                Assert(~(looking & (count != 0)) | (block.head == queue[0])),
                Assert(~(looking & (count != 0)) | (block.single == (count == 1))),
                Cover(count == self.entries),
                Cover(looking & block.pop & (count == 1) & block.push & (block.push_list == i)),
            ]
        return m
