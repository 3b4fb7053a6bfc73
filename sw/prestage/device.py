"""One device: what an inference loop calls."""

from __future__ import annotations

import operator
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import MESSAGES, DeviceConfig, Pipe, SimulatedPipe, register_by_name
from prestage_hw.contract.crc import CHECKSUM_TABLE
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import (
    HOST_MESSAGES,
    NO_TOKEN,
    REFUSAL_TEXT,
    TABLE_BURST,
    ErrorCode,
    Phase,
    Policy,
    PrefetchKind,
    PrefetchOutcome,
    Record,
    Refusal,
)
from prestage_hw.contract.registers import (
    CHANNEL_COUNTERS,
    COUNTERS,
    REFUSAL_FIELDS,
    REGISTERS,
    shape_registers,
)
from prestage_hw.contract.statistics import KIND_BITS, OUTCOME_BITS, STATISTICS_TABLE

from .copies import Copier, CopyServer
from .errors import (
    ArgumentError,
    ClosedError,
    DataError,
    DeviceError,
    DeviceTimeoutError,
    LinkError,
    MismatchError,
    device_error,
)
from .link import HostLink
from .settings import Settings, known_phase
from .snapshot import Snapshot, read_snapshot, write_snapshot

__all__ = ["Device", "Ready", "Refused", "check_mover"]

#: Answers to wait for at once where many come: half of what the device sends before it needs an
#: acknowledge, so that it never stands still.
_ANSWERS = 8

#: Longest wait for a message, in the pipe's unit of time, while copies of the host's are under way.
_COPY_PATIENCE = 2_000

#: Longest wait for the end of a copy, in seconds, before a device that isn't simulated is heard
#: again: it may still have something to say.
_COPY_PAUSE = 0.001

#: Clock cycles that a simulated device runs at once before its fetches are served.
_SERVED_CYCLES = 500

#: Words of a table that one message asks for.
_TABLE_PIECE = 1024

_CLEAR_PREDICTOR, _CLEAR_BUFFER, _CLEAR_COUNTERS, _CLEAR_CHECKSUMS = 1, 2, 4, 8


#: Events that refuse a whole routing decision.
_REFUSED_ROUTE = frozenset(
    {
        ErrorCode.BAD_CONTEXT,
        ErrorCode.BAD_LAYER,
        ErrorCode.BAD_EXPERT,
        ErrorCode.DUPLICATE_EXPERT,
        ErrorCode.UNRELEASED,
    }
)

#: Events about one demand of a routing decision.
_FAILED_DEMAND = frozenset(
    {
        ErrorCode.BUS,
        ErrorCode.NO_SLOT,
        ErrorCode.SLOT_MEMORY,
        ErrorCode.CHECKSUM,
        ErrorCode.TIMEOUT,
        ErrorCode.ABORTED,
        ErrorCode.ADDRESS,
    }
)
_FAILED_COPY = _FAILED_DEMAND | {ErrorCode.NOT_HELD}


class Ready(NamedTuple):
    """An expert that has arrived: its slot holds exactly its bytes until the layer is released."""

    ctx: int
    layer: int
    expert: int
    slot: int


class Refused(NamedTuple):
    """A register write that the device has refused."""

    register: str
    reason: Refusal

    def __str__(self) -> str:
        return f"Write of register {self.register} was refused: {REFUSAL_TEXT[self.reason]}"


class _Route:
    """One unreleased routing decision."""

    __slots__ = ("errors", "experts", "ready", "refused", "waiting")

    def __init__(self, experts: Sequence[int]) -> None:
        self.experts = experts
        self.waiting = set(experts)
        self.ready: deque[Ready] = deque()
        self.errors: deque[DeviceError] = deque()
        self.refused = False


def _layout(record: Record | None, config: DeviceConfig) -> struct.Struct:
    """Wire layout of a record, bound once: the hot path packs some ten messages a layer."""
    assert record is not None
    codes = {8: "B", 16: "H", 32: "I", 64: "Q"}
    return struct.Struct(
        "<" + "".join(f"{f.length(config)}{codes[f.wire_bits]}" for f in record.fields)
    )


def check_mover(config: DeviceConfig, copier: Copier | None) -> None:
    """Refuse a copier that isn't given exactly where the host moves experts."""
    if config.mover == "host" and copier is None:
        raise ArgumentError("Device with mover 'host' must have a copier: give open() one")
    if config.mover != "host" and copier is not None:
        raise ArgumentError(
            f"Copier must not be given to a device with mover {config.mover!r}, which never calls"
            " it: the configuration must have mover='host'"
        )


