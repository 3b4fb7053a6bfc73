"""Replay a routing trace through a device and check every byte that comes ready."""

from __future__ import annotations

import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import (
    TRANSFER_DTYPE,
    DeviceConfig,
    ModelConfig,
    register_hash,
)
from prestage_hw.contract.pattern import expert_pattern
from prestage_hw.contract.records import Phase, Policy, PrefetchKind, PrefetchOutcome
from prestage_hw.contract.registers import VERSION
from prestage_sim.profile import CORRELATION_TABLE, correlation_profile
from prestage_sim.runs import SAMPLE_DTYPE, Run, baseline_misses
from prestage_sim.traces import Trace, TraceError, model_config

from .device import Device
from .errors import (
    ArgumentError,
    DataError,
    DeviceError,
    DeviceTimeoutError,
    LinkError,
    PrestageError,
)

__all__ = [
    "PACES",
    "POLICIES",
    "Interrupt",
    "default_slots",
    "device_config",
    "profile_tables",
    "replay",
    "run_object",
]

#: Paces of a replay.
PACES = ("drained", "timed")

#: Policies of eviction by name.
POLICIES = {policy.name.lower().replace("_", "-"): policy for policy in Policy}

#: Points of the curves over tokens in a report.
_SAMPLES = 200
_SAMPLED = tuple(name for name in SAMPLE_DTYPE.names or () if name not in ("token", "cycle"))


