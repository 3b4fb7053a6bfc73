"""Testpoints of the expert buffer: when each of them was reached.

``docs/testplan/buffer.md`` lists them. What an operation was asked of is told by the state before
it; that its answer hung on a pin, a lock or a value, by what the golden model says without it.
"""

from itertools import product

import numpy as np

from prestage_hw.contract.records import BufferCode, BufferOp, Policy, RescanCode, ValueKind
from prestage_sim.model.buffer.buffer import copy, demand, lock, prefetch
from prestage_sim.model.buffer.state import (
    BY_COPY,
    BY_LOCK,
    EMPTY,
    FILLS,
    LOCKABLE,
    LOCKED,
    LOCKS,
    MARK,
    NUMBER,
    OWNER,
    PINS,
    POINTER,
    POLICY,
    PREFETCHED,
    READY,
    REMEMBERED,
    ROUTE,
    SLOT,
    STATE,
    TOUCHED,
    VALUE,
    BufferState,
    create_state,
)
from prestage_sim.model.buffer.victims import Victims, slot_worth

from .coverage import hit

__all__ = ["BufferPoints"]

DEMAND, PREFETCH, FILL, RELEASE, CANCEL, LOCK, UNLOCK, COPY = BufferOp
RESIDENT, FILLING, ALLOCATED, NO_SLOT, OUTBID, REFUSED, INVALID = BufferCode
LRU, LFU, NEXT_USE = Policy

_POLICIES = {policy.name for policy in Policy}

#: What a point needs, where that is more than one thing.
_PARTS = {
    "lockstep": {"light stalls", "bursts of stalls"},
    "demand_resident": {"prefetched", "prefetched before"},
    "demand_allocates": _POLICIES,
    "demand_no_slot": {"refused", "again after a release"},
    "pins_of_contexts": {"first", "later", "held", "taken"},
    "prefetch_untouched": {"taken", "refused"},
    "lru": {"oldest", "skipped"},
    "values_any_time": {"last cycle", "first after"},
    "passes": {"further", "none"},
    "remembered": {"runner-up", "freed"},
    "outbid": {"LFU", "NEXT_USE"},
    "probation": {"kept", "demanded", "outbid", "passed"},
    "cancel": {"first tile", "later tile", "taken again"},
    "cancel_refused": {"free", "ready", "demanded", "locked"},
    "lock": {"with a slot", "without", *_POLICIES},
    "lock_limit": {"with a slot", "without"},
    "unlock": {"unlocked", "taken", "not locked", "without a slot"},
    "copy": {"given back", "bytes", "light stalls", "bursts of stalls", "clears", *_POLICIES},
    "copy_fails": {"alone", "itself"},
    "copy_limit": {"spare", "bank"},
    "rescan": {
        *(f"{code.name}, {stall}" for code, stall in product(RescanCode, ("timed", "stalled"))),
        *("far", "least", "cut off", "by a value", "by an operation", "by a clear", "reset"),
        "beside an operation",
    },
    "strict": {"last=0", "last=1"},
    "fill_failed": {"not last", "unpinned", "pinned", "released"},
    "fill_idle": {"ready", "free", "ready, failed"},
    "sizes": {"ready", "invalid"},
    "reads_meet_writes": {"valid", "invalid"},
    "clear": {"idle", "under an operation"},
    "reset": {"in a search", "elsewhere"},
}


def _copied(state):
    return BufferState(*[table.copy() for table in state])


