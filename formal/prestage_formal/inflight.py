"""The table of fetches in flight: demands go first, and every tile is offered once."""

from amaranth import Array, Cat, Elaboratable, Module, Mux, Signal
from amaranth.asserts import AnyConst
from amaranth.hdl import Assert, Assume, Cover

from .harness import Held, Inside, drive_freely, lemma
from .instances import scheduler_device

__all__ = ["DemandFirst", "Progress"]


class _Book:
    """What was asked of the table and what it has offered, kept beside it.

    Adds the block to the harness, its free inputs, and what its docstring demands of them.

    Attributes
    ----------
    block : InflightTable
        The block.
    inside : :class:`Inside`
        The same.
    new : Value
        A tile is offered for the first time.
    live, demand, failed, cancelled : list of Value
        Of each entry: there is such a fetch; its class; it gets no more tiles for that reason.
    slot, address : list of Value
        Of each entry: what it was allocated with.
    offered : list of Value
        Tiles of each entry that were offered before this cycle.
    issued : list of Value
        The same with one that is new.
    left, left_before : list of Value
        Tiles of each entry that are to come: with and without the one that is new.
    away, speculative : list of list of Value
        Whether each tile was offered and has not come back, and was offered for a prefetch; the
        one that is new included.
    speculating_before : Value
        Tiles of prefetches on their way without the one that is new.
    taken_over : Value
        Tiles on their way that were offered for a prefetch and are a demand's by now.
    earlier : list of list of Value
        ``earlier[i][j]``: demand j became one before demand i did.
    """

    def __init__(self, m):
        from prestage_hw.scheduler.inflight import InflightTable

        config = scheduler_device()
        self.config = config
        self.block = block = InflightTable(config=config)
        self.inside = inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        self.count, self.tiles = config.inflight, config.tiles
        self.entries, self.numbers = range(self.count), range(self.tiles)

        def flags(name):
            return [Signal(name=f"book_{name}_{i}") for i in self.entries]

        self.live, self.demand = flags("live"), flags("demand")
        self.failed, self.cancelled = flags("failed"), flags("cancelled")
        self.waiters = [Signal(config.contexts, name=f"book_waiters_{i}") for i in self.entries]
        self.slot = [Signal(config.bits("slot"), name=f"book_slot_{i}") for i in self.entries]
        self.address = [Signal(config.address_bits, name=f"book_at_{i}") for i in self.entries]
        self.offered = [Signal(range(self.tiles + 1), name=f"offered_{i}") for i in self.entries]
        self.earlier = [
            [Signal(name=f"earlier_{i}_{j}") for j in self.entries] for i in self.entries
        ]
        self._stream(m)
        self._assume(m)
        self._follow(m)

    def _stream(self, m):
        """What a tile that is new changes."""
        fetches = self.block.fetches
        tile = fetches.payload
        waited, self.new = Signal(name="offer_waited"), Signal(name="offer_new")
        m.d.sync += waited.eq(fetches.valid & ~fetches.ready)
        m.d.comb += self.new.eq(fetches.valid & ~waited)
        self.issued = [Signal(range(self.tiles + 1), name=f"now_{i}") for i in self.entries]
        self.left, self.left_before = (
            [Signal(range(self.tiles + 1), name=f"{name}_{i}") for i in self.entries]
            for name in ("left", "left_before")
        )
        names = ("away", "speculative", "away_before", "speculative_before")
        self.away, self.speculative, away, speculative = (
            [[Signal(name=f"{name}_{i}_{j}") for j in self.numbers] for i in self.entries]
            for name in names
        )
        self._registers = away, speculative
        for i in self.entries:
            mine = self.new & (tile.tag == i)
            going = self.live[i] & ~self.failed[i] & ~self.cancelled[i]
            m.d.comb += [
                self.issued[i].eq(self.offered[i] + mine),
                self.left_before[i].eq(Mux(going, self.tiles - self.offered[i], 0)),
                self.left[i].eq(Mux(going, self.tiles - self.issued[i], 0)),
            ]
            m.d.sync += self.offered[i].eq(self.issued[i])
            for j in self.numbers:
                this = mine & (tile.tile == j)
                m.d.comb += [
                    self.away[i][j].eq(away[i][j] | this),
                    self.speculative[i][j].eq(speculative[i][j] | (this & ~self.demand[i])),
                ]
        self.speculating_before = Signal(range(self.count * self.tiles + 1))
        self.speculating = Signal(range(self.count * self.tiles + 1))
        m.d.comb += [
            self.speculating_before.eq(sum(Cat(*(Cat(*row) for row in speculative)))),
            self.speculating.eq(sum(Cat(*(Cat(*row) for row in self.speculative)))),
        ]
        self.taken_over = sum(
            Mux(self.demand[i], sum(self.speculative[i]), 0) for i in self.entries
        )

    def _assume(self, m):
        """What the block's docstring demands."""
        block = self.block
        changes = [block.allocate, block.wait, block.cancel, block.complete, block.free]
        self.change = change = Cat(changes).any()
        for i, one in enumerate(changes):
            for other in changes[:i]:
                m.d.comb += Assume(~(one & other))
        # Cycles since one of the entries began or ended.
        since = Signal(2, init=2)
        with m.If(block.allocate | block.free):
            m.d.sync += since.eq(1)
        with m.Elif(since != 2):
            m.d.sync += since.eq(since + 1)
        self.since = since
        tile = block.fetches.payload
        offers = block.fetches.valid & (tile.tag == block.tag) & (tile.tile == block.tile)
        m.d.comb += [
            Assume(~change | block.hold),
            Assume(~block.allocate | (since == 2)),
            Assume(~block.allocate | Mux(block.demand, block.demand_room, block.prefetch_room)),
            # All but allocate are about a fetch that there is.
            Assume(~change | block.allocate | Array(self.live)[block.tag]),
            # Only a tile that the DMA engine has taken comes back.
            Assume(~block.complete | (self.of_tile(self.away) & ~offers)),
            Assume(~block.free | block.row_last),
        ]

    def of_tile(self, flags):
        """A flag of the tile that comes back."""
        return Array(Array(row)[self.block.tile] for row in flags)[self.block.tag]

    def _follow(self, m):
        """How the book changes."""
        block = self.block
        away, speculative = self._registers
        for i in self.entries:
            mine = block.tag == i
            starts = block.allocate & (block.free_tag == i)
            becomes = (starts & block.demand) | (block.wait & mine & ~self.demand[i])
            back = block.complete & mine
            for j in self.numbers:
                stays = ~(back & (block.tile == j))
                m.d.sync += [
                    away[i][j].eq(self.away[i][j] & stays),
                    speculative[i][j].eq(self.speculative[i][j] & stays),
                ]
            for j in self.entries:
                if i == j:
                    continue
                with m.If(becomes):
                    m.d.sync += [
                        self.earlier[i][j].eq(self.live[j] & self.demand[j]),
                        self.earlier[j][i].eq(0),
                    ]
            with m.If(starts):
                m.d.sync += [
                    self.live[i].eq(1),
                    self.demand[i].eq(block.demand),
                    self.failed[i].eq(0),
                    self.cancelled[i].eq(0),
                    self.waiters[i].eq(block.waiters),
                    self.slot[i].eq(block.entry.slot),
                    self.address[i].eq(block.entry.addresses[0]),
                    self.offered[i].eq(0),
                ]
            with m.If(block.wait & mine):
                m.d.sync += [
                    self.demand[i].eq(1),
                    self.cancelled[i].eq(0),
                    self.waiters[i].eq(self.waiters[i] | block.waiters),
                ]
            with m.If(block.cancel & mine):
                m.d.sync += self.cancelled[i].eq(1)
            with m.If(back & block.failed):
                m.d.sync += self.failed[i].eq(1)
            with m.If(block.free & mine):
                m.d.sync += self.live[i].eq(0)

    def lemmas(self, m):
        """How the registers and memories of the table follow from the book."""
        block, inside = self.block, self.inside
        entries = self.entries
        older = [inside.signal(f"older_{i}") for i in entries]
        rows, promoted = inside.rows("entries"), inside.rows("promotions")
        prefetch = [self.live[i] & ~self.demand[i] for i in entries]
        free = Cat(~live for live in self.live)
        m.d.comb += [
            lemma(inside.signal("entries_used") == sum(self.live)),
            lemma(inside.signal("prefetches") == sum(prefetch)),
            lemma(inside.signal("under_way") == self.speculating),
            lemma(inside.signal("taken_over") == self.taken_over),
            lemma(self.since != 0),
            lemma((self.since < 2) | (free == 0) | free.bit_select(block.free_tag, 1)),
        ]
        tile = block.fetches.payload
        for i in entries:
            live = self.live[i]
            away = sum(self.away[i])
            m.d.comb += [
                lemma(inside.signal("valid")[i] == live),
                lemma(inside.signal("more")[i] == (self.left[i] != 0)),
                lemma(~live | (inside.signal("demand")[i] == self.demand[i])),
                lemma(~live | (inside.signal("failed")[i] == self.failed[i])),
                lemma(~live | (inside.signal("cancelled")[i] == self.cancelled[i])),
                lemma(~live | (inside.signal(f"waiters_{i}") == self.waiters[i])),
                lemma(~live | (inside.signal(f"issued_{i}") == self.issued[i])),
                lemma(~live | (inside.signal(f"returned_{i}") + away == self.issued[i])),
                lemma(live | (away == 0)),
                lemma(~live | (rows[i].slot == self.slot[i])),
                lemma(~live | (rows[i].addresses[0] == self.address[i])),
                lemma(~prefetch[i] | (promoted[i] == self.tiles)),
                lemma(~live | ~self.demand[i] | (promoted[i] <= self.issued[i])),
                lemma(self.issued[i] <= self.tiles),
            ]
            for j in self.numbers:
                is_offered = block.fetches.valid & (tile.tag == i) & (tile.tile == j)
                m.d.comb += [
                    lemma(~self.away[i][j] | (j < self.issued[i])),
                    lemma(self.speculative[i][j] == (self.away[i][j] & (j < promoted[i]))),
                    # What is offered has not come back.
                    lemma(~is_offered | self.away[i][j]),
                ]
            # An order: of two one is older, and there is no ring.
            for j in entries:
                both = live & self.live[j]
                if i == j:
                    m.d.comb += lemma(~live | ~older[i][i])
                    continue
                m.d.comb += lemma(~both | (older[i][j] != older[j][i]))
                demands = both & self.demand[i] & self.demand[j]
                m.d.comb += lemma(~demands | (older[i][j] == self.earlier[i][j]))
                for k in entries:
                    if k not in (i, j):
                        three = both & self.live[k]
                        m.d.comb += lemma(~three | ~older[i][j] | ~older[j][k] | older[i][k])


