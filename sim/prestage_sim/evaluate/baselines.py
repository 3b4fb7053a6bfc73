"""Rankers for comparison: counts, the previous token, the paper's predictor, and the truth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig, ModelConfig

from .._jit import compiled
from .rankers import Ranker, Ranking

__all__ = [
    "OracleRanker",
    "PopularityRanker",
    "PreviousTokenRanker",
    "StMoeCountsRanker",
    "StMoeRanker",
]

#: Above every count.
_CHOSEN_BEFORE = 1 << 30

#: Of the paper's predictor: counter of a new entry and its greatest value, worth of the previous
#: token's choice, and least score of a candidate.
_NEW, _MOST, _HISTORY_WORTH, _THRESHOLD = 2, 3, 2, 2

#: Scores of the paper's predictor are multiples of this, so that the order in which experts were
#: touched can break ties: at most K + 1 experts are touched for each of k, 33 * 16.
_TOUCH_SCALE = 1 << 10

#: Probabilities of successors are in units of 2**-12.
_SHARE_BITS = 12


@compiled
def _rank_counts(
    experts: NDArray[np.int32],
    counts: NDArray[np.int32],
    before: NDArray[np.int32],
    favour_before: bool,
    scores: NDArray[np.int32],
    proposed: NDArray[np.bool_],
) -> None:
    """Scores are counts, with the previous token's choice above all if it's favoured."""
    tokens, layers, top_k = experts.shape
    horizons = scores.shape[1]
    count = counts.shape[1]
    for t in range(tokens):
        for m in range(layers):
            row = scores[t, 0, m]
            row[:] = counts[m]
            if favour_before:
                if before[m, 0] >= 0:
                    for i in range(top_k):
                        row[before[m, i]] += _CHOSEN_BEFORE
                        proposed[t, 0, m, before[m, i]] = True
            else:
                for _ in range(top_k):
                    best = -1
                    for e in range(count):
                        if proposed[t, 0, m, e] or row[e] == 0:
                            continue
                        if best < 0 or row[e] > row[best]:
                            best = e
                    if best >= 0:
                        proposed[t, 0, m, best] = True
            for h in range(1, horizons):
                scores[t, h, m] = row
                proposed[t, h, m] = proposed[t, 0, m]
            for i in range(top_k):
                counts[m, experts[t, m, i]] += 1
                before[m, i] = experts[t, m, i]


@compiled
def _rank_st_moe(
    experts: NDArray[np.int32],
    rows: NDArray[np.int32],
    confidences: NDArray[np.int32],
    history: NDArray[np.int32],
    scores: NDArray[np.int32],
    proposed: NDArray[np.bool_],
) -> None:
    """The rule of the golden model's ``st_moe``, horizon 1."""
    tokens, layers, top_k = experts.shape
    count = rows.shape[1]
    successors = rows.shape[2]
    total = np.zeros(count, dtype=np.int32)
    touch = np.zeros(count, dtype=np.int32)
    used = np.zeros(top_k, dtype=np.bool_)
    for t in range(tokens):
        for m in range(layers):
            total[:] = 0
            touch[:] = -1
            touched = 0
            if m > 0:
                for i in range(top_k):
                    source = experts[t, m - 1, i]
                    for j in range(successors):
                        e = rows[m - 1, source, j]
                        if e < 0:
                            continue
                        total[e] += confidences[m - 1, source, j]
                        if touch[e] < 0:
                            touch[e] = touched
                            touched += 1
            if history[m, 0] >= 0:
                for i in range(top_k):
                    e = history[m, i]
                    total[e] += _HISTORY_WORTH
                    if touch[e] < 0:
                        touch[e] = touched
                        touched += 1
            for e in range(count):
                if total[e] > 0:
                    scores[t, 0, m, e] = total[e] * _TOUCH_SCALE + (_TOUCH_SCALE - 1 - touch[e])
                    proposed[t, 0, m, e] = m > 0 and total[e] >= _THRESHOLD
            if m > 0:
                for i in range(top_k):
                    source = experts[t, m - 1, i]
                    used[:] = False
                    for j in range(successors):
                        e = rows[m - 1, source, j]
                        if e < 0:
                            continue
                        hit = False
                        for n in range(top_k):
                            if experts[t, m, n] == e:
                                used[n] = True
                                hit = True
                        if hit:
                            if confidences[m - 1, source, j] < _MOST:
                                confidences[m - 1, source, j] += 1
                        elif confidences[m - 1, source, j] > 0:
                            confidences[m - 1, source, j] -= 1
                        else:
                            # Free from now on: whoever comes first takes it.
                            rows[m - 1, source, j] = -2 - e
                    n = 0
                    for j in range(successors):
                        e = rows[m - 1, source, j]
                        if e >= 0:
                            continue
                        while n < top_k and used[n]:
                            n += 1
                        if n < top_k:
                            rows[m - 1, source, j] = experts[t, m, n]
                            confidences[m - 1, source, j] = _NEW
                            n += 1
                        elif e < -1:
                            rows[m - 1, source, j] = -2 - e
            for i in range(top_k):
                history[m, i] = experts[t, m, i]