class BufferPoints:
    """Hit testpoints as the buffer's operations are compared with its golden model.

    Parameters
    ----------
    golden : :class:`prestage_sim.model.buffer.ExpertBuffer`
        The golden model.
    passes : :class:`int`
        Most passes of a search.
    exact : :class:`bool`
        Whether cycles are compared, too.
    """

    # Parts that are still to be seen; they may come from several tests of one simulation.
    _missing = {name: set(parts) for name, parts in _PARTS.items()}
    _hit = set()

    def __init__(self, golden, *, passes, exact):
        self.golden = golden
        self.config = golden.config
        self.passes = passes
        self.exact = exact
        self.valued = golden.victims.valued
        #: Operations, and policies under which a slot was given away.
        self.done = set()
        self.policies = set()
        #: (kind, context) of values that were taken.
        self.kinds = set()
        self._all_kinds = set(product(ValueKind, range(self.config.contexts)))
        # Values that the buffer should ignore.
        self._ignored = create_state(self.config)
        self._ignored_values = Victims(self.config, self._ignored, valued=True)
        self.forget()

    def forget(self):
        """Know of nothing in the slots."""
        self._told = set()  # slots of prefetches that were demanded
        self._starved = set()  # slots that were pinned when a demand found none
        self._freed = set()  # those of them that were released since
        self._demanders = {}  # slot: contexts that hold it, in the order of their demands
        self._shared = set()  # slots that one of several contexts has released
        self._left = set()  # those of them that nobody holds any longer
        self._cancelled = set()
        self._unlocked = set()
        self._short = set()  # slots that are whole without their last tiles
        self._orphans = set()  # slots whose fill failed while they were pinned
        for table in (self._ignored.chances, self._ignored.reuse, self._ignored.visited):
            table[:] = 0

    # --- points ---

    def open(self, name):
        """Whether a point was not hit so far."""
        return name not in self._hit

    def see(self, name, part=None):
        """A part of a point was reached and checked, or the whole of it."""
        if name in self._hit:
            return
        if part is not None:
            missing = self._missing[name]
            missing.discard(part)
            if missing:
                return
        self._hit.add(name)
        hit(f"buffer.{name}")

    # --- values ---

    def values(self, beat):
        """A beat of values was taken."""
        kind, ctx, *_ = beat
        self.kinds.add((kind, ctx))
        if not self.valued:
            self._ignored_values.values(*beat)

    # --- operations ---

    def before(self):
        """An operation begins: what the golden model knows, without some of the values."""
        return _copied(self.golden.state)

    def _again(self, state, op, fields, **changed):
        """Code and slot that an operation would have with another state or field."""
        fields = {**fields, **changed}
        layer, expert = fields["layer"], fields["expert"]
        if op == DEMAND:
            answer = demand(state, fields["ctx"], layer, expert, fields["index"])
        elif op == PREFETCH:
            answer = prefetch(state, layer, expert, fields["value"], bool(fields["last"]))
        elif op == LOCK:
            answer = lock(state, layer, expert)
        else:
            answer = copy(state, layer, expert, fields["value"], bool(fields["last"]))[0]
        return BufferCode(answer[0]), answer[1]

    def after(self, op, fields, answer, *, was, valid, searched, cycles, late=None, later=None):
        """An operation's answer was compared.

        Parameters
        ----------
        op, fields, answer
            The operation and its answer.
        was : :class:`BufferState`
            State before it.
        valid : list of :class:`int`
            Tile-valid bits before it.
        searched : :class:`bool`
            Whether a victim was searched by worth.
        cycles : :class:`int`
            Cycles that it has to take, which were compared if all are.
        late : :class:`BufferState` or None
            State before it but for the values that were taken in the last cycle that counts.
        later : tuple or None
            Beat of values that was offered all the time, and taken after that cycle.
        """
        code, slot = answer.code, answer.slot
        if code == INVALID:
            return
        self.done.add(op)
        row = was.slots[slot]
        if op in (DEMAND, PREFETCH, LOCK, COPY):
            self._sought(op, fields, answer, was, searched, cycles, late, later)
            if code == ALLOCATED:
                kept = row[PINS] or row[FILLS] or row[LOCKED]
                assert not kept, f"slot {slot} was taken, which is pinned, filling or locked"
                self._allocated(op, fields, answer, was, searched, cycles)
        if op == DEMAND:
            self._demanded(fields, answer, was)
        elif op == PREFETCH:
            self._prefetched(fields, answer, was)
        elif op == FILL:
            self._filled(fields, was, valid)
        elif op == RELEASE:
            self._released(fields, code, was)
        elif op == CANCEL:
            self._cancelled_or_not(fields["slot"], code, was, valid)
        elif op in (LOCK, UNLOCK):
            self._locked_or_not(op, fields, answer, was)
        else:
            self._copied_or_not(fields, answer, was)

    def _sought(self, op, fields, answer, was, searched, cycles, late, later):
        """On what the answer hung."""
        policy = Policy(was.registers[POLICY])
        given = answer.code, answer.slot

        def differs(state, **changed):
            return self._again(state, op, fields, **changed) != given

        if not searched:
            return
        if not self.valued and policy == NEXT_USE and self.open("no_values"):
            ignored = self._ignored
            state = _copied(was)._replace(
                chances=ignored.chances, reuse=ignored.reuse, visited=ignored.visited
            )
            if differs(state):
                self.see("no_values")
        if self.valued and self.open("values_any_time"):
            if late is not None and differs(late):
                self.see("values_any_time", "last cycle")
            if later is not None and self.exact:
                state = _copied(was)
                Victims(self.config, state, valued=True).values(*later)
                if differs(state):
                    self.see("values_any_time", "first after")
        if self.open("probation"):
            state = _copied(was)
            state.slots[:, PREFETCHED] = 0
            if differs(state):
                self.see("probation", "kept")
        passes = self.golden.victims.passes
        if self.exact and passes > 1:
            if answer.code == ALLOCATED:
                self.see("passes", "further")
            elif answer.code == NO_SLOT and passes == self.passes:
                self.see("passes", "none")

    def _free(self, was):
        """Which slots may be taken."""
        return (was.slots[:, PINS] == 0) & (was.slots[:, FILLS] == 0) & (was.slots[:, LOCKED] == 0)

    def _allocated(self, op, fields, answer, was, searched, cycles):
        policy = Policy(was.registers[POLICY])
        slot, row = answer.slot, was.slots[answer.slot]
        self.policies.add(policy)
        if answer.evicted and policy == LRU and self.exact and op != COPY:
            # Three cycles for each slot that is skipped.
            self.see("lru", "skipped" if cycles >= 9 else "oldest")
        name = policy.name.lower()
        whole = policy == LFU or (
            self.valued and self.kinds >= self._all_kinds and (was.current >= 0).all()
        )
        # A demand counts before its search.
        if answer.evicted and searched and op != DEMAND and whole and self.open(name):
            self._ranked(name, policy, fields, op, slot, was)
        if searched and slot == was.registers[REMEMBERED]:
            count = self.golden.victims.passes * self.golden.victims.samples
            if (slot - was.registers[POINTER]) % self.config.slots >= count:
                self.see("remembered", "freed" if row[OWNER] < 0 else "runner-up")
        if self.open("lock") and (was.slots[:, LOCKED] & BY_LOCK).any():
            state = _copied(was)
            state.slots[:, LOCKED] &= ~BY_LOCK
            # Of those that the lock alone keeps.
            other, at = self._again(state, op, fields)
            if other == ALLOCATED and was.slots[at, LOCKED] & BY_LOCK:
                self.see("lock", policy.name)
        if self.open("pins_of_contexts"):
            shared = [each for each in self._shared if was.slots[each, PINS]]
            if shared:
                state = _copied(was)
                state.slots[shared, PINS] = 0
                other, at = self._again(state, op, fields)
                if other == ALLOCATED and at in shared:
                    self.see("pins_of_contexts", "held")
            if slot in self._left:
                self.see("pins_of_contexts", "taken")
        if searched:
            marked = row[MARK] == was.visits[row[OWNER] // self.config.model.experts] % 16
            if answer.evicted_unused and not marked:
                self.see("probation", "passed")
            elif answer.evicted_unused and op == PREFETCH and fields["value"] and row[VALUE]:
                self.see("probation", "outbid")
            elif answer.evicted and slot in self._told:
                self.see("probation", "demanded")
        if slot in self._cancelled:
            self.see("cancel", "taken again")
        if slot in self._unlocked and answer.evicted:
            self.see("unlock", "taken")
        if op == DEMAND and slot in self._freed:
            self.see("demand_no_slot", "again after a release")
        self._forget_slot(slot)

    def _forget_slot(self, slot):
        for slots in (self._told, self._freed, self._shared, self._left, self._cancelled):
            slots.discard(slot)
        for slots in (self._unlocked, self._short, self._orphans):
            slots.discard(slot)
        self._demanders.pop(slot, None)

    def _ranked(self, name, policy, fields, op, slot, was):
        """The victim is worth least of those looked at, and others are worth more."""
        slots = self.config.slots
        looked = {int(was.registers[REMEMBERED])} - {-1}
        count = self.golden.victims.passes * self.golden.victims.samples
        looked |= {int(was.registers[POINTER] + n) % slots for n in range(min(count, slots))}
        free = self._free(was)
        if op == COPY and fields["value"]:
            free &= np.arange(slots) % self.config.replicas == slot % self.config.replicas
        worths = [int(slot_worth(was, int(policy), at)) for at in looked if free[at]]
        worth = int(slot_worth(was, int(policy), slot))
        assert worth == min(worths), f"slot {slot} is worth {worth}, others {worths}"
        if worth < max(worths):
            self.see(name)

    def _demanded(self, fields, answer, was):
        code, slot = answer.code, answer.slot
        if code == NO_SLOT:
            assert not self._free(was).any(), "a slot might have been taken"
            self._starved = set(was.slots[:, PINS].nonzero()[0].tolist())
            self._freed.clear()
            self.see("demand_no_slot", "refused")
            return
        self._demanders.setdefault(slot, []).append(fields["ctx"])
        prefetched = bool(was.slots[slot, PREFETCHED])
        if code == ALLOCATED:
            if answer.evicted:
                self.see("demand_allocates", Policy(was.registers[POLICY]).name)
            return
        if code == FILLING:
            self.see("demand_filling")
        elif prefetched:
            assert answer.prefetched
            self.see("demand_resident", "prefetched")
        elif slot in self._told:
            assert not answer.prefetched
            self.see("demand_resident", "prefetched before")
        if prefetched:
            self._told.add(slot)
        if code == RESIDENT and slot in self._short:
            self.see("sizes", "ready")

    def _prefetched(self, fields, answer, was):
        code, slot, value = answer.code, answer.slot, fields["value"]
        policy = Policy(was.registers[POLICY])
        if policy == LRU and code in (ALLOCATED, NO_SLOT):
            touched = was.slots[:, TOUCHED] == was.registers[ROUTE]
            assert code == NO_SLOT or not touched[slot], "a slot that the route touched was taken"
            if (touched & self._free(was)).any():
                self.see("prefetch_untouched", "taken" if code == ALLOCATED else "refused")
        if code == OUTBID:
            assert policy != LRU and value, "a prefetch without a value was outbid"
            assert self.same(was), "an outbid prefetch has changed something"
            self.see("outbid", policy.name)
        if policy == LRU or code not in (OUTBID, ALLOCATED):
            return
        if value == 0 and answer.evicted and self.open("unvalued_prefetch"):
            if self._again(_copied(was), PREFETCH, fields, value=1)[0] == OUTBID:
                self.see("unvalued_prefetch")
        if value and self.open("strict"):
            last = bool(fields["last"])
            other = self._again(_copied(was), PREFETCH, fields, last=not last)[0]
            if other != code:
                assert code == (OUTBID if last else ALLOCATED)
                self.see("strict", f"last={int(last)}")

    def same(self, was):
        """Whether nothing has changed since but the place where the next search begins."""
        state = self.golden.state
        same = all(
            np.array_equal(one, other)
            for name, one, other in zip(BufferState._fields, was, state, strict=True)
            if name != "registers"
        )
        return same and np.array_equal(was.registers[:POINTER], state.registers[:POINTER])

    def _filled(self, fields, was, valid):
        slot, tile, last, failed = (fields[name] for name in ("slot", "tile", "last", "failed"))
        row, state = was.slots[slot], self.golden.state
        if not row[FILLS]:
            assert self.same(was) and valid == self.golden.storage.valid
            kind = "ready" if row[OWNER] >= 0 else "free"
            if last:
                self.see("fill_idle", f"{kind}, failed" if failed and kind == "ready" else kind)
            return
        if failed and not last:
            assert self.same(was) and valid == self.golden.storage.valid
            self.see("fill_failed", "not last")
        elif failed:
            self.see("fill_failed", "pinned" if row[PINS] else "unpinned")
            demanders = self._demanders.get(slot, [])
            self._forget_slot(slot)
            if row[PINS]:
                self._orphans.add(slot)
                self._demanders[slot] = demanders
            if was.copies[slot, NUMBER]:
                assert state.experts[row[OWNER], STATE] == READY, "the expert itself was dropped"
                self.see("copy_fails", "alone")
            elif row[LOCKED] & BY_COPY:
                assert state.experts[row[OWNER], STATE] == EMPTY
                assert state.registers[LOCKS] == was.registers[LOCKS] - 1
                self.see("copy_fails", "itself")
        elif last and tile < self.config.tiles - 1:
            self._short.add(slot)

    def _released(self, fields, code, was):
        if code == REFUSED:
            self.see("release_refused")
            return
        ctx = fields["ctx"]
        for slot in was.pins[ctx, fields["layer"]].tolist():
            if slot < 0:
                continue
            if slot in self._orphans:
                self.see("fill_failed", "released")
            demanders = self._demanders[slot]
            if len(demanders) > 1:
                self.see("pins_of_contexts", "first" if demanders[0] == ctx else "later")
                self._shared.add(slot)
            demanders.remove(ctx)
            if self.golden.state.slots[slot, PINS] == 0:
                if slot in self._starved:
                    self._freed.add(slot)
                if slot in self._shared:
                    self._left.add(slot)
                    self._shared.discard(slot)

    def _cancelled_or_not(self, slot, code, was, valid):
        row = was.slots[slot]
        if code == RESIDENT:
            self.see("cancel", "later tile" if valid[slot] else "first tile")
            self._forget_slot(slot)
            self._cancelled.add(slot)
            return
        assert self.same(was) and valid == self.golden.storage.valid
        if row[OWNER] < 0:
            self.see("cancel_refused", "free")
        elif not row[FILLS]:
            self.see("cancel_refused", "ready")
        elif row[LOCKED] & BY_LOCK:
            self.see("cancel_refused", "locked")
        elif not row[LOCKED] and not row[PREFETCHED]:
            self.see("cancel_refused", "demanded")

    def _locked_or_not(self, op, fields, answer, was):
        code, slot = answer.code, answer.slot
        key = self.golden.directory.key(fields["layer"], fields["expert"])
        there = was.experts[key, STATE] != EMPTY
        if op == UNLOCK:
            if code == REFUSED:
                self.see("unlock", "not locked" if there else "without a slot")
            else:
                self._unlocked.add(slot)
                self.see("unlock", "unlocked")
        elif code == NO_SLOT:
            if was.registers[LOCKS] >= was.shape[LOCKABLE] > 0:
                self.see("lock_limit", "with a slot" if there else "without")
        else:
            self._unlocked.discard(slot)
            self.see("lock", "with a slot" if there else "without")

    def _copied_or_not(self, fields, answer, was):
        code, slot, number = answer.code, answer.slot, fields["value"]
        key = self.golden.directory.key(fields["layer"], fields["expert"])
        if code == NO_SLOT:
            assert self.same(was), "a refused copy has changed something"
            if was.registers[LOCKS] >= was.shape[LOCKABLE]:
                self.see("copy_limit", "spare")
            elif number and self._free(was).any():
                self.see("copy_limit", "bank")
        elif number and code in (ALLOCATED, RESIDENT):
            replicas = self.config.replicas
            first = was.experts[key, SLOT]
            assert slot % replicas == (first + number) % replicas, f"copy {number} in slot {slot}"
            if code == ALLOCATED:
                self.see("copy", Policy(was.registers[POLICY]).name)
            elif not fields["last"]:
                self._forget_slot(slot)
                self.see("copy", "given back")

    # --- reads ---

    def read(self, slot, beat, allowed, ok):
        """A beat was compared, which might be any of those."""
        some = any(valid for _, valid in allowed)
        if some and len(allowed) > 1 and not all(valid for _, valid in allowed):
            self.see("reads_meet_writes", "valid" if ok else "invalid")
        if not some and slot in self._short:
            tile = beat // self.config.tile_beats
            if tile < self.config.tiles and not self.golden.storage.valid[slot] >> tile & 1:
                self.see("sizes", "invalid")
        if ok and self.open("copy") and self.golden.state.copies[slot, NUMBER]:
            self.see("copy", "bytes")
