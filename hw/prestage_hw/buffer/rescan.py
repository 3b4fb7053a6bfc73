"""Which missing expert is worth a prefetch most, by the buffer's own values."""

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.benefit import CONFIDENCE_STEPS, LEAST_STEPS
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import RescanCode, ValueKind
from prestage_hw.layouts import RecordLayout

__all__ = ["Rescan"]

#: Experts that came or went and wait to be noted: two an operation, which takes as long as they do.
_CHANGES = 4


class Rescan(wiring.Component):
    """Walk through the values of the next layers for the missing expert of greatest benefit.

    It has memories of its own: of each expert the value that counts, V or half of R, and of each
    beat of experts which of them have a slot. So lookups and searches never wait for a walk. One
    that is under way when something changes that it may have looked at is given up, and answered
    with DISTURBED.

    An answer comes at most ``longest(ahead)`` cycles after its request was taken: each beat of
    values takes a cycle, and each missing expert in it that is likely enough another.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are looked at.

    Attributes
    ----------
    row_bits : :class:`int`
        Width of ``row``, in bits.

    Members
    -------
    requests : ``In(stream.Signature(RecordLayout("RescanRequest", config=config)))``
        Where to look. Taken while ``calm`` and nothing is noted or answered.
    results : ``Out(stream.Signature(RecordLayout("RescanResult", config=config)))``
        One result a request.
    calm : ``In(1)``
        No operation is under way, and none begins.
    disturbed : ``In(1)``
        Experts may come or go from now on.
    value_valid, value : ``In``
        Strobe: this beat of values comes.
    decided, ctx, layer : ``In``
        Strobe: a decision of this context, for this layer, begins.
    changed : ``In(1)``
        Strobe: the expert in ``key`` comes or goes; not while a walk is under way.
    key : ``In(StructLayout({"expert": ..., "layer": ...}))``
        That expert.
    comes : ``In(1)``
        It comes.
    clear : ``In(1)``, ``row`` : ``In(row_bits)``
        Forget row ``row`` of all memories.
    idle : ``Out(1)``
        No walk, and nothing to be noted.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self._layer_bits = config.bits("layer")
        self._ctx_bits = config.bits("ctx") if config.contexts > 1 else 0
        self._beat_bits = config.bits("lane_beat") if config.lane_beats > 1 else 0
        self.row_bits = self._beat_bits + self._layer_bits + self._ctx_bits
        key = data.StructLayout(
            {"expert": unsigned(config.bits("expert")), "layer": unsigned(config.bits("layer"))}
        )
        super().__init__(
            {
                "requests": In(stream.Signature(RecordLayout("RescanRequest", config=config))),
                "results": Out(stream.Signature(RecordLayout("RescanResult", config=config))),
                "calm": In(1),
                "disturbed": In(1),
                "value_valid": In(1),
                "value": In(RecordLayout("ValueBeat", config=config)),
                "decided": In(1),
                "ctx": In(config.bits("ctx")),
                "layer": In(config.bits("layer")),
                "changed": In(1),
                "key": In(key),
                "comes": In(1),
                "clear": In(1),
                "row": In(self.row_bits),
                "idle": Out(1),
            }
        )

    def longest(self, ahead):
        """Most cycles from a request to its answer, that many layers ahead."""
        return ahead * self.config.lane_beats * (self.config.predictor_lanes + 1) + 12

    def elaborate(self, platform):
        m = Module()
        config = self.config
        lanes, beats = config.predictor_lanes, config.lane_beats
        lane_bits = (lanes - 1).bit_length()

        def rows(shape, bits):
            # What is read while a row is written is not looked at: synthesis need not care for it.
            return Memory(shape=shape, depth=1 << bits, init=[], attrs={"no_rw_check": 1})

        place_bits = self._beat_bits + self._layer_bits
        m.submodules.values = values = rows(unsigned(8 * lanes), self.row_bits)
        m.submodules.there = there = rows(unsigned(lanes), place_bits)
        value_read, value_write = values.read_port(), values.write_port()
        there_read, there_write = there.read_port(), there.write_port()

        # Layer after the one of each context's latest decision.
        following = Signal(config.bits("layer"))
        last_layer = config.model.layers - 1
        m.d.comb += following.eq(Mux(self.layer == last_layer, 0, self.layer + 1))
        following_of = [
            Signal(config.bits("layer"), name=f"next_{c}") for c in range(config.contexts)
        ]
        for c, each in enumerate(following_of):
            with m.If(self.decided & (self.ctx == c)):
                m.d.sync += each.eq(following)
            with m.If(self.clear):
                m.d.sync += each.eq(0)

        # --- what comes is written a cycle later ---
        written = Signal()
        beat_written = Signal(self.value.shape())
        halved = Signal(8 * lanes)
        m.d.sync += [written.eq(self.value_valid), beat_written.eq(self.value)]
        m.d.comb += [
            halved.eq(Cat(Cat(each[1:], Const(0, 1)) for each in beat_written.values)),
            value_write.addr.eq(self._row(beat_written)),
            value_write.data.eq(
                Mux(
                    beat_written.kind == ValueKind.REUSE,
                    halved,
                    beat_written.values.as_value(),
                )
            ),
            value_write.en.eq(written),
        ]
        with m.If(self.clear):
            m.d.comb += [
                value_write.addr.eq(self.row),
                value_write.data.eq(0),
                value_write.en.eq(1),
            ]

        # --- who has a slot: a row is read, changed and written, in three cycles ---
        change_layout = data.StructLayout({"comes": 1, "key": self.key.shape()})
        m.submodules.changes = changes = fifo.SyncFIFO(width=change_layout.size, depth=_CHANGES)
        change = data.View(change_layout, changes.r_data)
        change_row = Signal(place_bits)
        noting, note_row = Signal(), Signal(lanes)
        lane = Signal(lanes)
        writes = Signal()
        m.d.comb += [
            changes.w_data.eq(Cat(self.comes, self.key)),
            changes.w_en.eq(self.changed),
            change_row.eq(Cat(change.key.expert[lane_bits:], change.key.layer)),
            lane.eq(Const(1, lanes) << change.key.expert[:lane_bits]),
            changes.r_en.eq(writes),
            there_write.addr.eq(change_row),
            there_write.data.eq(Mux(change.comes, note_row | lane, note_row & ~lane)),
            there_write.en.eq(writes),
        ]
        read_done = Signal()
        m.d.sync += [
            noting.eq(Mux(writes, changes.level > 1, changes.r_rdy & ~noting & ~read_done)),
            read_done.eq(noting),
            writes.eq(read_done),
        ]
        with m.If(read_done):
            m.d.sync += note_row.eq(there_read.data)
        with m.If(self.clear):
            m.d.sync += [noting.eq(0), read_done.eq(0), writes.eq(0)]
            m.d.comb += [
                changes.r_en.eq(changes.r_rdy),
                there_write.addr.eq(self.row),
                there_write.data.eq(0),
                there_write.en.eq(1),
            ]
        noted = Signal()
        m.d.comb += noted.eq(~changes.r_rdy & ~self.changed)

        # --- the walk ---
        request = Signal(self.requests.payload.shape())
        starting, skipping, walking = Signal(), Signal(), Signal()
        layer, beat, ahead = Signal.like(following), Signal(range(beats)), Signal(8)
        more = Signal()  # beats to be read
        at_1, at_2, at_3 = (
            Signal(
                data.StructLayout(
                    {"valid": 1, "layer": self._layer_bits, "beat": range(beats), "ahead": 8}
                ),
                name=f"at_{n}",
            )
            for n in (1, 2, 3)
        )
        word_2, word_3 = Signal(8 * lanes, reset_less=True), Signal(8 * lanes)
        there_2 = Signal(lanes, reset_less=True)
        counts_2 = Signal()
        likely = Signal(lanes)
        missing = Signal(lanes)  # and likely enough, not yet looked at
        advance = Signal()
        last_beat = beats - 1
        filled = config.model.experts - last_beat * lanes  # lanes of the last beat
        after = Mux(layer == last_layer, 0, layer + 1)
        m.d.comb += [
            advance.eq(~missing.any()),
            value_read.addr.eq(Cat(beat[: self._beat_bits], layer, request.ctx[: self._ctx_bits])),
            value_read.en.eq(advance),
            there_read.addr.eq(Mux(noting, change_row, Cat(beat[: self._beat_bits], layer))),
            there_read.en.eq(noting | advance),
        ]
        for n in range(lanes):
            in_layer = (at_2.beat != last_beat) if n >= filled else 1
            m.d.comb += likely[n].eq(
                (word_2.word_select(n, 8) >= request.least) & ~there_2[n] & counts_2 & in_layer
            )
        with m.If(advance):
            m.d.sync += [
                at_1.valid.eq(more),
                at_1.layer.eq(layer),
                at_1.beat.eq(beat),
                at_1.ahead.eq(ahead),
                at_2.eq(at_1),
                word_2.eq(value_read.data),
                there_2.eq(there_read.data),
                counts_2.eq(at_1.valid & (at_1.layer < request.cutoff_layer)),
                at_3.eq(at_2),
                word_3.eq(word_2),
                missing.eq(likely),
            ]
            with m.If(more & (beat == last_beat)):
                m.d.sync += [
                    beat.eq(0),
                    layer.eq(after),
                    ahead.eq(ahead + 1),
                    more.eq(ahead != request.ahead),
                ]
            with m.Elif(more):
                m.d.sync += beat.eq(beat + 1)

        # One of those that are missing a cycle: which, its value, its steps, what is left to it.
        lowest = Signal(lanes)
        lane_0, lane_1 = Signal(range(lanes)), Signal(range(lanes))
        picks = Signal(4)  # what is in each of the following registers
        found_layout = data.StructLayout(
            {
                "layer": self._layer_bits,
                "expert": config.bits("expert"),
                "value": 8,
                "ahead": 8,
            }
        )
        found_2, found_3, found_4, best = (
            Signal(found_layout, name=name) for name in ("found_2", "found_3", "found_4", "best")
        )
        steps = Signal(range(LEAST_STEPS + 1))
        left, best_left = Signal(8), Signal(8)
        m.d.comb += lowest.eq(missing & -missing)
        for n in range(lanes):
            with m.If(lowest[n]):
                m.d.comb += lane_0.eq(n)
        with m.If(~advance):
            m.d.sync += missing.eq(missing & ~lowest)
        m.d.sync += [
            picks.eq(Cat(~advance, picks[:-1])),
            lane_1.eq(lane_0),
            # ``at_3`` and ``word_3`` stay until the cycle after the last of their lanes.
            found_2.layer.eq(at_3.layer),
            found_2.expert.eq(Cat(lane_1, at_3.beat)),
            found_2.value.eq(word_3.word_select(lane_1, 8)),
            found_2.ahead.eq(at_3.ahead),
            found_3.eq(found_2),
            steps.eq(Array(Const(n, len(steps)) for n in CONFIDENCE_STEPS)[found_2.value]),
            found_4.eq(found_3),
            left.eq(found_3.ahead + steps),
        ]
        with m.If(picks[3] & (left < best_left)):
            m.d.sync += [best.eq(found_4), best_left.eq(left)]

        # What lies farther away can't be better.
        enough = Signal()
        ended = Signal()
        under_way = more | at_1.valid | at_2.valid | missing.any() | picks.any()
        m.d.sync += [
            enough.eq(at_3.valid & (at_3.ahead >= best_left) & advance & ~picks.any()),
            ended.eq(walking & ~under_way),
        ]

        # What disturbs comes late in a cycle, so that nothing but a register hangs on it: a cycle
        # later it stands in place of whatever the walk has found by then.
        answered = Signal()
        result = Signal(self.results.payload.shape())
        busy, busy_before = Signal(), Signal()
        came, disturbed = Signal(), Signal()
        m.d.sync += [
            came.eq(self.disturbed | self.value_valid),
            busy_before.eq(busy & ~disturbed),
        ]
        with m.If(self.results.ready):
            m.d.sync += answered.eq(0)
        m.d.comb += [
            disturbed.eq(busy_before & came),
            self.results.valid.eq(answered | disturbed),
            self.results.payload.eq(result),
            self.results.payload.code.eq(Mux(disturbed, RescanCode.DISTURBED, result.code)),
            busy.eq(starting | skipping | walking),
            self.requests.ready.eq(self.calm & noted & ~busy & ~answered),
            self.idle.eq(noted & ~busy & ~answered & ~disturbed),
        ]
        with m.If(self.requests.valid & self.requests.ready):
            m.d.sync += [request.eq(self.requests.payload), starting.eq(1)]
        with m.If(starting):
            m.d.sync += [
                starting.eq(0),
                skipping.eq(1),
                layer.eq(Array(following_of)[request.ctx]),
                ahead.eq(Mux(request.near, 1, 2)),
                beat.eq(0),
                best_left.eq(~0),
                Cat(picks, at_3.valid, ended, enough).eq(0),
            ]
        with m.If(skipping):
            m.d.sync += [skipping.eq(0), walking.eq(1), more.eq(ahead <= request.ahead)]
            with m.If(~request.near):
                m.d.sync += layer.eq(after)
        found = ~best_left.all()
        stops = Signal()  # All else of the walk does so before another can start.
        m.d.sync += stops.eq(0)
        with m.If(walking & (ended | enough) & ~disturbed):
            m.d.sync += [
                walking.eq(0),
                stops.eq(1),
                answered.eq(1),
                result.layer.eq(Mux(found, best.layer, 0)),
                result.expert.eq(Mux(found, best.expert, 0)),
                result.value.eq(Mux(found, best.value, 0)),
                result.ahead.eq(Mux(found, best.ahead, 0)),
                result.code.eq(Mux(found, RescanCode.FOUND, RescanCode.NOTHING)),
            ]
        with m.If(disturbed):
            m.d.sync += [
                Cat(starting, skipping, walking).eq(0),
                stops.eq(1),
                answered.eq(~self.results.ready),
                result.code.eq(RescanCode.DISTURBED),
            ]
        with m.If(stops):
            m.d.sync += [Cat(more, at_1.valid, at_2.valid, counts_2).eq(0), missing.eq(0)]
        return m

    def _row(self, beat):
        return Cat(beat.beat[: self._beat_bits], beat.layer, beat.ctx[: self._ctx_bits])
