"""Golden model of the scheduler at drained pace: each message is served before the next comes."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import NamedTuple, Protocol

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import (
    BufferCode,
    BufferOp,
    ErrorCode,
    FetchReason,
    PrefetchKind,
    RescanCode,
    Source,
)

from ..dma.axi import BusError, Memory
from ..dma.checksum import Checksums
from ..dma.dma import DMA
from ..dma.settings import Channel, Settings
from ..link.mover import Copies
from ..stats.counters import ChannelCounters
from .inflight import Copy, Entry
from .queue import Candidate, CandidateQueue, enters
from .rescan import create_rescans, next_rescan, rescanned, rest, wake
from .statistics import PrefetchStatistics
from .throttle import Throttle, kind_of

__all__ = ["Buffer", "Event", "Memory", "Ready", "Scheduler"]


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


class _Result(Protocol):
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
    ) -> _Result:
        """Do one operation."""

    def rescan(self, ctx: int, *, near: bool, ahead: int, least: int, cutoff_layer: int) -> _Found:
        """Look for the missing expert that is worth a prefetch most."""

    def write_expert(self, slot: int, data: bytes) -> None:
        """Write all bytes of an expert."""


_DEMAND, _PREFETCH = BufferOp.DEMAND, BufferOp.PREFETCH
_FILL, _RELEASE = BufferOp.FILL, BufferOp.RELEASE
_LOCK, _UNLOCK = BufferOp.LOCK, BufferOp.UNLOCK
_COPY = BufferOp.COPY
_RESIDENT = BufferCode.RESIDENT
_ALLOCATED, _NO_SLOT = BufferCode.ALLOCATED, BufferCode.NO_SLOT
_OUTBID, _REFUSED = BufferCode.OUTBID, BufferCode.REFUSED


class Scheduler:
    """Serve demands, then candidates, with every transfer done as soon as it may be.

    The counters and the buffer's state are those of the RTL at drained pace, with candidates one at
    a time (control bit 2). The slot that a failing fetch frees is the next to be taken; when that
    is hangs on time, so that with bus errors it is the model's as long as a decision's demands are
    all looked up before the first of them fails, and with the policy LRU: others count each time
    that a demand asks for a slot until it gets one.
    Three things are not modelled because drained pace never shows them: demands that find a
    prefetch in flight or wait for its tile, prefetches that are given up, and the budget, which has
    no effect with control bit 2. Candidates that are
    offered together are all in the queue before the first of them is served, as in the RTL while
    ``hold`` is 1.

    Order of answers: the RTL sends `Ready` and `Event` on separate streams, so that only the order
    within each kind counts. A resident expert is answered when it is looked up, a missing one when
    it has arrived, so that a fast memory may put a missing expert's answer before that of a
    resident expert which comes later in the decision. Allowed are therefore all orders in which the
    resident experts of a decision keep their order, so do the missing ones, and an expert that was
    looked up after a refused one comes after all missing ones before it. :meth:`demand` gives the
    order of a slow memory.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    buffer : :class:`Buffer`
        Golden expert buffer.
    memory : :class:`Memory` or :class:`Copies`
        Memory that holds the experts; with a host mover who copies them.
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
    channels : list of :class:`Channel`
        Active settings of the DMA engine's channels.
    counters : mutable mapping
        As above.
    throttle : :class:`Throttle`
        Drops candidates of kinds that cost more than they save.
    statistics : :class:`PrefetchStatistics`
        What became of prefetches, by layer and kind.
    streaming : list of :class:`bool`
        Contexts that go through a prefill chunk.

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
        memory: Memory | Copies,
        counters: MutableMapping[str, int],
        checksums: Checksums | None = None,
    ) -> None:
        require_config(config)
        if isinstance(memory, Memory) != (config.mover == "dma"):
            raise TypeError(f"Memory must suit the mover {config.mover!r}, not be {memory!r}")
        self.config = config
        self.checksums = Checksums(config) if checksums is None else checksums
        self.buffer = buffer
        self.memory = memory
        self.counters = counters
        self.bases = list(config.part_bases())
        self.enable = True
        self.cutoff_layer = 255
        self.rescan_ahead = self.rescan_least = 0
        self.channels = Settings(config).active
        self.throttle = Throttle(config)
        self.statistics = PrefetchStatistics(config)
        self.streaming = [False] * config.contexts
        self._dma = DMA(config)
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

    def demand(
        self, ctx: int, layer: int, experts: Sequence[int], *, repeat: bool = False
    ) -> list[Ready | Event]:
        """Serve one routing decision and give the answers, one for each expert.

        Parameters
        ----------
        ctx, layer : :class:`int`
            Whose decision.
        experts : sequence of :class:`int`
            The experts in the router's order, without repetition.
        repeat : :class:`bool`
            True if the context's last decision in this token was of this layer too: candidates for
            the layer after it have as much time as before.
        """
        request = self.buffer.request
        counters = self.counters
        if not repeat:
            self._routes[ctx] = (self._routes[ctx] + 1) % 256
        answers: list[Ready | Event] = []
        inflight: list[Entry] = []
        for index, expert in enumerate(experts):
            result = request(_DEMAND, ctx=ctx, layer=layer, expert=expert, index=index)
            while result.code == _NO_SLOT and inflight:
                answers += self._fill(inflight.pop(0))
                result = request(_DEMAND, ctx=ctx, layer=layer, expert=expert, index=index)
            counters["demands"] += 1
            if result.prefetched:
                counters["useful"] += 1
                self.throttle.used(result.slot)
                self.statistics.used(result.slot)
            counters["pollution"] += result.polluted
            self._count_eviction(result)
            if result.code == _RESIDENT:
                counters["hits"] += 1
                answers.append(Ready(ctx, layer, expert, result.slot))
            elif result.code == _ALLOCATED:
                counters["misses"] += 1
                self._missed(layer, expert, result)
                inflight.append(Entry(layer, expert, result.slot, True, [ctx]))
                self._begin(inflight[-1])
            elif result.code == _NO_SLOT:
                counters["refused"] += 1
                answers.append(Event(ErrorCode.NO_SLOT, ctx, layer, expert, 0))
            else:
                raise ValueError(
                    f"Experts of a decision must be distinct, but {expert} repeats in {experts}"
                )
        for entry in inflight:
            answers += self._fill(entry)
        return answers

    def offer(self, candidates: Sequence[tuple[int, int, int, int, int, int]]) -> None:
        """Prefetch candidates, best first: (context, layer, expert, score, source, deadline)."""
        counters = self.counters
        queue = self._queue
        enable = self.enable and self.rescan_ahead == 0
        for candidate in candidates:
            if enters(candidate[4], candidate[1], enable=enable, cutoff_layer=self.cutoff_layer):
                queue.push(candidate)
        while (best := queue.take()) is not None:
            self._prefetch(best)
        counters["prefetch_stale"] += queue.stale
        counters["prefetch_overflow"] += queue.overflow
        queue.stale = queue.overflow = 0

    def wake(self, ctx: int = -1) -> None:
        """Values of a context have come; of -1, a slot may be taken again."""
        if self.enable and self.rescan_ahead:
            wake(self._rescans, ctx)

    def rescan(self) -> None:
        """Prefetch what the buffer's own values say, until nobody is awake."""
        while (ctx := int(next_rescan(self._rescans))) >= 0:
            far = self.throttle.admits(PrefetchKind.FAR)
            found = self.buffer.rescan(
                ctx,
                near=self.throttle.admits(PrefetchKind.NEAR),
                ahead=self.rescan_ahead if far else min(1, self.rescan_ahead),
                least=self.rescan_least,
                cutoff_layer=self.cutoff_layer,
            )
            rescanned(self._rescans, ctx, found.code == RescanCode.FOUND)
            if found.code == RescanCode.FOUND:
                deadline = (self._routes[ctx] + found.ahead) % 256
                best = ctx, found.layer, found.expert, found.value, Source.PREDICTOR, deadline
                if not self._prefetch(best, strict=True):
                    rest(self._rescans, ctx)

    def _prefetch(self, candidate: Candidate, *, strict: bool = False) -> bool:
        """Prefetch an expert whole; False if it was given no slot, for which a strict one has to
        be worth more than what leaves it.
        """
        counters = self.counters
        ctx, layer, expert, score, source, deadline = candidate
        kind = kind_of(source, deadline, routes=self._routes[ctx])
        if not self.throttle.admits(kind):
            counters["prefetch_throttled"] += 1
            return False
        result = self.buffer.request(
            _PREFETCH, ctx=ctx, layer=layer, expert=expert, value=score, last=strict
        )
        if result.code == _NO_SLOT:
            counters["prefetch_no_slot"] += 1
        elif result.code == _OUTBID:
            counters["prefetch_outbid"] += 1
        elif result.code != _ALLOCATED:
            counters["prefetch_redundant"] += 1
        if result.code != _ALLOCATED:
            return False
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
        stream = kind == PrefetchKind.NEAR and self.streaming[ctx]
        self._fill(Entry(layer, expert, result.slot, False, stream=stream))
        return True

    def release(self, ctx: int, layer: int) -> None:
        """Release a layer."""
        self.buffer.request(_RELEASE, ctx=ctx, layer=layer)
        self.wake()
        self.rescan()

    def lock(self, ctx: int, layer: int, expert: int) -> list[Ready | Event]:
        """Keep an expert until it is unlocked, and give the answer: it is fetched if it is missing.

        No slot for it: either none may be taken, or as many as may be are locked.
        """
        result = self.buffer.request(_LOCK, layer=layer, expert=expert)
        if result.code == _NO_SLOT:
            return [Event(ErrorCode.NO_SLOT, ctx, layer, expert, 0)]
        counters = self.counters
        counters["locks"] += 1
        if result.prefetched:
            counters["useful"] += 1
            self.throttle.used(result.slot)
            self.statistics.used(result.slot)
        if result.code == _RESIDENT:
            return [Ready(ctx, layer, expert, result.slot)]
        counters["lock_misses"] += 1
        self._count_eviction(result)
        self._missed(layer, expert, result)
        return self._fill(Entry(layer, expert, result.slot, True, [ctx]))

    def unlock(self, ctx: int, layer: int, expert: int) -> list[Ready | Event]:
        """Let an expert be evicted again; an event if it was not locked."""
        result = self.buffer.request(_UNLOCK, layer=layer, expert=expert)
        self.wake()
        self.rescan()
        if result.code == _REFUSED:
            return [Event(ErrorCode.NOT_LOCKED, ctx, layer, expert, 0)]
        return []

    def replicate(
        self, ctx: int, layer: int, expert: int, copies: int
    ) -> list[Ready | Event | Copy]:
        """Hold so many copies of an expert, and give one answer for each; 1 gives all back.

        What is more than wanted is given back first, from the last copy down.
        """
        request = self.buffer.request
        least = copies if copies > 1 else 0
        for number in reversed(range(least, self.config.replicas)):
            request(_COPY, layer=layer, expert=expert, value=number)
        answers: list[Ready | Event | Copy] = []
        for number in range(least):
            result = request(_COPY, layer=layer, expert=expert, value=number, last=True)
            if result.code == _RESIDENT:
                answers.append(Copy(ctx, layer, expert, number, result.slot))
            elif result.code == _ALLOCATED:
                self._count_eviction(result)
                slot, evicted, unused = result.slot, result.evicted, result.evicted_unused
                self.throttle.copied(layer, expert, slot=slot, evicted=evicted, unused=unused)
                self.statistics.copied(layer, expert, slot=slot, evicted=evicted, unused=unused)
                [answer] = self._fill(Entry(layer, expert, result.slot, False, [ctx], copy=True))
                good = isinstance(answer, Ready)
                answers.append(Copy(ctx, layer, expert, number, result.slot) if good else answer)
            else:
                code = ErrorCode.NOT_HELD if result.code == _REFUSED else ErrorCode.NO_SLOT
                answers.append(Event(code, ctx, layer, expert, 0))
        return answers

    def clear(self) -> None:
        """Forget what was counted, along with the buffer."""
        self.throttle.clear()
        self._rescans = create_rescans(self.config.contexts)

    def _missed(self, layer: int, expert: int, result: _Result) -> None:
        """A demand or a lock was given a slot."""
        slot, evicted, unused = result.slot, result.evicted, result.evicted_unused
        self.throttle.miss(layer, expert, slot=slot, evicted=evicted, unused=unused)
        self.statistics.miss(
            layer, expert, slot=slot, evicted=evicted, unused=unused, polluted=result.polluted
        )

    def _dropped(self, slot: int) -> None:
        """A prefetch failed."""
        self.throttle.dropped(slot)
        self.statistics.dropped(slot)
        rest(self._rescans, -1)

    def _count_eviction(self, result: _Result) -> None:
        if result.evicted:
            self.counters["evictions"] += 1
            self.counters["useless"] += result.evicted_unused

    def _begin(self, entry: Entry) -> None:
        """Tell a host of an expert that is wanted, ahead of its fill, so that it copies several."""
        if not isinstance(self.memory, Memory):
            self.memory.begin(entry.layer, entry.expert, entry.slot, demand=entry.demand)

    def _fill(self, entry: Entry) -> list[Ready | Event]:
        """Fetch an expert whole; the answers to who waits for it."""
        if not isinstance(self.memory, Memory):
            return self._fill_from_host(entry, self.memory)
        request = self.buffer.request
        config = self.config
        size = config.layer_sizes[entry.layer]
        spans = config.expert_spans(entry.layer, entry.expert, bases=self.bases)
        if self._channel(entry).row_bytes:
            return self._fill_tiles(entry, spans)
        try:
            data = b"".join([self.memory.read(address, part) for address, part in spans])
        except BusError:
            return self._fill_tiles(entry, spans)
        slot = entry.slot
        last = config.layer_tiles[entry.layer] - 1
        self.buffer.write_expert(slot, data)
        for tile in range(last):
            request(_FILL, slot=slot, tile=tile)
        if not self.checksums.good(entry.layer, entry.expert, data):
            self._moved(entry, size - config.tile_bytes)
            return self._mismatch(entry, spans)
        request(_FILL, slot=slot, tile=last, last=True)
        self._moved(entry, size)
        self.counters["fills"] += 1
        return [Ready(ctx, entry.layer, entry.expert, slot) for ctx in entry.waiters]

    def _fill_from_host(self, entry: Entry, copies: Copies) -> list[Ready | Event]:
        """Let the host copy tiles, in whatever order they come back.

        Bytes count up to the first tile that fails.
        """
        slot = entry.slot
        first_failed: int | None = None
        for tile, failed, last in copies.results(
            entry.layer, entry.expert, slot, demand=entry.demand
        ):
            if failed and first_failed is None:
                first_failed = tile
            if first_failed is None:
                name = "demand_bytes" if entry.demand else "prefetch_bytes"
                self.counters[name] += self.config.tile_bytes
            bad = failed or (last and first_failed is not None)
            self.buffer.request(_FILL, slot=slot, tile=tile, last=last, failed=bad)
        if first_failed is None:
            self.counters["fills"] += 1
            return [Ready(ctx, entry.layer, entry.expert, slot) for ctx in entry.waiters]
        self.counters["fill_errors"] += 1
        if not entry.demand and not entry.copy:
            self._dropped(slot)
        address = self.config.expert_address(entry.layer, entry.expert, base=self.expert_base)
        address += first_failed * self.config.tile_bytes
        return [
            Event(ErrorCode.BUS, ctx, entry.layer, entry.expert, address) for ctx in entry.waiters
        ]

    def _moved(self, entry: Entry, size: int) -> None:
        """Bytes of whole tiles came."""
        self.counters["demand_bytes" if entry.demand else "prefetch_bytes"] += size
        tiles = size // self.config.tile_bytes
        self.channel_counters.moved(self._channel_number(entry), tiles=tiles)

    def _channel_number(self, entry: Entry) -> int:
        """The channel that fetches an expert."""
        config = self.config
        if entry.demand:
            return 0
        return config.stream_channel if entry.stream else min(1, config.dma_channels - 1)

    def _channel(self, entry: Entry) -> Channel:
        """Its settings."""
        return self.channels[self._channel_number(entry)]

    def _fill_tiles(self, entry: Entry, spans: Sequence[tuple[int, int]]) -> list[Ready | Event]:
        """Fetch tile by tile up to the first that fails; ``spans`` are the expert's pieces.

        The RTL may have later tiles under way by then; they are never read and not counted.
        """
        config = self.config
        slot = entry.slot
        data = bytearray()
        assert isinstance(self.memory, Memory)
        addresses = config.tile_addresses(entry.layer, entry.expert, bases=self.bases)
        for tile, address in enumerate(addresses):
            completion, tile_data = self._dma.transfer(
                address, self.memory, self._channel(entry), tile=tile
            )
            data += tile_data
            failed = completion.failed
            if tile == len(addresses) - 1 and not failed:
                self.buffer.write_expert(slot, bytes(data))
                if not self.checksums.good(entry.layer, entry.expert, bytes(data)):
                    return self._mismatch(entry, spans)
            last = failed or tile == len(addresses) - 1
            self.buffer.request(_FILL, slot=slot, tile=tile, last=last, failed=failed)
            if failed:
                channel = self._channel_number(entry)
                self.channel_counters.failed(channel, reason=completion.reason)
                break
            self._moved(entry, config.tile_bytes)
        if not failed:
            # Only the address wrapped around, or tiles are gathered from rows.
            self.counters["fills"] += 1
            return [Ready(ctx, entry.layer, entry.expert, slot) for ctx in entry.waiters]
        wraps = completion.reason is FetchReason.ADDRESS
        return self._failed(
            entry, ErrorCode.ADDRESS if wraps else ErrorCode.BUS, completion.address
        )

    def _mismatch(self, entry: Entry, spans: Sequence[tuple[int, int]]) -> list[Ready | Event]:
        """The last tile has come, but the expert has not its checksum."""
        last = self.config.layer_tiles[entry.layer] - 1
        self.buffer.request(_FILL, slot=entry.slot, tile=last, last=True, failed=True)
        self.counters["checksum_errors"] += 1
        self.channel_counters.moved(self._channel_number(entry), tiles=1)
        address = spans[0][0] % (1 << self.config.address_bits)
        return self._failed(entry, ErrorCode.CHECKSUM, address)

    def _failed(self, entry: Entry, code: ErrorCode, address: int) -> list[Ready | Event]:
        """A fetch ended in an error."""
        self.counters["fill_errors"] += 1
        if not entry.demand and not entry.copy:
            self._dropped(entry.slot)
        return [Event(code, ctx, entry.layer, entry.expert, address) for ctx in entry.waiters]
