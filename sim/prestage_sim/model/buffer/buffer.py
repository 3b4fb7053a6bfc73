"""Slots for experts: directory, replacement, pins, data."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import BufferCode, BufferOp

from .directory import EMPTY, FILLING, READY, Directory
from .recency import Recency
from .storage import Storage

__all__ = ["BufferResult", "ExpertBuffer"]

_Bytes = bytes | bytearray | memoryview | NDArray[np.uint8]


class BufferResult(NamedTuple):
    """Answer to a request: the fields of the contract's record.

    ``slot`` is 0 for NO_SLOT and RELEASE.
    """

    code: BufferCode
    slot: int = 0
    prefetched: bool = False
    evicted: bool = False
    evicted_unused: bool = False
    polluted: bool = False


_NO_SLOT = BufferResult(BufferCode.NO_SLOT)
_RELEASED = BufferResult(BufferCode.RESIDENT)
_RESIDENT, _IN_FLIGHT = BufferCode.RESIDENT, BufferCode.FILLING
_ALLOCATED = BufferCode.ALLOCATED


class ExpertBuffer:
    """Keep experts in slots and decide which slot an arriving expert takes.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are kept.

    Attributes
    ----------
    directory : :class:`Directory`
        State of experts, slots and pins.
    recency : :class:`Recency`
        Order of the slots by their last touch.
    storage : :class:`Storage`
        The bytes and tile-valid bits.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.config = config
        self.directory = Directory(config)
        self.recency = Recency(slots=config.slots)
        self.storage = Storage(config)

    def clear(self) -> None:
        """Forget everything but the data."""
        self.directory.clear()
        self.recency.clear()
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
    ) -> BufferResult:
        """Do one operation.

        Parameters
        ----------
        op : :class:`int`
            A :class:`BufferOp`. DEMAND uses ``ctx, layer, expert, index``; PREFETCH ``layer,
            expert``; FILL ``slot, tile, last, failed``; RELEASE ``ctx, layer``.

        Raises
        ------
        ValueError
            If the operation is unknown, a field that it uses is out of range, or a demand's pin
            list entry is taken.
        """
        if op == BufferOp.DEMAND:
            return self._demand(ctx, layer, expert, index)
        if op == BufferOp.PREFETCH:
            return self._prefetch(layer, expert)
        if op == BufferOp.FILL:
            return self._fill(slot, tile, bool(last), bool(failed))
        if op == BufferOp.RELEASE:
            return self._release(ctx, layer)
        raise ValueError(f"Operation must be a BufferOp, not {op!r}")

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
                assert self.storage.valid[number] == 0, f"slot {number} has tiles without an owner"
            assert 0 <= slot.pins <= self.config.contexts, f"slot {number} has {slot.pins} pins"
        for key, state in enumerate(directory.state):
            assert (state != EMPTY) == (key in owned), f"expert {key} has no slot"
        pins = [0] * self.config.slots
        for entries in directory.pins.values():
            for number in entries.values():
                pins[number] += 1
        assert pins == [slot.pins for slot in directory.slots], "pins differ from the pin lists"
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

        for slot in self.recency:
            held = directory.slots[slot]
            if held.pins == 0 and not held.filling:
                break
        else:
            return _NO_SLOT
        evicted = held.owner >= 0
        evicted_unused = held.prefetched
        polluted = key in directory.evicted_by_prefetch
        if evicted:
            directory.state[held.owner] = EMPTY
        held.prefetched = False
        held.pins = 1
        pins[index] = slot
        self._allocate(key, slot)
        return BufferResult(_ALLOCATED, slot, False, evicted, evicted_unused, polluted)

    def _prefetch(self, layer: int, expert: int) -> BufferResult:
        directory = self.directory
        key = directory.key(layer, expert)
        state = directory.state[key]
        if state != EMPTY:
            slot = directory.slot_of[key]
            self.recency.touch(slot)
            return BufferResult(_RESIDENT if state == READY else _IN_FLIGHT, slot)

        for slot in self.recency:
            # All that are more recent were touched in this route as well.
            if self.recency.touched(slot):
                return _NO_SLOT
            held = directory.slots[slot]
            if held.pins == 0 and not held.filling:
                break
        else:
            return _NO_SLOT
        evicted = held.owner >= 0
        evicted_unused = held.prefetched
        if evicted:
            directory.state[held.owner] = EMPTY
            directory.evicted_by_prefetch.add(held.owner)
        held.prefetched = True
        self._allocate(key, slot)
        return BufferResult(_ALLOCATED, slot, False, evicted, evicted_unused)

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
        if not 0 <= slot < self.config.slots:
            raise ValueError(f"Slot must be between 0 and {self.config.slots - 1}, not {slot}")
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
                    directory.state[held.owner] = EMPTY
                    held.owner = -1
                    held.prefetched = False
                    self.storage.valid[slot] = 0
                else:
                    directory.state[held.owner] = READY
        return BufferResult(_RESIDENT, slot)

    def _release(self, ctx: int, layer: int) -> BufferResult:
        self.directory.key(layer, 0)
        self._check_context(ctx)
        for slot in self.directory.pins.pop((ctx, layer), {}).values():
            self.directory.slots[slot].pins -= 1
        return _RELEASED