@compiled
def _rank_shares(
    experts: NDArray[np.int32],
    followed: NDArray[np.int32],
    seen: NDArray[np.int32],
    history: NDArray[np.int32],
    worth: int,
    scores: NDArray[np.int32],
    proposed: NDArray[np.bool_],
) -> None:
    """Scores are sums of shares of successors, and ``worth`` for the previous token's choice."""
    tokens, layers, top_k = experts.shape
    count = seen.shape[1]
    for t in range(tokens):
        for m in range(layers):
            row = scores[t, 0, m]
            if m > 0:
                for i in range(top_k):
                    source = experts[t, m - 1, i]
                    if seen[m - 1, source] == 0:
                        continue
                    unit = np.float64(1 << _SHARE_BITS) / seen[m - 1, source]
                    for e in range(count):
                        row[e] += np.int32(followed[m - 1, source, e] * unit)
            if history[m, 0] >= 0:
                for i in range(top_k):
                    row[history[m, i]] += worth
            for _ in range(top_k):
                best = -1
                for e in range(count):
                    if proposed[t, 0, m, e] or row[e] == 0:
                        continue
                    if best < 0 or row[e] > row[best]:
                        best = e
                if best >= 0:
                    proposed[t, 0, m, best] = True
            if m > 0:
                for i in range(top_k):
                    source = experts[t, m - 1, i]
                    seen[m - 1, source] += 1
                    for n in range(top_k):
                        followed[m - 1, source, experts[t, m, n]] += 1
            for i in range(top_k):
                history[m, i] = experts[t, m, i]


class _Baseline(Ranker):
    """A ranker without probabilities, whose work is one compiled function."""

    def __init__(self, *, model: ModelConfig, horizons: Iterable[int] = (1,)) -> None:
        super().__init__(model=model, horizons=horizons)
        # The previous token's choice, -1 in a layer that was never routed.
        self._before = np.full((model.layers, model.top_k), -1, dtype=np.int32)

    def rank(
        self, experts: NDArray[np.integer], tokens: NDArray[np.int32], requests: NDArray[np.int32]
    ) -> Ranking:
        chosen = np.ascontiguousarray(experts, dtype=np.int32)
        shape = (len(chosen), len(self.horizons), self.model.layers, self.model.experts)
        scores = np.zeros(shape, dtype=np.int32)
        proposed = np.zeros(shape, dtype=np.bool_)
        self._rank(chosen, scores, proposed)
        return Ranking(scores=scores, proposed=proposed)

    @abstractmethod
    def _rank(
        self, experts: NDArray[np.int32], scores: NDArray[np.int32], proposed: NDArray[np.bool_]
    ) -> None:
        """Fill in the scores and what is proposed, both zero before."""


