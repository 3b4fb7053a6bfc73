"""Scheduler: looks experts up in the buffer, fetches what is missing, answers demands."""

from amaranth import Array, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum, fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import (
    BufferCode,
    BufferOp,
    ErrorCode,
    FetchReason,
    PrefetchKind,
    Source,
)
from prestage_hw.contract.registers import TIME_BITS
from prestage_hw.layouts import RecordLayout

from .budget import Budget, answer_cycles
from .inflight import InflightTable
from .queue import CandidateQueue
from .rescan import Rescans
from .statistics import PrefetchStatistics
from .throttle import Outcome, OutcomeLayout, Throttle, ThrottleStateLayout, WeightsLayout

__all__ = ["STROBES", "Scheduler"]

#: Counters that the scheduler strobes, named as in :data:`prestage_hw.contract.registers.COUNTERS`.
STROBES = (
    "demands",
    "hits",
    "misses",
    "late",
    "merged",
    "refused",
    "locks",
    "lock_misses",
    "prefetch_issued",
    "prefetch_redundant",
    "prefetch_stale",
    "prefetch_no_slot",
    "prefetch_outbid",
    "prefetch_overflow",
    "prefetch_throttled",
    "prefetch_cancelled",
    "useful",
    "useless",
    "evictions",
    "pollution",
    "fills",
    "fill_errors",
    "demand_bytes",
    "prefetch_bytes",
    "checksum_errors",
    "prefetch_late_dropped",
)


class _State(enum.Enum, shape=unsigned(4)):
    DISPATCH = 0
    SCREEN = 1  # Of what kind is the candidate?
    LOOKUP = 2
    RESULT = 3
    DECIDE = 4
    MERGE = 5
    ALLOCATE = 6
    HIT = 7
    REFUSE = 8
    RETURN = 9  # A tile came back.
    FILL = 10
    ANSWER = 11
    JUDGE = 12  # May it be prefetched?
    SCAN = 13  # Was the layer of an entry routed?
    GIVE_UP = 14
    FREE = 15


