"""Order of the slots by their last touch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

__all__ = ["Recency"]


class Recency:
    """Keep every slot in the order of its last touch, and know which the route has touched.

    Parameters
    ----------
    slots : :class:`int`
        Slots (S).
    """

    def __init__(self, *, slots: int) -> None:
        self.slots = slots
        self.clear()

    def clear(self) -> None:
        """Make slot 0 the least recent, the last slot the most; begin a route that touched none."""
        self._order: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.slots))
        self._route = 0
        self._touched_in = [-1] * self.slots

    def begin_route(self) -> None:
        """Count all slots as untouched."""
        self._route += 1

    def touch(self, slot: int) -> None:
        """Make a slot the most recent."""
        self._order.move_to_end(slot)
        self._touched_in[slot] = self._route

    def retire(self, slot: int) -> None:
        """Make a slot the least recent, as if the route had not touched it."""
        self._order.move_to_end(slot, last=False)
        self._touched_in[slot] = -1

    def touched(self, slot: int) -> bool:
        """Whether the slot was touched since the route began."""
        return self._touched_in[slot] == self._route

    def __iter__(self) -> Iterator[int]:
        """All slots, least recent first."""
        return iter(self._order)
