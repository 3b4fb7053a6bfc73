"""The expert buffer: a slot in use is never given away, and an expert is in one slot at most."""

from amaranth import Array, Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.asserts import AnyConst, AnySeq
from amaranth.hdl import Assert, Assume, Cover
from amaranth.lib import data

from prestage_hw.buffer.directory import EntryState
from prestage_hw.contract.records import BufferCode, BufferOp, Policy

from .harness import Inside, drive_freely, lemma
from .instances import buffer_device

__all__ = ["Answers", "Slots"]


class _Book:
    """What requests and their results say of the slots, kept beside the buffer.

    It changes in the cycle in which a result is offered first.

    Attributes
    ----------
    new : Value
        A result is offered first.
    request, result
        Its request, and the result.
    filling, valid, locked, prefetched : list of Value
        Of each slot: an expert is on its way; an expert owns it; it is locked; a prefetch owns it.
    owner : list of Value
        Number of that expert, with its layer above it.
    pins : dict
        For each context and layer whether it holds a pin, and of which slot.
    """

    def __init__(self, m, block, clearing):
        config = block.config
        slots = range(config.slots)
        self.result = result = block.results.payload
        self.request = request = Signal(block.requests.payload.shape())
        offered = Signal()
        self.new = new = Signal()
        m.d.comb += new.eq(block.results.valid & ~offered)
        m.d.sync += offered.eq(block.results.valid & ~block.results.ready)
        with m.If(block.requests.valid & block.requests.ready):
            m.d.sync += request.eq(block.requests.payload)
        self.key = Cat(request.expert, request.layer)

        def flags(name):
            return [Signal(name=f"book_{name}_{s}") for s in slots]

        self.filling, self.valid, self.locked = flags("filling"), flags("valid"), flags("locked")
        self.owner = [Signal(len(self.key), name=f"book_owner_{s}") for s in slots]
        layers = range(config.model.layers)
        layout = data.StructLayout({"valid": 1, "slot": config.bits("slot")})
        self.pins = {
            (c, layer): Signal(layout, name=f"book_pin_{c}_{layer}")
            for c in range(config.contexts)
            for layer in layers
        }

        #: The same with what the result says that is offered first.
        self.after = after = {
            name: [Signal(name=f"after_{name}_{s}") for s in slots]
            for name in ("filling", "valid", "locked")
        }
        self.owner_after = [Signal(len(self.key), name=f"after_owner_{s}") for s in slots]
        self.pins_after = {
            place: Signal(layout, name=f"after_pin_{place[0]}_{place[1]}") for place in self.pins
        }
        op, code = request.op, result.code
        found = (code == BufferCode.RESIDENT) | (code == BufferCode.FILLING)
        allocated = code == BufferCode.ALLOCATED
        for s in slots:
            now = {"filling": self.filling[s], "valid": self.valid[s], "locked": self.locked[s]}
            for name, value in now.items():
                m.d.comb += after[name][s].eq(value)
                m.d.sync += value.eq(after[name][s])
            m.d.comb += self.owner_after[s].eq(self.owner[s])
            m.d.sync += self.owner[s].eq(self.owner_after[s])
            ended = (op == BufferOp.CANCEL) | ((op == BufferOp.FILL) & request.last)
            gone = (op == BufferOp.CANCEL) | request.failed
            with m.If(clearing):
                m.d.comb += [after[name][s].eq(0) for name in now]
            with m.Elif(new & allocated & (result.slot == s)):
                m.d.comb += [
                    after["filling"][s].eq(1),
                    after["valid"][s].eq(1),
                    after["locked"][s].eq(op == BufferOp.LOCK),
                    self.owner_after[s].eq(self.key),
                ]
            with m.Elif(new & found & (result.slot == s) & (op == BufferOp.LOCK)):
                m.d.comb += after["locked"][s].eq(1)
            with m.Elif(new & found & (result.slot == s) & (op == BufferOp.UNLOCK)):
                m.d.comb += after["locked"][s].eq(0)
            with m.Elif(
                new & (code == BufferCode.RESIDENT) & ended & (request.slot == s) & self.filling[s]
            ):
                m.d.comb += after["filling"][s].eq(0)
                with m.If(gone):
                    m.d.comb += [after["valid"][s].eq(0), after["locked"][s].eq(0)]
        for (c, layer), pin in self.pins.items():
            after_pin = self.pins_after[c, layer]
            mine = new & (request.ctx == c) & (request.layer == layer)
            m.d.comb += after_pin.eq(pin)
            m.d.sync += pin.eq(after_pin)
            with m.If(clearing):
                m.d.comb += after_pin.as_value().eq(0)
            with m.Elif(mine & (op == BufferOp.DEMAND) & (found | allocated)):
                m.d.comb += [after_pin.valid.eq(1), after_pin.slot.eq(result.slot)]
            with m.Elif(mine & (op == BufferOp.RELEASE) & (code != BufferCode.INVALID)):
                m.d.comb += after_pin.valid.eq(0)

    def pinned(self, slot):
        """How many pins a slot has."""
        return sum(pin.valid & (pin.slot == slot) for pin in self.pins.values())

    def pinned_after(self, slot):
        """How many it has with what the result says."""
        return sum(pin.valid & (pin.slot == slot) for pin in self.pins_after.values())


