"""Golden model of the DMA engine.

:class:`DMA` says what a tile's transfer brings, without its time. :class:`Engine` follows the whole
engine event by event: who drives it tells what was asked for and in which order the memory
answered, and is told what the engine must do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import FetchReason

from .axi import BusError, Memory
from .backend import Completion, OpenBurst, OpenTile, complete
from .frontend import Transfer, check, refused
from .midend import Cutter, bursts
from .settings import Channel, Settings
from .writer import write_bursts

__all__ = ["DMA", "Completion", "Engine", "Mismatch", "Write"]


class DMA:
    """Tiles become bursts; a failing burst fails its tile.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.config = config

    def bursts(
        self, address: int, channel: Channel | None = None, *, tile: int = 0
    ) -> list[tuple[int, int]]:
        """Address and beats of each burst of the tile at ``address``, in order."""
        return self._bursts(address, channel, tile)[0]

    def _bursts(
        self, address: int, channel: Channel | None, tile: int
    ) -> tuple[list[tuple[int, int]], bool]:
        address %= 1 << self.config.address_bits
        if refused(self.config, address, self.config.tile_bytes):
            return [], True
        return bursts(self.config, address, channel, tile=tile)

    def completion(
        self,
        address: int,
        failing: Container[int] = (),
        channel: Channel | None = None,
        *,
        tile: int = 0,
    ) -> Completion:
        """Completion of the tile at ``address``.

        Parameters
        ----------
        address : :class:`int`
            Address of the tile.
        failing : container of :class:`int`
            Addresses of beats that the memory answers with an error.
        channel : :class:`Channel` or None
            Settings of its channel; None stands for those of channel 0 after reset.
        tile : :class:`int`
            Its number in the expert.
        """
        size = self.config.data_bytes
        address %= 1 << self.config.address_bits
        cut, wraps = self._bursts(address, channel, tile)
        completion = complete(
            address,
            cut,
            lambda at, beats: any(at + beat * size in failing for beat in range(beats)),
        )
        if wraps and not completion.failed:
            return Completion(FetchReason.ADDRESS, address)
        return completion

    def transfer(
        self, address: int, memory: Memory, channel: Channel | None = None, *, tile: int = 0
    ) -> tuple[Completion, bytes]:
        """Completion of the tile at ``address`` and its bytes, those of failing bursts as zeros."""
        data = bytearray()
        failed: set[int] = set()
        for at, beats in self.bursts(address, channel, tile=tile):
            size = beats * self.config.data_bytes
            try:
                data += memory.read(at, size)
            except BusError:
                data += bytes(size)
                failed.add(at)
        return self.completion(address, failed, channel, tile=tile), bytes(data)


class Mismatch(AssertionError):
    """The engine did what the model does not allow."""


class Write(NamedTuple):
    """A beat for the buffer."""

    slot: int
    beat: int
    address: int
    transfer: Transfer


