"""Slots for experts: directory, replacement, pins, data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import BufferCode, BufferOp, Policy, RescanCode, ValueKind

from ..._jit import kernel
from .directory import Directory, SlotState
from .recency import Recency, least_recent, retire, touch
from .rescan import RescanResult, rescan
from .state import (
    BANKS,
    BY_COPY,
    BY_LOCK,
    EMPTY,
    EXPERTS,
    FILLING,
    FILLS,
    LOCKABLE,
    LOCKED,
    LOCKS,
    MARK,
    NUMBER,
    OWNER,
    PINS,
    POLICY,
    PREFETCHED,
    PUSHED,
    READY,
    REMEMBERED,
    ROUTE,
    SLOT,
    STATE,
    VALUE,
    clear_state,
    create_state,
)
from .storage import Storage
from .victims import Victims, count_demand, find_victim, layer_mark

__all__ = [
    "BufferResult",
    "ExpertBuffer",
    "begin_demand",
    "cancel",
    "copy",
    "demand",
    "fill",
    "find_demand_victim",
    "find_prefetch_victim",
    "lock",
    "prefetch",
    "release",
    "take_for_demand",
    "take_for_prefetch",
    "unlock",
]

_Bytes = bytes | bytearray | memoryview | NDArray[np.uint8]

#: Confidence that a prefetch without one is kept with.
_CERTAIN = 255

_LRU = int(Policy.LRU)
_RESIDENT, _IN_FLIGHT = int(BufferCode.RESIDENT), int(BufferCode.FILLING)
_ALLOCATED, _NO_SLOT = int(BufferCode.ALLOCATED), int(BufferCode.NO_SLOT)
_OUTBID, _REFUSED = int(BufferCode.OUTBID), int(BufferCode.REFUSED)


@kernel
def _result(code: Any, slot: Any, prefetched: Any, evicted: Any, unused: Any, polluted: Any) -> Any:
    """Fields of :class:`BufferResult`, all of one type."""
    return (
        np.int64(code),
        np.int64(slot),
        np.int64(prefetched),
        np.int64(evicted),
        np.int64(unused),
        np.int64(polluted),
    )


@kernel
def _take(state: Any, slot: Any, key: Any, by_prefetch: Any, number: Any = 0) -> Any:
    """Give a slot to an expert, or to a copy of it; whether it held another, and whether nobody had
    used that.
    """
    held = state.slots[slot]
    owner, unused = held[OWNER], held[PREFETCHED]
    evicted = owner >= 0
    if evicted:
        state.experts[owner, STATE] = EMPTY
        if by_prefetch:
            state.experts[owner, PUSHED] = 1
    if number == 0:
        state.experts[key, PUSHED] = 0
        state.experts[key, STATE] = FILLING
        state.experts[key, SLOT] = slot
    held[OWNER], held[FILLS], held[PREFETCHED] = key, 1, 0
    touch(state, slot)
    return evicted, evicted and unused != 0


@kernel
def _drop(state: Any, slot: Any) -> None:
    """Empty a slot; it keeps its pins."""
    held, number = state.slots[slot], state.copies[slot, NUMBER]
    if number:
        # The expert itself is there, and knows no longer of this copy.
        state.copies[state.experts[held[OWNER], SLOT], number] = -1
        state.copies[slot, NUMBER] = 0
    else:
        state.experts[held[OWNER], STATE] = EMPTY
    if held[LOCKED]:
        state.registers[LOCKS] -= 1
    held[OWNER] = -1
    held[FILLS] = held[PREFETCHED] = held[LOCKED] = 0
    if held[PINS] == 0:
        state.registers[REMEMBERED] = slot
        retire(state, slot)


@kernel
def find_demand_victim(state: Any, bank: Any = -1) -> Any:
    """Slot for a demand, or one of a bank for a copy, by the policy; -1 for none."""
    policy = state.registers[POLICY]
    if policy == _LRU:
        return least_recent(state, False, bank)
    return find_victim(state, policy, 0, 0, 0, bank)[0]


@kernel
def begin_demand(state: Any, ctx: Any, layer: Any, expert: Any, index: Any) -> Any:
    """Count a demand and hold its slot; ALLOCATED and slot -1 if a slot is still to be found."""
    if index == 0:
        state.registers[ROUTE] += 1
    count_demand(state, ctx, layer, expert, index == 0)
    key = layer * state.shape[EXPERTS] + expert
    if state.experts[key, STATE] == EMPTY:
        return _result(_ALLOCATED, -1, 0, 0, 0, 0)
    slot = state.experts[key, SLOT]
    held = state.slots[slot]
    touch(state, slot)
    held[PINS] += 1
    state.pins[ctx, layer, index] = slot
    prefetched = held[PREFETCHED]
    held[PREFETCHED] = 0
    code = _RESIDENT if state.experts[key, STATE] == READY else _IN_FLIGHT
    return _result(code, slot, prefetched, 0, 0, 0)


@kernel
def take_for_demand(state: Any, ctx: Any, layer: Any, expert: Any, index: Any, slot: Any) -> Any:
    """Give a slot to an expert that is demanded and missing."""
    key = layer * state.shape[EXPERTS] + expert
    polluted = state.experts[key, PUSHED]
    evicted, unused = _take(state, slot, key, False)
    state.slots[slot, PINS] = 1
    state.pins[ctx, layer, index] = slot
    return _result(_ALLOCATED, slot, 0, evicted, unused, polluted)


@kernel
def demand(state: Any, ctx: Any, layer: Any, expert: Any, index: Any) -> Any:
    """Do a DEMAND: the fields of its :class:`BufferResult`."""
    result = begin_demand(state, ctx, layer, expert, index)
    if result[1] >= 0:
        return result
    slot = find_demand_victim(state)
    if slot < 0:
        return _result(_NO_SLOT, 0, 0, 0, 0, 0)
    return take_for_demand(state, ctx, layer, expert, index, slot)


@kernel
def take_for_prefetch(state: Any, layer: Any, expert: Any, value: Any, slot: Any) -> Any:
    """Give a slot to an expert that nobody demanded."""
    evicted, unused = _take(state, slot, layer * state.shape[EXPERTS] + expert, True)
    held = state.slots[slot]
    held[PREFETCHED] = 1
    held[VALUE] = value if value > 0 else _CERTAIN
    held[MARK] = layer_mark(state, layer)
    return _result(_ALLOCATED, slot, 0, evicted, unused, 0)


@kernel
def find_prefetch_victim(
    state: Any, layer: Any, expert: Any, value: Any, strict: Any = False
) -> Any:
    """Slot for a prefetch, by the policy, -1 for none; and whether it is outbid, which of a strict
    one an equal does, too.
    """
    policy = state.registers[POLICY]
    if policy == _LRU:
        return least_recent(state, True), False
    return find_victim(state, policy, layer, expert, value, -1, strict)


@kernel
def prefetch(state: Any, layer: Any, expert: Any, value: Any, strict: Any = False) -> Any:
    """Do a PREFETCH: the fields of its :class:`BufferResult`."""
    key = layer * state.shape[EXPERTS] + expert
    if state.experts[key, STATE] != EMPTY:
        code = _RESIDENT if state.experts[key, STATE] == READY else _IN_FLIGHT
        return _result(code, state.experts[key, SLOT], 0, 0, 0, 0)
    slot, outbid = find_prefetch_victim(state, layer, expert, value, strict)
    if outbid:
        return _result(_OUTBID, 0, 0, 0, 0, 0)
    if slot < 0:
        return _result(_NO_SLOT, 0, 0, 0, 0, 0)
    return take_for_prefetch(state, layer, expert, value, slot)


@kernel
def lock(state: Any, layer: Any, expert: Any) -> Any:
    """Do a LOCK: the fields of its :class:`BufferResult`."""
    key = layer * state.shape[EXPERTS] + expert
    found = state.experts[key, STATE] != EMPTY
    code = _RESIDENT if state.experts[key, STATE] == READY else _IN_FLIGHT
    slot = state.experts[key, SLOT]
    if found:
        touch(state, slot)
        if state.slots[slot, LOCKED] & BY_LOCK:
            return _result(code, slot, 0, 0, 0, 0)
    counted = found and state.slots[slot, LOCKED] != 0
    if state.registers[LOCKS] >= state.shape[LOCKABLE] and not counted:
        return _result(_NO_SLOT, 0, 0, 0, 0, 0)
    if found:
        held = state.slots[slot]
        held[LOCKED] |= BY_LOCK
        if not counted:
            state.registers[LOCKS] += 1
        prefetched = held[PREFETCHED]
        held[PREFETCHED] = 0
        return _result(code, slot, prefetched, 0, 0, 0)
    slot = find_demand_victim(state)
    if slot < 0:
        return _result(_NO_SLOT, 0, 0, 0, 0, 0)
    evicted, unused = _take(state, slot, key, False)
    state.slots[slot, LOCKED] = BY_LOCK
    state.registers[LOCKS] += 1
    return _result(_ALLOCATED, slot, 0, evicted, unused, 0)


@kernel
def unlock(state: Any, layer: Any, expert: Any) -> Any:
    """Do an UNLOCK: the fields of its :class:`BufferResult`."""
    key = layer * state.shape[EXPERTS] + expert
    if state.experts[key, STATE] == EMPTY:
        return _result(_REFUSED, 0, 0, 0, 0, 0)
    slot = state.experts[key, SLOT]
    touch(state, slot)
    if state.slots[slot, LOCKED] & BY_LOCK == 0:
        return _result(_REFUSED, 0, 0, 0, 0, 0)
    state.slots[slot, LOCKED] &= ~BY_LOCK
    if state.slots[slot, LOCKED] == 0:
        state.registers[LOCKS] -= 1
    code = _RESIDENT if state.experts[key, STATE] == READY else _IN_FLIGHT
    return _result(code, slot, 0, 0, 0, 0)


@kernel
def _hold(state: Any, slot: Any, keep: Any) -> Any:
    """Hold the expert itself for the sake of copies, or no longer."""
    held = state.slots[slot]
    if held[FILLS]:
        return _result(_IN_FLIGHT, slot, 0, 0, 0, 0)
    before = held[LOCKED]
    if keep and before == 0 and state.registers[LOCKS] >= state.shape[LOCKABLE]:
        return _result(_NO_SLOT, 0, 0, 0, 0, 0)
    if not keep:
        for copy_slot in state.copies[slot, 1:]:
            if copy_slot >= 0:
                return _result(_REFUSED, 0, 0, 0, 0, 0)
    held[LOCKED] = before | BY_COPY if keep else before & ~BY_COPY
    state.registers[LOCKS] += np.int64(held[LOCKED] != 0) - np.int64(before != 0)
    touch(state, slot)
    return _result(_RESIDENT, slot, 0, 0, 0, 0)


@kernel
def _take_for_copy(state: Any, key: Any, number: Any, bank: Any) -> Any:
    """Find a slot for a copy, or for the expert itself."""
    if state.registers[LOCKS] >= state.shape[LOCKABLE]:
        return _result(_NO_SLOT, 0, 0, 0, 0, 0)
    slot = find_demand_victim(state, bank)
    if slot < 0:
        return _result(_NO_SLOT, 0, 0, 0, 0, 0)
    evicted, unused = _take(state, slot, key, False, number)
    if number:
        state.copies[state.experts[key, SLOT], number] = slot
        state.copies[slot, NUMBER] = number
    state.slots[slot, LOCKED] = BY_COPY
    state.registers[LOCKS] += 1
    return _result(_ALLOCATED, slot, 0, evicted, unused, 0)


@kernel
def copy(state: Any, layer: Any, expert: Any, number: Any, keep: Any) -> Any:
    """Do a COPY: the fields of its :class:`BufferResult`, and whether a slot was dropped."""
    key = layer * state.shape[EXPERTS] + expert
    refused = _result(_REFUSED, 0, 0, 0, 0, 0)
    if state.experts[key, STATE] == EMPTY:
        if number or not keep:
            return refused, False
        return _take_for_copy(state, key, 0, -1), False
    first = state.experts[key, SLOT]
    held = state.slots[first, LOCKED] & BY_COPY
    if not keep and not held:
        return refused, False
    if number == 0:
        return _hold(state, first, keep), False
    slot = state.copies[first, number]
    if not keep and slot < 0:
        return refused, False
    if state.slots[first, FILLS]:
        return _result(_IN_FLIGHT, first, 0, 0, 0, 0), False
    if not held:
        return refused, False
    if slot < 0:
        bank = (first + number) % state.shape[BANKS]
        return _take_for_copy(state, key, number, bank), False
    if state.slots[slot, FILLS]:
        return _result(_IN_FLIGHT, slot, 0, 0, 0, 0), False
    if keep:
        touch(state, slot)
    else:
        _drop(state, slot)
    return _result(_RESIDENT, slot, 0, 0, 0, 0), not keep


@kernel
def fill(state: Any, slot: Any, last: Any, failed: Any) -> Any:
    """Do a FILL, but for the tile-valid bits; whether the slot was dropped."""
    held = state.slots[slot]
    if not held[FILLS] or not last:
        return False
    held[FILLS] = 0
    if failed:
        _drop(state, slot)
        return True
    if state.copies[slot, NUMBER] == 0:
        state.experts[held[OWNER], STATE] = READY
    return False


@kernel
def cancel(state: Any, slot: Any) -> Any:
    """Do a CANCEL; whether there was a prefetch to be cancelled."""
    held = state.slots[slot]
    if not held[FILLS] or not held[PREFETCHED] or held[LOCKED]:
        return False
    _drop(state, slot)
    return True


@kernel
def release(state: Any, ctx: Any, layer: Any) -> Any:
    """Do a RELEASE; whether anything was held."""
    pins = state.pins[ctx, layer]
    found = False
    for index in range(pins.shape[0]):
        if pins[index] >= 0:
            state.slots[pins[index], PINS] -= 1
            pins[index] = -1
            found = True
    return found


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


_CODES = tuple(BufferCode)
_REFUSAL = BufferResult(BufferCode.REFUSED)
_DONE = BufferResult(BufferCode.RESIDENT)


def _answer(fields: Sequence[int]) -> BufferResult:
    """The result of a compiled operation."""
    code, slot, prefetched, evicted, unused, polluted = fields
    return BufferResult(
        _CODES[code], slot, bool(prefetched), bool(evicted), bool(unused), bool(polluted)
    )


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
    state : :class:`BufferState`
        All else, in arrays that the compiled functions of this module work on.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config: DeviceConfig, *, valued: bool | None = None) -> None:
        require_config(config)
        self.config = config
        if valued is None:
            valued = config.gives_values
        self.state = create_state(config)
        self.directory = Directory(config, self.state)
        self.victims = Victims(config, self.state, valued=valued)
        self.recency = Recency(self.state)
        self.storage = Storage(config)

    @property
    def policy(self) -> int:
        """Who gives way, a :class:`Policy`."""
        return int(self.state.registers[POLICY])

    @policy.setter
    def policy(self, policy: int) -> None:
        self.state.registers[POLICY] = policy

    @property
    def locked(self) -> int:
        """Slots that are locked or held for the sake of copies."""
        return int(self.state.registers[LOCKS])

    def clear(self) -> None:
        """Forget everything but the data."""
        clear_state(self.state)
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
            expert, value, last``; FILL ``slot, tile, last, failed``; RELEASE ``ctx, layer``; CANCEL
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
            return self._prefetch(layer, expert, value, strict=bool(last))
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

    def rescan(
        self, ctx: int, *, near: bool, ahead: int, least: int, cutoff_layer: int
    ) -> RescanResult:
        """Look for the missing expert that is worth a prefetch most: :func:`rescan`.

        Raises
        ------
        ValueError
            If the context is out of range.
        """
        self._check_context(ctx)
        key, value, distance = rescan(
            self.state, ctx, bool(near), int(ahead), int(least), int(cutoff_layer)
        )
        if key < 0:
            return RescanResult(RescanCode.NOTHING)
        layer, expert = divmod(int(key), self.config.model.experts)
        return RescanResult(RescanCode.FOUND, layer, expert, int(value), int(distance))

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
        self.directory.key(layer, expert)
        self._check_context(ctx)
        if not 0 <= index < self.config.model.top_k:
            raise ValueError(
                f"Index must be between 0 and {self.config.model.top_k - 1}, not {index}"
            )
        if self.state.pins[ctx, layer, index] >= 0:
            raise ValueError(
                f"Context {ctx} must release layer {layer} before it demands index {index} again"
            )
        return self._allocated(demand(self.state, ctx, layer, expert, index))

    def _prefetch(self, layer: int, expert: int, value: int, *, strict: bool) -> BufferResult:
        self.directory.key(layer, expert)
        if not 0 <= value <= _CERTAIN:
            raise ValueError(f"Value must be between 0 and {_CERTAIN}, not {value}")
        return self._allocated(prefetch(self.state, layer, expert, value, strict))

    def _lock(self, layer: int, expert: int) -> BufferResult:
        self.directory.key(layer, expert)
        return self._allocated(lock(self.state, layer, expert))

    def _unlock(self, layer: int, expert: int) -> BufferResult:
        self.directory.key(layer, expert)
        return _answer(unlock(self.state, layer, expert))

    def _copy(self, layer: int, expert: int, number: int, *, keep: bool) -> BufferResult:
        self.directory.key(layer, expert)
        if not 0 <= number < self.config.replicas:
            raise ValueError(f"Copy must be between 0 and {self.config.replicas - 1}, not {number}")
        fields, dropped = copy(self.state, layer, expert, number, keep)
        answer = self._allocated(fields)
        if dropped:
            self.storage.valid[answer.slot] = 0
        return answer

    def _allocated(self, fields: Sequence[int]) -> BufferResult:
        """The result of an operation that may have given away a slot."""
        answer = _answer(fields)
        if answer.code == BufferCode.ALLOCATED:
            self.storage.valid[answer.slot] = 0
        return answer

    def _fill(self, slot: int, tile: int, last: bool, failed: bool) -> BufferResult:
        self._check_slot(slot)
        if not 0 <= tile < self.config.tiles:
            raise ValueError(f"Tile must be between 0 and {self.config.tiles - 1}, not {tile}")
        if not failed and self.state.slots[slot, FILLS]:
            self.storage.valid[slot] |= 1 << tile
        if last and fill(self.state, slot, last, failed):
            self.storage.valid[slot] = 0
        return BufferResult(BufferCode.RESIDENT, slot)

    def _cancel(self, slot: int) -> BufferResult:
        self._check_slot(slot)
        if not cancel(self.state, slot):
            return _REFUSAL
        self.storage.valid[slot] = 0
        return BufferResult(BufferCode.RESIDENT, slot)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.config.slots:
            raise ValueError(f"Slot must be between 0 and {self.config.slots - 1}, not {slot}")

    def _release(self, ctx: int, layer: int) -> BufferResult:
        self.directory.key(layer, 0)
        self._check_context(ctx)
        return _DONE if release(self.state, ctx, layer) else _REFUSAL
