"""Golden model of an entry of the in-flight table."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Entry"]


@dataclass
class Entry:
    """An expert that is being fetched.

    Attributes
    ----------
    layer, expert, slot : :class:`int`
        What is fetched, and where to.
    demand : :class:`bool`
        Class of its tiles.
    waiters : list of :class:`int`
        Contexts that wait for it, ascending.
    stream : :class:`bool`
        It is a prefetch of a prefill chunk's.
    """

    layer: int
    expert: int
    slot: int
    demand: bool
    waiters: list[int] = field(default_factory=list)
    stream: bool = False
