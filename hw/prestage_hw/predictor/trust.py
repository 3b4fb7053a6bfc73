"""Hints from outside: their learned trust, and the values of the heads that it is put on."""

from amaranth import Array, Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from prestage_hw.contract.params import require_config

from .ranking import PatchLayout
from .sets import LFSR_SEED, lfsr_next
from .tokens import NO_COLLISIONS
from .two_beats import TwoBeats

__all__ = ["HintedLayout", "OpinionLayout", "Trust", "TrustValuesLayout"]

_SEED = LFSR_SEED + 7

#: Layers of a context that may hold hints at a time, a power of two.
_PLACES = 4

_DISTANCES, _BINS = 4, 8
_MOST_TRUST = 255


class TrustValuesLayout(data.StructLayout):
    """A beat of a head's values for a layer.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Members
    -------
    ctx, layer : as in the contract's records
        Layer that the values are about.
    beat : as in the contract's records
        Element 0 is expert beat x lanes.
    values : array of 8 bits
        Confidence of each expert, in 1/256.
    last : 1 bit
        Last beat of the layer.
    """

    def __init__(self, *, config):
        require_config(config)
        super().__init__(
            {
                "ctx": unsigned(config.bits("ctx")),
                "layer": unsigned(config.bits("layer")),
                "beat": unsigned(config.bits("lane_beat")),
                "values": data.ArrayLayout(unsigned(8), config.predictor_lanes),
                "last": 1,
            }
        )


class OpinionLayout(data.StructLayout):
    """A hint as it comes from outside.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Members
    -------
    ctx, layer, expert : as in the contract's records
        What the hint is about.
    score : 8 bits
        Confidence of its source, 255 is certain.
    deadline : 8 bits
        Passed on.
    """

    def __init__(self, *, config):
        require_config(config)
        super().__init__(
            {
                "ctx": unsigned(config.bits("ctx")),
                "layer": unsigned(config.bits("layer")),
                "expert": unsigned(config.bits("expert")),
                "score": 8,
                "deadline": 8,
            }
        )


class HintedLayout(data.StructLayout):
    """A hint with the value that its expert now has.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Members
    -------
    ctx, layer, expert : as in the contract's records
        What the hint is about.
    value : 8 bits
        Confidence of the expert, in 1/256.
    near : 1 bit
        The layer is the next to be routed.
    deadline : 8 bits
        That of the hint.
    """

    def __init__(self, *, config):
        require_config(config)
        super().__init__(
            {
                "ctx": unsigned(config.bits("ctx")),
                "layer": unsigned(config.bits("layer")),
                "expert": unsigned(config.bits("expert")),
                "value": 8,
                "near": 1,
                "deadline": 8,
            }
        )


