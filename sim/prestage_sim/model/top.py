"""Golden model of the whole device, one message at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract.crc import CHECKSUM_TABLE
from prestage_hw.contract.params import DeviceConfig
from prestage_hw.contract.records import MESSAGES
from prestage_hw.contract.statistics import STATISTICS_TABLE

from .buffer.buffer import ExpertBuffer
from .dma.checksum import Checksums
from .link.dispatcher import Answer, Dispatcher
from .link.mover import Copier, Copies, HostCopies, HostMover
from .predictor import Predictor, create_predictor
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
    """The device without its clock: every message is served to completion before the next.

    Results and counters are those of the RTL at drained pace (see ``docs/architecture.md``).

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    memory : array of uint8, callable or :class:`Copies`
        Bytes of the memory that holds the experts, expert 0 of layer 0 at ``expert_base``. With a
        host mover who copies: a callable that takes a :class:`Fetch`, copies that tile and returns
        whether it could; with ``config.host_writes`` it hands WRITEs to :meth:`handle` before.

    Raises
    ------
    TypeError
        If ``memory`` is not what the device's mover needs.
    """

    def __init__(self, config: DeviceConfig, memory: NDArray[np.uint8] | Copier | Copies) -> None:
        self.config = config
        self.counters = Counters()
        self.predictor = create_predictor(config)
        self.buffer = ExpertBuffer(config)
        self.memory = _source(config, memory)
        self._gate = None if isinstance(self.memory, Memory) else self.memory.gate
        if self._gate is not None:
            self._gate.connect(self.buffer.storage.write_beat, self._refuse_write)
        self.scheduler = Scheduler(
            config, buffer=self.buffer, memory=self.memory, counters=self.counters
        )
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
        """Answers to one message, in an order that the device could give."""
        if self._gate is not None and code == MESSAGES["WRITE"].code:
            self._gate.receive(body)
            return []
        return self._dispatcher.handle(code, body)

    def _refuse_write(self) -> None:
        self.counters["writes_refused"] += 1


def _source(config: DeviceConfig, memory: NDArray[np.uint8] | Copier | Copies) -> Memory | Copies:
    """Where experts come from."""
    if config.mover == "dma":
        if not isinstance(memory, np.ndarray):
            raise TypeError(f"Memory must be an array of bytes, not {memory!r}")
        return Memory(memory)
    if isinstance(memory, np.ndarray):
        raise TypeError("Memory must be a callable that copies tiles, not an array of bytes")
    if isinstance(memory, HostMover):
        return memory
    return HostCopies(config, memory)  # type: ignore[arg-type]