class Device:
    """A device behind a pipe.

    Messages are posted one way: only :meth:`wait_ready`, :meth:`read`, :meth:`drain`, :meth:`stats`
    and the table methods wait for an answer, and whatever arrives meanwhile is kept. Arguments are
    checked before anything is sent.

    Parameters
    ----------
    pipe : :class:`Pipe`
        Byte streams to and from the device; closed with it.
    config : :class:`DeviceConfig`
        Device that is expected.
    url : :class:`str`
        Where the pipe came from, for messages.
    copier : callable or None
        With ``config.mover == "host"``, and only then: ``copier(layer, expert, slot, tile, nbytes,
        demand)`` copies tile ``tile``, of ``nbytes`` bytes, of an expert into the host's slot
        ``slot``; ``demand`` is False for a prefetch. It is called from within this object's
        methods, which it must not call, and either returns when the copy is done or returns a
        :class:`concurrent.futures.Future` that is done then. If it raises, or the future ends with
        an exception, the expert's fetch has failed: who waits for it gets a :class:`BusError` with
        that exception as its cause. With ``config.host_writes`` it, or the future, may give the
        tile's bytes back, which are then written into the device's slot over the link; None means
        that it has written them through the device's port.

    Members
    -------
    config, pipe, url
        As given.

    Raises
    ------
    MismatchError
        If a register of the device disagrees with the configuration.
    ArgumentError
        If a copier is missing, or given in vain.
    """

    def __init__(
        self, pipe: Pipe, config: DeviceConfig, *, url: str = "", copier: Copier | None = None
    ) -> None:
        require_config(config)
        check_mover(config, copier)
        self._copies = None if copier is None else CopyServer(config, copier)
        self._expires = False  # Copies may take too long.
        self._untaken = 0  # messages that no answer has shown to be taken, at most
        self._asked: deque[bool] = deque()  # registers asked for: is it only to hear an answer?
        self._heard = 0
        self.config = config
        self.pipe = pipe
        self.url = url
        self._closed = False
        self._link = HostLink(pipe, config)
        self._simulated = pipe if isinstance(pipe, SimulatedPipe) else None
        self._routes: dict[tuple[int, int], _Route] = {}
        self._locked: dict[tuple[int, int], Ready] = {}
        self._locking: set[tuple[int, int, int]] = set()  # context, layer, expert
        self._lock_errors: dict[tuple[int, int, int], DeviceError] = {}
        # Copies of experts by number; answers that are awaited, by context, layer and expert, and
        # the errors among those that have come.
        self._held: dict[tuple[int, int], dict[int, Ready]] = {}
        self._copying: dict[tuple[int, int, int], int] = {}
        self._copy_errors: dict[tuple[int, int, int], list[DeviceError]] = {}
        self._current = [-1] * config.contexts
        self._unclaimed: list[DeviceError] = []
        self._values: deque[tuple[int, int]] = deque()
        self._data: deque[tuple[int, int, bytes, int]] = deque()
        self._words: deque[tuple[int, ...]] = deque()
        self._synced: int | None = None
        self._sync_tag = 0
        self._settings = Settings(config, read=self.read_register)
        self._contexts = config.contexts
        self._layers = config.model.layers
        self._experts = config.model.experts
        self._top_k = config.model.top_k
        layouts = {name: _layout(m.record, config) for name, m in MESSAGES.items() if m.record}
        self._pack = {
            name: (MESSAGES[name].code, layout.pack)
            for name, layout in layouts.items()
            if MESSAGES[name].to_device
        }
        self._route_code, self._route_pack = self._pack["ROUTE"]
        self._sizes = {m.code: layouts[m.name].size for m in MESSAGES.values() if m.record}
        self._ready_code = MESSAGES["READY"].code
        self._ready_unpack = layouts["READY"].unpack
        self._handlers: dict[int, tuple[Callable[[bytes], Any], Callable[..., None]]] = {
            MESSAGES["EVENT"].code: (layouts["EVENT"].unpack, self._on_event),
            MESSAGES["SYNCED"].code: (layouts["SYNCED"].unpack, self._on_synced),
            MESSAGES["COPY"].code: (layouts["COPY"].unpack, self._on_copy),
            MESSAGES["REGISTER_VALUE"].code: (layouts["REGISTER_VALUE"].unpack, self._on_value),
            MESSAGES["DATA"].code: (layouts["DATA"].unpack, self._on_data),
            MESSAGES["TABLE_DATA"].code: (layouts["TABLE_DATA"].unpack, self._on_words),
        }
        if self._copies is not None:
            fetch = MESSAGES["FETCH"].code
            self._handlers[fetch] = (layouts["FETCH"].unpack, self._copies.take)
        self._link.reset()
        self._check_shape()

    def _check_shape(self) -> None:
        expected = shape_registers(self.config)
        actual = self._read_registers(list(expected))
        hints = {
            "device_id": "This is no Prestage device, or the link garbles bytes.",
            "register_hash": "Driver and device were built from different register lists.",
        }
        for name, value in zip(expected, actual, strict=True):
            if name == "version":
                if value >> 16 != expected[name] >> 16:
                    raise MismatchError(
                        name,
                        expected=expected[name],
                        actual=value,
                        hint="The major versions must agree.",
                    )
            elif value != expected[name]:
                raise MismatchError(
                    name, expected=expected[name], actual=value, hint=hints.get(name, "")
                )

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Send what was posted and release the device. A second call does nothing.

        Copies that the host's copier has under way are not waited for.
        """
        if self._closed:
            return
        self._closed = True
        if self._copies is not None:
            self._copies.close()
        try:
            self._link.poll(frames=0)
        except (OSError, LinkError):
            pass  # a device that has gone can't be told anything more
        finally:
            self.pipe.close()

    @property
    def closed(self) -> bool:
        """True once the device was closed."""
        return self._closed

    @property
    def simulated(self) -> SimulatedPipe | None:
        """The pipe, if it is that of a simulated device."""
        return self._simulated

    @property
    def clocked(self) -> bool:
        """True if the device is simulated and has a clock."""
        return self._simulated is not None and self._simulated.clocked

    @property
    def cycles(self) -> int:
        """Clock cycles since reset of a simulated device, without a message; 0 otherwise."""
        return self._simulated.cycles if self._simulated is not None else 0

    @property
    def copying(self) -> int:
        """Copies of the host's copier that the device hasn't been told the end of."""
        return 0 if self._copies is None else self._copies.under_way

    @property
    def unclaimed(self) -> tuple[DeviceError, ...]:
        """Errors that belong to no layer that is waited for; :meth:`drain` raises them."""
        return tuple(self._unclaimed)

    # What an inference loop calls.

    def begin_token(
        self, ctx: int, token: int | None = None, phase: Phase | int = Phase.DECODE
    ) -> None:
        """A token starts.

        Parameters
        ----------
        ctx : :class:`int`
            Context (sequence) number.
        token : :class:`int` or None
            Id of the *input* token, 0 to 0xFFFFFFFE; None where unknown.
        phase : :class:`Phase`
            What the token is for. With ``configure(follow_phase=True)`` it becomes the active
            profile, as by :meth:`switch`.
        """
        self._check_context(ctx)
        number = NO_TOKEN if token is None else operator.index(token)
        if not 0 <= number <= NO_TOKEN or (token is not None and number == NO_TOKEN):
            raise ArgumentError(f"Token id must be between 0 and {NO_TOKEN - 1}, not {token}")
        phase = known_phase(phase)
        self._post("BEGIN_TOKEN", ctx, phase, number)
        self._current[ctx] = -1
        self._settings.token_begins(phase)

    def route(self, ctx: int, layer: int, experts: Iterable[int]) -> None:
        """The router has chosen: demand k experts, teach the predictor and start prefetches.

        Parameters
        ----------
        ctx, layer : :class:`int`
            Context, and the layer that was routed.
        experts : iterable of :class:`int`
            The k chosen experts, descending weight, distinct.

        Raises
        ------
        ArgumentError
            If a number is out of range, there are not k distinct experts, or the layer wasn't
            released since its last route.
        """
        chosen = [operator.index(expert) for expert in experts]
        self._check_layer(ctx, layer)
        if len(chosen) != self._top_k:
            raise ArgumentError(
                f"Route must name k = {self._top_k} experts, not {len(chosen)}: {chosen}"
            )
        if min(chosen) < 0 or max(chosen) >= self._experts:
            raise ArgumentError(f"Experts must be between 0 and {self._experts - 1}, not {chosen}")
        key = (ctx, layer)
        if key in self._routes:
            raise ArgumentError(
                f"Layer {layer} of context {ctx} must be released before it is routed again"
            )
        route = _Route(chosen)
        if len(route.waiting) != self._top_k:
            raise ArgumentError(f"Experts of a route must be distinct, not {chosen}")
        self._send(self._route_code, self._route_pack(ctx, layer, *chosen))
        self._routes[key] = route
        self._current[ctx] = layer

    def hint(self, ctx: int, layer: int, expert: int, score: int = 255) -> None:
        """Tell the device that a layer to come may choose an expert.

        Parameters
        ----------
        ctx, layer, expert : :class:`int`
            Context, a layer after the last one routed in this token, expert.
        score : :class:`int`
            Confidence, 0 to 255. Hints below the threshold are dropped, and all of them unless
            hints are enabled: see :meth:`configure`.
        """
        self._check_expert(ctx, layer, expert)
        if not 0 <= operator.index(score) <= 255:
            raise ArgumentError(f"Hint score must be between 0 and 255, not {score}")
        if layer <= self._current[ctx]:
            raise ArgumentError(
                f"Hint must be for a layer after {self._current[ctx]}, the last one routed, not"
                f" {layer}"
            )
        self._post("HINT", ctx, layer, expert, score)

    def wait_ready(self, ctx: int, layer: int, *, timeout: float | None = None) -> Iterator[Ready]:
        """Experts of a routed layer as they arrive, ready first.

        Parameters
        ----------
        ctx, layer : :class:`int`
            A context and a layer that was routed and not released.
        timeout : :class:`float` or None
            Longest wait for the next expert: clock cycles on a simulated device, microseconds on a
            board.

        Raises
        ------
        DeviceError
            If the device reports an error about this layer. The other experts still come: wait
            again.
        DeviceTimeoutError
            If nothing arrives in time.
        """
        self._check_layer(ctx, layer)
        route = self._routes.get((ctx, layer))
        if route is None:
            raise ArgumentError(
                f"Layer {layer} of context {ctx} must be routed before it's waited for"
            )
        self._check_open()
        return self._arrivals(ctx, layer, route, timeout)

    def _arrivals(
        self, ctx: int, layer: int, route: _Route, timeout: float | None
    ) -> Iterator[Ready]:
        while True:
            while route.ready:
                yield route.ready.popleft()
            if route.errors:
                error = route.errors.popleft()
                if route.refused:
                    self._routes.pop((ctx, layer), None)
                raise error
            if not route.waiting:
                return
            if not self._pump(1, timeout):
                raise self._silence(ctx, layer, route)

    def _silence(self, ctx: int, layer: int, route: _Route) -> DeviceTimeoutError:
        return DeviceTimeoutError(
            f"Device didn't answer in time: layer {layer} of context {ctx} still waits for"
            f" experts {sorted(route.waiting)}"
        )

    def read(self, ready: Ready, *, over_link: bool = False) -> bytes:
        """Bytes of an expert that is ready.

        Parameters
        ----------
        ready : :class:`Ready`
            From :meth:`wait_ready`, its layer not released yet.
        over_link : :class:`bool`
            Read with messages even where the device has a consumer port.

        Raises
        ------
        ArgumentError
            If the layer was released, or slots are the host's or in a memory of their own.
        DataError
            If a tile of the slot isn't valid.
        """
        if self._copies is not None and not self.config.stores_slots:
            raise ArgumentError(
                f"Slots are the host's: slot {ready.slot}, with expert {ready.expert} of layer"
                f" {ready.layer}, must be read where the copier has put it"
            )
        route = self._routes.get((ready.ctx, ready.layer))
        routed = route is not None and ready.expert in route.experts
        at = ready.layer, ready.expert
        kept = at in self._locked or ready in self._held.get(at, {}).values()
        if not routed and not kept:
            raise ArgumentError(
                f"Expert {ready.expert} of layer {ready.layer}, context {ready.ctx}, must not be"
                f" read"
                " after its layer was released"
            )
        self._check_open()
        stored = self.config.slot_store == "internal"
        if not stored and (self._simulated is None or over_link):
            raise ArgumentError(
                "Slots in a memory of their own must be read there, not through the device"
            )
        if self._simulated is not None and not over_link:
            try:
                size = self.config.layer_sizes[ready.layer]
                return self._simulated.read_slot(ready.slot, size=size)
            except OSError as error:
                raise DataError(f"Slot {ready.slot} can't be read: {error}") from error
        return self._read_over_link(ready)

    def _read_over_link(self, ready: Ready) -> bytes:
        slot = ready.slot
        beats = self.config.layer_sizes[ready.layer] // self.config.data_bytes
        most = 0xFFFF
        for beat in range(0, beats, most):
            self._post("READ", slot, beat, min(most, beats - beat))
        parts: list[bytes] = []
        while len(parts) < beats:
            if not self._data and not self._pump(min(beats - len(parts), _ANSWERS), None):
                raise DeviceTimeoutError(
                    f"Device didn't answer in time: slot {slot} gave {len(parts)} of {beats} beats"
                )
            self._raise_unclaimed(ErrorCode.BAD_READ)
            while self._data:
                got_slot, beat, data, ok = self._data.popleft()
                if got_slot != slot or beat != len(parts):
                    raise LinkError(
                        f"Data must be of slot {slot}, beat {len(parts)}, not slot {got_slot},"
                        f" beat {beat}"
                    )
                if not ok:
                    raise DataError(f"Slot {slot} has an invalid tile at beat {beat}")
                parts.append(data)
        return b"".join(parts)

    def release(self, ctx: int, layer: int) -> None:
        """The consumer is done with a layer; its slots may be reused.

        Raises
        ------
        ArgumentError
            If the layer isn't routed, or an expert of it hasn't arrived.
        """
        key = (ctx, layer)
        route = self._routes.get(key)
        if route is None:
            self._check_layer(ctx, layer)
            raise ArgumentError(
                f"Layer {layer} of context {ctx} must be routed before it's released"
            )
        if route.waiting:
            raise ArgumentError(
                f"Layer {layer} of context {ctx} must not be released while experts"
                f" {sorted(route.waiting)} are awaited"
            )
        if not route.refused:
            self._post("RELEASE", ctx, layer)
        del self._routes[key]
        self._unclaimed.extend(route.errors)

    def lock(self, layer: int, expert: int, *, ctx: int = 0, timeout: float | None = None) -> Ready:
        """Keep an expert in the buffer until :meth:`unlock`, say one that all tokens share.

        It is fetched if it is missing, like a demand. Clearing the buffer ends all locks.

        Parameters
        ----------
        layer, expert : :class:`int`
            Which expert. The device has ``slots - contexts * top_k`` locks.
        ctx : :class:`int`
            Context in whose name the expert is asked for; any will do.
        timeout : :class:`float` or None
            Longest wait without any answer, as in :meth:`wait_ready`.

        Returns
        -------
        :class:`Ready`
            Its slot, which it keeps; :meth:`read` takes it until it is unlocked.

        Raises
        ------
        ArgumentError
            If a number is out of range, a route of the context still waits for this expert, or for
            copies of it, or as many slots are locked or hold copies as may.
        NoSlotError
            If no slot may be taken.
        BusError
            If the expert can't be read; it is not locked then.
        DeviceTimeoutError
            If nothing arrives in time.
        """
        self._check_unawaited(ctx, layer, expert, "locked")
        self._check_lockable(layer, expert)
        key = (ctx, layer, expert)
        self._lock_errors.pop(key, None)
        self._post("LOCK", ctx, layer, expert, 1)
        self._locking.add(key)
        while key in self._locking:
            if not self._pump(1, timeout):
                # It counts as locked as soon as the answer comes.
                raise DeviceTimeoutError(
                    f"Device didn't answer in time: expert {expert} of layer {layer} is still not"
                    " locked"
                )
        if key in self._lock_errors:
            raise self._lock_errors.pop(key)
        return self._locked[layer, expert]

    def unlock(self, layer: int, expert: int) -> None:
        """Let a locked expert be evicted again.

        Raises
        ------
        ArgumentError
            If it isn't locked.
        """
        self._check_expert(0, layer, expert)
        if (layer, expert) not in self._locked:
            raise ArgumentError(
                f"Expert {expert} of layer {layer} must be locked before it's unlocked"
            )
        self._post("LOCK", 0, layer, expert, 0)
        del self._locked[layer, expert]

    @property
    def locked(self) -> tuple[Ready, ...]:
        """The experts that are locked, in the order in which they were."""
        return tuple(self._locked.values())

    def _check_lockable(self, layer: int, expert: int) -> None:
        """Refuse a lock for which the device has no more slots, and that would hold up demands."""
        kept = {ready.slot for ready in self._locked.values()}
        kept.update(ready.slot for copies in self._held.values() for ready in copies.values())
        most = self.config.lockable
        counted = (layer, expert) in self._locked or (layer, expert) in self._held
        if len(kept) >= most and not counted:
            raise ArgumentError(
                f"Locked experts and copies must not take more than {most} slots, as they would"
                f" with expert {expert} of layer {layer}"
            )

    def _check_unawaited(self, ctx: int, layer: int, expert: int, what: str) -> None:
        """Refuse what would make the answers for an expert ambiguous."""
        self._check_expert(ctx, layer, expert)
        route = self._routes.get((ctx, layer))
        key = (ctx, layer, expert)
        routed = route is not None and expert in route.waiting
        if routed or key in self._locking and what != "locked" or key in self._copying:
            raise ArgumentError(
                f"Expert {expert} of layer {layer} must not be {what} while context {ctx} waits"
                " for it"
            )

    def replicate(
        self, layer: int, expert: int, copies: int, *, ctx: int = 0, timeout: float | None = None
    ) -> dict[int, Ready]:
        """Hold so many copies of an expert, each in a bank of its own, until fewer are asked for.

        Each bank has a consumer port, so that as many compute units read the expert at once. What
        is missing is fetched, behind demands. The expert itself is one of the copies, and
        :meth:`wait_ready` goes on naming its slot. Whoever reads a copy has to be done with it
        before a lower number is asked for. Clearing the buffer ends all copies.

        Parameters
        ----------
        layer, expert : :class:`int`
            Which expert.
        copies : :class:`int`
            1 to ``config.replicas``. From 2 on the expert and its copies are held: together with
            locked experts at most ``slots - contexts * top_k`` slots. 1 gives all of them back.
        ctx : :class:`int`
            Context in whose name they are asked for; any will do.
        timeout : :class:`float` or None
            Longest wait without any answer, as in :meth:`wait_ready`.

        Returns
        -------
        :class:`dict` of :class:`int` to :class:`Ready`
            Slot of each copy by its bank, which is the rest of the slot's number after a division
            by ``config.replicas``; :meth:`read` takes them. Empty for 1.

        Raises
        ------
        ArgumentError
            If a number is out of range, or somebody waits for this expert in that context.
        DeviceError
            If a copy could not be made: :class:`NoSlotError`, :class:`BusError`, ..., and
            :class:`NotHeldError` for copies of an expert that could not be held itself. Further
            ones are in its ``others``. What was made is held: see :attr:`replicas`.
        DeviceTimeoutError
            If nothing arrives in time.
        """
        most = self.config.replicas
        if most == 1:
            raise ArgumentError(
                "Experts must not be replicated on a device without banks: its configuration has"
                " replicas = 1"
            )
        if not 1 <= operator.index(copies) <= most:
            raise ArgumentError(f"Copies must be between 1 and {most}, not {copies}")
        self._check_unawaited(ctx, layer, expert, "replicated")
        key = (ctx, layer, expert)
        self._post("REPLICATE", ctx, layer, expert, copies)
        held = self._held.get((layer, expert), {})
        for number in [number for number in held if copies == 1 or number >= copies]:
            del held[number]
        if copies == 1:
            self._held.pop((layer, expert), None)
            return {}
        self._copying[key] = copies
        self._copy_errors[key] = []
        while key in self._copying:
            if not self._pump(1, timeout):
                # They count as held as soon as the answers come.
                raise DeviceTimeoutError(
                    f"Device didn't answer in time: expert {expert} of layer {layer} has"
                    f" {copies - self._copying[key]} of {copies} answers for its copies"
                )
        errors = self._copy_errors.pop(key)
        if errors:
            first, *others = errors
            first.others = tuple(others)
            raise first
        return self.replicas[layer, expert]

    @property
    def replicas(self) -> dict[tuple[int, int], dict[int, Ready]]:
        """Slots of the copies that are held, by layer and expert, then by bank."""
        return {
            expert: {ready.slot % self.config.replicas: ready for ready in held.values()}
            for expert, held in self._held.items()
            if held
        }

    def drain(self, *, timeout: float | None = None) -> None:
        """Wait until everything posted is done and the device is idle.

        Parameters
        ----------
        timeout : :class:`float` or None
            Longest wait without any answer, as in :meth:`wait_ready`.

        Raises
        ------
        DeviceError
            An error that belongs to no unreleased layer; further ones are in its ``others``.
        DeviceTimeoutError
            If the device doesn't become idle in time.
        """
        self.sync(timeout=timeout)
        if self._unclaimed:
            first, *others = self._unclaimed
            self._unclaimed.clear()
            first.others = tuple(others)
            raise first

    def sync(self, *, timeout: float | None = None) -> None:
        """Like :meth:`drain`, but leaves errors in :attr:`unclaimed`."""
        tag = self._sync_tag = (self._sync_tag + 1) & 0xFFFF
        self._post("SYNC", tag)
        self._synced = None
        waiting = sum(len(route.waiting) for route in self._routes.values())
        while self._synced != tag:
            if not self._pump(waiting + 1, timeout):
                raise DeviceTimeoutError("Device didn't answer in time: it's still not idle")
            waiting = 0

    def flush(self) -> None:
        """Send what was posted without waiting for an answer.

        With a host mover, begin the copies that the device has asked for by now, too, and tell it
        of those that have ended.
        """
        self._pump(0, None)

    def collect(self, ctx: int, layer: int, *, timeout: float | None = None) -> None:
        """Wait until no expert of a routed layer is awaited any more.

        Raises
        ------
        DeviceTimeoutError
            If nothing arrives in time.
        """
        self._check_layer(ctx, layer)
        route = self._routes.get((ctx, layer))
        while route is not None and route.waiting:
            if not self._pump(len(route.waiting), timeout):
                raise self._silence(ctx, layer, route)

    def run(self, cycles: int) -> None:
        """Let clock cycles pass on a simulated device, none if ``cycles`` isn't positive.

        Raises
        ------
        ArgumentError
            If the device has no clock.
        """
        if self._simulated is None or not self._simulated.clocked:
            raise ArgumentError(f"Only a device with a clock can run, not {self.url or 'this one'}")
        self._check_open()
        if cycles > 0:
            end = self._simulated.cycles + cycles
            self._link.acknowledge()
            while (rest := end - self._simulated.cycles) > 0:
                if self._copies is not None:
                    rest = min(rest, _SERVED_CYCLES)
                self._link.receive(self._simulated.run(rest))
                if self._copies is not None:
                    self._pump(0, None)
                    self._link.acknowledge()

    # Settings, counters and tables.

    def configure(
        self,
        *,
        prefetch: bool | None = None,
        hints: bool | None = None,
        hint_threshold: int | None = None,
        expert_base: int | None = None,
        part_bases: Mapping[int, int] | None = None,
        token_base: int | None = None,
        slot_base: int | None = None,
        timeout: int | None = None,
        prefetch_tiles: int | None = None,
        policy: Policy | None = None,
        settle: bool | None = None,
        throttle: bool | Mapping[str, int] | None = None,
        cancel: bool | None = None,
        threshold: int | None = None,
        far_threshold: int | None = None,
        ahead: int | None = None,
        cutoff: int | None = None,
        budget: int | None = None,
        rescan: int | None = None,
        rescan_least: int | None = None,
        follow_phase: bool | None = None,
        clear_predictor: bool = False,
        clear_buffer: bool = False,
        clear_counters: bool = False,
        clear_checksums: bool = False,
        tables: Mapping[int, NDArray[np.uint32]] | None = None,
    ) -> None:
        """Change settings; None leaves one as it is.

        ``prefetch``, ``hints``, ``prefetch_tiles``, ``threshold``, ``far_threshold``, ``ahead``,
        ``cutoff``, ``budget``, ``rescan`` and ``rescan_least`` are those of the active profile: the
        one of decoding unless :meth:`switch` or ``follow_phase`` has chosen another.

        Parameters
        ----------
        prefetch, hints : :class:`bool` or None
            Prefetch what the predictor proposes (on after reset), and what hints name (off after
            reset).
        hint_threshold : :class:`int` or None
            Least score of a hint that counts, 0 to 255.
        expert_base : :class:`int` or None
            Address of expert 0 of layer 0, in bytes: a multiple of the memory port's width. Of
            experts in several parts that of part 0, as ``part_bases[0]``.
        part_bases : mapping of :class:`int` to :class:`int`, or None
            Address of the array of each of these parts of experts, in bytes: a multiple of the
            memory port's width. After reset they follow each other from address 0 on.
        token_base : :class:`int` or None
            Address of the predictor's token tables where they lie behind a memory port, in bytes: a
            multiple of 4,096.
        slot_base : :class:`int` or None
            Address of slot 0 where slots are in a memory of their own (``slot_store`` "axi"), in
            bytes: a multiple of 4,096. Nothing may be in flight.
        timeout : :class:`int` or None
            Clock cycles that a channel of the DMA engine waits for the memory before its tiles
            fail, 4 to 16,777,215; 0 (after reset) for ever. Choose a time longer than the memory
            takes for all that may be outstanding. With a host mover, cycles without any end of an
            expert's copies before those that are outstanding fail; what ends later changes nothing,
            but may still write to a slot that is another's by then. Refused on ``model://``, which
            has no clock: a copier's future can end with an exception there.
        prefetch_tiles : :class:`int` or None
            Prefetch tiles that may be under way at once, 1 to 4. A demand waits behind at most so
            many.
        policy : :class:`Policy` or None
            Which expert gives way to another; the least recently used after reset.
        settle : :class:`bool` or None
            Let each prefetch wait until the predictor is at rest and nothing is in flight, so that
            runs at drained pace are the same on every device whatever the policy (off after reset).
        throttle : :class:`bool`, mapping or None
            Switch off prefetches of a kind (the predictor's for the next layer, those for layers
            farther away, hints) while they cost more than they save, and probe them again later
            (off after reset). A mapping switches it on with these weights: fields of
            :data:`prestage_hw.contract.registers.THROTTLE_FIELDS`, the others as they are.
        cancel : :class:`bool` or None
            Give up prefetches in flight once their layer was routed (on after reset).
        threshold, far_threshold : :class:`int` or None
            Least confidence of the predictor's candidates for the next layer and for layers farther
            away, in 1/256, 0 to 255.
        ahead : :class:`int` or None
            Layers that the predictor proposes when a token starts, 0 to 255.
        cutoff : :class:`int` or None
            Layers from this one on are not prefetched; 255 (after reset) for none.
        budget : :class:`int` or None
            Eighths of a prefetch's tiles, 1 to 8, that must be expected before its deadline by the
            measured times of layers and tiles, or it is dropped; 0 (after reset) drops none. It was
            measured to lose time on a link that is the bottleneck: it is there for who pays for
            bytes. No effect with ``settle``.
        rescan : :class:`int` or None
            Layers, from the one after a context's latest routing decision on, whose values are
            looked through for what is worth a prefetch whenever there is room for one; at most
            ``config.most_ahead``. It takes the place of the predictor's candidates; 0 (after reset)
            leaves it to them. Only with a predictor that gives values.
        rescan_least : :class:`int` or None
            Least confidence of what is found so, in 1/256, 1 to 255; 24 after reset.
        follow_phase : :class:`bool` or None
            The phase of :meth:`begin_token` makes its profile active (off after reset).
        clear_predictor, clear_buffer, clear_counters, clear_checksums : :class:`bool`
            Clear the predictor's tables, the buffer (every layer counts as released), the counters
            with the statistics of prefetches, the checksums of experts. Waits for the engine to be
            idle.
        tables : mapping of :class:`int` to arrays of uint32, or None
            Predictor tables to load after clearing, as :meth:`snapshot` gives them.
        """
        if timeout is not None:
            self._check_timeout(timeout)
        writes = self._settings.writes(
            settle=settle,
            throttle=throttle,
            cancel=cancel,
            follow_phase=follow_phase,
            hint_threshold=hint_threshold,
            expert_base=expert_base,
            part_bases=part_bases,
            token_base=token_base,
            slot_base=slot_base,
            timeout=timeout,
            policy=policy,
            prefetch=prefetch,
            hints=hints,
            prefetch_tiles=prefetch_tiles,
            threshold=threshold,
            far_threshold=far_threshold,
            ahead=ahead,
            cutoff=cutoff,
            budget=budget,
            rescan=rescan,
            rescan_least=rescan_least,
        )
        clear = (
            clear_predictor * _CLEAR_PREDICTOR
            + clear_buffer * _CLEAR_BUFFER
            + clear_counters * _CLEAR_COUNTERS
            + clear_checksums * _CLEAR_CHECKSUMS
        )
        if clear:
            awaited = (
                self._locking
                or self._copying
                or any(route.waiting for route in self._routes.values())
            )
            if clear_buffer and awaited:
                raise ArgumentError("Buffer must not be cleared while experts are awaited")
            writes.append(("clear", clear))
        loads = [(n, self._check_table(n, t)) for n, t in (tables or {}).items()]
        self._write(writes)
        if clear_buffer:
            self._routes.clear()
            self._locked.clear()
            self._locking.clear()
            self._held.clear()
            self._current = [-1] * self._contexts
        for number, values in loads:
            self._load_table(number, values)

    def _check_timeout(self, timeout: int) -> None:
        """Refuse a time-out of copies where there is no clock."""
        clockless = self._simulated is not None and not self._simulated.clocked
        if timeout and self._copies is not None and clockless:
            raise ArgumentError(
                f"Time-out must be 0 for copies of a device without a clock, not {timeout}: end the"
                f" copier's future with an exception"
            )
        self._expires = timeout != 0

    def configure_profile(
        self,
        phase: Phase | int,
        *,
        prefetch: bool | None = None,
        hints: bool | None = None,
        prefetch_tiles: int | None = None,
        threshold: int | None = None,
        far_threshold: int | None = None,
        ahead: int | None = None,
        cutoff: int | None = None,
        budget: int | None = None,
        rescan: int | None = None,
        rescan_least: int | None = None,
        lower_credits: int | None = None,
        channels: Mapping[int, Mapping[str, int]] | None = None,
    ) -> None:
        """Change settings of a phase's profile; None leaves one as it is.

        Those of the active profile hold at once, but for ``lower_credits`` and ``channels``, which
        always wait for :meth:`switch`.

        Parameters
        ----------
        phase : :class:`Phase`
            Whose profile.
        prefetch, hints, prefetch_tiles, threshold, far_threshold, ahead, cutoff, budget, rescan, \
        rescan_least
            As for :meth:`configure`.
        lower_credits : :class:`int` or None
            Most read bursts outstanding in the traffic classes below demand, at most
            ``config.outstanding_bursts``; 0 (after reset) for as many as hold a tile.
        channels : mapping of :class:`int` to mappings, or None
            Settings of channels of the DMA engine: ``enable`` (0 or 1; those of
            ``config.scheduled_channels`` carry demands and prefetches and stay enabled),
            ``traffic`` (a :class:`TrafficClass`), ``weight`` (1 to 15), ``credits`` (1 to
            ``config.outstanding_bursts``), ``burst_beats`` (a power of two up to
            ``config.longest_burst``), ``row_bytes`` and ``row_stride`` (whole beats). What isn't
            named stays. Rows of a channel must not change while it moves tiles.

        Raises
        ------
        ArgumentError
            If the device would refuse a value; nothing was changed then.
        """
        phase = known_phase(phase)
        writes = self._settings.profile_writes(
            phase,
            prefetch=prefetch,
            hints=hints,
            prefetch_tiles=prefetch_tiles,
            threshold=threshold,
            far_threshold=far_threshold,
            ahead=ahead,
            cutoff=cutoff,
            budget=budget,
            rescan=rescan,
            rescan_least=rescan_least,
            lower_credits=lower_credits,
        )
        for channel, settings in (channels or {}).items():
            self._settings.check_channel(channel, settings)
        self._write(writes)
        for channel, settings in (channels or {}).items():
            self._write(self._settings.select_channel(phase, channel))
            self._write(self._settings.channel_writes(settings))

    def switch(self, phase: Phase | int) -> None:
        """Make a phase's profile active, as a whole, at the next layer boundary.

        A boundary is the start of a token and the first :meth:`route` of a layer; what those posted
        before it want goes on meanwhile, and nothing is lost. If nothing is under way the switch
        comes at once. A switch to the active profile makes its ``lower_credits`` and ``channels``
        hold.

        Parameters
        ----------
        phase : :class:`Phase`
            Whose profile.
        """
        phase = known_phase(phase)
        self._write([("profile", int(phase))])

    def refusal(self, *, clear: bool = True) -> Refused | None:
        """The first register write that the device has refused since this was cleared, or None.

        The other methods check what they write; a refusal comes of :meth:`write_register`.
        """
        value = self.read_register("refusal")
        fields = {
            name: value >> low & (1 << bits) - 1 for name, (low, bits) in REFUSAL_FIELDS.items()
        }
        if not fields["refused"]:
            return None
        if clear:
            self.write_register("refusal", 0)
        names = {register.address: register.name for register in REGISTERS}
        return Refused(names[fields["register"]], Refusal(fields["reason"]))

    def _write(self, writes: Iterable[tuple[str, int]]) -> None:
        """Post register writes, and remember what the device makes of some."""
        for name, value in writes:
            self._post("REGISTER_WRITE", register_by_name(name).address, value)
            self._settings.written(name, value)

    def stats(self) -> dict[str, int]:
        """All counters by name, and ``cycles``: clock cycles since reset."""
        names = ["cycles_low", "cycles_high"]
        for counter in COUNTERS:
            if counter.bits == 32:
                names.append(counter.name)
            else:
                names += [f"{counter.name}_low", f"{counter.name}_high"]
        values = dict(zip(names, self._read_registers(names), strict=True))
        stats = {"cycles": values["cycles_high"] << 32 | values["cycles_low"]}
        for counter in COUNTERS:
            if counter.bits == 32:
                stats[counter.name] = values[counter.name]
            else:
                low, high = values[f"{counter.name}_low"], values[f"{counter.name}_high"]
                stats[counter.name] = high << 32 | low
        return stats

    def channel_counters(self) -> list[dict[str, int]]:
        """Counters of each channel of the DMA engine, by the names of
        :data:`prestage_hw.contract.registers.CHANNEL_COUNTERS`.

        They wrap at 2^32, and start anew with ``clear_counters``. Without a clock (``model://``)
        those of cycles stay 0. All are 0 where the host copies.
        """
        found = []
        for channel in range(self.config.dma_channels):
            self._write([("dma_channel", channel)])
            values = self._read_registers([f"channel_{name}" for name in CHANNEL_COUNTERS])
            found.append(dict(zip(CHANNEL_COUNTERS, values, strict=True)))
        return found

    def abort(self) -> None:
        """Abort all tiles that the DMA engine was asked for.

        Prefetches in flight are dropped; demands end in an :class:`~prestage.errors.AbortedError`
        where they are waited for. What has come already stays. Without effect where the host
        copies.
        """
        self._write([("dma_abort", 1)])

    def counters(self, *names: str) -> tuple[int, ...]:
        """Some 32-bit counters, cheaper than :meth:`stats`."""
        return tuple(self._read_registers(names))

    def prefetch_statistics(self) -> NDArray[np.uint32]:
        """What became of prefetches since the counters were cleared, ``[layers, kinds, outcomes]``.

        Indices are :class:`PrefetchKind` and :class:`PrefetchOutcome`; the layer is that which was
        prefetched for. Counters stay at 65,535. Waits for the engine to be idle.
        """
        values = self.save_table(STATISTICS_TABLE)
        rows = values.reshape(self._layers, 1 << KIND_BITS, 1 << OUTCOME_BITS)
        return rows[:, : len(PrefetchKind), : len(PrefetchOutcome)].copy()

    def read_register(self, name: str) -> int:
        """Value of a register."""
        (value,) = self._read_registers([name])
        return value

    def write_register(self, name: str, value: int) -> None:
        """Write a register.

        Raises
        ------
        ArgumentError
            If it's read-only or the value doesn't fit in 32 bits.
        """
        register = _register(name)
        if register.access == "ro":
            raise ArgumentError(f"Register {name} must not be written: it's read-only")
        if not 0 <= operator.index(value) < 1 << 32:
            raise ArgumentError(f"Register value must be between 0 and 0xffffffff, not {value:#x}")
        self._write([(name, value)])

    def table_words(self, table: int) -> int:
        """Words in a predictor table, 0 if there is no such table."""
        self._check_table_number(table)
        self.write_register("table_address", table << 24)
        return self.read_register("table_words")

    def load_checksums(self, sums: Mapping[tuple[int, int], int] | NDArray[np.uint32]) -> None:
        """Let experts be compared with their checksum as they arrive: :func:`zlib.crc32` of the
        bytes, in their order in the slot.

        An expert that has another is never ready; its demands end in a :class:`ChecksumError`.
        Experts that are in the buffer already are not compared.

        Parameters
        ----------
        sums : mapping or array of uint32
            Checksum of each expert by (layer, expert); others stay as they are. An array
            ``[layers, experts]`` holds all.

        Raises
        ------
        ArgumentError
            If the device has no checksums, or an expert or a checksum is out of range.
        """
        layers, experts = self._layers, self._experts
        if not self.config.checksums:
            raise ArgumentError("Device must have been built with checksums")
        if not isinstance(sums, Mapping):
            array = np.asarray(sums)
            if array.shape != (layers, experts):
                raise ArgumentError(
                    f"Checksums must have shape ({layers}, {experts}), not {array.shape}"
                )
            sums = {
                (layer, expert): int(array[layer, expert])
                for layer in range(layers)
                for expert in range(experts)
            }
        words: dict[int, int] = {}
        for (layer, expert), value in sums.items():
            if not 0 <= layer < layers or not 0 <= expert < experts:
                raise ArgumentError(f"Model has no expert {expert} in layer {layer}")
            if not 0 <= operator.index(value) < 1 << 32:
                raise ArgumentError(f"Checksum must fit in 32 bits, not {value}")
            words[layer * experts + expert] = value
        order = sorted(words)
        at = 0
        while at < len(order):
            # What lies side by side goes together.
            run = [n for i, n in enumerate(order[at : at + TABLE_BURST]) if n == order[at] + i]
            values = [words[n] for n in run] + [0] * (TABLE_BURST - len(run))
            self._post("TABLE_WRITE", CHECKSUM_TABLE, run[0], len(run), *values)
            at += len(run)
        self.sync()

    def save_table(self, table: int) -> NDArray[np.uint32]:
        """Words of a predictor table, read one at a time while the device is idle.

        Raises
        ------
        ArgumentError
            If there is no such table.
        """
        count = self.table_words(table)
        if count == 0:
            raise ArgumentError(f"Predictor {self.config.predictor!r} must have a table {table}")
        values: list[int] = []
        # In pieces, so that a large table doesn't pile up as bytes in the pipe, and demands of
        # another thread of the host's don't wait for all of it.
        while len(values) < count:
            self._read_words(table, values, min(_TABLE_PIECE, count - len(values)))
        return np.array(values, dtype=np.uint32)

    def _read_words(self, table: int, values: list[int], count: int) -> None:
        """Append the next ``count`` words of a table."""
        self._post("TABLE_READ", table, len(values), count)
        end = len(values) + count
        while len(values) < end:
            messages = -(-(end - len(values)) // TABLE_BURST)
            if not self._words and not self._pump(min(messages, _ANSWERS), None):
                raise DeviceTimeoutError(
                    f"Device didn't answer in time: table {table} gave {len(values)} of {end} words"
                )
            self._raise_unclaimed(ErrorCode.BAD_TABLE)
            while self._words:
                got_table, word, *words = self._words.popleft()
                if got_table != table or word != len(values):
                    raise LinkError(
                        f"Table data must be of table {table}, word {len(values)}, not table"
                        f" {got_table}, word {word}"
                    )
                values += words[: end - word]

    def snapshot(self) -> dict[int, NDArray[np.uint32]]:
        """All tables of the predictor, for ``configure(tables=...)``. Empty if it has none."""
        tables: dict[int, NDArray[np.uint32]] = {}
        for number in range(256):
            if self.table_words(number) == 0:
                return tables
            tables[number] = self.save_table(number)
        return tables

    def save_tables(self, path: str | os.PathLike[str]) -> Snapshot:
        """Save all tables of the predictor to a file: see :mod:`prestage.snapshot`.

        Words are read one at a time while the device is idle, so that this changes no result and no
        counter of what goes on before and after it.

        Raises
        ------
        ArgumentError
            If the predictor has no tables.
        OutputError
            If the file can't be written; it is then as it was before.
        """
        snapshot = Snapshot.of(self.config, self.snapshot())
        write_snapshot(path, snapshot)
        return snapshot

    def load_tables(self, source: str | os.PathLike[str] | Snapshot) -> Snapshot:
        """Load all tables of the predictor from a file, in place of all that it has learned.

        Parameters
        ----------
        source : path or :class:`Snapshot`
            What :meth:`save_tables` has written, on a device with the same predictor and the same
            shape of the model.

        Raises
        ------
        SnapshotError
            If the file can't be read, is no snapshot, of another version, truncated, damaged or of
            another device. Nothing was written to the device then.
        """
        snapshot = source if isinstance(source, Snapshot) else read_snapshot(source)
        snapshot.check(self.config)
        self.configure(clear_predictor=True, tables=snapshot.tables)
        return snapshot

    def _check_table_number(self, table: int) -> None:
        if not 0 <= operator.index(table) <= 255:
            raise ArgumentError(f"Table number must be between 0 and 255, not {table}")

    def _check_table(self, table: int, values: NDArray[np.uint32]) -> NDArray[np.uint32]:
        self._check_table_number(table)
        array = np.asarray(values)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(f"Table {table} must be a one-dimensional array of integers")
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < 1 << 32:
            raise ArgumentError(f"Words of table {table} must fit in 32 bits")
        words = self.table_words(table)
        if array.size != words:
            raise ArgumentError(f"Table {table} must have {words} words, not {array.size}")
        return array

    def _load_table(self, table: int, values: NDArray[np.uint32]) -> None:
        words = values.tolist()
        for word in range(0, len(words), TABLE_BURST):
            some = words[word : word + TABLE_BURST]
            padding = [0] * (TABLE_BURST - len(some))
            self._post("TABLE_WRITE", table, word, len(some), *some, *padding)
        self.sync()

    # Messages.

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("Device must be open, but was closed")
        if self._copies is not None:
            self._copies.check_idle()

    def _check_context(self, ctx: int) -> None:
        if not 0 <= operator.index(ctx) < self._contexts:
            raise ArgumentError(f"Context must be between 0 and {self._contexts - 1}, not {ctx}")

    def _check_layer(self, ctx: int, layer: int) -> None:
        self._check_context(ctx)
        if not 0 <= operator.index(layer) < self._layers:
            raise ArgumentError(f"Layer must be between 0 and {self._layers - 1}, not {layer}")

    def _check_expert(self, ctx: int, layer: int, expert: int) -> None:
        self._check_layer(ctx, layer)
        if not 0 <= operator.index(expert) < self._experts:
            raise ArgumentError(f"Expert must be between 0 and {self._experts - 1}, not {expert}")

    def _post(self, name: str, *values: int) -> None:
        code, pack = self._pack[name]
        self._send(code, pack(*values))

    def _send(self, code: int, body: bytes) -> None:
        self._check_open()
        if self._copies is not None:
            self._untaken += 1
            if self._untaken == HOST_MESSAGES:
                self._hear()
        try:
            self._link.post(code, body)
        except OSError as error:
            raise self._unreachable(error) from error

    def _hear(self) -> None:
        """Wait until the device has taken all that was posted before this.

        A device with a host mover keeps few messages that it can't serve yet. The value of a
        register, whichever, says that those before have gone.
        """
        code, pack = self._pack["REGISTER_READ"]
        try:
            self._link.post(code, pack(register_by_name("device_id").address))
        except OSError as error:
            raise self._unreachable(error) from error
        self._asked.append(True)
        self._untaken = 1  # what follows
        heard = self._heard
        while self._heard == heard:
            if not self._pump(1, None):
                raise DeviceTimeoutError("Device didn't answer in time: it takes no messages")

    def _unreachable(self, error: OSError) -> LinkError:
        return LinkError(f"{self.url or 'Device'} can't be reached: {error}")

    def _read_registers(self, names: Sequence[str]) -> list[int]:
        return self._read_addresses([_register(name).address for name in names])

    def _read_addresses(self, addresses: Sequence[int]) -> list[int]:
        for address in addresses:
            self._post("REGISTER_READ", address)
            if self._copies is not None:
                self._asked.append(False)
        values: list[int] = []
        while len(values) < len(addresses):
            if not self._values and not self._pump(len(addresses) - len(values), None):
                raise DeviceTimeoutError(
                    f"Device didn't answer in time: register {addresses[len(values)]:#x} wasn't"
                    f" read"
                )
            self._raise_unclaimed(ErrorCode.BAD_REGISTER)
            while self._values:
                address, value = self._values.popleft()
                if address != addresses[len(values)]:
                    raise LinkError(
                        f"Register value must be of {addresses[len(values)]:#x}, not {address:#x}"
                    )
                values.append(value)
        return values

    def _raise_unclaimed(self, code: ErrorCode) -> None:
        for at, error in enumerate(self._unclaimed):
            if error.code == code:
                raise self._unclaimed.pop(at)

    def _pump(self, messages: int, timeout: float | None) -> bool:
        """Wait for messages and sort them; False if none came in time."""
        self._check_open()
        if self._copies is not None:
            return self._pump_and_copy(self._copies, messages, timeout)
        return bool(self._poll(messages, timeout))

    def _pump_and_copy(self, copies: CopyServer, messages: int, timeout: float | None) -> bool:
        """The same, and serve the device's fetches meanwhile.

        Of them one at most is waited for at a time, since none of the other messages may come
        before it was served. While copies are under way, time is the host's, in microseconds.
        """
        end = None if timeout is None else time.monotonic() + timeout / 1e6
        if not messages:
            # What has come without being waited for.
            try:
                self._link.receive(self.pipe.exchange(b"", frames=0))
            except OSError as error:
                raise self._unreachable(error) from error
        fetch = MESSAGES["FETCH"].code
        # A prefetch that is copied at once may hold up a demand that is still to be posted, or to
        # come: so none is begun before the device was heard, and had nothing to say.
        quiet = False
        while True:
            self._copy(copies, prefetch=quiet)
            wanted = min(messages, 0 if copies.waiting else 1)
            limit = timeout
            if copies.under_way:
                limit = _COPY_PATIENCE if timeout is None else min(timeout, _COPY_PATIENCE)
            arrived = self._poll(wanted, limit)
            quiet = not arrived
            if any(code != fetch for code, _ in arrived):
                # Demands don't wait for the host to come back.
                self._copy(copies, prefetch=False)
                while self._poll(0, None):
                    self._copy(copies, prefetch=False)
                if messages:
                    return True
            if arrived or copies.waiting:
                continue
            if not messages:
                return True
            if not copies.under_way:
                return False
            rest = None if end is None else end - time.monotonic()
            if rest is not None and rest <= 0:
                return False
            if self._simulated is None:
                copies.wait(_COPY_PAUSE if rest is None else min(rest, _COPY_PAUSE))
            elif not copies.wait(rest):
                return False

    def _copy(self, copies: CopyServer, *, prefetch: bool) -> None:
        """Begin copies, and tell the device of those that have ended."""
        code, pack = self._pack["FETCHED"]
        write_code, write_pack = self._pack["WRITE"]
        copies.begin(prefetch=prefetch)
        for beats, values in copies.ended():
            try:
                for slot, beat, data in beats:
                    self._link.post(write_code, write_pack(slot, beat, *data))
                self._link.post(code, pack(*values))
            except OSError as error:
                raise self._unreachable(error) from error

    def _poll(self, messages: int, timeout: float | None) -> list[tuple[int, bytes]]:
        """Messages that come in time, sorted."""
        try:
            arrived = self._link.poll(frames=messages, limit=timeout)
        except OSError as error:
            raise self._unreachable(error) from error
        for code, body in arrived:
            if code == self._ready_code and len(body) == self._sizes[code]:
                self._on_ready(*self._ready_unpack(body))
                continue
            handler = self._handlers.get(code)
            if handler is None or len(body) != self._sizes[code]:
                raise LinkError(
                    f"Device sent a message of type {code:#04x} with {len(body)} bytes,"
                    " which isn't in the contract"
                )
            unpack, handle = handler
            handle(*unpack(body))
        return arrived

    def _on_ready(self, ctx: int, layer: int, expert: int, slot: int) -> None:
        route = self._routes.get((ctx, layer))
        locks = (ctx, layer, expert) in self._locking
        if not locks and (route is None or expert not in route.waiting):
            raise LinkError(
                f"Device announced expert {expert} of layer {layer}, context {ctx}, which isn't"
                f" awaited"
            )
        if slot >= self.config.slots:
            raise LinkError(f"Device announced slot {slot}, but has only {self.config.slots}")
        ready = Ready(ctx, layer, expert, slot)
        if locks:
            self._locking.remove((ctx, layer, expert))
            self._locked[layer, expert] = ready
            return
        assert route is not None
        route.waiting.remove(expert)
        route.ready.append(ready)

    def _on_copy(self, ctx: int, layer: int, expert: int, copy: int, slot: int) -> None:
        key = (ctx, layer, expert)
        if key not in self._copying or copy >= self.config.replicas:
            raise LinkError(
                f"Device announced copy {copy} of expert {expert} of layer {layer}, context {ctx},"
                " which isn't awaited"
            )
        if slot >= self.config.slots:
            raise LinkError(f"Device announced slot {slot}, but has only {self.config.slots}")
        self._held.setdefault((layer, expert), {})[copy] = Ready(ctx, layer, expert, slot)
        self._copy_answered(key)

    def _copy_answered(self, key: tuple[int, int, int]) -> None:
        self._copying[key] -= 1
        if not self._copying[key]:
            del self._copying[key]

    def _on_event(self, code: int, ctx: int, layer: int, expert: int, address: int) -> None:
        if self._copies is not None and code == ErrorCode.BAD_FETCHED:
            if self._copies.refused(expert, address):
                return
        late = self._expires and code == ErrorCode.BAD_FETCHED and self._copies is not None
        if late and self._copies is not None and self._copies.was_told(expert, address):
            return  # It had failed already, with TIMEOUT.
        error = device_error(code, ctx=ctx, layer=layer, expert=expert, address=address)
        if isinstance(error, LinkError):
            raise error
        if self._copies is not None and error.code == ErrorCode.BUS:
            error.__cause__ = self._copies.error_of(layer, expert)
        route = self._routes.get((ctx, layer))
        key = (ctx, layer, expert)
        if key in self._locking and error.code in _FAILED_DEMAND:
            self._locking.remove(key)
            self._lock_errors[key] = error
        elif key in self._copying and error.code in _FAILED_COPY:
            self._copy_errors[key].append(error)
            self._copy_answered(key)
        elif route is not None and error.code in _FAILED_DEMAND and expert in route.waiting:
            route.waiting.remove(expert)
            route.errors.append(error)
        elif route is not None and error.code in _REFUSED_ROUTE and route.waiting:
            route.waiting.clear()
            route.refused = True
            route.errors.append(error)
        else:
            self._unclaimed.append(error)

    def _on_synced(self, tag: int) -> None:
        self._synced = tag

    def _on_value(self, address: int, value: int) -> None:
        if self._copies is not None and self._asked and self._asked.popleft():
            self._heard += 1
            return
        self._values.append((address, value))

    def _on_data(self, slot: int, beat: int, *rest: int) -> None:
        *data, ok = rest
        self._data.append((slot, beat, bytes(data), ok))

    def _on_words(self, *values: int) -> None:
        self._words.append(values)


_REGISTERS = {register.name: register for register in REGISTERS}


def _register(name: str) -> Any:
    try:
        return _REGISTERS[name]
    except KeyError:
        raise ArgumentError(
            f"Register must be one of {', '.join(_REGISTERS)}, not {name!r}"
        ) from None
