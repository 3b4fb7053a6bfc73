"""The pipe of ``sim://``: :class:`prestage_hw.contract.SimulatedPipe` over a compiled device."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import TRANSFER_DTYPE, DeviceConfig
from prestage_hw.contract.pipe import slot_tiles

from .build import ENGINES, TOP, build_library

__all__ = ["OPTIONS", "CompiledPipe", "open_pipe"]

#: Options of a ``sim://`` URL with their meaning.
OPTIONS = {
    "latency": "Cycles from a read address to its first beat, 1 to 1000000 (default 64).",
    "bytes_per_cycle": "Bandwidth, above 0, at most the port's width (default); decimal or p/q.",
    "error": "Address ranges that answer with an error: ADDRESS:SIZE[,ADDRESS:SIZE...].",
    "engine": f"Simulator: {' or '.join(ENGINES)} (default {ENGINES[0]}).",
}

_ABI = 2
_UNTIL_SENT, _UNTIL_FRAMES, _UNTIL_CONSUMED = 1, 2, 4
_INVALID = 2
_LOG_BURSTS = 131072

# A call into the library can't be interrupted, so none takes much longer than this.
_CALL_SECONDS = 0.03


def open_pipe(
    config: DeviceConfig, *, memory: NDArray[np.uint8], options: Mapping[str, str] | None = None
) -> CompiledPipe:
    """Open a compiled device; builds it first if the cache doesn't hold it.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device to simulate.
    memory : array of uint8, shape ``[config.memory_bytes]``
        Image of all experts at address 0. It is not copied: later changes count.
    options : mapping of :class:`str` to :class:`str`
        See :data:`OPTIONS`.

    Raises
    ------
    ValueError
        If an option is unknown or out of its range, or the memory has the wrong size.
    BuildError
        If the simulation can't be built.
    """
    options = dict(options or {})
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"Option of sim:// must be one of {', '.join(OPTIONS)}, not {name!r}")
    engine = options.get("engine", ENGINES[0])
    if engine not in ENGINES:
        raise ValueError(f"Simulation engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    return CompiledPipe(
        config,
        memory=memory,
        latency=_latency(options.get("latency", "64")),
        bandwidth=_bandwidth(options.get("bytes_per_cycle"), config),
        failing=_ranges(options.get("error", "")),
        engine=engine,
    )


def _latency(text: str) -> int:
    try:
        latency = int(text)
    except ValueError:
        latency = 0
    if not 1 <= latency <= 1_000_000:
        raise ValueError(f"Memory latency must be from 1 to 1000000 cycles, not {text!r}")
    return latency


def _bandwidth(text: str | None, config: DeviceConfig) -> Fraction:
    if text is None:
        return Fraction(config.data_bytes)
    try:
        bandwidth = Fraction(text)
    except (ValueError, ZeroDivisionError):
        bandwidth = Fraction(0)
    if not 0 < bandwidth <= config.data_bytes or bandwidth.denominator > 1_000_000:
        raise ValueError(
            f"Memory bandwidth must be above 0 and at most the port's {config.data_bytes} bytes a"
            f" cycle, in steps of a millionth, not {text!r}"
        )
    return bandwidth


def _ranges(text: str) -> list[tuple[int, int]]:
    ranges = []
    for part in text.split(",") if text else ():
        try:
            address, size = (int(number, 0) for number in part.split(":"))
        except ValueError:
            address = size = 0
        if address < 0 or size <= 0 or address + size > 1 << 64:
            raise ValueError(f"Error range must be ADDRESS:SIZE with a positive size, not {part!r}")
        ranges.append((address, size))
    return ranges


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    handle, u64 = ctypes.c_void_p, ctypes.c_uint64
    for name, result, arguments in (
        ("abi", ctypes.c_int, ()),
        ("create", handle, (handle, u64, u64, u64, u64)),
        ("destroy", None, (handle,)),
        ("reset", None, (handle,)),
        ("fail", None, (handle, u64, u64)),
        ("push", None, (handle, ctypes.c_char_p, u64)),
        ("unsent", u64, (handle,)),
        ("run", u64, (handle, u64, ctypes.c_uint32, u64)),
        ("cycles", u64, (handle,)),
        ("received", u64, (handle,)),
        ("data", handle, (handle,)),
        ("pop", None, (handle, u64)),
        ("consume", None, (handle, u64, handle, handle, handle)),
        ("consumed", ctypes.c_int, (handle,)),
        ("verdicts", handle, (handle,)),
        ("slot_bytes", handle, (handle,)),
        ("bursts", u64, (handle,)),
        ("transfers", u64, (handle, handle, u64)),
    ):
        function = getattr(library, f"prestage_{name}")
        function.restype = result
        function.argtypes = arguments
    if library.prestage_abi() != _ABI:
        raise OSError(f"{path} has interface {library.prestage_abi()}, but {_ABI} is needed")
    return library


class CompiledPipe:
    """A device that runs as compiled code in this process.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device to simulate.
    memory : array of uint8
        Image of all experts at address 0, empty where the host moves them. It is not copied: later
        changes count.
    latency : :class:`int`
        Cycles from the handshake of a read address to its first beat, at least 1.
    bandwidth : :class:`fractions.Fraction` or None
        Bytes a cycle, above 0 and at most ``config.data_bytes``, which None stands for.
    failing : sequence of (:class:`int`, :class:`int`)
        Addresses and sizes of ranges that answer with SLVERR.
    engine : :class:`str`
        One of :data:`prestage_tb.compiled.build.ENGINES`.
    top : :class:`str`
        ``"module:Class"`` of the design.

    Raises
    ------
    TypeError
        If the memory is not a contiguous array of uint8.
    ValueError
        If the memory has the wrong size, or slots are in a memory of their own.
    BuildError
        If the simulation can't be built.
    """

    def __init__(
        self,
        config: DeviceConfig,
        *,
        memory: NDArray[np.uint8],
        latency: int = 64,
        bandwidth: Fraction | None = None,
        failing: Sequence[tuple[int, int]] = (),
        engine: str = ENGINES[0],
        top: str = TOP,
    ) -> None:
        if not isinstance(memory, np.ndarray) or memory.dtype != np.uint8:
            raise TypeError("Memory image must be an array of uint8")
        if not memory.flags.c_contiguous:
            raise TypeError("Memory image must be contiguous")
        if config.slot_store != "internal":
            raise ValueError("A compiled device must have internal slots, not slots in a memory")
        size = config.memory_bytes
        if config.mover == "host":
            size = 0
        if memory.shape != (size,):
            raise ValueError(f"Memory image must have shape ({size},), not {memory.shape}")
        self.config = config
        self.latency = latency
        self.bandwidth = Fraction(config.data_bytes) if bandwidth is None else bandwidth
        library = _load(build_library(config, engine=engine, top=top))
        self._library = library
        self._memory = memory
        self._handle: int | None = library.prestage_create(
            memory.ctypes.data, size, latency, self.bandwidth.numerator, self.bandwidth.denominator
        )
        if not self._handle:
            raise ValueError(
                f"Memory must have a latency of at least 1 cycle and a bandwidth above 0 of at most"
                f" {config.data_bytes} bytes a cycle, not {latency} and {self.bandwidth}"
            )
        # The image must live as long as the device reads it.
        self._finalizer = weakref.finalize(self, _destroy, library, self._handle, memory)
        for address, length in failing:
            library.prestage_fail(self._handle, address, length)
        self._cycles_a_call = 10_000
        # Everything in flight one after the other, four times over, and room for link timeouts.
        shortest = min(config.burst_beats, config.tile_beats)
        if config.rows:
            # Each tile may cut a row in two.
            least = min(rows.row_bytes for rows in config.part_rows)
            shortest = max(1, min(shortest, least // config.data_bytes) // 2)
        busy = (config.inflight + 1) * (
            config.expert_bytes / self.bandwidth + latency * (config.expert_beats // shortest + 1)
        )
        self._default_limit = 500_000 + 4 * int(busy)

    @property
    def clocked(self) -> bool:
        """True: there is a clock."""
        return True

    @property
    def cycles(self) -> int:
        """Clock cycles since reset."""
        return int(self._library.prestage_cycles(self._open()))

    def exchange(self, data: bytes, *, frames: int = 1, limit: float | None = None) -> bytes:
        """Send ``data`` and return what came back, at the latest after ``limit`` cycles."""
        handle = self._open()
        if data:
            self._library.prestage_push(handle, bytes(data), len(data))
        until = _UNTIL_SENT | (_UNTIL_FRAMES if frames else 0)
        self._advance(self._default_limit if limit is None else int(limit), until, frames)
        return self._pop()

    def run(self, cycles: int) -> bytes:
        """Let ``cycles`` clock cycles pass; returns the bytes that came back meanwhile."""
        self._open()
        self._advance(cycles, 0, 0)
        return self._pop()

    def reset(self) -> None:
        """Assert the reset; cycles start at 0 again and the log is empty."""
        self._library.prestage_reset(self._open())

    def read_slot(self, slot: int, *, size: int | None = None) -> bytes:
        """The first ``size`` bytes of a slot, or all, through the consumer port.

        Raises
        ------
        ValueError
            If there is no such slot, or if it hasn't so many whole tiles.
        OSError
            If a tile of them isn't valid, or slots are the host's.
        """
        size = slot_tiles(self.config, size) * self.config.tile_bytes
        (verdict,) = self._consume([slot], [0], [size])
        if verdict & _INVALID:
            raise OSError(f"Slot {slot} holds a tile that is not valid")
        return ctypes.string_at(self._library.prestage_slot_bytes(self._open()), size)

    def compare(
        self, slots: Sequence[int], layers: Sequence[int], experts: Sequence[int]
    ) -> list[int]:
        """Positions whose slot differs from the expert's bytes in memory or holds an invalid tile.

        Raises
        ------
        ValueError
            If the sequences differ in length or a number is out of its range.
        """
        if not len(slots) == len(layers) == len(experts):
            raise ValueError(
                "Slots, layers and experts must be equally many,"
                f" not {len(slots)}, {len(layers)} and {len(experts)}"
            )
        model = self.config.model
        addresses = []
        for layer, expert in zip(layers, experts, strict=True):
            if not 0 <= layer < model.layers or not 0 <= expert < model.experts:
                raise ValueError(f"Model has no expert {expert} in layer {layer}")
            addresses.append(self.config.expert_address(int(layer), int(expert)))
        if self.config.mover == "host" and self.config.stores_slots:
            raise OSError("Experts are the host's")
        if len(self.config.part_bytes) > 1 or self.config.rows:
            return self._compare_parts(slots, layers, experts)
        sizes = [self.config.layer_sizes[layer] for layer in layers]
        verdicts = self._consume(slots, addresses, sizes)
        return [position for position, verdict in enumerate(verdicts) if verdict]

    def _compare_parts(
        self, slots: Sequence[int], layers: Sequence[int], experts: Sequence[int]
    ) -> list[int]:
        """The same slot by slot: the harness compares with what lies in one piece."""
        wrong = []
        for position, (slot, layer, expert) in enumerate(zip(slots, layers, experts, strict=True)):
            spans = self.config.expert_spans(int(layer), int(expert))
            whole = np.concatenate([self._memory[at : at + size] for at, size in spans]).tobytes()
            (verdict,) = self._consume([slot], [0], [len(whole)])
            held = self._library.prestage_slot_bytes(self._open())
            if verdict & _INVALID or ctypes.string_at(held, len(whole)) != whole:
                wrong.append(position)
        return wrong

    def transfers(self) -> NDArray[np.void]:
        """The last 131,072 bursts that ended, oldest first."""
        log = np.zeros(
            min(int(self._library.prestage_bursts(self._open())), _LOG_BURSTS), TRANSFER_DTYPE
        )
        self._library.prestage_transfers(self._handle, log.ctypes.data, len(log))
        return log

    def close(self) -> None:
        """Free the device. A second call does nothing."""
        self._handle = None
        self._finalizer()

    def __enter__(self) -> CompiledPipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError("Device is closed")
        return self._handle

    def _advance(self, cycles: int, until: int, frames: int) -> None:
        """Run in calls so short that Ctrl-C gets through; it does no harm between any two."""
        while cycles > 0:
            count = min(cycles, self._cycles_a_call)
            begun = time.perf_counter()
            done = self._library.prestage_run(self._handle, count, until, frames)
            if done < count:
                return
            cycles -= count
            seconds = time.perf_counter() - begun
            if count == self._cycles_a_call:
                if seconds > 2 * _CALL_SECONDS:
                    self._cycles_a_call = max(1_000, self._cycles_a_call // 2)
                elif seconds < _CALL_SECONDS / 2:
                    self._cycles_a_call *= 2

    def _pop(self) -> bytes:
        count = self._library.prestage_received(self._handle)
        data = ctypes.string_at(self._library.prestage_data(self._handle), count) if count else b""
        self._library.prestage_pop(self._handle, count)
        return data

    def _consume(
        self, slots: Sequence[int], addresses: Sequence[int], sizes: Sequence[int]
    ) -> bytes:
        handle = self._open()
        if not self.config.stores_slots:
            raise OSError("Slots are the host's")
        for slot in slots:
            if not 0 <= slot < self.config.slots:
                raise ValueError(f"Slot must be below {self.config.slots}, not {slot}")
        if not slots:
            return b""
        chosen = np.array(slots, np.uint32)
        places = np.array(addresses, np.uint64)
        beats = np.array(sizes, np.uint64) // np.uint64(self.config.data_bytes)
        self._library.prestage_consume(
            handle, len(chosen), chosen.ctypes.data, places.ctypes.data, beats.ctypes.data
        )
        # A beat a cycle is usual; a port that answers a hundred times slower is stuck.
        limit = 100_000 + 100 * len(chosen) * self.config.expert_beats
        self._advance(limit, _UNTIL_CONSUMED, 0)
        if not self._library.prestage_consumed(handle):
            raise OSError(f"Consumer port did not answer within {limit} cycles")
        return ctypes.string_at(self._library.prestage_verdicts(handle), len(chosen))


def _destroy(library: ctypes.CDLL, handle: int, memory: NDArray[np.uint8]) -> None:
    del memory
    library.prestage_destroy(handle)
