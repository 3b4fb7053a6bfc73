"""Golden model of the host mover: fetches that a host serves."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from prestage_hw.contract.params import DeviceConfig, require_config
from prestage_hw.contract.records import HOST_MESSAGES, MESSAGES, RECORDS, ErrorCode

from .gate import WriteGate

__all__ = ["Copier", "Copies", "Fetch", "HostCopies", "HostMover"]

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


class Copies(Protocol):
    """Who copies tiles, as the scheduler sees it."""

    #: What the host's writes go through, where slots are in the device.
    gate: WriteGate | None

    def begin(self, layer: int, expert: int, slot: int, *, demand: bool) -> None:
        """An expert is wanted; its tiles may be copied from now on."""

    def results(
        self, layer: int, expert: int, slot: int, *, demand: bool
    ) -> Iterator[tuple[int, bool, bool]]:
        """Tile, whether it failed, and whether nothing more of the expert is to come.

        Begins by itself what was not begun.
        """


class HostCopies:
    """A host that copies when it is asked, tile by tile, none after one that has failed.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    copier : callable
        Takes a :class:`Fetch` and returns whether the tile is in its slot. With
        ``config.host_writes`` it writes all beats of the tile through ``gate`` before.

    Members
    -------
    gate : :class:`WriteGate` or None
        What the host's writes go through; only with ``config.host_writes``.

    Raises
    ------
    TypeError
        If ``copier`` can't be called.
    """

    def __init__(self, config: DeviceConfig, copier: Copier) -> None:
        require_config(config)
        if not callable(copier):
            raise TypeError(f"Copier must be callable, not {copier!r}")
        self._tiles = config.layer_tiles
        self._copier = copier
        self.gate = WriteGate(config) if config.host_writes else None

    def begin(self, layer: int, expert: int, slot: int, *, demand: bool) -> None:
        """Nothing: copies come when their results are wanted."""

    def results(
        self, layer: int, expert: int, slot: int, *, demand: bool
    ) -> Iterator[tuple[int, bool, bool]]:
        """Tile, whether it failed, and whether nothing more of the expert is to come."""
        tiles = self._tiles[layer]
        for tile in range(tiles):
            fetch = Fetch(layer, expert, slot, tile, demand)
            if self.gate is not None:
                self.gate.open(slot, tile)
            failed = not self._copier(fetch)
            if self.gate is not None:
                if not failed and not self.gate.whole(slot, tile):
                    raise ValueError(f"Tile must be written before it is reported: {fetch}")
                self.gate.close(slot, tile)
            yield tile, failed, failed or tile == tiles - 1
            if failed:
                return


class _Entry:
    """An expert that the host was asked for."""

    def __init__(self, tag: int, serial: int, slot: int, tiles: int) -> None:
        self.tag = tag
        self.serial = serial
        self.slot = slot
        self.outstanding = set(range(tiles))
        self.arrived: deque[tuple[int, bool]] = deque()


class _Closed(BaseException):
    """Ends the device's thread; not an Exception, so that nothing in the model catches it."""


