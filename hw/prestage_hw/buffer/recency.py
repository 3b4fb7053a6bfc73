"""Order of the slots by their last touch, as a doubly linked list in two memories."""

from amaranth import Module, Signal, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config

__all__ = ["RecencyList"]


class RecencyList(wiring.Component):
    """Keep every slot in the order of its last touch, and mark where the current route began.

    The list's ends are registers in place of a sentinel row, so that the least recent slot is known
    without a read.

    *Read* takes two cycles, and one begins in each: ``newer`` is valid in the second cycle after;
    what is read while a row is written is not. *Touch* takes two cycles: it starts when the
    neighbours of ``slot`` have been read, and ``slot`` must be stable in both. So does *retire*.
    *Clear* writes one row a cycle. What these write passes through a register, since block RAMs may
    be far away: rows are written until the cycle after the last one of each.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose slots are ordered.

    Members
    -------
    slot : ``In(config.bits("slot"))``
        The slot that ``touch`` and ``clear`` are about.
    read_slot : ``In(config.bits("slot"))``
        The slot whose neighbours are read. It may come late in the cycle.
    newer : ``Out(config.bits("slot"))``
        The slot touched next after the one that was read; meaningless for ``newest``.
    touch : ``In(1)``
        Make ``slot`` the most recent. A mark on it moves to the next less recent slot.
    retire : ``In(1)``
        Make ``slot`` the least recent, as if it had not been touched since the route began.
    begin_route : ``In(1)``
        Mark the most recent slot: slots more recent than the mark were touched since.
    clear : ``In(1)``
        High while all slot numbers pass by on ``slot``: slot 0 becomes the least recent, the last
        slot the most recent and marked.
    oldest, newest : ``Out(config.bits("slot"))``
        Least and most recent slot.
    mark : ``Out(config.bits("slot"))``
        Most recent slot that was not touched since the route began.
    marked : ``Out(1)``
        Low when every slot was touched since the route began; ``mark`` is then meaningless.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        slot = unsigned(config.bits("slot"))
        super().__init__(
            {
                "slot": In(slot),
                "read_slot": In(slot),
                "newer": Out(slot),
                "touch": In(1),
                "retire": In(1),
                "begin_route": In(1),
                "clear": In(1),
                "oldest": Out(slot),
                "newest": Out(slot),
                "mark": Out(slot),
                "marked": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()

        shape = unsigned(self.config.bits("slot"))
        depth = 1 << self.config.bits("slot")
        last = self.config.slots - 1
        # What is read while a row is written is not looked at, so synthesis need not care for it.
        own = {"no_rw_check": 1}
        m.submodules.older = older_rows = Memory(shape=shape, depth=depth, init=[], attrs=own)
        m.submodules.newer = newer_rows = Memory(shape=shape, depth=depth, init=[], attrs=own)
        older_read, older_write = older_rows.read_port(), older_rows.write_port()
        newer_read, newer_write = newer_rows.read_port(), newer_rows.write_port()
        older, newer = Signal(shape, reset_less=True), Signal(shape, reset_less=True)
        m.d.sync += [older.eq(older_read.data), newer.eq(newer_read.data)]

        relink = Signal()  # second cycle of a touch
        relink_last = Signal()  # of a retirement
        is_oldest = Signal()
        is_newest = Signal()
        m.d.comb += [
            is_oldest.eq(self.slot == self.oldest),
            is_newest.eq(self.slot == self.newest),
            older_read.addr.eq(self.read_slot),
            older_read.en.eq(1),
            newer_read.addr.eq(self.read_slot),
            newer_read.en.eq(1),
            self.newer.eq(newer),
        ]
        m.d.sync += [
            older_write.en.eq(0),
            newer_write.en.eq(0),
            # The first cycle of a touch or retirement, which come late in it: where to write, and
            # what, does not hang on them.
            older_write.addr.eq(newer),
            older_write.data.eq(older),
            newer_write.addr.eq(older),
            newer_write.data.eq(newer),
        ]

        with m.If(self.clear):
            m.d.sync += [
                older_write.addr.eq(self.slot),
                older_write.data.eq(self.slot - 1),
                older_write.en.eq(1),
                newer_write.addr.eq(self.slot),
                newer_write.data.eq(self.slot + 1),
                newer_write.en.eq(1),
            ]
            m.d.sync += [
                self.oldest.eq(0),
                self.newest.eq(last),
                self.mark.eq(last),
                self.marked.eq(1),
            ]
        with m.Elif(relink):
            m.d.sync += [
                older_write.addr.eq(self.slot),
                older_write.data.eq(self.newest),
                older_write.en.eq(1),
                newer_write.addr.eq(self.newest),
                newer_write.data.eq(self.slot),
                newer_write.en.eq(1),
            ]
            m.d.sync += [
                self.newest.eq(self.slot),
                relink.eq(0),
            ]
        with m.Elif(relink_last):
            m.d.sync += [
                newer_write.addr.eq(self.slot),
                newer_write.data.eq(self.oldest),
                newer_write.en.eq(1),
                older_write.addr.eq(self.oldest),
                older_write.data.eq(self.slot),
                older_write.en.eq(1),
            ]
            m.d.sync += [
                self.oldest.eq(self.slot),
                relink_last.eq(0),
            ]
            with m.If(~self.marked):
                m.d.sync += [self.mark.eq(self.slot), self.marked.eq(1)]
        with m.Elif(self.retire):
            m.d.sync += [
                older_write.en.eq(~is_oldest & ~is_newest),
                newer_write.en.eq(~is_oldest),
            ]
            m.d.sync += relink_last.eq(~is_oldest)
            with m.If(is_newest & ~is_oldest):
                m.d.sync += self.newest.eq(older)
            with m.If(is_oldest):
                # In its place already.
                with m.If(~self.marked):
                    m.d.sync += [self.mark.eq(self.slot), self.marked.eq(1)]
            with m.Elif(self.slot == self.mark):
                m.d.sync += self.mark.eq(older)
        with m.Elif(self.touch):
            m.d.sync += [
                older_write.en.eq(~is_newest),
                newer_write.en.eq(~is_newest & ~is_oldest),
            ]
            m.d.sync += relink.eq(~is_newest)
            with m.If(is_oldest & ~is_newest):
                m.d.sync += self.oldest.eq(newer)
            with m.If(self.slot == self.mark):
                m.d.sync += self.mark.eq(older)
                with m.If(is_oldest):
                    m.d.sync += self.marked.eq(0)

        with m.If(self.begin_route):
            m.d.sync += [
                self.mark.eq(self.newest),
                self.marked.eq(1),
            ]

        return m
