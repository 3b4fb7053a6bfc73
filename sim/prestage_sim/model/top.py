"""Golden model of the whole device, one message at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract.params import DeviceConfig

from .buffer.buffer import ExpertBuffer
from .link.dispatcher import Answer, Dispatcher
from .link.mover import Copier, Copies, HostCopies, HostMover
from .predictor import create_predictor
from .scheduler.scheduler import Memory, Scheduler
from .stats.counters import Counters
from .stats.registers import RegisterBank

__all__ = ["Top"]


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
        whether it could.

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
        self.scheduler = Scheduler(
            config, buffer=self.buffer, memory=self.memory, counters=self.counters
        )
        self.registers = RegisterBank(
            config, self.counters, self.predictor, self.scheduler.throttle
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
        return self._dispatcher.handle(code, body)


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