class Slots(Elaboratable):
    """All that a predictor says is free: values, confidences, policy, prefetches, locks.

    Parameters
    ----------
    lru : :class:`bool`
        Keep to that policy.
    device : :class:`dict`
        Parameters of the instance that differ.
    """

    def __init__(self, *, lru=False, **device):
        self.lru = lru
        self.device = device

    def elaborate(self, platform):
        from prestage_hw.buffer.buffer import ExpertBuffer

        m = Module()
        config = buffer_device(**self.device)
        block = ExpertBuffer(config=config, valued=True)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block, but=("policy",))
        at = inside.states("fsm_state")
        # The policy changes while no request is worked on.
        policy = Signal(2)
        m.d.comb += block.policy.eq(policy)
        if not self.lru:
            with m.If(block.idle):
                m.d.sync += policy.eq(AnySeq(2))
        clearing = at("CLEAR")
        book = _Book(m, block, clearing)
        request, result, new = book.request, book.result, book.new
        slots = range(config.slots)
        arriving = block.requests.payload
        asked = block.requests.valid & block.requests.ready

        # What those who ask keep to: a demand names an entry of the pin list that is free.
        for (c, layer), pin in book.pins.items():
            named = (arriving.ctx == c) & (arriving.layer == layer)
            demands = asked & (arriving.op == BufferOp.DEMAND)
            m.d.comb += Assume(~(demands & named & pin.valid))

        # --- claims ---
        named = [result.slot == s for s in slots]
        allocated = new & (result.code == BufferCode.ALLOCATED)
        found = new & (
            (request.op != BufferOp.FILL)
            & (request.op != BufferOp.CANCEL)
            & (request.op != BufferOp.RELEASE)
            & ((result.code == BufferCode.RESIDENT) | (result.code == BufferCode.FILLING))
        )
        for s in slots:
            used = book.filling[s] | book.locked[s] | (book.pinned(s) != 0)
            holds = book.valid[s] & (book.owner[s] == book.key)
            m.d.comb += [
                # Invariant 1: a slot in use is not given to another expert.
                Assert(~(allocated & named[s]) | ~used),
                # Invariant 2: an expert that has a slot gets no other; what is found is there.
                Assert(~allocated | ~holds),
                Assert(~(found & named[s]) | holds),
                Assert(
                    ~(found & named[s]) | ((result.code == BufferCode.FILLING) == book.filling[s])
                ),
                # A prefetch that is wanted, or was locked, is not cancelled.
                Assert(
                    ~(new & (request.op == BufferOp.CANCEL) & (result.code == BufferCode.RESIDENT))
                    | (request.slot != s)
                    | (book.filling[s] & ~book.locked[s] & (book.pinned(s) == 0))
                ),
            ]
            for t in range(s):
                both = book.valid[s] & book.valid[t]
                m.d.comb += Assert(~both | (book.owner[s] != book.owner[t]))

        self._lemmas(m, inside, block, book, at)
        evicts = allocated & result.evicted
        m.d.comb += [
            Cover(evicts & (block.policy == Policy.LRU) & (request.op == BufferOp.DEMAND)),
            Cover(new & (request.op == BufferOp.RELEASE) & (result.code == BufferCode.RESIDENT)),
        ]
        return m

    def _lemmas(self, m, inside, block, book, at):
        """The memories say what the book says, but for what is being written."""
        signal, config = inside.signal, block.config
        directory = block._directory
        slots = range(config.slots)
        slot_layout = directory.slot_layout
        entries = inside.rows("directory.entries", written=True)
        states = inside.rows("directory.slots", written=True)
        pins = inside.rows("directory.pins", written=True)
        slot, pinned, done = signal("slot"), signal("pinned"), signal("done")
        is_resident = signal("is_resident")
        entry = directory.entry_layout(signal("entry"))
        pin = directory.pin_layout(signal("pin"))
        # A slot's state on its way.
        port, read_state, state = (
            slot_layout(signal(name)) for name in ("directory.state", "read_state", "state")
        )
        inner = block.requests.payload.shape()(signal("request"))
        key = Cat(inner.expert, inner.layer)
        decided = ("SEARCH", "READ", "CAPTURE", "ARRIVE", "CHECK", "REFUSE", "TOUCH")
        lookup = ("LOOKUP", "BRANCH", *decided)

        def is_same(a, b):
            return Value.cast(a) == Value.cast(b)

        def may_take(state):
            return ~state.filling & ~state.locked & (state.pins == 0)

        rows = Array(Value.cast(row) for row in states)
        here = slot_layout(Signal(slot_layout.size, name="state_of_slot"))
        entry_here = directory.entry_layout(Signal(directory.entry_layout.size, name="entry_here"))
        m.d.comb += [
            Value.cast(here).eq(rows[slot]),
            Value.cast(entry_here).eq(Array(Value.cast(row) for row in entries)[key]),
        ]

        # --- states of the work on a request ---
        clearing, idle = at("CLEAR"), at("IDLE")
        allocating = at("ALLOCATE") & ~is_resident
        filling = at("FILL READ", "FILL ARRIVE", "FILL")
        releasing = at("UNPIN", "UNPIN ARRIVE", "UNPIN READ", "UNPIN CAPTURE")
        op = inner.op
        looks_up = Cat(
            op == o for o in (BufferOp.DEMAND, BufferOp.PREFETCH, BufferOp.LOCK, BufferOp.UNLOCK)
        ).any()
        m.d.comb += [
            lemma(at()),
            # A result is offered while nothing else is worked on.
            lemma(~block.results.valid | idle | at("ALLOCATE", "SETTLE")),
            lemma(~book.new | idle | at("ALLOCATE")),
            lemma(~at("ALLOCATE") | book.new),
            lemma(~at(*lookup, "ALLOCATE") | looks_up),
            lemma(~at(*lookup, "ALLOCATE") | (op != BufferOp.DEMAND) | (inner.index == 0)),
            lemma(~(at("ALLOCATE") | book.new) | (op != BufferOp.UNLOCK) | is_resident | idle),
            lemma(~at(*decided, "ALLOCATE") | (op != BufferOp.UNLOCK) | is_resident),
            lemma(~filling | (op == BufferOp.FILL) | (op == BufferOp.CANCEL)),
            lemma(~releasing | (op == BufferOp.RELEASE)),
        ]
        for field in ("op", "layer", "expert", "ctx", "slot", "last", "failed"):
            m.d.comb += lemma(
                ~(~idle & ~clearing & ~at("SETTLE") | book.new)
                | (inner[field] == book.request[field])
            )

        # --- slots and entries ---
        for s in slots:
            own = states[s]
            given = allocating & (slot == s)
            owned = Array(entries)[Cat(own.expert, own.layer)]
            same = (
                (own.valid == book.after["valid"][s])
                & (own.filling == book.after["filling"][s])
                & (own.locked == book.after["locked"][s])
                & (own.pins == book.pinned_after(s))
                & (~own.valid | (Cat(own.expert, own.layer) == book.owner_after[s]))
            )
            m.d.comb += [
                lemma(clearing | given | same),
                lemma(clearing | (~own.filling & ~own.locked) | own.valid),
                lemma(clearing | ~own.prefetched | (own.pins == 0)),
                lemma(~given | may_take(own)),
                lemma(
                    clearing
                    | given
                    | ~own.valid
                    | ((owned.state != EntryState.EMPTY) & (owned.slot == s))
                ),
            ]
        for number, row in enumerate(entries):
            own = Array(states)[row.slot]
            m.d.comb += lemma(
                clearing
                | (row.state == EntryState.EMPTY)
                | (
                    own.valid
                    & (Cat(own.expert, own.layer) == number)
                    & ((row.state == EntryState.FILLING) == own.filling)
                    & ((row.state == EntryState.READY) == ~own.filling)
                    & ~(allocating & (row.slot == slot))
                )
            )

        # --- what was read ---
        missing = at("BRANCH") & ~is_resident
        is_cancel = op == BufferOp.CANCEL
        m.d.comb += [
            lemma(~at("FETCH") | is_same(signal("directory.entry"), entry_here)),
            lemma(~at(*lookup) | is_same(entry, entry_here)),
            lemma(~allocating | (entry_here.state == EntryState.EMPTY)),
            lemma(
                ~at("BRANCH", *decided, "ALLOCATE")
                | (is_resident == (entry.state != EntryState.EMPTY))
            ),
            lemma(
                ~(at("LOOKUP", "CAPTURE", "ARRIVE", "CHECK", "FILL READ", "FILL ARRIVE") | missing)
                | is_same(port, here)
            ),
            lemma(~(at("ARRIVE", "CHECK", "FILL ARRIVE") | missing) | is_same(read_state, here)),
            lemma(~at("CHECK", "TOUCH", "FILL") | is_same(state, here)),
            lemma(~at("SEARCH", "READ", "CHECK", "REFUSE") | ~is_resident),
            lemma(~at("SEARCH") | (block.policy != Policy.LRU)),
            lemma(~at("READ", "CHECK", "REFUSE") | (block.policy == Policy.LRU)),
            lemma(
                ~at("BRANCH", "CAPTURE", "ARRIVE", "TOUCH") | ~is_resident | (slot == entry.slot)
            ),
            lemma(
                ~at("CAPTURE", "ARRIVE")
                | is_resident
                | (block.policy == Policy.LRU)
                | may_take(here)
            ),
            lemma(~at("TOUCH") | is_resident | may_take(here)),
            lemma(~filling | (slot == inner.slot)),
            lemma(signal("allocates") == at("ALLOCATE")),
            lemma(~filling | (signal("is_cancel") == is_cancel)),
            lemma(~filling | (signal("last") == (inner.last | is_cancel))),
            lemma(~filling | (signal("dropped") == (inner.failed & inner.last | is_cancel))),
        ]

        # --- what is being written is not read ---
        entry_write, slot_write, pin_write = (
            inside.local(f"{name}_write", part="Directory").en for name in ("entry", "slot", "pin")
        )
        at_rest = at("CLEAR", "ALLOCATE", "SETTLE", "IDLE")
        m.d.comb += [
            lemma(~entry_write | at("CLEAR", "ALLOCATE", "SETTLE") | (idle & block.results.valid)),
            lemma(~slot_write | at_rest),
            lemma(~pin_write | at_rest | at("UNPIN ARRIVE")),
        ]

        # --- pins ---
        for (c, layer), kept in book.pins_after.items():
            row, unused = (pins[(c * config.model.layers + layer) * 2 + i] for i in range(2))
            named = (inner.ctx == c) & (inner.layer == layer)
            begun = releasing & named & done
            m.d.comb += [
                lemma(clearing | begun | (row.valid == kept.valid)),
                lemma(clearing | begun | ~row.valid | (row.slot == kept.slot)),
                lemma(clearing | ~unused.valid),
                # A slot is pinned for its layer, so that its count of pins has room for all.
                lemma(
                    clearing
                    | ~kept.valid
                    | (allocating & (kept.slot == slot) & named)
                    | (slot_layout(rows[kept.slot]).layer == layer)
                ),
                lemma(~begun | (~row.valid & (kept.valid == pinned))),
                lemma(~begun | ~pinned | (kept.slot == slot)),
                lemma(~(at("UNPIN") & ~done & named) | is_same(pin, row)),
                lemma(
                    ~(at("UNPIN CAPTURE") & ~done & named) | is_same(signal("directory.pin"), row)
                ),
                # A demand that is worked on has no pin yet.
                lemma(
                    ~(at("FETCH", *lookup) & named & (op == BufferOp.DEMAND) & (inner.index == 0))
                    | ~kept.valid
                ),
            ]
        m.d.comb += [
            lemma(releasing | (~pinned & ~done & ~signal("any_pinned"))),
            lemma(done | ~pinned),
            lemma(~at("UNPIN ARRIVE", "UNPIN READ") | done),
            lemma(~releasing | done | (inner.index == 0)),
            lemma(~at("UNPIN READ") | ~pinned | is_same(port, here)),
            lemma(~at("UNPIN CAPTURE") | ~pinned | is_same(read_state, here)),
            lemma(~at("UNPIN") | ~pinned | is_same(state, here)),
        ]

        # --- clearing ---
        row = signal("row")
        m.d.comb += lemma(clearing | (row == 0))
        for number in range(len(entries)):
            cleared = clearing & (row > number)
            m.d.comb += lemma(~cleared | (entries[number].state == EntryState.EMPTY))
            m.d.comb += lemma(~cleared | ~pins[number].valid)
        for back in slots:
            behind = Signal(config.bits("slot"), name=f"behind_{back}")
            m.d.comb += behind.eq(slot - back - 1)
            m.d.comb += lemma(~(clearing & (row > back)) | (rows[behind] == 0))

        # --- search ---
        # What is asked for passes through a pipeline; only at its end a slot is chosen.
        searching = signal("victims.searching")
        asking, found = signal("victims.asking"), signal("victims.found")
        asked = inside.delays("victims", of=("asking", "remembers", "is_remembered"), cycles=3)
        eligible = inside.delays("victims", of=("may", asked[2]), cycles=9)
        numbers = inside.delays("victims", of=("slot",), cycles=12)
        last = inside.delays("victims", of=("last",), cycles=13)
        stages = [*asked, *eligible]
        m.d.comb += [
            lemma(searching == at("SEARCH")),
            lemma(searching | (~asking & ~Cat(*stages, *last).any())),
            lemma(~asked[0] | (Value.cast(port) == rows[numbers[0]])),
            lemma(~asked[1] | (Value.cast(read_state) == rows[numbers[1]])),
            lemma(~(asked[2] & signal("victims.may")) | may_take(slot_layout(rows[numbers[2]]))),
            lemma(~(searching & found) | may_take(slot_layout(rows[signal("victims.victim")]))),
        ]
        for stage, is_eligible in enumerate(eligible):
            taken = slot_layout(rows[numbers[3 + stage]])
            m.d.comb += lemma(~is_eligible | may_take(taken))
        for i, ended in enumerate(last):
            before = Cat(asking, *stages[:i], *last[:i])
            m.d.comb += lemma(~ended | ~before.any())