class Engine:
    """The engine as a whole, event by event.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Attributes
    ----------
    settings : :class:`Settings`
        Settings of its channels.
    waiting : list of deque of :class:`Transfer`
        Requests of each channel that were not begun.
    open : list of deque of :class:`OpenTile`
        Tiles of each channel that were begun, oldest first.
    bursts : list of deque of :class:`OpenBurst`
        Bursts of each ID that the memory has not answered wholly.
    slot_base : :class:`int`
        Address of slot 0 in the memory that holds the slots.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.config = config
        self.settings = Settings(config)
        channels = range(config.dma_channels)
        self.waiting: list[deque[Transfer]] = [deque() for _ in channels]
        self.open: list[deque[OpenTile]] = [deque() for _ in channels]
        self.bursts: list[deque[OpenBurst]] = [deque() for _ in range(config.axi_ids)]
        self.slot_base = 0
        self._answers_to_writes: dict[tuple[int, int], deque[bool]] = {}
        # Completions to come, each with the reasons that it may have.
        self._ended: list[deque[tuple[Transfer, int, set[FetchReason]]]] = [
            deque() for _ in channels
        ]

    @property
    def inside(self) -> int:
        """Requests that were not completed."""
        return sum(
            len(self.waiting[c]) + len(self.open[c]) + len(self._ended[c])
            for c in range(self.config.dma_channels)
        )

    @property
    def outstanding(self) -> int:
        """Bursts that the memory has not answered wholly."""
        return sum(map(len, self.bursts))

    def accept(self, request: Mapping[str, int]) -> Transfer:
        """A FetchRequest came in."""
        transfer = check(self.config, request)
        self.waiting[transfer.channel].append(transfer)
        return transfer

    def requests(self, tag: int | None = None) -> list[Transfer]:
        """Requests with this tag, or all, that are inside: those that an abort means."""
        found: list[Transfer] = []
        for channel in range(self.config.dma_channels):
            found += [transfer for transfer, _, _ in self._ended[channel]]
            found += [tile.transfer for tile in self.open[channel]]
            found += self.waiting[channel]
        return [transfer for transfer in found if tag is None or transfer.tag == tag]

    def abort(self, transfers: Iterable[Transfer]) -> None:
        """Abort requests.

        Where all beats of one have come already, it depends on how far they are whether it still
        ends well.
        """
        for transfer in transfers:
            transfer.aborted = True
            for ended, _, reasons in self._ended[transfer.channel]:
                if ended is transfer and not reasons & {FetchReason.BUS, FetchReason.TIMEOUT}:
                    reasons.add(FetchReason.ABORTED)

    def _skip(self, channel: int) -> None:
        """The first request of a channel that waits moves nothing and is answered."""
        transfer = self.waiting[channel].popleft()
        self._ended[channel].append((transfer, transfer.address, self._answers(transfer)))

    @staticmethod
    def _answers(transfer: Transfer) -> set[FetchReason]:
        reasons = set()
        if transfer.refused:
            reasons.add(FetchReason.ADDRESS)
        elif transfer.beats == 0:
            reasons.add(FetchReason.OK)
        if transfer.aborted:
            reasons.add(FetchReason.ABORTED)
        return reasons

    def issue(self, identifier: int, address: int, beats: int) -> int:
        """A burst was asked for; gives its channel.

        Raises
        ------
        Mismatch
            If no channel of this ID may ask for it now.
        """
        size = self.config.data_bytes
        candidates = []
        for channel in range(self.config.dma_channels):
            if channel % self.config.axi_ids != identifier:
                continue
            settings = self.settings.active[channel]
            tiles = self.open[channel]
            if tiles and not tiles[-1].cutter.done:
                tile = tiles[-1]
            else:
                # The first that moves something, or one that was aborted as it began.
                first = next(
                    (
                        t
                        for t in self.waiting[channel]
                        if not t.null or (t.aborted and t.address == address and beats == 1)
                    ),
                    None,
                )
                if first is None:
                    continue
                cutter = Cutter(self.config, first.address, first.beats, tile=first.tile)
                tile = OpenTile(first, cutter)
            trial = Cutter(self.config, 0, 1)
            trial.__dict__.update(tile.cutter.__dict__)
            burst = trial.next(settings, aborted=tile.transfer.aborted)
            candidates.append((channel, burst.address, burst.beats))
            if (burst.address, burst.beats) != (address, beats):
                continue
            tile.cutter.__dict__.update(trial.__dict__)
            if not tiles or tiles[-1] is not tile:
                while self.waiting[channel][0] is not tile.transfer:
                    self._skip(channel)
                self.waiting[channel].popleft()
                tiles.append(tile)
            self.bursts[identifier].append(OpenBurst(tile, address, beats, burst.last))
            return channel
        raise Mismatch(
            f"ID {identifier} must not ask for {beats} beats of {size} bytes at {address:#x};"
            f" (channel, address, beats) may be one of {candidates}"
        )

    def beat(self, identifier: int, *, error: bool, last: bool) -> Write | None:
        """The memory answered a beat; gives the write that it leads to."""
        if identifier >= len(self.bursts) or not self.bursts[identifier]:
            return None
        burst = self.bursts[identifier][0]
        at = burst.address + burst.taken * self.config.data_bytes
        burst.taken += 1
        ends = burst.taken == burst.beats
        if ends:
            self.bursts[identifier].popleft()
        if burst.dead:
            return None
        tile = burst.tile
        transfer = tile.transfer
        if tile.failed_at is None and (error or last != ends):
            tile.failed_at = burst.address
        beat = transfer.tile * self.config.tile_beats + tile.beats
        write = Write(transfer.slot, beat, at, transfer)
        tile.beats += 1
        transfer.written += 1
        if ends and burst.last:
            tiles = self.open[transfer.channel]
            if tiles[0] is not tile:
                raise Mismatch("Tiles of a channel must end in their order")
            tiles.popleft()
            ending = tile.ending()
            self._ended[transfer.channel].append((transfer, ending.address, {ending.reason}))
        return write

    def answer(self, address: int, beats: int, *, error: bool) -> None:
        """The memory that holds the slots answered a write burst."""
        self._answers_to_writes.setdefault((address, beats), deque()).append(error)

    def _write_failure(self, transfer: Transfer) -> int | None:
        """Address of the first write burst of a tile that failed, None if none has.

        Raises
        ------
        Mismatch
            If one of its bursts has no answer.
        """
        failures = []
        for burst in write_bursts(
            self.config, transfer.slot, transfer.tile, transfer.written, base=self.slot_base
        ):
            if not self._answers_to_writes.get(burst):
                raise Mismatch(f"A tile must not complete before {burst} was written")
            if self._answers_to_writes[burst].popleft():
                failures.append(burst[0])
        return failures[0] if failures else None

    @property
    def unclaimed(self) -> int:
        """Answered write bursts whose tile has not completed."""
        return sum(map(len, self._answers_to_writes.values()))

    def expire(self, channel: int) -> None:
        """A channel has waited for too long: its open tiles fail, or else what waits first."""
        ended = self._ended[channel]
        tiles = self.open[channel]
        if tiles:
            for tile in tiles:
                at = tile.failed_at if tile.failed_at is not None else tile.transfer.address
                ended.append((tile.transfer, at, {FetchReason.TIMEOUT}))
            for burst in self.bursts[channel % self.config.axi_ids]:
                burst.dead |= burst.tile in tiles
            tiles.clear()
        elif self.waiting[channel]:
            transfer = self.waiting[channel].popleft()
            reasons = self._answers(transfer) or {FetchReason.TIMEOUT}
            ended.append((transfer, transfer.address, reasons))

    def complete(self, record: Mapping[str, int]) -> Transfer:
        """A Completion came out; gives the request that it answers.

        Raises
        ------
        Mismatch
            If it is not the next one of its channel.
        """
        channel = record["channel"]
        ended = self._ended[channel]
        waiting = self.waiting[channel]
        if not ended and not self.open[channel] and waiting and waiting[0].null:
            self._skip(channel)
        if not ended:
            raise Mismatch(f"Channel {channel} must not complete anything, but gave {record}")
        transfer, address, reasons = ended.popleft()
        failure = self._write_failure(transfer) if self.config.slot_store == "axi" else None
        if failure is not None and record["reason"] == FetchReason.WRITE:
            # Only a tile that would have been whole has no other reason.
            address, reasons = failure, {FetchReason.WRITE} if FetchReason.OK in reasons else set()
        elif failure is not None:
            reasons = reasons - {FetchReason.OK}
        allowed = [
            {
                "tag": transfer.tag,
                "tile": transfer.tile,
                "failed": int(reason is not FetchReason.OK),
                "address": address,
                "channel": channel,
                "reason": int(reason),
            }
            for reason in sorted(reasons)
        ]
        if dict(record) not in allowed:
            raise Mismatch(f"Completion must be one of {allowed}, not {dict(record)}")
        return transfer
