"""Slots for experts: directory, replacement, pins, data."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import BufferCode, BufferOp
from prestage_hw.layouts import RecordLayout

from .directory import Directory, EntryState
from .recency import RecencyList
from .storage import Storage

__all__ = ["ExpertBuffer"]


class ExpertBuffer(wiring.Component):
    """Keep experts in slots and decide which slot an arriving expert takes.

    One request is worked on at a time. Its result is offered, counted in cycles from the one in
    which the request is taken:

    - DEMAND, PREFETCH: after ``lookup_latency``, plus 2 for each pinned or filling slot that the
      search for a victim skips. NO_SLOT comes one cycle sooner than the allocation of the last slot
      searched would; for a PREFETCH after 2 if every slot was touched since the route began.
    - FILL: after ``fill_latency``.
    - RELEASE: after ``release_latency``.

    The next request is taken when the result was taken, at the earliest one cycle later. What a
    result says is visible on the read port for every read taken from the first cycle in which the
    result is offered.

    After reset and after ``clear`` the block clears itself, one row in each of ``clear_cycles``: no
    expert resident, no pin, no tile valid, slot 0 least recent, and a route begun. The data stay. A
    request that was taken before is answered first.

    Every tile of an expert is to be written before the FILL that reports it. Fills are to name a
    slot that is filling (others change nothing), demands an entry of the pin list that is free.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are kept.

    Attributes
    ----------
    lookup_latency, fill_latency, release_latency : :class:`int`
        See above, in cycles.
    read_latency : :class:`int`
        Cycles from the cycle in which a read is taken to the first in which its beat is offered,
        where ``beats`` never waits.
    clear_cycles : :class:`int`
        Cycles that clearing takes.

    Members
    -------
    requests : ``In(stream.Signature(RecordLayout("BufferRequest", config=config)))``
        Operations, see :class:`prestage_hw.contract.records.BufferOp`.
    results : ``Out(stream.Signature(RecordLayout("BufferResult", config=config)))``
        One result a request, in order. ``slot`` is 0 for NO_SLOT and RELEASE.
    writes : ``In(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Beats of arriving experts. Always ready.
    reads : ``In(stream.Signature(RecordLayout("ReadRequest", config=config)))``
        Beats wanted by the consumer, one a cycle.
    beats : ``Out(stream.Signature(RecordLayout("Beat", config=config)))``
        The beats, in the order of the reads.
    clear : ``In(1)``
        A pulse forgets everything but the data.
    idle : ``Out(1)``
        No request, result or clearing is in the block. Low from the cycle after a pulse of
        ``clear``.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self._directory = Directory(config=config)
        self._recency = RecencyList(config=config)
        self._storage = Storage(config=config)
        self.lookup_latency = 4
        self.fill_latency = 3
        self.release_latency = 2 * config.model.top_k + 3
        self.read_latency = self._storage.read_latency
        self.clear_cycles = 1 << self._directory.row_bits
        super().__init__(
            {
                "requests": In(stream.Signature(RecordLayout("BufferRequest", config=config))),
                "results": Out(stream.Signature(RecordLayout("BufferResult", config=config))),
                "writes": In(stream.Signature(RecordLayout("BufferWrite", config=config))),
                "reads": In(stream.Signature(RecordLayout("ReadRequest", config=config))),
                "beats": Out(stream.Signature(RecordLayout("Beat", config=config))),
                "clear": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.directory = directory = self._directory
        m.submodules.recency = recency = self._recency
        m.submodules.storage = storage = self._storage
        wiring.connect(m, wiring.flipped(self.writes), storage.writes)
        wiring.connect(m, wiring.flipped(self.reads), storage.reads)
        wiring.connect(m, storage.beats, wiring.flipped(self.beats))

        arriving = self.requests.payload
        request = Signal.like(arriving)
        result = self.results.payload
        slot = Signal(self.config.bits("slot"))  # slot under work
        row = Signal(directory.row_bits)  # row under clearing
        clear_wanted = Signal()
        entry = directory.entry
        state = directory.state

        is_demand = Signal()
        is_resident = Signal()
        m.d.comb += [
            is_demand.eq(request.op == BufferOp.DEMAND),
            is_resident.eq(entry.state != EntryState.EMPTY),
            directory.slot.eq(slot),
            directory.read_key.expert.eq(arriving.expert),
            directory.read_key.layer.eq(arriving.layer),
            directory.pin_key.index.eq(request.index),
            directory.pin_key.layer.eq(request.layer),
            directory.pin_key.ctx.eq(request.ctx),
            directory.row.eq(row),
            recency.slot.eq(slot),
            storage.valid_slot.eq(slot),
        ]

        with m.If(self.clear):
            m.d.sync += clear_wanted.eq(1)
        with m.If(self.results.valid & self.results.ready):
            m.d.sync += self.results.valid.eq(0)

        def answer(code, *, slot=0):
            """Offer a result without flags."""
            m.d.sync += [
                self.results.valid.eq(1),
                result.as_value().eq(0),
                result.code.eq(code),
                result.slot.eq(slot),
            ]

        with m.FSM(init="CLEAR"):
            with m.State("CLEAR"):
                # `slot` passes all its values whatever it starts from: there are at least as many
                # rows as slots.
                m.d.comb += [
                    directory.clear.eq(1),
                    recency.clear.eq(1),
                    storage.valid_write.eq(1),
                    storage.blank.eq(1),
                ]
                m.d.sync += [
                    row.eq(row + 1),
                    slot.eq(slot + 1),
                ]
                with m.If(row.all()):
                    m.next = "IDLE"

            with m.State("IDLE"):
                m.d.comb += [
                    self.idle.eq(~clear_wanted & ~self.results.valid),
                    self.requests.ready.eq(~clear_wanted & ~self.results.valid),
                    directory.entry_read.eq(1),
                ]
                m.d.sync += request.eq(arriving)
                with m.If(clear_wanted & ~self.results.valid):
                    m.d.sync += clear_wanted.eq(self.clear)
                    m.next = "CLEAR"
                with m.Elif(self.requests.valid & self.requests.ready):
                    # Where the walk for a victim begins, should there be one.
                    m.d.sync += slot.eq(recency.oldest)
                    with m.Switch(arriving.op):
                        with m.Case(BufferOp.DEMAND):
                            m.d.comb += recency.begin_route.eq(arriving.index == 0)
                        with m.Case(BufferOp.FILL):
                            m.d.sync += slot.eq(arriving.slot)
                        with m.Case(BufferOp.RELEASE):
                            m.d.sync += request.index.eq(0)
                    m.next = "LOOKUP"

            with m.State("LOOKUP"):
                m.d.comb += [
                    directory.slot_read.eq(1),
                    directory.pin_read.eq(1),
                    recency.read.eq(1),
                ]
                with m.Switch(request.op):
                    with m.Case(BufferOp.FILL):
                        m.next = "FILL"
                    with m.Case(BufferOp.RELEASE):
                        m.next = "UNPIN"
                    with m.Default():
                        with m.If(is_resident):
                            m.d.sync += slot.eq(entry.slot)
                            m.next = "READ"
                        with m.Elif(~is_demand & ~recency.marked):
                            answer(BufferCode.NO_SLOT)
                            m.next = "IDLE"
                        with m.Else():
                            m.next = "CHECK"

            with m.State("READ"):
                m.d.comb += [
                    directory.slot_read.eq(1),
                    recency.read.eq(1),
                ]
                m.next = "CHECK"
                with m.If(is_resident):
                    m.next = "TOUCH"

            with m.State("CHECK"):
                m.d.sync += slot.eq(recency.newer)
                m.next = "READ"
                with m.If((state.pins == 0) & ~state.filling):
                    m.d.sync += slot.eq(slot)
                    m.next = "TOUCH"
                with m.Elif(slot == Mux(is_demand, recency.newest, recency.mark)):
                    # A refused demand holds no pin.
                    m.d.comb += directory.pin_write.eq(is_demand)
                    answer(BufferCode.NO_SLOT)
                    m.next = "IDLE"

            with m.State("TOUCH"):
                m.d.comb += [
                    recency.touch.eq(1),
                    directory.pin_write.eq(is_demand),
                    directory.pin_value.valid.eq(1),
                    directory.pin_value.slot.eq(slot),
                    # The owner is evicted.
                    directory.write_key.expert.eq(state.expert),
                    directory.write_key.layer.eq(state.layer),
                    directory.entry_value.evicted_by_prefetch.eq(~is_demand),
                    directory.entry_write.eq(~is_resident & state.valid),
                    storage.valid_write.eq(~is_resident),
                    # A demand pins a resident expert.
                    directory.slot_value.eq(state),
                    directory.slot_value.prefetched.eq(0),
                    directory.slot_value.pins.eq(state.pins + 1),
                    directory.slot_write.eq(is_resident & is_demand),
                ]
                with m.If(is_resident):
                    answer(
                        Mux(
                            entry.state == EntryState.READY,
                            BufferCode.RESIDENT,
                            BufferCode.FILLING,
                        ),
                        slot=slot,
                    )
                    m.d.sync += result.prefetched.eq(is_demand & state.prefetched)
                with m.Else():
                    answer(BufferCode.ALLOCATED, slot=slot)
                    m.d.sync += [
                        result.evicted.eq(state.valid),
                        result.evicted_unused.eq(state.valid & state.prefetched),
                        result.polluted.eq(is_demand & entry.evicted_by_prefetch),
                    ]
                m.next = "ALLOCATE"

            with m.State("ALLOCATE"):
                # Second cycle of the touch, for resident experts too.
                m.d.comb += [
                    directory.write_key.expert.eq(request.expert),
                    directory.write_key.layer.eq(request.layer),
                    directory.entry_value.state.eq(EntryState.FILLING),
                    directory.entry_value.slot.eq(slot),
                    directory.entry_write.eq(~is_resident),
                    directory.slot_value.valid.eq(1),
                    directory.slot_value.layer.eq(request.layer),
                    directory.slot_value.expert.eq(request.expert),
                    directory.slot_value.filling.eq(1),
                    directory.slot_value.prefetched.eq(~is_demand),
                    directory.slot_value.pins.eq(is_demand),
                    directory.slot_write.eq(~is_resident),
                ]
                m.next = "IDLE"

            with m.State("FILL"):
                dropped = request.failed & request.last
                m.d.comb += [
                    directory.write_key.expert.eq(state.expert),
                    directory.write_key.layer.eq(state.layer),
                    directory.entry_value.state.eq(
                        Mux(dropped, EntryState.EMPTY, EntryState.READY)
                    ),
                    directory.entry_value.slot.eq(slot),
                    directory.entry_write.eq(state.filling & request.last),
                    directory.slot_value.eq(state),
                    directory.slot_value.filling.eq(~request.last),
                    storage.valid_tiles.eq(directory.slot_value.tiles),
                ]
                with m.If(dropped):
                    m.d.comb += [
                        directory.slot_value.valid.eq(0),
                        directory.slot_value.prefetched.eq(0),
                        directory.slot_value.tiles.eq(0),
                    ]
                with m.Elif(~request.failed):
                    m.d.comb += directory.slot_value.tiles.eq(state.tiles | (1 << request.tile))
                with m.If(state.filling):
                    m.d.comb += [
                        directory.slot_write.eq(1),
                        storage.valid_write.eq(1),
                    ]
                answer(BufferCode.RESIDENT, slot=slot)
                m.next = "IDLE"

            with m.State("UNPIN"):
                pinned = Signal()  # `slot` holds a pin of this release
                done = Signal()
                m.d.comb += [
                    directory.pin_write.eq(~done),
                    directory.slot_value.eq(state),
                    directory.slot_value.pins.eq(state.pins - 1),
                    directory.slot_write.eq(pinned),
                ]
                m.d.sync += [
                    slot.eq(directory.pin.slot),
                    pinned.eq(directory.pin.valid),
                    request.index.eq(request.index + 1),
                    done.eq(request.index == self.config.model.top_k - 1),
                ]
                m.next = "UNPIN READ"
                with m.If(done):
                    m.d.sync += [
                        pinned.eq(0),
                        done.eq(0),
                    ]
                    answer(BufferCode.RESIDENT)
                    m.next = "IDLE"

            with m.State("UNPIN READ"):
                m.d.comb += [
                    directory.slot_read.eq(1),
                    directory.pin_read.eq(1),
                ]
                m.next = "UNPIN"

        return m
