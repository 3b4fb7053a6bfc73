"""AXI4 memory for benches: set latency and bandwidth, random stalls, errors, protocol checks.

Time is that of :mod:`prestage_tb.bench`: signals change just after a rising edge of ``clk``, are
looked at on the falling edge, and a beat seen there happens at the next rising edge.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prestage_tb.bench import Stall, _pauses, bits_of, step_at_edges

__all__ = [
    "DECERR",
    "OKAY",
    "SLVERR",
    "AXIMemory",
    "AXIWritableMemory",
    "AXIWriteMemory",
    "Transfer",
    "pattern",
]

OKAY, SLVERR, DECERR = 0, 2, 3

_EDGE_BYTES = 4096
_INCR = 1


def pattern(address: int, size: int) -> bytes:
    """``size`` bytes that depend on their address, a multiple of 4."""
    return b"".join(
        ((at // 4 * 0x9E3779B1 + (at >> 34)) & 0xFFFFFFFF).to_bytes(4, "little")
        for at in range(address, address + size, 4)
    )


def _driver(signals: Mapping[str, Any]) -> Callable[[str, int], None]:
    """What gives a signal a value, where that is not the last one that it was given."""
    driven: dict[str, int] = {}

    def drive(member: str, value: int) -> None:
        if driven.get(member) != value:
            driven[member] = value
            signals[member].value = value

    return drive


@dataclass
class Transfer:
    """One burst as the memory saw it; cycles are counted since the memory started.

    Attributes
    ----------
    address, beats : :class:`int`
        The burst.
    identifier : :class:`int`
        Its ID.
    asked : :class:`int`
        Cycle in which its address was taken.
    start, end : :class:`int`
        Cycles in which its first and its last beat were taken, -1 before.
    """

    address: int
    beats: int
    asked: int
    start: int = -1
    end: int = -1
    identifier: int = 0


@dataclass
class _Waiting:
    """A burst that was asked for: when its next beat may be offered, and which it is."""

    transfer: Transfer
    earliest: int
    beat: int = 0


class AXIMemory:
    """Serve the reads of an AXI4 master and check that it keeps the rules.

    Parameters
    ----------
    dut : handle
        Device under test.
    name : :class:`str`
        Name of the bus, a port with :class:`prestage_hw.dma.axi.AXI4ReadSignature`.
    data : callable
        Bytes at an address: ``data(address, size)``.
    data_bytes : :class:`int`
        Width of the bus, in bytes.
    address_bits : :class:`int`
        Width of an address, in bits.
    latency : :class:`int`
        Cycles from an address being taken to its first beat being offered, at least 1.
    bytes_per_cycle : :class:`float` or None
        Bandwidth; None offers a beat every cycle.
    address_stall, data_stall : :class:`float` or :class:`Stall` or iterable of :class:`bool`
        When ``arready`` is 0 and when no new beat is offered.
    outstanding : :class:`int` or None
        Most bursts that the master may have outstanding; more fail the test.
    burst_beats : :class:`int`
        Longest burst that the master may ask for; a longer one fails the test.
    fault : callable or None
        ``fault(address, beat, beats)`` of a burst gives the beat's response and ``rlast``; None
        stands for a memory without faults. See :attr:`failing` for the simple case.
    reorder : :class:`float`
        How likely the memory turns to another ID before a beat, so that bursts of different IDs
        come out of order and beat by beat in turns; 0 answers in the order of the addresses.

    Members
    -------
    silent : list of (first, one past the last)
        Bursts that begin at these addresses are not answered, nor are those behind them with the
        same ID, until they are taken off this list.
    failing : list of (first, one past the last, response)
        Addresses of beats that answer an error.
    transfers : list of :class:`Transfer`
        Bursts so far.
    beat_cycles : list of :class:`int`
        Cycles in which a beat was taken.
    cycle : :class:`int`
        Cycles since the memory started.
    """

    def __init__(
        self,
        dut: object,
        name: str = "bus",
        *,
        data: Callable[[int, int], bytes] = pattern,
        data_bytes: int,
        address_bits: int,
        latency: int = 4,
        bytes_per_cycle: float | None = None,
        address_stall: float | Stall | Iterable[bool] = 0.0,
        data_stall: float | Stall | Iterable[bool] = 0.0,
        outstanding: int | None = None,
        burst_beats: int = 256,
        fault: Callable[[int, int, int], tuple[int, bool]] | None = None,
        reorder: float = 0.0,
        seed: object = None,
    ) -> None:
        import cocotb

        if latency < 1:
            raise ValueError(f"Latency must be at least 1 cycle, not {latency}")
        self._clk = dut.clk
        rst = getattr(dut, "rst", None)
        self._rst_bits = None if rst is None else bits_of(rst)
        self._signals = {
            member: getattr(dut, f"{name}__{member}")
            for member in (
                "arvalid",
                "arready",
                "araddr",
                "arlen",
                "arsize",
                "arburst",
                "arid",
                "rvalid",
                "rready",
                "rdata",
                "rresp",
                "rlast",
                "rid",
            )
        }
        self._bits = {member: bits_of(signal) for member, signal in self._signals.items()}
        self._data = data
        self._bytes = data_bytes
        self._space = 1 << address_bits
        self.latency = latency
        self._interval = 1.0 if bytes_per_cycle is None else max(1.0, data_bytes / bytes_per_cycle)
        self._address_pause = _pauses(address_stall, seed=seed, name=f"{name}.ar")
        self._data_pause = _pauses(data_stall, seed=seed, name=f"{name}.r")
        self._outstanding = outstanding
        self._burst_beats = burst_beats
        self._fault = fault
        self.failing: list[tuple[int, int, int]] = []
        self.transfers: list[Transfer] = []
        self.beat_cycles: list[int] = []
        self.cycle = 0
        #: True keeps the address channel or the data channel stalled.
        self.address_paused = False
        self.data_paused = False
        self._queues: dict[int, deque[_Waiting]] = {}
        self._reorder = reorder
        self._random = random.Random(f"{cocotb.RANDOM_SEED if seed is None else seed}/{name}")
        self.silent: list[tuple[int, int]] = []
        self._strays: deque[tuple[int, int, int, bool]] = deque()
        for member in ("arready", "rvalid", "rdata", "rresp", "rlast", "rid"):
            self._signals[member].value = 0
        step_at_edges(self._clk, self._run())

    @property
    def waiting(self) -> int:
        """Bursts whose last beat was not taken yet."""
        return sum(map(len, self._queues.values()))

    def send_stray(self, identifier: int, *, response: int = OKAY, last: bool = True) -> None:
        """Send a beat that nobody asked for as soon as there is nothing else to send."""
        self._strays.append((identifier, 0, response, last))

    def _in_reset(self) -> bool:
        return self._rst_bits is not None and self._rst_bits() != "0"

    def _require(self, condition: bool, rule: str) -> None:
        if not condition:
            raise AssertionError(f"AXI4, cycle {self.cycle}: {rule}")

    def _bit(self, member: str) -> bool:
        value = self._bits[member]()
        self._require(value in ("0", "1"), f"{member} must be 0 or 1, not {value}")
        return value == "1"

    def _number(self, member: str) -> int:
        value = self._bits[member]()
        self._require(value.isdigit(), f"{member} must hold only 0 and 1, not {value}")
        return int(value, 2)

    def _check(self, address: int, length: int, size: int, burst: int) -> None:
        """Rules of an address beat."""
        total = (length + 1) * self._bytes
        self._require(1 << size == self._bytes, f"arsize must be the full width, not {size}")
        self._require(burst == _INCR, f"arburst must be INCR, not {burst}")
        self._require(
            length < self._burst_beats,
            f"a burst must have at most {self._burst_beats} beats, not {length + 1}",
        )
        self._require(
            address % self._bytes == 0, f"araddr must be a multiple of a beat, not {address:#x}"
        )
        self._require(
            address // _EDGE_BYTES == (address + total - 1) // _EDGE_BYTES,
            f"a burst must not cross a 4 KiB edge, but {address:#x} has {length + 1} beats",
        )
        if self._outstanding is not None:
            self._require(
                self.waiting < self._outstanding,
                f"at most {self._outstanding} bursts may be outstanding",
            )

    def _beat(self, transfer: Transfer, beat: int) -> tuple[int, int, bool]:
        """Data, response and rlast of a beat."""
        address = (transfer.address + beat * self._bytes) % self._space
        response, last = OKAY, beat == transfer.beats - 1
        for first, end, code in self.failing:
            if first <= address < end:
                response = code
        if self._fault is not None:
            fault_response, last = self._fault(transfer.address, beat, transfer.beats)
            response = fault_response or response
        return int.from_bytes(self._data(address, self._bytes), "little"), response, last

    @staticmethod
    def _pauses_now(pause: Iterator[bool] | None) -> bool:
        return pause is not None and next(pause, False)

    def _choose(self, current: int | None) -> _Waiting | None:
        """The burst that the next beat is of."""
        ready = {
            identifier: queue[0]
            for identifier, queue in self._queues.items()
            if queue
            and self.cycle >= queue[0].earliest
            and not any(a <= queue[0].transfer.address < b for a, b in self.silent)
        }
        if not ready:
            return None
        if self._reorder and self._random.random() < self._reorder:
            return ready[self._random.choice(list(ready))]
        if current in ready and ready[current].beat:
            return ready[current]
        return min(ready.values(), key=lambda waiting: waiting.transfer.asked)

    def _run(self) -> Iterator[None]:
        drive = _driver(self._signals)
        held: tuple[int, ...] | None = None
        chosen: _Waiting | None = None
        current: int | None = None
        offering = False
        next_beat = 0.0
        yield  # until the clock rises
        while True:
            accepting = not self.address_paused and not self._pauses_now(self._address_pause)
            drive("arready", int(accepting))
            if not offering and (self._strays or any(self._queues.values())):
                if (
                    self.cycle >= next_beat
                    and (chosen := self._choose(current)) is not None
                    and not self.data_paused
                    and not self._pauses_now(self._data_pause)
                ):
                    identifier = chosen.transfer.identifier
                    data, response, last = self._beat(chosen.transfer, chosen.beat)
                    current = identifier
                    offering = True
                elif chosen is None and self._strays:
                    identifier, data, response, last = self._strays.popleft()
                    offering = True
                if offering:
                    drive("rdata", data)
                    drive("rresp", response)
                    drive("rlast", int(last))
                    drive("rid", identifier)
                    drive("rvalid", 1)
            if not offering:
                drive("rvalid", 0)
            yield  # until it falls
            if self._in_reset():
                yield  # until the clock rises
                self.cycle += 1
                self._queues.clear()
                self._strays.clear()
                held, current, chosen, offering = None, None, None, False
                continue
            asked = None
            if self._bit("arvalid"):
                asked = tuple(
                    self._number(m) for m in ("araddr", "arlen", "arsize", "arburst", "arid")
                )
                self._require(
                    held is None or held == asked,
                    f"the address channel must not change while it waits: {held} to {asked}",
                )
                self._check(*asked[:4])
                held = None if accepting else asked
            else:
                self._require(held is None, "arvalid must not fall before arready")
            taken = offering and self._bit("rready")
            yield  # until the clock rises
            self.cycle += 1
            if asked is not None and accepting:
                transfer = Transfer(asked[0], asked[1] + 1, self.cycle, identifier=asked[4])
                self.transfers.append(transfer)
                # Offered from this cycle's start on, it can be taken one cycle later.
                self._queues.setdefault(asked[4], deque()).append(
                    _Waiting(transfer, self.cycle + self.latency - 1)
                )
            if taken:
                offering = False
                if chosen is not None:
                    transfer = chosen.transfer
                    self.beat_cycles.append(self.cycle)
                    if chosen.beat == 0:
                        transfer.start = self.cycle
                    next_beat = max(next_beat, self.cycle - 1) + self._interval
                    chosen.beat += 1
                    if chosen.beat == transfer.beats:
                        transfer.end = self.cycle
                        self._queues[transfer.identifier].popleft()
                    chosen = None


class AXIWritableMemory(AXIMemory):
    """Serve the reads and writes of an AXI4 master and check that it keeps the rules.

    A write takes effect when its answer is offered, so that a read that does not wait for the
    answer finds what was there before.

    Parameters
    ----------
    dut, name, data, data_bytes, address_bits, seed, **keywords
        As for :class:`AXIMemory`, of a port with :class:`prestage_hw.dma.axi.AXI4Signature`.
        ``data`` is what was in the memory at first; ``address_stall`` and ``data_stall`` hold for
        writes too.

    Members
    -------
    failing_writes : list of (first, one past the last, response)
        Addresses of beats whose write answers an error; nothing of such a burst is written.
    writes : list of :class:`Transfer`
        Write bursts so far; ``end`` is the cycle of the answer.
    words : :class:`dict`
        Beats that were written, by address.
    """

    def __init__(
        self,
        dut: object,
        name: str = "bus",
        *,
        data: Callable[[int, int], bytes] = pattern,
        data_bytes: int,
        address_bits: int,
        address_stall: float | Stall | Iterable[bool] = 0.0,
        data_stall: float | Stall | Iterable[bool] = 0.0,
        seed: object = None,
        **keywords: object,
    ) -> None:
        self._first = data
        self.words: dict[int, int] = {}
        self.failing_writes: list[tuple[int, int, int]] = []
        self.writes: list[Transfer] = []
        super().__init__(
            dut,
            name,
            data=self._read,
            data_bytes=data_bytes,
            address_bits=address_bits,
            address_stall=address_stall,
            data_stall=data_stall,
            seed=seed,
            **keywords,  # type: ignore[arg-type]
        )
        for channel, members in {
            "aw": ("valid", "ready", "addr", "len", "size", "burst", "id"),
            "w": ("valid", "ready", "data", "strb", "last"),
            "b": ("valid", "ready", "resp", "id"),
        }.items():
            for member in members:
                self._signals[channel + member] = getattr(dut, f"{name}__{channel}{member}")
        self._bits = {member: bits_of(signal) for member, signal in self._signals.items()}
        self._write_pauses = [
            _pauses(stall, seed=seed, name=f"{name}.{channel}")
            for channel, stall in (("aw", address_stall), ("w", data_stall), ("b", data_stall))
        ]
        for member in ("awready", "wready", "bvalid", "bresp", "bid"):
            self._signals[member].value = 0
        step_at_edges(self._clk, self._serve_writes())

    def _read(self, address: int, size: int) -> bytes:
        """Bytes at an address, at most a beat."""
        if address in self.words:
            return self.words[address].to_bytes(size, "little")
        return self._first(address, size)

    def _answer(self, transfer: Transfer, beats: list[int]) -> int:
        """Do a write and give its response."""
        addresses = [transfer.address + at * self._bytes for at in range(transfer.beats)]
        for first, end, code in self.failing_writes:
            if any(first <= address < end for address in addresses):
                return code
        for address, beat in zip(addresses, beats, strict=True):
            self.words[address % self._space] = beat
        return OKAY

    def _serve_writes(self) -> Iterator[None]:
        drive = _driver(self._signals)
        # A burst that was asked for, its beats so far, and those that wait for their answer.
        present: Transfer | None = None
        beats: list[int] = []
        done: deque[tuple[Transfer, list[int], int]] = deque()
        held: dict[str, object] = {}
        answering = False
        yield  # until the clock rises
        while True:
            go = [not self._pauses_now(pause) for pause in self._write_pauses]
            address_ready, data_ready = go[0] and present is None, go[1] and present is not None
            drive("awready", int(address_ready))
            drive("wready", int(data_ready))
            if not answering and done and go[2] and self.cycle >= done[0][2]:
                transfer, words, _ = done.popleft()
                drive("bresp", self._answer(transfer, words))
                transfer.end = self.cycle
                answering = True
            drive("bvalid", int(answering))
            yield  # until it falls
            if self._in_reset():
                yield  # until the clock rises
                present, beats, held, answering = None, [], {}, False
                done.clear()
                continue
            asked = self._held(held, "aw", ("addr", "len", "size", "burst"), address_ready)
            beat = self._held(held, "w", ("data", "strb", "last"), data_ready)
            answered = answering and self._bit("bready")
            if asked is not None:
                self._check(*asked)
            yield  # until the clock rises
            if asked is not None and address_ready:
                present = Transfer(asked[0], asked[1] + 1, self.cycle)
                self.writes.append(present)
            if beat is not None and data_ready:
                assert present is not None
                data, strobes, last = beat
                self._require(strobes == (1 << self._bytes) - 1, "all bytes must be written")
                beats.append(data)
                self._require(
                    bool(last) == (len(beats) == present.beats),
                    f"wlast must be on beat {present.beats}, not {len(beats)}",
                )
                if last:
                    done.append((present, beats, self.cycle + self.latency))
                    present, beats = None, []
            if answered:
                answering = False

    def _held(
        self, held: dict[str, object], channel: str, members: tuple[str, ...], ready: bool
    ) -> tuple[int, ...] | None:
        """What a channel offers, which must stay until it is taken."""
        if not self._bit(f"{channel}valid"):
            self._require(held.get(channel) is None, f"{channel}valid must not fall before ready")
            return None
        offer = tuple(self._number(channel + member) for member in members)
        before = held.get(channel)
        self._require(
            before is None or before == offer,
            f"channel {channel} must not change while it waits: {before} to {offer}",
        )
        held[channel] = None if ready else offer
        return offer


class AXIWriteMemory:
    """Take the writes of an AXI4 master and check that it keeps the rules.

    Addresses and data are taken independently of each other, in each cycle, so that data may come
    before their address. Writes are answered in the order of their addresses.

    Parameters
    ----------
    dut : handle
        Device under test.
    name : :class:`str`
        Name of the bus, a port with :class:`prestage_hw.dma.axi.AXI4WriteSignature`.
    data_bytes : :class:`int`
        Width of the bus, in bytes.
    latency : :class:`int`
        Cycles from a burst's last beat being taken to its answer being offered, at least 1.
    address_stall, data_stall, answer_stall : :class:`float` or :class:`Stall`
        When ``awready``, ``wready`` are 0 and when no new answer is offered.
    data_first : :class:`bool`
        Take an address only when all beats of its burst are there.
    outstanding : :class:`int` or None
        Most bursts that the master may have outstanding.
    burst_beats : :class:`int`
        Longest burst that the master may ask for.

    Members
    -------
    failing : list of (first, one past the last, response)
        Addresses of beats whose write answers an error; nothing of such a burst is written.
    paused : :class:`bool`
        True takes and answers nothing.
    words : :class:`dict`
        Beats that were written, by address.
    transfers : list of :class:`Transfer`
        Bursts that were answered, in order; ``end`` is the cycle of the answer.
    beats : list of (address, beat)
        Beats of these, failing ones too.
    beat_cycles : list of :class:`int`
        Cycles in which a beat was taken.
    asked, waiting : :class:`int`
        Bursts asked for so far, and those without an answer.
    """

    def __init__(
        self,
        dut: object,
        name: str,
        *,
        data_bytes: int,
        latency: int = 4,
        address_stall: float | Stall = 0.0,
        data_stall: float | Stall = 0.0,
        answer_stall: float | Stall = 0.0,
        data_first: bool = False,
        outstanding: int | None = None,
        burst_beats: int = 256,
        seed: object = None,
    ) -> None:
        self._clk = dut.clk
        rst = getattr(dut, "rst", None)
        self._rst_bits = None if rst is None else bits_of(rst)
        members = {
            "aw": ("valid", "ready", "addr", "len", "size", "burst", "id"),
            "w": ("valid", "ready", "data", "strb", "last"),
            "b": ("valid", "ready", "resp", "id"),
        }
        self._signals = {
            channel + member: getattr(dut, f"{name}__{channel}{member}")
            for channel, names in members.items()
            for member in names
        }
        self._bits = {member: bits_of(signal) for member, signal in self._signals.items()}
        self._bytes = data_bytes
        self.latency = latency
        self._stalls = [
            _pauses(stall, seed=seed, name=f"{name}.{channel}")
            for channel, stall in (
                ("aw", address_stall),
                ("w", data_stall),
                ("b", answer_stall),
            )
        ]
        self._data_first = data_first
        self._outstanding = outstanding
        self._burst_beats = burst_beats
        self.failing: list[tuple[int, int, int]] = []
        self.paused = False
        self.words: dict[int, int] = {}
        self.transfers: list[Transfer] = []
        self.beats: list[tuple[int, int]] = []
        self.beat_cycles: list[int] = []
        self.asked = 0
        self.cycle = 0
        self._forget()
        for member in ("awready", "wready", "bvalid", "bresp", "bid"):
            self._signals[member].value = 0
        step_at_edges(self._clk, self._run())

    @property
    def waiting(self) -> int:
        """Bursts that were asked for and not answered."""
        return len(self._addresses) + len(self._whole)

    def _forget(self) -> None:
        # Addresses without their data, data without their address, whole bursts to answer.
        self._addresses: deque[Transfer] = deque()
        self._data: deque[list[int]] = deque([[]])
        self._whole: deque[tuple[Transfer, list[int], int]] = deque()
        self._held: dict[str, object] = {}
        self._answering = False

    def _require(self, condition: bool, rule: str) -> None:
        if not condition:
            raise AssertionError(f"AXI4, cycle {self.cycle}: {rule}")

    def _number(self, member: str) -> int:
        value = self._bits[member]()
        self._require(set(value) <= {"0", "1"}, f"{member} must hold only 0 and 1, not {value}")
        return int(value, 2)

    def _offer(self, channel: str, members: tuple[str, ...], ready: bool) -> tuple[int, ...] | None:
        """What a channel offers, which must stay until it is taken; None if it is not taken."""
        before = self._held.get(channel)
        if not self._number(f"{channel}valid"):
            self._require(before is None, f"{channel}valid must not fall before ready")
            return None
        offer = tuple(self._number(channel + member) for member in members)
        self._require(
            before is None or before == offer,
            f"channel {channel} must not change while it waits: {before} to {offer}",
        )
        self._held[channel] = None if ready else offer
        return offer if ready else None

    def _check(self, address: int, length: int, size: int, burst: int, identifier: int) -> None:
        total = (length + 1) * self._bytes
        self._require(1 << size == self._bytes, f"awsize must be the full width, not {size}")
        self._require(burst == _INCR, f"awburst must be INCR, not {burst}")
        self._require(identifier == 0, f"awid must be 0, not {identifier}")
        self._require(
            length < self._burst_beats,
            f"a burst must have at most {self._burst_beats} beats, not {length + 1}",
        )
        self._require(
            address % self._bytes == 0, f"awaddr must be a multiple of a beat, not {address:#x}"
        )
        self._require(
            address // _EDGE_BYTES == (address + total - 1) // _EDGE_BYTES,
            f"a burst must not cross a 4 KiB edge, but {address:#x} has {length + 1} beats",
        )
        if self._outstanding is not None:
            self._require(
                self.waiting < self._outstanding,
                f"at most {self._outstanding} bursts may be outstanding",
            )

    def _answer(self) -> int:
        """Do the oldest write and give its response."""
        transfer, beats, _ = self._whole.popleft()
        transfer.end = self.cycle
        self.transfers.append(transfer)
        addresses = [transfer.address + at * self._bytes for at in range(transfer.beats)]
        self.beats += zip(addresses, beats, strict=True)
        for first, end, code in self.failing:
            if any(first <= address < end for address in addresses):
                return code
        self.words.update(zip(addresses, beats, strict=True))
        return OKAY

    def _run(self) -> Iterator[None]:
        drive = _driver(self._signals)
        yield  # until the clock rises
        while True:
            go = [
                not self.paused and not (pause is not None and next(pause, False))
                for pause in self._stalls
            ]
            if self._data_first:
                go[0] &= len(self._data) > 1
            drive("awready", int(go[0]))
            drive("wready", int(go[1]))
            if not self._answering and self._whole and go[2] and self.cycle >= self._whole[0][2]:
                drive("bresp", self._answer())
                self._answering = True
            drive("bvalid", int(self._answering))
            yield  # until it falls
            if self._rst_bits is not None and self._rst_bits() != "0":
                yield  # until the clock rises
                self.cycle += 1
                self._forget()
                continue
            asked = self._offer("aw", ("addr", "len", "size", "burst", "id"), go[0])
            beat = self._offer("w", ("data", "strb", "last"), go[1])
            answered = self._answering and bool(self._number("bready"))
            if asked is not None:
                self._check(*asked)
            yield  # until the clock rises
            self.cycle += 1
            if asked is not None:
                self._addresses.append(Transfer(asked[0], asked[1] + 1, self.cycle))
                self.asked += 1
            if beat is not None:
                data, strobes, last = beat
                self._require(strobes == (1 << self._bytes) - 1, "all bytes must be written")
                self.beat_cycles.append(self.cycle)
                self._data[-1].append(data)
                if last:
                    self._data.append([])
            if self._addresses:
                transfer, beats = self._addresses[0], self._data[0]
                whole = len(self._data) > 1
                self._require(
                    len(beats) == transfer.beats if whole else len(beats) < transfer.beats,
                    f"wlast must be on beat {transfer.beats}, not {len(beats)}",
                )
                if whole:
                    self._whole.append((transfer, beats, self.cycle + self.latency - 1))
                    self._addresses.popleft()
                    self._data.popleft()
            if answered:
                self._answering = False


def random_address(
    generator: random.Random, *, address_bits: int, tile_bytes: int, data_bytes: int
) -> int:
    """An address of a tile, often close to a 4 KiB edge, with any bits below a beat."""
    limit = (1 << address_bits) - tile_bytes - data_bytes
    address = generator.randrange(limit)
    if generator.random() < 0.6:
        address = address // _EDGE_BYTES * _EDGE_BYTES
        address += generator.randrange(-8, 9) * data_bytes
        address = min(max(address, 0), limit)
    return address
