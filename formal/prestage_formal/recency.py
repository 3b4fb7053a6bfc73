"""Least recently used: the list is an order of the slots, and the walk along it ends."""

from amaranth import Array, Cat, Elaboratable, Module, Mux, Signal
from amaranth.hdl import Assert, Cover

from prestage_hw.buffer.directory import EntryState
from prestage_hw.contract.records import BufferCode, BufferOp, Policy

from .harness import Inside, drive_freely, lemma
from .instances import buffer_device

__all__ = ["Walk"]


class _Order:
    """The slots in the order of their last touch, written down plainly, beside a buffer's list.

    Attributes
    ----------
    slots : list of Value
        The slots, least recent first. It changes in the cycle of a touch.
    settled : Value
        No touch or retirement is in its second cycle.
    writes : Value
        A row is being written.
    """

    def __init__(self, m, inside, config, *, clearing):
        self.inside = inside
        count = config.slots
        part = "RecencyList"
        (block,) = {inside.local("self", part=part)}
        self.block = block
        bits = config.bits("slot")
        self.slots = slots = [Signal(bits, name=f"order_{j}", init=j) for j in range(count)]
        moved = Signal(count)  # Places up to, or from, that of the slot that moves.
        for j in range(count):
            here = slots[j] == block.slot
            m.d.comb += moved[j].eq(here | (moved[j - 1] if j else 0))
        with m.If(clearing):
            m.d.sync += [slots[j].eq(j) for j in range(count)]
        with m.Elif(block.retire):
            m.d.sync += slots[0].eq(block.slot)
            for j in range(1, count):
                with m.If(~moved[j - 1]):
                    m.d.sync += slots[j].eq(slots[j - 1])
        with m.Elif(block.touch):
            m.d.sync += slots[-1].eq(block.slot)
            for j in range(count - 1):
                with m.If(moved[j]):
                    m.d.sync += slots[j].eq(slots[j + 1])
        relink = inside.local("relink", part=part)
        relink_last = inside.local("relink_last", part=part)
        self.relink, self.relink_last = relink, relink_last
        self.settled = ~relink & ~relink_last
        older, newer = (
            Array(inside.rows(f"recency.{name}", written=True)) for name in ("older", "newer")
        )
        self.writes = Cat(
            inside.local(f"{name}_write", part=part).en for name in ("older", "newer")
        ).any()
        self.older, self.newer = older, newer
        m.d.comb += lemma(~(relink & relink_last))
        for j in range(count):
            for i in range(j):
                m.d.comb += lemma(slots[i] != slots[j])
        for j in range(count - 1):
            # A slot that moves is not linked yet.
            linked = ~clearing & ~(relink & (j == count - 2)) & ~(relink_last & (j == 0))
            m.d.comb += [
                lemma(~linked | (newer[slots[j]] == slots[j + 1])),
                lemma(~linked | (older[slots[j + 1]] == slots[j])),
            ]
        m.d.comb += [
            lemma(clearing | (block.oldest == Mux(relink_last, slots[1], slots[0]))),
            lemma(clearing | (block.newest == Mux(relink, slots[-2], slots[-1]))),
            lemma(~relink | (block.slot == slots[-1])),
            lemma(~relink_last | (block.slot == slots[0])),
        ]

    def place(self, slot):
        """Place of a slot in the order."""
        return sum(Mux(self.slots[j] == slot, j, 0) for j in range(len(self.slots)))

    def was_read(self, slot, *, where):
        """Lemma: what was read in the registers of one stage is what the rows say of a slot."""
        local = self.inside.local
        part = "RecencyList"
        if where == "port":
            ports = local("older_read", part=part).data, local("newer_read", part=part).data
        else:
            ports = local("older", part=part), local("newer", part=part)
        return (ports[0] == self.older[slot]) & (ports[1] == self.newer[slot])


