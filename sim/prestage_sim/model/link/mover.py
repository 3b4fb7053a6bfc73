"""Golden model of the host mover: fetches that leave as messages, and what the host answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from prestage_hw.contract.params import DeviceConfig, require_config
from prestage_hw.contract.records import HOST_MESSAGES, MESSAGES, RECORDS, ErrorCode, FetchReason

__all__ = ["Copier", "Device", "Fetch", "HostMover"]

#: Frame type and body of a message for the host.
Answer = tuple[int, bytes]


class Fetch(NamedTuple):
    """One tile that the host is to copy."""

    layer: int
    expert: int
    slot: int
    tile: int
    demand: bool


#: Copies a tile; False if it could not.
Copier = Callable[[Fetch], bool]


class Device(Protocol):
    """The device behind the mover: what it has to say, it says at once."""

    def handle(self, code: int, body: bytes) -> list[Answer]:
        """Take a message, of which some may come to an end later; what is to be answered now."""

    def ready(self, code: int, body: bytes) -> bool:
        """Whether there is room for a message, and nothing that it has to wait for."""

    def next_fetch(self) -> tuple[int, Fetch] | None:
        """Take the tile that the host is to copy next, with the entry that it is of."""

    def written(self, tag: int, tile: int) -> bool:
        """Whether the host may say of a tile of an entry that it is in its slot."""

    def complete(self, tag: int, tile: int, reason: FetchReason) -> list[Answer]:
        """A tile of an entry has ended; what is to be answered now."""

    def reject(self) -> None:
        """Count a message that is refused."""


class HostMover:
    """Stand between link and device: tiles leave as FETCH, and FETCHED overtake all else.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device, with the mover ``"host"``.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self._config = config
        self._device: Device | None = None
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._asked: dict[int, set[int]] = {}  # tiles of each entry that were not reported
        self._serials: dict[int, int] = {}  # of the fetch that each entry is, or was last
        self._serial = 0

    def connect(self, device: Device) -> None:
        """Say whose fetches these are."""
        self._device = device

    def receive(self, code: int, body: bytes) -> list[Answer]:
        """Take a message of the host; returns all that is for the host now."""
        answers: list[Answer] = []
        if code == MESSAGES["FETCHED"].code:
            self._fetched(body, answers)
        elif self._config.host_writes and code == MESSAGES["WRITE"].code:
            assert self._device is not None
            answers += self._device.handle(code, body)
        elif len(self._waiting) >= HOST_MESSAGES:
            self._refuse(ErrorCode.OVERRUN, answers, address=code)
        else:
            self._waiting.append((code, body))
        self._serve(answers)
        return answers

    def restart(self) -> list[Answer]:
        """The link was restarted: the host has forgotten what it was asked for.

        Returns what comes of it, for the host that has come.
        """
        answers: list[Answer] = []
        asked = [(tag, tile) for tag in sorted(self._asked) for tile in sorted(self._asked[tag])]
        for tag, tile in asked:
            self._complete(tag, tile, FetchReason.BUS, answers)
        self._serve(answers)
        return answers

    def expire(self, tag: int) -> list[Answer]:
        """Nothing was heard of an entry for the time of the register ``dma_timeout``.

        The RTL's doing: the model has no clock, so that nothing expires by itself.
        """
        answers: list[Answer] = []
        for tile in sorted(self._asked.get(tag, ())):
            self._complete(tag, tile, FetchReason.TIMEOUT, answers)
        self._serve(answers)
        return answers

    def _fetched(self, body: bytes, answers: list[Answer]) -> None:
        assert self._device is not None
        tag, serial, tile, failed = RECORDS["Fetched"].unpack(self._config, body).values()
        assert isinstance(tag, int) and isinstance(tile, int)
        known = self._serials.get(tag) == serial and tile in self._asked.get(tag, ())
        if known and (failed or self._device.written(tag, tile)):
            self._complete(tag, tile, FetchReason.BUS if failed else FetchReason.OK, answers)
        else:
            self._refuse(ErrorCode.BAD_FETCHED, answers, expert=tag, address=tile)

    def _complete(self, tag: int, tile: int, reason: FetchReason, answers: list[Answer]) -> None:
        assert self._device is not None
        self._asked[tag].remove(tile)
        answers += self._device.complete(tag, tile, reason)

    def _serve(self, answers: list[Answer]) -> None:
        """Hand on what need not wait any longer, and ask for tiles."""
        assert self._device is not None
        self._ask(answers)
        while self._waiting and self._device.ready(*self._waiting[0]):
            answers += self._device.handle(*self._waiting.popleft())
            self._ask(answers)

    def _ask(self, answers: list[Answer]) -> None:
        assert self._device is not None
        while (wanted := self._device.next_fetch()) is not None:
            tag, fetch = wanted
            if fetch.tile == 0:
                self._serial = (self._serial + 1) & 0xFFFF
                self._serials[tag] = self._serial
            self._asked.setdefault(tag, set()).add(fetch.tile)
            values = (fetch.layer, fetch.expert, fetch.slot, fetch.tile)
            answers.append(
                self._message("FETCH", tag, self._serials[tag], int(fetch.demand), *values)
            )

    def _refuse(
        self, code: ErrorCode, answers: list[Answer], *, expert: int = 0, address: int = 0
    ) -> None:
        assert self._device is not None
        self._device.reject()
        answers.append(self._message("EVENT", code, 0, 0, expert, address))

    def _message(self, name: str, *values: object) -> Answer:
        record = MESSAGES[name].record
        assert record is not None
        return MESSAGES[name].code, record.pack(self._config, *values)
