"""Several queues of numbers that share one memory: the order of bursts and of tiles."""

from amaranth import Array, Module, Signal, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["OrderLists"]


class OrderLists(wiring.Component):
    """First in, first out lists of entries; an entry is in at most one of them.

    Parameters
    ----------
    lists : :class:`int`
        Lists, at least 1.
    entries : :class:`int`
        Entries, at least 1.

    Members
    -------
    push, push_list, push_entry, push_mark : ``In``
        Put an entry at the end of a list, with a mark of one bit.
    look_list : ``In``
        List whose ``head`` is shown and which ``pop`` shortens.
    head, head_mark : ``Out``
        First entry of that list and its mark, if it has any.
    single : ``Out(1)``
        It is the only one.
    pop : ``In(1)``
        Remove it. Only legal if there is one.
    filled : ``Out(lists)``
        Lists that have entries, a bit each.

    Raises
    ------
    ValueError
        If there are no lists or entries.
    """

    def __init__(self, *, lists, entries):
        for what, value in (("List count", lists), ("Entry count", entries)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{what} must be an integer, not {value!r}")
            if value < 1:
                raise ValueError(f"{what} must be a positive integer, not {value}")
        self.lists = lists
        self.entries = entries
        list_bits = max(1, (lists - 1).bit_length())
        entry_bits = max(1, (entries - 1).bit_length())
        super().__init__(
            {
                "push": In(1),
                "push_list": In(list_bits),
                "push_entry": In(entry_bits),
                "push_mark": In(1),
                "look_list": In(list_bits),
                "head": Out(entry_bits),
                "head_mark": Out(1),
                "single": Out(1),
                "pop": In(1),
                "filled": Out(lists),
            }
        )

    def elaborate(self, platform):
        m = Module()
        heads = Array(Signal(len(self.head), name=f"head_{i}") for i in range(self.lists))
        marks = Array(Signal(name=f"mark_{i}") for i in range(self.lists))
        tails = Array(Signal(len(self.head), name=f"tail_{i}") for i in range(self.lists))
        # What follows an entry in its list.
        m.submodules.links = links = memory.Memory(
            shape=unsigned(len(self.head)), depth=self.entries, init=[]
        )
        link_write = links.write_port()
        link_read = links.read_port(domain="comb")
        # The mark of that entry.
        m.submodules.next_marks = next_marks = memory.Memory(
            shape=unsigned(1), depth=self.entries, init=[]
        )
        mark_write = next_marks.write_port()
        mark_read = next_marks.read_port(domain="comb")
        ends = Signal()
        m.d.comb += [
            self.head.eq(heads[self.look_list]),
            self.head_mark.eq(marks[self.look_list]),
            mark_read.addr.eq(self.head),
            mark_write.addr.eq(link_write.addr),
            mark_write.data.eq(self.push_mark),
            mark_write.en.eq(link_write.en),
            self.single.eq(ends),
            link_read.addr.eq(self.head),
            link_write.addr.eq(tails[self.push_list]),
            link_write.data.eq(self.push_entry),
            # The last entry of a list that was emptied may be in another one by now.
            link_write.en.eq(self.push & self.filled.bit_select(self.push_list, 1)),
            ends.eq(self.head == tails[self.look_list]),
        ]
        for i in range(self.lists):
            pushed = self.push & (self.push_list == i)
            popped = self.pop & (self.look_list == i)
            with m.If(pushed):
                m.d.sync += [tails[i].eq(self.push_entry), self.filled[i].eq(1)]
            with m.Elif(popped & ends):
                m.d.sync += self.filled[i].eq(0)
            # An entry that comes to an empty list, or as the last one leaves, is the first.
            with m.If(pushed & (~self.filled[i] | (popped & ends))):
                m.d.sync += [heads[i].eq(self.push_entry), marks[i].eq(self.push_mark)]
            with m.Elif(popped):
                # If it was the last one, the list has no head.
                m.d.sync += [heads[i].eq(link_read.data), marks[i].eq(mark_read.data)]
        return m
