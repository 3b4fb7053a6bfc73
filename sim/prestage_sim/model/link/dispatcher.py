"""Golden model of the dispatcher: one message in, its answers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from prestage_hw.contract.params import DeviceConfig
from prestage_hw.contract.records import MESSAGES, RECORDS, TABLE_BURST, ErrorCode, Phase, Source
from prestage_hw.contract.registers import register_by_name

from ..dma.checksum import Checksums
from ..dma.settings import Channel
from ..scheduler.chunks import ChunkUnion
from ..scheduler.inflight import Copy
from ..scheduler.statistics import PrefetchStatistics
from ..scheduler.throttle import Throttle
from ..stats.accuracy import Accuracy
from ..stats.counters import Counters
from ..stats.registers import RegisterBank, Tables

if TYPE_CHECKING:
    from ..buffer.buffer import ExpertBuffer

__all__ = ["Answer", "Dispatcher", "Predictor", "Scheduler"]

#: Frame type and body of a message for the host.
Answer = tuple[int, bytes]

#: Context, layer, expert, score, source and deadline of a candidate.
CandidateTuple = tuple[int, int, int, int, int, int]


def _address(register: str) -> int:
    return register_by_name(register).address


_SYNC, _TABLE_READ, _TABLE_WRITE, _REGISTER_READ, _REGISTER_WRITE = (
    MESSAGES[name].code
    for name in ("SYNC", "TABLE_READ", "TABLE_WRITE", "REGISTER_READ", "REGISTER_WRITE")
)
_COMMANDS = tuple(MESSAGES[name].code for name in ("ROUTE", "RELEASE", "LOCK"))

#: Registers whose access waits until the engine is idle.
_SLOW = (_address("table_data"), _address("clear"))


class Predictor(Tables, Protocol):
    """What the dispatcher needs of a predictor."""

    threshold: int
    far_threshold: int
    ahead: int

    def begin(self, ctx: int, token: int, phase: int) -> Sequence[CandidateTuple]:
        """A token starts; propose experts, best first."""

    def decide(
        self, ctx: int, layer: int, experts: Sequence[int], stamp: int
    ) -> Sequence[CandidateTuple]:
        """Learn a decision and propose experts, best first."""

    def hint(
        self, ctx: int, layer: int, expert: int, score: int, deadline: int
    ) -> Sequence[CandidateTuple]:
        """Take an opinion from outside and propose experts, best first."""

    def values(self) -> Sequence[tuple[int, int, int, int, Sequence[int]]]:
        """What experts are worth, as it was given out since the last call."""

    def clear(self) -> None:
        """Forget everything."""


class Scheduler(Protocol):
    """What the dispatcher needs of a scheduler."""

    enable: bool
    cutoff_layer: int
    channels: list[Channel]
    bases: list[int]
    checksums: Checksums
    throttle: Throttle
    statistics: PrefetchStatistics
    streaming: list[bool]
    gathering: list[bool]
    rescan_ahead: int
    rescan_least: int
    alone: bool
    cancel_enable: bool
    prefetch_tiles: int

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""

    @property
    def command_room(self) -> int:
        """Commands that there is room for."""

    @property
    def copy_room(self) -> int:
        """Copies that there is room for."""

    def valued(self, kind: int, ctx: int, layer: int, beat: int, values: Sequence[int]) -> None:
        """Take what the predictor says of some experts of a layer."""

    def rescan(self) -> None:
        """Prefetch what the buffer's own values say."""

    def demand(
        self, ctx: int, layer: int, experts: Sequence[int], *, repeat: bool
    ) -> Sequence[object]:
        """Serve the demands of one decision."""

    def offer(self, candidates: Sequence[CandidateTuple]) -> None:
        """Prefetch candidates, best first."""

    def offer_in_turn(self, candidates: Sequence[CandidateTuple]) -> None:
        """The same, once no other candidate waits."""

    def replicate(self, ctx: int, layer: int, expert: int, copies: int) -> Sequence[object]:
        """Hold so many copies of an expert, and give the answers."""

    def release(self, ctx: int, layer: int) -> None:
        """Release a layer."""

    def lock(self, ctx: int, layer: int, expert: int) -> Sequence[object]:
        """Lock an expert."""

    def unlock(self, ctx: int, layer: int, expert: int) -> Sequence[object]:
        """Unlock an expert."""

    def clear(self) -> None:
        """Forget what was counted."""


