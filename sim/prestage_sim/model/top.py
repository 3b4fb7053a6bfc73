"""Golden model of the whole device, one message at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract.crc import CHECKSUM_TABLE
from prestage_hw.contract.params import DeviceConfig
from prestage_hw.contract.records import MESSAGES, FetchReason
from prestage_hw.contract.statistics import STATISTICS_TABLE

from .buffer.buffer import ExpertBuffer
from .dma.checksum import Checksums
from .link.dispatcher import Answer, Dispatcher
from .link.gate import WriteGate
from .link.mover import Copier, Fetch, HostMover
from .predictor import Predictor, create_predictor
from .scheduler.host import HostScheduler
from .scheduler.scheduler import Memory, Scheduler
from .scheduler.statistics import PrefetchStatistics
from .stats.counters import Counters
from .stats.registers import RegisterBank

__all__ = ["Tables", "Top"]


class Tables:
    """Tables of the predictor, that of checksums and that of the statistics of prefetches.

    Parameters
    ----------
    predictor : :class:`Predictor`
        Answers for all tables but the other two.
    checksums : :class:`Checksums`
        Answers for table 255.
    statistics : :class:`PrefetchStatistics`
        Answers for table 254, which ignores writes.
    """

    def __init__(
        self, predictor: Predictor, checksums: Checksums, statistics: PrefetchStatistics
    ) -> None:
        self._predictor = predictor
        self._checksums = checksums
        self._statistics = statistics

    def table_words(self, table: int) -> int:
        """Words in a table, 0 if there is none."""
        if table == CHECKSUM_TABLE:
            return self._checksums.words
        if table == STATISTICS_TABLE:
            return self._statistics.words
        return self._predictor.table_words(table)

    def read_table(self, table: int, word: int) -> int:
        """One word of a table."""
        if table == CHECKSUM_TABLE:
            return self._checksums.read(word)
        if table == STATISTICS_TABLE:
            return self._statistics.read(word)
        return self._predictor.read_table(table, word)

    def write_table(self, table: int, word: int, value: int) -> None:
        """Store one word in a table."""
        if table == CHECKSUM_TABLE:
            self._checksums.write(word, value)
        elif table != STATISTICS_TABLE:
            self._predictor.write_table(table, word, value)


class Top:
    """The device without its clock.

    With a DMA engine, and with a host that copies when it is asked, every message is served to
    completion before the next: results and counters are those of the RTL at drained pace (see
    ``docs/architecture.md``). Behind a :class:`HostMover` copies take the host's time, and all else
    goes on meanwhile.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    memory : array of uint8, callable or :class:`HostMover`
        Bytes of the memory that holds the experts, expert 0 of layer 0 at ``expert_base``. With a
        host mover who copies: a callable that takes a :class:`Fetch`, copies that tile and returns
        whether it could, or the mover that is to ask the host. With ``config.host_writes`` a
        callable hands the tile's beats to ``gate`` before, or WRITEs to :meth:`handle`.

    Raises
    ------
    TypeError
        If ``memory`` is not what the device's mover needs.
    """

    def __init__(
        self, config: DeviceConfig, memory: NDArray[np.uint8] | Copier | HostMover
    ) -> None:
        self.config = config
        self.counters = Counters()
        self.predictor = create_predictor(config)
        self.buffer = ExpertBuffer(config)
        self.memory: Memory | None = None
        self.scheduler: Scheduler | HostScheduler
        self._copier: Copier | None = None
        if config.mover == "dma":
            if not isinstance(memory, np.ndarray):
                raise TypeError(f"Memory must be an array of bytes, not {memory!r}")
            self.memory = Memory(memory)
            self.scheduler = Scheduler(
                config, buffer=self.buffer, memory=self.memory, counters=self.counters
            )
        else:
            if isinstance(memory, np.ndarray):
                raise TypeError(
                    "Memory must be a callable that copies tiles, not an array of bytes"
                )
            self._host = HostScheduler(config, buffer=self.buffer, counters=self.counters)
            self.scheduler = self._host
            if isinstance(memory, HostMover):
                memory.connect(self)
            elif callable(memory):
                self._copier = memory
            else:
                raise TypeError(f"Copier must be callable, not {memory!r}")
        #: What the host's writes go through, where it writes slots of the device.
        self.gate: WriteGate | None = None
        self._places: dict[tuple[int, int], int] = {}  # slots of tiles that the host was asked for
        if config.host_writes:
            self.gate = WriteGate(config)
            self.gate.connect(self.buffer.storage.write_beat, self._refuse_write)
        tables = Tables(self.predictor, self.scheduler.checksums, self.scheduler.statistics)
        self.registers = RegisterBank(
            config,
            self.counters,
            tables,
            self.scheduler.throttle,
            self.scheduler.channel_counters,
        )
        self._dispatcher = Dispatcher(
            config,
            counters=self.counters,
            predictor=self.predictor,
            scheduler=self.scheduler,
            buffer=self.buffer,
            registers=self.registers,
        )

    def handle(self, code: int, body: bytes) -> list[Answer]:
        """Answers to one message, in an order that the device could give.

        Behind a :class:`HostMover` those that are due now, to whatever.
        """
        if self.gate is not None and code == MESSAGES["WRITE"].code:
            self.gate.receive(body)
            return []
        answers = self._dispatcher.handle(code, body)
        if self._copier is not None:
            while (wanted := self.next_fetch()) is not None:
                tag, fetch = wanted
                copied = self._copier(fetch)
                if copied and not self.written(tag, fetch.tile):
                    raise ValueError(f"Tile must be written before it is reported: {fetch}")
                reason = FetchReason.OK if copied else FetchReason.BUS
                answers += self.complete(tag, fetch.tile, reason)
        return answers

    def ready(self, code: int, body: bytes) -> bool:
        """Whether there is room for a message, and nothing that it has to wait for."""
        return self._dispatcher.ready(code, body)

    def next_fetch(self) -> tuple[int, Fetch] | None:
        """With a host mover, take the tile that is to be copied next, and the entry it is of."""
        wanted = self._host.next_tile()
        if wanted is None:
            return None
        tag, entry, tile = wanted
        if self.gate is not None:
            self._places[tag, tile] = entry.slot
            self.gate.open(entry.slot, tile)
        return tag, Fetch(entry.layer, entry.expert, entry.slot, tile, entry.demand)

    def written(self, tag: int, tile: int) -> bool:
        """With a host mover, whether a tile may be reported: all its beats were written, where
        that is the host's to do.
        """
        return self.gate is None or self.gate.whole(self._places[tag, tile], tile)

    def complete(self, tag: int, tile: int, reason: FetchReason) -> list[Answer]:
        """With a host mover, a tile has ended; what is to be answered now."""
        if self.gate is not None:
            self.gate.close(self._places.pop((tag, tile)), tile)
        return self._dispatcher.scheduled(self._host.complete(tag, tile, reason))

    def _refuse_write(self) -> None:
        self.counters["writes_refused"] += 1

    def reject(self) -> None:
        """Count a message that is refused."""
        self.counters["rejected"] += 1
