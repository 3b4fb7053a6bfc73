"""The host mover: whatever the host says, a tile comes back once, and only if it was asked for."""

from amaranth import Cat, Elaboratable, Module, Signal
from amaranth.hdl import Assert, Assume, Cover

from .harness import Held, Inside, drive_freely, lemma
from .instances import scheduler_device

__all__ = ["HostTiles"]


class HostTiles(Elaboratable):
    """Any messages of the host in any order, and restarts of it at any time."""

    def elaborate(self, platform):
        from prestage_hw.link.mover import HostMover

        m = Module()
        config = scheduler_device(mover="host")
        block = HostMover(config=config, depth=1)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block)
        at, local = inside.states("fsm_state"), inside.local
        fetch, completion = block.fetches, block.completions
        number = Cat(fetch.p.tile, fetch.p.tag)
        ended = Cat(completion.p.tile, completion.p.tag)
        tiles = range(1 << len(number))
        held = Held(m, completion.valid, completion.ready, completion.p, name="completion")
        sent = Held(m, block.replies.valid, block.replies.ready, block.replies.p, name="reply")
        new = completion.valid & ~held.waited
        taken = fetch.valid & fetch.ready

        # Tiles that were asked for and have not come back.
        asked_before = [Signal(name=f"asked_before_{i}") for i in tiles]
        asked = [Signal(name=f"asked_{i}") for i in tiles]
        for i in tiles:
            m.d.comb += asked[i].eq(asked_before[i] & ~(new & (ended == i)))
            m.d.sync += asked_before[i].eq(asked[i] | (taken & (number == i)))
            m.d.comb += [
                # The scheduler asks once for each tile, and then only when it has come back.
                Assume(~(fetch.valid & (number == i)) | ~asked[i]),
                Assert(~(new & (ended == i)) | asked_before[i]),
            ]
        m.d.comb += [
            Assert(held.kept),
            Assert(sent.kept),
            Cover(new & ~completion.p.failed),
            Cover(new & completion.p.failed & at("SWEEP", "IDLE")),
            Cover(local("uncounted") & Cat(asked).any()),
        ]

        # --- lemmas ---
        rows = inside.rows("asked")
        looked_up, sweep = local("looked_up"), local("sweep")
        read = local("asked_read").data
        m.d.comb += lemma(at())
        for i in tiles:
            here = looked_up == i
            m.d.comb += [
                lemma(at("CLEAR") | (rows[i] == asked[i])),
                lemma(~at("CLEAR") | ~asked[i]),
                lemma(~at("CLEAR") | (sweep <= i) | (rows[i] == 0)),
                lemma(~(at("LOOK", "SWEEP LOOK") & here & read) | asked[i]),
                lemma(~(at("JUDGE", "SWEEP JUDGE") & here & local("was_asked")) | asked[i]),
            ]
        m.d.comb += lemma(~at("CLEAR") | ~completion.valid)
        return m