class Dispatcher:
    """Check messages and hand them on, each to completion.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    counters : :class:`Counters`
        Counters.
    predictor, scheduler, buffer, registers
        The stages behind the dispatcher.
    """

    def __init__(
        self,
        config: DeviceConfig,
        *,
        counters: Counters,
        predictor: Predictor,
        scheduler: Scheduler,
        buffer: ExpertBuffer,
        registers: RegisterBank,
    ) -> None:
        self._config = config
        self._counters = counters
        self._predictor = predictor
        self._scheduler = scheduler
        self._buffer = buffer
        self._registers = registers
        self._accuracy = Accuracy(config, counters)
        self._chunks = ChunkUnion(config)
        self._stamp = [0] * config.contexts
        self._current = [-1] * config.contexts
        self._unreleased: set[tuple[int, int]] = set()
        self._handlers: dict[int, Callable[[bytes], list[Answer]]] = {
            MESSAGES[name].code: handler
            for name, handler in (
                ("BEGIN_TOKEN", self._begin),
                ("ROUTE", self._route),
                ("RELEASE", self._release),
                ("HINT", self._hint),
                ("LOCK", self._lock),
                ("READ", self._read),
                ("SYNC", self._sync),
                ("REGISTER_READ", self._register_read),
                ("REGISTER_WRITE", self._register_write),
                ("TABLE_READ", self._table_read),
                ("TABLE_WRITE", self._table_write),
                ("REPLICATE", self._replicate),
            )
            if MESSAGES[name].known(config)
        }

    def handle(self, code: int, body: bytes) -> list[Answer]:
        """Answers to one message, in an order that the device could give."""
        handler = self._handlers.get(code)
        if handler is None:
            return self._reject(ErrorCode.BAD_MESSAGE, address=code)
        return handler(body)

    def ready(self, code: int, body: bytes) -> bool:
        """Whether there is room for a message, and nothing that it has to wait for.

        At drained pace there always is, and never anything.
        """
        if code in (_SYNC, _TABLE_READ, _TABLE_WRITE):
            return self._scheduler.idle
        if code in (_REGISTER_READ, _REGISTER_WRITE):
            record = "RegisterRead" if code == _REGISTER_READ else "RegisterWrite"
            return self._values(record, body)[0] not in _SLOW or self._scheduler.idle
        if code in _COMMANDS:
            most = self._config.model.top_k if code == MESSAGES["ROUTE"].code else 1
            return self._scheduler.command_room >= most
        if code == MESSAGES["REPLICATE"].code:
            return self._scheduler.copy_room >= self._config.replicas
        return True

    def _values(self, name: str, body: bytes) -> tuple[int, ...]:
        """Fields of a body; an array is one element."""
        return tuple(RECORDS[name].unpack(self._config, body).values())  # type: ignore[arg-type]

    def _answer(self, message: str, *values: object) -> Answer:
        record = MESSAGES[message].record
        assert record is not None
        return MESSAGES[message].code, record.pack(self._config, *values)

    def _reject(
        self, code: ErrorCode, *, ctx: int = 0, layer: int = 0, expert: int = 0, address: int = 0
    ) -> list[Answer]:
        self._counters["rejected"] += 1
        return [self._answer("EVENT", code, ctx, layer, expert, address)]

    def _misplaced(self, ctx: int, layer: int) -> ErrorCode | None:
        if ctx >= self._config.contexts:
            return ErrorCode.BAD_CONTEXT
        if layer >= self._config.model.layers:
            return ErrorCode.BAD_LAYER
        return None

    def _begin(self, body: bytes) -> list[Answer]:
        ctx, phase, token = self._values("BeginToken", body)
        if ctx >= self._config.contexts:
            return self._reject(ErrorCode.BAD_CONTEXT, ctx=ctx)
        self._counters["tokens"] += 1
        self._current[ctx] = -1
        self._accuracy.begin(ctx)
        self._registers.begin(phase)
        if phase > max(Phase):
            phase = int(Phase.DECODE)
        self._chunks.begin(ctx, phase)
        self._configure()
        self._propose(ctx, self._predictor.begin(ctx, token, phase))
        return []

    def _configure(self) -> None:
        """Show the registers to the stages behind."""
        registers = self._registers
        self._scheduler.bases = registers.bases
        self._scheduler.enable = bool(registers["control"] & 1)
        self._scheduler.cutoff_layer = registers["cutoff_layer"]
        self._scheduler.rescan_ahead = registers["rescan_ahead"]
        self._scheduler.rescan_least = registers["rescan_least"]
        self._scheduler.alone = bool(registers["control"] & 4)
        self._scheduler.cancel_enable = bool(registers["control"] & 16)
        self._scheduler.prefetch_tiles = registers["prefetch_tiles"]
        self._scheduler.channels = registers.profiles.dma.active
        self._scheduler.streaming = self._chunks.streaming
        self._scheduler.gathering = self._chunks.gathering
        self._scheduler.throttle.enable = bool(registers["control"] & 8)
        self._scheduler.throttle.register = registers["throttle"]
        self._buffer.policy = registers["policy"]
        self._predictor.threshold = registers["predict_threshold"]
        self._predictor.far_threshold = registers["predict_far_threshold"]
        self._predictor.ahead = registers["predict_ahead"]

    def _propose(self, ctx: int, candidates: Sequence[CandidateTuple]) -> None:
        """Hand the predictor's candidates on; only its own count, not the hints among them."""
        self._accuracy.proposed(ctx, [(c[1], c[2]) for c in candidates if c[4] != Source.HINT])
        for value in self._predictor.values():
            self._scheduler.valued(*value)
        passed, *gathered = self._chunks.offer(candidates)
        if passed:
            self._scheduler.offer(passed)
        for each in gathered:
            self._scheduler.offer_in_turn(each)
        self._scheduler.rescan()

    def _route(self, body: bytes) -> list[Answer]:
        fields = RECORDS["Route"].unpack(self._config, body)
        ctx, layer, experts = fields["ctx"], fields["layer"], fields["experts"]
        assert isinstance(ctx, int) and isinstance(layer, int) and isinstance(experts, tuple)
        reason = self._misplaced(ctx, layer)
        if reason is not None:
            return self._reject(reason, ctx=ctx, layer=layer)
        for expert in experts:
            if expert >= self._config.model.experts:
                return self._reject(ErrorCode.BAD_EXPERT, ctx=ctx, layer=layer, expert=expert)
        if len(set(experts)) != len(experts):
            repeated = next(e for i, e in enumerate(experts) if e in experts[:i])
            return self._reject(ErrorCode.DUPLICATE_EXPERT, ctx=ctx, layer=layer, expert=repeated)
        if (ctx, layer) in self._unreleased:
            return self._reject(ErrorCode.UNRELEASED, ctx=ctx, layer=layer)
        self._unreleased.add((ctx, layer))
        self._counters["routes"] += 1
        # In a chunk of tokens a layer is routed several times before the next one; the stamp counts
        # it once.
        repeat = self._current[ctx] == layer
        self._counters["routes_out_of_order"] += layer < self._current[ctx]
        if not repeat:
            self._stamp[ctx] = (self._stamp[ctx] + 1) % 256
        self._current[ctx] = layer
        self._configure()
        answers = self.scheduled(self._scheduler.demand(ctx, layer, experts, repeat=repeat))
        self._accuracy.truth(ctx, layer, experts)
        self._chunks.decide(ctx, layer)
        self._propose(ctx, self._predictor.decide(ctx, layer, experts, self._stamp[ctx]))
        return answers

    def scheduled(self, answers: Sequence[object]) -> list[Answer]:
        """Answers of the scheduler as messages."""
        return [self._scheduled(answer) for answer in answers]

    def _scheduled(self, answer: object) -> Answer:
        fields = tuple(answer)  # type: ignore[arg-type, var-annotated]
        if isinstance(answer, Copy):
            return self._answer("COPY", *fields)
        return self._answer("READY" if len(fields) == 4 else "EVENT", *fields)

    def _release(self, body: bytes) -> list[Answer]:
        ctx, layer = self._values("Release", body)
        reason = self._misplaced(ctx, layer)
        if reason is None and (ctx, layer) not in self._unreleased:
            reason = ErrorCode.UNROUTED
        if reason is not None:
            return self._reject(reason, ctx=ctx, layer=layer)
        self._unreleased.remove((ctx, layer))
        self._counters["releases"] += 1
        self._configure()
        self._scheduler.release(ctx, layer)
        return []

    def _hint(self, body: bytes) -> list[Answer]:
        ctx, layer, expert, score = self._values("Hint", body)
        reason = self._misplaced(ctx, layer)
        if reason is not None:
            return self._reject(reason, ctx=ctx, layer=layer)
        if expert >= self._config.model.experts:
            return self._reject(ErrorCode.BAD_EXPERT, ctx=ctx, layer=layer, expert=expert)
        if layer <= self._current[ctx]:
            return self._reject(ErrorCode.HINT_PASSED, ctx=ctx, layer=layer, expert=expert)
        if self._registers["control"] & 2 and score >= self._registers["hint_threshold"]:
            self._counters["hints"] += 1
            deadline = (self._stamp[ctx] + layer - self._current[ctx]) % 256
            self._configure()
            self._propose(ctx, self._predictor.hint(ctx, layer, expert, score, deadline))
        return []

    def _lock(self, body: bytes) -> list[Answer]:
        ctx, layer, expert, lock = self._values("Lock", body)
        reason = self._misplaced(ctx, layer)
        if reason is None and expert >= self._config.model.experts:
            reason = ErrorCode.BAD_EXPERT
        if reason is not None:
            named = expert if reason is ErrorCode.BAD_EXPERT else 0
            return self._reject(reason, ctx=ctx, layer=layer, expert=named)
        self._configure()
        act = self._scheduler.lock if lock & 1 else self._scheduler.unlock
        return self.scheduled(act(ctx, layer, expert))

    def _replicate(self, body: bytes) -> list[Answer]:
        ctx, layer, expert, copies = self._values("Replicate", body)
        reason = self._misplaced(ctx, layer)
        if reason is not None:
            return self._reject(reason, ctx=ctx, layer=layer)
        if expert >= self._config.model.experts:
            return self._reject(ErrorCode.BAD_EXPERT, ctx=ctx, layer=layer, expert=expert)
        if not 0 < copies <= self._config.replicas:
            return self._reject(
                ErrorCode.BAD_COPIES, ctx=ctx, layer=layer, expert=expert, address=copies
            )
        self._configure()
        return self.scheduled(self._scheduler.replicate(ctx, layer, expert, copies))

    def _read(self, body: bytes) -> list[Answer]:
        slot, beat, count = self._values("Read", body)
        config = self._config
        if (
            not config.stores_slots
            or slot >= config.slots
            or count == 0
            or beat + count > config.expert_beats
        ):
            return self._reject(ErrorCode.BAD_READ, expert=slot, address=beat)
        answers = []
        for at in range(beat, beat + count):
            data, ok = self._buffer.read_beat(slot, at)
            answers.append(self._answer("DATA", slot, at, tuple(data), int(ok)))
        return answers

    def _table(self, table: int, word: int, count: int) -> bool:
        """Select words of a table; False if it doesn't have all of them."""
        self._registers.write(_address("table_address"), table << 24 | word & 0xFFFFFF)
        words = self._registers.read(_address("table_words"))
        return 0 < count <= (words or 0) - word

    def _table_read(self, body: bytes) -> list[Answer]:
        table, word, count = self._values("TableRead", body)
        if not self._table(table, word, count):
            return self._reject(ErrorCode.BAD_TABLE, expert=table, address=word)
        data = _address("table_data")
        values = [self._registers.read(data) or 0 for _ in range(count)]
        values += [0] * (-count % TABLE_BURST)
        return [
            self._answer("TABLE_DATA", table, word + at, values[at : at + TABLE_BURST])
            for at in range(0, count, TABLE_BURST)
        ]

    def _table_write(self, body: bytes) -> list[Answer]:
        table, word, count, values = self._values("TableWrite", body)
        assert isinstance(values, tuple)
        if not self._table(table, word, count) or count > TABLE_BURST:
            return self._reject(ErrorCode.BAD_TABLE, expert=table, address=word)
        for value in values[:count]:
            self._registers.write(_address("table_data"), value)
        return []

    def _sync(self, body: bytes) -> list[Answer]:
        return [self._answer("SYNCED", *self._values("Sync", body))]

    def _register_read(self, body: bytes) -> list[Answer]:
        (address,) = self._values("RegisterRead", body)
        value = self._registers.read(address)
        if value is None:
            return self._reject(ErrorCode.BAD_REGISTER, address=address)
        return [self._answer("REGISTER_VALUE", address, value)]

    def _register_write(self, body: bytes) -> list[Answer]:
        address, value = self._values("RegisterWrite", body)
        if not self._registers.write(address, value):
            return self._reject(ErrorCode.BAD_REGISTER, address=address)
        cleared, self._registers.cleared = self._registers.cleared, set()
        if "tables" in cleared:
            self._predictor.clear()
        if "buffer" in cleared:
            self._buffer.clear()
            self._scheduler.clear()
            self._unreleased.clear()
            self._current = [-1] * self._config.contexts
        if "counters" in cleared:
            self._counters.clear()
            self._scheduler.statistics.clear()
            self._registers.channels.clear()
        if "checksums" in cleared:
            self._scheduler.checksums.clear()
        return []
