"""Slots for experts: directory, replacement, pins, data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import BufferCode, BufferOp, Policy, ValueKind

from .directory import EMPTY, FILLING, READY, Directory
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
        Slots that are locked.

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
            ``slot``; LOCK and UNLOCK ``layer, expert``.

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
        for number, slot in enumerate(directory.slots):
            if slot.owner >= 0:
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
                assert self.storage.valid[number] == 0, f"slot {number} has tiles without an owner"
            assert 0 <= slot.pins <= self.config.contexts, f"slot {number} has {slot.pins} pins"
        for key, state in enumerate(directory.state):
            assert (state != EMPTY) == (key in owned), f"expert {key} has no slot"
        pins = [0] * self.config.slots
        for entries in directory.pins.values():
            for number in entries.values():
                pins[number] += 1
        assert pins == [slot.pins for slot in directory.slots], "pins differ from the pin lists"
        locked = sum(slot.locked for slot in directory.slots)
        assert locked == self.locked, f"{self.locked} locks counted, not {locked}"
        assert sorted(self.recency) == list(range(self.config.slots)), "slots lost from the order"

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
        most = self.config.slots - self.config.contexts * self.config.model.top_k
        slot = directory.slot_of[key] if state != EMPTY else -1
        if slot >= 0:
            self.recency.touch(slot)
        if slot >= 0 and directory.slots[slot].locked:
            return BufferResult(_RESIDENT if state == READY else _IN_FLIGHT, slot)
        if self.locked >= most:
            return _NO_SLOT
        if slot >= 0:
            held = directory.slots[slot]
            held.locked = True
            self.locked += 1
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
        self.locked -= 1
        return BufferResult(_RESIDENT if state == READY else _IN_FLIGHT, slot)

    def _victim(self) -> int:
        """Slot for a demand; -1 for none."""
        if self.policy == Policy.LRU:
            return self._least_recent(untouched=False)
        return self.victims.search(self.policy).slot

    def _least_recent(self, *, untouched: bool) -> int:
        """Least recent slot that may be taken; -1 for none."""
        for slot in self.recency:
            # All that are more recent were touched in this route as well.
            if untouched and self.recency.touched(slot):
                break
            held = self.directory.slots[slot]
            if held.pins == 0 and not held.filling and not held.locked:
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
        held = directory.slots[slot]
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
                else:
                    directory.state[held.owner] = READY
        return BufferResult(_RESIDENT, slot)

    def _drop(self, slot: int) -> None:
        """Empty a slot; it keeps its pins."""
        held = self.directory.slots[slot]
        self.directory.state[held.owner] = EMPTY
        self.locked -= held.locked
        held.owner = -1
        held.filling = held.prefetched = held.locked = False
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
