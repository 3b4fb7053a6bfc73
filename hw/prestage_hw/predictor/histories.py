"""Histories of the ``perceptron`` predictor: what each context routed lately, and before that."""

from typing import NamedTuple

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import NO_TOKEN, Phase
from prestage_hw.dma.axi import AXI4Signature
from prestage_hw.layouts import RecordLayout

from .sets import SETS, SetLayout
from .tokens import (
    KEPT,
    NO_COLLISIONS,
    TABLES,
    StoredSetLayout,
    TableAccessLayout,
    TokenTable,
    place,
    table_rows,
    words_of_table,
)
from .tokens_memory import TokenMemory

__all__ = ["TABLES", "Histories", "HistoryRequestLayout", "HistoryRouteLayout"]

#: Who asks: a head that predicts choices, or the reuse head after this or before the last visit.
_PREDICT, _NOW, _OLD = "predict", "now", "old"

#: Memory and place in it of each set: the layers m - h - place of this token; m, m + 1, m - 1 of
#: the previous one; m, m + 1 of the one before.
_SOURCES = {
    "A": {_PREDICT: ("this", 0)},
    "C": {_PREDICT: ("this", 1)},
    "D": {_PREDICT: ("this", 2)},
    "B": {_PREDICT: ("prev", 0), _NOW: ("this", 0), _OLD: ("prev", 0)},
    "Bn": {_PREDICT: ("prev", 1), _NOW: ("prev", 1), _OLD: ("before", 1)},
    "Bp": {_PREDICT: ("prev", 2), _NOW: ("this", 1), _OLD: ("prev", 2)},
    "G": {_PREDICT: ("before", 0), _NOW: ("prev", 0), _OLD: ("before", 0)},
    "T": {_PREDICT: ("token", 0)},
    "T2": {_PREDICT: ("token", 0)},
    "Q": {_PREDICT: ("pair", 0)},
    "S": {_PREDICT: ("successor", 0), _NOW: ("next", 0), _OLD: ("successor", 0)},
}

#: Words up to which a memory lies in distributed RAM: block RAMs are needed for the weights.
_SMALL = 64

#: Layer of a place, relative to the target layer; of this token also less the horizon.
_STEPS = {"this": (0, -1, -2), "prev": (0, 1, -1), "before": (0, 1)}


