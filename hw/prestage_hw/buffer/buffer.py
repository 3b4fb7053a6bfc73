"""Slots for experts: directory, replacement, pins, data."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import BufferCode, BufferOp, Policy
from prestage_hw.layouts import RecordLayout

from .directory import Directory, EntryState
from .recency import RecencyList
from .rescan import Rescan
from .storage import Storage
from .victims import Victims

__all__ = ["ExpertBuffer"]

#: Confidence that a prefetch without one is kept with.
_CERTAIN = 255


class ExpertBuffer(wiring.Component):
    """Keep experts in slots and decide which slot an arriving expert takes.

    One request is worked on at a time. Its result is offered, counted in cycles from the one in
    which the request is taken:

    - DEMAND, PREFETCH, LOCK, UNLOCK of an expert that has a slot: after ``lookup_latency``.
    - DEMAND, PREFETCH, LOCK of another. Policy LRU: after ``walk_latency``, plus 4 for each
      pinned, filling or locked slot that the search for a victim skips. NO_SLOT comes when the
      allocation of the last slot searched would; for a PREFETCH after 4 if every slot was touched
      since the route began. Other policies: after ``search_latency``, plus ``pass_cycles`` for each
      pass after the first, of at most ``passes``; NO_SLOT and OUTBID three cycles sooner.
    - FILL, CANCEL: after ``fill_latency``.
    - RELEASE: after ``release_latency``.
    - LOCK of one expert more than may be locked, UNLOCK of one without a slot: after 4.
    - COPY of an expert without a slot: as a LOCK or, where there is nothing to hold, an UNLOCK. Of
      one that has a slot: after ``lookup_latency``, or ``copy_latency`` where the copy has a slot,
      too. One that allocates a slot for a copy: five cycles later than a LOCK that has to look at
      as many slots, those of other banks included; with policies other than LRU three later.
    - INVALID: after 2.

    The next request is taken when the result was taken, at the earliest one cycle later, two after
    an allocation. What a result says is visible on the read port for every read taken from the
    first cycle in which the result is offered. A search sees the values taken up to three cycles
    after its request.

    After reset and after ``clear`` the block clears itself, one row a cycle, in ``clear_cycles``:
    no expert resident, no pin, no lock, no tile valid, no value, slot 0 least recent, and a route
    begun. The data stay. A request that was taken before is answered first.

    Unless ``config.stores_slots`` the bytes of slots are elsewhere, in a memory of their own or at
    the host: the block keeps who has which slot, and has no ports for data.

    Where values are taken, a walk through them looks for an expert worth a prefetch, beside all
    else: see :class:`Rescan`. A request is taken in a cycle without an operation; its result goes
    by what was taken before it. Values, and operations other than RELEASE, UNLOCK and FILLs that do
    not fail, disturb it.

    Every tile of an expert is to be written before the FILL that reports it. Fills are to name a
    slot that is filling (others change nothing), demands an entry of the pin list that is free. No
    tile may be on its way to a slot whose prefetch is cancelled.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are kept.
    valued : :class:`bool` or None
        Whether values of the predictor are taken; else they are ignored. None stands for whether
        the device's predictor gives any.
    host_writes : :class:`bool`
        Whether there is a port through which the host writes slots; not where they are the host's.

    Attributes
    ----------
    lookup_latency, walk_latency, fill_latency, release_latency, search_latency, pass_cycles, \
    copy_latency : :class:`int`
        See above, in cycles.
    passes : :class:`int`
        See above.
    read_latency : :class:`int`
        Cycles from the cycle in which a read is taken to the first in which its beat is offered,
        where ``beats`` never waits; 0 without data.
    clear_cycles : :class:`int`
        Cycles that clearing takes.

    Members
    -------
    requests : ``In(stream.Signature(RecordLayout("BufferRequest", config=config)))``
        Operations, see :class:`prestage_hw.contract.records.BufferOp`.
    results : ``Out(stream.Signature(RecordLayout("BufferResult", config=config)))``
        One result a request, in order. ``slot`` is 0 for NO_SLOT, OUTBID, REFUSED, INVALID and
        RELEASE.
    policy : ``In(2)``
        A :class:`prestage_hw.contract.records.Policy`; 3 stands for NEXT_USE. May change while no
        request is worked on.
    values : ``In(stream.Signature(RecordLayout("ValueBeat", config=config)))``
        What the predictor says of experts. Waits while a search is under way.
    rescans : ``In(stream.Signature(RecordLayout("RescanRequest", config=config)))``
        Where to look for an expert worth a prefetch; only if values are taken.
    rescanned : ``Out(stream.Signature(RecordLayout("RescanResult", config=config)))``
        What was found, one result a request; only if values are taken.
    writes : ``In(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Beats of arriving experts. Always ready.
    host_writes : ``In(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        The same from the host, in cycles without a beat on ``writes``; only if asked for.
    reads : ``In(stream.Signature(RecordLayout("ReadRequest", config=config)))``
        Beats wanted by the consumer, one a cycle. With ``config.replicas`` above 1 an array: a port
        for each bank, whose slots it reads.
    beats : ``Out(stream.Signature(RecordLayout("Beat", config=config)))``
        The beats, in the order of the reads; an array, too.
    clear : ``In(1)``
        A pulse forgets everything but the data.
    strobes : ``Out(StructLayout({"cancelled": 1, "outbid": 1, "refused": 1, "invalid": 1}))``
        High for one cycle with a CANCEL that was done, and with a result of that code.
    idle : ``Out(1)``
        No request, rescan, result or clearing is in the block. Low from the cycle after a pulse of
        ``clear``.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If the host is to write slots that are not in the device.
    """

    def __init__(self, *, config, valued=None, host_writes=False):
        require_config(config)
        self.config = config
        stores = config.stores_slots
        if host_writes and not stores:
            raise ValueError("Host writes need slots in the device, not elsewhere")
        self.valued = config.gives_values if valued is None else valued
        self._has_host_writes = host_writes
        self._directory = Directory(config=config)
        self._recency = RecencyList(config=config)
        banks = config.replicas if stores else 0
        self._storages = [Storage(config=config, bank=bank) for bank in range(banks)]
        self._victims = Victims(config=config, valued=self.valued)
        self._rescan = Rescan(config=config) if self.valued else None
        self.lookup_latency = 7
        self.walk_latency = 6
        self.fill_latency = 5
        self.release_latency = 4 * config.model.top_k + 4
        self.search_latency = self._victims.search_cycles + 7
        self.pass_cycles = self._victims.pass_cycles
        self.passes = self._victims.passes
        #: Of a COPY that finds or allocates a copy.
        self.copy_latency = 10
        self.read_latency = self._storages[0].read_latency if stores else 0
        self._row_bits = max(self._directory.row_bits, self._victims.row_bits)
        self.clear_cycles = (1 << self._row_bits) + 1
        writes = stream.Signature(RecordLayout("BufferWrite", config=config))
        reads = In(stream.Signature(RecordLayout("ReadRequest", config=config)))
        beats = Out(stream.Signature(RecordLayout("Beat", config=config)))
        if banks > 1:
            reads, beats = reads.array(banks), beats.array(banks)
        data_ports = {
            "writes": In(writes),
            **({"host_writes": In(writes)} if host_writes else {}),
            "reads": reads,
            "beats": beats,
        }
        rescans = {
            "rescans": In(stream.Signature(RecordLayout("RescanRequest", config=config))),
            "rescanned": Out(stream.Signature(RecordLayout("RescanResult", config=config))),
        }
        super().__init__(
            {
                "requests": In(stream.Signature(RecordLayout("BufferRequest", config=config))),
                "results": Out(stream.Signature(RecordLayout("BufferResult", config=config))),
                "policy": In(2),
                "values": In(stream.Signature(RecordLayout("ValueBeat", config=config))),
                **(rescans if self.valued else {}),
                **(data_ports if stores else {}),
                "clear": In(1),
                "strobes": Out(
                    data.StructLayout({"cancelled": 1, "outbid": 1, "refused": 1, "invalid": 1})
                ),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.directory = directory = self._directory
        m.submodules.recency = recency = self._recency
        copies = self.config.replicas > 1
        if not self._storages:
            # What the storage would be told; nobody listens.
            storage = Signal(
                data.StructLayout(
                    {
                        "valid_write": 1,
                        "valid_slot": self.config.bits("slot"),
                        "valid_tiles": self.config.tiles,
                        "blank": 1,
                    }
                )
            )
        elif copies:
            storage = self._connect_banks(m)
        else:
            m.submodules.storage = storage = self._storages[0]
        m.submodules.victims = victims = self._victims
        wiring.connect(m, wiring.flipped(self.values), victims.values)
        if not self._storages or copies:
            pass
        elif self._has_host_writes:
            m.d.comb += [
                storage.writes.p.eq(Mux(self.writes.valid, self.writes.p, self.host_writes.p)),
                storage.writes.valid.eq(self.writes.valid | self.host_writes.valid),
                self.writes.ready.eq(1),
                self.host_writes.ready.eq(~self.writes.valid),
            ]
        else:
            wiring.connect(m, wiring.flipped(self.writes), storage.writes)
        if self._storages and not copies:
            wiring.connect(m, wiring.flipped(self.reads), storage.reads)
            wiring.connect(m, storage.beats, wiring.flipped(self.beats))

        arriving = self.requests.payload
        request = Signal.like(arriving)
        result = self.results.payload
        slot = Signal(self.config.bits("slot"))  # slot under work
        looked_at = Signal.like(slot)  # slot that the memories are asked for
        row = Signal(self._row_bits)  # row under clearing
        clear_wanted = Signal()
        rests = Signal()  # nothing is looked for
        # Block RAM is slow out of the clock edge: what it gives is looked at a cycle later, from
        # registers that synthesis may take from the block RAM since they have no reset. Much hangs
        # on a slot's state, and its block RAM may be far away: it has a cycle for the way, too.
        entry = Signal.like(directory.entry, reset_less=True)
        read_state = Signal.like(directory.state, reset_less=True)
        state = Signal.like(directory.state, reset_less=True)
        pin = Signal.like(directory.pin, reset_less=True)
        m.d.sync += [read_state.eq(directory.state), state.eq(read_state), pin.eq(directory.pin)]

        is_demand = Signal()
        is_prefetch = Signal()
        is_lock = Signal()
        is_unlock = Signal()
        is_resident = Signal()
        by_recency = Signal()
        locked = Signal(range(self.config.slots + 1))
        most_locked = self.config.lockable
        may_lock = Signal()
        may_take = Signal()
        free = (state.pins == 0) & ~state.filling & ~state.locked
        found = is_resident  # The slot that is looked up is there.
        kept = state.locked  # The slot counts among those that are locked.
        takes_lock = is_lock  # What is allocated will.
        if copies:
            is_copy = Signal()
            found = Signal()
            seeks = Signal()  # A slot for a copy is looked for, in ``bank``.
            bank = Signal(self.config.bank_bits)
            place = Signal(self.config.bits("copy"))  # number of the copy under work
            further = Signal()  # It is not the expert itself.
            first = Signal.like(state)  # state of the slot of the expert itself, and its number
            first_slot = Signal.like(slot)
            linked, linking = Signal.like(slot), Signal()
            free &= ~state.held & (~seeks | (slot[: self.config.bank_bits] == bank))
            kept = state.locked | state.held
            takes_lock = is_lock | is_copy
            m.d.comb += [
                is_copy.eq(request.op == BufferOp.COPY),
                further.eq(is_copy & (request.value != 0)),
                # Copies are looked up beside their expert.
                found.eq(is_resident & ~is_copy),
                victims.banked.eq(seeks),
                victims.bank.eq(bank),
            ]
        all_touched = Signal()  # since the route began, a cycle ago
        m.d.sync += [
            all_touched.eq(~recency.marked),
            # From the cycle after LOOKUP on: much depends on it.
            is_resident.eq(entry.state != EntryState.EMPTY),
        ]
        m.d.comb += [
            is_demand.eq(request.op == BufferOp.DEMAND),
            is_prefetch.eq(request.op == BufferOp.PREFETCH),
            is_lock.eq(request.op == BufferOp.LOCK),
            is_unlock.eq(request.op == BufferOp.UNLOCK),
            by_recency.eq(self.policy == Policy.LRU),
            may_lock.eq(locked != most_locked),
            may_take.eq(free),
            looked_at.eq(Mux(victims.searching, victims.slot, slot)),
            directory.slot.eq(slot),
            directory.read_slot.eq(looked_at),
            directory.read_key.expert.eq(arriving.expert),
            directory.read_key.layer.eq(arriving.layer),
            directory.pin_key.index.eq(request.index),
            directory.pin_key.layer.eq(request.layer),
            directory.pin_key.ctx.eq(request.ctx),
            directory.row.eq(row),
            recency.slot.eq(slot),
            recency.read_slot.eq(looked_at),
            storage.valid_slot.eq(slot),
            victims.layer.eq(request.layer),
            victims.expert.eq(request.expert),
            victims.ctx.eq(request.ctx),
            victims.look_key.eq(directory.read_key),
            victims.first.eq(request.index == 0),
            victims.next_use.eq(self.policy != Policy.LFU),
            victims.bids.eq(is_prefetch & (request.value != 0)),
            victims.value.eq(request.value),
            victims.strict.eq(request.last),
            victims.state.eq(read_state),
            victims.free_slot.eq(slot),
            victims.row.eq(row),
        ]

        with m.If(self.clear):
            m.d.sync += clear_wanted.eq(1)
        with m.If(self.results.valid & self.results.ready):
            m.d.sync += self.results.valid.eq(0)

        taken = Signal()
        cancelled = Signal()  # what the result says
        m.d.comb += [
            taken.eq(self.results.valid & self.results.ready),
            self.strobes.cancelled.eq(taken & cancelled),
            self.strobes.outbid.eq(taken & (result.code == BufferCode.OUTBID)),
            self.strobes.refused.eq(taken & (result.code == BufferCode.REFUSED)),
            self.strobes.invalid.eq(taken & (result.code == BufferCode.INVALID)),
        ]

        def answer(code, *, slot=0):
            """Offer a result without flags."""
            m.d.sync += [
                self.results.valid.eq(1),
                result.as_value().eq(0),
                result.code.eq(code),
                result.slot.eq(slot),
                cancelled.eq(0),
            ]

        # A number is checked only where its field can hold one that is out of range.
        def below(name, count):
            field = request[name]
            return Const(1) if count == 1 << len(field) else field < count

        model = self.config.model
        names_expert = below("layer", model.layers) & below("expert", model.experts)
        names_context = below("layer", model.layers) & below("ctx", self.config.contexts)
        names_slot = below("slot", self.config.slots)
        is_valid = Signal()
        with m.Switch(request.op):
            with m.Case(BufferOp.DEMAND):
                m.d.comb += is_valid.eq(names_expert & names_context & below("index", model.top_k))
            with m.Case(BufferOp.PREFETCH, BufferOp.LOCK, BufferOp.UNLOCK):
                m.d.comb += is_valid.eq(names_expert)
            with m.Case(BufferOp.RELEASE):
                m.d.comb += is_valid.eq(names_context)
            with m.Case(BufferOp.FILL):
                m.d.comb += is_valid.eq(names_slot & below("tile", self.config.tiles))
            with m.Case(BufferOp.CANCEL):
                m.d.comb += is_valid.eq(names_slot)
            if copies:
                with m.Case(BufferOp.COPY):
                    m.d.comb += is_valid.eq(names_expert & (request.value < self.config.replicas))

        # Of a FILL or CANCEL, from its second cycle on.
        is_cancel = Signal()
        last = Signal()
        dropped = Signal()
        m.d.sync += [
            is_cancel.eq(request.op == BufferOp.CANCEL),
            last.eq(request.last | (request.op == BufferOp.CANCEL)),
            dropped.eq((request.failed & request.last) | (request.op == BufferOp.CANCEL)),
        ]

        # Of an expert without a slot.
        nothing_to_give = request.op == BufferOp.UNLOCK
        if copies:
            nothing_to_give |= is_copy & (further | ~request.last)

        # What the directory's entry is written for, from a register: the block RAM is far away.
        allocates = Signal()
        m.d.comb += [
            directory.write_key.expert.eq(Mux(allocates, request.expert, state.expert)),
            directory.write_key.layer.eq(Mux(allocates, request.layer, state.layer)),
        ]

        with m.FSM(init="CLEAR") as fsm:
            with m.State("CLEAR"):
                # `slot` passes all its values whatever it starts from: there are at least as many
                # rows as slots.
                m.d.comb += [
                    directory.clear.eq(1),
                    recency.clear.eq(1),
                    victims.clear.eq(1),
                    storage.valid_write.eq(1),
                    storage.blank.eq(1),
                ]
                m.d.sync += [
                    row.eq(row + 1),
                    slot.eq(slot + 1),
                    locked.eq(0),
                ]
                with m.If(row.all()):
                    m.next = "SETTLE"

            with m.State("SETTLE"):
                # The last row is written, which may be the first to be read.
                m.next = "IDLE"

            with m.State("IDLE"):
                m.d.comb += [
                    self.idle.eq(~clear_wanted & ~self.results.valid & rests),
                    self.requests.ready.eq(~clear_wanted & ~self.results.valid),
                    directory.entry_read.eq(1),
                ]
                m.d.sync += request.eq(arriving)
                if copies:
                    m.d.sync += seeks.eq(0)
                with m.If(clear_wanted & ~self.results.valid):
                    m.d.sync += clear_wanted.eq(self.clear)
                    m.next = "CLEAR"
                with m.Elif(self.requests.valid & self.requests.ready):
                    # Where the walk for a victim begins, should there be one.
                    m.d.sync += slot.eq(recency.oldest)
                    m.d.comb += victims.look.eq(1)
                    with m.Switch(arriving.op):
                        with m.Case(BufferOp.FILL, BufferOp.CANCEL):
                            m.d.sync += slot.eq(arriving.slot)
                        with m.Case(BufferOp.RELEASE):
                            m.d.sync += request.index.eq(0)
                    m.next = "FETCH"

            with m.State("FETCH"):
                m.d.comb += [
                    directory.pin_read.eq(1),
                    recency.begin_route.eq(is_demand & (request.index == 0) & is_valid),
                    victims.count.eq(is_demand & is_valid),
                ]
                m.d.sync += entry.eq(directory.entry)
                with m.If(~is_valid):
                    answer(BufferCode.INVALID)
                    m.next = "IDLE"
                with m.Elif((request.op == BufferOp.FILL) | (request.op == BufferOp.CANCEL)):
                    m.next = "FILL READ"
                with m.Elif(request.op == BufferOp.RELEASE):
                    m.next = "UNPIN CAPTURE"
                with m.Else():
                    m.next = "LOOKUP"

            with m.State("LOOKUP"):
                with m.If(entry.state != EntryState.EMPTY):
                    m.d.sync += slot.eq(entry.slot)
                m.next = "BRANCH"

            with m.State("BRANCH"):
                with m.If(is_resident):
                    m.next = "CAPTURE"
                with m.Elif(nothing_to_give):
                    answer(BufferCode.REFUSED)
                    m.next = "IDLE"
                with m.Elif(takes_lock & ~may_lock):
                    answer(BufferCode.NO_SLOT)
                    m.next = "IDLE"
                with m.Elif(~by_recency):
                    m.d.comb += victims.begin.eq(1)
                    m.next = "SEARCH"
                with m.Elif(is_prefetch & all_touched):
                    answer(BufferCode.NO_SLOT)
                    m.next = "IDLE"
                with m.Else():
                    m.next = "CHECK"

            with m.State("SEARCH"):
                m.d.sync += slot.eq(victims.victim)
                with m.If(victims.done):
                    m.next = "IDLE"
                    with m.If(~victims.found):
                        m.d.comb += directory.pin_write.eq(is_demand)
                        answer(BufferCode.NO_SLOT)
                    with m.Elif(victims.outbid):
                        answer(BufferCode.OUTBID)
                    with m.Else():
                        m.next = "CAPTURE"

            with m.State("READ"):
                m.next = "CAPTURE"

            with m.State("CAPTURE"):
                m.next = "ARRIVE"

            with m.State("ARRIVE"):
                m.next = "CHECK"
                with m.If(found | ~by_recency):
                    m.next = "TOUCH"
                if copies:
                    with m.If(is_copy & is_resident & ~seeks):
                        m.next = "COPY"

            with m.State("CHECK"):
                m.d.sync += slot.eq(recency.newer)
                m.next = "READ"
                with m.If(may_take):
                    m.d.sync += slot.eq(slot)
                    m.next = "TOUCH"
                with m.Elif(slot == Mux(is_prefetch, recency.mark, recency.newest)):
                    m.next = "REFUSE"

            with m.State("REFUSE"):
                # Not sooner: the same demand may come again, and reads what this one writes. One
                # that is refused holds no pin.
                m.d.comb += directory.pin_write.eq(is_demand)
                answer(BufferCode.NO_SLOT)
                m.next = "IDLE"

            with m.State("TOUCH"):
                m.d.comb += [
                    # That an expert is predicted is no use of it: a source may say anything.
                    recency.touch.eq(~(is_prefetch & found)),
                    directory.pin_write.eq(is_demand),
                    directory.pin_value.valid.eq(1),
                    directory.pin_value.slot.eq(slot),
                    # The owner is evicted.
                    directory.entry_value.evicted_by_prefetch.eq(is_prefetch),
                    directory.entry_write.eq(~found & state.valid),
                    storage.valid_write.eq(~found),
                    # A demand pins a resident expert.
                    directory.slot_value.eq(state),
                    directory.slot_value.prefetched.eq(state.prefetched & ~(is_demand | is_lock)),
                    directory.slot_value.pins.eq(state.pins + is_demand),
                    directory.slot_value.locked.eq(is_lock | (state.locked & ~is_unlock)),
                ]
                with m.If(found):
                    with m.If(is_lock & ~kept & ~may_lock):
                        answer(BufferCode.NO_SLOT)
                    with m.Elif(is_unlock & ~state.locked):
                        answer(BufferCode.REFUSED)
                    with m.Else():
                        m.d.comb += directory.slot_write.eq(~is_prefetch)
                        answer(
                            Mux(
                                entry.state == EntryState.READY,
                                BufferCode.RESIDENT,
                                BufferCode.FILLING,
                            ),
                            slot=slot,
                        )
                        m.d.sync += [
                            result.prefetched.eq((is_demand | is_lock) & state.prefetched),
                            locked.eq(
                                locked
                                + (is_lock & ~kept)
                                - (is_unlock & ~state.held if copies else is_unlock)
                            ),
                        ]
                with m.Else():
                    answer(BufferCode.ALLOCATED, slot=slot)
                    m.d.sync += [
                        result.evicted.eq(state.valid),
                        result.evicted_unused.eq(state.valid & state.prefetched),
                        result.polluted.eq(is_demand & entry.evicted_by_prefetch),
                        locked.eq(locked + takes_lock),
                    ]
                m.next = "ALLOCATE"

            with m.State("ALLOCATE"):
                # Second cycle of the touch, for resident experts too.
                m.d.comb += [
                    directory.entry_value.state.eq(EntryState.FILLING),
                    directory.entry_value.slot.eq(slot),
                    directory.entry_write.eq(~found & ~further if copies else ~found),
                    directory.slot_value.valid.eq(1),
                    directory.slot_value.layer.eq(request.layer),
                    directory.slot_value.expert.eq(request.expert),
                    directory.slot_value.filling.eq(1),
                    directory.slot_value.prefetched.eq(is_prefetch),
                    directory.slot_value.pins.eq(is_demand),
                    directory.slot_value.locked.eq(is_lock),
                    directory.slot_value.value.eq(Mux(request.value == 0, _CERTAIN, request.value)),
                    directory.slot_value.mark.eq(victims.mark),
                    directory.slot_write.eq(~found),
                ]
                m.next = "SETTLE"
                if copies:
                    m.d.comb += [
                        directory.slot_value.held.eq(is_copy),
                        directory.slot_value.copy.eq(Mux(further, place, 0)),
                        directory.slot_value.links[0].slot.eq(Mux(further, first_slot, 0)),
                    ]
                    m.d.sync += [linked.eq(slot), linking.eq(1)]
                    with m.If(further):
                        m.d.sync += slot.eq(first_slot)
                        m.next = "LINK"

            with m.State("FILL READ"):
                m.next = "FILL ARRIVE"

            with m.State("FILL ARRIVE"):
                m.next = "FILL"

            with m.State("FILL"):
                acts = Signal()
                m.d.comb += [
                    acts.eq(state.filling & (~is_cancel | (state.prefetched & ~state.locked))),
                    directory.entry_value.state.eq(
                        Mux(dropped, EntryState.EMPTY, EntryState.READY)
                    ),
                    directory.entry_value.slot.eq(slot),
                    directory.entry_write.eq(
                        acts & last & (state.copy == 0) if copies else acts & last
                    ),
                    directory.slot_value.eq(state),
                    directory.slot_value.filling.eq(~last),
                    storage.valid_tiles.eq(directory.slot_value.tiles),
                ]
                with m.If(dropped):
                    m.d.comb += [
                        directory.slot_value.valid.eq(0),
                        directory.slot_value.prefetched.eq(0),
                        directory.slot_value.locked.eq(0),
                        directory.slot_value.tiles.eq(0),
                    ]
                with m.Elif(~request.failed):
                    m.d.comb += directory.slot_value.tiles.eq(state.tiles | (1 << request.tile))
                answer(BufferCode.RESIDENT, slot=slot)
                with m.If(acts):
                    m.d.comb += [
                        directory.slot_write.eq(1),
                        storage.valid_write.eq(1),
                        victims.free.eq(dropped & (state.pins == 0)),
                        # Second cycle: no request is taken in the one after.
                        recency.retire.eq(dropped & (state.pins == 0)),
                    ]
                    m.d.sync += [
                        locked.eq(locked - (dropped & kept)),
                        cancelled.eq(is_cancel),
                    ]
                with m.Elif(is_cancel):
                    answer(BufferCode.REFUSED)
                m.next = "IDLE"
                if copies:
                    with m.If(dropped):
                        m.d.comb += [
                            directory.slot_value.held.eq(0),
                            directory.slot_value.copy.eq(0),
                        ]
                    m.d.sync += [
                        first_slot.eq(state.links[0].slot),
                        place.eq(state.copy),
                        linking.eq(0),
                    ]
                    with m.If(acts & dropped & (state.copy != 0)):
                        m.next = "UNLINK"

            if copies:
                self._serve_copy(
                    m,
                    answer=answer,
                    request=request,
                    entry=entry,
                    state=state,
                    slot=slot,
                    looked_at=looked_at,
                    storage=storage,
                    locked=locked,
                    may_lock=may_lock,
                    by_recency=by_recency,
                    seeks=seeks,
                    bank=bank,
                    place=place,
                    first=first,
                    first_slot=first_slot,
                    linked=linked,
                    linking=linking,
                )

            with m.State("UNPIN"):
                pinned = Signal()  # `slot` holds a pin of this release
                any_pinned = Signal()  # so did one before it
                done = Signal()
                m.d.comb += [
                    directory.pin_write.eq(~done),
                    directory.slot_value.eq(state),
                    directory.slot_value.pins.eq(state.pins - 1),
                    directory.slot_write.eq(pinned),
                ]
                m.d.sync += [
                    slot.eq(pin.slot),
                    pinned.eq(pin.valid),
                    any_pinned.eq(any_pinned | pinned),
                    request.index.eq(request.index + 1),
                    done.eq(request.index == self.config.model.top_k - 1),
                ]
                m.next = "UNPIN ARRIVE"
                with m.If(done):
                    m.d.sync += [
                        pinned.eq(0),
                        any_pinned.eq(0),
                        done.eq(0),
                    ]
                    answer(Mux(any_pinned | pinned, BufferCode.RESIDENT, BufferCode.REFUSED))
                    m.next = "IDLE"

            with m.State("UNPIN ARRIVE"):
                m.next = "UNPIN READ"

            with m.State("UNPIN READ"):
                m.d.comb += directory.pin_read.eq(1)
                m.next = "UNPIN CAPTURE"

            with m.State("UNPIN CAPTURE"):
                m.next = "UNPIN"

        m.d.sync += allocates.eq(fsm.ongoing("TOUCH"))
        if self.valued:
            self._walk(m, fsm=fsm, row=row)
            m.d.comb += rests.eq(self._rescan.idle)
        else:
            m.d.comb += rests.eq(1)
        return m

    def _walk(self, m, *, fsm, row):
        """Look for an expert worth a prefetch beside all else."""
        m.submodules.rescan = rescan = self._rescan
        directory, victims = self._directory, self._victims
        wiring.connect(m, wiring.flipped(self.rescans), rescan.requests)
        wiring.connect(m, rescan.results, wiring.flipped(self.rescanned))
        taken = self.requests.valid & self.requests.ready
        op = self.requests.payload.op
        harmless = (
            (op == BufferOp.RELEASE)
            | (op == BufferOp.UNLOCK)
            | ((op == BufferOp.FILL) & ~self.requests.payload.failed)
        )
        entry = directory.entry_value.state
        m.d.comb += [
            rescan.calm.eq(self.requests.ready & ~self.requests.valid),
            rescan.disturbed.eq((taken & ~harmless) | fsm.ongoing("CLEAR")),
            rescan.value_valid.eq(self.values.valid & self.values.ready),
            rescan.value.eq(self.values.payload),
            rescan.decided.eq(victims.count & victims.first),
            rescan.ctx.eq(victims.ctx),
            rescan.layer.eq(victims.layer),
            rescan.changed.eq(directory.entry_write & (entry != EntryState.READY)),
            rescan.key.eq(directory.write_key),
            rescan.comes.eq(entry == EntryState.FILLING),
            rescan.clear.eq(fsm.ongoing("CLEAR")),
            rescan.row.eq(row),
        ]

    def _connect_banks(self, m):
        """Storage of every bank; what all of them are told."""
        config = self.config
        arriving = self.writes
        writes_valid = self.writes.valid
        writes = self.writes.payload
        if self._has_host_writes:
            writes = Signal(arriving.payload.shape())
            m.d.comb += [
                writes.eq(Mux(self.writes.valid, self.writes.p, self.host_writes.p)),
                self.host_writes.ready.eq(~self.writes.valid),
            ]
            writes_valid = self.writes.valid | self.host_writes.valid
        m.d.comb += self.writes.ready.eq(1)
        told = Signal(
            data.StructLayout(
                {
                    "valid_write": 1,
                    "valid_slot": config.bits("slot"),
                    "valid_tiles": config.tiles,
                    "blank": 1,
                }
            )
        )
        for bank, storage in enumerate(self._storages):
            m.submodules[f"storage_{bank}"] = storage
            m.d.comb += [
                storage.writes.payload.eq(writes),
                storage.writes.valid.eq(writes_valid),
                storage.valid_write.eq(told.valid_write),
                storage.valid_slot.eq(told.valid_slot),
                storage.valid_tiles.eq(told.valid_tiles),
                storage.blank.eq(told.blank),
            ]
            wiring.connect(m, wiring.flipped(self.reads[bank]), storage.reads)
            wiring.connect(m, storage.beats, wiring.flipped(self.beats[bank]))
        return told

    def _serve_copy(
        self,
        m,
        *,
        answer,
        request,
        entry,
        state,
        slot,
        looked_at,
        storage,
        locked,
        may_lock,
        by_recency,
        seeks,
        bank,
        place,
        first,
        first_slot,
        linked,
        linking,
    ):
        """States of a COPY whose expert has a slot, and of a copy that fails to arrive."""
        directory, recency, victims = self._directory, self._recency, self._victims
        number = request.value[: len(place)]
        keep = request.last
        fills = entry.state == EntryState.FILLING
        link = state.links[(number - 1)[: len(number)]]
        any_there = Cat(state.links[at].there for at in range(self.config.replicas - 1)).any()

        # The slot of the expert itself.
        with m.State("COPY"):
            m.d.sync += [
                first.eq(state),
                first_slot.eq(slot),
                place.eq(number),
                bank.eq(slot[: len(bank)] + number),
            ]
            m.d.comb += [
                directory.slot_value.eq(state),
                directory.slot_value.held.eq(keep),
            ]
            m.next = "IDLE"
            with m.If(~keep & ~state.held):
                answer(BufferCode.REFUSED)
            with m.Elif(number == 0):
                with m.If(fills):
                    answer(BufferCode.FILLING, slot=slot)
                with m.Elif(keep & ~state.held & ~state.locked & ~may_lock):
                    answer(BufferCode.NO_SLOT)
                with m.Elif(~keep & any_there):
                    answer(BufferCode.REFUSED)
                with m.Else():
                    answer(BufferCode.RESIDENT, slot=slot)
                    # Second cycle: no request is taken in the one after.
                    m.d.comb += [recency.touch.eq(1), directory.slot_write.eq(1)]
                    with m.If(~state.locked & (keep != state.held)):
                        m.d.sync += locked.eq(Mux(keep, locked + 1, locked - 1))
            with m.Elif(~keep & ~link.there):
                answer(BufferCode.REFUSED)
            with m.Elif(fills):
                answer(BufferCode.FILLING, slot=slot)
            with m.Elif(~state.held):
                answer(BufferCode.REFUSED)
            with m.Elif(link.there):
                m.d.comb += looked_at.eq(link.slot)
                m.d.sync += slot.eq(link.slot)
                m.next = "COPY CAPTURE"
            with m.Elif(~may_lock):
                answer(BufferCode.NO_SLOT)
            with m.Else():
                m.d.sync += seeks.eq(1)
                with m.If(by_recency):
                    m.d.comb += looked_at.eq(recency.oldest)
                    m.d.sync += slot.eq(recency.oldest)
                    m.next = "CAPTURE"
                with m.Else():
                    m.d.comb += victims.begin.eq(1)
                    m.next = "SEARCH"

        with m.State("COPY CAPTURE"):
            m.next = "COPY ARRIVE"

        with m.State("COPY ARRIVE"):
            m.next = "COPY FOUND"

        # The slot of the copy.
        with m.State("COPY FOUND"):
            answer(BufferCode.RESIDENT, slot=slot)
            m.next = "IDLE"
            with m.If(state.filling):
                answer(BufferCode.FILLING, slot=slot)
            with m.Elif(keep):
                m.d.comb += recency.touch.eq(1)
            with m.Else():
                m.d.comb += [
                    directory.slot_write.eq(1),
                    storage.valid_write.eq(1),
                    victims.free.eq(1),
                    recency.retire.eq(1),
                ]
                m.d.sync += [locked.eq(locked - 1), linking.eq(0)]
                m.next = "COPY DROPPED"

        with m.State("COPY DROPPED"):
            m.d.sync += slot.eq(first_slot)
            m.next = "LINK"

        # A copy did not arrive: the slot of its expert has to know.
        with m.State("UNLINK"):
            m.d.comb += looked_at.eq(first_slot)
            m.d.sync += slot.eq(first_slot)
            m.next = "UNLINK CAPTURE"

        with m.State("UNLINK CAPTURE"):
            m.next = "UNLINK ARRIVE"

        with m.State("UNLINK ARRIVE"):
            m.next = "UNLINK FIRST"

        with m.State("UNLINK FIRST"):
            m.d.sync += first.eq(state)
            m.next = "LINK"

        with m.State("LINK"):
            m.d.comb += [directory.slot_value.eq(first), directory.slot_write.eq(1)]
            for at in range(self.config.replicas - 1):
                with m.If(place == at + 1):
                    m.d.comb += [
                        directory.slot_value.links[at].there.eq(linking),
                        directory.slot_value.links[at].slot.eq(linked),
                    ]
            m.next = "IDLE"