def _of(book, values):
    """What the book says of the entry that is offered."""
    return Array(values)[book.block.fetches.payload.tag]


def _offers(m, book, claim):
    """Properties of each tile that is offered: which it is, and that demands go first.

    Parameters
    ----------
    m : Module
        Harness.
    book : _Book
        The table and what is known of it.
    claim : callable
        ``Assert``, or :func:`lemma`.
    """
    tile, new = book.block.fetches.payload, book.new
    waits = [book.demand[i] & (book.left_before[i] != 0) for i in book.entries]
    m.d.comb += [
        # Each tile once and in order, none of an entry that failed or was cancelled.
        claim(~new | (_of(book, book.left_before) != 0)),
        claim(~new | (tile.tile == _of(book, book.offered))),
        claim(~new | (tile.demand == _of(book, book.demand))),
        # Demands first, in the order in which they became demands.
        claim(~new | tile.demand | ~Cat(waits).any()),
    ]
    for i in book.entries:
        others = [book.earlier[i][j] & waits[j] for j in book.entries if j != i]
        m.d.comb += claim(~new | (tile.tag != i) | ~tile.demand | ~Cat(others).any())


class DemandFirst(Elaboratable):
    """A prefetch's tile leaves only if no demand has tiles left; every tile leaves once."""

    def elaborate(self, platform):
        m = Module()
        book = _Book(m)
        block, entries, config = book.block, book.entries, book.config
        book.lemmas(m)
        _offers(m, book, Assert)
        tile, new = block.fetches.payload, book.new
        # The limit as of the choice: two cycles before the tile is loaded, three before it is seen.
        limits = [Signal(3, name=f"limit_{k}") for k in range(4)]
        m.d.comb += limits[0].eq(block.prefetch_tiles)
        for k in range(3):
            m.d.sync += limits[k + 1].eq(limits[k])
        most = Signal(3)
        m.d.comb += [most.eq(AnyConst(3)), Assume(block.prefetch_tiles <= most)]
        held = Held(m, block.fetches.valid, block.fetches.ready, tile, name="fetch")
        room = (book.speculating_before == 0) | (book.speculating_before < limits[3])
        address = Signal(config.address_bits)
        urgent = Signal()
        m.d.sync += urgent.eq(book.taken_over != 0)
        m.d.comb += [
            address.eq(_of(book, book.address) + tile.tile * config.tile_bytes),
            Assert(held.kept),
            # What is said of a tile.
            Assert(~new | (tile.channel == ~tile.demand)),
            Assert(~new | (tile.slot == _of(book, book.slot))),
            Assert(~new | (tile.address == address)),
            # Few prefetch tiles at once.
            Assert(~new | tile.demand | room),
            Assert(book.speculating <= Mux(most == 0, 1, most)),
            Assert(block.waits == (book.speculating != 0)),
            # Channel 1 is urgent while a demand waits for one of them.
            Assert(block.urgent == Mux(urgent, 2, 0)),
            # What the table says of itself.
            Assert(block.occupied == Cat(book.live).any()),
            Assert(block.prefetching == Cat(book.live[i] & ~book.demand[i] for i in entries).any()),
            Assert(~block.allocate | ~Array(book.live)[block.free_tag]),
            Assert(~block.complete | (block.complete_demand != book.of_tile(book.speculative))),
        ]
        for i in entries:
            mine = book.live[i] & (block.tag == i)
            still = ~Cat(book.away[i]).any()
            m.d.comb += [
                Assert(~mine | (block.row_last == (still & (book.left[i] == 0)))),
                Assert(~mine | (block.row_idle == still)),
                Assert(~mine | (block.row_demand == book.demand[i])),
                Assert(~mine | (block.row_failed == book.failed[i])),
                Assert(~mine | (block.row_waiters == book.waiters[i])),
                Assert(~mine | (block.row_returned + sum(book.away[i]) == book.issued[i])),
            ]
        unpromoted = [~book.demand[i] & (book.left[i] != 0) for i in entries]
        promoted = [book.demand[i] & Cat(book.speculative[i]).any() for i in entries]
        m.d.comb += [
            # A demand goes first while a prefetch has tiles left.
            Cover(new & tile.demand & Cat(unpromoted).any()),
            # The last tile of a prefetch that has become a demand.
            Cover(new & tile.demand & Cat(promoted).any() & (tile.tile == book.tiles - 1)),
            Cover(new & ~tile.demand & (book.speculating == 2) & Cat(book.demand).any()),
            Cover(block.free & block.row_failed),
        ]
        return m


