"""Which of the host's writes reach a slot."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

__all__ = ["WriteGate"]


class WriteGate(wiring.Component):
    """Let through what the host writes to tiles that it was asked for, and count their beats.

    A tile is open from its FETCH until it is reported. Beats for others, out of range or not, are
    dropped. A tile is whole once as many beats as it has were let through, in whatever order: they
    are counted, not remembered, so that the host has to write each once.

    What is known of one tile is in registers. Beats of it pass one a cycle; the first of another
    tile, and the first after any tile was opened or closed, takes two more.

    After reset the block clears itself in ``clear_cycles``, and takes nothing meanwhile.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose slots the host writes.

    Attributes
    ----------
    clear_cycles : :class:`int`
        Cycles that clearing takes.

    Members
    -------
    port : ``In(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Beats of the host's own bus.
    link : ``In(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Beats that came over the link; they go first.
    astray : ``In(1)``
        That of ``link`` is for a slot or a beat that there is not, which its fields cannot say.
    o : ``Out(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Those that are let through.
    changes : ``In(1)``
        A strobe: tile ``tile`` of slot ``slot`` is opened if ``opens``, else closed. What is taken
        from the next cycle on is judged by that.
    opens, slot, tile : ``In``
        See ``changes``.
    asks : ``In(1)``
        Tile ``asked_tile`` of slot ``asked_slot`` is asked about, until ``told``. Nothing is taken
        from ``port`` meanwhile, so that what was taken before counts.
    asked_slot, asked_tile : ``In``
        See ``asks``.
    told : ``Out(1)``
        The answer is there, in this cycle.
    whole : ``Out(1)``
        The answer: all beats of the tile were let through.
    refused : ``Out(1)``
        A strobe for each beat that was dropped.
    clearing, idle : ``Out(1)``
        The block clears itself; no beat is in the block.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self._row_bits = config.bits("slot") + config.bits("tile")
        self.clear_cycles = 1 << self._row_bits
        beats = stream.Signature(RecordLayout("BufferWrite", config=config))
        super().__init__(
            {
                "port": In(beats),
                "link": In(beats),
                "astray": In(1),
                "o": Out(beats),
                "changes": In(1),
                "opens": In(1),
                "slot": In(config.bits("slot")),
                "tile": In(config.bits("tile")),
                "asks": In(1),
                "asked_slot": In(config.bits("slot")),
                "asked_tile": In(config.bits("tile")),
                "told": Out(1),
                "whole": Out(1),
                "refused": Out(1),
                "clearing": Out(1, init=1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config

        # Of each tile of each slot: whether it is open, and how many beats are missing.
        state = data.StructLayout({"open": 1, "missing": range(config.tile_beats + 1)})
        m.submodules.rows = rows = Memory(
            shape=state, depth=1 << self._row_bits, init=[], attrs={"no_rw_check": 1}
        )
        read, write = rows.read_port(), rows.write_port()

        # A beat of the port waits here; one of the link where it comes from.
        held = Signal.like(self.port.payload)
        held_valid = Signal()
        passes = Signal()  # The beat that is looked at goes on, or is dropped.
        is_link = self.link.valid
        m.d.comb += [
            self.port.ready.eq(~self.clearing & ~self.asks & (~held_valid | (passes & ~is_link))),
            self.link.ready.eq(passes & is_link),
        ]
        with m.If(passes & ~is_link):
            m.d.sync += held_valid.eq(0)
        with m.If(self.port.valid & self.port.ready):
            m.d.sync += [held_valid.eq(1), held.eq(self.port.payload)]

        beat = Signal.like(held)
        valid = Signal()
        row = Signal(self._row_bits)  # of the beat, else of what is asked about
        m.d.comb += [
            beat.eq(Mux(is_link, self.link.payload, held)),
            valid.eq(is_link | held_valid),
        ]
        tile = Signal(config.bits("tile"))
        m.d.comb += [
            tile.eq(beat.beat >> (config.tile_beats - 1).bit_length()),
            row.eq(Mux(valid, Cat(tile, beat.slot), Cat(self.asked_tile, self.asked_slot))),
        ]

        # What is known: that of row ``at``.
        at = Signal(self._row_bits)
        known = Signal()
        entry = Signal(state)
        hit = Signal()
        left = Signal(range(config.tile_beats + 1))
        m.d.comb += [
            hit.eq(known & (at == row)),
            left.eq(entry.missing - (entry.missing != 0)),
            read.addr.eq(row),
            self.whole.eq(entry.open & (entry.missing == 0)),
        ]

        sweep = Signal(self._row_bits)
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        m.d.sync += self.refused.eq(0)
        with m.FSM(init="CLEAR"):
            with m.State("CLEAR"):
                m.d.comb += [write.en.eq(1), write.addr.eq(sweep)]
                m.d.sync += sweep.eq(sweep + 1)
                with m.If(sweep.all()):
                    m.d.sync += self.clearing.eq(0)
                    m.next = "JUDGE"

            with m.State("JUDGE"):
                with m.If(self.changes):
                    pass  # see below
                with m.Elif(is_link & self.astray):
                    m.d.comb += passes.eq(1)
                    m.d.sync += self.refused.eq(1)
                with m.Elif(valid & hit):
                    with m.If(~self.o.valid | self.o.ready):
                        m.d.comb += [
                            passes.eq(1),
                            write.en.eq(1),
                            write.addr.eq(at),
                            write.data.open.eq(entry.open),
                            write.data.missing.eq(left),
                        ]
                        m.d.sync += [
                            entry.missing.eq(left),
                            self.o.valid.eq(entry.open),
                            self.o.payload.eq(beat),
                            self.refused.eq(~entry.open),
                        ]
                with m.Elif(valid | (self.asks & ~hit)):
                    m.d.sync += [at.eq(row), known.eq(0)]
                    m.next = "LOOK"
                with m.Elif(self.asks):
                    m.d.comb += self.told.eq(1)

            with m.State("LOOK"):
                m.d.sync += [entry.eq(read.data), known.eq(~self.changes)]
                m.next = "JUDGE"

        with m.If(self.changes & ~self.clearing):
            m.d.comb += [
                write.en.eq(1),
                write.addr.eq(Cat(self.tile, self.slot)),
                write.data.open.eq(self.opens),
                write.data.missing.eq(config.tile_beats),
            ]
            m.d.sync += known.eq(0)

        m.d.comb += self.idle.eq(~self.clearing & ~valid & ~self.o.valid)
        return m
