"""Golden model of the throttle: what prefetches of each kind have saved, and have cost."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import PrefetchKind, Source
from prestage_hw.contract.registers import THROTTLE_FIELDS, register_by_name

from ..._jit import kernel

__all__ = [
    "Throttle",
    "ThrottleState",
    "clear_throttle",
    "count_drop",
    "count_miss",
    "count_prefetch",
    "count_use",
    "create_throttle",
    "kind_of",
    "prefetch_kind",
    "set_weights",
    "throttle_admits",
]

_START = -25
_LEAST, _MOST = -128, 127
#: Probes are at least 2 ** that many misses apart.
_SHORTEST = 4
#: Evictions are counted modulo 2 ** that, or more for very many slots.
_EVICTION_BITS = 18

_KINDS = len(PrefetchKind)
_NEAR, _FAR, _HINT = (int(kind) for kind in PrefetchKind)
_SOURCE_HINT = int(Source.HINT)

#: Rows of :attr:`ThrottleState.kinds`.
CREDIT, ON, OPEN, MISSES, APART = range(5)

#: Places of :attr:`ThrottleState.registers`.
ENABLE, EVICTIONS, MODULUS, JUMP, TILES, USEFUL, PRICE, POLLUTION, WAIT, FLOOR, LONGEST = range(11)


class ThrottleState(NamedTuple):
    """All that a throttle knows.

    Parameters
    ----------
    kinds : array of ``int64``, shape ``[5, kinds]``
        Credit of each kind, whether it is on, its prefetches that were neither used nor evicted,
        demand misses since its last probe, and how far apart its probes are, as a power of two.
    registers : array of ``int64``
        Whether it is enabled, evictions so far, what they are counted modulo, how many pass at a
        clear, tiles of an expert, and the fields of the register ``throttle``.
    evicted : array of ``int64``, shape ``[L * E]``
        When each expert was evicted last.
    owners : array of ``int64``, shape ``[S, 2]``
        Expert and kind of each slot's latest fetch, -1 for none.
    """

    kinds: NDArray[np.int64]
    registers: NDArray[np.int64]
    evicted: NDArray[np.int64]
    owners: NDArray[np.int64]


def create_throttle(config: DeviceConfig) -> ThrottleState:
    """A throttle as after reset: it is not enabled, and no field of its register is set."""
    jump = 1 << config.slots.bit_length()
    registers = np.zeros(11, np.int64)
    registers[MODULUS] = max(1 << _EVICTION_BITS, 4 * jump)
    registers[JUMP] = jump
    registers[TILES] = config.tiles
    state = ThrottleState(
        kinds=np.zeros((5, _KINDS), np.int64),
        registers=registers,
        evicted=np.zeros(config.model.layers * config.model.experts, np.int64),
        owners=np.zeros((config.slots, 2), np.int64),
    )
    clear_throttle(state)
    return state


def clear_throttle(state: ThrottleState) -> None:
    """Forget everything, as after reset."""
    state.kinds[:] = 0
    state.kinds[CREDIT] = _START
    state.kinds[APART] = _SHORTEST
    # By more evictions than prefetches can lie about: all before is too far back to count.
    registers = state.registers
    registers[EVICTIONS] = (registers[EVICTIONS] + registers[JUMP]) % registers[MODULUS]
    state.owners[:] = -1


def set_weights(state: ThrottleState, value: int) -> None:
    """Set what the register ``throttle`` says."""
    weights = {
        name: value >> low & (1 << bits) - 1 for name, (low, bits) in THROTTLE_FIELDS.items()
    }
    registers = state.registers
    for place, name in (
        (USEFUL, "useful"),
        (PRICE, "price"),
        (POLLUTION, "pollution"),
        (WAIT, "wait"),
        (FLOOR, "floor"),
    ):
        registers[place] = weights[name]
    registers[LONGEST] = max(_SHORTEST, weights["probe"])


@kernel
def prefetch_kind(source: Any, deadline: Any, routes: Any) -> Any:
    """Number of the kind of a candidate: :func:`kind_of`."""
    if source == _SOURCE_HINT:
        return _HINT
    return _NEAR if (deadline - routes) % 256 == 1 else _FAR


def kind_of(source: int, deadline: int, *, routes: int) -> PrefetchKind:
    """Kind of a candidate whose context has had ``routes`` routing decisions, modulo 256."""
    return PrefetchKind(prefetch_kind(int(source), deadline, routes))


@kernel
def _pay(state: Any, kind: Any, amount: Any) -> None:
    kinds = state.kinds
    credit = max(_LEAST, min(_MOST, kinds[CREDIT, kind] + amount))
    kinds[CREDIT, kind] = credit
    if credit < -state.registers[FLOOR]:
        kinds[ON, kind] = 0
    elif credit >= 0:
        kinds[ON, kind] = 1


@kernel
def _note(state: Any, slot: Any, expert: Any, kind: Any, evicted: Any, unused: Any) -> None:
    """Note who has the slot now, and what became of the one before."""
    registers, owner = state.registers, state.owners[slot]
    if evicted:
        registers[EVICTIONS] = (registers[EVICTIONS] + 1) % registers[MODULUS]
        state.evicted[owner[0]] = registers[EVICTIONS]
        if unused:
            state.kinds[OPEN, owner[1]] -= 1
    owner[0], owner[1] = expert, kind


@kernel
def throttle_admits(state: Any, kind: Any) -> Any:
    """Whether a candidate of that kind may be prefetched now."""
    kinds = state.kinds
    due = kinds[MISSES, kind] >= 1 << kinds[APART, kind]
    return not state.registers[ENABLE] or kinds[ON, kind] != 0 or due


@kernel
def count_miss(state: Any, slot: Any, expert: Any, evicted: Any, unused: Any, busy: Any) -> None:
    """Count a demand that was given a slot; ``busy`` is the kind of a tile before it, or -1."""
    kinds, registers = state.kinds, state.registers
    age = (registers[EVICTIONS] - state.evicted[expert]) % registers[MODULUS]
    for kind in range(kinds.shape[1]):
        kinds[MISSES, kind] = min(kinds[MISSES, kind] + 1, (1 << 16) - 1)
        cost = registers[POLLUTION] if age < kinds[OPEN, kind] else 0
        if busy == kind:
            cost += registers[WAIT]
        _pay(state, kind, -cost)
    _note(state, slot, expert, -1, evicted, unused)


@kernel
def count_prefetch(
    state: Any, slot: Any, expert: Any, kind: Any, evicted: Any, unused: Any
) -> None:
    """Count a prefetch that was given a slot. It pays in advance, for the case of no use."""
    kinds, registers = state.kinds, state.registers
    if not kinds[ON, kind]:
        kinds[MISSES, kind] = 0
        kinds[APART, kind] = min(kinds[APART, kind] + 1, registers[LONGEST])
    _pay(state, kind, -registers[PRICE])
    _note(state, slot, expert, kind, evicted, unused)
    kinds[OPEN, kind] += 1


@kernel
def count_use(state: Any, slot: Any, tiles: Any) -> None:
    """Count a demand for a prefetch of which so many tiles had come."""
    kinds, registers = state.kinds, state.registers
    kind = state.owners[slot, 1]
    eighths = 8 * tiles // registers[TILES]
    kinds[OPEN, kind] -= 1
    kinds[APART, kind] = max(kinds[APART, kind] - 2, _SHORTEST)
    _pay(state, kind, (registers[USEFUL] * eighths >> 3) + registers[PRICE])


@kernel
def count_drop(state: Any, slot: Any) -> None:
    """Count a prefetch that was cancelled, or failed, before a demand came."""
    state.kinds[OPEN, state.owners[slot, 1]] -= 1


class Throttle:
    """Credit of each kind of prefetch; a kind that has none left may only probe.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Attributes
    ----------
    counted : :class:`ThrottleState`
        The throttle, in arrays that the compiled functions of this module work on.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self._experts = config.model.experts
        self.counted = create_throttle(config)
        self.register = register_by_name("throttle").reset or 0

    @property
    def enable(self) -> bool:
        """Whether kinds are switched off; False admits all."""
        return bool(self.counted.registers[ENABLE])

    @enable.setter
    def enable(self, enable: bool) -> None:
        self.counted.registers[ENABLE] = enable

    @property
    def register(self) -> int:
        """The register ``throttle``."""
        return self._register

    @register.setter
    def register(self, value: int) -> None:
        self._register = value
        set_weights(self.counted, value)

    def clear(self) -> None:
        """Forget everything, as after reset."""
        clear_throttle(self.counted)

    @property
    def state(self) -> int:
        """The register ``throttle_state``."""
        value = 0
        for kind, (credit, on) in enumerate(self.counted.kinds[[CREDIT, ON]].T.tolist()):
            value |= (credit & 0xFF) << 8 * kind | on << 24 + kind
        return value

    def admits(self, kind: PrefetchKind) -> bool:
        """Whether a candidate of that kind may be prefetched now."""
        return bool(throttle_admits(self.counted, int(kind)))

    def miss(
        self,
        layer: int,
        expert: int,
        *,
        slot: int,
        evicted: bool,
        unused: bool,
        waits_for: PrefetchKind | None = None,
    ) -> None:
        """Count a demand that was given a slot.

        It misses because of the prefetches of a kind if no more experts were evicted since its own
        eviction than such prefetches lie about: without them, they would still be there.
        ``waits_for`` is the kind of a tile that the demand finds before it.
        """
        busy = -1 if waits_for is None else int(waits_for)
        self._check(slot)
        key = layer * self._experts + expert
        count_miss(self.counted, slot, key, bool(evicted), bool(unused), busy)

    def prefetch(
        self,
        layer: int,
        expert: int,
        kind: PrefetchKind,
        *,
        slot: int,
        evicted: bool,
        unused: bool,
    ) -> None:
        """Count a prefetch that was given a slot. It pays in advance, for the case of no use."""
        self._check(slot)
        key = layer * self._experts + expert
        count_prefetch(self.counted, slot, key, int(kind), bool(evicted), bool(unused))

    def used(self, slot: int, *, returned: int | None = None) -> None:
        """Count a demand for a prefetch that had so many tiles; None stands for all."""
        self._check(slot)
        assert self.counted.owners[slot, 1] >= 0, f"slot {slot} holds no prefetch"
        tiles = int(self.counted.registers[TILES])
        count_use(self.counted, slot, tiles if returned is None else returned)

    def dropped(self, slot: int) -> None:
        """Count a prefetch that was cancelled, or failed, before a demand came."""
        self._check(slot)
        assert self.counted.owners[slot, 1] >= 0, f"slot {slot} holds no prefetch"
        count_drop(self.counted, slot)

    def _check(self, slot: int) -> None:
        slots = len(self.counted.owners)
        if not 0 <= slot < slots:
            raise ValueError(f"Slot must be between 0 and {slots - 1}, not {slot}")