class Progress(Elaboratable):
    """Tiles of demands leave in bounded time while nothing holds them up.

    A tile leaves in every third cycle; the first cycle of a run in which nothing holds up the
    table counts as none.
    """

    #: Cycles a tile.
    period = 3

    def elaborate(self, platform):
        m = Module()
        book = _Book(m)
        block, entries, period = book.block, book.entries, self.period
        book.lemmas(m)
        _offers(m, book, lemma)
        quiet = Signal()
        m.d.comb += quiet.eq(~block.hold & block.fetches.ready)
        waits = [book.demand[i] & (book.left[i] != 0) for i in entries]

        # Quiet cycles with a demand that has tiles left since a tile was offered.
        pause = Signal(range(period + 2))
        with m.If(~quiet | ~Cat(waits).any()):
            m.d.sync += pause.eq(0)
        with m.Elif(book.new):
            m.d.sync += pause.eq(1)
        with m.Else():
            m.d.sync += pause.eq(pause + 1)

        # Quiet cycles since one of the demands, any, waits; tiles that were ahead when they began,
        # its own and those of earlier demands, and that still are.
        watched = Signal(range(book.count))
        most = book.count * book.tiles
        age = Signal(range(period * most + 2))
        ahead, started = Signal(range(most + 1)), Signal(range(most + 1))
        m.d.comb += watched.eq(AnyConst(len(watched)))
        with m.Switch(watched):
            for i in entries:
                with m.Case(i):
                    m.d.comb += ahead.eq(
                        book.left_before[i]
                        + sum(
                            Mux(book.earlier[i][j] & book.demand[j], book.left_before[j], 0)
                            for j in entries
                            if j != i
                        )
                    )
        with m.If(age == 0):
            m.d.sync += started.eq(ahead)
        with m.If(quiet & Array(waits)[watched]):
            m.d.sync += age.eq(age + 1)
        with m.Else():
            m.d.sync += age.eq(0)
        m.d.comb += [
            # A tile of a demand in every third cycle, if there is one.
            Assert(pause <= period),
            Assert((pause != period) | (book.new & block.fetches.payload.demand)),
            # The last one of a demand has come when there was time for those ahead.
            Assert((age == 0) | (age <= period * started)),
            Assert(age <= period * most),
            lemma((age == 0) | (age + period * ahead <= period * started + pause)),
            lemma((age == 0) | (pause != 0)),
            lemma(age <= period * most),
            lemma(started <= most),
            Cover((pause == period) & (started == 3)),
            Cover((age == period * started) & (started == 2)),
        ]
        return m
