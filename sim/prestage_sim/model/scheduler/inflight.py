"""Golden model of an entry of the in-flight table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Copy", "Entry"]


class Copy(NamedTuple):
    """The slot holds this expert until fewer copies are asked for."""

    ctx: int
    layer: int
    expert: int
    copy: int
    slot: int


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
    copy : :class:`bool`
        Whether it is fetched for the sake of copies: no prefetch that the throttle counts.
    stream : :class:`bool`
        It is a prefetch of a prefill chunk's.
    """

    layer: int
    expert: int
    slot: int
    demand: bool
    waiters: list[int] = field(default_factory=list)
    copy: bool = False
    stream: bool = False
