"""Run predictors over traces and make their numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prestage_hw.contract import ModelConfig
from prestage_sim.traces import Trace, TraceError, model_config

from .metrics import Tally, cut_offs, expected_calibration_error, reliability_table
from .rankers import FARTHEST_HORIZON, Ranker, create_ranker, ranker_class, split_name

__all__ = [
    "RESIDENCIES",
    "Evaluation",
    "check_horizons",
    "check_warm",
    "defined_horizons",
    "evaluate",
]

#: Shares of all experts that the LRU caches hold by default.
RESIDENCIES = (0.10, 0.25, 0.40)

#: What a chunk's rankings may take, in bytes, and its greatest length in tokens.
_CHUNK_BYTES = 64 << 20
_CHUNK_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Quality of one predictor on one trace at one horizon, over all layers.

    What a denominator of 0 leaves undefined is None.

    Parameters
    ----------
    trace : :class:`str`
        Path of the trace as given.
    predictor : :class:`str`
        Name as given, with its options.
    horizon : :class:`int`
        Layers ahead.
    model : :class:`str`
        Model of the trace.
    layers, experts, top_k : :class:`int`
        Its shape (L, E, k).
    tokens, requests : :class:`int`
        Tokens scored, and their requests.
    warm : list of :class:`str`
        Traces that were learned before, in order.
    warm_tokens : :class:`int`
        Their tokens.
    recall_at_k, recall_at_1_5k, recall_at_2k, recall_at_3k : :class:`float`
        Share of the k true experts among the m best ranked; m is rounded down, and E at most.
    recall_at : list of :class:`float`
        The same for each m from 1 to E.
    own_recall : :class:`float`
        Share of the true experts that were proposed, by the predictor's own stopping rule.
    own_precision : :class:`float` or None
        Share of the proposed experts that came true.
    over_fetch : :class:`float`
        Proposed experts / k.
    ece : :class:`float` or None
        Expected calibration error over all experts; None without probabilities.
    ece_proposed : :class:`float` or None
        The same over proposed experts only.
    reliability, reliability_proposed : list of mapping, or None
        ``low``, ``high``, ``count``, ``predicted``, ``observed`` of 16 bins of equal width.
    cold_start : list of mapping
        ``first``, ``tokens``, ``recall_at_k`` of blocks of tokens, ever wider.
    miss_recall : list of mapping
        ``residency``, ``slots``, ``misses``, ``miss_rate``, ``recall_at_k``, ``recall_at_2k`` of
        true experts that an LRU cache doesn't hold.
    by_layer : list of mapping
        ``layer``, ``recall_at_k``, ``recall_at_2k``, ``own_recall``, ``own_precision``,
        ``over_fetch``.
    seconds : :class:`float`
        Time of ranking, learning and scoring, all horizons of the run together.
    token_layers_per_second : :class:`float`
        Tokens times layers / seconds.
    """

    trace: str
    predictor: str
    horizon: int
    model: str
    layers: int
    experts: int
    top_k: int
    tokens: int
    requests: int
    warm: list[str]
    warm_tokens: int
    recall_at_k: float
    recall_at_1_5k: float
    recall_at_2k: float
    recall_at_3k: float
    recall_at: list[float]
    own_recall: float
    own_precision: float | None
    over_fetch: float
    ece: float | None
    ece_proposed: float | None
    reliability: list[dict[str, Any]] | None
    reliability_proposed: list[dict[str, Any]] | None
    cold_start: list[dict[str, Any]]
    miss_recall: list[dict[str, Any]]
    by_layer: list[dict[str, Any]]
    seconds: float
    token_layers_per_second: float

    def as_object(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)


def check_horizons(trace: Trace, horizons: Iterable[int]) -> None:
    """Refuse horizons that no layer of a trace has.

    Raises
    ------
    ValueError
        If a horizon is not 1 to 4, or beyond the last layer.
    """
    for horizon in horizons:
        if not 1 <= horizon <= FARTHEST_HORIZON:
            raise ValueError(f"Horizon must be between 1 and {FARTHEST_HORIZON}, not {horizon}")
        if horizon >= trace.layers:
            raise ValueError(
                f"Horizon {horizon} is beyond the last layer of the trace, layer {trace.layers - 1}"
            )


