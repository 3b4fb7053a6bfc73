"""Golden model of the scheduler of a host mover: copies take their time, and all else goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import BufferCode, BufferOp, ErrorCode, FetchReason

from .base import Buffer, Event, Ready, Result, SchedulerBase
from .inflight import Copy, Entry, InflightTable
from .queue import Candidate, stale

__all__ = ["HostScheduler"]

_Answers = list[Ready | Event | Copy]


class _Command(NamedTuple):
    """A demand, a release, a lock or an unlock that waits for its turn."""

    op: BufferOp
    ctx: int
    layer: int
    expert: int = 0
    place: int = 0
    repeat: bool = False


class HostScheduler(SchedulerBase):
    """Serve demands, then candidates, while tiles are on their way.

    Whatever comes (a command, candidates, values, the end of a tile) is taken at once; then all is
    done that may be, the first thing first: commands in their order, values, entries that may be
    given up, copies, candidates, rescans. That is the order of the RTL's scheduler, of which this
    is the model without its clock: what there is a matter of cycles, here takes none. There is no
    time to measure either, so that the budget has no effect.

    Commands wait for an entry, for a slot, and behind a demand that waits; a candidate for an
    entry and, with ``alone``, until nothing is in flight. A demand for an expert in flight waits
    with it, and turns a prefetch into a demand. With ``cancel_enable`` a prefetch whose layer was
    routed without it, or whose slot a demand needs, gets no more tiles; its slot is free when the
    last of those under way has come.

    With ``alone``, and tiles that end before the next message comes, all results are those of
    :class:`Scheduler`.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose host moves experts.
    buffer, counters
        As for :class:`SchedulerBase`.
    """

    def __init__(
        self, config: DeviceConfig, *, buffer: Buffer, counters: MutableMapping[str, int]
    ) -> None:
        super().__init__(config, buffer=buffer, counters=counters)
        self._table = InflightTable(config)
        self._commands: deque[_Command] = deque()
        self._waiting: _Command | None = None  # It found no slot,
        self._retry = False  # and a tile has ended since.
        self._held: tuple[Entry, int] | None = None  # Who waits twice for the same fetch.
        self._values: deque[tuple[int, int, int, int, Sequence[int]]] = deque()
        self._scans: list[int] = []  # entries to look at, last one first
        self._copies: deque[tuple[int, int, int, int, bool]] = deque()
        self._copying: tuple[Entry, int, int] | None = None  # its context and number
        self._copy_waits = False  # until a fetch ends
        self._gathered: deque[Candidate] = deque()  # what comes when no other candidate waits
        self._charged = False  # A demand of this decision was charged for waiting.
        self._answers: _Answers = []

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not (
            self._commands
            or self._waiting
            or self._values
            or self._copies
            or self._gathered
            or len(self._queue)
            or len(self._table)
        )

    @property
    def command_room(self) -> int:
        """Commands that there is room for."""
        return super().command_room - len(self._commands)

    @property
    def copy_room(self) -> int:
        """Copies that there is room for."""
        return super().copy_room - len(self._copies)

    def demand(
        self, ctx: int, layer: int, experts: Sequence[int], *, repeat: bool = False
    ) -> _Answers:
        """Take one routing decision; the answers that are due now, to whatever."""
        if len(set(experts)) != len(experts):
            raise ValueError(f"Experts of a decision must be distinct, not {experts}")
        self._commands += (
            _Command(BufferOp.DEMAND, ctx, layer, expert, place, repeat)
            for place, expert in enumerate(experts)
        )
        return self._run()

    def release(self, ctx: int, layer: int) -> None:
        """Release a layer, once what was asked for before has been looked up."""
        self._take_command(BufferOp.RELEASE, ctx, layer)

    def lock(self, ctx: int, layer: int, expert: int) -> _Answers:
        """Keep an expert until it is unlocked; the answers that are due now, to whatever."""
        self._commands.append(_Command(BufferOp.LOCK, ctx, layer, expert))
        return self._run()

    def unlock(self, ctx: int, layer: int, expert: int) -> _Answers:
        """Let an expert be evicted again; the answers that are due now, to whatever."""
        self._commands.append(_Command(BufferOp.UNLOCK, ctx, layer, expert))
        return self._run()

    def replicate(self, ctx: int, layer: int, expert: int, copies: int) -> _Answers:
        """Hold so many copies of an expert; the answers that are due now, to whatever."""
        self._copies += self._copy_commands(ctx, layer, expert, copies)
        return self._run()

    def offer(self, candidates: Sequence[Candidate]) -> None:
        """Take candidates: (context, layer, expert, score, source, deadline)."""
        self._push(candidates)
        self._run(keep=True)

    def offer_in_turn(self, candidates: Sequence[Candidate]) -> None:
        """Take candidates that come once no other waits."""
        self._gathered += candidates
        self._run(keep=True)

    def valued(self, kind: int, ctx: int, layer: int, beat: int, values: Sequence[int]) -> None:
        """Take what the predictor says of some experts; no demand is looked up by it before."""
        self._values.append((kind, ctx, layer, beat, values))
        self._run(keep=True)

    def rescan(self) -> None:
        """Nothing: rescans come in their turn."""

    def next_tile(self) -> tuple[int, Entry, int] | None:
        """Take the tile that leaves next: tag, entry and tile; None while none may."""
        self._table.prefetch_tiles = self.prefetch_tiles
        return self._table.next_tile()

    def complete(self, tag: int, tile: int, reason: FetchReason) -> _Answers:
        """A tile has ended; the answers that are due now, to whatever."""
        entry = self._table[tag]
        good = reason == FetchReason.OK and entry.failure is None
        demand = self._table.complete(tag, tile, reason)
        if good:
            name = "demand_bytes" if demand else "prefetch_bytes"
            self.counters[name] += self.config.tile_bytes
        self._retry = True
        last = entry.ended
        broken = entry.failure is not None or entry.cancelled
        failed = reason != FetchReason.OK or (last and broken)
        self.buffer.request(BufferOp.FILL, slot=entry.slot, tile=tile, last=last, failed=failed)
        if last:
            self._end(tag, entry)
        return self._run()

    def _run(self, *, keep: bool = False) -> _Answers:
        """Do all that may be done; the answers that are due now, unless they are kept for later."""
        while self._step():
            pass
        if keep:
            return []
        answers, self._answers = self._answers, []
        return answers

    def _take_command(self, op: BufferOp, ctx: int, layer: int) -> None:
        self._commands.append(_Command(op, ctx, layer))
        self._run(keep=True)

    def _step(self) -> bool:
        """Do the first thing that may be done; False if there is none."""
        if self._held is not None:
            return False
        if self._waiting is not None:
            if self._retry:
                command, self._waiting = self._waiting, None
                self._look_up(command)
                return True
            return False
        if self._commands:
            wants = self._commands[0].op in (BufferOp.DEMAND, BufferOp.LOCK)
            if wants and not self._table.demand_room:
                return False
            self._serve(self._commands.popleft())
        elif self._values:
            kind, ctx, layer, beat, values = self._values.popleft()
            self.buffer.values(kind, ctx, layer, beat, values)
            self.wake(ctx)
        elif self._scans:
            self._scan(self._scans.pop())
        elif self._copies and self._may_copy():
            self._copy(*self._copies[0])
        elif self._table.prefetch_room and not (self.alone and len(self._table)):
            return self._prefetch_next()
        else:
            return False
        return True

    # Commands.

    def _serve(self, command: _Command) -> None:
        """Begin with a command."""
        if command.op is BufferOp.RELEASE:
            self.buffer.request(BufferOp.RELEASE, ctx=command.ctx, layer=command.layer)
            self.wake()
        elif command.op is BufferOp.UNLOCK:
            self._answers += self._unlock(command.ctx, command.layer, command.expert)
        else:
            if command.op is BufferOp.DEMAND and command.place == 0 and not command.repeat:
                self._routes[command.ctx] = (self._routes[command.ctx] + 1) % 256
            self._look_up(command)

    def _look_up(self, command: _Command) -> None:
        """Look up what a demand or a lock wants, perhaps once more."""
        op, ctx, layer, expert, place, _ = command
        table, demands = self._table, op is BufferOp.DEMAND
        if demands:
            if place == 0:
                self._charged = False
            if place == self.config.model.top_k - 1:
                scans = self.cancel_enable and table.prefetching
                self._scans = sorted(table) if scans else []
            result = self.buffer.request(op, ctx=ctx, layer=layer, expert=expert, index=place)
        else:
            result = self.buffer.request(op, layer=layer, expert=expert)
        if result.code == BufferCode.NO_SLOT and len(table):
            self._waiting, self._retry = command, False
            self._spare()
            return
        if demands:
            self.counters["demands"] += 1
        elif result.code != BufferCode.NO_SLOT:
            self.counters["locks"] += 1
        self.counters["pollution"] += result.polluted
        self._count_eviction(result)
        if result.code == BufferCode.RESIDENT:
            self.counters["hits"] += demands
            self._used(result)
            self._answers.append(Ready(ctx, layer, expert, result.slot))
        elif result.code == BufferCode.FILLING:
            self._merge(result, ctx, demands=demands)
        elif result.code == BufferCode.ALLOCATED:
            self.counters["misses" if demands else "lock_misses"] += 1
            waits_for = None
            if demands and not self._charged:
                waits_for = table.waits_for
                self._charged = waits_for is not None
            self._missed(layer, expert, result, waits_for=waits_for)
            self._begin(Entry(layer, expert, result.slot, True, [ctx]))
        else:
            self.counters["refused"] += demands
            self._answers.append(Event(ErrorCode.NO_SLOT, ctx, layer, expert, 0))

    def _merge(self, result: Result, ctx: int, *, demands: bool) -> None:
        """The expert is in flight already."""
        entry = self._table.filling(result.slot)
        if demands:
            self.counters["merged" if entry.demand else "late"] += 1
        self._used(result, returned=entry.returned)
        if ctx in entry.waiters:
            # Its layer was released and routed again meanwhile.
            self._held = entry, ctx
        else:
            self._table.wait(entry, ctx)

    def _begin(self, entry: Entry) -> None:
        """Begin a fetch."""
        base = self.config.expert_address(entry.layer, entry.expert, base=self.expert_base)
        entry.address = base
        self._table.begin(entry)

    # What is prefetched, and given up.

    def _prefetch_next(self) -> bool:
        """Look up a candidate, or ask for a rescan; False if there is neither."""
        best = self._take()
        while best is None and self._gathered:
            candidate = self._gathered.popleft()
            # What its chunk has gathered is forgotten when the layer is routed.
            if not stale(candidate[5], routes=self._routes[candidate[0]]):
                self._push([candidate])
                best = self._take()
        if best is not None:
            entry, awake = self._prefetch(best), True
        else:
            entry, awake = self._rescan()
        if entry is not None:
            self._begin(entry)
        return awake

    def _share(self, slot: int, ctx: int, deadline: int) -> None:
        entry = self._table.filling(slot)
        if (entry.ctx, entry.deadline) != (ctx, deadline):
            entry.shared = True

    def _scan(self, tag: int) -> None:
        """Give up a prefetch whose deadline has come, unless another decision wants it, or other
        tokens of its chunk may.
        """
        if tag not in self._table:
            return
        entry = self._table[tag]
        age = (self._routes[entry.ctx] - entry.deadline) % 256
        if age < 128 and not (self.gathering[entry.ctx] and age == 0) and not entry.shared:
            self._give_up(tag)

    def _spare(self) -> None:
        """A demand finds no slot: it waits for a tile of a prefetch, not for an expert."""
        spare = self._table.spare
        if spare is not None and self.cancel_enable and not self._table.cancelling:
            self._give_up(spare)

    def _give_up(self, tag: int) -> None:
        """No more tiles of a prefetch; what is under way of it comes first."""
        entry = self._table[tag]
        if entry.demand or entry.copy or not entry.more:
            return
        entry.cancelled = True
        if not entry.under_way:
            self.buffer.request(BufferOp.CANCEL, slot=entry.slot)
            self._end(tag, entry)

    def _end(self, tag: int, entry: Entry) -> None:
        """Nothing more comes of a fetch: answer who waits for it."""
        self._table.free(tag)
        self._copy_waits, self._retry = False, True
        waiters = list(entry.waiters)
        if self._held is not None and self._held[0] is entry:
            waiters.append(self._held[1])
            self._held = None
        if entry.failure is not None:
            self.counters["fill_errors"] += 1
        else:
            self.counters["prefetch_cancelled" if entry.cancelled else "fills"] += 1
        if (entry.failure is not None or entry.cancelled) and not (entry.demand or entry.copy):
            self._dropped(entry.slot)
        self._answers += [self._answer(entry, ctx) for ctx in waiters]
        if self._copying is not None and self._copying[0] is entry:
            _, ctx, number = self._copying
            self._copying = None
            answer = self._answer(entry, ctx)
            if isinstance(answer, Ready):
                self._answers.append(Copy(ctx, entry.layer, entry.expert, number, entry.slot))
            else:
                self._answers.append(answer)
        if entry.cancelled:
            self.wake()
        if entry.failure is not None and not entry.demand:
            self._rest()

    def _answer(self, entry: Entry, ctx: int) -> Ready | Event:
        """Answer to who waits for an entry that has ended."""
        if entry.failure is None:
            return Ready(ctx, entry.layer, entry.expert, entry.slot)
        tile, reason = entry.failure
        code = ErrorCode.TIMEOUT if reason is FetchReason.TIMEOUT else ErrorCode.BUS
        address = (entry.address + tile * self.config.tile_bytes) % (1 << self.config.address_bits)
        return Event(code, ctx, entry.layer, entry.expert, address)

    # Copies.

    def _may_copy(self) -> bool:
        """Whether a copy may be looked up: one is fetched at a time."""
        return self._copying is None and not self._copy_waits and self._table.prefetch_room

    def _copy(self, ctx: int, layer: int, expert: int, number: int, keep: bool) -> None:
        """Look a copy up."""
        result = self.buffer.request(
            BufferOp.COPY, layer=layer, expert=expert, value=number, last=keep
        )
        if result.code == BufferCode.FILLING or (
            result.code == BufferCode.NO_SLOT and len(self._table)
        ):
            self._copy_waits = True
            return
        self._copies.popleft()
        if not keep:
            return
        if result.code == BufferCode.RESIDENT:
            self._answers.append(Copy(ctx, layer, expert, number, result.slot))
        elif result.code == BufferCode.ALLOCATED:
            entry = self._copied(layer, expert, result)
            self._copying = entry, ctx, number
            self._begin(entry)
        else:
            self._answers.append(self._no_copy(ctx, layer, expert, result.code))
