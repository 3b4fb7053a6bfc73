"""One head of the ``perceptron`` predictor: an online linear model in integers."""

from functools import reduce
from operator import add, or_

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.checks import require_integer
from prestage_hw.contract.params import require_config
from prestage_hw.contract.perceptron import HeadConfig
from prestage_hw.layouts import RecordLayout

from .sets import LFSR_SEED, SETS, SetLayout, lfsr_next

__all__ = ["LinearHead"]

#: Predictions and learnings that the head takes: one under way and two that wait.
_JOBS = 3

#: Lanes that share a parity bit.
_GROUP = 8

#: Bits of a memory from which on UltraRAM is asked for: more than parts without it have in all.
_LARGE_BITS = 1 << 22

#: Depth of a block RAM at 8 bits and more. The multiplexer behind a deeper memory has a cycle of
#: its own, since block RAM is slow.
_BANK_WORDS = 2048

# The hash of a conjunction, 157 first + 1265 second, as shifted terms that are added or subtracted.
_FIRST_TERMS = ((7, 1), (5, 1), (2, -1), (0, 1))
_SECOND_TERMS = ((10, 1), (8, 1), (4, -1), (0, 1))

_LANE_STEP, _FEATURE_STEP = 97, 59
_MATURE_BELOW = (64, 16)  # of 256, by stage


def _index_bits(count):
    """Bits of an index below ``count``; 0 for 1."""
    return (count - 1).bit_length()


def _pick(index, items):
    """Item of an index, as a tree of multiplexers."""
    items = list(items)
    if len(items) == 1:
        return items[0]
    half = 1 << _index_bits(len(items)) - 1
    top = index[_index_bits(len(items)) - 1]
    return Mux(top, _pick(index, items[half:]), _pick(index, items[:half]))


def _times(value, factor, *, bits):
    """Product with a positive constant, as shifted terms."""
    terms = [Cat(Const(0, n), value) if n else value for n in range(bits) if factor >> n & 1]
    return reduce(add, terms)[:bits] if len(terms) > 1 else Cat(terms[0], Const(0, bits))[:bits]


def _even_parity(bits):
    """Even parity of a value."""
    return Value.cast(bits).xor()


class _Scratch:
    """Words that can be read in the cycle of their address: LUT memory, a register if only one.

    Parameters
    ----------
    m : :class:`Module`
        Where it is added.
    name : :class:`str`
        Name of the memory.
    bits, depth : :class:`int`
        Width of a word, number of words.
    init : :class:`int`
        What a register holds after reset; a memory has to be written first.
    """

    def __init__(self, m, name, *, bits, depth, init=0):
        self.read_address = Signal(range(depth), name=f"{name}_at")
        self.read_data = Signal(bits, name=f"{name}_found")
        self.write_address = Signal(range(depth), name=f"{name}_write_at")
        self.write_data = Signal(bits, name=f"{name}_write_data")
        self.write = Signal(name=f"{name}_write")
        if depth == 1:
            word = Signal(bits, name=name, init=init)
            m.d.comb += self.read_data.eq(word)
            with m.If(self.write):
                m.d.sync += word.eq(self.write_data)
        else:
            m.submodules[name] = memory = Memory(shape=bits, depth=depth, init=[])
            read, write = memory.read_port(domain="comb"), memory.write_port()
            m.d.comb += [
                read.addr.eq(self.read_address),
                self.read_data.eq(read.data),
                write.addr.eq(self.write_address),
                write.data.eq(self.write_data),
                write.en.eq(self.write),
            ]


def _banks(*, bits, depth):
    """Depths of the block memories that a memory is made of."""
    if depth <= _BANK_WORDS or bits * depth > _LARGE_BITS:
        return [depth]
    return [min(_BANK_WORDS, depth - at) for at in range(0, depth, _BANK_WORDS)]


def _block_memory(m, name, *, bits, depth):
    """Ports of a memory with a read port and a write port that never meet at one address."""
    # Without the attribute, synthesis adds registers and multiplexers that give the old word where
    # they do meet.
    attributes = {"no_rw_check": 1}
    if bits * depth > _LARGE_BITS:
        attributes["ram_style"] = "ultra"
    m.submodules[name] = memory = Memory(shape=bits, depth=depth, init=[], attrs=attributes)
    return memory.read_port(), memory.write_port()


