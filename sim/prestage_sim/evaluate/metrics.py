"""Counts that every metric is made of, gathered chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import ModelConfig

from .._jit import compiled
from .rankers import Ranking

__all__ = [
    "BINS",
    "LruCache",
    "Tally",
    "block_edges",
    "cut_offs",
    "expected_calibration_error",
    "reliability_table",
]

#: Bins of equal width of the reliability table.
BINS = 16

#: Least tokens of a block of the cold-start curve, and most blocks.
_LEAST_BLOCK, _BLOCKS = 8, 32


def cut_offs(*, top_k: int, experts: int) -> tuple[int, int, int, int]:
    """Numbers of experts that recall is stated at: k, 1.5k rounded down, 2k and 3k, at most E."""
    return (
        top_k,
        min((3 * top_k) // 2, experts),
        min(2 * top_k, experts),
        min(3 * top_k, experts),
    )


def block_edges(tokens: int) -> NDArray[np.int64]:
    """Edges of the blocks of the cold-start curve, from 0 to ``tokens``, ever wider."""
    edges = [0]
    for end in np.geomspace(min(_LEAST_BLOCK, tokens), tokens, _BLOCKS).round().astype(int):
        if end - edges[-1] >= _LEAST_BLOCK and tokens - end >= _LEAST_BLOCK:
            edges.append(int(end))
    return np.array([*edges, tokens], dtype=np.int64)


@compiled
def _miss_lru(
    experts: NDArray[np.int32],
    count: int,
    slots: int,
    held: NDArray[np.int64],
    older: NDArray[np.int64],
    newer: NDArray[np.int64],
    missed: NDArray[np.bool_],
) -> None:
    """One cache over all layers; the last place of both lists closes them to a ring."""
    tokens, layers, top_k = experts.shape
    head = len(newer) - 1
    for t in range(tokens):
        for m in range(layers):
            for i in range(top_k):
                missed[t, m, i] = newer[m * count + experts[t, m, i]] < 0
            if slots == 0:
                continue
            for i in range(top_k):
                x = m * count + experts[t, m, i]
                if newer[x] >= 0:
                    older[newer[x]] = older[x]
                    newer[older[x]] = newer[x]
                elif held[0] < slots:
                    held[0] += 1
                else:
                    victim = newer[head]
                    newer[head] = newer[victim]
                    older[newer[victim]] = head
                    newer[victim] = -1
                newest = older[head]
                newer[newest] = x
                older[x] = newest
                newer[x] = head
                older[head] = x


class LruCache:
    """A cache of experts of all layers that holds what was demanded last.

    Parameters
    ----------
    model : :class:`ModelConfig`
        Shape of the model.
    slots : :class:`int`
        Experts that it holds, 0 or more.

    Members
    -------
    slots : :class:`int`
        Experts that it holds.
    """

    def __init__(self, *, model: ModelConfig, slots: int) -> None:
        self.slots = slots
        self._count = model.experts
        places = model.layers * model.experts + 1
        self._held = np.zeros(1, dtype=np.int64)
        self._older = np.full(places, -1, dtype=np.int64)
        self._newer = np.full(places, -1, dtype=np.int64)
        self._older[-1] = self._newer[-1] = places - 1

    def demand(self, experts: NDArray[np.int32]) -> NDArray[np.bool_]:
        """True for each demand that misses; the k demands of a layer see what was held before it.

        Parameters
        ----------
        experts : array of int32, ``[n, L, k]``
            The router's choices, in the order in which they're touched.
        """
        missed = np.zeros(experts.shape, dtype=np.bool_)
        _miss_lru(experts, self._count, self.slots, self._held, self._older, self._newer, missed)
        return missed


@compiled
def _count_hits(
    experts: NDArray[np.int32],
    scores: NDArray[np.int32],
    proposed: NDArray[np.bool_],
    missed: NDArray[np.bool_],
    blocks: NDArray[np.int64],
    top_2k: int,
    ranks: NDArray[np.int64],
    own: NDArray[np.int64],
    cold: NDArray[np.int64],
    misses: NDArray[np.int64],
) -> None:
    tokens, layers, top_k = experts.shape
    horizons, count = scores.shape[1], scores.shape[3]
    for t in range(tokens):
        for h in range(horizons):
            for m in range(layers):
                row = scores[t, h, m]
                sent = 0
                for e in range(count):
                    sent += proposed[t, h, m, e]
                own[h, m, 0] += sent
                for i in range(top_k):
                    x = experts[t, m, i]
                    score = row[x]
                    rank = 0
                    for e in range(x):
                        rank += row[e] >= score
                    for e in range(x + 1, count):
                        rank += row[e] > score
                    ranks[h, m, rank] += 1
                    own[h, m, 1] += proposed[t, h, m, x]
                    if rank < top_k:
                        cold[h, blocks[t]] += 1
                    for c in range(missed.shape[0]):
                        if missed[c, t, m, i]:
                            misses[h, c, 0] += 1
                            misses[h, c, 1] += rank < top_k
                            misses[h, c, 2] += rank < top_2k


@compiled
def _count_probabilities(
    experts: NDArray[np.int32],
    probabilities: NDArray[np.float32],
    proposed: NDArray[np.bool_],
    counts: NDArray[np.int64],
    sums: NDArray[np.float64],
) -> bool:
    """False where a probability is none."""
    tokens, layers, top_k = experts.shape
    horizons, count = probabilities.shape[1], probabilities.shape[3]
    bins = counts.shape[2]
    true = np.zeros(count, dtype=np.bool_)
    for t in range(tokens):
        for m in range(layers):
            true[:] = False
            for i in range(top_k):
                true[experts[t, m, i]] = True
            for h in range(horizons):
                for e in range(count):
                    p = probabilities[t, h, m, e]
                    if not (p >= 0 and p <= 1):
                        return False
                    at = min(bins - 1, int(p * bins))
                    counts[h, 0, at, 0] += 1
                    counts[h, 0, at, 1] += true[e]
                    sums[h, 0, at] += p
                    if proposed[t, h, m, e]:
                        counts[h, 1, at, 0] += 1
                        counts[h, 1, at, 1] += true[e]
                        sums[h, 1, at] += p
    return True


class Tally:
    """What is counted of one predictor over one trace.

    Parameters
    ----------
    model : :class:`ModelConfig`
        Shape of the model.
    horizons : :class:`int`
        Number of horizons (H).
    tokens : :class:`int`
        Tokens that will come, for the blocks of the cold-start curve.
    slots : sequence of :class:`int`
        Sizes of the LRU caches (R) behind which misses are counted.

    Members
    -------
    tokens : :class:`int`
        Tokens counted.
    ranks : array of int64, ``[H, L, E]``
        How many true experts had each place, 0 is the best.
    own : array of int64, ``[H, L, 2]``
        Proposed experts, and those of them that were true.
    edges : array of int64, ``[blocks + 1]``
        Tokens at which the blocks begin and end.
    cold : array of int64, ``[H, blocks]``
        True experts among the k best.
    misses : array of int64, ``[H, R, 3]``
        Demands that missed, and those of them among the k and the 2k best.
    calibration_counts : array of int64, ``[H, 2, BINS, 2]``
        Predictions and those that came true, for all experts and for proposed ones.
    calibration_sums : array of float64, ``[H, 2, BINS]``
        Sums of predicted probabilities.
    probabilities : :class:`bool`
        True once probabilities were seen.
    """

    def __init__(
        self, *, model: ModelConfig, horizons: int, tokens: int, slots: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.horizons = horizons
        self.tokens = 0
        self.probabilities = False
        self.caches = [LruCache(model=model, slots=count) for count in slots]
        self.edges = block_edges(tokens)
        self.ranks = np.zeros((horizons, model.layers, model.experts), dtype=np.int64)
        self.own = np.zeros((horizons, model.layers, 2), dtype=np.int64)
        self.cold = np.zeros((horizons, len(self.edges) - 1), dtype=np.int64)
        self.misses = np.zeros((horizons, len(slots), 3), dtype=np.int64)
        self.calibration_counts = np.zeros((horizons, 2, BINS, 2), dtype=np.int64)
        self.calibration_sums = np.zeros((horizons, 2, BINS), dtype=np.float64)

    def add(self, experts: NDArray[np.int32], ranking: Ranking) -> None:
        """Count the next n tokens.

        Raises
        ------
        ValueError
            If an array of the ranking has another shape or type than it should, or a probability
            isn't one, or more tokens come than were announced.
        """
        n = len(experts)
        shape = (n, self.horizons, self.model.layers, self.model.experts)
        _check("Scores", ranking.scores, shape, np.int32)
        _check("Proposed", ranking.proposed, shape, np.bool_)
        if self.tokens + n > self.edges[-1]:
            raise ValueError(f"Tokens must be at most {self.edges[-1]}, not {self.tokens + n}")
        missed = np.zeros((len(self.caches), *experts.shape), dtype=np.bool_)
        for at, cache in enumerate(self.caches):
            missed[at] = cache.demand(experts)
        places = np.arange(self.tokens, self.tokens + n)
        _count_hits(
            experts,
            ranking.scores,
            ranking.proposed,
            missed,
            np.searchsorted(self.edges, places, side="right") - 1,
            2 * self.model.top_k,
            self.ranks,
            self.own,
            self.cold,
            self.misses,
        )
        if ranking.probabilities is not None:
            _check("Probabilities", ranking.probabilities, shape, np.float32)
            self.probabilities = True
            if not _count_probabilities(
                experts,
                ranking.probabilities,
                ranking.proposed,
                self.calibration_counts,
                self.calibration_sums,
            ):
                raise ValueError("Probabilities must be between 0 and 1")
        self.tokens += n


def _check(name: str, array: NDArray[Any], shape: tuple[int, ...], dtype: type) -> None:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be a contiguous array of {np.dtype(dtype)} of shape {list(shape)}, not"
            f" {array.dtype} of shape {list(array.shape)}"
        )


def expected_calibration_error(
    counts: NDArray[np.int64], sums: NDArray[np.float64]
) -> float | None:
    """Mean distance between predicted and observed probability, weighted by predictions.

    Parameters
    ----------
    counts : array of int64, ``[BINS, 2]``
        Predictions, and those that came true.
    sums : array of float64, ``[BINS]``
        Sums of predicted probabilities.
    """
    total = int(counts[:, 0].sum())
    # A bin's share of all, times the distance of its two means.
    return float(np.abs(sums - counts[:, 1]).sum() / total) if total else None


def reliability_table(
    counts: NDArray[np.int64], sums: NDArray[np.float64]
) -> list[dict[str, float | int | None]]:
    """One row for each bin, from low probabilities to high; means of empty bins are None."""
    return [
        {
            "low": at / BINS,
            "high": (at + 1) / BINS,
            "count": int(count),
            "predicted": float(total / count) if count else None,
            "observed": float(came / count) if count else None,
        }
        for at, ((count, came), total) in enumerate(zip(counts.tolist(), sums, strict=True))
    ]