def check_warm(trace: Trace, warm: Trace) -> None:
    """Refuse a trace to learn from that has another shape than the one to be scored.

    Raises
    ------
    TraceError
        If layers, experts or k differ.
    """
    wanted = (trace.layers, trace.experts_per_layer, trace.top_k)
    shape = (warm.layers, warm.experts_per_layer, warm.top_k)
    if shape != wanted:
        raise TraceError(
            f"Trace to learn from must have {wanted[0]} layers, {wanted[1]} experts and"
            f" k = {wanted[2]}, not {shape[0]}, {shape[1]} and {shape[2]}"
        )


def defined_horizons(predictor: str, horizons: Iterable[int]) -> tuple[int, ...]:
    """Those horizons that a predictor is defined for, ascending.

    Raises
    ------
    ValueError
        If the predictor or one of its options is unknown.
    """
    farthest = ranker_class(split_name(predictor)[0]).farthest
    return tuple(sorted({horizon for horizon in horizons if horizon <= farthest}))


def _chunks(trace: Trace, *, horizons: int, model: ModelConfig) -> Iterable[slice]:
    token_bytes = 9 * horizons * model.layers * model.experts
    size = max(1, min(_CHUNK_TOKENS, _CHUNK_BYTES // token_bytes))
    return (slice(at, at + size) for at in range(0, trace.tokens, size))


def _ready(name: str, trace: Trace, model: ModelConfig, ranker: Ranker, slots: list[int]) -> None:
    """Have everything compiled, on two tokens, so that no time is taken of it."""
    other = create_ranker(name, model=model, horizons=ranker.horizons)
    tally = Tally(model=model, horizons=len(ranker.horizons), tokens=2, slots=slots)
    experts = trace.experts[:2].astype(np.int32)
    tally.add(experts, other.rank(experts, trace.token[:2], trace.request_id[:2]))


def evaluate(
    trace: Trace,
    *,
    predictor: str,
    horizons: Iterable[int] = (1,),
    warm: Sequence[Trace] = (),
    residencies: Sequence[float] = RESIDENCIES,
    name: str = "",
    warm_names: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """Run a predictor over a trace and compare what it ranked with what came.

    The predictor starts with empty tables, learns the traces of ``warm`` unscored, then ranks and
    learns the trace. The LRU caches start empty with the trace.

    Parameters
    ----------
    trace : :class:`Trace`
        Trace to score.
    predictor : :class:`str`
        Name of a ranker, ``NAME[:OPTION=VALUE]...``.
    horizons : iterable of :class:`int`
        Layers ahead, 1 to 4 and below the trace's layers; each must be defined for the predictor.
    warm : sequence of :class:`Trace`
        Traces of the same shape to learn before.
    residencies : sequence of :class:`float`
        Shares of all experts that the LRU caches hold, 0 to 1.
    name, warm_names : :class:`str` and sequence of :class:`str`
        Paths of the traces, for the results.
    progress : callable or None
        Takes the number of tokens done, those of ``warm`` included.

    Returns
    -------
    list of :class:`Evaluation`
        One for each horizon, ascending.

    Raises
    ------
    TraceError
        If a trace to learn from has another shape.
    ValueError
        If a name, an option, a horizon or a residency is refused.
    """
    wanted = tuple(sorted(set(horizons)))
    check_horizons(trace, wanted)
    for other in warm:
        check_warm(trace, other)
    for residency in residencies:
        if not 0 <= residency <= 1:
            raise ValueError(f"Residency must be between 0 and 1, not {residency}")
    model = model_config(trace)
    ranker = create_ranker(predictor, model=model, horizons=wanted)
    # Decimal shares such as 0.10 are a hair off in binary; a slot must not be lost to that.
    slots = [int(r * model.layers * model.experts + 1e-9) for r in residencies]
    _ready(predictor, trace, model, ranker, slots)
    tally = Tally(model=model, horizons=len(wanted), tokens=trace.tokens, slots=slots)
    done = 0
    seconds = 0.0
    for current, scored in (*((other, False) for other in warm), (trace, True)):
        for part in _chunks(current, horizons=len(wanted), model=model):
            experts = current.experts[part].astype(np.int32)
            begun = time.perf_counter()
            ranking = ranker.rank(experts, current.token[part], current.request_id[part])
            if scored:
                tally.add(experts, ranking)
                seconds += time.perf_counter() - begun
            done += len(experts)
            if progress is not None:
                progress(done)
    return [
        _evaluation(
            tally,
            at,
            trace=name,
            predictor=predictor,
            horizon=horizon,
            requests=trace.requests,
            warm=list(warm_names),
            warm_tokens=sum(t.tokens for t in warm),
            residencies=residencies,
            seconds=seconds,
        )
        for at, horizon in enumerate(wanted)
    ]


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _evaluation(
    tally: Tally, at: int, *, residencies: Sequence[float], seconds: float, **given: Any
) -> Evaluation:
    model = tally.model
    k = model.top_k
    truths = tally.tokens * k  # of one layer
    curve = np.cumsum(tally.ranks[at].sum(axis=0)) / (truths * model.layers)
    at_k, at_1_5k, at_2k, at_3k = cut_offs(top_k=k, experts=model.experts)
    own = tally.own[at].sum(axis=0)
    counts, sums = tally.calibration_counts[at], tally.calibration_sums[at]
    calibrated = tally.probabilities
    sizes = np.diff(tally.edges)
    by_rank = np.cumsum(tally.ranks[at], axis=1)
    return Evaluation(
        **given,
        model=model.name,
        layers=model.layers,
        experts=model.experts,
        top_k=k,
        tokens=tally.tokens,
        recall_at_k=float(curve[at_k - 1]),
        recall_at_1_5k=float(curve[at_1_5k - 1]),
        recall_at_2k=float(curve[at_2k - 1]),
        recall_at_3k=float(curve[at_3k - 1]),
        recall_at=curve.tolist(),
        own_recall=float(own[1] / (truths * model.layers)),
        own_precision=_ratio(own[1], own[0]),
        over_fetch=float(own[0] / (truths * model.layers)),
        ece=expected_calibration_error(counts[0], sums[0]) if calibrated else None,
        ece_proposed=expected_calibration_error(counts[1], sums[1]) if calibrated else None,
        reliability=reliability_table(counts[0], sums[0]) if calibrated else None,
        reliability_proposed=reliability_table(counts[1], sums[1]) if calibrated else None,
        cold_start=[
            {
                "first": int(first),
                "tokens": int(size),
                "recall_at_k": float(found / (size * k * model.layers)),
            }
            for first, size, found in zip(tally.edges[:-1], sizes, tally.cold[at], strict=True)
        ],
        miss_recall=[
            {
                "residency": residency,
                "slots": cache.slots,
                "misses": int(missed),
                "miss_rate": float(missed / (truths * model.layers)),
                "recall_at_k": _ratio(found_k, missed),
                "recall_at_2k": _ratio(found_2k, missed),
            }
            for residency, cache, (missed, found_k, found_2k) in zip(
                residencies, tally.caches, tally.misses[at], strict=True
            )
        ],
        by_layer=[
            {
                "layer": layer,
                "recall_at_k": float(by_rank[layer, at_k - 1] / truths),
                "recall_at_2k": float(by_rank[layer, at_2k - 1] / truths),
                "own_recall": float(true / truths),
                "own_precision": _ratio(true, sent),
                "over_fetch": float(sent / truths),
            }
            for layer, (sent, true) in enumerate(tally.own[at])
        ],
        seconds=seconds,
        token_layers_per_second=tally.tokens * model.layers / seconds if seconds else 0.0,
    )