class LinearHead(wiring.Component):
    """Predict the values of a layer's experts, and learn from the truth.

    Lanes side by side take one word a cycle::

        predicts ─▶ queue ─▶ walk ─▶ address ─┐             ┌─▶ scores ─┐
                                              ├─▶ rows ─▶ parity        ├─▶ sum ─▶ clamp ─▶ values
        learns ──▶ queue ─▶ walk ─▶ address ──┘ ▲           │ diagonals ┘           │
                             ▲                  └── update ◀┘ errors ◀── saved values

    A prediction takes its words before learning does, so that learning never delays it but by the
    rule of order: a prediction waits for an earlier learning of the same layer and bank. Jobs that
    are transferred in the same cycle count as prediction first.

    From the transfer to an idle head, :meth:`predict_cycles` and :meth:`learn_cycles` tell the
    cycles; a learning takes a cycle more for every one in which a prediction reads the same memory,
    and reads no diagonal features while a prediction is under way.
    The next prediction may start :meth:`predict_interval` cycles after the one before, so long as
    ``values`` are taken.

    A word of saved values with bad parity counts as error 0: the weights of its experts stay as
    they are.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that the head is part of; its predictor is the perceptron.
    head : :class:`HeadConfig`
        The head, one of the predictor's.
    number : :class:`int`
        Its place among the heads, from 0; at most 4.

    Members
    -------
    predicts : ``In(stream.Signature(StructLayout))``
        ``ctx``, ``layer``, ``sets`` (array of :class:`SetLayout` in the order of :data:`SETS`;
        *now* of a reuse head) and ``extra``: values come out, but are not saved for learning.
    learns : ``In(stream.Signature(StructLayout))``
        ``ctx``, ``layer``, ``sets`` (*old* of a reuse head), ``used`` (the experts that were
        chosen) and ``skip``: a reuse head only keeps its latest prediction as the next visit's old
        value. Other heads take no notice of ``skip``.
    values : ``Out(stream.Signature(StructLayout))``
        ``ctx``, ``layer``, ``beat``, ``values`` (8 bits a lane, 0 in lanes beyond the last expert)
        and ``extra``.
    table_requests : ``In(stream.Signature(RecordLayout("TableRequest")))``
        Reads and writes of table words, only taken while nothing else is to do. Table 0 holds the
        rows, 1 the diagonal features.
    table_values : ``Out(stream.Signature(32))``
        One value for each read, in order; 0 beyond the end.
    parity_errors : ``Out(1)``
        Strobe: a word with bad parity was read.
    clear : ``In(1)``
        A pulse clears everything, after what was accepted up to that cycle.
    idle : ``Out(1)``
        Nothing to do and nothing in an output register.

    Raises
    ------
    TypeError
        If a parameter is not of its type.
    ValueError
        If the device has no perceptron, or its perceptron no such head.
    """

    def __init__(self, config, *, head, number):
        require_config(config)
        if config.predictor != "perceptron":
            raise ValueError(f"Predictor must be perceptron, not {config.predictor!r}")
        if not isinstance(head, HeadConfig):
            raise TypeError(f"Head must be a HeadConfig, not {head!r}")
        if head not in config.perceptron.heads:
            raise ValueError(f"Head must be one of the perceptron's, not {head!r}")
        require_integer("Head number", number, low=0, high=4)
        self.config = config
        self.head = head
        self.number = number

        bits = config.bits
        sets = data.ArrayLayout(SetLayout(config), len(SETS))
        experts = SetLayout(config)["experts"].shape
        place = {"ctx": unsigned(bits("ctx")), "layer": unsigned(bits("layer"))}
        values = {
            "beat": unsigned(bits("lane_beat")),
            "values": data.ArrayLayout(8, config.predictor_lanes),
            "extra": 1,
        }
        requests = RecordLayout("TableRequest", config=config)
        super().__init__(
            {
                "predicts": In(
                    stream.Signature(data.StructLayout({**place, "sets": sets, "extra": 1}))
                ),
                "learns": In(
                    stream.Signature(
                        data.StructLayout({**place, "sets": sets, "used": experts, "skip": 1})
                    )
                ),
                "values": Out(stream.Signature(data.StructLayout({**place, **values}))),
                "table_requests": In(stream.Signature(requests)),
                "table_values": Out(stream.Signature(unsigned(32))),
                "clear": In(1),
                "idle": Out(1),
                "parity_errors": Out(1),
            }
        )

    # --- shape

    @property
    def lanes(self):
        """Weights that are read and written side by side (W)."""
        return self.config.predictor_lanes

    @property
    def value_beats(self):
        """Beats of a value for each expert."""
        return self.config.lane_beats

    @property
    def row_beats(self):
        """Words of a row."""
        entries = self.config.perceptron.list_entries
        return entries // self.lanes if entries else self.value_beats

    @property
    def layers(self):
        """Layers times banks (LB)."""
        banks = self.config.contexts if self.config.perceptron.banked else 1
        return self.config.model.layers * banks

    @property
    def row_words(self):
        """Words of the memory of rows; 0 if the head has none."""
        rows = len(self.head.rows) * self.layers << self.config.bits("expert")
        crosses = len(self.head.crosses) * self.layers * self.config.perceptron.cross_rows
        return (rows + crosses) * self.row_beats

    @property
    def diagonal_words(self):
        """Words of the memory of diagonal features."""
        return self.layers * self.value_beats

    @property
    def _row_banks(self):
        """Depths of the memories that the rows are in."""
        bits = self.lanes * (self.head.weight_bits + self.index_bits) + 2
        bits += -(-self.lanes // _GROUP)
        return _banks(bits=bits, depth=self.row_words) if self.row_words else []

    @property
    def index_bits(self):
        """Bits of the index in an entry of a list; 0 for full rows."""
        entries = self.config.perceptron.list_entries
        return max(1, _index_bits(-(-self.config.model.experts // entries))) if entries else 0

    @property
    def table_words(self):
        """Words of the two tables, as the table port cuts them."""
        return tuple(
            depth * chunks
            for depth, chunks in zip(
                (self.row_words, self.diagonal_words), self._chunks(), strict=True
            )
        )

    def _chunks(self):
        """Table words of a stored word of each memory."""
        row_bits = self.lanes * (self.head.weight_bits + self.index_bits) + 2
        diagonal_bits = (1 + len(self.head.diagonals)) * self.lanes * self.head.weight_bits
        return -(-row_bits // 32), -(-diagonal_bits // 32)

    def _pairs(self, cross):
        """Pairs of a conjunction, as places in its two sets."""
        k = self.config.model.top_k
        if cross == "AA":
            return [(i, j) for i in range(min(3, k)) for j in range(i)]
        return [(i, j) for i in range(min(2, k)) for j in range(min(2, k))]

    # --- cycles

    @property
    def _address_stages(self):
        """Cycles from the choice of a word to its address, beyond the first."""
        product = self.row_beats & (self.row_beats - 1) != 0
        return 3 * bool(self.head.crosses) + product if self.row_words else 0

    @property
    def _bank_stages(self):
        """Cycles in which a word of rows waits for the choice of its bank."""
        return int(len(self._row_banks) > 1)

    def active_words(self, known):
        """Words that a job reads where just the sets of these names are known."""
        words = len([name for name in self.head.rows if name in known])
        words *= self.config.model.top_k
        for cross in self.head.crosses:
            if set(cross) <= set(known):
                words += len(self._pairs(cross))
        return words * self.row_beats

    def _collect_cycles(self, active_words):
        """Cycles of a prediction in front of its first beat of diagonal features."""
        # A single word is known to be the last one only after it.
        words = max(active_words, 1) + (active_words == 1)
        stages = self._address_stages + self._bank_stages
        return max(words + stages, self.config.model.top_k)

    def predict_cycles(self, active_words):
        """Cycles from the transfer of a prediction to an idle head until its last beat is valid."""
        return self._collect_cycles(active_words) + self.value_beats + 6

    def predict_interval(self, active_words):
        """Cycles from one prediction to the next where both wait, while ``values`` are taken."""
        beats = self.value_beats
        return max(self._collect_cycles(active_words) + 2, 8 if beats == 1 else 7) + beats

    def learn_cycles(self, active_words):
        """Cycles of a learning on an idle head, from its transfer until the next one may start."""
        k = self.config.model.top_k
        cycles = k + self.value_beats
        if self.head.is_reuse:
            cycles += 1
        cycles += active_words + (1 + self._address_stages if active_words else 0)
        cycles += (self.value_beats - 1) * max(3, 1 + len(self.head.diagonals))
        return cycles + len(self.head.diagonals) + 16

    # --- logic

    def _set_names(self):
        """Names of the sets that the head needs."""
        needed = {*self.head.rows, *self.head.diagonals}
        for cross in self.head.crosses:
            needed.update(("A", "A" if cross == "AA" else cross[1]))
        return [name for name in SETS if name in needed]

    def _other(self, cross):
        """The second set of a conjunction."""
        return "A" if cross == "AA" else cross[1]

    def elaborate(self, platform):
        m = Module()

        model, perceptron, head = self.config.model, self.config.perceptron, self.head
        layers, experts, top_k = model.layers, model.experts, model.top_k
        lanes, value_beats, row_beats = self.lanes, self.value_beats, self.row_beats
        entries, index_bits = perceptron.list_entries, self.index_bits
        expert_bits = self.config.bits("expert")
        weight_bits, value_bits = head.weight_bits, head.value_bits
        most = (1 << weight_bits - 1) - 1
        has_rows = self.row_words > 0
        features = 1 + len(head.diagonals)
        groups = -(-lanes // _GROUP)
        names = self._set_names()
        lane_bits = _index_bits(lanes)
        beat_bits = _index_bits(value_beats)
        row_beat_bits = _index_bits(row_beats)
        boost = int(head.is_reuse)
        scale = 1 << value_bits
        prior = scale // 4 if head.is_reuse else scale * top_k // experts

        def group_of(lane):
            return lane // _GROUP

        # What a lane of the last beat holds beyond the last expert.
        def exists(beat, lane):
            if (value_beats - 1) * lanes + lane < experts:
                return Const(1)
            return beat != value_beats - 1 if beat_bits else Const(0)

        # --- queues: the sets in LUT memory, what is compared or changed in registers.
        set_layout = SetLayout(self.config)
        used_layout = set_layout["experts"].shape
        place = {"ctx": self.config.bits("ctx"), "layer": self.config.bits("layer")}
        choices = data.ArrayLayout(used_layout, len(names))
        guess_layout = data.StructLayout({**place, "extra": 1, "choices": choices})
        lesson_layout = data.StructLayout(
            {**place, "skip": 1, "used": used_layout, "choices": choices}
        )

        deepest = max(
            self.row_words,
            self.diagonal_words,
            self.config.contexts << self.config.bits("layer") + beat_bits,
            value_beats,
            row_beats,
        )
        clearing = Signal(init=1)
        clear_address = Signal(range(deepest))
        busy_table = Signal()  # the table port reads and writes
        taking = Signal()  # jobs are taken
        guess_done, lesson_done = Signal(), Signal()  # last value saved; everything learned
        guess_pop = Signal()
        guess_level, lesson_level = Signal(range(_JOBS + 1)), Signal(range(_JOBS + 1))
        guesses_ahead = Signal(range(_JOBS + 3))
        todo_bits = len(head.rows) + len(head.crosses)
        base_bits = _index_bits(self.layers)

        def base_of(payload):
            if self.layers == layers:
                return payload.layer
            return (
                reduce(
                    or_, (Mux(payload.ctx == n, n * layers, 0) for n in range(self.config.contexts))
                )
                + payload.layer
            )

        def todo_of(payload):
            known = {name: payload.sets[SETS.index(name)].valid for name in names}
            return Cat(
                *(known[name] for name in head.rows),
                *(
                    known["A"] & known[self._other(cross)] & bool(self._pairs(cross))
                    for cross in head.crosses
                ),
            )

        def valid_of(payload):
            return Cat(payload.sets[SETS.index(name)].valid for name in head.diagonals)

        def queue(name, source, layout, level, pop, extra_fields, blocked):
            """A queue of jobs; returns its head, its registers, and whether one is taken."""
            m.submodules[name] = memory = Memory(shape=layout, depth=4, init=[])
            write, read = memory.write_port(), memory.read_port(domain="comb")
            at = Signal(2, name=f"{name}_at")
            fields = {
                "todo": todo_of(source.payload),
                "valid": valid_of(source.payload),
                "base": base_of(source.payload),
                **extra_fields,
            }
            widths = {"todo": todo_bits, "valid": features - 1, "base": base_bits}
            slots = [
                {
                    key: Signal(widths.get(key, 3), name=f"{name}_{key}{n}", reset_less=True)
                    for key in fields
                }
                for n in range(_JOBS)
            ]
            push = Signal(name=f"{name}_push")
            m.d.comb += [
                source.ready.eq(taking & (level != _JOBS)),
                push.eq(source.valid & source.ready),
                write.en.eq(push),
                write.addr.eq((at + level)[:2]),
                read.addr.eq(at),
            ]
            m.d.comb += [
                write.data[key].eq(source.payload[key]) for key, _ in layout if key != "choices"
            ]
            for n, set_name in enumerate(names):
                m.d.comb += write.data.choices[n].eq(
                    source.payload.sets[SETS.index(set_name)].experts
                )
            m.d.sync += [level.eq(level + push - pop), at.eq(at + pop)]
            place = Signal(range(_JOBS + 1), name=f"{name}_place")
            m.d.comb += place.eq(level - pop)
            for n, slot in enumerate(slots):
                after = slots[n + 1] if n + 1 < _JOBS else slot
                for key, value in fields.items():
                    kept = Mux(pop, after[key], slot[key])
                    if key == "blocked":
                        # Jobs of the other kind that have to end first.
                        kept = Mux(blocked & (kept != 0), kept - 1, kept)
                    with m.If(push & (place == n)):
                        m.d.sync += slot[key].eq(value)
                    with m.Else():
                        m.d.sync += slot[key].eq(kept)
            return read.data, slots, push

        # The youngest learning of the same layer and bank has to end before a prediction starts.
        guess_blocked = Signal(2)
        lesson_slots = []  # filled below; the comparison needs them
        guess, guess_slots, guess_push = queue(
            "guesses",
            self.predicts,
            guess_layout,
            guess_level,
            guess_pop,
            {"blocked": guess_blocked},
            lesson_done,
        )
        # All predictions that came before have to end before a learning starts.
        lesson_blocked = Signal(range(_JOBS + 3))
        lesson, lesson_slots, _ = queue(
            "lessons",
            self.learns,
            lesson_layout,
            lesson_level,
            lesson_done,
            {"blocked": lesson_blocked},
            guess_done,
        )
        new_base = Signal(base_bits)
        m.d.comb += new_base.eq(base_of(self.predicts.payload))
        for n, slot in enumerate(lesson_slots):
            with m.If((lesson_level > n) & (slot["base"] == new_base)):
                m.d.comb += guess_blocked.eq(n + 1 - lesson_done)
        m.d.comb += lesson_blocked.eq(guesses_ahead + guess_push - guess_done)
        m.d.sync += guesses_ahead.eq(lesson_blocked)

        guess_now, lesson_now = Signal(), Signal()
        m.d.comb += [
            guess_now.eq((guess_level != 0) & (guess_slots[0]["blocked"] == 0)),
            lesson_now.eq((lesson_level != 0) & (lesson_slots[0]["blocked"] == 0)),
        ]
        guess_base, lesson_base = guess_slots[0]["base"], lesson_slots[0]["base"]

        # --- walk over the active words of a job: one a cycle, unknown sets take none.
        def walk(name, job, slot, go, restart):
            """Choose the next word; returns its parts, and whether none is left."""
            if not has_rows:
                return None, Const(1)
            todo = slot["todo"]
            index_count = max(
                [top_k] * bool(head.rows) + [len(self._pairs(c)) for c in head.crosses] + [1]
            )
            index = Signal(range(index_count), name=f"{name}_index")
            beat = Signal(range(row_beats), name=f"{name}_beat")
            pick = Signal(todo_bits, name=f"{name}_pick")
            m.d.comb += pick.eq(todo & ~(todo - 1))
            counts = [top_k] * len(head.rows) + [
                max(1, len(self._pairs(cross))) for cross in head.crosses
            ]
            last_index = Signal(name=f"{name}_last_index")
            m.d.comb += last_index.eq(
                reduce(or_, (pick[n] & (index == count - 1) for n, count in enumerate(counts)))
            )
            last_beat = beat == row_beats - 1
            # Whether the word is the last one, from a register: it opens the way to the diagonal
            # features. A single word is not known to be the last one beforehand.
            last = Signal(name=f"{name}_last")
            next_beat = Signal.like(beat, name=f"{name}_next_beat")
            next_index = Signal.like(index, name=f"{name}_next_index")
            next_todo = Signal(todo_bits, name=f"{name}_next_todo")
            m.d.comb += [
                next_beat.eq(Mux(last_beat, 0, beat + 1)),
                next_index.eq(Mux(last_beat, Mux(last_index, 0, index + 1), index)),
                next_todo.eq(Mux(last_beat & last_index, todo & (todo - 1), todo)),
            ]
            with m.If(go):
                m.d.sync += last.eq(
                    (todo != 0)
                    & (next_beat == row_beats - 1)
                    & reduce(
                        or_,
                        (
                            (next_todo == 1 << n) & (next_index == count - 1)
                            for n, count in enumerate(counts)
                        ),
                    )
                )
            with m.If(go & (todo != 0)):
                m.d.sync += beat.eq(beat + 1)
                with m.If(last_beat):
                    m.d.sync += [beat.eq(0), index.eq(index + 1)]
                    with m.If(last_index):
                        m.d.sync += [index.eq(0), todo.eq(todo & (todo - 1))]
            with m.If(restart):
                m.d.sync += [index.eq(0), beat.eq(0), last.eq(0)]

            def chosen(items):
                if len(items) == 1:
                    return Value.cast(items[0][1])
                return reduce(or_, (Mux(pick[n], item, 0) for n, item in items))

            def of(set_name):
                return job.choices[names.index(set_name)]

            source = [
                (n, _pick(index, [of(f)[i] for i in range(top_k)])) for n, f in enumerate(head.rows)
            ]
            second = []
            for n, cross in enumerate(head.crosses, len(head.rows)):
                pairs = self._pairs(cross) or [(0, 0)]
                source.append((n, _pick(index, [of("A")[i] for i, _ in pairs])))
                other = self._other(cross)
                second.append((n, _pick(index, [of(other)[j] for _, j in pairs])))
            word = {
                "first": chosen(source),
                "block": chosen([(n, n * self.layers) for n in range(len(head.rows))] or [(0, 0)]),
                "beat": beat,
            }
            if head.crosses:
                word["region"] = chosen([(n, x * self.layers) for x, (n, _) in enumerate(second)])
                word["second"] = chosen(second)
                word["crossed"] = pick[len(head.rows) :].any()
                word["sorted"] = reduce(
                    or_,
                    (pick[n] for n, c in enumerate(head.crosses, len(head.rows)) if c == "AA"),
                    Const(0),
                )
            return {**word, "valid": go & (todo != 0), "last": last, "todo": todo}, todo == 0

        cross_bits = perceptron.cross_rows.bit_length() - 1
        row_bits = _index_bits(max(1, self.row_words))
        first_cross = len(head.rows) * self.layers << expert_bits

        def address(name, word, base, go):
            """Address of a word, in ``_address_stages`` + 1 cycles that count while ``go``."""
            if word is None:
                return Const(0), None, None, Const(0)

            moving = []

            def stage(number, **parts):
                held = {}
                for key, value in parts.items():
                    value = Value.cast(value)
                    held[key] = Signal(
                        len(value), name=f"{name}_{key}{number}", reset_less=key != "valid"
                    )
                    with m.If(go):
                        m.d.sync += held[key].eq(value)
                moving.append(held["valid"])
                return held

            valid, beat = word["valid"], word["beat"]
            row_number_bits = _index_bits(max(2, self.row_words // row_beats))
            if not head.crosses:
                block = (base + word["block"])[: max(1, _index_bits(self.layers * len(head.rows)))]
                row = Cat(word["first"], block)[:row_number_bits]
                held = stage(0, valid=valid, row=row, beat=beat)
            else:
                first, second = word["first"], word["second"]
                start = Mux(
                    word["crossed"],
                    (Cat(Const(0, cross_bits), (base + word["region"])) + first_cross),
                    Cat(Const(0, expert_bits), (base + word["block"])),
                )[:row_number_bits]
                held = stage(
                    0,
                    valid=valid,
                    start=start,
                    first=first,
                    second=second,
                    crossed=word["crossed"],
                    sorted=word["sorted"],
                    beat=beat,
                )
                swap = held["sorted"] & (held["first"] > held["second"])
                held = stage(
                    1,
                    valid=held["valid"],
                    start=held["start"],
                    first=Mux(swap, held["second"], held["first"]),
                    second=Mux(swap, held["first"], held["second"]),
                    crossed=held["crossed"],
                    beat=held["beat"],
                )
                total = Const(0, cross_bits)
                for part, terms in (("first", _FIRST_TERMS), ("second", _SECOND_TERMS)):
                    for places, sign in terms:
                        term = Cat(Const(0, places), held[part]) if places else held[part]
                        total = (total + term if sign > 0 else total - term)[:cross_bits]
                held = stage(
                    2,
                    valid=held["valid"],
                    start=held["start"],
                    offset=Mux(held["crossed"], total, held["first"]),
                    beat=held["beat"],
                )
                held = stage(
                    3,
                    valid=held["valid"],
                    row=(held["start"] + held["offset"])[:row_number_bits],
                    beat=held["beat"],
                )
            if row_beats & (row_beats - 1):
                product = _times(held["row"], row_beats, bits=row_bits)
                held = stage(
                    4,
                    valid=held["valid"],
                    row=(product + held["beat"])[:row_bits],
                    beat=held["beat"],
                )
                word_address = held["row"]
            else:
                word_address = Cat(held["beat"], held["row"])[:row_bits]
            return held["valid"], word_address, held["beat"], reduce(or_, moving)

        # --- predict: the words, the membership masks, then the beats of diagonal features.
        guess_word, guess_none = walk("guess", guess, guess_slots[0], guess_now, guess_pop)
        guess_valid, guess_address, guess_beat, _ = address(
            "guess", guess_word, guess_base, Const(1)
        )
        walked = guess_none
        if has_rows:
            walked = guess_none | guess_word["last"]
        for n in range(self._address_stages + self._bank_stages):
            # Diagonal features are read so that their sum is there in time for the last word.
            later = Signal(name=f"walked{n}")
            m.d.sync += later.eq(walked & guess_now & ~guess_pop)
            walked = later

        # Masks get the n-th expert of every set in one cycle.
        def masks(prefix, job, valid, index, build):
            stores = []
            for n, name in enumerate(head.diagonals):
                store = _Scratch(m, f"{prefix}_mask{n}", bits=lanes, depth=value_beats)
                expert = Signal(expert_bits, name=f"{prefix}_member{n}", reset_less=True)
                build_now = Signal(name=f"{prefix}_mask_build{n}")
                m.d.sync += [
                    expert.eq(
                        _pick(index, [job.choices[names.index(name)][i] for i in range(top_k)])
                    ),
                    build_now.eq(valid[n] & build),
                ]
                stores.append((store, expert, build_now))
            return stores

        def mask_beat(expert):
            return expert[lane_bits:][:beat_bits] if beat_bits else Const(0, 0)

        def one_hot(expert):
            return (Const(1, lanes) << expert[:lane_bits])[:lanes]

        def build_mask(store, expert, build, *, read, read_beat):
            """Add an expert to a mask; give the mask of a beat, which is thereby cleared."""
            m.d.comb += [
                store.read_address.eq(Mux(read, read_beat, mask_beat(expert))),
                store.write_address.eq(Mux(clearing, clear_address, store.read_address)),
                store.write_data.eq(Mux(clearing | read, 0, store.read_data | one_hot(expert))),
                store.write.eq(clearing | read | build),
            ]

        guess_index = Signal(range(top_k + 1))
        guess_build = Signal()
        m.d.comb += guess_build.eq(guess_now & (guess_index != top_k))
        with m.If(guess_build):
            m.d.sync += guess_index.eq(guess_index + 1)
        with m.If(guess_pop):
            m.d.sync += guess_index.eq(0)
        guess_masks = masks("guess", guess, guess_slots[0]["valid"], guess_index, guess_build)

        final, final_done = Signal(), Signal()  # beats are read; all have been read
        final_beat = Signal(range(value_beats))
        final_read = Signal()
        room = Signal()
        start = Signal()
        m.d.comb += [
            start.eq(guess_now & walked & room & ~final & ~final_done & (guess_index >= top_k - 1)),
            final_read.eq(start | final),
        ]
        with m.If(final_read):
            m.d.sync += [final_beat.eq(final_beat + 1), final.eq(1)]
            with m.If(final_beat == value_beats - 1):
                m.d.sync += [final_beat.eq(0), final.eq(0), final_done.eq(1)]
        with m.If(guess_pop):
            m.d.sync += final_done.eq(0)

        # --- memories
        entry_bits = weight_bits + index_bits
        row_data_bits = lanes * entry_bits + 2
        diagonal_data_bits = features * lanes * weight_bits
        row_banks, row_bank_bits = [], 0
        if has_rows:
            row_bank_bits = _index_bits(len(self._row_banks))
            row_banks = [
                _block_memory(
                    m,
                    f"rows{n}" if row_bank_bits else "rows",
                    bits=row_data_bits + groups,
                    depth=depth,
                )
                for n, depth in enumerate(self._row_banks)
            ]
        diagonal_read, diagonal_write = _block_memory(
            m, "diagonals", bits=diagonal_data_bits + features * groups, depth=self.diagonal_words
        )
        saved_bits = lanes * value_bits + 1
        saved_address_bits = self.config.bits("ctx") + self.config.bits("layer") + beat_bits
        saved_depth = self.config.contexts << self.config.bits("layer") + beat_bits
        next_read, next_write = _block_memory(
            m, "next" if head.is_reuse else "saved", bits=saved_bits, depth=saved_depth
        )
        if head.is_reuse:
            old_read, old_write = _block_memory(m, "saved", bits=saved_bits, depth=saved_depth)

        # --- words of rows on their way: address, memory, register, with several banks the register
        # of the one that was meant, register with parity checked
        lesson_go = Signal()
        lesson_walking = Signal()
        table_read_row, table_read_diagonal = Signal(), Signal()
        table_address = Signal(24)
        lesson_word, lesson_none = walk(
            "lesson", lesson, lesson_slots[0], lesson_walking & lesson_go, lesson_done
        )
        lesson_valid, lesson_address, lesson_beat, lesson_moving = address(
            "lesson", lesson_word, lesson_base, lesson_go
        )
        row_lesson = Signal()
        errors = []  # words with bad parity, counted

        def track(name, first, *, count, width=1, reset_less=False):
            """The signal of an address's cycle in the cycles thereafter."""
            stages = []
            value = first
            for n in range(count):
                held = Signal(width, name=f"{name}_after{n + 1}", reset_less=reset_less)
                m.d.sync += held.eq(value)
                stages.append(held)
                value = held
            return stages

        def checked(name, raw, *, groups_of, any_valid):
            """A word one cycle later, with which of its groups are bad."""
            word = Signal(len(raw), name=f"{name}_word", reset_less=True)
            bad = Signal(len(groups_of), name=f"{name}_bad", reset_less=True)
            m.d.sync += [
                word.eq(raw),
                bad.eq(Cat(_even_parity(part(raw)) for part in groups_of)),
            ]
            errors.append(any_valid & bad.any())
            return word, bad

        if has_rows:
            hazard = Signal()
            row_address = Signal(row_bits)
            m.d.comb += [
                row_lesson.eq(lesson_valid & ~guess_valid & ~hazard),
                lesson_go.eq(~lesson_valid | row_lesson),
                row_address.eq(
                    Mux(
                        guess_valid,
                        guess_address,
                        Mux(table_read_row, table_address, lesson_address),
                    )
                ),
            ]
            m.d.comb += [read.addr.eq(row_address) for read, _ in row_banks]
            word_step = 2 + self._bank_stages  # when ``row_word`` is there
            row_guess_at = track("row_guess", guess_valid, count=word_step + 1)
            row_lesson_at = track("row_lesson", row_lesson, count=word_step + 7)
            row_table_at = track("row_table", table_read_row, count=word_step + 1)
            row_addresses = track(
                "row_address", row_address, count=word_step + 7, width=row_bits, reset_less=True
            )
            row_beats_at = track(
                "row_beat",
                Mux(guess_valid, guess_beat, lesson_beat),
                count=word_step + 1,
                width=row_beat_bits,
                reset_less=True,
            )
            if head.crosses:
                # Conjunctions may hash to one row: a word is written before it is read again.
                m.d.comb += hazard.eq(
                    reduce(
                        or_,
                        (
                            flag & (at == lesson_address)
                            for flag, at in zip(row_lesson_at, row_addresses, strict=True)
                        ),
                    )
                )

            def row_group(group):
                def part(raw):
                    lane = group * _GROUP
                    taken = [raw[lane * entry_bits : min(lanes, lane + _GROUP) * entry_bits]]
                    if group == 0:
                        taken.append(raw[lanes * entry_bits :][:2])
                    return Cat(*taken, raw[row_data_bits + group])

                return part

            row_banks_read = []
            for n, (read, _) in enumerate(row_banks):
                raw = Signal(len(read.data), name=f"row_bank{n}", reset_less=True)
                m.d.sync += raw.eq(read.data)
                row_banks_read.append(raw)
            row_raw = _pick(row_addresses[1][row_bits - row_bank_bits :], row_banks_read)
            if self._bank_stages:
                picked = Signal(len(row_raw), name="row_raw", reset_less=True)
                m.d.sync += picked.eq(row_raw)
                row_raw = picked
            row_word, row_bad = checked(
                "row",
                row_raw,
                groups_of=[row_group(group) for group in range(groups)],
                any_valid=reduce(
                    or_, (at[word_step] for at in (row_guess_at, row_lesson_at, row_table_at))
                ),
            )
        else:
            m.d.comb += lesson_go.eq(1)

        # --- words of diagonal features, likewise
        # What learning reads waits in a register until no prediction is in front, so that nothing
        # but two registers' bits chooses the address.
        lesson_diagonal = Signal()  # learning asks for a word
        lesson_diagonal_beat = Signal(range(value_beats))
        diagonal_lesson, diagonal_waits = Signal(), Signal()
        waiting_beat = Signal.like(lesson_diagonal_beat, reset_less=True)
        waiting_at = Signal(range(self.diagonal_words), reset_less=True)
        m.d.comb += diagonal_lesson.eq(diagonal_waits & ~guess_now)

        def diagonal_address(base, beat):
            if value_beats & (value_beats - 1):
                return _times(base, value_beats, bits=_index_bits(self.diagonal_words)) + beat
            return Cat(beat, base)

        with m.If(lesson_diagonal):
            m.d.sync += [
                waiting_at.eq(diagonal_address(lesson_base, lesson_diagonal_beat)),
                waiting_beat.eq(lesson_diagonal_beat),
            ]
        m.d.sync += diagonal_waits.eq(lesson_diagonal | (diagonal_waits & guess_now))
        with m.If(guess_now):
            m.d.comb += diagonal_read.addr.eq(diagonal_address(guess_base, final_beat))
        with m.Elif(table_read_diagonal):
            m.d.comb += diagonal_read.addr.eq(table_address)
        with m.Else():
            m.d.comb += diagonal_read.addr.eq(waiting_at)
        diagonal_guess_at = track("diagonal_guess", final_read, count=6)
        diagonal_lesson_at = track("diagonal_lesson", diagonal_lesson, count=3)
        diagonal_table_at = track("diagonal_table", table_read_diagonal, count=3)
        final_beats = track("final_beat", final_beat, count=7, width=beat_bits, reset_less=True)
        lesson_beats = track(
            "lesson_diagonal_beat",
            waiting_beat,
            count=3,
            width=beat_bits,
            reset_less=True,
        )

        def diagonal_group(feature, group):
            def part(raw):
                first = (feature * lanes + group * _GROUP) * weight_bits
                last = (feature * lanes + min(lanes, (group + 1) * _GROUP)) * weight_bits
                return Cat(raw[first:last], raw[diagonal_data_bits + feature * groups + group])

            return part

        diagonal_raw = Signal(len(diagonal_read.data), reset_less=True)
        m.d.sync += diagonal_raw.eq(diagonal_read.data)
        diagonal_word, diagonal_bad = checked(
            "diagonal",
            diagonal_raw,
            groups_of=[
                diagonal_group(feature, group)
                for feature in range(features)
                for group in range(groups)
            ],
            any_valid=diagonal_guess_at[2] | diagonal_lesson_at[2] | diagonal_table_at[2],
        )

        # --- scores: read, added to and written in one cycle
        collect = Signal()  # a word of a prediction is here
        sum_now = diagonal_guess_at[4]
        word_count = max(1, self.active_words(names) // row_beats)
        score_bits = weight_bits + _index_bits(word_count + 1) + 1

        def entry_place(index, beat):
            """Beat of the values that an entry of a list is about."""
            return Cat(beat, index)

        def entry_exists(index, beat, lane):
            """Whether an entry of a list is about an expert at all."""
            if (entries << index_bits) <= experts:
                return Const(1)
            number = Cat(Const(lane, lane_bits), entry_place(index, beat))
            return number < experts

        row_weights, row_indices = [], []
        if has_rows:
            m.d.comb += collect.eq(row_guess_at[word_step])
            for lane in range(lanes):
                entry = row_word[lane * entry_bits :][:entry_bits]
                row_weights.append(entry[:weight_bits])
                row_indices.append(entry[weight_bits:])
        scores = []
        for lane in range(lanes if has_rows else 0):
            store = _Scratch(m, f"score{lane}", bits=score_bits, depth=value_beats, init=prior)
            good = ~row_bad[group_of(lane)]
            weight = Signal(signed(weight_bits), name=f"score_weight{lane}")
            place_next, real = row_beats_at[word_step - 1], Const(1)
            if entries:
                index_next = row_raw[lane * entry_bits + weight_bits :][:index_bits]
                place_next = entry_place(index_next, row_beats_at[word_step - 1])
                real = entry_exists(row_indices[lane], row_beats_at[word_step], lane)
            place_now = Signal(beat_bits, name=f"score_place{lane}", reset_less=True)
            m.d.sync += place_now.eq(Mux(diagonal_guess_at[3], final_beats[3], place_next))
            total = Signal(signed(score_bits), name=f"score_total{lane}")
            m.d.comb += [
                weight.eq(Mux(good, row_weights[lane], 0)),
                total.eq(store.read_data.as_signed() + weight),
                store.read_address.eq(place_now),
                store.write_address.eq(Mux(clearing, clear_address, place_now)),
                store.write_data.eq(Mux(clearing | sum_now, prior, total)),
                store.write.eq(clearing | sum_now | (collect & real)),
            ]
            scores.append(store.read_data.as_signed())

        # --- diagonal features of a prediction: masked and added up in two cycles
        m.d.comb += guess_pop.eq(diagonal_guess_at[2] & (final_beats[2] == value_beats - 1))
        mask_now = []
        for store, expert, build in guess_masks:
            build_mask(store, expert, build, read=diagonal_guess_at[1], read_beat=final_beats[1])
            mask = Signal(lanes, name=f"guess_mask_now{len(mask_now)}", reset_less=True)
            m.d.sync += mask.eq(store.read_data)
            mask_now.append(mask)
        term_bits = weight_bits + _index_bits(features + 1)
        sums = []

        def add_up(name, terms):
            """Sums of three terms each, in registers."""
            result = []
            for n in range(0, len(terms), 3):
                total = Signal(signed(term_bits), name=f"{name}_{n // 3}", reset_less=True)
                m.d.sync += total.eq(reduce(add, terms[n : n + 3]))
                result.append(total)
            return result

        for lane in range(lanes):
            terms = []
            for feature in range(features):
                taken = ~diagonal_bad[feature * groups + group_of(lane)]
                if feature:
                    taken = taken & mask_now[feature - 1][lane]
                term = Signal(signed(weight_bits), name=f"term{feature}_{lane}")
                weight = diagonal_word[(feature * lanes + lane) * weight_bits :][:weight_bits]
                m.d.comb += term.eq(Mux(taken, weight, 0))
                terms.append(term)
            sums.append(add_up(f"sum_again{lane}", add_up(f"sum{lane}", terms))[0])

        # --- values: score and sum, clamped; saved, and sent on through a queue of a layer's beats
        clamped = Signal(data.ArrayLayout(value_bits, lanes))  # as saved
        clamp = Signal(data.ArrayLayout(value_bits, lanes))
        total_bits = max(score_bits, term_bits, value_bits + 1) + 2
        for lane in range(lanes):
            total = Signal(signed(total_bits), name=f"total{lane}", reset_less=True)
            score = scores[lane] if has_rows else Const(prior, signed(value_bits + 1))
            m.d.sync += total.eq(score + sums[lane])
            above = (total[value_bits:-1]).any()
            value = Mux(total[-1], 0, total[:value_bits] | above.replicate(value_bits))
            m.d.comb += clamp[lane].eq(Mux(exists(final_beats[5], lane), value, 0))

        # The place of a job goes along from when its first beat is summed up.
        out_place = {
            key: Signal(len(guess[key]), name=f"out_{key}", reset_less=True)
            for key in ("ctx", "layer", "extra")
        }
        with m.If(diagonal_guess_at[2] & (final_beats[2] == 0)):
            m.d.sync += [held.eq(guess[key]) for key, held in out_place.items()]
        saving = Signal()
        m.d.sync += [saving.eq(diagonal_guess_at[5]), clamped.eq(clamp)]
        saved_at = Cat(final_beats[6], out_place["layer"], out_place["ctx"])
        m.d.comb += [
            guess_done.eq(saving & (final_beats[6] == value_beats - 1)),
            next_write.addr.eq(Mux(clearing, clear_address, saved_at)),
            next_write.data.eq(Cat(clamped, _even_parity(clamped))),
            next_write.en.eq(clearing | (saving & ~out_place["extra"])),
        ]
        with m.If(clearing):
            m.d.sync += clamped.eq(0)

        out = self.values
        free = Signal()
        m.d.comb += free.eq(~out.valid | out.ready)
        value = out.payload
        fresh = diagonal_guess_at[5]
        if value_beats == 1:
            m.d.sync += room.eq(~out.valid & ~reduce(or_, diagonal_guess_at))
            with m.If(out.ready):
                m.d.sync += out.valid.eq(0)
            with m.If(fresh):
                m.d.sync += out.valid.eq(1)
                m.d.sync += [value[key].eq(held) for key, held in out_place.items()]
                for lane in range(lanes):
                    m.d.sync += value["values"][lane].eq(clamp[lane][value_bits - 8 :])
        else:
            # The beats of one prediction have room: once it has begun, nothing stops it.
            item_layout = data.StructLayout(
                {**place, "beat": beat_bits, "extra": 1, "values": data.ArrayLayout(8, lanes)}
            )
            m.submodules.beats = memory = Memory(shape=item_layout, depth=value_beats, init=[])
            beat_write, beat_read = memory.write_port(), memory.read_port(domain="comb")
            waiting = Signal(range(value_beats + 1))
            entry, leave = Signal(), Signal()
            item = Signal(item_layout)
            m.d.comb += [item[key].eq(held) for key, held in out_place.items()]
            m.d.comb += item.beat.eq(final_beats[5])
            for lane in range(lanes):
                m.d.comb += item["values"][lane].eq(clamp[lane][value_bits - 8 :])
            from_queue = waiting != 0
            m.d.sync += room.eq(~from_queue & ~reduce(or_, diagonal_guess_at[1:]))
            m.d.comb += [
                entry.eq(fresh & (from_queue | ~free)),
                leave.eq(from_queue & free),
                beat_write.addr.eq(final_beats[5]),
                beat_write.data.eq(item),
                beat_write.en.eq(entry),
            ]
            first_waiting = Signal(range(value_beats))
            m.d.comb += beat_read.addr.eq(first_waiting)
            with m.If(entry & ~from_queue):
                m.d.sync += first_waiting.eq(final_beats[5])
            with m.Elif(leave):
                m.d.sync += first_waiting.eq(first_waiting + 1)
            m.d.sync += waiting.eq(waiting + entry - leave)
            with m.If(free):
                m.d.sync += out.valid.eq(from_queue | fresh)
                chosen_item = data.View(
                    item_layout, Mux(from_queue, beat_read.data.as_value(), item.as_value())
                )
                for key in ("ctx", "layer", "extra", "beat"):
                    m.d.sync += value[key].eq(chosen_item[key])
                for lane in range(lanes):
                    m.d.sync += value["values"][lane].eq(chosen_item["values"][lane])

        # --- learn: load errors, walk the rows, walk the diagonal features, drain
        loading = Signal()
        load_beat = Signal(range(value_beats))
        load_valid = Signal()
        lesson_index = Signal(range(top_k + 1))
        lesson_build = Signal()
        skip = lesson.skip if head.is_reuse else Const(0)
        load_place = Cat(load_beat, lesson.layer, lesson.ctx)
        m.d.comb += [
            load_valid.eq(loading & (skip | (lesson_index >= top_k - 1))),
            next_read.addr.eq(load_place),
        ]
        load_at = track("load", load_valid, count=5)
        load_beats = track("load_beat", load_beat, count=5, width=beat_bits, reset_less=True)

        def saved_word(name, read):
            raw = Signal(saved_bits, name=f"{name}_raw", reset_less=True)
            word = Signal(lanes * value_bits, name=f"{name}_word", reset_less=True)
            bad = Signal(name=f"{name}_bad", reset_less=True)
            m.d.sync += [raw.eq(read.data), word.eq(raw), bad.eq(_even_parity(raw))]
            errors.append(load_at[2] & bad)
            return raw, word, bad

        next_raw, next_word, next_bad = saved_word("next", next_read)
        if head.is_reuse:
            # The latest prediction becomes the next visit's old value, with its parity as it is.
            old_place = track(
                "load_place", load_place, count=2, width=saved_address_bits, reset_less=True
            )
            m.d.comb += [
                old_read.addr.eq(load_place),
                old_write.addr.eq(Mux(clearing, clear_address, old_place[1])),
                old_write.data.eq(next_raw),
                old_write.en.eq(clearing | load_at[1]),
            ]
            with m.If(clearing):
                m.d.sync += next_raw.eq(0)
            _, old_word, old_bad = saved_word("old", old_read)

        used_store = _Scratch(m, "used", bits=lanes, depth=value_beats)
        used_expert = Signal(expert_bits, reset_less=True)
        used_build = Signal()
        used_now = Signal(lanes, reset_less=True)
        m.d.sync += [
            used_expert.eq(_pick(lesson_index, [lesson.used[i] for i in range(top_k)])),
            used_build.eq(lesson_build),
            used_now.eq(used_store.read_data),
        ]
        build_mask(used_store, used_expert, used_build, read=load_at[1], read_beat=load_beats[1])
        error_bits = value_bits + 2
        error_beat = load_beats[4] if head.is_reuse else load_beats[2]
        error_valid = load_at[4] if head.is_reuse else load_at[2]
        error_stores = []
        for lane in range(lanes):
            error = Signal(signed(error_bits), name=f"error{lane}")
            used = used_now[lane]
            if head.is_reuse:
                # target = used ? 1024 : floor(13 new / 16), in two cycles
                new = next_word[lane * value_bits :][:value_bits]
                old = old_word[lane * value_bits :][:value_bits]
                twelve = Signal(value_bits + 4, name=f"twelve{lane}", reset_less=True)
                one = Signal(value_bits, name=f"one{lane}", reset_less=True)
                was = Signal(value_bits, name=f"was{lane}", reset_less=True)
                chosen = Signal(name=f"chosen{lane}", reset_less=True)
                ignored = Signal(name=f"ignored{lane}", reset_less=True)
                target = Signal(value_bits + 1, name=f"target{lane}", reset_less=True)
                was_again = Signal(value_bits, name=f"was_again{lane}", reset_less=True)
                m.d.sync += [
                    twelve.eq(Cat(Const(0, 3), new) + Cat(Const(0, 2), new)),
                    one.eq(new),
                    was.eq(old),
                    chosen.eq(used),
                    ignored.eq(next_bad | old_bad),
                    was_again.eq(Mux(ignored, 0, was)),
                    target.eq(
                        Mux(ignored, 0, Mux(chosen, scale, (twelve + one)[4 : 5 + value_bits]))
                    ),
                ]
                m.d.comb += error.eq(target - was_again)
            else:
                value = next_word[lane * value_bits :][:value_bits]
                m.d.comb += error.eq(Mux(next_bad, 0, Cat(Const(0, value_bits), used) - value))
            store = _Scratch(m, f"errors{lane}", bits=error_bits, depth=value_beats)
            m.d.comb += [
                store.write_address.eq(error_beat),
                store.write_data.eq(error),
                store.write.eq(error_valid),
            ]
            error_stores.append(store)

        # Lists: of each lane's experts, the lowest two that were chosen.
        newcomers = []
        if entries and has_rows:
            whose = used_expert[: _index_bits(entries)]
            number = used_expert[_index_bits(entries) :][:index_bits]
            forget = Signal()
            for lane in range(lanes):
                store = _Scratch(m, f"newcomers{lane}", bits=2 * index_bits + 2, depth=row_beats)
                found = data.View(
                    data.StructLayout(
                        {"least": index_bits, "any": 1, "second": index_bits, "two": 1}
                    ),
                    store.read_data,
                )
                added = Signal(found.shape(), name=f"newcomer{lane}")
                lower = number < found.least
                m.d.comb += [
                    added.least.eq(Mux(~found.any | lower, number, found.least)),
                    added.any.eq(1),
                    added.second.eq(
                        Mux(
                            found.any & lower,
                            found.least,
                            Mux(~found.two | (number < found.second), number, found.second),
                        )
                    ),
                    added.two.eq(found.any),
                    store.read_address.eq(
                        Mux(used_build, whose[lane_bits:], row_beats_at[word_step])
                    ),
                    store.write_address.eq(
                        Mux(
                            clearing,
                            clear_address,
                            Mux(forget, lesson_beats[2], store.read_address),
                        )
                    ),
                    store.write_data.eq(Mux(clearing | forget, 0, added)),
                    store.write.eq(
                        clearing
                        | (forget & (lesson_beats[2] < row_beats))
                        | (used_build & (whose[:lane_bits] == lane))
                    ),
                ]
                newcomers.append(found)
            m.d.comb += forget.eq(diagonal_lesson_at[2])

        lesson_masks = masks("lesson", lesson, lesson_slots[0]["valid"], lesson_index, lesson_build)
        lesson_mask_now = []
        for store, expert, build in lesson_masks:
            build_mask(store, expert, build, read=diagonal_lesson_at[2], read_beat=lesson_beats[2])
            lesson_mask_now.append(store.read_data)

        # --- what updates weights: rows a word a cycle, diagonal features one by one
        table_write = Signal()
        table_value = Signal(32)
        table_chunk = Signal(24)
        chunk_counts = self._chunks()

        def replaced(bits, next_writing, *, first=0):
            """Bits of a stored word with the written table word put into its place.

            ``next_writing`` tells one cycle ahead.
            """
            parts = []
            for at in range(first // 32, -(-(first + len(bits)) // 32)):
                low, high = max(first, 32 * at), min(first + len(bits), 32 * at + 32)
                hit = Signal(name=f"chunk{at}")
                m.d.sync += hit.eq(next_writing & (table_chunk == at))
                parts.append(
                    Mux(
                        hit,
                        table_value[low - 32 * at : high - 32 * at],
                        bits[low - first : high - first],
                    )
                )
            return Cat(*parts)

        feature_bits = lanes * weight_bits
        turn = Signal(range(features))  # feature of the word in front
        turning = Signal()  # a word of diagonal features is being updated
        turn_table = Signal()
        turn_beat = Signal(range(value_beats))
        turned = Signal(diagonal_data_bits, reset_less=True)
        turned_masks = Signal(features * lanes, reset_less=True)
        load_turn = Signal()
        m.d.comb += load_turn.eq(diagonal_lesson_at[2] | diagonal_table_at[2])
        clean = Cat(
            Mux(
                diagonal_bad[feature * groups + group_of(lane)],
                0,
                diagonal_word[(feature * lanes + lane) * weight_bits :][:weight_bits],
            )
            for feature in range(features)
            for lane in range(lanes)
        )
        diagonal_clean = Signal(diagonal_data_bits)
        m.d.comb += diagonal_clean.eq(clean)
        m.d.sync += [
            turned.eq(turned[feature_bits:]),
            turned_masks.eq(turned_masks[lanes:]),
            turn.eq(turn + 1),
        ]
        with m.If(turn == features - 1):
            m.d.sync += [turn.eq(0), turning.eq(0)]
        diagonal_replaced = replaced(diagonal_clean, diagonal_table_at[1] & table_write)
        with m.If(load_turn):
            m.d.sync += [
                turned.eq(diagonal_replaced),
                turned_masks.eq(Cat(Const(-1, lanes), *lesson_mask_now)),
                turn.eq(0),
                turning.eq(1),
                turn_table.eq(diagonal_table_at[2]),
                turn_beat.eq(lesson_beats[2]),
            ]
        with m.Elif(~turning):
            m.d.sync += turn.eq(0)

        update_row, update_turn = Signal(), Signal()  # U0: a word of rows, a diagonal feature
        update_table = Signal()
        if has_rows:
            m.d.comb += [
                update_row.eq(row_lesson_at[word_step] | row_table_at[word_step]),
                update_table.eq(Mux(turning, turn_table, row_table_at[word_step])),
            ]
        else:
            m.d.comb += update_table.eq(turn_table)
        m.d.comb += update_turn.eq(turning)

        lfsr = Signal(32, init=LFSR_SEED + self.number)
        with m.If((update_row | (update_turn & (turn == 0))) & ~update_table):
            m.d.sync += lfsr.eq(lfsr_next(lfsr))
        with m.If(clearing):
            m.d.sync += lfsr.eq(LFSR_SEED + self.number)

        # U0 ▸ U1
        stage1 = Signal(2, reset_less=True)
        turn1 = Signal(reset_less=True)
        offset1 = Signal(8, reset_less=True)
        m.d.sync += turn1.eq(update_turn)
        m.d.sync += offset1.eq(
            _pick(turn, [Const(_FEATURE_STEP * f & 255, 8) for f in range(features)])
        )
        if has_rows:
            row_flat = Signal(row_data_bits)
            m.d.comb += row_flat.eq(
                replaced(
                    Cat(
                        *(
                            Mux(
                                row_bad[group_of(lane)],
                                0,
                                row_word[lane * entry_bits :][:entry_bits],
                            )
                            for lane in range(lanes)
                        ),
                        Mux(row_bad[0], 0, row_word[lanes * entry_bits :][:2]),
                    ),
                    row_table_at[word_step - 1] & table_write,
                )
            )
            stored_stage = row_flat[lanes * entry_bits :]
            m.d.sync += stage1.eq(Cat(stored_stage[0] & ~stored_stage[1], stored_stage[1]))
        weights1, errors1, indices1 = [], [], []
        moves1 = Signal(lanes, reset_less=True)
        takes1 = Signal(lanes)
        claims1 = Signal(reset_less=True)  # a word of rows that is learned
        m.d.sync += claims1.eq(update_row & ~update_table)
        for lane in range(lanes):
            weight = Signal(signed(weight_bits), name=f"weight1_{lane}", reset_less=True)
            error = Signal(signed(error_bits), name=f"error1_{lane}", reset_less=True)
            in_turn = turned[lane * weight_bits :][:weight_bits]
            moved = turned_masks[lane] & exists(turn_beat, lane)
            store = error_stores[lane]
            m.d.sync += error.eq(store.read_data.as_signed())
            if not has_rows:
                m.d.comb += store.read_address.eq(turn_beat)
                m.d.sync += [weight.eq(in_turn), moves1[lane].eq(moved & ~update_table)]
            else:
                entry = row_flat[lane * entry_bits :][:entry_bits]
                in_row = entry[:weight_bits]
                m.d.sync += weight.eq(Mux(update_turn, in_turn, in_row))
                if not entries:
                    row_moved = exists(row_beats_at[word_step], lane)
                    m.d.comb += store.read_address.eq(
                        Mux(update_turn, turn_beat, row_beats_at[word_step])
                    )
                else:
                    index = Signal(index_bits, name=f"index1_{lane}")
                    stored_index = Signal(index_bits, name=f"stored_index{lane}", reset_less=True)
                    at = entry[weight_bits:]
                    full = Signal(name=f"full{lane}")
                    small = Signal(name=f"small{lane}", reset_less=True)
                    first_is_new = Signal(name=f"first_is_new{lane}", reset_less=True)
                    rivals = Signal(newcomers[lane].shape(), name=f"rivals{lane}", reset_less=True)
                    high = in_row[2:]
                    m.d.comb += [
                        full.eq(in_row != 0),
                        store.read_address.eq(
                            Mux(update_turn, turn_beat, entry_place(at, row_beats_at[word_step]))
                        ),
                        takes1[lane].eq(
                            small & ((rivals.any & first_is_new) | rivals.two) & claims1
                        ),
                        index.eq(
                            Mux(
                                takes1[lane],
                                Mux(first_is_new, rivals.least, rivals.second),
                                stored_index,
                            )
                        ),
                    ]
                    m.d.sync += [
                        # -3 to 3
                        small.eq(~high.any() | (high.all() & in_row[:2].any())),
                        first_is_new.eq(~full | (newcomers[lane].least != at)),
                        rivals.eq(newcomers[lane]),
                        stored_index.eq(at),
                    ]
                    row_moved = full & entry_exists(at, row_beats_at[word_step], lane)
                    indices1.append((index, stored_index))
                m.d.sync += moves1[lane].eq(Mux(update_turn, moved, row_moved) & ~update_table)
            weights1.append(weight)
            errors1.append(error)

        update_rows = track("update_row", update_row, count=5)
        update_turns = track("update_turn", update_turn, count=5)
        update_tables = track("update_table", update_table, count=5, reset_less=True)
        turns = track("turn", turn, count=5, width=len(turn), reset_less=True)
        update_beats = track("update_beat", turn_beat, count=5, width=beat_bits, reset_less=True)

        # U1 ▸ U2: the error at its scale, and the random number before the lanes' own offsets
        random2 = Signal(8, reset_less=True)
        grown1 = Signal(2)
        m.d.comb += grown1.eq(stage1)
        with m.If(~update_tables[0]):
            for stage, below in enumerate(_MATURE_BELOW):
                # The top byte is below a power of two.
                with m.If((stage1 == stage) & ~lfsr[24 + below.bit_length() - 1 :].any()):
                    m.d.comb += grown1.eq(stage + 1)
        stage5 = track("stage_after_update", grown1, count=4, width=2)[-1]
        m.d.sync += random2.eq(lfsr[:8] + offset1)
        claim1 = Signal(4)
        m.d.comb += claim1.eq(Mux(stage1[1], 2, Mux(stage1[0], 4, 8)))
        claim4 = track("claim", claim1, count=3, width=4, reset_less=True)[-1]
        moves3 = track("moves", moves1, count=2, width=lanes, reset_less=True)[-1]
        takes4 = track("takes", takes1, count=3, width=lanes, reset_less=True)[-1]
        updated = []
        scaled_bits = error_bits + 3 + boost
        for lane in range(lanes):
            weight, error = weights1[lane], errors1[lane]
            scaled = Signal(signed(scaled_bits), name=f"scaled{lane}", reset_less=True)
            with m.Switch(Cat(stage1, turn1)):
                with m.Case(0):
                    m.d.sync += scaled.eq(error << 3 + boost)
                with m.Case(1):
                    m.d.sync += scaled.eq(error << 2 + boost)
                with m.Default():
                    m.d.sync += scaled.eq(error << 1 + boost)
            # U2 ▸ U3: what the weight moves by
            random = Signal(8, name=f"random{lane}")
            step = Signal(signed(scaled_bits - value_bits + 1), name=f"step{lane}", reset_less=True)
            m.d.comb += random.eq(random2 + (_LANE_STEP * lane & 255))
            noise = Cat(Const(0, value_bits - 8), random) if value_bits > 8 else random
            m.d.sync += step.eq((scaled + noise) >> value_bits)
            weight3 = track(
                f"weight_before{lane}", weight, count=2, width=weight_bits, reset_less=True
            )[-1]
            # U3 ▸ U4: the weight
            moved = Signal(signed(weight_bits + 1), name=f"moved{lane}", reset_less=True)
            moves4 = Signal(name=f"moves4_{lane}", reset_less=True)
            m.d.sync += [
                moved.eq(weight3.as_signed() + Mux(moves3[lane], step, 0)),
                moves4.eq(moves3[lane]),
            ]
            # U4 ▸ U5: saturated; the most negative number is only possible as loaded
            new = Signal(weight_bits, name=f"weight_after{lane}")
            least = ~moved[:-2].any()
            m.d.sync += new.eq(moved)
            with m.If(~moved[-1] & moved[-2]):
                m.d.sync += new.eq(most)
            with m.Elif(moves4 & moved[-1] & (~moved[-2] | least)):
                m.d.sync += new.eq(-most)
            if entries and has_rows:
                with m.If(takes4[lane]):
                    m.d.sync += new.eq(claim4)
            updated.append(new)
        places = []
        if entries and has_rows:
            for lane in range(lanes):
                places.append(
                    track(f"index_before{lane}", indices1[lane][0], count=4, width=index_bits)[-1]
                )

        # U5: written. Rows at once, diagonal features when all of a word are there.
        row_table_writes = Signal()
        m.d.comb += row_table_writes.eq(~update_tables[4] | table_write)
        if has_rows:
            fields = []
            for lane in range(lanes):
                fields.append(updated[lane])
                if entries:
                    fields.append(places[lane])
            new_word = Signal(row_data_bits)
            row_written = Signal(row_bits)
            parities = []
            for group in range(groups):
                part = new_word[
                    group * _GROUP * entry_bits : min(lanes, (group + 1) * _GROUP) * entry_bits
                ]
                extra = [new_word[lanes * entry_bits :]] if group == 0 else []
                parities.append(_even_parity(Cat(part, *extra)))
            m.d.comb += [
                new_word.eq(Cat(*fields, stage5)),
                row_written.eq(Mux(clearing, clear_address, row_addresses[word_step + 5])),
            ]
            row_store = Signal(row_data_bits + groups, reset_less=True)
            row_store_at = Signal(row_bits, reset_less=True)
            m.d.sync += [row_store.eq(Cat(new_word, *parities)), row_store_at.eq(row_written)]
            for n, (_, row_write) in enumerate(row_banks):
                here = row_written[row_bits - row_bank_bits :] == n if row_bank_bits else Const(1)
                enable = Signal(name=f"row_store_enable{n}")
                m.d.sync += enable.eq((clearing | (update_rows[4] & row_table_writes)) & here)
                m.d.comb += [
                    row_write.addr.eq(row_store_at),
                    row_write.data.eq(row_store),
                    row_write.en.eq(enable),
                ]
            with m.If(clearing):
                m.d.sync += [Value.cast(part).eq(0) for part in (*fields, stage5)]
        else:
            with m.If(clearing):
                m.d.sync += [part.eq(0) for part in updated]

        gathered = Signal(diagonal_data_bits)
        gathered_parity = Signal(features * groups)
        gathered_all = Signal()
        gathered_at = Signal(range(self.diagonal_words), reset_less=True)
        with m.If(update_turns[4]):
            m.d.sync += [
                gathered.eq(Cat(gathered[feature_bits:], *updated)),
                gathered_parity.eq(
                    Cat(
                        gathered_parity[groups:],
                        *(
                            _even_parity(Cat(*updated[group * _GROUP : (group + 1) * _GROUP]))
                            for group in range(groups)
                        ),
                    )
                ),
            ]
        with m.If(clearing):
            m.d.sync += [gathered.eq(0), gathered_parity.eq(0)]
        m.d.sync += [
            gathered_all.eq(
                clearing | (update_turns[4] & (turns[4] == features - 1) & row_table_writes)
            ),
            gathered_at.eq(
                Mux(
                    clearing,
                    clear_address,
                    Mux(
                        busy_table,
                        table_address,
                        diagonal_address(lesson_base, update_beats[4]),
                    ),
                )
            ),
        ]
        m.d.comb += [
            diagonal_write.addr.eq(gathered_at),
            diagonal_write.data.eq(Cat(gathered, gathered_parity)),
            diagonal_write.en.eq(gathered_all),
        ]

        # --- order of a learning
        lesson_busy = Signal()
        pause = Signal(range(features))
        flags = [*load_at, *diagonal_lesson_at, *update_rows, *update_turns]
        if has_rows:
            flags += row_lesson_at
        # What enters a pipeline counts as well, since the register tells of the cycle before.
        flags += [load_valid, row_lesson, lesson_diagonal, diagonal_waits]
        m.d.sync += lesson_busy.eq(reduce(or_, flags) | turning | gathered_all)
        # A word takes a cycle for each of its features further on.
        with m.If(pause != 0):
            m.d.sync += pause.eq(pause - 1)
        with m.If(diagonal_lesson_at[0]):
            m.d.sync += pause.eq(max(0, features - 3))
        with m.If(lesson_build):
            m.d.sync += lesson_index.eq(lesson_index + 1)
        with m.FSM(name="lesson_state") as lesson_fsm:
            with m.State("Wait"):
                m.d.sync += lesson_index.eq(0)
                with m.If(lesson_now):
                    m.next = "Load"
            with m.State("Load"):
                m.d.comb += loading.eq(1)
                with m.If(load_valid):
                    m.d.sync += load_beat.eq(load_beat + 1)
                    with m.If(load_beat == value_beats - 1):
                        m.d.sync += load_beat.eq(0)
                        m.next = "Settle" if head.is_reuse else "Walk"
                        with m.If(skip):
                            m.next = "Drain"
            if head.is_reuse:
                with m.State("Settle"):
                    m.next = "Walk"
            with m.State("Walk"):
                m.d.comb += lesson_walking.eq(1)
                with m.If(lesson_none & ~lesson_moving):
                    m.next = "Diagonal"
            with m.State("Diagonal"):
                m.d.comb += lesson_diagonal.eq(
                    (pause == 0) & ~diagonal_waits & ~diagonal_lesson_at[0]
                )
                with m.If(lesson_diagonal):
                    m.d.sync += lesson_diagonal_beat.eq(lesson_diagonal_beat + 1)
                    with m.If(lesson_diagonal_beat == value_beats - 1):
                        m.d.sync += lesson_diagonal_beat.eq(0)
                        m.next = "Drain"
            with m.State("Drain"):
                with m.If(~lesson_busy):
                    m.d.comb += lesson_done.eq(1)
                    m.next = "Wait"
        m.d.comb += lesson_build.eq(~lesson_fsm.ongoing("Wait") & ~skip & (lesson_index != top_k))

        # --- parity errors: several in a cycle are told one after the other
        error_count = Signal(6)
        error_sum = Signal(range(len(errors) + 1))
        m.d.sync += error_sum.eq(reduce(add, errors))
        telling = error_count != 0
        m.d.sync += [
            self.parity_errors.eq(telling),
            error_count.eq(error_count + error_sum - telling),
        ]

        # --- clear and tables
        quiet = Signal()
        m.d.comb += quiet.eq(
            (guess_level == 0) & (guesses_ahead == 0) & (lesson_level == 0) & ~lesson_busy
        )
        asking, asked, was_asked, opened = Signal(), Signal(), Signal(), Signal()
        m.d.comb += self.table_requests.ready.eq(asking)
        clear_waits = Signal()
        with m.If(self.clear):
            m.d.sync += clear_waits.eq(1)

        request = self.table_requests.payload
        table = Signal(8)
        left = Signal(24)  # what is still to be divided, then the quotient
        rest = Signal(range(2 * max(chunk_counts)))
        step = Signal(range(24))
        divisor = Signal(range(max(chunk_counts) + 1))
        reduced = Signal(range(2 * max(chunk_counts)))
        m.d.comb += [
            divisor.eq(Mux(table == 0, chunk_counts[0], chunk_counts[1])),
            reduced.eq(Cat(left[-1], rest)),
            table_address.eq(left),
            table_chunk.eq(rest),
        ]
        found = Signal(32)
        known_row, known_diagonal = Signal(), Signal()
        wait = Signal(range(features + 13))
        relative = Signal(len(rest) + 1)

        def chunks_of(bits):
            return [bits[at : at + 32] for at in range(0, len(bits), 32)]

        if has_rows:
            fields = []
            for lane in range(lanes):
                fields.append(weights1[lane].as_unsigned())
                if entries:
                    fields.append(indices1[lane][1])
            with m.If(update_rows[0] & update_tables[0]):
                m.d.sync += found.eq(_pick(rest, chunks_of(Cat(*fields, stage1))))
        if feature_bits % 32 == 0:
            each = feature_bits // 32
            with m.If(update_turns[0] & update_tables[0]):
                m.d.sync += relative.eq(relative - each)
                with m.If(relative < each):
                    m.d.sync += found.eq(_pick(relative, chunks_of(Cat(*weights1))))
        else:
            with m.If(diagonal_table_at[2]):
                m.d.sync += found.eq(_pick(rest, chunks_of(diagonal_clean)))

        with m.If(self.table_values.ready):
            m.d.sync += self.table_values.valid.eq(0)
        m.d.sync += [table_read_row.eq(0), table_read_diagonal.eq(0)]
        with m.FSM(init="Clear start", name="state") as fsm:
            with m.State("Clear start"):
                # The registers in front of the memories become 0.
                m.next = "Clear"
            with m.State("Clear"):
                m.d.sync += clear_address.eq(clear_address + 1)
                with m.If(clear_address == deepest - 1):
                    m.d.sync += [clear_address.eq(0), clearing.eq(0)]
                    m.next = "Ready"
            with m.State("Ready"):
                m.d.sync += [step.eq(0), rest.eq(0), found.eq(0)]
                with m.If(quiet & clear_waits & ~was_asked):
                    m.d.sync += [clear_waits.eq(self.clear), clearing.eq(1)]
                    m.next = "Clear start"
                with m.If(asking):
                    m.d.sync += [
                        left.eq(request.word),
                        table.eq(request.table),
                        table_write.eq(request.write),
                        table_value.eq(request.value),
                    ]
                with m.If(was_asked):
                    m.next = "Divide"
            with m.State("Divide"):
                m.d.sync += [
                    rest.eq(Mux(reduced >= divisor, reduced - divisor, reduced)),
                    left.eq(Cat(reduced >= divisor, left)),
                    step.eq(step + 1),
                ]
                with m.If(step == 23):
                    m.next = "Check"
            with m.State("Check"):
                m.d.sync += [
                    known_row.eq((table == 0) & (left < self.row_words)),
                    known_diagonal.eq((table == 1) & (left < self.diagonal_words)),
                ]
                m.next = "Fetch"
            with m.State("Fetch"):
                m.d.sync += [wait.eq(features + 12), relative.eq(rest)]
                with m.If(quiet):
                    m.d.sync += [
                        table_read_row.eq(known_row),
                        table_read_diagonal.eq(known_diagonal),
                    ]
                    m.next = "Turn"
            with m.State("Turn"):
                m.d.comb += busy_table.eq(1)
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == 0):
                    m.next = "Answer"
            with m.State("Answer"):
                with m.If(table_write):
                    m.next = "Ready"
                with m.Elif(~self.table_values.valid):
                    m.d.sync += [
                        self.table_values.valid.eq(1),
                        self.table_values.payload.eq(found),
                    ]
                    m.next = "Ready"

        queued = waiting != 0 if value_beats > 1 else Const(0)
        # Both are registers: a job and a table request may be taken in one cycle, and the request
        # then waits for the job.
        m.d.comb += [
            asked.eq(self.table_requests.valid & self.table_requests.ready),
            opened.eq(fsm.ongoing("Ready") & ~clear_waits & ~self.clear & ~asked & ~was_asked),
        ]
        m.d.sync += [taking.eq(opened), asking.eq(opened & quiet), was_asked.eq(asked)]
        m.d.comb += [
            self.idle.eq(
                fsm.ongoing("Ready")
                & ~was_asked
                & quiet
                & ~clear_waits
                & ~out.valid
                & ~queued
                & ~self.table_values.valid
                & ~telling
                & (error_sum == 0)
                & ~self.parity_errors
            ),
        ]
        return m
