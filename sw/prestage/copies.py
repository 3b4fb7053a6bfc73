"""Copies that a device with a host mover asks for."""

from __future__ import annotations

import inspect
import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import NamedTuple

from prestage_hw.contract import DeviceConfig

from .errors import ArgumentError, LinkError

__all__ = ["Copier", "CopyServer"]

#: ``copier(layer, expert, slot, tile, nbytes, demand)`` copies one tile of an expert into a slot.
Copier = Callable[[int, int, int, int, int, bool], object]


class _Fetch(NamedTuple):
    """A FETCH of the device."""

    tag: int
    serial: int
    demand: int
    layer: int
    expert: int
    slot: int
    tile: int


class CopyServer:
    """Call a copier for each fetch of a device, and keep what is to be reported.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose fetches are served.
    copier : callable
        Copies a tile and returns, or returns a :class:`concurrent.futures.Future` that is done once
        the tile is in its slot. What it raises, or the future ends with, means that it is not. With
        ``config.host_writes`` the tile's bytes may be what it, or the future, gives back: they are
        then written over the link; None means that they were written through the device's port.

    Raises
    ------
    TypeError
        If ``copier`` can't be called.
    """

    def __init__(self, config: DeviceConfig, copier: Copier) -> None:
        if not callable(copier):
            raise TypeError(f"Copier must be callable, not {copier!r}")
        self._config = config
        self._copier = copier
        self._demands: deque[_Fetch] = deque()
        self._prefetches: deque[_Fetch] = deque()
        self._futures: dict[tuple[int, int, int], Future[object]] = {}
        self._done: queue.SimpleQueue[tuple[_Fetch, BaseException | None, object]] = (
            queue.SimpleQueue()
        )
        self._reported: deque[tuple[_Fetch, BaseException | None, memoryview | None]] = deque()
        self._good: dict[tuple[int, int], _Fetch] = {}  # by entry and tile
        self._errors: dict[tuple[int, int], BaseException] = {}
        self._calling = False
        self._told: set[tuple[int, int]] = set()
        # Whether the copier has returned a future lately: for a prefetch, if there was one.
        self._prompt: bool | None = None
        self._demand_prompt = False

    @property
    def calling(self) -> bool:
        """True while the copier is called."""
        return self._calling

    @property
    def under_way(self) -> int:
        """Copies whose futures the device hasn't been told of."""
        return len(self._futures)

    @property
    def waiting(self) -> bool:
        """True if there are copies to begin."""
        return bool(self._demands or self._prefetches)

    def take(self, *values: int) -> None:
        """Take a FETCH of the device.

        Raises
        ------
        LinkError
            If it names something that the device doesn't have.
        """
        fetch = _Fetch(*values)
        config = self._config
        if not (
            fetch.layer < config.model.layers
            and fetch.expert < config.model.experts
            and fetch.slot < config.slots
            and fetch.tile < config.layer_tiles[fetch.layer]
        ):
            raise LinkError(f"Device asked for a tile that there isn't: {fetch}")
        (self._demands if fetch.demand else self._prefetches).append(fetch)

    @property
    def prompt(self) -> bool:
        """Whether prefetches are begun at once: the copier doesn't copy them within the call."""
        return self._demand_prompt if self._prompt is None else self._prompt

    def begin(self, *, prefetch: bool) -> None:
        """Begin the copies of all demands that wait, and that of one prefetch.

        Without ``prefetch`` that of none, unless it takes no time: those are all begun.
        """
        while self._demands:
            self._call(self._demands.popleft())
        while self._prefetches and (prefetch or self.prompt):
            self._call(self._prefetches.popleft())
            prefetch = False

    def _call(self, fetch: _Fetch) -> None:
        if fetch.tile == 0:
            self._errors.pop((fetch.layer, fetch.expert), None)
        self._calling = True
        try:
            result = self._copier(
                fetch.layer,
                fetch.expert,
                fetch.slot,
                fetch.tile,
                self._config.tile_bytes,
                bool(fetch.demand),
            )
            if fetch.demand:
                self._demand_prompt = isinstance(result, Future)
            else:
                self._prompt = isinstance(result, Future)
            if isinstance(result, Future):
                self._watch(fetch, result)
            elif inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise TypeError(
                    f"Copier must return a concurrent.futures.Future or nothing to wait for, not"
                    f" {result!r}"
                )
            else:
                self._reported.append((fetch, None, self._bytes(result)))
        except BaseException as error:
            self._reported.append((fetch, error, None))
            if not isinstance(error, Exception):
                raise  # Ctrl-C is not the copier's; the device is told all the same.
        finally:
            self._calling = False

    def _watch(self, fetch: _Fetch, future: Future[object]) -> None:
        self._futures[fetch.tag, fetch.serial, fetch.tile] = future

        def done(future: Future[object]) -> None:
            error = CancelledError() if future.cancelled() else future.exception()
            self._done.put((fetch, error, None if error is not None else future.result()))

        future.add_done_callback(done)

    def wait(self, timeout: float | None) -> bool:
        """Wait, in seconds, until a copy has ended; False if none has."""
        if self._reported:
            return True
        try:
            self._end(*self._done.get(timeout=timeout))
        except queue.Empty:
            return False
        return True

    def ended(self) -> Iterator[tuple[list[tuple[int, int, bytes]], tuple[int, int, int, int]]]:
        """Of each copy that has ended since the last call its WRITEs and its FETCHED, as fields."""
        while True:
            try:
                self._end(*self._done.get_nowait())
            except queue.Empty:
                break
        while self._reported:
            fetch, error, data = self._reported.popleft()
            if error is not None:
                self._errors[fetch.layer, fetch.expert] = error
            elif self._config.host_writes:
                self._good[fetch.tag, fetch.tile] = fetch
            beats = [] if data is None else self._beats(fetch, data)
            yield beats, (fetch.tag, fetch.serial, fetch.tile, int(error is not None))

    def was_told(self, tag: int, tile: int) -> bool:
        """Whether the device was ever told the end of that tile of an entry, which it asked for."""
        return (tag, tile) in self._told

    def _end(self, fetch: _Fetch, error: BaseException | None, result: object) -> None:
        self._futures.pop((fetch.tag, fetch.serial, fetch.tile), None)
        data = None
        if error is None:
            try:
                data = self._bytes(result)
            except (ArgumentError, TypeError) as wrong:
                error = wrong
        self._reported.append((fetch, error, data))

    def _bytes(self, result: object) -> memoryview | None:
        """What a copier has given back for the device to write, if it is to."""
        if result is None or not self._config.host_writes:
            return None
        try:
            data = memoryview(result).cast("B")  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                f"Copier must return a tile's bytes in one piece, a Future or None, not {result!r}"
            ) from None
        size = self._config.tile_bytes
        if len(data) != size:
            raise ArgumentError(f"Tile must be {size} bytes, but the copier returned {len(data)}")
        return data

    def _beats(self, fetch: _Fetch, data: memoryview) -> list[tuple[int, int, bytes]]:
        """Slot, number and bytes of each beat of a tile."""
        width, first = self._config.data_bytes, fetch.tile * self._config.tile_beats
        return [
            (fetch.slot, first + at, bytes(data[at * width : (at + 1) * width]))
            for at in range(self._config.tile_beats)
        ]

    def refused(self, tag: int, tile: int) -> bool:
        """The device has refused a FETCHED: False if it isn't one of a tile that it has slots for.

        Else the tile was not written whole, and is reported as one that failed.
        """
        fetch = self._good.pop((tag, tile), None)
        if fetch is None:
            return False
        error = ArgumentError(
            f"Copier must write a tile whole, or return its bytes: tile {tile} of expert"
            f" {fetch.expert}, layer {fetch.layer}, was not"
        )
        self._reported.append((fetch, error, None))
        return True

    def error_of(self, layer: int, expert: int) -> BaseException | None:
        """Why the last copy of an expert failed; it is forgotten then."""
        return self._errors.pop((layer, expert), None)

    def check_idle(self) -> None:
        """Refuse a call of the device by the copier.

        Raises
        ------
        ArgumentError
            If the copier is being called.
        """
        if self._calling:
            raise ArgumentError("Copier must not call the device that it copies for")

    def close(self) -> None:
        """Begin nothing more; cancel the futures that let themselves be cancelled."""
        self._demands.clear()
        self._prefetches.clear()
        for future in list(self._futures.values()):
            future.cancel()