class Trust(wiring.Component):
    """Keep the heads' values and the hints for layers to come, and learn what hints are worth.

    One job at a time, in the order of arrival; of jobs that arrive in the same cycle, token starts
    come first, then values, routes, hints. What hints add goes through a pipeline, an entry of the
    layer's list a cycle::

        entry ─▶ word of values ─▶ its byte ─▶ its value ─▶ + trust ─▶ patches or hinted
          ▲                                       │
          └───────────── written back ◀───────────┘

    With n hints in the layer's list, cycles after the transfer (of values: of the last beat) and
    without stalls:

    ========= ======================================= ======================
    job       answer                                  next job is taken
    ========= ======================================= ======================
    begin                                             5; 3 with 2 layers
    values    n = 0: ``go`` at 2; 1 if several beats  2
    values    first patch at 8, the last at n + 7     n + 7
    hint      n = 0: at 7                             7
    hint      at n + 8                                n + 8
    hint      ignored: none                           at most n + 3
    route     n = 0                                   2
    route                                             2n + 3
    clear                                             words of the largest
                                                      memory + 2
    ========= ======================================= ======================

    A hint whose stored word has wrong parity is as good as none, though it still takes its place in
    the list. A value or trust with wrong parity is 0, such a list is empty.

    Without ``config.perceptron.hints`` nothing is kept, hints are dropped, and ``go`` is said 1
    cycle after the last beat.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that the block is part of; its predictor is a ``perceptron``.

    Members
    -------
    begins : ``In(stream.Signature({ctx}))``
        A token starts: the context's hints are forgotten, none of its layers is routed.
    values : ``In(stream.Signature(TrustValuesLayout))``
        A head's values for a layer, its beats in order and without another job between them.
    patches : ``Out(stream.Signature(PatchLayout))``
        New values of the layer's hinted experts; the last says ``go``.
    hints : ``In(stream.Signature(OpinionLayout))``
        Hints.
    hinted : ``Out(stream.Signature(HintedLayout))``
        Hints that were not ignored, with their experts' new values.
    routes : ``In(stream.Signature({ctx, layer, experts: array of k}))``
        A layer was routed: its hints are learned from, and dropped.
    clear : ``In(1)``
        A pulse clears everything, after the jobs that were accepted up to that cycle.
    parity_errors : ``Out(1)``
        Strobe: a word was read with wrong parity, one cycle or more ago.
    idle : ``Out(1)``
        No job, no layer in part, and nothing in an output register.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If the device has no ``perceptron`` predictor.
    """

    def __init__(self, config):
        require_config(config)
        if config.perceptron is None:
            raise ValueError("Device must have a perceptron predictor to weigh hints")
        self.config = config
        ctx, layer = unsigned(config.bits("ctx")), unsigned(config.bits("layer"))
        expert = unsigned(config.bits("expert"))
        begin = data.StructLayout({"ctx": ctx})
        route = data.StructLayout(
            {"ctx": ctx, "layer": layer, "experts": data.ArrayLayout(expert, config.model.top_k)}
        )
        super().__init__(
            {
                "begins": In(stream.Signature(begin)),
                "values": In(stream.Signature(TrustValuesLayout(config=config))),
                "patches": Out(stream.Signature(PatchLayout(config=config))),
                "hints": In(stream.Signature(OpinionLayout(config=config))),
                "hinted": Out(stream.Signature(HintedLayout(config=config))),
                "routes": In(stream.Signature(route)),
                "clear": In(1),
                "parity_errors": Out(1),
                "idle": Out(1),
            }
        )

    @property
    def most_hints(self):
        """Most hints of a layer."""
        return 2 * self.config.model.top_k

    def elaborate(self, platform):
        return self._elaborate() if self.config.perceptron.hints else self._elaborate_without()

    def _elaborate_without(self):
        m = Module()
        partial = Signal()
        m.d.comb += [
            self.begins.ready.eq(1),
            self.routes.ready.eq(1),
            self.hints.ready.eq(1),
            self.values.ready.eq(~self.patches.valid),
            self.patches.payload.go.eq(1),
            self.idle.eq(~partial & ~self.patches.valid),
        ]
        with m.If(self.values.valid & self.values.ready):
            m.d.sync += [
                partial.eq(~self.values.payload.last),
                self.patches.valid.eq(self.values.payload.last),
            ]
        with m.Elif(self.patches.ready):
            m.d.sync += self.patches.valid.eq(0)
        return m

    def _elaborate(self):
        m = Module()

        config = self.config
        contexts, lanes = config.contexts, config.predictor_lanes
        ctx_bits, layer_bits = ceil_log2(contexts), config.bits("layer")
        expert_bits, place_bits = config.bits("expert"), min(ceil_log2(_PLACES), layer_bits)
        lane_bits, beat_bits = ceil_log2(lanes), ceil_log2(config.lane_beats)
        index_bits = ceil_log2(self.most_hints)

        # One even parity bit a word, of values one each.
        byte_layout = data.StructLayout({"value": 8, "parity": 1})
        word_layout = data.ArrayLayout(byte_layout, lanes)
        list_layout = data.StructLayout({"layer": layer_bits, "count": index_bits + 1, "parity": 1})
        entry_layout = data.StructLayout(
            {"expert": expert_bits, "bin": 3, "distance": 2, "plain": 8, "parity": 1}
        )
        trust_layout = data.StructLayout({"value": signed(9), "parity": 1})

        depths = {
            "values": contexts << layer_bits + beat_bits,
            "lists": contexts << place_bits,
            "entries": contexts << place_bits + index_bits,
            "trust": _DISTANCES * _BINS,
        }
        # No value is read before the beats of its layer are written.
        m.submodules.values = values = Memory(
            shape=word_layout, depth=depths["values"], init=[], attrs=NO_COLLISIONS
        )
        m.submodules.lists = lists = Memory(shape=list_layout, depth=depths["lists"], init=[])
        m.submodules.entries = entries = Memory(
            shape=entry_layout, depth=depths["entries"], init=[]
        )
        m.submodules.trust = trust = Memory(shape=trust_layout, depth=depths["trust"], init=[])
        value_read, value_write = values.read_port(), values.write_port()
        list_read, list_write = lists.read_port(), lists.write_port()
        entry_read, entry_write = entries.read_port(), entries.write_port()
        trust_write = trust.write_port()
        trust_read = trust.read_port(transparent_for=(trust_write,))

        clear_waits = Signal()
        clear_address = Signal(range(max(depths.values())))

        # The job.
        ctx, layer = Signal(config.bits("ctx")), Signal(layer_bits)
        hint = Signal(self.hints.payload.shape())
        experts = Signal(self.routes.payload.experts.shape())
        partial = Signal()
        is_hint, is_route = Signal(), Signal()
        count, more = Signal(index_bits + 1), Signal(index_bits + 1)  # hints of the list, and 1
        index = Signal(index_bits + 1)  # the one to read

        def place_of(ctx, layer):
            """Where the list of a layer lies."""
            return Cat(layer[:place_bits], ctx[:ctx_bits])

        place = place_of(ctx, layer)

        # Of each context: one more than the layer that was routed last.
        routed = Array(Signal(layer_bits + 1, name=f"routed{n}") for n in range(contexts))
        distance = Signal(layer_bits + 1)
        passed = Signal()
        m.d.comb += [
            distance.eq(layer - routed[ctx]),
            passed.eq(layer < routed[ctx]),
            more.eq(count + 1),
        ]

        found_bad = list_read.data.as_value().xor()
        found_count = Mux(found_bad, 0, list_read.data.count)
        found_own = (found_count != 0) & (list_read.data.layer == layer)

        # Entries of the list are read one after the other. All keeps still while the output
        # register of the job is full.
        # Two registers behind it: whether it moves does not hang on those who take what comes out.
        m.submodules.patched = patched = TwoBeats(self.patches.payload.shape())
        m.submodules.scored = scored = TwoBeats(self.hinted.payload.shape())
        wiring.connect(m, patched.outgoing, wiring.flipped(self.patches))
        wiring.connect(m, scored.outgoing, wiring.flipped(self.hinted))
        move = Signal()
        ask, coming, here = Signal(), Signal(), Signal()
        coming_at, here_at = Signal(index_bits), Signal(index_bits)
        here_last = here_at == (count - 1)[:index_bits]
        entry = Signal(entry_layout)
        entry_bad = entry.as_value().xor()
        m.d.comb += [
            move.eq(patched.incoming.ready),
            entry_read.addr.eq(Cat(index[:index_bits], place)),
            entry_read.en.eq(move),
        ]
        with m.If(is_hint):
            m.d.comb += move.eq(scored.incoming.ready)
        with m.Elif(is_route):
            m.d.comb += move.eq(1)
        with m.If(move):
            m.d.sync += [
                coming.eq(ask),
                coming_at.eq(index),
                here.eq(coming),
                here_at.eq(coming_at),
                entry.eq(entry_read.data),
            ]
            with m.If(ask):
                m.d.sync += index.eq(index + 1)

        # Stage 1: the entry is there, or the hint that becomes one. Stages 2 to 5: the word of
        # values, its byte, the byte's value, the sum with the trust.
        stage_layout = data.StructLayout(
            {
                "valid": 1,
                "known": 1,
                "last": 1,
                "at": index_bits,
                "expert": expert_bits,
                "bin": 3,
                "distance": 2,
            }
        )
        stage_1, stage_2, stage_3, stage_4, stage_5 = (
            Signal(stage_layout, name=f"stage_{n}") for n in range(1, 6)
        )
        m.d.comb += [
            stage_1.known.eq(~entry_bad),
            stage_1.last.eq(here_last),
            stage_1.at.eq(here_at),
            stage_1.expert.eq(entry.expert),
            stage_1.bin.eq(entry.bin),
            stage_1.distance.eq(entry.distance),
        ]
        with m.If(is_hint):
            m.d.comb += [
                stage_1.known.eq(1),
                stage_1.last.eq(1),
                stage_1.at.eq(count),
                stage_1.expert.eq(hint.expert),
                stage_1.bin.eq(hint.score[5:]),
                stage_1.distance.eq(Mux(distance[2:].any(), _DISTANCES - 1, distance[:2])),
            ]
        raw = Signal(word_layout)
        byte = Signal(byte_layout)
        plain = Signal(8)
        extra = Signal(signed(9))
        byte_bad = byte.as_value().xor()
        trust_bad = trust_read.data.as_value().xor()
        trusted = Signal(signed(9))

        def weighed(value, extra):
            """Sum of a value and trust, 0 to 255."""
            total = Signal(signed(10))
            m.d.comb += total.eq(value + extra)
            return Mux(total[9], 0, Mux(total[8], 255, total[:8]))

        value = weighed(plain, extra)
        done = Signal()
        m.d.comb += [
            value_read.addr.eq(
                Cat(stage_1.expert[lane_bits : lane_bits + beat_bits], layer, ctx[:ctx_bits])
            ),
            value_read.en.eq(move),
            trust_read.addr.eq(Cat(stage_3.bin, stage_3.distance)),
            trust_read.en.eq(move),
            trusted.eq(Mux(trust_bad, 0, trust_read.data.value)),
            entry_write.addr.eq(Cat(stage_5.at, place)),
            entry_write.data.expert.eq(stage_5.expert),
            entry_write.data.bin.eq(stage_5.bin),
            entry_write.data.distance.eq(stage_5.distance),
            entry_write.data.plain.eq(plain),
            entry_write.data.parity.eq(
                Cat(stage_5.expert, stage_5.bin, stage_5.distance, plain).xor()
            ),
            entry_write.en.eq(stage_5.valid & stage_5.known & move),
            done.eq(stage_5.valid & stage_5.last & move),
        ]
        with m.If(move):
            m.d.sync += [
                stage_2.eq(stage_1),
                stage_3.eq(stage_2),
                stage_4.eq(stage_3),
                stage_5.eq(stage_4),
                raw.eq(value_read.data),
                byte.eq(raw[stage_3.expert[:lane_bits]]),
                plain.eq(Mux(byte_bad, 0, byte.value)),
                extra.eq(trusted),
            ]

        # Learning: the trust is there, then the sum with it, then the trust is written.
        guess_now, learn_now = Signal(), Signal()
        learn_address, learned_address = (
            Signal(trust_read.addr.shape()),
            Signal(trust_read.addr.shape()),
        )
        learn_plain, guess = Signal(8), Signal(8)
        chosen, chosen_late = Signal(), Signal()
        learn_known, learn_last = Signal(), Signal()
        base = Signal(signed(9))
        lfsr = Signal(32, init=_SEED)
        moves, most = Signal(), Signal()
        stepped = Signal(signed(9))
        m.d.sync += learn_now.eq(guess_now)
        with m.If(guess_now):
            m.d.sync += [
                guess.eq(weighed(learn_plain, trusted)),
                base.eq(trusted),
                learned_address.eq(learn_address),
                chosen_late.eq(chosen),
                lfsr.eq(lfsr_next(lfsr)),
            ]
        # (error + u) >> 8 is 1 or 0 for what was chosen, -1 or 0 for the rest.
        m.d.comb += [
            moves.eq((lfsr[:8] >= guess) == chosen_late),
            most.eq(base == Mux(chosen_late, _MOST_TRUST, -_MOST_TRUST)),
            stepped.eq(base + Mux(chosen_late, 1, -1)),
        ]

        # Writes; clearing writes zeros everywhere.
        taken = self.values.payload
        clearing = Signal()
        m.d.comb += [
            value_write.addr.eq(Cat(taken.beat[:beat_bits], taken.layer, taken.ctx[:ctx_bits])),
            value_write.en.eq(self.values.valid & self.values.ready),
            list_write.addr.eq(place),
            trust_write.addr.eq(learned_address),
            trust_write.data.value.eq(Mux(moves & ~most, stepped, base)),
            trust_write.data.parity.eq(Mux(moves & ~most, stepped.xor(), base.xor())),
            trust_write.en.eq(learn_now),
        ]
        for lane in range(lanes):
            m.d.comb += [
                value_write.data[lane].value.eq(taken.values[lane]),
                value_write.data[lane].parity.eq(taken.values[lane].xor()),
            ]

        free = Signal()
        m.d.comb += [
            free.eq(~partial & ~clear_waits),
            list_read.addr.eq(place),
        ]

        with m.If(self.clear):
            m.d.sync += clear_waits.eq(1)
        unhinted = Signal()  # the layer's values stay as they are
        m.d.comb += [
            scored.incoming.valid.eq(stage_5.valid & is_hint),
            scored.incoming.payload.ctx.eq(ctx),
            scored.incoming.payload.layer.eq(layer),
            scored.incoming.payload.expert.eq(stage_5.expert),
            scored.incoming.payload.value.eq(value),
            scored.incoming.payload.near.eq(stage_5.distance == 0),
            scored.incoming.payload.deadline.eq(hint.deadline),
            patched.incoming.valid.eq(unhinted | (stage_5.valid & ~is_hint)),
            patched.incoming.payload.expert.eq(stage_5.expert),
            patched.incoming.payload.value.eq(value),
            patched.incoming.payload.valid.eq(stage_5.known & ~unhinted),
            patched.incoming.payload.go.eq(stage_5.last | unhinted),
        ]

        bad_list, bad_entry = Signal(), Signal()
        learn_bad = Signal()
        m.d.comb += learn_bad.eq(guess_now & trust_bad)
        m.d.sync += self.parity_errors.eq(
            bad_list
            | bad_entry
            | learn_bad
            | (move & stage_4.valid & stage_4.known & (byte_bad | trust_bad))
        )

        with m.FSM(init="Clear") as fsm:
            with m.State("Clear"):
                m.d.comb += clearing.eq(1)
                for write in (value_write, list_write, entry_write, trust_write):
                    m.d.comb += [write.addr.eq(clear_address), write.data.eq(0), write.en.eq(1)]
                m.d.sync += [clear_address.eq(clear_address + 1), lfsr.eq(_SEED)]
                m.d.sync += [number.eq(0) for number in routed]
                with m.If(clear_address == max(depths.values()) - 1):
                    m.next = "Idle"
            with m.State("Idle"):
                # The list of what is taken, if anything is: the first that is valid.
                m.d.comb += list_read.addr.eq(
                    place_of(self.hints.payload.ctx, self.hints.payload.layer)
                )
                for source in (self.routes, self.values):
                    with m.If(source.valid):
                        m.d.comb += list_read.addr.eq(
                            place_of(source.payload.ctx, source.payload.layer)
                        )
                with m.If(partial):
                    m.d.comb += list_read.addr.eq(place)
                m.d.comb += [
                    self.begins.ready.eq(free),
                    self.values.ready.eq(partial | (free & ~self.begins.valid)),
                    self.routes.ready.eq(free & ~self.begins.valid & ~self.values.valid),
                    self.hints.ready.eq(self.routes.ready & ~self.routes.valid),
                ]
                m.d.sync += [
                    index.eq(0),
                    coming.eq(0),
                    here.eq(0),
                    is_hint.eq(self.hints.valid & self.hints.ready),
                    is_route.eq(self.routes.valid & self.routes.ready),
                ]
                with m.If(self.values.valid & self.values.ready):
                    m.d.sync += [
                        ctx.eq(taken.ctx),
                        layer.eq(taken.layer),
                        partial.eq(~taken.last),
                    ]
                    with m.If(taken.last):
                        m.next = "Look"
                        # The list was there with the beat before.
                        with m.If(partial & move & ~found_bad & ~found_own):
                            m.d.comb += unhinted.eq(1)
                            m.next = "Idle"
                with m.Elif(self.begins.valid & self.begins.ready):
                    m.d.sync += ctx.eq(self.begins.payload.ctx)
                    m.next = "Forget"
                with m.Elif(self.routes.valid & self.routes.ready):
                    route = self.routes.payload
                    m.d.sync += [
                        ctx.eq(route.ctx),
                        layer.eq(route.layer),
                        experts.eq(route.experts),
                    ]
                    m.next = "Look"
                with m.Elif(self.hints.valid & self.hints.ready):
                    m.d.sync += [
                        ctx.eq(self.hints.payload.ctx),
                        layer.eq(self.hints.payload.layer),
                        hint.eq(self.hints.payload),
                    ]
                    m.next = "Look"
                with m.Elif(clear_waits & ~partial):
                    m.d.sync += [clear_waits.eq(self.clear), clear_address.eq(0)]
                    m.next = "Clear"
            with m.State("Forget"):
                m.d.comb += [
                    list_write.addr.eq(place_of(ctx, index)),
                    list_write.data.eq(0),
                    list_write.en.eq(1),
                ]
                m.d.sync += index.eq(index + 1)
                for n in range(contexts):
                    with m.If(ctx == n):
                        m.d.sync += routed[n].eq(0)
                with m.If(index[:place_bits].all()):
                    m.next = "Idle"
            with m.State("Look"):
                m.d.sync += count.eq(found_count)
                with m.If(move):
                    m.d.comb += [bad_list.eq(found_bad), ask.eq(1)]
                    with m.If(is_hint):
                        m.next = "Scan"
                        with m.If(found_count == 0):
                            m.next = "Enter"
                        with m.If(
                            passed
                            | (found_count == self.most_hints)
                            | ((found_count != 0) & ~found_own)
                        ):
                            m.next = "Idle"
                    with m.Elif(is_route):
                        for n in range(contexts):
                            with m.If(ctx == n):
                                m.d.sync += routed[n].eq(layer + 1)
                        m.next = "Idle"
                        with m.If(found_own):
                            m.d.comb += list_write.en.eq(1)  # with no hints
                            m.next = "Await"
                    with m.Elif(found_own):
                        m.next = "Patch"
                    with m.Else():
                        m.d.comb += unhinted.eq(1)
                        m.next = "Idle"

            with m.State("Patch"):
                m.d.comb += [
                    ask.eq(index != count),
                    stage_1.valid.eq(here),
                    bad_entry.eq(move & here & entry_bad),
                ]
                with m.If(done):
                    m.next = "Idle"

            with m.State("Scan"):
                m.d.comb += [ask.eq(index != count), bad_entry.eq(move & here & entry_bad)]
                with m.If(move & here):
                    with m.If(here_last):
                        m.next = "Enter"
                    with m.If(~entry_bad & (entry.expert == hint.expert)):
                        m.next = "Idle"
            with m.State("Enter"):
                with m.If(move):
                    m.d.comb += [
                        stage_1.valid.eq(1),
                        list_write.data.layer.eq(layer),
                        list_write.data.count.eq(more),
                        list_write.data.parity.eq(Cat(layer, more).xor()),
                        list_write.en.eq(1),
                    ]
                    m.next = "Weigh"
            with m.State("Weigh"):
                with m.If(done):
                    m.next = "Idle"

            with m.State("Await"):
                m.next = "Learn"
            with m.State("Learn"):
                m.d.comb += [
                    ask.eq(1),
                    trust_read.addr.eq(Cat(entry.bin, entry.distance)),
                    bad_entry.eq(entry_bad),
                ]
                m.d.sync += [
                    learn_address.eq(trust_read.addr),
                    learn_plain.eq(entry.plain),
                    chosen.eq(Cat(expert == entry.expert for expert in experts).any()),
                    learn_known.eq(~entry_bad),
                    learn_last.eq(here_last),
                ]
                m.next = "Guess"
            with m.State("Guess"):
                m.d.comb += guess_now.eq(learn_known)
                m.next = "Learn"
                with m.If(learn_last):
                    m.next = "Idle"

        m.d.comb += self.idle.eq(
            fsm.ongoing("Idle") & free & ~patched.outgoing.valid & ~scored.outgoing.valid
        )
        return m