class HostMover:
    """A device whose fetches leave as messages, to be answered by messages.

    The model serves a message to completion, which may need the host. So it runs in a thread of its
    own, which stands still whenever this one goes on: nothing ever runs at the same time. The
    demands of a routing decision are asked for together.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device, with the mover ``"host"``.

    Members
    -------
    gate : :class:`WriteGate` or None
        What the host's writes go through; only with ``config.host_writes``.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.gate = WriteGate(config) if config.host_writes else None
        self._config = config
        self._handle: Callable[[int, bytes], list[Answer]] | None = None
        self._reject: Callable[[], None] | None = None
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._answers: list[Answer] = []
        self._entries: dict[int, _Entry] = {}
        self._wanted: deque[tuple[int, int, int, bool]] = deque()
        self._serial = 0
        self._thread: threading.Thread | None = None
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._closing = False
        self._error: BaseException | None = None

    def connect(
        self, handle: Callable[[int, bytes], list[Answer]], reject: Callable[[], None]
    ) -> None:
        """Say who serves messages, and who counts those that are refused.

        Parameters
        ----------
        handle : callable
            Serves a message and returns its answers, as :meth:`Top.handle`, with this object for
            its memory.
        reject : callable
            Counts a message that is refused.
        """
        self._handle = handle
        self._reject = reject

    # What the host's side calls.

    def receive(self, code: int, body: bytes) -> list[Answer]:
        """Take a message of the host; returns all that is for the host now."""
        if code == MESSAGES["FETCHED"].code:
            self._fetched(body)
        elif self.gate is not None and code == MESSAGES["WRITE"].code:
            self.gate.receive(body)
        elif len(self._waiting) >= HOST_MESSAGES:
            self._refuse(ErrorCode.OVERRUN, address=code)
        else:
            self._waiting.append((code, body))
        self._run()
        answers, self._answers = self._answers, []
        return answers

    def restart(self) -> list[Answer]:
        """The link was restarted: the host has forgotten what it was asked for.

        Returns what comes of it, for the host that has come.
        """
        for entry in self._entries.values():
            for tile in sorted(entry.outstanding):
                self._close(entry.slot, tile)
                entry.arrived.append((tile, True))
            entry.outstanding.clear()
        self._run()
        answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        """End the device's thread. A second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._closing = True
            self._go.release()
            thread.join()

    def _fetched(self, body: bytes) -> None:
        tag, serial, tile, failed = RECORDS["Fetched"].unpack(self._config, body).values()
        assert isinstance(tag, int) and isinstance(tile, int)
        entry = self._entries.get(tag)
        if entry is None or entry.serial != serial or tile not in entry.outstanding:
            self._refuse(ErrorCode.BAD_FETCHED, expert=tag, address=tile)
            return
        if not failed and self.gate is not None and not self.gate.whole(entry.slot, tile):
            self._refuse(ErrorCode.BAD_FETCHED, expert=tag, address=tile)
            return
        self._close(entry.slot, tile)
        entry.outstanding.remove(tile)
        entry.arrived.append((tile, bool(failed)))

    def _close(self, slot: int, tile: int) -> None:
        if self.gate is not None:
            self.gate.close(slot, tile)

    def _refuse(self, code: ErrorCode, *, expert: int = 0, address: int = 0) -> None:
        assert self._reject is not None
        self._reject()
        self._answer("EVENT", code, 0, 0, expert, address)

    def _answer(self, name: str, *values: object) -> None:
        record = MESSAGES[name].record
        assert record is not None
        self._answers.append((MESSAGES[name].code, record.pack(self._config, *values)))

    # The device's thread.

    def _run(self) -> None:
        """Let the device go on until it has nothing to do or waits for the host."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="prestage-model", daemon=True)
            self._thread.start()
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _pause(self) -> None:
        """Let the host go on until it has something new."""
        self._stopped.release()
        self._go.acquire()
        if self._closing:
            raise _Closed

    def _work(self) -> None:
        try:
            self._go.acquire()
            while not self._closing:
                assert self._handle is not None
                while self._waiting:
                    try:
                        # What was answered meanwhile has gone; only then the list is looked at.
                        answers = self._handle(*self._waiting.popleft())
                        self._answers += answers
                    except Exception as error:
                        self._error = error
                self._pause()
        except _Closed:
            pass

    # What the scheduler calls, in the device's thread.

    def begin(self, layer: int, expert: int, slot: int, *, demand: bool) -> None:
        """Ask the host for all tiles of an expert, as soon as there is an entry for it."""
        self._wanted.append((layer, expert, slot, demand))
        self._ask()

    def _ask(self) -> None:
        while self._wanted and len(self._entries) < self._config.inflight:
            layer, expert, slot, demand = self._wanted.popleft()
            tag = next(t for t in range(self._config.inflight) if t not in self._entries)
            self._serial = (self._serial + 1) & 0xFFFF
            tiles = self._config.layer_tiles[layer]
            self._entries[tag] = _Entry(tag, self._serial, slot, tiles)
            for tile in range(tiles):
                if self.gate is not None:
                    self.gate.open(slot, tile)
                self._answer("FETCH", tag, self._serial, int(demand), layer, expert, slot, tile)

    def results(
        self, layer: int, expert: int, slot: int, *, demand: bool
    ) -> Iterator[tuple[int, bool, bool]]:
        """Tile, whether it failed, and whether nothing more of the expert is to come."""
        asked = [entry.slot for entry in self._entries.values()]
        if slot not in asked and slot not in [wanted for _, _, wanted, _ in self._wanted]:
            self.begin(layer, expert, slot, demand=demand)
        entry = next(e for e in self._entries.values() if e.slot == slot)
        while entry.outstanding or entry.arrived:
            while not entry.arrived:
                self._pause()
            tile, failed = entry.arrived.popleft()
            last = not entry.outstanding and not entry.arrived
            if last:
                del self._entries[entry.tag]
                self._ask()
            yield tile, failed, last
