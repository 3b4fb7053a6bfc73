"""Messages from the host into the data's way, and answers back."""

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract import MESSAGES
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import TABLE_BURST, ErrorCode, Phase, Source
from prestage_hw.contract.registers import register_by_name
from prestage_hw.layouts import RecordLayout, body_bytes, body_fields

from .layouts import MessageLayout

__all__ = ["Dispatcher", "RegisterRequestLayout", "RegisterResponseLayout"]

#: Cycles that the engine must look idle in a row before a Sync is answered: a record that leaves
#: one block's output register
#: shows in the next block's ``idle`` a cycle later.
_IDLE_CYCLES = 4

#: What is counted here.
_COUNTERS = ("tokens", "routes", "routes_out_of_order", "releases", "hints", "rejected")


class RegisterRequestLayout(data.StructLayout):
    """Access to one register."""

    def __init__(self):
        super().__init__({"write": unsigned(1), "register": unsigned(16), "value": unsigned(32)})


class RegisterResponseLayout(data.StructLayout):
    """Outcome of a register access; ``ok`` is 0 if there is no such register or it can't be
    written.
    """

    def __init__(self):
        super().__init__({"ok": unsigned(1), "value": unsigned(32)})


class Dispatcher(wiring.Component):
    """Check messages, turn them into records, and merge the answers.

    Messages are handled strictly in order, one at a time. A routing decision of k experts is
    checked in ``k + 4`` cycles; its
    first command leaves one cycle later, and the decision follows when all k commands were taken.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    messages : ``In(stream.Signature(MessageLayout(config=config, to_device=True)))``
        Messages in the order of the host.
    replies : ``Out(stream.Signature(MessageLayout(config=config, to_device=False)))``
        Messages for the host.
    begin : ``Out(stream.Signature(RecordLayout("BeginToken", config=config)))``
        Token starts, to the predictor.
    decisions : ``Out(stream.Signature(RecordLayout("RoutingDecision", config=config)))``
        Checked routing decisions, to the predictor.
    commands : ``Out(stream.Signature(RecordLayout("Command", config=config)))``
        Demands and releases, to the scheduler.
    copies : ``Out(stream.Signature(RecordLayout("CopyCommand", config=config)))``
        Copies to hold or to give back, to the scheduler; only where experts may have any.
    copied : ``In(stream.Signature(RecordLayout("Copy", config=config)))``
        Copies that are there; only with ``copies``.
    hints : ``Out(stream.Signature(RecordLayout("Candidate", config=config)))``
        Candidates from hints, to the predictor. Only one of ``begin``, ``decisions`` and ``hints``
        is valid at a time, so that the predictor sees them in the host's order.
    ready : ``In(stream.Signature(RecordLayout("Ready", config=config)))``
        Answers of the scheduler.
    events : ``In(stream.Signature(RecordLayout("Event", config=config)))``
        Errors of the scheduler.
    registers : ``Out(stream.Signature(RegisterRequestLayout()))``
        Register accesses.
    values : ``In(stream.Signature(RegisterResponseLayout()))``
        One response for each register access.
    reads : ``Out(stream.Signature(RecordLayout("ReadRequest", config=config)))``
        Beats to read over the link; never any with a host mover.
    beats : ``In(stream.Signature(RecordLayout("Beat", config=config)))``
        Beats that were read.
    hint_enable : ``In(1)``
        Hints become candidates.
    hint_threshold : ``In(8)``
        Least score of a hint that becomes a candidate.
    phases : ``Out(stream.Signature(8))``
        Phase of each token that starts, before it goes to ``begin``.
    boundary : ``Out(1)``
        Strobe: the first decision of a layer was accepted. Its first command is valid a cycle
        later at the earliest.
    engine_idle : ``In(1)``
        Nothing is under way behind the dispatcher.
    clear : ``In(1)``
        A pulse forgets which layers are unreleased.
    busy : ``Out(1)``
        The dispatcher is clearing.
    strobes : ``Out(StructLayout)``
        One bit a counter: tokens, routes, routes_out_of_order, releases, hints, rejected.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config

        def record(name):
            return stream.Signature(RecordLayout(name, config=config))

        super().__init__(
            {
                "messages": In(stream.Signature(MessageLayout(config=config, to_device=True))),
                "replies": Out(stream.Signature(MessageLayout(config=config, to_device=False))),
                "begin": Out(record("BeginToken")),
                "decisions": Out(record("RoutingDecision")),
                "commands": Out(record("Command")),
                **(
                    {"copies": Out(record("CopyCommand")), "copied": In(record("Copy"))}
                    if config.replicas > 1
                    else {}
                ),
                "hints": Out(record("Candidate")),
                "ready": In(record("Ready")),
                "events": In(record("Event")),
                "registers": Out(stream.Signature(RegisterRequestLayout())),
                "values": In(stream.Signature(RegisterResponseLayout())),
                "reads": Out(record("ReadRequest")),
                "beats": In(record("Beat")),
                "phases": Out(stream.Signature(8)),
                "boundary": Out(1),
                "hint_enable": In(1),
                "hint_threshold": In(8),
                "engine_idle": In(1),
                "clear": In(1),
                "busy": Out(1),
                "strobes": Out(data.StructLayout(dict.fromkeys(_COUNTERS, 1))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        model = config.model
        may_copy = config.replicas > 1
        layer_bits = config.bits("layer")
        ctx_bits = config.bits("ctx")

        body = self.messages.p.body
        code = self.messages.p.code
        fields = {
            message.name: body_fields(message.record.name, config=config, body=body)
            for message in MESSAGES.values()
            if message.to_device and message.record is not None
        }

        # Route, Release, Hint, Lock and BeginToken all start with the context, the first four go on
        # with the layer.
        ctx = fields["ROUTE"]["ctx"]
        layer = fields["ROUTE"]["layer"]
        experts = Array(fields["ROUTE"]["experts"])

        stamps = Array(Signal(8, name=f"stamp_{i}") for i in range(config.contexts))
        # Layer that comes after the context's current one: 0 before the first route of a token.
        nexts = Array(
            Signal(range(model.layers + 1), name=f"next_{i}") for i in range(config.contexts)
        )
        ctx_index = ctx[:ctx_bits]

        m.submodules.unreleased = unreleased = Memory(
            shape=unsigned(1), depth=1 << (ctx_bits + layer_bits), init=[]
        )
        open_read = unreleased.read_port()
        open_write = unreleased.write_port()
        open_address = Cat(layer[:layer_bits], ctx_index)
        m.d.comb += open_read.addr.eq(open_address)

        event = Signal(RecordLayout("Event", config=config))
        own = Signal(MessageLayout(config=config, to_device=False))
        own_valid = Signal()
        own_ready = Signal()
        index = Signal(range(model.top_k + 1))
        duplicate = Signal()
        duplicate_expert = Signal(16)
        expert = experts[index]
        sweep = Signal(ctx_bits + layer_bits + 1)
        idle_for = Signal(range(_IDLE_CYCLES + 1))
        clear_pending = Signal()
        repeat = Signal()
        beat = Signal(32)
        beats_left = Signal(16)
        table_end = Signal(33)
        at = Signal(range(TABLE_BURST))

        def put(stream_port, values):
            """Load a registered output stream; the state that called waits until it is taken."""
            m.d.sync += [stream_port.valid.eq(1)]
            for name, value in values.items():
                m.d.sync += stream_port.p[name].eq(value)

        for port in (
            self.begin,
            self.decisions,
            self.commands,
            self.hints,
            self.registers,
            self.reads,
            self.phases,
            *([self.copies] if may_copy else []),
        ):
            with m.If(port.valid & port.ready):
                m.d.sync += port.valid.eq(0)

        def reject(reason, *, at_expert=0, address=0, at_layer=None):
            values = {
                "code": reason,
                "ctx": ctx,
                "layer": layer if at_layer is None else at_layer,
                "expert": at_expert,
                "address": address,
            }
            for name, value in values.items():
                m.d.sync += event[name].eq(value)
            m.next = "REJECT"

        def own_reply(name, values):
            m.d.sync += [own_valid.eq(1), own.code.eq(MESSAGES[name].code)]
            record = MESSAGES[name].record.name
            for i, value in enumerate(body_bytes(record, config=config, **values)):
                m.d.sync += own.body[i].eq(value)

        def done():
            m.d.comb += self.messages.ready.eq(1)
            m.next = "NEXT"

        for name in _COUNTERS:
            m.d.sync += self.strobes[name].eq(0)
        m.d.sync += self.boundary.eq(0)

        with m.If(self.clear):
            m.d.sync += clear_pending.eq(1)
        m.d.comb += self.busy.eq(clear_pending | self.clear)

        # Table words and clear act on a quiet engine, so that what they see is settled.
        settled = Signal()
        m.d.comb += settled.eq(idle_for == _IDLE_CYCLES)

        def settle():
            with m.If(
                ~self.engine_idle
                | self.begin.valid
                | self.decisions.valid
                | self.commands.valid
                | (self.hints.valid | self.copies.valid if may_copy else self.hints.valid)
            ):
                m.d.sync += idle_for.eq(0)
            with m.Elif(~settled):
                m.d.sync += idle_for.eq(idle_for + 1)

        bad_ctx = ctx >= config.contexts
        bad_layer = layer >= model.layers
        with m.FSM(init="CLEAR"):
            with m.State("CLEAR"):
                m.d.comb += [open_write.en.eq(1), open_write.addr.eq(sweep), open_write.data.eq(0)]
                m.d.sync += sweep.eq(sweep + 1)
                with m.If(sweep == (1 << (ctx_bits + layer_bits)) - 1):
                    m.d.sync += [sweep.eq(0), clear_pending.eq(0)]
                    m.next = "NEXT"

            with m.State("NEXT"):
                m.d.sync += [index.eq(0), duplicate.eq(0), idle_for.eq(0)]
                with m.If(clear_pending):
                    m.next = "CLEAR"
                with m.Elif(self.messages.valid):
                    with m.Switch(code):
                        with m.Case(MESSAGES["BEGIN_TOKEN"].code):
                            m.next = "BEGIN"
                        with m.Case(
                            *(MESSAGES[name].code for name in ("ROUTE", "RELEASE", "HINT", "LOCK")),
                            *([MESSAGES["REPLICATE"].code] if may_copy else []),
                        ):
                            m.next = "PLACE"
                        with m.Case(MESSAGES["READ"].code):
                            m.next = "READ"
                        with m.Case(MESSAGES["SYNC"].code):
                            m.next = "SYNC"
                        with m.Case(
                            MESSAGES["REGISTER_READ"].code, MESSAGES["REGISTER_WRITE"].code
                        ):
                            m.next = "REGISTER"
                        with m.Case(MESSAGES["TABLE_READ"].code, MESSAGES["TABLE_WRITE"].code):
                            m.next = "TABLE"
                        with m.Default():
                            for name in ("ctx", "layer", "expert"):
                                m.d.sync += event[name].eq(0)
                            m.d.sync += [
                                event.code.eq(ErrorCode.BAD_MESSAGE),
                                event.address.eq(code),
                            ]
                            m.next = "REJECT"

            with m.State("REJECT"):
                with m.If(~own_valid):
                    own_reply(
                        "EVENT",
                        {
                            name: event[name]
                            for name in ("code", "ctx", "layer", "expert", "address")
                        },
                    )
                    m.d.sync += self.strobes.rejected.eq(1)
                    done()

            with m.State("BEGIN"):
                token = fields["BEGIN_TOKEN"]
                with m.If(bad_ctx):
                    reject(ErrorCode.BAD_CONTEXT, at_layer=0)
                with m.Else():
                    m.d.sync += [self.phases.valid.eq(1), self.phases.payload.eq(token["phase"])]
                    m.next = "PHASE"

            with m.State("PHASE"):
                # Decisions, starts of tokens and hints travel on three streams: each waits until
                # the others have been taken, so that the predictor sees them in the host's order.
                with m.If(~self.phases.valid & ~self.decisions.valid & ~self.hints.valid):
                    # The field is wider on the wire: 4 must not become PREFILL.
                    known = token["phase"] <= max(Phase)
                    put(self.begin, {**token, "phase": Mux(known, token["phase"], Phase.DECODE)})
                    m.d.sync += [nexts[ctx_index].eq(0), self.strobes.tokens.eq(1)]
                    m.next = "BEGUN"

            with m.State("BEGUN"):
                with m.If(self.begin.ready):
                    done()

            # Context and layer of a Route, Release, Hint or Lock; the memory of unreleased layers
            # is read meanwhile.
            with m.State("PLACE"):
                with m.If(bad_ctx):
                    reject(ErrorCode.BAD_CONTEXT)
                with m.Elif(bad_layer):
                    reject(ErrorCode.BAD_LAYER)
                with m.Elif(code == MESSAGES["ROUTE"].code):
                    m.next = "EXPERTS"
                with m.Elif(code == MESSAGES["RELEASE"].code):
                    m.next = "RELEASE"
                with m.Elif(code == MESSAGES["LOCK"].code):
                    m.next = "LOCK"
                if may_copy:
                    with m.Elif(code == MESSAGES["REPLICATE"].code):
                        m.next = "REPLICATE"
                with m.Else():
                    m.next = "HINT"

            with m.State("EXPERTS"):
                repeated = Cat(
                    (fields["ROUTE"]["experts"][j] == expert) & (index > j)
                    for j in range(model.top_k)
                ).any()
                with m.If(repeated & ~duplicate):
                    m.d.sync += [duplicate.eq(1), duplicate_expert.eq(expert)]
                m.d.sync += index.eq(index + 1)
                with m.If(expert >= model.experts):
                    reject(ErrorCode.BAD_EXPERT, at_expert=expert)
                with m.Elif(index == model.top_k - 1):
                    m.next = "UNRELEASED"

            with m.State("UNRELEASED"):
                m.d.sync += index.eq(0)
                with m.If(duplicate):
                    reject(ErrorCode.DUPLICATE_EXPERT, at_expert=duplicate_expert)
                with m.Elif(open_read.data):
                    reject(ErrorCode.UNRELEASED)
                with m.Else():
                    m.d.comb += [
                        open_write.en.eq(1),
                        open_write.addr.eq(open_address),
                        open_write.data.eq(1),
                    ]
                    # In a chunk of tokens a layer is routed several times before the next one: for
                    # whom waits for that one, the time between them is one step all the same.
                    again = nexts[ctx_index] == layer + 1
                    with m.If(~again):
                        m.d.sync += [
                            stamps[ctx_index].eq(stamps[ctx_index] + 1),
                            self.boundary.eq(1),
                        ]
                    m.d.sync += [
                        repeat.eq(again),
                        nexts[ctx_index].eq(layer + 1),
                        self.strobes.routes.eq(1),
                        # The model is right, whatever order it has: it is served, but what was
                        # predicted, and hints, are for layers above.
                        self.strobes.routes_out_of_order.eq(nexts[ctx_index] > layer + 1),
                    ]
                    m.next = "DEMAND"

            with m.State("DEMAND"):
                with m.If(~self.commands.valid | self.commands.ready):
                    with m.If(index == model.top_k):
                        m.next = "DECIDE"
                    with m.Else():
                        put(
                            self.commands,
                            {
                                "release": 0,
                                "lock": 0,
                                "ctx": ctx,
                                "layer": layer,
                                "expert": expert,
                                "index": index,
                                "repeat": repeat,
                            },
                        )
                        m.d.sync += index.eq(index + 1)

            with m.State("DECIDE"):
                with m.If(~self.decisions.valid & ~self.hints.valid):
                    put(self.decisions, {"ctx": ctx, "layer": layer, "stamp": stamps[ctx_index]})
                    for i, value in enumerate(fields["ROUTE"]["experts"]):
                        m.d.sync += self.decisions.p.experts[i].eq(value)
                    done()

            with m.State("RELEASE"):
                with m.If(~open_read.data):
                    reject(ErrorCode.UNROUTED)
                with m.Elif(~self.commands.valid):
                    m.d.comb += [
                        open_write.en.eq(1),
                        open_write.addr.eq(open_address),
                        open_write.data.eq(0),
                    ]
                    put(
                        self.commands,
                        {
                            "release": 1,
                            "lock": 0,
                            "ctx": ctx,
                            "layer": layer,
                            "expert": 0,
                            "index": 0,
                            "repeat": 0,
                        },
                    )
                    m.d.sync += self.strobes.releases.eq(1)
                    done()

            with m.State("LOCK"):
                lock = fields["LOCK"]
                with m.If(lock["expert"] >= model.experts):
                    reject(ErrorCode.BAD_EXPERT, at_expert=lock["expert"])
                with m.Elif(~self.commands.valid):
                    put(
                        self.commands,
                        {
                            "release": ~lock["lock"][0],
                            "lock": 1,
                            "ctx": ctx,
                            "layer": layer,
                            "expert": lock["expert"],
                            "index": 0,
                            "repeat": 0,
                        },
                    )
                    done()

            if may_copy:
                self._replicate(m, fields=fields, put=put, reject=reject, done=done)

            with m.State("HINT"):
                hint = fields["HINT"]
                with m.If(hint["expert"] >= model.experts):
                    reject(ErrorCode.BAD_EXPERT, at_expert=hint["expert"])
                with m.Elif(layer < nexts[ctx_index]):
                    reject(ErrorCode.HINT_PASSED, at_expert=hint["expert"])
                with m.Elif(~self.hint_enable | (hint["score"] < self.hint_threshold)):
                    done()
                with m.Elif(~self.hints.valid & ~self.decisions.valid):
                    put(
                        self.hints,
                        {
                            "ctx": ctx,
                            "layer": layer,
                            "expert": hint["expert"],
                            "score": hint["score"],
                            "source": Const(Source.HINT, 1),
                            "deadline": (stamps[ctx_index] + layer - nexts[ctx_index] + 1)[:8],
                        },
                    )
                    m.d.sync += self.strobes.hints.eq(1)
                    done()

            with m.State("READ"):
                read = fields["READ"]
                m.d.sync += [beat.eq(read["beat"]), beats_left.eq(read["count"])]
                out_of_range = (
                    (read["slot"] >= config.slots)
                    | (read["count"] == 0)
                    | (read["beat"] + read["count"] > config.expert_beats)
                )
                with m.If(out_of_range if config.stores_slots else 1):
                    m.d.sync += [
                        event.code.eq(ErrorCode.BAD_READ),
                        event.ctx.eq(0),
                        event.layer.eq(0),
                        event.expert.eq(read["slot"]),
                        event.address.eq(read["beat"]),
                    ]
                    m.next = "REJECT"
                with m.Else():
                    m.next = "READ_BEAT"

            with m.State("READ_BEAT"):
                with m.If(~self.reads.valid):
                    put(self.reads, {"slot": fields["READ"]["slot"], "beat": beat})
                    m.next = "READ_DATA"

            with m.State("READ_DATA"):
                with m.If(self.beats.valid & ~own_valid):
                    m.d.comb += self.beats.ready.eq(1)
                    own_reply(
                        "DATA",
                        {
                            "slot": fields["READ"]["slot"],
                            "beat": beat,
                            "data": [self.beats.p.data[i] for i in range(config.data_bytes)],
                            "ok": self.beats.p.ok,
                        },
                    )
                    m.d.sync += [beat.eq(beat + 1), beats_left.eq(beats_left - 1)]
                    with m.If(beats_left == 1):
                        done()
                    with m.Else():
                        m.next = "READ_BEAT"

            with m.State("SYNC"):
                # Outputs of this block count too: what it sent last must have been taken.
                quiet = (
                    self.engine_idle
                    & ~own_valid
                    & ~Cat(
                        port.valid
                        for port in (
                            *(self.begin, self.decisions, self.commands, self.hints),
                            *([self.copies] if may_copy else []),
                        )
                    ).any()
                )
                with m.If(~quiet):
                    m.d.sync += idle_for.eq(0)
                with m.Elif(idle_for != _IDLE_CYCLES):
                    m.d.sync += idle_for.eq(idle_for + 1)
                with m.Else():
                    own_reply("SYNCED", {"tag": fields["SYNC"]["tag"]})
                    done()

            with m.State("REGISTER"):
                access = fields["REGISTER_WRITE"]
                slow = (access["register"] == register_by_name("table_data").address) | (
                    access["register"] == register_by_name("clear").address
                )
                settle()
                with m.If(~slow | settled):
                    put(
                        self.registers,
                        {
                            "write": code == MESSAGES["REGISTER_WRITE"].code,
                            "register": access["register"],
                            "value": access["value"],
                        },
                    )
                    m.next = "VALUE"

            with m.State("VALUE"):
                with m.If(self.values.valid & ~own_valid):
                    m.d.comb += self.values.ready.eq(1)
                    with m.If(~self.values.p.ok):
                        for name in ("ctx", "layer", "expert"):
                            m.d.sync += event[name].eq(0)
                        m.d.sync += [
                            event.code.eq(ErrorCode.BAD_REGISTER),
                            event.address.eq(fields["REGISTER_WRITE"]["register"]),
                        ]
                        m.next = "REJECT"
                    with m.Else():
                        with m.If(code == MESSAGES["REGISTER_READ"].code):
                            own_reply(
                                "REGISTER_VALUE",
                                {
                                    "register": fields["REGISTER_WRITE"]["register"],
                                    "value": self.values.p.value,
                                },
                            )
                        done()

            # Words of a table, one by one through the registers table_address and table_data. What
            # comes after this message waits, so that the engine stays idle.
            table = fields["TABLE_WRITE"]
            writes_table = code == MESSAGES["TABLE_WRITE"].code
            table_count = Mux(writes_table, table["count"], fields["TABLE_READ"]["count"])
            with m.State("TABLE"):
                settle()
                m.d.sync += [beat.eq(table["word"]), beats_left.eq(table_count)]
                with m.If(settled):
                    put(
                        self.registers,
                        {
                            "write": 1,
                            "register": register_by_name("table_address").address,
                            "value": Cat(table["word"][:24], table["table"]),
                        },
                    )
                    m.next = "TABLE_SELECT"

            with m.State("TABLE_SELECT"):
                m.d.sync += table_end.eq(beat + beats_left)
                with m.If(self.values.valid):
                    m.d.comb += self.values.ready.eq(1)
                    put(
                        self.registers,
                        {
                            "write": 0,
                            "register": register_by_name("table_words").address,
                            "value": 0,
                        },
                    )
                    m.next = "TABLE_SIZE"

            with m.State("TABLE_SIZE"):
                with m.If(self.values.valid):
                    m.d.comb += self.values.ready.eq(1)
                    with m.If(
                        (table_end > self.values.p.value)
                        | (beats_left == 0)
                        | (writes_table & (beats_left > TABLE_BURST))
                    ):
                        m.d.sync += [
                            event.code.eq(ErrorCode.BAD_TABLE),
                            event.ctx.eq(0),
                            event.layer.eq(0),
                            event.expert.eq(table["table"]),
                            event.address.eq(table["word"]),
                        ]
                        m.next = "REJECT"
                    with m.Else():
                        m.next = "TABLE_ROOM"

            with m.State("TABLE_ROOM"):
                m.d.sync += at.eq(0)
                with m.If(~own_valid):
                    m.d.sync += own.code.eq(MESSAGES["TABLE_DATA"].code)
                    head = {"table": table["table"], "word": beat, "values": [0] * TABLE_BURST}
                    for i, value in enumerate(body_bytes("TableData", config=config, **head)):
                        m.d.sync += own.body[i].eq(value)
                    m.next = "TABLE_WORD"

            with m.State("TABLE_WORD"):
                put(
                    self.registers,
                    {
                        "write": writes_table,
                        "register": register_by_name("table_data").address,
                        "value": Array(table["values"])[at],
                    },
                )
                m.next = "TABLE_VALUE"

            with m.State("TABLE_VALUE"):
                with m.If(self.values.valid):
                    m.d.comb += self.values.ready.eq(1)
                    # The words are the last fields of the answer.
                    first = MESSAGES["TABLE_DATA"].body_bytes(config) - 4 * TABLE_BURST
                    for i in range(TABLE_BURST):
                        with m.If(at == i):
                            for j in range(4):
                                byte = self.values.p.value.word_select(j, 8)
                                m.d.sync += own.body[first + 4 * i + j].eq(byte)
                    m.d.sync += [
                        beat.eq(beat + 1),
                        beats_left.eq(beats_left - 1),
                        at.eq(at + 1),
                    ]
                    with m.If(~writes_table & ((beats_left == 1) | (at == TABLE_BURST - 1))):
                        m.d.sync += own_valid.eq(1)
                    with m.If(beats_left == 1):
                        done()
                    with m.Elif(at == TABLE_BURST - 1):
                        m.next = "TABLE_ROOM"
                    with m.Else():
                        m.next = "TABLE_WORD"

        # The stamps go on: the scheduler counts the same routes and isn't told of a clear.
        with m.If(self.clear):
            m.d.sync += [signal.eq(0) for signal in nexts]

        self._merge(m, own=own, own_valid=own_valid, own_ready=own_ready)
        return m

    def _replicate(self, m, *, fields, put, reject, done):
        """States of a Replicate: a command for each copy that the device may have.

        What is more than wanted is given back first, from the last copy down to the expert itself;
        then the others are held, from the expert itself on.
        """
        config = self.config
        wanted = fields["REPLICATE"]
        copies = wanted["copies"]
        number = Signal(range(config.replicas + 1))
        command = {name: wanted[name] for name in ("ctx", "layer", "expert")}
        least = Mux(copies == 1, 0, copies)  # Of those to give back.

        with m.State("REPLICATE"):
            m.d.sync += number.eq(config.replicas)
            with m.If(wanted["expert"] >= config.model.experts):
                reject(ErrorCode.BAD_EXPERT, at_expert=wanted["expert"])
            with m.Elif((copies == 0) | (copies > config.replicas)):
                reject(ErrorCode.BAD_COPIES, at_expert=wanted["expert"], address=copies)
            with m.Else():
                m.next = "GIVE_BACK"

        with m.State("GIVE_BACK"):
            with m.If(number == least):
                m.d.sync += number.eq(0)
                m.next = "HOLD"
            with m.Elif(~self.copies.valid | self.copies.ready):
                put(self.copies, {**command, "keep": 0, "copy": number - 1})
                m.d.sync += number.eq(number - 1)

        with m.State("HOLD"):
            with m.If((copies == 1) | (number == copies)):
                done()
            with m.Elif(~self.copies.valid | self.copies.ready):
                put(self.copies, {**command, "keep": 1, "copy": number})
                m.d.sync += number.eq(number + 1)

    def _merge(self, m, *, own, own_valid, own_ready):
        """Merge the scheduler's answers and the dispatcher's own into ``replies``.

        The scheduler's go first: the dispatcher sends at most one reply for each message, so it
        can't be starved for ever.
        """
        with m.If(self.replies.ready | ~self.replies.valid):
            answers = self.ready.valid | self.events.valid
            if self.config.replicas > 1:
                answers |= self.copied.valid
            m.d.sync += self.replies.valid.eq(answers | own_valid)
            with m.If(self.ready.valid):
                m.d.comb += self.ready.ready.eq(1)
                self._load(m, "READY", "Ready", self.ready.p)
            with m.Elif(self.events.valid):
                m.d.comb += self.events.ready.eq(1)
                self._load(m, "EVENT", "Event", self.events.p)
            if self.config.replicas > 1:
                with m.Elif(self.copied.valid):
                    m.d.comb += self.copied.ready.eq(1)
                    self._load(m, "COPY", "Copy", self.copied.p)
            with m.Elif(own_valid):
                m.d.comb += own_ready.eq(1)
                m.d.sync += self.replies.p.eq(own)
        with m.If(own_ready):
            m.d.sync += own_valid.eq(0)

    def _load(self, m, message, record, payload):
        m.d.sync += self.replies.p.code.eq(MESSAGES[message].code)
        values = {name: payload[name] for name, _ in payload.shape()}
        for i, value in enumerate(body_bytes(record, config=self.config, **values)):
            m.d.sync += self.replies.p.body[i].eq(value)