class Walk(Elaboratable):
    """Every request, in any order, with the policy LRU.

    Parameters
    ----------
    device : :class:`dict`
        Parameters of the instance that differ.
    """

    def __init__(self, **device):
        self.device = device

    def elaborate(self, platform):
        from prestage_hw.buffer.buffer import ExpertBuffer

        m = Module()
        config = buffer_device(**self.device)
        block = ExpertBuffer(config=config, valued=True)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block, but=("policy",))
        m.d.comb += block.policy.eq(Policy.LRU)
        at, local = inside.states("fsm_state"), inside.local
        idle, clearing = at("IDLE"), at("CLEAR")
        order = _Order(m, inside, config, clearing=clearing)
        recency, slot = order.block, local("slot")
        is_resident, is_prefetch = local("is_resident"), local("is_prefetch")
        request, code = local("request"), block.results.payload.code

        # Cycles since the request was taken that is worked on.
        waited, offered, new = Signal(8), Signal(), Signal()
        m.d.comb += new.eq(block.results.valid & ~offered)
        m.d.sync += [
            offered.eq(block.results.valid & ~block.results.ready),
            waited.eq(Mux(block.requests.valid & block.requests.ready, 1, waited + 1)),
        ]
        place, skipped = Signal(4), Signal(4)
        m.d.comb += place.eq(order.place(slot))
        with m.If(at("CHECK")):
            m.d.sync += skipped.eq(place)
        op = request.op
        fills, releases = (op == BufferOp.FILL) | (op == BufferOp.CANCEL), op == BufferOp.RELEASE
        looked = ~fills & ~releases
        found = looked & ((code == BufferCode.RESIDENT) | (code == BufferCode.FILLING))
        allocated = looked & (code == BufferCode.ALLOCATED)
        none = looked & (code == BufferCode.NO_SLOT)
        lookup, walk, step = block.lookup_latency, block.walk_latency, 4
        most = max(lookup, walk + step * (config.slots - 1))
        busy = ~idle & ~clearing & ~at("SETTLE")
        m.d.comb += [
            # Work that began ends; a walk skips a slot in four cycles.
            Assert(~busy | (waited <= most)),
            Assert(~(new & found) | (waited == lookup)),
            Assert(~(new & allocated) | (waited == walk + step * skipped)),
            Assert(~(new & allocated) | (skipped < config.slots)),
            Assert(~(new & none & ~is_resident) | (waited <= most)),
            # The list is the order of the touches.
            Assert(clearing | ~order.settled | (recency.oldest == order.slots[0])),
            Assert(clearing | ~order.settled | (recency.newest == order.slots[-1])),
            # A slot is checked once all that are less recent were.
            Assert(~at("CHECK") | (waited == walk - 2 + step * place)),
            Cover(new & allocated & (skipped == 2)),
            Cover(new & none & (waited == walk + step)),
        ]

        # --- lemmas ---
        walking = ~is_resident
        read = order.was_read(slot, where="port")
        known = order.was_read(slot, where="register")
        row = local("row")
        row_of = Signal(config.bits("slot"))
        m.d.comb += row_of.eq(slot)
        done, index = local("done"), request.index
        unpins = at("UNPIN", "UNPIN ARRIVE", "UNPIN READ", "UNPIN CAPTURE")
        m.d.comb += [
            lemma(at()),
            lemma(~at("SEARCH")),
            lemma(~inside.signal("victims.searching")),
            lemma(~block.results.valid | idle | at("ALLOCATE", "SETTLE")),
            lemma(~order.writes | idle | at("CLEAR", "ALLOCATE", "SETTLE")),
            lemma(
                ~at("BRANCH", "READ", "CAPTURE", "ARRIVE", "CHECK", "REFUSE", "TOUCH", "ALLOCATE")
                | (is_resident == (local("entry").state != EntryState.EMPTY))
            ),
            lemma(~at("ALLOCATE") | new),
            lemma(~order.relink | at("ALLOCATE")),
            lemma(~order.relink_last | (idle & block.results.valid & new)),
            lemma(~at("FETCH") | (waited == 1)),
            lemma(~at("FETCH") | ~looked | (slot == order.slots[0])),
            lemma(~at("LOOKUP") | ((waited == 2) & (slot == order.slots[0]) & looked)),
            lemma(~at("BRANCH") | ((waited == 3) & looked)),
            lemma(~at("BRANCH") | is_resident | (slot == order.slots[0])),
            lemma(~at("LOOKUP", "CAPTURE", "ARRIVE", "CHECK", "FILL READ", "FILL ARRIVE") | read),
            lemma(~(at("BRANCH") & walking) | read),
            lemma(~at("REFUSE") | (walking & looked & (waited == walk - 1 + step * skipped))),
            lemma(~at("CHECK", "TOUCH", "FILL") | known),
            lemma(~at("READ", "CHECK") | walking),
            lemma(~at("READ") | (waited == walk - 5 + step * place)),
            lemma(~at("READ") | (place != 0)),
            lemma(~(at("CAPTURE") & walking) | (waited == walk - 4 + step * place)),
            lemma(~(at("ARRIVE") & walking) | (waited == walk - 3 + step * place)),
            lemma(~(at("CAPTURE", "ARRIVE") & walking) | (place != 0)),
            lemma(~(at("TOUCH") & walking) | (waited == walk - 1 + step * place)),
            lemma(~(at("TOUCH") & walking) | (skipped == place)),
            lemma(~(at("ALLOCATE") & walking) | (waited == walk + step * skipped)),
            lemma(skipped < config.slots),
            lemma(~(at("CAPTURE") & is_resident) | (waited == 4)),
            lemma(~(at("ARRIVE") & is_resident) | (waited == 5)),
            lemma(~(at("TOUCH") & is_resident) | (waited == 6)),
            lemma(~(at("ALLOCATE") & is_resident) | (waited == 7)),
            lemma(~at("READ", "CAPTURE", "ARRIVE", "CHECK", "TOUCH", "ALLOCATE") | looked),
            lemma(
                ~(at("READ", "CAPTURE", "ARRIVE", "CHECK") & walking & is_prefetch)
                | (place <= order.place(recency.mark))
            ),
            lemma(~at("FILL READ") | (waited == 2)),
            lemma(~at("FILL ARRIVE") | (waited == 3)),
            lemma(~at("FILL") | (waited == 4)),
            lemma(~at("FILL READ", "FILL ARRIVE", "FILL") | fills),
            lemma(~unpins | releases),
            lemma(unpins | ~done),
            lemma(~at("UNPIN ARRIVE") | (done & (waited == 4))),
            lemma(~at("UNPIN READ") | (done & (waited == 5))),
            lemma(~at("UNPIN CAPTURE") | (waited == Mux(done, 6, 2))),
            lemma(~at("UNPIN") | (waited == Mux(done, 7, 3))),
            lemma(~(at("UNPIN CAPTURE", "UNPIN") & ~done) | (index == 0)),
            lemma(clearing | (row == 0)),
        ]
        for back in range(config.slots):
            behind = Signal(config.bits("slot"), name=f"behind_{back}")
            m.d.comb += [
                behind.eq(slot - back - 1),
                lemma(
                    ~(clearing & (row > back))
                    | (
                        (order.newer[behind] == (behind + 1)[: len(behind)])
                        & (order.older[behind] == (behind - 1)[: len(behind)])
                    )
                ),
            ]
        ends = (recency.oldest == 0) & (recency.newest == config.slots - 1)
        in_order = Cat(order.slots[j] == j for j in range(config.slots)).all()
        m.d.comb += lemma(~(clearing & (row != 0)) | (ends & in_order))
        return m