def default_slots(*, layers: int, experts: int, top_k: int, contexts: int = 1) -> int:
    """A quarter of all experts, at least what all contexts may pin."""
    return max(contexts * top_k, layers * experts // 4)


def device_config(trace: Trace, *, slots: int | None = None, **parameters: Any) -> DeviceConfig:
    """Configuration of a device that fits a trace.

    Parameters
    ----------
    trace : :class:`Trace`
        Trace whose shape the device must have.
    slots : :class:`int` or None
        Slots of the buffer; None stands for :func:`default_slots`.
    parameters
        Further parameters of :class:`DeviceConfig`.

    Raises
    ------
    ArgumentError
        If a parameter is out of its range.
    TraceError
        If the trace's shape is beyond what a device may have.
    """
    model = model_config(trace)
    if slots is None:
        slots = default_slots(layers=model.layers, experts=model.experts, top_k=model.top_k)
    try:
        return DeviceConfig(model=model, slots=slots, **parameters)
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def profile_tables(config: DeviceConfig, traces: Iterable[Trace]) -> dict[int, NDArray[np.uint32]]:
    """Predictor tables from a profile, as :meth:`Device.configure` takes them.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor will hold them.
    traces : iterable of :class:`Trace`
        Traces of the same model.

    Raises
    ------
    ArgumentError
        If a trace has another shape than the device, or its predictor holds no profile.
    """
    if config.predictor != "st_moe":
        raise ArgumentError(f"Predictor must be st_moe to hold a profile, not {config.predictor}")
    experts = []
    for trace in traces:
        _check_shape(trace, config.model, what="Profile", kind=ArgumentError)
        experts.append(trace.experts)
    return {CORRELATION_TABLE: correlation_profile(np.concatenate(experts), config=config)}


def _check_shape(trace: Trace, model: ModelConfig, *, what: str, kind: type[ValueError]) -> None:
    shape = (trace.layers, trace.experts_per_layer, trace.top_k)
    if shape != (model.layers, model.experts, model.top_k):
        raise kind(
            f"{what} must have {model.layers} layers, {model.experts} experts and"
            f" k = {model.top_k}, not {shape[0]}, {shape[1]} and {shape[2]}"
        )


class Interrupt:
    """Turn the first Ctrl-C into a flag, so that a run ends between two layers.

    A second one ends it at once.

    Members
    -------
    requested : :class:`bool`
        True once Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class _Recorder:
    """What a replay notes on its way, in arrays of fixed size."""

    def __init__(self, trace: Trace, *, clocked: bool) -> None:
        self.samples = np.zeros(_SAMPLES + 2, dtype=SAMPLE_DTYPE)
        self.sampled = 0
        # Route and last ready of every layer, in cycles.
        shape = (trace.tokens, trace.layers, 2) if clocked else (0, trace.layers, 2)
        self.spans = np.zeros(shape, dtype=np.uint64)

    def sample(self, device: Device, token: int) -> None:
        if self.sampled < len(self.samples):
            values = device.counters(*_SAMPLED)
            self.samples[self.sampled] = (token, device.cycles, *values)
            self.sampled += 1


def replay(
    device: Device,
    trace: Trace,
    *,
    pace: str = "drained",
    layer_cycles: int = 0,
    prefetch_tiles: int | None = None,
    policy: Policy | None = None,
    throttle: bool | None = None,
    budget: int = 0,
    rescan: int = 0,
    rescan_least: int | None = None,
    interrupt: Interrupt | None = None,
    progress: Callable[[int], None] | None = None,
    tables: dict[int, NDArray[np.uint32]] | None = None,
) -> Run:
    """Stream a trace through a device, token by token and layer by layer, on context 0.

    Parameters
    ----------
    device : :class:`Device`
        A freshly opened device.
    trace : :class:`Trace`
        What the router chose.
    pace : :class:`str`
        ``"drained"``: each layer is posted when the device is idle, so that every counter is the
        same on every device. ``"timed"``: a layer is computed for ``layer_cycles`` after its
        experts have arrived, whatever the device does meanwhile; needs a clock.
    layer_cycles : :class:`int`
        Cycles from a layer's last ready to the next layer's route, at timed pace. At least 1.
    prefetch_tiles : :class:`int` or None
        Prefetch tiles that may be under way at once, 1 to 4. None stands for 4 at drained pace,
        where no demand ever waits behind them and only time is saved, and 1 at timed pace. Bursts
        outstanding below demand are those of a tile at timed pace, all at drained pace.
    policy : :class:`Policy` or None
        Which expert gives way to another. None stands for the one whose next use is worth least
        where the predictor says what experts are worth, else for the least recently used.
    throttle : :class:`bool` or None
        Switch off prefetches of a kind while they cost more than they save. None stands for True at
        timed pace; at drained pace all that is prefetched comes in time, and costs no demand any.
    budget : :class:`int`
        Eighths of a prefetch's tiles that must be expected before its deadline, or it is dropped; 0
        drops none. Without effect at drained pace.
    rescan, rescan_least : :class:`int`
        Layers whose values are looked through for prefetches in place of the predictor's
        candidates, 0 for none, and the least confidence of those, None for the device's own: see
        :meth:`Device.configure`.
    interrupt : :class:`Interrupt` or None
        Flag that ends the run between two layers.
    progress : callable or None
        Called with the number of tokens done.
    tables : mapping or None
        Predictor tables that were loaded before, for the report.

    Returns
    -------
    :class:`prestage_sim.report.Run`
        What happened. Its ``complete`` is False, and ``error`` says why, if the run was interrupted
        or an expert's bytes were wrong.

    Raises
    ------
    ArgumentError
        If the pace is unknown, the device has no clock for it, or trace and device differ in shape.
    """
    _check(device, trace, pace=pace, layer_cycles=layer_cycles)
    if prefetch_tiles is None:
        prefetch_tiles = 4 if pace == "drained" else 1
    if policy is None:
        policy = Policy.NEXT_USE if device.config.gives_values else Policy.LRU
    # What is served first must not hang on how fast the predictor is.
    settle = pace == "drained"
    if throttle is None:
        throttle = pace == "timed"
    device.configure(
        prefetch_tiles=prefetch_tiles,
        policy=policy,
        settle=settle,
        throttle=throttle,
        budget=budget,
        rescan=rescan,
        rescan_least=rescan_least,
    )
    # At drained pace no demand waits for what a prefetch has outstanding.
    lower_credits = device.config.outstanding_bursts if pace == "drained" else 0
    device.configure_profile(Phase.DECODE, lower_credits=lower_credits)
    device.switch(Phase.DECODE)
    recorder = _Recorder(trace, clocked=device.clocked)
    model = device.config.model
    interrupt = interrupt or Interrupt()
    step = _drained if pace == "drained" else _timed
    stride = max(1, trace.tokens // _SAMPLES)
    tokens = trace.token.tolist()
    phases = np.where(trace.is_decode, Phase.DECODE, Phase.PREFILL).tolist()
    done = 0
    layers_done = 0
    error: PrestageError | None = None
    started = time.perf_counter()
    first_cycle = device.cycles
    recorder.sample(device, 0)
    try:
        for at in range(trace.tokens):
            if interrupt.requested:
                break
            token = tokens[at]
            device.begin_token(0, token if token >= 0 else None, phases[at])
            if pace == "drained":
                device.sync()  # What is prefetched when a token starts.
            for layer, experts in enumerate(trace.experts[at].tolist()):
                span = step(device, layer, experts, layer_cycles)
                if pace == "drained" and rescan:
                    device.sync()  # What is prefetched once a layer is released.
                if span is not None:
                    recorder.spans[at, layer] = span
                layers_done += 1
                if interrupt.requested:
                    break
            else:
                done = at + 1
            if done % stride == 0:
                recorder.sample(device, done)
            if progress is not None:
                progress(done)
        device.drain()
    except (DataError, DeviceError, DeviceTimeoutError, LinkError) as failure:
        error = failure
    seconds = time.perf_counter() - started
    cycles = device.cycles - first_cycle
    counters: dict[str, int] = {}
    prefetches = np.zeros((0, len(PrefetchKind), len(PrefetchOutcome)), np.uint32)
    refusal = ""
    try:
        counters = device.stats()
        counters.pop("cycles")
        if int(recorder.samples[recorder.sampled - 1]["token"]) != done:
            recorder.sample(device, done)
        prefetches = device.prefetch_statistics()
        refusal = str(device.refusal(clear=False) or "")
    except PrestageError as failure:
        error = error or failure
    complete = done == trace.tokens and error is None
    k = model.top_k
    return Run(
        config=device.config,
        url=device.url,
        pace=pace,
        layer_cycles=layer_cycles,
        prefetch_tiles=prefetch_tiles,
        throttle=throttle,
        budget=budget,
        rescan=rescan,
        policy=next(name for name, each in POLICIES.items() if each == policy),
        trace=trace,
        complete=complete,
        error="" if error is None else str(error),
        tokens=done,
        layers=layers_done,
        experts_checked=layers_done * k,
        baseline_misses=baseline_misses(trace, layers=layers_done, slots=device.config.slots),
        bytes_checked=k * _layers_bytes(device.config, layers_done),
        counters=counters,
        cycles=cycles,
        seconds=seconds,
        samples=recorder.samples[: recorder.sampled],
        spans=recorder.spans[: done if device.clocked else 0],
        transfers=(
            device.simulated.transfers()
            if device.simulated is not None and not isinstance(error, LinkError)
            else np.zeros(0, TRANSFER_DTYPE)
        ),
        tables=tables or {},
        versions=_versions(),
        prefetches=prefetches,
        refusal=refusal,
    )


def _layers_bytes(config: DeviceConfig, layers: int) -> int:
    """Bytes of one expert of each of so many layers, token after token."""
    tokens, more = divmod(layers, config.model.layers)
    return tokens * sum(config.layer_sizes) + sum(config.layer_sizes[:more])


def _check(device: Device, trace: Trace, *, pace: str, layer_cycles: int) -> None:
    if pace not in PACES:
        raise ArgumentError(f"Pace must be one of {', '.join(PACES)}, not {pace!r}")
    if pace == "timed":
        if not device.clocked:
            raise ArgumentError(
                f"Pace timed needs a device with a clock, such as sim://, not {device.url}"
            )
        if layer_cycles < 1:
            raise ArgumentError(f"Layer cycles must be a positive integer, not {layer_cycles}")
    _check_shape(trace, device.config.model, what="Trace", kind=TraceError)


def _verify(device: Device, layer: int) -> None:
    """Compare every byte of a layer's experts, all of them ready."""
    arrived = list(device.wait_ready(0, layer))
    experts = [ready.expert for ready in arrived]
    if device.simulated is not None:
        slots = [ready.slot for ready in arrived]
        wrong = device.simulated.compare(slots, [layer] * len(slots), experts)
    else:
        size = device.config.layer_sizes[layer]
        wrong = [
            at
            for at, ready in enumerate(arrived)
            if device.read(ready) != expert_pattern(layer, ready.expert, size=size).tobytes()
        ]
    if wrong:
        ready = arrived[wrong[0]]
        raise DataError(
            f"Slot {ready.slot} must hold expert {ready.expert} of layer {layer},"
            " but its bytes differ"
        )


def _drained(
    device: Device, layer: int, experts: list[int], layer_cycles: int
) -> tuple[int, int] | None:
    start = device.cycles
    device.route(0, layer, experts)
    device.sync()
    end = device.cycles
    _verify(device, layer)
    device.release(0, layer)
    return (start, end) if end else None


def _timed(
    device: Device, layer: int, experts: list[int], layer_cycles: int
) -> tuple[int, int] | None:
    start = device.cycles
    device.route(0, layer, experts)
    device.collect(0, layer)
    end = device.cycles
    _verify(device, layer)
    # Reading the experts is part of computing with them.
    device.run(end + layer_cycles - device.cycles)
    device.release(0, layer)
    return start, end


def _versions() -> dict[str, str]:
    from . import __version__

    return {
        "prestage": __version__,
        "contract": f"{VERSION >> 16}.{VERSION & 0xFFFF}",
        "register_hash": f"{register_hash():#010x}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def run_object(run: Run, *, trace_path: str) -> dict[str, Any]:
    """A run as one JSON object: what was replayed, on what, and what was counted."""
    timing: dict[str, Any] = {
        "cycles": run.cycles,
        "seconds": round(run.seconds, 6),
        "cycles_per_second": round(run.cycles / run.seconds) if run.seconds else 0,
        "tokens_per_second": round(run.tokens / run.seconds, 3) if run.seconds else 0,
    }
    if run.pace == "timed":
        timing |= run.stall_summary()
    return {
        "complete": run.complete,
        "error": run.error or None,
        "refusal": run.refusal or None,
        "trace": {
            "path": trace_path,
            "model": run.trace.model,
            "tokens": run.trace.tokens,
            "tokens_replayed": run.tokens,
            "layers_replayed": run.layers,
        },
        "config": {
            **asdict(run.config),
            "device": run.url,
            "pace": run.pace,
            "layer_cycles": run.layer_cycles if run.pace == "timed" else None,
            "prefetch_tiles": run.prefetch_tiles,
            "policy": run.policy,
            "throttle": run.throttle,
            "budget": run.budget,
            "rescan": run.rescan,
            "profiled": bool(run.tables),
        },
        "counters": run.counters,
        "prefetches": run.prefetch_rows(),
        "metrics": {**run.metrics(), "baseline_misses": run.baseline_misses},
        "checked": {"experts": run.experts_checked, "bytes": run.bytes_checked},
        "timing": timing,
        "versions": run.versions,
    }