class Scheduler(wiring.Component):
    """Serve demands before prefetches, one fetch for each expert in flight.

    One thing at a time: a completion before a command, a command before an entry that may be given
    up, that before a copy, that before a candidate of the queue, that before one out of a rescan.
    Commands are served in order; one that must
    wait holds up those behind it and every candidate. Copies are held and given back in order, too;
    one that must wait holds up only other copies. With a buffer
    that answers a request ``b`` cycles after taking it and nothing else to do, from a command being
    taken it is ``hit_latency + b`` cycles to ``ready.valid`` for a resident expert, ``miss_latency
    + b`` to ``fetches.valid`` for a missing one; from a completion being taken it is ``fill_latency
    + b`` to ``ready.valid``.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    valued : :class:`bool` or None
        Whether the buffer takes values, so that it can be asked for rescans. None stands for
        whether the device's predictor gives any.

    Members
    -------
    commands : ``In(stream.Signature(RecordLayout("Command")))``
        Demands, releases, locks and unlocks in the host's order. A lock is served as a demand is,
        but it pins nothing, and its expert stays.
    copies : ``In(stream.Signature(RecordLayout("CopyCommand")))``
        Copies to hold or to give back; only where experts may have any. A copy is fetched as a
        prefetch is, one at a time.
    copied : ``Out(stream.Signature(RecordLayout("Copy")))``
        Copies that are there; only with ``copies``. Those that could not be made are among
        ``events``.
    candidates : ``In(stream.Signature(RecordLayout("Candidate")))``
        A :class:`CandidateQueue`: the best goes first, the worst is lost to a full queue, and
        newcomers wait for bounded time.
    buffer_requests : ``Out(stream.Signature(RecordLayout("BufferRequest")))``
        Operations on the buffer, one at a time.
    buffer_results : ``In(stream.Signature(RecordLayout("BufferResult")))``
        One for each operation.
    rescans : ``Out(stream.Signature(RecordLayout("RescanRequest")))``
        Asks the buffer what of its own values is worth a prefetch; only if it takes any.
    rescanned : ``In(stream.Signature(RecordLayout("RescanResult")))``
        One answer for each; only then.
    rescan_ahead, rescan_least : ``In(7)``, ``In(8)``
        The registers of these names; only then. Unless ``rescan_ahead`` is 0, the predictor's
        candidates are dropped on entry.
    valued : ``In(config.contexts)``
        Strobes: the buffer takes values of this context; only then.
    fetches : ``Out(stream.Signature(RecordLayout("FetchRequest")))``
        Tiles for the DMA engine.
    urgent : ``Out(config.dma_channels)``
        Channel with a prefetch's tile on its way that a demand waits for by now.
    completions : ``In(stream.Signature(RecordLayout("Completion")))``
        One for each fetch, in any order.
    start, start_tag, start_number, start_address, start_last_tile : ``Out``
        Strobe: the fetch of this expert begins; only with ``config.checksums``, the last one only
        where experts differ in size. See :class:`prestage_hw.dma.checksum.Checksums`.
    fetch_layer, fetch_expert : ``Out``
        Expert that ``fetches`` offers a tile of; only with a host mover, who has no use for
        addresses.
    ready : ``Out(stream.Signature(RecordLayout("Ready")))``
        Experts that a demand may use.
    events : ``Out(stream.Signature(RecordLayout("Event")))``
        Demands that could not be served.
    expert_base : ``In(address bits)``
        Address of expert 0 of layer 0: a whole number of beats.
    part_bases : ``In(ArrayLayout(address bits, parts - 1))``
        The same of the parts of experts after the first one; only where there are any.
    prefetch_tiles : ``In(3)``
        Most prefetch tiles with the DMA engine; 0 counts as 1.
    enable : ``In(1)``
        0 drops the predictor's candidates on entry.
    cutoff_layer : ``In(8)``
        Candidates for this layer and those above are dropped on entry; 255: none are.
    hold : ``In(1)``
        1 lets candidates wait.
    wanted : ``Out(1)``
        No candidate waits to be looked up.
    alone : ``In(1)``
        1 lets a candidate wait until nothing is in flight.
    cancel_enable : ``In(1)``
        1 gives up prefetches in flight whose layer was routed: once a routing decision was looked
        up, each entry is looked at, and gets no more tiles if its deadline has come and no other
        decision's candidate was for it. A demand that finds no slot gives one up, too: that which
        was begun last, and another once its slot is free.
    throttle_enable : ``In(1)``
        1 drops candidates of kinds that cost more than they save.
    throttle_weights : ``In(WeightsLayout())``
        The register ``throttle``.
    throttle_state : ``Out(ThrottleStateLayout())``
        The register ``throttle_state``.
    budget : ``In(4)``
        The register of that name; no effect while ``alone`` is 1.
    layer_time, tile_time : ``Out(24)``
        The registers of these names.
    streaming : ``In(config.contexts)``
        Contexts that go through a prefill chunk: what the predictor proposes for their next layer
        goes over ``config.stream_channel``.
    gathering : ``In(config.contexts)``
        Contexts that go through any chunk, whose tokens are routed one by one through a layer:
        their prefetches are not given up before the layer after theirs is routed.
    statistics_requests, statistics_values, clear_statistics
        As ``requests``, ``values`` and ``clear`` of :class:`PrefetchStatistics`.
    clear : ``In(1)``
        A pulse makes throttle and budget forget what they have counted and measured. Nothing else
        may be in the block.
    demanding : ``Out(1)``
        A demand waits, or is looked up.
    strobes : ``Out(StructLayout)``
        One bit for each counter of :data:`STROBES`. The bytes counters strobe with each good tile
        that comes before any failed tile of its fetch, by the class with which it was requested.
    idle : ``Out(1)``
        No command, candidate, transfer, answer or strobe is in the block.
    """

    #: Cycles beside the buffer's, see above.
    hit_latency = 7
    miss_latency = 10
    fill_latency = 6

    def __init__(self, *, config, valued=None):
        require_config(config)
        self.config = config
        self._valued = config.gives_values if valued is None else valued
        #: Cycles for which a candidate, and what comes meanwhile, is held up if the register
        #: ``budget`` is not 0.
        self.weigh_latency = answer_cycles(config)
        #: Commands that may wait: two routing decisions at least.
        self.command_depth = max(16, 2 * config.model.top_k)

        #: Copies that may wait.
        self.copy_depth = 4 * config.replicas

        def record(name):
            return stream.Signature(RecordLayout(name, config=config))

        contexts = config.contexts
        others = len(config.part_bytes) - 1
        bases = {"part_bases": In(data.ArrayLayout(config.address_bits, others))}
        starts = {
            "start": Out(1),
            "start_tag": Out(config.bits("tag")),
            "start_number": Out(range(config.model.layers * config.model.experts)),
            "start_address": Out(config.bits("address")),
            **({"start_last_tile": Out(config.bits("tile"))} if config.layer_bytes else {}),
        }
        subject = {
            "fetch_layer": Out(config.bits("layer")),
            "fetch_expert": Out(config.bits("expert")),
        }
        rescans = {
            "rescans": Out(record("RescanRequest")),
            "rescanned": In(record("RescanResult")),
            "rescan_ahead": In(7),
            "rescan_least": In(8),
            "valued": In(contexts),
        }
        super().__init__(
            {
                **(bases if others else {}),
                **(rescans if self._valued else {}),
                **(starts if config.checksums else {}),
                **(subject if config.mover == "host" else {}),
                **(
                    {"copies": In(record("CopyCommand")), "copied": Out(record("Copy"))}
                    if config.replicas > 1
                    else {}
                ),
                "commands": In(record("Command")),
                "candidates": In(record("Candidate")),
                "buffer_requests": Out(record("BufferRequest")),
                "buffer_results": In(record("BufferResult")),
                "fetches": Out(record("FetchRequest")),
                "urgent": Out(config.dma_channels),
                "completions": In(record("Completion")),
                "ready": Out(record("Ready")),
                "events": Out(record("Event")),
                "expert_base": In(config.bits("address")),
                "prefetch_tiles": In(3),
                "enable": In(1),
                "cutoff_layer": In(8),
                "hold": In(1),
                "wanted": Out(1),
                "alone": In(1),
                "cancel_enable": In(1),
                "throttle_enable": In(1),
                "throttle_weights": In(WeightsLayout()),
                "throttle_state": Out(ThrottleStateLayout()),
                "budget": In(4),
                "layer_time": Out(TIME_BITS),
                "tile_time": Out(TIME_BITS),
                "streaming": In(contexts),
                "gathering": In(contexts),
                "statistics_requests": In(record("TableRequest")),
                "statistics_values": Out(stream.Signature(32)),
                "clear_statistics": In(1),
                "clear": In(1),
                "demanding": Out(1),
                "strobes": Out(data.StructLayout({name: unsigned(1) for name in STROBES})),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        contexts = config.contexts
        may_copy = config.replicas > 1

        m.submodules.queue = queue = CandidateQueue(config=config)
        m.submodules.table = table = InflightTable(config=config)
        m.submodules.throttle = throttle = Throttle(config=config)
        m.submodules.statistics = statistics = PrefetchStatistics(config=config)
        m.submodules.budgeting = budget = Budget(config=config)
        m.submodules.commands = commands = fifo.SyncFIFOBuffered(
            width=self.commands.payload.shape().size, depth=self.command_depth
        )
        # Which entry fills a slot. Read only for slots that are filling, so nothing needs clearing.
        m.submodules.filling = filling = memory.Memory(
            shape=unsigned(config.bits("tag")), depth=config.slots, init=[]
        )
        filling_write = filling.write_port()
        filling_read = filling.read_port()

        wiring.connect(m, throttle.marks, statistics.marks)
        wiring.connect(m, wiring.flipped(self.statistics_requests), statistics.requests)
        wiring.connect(m, statistics.values, wiring.flipped(self.statistics_values))
        wiring.connect(m, wiring.flipped(self.candidates), queue.i)
        wiring.connect(m, wiring.flipped(self.commands), commands.w_stream)
        wiring.connect(m, table.fetches, wiring.flipped(self.fetches))
        if config.mover == "host":
            m.d.comb += [
                self.fetch_layer.eq(table.fetch_layer),
                self.fetch_expert.eq(table.fetch_expert),
            ]
        if self._valued:
            m.submodules.rescan = rescan = Rescans(config=config)
            wiring.connect(m, rescan.requests, wiring.flipped(self.rescans))
            wiring.connect(m, wiring.flipped(self.rescanned), rescan.results)
        command = data.View(RecordLayout("Command", config=config), commands.r_data)
        if may_copy:
            m.submodules.copies = copies = fifo.SyncFIFOBuffered(
                width=self.copies.payload.shape().size, depth=self.copy_depth
            )
            wiring.connect(m, wiring.flipped(self.copies), copies.w_stream)
            copy = data.View(RecordLayout("CopyCommand", config=config), copies.r_data)

        state = Signal(_State)
        strobe = Signal(self.strobes.shape())

        # What is served: a command or a candidate, kept while a demand waits.
        op = Signal(BufferOp)
        wanted = (
            Signal()
        )  # It is a demand or a lock: it is answered, and fetched before prefetches.
        ctx = Signal(config.bits("ctx"))
        layer = Signal(config.bits("layer"))
        expert = Signal(config.bits("expert"))
        index = Signal(config.bits("index"))
        deadline = Signal(8)
        value = Signal(8)  # confidence of a candidate
        hinted = Signal()  # It comes from a hint.
        scanned = Signal()  # It comes out of a rescan.
        kind = Signal(PrefetchKind)
        streams = Signal()  # It is one of a prefill chunk's.
        weighs = Signal()  # Whether it comes late is asked.
        route_starts = Signal()
        waiting = Signal()  # A demand found no slot and waits for a completion.
        retry = Signal()  # That completion has come, or a slot was given up.
        filled = Signal()  # The buffer's answer is to a FILL,
        cancels = Signal()  # to a CANCEL.

        # A copy that is held or given back stays in its queue until it is decided. One at a time is
        # fetched, so that nothing hangs on when it arrives.
        keep = Signal()
        copy_waits = Signal()  # until a fetch ends
        copying = Signal()
        copying_tag = Signal(config.bits("tag"))
        copying_ctx = Signal(config.bits("ctx"))
        copying_number = Signal(config.bits("copy"))
        is_copy = op == BufferOp.COPY

        # A demand of a context that waits for the same fetch already (its layer was released and
        # routed again meanwhile).
        held = Signal()
        held_tag = Signal(config.bits("tag"))
        held_ctx = Signal(contexts)

        completion = Signal(self.completions.payload.shape())
        tag = Signal(config.bits("tag"))
        last = Signal()
        pending = Signal(contexts)
        result = Signal(self.buffer_results.payload.shape())
        routes = [Signal(8, name=f"routes_{c}") for c in range(contexts)]
        scans = Signal(range(config.inflight + 1))  # entries to look at
        # How an entry that is looked at stands, a cycle later.
        aged, gathers, shared = Signal(8), Signal(), Signal()
        spares = Signal()  # A demand needs its slot.
        entry_gathers = Signal()  # Its context goes through a chunk.
        waits, waits_kind = Signal(), Signal(2)  # A prefetch's tile was on its way, and whose.
        charged = Signal()  # A demand of this decision was charged for waiting.

        # What the throttle is told of waits in a register.
        outcome = throttle.outcomes.payload
        outcome_valid = Signal()
        m.d.comb += [
            throttle.outcomes.valid.eq(outcome_valid),
            throttle.weights.eq(self.throttle_weights),
            throttle.enable.eq(self.throttle_enable),
            throttle.clear.eq(self.clear),
            self.throttle_state.eq(throttle.state),
            statistics.clear.eq(self.clear_statistics),
            budget.budget.eq(self.budget),
            budget.clear.eq(self.clear),
            self.layer_time.eq(budget.layer_time),
            self.tile_time.eq(budget.tile_time),
        ]
        with m.If(throttle.outcomes.ready):
            m.d.sync += outcome_valid.eq(0)
        told = Signal(OutcomeLayout(config=config))
        m.d.comb += outcome.eq(told)

        def tell(what, **fields):
            """Tell the throttle, which has taken what it was told before."""
            m.d.sync += [outcome_valid.eq(1), told.outcome.eq(what)]
            m.d.sync += [told[name].eq(value) for name, value in fields.items()]

        # Address of the expert that is served, three cycles after it is known: sooner than any
        # lookup ends. Of each further part the address that the expert would have if its tiles
        # before the part lay there, too, so that a tile's number counts from 0 in all of them. With
        # rows the table counts in each part itself.
        number = Signal(range(config.model.layers * config.model.experts))
        m.d.sync += number.eq(layer * config.model.experts + expert)
        addresses = []
        if config.layer_bytes:
            last_tile = Signal(config.bits("tile"))
            addresses.append(self._address(m, layer=layer, expert=expert, last_tile=last_tile))
        for part, rows in enumerate(() if config.layer_bytes else config.part_rows):
            offset = Signal(range(config.array_bytes[part]), name=f"offset_{part}")
            address = Signal(config.bits("address"), name=f"address_{part}")
            start = self.expert_base
            if part:
                start = Signal(config.bits("address"), name=f"start_{part}")
                before = 0 if config.rows else config.first_tiles[part] * config.tile_bytes
                m.d.sync += start.eq(self.part_bases[part - 1] - before)
            if rows.layer_stride == config.model.experts * rows.expert_stride:
                m.d.sync += offset.eq(number * rows.expert_stride)
            else:
                # Experts whose rows lie in turns.
                of_layer = Signal(range(config.array_bytes[part]), name=f"of_layer_{part}")
                of_expert = Signal(range(config.array_bytes[part]), name=f"of_expert_{part}")
                m.d.sync += [
                    of_layer.eq(layer * rows.layer_stride),
                    of_expert.eq(expert * rows.expert_stride),
                    offset.eq(of_layer + of_expert),
                ]
            m.d.sync += address.eq(start + offset)
            addresses.append(address)

        if may_copy:
            m.d.comb += [table.keeps.eq(copying), table.kept_tag.eq(copying_tag)]
        one_ctx = Signal(contexts)
        age, entry_age = Signal(8), Signal(8)
        m.d.comb += [
            one_ctx.eq(Const(1) << ctx),
            wanted.eq((op == BufferOp.DEMAND) | (op == BufferOp.LOCK)),
            age.eq(Array(routes)[ctx] - deadline),
            entry_age.eq(Array(routes)[table.row.ctx] - table.row.deadline),
            entry_gathers.eq(self.gathering.bit_select(table.row.ctx, 1)),
            *(queue.routes[c].eq(routes[c]) for c in range(contexts)),
            queue.cutoff_layer.eq(self.cutoff_layer),
            self.wanted.eq(queue.empty),
            self.urgent.eq(table.urgent),
            table.prefetch_tiles.eq(self.prefetch_tiles),
            table.tag.eq(tag),
            table.entry.layer.eq(layer),
            table.entry.expert.eq(expert),
            table.entry.slot.eq(result.slot),
            *(table.entry.addresses[part].eq(each) for part, each in enumerate(addresses)),
            table.entry.ctx.eq(ctx),
            table.entry.deadline.eq(deadline),
            table.entry.kind.eq(kind),
            *([table.entry.last_tile.eq(last_tile)] if config.layer_bytes else []),
            table.stream.eq(streams),
            table.waiters.eq(Mux(wanted, one_ctx, 0)),
            table.demand.eq(wanted),
            table.tile.eq(completion.tile),
            table.failed.eq(completion.failed),
            table.address.eq(completion.address),
            table.reason.eq(completion.reason),
            table.hold.eq(
                (state == _State.ALLOCATE)
                | (state == _State.MERGE)
                | (state == _State.GIVE_UP)
                | (state == _State.RETURN)
                | (state == _State.FREE)
            ),
            budget.routed.eq((state == _State.LOOKUP) & route_starts),
            budget.ctx.eq(ctx),
            budget.fetched.eq(self.fetches.valid & self.fetches.ready),
            budget.completed.eq(self.completions.valid & self.completions.ready),
            budget.failed.eq(self.completions.payload.failed),
            budget.left.eq(table.left),
            budget.ask_ctx.eq(ctx),
            budget.ask_deadline.eq(-age),
            *([budget.ask_layer.eq(layer)] if config.layer_bytes else []),
            filling_write.addr.eq(result.slot),
            filling_write.data.eq(table.free_tag),
            filling_read.addr.eq(self.buffer_results.payload.slot),
            filling_read.en.eq(state == _State.RESULT),
            self.completions.ready.eq(state == _State.DISPATCH),
            self.buffer_results.ready.eq(state == _State.RESULT),
        ]
        for stream_ in (
            *(self.buffer_requests, self.ready, self.events),
            *([self.copied] if may_copy else []),
        ):
            with m.If(stream_.ready):
                m.d.sync += stream_.valid.eq(0)

        budgeted = Signal()
        m.d.sync += budgeted.eq((self.budget != 0) & ~self.alone)

        # Whether a candidate may come, known from the state's second cycle on. There nothing of it
        # changes but that the throttle comes to an end: what it was told before counts.
        may_prefetch = Signal()
        m.d.sync += may_prefetch.eq(
            (state == _State.DISPATCH)
            & table.prefetch_room
            & throttle.idle
            & ~outcome_valid
            & ~(self.alone & table.occupied)
        )

        queue_enable = self.enable
        if self._valued:
            scanned_deadline = Signal(8)
            m.d.sync += [
                rescan.on.eq(self.enable & self.rescan_ahead.any()),
                scanned_deadline.eq(Array(routes)[rescan.ctx] + rescan.result.ahead),
            ]
            near, far = (
                throttle.admits.bit_select(kind, 1)
                for kind in (PrefetchKind.NEAR, PrefetchKind.FAR)
            )
            m.d.comb += [
                rescan.near.eq(near),
                rescan.ahead.eq(Mux(far, self.rescan_ahead, 1)),
                rescan.least.eq(self.rescan_least),
                rescan.cutoff_layer.eq(self.cutoff_layer),
                rescan.valued.eq(self.valued),
                rescan.clear.eq(self.clear),
                rescan.may_ask.eq(
                    (state == _State.DISPATCH)
                    & may_prefetch
                    & ~self.hold
                    & queue.empty
                    & (commands.level == 0)
                    & ~waiting
                    & ~held
                    & (scans == 0)
                ),
            ]
            queue_enable = self.enable & ~self.rescan_ahead.any()
        m.d.comb += queue.enable.eq(queue_enable)

        if may_copy:
            copy_room = Signal()
            m.d.sync += copy_room.eq((state == _State.DISPATCH) & table.prefetch_room)

        lowest = Signal(contexts)
        lowest_ctx = Signal(config.bits("ctx"))
        m.d.comb += lowest.eq(pending & -pending)
        for c in range(contexts):
            with m.If(lowest[c]):
                m.d.comb += lowest_ctx.eq(c)

        request = self.buffer_requests.payload
        with m.Switch(state):
            with m.Case(_State.DISPATCH):
                m.d.sync += [filled.eq(0), cancels.eq(0), spares.eq(0)]
                with m.If(self.completions.valid):
                    m.d.sync += [
                        completion.eq(self.completions.payload),
                        tag.eq(self.completions.payload.tag),
                        state.eq(_State.RETURN),
                    ]
                with m.Elif(held):
                    pass
                with m.Elif(waiting):
                    with m.If(retry):
                        m.d.sync += state.eq(_State.LOOKUP)
                with m.Elif(commands.level != 0):
                    with m.If(commands.r_rdy & (command.release | table.demand_room)):
                        m.d.comb += commands.r_en.eq(1)
                        if self._valued:
                            m.d.comb += rescan.disturbed.eq(~command.release)
                        m.d.sync += [
                            op.eq(
                                Mux(
                                    command.lock,
                                    Mux(command.release, BufferOp.UNLOCK, BufferOp.LOCK),
                                    Mux(command.release, BufferOp.RELEASE, BufferOp.DEMAND),
                                )
                            ),
                            ctx.eq(command.ctx),
                            layer.eq(command.layer),
                            expert.eq(command.expert),
                            index.eq(command.index),
                            route_starts.eq(
                                ~command.release
                                & ~command.lock
                                & (command.index == 0)
                                & ~command.repeat
                            ),
                            state.eq(_State.LOOKUP),
                        ]
                with m.Elif(scans != 0):
                    m.d.sync += [scans.eq(scans - 1), tag.eq(scans - 1), state.eq(_State.SCAN)]
                if may_copy:
                    with m.Elif(copies.r_rdy & copy_room & ~copying & ~copy_waits):
                        m.d.sync += [
                            op.eq(BufferOp.COPY),
                            ctx.eq(copy.ctx),
                            layer.eq(copy.layer),
                            expert.eq(copy.expert),
                            value.eq(copy.copy),
                            keep.eq(copy.keep),
                            kind.eq(len(PrefetchKind)),  # No throttle hears of it.
                            streams.eq(0),
                            state.eq(_State.LOOKUP),
                        ]
                with m.Elif(queue.valid & may_prefetch & ~self.hold):
                    m.d.comb += queue.take.eq(1)
                    m.d.sync += [
                        op.eq(BufferOp.PREFETCH),
                        ctx.eq(queue.best.ctx),
                        layer.eq(queue.best.layer),
                        expert.eq(queue.best.expert),
                        deadline.eq(queue.best.deadline),
                        value.eq(queue.best.score),
                        hinted.eq(queue.best.source == Source.HINT),
                        index.eq(0),
                        state.eq(_State.SCREEN),
                    ]
                    if self._valued:
                        m.d.comb += rescan.disturbed.eq(1)
                        m.d.sync += scanned.eq(0)
                if self._valued:
                    with m.Elif(rescan.found & may_prefetch & ~self.hold):
                        m.d.comb += rescan.take.eq(1)
                        m.d.sync += [
                            op.eq(BufferOp.PREFETCH),
                            ctx.eq(rescan.ctx),
                            layer.eq(rescan.result.layer),
                            expert.eq(rescan.result.expert),
                            deadline.eq(scanned_deadline),
                            value.eq(rescan.result.value),
                            hinted.eq(0),
                            index.eq(0),
                            scanned.eq(1),
                            state.eq(_State.SCREEN),
                        ]

            with m.Case(_State.SCREEN):
                m.d.comb += budget.ask.eq(budgeted)
                m.d.sync += [
                    weighs.eq(budgeted),
                    streams.eq(~hinted & age.all() & (self.streaming & one_ctx).any()),
                    kind.eq(
                        Mux(
                            hinted,
                            PrefetchKind.HINT,
                            Mux(age.all(), PrefetchKind.NEAR, PrefetchKind.FAR),
                        )
                    ),
                    state.eq(_State.JUDGE),
                ]

            with m.Case(_State.JUDGE):
                admitted = throttle.admits.bit_select(kind, 1)
                with m.If(~weighs | budget.answered):
                    m.d.comb += [
                        strobe.prefetch_throttled.eq(~admitted),
                        strobe.prefetch_late_dropped.eq(admitted & weighs & budget.late),
                    ]
                    with m.If(admitted & ~(weighs & budget.late)):
                        m.d.sync += state.eq(_State.LOOKUP)
                    with m.Else():
                        m.d.sync += state.eq(_State.DISPATCH)
                        if self._valued:
                            m.d.comb += rescan.failed.eq(scanned)

            with m.Case(_State.SCAN):
                m.d.sync += [
                    aged.eq(entry_age),
                    gathers.eq(entry_gathers),
                    shared.eq(table.row_shared),
                    state.eq(_State.GIVE_UP),
                ]

            with m.Case(_State.GIVE_UP):
                m.d.sync += state.eq(_State.DISPATCH)
                # What other decisions want, too, comes. A chunk's other tokens may want it, so long
                # as they are routed through the layer.
                in_time = aged[7] | (gathers & (aged == 0))
                overdue = ~in_time & ~shared
                # Its last tile may have left meanwhile.
                held_copy = copying & (tag == copying_tag)
                disposable = table.row_disposable & ~held_copy if may_copy else table.row_disposable
                # What would be asked, whether it is or not: that is known late.
                m.d.sync += [
                    request.op.eq(BufferOp.CANCEL),
                    request.slot.eq(table.row.slot),
                ]
                with m.If((overdue | spares) & disposable):
                    m.d.comb += table.cancel.eq(1)
                    # What is on its way comes first: its last tile ends the entry.
                    with m.If(table.row_idle):
                        m.d.sync += [
                            cancels.eq(1),
                            self.buffer_requests.valid.eq(1),
                            state.eq(_State.RESULT),
                        ]

            with m.Case(_State.LOOKUP):
                # Else what is found and what goes for it might take turns for ever.
                strict = (op == BufferOp.PREFETCH) & scanned
                with m.If(route_starts):
                    m.d.comb += queue.routed.eq(1)
                    for c in range(contexts):
                        with m.If(one_ctx[c]):
                            m.d.sync += routes[c].eq(routes[c] + 1)
                with m.If((op == BufferOp.DEMAND) & (index == 0)):
                    m.d.sync += charged.eq(0)
                with m.If((op == BufferOp.DEMAND) & (index == config.model.top_k - 1)):
                    m.d.sync += scans.eq(
                        Mux(self.cancel_enable & table.prefetching, config.inflight, 0)
                    )
                m.d.sync += [
                    route_starts.eq(0),
                    waiting.eq(0),
                    request.op.eq(op),
                    request.ctx.eq(ctx),
                    request.layer.eq(layer),
                    request.expert.eq(expert),
                    request.index.eq(index),
                    request.slot.eq(0),
                    request.tile.eq(0),
                    request.last.eq(Mux(is_copy, keep, strict) if may_copy else strict),
                    request.failed.eq(0),
                    request.value.eq(
                        Mux((op == BufferOp.PREFETCH) | is_copy, value, 0)
                        if may_copy
                        else Mux(op == BufferOp.PREFETCH, value, 0)
                    ),
                    self.buffer_requests.valid.eq(1),
                    state.eq(_State.RESULT),
                ]

            with m.Case(_State.RESULT):
                m.d.sync += [
                    result.eq(self.buffer_results.payload),
                    waits.eq(table.waits & ~charged),
                    waits_kind.eq(table.waits_kind),
                ]
                with m.If(self.buffer_results.valid):
                    m.d.sync += state.eq(_State.DECIDE)

            with m.Case(_State.DECIDE):
                with m.If(outcome_valid):
                    m.d.sync += state.eq(_State.DECIDE)
                with m.Elif(filled):
                    m.d.comb += [
                        strobe.fills.eq(last & ~table.row_failed & ~table.row_cancelled),
                        strobe.fill_errors.eq(last & table.row_failed),
                        strobe.checksum_errors.eq(
                            last & table.row_failed & (table.row_reason == FetchReason.CRC)
                            if config.checksums
                            else 0
                        ),
                        strobe.prefetch_cancelled.eq(
                            last & table.row_cancelled & ~table.row_failed
                        ),
                    ]
                    with m.If(last & (table.row_failed | table.row_cancelled) & ~table.row_demand):
                        tell(Outcome.DROPPED, slot=table.row.slot)
                    m.d.sync += state.eq(Mux(last, _State.ANSWER, _State.DISPATCH))
                with m.Elif(cancels):
                    m.d.comb += strobe.prefetch_cancelled.eq(1)
                    tell(Outcome.DROPPED, slot=table.row.slot)
                    m.d.sync += state.eq(_State.FREE)
                with m.Else():
                    m.d.sync += tag.eq(filling_read.data)
                    if self._valued:
                        m.d.comb += [
                            rescan.failed.eq(
                                (op == BufferOp.PREFETCH)
                                & scanned
                                & (result.code != BufferCode.ALLOCATED)
                            ),
                            rescan.freed.eq((op == BufferOp.RELEASE) | (op == BufferOp.UNLOCK)),
                        ]
                    if may_copy:
                        waits_on = (result.code == BufferCode.FILLING) | (
                            (result.code == BufferCode.NO_SLOT) & table.occupied
                        )
                        with m.If(is_copy & waits_on):
                            m.d.sync += copy_waits.eq(1)
                        with m.Elif(is_copy):
                            m.d.comb += copies.r_en.eq(1)
                    self._decide(
                        m,
                        op=op,
                        result=result,
                        occupied=table.occupied,
                        keep=keep,
                        strobe=strobe,
                        state=state,
                        waiting=waiting,
                        retry=retry,
                    )
                    # A demand without a slot waits for no more than a tile of a prefetch: the slot
                    # of one is given up, another's once that has come to its end.
                    starves = wanted & (result.code == BufferCode.NO_SLOT) & table.spare
                    with m.If(starves & self.cancel_enable & ~table.cancelling):
                        m.d.sync += [
                            tag.eq(table.spare_tag),
                            spares.eq(1),
                            state.eq(_State.GIVE_UP),
                        ]

            with m.Case(_State.MERGE):
                m.d.comb += [
                    strobe.demands.eq(op == BufferOp.DEMAND),
                    strobe.late.eq((op == BufferOp.DEMAND) & ~table.row_demand),
                    strobe.merged.eq((op == BufferOp.DEMAND) & table.row_demand),
                    strobe.locks.eq(op == BufferOp.LOCK),
                ]
                candidate = op == BufferOp.PREFETCH
                differs = (table.row.ctx != ctx) | (table.row.deadline != deadline)
                m.d.comb += table.share.eq(candidate & differs)
                with m.If(candidate):
                    pass
                with m.Elif((table.row_waiters & one_ctx).any()):
                    m.d.sync += [held.eq(1), held_tag.eq(tag), held_ctx.eq(one_ctx)]
                with m.Else():
                    m.d.comb += table.wait.eq(1)
                with m.If(result.prefetched & ~candidate):
                    whole = {"last_tile": table.row.last_tile} if config.layer_bytes else {}
                    tell(Outcome.USED, slot=result.slot, returned=table.row_returned, **whole)
                m.d.sync += state.eq(_State.DISPATCH)

            with m.Case(_State.ALLOCATE):
                m.d.comb += [table.allocate.eq(1), filling_write.en.eq(1)]
                tell(
                    Mux(wanted, Outcome.MISS, Outcome.PREFETCH),
                    slot=result.slot,
                    layer=layer,
                    expert=expert,
                    evicted=result.evicted,
                    unused=result.evicted_unused,
                    polluted=result.polluted,
                    waits=waits & (op == BufferOp.DEMAND),
                    kind=Mux(wanted, waits_kind, kind),
                )
                with m.If((op == BufferOp.DEMAND) & waits):
                    m.d.sync += charged.eq(1)
                m.d.sync += state.eq(_State.DISPATCH)
                if may_copy:
                    with m.If(is_copy):
                        m.d.sync += [
                            copying.eq(1),
                            copying_tag.eq(table.free_tag),
                            copying_ctx.eq(ctx),
                            copying_number.eq(value),
                        ]

            with m.Case(_State.HIT):
                if may_copy:
                    with m.If(is_copy & ~self.copied.valid):
                        m.d.sync += [
                            self.copied.valid.eq(1),
                            self.copied.payload.ctx.eq(ctx),
                            self.copied.payload.layer.eq(layer),
                            self.copied.payload.expert.eq(expert),
                            self.copied.payload.copy.eq(value),
                            self.copied.payload.slot.eq(result.slot),
                            state.eq(_State.DISPATCH),
                        ]
                with m.If(~self.ready.valid & ~is_copy if may_copy else ~self.ready.valid):
                    m.d.sync += [
                        self.ready.valid.eq(1),
                        self.ready.payload.ctx.eq(ctx),
                        self.ready.payload.layer.eq(layer),
                        self.ready.payload.expert.eq(expert),
                        self.ready.payload.slot.eq(result.slot),
                        state.eq(_State.DISPATCH),
                    ]
                    with m.If(result.prefetched):
                        whole = {"last_tile": last_tile} if config.layer_bytes else {}
                        tell(Outcome.USED, slot=result.slot, returned=config.tiles, **whole)

            with m.Case(_State.REFUSE):
                unserved = ErrorCode.NO_SLOT
                if may_copy:
                    unserved = Mux(
                        result.code == BufferCode.REFUSED, ErrorCode.NOT_HELD, ErrorCode.NO_SLOT
                    )
                with m.If(~self.events.valid):
                    m.d.sync += [
                        self.events.valid.eq(1),
                        self.events.payload.code.eq(
                            Mux(op == BufferOp.UNLOCK, ErrorCode.NOT_LOCKED, unserved)
                        ),
                        self.events.payload.ctx.eq(ctx),
                        self.events.payload.layer.eq(layer),
                        self.events.payload.expert.eq(expert),
                        self.events.payload.address.eq(0),
                        state.eq(_State.DISPATCH),
                    ]

            with m.Case(_State.RETURN):
                good = ~completion.failed & ~table.row_failed
                m.d.comb += [
                    table.complete.eq(1),
                    strobe.demand_bytes.eq(good & table.complete_demand),
                    strobe.prefetch_bytes.eq(good & ~table.complete_demand),
                ]
                m.d.sync += [retry.eq(1), state.eq(_State.FILL)]

            with m.Case(_State.FILL):
                m.d.sync += [
                    filled.eq(1),
                    last.eq(table.row_last),
                    pending.eq(table.row_waiters),
                    request.op.eq(BufferOp.FILL),
                    request.ctx.eq(0),
                    request.layer.eq(table.row.layer),
                    request.expert.eq(table.row.expert),
                    request.index.eq(0),
                    request.slot.eq(table.row.slot),
                    request.tile.eq(completion.tile),
                    request.last.eq(table.row_last),
                    request.failed.eq(
                        completion.failed
                        | (table.row_last & (table.row_failed | table.row_cancelled))
                    ),
                    request.value.eq(0),
                    self.buffer_requests.valid.eq(1),
                    state.eq(_State.RESULT),
                ]

            with m.Case(_State.ANSWER):
                with m.If(~pending.any()):
                    with m.If(held & (held_tag == tag)):
                        m.d.sync += [pending.eq(held_ctx), held.eq(0)]
                    if may_copy:
                        with m.Elif(held_copy):
                            self._answer_copy(
                                m,
                                table=table,
                                ctx=copying_ctx,
                                number=copying_number,
                                copying=copying,
                            )
                    with m.Else():
                        m.d.sync += state.eq(_State.FREE)
                with m.Elif(table.row_failed):
                    with m.If(~self.events.valid):
                        m.d.sync += [
                            pending.eq(pending & ~lowest),
                            self.events.valid.eq(1),
                            self.events.payload.code.eq(self._error(table.row_reason)),
                            self.events.payload.ctx.eq(lowest_ctx),
                            self.events.payload.layer.eq(table.row.layer),
                            self.events.payload.expert.eq(table.row.expert),
                            self.events.payload.address.eq(table.row_address),
                        ]
                with m.Else():
                    with m.If(~self.ready.valid):
                        m.d.sync += [
                            pending.eq(pending & ~lowest),
                            self.ready.valid.eq(1),
                            self.ready.payload.ctx.eq(lowest_ctx),
                            self.ready.payload.layer.eq(table.row.layer),
                            self.ready.payload.expert.eq(table.row.expert),
                            self.ready.payload.slot.eq(table.row.slot),
                        ]

            with m.Case(_State.FREE):
                m.d.comb += table.free.eq(1)
                m.d.sync += [retry.eq(1), state.eq(_State.DISPATCH)]
                if self._valued:
                    m.d.comb += [
                        rescan.freed.eq(table.row_cancelled),
                        rescan.broken.eq(table.row_failed & ~table.row_demand),
                    ]
                if may_copy:
                    m.d.sync += copy_waits.eq(0)

        if config.checksums:
            m.d.sync += [
                self.start.eq(table.allocate),
                self.start_tag.eq(table.free_tag),
                self.start_number.eq(number),
                self.start_address.eq(addresses[0]),
                *([self.start_last_tile.eq(last_tile)] if config.layer_bytes else []),
            ]
        m.d.sync += self.demanding.eq(
            (commands.level != 0)
            | waiting
            | ((state != _State.DISPATCH) & wanted & ~filled & ~cancels)
        )
        m.d.comb += [
            strobe.prefetch_overflow.eq(queue.overflow),
            strobe.prefetch_stale.eq(queue.stale),
        ]
        m.d.sync += self.strobes.eq(strobe)
        if may_copy:
            no_copy = ~copies.level.any() & ~self.copied.valid
        m.d.comb += self.idle.eq(
            (state == _State.DISPATCH)
            & (commands.level == 0)
            & queue.empty
            & ~table.occupied
            & ~waiting
            & ~self.ready.valid
            & ~self.events.valid
            & ~self.strobes.as_value().any()
            & (scans == 0)
            & throttle.idle
            & statistics.idle
            & (~outcome_valid & no_copy if may_copy else ~outcome_valid)
            & (rescan.idle if self._valued else 1)
        )
        return m

    def _address(self, m, *, layer, expert, last_tile):
        """Address of an expert where experts of different layers differ in size.

        It is there four cycles after the expert is known, one more than where all are alike: still
        sooner than any lookup ends, whose request and result take a register each. ``last_tile``,
        the number of its last tile, is there after one.
        """
        config = self.config
        # Sizes are multiplied in the largest power of two that divides them all.
        unit = config.tile_bytes & -config.tile_bytes
        sizes = [size // unit for size in config.layer_sizes]
        starts = [tiles * config.tile_bytes // unit for tiles in config.layer_starts]
        start, start_after = Signal(range(starts[-1])), Signal(range(starts[-1]))
        size, expert_after = Signal(range(max(sizes) + 1)), Signal.like(expert)
        within = Signal(range(config.model.experts * max(sizes)))
        offset = Signal(range(starts[-1]))
        address = Signal(config.bits("address"))
        m.d.sync += [
            last_tile.eq(Array(tiles - 1 for tiles in config.layer_tiles)[layer]),
            start.eq(Array(starts[:-1])[layer]),
            size.eq(Array(sizes)[layer]),
            expert_after.eq(expert),
            within.eq(expert_after * size),
            start_after.eq(start),
            offset.eq(start_after + within),
            address.eq(self.expert_base + offset * unit),
        ]
        return address

    def _error(self, reason):
        """Code of the event for a fetch that failed."""
        code = Const(ErrorCode.BUS, self.events.payload.code.shape())
        code = Mux(reason == FetchReason.TIMEOUT, ErrorCode.TIMEOUT, code)
        if self.config.mover == "dma":
            code = Mux(reason == FetchReason.ABORTED, ErrorCode.ABORTED, code)
            code = Mux(reason == FetchReason.ADDRESS, ErrorCode.ADDRESS, code)
        if self.config.slot_store == "axi":
            code = Mux(reason == FetchReason.WRITE, ErrorCode.SLOT_MEMORY, code)
        if self.config.checksums:
            code = Mux(reason == FetchReason.CRC, ErrorCode.CHECKSUM, code)
        return code

    def _answer_copy(self, m, *, table, ctx, number, copying):
        """The fetch of a copy has ended."""
        event, copied = self.events, self.copied
        with m.If(table.row_failed):
            with m.If(~event.valid):
                m.d.sync += [
                    copying.eq(0),
                    event.valid.eq(1),
                    event.payload.code.eq(self._error(table.row_reason)),
                    event.payload.ctx.eq(ctx),
                    event.payload.layer.eq(table.row.layer),
                    event.payload.expert.eq(table.row.expert),
                    event.payload.address.eq(table.row_address),
                ]
        with m.Elif(~copied.valid):
            m.d.sync += [
                copying.eq(0),
                copied.valid.eq(1),
                copied.payload.ctx.eq(ctx),
                copied.payload.layer.eq(table.row.layer),
                copied.payload.expert.eq(table.row.expert),
                copied.payload.copy.eq(number),
                copied.payload.slot.eq(table.row.slot),
            ]

    def _decide(self, m, *, op, result, occupied, keep, strobe, state, waiting, retry):
        """Next state after the buffer's answer to a command or candidate."""
        with m.If(op != BufferOp.RELEASE):
            m.d.comb += [
                strobe.evictions.eq(result.evicted),
                strobe.useless.eq(result.evicted_unused),
            ]
        with m.Switch(op):
            with m.Case(BufferOp.DEMAND, BufferOp.LOCK):
                demand, lock = op == BufferOp.DEMAND, op == BufferOp.LOCK
                m.d.comb += [
                    strobe.useful.eq(result.prefetched),
                    strobe.pollution.eq(result.polluted),
                ]
                with m.Switch(result.code):
                    with m.Case(BufferCode.RESIDENT):
                        m.d.comb += [
                            strobe.demands.eq(demand),
                            strobe.hits.eq(demand),
                            strobe.locks.eq(lock),
                        ]
                        m.d.sync += state.eq(_State.HIT)
                    with m.Case(BufferCode.FILLING):
                        m.d.sync += state.eq(_State.MERGE)
                    with m.Case(BufferCode.ALLOCATED):
                        m.d.comb += [
                            strobe.demands.eq(demand),
                            strobe.misses.eq(demand),
                            strobe.locks.eq(lock),
                            strobe.lock_misses.eq(lock),
                        ]
                        m.d.sync += state.eq(_State.ALLOCATE)
                    with m.Default():
                        with m.If(occupied):
                            m.d.sync += [
                                waiting.eq(1),
                                retry.eq(0),
                                state.eq(_State.DISPATCH),
                            ]
                        with m.Else():
                            m.d.comb += [strobe.demands.eq(demand), strobe.refused.eq(demand)]
                            m.d.sync += state.eq(_State.REFUSE)
            with m.Case(BufferOp.PREFETCH):
                with m.Switch(result.code):
                    with m.Case(BufferCode.ALLOCATED):
                        m.d.comb += strobe.prefetch_issued.eq(1)
                        m.d.sync += state.eq(_State.ALLOCATE)
                    with m.Case(BufferCode.OUTBID):
                        m.d.comb += strobe.prefetch_outbid.eq(1)
                        m.d.sync += state.eq(_State.DISPATCH)
                    with m.Case(BufferCode.NO_SLOT):
                        m.d.comb += strobe.prefetch_no_slot.eq(1)
                        m.d.sync += state.eq(_State.DISPATCH)
                    with m.Case(BufferCode.FILLING):
                        m.d.comb += strobe.prefetch_redundant.eq(1)
                        m.d.sync += state.eq(_State.MERGE)
                    with m.Default():
                        m.d.comb += strobe.prefetch_redundant.eq(1)
                        m.d.sync += state.eq(_State.DISPATCH)
            if self.config.replicas > 1:
                with m.Case(BufferOp.COPY):
                    m.d.sync += state.eq(_State.DISPATCH)
                    with m.Switch(result.code):
                        with m.Case(BufferCode.RESIDENT):
                            with m.If(keep):
                                m.d.sync += state.eq(_State.HIT)
                        with m.Case(BufferCode.ALLOCATED):
                            m.d.sync += state.eq(_State.ALLOCATE)
                        with m.Case(BufferCode.NO_SLOT):
                            with m.If(~occupied):
                                m.d.sync += state.eq(_State.REFUSE)
                        with m.Case(BufferCode.REFUSED):
                            with m.If(keep):
                                m.d.sync += state.eq(_State.REFUSE)
            with m.Case(BufferOp.UNLOCK):
                m.d.sync += state.eq(
                    Mux(result.code == BufferCode.REFUSED, _State.REFUSE, _State.DISPATCH)
                )
            with m.Default():
                m.d.sync += state.eq(_State.DISPATCH)
