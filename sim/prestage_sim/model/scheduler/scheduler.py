"""Golden model of the scheduler at drained pace: each message is served before the next comes."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import BufferCode, BufferOp, ErrorCode, FetchReason

from ..dma.axi import BusError, Memory
from ..dma.checksum import Checksums
from ..dma.dma import DMA
from ..dma.settings import Channel
from .base import Buffer, Event, Ready, SchedulerBase
from .inflight import Copy, Entry
from .queue import Candidate

__all__ = ["Buffer", "Event", "Memory", "Ready", "Scheduler"]

_DEMAND, _FILL, _RELEASE = BufferOp.DEMAND, BufferOp.FILL, BufferOp.RELEASE
_LOCK, _COPY = BufferOp.LOCK, BufferOp.COPY
_RESIDENT = BufferCode.RESIDENT
_ALLOCATED, _NO_SLOT = BufferCode.ALLOCATED, BufferCode.NO_SLOT


class Scheduler(SchedulerBase):
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
        Device whose DMA engine moves experts.
    buffer, counters, checksums
        As for :class:`SchedulerBase`.
    memory : :class:`Memory`
        Memory that holds the experts.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`, or there is no memory.
    """

    def __init__(
        self,
        config: DeviceConfig,
        *,
        buffer: Buffer,
        memory: Memory,
        counters: MutableMapping[str, int],
        checksums: Checksums | None = None,
    ) -> None:
        require_config(config)
        if not isinstance(memory, Memory):
            raise TypeError(f"Memory must be a Memory, not {memory!r}")
        super().__init__(config, buffer=buffer, counters=counters, checksums=checksums)
        self.memory = memory
        self._dma = DMA(config)

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
            self._used(result)
            counters["pollution"] += result.polluted
            self._count_eviction(result)
            if result.code == _RESIDENT:
                counters["hits"] += 1
                answers.append(Ready(ctx, layer, expert, result.slot))
            elif result.code == _ALLOCATED:
                counters["misses"] += 1
                self._missed(layer, expert, result)
                inflight.append(Entry(layer, expert, result.slot, True, [ctx]))
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

    def offer(self, candidates: Sequence[Candidate]) -> None:
        """Prefetch candidates, best first: (context, layer, expert, score, source, deadline)."""
        self._push(candidates)
        while (best := self._take()) is not None:
            self._fetch(self._prefetch(best))

    def offer_in_turn(self, candidates: Sequence[Candidate]) -> None:
        """The same, once no other candidate waits: none ever does."""
        self.offer(candidates)

    def valued(self, kind: int, ctx: int, layer: int, beat: int, values: Sequence[int]) -> None:
        """Hand on what the predictor says of some experts of a layer."""
        self.buffer.values(kind, ctx, layer, beat, values)
        self.wake(ctx)

    def rescan(self) -> None:
        """Prefetch what the buffer's own values say, until nobody is awake."""
        awake = True
        while awake:
            entry, awake = self._rescan()
            self._fetch(entry)

    def _fetch(self, entry: Entry | None) -> None:
        """Fetch an expert that nobody waits for, if there is one."""
        if entry is not None:
            self._fill(entry)

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
        self._used(result)
        if result.code == _RESIDENT:
            return [Ready(ctx, layer, expert, result.slot)]
        counters["lock_misses"] += 1
        self._count_eviction(result)
        self._missed(layer, expert, result)
        return self._fill(Entry(layer, expert, result.slot, True, [ctx]))

    def unlock(self, ctx: int, layer: int, expert: int) -> list[Ready | Event | Copy]:
        """Let an expert be evicted again; an event if it was not locked."""
        answers = self._unlock(ctx, layer, expert)
        self.rescan()
        return answers

    def replicate(
        self, ctx: int, layer: int, expert: int, copies: int
    ) -> list[Ready | Event | Copy]:
        """Hold so many copies of an expert, and give one answer for each; 1 gives all back.

        What is more than wanted is given back first, from the last copy down.
        """
        answers: list[Ready | Event | Copy] = []
        for *_, number, keep in self._copy_commands(ctx, layer, expert, copies):
            result = self.buffer.request(_COPY, layer=layer, expert=expert, value=number, last=keep)
            if not keep:
                continue
            if result.code == _RESIDENT:
                answers.append(Copy(ctx, layer, expert, number, result.slot))
            elif result.code == _ALLOCATED:
                entry = self._copied(layer, expert, result)
                entry.waiters.append(ctx)
                [answer] = self._fill(entry)
                good = isinstance(answer, Ready)
                answers.append(Copy(ctx, layer, expert, number, result.slot) if good else answer)
            else:
                answers.append(self._no_copy(ctx, layer, expert, result.code))
        return answers

    def _fill(self, entry: Entry) -> list[Ready | Event]:
        """Fetch an expert whole; the answers to who waits for it."""
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
            self._rest()
        return [Event(code, ctx, entry.layer, entry.expert, address) for ctx in entry.waiters]
