"""What a replay found out, as numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import TRANSFER_DTYPE, DeviceConfig
from prestage_hw.contract.records import NO_TOKEN, Phase, PrefetchKind, PrefetchOutcome

from .traces import Trace

__all__ = [
    "METRICS",
    "SAMPLE_DTYPE",
    "LayerAccuracy",
    "Run",
    "baseline_misses",
    "layer_accuracy",
    "metrics",
]

#: One reading of some counters after a number of tokens.
SAMPLE_DTYPE = np.dtype(
    [
        ("token", "<u4"),
        ("cycle", "<u8"),
        ("demands", "<u4"),
        ("hits", "<u4"),
        ("misses", "<u4"),
        ("late", "<u4"),
        ("merged", "<u4"),
        ("useful", "<u4"),
    ]
)

#: One sentence for each metric.
METRICS = {
    "recall": "Chosen experts that the predictor had proposed, of all at predictable layers.",
    "over_fetch": "Experts that the predictor proposed for each one that was chosen.",
    "precision": "Proposed experts that the layer then chose.",
    "coverage": "Demand misses that prefetching removed, of those without prefetching.",
    "accuracy": "Prefetched experts that were demanded: useful / (useful + useless).",
    "hit_rate": "Demands that found their expert resident.",
    "bytes_moved": "Bytes fetched, for demands and for prefetches.",
}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def baseline_misses(trace: Trace, *, layers: int, slots: int) -> int:
    """Demand misses without prefetching: plain LRU, since what is pinned was just used.

    Parameters
    ----------
    trace : :class:`Trace`
        What the router chose.
    layers : :class:`int`
        Routing decisions that count, from the first token's first layer on.
    slots : :class:`int`
        Slots of the buffer, at least the trace's k.
    """
    rows = trace.experts.reshape(-1, trace.top_k)[:layers].astype(np.int64)
    rows += (np.arange(len(rows)) % trace.layers * trace.experts_per_layer)[:, None]
    kept: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for expert in rows.ravel().tolist():
        if expert in kept:
            kept.move_to_end(expert)
            continue
        misses += 1
        if len(kept) == slots:
            kept.popitem(last=False)
        kept[expert] = None
    return misses


def metrics(counters: Mapping[str, int], *, baseline: int) -> dict[str, float | int | None]:
    """Metrics of :data:`METRICS`; None where nothing was counted.

    Parameters
    ----------
    counters : mapping
        Counters of a device by name.
    baseline : :class:`int`
        Demand misses without prefetching, see :func:`baseline_misses`.
    """
    c = counters
    if not c:
        return dict.fromkeys(METRICS)
    return {
        "recall": _ratio(c["candidates_correct"], c["demands_predicted"]),
        "over_fetch": _ratio(c["candidates"], c["demands_predicted"]),
        "precision": _ratio(c["candidates_correct"], c["candidates"]),
        "coverage": _ratio(baseline - c["misses"], baseline),
        "accuracy": _ratio(c["useful"], c["useful"] + c["useless"]),
        "hit_rate": _ratio(c["hits"], c["demands"]),
        "bytes_moved": c["demand_bytes"] + c["prefetch_bytes"],
    }


@dataclass(kw_only=True)
class Run:
    """One replay.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    url : :class:`str`
        Where it was opened.
    pace, layer_cycles
        Pace of the replay, and cycles of a layer's compute at timed pace.
    prefetch_tiles : :class:`int`
        Prefetch tiles that could be under way at once.
    policy : :class:`str`
        Which expert gave way to another.
    budget : :class:`int`
        Eighths of a prefetch that had to be expected in time; 0: none.
    rescan : :class:`int`
        Layers whose values were looked through in place of the predictor's candidates; 0: none.
    throttle : :class:`bool`
        Whether prefetches of a kind were switched off while they cost more than they saved.
    trace : :class:`Trace`
        What was to be replayed.
    complete : :class:`bool`
        True if all of it was.
    error : :class:`str`
        Why it wasn't, empty if it was or if it was interrupted.
    tokens, layers : :class:`int`
        Whole tokens and single layers that were replayed.
    experts_checked, bytes_checked : :class:`int`
        What was compared with memory, all of it equal.
    baseline_misses : :class:`int`
        Demand misses that there would be without prefetching.
    counters : mapping
        Counters by name; empty if the device couldn't be asked any more.
    cycles : :class:`int`
        Clock cycles, 0 without a clock.
    seconds : :class:`float`
        Wall time.
    samples : array of :data:`SAMPLE_DTYPE`
        Counters over tokens.
    spans : array of uint64, ``[tokens, layers, 2]``
        Cycle of each layer's route and of its last ready; no tokens without a clock.
    transfers : array of :data:`TRANSFER_DTYPE`
        The last bursts.
    tables : mapping
        Predictor tables that were loaded before.
    versions : mapping
        Versions by name.
    prefetches : array
        What became of prefetches, ``[layers, kinds, outcomes]``.
    refusal : :class:`str`
        The first register write that the device has refused, and why; empty if there is none.
    """

    config: DeviceConfig
    url: str
    pace: str
    trace: Trace
    complete: bool
    tokens: int
    layers: int
    counters: dict[str, int]
    cycles: int
    seconds: float
    experts_checked: int = 0
    bytes_checked: int = 0
    baseline_misses: int = 0
    layer_cycles: int = 0
    prefetch_tiles: int = 1
    policy: str = "lru"
    throttle: bool = False
    budget: int = 0
    rescan: int = 0
    error: str = ""
    samples: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, SAMPLE_DTYPE))
    spans: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 0, 2), np.uint64))
    transfers: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, TRANSFER_DTYPE))
    tables: dict[int, NDArray[np.uint32]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    prefetches: NDArray[np.uint32] = field(default_factory=lambda: np.zeros((0, 3, 5), np.uint32))
    refusal: str = ""

    def prefetch_rows(self) -> list[dict[str, int | str]]:
        """What became of prefetches, a row for each layer and kind that had any."""
        return [
            {
                "layer": layer,
                "kind": kind.name.lower(),
                **{o.name.lower(): int(counts[kind, o]) for o in PrefetchOutcome},
            }
            for layer, counts in enumerate(self.prefetches)
            for kind in PrefetchKind
            if counts[kind].any()
        ]

    def metrics(self) -> dict[str, float | int | None]:
        """See :func:`metrics`."""
        return metrics(self.counters, baseline=self.baseline_misses)

    def stalls(self) -> NDArray[np.int64]:
        """Cycles from route to last ready of every layer, ``[tokens, layers]``."""
        return (self.spans[..., 1] - self.spans[..., 0]).astype(np.int64)

    def stall_summary(self) -> dict[str, float | int]:
        """Sum, mean, median and 99th percentile of :meth:`stalls`, in cycles."""
        stalls = self.stalls()
        if not stalls.size:
            return {"stall_cycles": 0, "stall_mean": 0, "stall_median": 0, "stall_p99": 0}
        return {
            "stall_cycles": int(stalls.sum()),
            "stall_mean": round(float(stalls.mean()), 1),
            "stall_median": float(np.median(stalls)),
            "stall_p99": round(float(np.percentile(stalls, 99)), 1),
        }


@dataclass(kw_only=True)
class LayerAccuracy:
    """How well each layer was predicted, ``[layers]`` each."""

    demands: NDArray[np.int64]
    candidates: NDArray[np.int64]
    correct: NDArray[np.int64]


def layer_accuracy(run: Run) -> LayerAccuracy:
    """Accuracy by layer: the golden predictor on the tokens that were replayed.

    What a predictor proposes depends on the routing alone, so that this holds for every device and
    pace. Its sums are the device's counters.
    """
    # Some predictors are compiled when they are first used, which a replay doesn't wait for.
    from .model.predictor import create_predictor

    config = run.config
    predictor = create_predictor(config)
    for number, words in run.tables.items():
        for at, word in enumerate(words.tolist()):
            predictor.write_table(number, at, word)
    shape = config.model.layers
    result = LayerAccuracy(
        demands=np.zeros(shape, np.int64),
        candidates=np.zeros(shape, np.int64),
        correct=np.zeros(shape, np.int64),
    )
    stamp = 0
    left = run.layers
    tokens = np.where(run.trace.token < 0, NO_TOKEN, run.trace.token).tolist()
    phases = np.where(run.trace.is_decode, Phase.DECODE, Phase.PREFILL).tolist()
    for token, phase, rows in zip(tokens, phases, run.trace.experts.tolist(), strict=True):
        if not left:
            return result
        candidates = predictor.begin(0, token, phase)
        for layer, experts in enumerate(rows):
            proposed = {candidate[2] for candidate in candidates if candidate[1] == layer}
            result.candidates[layer] += len(proposed)
            if not left:
                return result
            left -= 1
            # A token's first layer has none before it: it counts only if something was proposed.
            if layer or proposed:
                result.demands[layer] += len(experts)
                result.correct[layer] += len(proposed.intersection(experts))
            stamp = (stamp + 1) % 256
            candidates = predictor.decide(0, layer, experts, stamp)
    return result
