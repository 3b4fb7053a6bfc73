"""What both golden schedulers share: lookups, what is counted, and what is prefetched."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import NamedTuple, Protocol

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import (
    BufferCode,
    BufferOp,
    ErrorCode,
    PrefetchKind,
    RescanCode,
    Source,
)

from ..dma.checksum import Checksums
from ..dma.settings import Settings
from ..stats.counters import ChannelCounters
from .inflight import Copy, Entry
from .queue import Candidate, CandidateQueue, enters
from .rescan import create_rescans, next_rescan, rescanned, rest, wake
from .statistics import PrefetchStatistics
from .throttle import Throttle, kind_of

__all__ = ["Buffer", "Event", "Ready", "Result", "SchedulerBase"]


class Ready(NamedTuple):
    """The slot holds this expert until the layer is released."""

    ctx: int
    layer: int
    expert: int
    slot: int


class Event(NamedTuple):
    """A demand that could not be served."""

    code: ErrorCode
    ctx: int
    layer: int
    expert: int
    address: int


class Result(Protocol):
    """What the buffer answers."""

    @property
    def code(self) -> BufferCode: ...
    @property
    def slot(self) -> int: ...
    @property
    def prefetched(self) -> bool: ...
    @property
    def evicted(self) -> bool: ...
    @property
    def evicted_unused(self) -> bool: ...
    @property
    def polluted(self) -> bool: ...


class _Found(Protocol):
    @property
    def code(self) -> RescanCode: ...
    @property
    def layer(self) -> int: ...
    @property
    def expert(self) -> int: ...
    @property
    def value(self) -> int: ...
    @property
    def ahead(self) -> int: ...


class Buffer(Protocol):
    """What the scheduler needs of the golden expert buffer."""

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
    ) -> Result:
        """Do one operation."""

    def rescan(self, ctx: int, *, near: bool, ahead: int, least: int, cutoff_layer: int) -> _Found:
        """Look for the missing expert that is worth a prefetch most."""

    def values(self, kind: int, ctx: int, layer: int, beat: int, values: Sequence[int]) -> None:
        """Take what the predictor says of some experts of a layer."""

    def write_expert(self, slot: int, data: bytes) -> None:
        """Write all bytes of an expert."""


class SchedulerBase:
    """State and rules of a scheduler, whenever its transfers are done.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    buffer : :class:`Buffer`
        Golden expert buffer.
    counters : mutable mapping of :class:`str` to :class:`int`
        Counters by name; those of the stages 3, 4 and 5 are counted, the bytes counters in bytes.
    checksums : :class:`Checksums` or None
        Checksums of experts; None stands for none.

    Attributes
    ----------
    bases : list of :class:`int`
        Address of expert 0 of layer 0, for each part of experts.
    enable : :class:`bool`
        False drops the predictor's candidates.
    cutoff_layer : :class:`int`
        Candidates for this layer and those above are dropped.
    rescan_ahead, rescan_least : :class:`int`
        The registers of these names. Unless ``rescan_ahead`` is 0, :meth:`rescan` prefetches in
        place of the predictor's candidates, which are dropped.
    alone, cancel_enable : :class:`bool`
        Bits 2 and 4 of the register ``control``.
    prefetch_tiles : :class:`int`
        The register of that name.
    channels : list of :class:`Channel`
        Active settings of the DMA engine's channels.
    counters : mutable mapping
        As above.
    throttle : :class:`Throttle`
        Drops candidates of kinds that cost more than they save.
    statistics : :class:`PrefetchStatistics`
        What became of prefetches, by layer and kind.
    streaming, gathering : list of :class:`bool`
        Contexts that go through a prefill chunk; through any chunk.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(
        self,
        config: DeviceConfig,
        *,
        buffer: Buffer,
        counters: MutableMapping[str, int],
        checksums: Checksums | None = None,
    ) -> None:
        require_config(config)
        self.config = config
        self.checksums = Checksums(config) if checksums is None else checksums
        self.buffer = buffer
        self.counters = counters
        self.bases = list(config.part_bases())
        self.enable = True
        self.cutoff_layer = 255
        self.rescan_ahead = self.rescan_least = 0
        self.alone = self.cancel_enable = False
        self.prefetch_tiles = 1
        self.channels = Settings(config).active
        self.throttle = Throttle(config)
        self.statistics = PrefetchStatistics(config)
        self.streaming = [False] * config.contexts
        self.gathering = [False] * config.contexts
        self.channel_counters = ChannelCounters(config)
        self._routes = [0] * config.contexts
        self._queue = CandidateQueue(config, routes=self._routes)
        self._rescans = create_rescans(config.contexts)

    @property
    def expert_base(self) -> int:
        """Address of expert 0 of layer 0: of its first part, where it has several."""
        return self.bases[0]

    @expert_base.setter
    def expert_base(self, base: int) -> None:
        self.bases[0] = base

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return True

    @property
    def command_room(self) -> int:
        """Commands that there is room for: as many as in the RTL."""
        return max(16, 2 * self.config.model.top_k)

    @property
    def copy_room(self) -> int:
        """Copies that there is room for: as many as in the RTL."""
        return 4 * self.config.replicas

    def wake(self, ctx: int = -1) -> None:
        """Values of a context have come; of -1, a slot may be taken again."""
        if self.enable and self.rescan_ahead:
            wake(self._rescans, ctx)

    def clear(self) -> None:
        """Forget what was counted, along with the buffer."""
        self.throttle.clear()
        self._rescans = create_rescans(self.config.contexts)

    def _push(self, candidates: Sequence[Candidate]) -> None:
        """Let those candidates into the queue that may enter."""
        enable = self.enable and self.rescan_ahead == 0
        for candidate in candidates:
            if enters(candidate[4], candidate[1], enable=enable, cutoff_layer=self.cutoff_layer):
                self._queue.push(candidate)
        self._count_queue()

    def _take(self) -> Candidate | None:
        """The candidate that goes next."""
        best = self._queue.take()
        self._count_queue()
        return best

    def _count_queue(self) -> None:
        queue = self._queue
        self.counters["prefetch_stale"] += queue.stale
        self.counters["prefetch_overflow"] += queue.overflow
        queue.stale = queue.overflow = 0

    def _rescan(self) -> tuple[Entry | None, bool]:
        """Ask for a rescan: the prefetch that comes of it, and whether anybody was awake."""
        ctx = int(next_rescan(self._rescans))
        if ctx < 0:
            return None, False
        far = self.throttle.admits(PrefetchKind.FAR)
        found = self.buffer.rescan(
            ctx,
            near=self.throttle.admits(PrefetchKind.NEAR),
            ahead=self.rescan_ahead if far else min(1, self.rescan_ahead),
            least=self.rescan_least,
            cutoff_layer=self.cutoff_layer,
        )
        rescanned(self._rescans, ctx, found.code == RescanCode.FOUND)
        if found.code != RescanCode.FOUND:
            return None, True
        deadline = (self._routes[ctx] + found.ahead) % 256
        best = ctx, found.layer, found.expert, found.value, Source.PREDICTOR, deadline
        entry = self._prefetch(best, strict=True)
        if entry is None:
            rest(self._rescans, ctx)
        return entry, True

    def _prefetch(self, candidate: Candidate, *, strict: bool = False) -> Entry | None:
        """Look a candidate up: what is to be fetched, None if it was given no slot, for which a
        strict one has to be worth more than what leaves it.
        """
        counters = self.counters
        ctx, layer, expert, score, source, deadline = candidate
        kind = kind_of(source, deadline, routes=self._routes[ctx])
        if not self.throttle.admits(kind):
            counters["prefetch_throttled"] += 1
            return None
        result = self.buffer.request(
            BufferOp.PREFETCH, ctx=ctx, layer=layer, expert=expert, value=score, last=strict
        )
        if result.code == BufferCode.NO_SLOT:
            counters["prefetch_no_slot"] += 1
        elif result.code == BufferCode.OUTBID:
            counters["prefetch_outbid"] += 1
        elif result.code != BufferCode.ALLOCATED:
            counters["prefetch_redundant"] += 1
            if result.code == BufferCode.FILLING:
                self._share(result.slot, ctx, deadline)
        if result.code != BufferCode.ALLOCATED:
            return None
        counters["prefetch_issued"] += 1
        self._count_eviction(result)
        for told in (self.throttle, self.statistics):
            told.prefetch(
                layer,
                expert,
                kind,
                slot=result.slot,
                evicted=result.evicted,
                unused=result.evicted_unused,
            )
        return Entry(
            layer,
            expert,
            result.slot,
            False,
            stream=kind == PrefetchKind.NEAR and self.streaming[ctx],
            ctx=ctx,
            deadline=deadline,
            kind=kind,
        )

    def _share(self, slot: int, ctx: int, deadline: int) -> None:
        """A candidate finds its expert in flight."""

    def _unlock(self, ctx: int, layer: int, expert: int) -> list[Ready | Event | Copy]:
        """Unlock an expert, and give the answer, if any."""
        result = self.buffer.request(BufferOp.UNLOCK, layer=layer, expert=expert)
        self.wake()
        if result.code == BufferCode.REFUSED:
            return [Event(ErrorCode.NOT_LOCKED, ctx, layer, expert, 0)]
        return []

    def _copy_commands(
        self, ctx: int, layer: int, expert: int, copies: int
    ) -> list[tuple[int, int, int, int, bool]]:
        """Copies to give back, from the last one down, and then to hold: context, layer, expert,
        number, and whether it is held.
        """
        least = copies if copies > 1 else 0
        back = [
            (ctx, layer, expert, n, False) for n in reversed(range(least, self.config.replicas))
        ]
        return back + [(ctx, layer, expert, number, True) for number in range(least)]

    def _copied(self, layer: int, expert: int, result: Result) -> Entry:
        """A copy was given a slot: what is to be fetched."""
        self._count_eviction(result)
        slot, evicted, unused = result.slot, result.evicted, result.evicted_unused
        self.throttle.copied(layer, expert, slot=slot, evicted=evicted, unused=unused)
        self.statistics.copied(layer, expert, slot=slot, evicted=evicted, unused=unused)
        return Entry(layer, expert, slot, False, copy=True)

    def _no_copy(self, ctx: int, layer: int, expert: int, code: BufferCode) -> Event:
        """A copy can't be held."""
        refused = ErrorCode.NOT_HELD if code == BufferCode.REFUSED else ErrorCode.NO_SLOT
        return Event(refused, ctx, layer, expert, 0)

    def _used(self, result: Result, *, returned: int | None = None) -> None:
        """Count a demand or a lock that finds a prefetch, with so many of its tiles; None: all."""
        if result.prefetched:
            self.counters["useful"] += 1
            self.throttle.used(result.slot, returned=returned)
            self.statistics.used(result.slot, returned=returned)

    def _missed(
        self, layer: int, expert: int, result: Result, *, waits_for: PrefetchKind | None = None
    ) -> None:
        """A demand or a lock was given a slot; ``waits_for`` is the kind of a tile before it."""
        slot, evicted, unused = result.slot, result.evicted, result.evicted_unused
        self.throttle.miss(
            layer, expert, slot=slot, evicted=evicted, unused=unused, waits_for=waits_for
        )
        self.statistics.miss(
            layer, expert, slot=slot, evicted=evicted, unused=unused, polluted=result.polluted
        )

    def _dropped(self, slot: int) -> None:
        """A prefetch failed, or was given up."""
        self.throttle.dropped(slot)
        self.statistics.dropped(slot)

    def _rest(self) -> None:
        """A prefetch failed: its expert is missing again, and would be found at once."""
        rest(self._rescans, -1)

    def _count_eviction(self, result: Result) -> None:
        if result.evicted:
            self.counters["evictions"] += 1
            self.counters["useless"] += result.evicted_unused
