"""Order of the slots by their last touch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..._jit import kernel
from .state import (
    FILLS,
    LOCKED,
    NEWER,
    NEWEST,
    OLDER,
    OLDEST,
    PINS,
    ROUTE,
    TOUCHED,
    BufferState,
)

__all__ = ["Recency", "least_recent", "retire", "touch"]


@kernel
def _unlink(state: Any, slot: Any) -> None:
    """Take a slot out of the order."""
    slots, registers = state.slots, state.registers
    older, newer = slots[slot, OLDER], slots[slot, NEWER]
    if older >= 0:
        slots[older, NEWER] = newer
    else:
        registers[OLDEST] = newer
    if newer >= 0:
        slots[newer, OLDER] = older
    else:
        registers[NEWEST] = older


@kernel
def touch(state: Any, slot: Any) -> None:
    """Make a slot the most recent."""
    slots, registers = state.slots, state.registers
    slots[slot, TOUCHED] = registers[ROUTE]
    newest = registers[NEWEST]
    if newest == slot:
        return
    _unlink(state, slot)
    slots[slot, OLDER], slots[slot, NEWER] = newest, -1
    slots[newest, NEWER] = slot
    registers[NEWEST] = slot


@kernel
def retire(state: Any, slot: Any) -> None:
    """Make a slot the least recent, as if the route had not touched it."""
    slots, registers = state.slots, state.registers
    slots[slot, TOUCHED] = -1
    oldest = registers[OLDEST]
    if oldest == slot:
        return
    _unlink(state, slot)
    slots[slot, OLDER], slots[slot, NEWER] = -1, oldest
    slots[oldest, OLDER] = slot
    registers[OLDEST] = slot


@kernel
def least_recent(state: Any, untouched: Any) -> Any:
    """Least recent slot that may be taken, of those that the route has not touched if wanted so;
    -1 for none.
    """
    slots = state.slots
    slot = state.registers[OLDEST]
    while slot >= 0:
        # All that are more recent were touched in this route as well.
        if untouched and slots[slot, TOUCHED] == state.registers[ROUTE]:
            break
        if slots[slot, PINS] == 0 and slots[slot, FILLS] == 0 and slots[slot, LOCKED] == 0:
            return slot
        slot = slots[slot, NEWER]
    return -1


class Recency:
    """The order of the slots, and which of them the route has touched.

    Parameters
    ----------
    state : :class:`BufferState`
        Where they are kept.
    """

    def __init__(self, state: BufferState) -> None:
        self._state = state

    def touched(self, slot: int) -> bool:
        """Whether the slot was touched since the route began."""
        return bool(self._state.slots[slot, TOUCHED] == self._state.registers[ROUTE])

    def __iter__(self) -> Iterator[int]:
        """All slots, least recent first."""
        slot = int(self._state.registers[OLDEST])
        for _ in self._state.slots:
            if slot < 0:
                break
            yield slot
            slot = int(self._state.slots[slot, NEWER])
