"""The DMA engine's arbiter: strict priority of classes, bounded waiting inside a class."""

from amaranth import Elaboratable, Module, Mux, Signal
from amaranth.asserts import AnyConst
from amaranth.hdl import Assert, Assume, Cover

from .harness import Inside, drive_freely, lemma
from .instances import dma_device

__all__ = ["ArbiterFairness", "ArbiterPriority", "order_lemmas"]


def _arbiter(m):
    """The block, free but for what its docstring asks of those who use it."""
    from prestage_hw.dma.arbiter import Arbiter

    block = Arbiter(config=dma_device(dma_channels=3))
    inside = Inside(block)
    m.submodules.block = inside.fragment
    since = Signal(2, init=3)  # Cycles since something was taken.
    with m.If(block.take):
        m.d.sync += since.eq(1)
    with m.Elif(since != 3):
        m.d.sync += since.eq(since + 1)
    m.d.comb += Assume(~block.take | (since == 3))
    return block, inside, since


def order_lemmas(m, inside, traffic, *, prefix=""):
    """State of an arbiter in the cycle before, and lemmas that its order follows from it.

    Parameters
    ----------
    m : Module
        Harness.
    inside : :class:`Inside`
        Block with the arbiter.
    traffic : array
        Class of each channel.
    prefix : :class:`str`
        Where the arbiter is in the block, with a dot at its end.

    Returns
    -------
    tuple
        Grants left to each channel, now and in the cycle before, classes in the cycle before, and
        whether there was one.
    """
    count = len(inside.signal(f"{prefix}has_left"))
    left = [inside.signal(f"{prefix}left_{c}") for c in range(count)]
    traffic_before = [Signal(2, name=f"traffic_before_{c}") for c in range(count)]
    left_before = [Signal(4, name=f"left_before_{c}") for c in range(count)]
    known = Signal()
    m.d.sync += known.eq(1)
    for c in range(count):
        m.d.sync += [traffic_before[c].eq(traffic[c]), left_before[c].eq(left[c])]
        renews = inside.signal(f"{prefix}renews_{c}")
        for d in range(count):
            renewed = (left_before[d] == 0) & (traffic_before[d] == traffic_before[c])
            m.d.comb += lemma(~known | (renews[d] == renewed))
            is_before = inside.signal(f"{prefix}before_{c}")[d]
            if c == d:
                m.d.comb += lemma(~is_before)
                continue
            d_has, c_has = left_before[d] != 0, left_before[c] != 0
            rights = (d_has | ~c_has) if d < c else (d_has & ~c_has)
            before = (traffic_before[d] < traffic_before[c]) | (
                (traffic_before[d] == traffic_before[c]) & rights
            )
            m.d.comb += lemma(~known | (is_before == before))
    return left, left_before, traffic_before, known


class ArbiterPriority(Elaboratable):
    """Classes and weights change at will."""

    def elaborate(self, platform):
        m = Module()
        block, inside, since = _arbiter(m)
        drive_freely(m, block)
        _, _, traffic_before, known = order_lemmas(m, inside, block.traffic)
        wants, choice = block.wants, block.choice
        # Who goes before whom is known a cycle after reset.
        m.d.comb += Assume(known | (wants == 0))
        channels = range(len(wants))
        m.d.comb += [
            Assert((choice & ~wants) == 0),
            Assert((choice & (choice - 1)) == 0),
            Assert((wants == 0) | (choice != 0)),
            Cover((wants == 7) & (choice == 2)),
            Cover((wants == 7) & (choice == 4) & block.take & (block.traffic[2] == 2)),
        ]
        for c in channels:
            for d in channels:
                if c != d:
                    later = traffic_before[d] >= traffic_before[c]
                    m.d.comb += Assert(~(choice[c] & wants[d]) | later)
        return m


class ArbiterFairness(Elaboratable):
    """A channel that wants to loses at most twice the others' weights in a row to its own class."""

    def elaborate(self, platform):
        m = Module()
        block, inside, since = _arbiter(m)
        drive_freely(m, block, but=("traffic", "weight"))
        left, left_before, _, known = order_lemmas(m, inside, block.traffic)
        channels = range(len(block.wants))
        traffic, weight = (
            [Signal(width, name=f"{name}_{c}") for c in channels]
            for name, width in (("traffic", 2), ("weight", 4))
        )
        for c in channels:
            m.d.comb += [
                traffic[c].eq(AnyConst(2)),
                weight[c].eq(AnyConst(4)),
                block.traffic[c].eq(traffic[c]),
                block.weight[c].eq(weight[c]),
                Assume(weight[c] != 0),
            ]
        m.d.comb += Assume(known | (block.wants == 0))
        chosen = inside.signal("chosen")
        waiting = [Signal(8, name=f"waited_{c}") for c in channels]
        for c in channels:
            # Counted when the arbiter counts: the cycle after a choice.
            lost, reset = Signal(name=f"lost_{c}"), Signal(name=f"reset_{c}")
            rivals = [d for d in channels if d != c]
            same = {d: traffic[d] == traffic[c] for d in rivals}
            taken = [block.choice[d] & same[d] for d in rivals]
            m.d.sync += [
                lost.eq(block.take & block.wants[c] & (taken[0] | taken[1])),
                reset.eq(block.take & (~block.wants[c] | block.choice[c])),
            ]
            with m.If(reset):
                m.d.sync += waiting[c].eq(0)
            with m.Elif(lost):
                m.d.sync += waiting[c].eq(waiting[c] + 1)

            bound = sum(Mux(same[d], weight[d] << 1, 0) for d in rivals)
            to_come = sum(
                Mux(same[d], left[d] + Mux(left[c] == 0, weight[d], 0), 0) for d in rivals
            )
            winners = [chosen[d] & same[d] for d in rivals]
            won = winners[0] | winners[1]
            won_by_right = (winners[0] & (left[rivals[0]] != 0)) | (
                winners[1] & (left[rivals[1]] != 0)
            )
            m.d.comb += [
                Assert(waiting[c] <= bound),
                lemma(waiting[c] + to_come <= bound),
                lemma(left[c] <= weight[c]),
                lemma((since == 1) | (~lost & ~reset & (chosen == 0))),
                lemma((since < 3) | (left_before[c] == left[c])),
                lemma(~lost | ((chosen != 0) & ~chosen[c])),
                # Who won against it is of its class, and had grants left, or neither had.
                lemma(lost == (won & ~reset)),
                lemma(~lost | (left[c] == 0) | won_by_right),
                lemma(~chosen[c] | reset),
            ]
            if c == 2:
                # The lowest number goes first, so that only others can lose as often.
                m.d.comb += Cover((waiting[c] == bound) & (bound == 2))
        m.d.comb += [lemma((chosen & (chosen - 1)) == 0), lemma(since != 0)]
        return m