class HistoryRouteLayout(data.StructLayout):
    """Layout of a choice: {ctx, layer, experts}.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, config):
        experts = data.ArrayLayout(unsigned(config.bits("expert")), config.model.top_k)
        super().__init__(
            {"ctx": config.bits("ctx"), "layer": config.bits("layer"), "experts": experts}
        )


class HistoryRequestLayout(data.StructLayout):
    """Layout of a question for the sets of a target layer.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Members
    -------
    ctx, layer : context and layer numbers
        Context and target layer.
    base : layer number
        Target layer less the horizon, modulo its width; the target layer for the reuse head.
    horizon : 2 bits
        Horizon of the head that asks, 0 for the reuse head.
    reuse : 1 bit
        Whether that is the reuse head.
    now : 1 bit
        Reuse head: sets after this visit of the layer, not those of the visit before.
    """

    def __init__(self, config):
        super().__init__(
            {
                "ctx": config.bits("ctx"),
                "layer": config.bits("layer"),
                "base": config.bits("layer"),
                "horizon": 2,
                "reuse": 1,
                "now": 1,
            }
        )


class _Read(NamedTuple):
    """One read of a memory: which of its copies, in which step, at which place."""

    copy: int
    step: int


class Histories(wiring.Component):
    """Choices of the last three tokens of each context, and what the token tables know.

    A word of memory for each context and layer holds a set and its parity: three memories for this
    token, the previous one and the one before, and one for each token table, where ``begins`` puts
    what it finds. They are read in at most two steps, from a second copy where a memory holds three
    sets that are asked for at once. A token start copies this token's choices to the previous
    token's place and so on, while they pass by on their way into the token tables, and then looks
    the new token up.

    Sets that no head of the device looks at are always unknown. A word with wrong parity is an
    unknown set; one in the memory of token ids makes the ids unknown, and the ended token is not
    stored.

    What was transferred in an earlier cycle happened before; within a cycle it is a route, a
    request, a table access, a token start.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.

    Members
    -------
    begins : ``In(stream.Signature(RecordLayout("BeginToken")))``
        A token starts. Ready again after at most ``begin_cycles``, when the sets of the new token
        can be asked for.
    routes : ``In(stream.Signature(HistoryRouteLayout(config)))``
        This token's choice for a layer.
    requests : ``In(stream.Signature(HistoryRequestLayout(config)))``
        Questions, one every 4 cycles.
    sets : ``Out(stream.Signature(data.ArrayLayout(SetLayout(config), 11)))``
        The answers, in the order of :data:`SETS`; valid ``latency`` cycles after the question.
    table_requests : ``In(stream.Signature(TableAccessLayout(3)))``
        Reads and writes of words of the token tables, see :class:`TokenTable`; tables as in
        :data:`TABLES`.
    table_values : ``Out(stream.Signature(32))``
        One value for each read.
    clear : ``In(1)``
        A pulse forgets everything, after all that was accepted up to that cycle.
    idle : ``Out(1)``
        Nothing to do and nothing in an output register.
    parity_errors : ``Out(1)``
        Strobe: words were read with wrong parity.
    bus, base, bus_errors :
        Where the token tables lie, as in :class:`TokenMemory`; only if they lie behind the memory
        port. The table port then reads 0 and writes nothing.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If its predictor is not a ``perceptron``.
    """

    def __init__(self, config):
        require_config(config)
        if config.perceptron is None:
            raise ValueError(f"Predictor must be 'perceptron', not {config.predictor!r}")
        self.config = config
        sets = data.ArrayLayout(SetLayout(config), len(SETS))
        self._in_memory = config.perceptron.token_store == "memory"
        memory_ports = {
            "bus": Out(
                AXI4Signature(address_bits=config.address_bits, data_bits=config.bits("data"))
            ),
            "base": In(config.address_bits),
            "bus_errors": Out(1),
        }
        super().__init__(
            {
                **(memory_ports if self._in_memory else {}),
                "begins": In(stream.Signature(RecordLayout("BeginToken", config=config))),
                "routes": In(stream.Signature(HistoryRouteLayout(config))),
                "requests": In(stream.Signature(HistoryRequestLayout(config))),
                "sets": Out(stream.Signature(sets)),
                "table_requests": In(stream.Signature(TableAccessLayout(len(TABLES)))),
                "table_values": Out(stream.Signature(unsigned(32))),
                "clear": In(1),
                "idle": Out(1),
                "parity_errors": Out(1),
            }
        )
        used = {_PREDICT: set(), _NOW: set(), _OLD: set()}
        for head in config.perceptron.heads:
            for kind in (_NOW, _OLD) if head.is_reuse else (_PREDICT,):
                used[kind] |= head.features()
        # For each set and kind of question: memory and place in it.
        self._sources = {
            name: {kind: where for kind, where in _SOURCES[name].items() if name in used[kind]}
            for name in SETS
        }
        places = {}
        for sources in self._sources.values():
            for memory, number in sources.values():
                places.setdefault(memory, set()).add(number)
        #: For each memory the reads of its places: copy and step. The first needs no sum and is
        #: done in the first step.
        self._reads = {
            memory: {
                number: _Read(copy=order // 2, step=min(order, 1))
                for order, number in enumerate(sorted(numbers))
            }
            for memory, numbers in places.items()
        }
        self._rows = table_rows(config)

    @property
    def memories(self):
        """Names of the memories that requests read."""
        return tuple(self._reads)

    @property
    def latency(self):
        """Cycles from a request's transfer until its sets are valid, if the last were taken."""
        steps = max((r.step for reads in self._reads.values() for r in reads.values()), default=0)
        return 3 + steps

    @property
    def begin_cycles(self):
        """Cycles from the transfer of a token start until ``begins`` is ready again, at most, if
        the sets before are taken and the token tables lie in block RAM.
        """
        return 2 * self.config.model.layers + 22

    def table_words(self, table):
        """Words in a table of :data:`TABLES`, by number; 0 if no head uses it."""
        name = TABLES[table] if table < len(TABLES) else None
        if name not in self._rows or self._in_memory:
            return 0
        return words_of_table(self.config, rows=self._rows[name], choices=len(KEPT[name]))

    def elaborate(self, platform):
        m = Module()
        config = self.config
        layers, contexts = config.model.layers, config.contexts
        layer_bits = config.bits("layer")

        set_layout, stored_layout = SetLayout(config), StoredSetLayout(config)
        word_bits = range(contexts << layer_bits)

        def word_of(ctx, layer):
            return Cat(layer[:layer_bits], ctx) if contexts > 1 else layer[:layer_bits]

        tables = {}
        if not self._in_memory:
            for name, rows in self._rows.items():
                table = TokenTable(config, rows=rows, choices=len(KEPT[name]))
                m.submodules[f"{name}_table"] = tables[name] = table
        store = None
        if self._in_memory and self._rows:
            m.submodules.store = store = TokenMemory(config)
            wiring.connect(m, wiring.flipped(self.bus), store.bus)
            m.d.comb += [store.base.eq(self.base), self.bus_errors.eq(store.bus_errors)]
        stores = [*tables.values()] if store is None else [store]

        # A memory holds {set, parity}; that of the token table both of its sets.
        # Tables behind the memory port store the ended token from its place of the previous one.
        needs_prev = store is not None or "prev" in self._reads or "before" in self._reads
        names = ["this", "prev"] if needs_prev else ["this"]
        names += ["before"] if "before" in self._reads else []
        names += [name for name in self._rows if name != "successor"]
        names += ["successor", "next"] if "successor" in self._rows else []
        depth = contexts << layer_bits
        reads, writes, layouts = {}, {}, {}
        for name in names:
            count = len(KEPT.get(name, (name,)))
            layouts[name] = data.ArrayLayout(stored_layout, count)
            copies = max((read.copy for read in self._reads.get(name, {}).values()), default=0) + 1
            reads[name], writes[name] = [], []
            for copy in range(copies):
                # A route is seen by a request of the same cycle.
                attributes = {} if name == "this" else NO_COLLISIONS
                if depth <= _SMALL:
                    attributes = {**attributes, "ram_style": "distributed"}
                memory = Memory(shape=layouts[name], depth=depth, init=[], attrs=attributes)
                m.submodules[f"{name}{copy}"] = memory
                write = memory.write_port()
                seen = (write,) if name == "this" else ()
                writes[name].append(write)
                reads[name].append(memory.read_port(transparent_for=seen))

        context_layout = data.StructLayout(
            {
                "token": 32,
                "before": 32,
                "token_known": 1,
                "before_known": 1,
                "learns": 1,
                "parity": 1,
            }
        )
        m.submodules.tokens = tokens = Memory(
            shape=context_layout, depth=max(2, contexts), init=[], attrs=NO_COLLISIONS
        )
        context_read, context_write = tokens.read_port(), tokens.write_port()

        # What waits for its turn.
        begin, begin_waits = Signal(self.begins.payload.shape()), Signal()
        access, access_waits = Signal(TableAccessLayout(len(TABLES))), Signal()
        clear_waits, clearing = Signal(init=1), Signal()
        free, phase = Signal(), Signal(2)
        m.d.comb += [
            free.eq(~begin_waits & ~clear_waits & ~clearing),
            self.begins.ready.eq(free & ~access_waits),
            self.table_requests.ready.eq(free & ~access_waits),
            self.routes.ready.eq(free & (phase == 0)),
            self.requests.ready.eq(free & (phase == 0)),
        ]
        with m.If(self.begins.valid & self.begins.ready):
            m.d.sync += [begin.eq(self.begins.payload), begin_waits.eq(1)]
        with m.If(self.table_requests.valid & self.table_requests.ready):
            m.d.sync += [access.eq(self.table_requests.payload), access_waits.eq(1)]
        with m.If(self.clear):
            m.d.sync += clear_waits.eq(1)

        # --- questions: at most two reads of each memory, checked a cycle after they arrive

        asked = Signal(self.requests.payload.shape())
        question = self.requests.payload
        rotating, at = Signal(), Signal(range(layers + 1))
        asks, stepping = Signal(), Signal()  # stepping: phase is not 0
        m.d.comb += asks.eq(self.requests.valid & self.requests.ready)
        with m.If(asks):
            m.d.sync += asked.eq(question)
        horizon = Signal(2)
        m.d.comb += horizon.eq(Mux(question.reuse, 0, question.horizon))

        # A token start reads ``begin_layer`` where it begins and where it moves ``onward``; in a
        # rotation it does so with all its writes, by ``advance``.
        advance, onward, beginning = Signal(), Signal(), Signal()
        begin_layer = Signal(range(layers + 1))
        with m.If(beginning | onward):
            m.d.sync += begin_layer.eq(begin_layer + 1)

        exists = {}  # Whether the layer of a read exists, kept while the memory is read.
        raws = {}  # What a memory gave, a cycle later.
        latch = Signal()
        for name in names:
            where = self._reads.get(name, {0: _Read(copy=0, step=0)})
            steps = _STEPS.get(name, (0,))
            for copy, port in enumerate(reads[name]):
                raws[name, copy] = raw = Signal(layouts[name], name=f"{name}{copy}_raw")
                with m.If(latch):
                    m.d.sync += raw.eq(port.data)
                # Layers of the first step and, from a register, of the second.
                targets = [Signal(layer_bits, name=f"{name}{copy}_layer{n}") for n in range(2)]
                for number, read in where.items():
                    if read.copy != copy:
                        continue
                    step = steps[number]
                    back = (horizon if name == "this" else 0) - step
                    start = question.base if name == "this" else question.layer
                    exists[name, number] = Signal(name=f"{name}{number}_exists")
                    with m.If(asks):
                        there = Const(1, 1)
                        if name == "this":
                            there = (question.reuse | (horizon != 0)) & (question.layer >= back)
                        elif step < 0:
                            there = question.layer >= -step
                        elif step > 0:
                            there = question.layer < layers - step
                        m.d.sync += exists[name, number].eq(there)
                    if read.step == 0:
                        m.d.comb += targets[0].eq(start + step)
                    else:
                        with m.If(asks):
                            m.d.sync += targets[1].eq(start + step)
                m.d.comb += port.en.eq(~rotating | beginning | onward)
                with m.If(rotating):
                    m.d.comb += port.addr.eq(word_of(begin.ctx, begin_layer))
                with m.Elif(stepping):
                    m.d.comb += port.addr.eq(word_of(asked.ctx, targets[1]))
                with m.Else():
                    m.d.comb += port.addr.eq(word_of(question.ctx, targets[0]))

        sets = Signal(self.sets.payload.shape())
        sets_valid = Signal()
        bad, found_bad = Signal(), Signal()
        last_step = self.latency - 3
        m.d.comb += [self.sets.payload.eq(sets), self.sets.valid.eq(sets_valid)]
        with m.If(self.sets.ready):
            m.d.sync += sets_valid.eq(0)

        def take_step(step):
            """Move what was read in a step to the answer."""
            kinds = {
                _PREDICT: ~asked.reuse,
                _NOW: asked.reuse & asked.now,
                _OLD: asked.reuse & ~asked.now,
            }
            for number, set_name in enumerate(SETS):
                target = sets[number]
                if step == 0:
                    m.d.sync += target.valid.eq(0)
                for kind, (name, where) in self._sources[set_name].items():
                    read = self._reads[name][where]
                    if read.step != step:
                        continue
                    kept = KEPT.get(name, (set_name,))
                    stored = raws[name, read.copy][kept.index(set_name)]
                    with m.If(kinds[kind]):
                        m.d.sync += [
                            target.experts.eq(stored.experts),
                            target.valid.eq(stored_layout.known(stored) & exists[name, where]),
                        ]
            wrong = [
                exists[name, where] & stored.as_value().xor()
                for name, where_reads in self._reads.items()
                for where, read in where_reads.items()
                if read.step == step
                for stored in raws[name, read.copy]
            ]
            m.d.comb += bad.eq(Cat(wrong).any())

        with m.Switch(phase):
            with m.Case(0):
                m.d.sync += [phase.eq(asks), stepping.eq(asks)]
            with m.Case(1):
                m.d.comb += latch.eq(1)
                m.d.sync += phase.eq(2)
            with m.Case(2):
                with m.If(~sets_valid):
                    m.d.comb += latch.eq(1)
                    take_step(0)
                    m.d.sync += [
                        phase.eq(3 if last_step else 0),
                        stepping.eq(last_step != 0),
                        sets_valid.eq(last_step == 0),
                    ]
            with m.Case(3):
                if last_step:
                    take_step(1)
                    m.d.sync += [phase.eq(0), stepping.eq(0), sets_valid.eq(1)]

        # --- writes: routes, rotation, what the tables found, zeros

        clear_word = Signal(word_bits)
        rotated = word_of(begin.ctx, at)
        route = self.routes
        for name in names:
            for write in writes[name]:
                if name == "this":
                    # Zeros but for routes; ``free`` tells without the machine that none is taken.
                    known = Signal(set_layout, name="routed")
                    m.d.comb += [
                        known.experts.eq(route.payload.experts),
                        known.valid.eq(1),
                        write.en.eq(clearing | advance | (route.valid & route.ready)),
                    ]
                    with m.If(route.valid & free):
                        m.d.comb += [
                            write.addr.eq(word_of(route.payload.ctx, route.payload.layer)),
                            write.data[0].eq(stored_layout.store(known)),
                        ]
                    with m.Else():
                        m.d.comb += write.addr.eq(Mux(clearing, clear_word, rotated))
                    continue
                with m.If(clearing):
                    m.d.comb += [write.addr.eq(clear_word), write.en.eq(1)]
                with m.Elif(advance):
                    m.d.comb += [write.addr.eq(rotated), write.en.eq(1)]
                    older = {"prev": "this", "before": "prev", "successor": "next"}.get(name)
                    if older is not None:
                        m.d.comb += write.data.eq(reads[older][0].data)
                table_name = "successor" if name == "next" else name
                if table_name in self._rows and name != "successor":
                    found = (tables[table_name] if store is None else store).found
                    here = Const(1, 1)
                    if store is not None:
                        here = found.payload.table == TABLES.index(table_name)
                    with m.Elif(found.valid & here):
                        m.d.comb += [
                            write.addr.eq(word_of(begin.ctx, found.payload.layer)),
                            write.en.eq(1),
                        ]
                        for n in range(len(KEPT[table_name])):
                            m.d.comb += write.data[n].eq(stored_layout.store(found.payload.sets[n]))

        # --- token starts

        ids = Signal(context_layout)
        # A token, and the one before it; first those of the ended token, then those of the new one.
        newer, older = Signal(32), Signal(32)
        newer_known, older_known, learns = Signal(), Signal(), Signal()
        storing = Signal()
        wanted = Signal(len(TABLES))
        orders, storers, given = (
            Signal(len(TABLES), name=n) for n in ("orders", "storers", "given")
        )
        busy, ready, offered = Signal(), Signal(len(TABLES)), Signal()
        first_known = Signal()
        ids_bad, first_bad, check_ids = Signal(), Signal(), Signal()
        m.d.comb += [
            context_read.addr.eq(begin.ctx),
            ids_bad.eq(ids.as_value().xor()),
            first_bad.eq(raws["this", 0].as_value().xor()),
            first_known.eq(stored_layout.known(raws["this", 0][0])),
            wanted.eq(
                Cat(
                    newer_known,
                    newer_known & older_known,
                    Mux(storing, older_known, newer_known),
                )
                & Const(
                    sum((name in self._rows) << n for n, name in enumerate(TABLES)), len(TABLES)
                )
            ),
        ]
        turn, turned = Signal(range(len(TABLES) + 1)), Signal()
        m.d.comb += turned.eq(turn == len(TABLES))
        for number, name in enumerate(TABLES):
            if name not in self._rows:
                m.d.comb += ready[number].eq(1)
                continue
            token = newer
            if name == "successor":
                token = Mux(storing, older, newer)
            rows = self._rows[name]
            entry, tag = place(token, older if name == "pair" else None, rows=rows)
            if store is not None:
                m.d.comb += ready[number].eq(1)
                with m.If(turn == number):
                    m.d.comb += [
                        store.commands.payload.entry.eq(entry),
                        store.commands.payload.tag.eq(tag),
                    ]
                continue
            table = tables[name]
            m.d.comb += [
                table.commands.valid.eq(orders[number]),
                table.commands.payload.store.eq(storing),
                table.commands.payload.entry.eq(entry),
                table.commands.payload.tag.eq(tag),
                table.choices_in.valid.eq(offered & storers[number] & ~given[number]),
                table.choices_in.payload.eq(reads["this"][0].data[0]),
                table.found.ready.eq(1),
                ready[number].eq(~storers[number] | given[number] | table.choices_in.ready),
            ]
            with m.If(table.commands.ready):
                m.d.sync += orders[number].eq(0)
            with m.If(offered):
                m.d.sync += given[number].eq(ready[number] & ~advance)
        sending = Signal()  # The layers of the ended token go to the tables behind the port.
        if store is not None:
            m.d.comb += [
                store.commands.valid.eq(orders[0]),
                store.commands.payload.table.eq(turn),
                store.commands.payload.store.eq(storing),
                store.choices_in.valid.eq(sending),
                store.choices_in.payload.eq(reads["prev"][0].data[0]),
                store.found.ready.eq(1),
            ]
            with m.If(store.commands.ready):
                m.d.sync += orders[0].eq(0)
        m.d.comb += busy.eq(orders.any() | ~Cat(each.idle for each in stores).all())

        value, value_valid = Signal(32), Signal()
        m.d.comb += [self.table_values.payload.eq(value), self.table_values.valid.eq(value_valid)]
        with m.If(self.table_values.ready):
            m.d.sync += value_valid.eq(0)
        sent = Signal()

        strobes = [each.parity_errors for each in stores]
        m.d.sync += [
            found_bad.eq(bad | (check_ids & (ids_bad | first_bad))),
            self.parity_errors.eq(found_bad | Cat(strobes).any()),
        ]

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(
                    ~begin_waits
                    & ~access_waits
                    & ~clear_waits
                    & (phase == 0)
                    & ~sets_valid
                    & ~value_valid
                    & ~found_bad
                    & ~busy
                )
                m.d.sync += [at.eq(0), begin_layer.eq(0)]
                m.d.sync += [turn.eq(0), sent.eq(0), storers.eq(0), given.eq(0)]
                with m.If(access_waits & ~value_valid):
                    m.next = "ACCESS"
                with m.Elif(begin_waits & (phase == 0)):
                    m.d.sync += rotating.eq(1)
                    m.next = "LOAD"
                with m.Elif(clear_waits & (phase == 0) & ~access_waits):
                    m.d.sync += clear_word.eq(0)
                    m.d.comb += [each.clear.eq(1) for each in stores]
                    m.next = "CLEAR"
            with m.State("LOAD"):
                m.d.comb += beginning.eq(1)
                m.d.sync += ids.eq(context_read.data)
                m.next = "LATCH"
            with m.State("LATCH"):
                m.d.comb += latch.eq(1)
                m.d.sync += [
                    newer.eq(ids.token),
                    older.eq(ids.before),
                    newer_known.eq(ids.token_known & ~ids_bad),
                    older_known.eq(ids.before_known & ~ids_bad),
                    learns.eq(ids.learns & ~ids_bad),
                ]
                m.next = "PLAN"
            with m.State("PLAN"):
                m.d.comb += [storing.eq(1), check_ids.eq(1)]
                with m.If(learns & first_known):
                    m.d.sync += [storers.eq(wanted), orders.eq(0 if store is not None else wanted)]
                m.next = "ROTATE"
            with m.State("ROTATE"):
                m.d.comb += [
                    storing.eq(1),
                    offered.eq(1),
                    advance.eq(ready.all()),
                    onward.eq(advance),
                ]
                with m.If(advance):
                    m.d.sync += at.eq(at + 1)
                    with m.If(at == layers - 1):
                        m.d.sync += [at.eq(0), begin_layer.eq(0), rotating.eq(store is not None)]
                        m.next = "TURN" if store is None else "STORE"
            if store is not None:
                # One table after the other. The ended token is the previous one by now.
                with m.State("STORE"):
                    m.d.comb += storing.eq(1)
                    with m.If(turned):
                        m.d.sync += [turn.eq(0), rotating.eq(0)]
                        m.next = "TURN"
                    with m.Elif(storers.bit_select(turn, 1)):
                        m.d.comb += beginning.eq(1)
                        m.d.sync += [orders.eq(1), sending.eq(1)]
                        m.next = "SEND"
                    with m.Else():
                        m.d.sync += turn.eq(turn + 1)
                with m.State("SEND"):
                    m.d.comb += [storing.eq(1), onward.eq(store.choices_in.ready)]
                    with m.If(onward):
                        m.d.sync += at.eq(at + 1)
                        with m.If(at == layers - 1):
                            m.d.sync += [at.eq(0), begin_layer.eq(0), turn.eq(turn + 1)]
                            m.d.sync += sending.eq(0)
                            m.next = "STORE"
            with m.State("TURN"):
                m.d.sync += [
                    newer.eq(begin.token),
                    newer_known.eq(begin.token != NO_TOKEN),
                    older.eq(newer),
                    older_known.eq(newer_known),
                ]
                m.next = "FIND"
            with m.State("FIND"):
                if store is None:
                    m.d.sync += orders.eq(wanted)
                    m.next = "WAIT"
                else:
                    with m.If(turned):
                        m.next = "WAIT"
                    with m.Elif(wanted.bit_select(turn, 1)):
                        m.d.sync += orders.eq(1)
                        m.next = "FETCH"
                    with m.Else():
                        m.d.sync += turn.eq(turn + 1)
            if store is not None:
                with m.State("FETCH"):
                    with m.If(~busy):
                        m.d.sync += turn.eq(turn + 1)
                        m.next = "FIND"
            with m.State("WAIT"):
                m.d.comb += context_write.en.eq(1)
                with m.If(~busy):
                    m.d.sync += begin_waits.eq(0)
                    m.next = "IDLE"
            with m.State("ACCESS"):
                m.d.sync += value.eq(0)
                with m.Switch(access.table):
                    for number, name in enumerate(TABLES):
                        if name not in tables:
                            continue
                        table = tables[name]
                        with m.Case(number):
                            m.d.comb += [
                                table.table_requests.valid.eq(~sent),
                                table.table_values.ready.eq(1),
                            ]
                            with m.If(~sent):
                                m.d.sync += sent.eq(table.table_requests.ready)
                            with m.Elif(table.table_values.valid | table.idle):
                                m.d.sync += [
                                    value.eq(table.table_values.payload),
                                    value_valid.eq(~access.write),
                                    access_waits.eq(0),
                                ]
                                m.next = "IDLE"
                    with m.Default():
                        m.d.sync += [value_valid.eq(~access.write), access_waits.eq(0)]
                        m.next = "IDLE"
            with m.State("CLEAR"):
                m.d.comb += clearing.eq(1)
                m.d.sync += clear_word.eq(clear_word + 1)
                with m.If(clear_word == depth - 1):
                    m.next = "CLEARED"
            with m.State("CLEARED"):
                with m.If(~busy):
                    m.d.sync += clear_waits.eq(0)
                    m.next = "IDLE"

        for table in tables.values():
            m.d.comb += [
                table.table_requests.payload.word.eq(access.word),
                table.table_requests.payload.write.eq(access.write),
                table.table_requests.payload.value.eq(access.value),
            ]

        started = Signal(context_layout)
        body = started.as_value()[: context_layout.size - 1]
        with m.If(clearing):
            m.d.comb += [context_write.addr.eq(clear_word), context_write.en.eq(1)]
        with m.Else():
            m.d.comb += [
                context_write.addr.eq(begin.ctx),
                started.token.eq(newer),
                started.before.eq(older),
                started.token_known.eq(newer_known),
                started.before_known.eq(older_known),
                started.learns.eq(begin.phase != Phase.PREFILL),
                context_write.data.eq(Cat(body, body.xor())),
            ]
        return m
