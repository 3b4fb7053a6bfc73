"""Which expert is in which slot, what each slot holds, and what each context has pinned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableSet, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig

from .state import (
    BY_COPY,
    BY_LOCK,
    EMPTY,
    FILLING,
    FILLS,
    LOCKED,
    MARK,
    NUMBER,
    OWNER,
    PINS,
    PREFETCHED,
    PUSHED,
    READY,
    SLOT,
    STATE,
    VALUE,
    BufferState,
)

__all__ = ["EMPTY", "FILLING", "READY", "Directory", "SlotState"]


def _field(column: int, kind: type, description: str) -> property:
    """Attribute of a slot that lies in a column of the slots' table."""

    def read(self: SlotState) -> Any:
        return kind(self._table[self.number, column])

    def write(self: SlotState, value: int) -> None:
        self._table[self.number, column] = value

    return property(read, write, doc=description)


def _flag(column: int, bit: int, description: str) -> property:
    """Attribute of a slot that is one bit of a column of the slots' table."""

    def read(self: SlotState) -> bool:
        return bool(self._table[self.number, column] & bit)

    def write(self: SlotState, value: bool) -> None:
        self._table[self.number, column] &= ~bit
        self._table[self.number, column] |= bit * bool(value)

    return property(read, write, doc=description)


class SlotState:
    """What a slot holds.

    Parameters
    ----------
    state : :class:`BufferState`
        Where it is kept.
    number : :class:`int`
        Number of the slot.

    Attributes
    ----------
    owner : :class:`int`
        Key of the expert, see :meth:`Directory.key`; -1 for none.
    filling : :class:`bool`
        Whether a transfer into the slot is in flight.
    prefetched : :class:`bool`
        Whether the expert came by a prefetch and was not demanded since.
    pins : :class:`int`
        Contexts that hold the slot.
    locked : :class:`bool`
        Whether the expert stays until it is unlocked.
    value, mark : :class:`int`
        Of a prefetch: its confidence, and the visits of its layer at that time.
    held : :class:`bool`
        Whether it is a copy, or an expert that is held for the sake of its copies.
    copy : :class:`int`
        Number of the copy, 0 for the expert itself.
    links : dict of :class:`int` to :class:`int`
        Slot of each copy of the expert that is here itself.
    """

    __slots__ = ("_copies", "_table", "number")

    def __init__(self, state: BufferState, number: int) -> None:
        self._table = state.slots
        self._copies = state.copies
        self.number = number

    @property
    def copy(self) -> int:
        """Number of the copy, 0 for the expert itself."""
        return int(self._copies[self.number, NUMBER])

    @copy.setter
    def copy(self, number: int) -> None:
        self._copies[self.number, NUMBER] = number

    @property
    def links(self) -> dict[int, int]:
        """Slot of each copy of the expert that is here itself."""
        row = self._copies[self.number].tolist()
        return {number: slot for number, slot in enumerate(row) if number > NUMBER and slot >= 0}

    @links.setter
    def links(self, links: dict[int, int]) -> None:
        self._copies[self.number, NUMBER + 1 :] = -1
        for number, slot in links.items():
            self._copies[self.number, number] = slot

    owner = _field(OWNER, int, "Key of the expert, -1 for none.")
    filling = _field(FILLS, bool, "Whether a transfer into the slot is in flight.")
    prefetched = _field(PREFETCHED, bool, "Whether a prefetch brought it and nobody came for it.")
    pins = _field(PINS, int, "Contexts that hold the slot.")
    locked = _flag(LOCKED, BY_LOCK, "Whether the expert stays until it is unlocked.")
    held = _flag(LOCKED, BY_COPY, "Whether it is a copy, or held for the sake of copies.")
    value = _field(VALUE, int, "Confidence of the prefetch.")
    mark = _field(MARK, int, "Visits of its layer when it was prefetched.")


class _Column(Sequence[int]):
    """A column of the experts' table, by key."""

    def __init__(self, state: BufferState, column: int) -> None:
        self._column = state.experts[:, column]

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, key: Any) -> Any:
        return self._column[key].tolist()

    def __setitem__(self, key: int, value: int) -> None:
        self._column[key] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class _Keys(MutableSet[int]):
    """The experts that have a flag in the experts' table."""

    def __init__(self, state: BufferState, column: int) -> None:
        self._column = state.experts[:, column]

    def __contains__(self, key: object) -> bool:
        return bool(self._column[key])  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[int]:
        return iter(self._column.nonzero()[0].tolist())

    def __len__(self) -> int:
        return int(self._column.sum())

    def add(self, value: int) -> None:
        self._column[value] = 1

    def discard(self, value: int) -> None:
        self._column[value] = 0


class _Pins(Mapping[tuple[int, int], dict[int, int]]):
    """Slot by index, of each context and layer that has pinned any."""

    def __init__(self, state: BufferState) -> None:
        self._table = state.pins

    def __getitem__(self, key: tuple[int, int]) -> dict[int, int]:
        row = self._table[key].tolist()
        return {index: slot for index, slot in enumerate(row) if slot >= 0}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((ctx, layer) for ctx, layer in np.argwhere(self._held()).tolist())

    def __len__(self) -> int:
        return int(self._held().sum())

    def _held(self) -> NDArray[np.bool_]:
        """Whether a context has pinned anything of a layer."""
        held: NDArray[np.bool_] = np.any(self._table >= 0, axis=2)
        return held

    def clear(self) -> None:
        """Forget all of them; the slots still count their pins."""
        self._table[:] = -1


class Directory:
    """The state of every expert and of every slot, and the pin lists.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts, slots and contexts are listed.
    state : :class:`BufferState`
        Where they are kept; what is set here is set there.

    Attributes
    ----------
    state : sequence of :class:`int`
        ``EMPTY``, ``FILLING`` or ``READY`` of each expert, by key.
    slot_of : sequence of :class:`int`
        Slot of each expert that is not empty, by key.
    evicted_by_prefetch : set of :class:`int`
        Keys of the experts that a prefetch evicted, until they are allocated again.
    slots : list of :class:`SlotState`
        State of each slot.
    pins : mapping of (:class:`int`, :class:`int`) to dict
        For each context and layer that has any: the slot pinned at each index.
    """

    def __init__(self, config: DeviceConfig, state: BufferState) -> None:
        self.config = config
        self.state = _Column(state, STATE)
        self.slot_of = _Column(state, SLOT)
        self.evicted_by_prefetch = _Keys(state, PUSHED)
        self.slots = [SlotState(state, number) for number in range(config.slots)]
        self.pins = _Pins(state)

    def key(self, layer: int, expert: int) -> int:
        """Number of an expert among those of all layers.

        Raises
        ------
        ValueError
            If the layer or the expert is out of range.
        """
        model = self.config.model
        if not 0 <= layer < model.layers:
            raise ValueError(f"Layer must be between 0 and {model.layers - 1}, not {layer}")
        if not 0 <= expert < model.experts:
            raise ValueError(f"Expert must be between 0 and {model.experts - 1}, not {expert}")
        return layer * model.experts + expert