class Answers(Elaboratable):
    """Every request, in any order, with policies that search: LFU and NEXT_USE."""

    def __init__(self, **device):
        self.device = device

    def elaborate(self, platform):
        from prestage_hw.buffer.buffer import ExpertBuffer

        m = Module()
        config = buffer_device(**self.device)
        block = ExpertBuffer(config=config, valued=True)
        inside = Inside(block)
        m.submodules.block = inside.fragment
        drive_freely(m, block, but=("policy",))
        at = inside.states("fsm_state")
        signal = inside.signal
        m.d.comb += block.policy.eq(Mux(AnyConst(1), Policy.LFU, Policy.NEXT_USE))

        # Cycles since the request was taken that is worked on.
        waited = Signal(8)
        offered = Signal()
        new = Signal()
        idle, clearing = at("IDLE"), at("CLEAR")
        busy = ~idle & ~clearing & ~at("SETTLE")
        m.d.comb += new.eq(block.results.valid & ~offered)
        m.d.sync += [
            offered.eq(block.results.valid & ~block.results.ready),
            waited.eq(Mux(block.requests.valid & block.requests.ready, 1, waited + 1)),
        ]
        code, op = block.results.payload.code, signal("request")[:3]
        fills, releases = (op == BufferOp.FILL) | (op == BufferOp.CANCEL), op == BufferOp.RELEASE
        looked = ~fills & ~releases
        found = looked & ((code == BufferCode.RESIDENT) | (code == BufferCode.FILLING))
        lost = (code == BufferCode.NO_SLOT) | (code == BufferCode.OUTBID)
        allocated = code == BufferCode.ALLOCATED
        search = block.search_latency
        m.d.comb += [
            # Work that began ends, and in the number of cycles that the docstring promises.
            Assert(~busy | (waited <= search)),
            Assert(~(busy & ~block.results.valid) | (waited < search)),
            Assert(~(new & found) | (waited == block.lookup_latency)),
            Assert(~(new & allocated) | (waited == search)),
            Assert(~(new & lost) | (waited <= search - 3)),
            Assert(~(new & fills) | (waited <= block.fill_latency)),
            Assert(~(new & releases) | (waited <= block.release_latency)),
            Assert(~(busy & fills) | (waited < block.fill_latency)),
            Assert(~(busy & releases) | (waited < block.release_latency)),
            # A clearing ends, too, so that requests are taken again.
            Assert(~clearing | (signal("row") < block.clear_cycles)),
            Cover(new & allocated),
            Cover(new & releases & (code != BufferCode.INVALID)),
        ]

        is_resident, done = signal("is_resident"), signal("done")
        entry = block._directory.entry_layout(signal("entry"))
        asking, searching = signal("victims.asking"), signal("victims.searching")
        asked = (signal("victims.step") * config.contexts) + signal("victims.ctx")
        asks = (block._victims.samples + 2) * config.contexts
        last = inside.delays("victims", of=("last",), cycles=13)
        passes = signal("victims.passes")
        decided = ("BRANCH", "SEARCH", "CAPTURE", "ARRIVE", "TOUCH", "ALLOCATE")
        unpins = at("UNPIN", "UNPIN ARRIVE", "UNPIN READ", "UNPIN CAPTURE")
        fetched = (
            (at("FETCH"), 1),
            (at("LOOKUP") | (at("UNPIN CAPTURE") & ~done) | at("FILL READ"), 2),
            (at("BRANCH"), 3),
            (at("CAPTURE") & is_resident, 4),
            (at("ARRIVE") & is_resident, 5),
            (at("TOUCH") & is_resident, 6),
            (at("ALLOCATE") & is_resident, 7),
            (at("FILL ARRIVE") | (at("UNPIN") & ~done), 3),
            (at("FILL"), 4),
            (at("UNPIN ARRIVE"), 4),
            (at("UNPIN READ"), 5),
            (at("UNPIN CAPTURE") & done, 6),
            (at("UNPIN") & done, 7),
            (at("CAPTURE") & ~is_resident, search - 3),
            (at("ARRIVE") & ~is_resident, search - 2),
            (at("TOUCH") & ~is_resident, search - 1),
            (at("ALLOCATE") & ~is_resident, search),
            *((ended, 3 + asks + i) for i, ended in enumerate(last, 1)),
        )
        m.d.comb += [
            lemma(at()),
            lemma(~at("READ", "CHECK", "REFUSE")),
            lemma(~block.results.valid | idle | at("ALLOCATE", "SETTLE")),
            lemma(~at("ALLOCATE") | new),
            lemma(searching == at("SEARCH")),
            lemma(searching == (asking | Cat(last).any())),
            lemma(~asking | (waited == 4 + asked)),
            lemma(~asking | ((passes == 0) & (asked < asks))),
            lemma(signal("victims.ctx") < config.contexts),
            lemma(~Cat(last).any() | (passes == 1)),
            lemma(unpins | ~done),
            lemma(~at("UNPIN ARRIVE", "UNPIN READ") | done),
            lemma(~unpins | releases),
            lemma(~at("FILL READ", "FILL ARRIVE", "FILL") | fills),
            lemma(~at("LOOKUP", *decided) | looked),
            lemma(~at(*decided) | (is_resident == (entry.state != EntryState.EMPTY))),
            lemma(~at("SEARCH") | ~is_resident),
            *(lemma(~when | (waited == cycles)) for when, cycles in fetched),
        ]
        for i, ended in enumerate(last):
            m.d.comb += lemma(~ended | ~Cat(asking, *last[:i]).any())
        inner = block.requests.payload.shape()(signal("request"))
        m.d.comb += lemma(~(at("UNPIN CAPTURE", "UNPIN") & ~done) | (inner.index == 0))
        return m
