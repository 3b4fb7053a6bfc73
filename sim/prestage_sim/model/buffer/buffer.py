"""Slots for experts: directory, replacement, pins, data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import BufferCode, BufferOp, Policy, ValueKind

from .directory import EMPTY, FILLING, READY, Directory, SlotState
from .recency import Recency
from .storage import Storage
from .victims import Victims

__all__ = ["BufferResult", "ExpertBuffer"]

_Bytes = bytes | bytearray | memoryview | NDArray[np.uint8]


class BufferResult(NamedTuple):
    """Answer to a request: the fields of the contract's record.

    ``slot`` is 0 for NO_SLOT, OUTBID, REFUSED and RELEASE.
    """

    code: BufferCode
    slot: int = 0
    prefetched: bool = False
    evicted: bool = False
    evicted_unused: bool = False
    polluted: bool = False


_NO_SLOT = BufferResult(BufferCode.NO_SLOT)
_OUTBID = BufferResult(BufferCode.OUTBID)
_REFUSED = BufferResult(BufferCode.REFUSED)
_RELEASED = BufferResult(BufferCode.RESIDENT)
_RESIDENT, _IN_FLIGHT = BufferCode.RESIDENT, BufferCode.FILLING
_ALLOCATED = BufferCode.ALLOCATED

#: Confidence that a prefetch without one is kept with.
_CERTAIN = 255


class ExpertBuffer:
    """Keep experts in slots and decide which slot an arriving expert takes.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are kept.
    valued : :class:`bool` or None
        Whether values of the predictor are taken; else they are ignored. None stands for whether
        the device's predictor gives any.

    Attributes
    ----------
    policy : :class:`int`
        A :class:`Policy`; may change between operations.
    directory : :class:`Directory`
        State of experts, slots and pins.
    recency : :class:`Recency`
        Order of the slots by their last touch.
    victims : :class:`Victims`
        Use rates and values, and the search for a victim.
    storage : :class:`Storage`
        The bytes and tile-valid bits.
    locked : :class:`int`
        Slots that are locked or held for the sake of copies.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config: DeviceConfig, *, valued: bool | None = None) -> None:
        require_config(config)
        self.config = config
        if valued is None:
            valued = config.predictor == "perceptron"
        self.policy: int = Policy.LRU
        self.locked = 0
        self.directory = Directory(config)
        self.victims = Victims(config, self.directory, valued=valued)
        self.recency = Recency(slots=config.slots)
        self.storage = Storage(config)

    def clear(self) -> None:
        """Forget everything but the data."""
        self.directory.clear()
        self.recency.clear()
        self.victims.clear()
        self.locked = 0
        self.storage.clear()

    def request(
        self,
        op: int,
        *,
        ctx: int = 0,
        layer: int = 0,
        expert: int = 0,
        index: int = 0,
        slot: int = 0,
        tile: int = 0,
        last: bool = False,
        failed: bool = False,
        value: int = 0,
    ) -> BufferResult:
        """Do one operation.

        Parameters
        ----------
        op : :class:`int`
            A :class:`BufferOp`. DEMAND uses ``ctx, layer, expert, index``; PREFETCH ``layer,
            expert, value``; FILL ``slot, tile, last, failed``; RELEASE ``ctx, layer``; CANCEL
            ``slot``; LOCK and UNLOCK ``layer, expert``; COPY, where experts may have copies,
            ``layer, expert``, number ``value`` and ``last`` to hold it.

        Raises
        ------
        ValueError
            If the operation is unknown, a field that it uses is out of range, or a demand's pin
            list entry is taken.
        """
        if op == BufferOp.DEMAND:
            return self._demand(ctx, layer, expert, index)
        if op == BufferOp.PREFETCH:
            return self._prefetch(layer, expert, value)
        if op == BufferOp.FILL:
            return self._fill(slot, tile, bool(last), bool(failed))
        if op == BufferOp.RELEASE:
            return self._release(ctx, layer)
        if op == BufferOp.CANCEL:
            return self._cancel(slot)
        if op == BufferOp.LOCK:
            return self._lock(layer, expert)
        if op == BufferOp.UNLOCK:
            return self._unlock(layer, expert)
        if op == BufferOp.COPY and self.config.replicas > 1:
            return self._copy(layer, expert, value, keep=bool(last))
        raise ValueError(f"Operation must be a BufferOp, not {op!r}")

    def values(self, kind: int, ctx: int, layer: int, beat: int, values: Sequence[int]) -> None:
        """Take what the predictor says of some experts of a layer.

        Parameters
        ----------
        kind : :class:`int`
            A :class:`ValueKind`.
        ctx, layer, beat : :class:`int`
            Whose experts: element 0 is expert ``beat * config.predictor_lanes`` of the layer.
        values : sequence of :class:`int`
            Values in 1/256, ``config.predictor_lanes`` of them.

        Raises
        ------
        ValueError
            If the kind is unknown, a number is out of range, or there are more or fewer values.
        """
        self.directory.key(layer, 0)
        self._check_context(ctx)
        kind = ValueKind(kind)
        if not 0 <= beat < self.config.lane_beats:
            raise ValueError(f"Beat must be between 0 and {self.config.lane_beats - 1}, not {beat}")
        if len(values) != self.config.predictor_lanes:
            raise ValueError(
                f"Values must be {self.config.predictor_lanes} in number, not {len(values)}"
            )
        self.victims.values(kind, ctx, layer, beat, values)

    def write_beat(self, slot: int, beat: int, data: _Bytes) -> None:
        """Write one beat of an arriving expert.

        Raises
        ------
        ValueError
            If the slot or beat is out of range, or the data is not one beat long.
        """
        self.storage.write_beat(slot, beat, data)

    def write_expert(self, slot: int, data: _Bytes) -> None:
        """Write all beats of an arriving expert.

        Raises
        ------
        ValueError
            If the slot is out of range or the data is not one expert long.
        """
        self.storage.write_expert(slot, data)

    def read_beat(self, slot: int, beat: int) -> tuple[bytes, bool]:
        """Bytes of a beat, and whether its tile is valid.

        Raises
        ------
        ValueError
            If the slot or beat is out of range.
        """
        return self.storage.read_beat(slot, beat)

    def check_invariants(self) -> None:
        """Compare the directory, the slots, the pin lists and the tile-valid bits with each other.

        Raises
        ------
        AssertionError
            If they contradict each other.
        """
        directory = self.directory
        owned = {}
        linked = {}
        for number, slot in enumerate(directory.slots):
            if slot.copy:
                self._check_copy(number, slot)
                linked[slot.owner, slot.copy] = number
            elif slot.owner >= 0:
                assert slot.owner not in owned, f"expert {slot.owner} in two slots"
                owned[slot.owner] = number
                state = FILLING if slot.filling else READY
                assert directory.state[slot.owner] == state, f"slot {number}: state of its owner"
                assert directory.slot_of[slot.owner] == number, f"slot {number}: slot of its owner"
                assert slot.owner not in directory.evicted_by_prefetch, f"slot {number}: evicted"
            else:
                assert not slot.filling, f"slot {number} fills without an owner"
                assert not slot.prefetched, f"slot {number} is prefetched without an owner"
                assert not slot.locked, f"slot {number} is locked without an owner"
                assert not slot.held, f"slot {number} is held without an owner"
                assert self.storage.valid[number] == 0, f"slot {number} has tiles without an owner"
            assert 0 <= slot.pins <= self.config.contexts, f"slot {number} has {slot.pins} pins"
        for key, state in enumerate(directory.state):
            assert (state != EMPTY) == (key in owned), f"expert {key} has no slot"
        pins = [0] * self.config.slots
        for entries in directory.pins.values():
            for number in entries.values():
                pins[number] += 1
        assert pins == [slot.pins for slot in directory.slots], "pins differ from the pin lists"
        links = {
            (slot.owner, copy): at for slot in directory.slots for copy, at in slot.links.items()
        }
        assert links == linked, f"copies {linked} are not those of the experts: {links}"
        locked = sum(slot.locked or slot.held for slot in directory.slots)
        assert locked <= self.config.lockable, f"{locked} slots are locked"
        assert locked == self.locked, f"{self.locked} locks counted, not {locked}"
        assert sorted(self.recency) == list(range(self.config.slots)), "slots lost from the order"

    def _check_copy(self, number: int, slot: SlotState) -> None:
        """A copy belongs to an expert that is whole and held, and is in a bank of its own."""
        directory, replicas = self.directory, self.config.replicas
        assert slot.held and not slot.pins and not slot.locked and not slot.prefetched, number
        assert directory.state[slot.owner] == READY, f"slot {number}: a copy of nothing"
        at = directory.slot_of[slot.owner]
        assert directory.slots[at].held, f"slot {number}: a copy of what is not held"
        assert number % replicas == (at + slot.copy) % replicas, f"slot {number}: wrong bank"

    def _check_context(self, ctx: int) -> None:
        if not 0 <= ctx < self.config.contexts:
            raise ValueError(f"Context must be between 0 and {self.config.contexts - 1}, not {ctx}")

    def _demand(self, ctx: int, layer: int, expert: int, index: int) -> BufferResult:
        directory = self.directory
        key = directory.key(layer, expert)
        self._check_context(ctx)
        if not 0 <= index < self.config.model.top_k:
            raise ValueError(
                f"Index must be between 0 and {self.config.model.top_k - 1}, not {index}"
            )
        pins = directory.pins.setdefault((ctx, layer), {})
        if index in pins:
            raise ValueError(
                f"Context {ctx} must release layer {layer} before it demands index {index} again"
            )
        if index == 0:
            self.recency.begin_route()
        self.victims.demand(ctx, layer, expert, first=index == 0)

        state = directory.state[key]
        if state != EMPTY:
            slot = directory.slot_of[key]
            held = directory.slots[slot]
            self.recency.touch(slot)
            held.pins += 1
            pins[index] = slot
            prefetched = held.prefetched
            held.prefetched = False
            return BufferResult(
                _RESIDENT if state == READY else _IN_FLIGHT, slot, prefetched=prefetched
            )

        slot = self._victim()
        if slot < 0:
            return _NO_SLOT
        pins[index] = slot
        polluted = key in directory.evicted_by_prefetch
        evicted, evicted_unused = self._take(slot, by_prefetch=False)
        directory.slots[slot].pins = 1
        self._allocate(key, slot)
        return BufferResult(_ALLOCATED, slot, False, evicted, evicted_unused, polluted)

    def _prefetch(self, layer: int, expert: int, value: int) -> BufferResult:
        directory = self.directory
        key = directory.key(layer, expert)
        if not 0 <= value <= _CERTAIN:
            raise ValueError(f"Value must be between 0 and {_CERTAIN}, not {value}")
        state = directory.state[key]
        if state != EMPTY:
            slot = directory.slot_of[key]
            return BufferResult(_RESIDENT if state == READY else _IN_FLIGHT, slot)

        if self.policy == Policy.LRU:
            slot = self._least_recent(untouched=True)
        else:
            search = self.victims.search(self.policy, (layer, expert, value) if value else None)
            if search.outbid:
                return _OUTBID
            slot = search.slot
        if slot < 0:
            return _NO_SLOT
        evicted, evicted_unused = self._take(slot, by_prefetch=True)
        held = directory.slots[slot]
        held.prefetched = True
        held.value = value or _CERTAIN
        held.mark = self.victims.mark(layer)
        self._allocate(key, slot)
        return BufferResult(_ALLOCATED, slot, False, evicted, evicted_unused)

    def _lock(self, layer: int, expert: int) -> BufferResult:
        directory = self.directory
        key = directory.key(layer, expert)
        state = directory.state[key]
        slot = directory.slot_of[key] if state != EMPTY else -1
        if slot >= 0:
            self.recency.touch(slot)
        if slot >= 0 and directory.slots[slot].locked:
            return BufferResult(_RESIDENT if state == READY else _IN_FLIGHT, slot)
        held_already = slot >= 0 and directory.slots[slot].held
        if self.locked >= self.config.lockable and not held_already:
            return _NO_SLOT
        if slot >= 0:
            held = directory.slots[slot]
            held.locked = True
            self.locked += not held.held
            prefetched, held.prefetched = held.prefetched, False
            return BufferResult(
                _RESIDENT if state == READY else _IN_FLIGHT, slot, prefetched=prefetched
            )
        slot = self._victim()
        if slot < 0:
            return _NO_SLOT
        evicted, evicted_unused = self._take(slot, by_prefetch=False)
        directory.slots[slot].locked = True
        self.locked += 1
        self._allocate(key, slot)
        return BufferResult(_ALLOCATED, slot, False, evicted, evicted_unused)

    def _unlock(self, layer: int, expert: int) -> BufferResult:
        directory = self.directory
        key = directory.key(layer, expert)
        state = directory.state[key]
        slot = directory.slot_of[key]
        if state == EMPTY:
            return _REFUSED
        self.recency.touch(slot)
        if not directory.slots[slot].locked:
            return _REFUSED
        directory.slots[slot].locked = False
        self.locked -= not directory.slots[slot].held
        return BufferResult(_RESIDENT if state == READY else _IN_FLIGHT, slot)

    def _copy(self, layer: int, expert: int, copy: int, *, keep: bool) -> BufferResult:
        """Hold a copy of an expert, or give it back."""
        directory = self.directory
        key = directory.key(layer, expert)
        if not 0 <= copy < self.config.replicas:
            raise ValueError(f"Copy must be between 0 and {self.config.replicas - 1}, not {copy}")
        state = directory.state[key]
        if state == EMPTY:
            if copy or not keep:
                return _REFUSED
            return self._allocate_copy(key, 0, None)
        first = directory.slot_of[key]
        held = directory.slots[first]
        if not keep and not held.held:
            return _REFUSED
        if copy == 0:
            return self._hold(first, keep=keep)
        at = held.links.get(copy)
        if not keep and at is None:
            return _REFUSED
        if state == FILLING:
            return BufferResult(_IN_FLIGHT, first)
        if not held.held:
            return _REFUSED
        if at is None:
            return self._allocate_copy(key, copy, (first + copy) % self.config.replicas)
        if directory.slots[at].filling:
            return BufferResult(_IN_FLIGHT, at)
        if keep:
            self.recency.touch(at)
        else:
            self._drop(at)
        return BufferResult(_RESIDENT, at)

    def _hold(self, slot: int, *, keep: bool) -> BufferResult:
        """Hold the expert itself for the sake of copies, or no longer."""
        held = self.directory.slots[slot]
        if held.filling:
            return BufferResult(_IN_FLIGHT, slot)
        counted = held.locked or held.held
        if keep and not counted and self.locked >= self.config.lockable:
            return _NO_SLOT
        if not keep and held.links:
            return _REFUSED
        held.held = keep
        self.locked += (held.locked or keep) - counted
        self.recency.touch(slot)
        return BufferResult(_RESIDENT, slot)

    def _allocate_copy(self, key: int, copy: int, bank: int | None) -> BufferResult:
        if self.locked >= self.config.lockable:
            return _NO_SLOT
        slot = self._victim(bank)
        if slot < 0:
            return _NO_SLOT
        directory = self.directory
        evicted, evicted_unused = self._take(slot, by_prefetch=False)
        if copy:
            directory.slots[directory.slot_of[key]].links[copy] = slot
            self._occupy(key, slot)
        else:
            self._allocate(key, slot)
        directory.slots[slot].held = True
        directory.slots[slot].copy = copy
        self.locked += 1
        return BufferResult(_ALLOCATED, slot, False, evicted, evicted_unused)

    def _victim(self, bank: int | None = None) -> int:
        """Slot for a demand, or for a copy in a bank; -1 for none."""
        if self.policy == Policy.LRU:
            return self._least_recent(untouched=False, bank=bank)
        return self.victims.search(self.policy, bank=bank).slot

    def _least_recent(self, *, untouched: bool, bank: int | None = None) -> int:
        """Least recent slot, of a bank or of all, that may be taken; -1 for none."""
        for slot in self.recency:
            # All that are more recent were touched in this route as well.
            if untouched and self.recency.touched(slot):
                break
            if bank is not None and slot % self.config.replicas != bank:
                continue
            held = self.directory.slots[slot]
            if held.pins == 0 and not held.filling and not held.locked and not held.held:
                return slot
        return -1

    def _take(self, slot: int, *, by_prefetch: bool) -> tuple[bool, bool]:
        """Evict what is in a slot; whether there was something, and whether nobody had used it."""
        held = self.directory.slots[slot]
        unused = held.prefetched
        held.prefetched = False
        if held.owner < 0:
            return False, False
        self.directory.state[held.owner] = EMPTY
        if by_prefetch:
            self.directory.evicted_by_prefetch.add(held.owner)
        return True, unused

    def _allocate(self, key: int, slot: int) -> None:
        directory = self.directory
        directory.evicted_by_prefetch.discard(key)
        directory.state[key] = FILLING
        directory.slot_of[key] = slot
        self._occupy(key, slot)

    def _occupy(self, key: int, slot: int) -> None:
        held = self.directory.slots[slot]
        held.owner = key
        held.filling = True
        self.storage.valid[slot] = 0
        self.recency.touch(slot)

    def _fill(self, slot: int, tile: int, last: bool, failed: bool) -> BufferResult:
        self._check_slot(slot)
        if not 0 <= tile < self.config.tiles:
            raise ValueError(f"Tile must be between 0 and {self.config.tiles - 1}, not {tile}")
        directory = self.directory
        held = directory.slots[slot]
        if held.filling:
            if not failed:
                self.storage.valid[slot] |= 1 << tile
            if last:
                held.filling = False
                if failed:
                    self._drop(slot)
                elif held.copy == 0:
                    directory.state[held.owner] = READY
        return BufferResult(_RESIDENT, slot)

    def _drop(self, slot: int) -> None:
        """Empty a slot; it keeps its pins."""
        directory = self.directory
        held = directory.slots[slot]
        if held.copy:
            del directory.slots[directory.slot_of[held.owner]].links[held.copy]
        else:
            directory.state[held.owner] = EMPTY
        self.locked -= held.locked or held.held
        held.owner = -1
        held.copy = 0
        held.filling = held.prefetched = held.locked = held.held = False
        self.storage.valid[slot] = 0
        if held.pins == 0:
            self.victims.freed(slot)
            self.recency.retire(slot)

    def _cancel(self, slot: int) -> BufferResult:
        self._check_slot(slot)
        held = self.directory.slots[slot]
        if not held.filling or not held.prefetched or held.locked:
            return _REFUSED
        self._drop(slot)
        return BufferResult(_RESIDENT, slot)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.config.slots:
            raise ValueError(f"Slot must be between 0 and {self.config.slots - 1}, not {slot}")

    def _release(self, ctx: int, layer: int) -> BufferResult:
        self.directory.key(layer, 0)
        self._check_context(ctx)
        held = self.directory.pins.pop((ctx, layer), {})
        for slot in held.values():
            self.directory.slots[slot].pins -= 1
        return _RELEASED if held else _REFUSED
