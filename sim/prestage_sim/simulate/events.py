"""What happened when, for timelines and Chrome traces."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["Event", "EventKind", "Recorder"]


class EventKind(IntEnum):
    """What took place."""

    ATTENTION = 0  # a layer until its routing is known; expert is -1
    COMPUTE = 1  # one expert of a layer
    DEMAND_TILE = 2  # a tile that a layer waits for is on its way
    PREFETCH_TILE = 3  # a tile that no layer asked for yet
    STALL = 4  # the layer waits for this expert
    EVICT = 5  # an expert leaves its slot; start = end
    CANCEL = 6  # a prefetch on its way is given up; start = end
    DRAFT = 7  # a draft model works before the first layer; layer and expert are -1


class Event(NamedTuple):
    """One thing that happened.

    Parameters
    ----------
    kind : :class:`EventKind`
        What.
    start, end : :class:`float`
        When, in seconds of simulated time.
    token, layer, expert : :class:`int`
        Of which step, a token of the trace where they go one by one, and which expert it is about;
        -1 where there is none.
    link : :class:`int`
        Which link carries a tile; -1 for others.
    """

    kind: EventKind
    start: float
    end: float
    token: int
    layer: int
    expert: int
    link: int


class Recorder:
    """Collects the events of a stretch of tokens.

    Parameters
    ----------
    first, tokens : :class:`int`
        First step to record, a token of the trace where they go one by one, and how many.
    most : :class:`int`
        Events after which no more are kept.

    Attributes
    ----------
    events : list of :class:`Event`
        By start.
    """

    def __init__(self, *, first: int = 0, tokens: int = 8, most: int = 1_000_000) -> None:
        if first < 0 or tokens < 1 or most < 1:
            raise ValueError(
                "Recorder must start at token 0 or later, and keep at least one token and event,"
                f" not {first}, {tokens} and {most}"
            )
        self.first, self.tokens, self.most = first, tokens, most
        self.events: list[Event] = []
