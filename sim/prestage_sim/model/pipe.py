"""The golden model behind the byte streams of a device: ``model://``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import TRANSFER_DTYPE, DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.pipe import slot_tiles

from .link import DeviceLink
from .link.dispatcher import Answer
from .link.mover import HostMover
from .top import Top

__all__ = ["ModelPipe", "open_pipe"]


class ModelPipe:
    """A device without a clock: every message is served as soon as it arrives.

    With a DMA engine it is served to completion; with a host mover copies take their time.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    memory : array of uint8
        Bytes of the memory, from address 0; with a host mover, of size 0.
    failing : sequence of pairs of :class:`int`
        Address and size of ranges that answer with an error; none with a host mover.

    Members
    -------
    top : :class:`Top`
        The device behind the link.

    Raises
    ------
    TypeError
        If a parameter is not of its type.
    """

    def __init__(
        self,
        config: DeviceConfig,
        *,
        memory: NDArray[np.uint8],
        failing: Sequence[tuple[int, int]] = (),
    ) -> None:
        require_config(config)
        if not isinstance(memory, np.ndarray) or memory.dtype != np.uint8 or memory.ndim != 1:
            raise TypeError("Memory must be a one-dimensional array of uint8")
        self.config = config
        self._mover: HostMover | None = None
        if config.mover == "host":
            if memory.size or failing:
                raise ValueError("Memory must be empty where the host moves experts")
            self._mover = HostMover(config)
            self.top = Top(config, self._mover)
        else:
            self.top = Top(config, memory)
            assert self.top.memory is not None
            self.top.memory.failing.extend((address, address + size) for address, size in failing)
        self._memory = memory
        self._link = DeviceLink(config)
        self._errors = 0
        self._replays = 0
        self._closed = False

    @property
    def cycles(self) -> int:
        """Always 0: there is no clock."""
        return 0

    @property
    def clocked(self) -> bool:
        """Always False: there is no clock."""
        return False

    def exchange(self, data: bytes, *, frames: int = 1, limit: float | None = None) -> bytes:
        """Serve ``data`` and return everything that is due; there is nothing to wait for.

        An empty answer to a caller who expects frames stands for a silence in which the device's
        replay timer ends.

        Raises
        ------
        OSError
            If the pipe is closed.
        """
        if self._closed:
            raise OSError("the device was closed")
        link = self._link
        resets = link.resets
        messages = link.receive(data)
        self._count()
        if self._mover is not None and link.resets != resets:
            for answer_code, answer in self._mover.restart():
                link.reply(answer_code, answer)
        for code, body in messages:
            for answer_code, answer in self._handle(code, body):
                link.reply(answer_code, answer)
        answer = link.transmit()
        if not answer and frames > 0 and not data:
            link.expire()
            self._count()
            answer = link.transmit()
        return answer

    def _handle(self, code: int, body: bytes) -> list[Answer]:
        """Answers that a message brings about, perhaps with those to messages before."""
        return (
            self.top.handle(code, body) if self._mover is None else self._mover.receive(code, body)
        )

    def _count(self) -> None:
        counters = self.top.counters
        counters["link_errors"] += self._link.errors - self._errors
        counters["link_replays"] += self._link.replays - self._replays
        self._errors, self._replays = self._link.errors, self._link.replays

    def run(self, cycles: int) -> bytes:
        """Nothing passes: returns what is due."""
        return self.exchange(b"", frames=0)

    def read_slot(self, slot: int, *, size: int | None = None) -> bytes:
        """The first ``size`` bytes of a slot, or all.

        Raises
        ------
        ValueError
            If there is no such slot, or if it hasn't so many whole tiles.
        OSError
            If a tile of them isn't valid, or slots are the host's.
        """
        tiles = slot_tiles(self.config, size)
        if not 0 <= slot < self.config.slots:
            raise ValueError(f"Slot must be between 0 and {self.config.slots - 1}, not {slot}")
        self._check_slots()
        storage = self.top.buffer.storage
        missing = [t for t in range(tiles) if not storage.valid[slot] >> t & 1]
        if missing:
            raise OSError(f"tile {missing[0]} of slot {slot} is not valid")
        data: bytes = storage.data[slot, : tiles * self.config.tile_bytes].tobytes()
        return data

    def compare(
        self, slots: Sequence[int], layers: Sequence[int], experts: Sequence[int]
    ) -> list[int]:
        """Positions whose slot differs from the expert in memory, or has an invalid tile.

        Raises
        ------
        OSError
            If slots or experts are the host's.
        """
        self._check_slots()
        if self.config.mover == "host":
            raise OSError("experts are the host's")
        storage = self.top.buffer.storage
        bases = self.top.registers.bases
        wrong = []
        for at, (slot, layer, expert) in enumerate(zip(slots, layers, experts, strict=True)):
            parts = [
                self._memory[start : start + size]
                for start, size in self.config.expert_spans(layer, expert, bases=bases)
            ]
            whole = np.concatenate(parts)
            valid = (1 << self.config.layer_tiles[layer]) - 1
            if storage.valid[slot] != valid or not np.array_equal(
                storage.data[slot, : whole.size], whole
            ):
                wrong.append(at)
        return wrong

    def _check_slots(self) -> None:
        if self.config.mover == "host" and not self.config.stores_slots:
            raise OSError("slots are the host's")

    def transfers(self) -> NDArray[np.void]:
        """Always empty: there is no clock."""
        return np.zeros(0, dtype=TRANSFER_DTYPE)

    def close(self) -> None:
        """Refuse further bytes. A second call does nothing."""
        self._closed = True


def open_pipe(
    config: DeviceConfig, *, memory: NDArray[np.uint8], options: Mapping[str, str]
) -> ModelPipe:
    """Open the golden model: what ``model://`` stands for.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    memory : array of uint8
        Bytes of the memory, from address 0.
    options : mapping
        The URL's options: ``error`` names address ranges that answer with an error, as
        ``ADDRESS:SIZE[,ADDRESS:SIZE...]``.

    Raises
    ------
    ValueError
        If an option is unknown or malformed.
    """
    for name in options:
        if name != "error":
            raise ValueError(f"Option of model:// must be error, not {name!r}")
    return ModelPipe(config, memory=memory, failing=_ranges(options.get("error", "")))


def _ranges(text: str) -> list[tuple[int, int]]:
    ranges = []
    for part in text.split(",") if text else ():
        try:
            address, size = (int(number, 0) for number in part.split(":"))
        except ValueError:
            address = size = 0
        if address < 0 or size <= 0:
            raise ValueError(f"Error range must be ADDRESS:SIZE with a positive size, not {part!r}")
        ranges.append((address, size))
    return ranges