class PopularityRanker(_Baseline):
    """How often an expert was chosen in that layer; proposes the k that were chosen most."""

    _favour_before: ClassVar[bool] = False

    def __init__(self, *, model: ModelConfig, horizons: Iterable[int] = (1,)) -> None:
        super().__init__(model=model, horizons=horizons)
        self._counts = np.zeros((model.layers, model.experts), dtype=np.int32)

    def _rank(
        self, experts: NDArray[np.int32], scores: NDArray[np.int32], proposed: NDArray[np.bool_]
    ) -> None:
        _rank_counts(experts, self._counts, self._before, self._favour_before, scores, proposed)


class PreviousTokenRanker(PopularityRanker):
    """The previous token's choice in that layer, the rest by popularity; proposes that choice."""

    _favour_before = True


class StMoeRanker(_Baseline):
    """The paper's predictor, the same as the golden model's class, one layer ahead.

    Scores order experts as the device does, by score and then by first touch; an expert of score 0
    has none. Layer 0, for which the paper predicts nothing, is ranked by the previous token's
    choice, and nothing is proposed there.

    Parameters
    ----------
    model : :class:`ModelConfig`
        Shape of the model.
    horizons : iterable of :class:`int`
        Layers ahead: 1 and no other.
    successors : :class:`int`
        Entries of a correlation row (K), 1 to 32; 0 stands for the device's default.
    """

    farthest = 1
    options: ClassVar[dict[str, Any]] = {"successors": int}

    def __init__(
        self, *, model: ModelConfig, horizons: Iterable[int] = (1,), successors: int = 0
    ) -> None:
        super().__init__(model=model, horizons=horizons)
        config = DeviceConfig(model=model, slots=model.top_k, successors=successors)
        shape = (model.layers - 1, model.experts, config.successors)
        self._rows = np.full(shape, -1, dtype=np.int32)
        self._confidences = np.zeros(shape, dtype=np.int32)

    def _rank(
        self, experts: NDArray[np.int32], scores: NDArray[np.int32], proposed: NDArray[np.bool_]
    ) -> None:
        _rank_st_moe(experts, self._rows, self._confidences, self._before, scores, proposed)


class StMoeCountsRanker(_Baseline):
    """The paper's tables without their limits: how often each expert followed each, one layer on.

    The score is the sum over the k sources of the share of times that the expert followed, and
    ``history`` more if the previous token chose it. It proposes the k best.

    Parameters
    ----------
    model : :class:`ModelConfig`
        Shape of the model.
    horizons : iterable of :class:`int`
        Layers ahead: 1 and no other.
    history : :class:`float`
        Worth of the previous token's choice, 0 to 16, where 1 is the worth of a source that was
        always followed by the expert.
    """

    farthest = 1
    options: ClassVar[dict[str, Any]] = {"history": float}

    def __init__(
        self, *, model: ModelConfig, horizons: Iterable[int] = (1,), history: float = 0.5
    ) -> None:
        super().__init__(model=model, horizons=horizons)
        if not 0 <= history <= 16:
            raise ValueError(f"Worth of the history must be between 0 and 16, not {history}")
        self.history = history
        self._worth = round(history * (1 << _SHARE_BITS))
        self._followed = np.zeros((model.layers - 1, model.experts, model.experts), dtype=np.int32)
        self._seen = np.zeros((model.layers - 1, model.experts), dtype=np.int32)

    def _rank(
        self, experts: NDArray[np.int32], scores: NDArray[np.int32], proposed: NDArray[np.bool_]
    ) -> None:
        _rank_shares(
            experts, self._followed, self._seen, self._before, self._worth, scores, proposed
        )


class OracleRanker(Ranker):
    """The truth itself, which no predictor can pass; it checks the metrics."""

    knows_truth = True

    def rank(
        self, experts: NDArray[np.integer], tokens: NDArray[np.int32], requests: NDArray[np.int32]
    ) -> Ranking:
        chosen = np.asarray(experts, dtype=np.int64)
        truth = np.zeros((len(chosen), self.model.layers, self.model.experts), dtype=np.bool_)
        np.put_along_axis(truth, chosen, True, axis=-1)
        everywhere = np.repeat(truth[:, np.newaxis], len(self.horizons), axis=1)
        return Ranking(
            scores=everywhere.astype(np.int32),
            proposed=everywhere,
            probabilities=everywhere.astype(np.float32),
        )
