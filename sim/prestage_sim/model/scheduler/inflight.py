"""Golden model of the in-flight table: what is being fetched, and which tile leaves next."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import FetchReason, PrefetchKind

__all__ = ["Copy", "Entry", "InflightTable"]


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
    ctx, deadline, kind
        Of a prefetch: whose it is, until when, and of which kind. A copy has no kind.
    tiles, address : :class:`int`
        Tiles in all, and the expert's address.
    issued, returned : :class:`int`
        Tiles that have left, and come back.
    promoted : :class:`int`
        Tiles below this number were requested for a prefetch.
    cancelled : :class:`bool`
        It gets no more tiles, unless a demand comes.
    shared : :class:`bool`
        Candidates of several decisions were for it.
    failure : pair of :class:`int` and :class:`FetchReason`, or None
        The first tile that failed, and why.
    """

    layer: int
    expert: int
    slot: int
    demand: bool
    waiters: list[int] = field(default_factory=list)
    copy: bool = False
    stream: bool = False
    ctx: int = 0
    deadline: int = 0
    kind: PrefetchKind | None = None
    tiles: int = 0
    address: int = 0
    issued: int = 0
    returned: int = 0
    promoted: int = 0
    cancelled: bool = False
    shared: bool = False
    failure: tuple[int, FetchReason] | None = None

    @property
    def more(self) -> bool:
        """Whether tiles are left to leave."""
        return self.issued < self.tiles and not self.cancelled and self.failure is None

    @property
    def under_way(self) -> int:
        """Tiles that have left and not come back."""
        return self.issued - self.returned

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way nor will be."""
        return not self.under_way and not self.more


class InflightTable:
    """Experts in flight, and the choice of the next tile: demands first.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Attributes
    ----------
    prefetch_tiles : :class:`int`
        Most prefetch tiles under way; 0 counts as 1.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self._config = config
        self.prefetch_tiles = 1
        self._entries: dict[int, Entry] = {}
        # Tags in the order in which entries took their places.
        self._order: list[int] = []
        self._prefetch_tiles = 0  # under way
        self._waits_kind: PrefetchKind | None = None
        self._streaming = False  # So were the prefetch tiles that left last.

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        """Tags of all entries, in no particular order."""
        return iter(self._entries)

    def __getitem__(self, tag: int) -> Entry:
        return self._entries[tag]

    @property
    def prefetching(self) -> int:
        """Entries that no demand waits for."""
        return sum(not entry.demand for entry in self._entries.values())

    @property
    def demand_room(self) -> bool:
        """Whether a demand may begin."""
        return len(self._entries) < self._config.inflight

    @property
    def prefetch_room(self) -> bool:
        """Whether a prefetch may, which leaves an entry for a demand."""
        config = self._config
        return (
            len(self._entries) < config.inflight - 1 and self.prefetching < config.prefetch_inflight
        )

    @property
    def waits_for(self) -> PrefetchKind | None:
        """Kind of the prefetch tile that left last, if one is under way."""
        return self._waits_kind if self._prefetch_tiles else None

    @property
    def cancelling(self) -> bool:
        """Whether an entry was cancelled and is there still."""
        return any(entry.cancelled for entry in self._entries.values())

    @property
    def spare(self) -> int | None:
        """The prefetch with tiles left that was begun last, None for none: what has got the least
        so far. What is fetched as a copy is none.
        """
        for tag in reversed(self._order):
            entry = self._entries[tag]
            if entry.more and not (entry.demand or entry.copy):
                return tag
        return None

    def begin(self, entry: Entry) -> None:
        """Begin a fetch, as the lowest entry that is free."""
        tag = next(t for t in range(self._config.inflight) if t not in self._entries)
        entry.tiles = self._config.layer_tiles[entry.layer]
        entry.promoted = 0 if entry.demand else entry.tiles
        self._entries[tag] = entry
        self._order.append(tag)

    def filling(self, slot: int) -> Entry:
        """The entry that fills a slot."""
        return next(entry for entry in self._entries.values() if entry.slot == slot)

    def wait(self, entry: Entry, ctx: int) -> None:
        """A demand waits for the entry, too; what is left of a prefetch is fetched as a demand."""
        insort(entry.waiters, ctx)
        if not entry.demand:
            tag = next(tag for tag, each in self._entries.items() if each is entry)
            self._order.remove(tag)
            self._order.append(tag)
            entry.promoted = entry.issued
        entry.demand, entry.cancelled = True, False

    def next_tile(self) -> tuple[int, Entry, int] | None:
        """Take the tile that leaves next: tag, entry and tile; None while none may.

        Tiles of demands leave in the order in which the entries became demands. One of a prefetch
        leaves only if no demand has tiles left and fewer than ``prefetch_tiles`` are under way;
        those are all of prefill chunks, or all not, since they share a channel.
        """
        wanting = [tag for tag in self._order if self._entries[tag].more]
        demands = [tag for tag in wanting if self._entries[tag].demand]
        if demands:
            wanting = demands
        elif self._prefetch_tiles >= max(1, self.prefetch_tiles):
            return None
        if not wanting:
            return None
        tag = wanting[0]
        entry = self._entries[tag]
        if not entry.demand:
            other = entry.stream != self._streaming and self._config.dma_channels > 2
            if self._prefetch_tiles and other:
                return None
            self._prefetch_tiles += 1
            self._waits_kind, self._streaming = entry.kind, entry.stream
        tile = entry.issued
        entry.issued += 1
        return tag, entry, tile

    def complete(self, tag: int, tile: int, reason: FetchReason) -> bool:
        """A tile has come back, or failed; whether it was requested for a demand."""
        entry = self._entries[tag]
        entry.returned += 1
        if reason != FetchReason.OK and entry.failure is None:
            entry.failure = tile, reason
        demand = tile >= entry.promoted
        self._prefetch_tiles -= not demand
        return demand

    def free(self, tag: int) -> None:
        """An entry is done."""
        del self._entries[tag]
        self._order.remove(tag)
