"""Metrics of the evaluation: cases worked by hand, and a slow second reading in NumPy."""

from collections import OrderedDict

import numpy as np
import pytest

from prestage_hw.contract import ModelConfig
from prestage_sim.evaluate import Ranking
from prestage_sim.evaluate.metrics import (
    BINS,
    LruCache,
    Tally,
    block_edges,
    cut_offs,
    expected_calibration_error,
    reliability_table,
)


def model(*, layers, experts, top_k):
    return ModelConfig(name="test", layers=layers, experts=experts, top_k=top_k)


def ranking(scores, proposed=None, probabilities=None):
    scores = np.asarray(scores, dtype=np.int32)
    if proposed is None:
        proposed = np.zeros(scores.shape)
    if probabilities is not None:
        probabilities = np.asarray(probabilities, dtype=np.float32)
    return Ranking(
        scores=scores,
        proposed=np.asarray(proposed, dtype=np.bool_),
        probabilities=probabilities,
    )


def test_cut_offs():
    assert cut_offs(top_k=4, experts=32) == (4, 6, 8, 12)
    assert cut_offs(top_k=5, experts=32) == (5, 7, 10, 15)
    assert cut_offs(top_k=2, experts=5) == (2, 3, 4, 5)
    assert cut_offs(top_k=1, experts=2) == (1, 1, 2, 2)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 15, 16, 17, 100, 129, 10905])
def test_block_edges(tokens):
    edges = block_edges(tokens)
    assert (edges[0], edges[-1]) == (0, tokens)
    assert len(edges) <= 33
    sizes = np.diff(edges)
    assert (sizes >= min(8, tokens)).all()
    if tokens > 1000:
        assert len(edges) > 20
        assert sizes[0] == 8
        assert sizes[-1] > 10 * sizes[0]


def test_ranks_by_hand():
    tally = Tally(model=model(layers=2, experts=5, top_k=2), horizons=1, tokens=1)
    # Layer 0: order 3, 0, 1, 2, 4 (0 to 2 are equal, the lower number first); truth 1 and 3.
    # Layer 1: all equal, so that the order is 0 to 4; truth 4 and 0.
    scores = [[[[1, 1, 1, 9, -1], [7, 7, 7, 7, 7]]]]
    proposed = [[[[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]]]
    tally.add(np.array([[[1, 3], [4, 0]]], dtype=np.int32), ranking(scores, proposed))
    assert tally.tokens == 1
    assert tally.ranks[0].tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 0, 1]]
    assert tally.own[0].tolist() == [[2, 1], [0, 0]]
    assert tally.cold.tolist() == [[2]]
    assert not tally.probabilities


def test_calibration_by_hand():
    tally = Tally(model=model(layers=1, experts=4, top_k=1), horizons=1, tokens=2)
    # 0.5 opens bin 8; 1.0 belongs to the last bin.
    tally.add(
        np.array([[[0]], [[1]]], dtype=np.int32),
        ranking(
            np.zeros((2, 1, 1, 4)),
            [[[[1, 0, 0, 0]]], [[[1, 1, 0, 0]]]],
            [[[[1.0, 0.5, 0.0, 0.0]]], [[[0.5, 0.5, 0.03, 0.0]]]],
        ),
    )
    assert tally.probabilities
    counts, sums = tally.calibration_counts[0], tally.calibration_sums[0]
    assert counts[0, 15].tolist() == [1, 1]
    assert counts[0, 8].tolist() == [3, 1]
    assert counts[0, 0].tolist() == [4, 0]
    assert counts[0].sum(axis=0).tolist() == [8, 2]
    assert counts[1, 15].tolist() == [1, 1]
    assert counts[1, 8].tolist() == [2, 1]
    # All: |1 - 1| + |1.5 - 1| + |0.03 - 0| over 8. Proposed: 0 + |1 - 1| over 3.
    assert expected_calibration_error(counts[0], sums[0]) == pytest.approx(0.53 / 8)
    assert expected_calibration_error(counts[1], sums[1]) == pytest.approx(0)
    table = reliability_table(counts[0], sums[0])
    assert len(table) == BINS
    assert table[8]["low"] == 0.5
    assert table[8]["high"] == 0.5625
    assert table[8]["count"] == 3
    assert table[8]["predicted"] == pytest.approx(0.5)
    assert table[8]["observed"] == pytest.approx(1 / 3)
    assert table[3] == {
        "low": 3 / 16,
        "high": 4 / 16,
        "count": 0,
        "predicted": None,
        "observed": None,
    }


def test_no_prediction_has_no_calibration():
    assert expected_calibration_error(np.zeros((BINS, 2), np.int64), np.zeros(BINS)) is None


def test_lru_by_hand():
    cache = LruCache(model=model(layers=1, experts=8, top_k=2), slots=3)
    experts = np.array([[[0, 1]], [[1, 2]], [[3, 0]], [[1, 3]], [[2, 4]]], dtype=np.int32)
    # Held afterwards, oldest first: 0 1; 0 1 2; 2 3 0 (1 goes first, then 0 is touched);
    # 0 1 3; 3 2 4.
    missed = cache.demand(experts)
    assert missed.tolist() == [
        [[True, True]],
        [[False, True]],
        [[True, False]],
        [[True, False]],
        [[True, True]],
    ]


def test_lru_counts_what_was_held_before_the_layer():
    cache = LruCache(model=model(layers=1, experts=8, top_k=2), slots=1)
    # The second demand finds its expert gone, but it was there when the layer was routed.
    missed = cache.demand(np.array([[[0, 1]], [[2, 1]]], dtype=np.int32))
    assert missed.tolist() == [[[True, True]], [[True, False]]]
    nothing = LruCache(model=model(layers=1, experts=8, top_k=2), slots=0)
    assert nothing.demand(np.array([[[0, 1]], [[0, 1]]], dtype=np.int32)).all()


class SecondReading:
    """Everything that :class:`Tally` counts, from whole arrays and an ordered dictionary."""

    def __init__(self, experts, ranked, *, slots, edges):
        tokens, layers, top_k = experts.shape
        n, horizons, _, count = ranked.scores.shape
        numbers = np.arange(count)
        order = np.lexsort((np.broadcast_to(numbers, ranked.scores.shape), -ranked.scores))
        places = np.argsort(order, axis=-1)
        true = np.zeros((tokens, layers, count), dtype=bool)
        for t in range(tokens):
            for m in range(layers):
                true[t, m, experts[t, m]] = True
        missed = [self.misses(experts, size) for size in slots]
        shape = (horizons, layers, count)
        self.ranks = np.zeros(shape, dtype=int)
        self.own = np.zeros((horizons, layers, 2), dtype=int)
        self.cold = np.zeros((horizons, len(edges) - 1), dtype=int)
        self.misses_found = np.zeros((horizons, len(slots), 3), dtype=int)
        self.counts = np.zeros((horizons, 2, BINS, 2), dtype=int)
        self.sums = np.zeros((horizons, 2, BINS))
        for h in range(horizons):
            place = np.take_along_axis(places[:, h], experts.astype(int), axis=-1)
            for m in range(layers):
                self.ranks[h, m] = np.bincount(place[:, m].ravel(), minlength=count)
            sent = ranked.proposed[:, h]
            self.own[h, :, 0] = sent.sum(axis=(0, 2))
            self.own[h, :, 1] = (sent & true).sum(axis=(0, 2))
            for b, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
                self.cold[h, b] = (place[first:last] < top_k).sum()
            for c, miss in enumerate(missed):
                self.misses_found[h, c] = [
                    miss.sum(),
                    (miss & (place < top_k)).sum(),
                    (miss & (place < 2 * top_k)).sum(),
                ]
            p = ranked.probabilities[:, h].astype(float)
            at = np.minimum((p * BINS).astype(int), BINS - 1)
            for which, of in enumerate((np.ones_like(sent), sent)):
                for b in range(BINS):
                    chosen = of & (at == b)
                    self.counts[h, which, b] = [chosen.sum(), (chosen & true).sum()]
                    self.sums[h, which, b] = p[chosen].sum()

    @staticmethod
    def misses(experts, slots):
        held = OrderedDict()
        missed = np.zeros(experts.shape, dtype=bool)
        for t, token in enumerate(experts.tolist()):
            for m, row in enumerate(token):
                missed[t, m] = [(m, x) not in held for x in row]
                for x in row:
                    held[m, x] = True
                    held.move_to_end((m, x))
                    if len(held) > slots:
                        held.popitem(last=False)
        return missed


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "horizons", "tokens"),
    [(3, 8, 2, 2, 60), (5, 16, 4, 3, 40), (1, 2, 1, 1, 9), (2, 4, 4, 1, 20), (6, 33, 5, 4, 25)],
)
def test_against_second_reading(layers, experts, top_k, horizons, tokens):
    rng = np.random.default_rng(layers * 100 + experts)
    shape = (tokens, horizons, layers, experts)
    order = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)
    truth = np.ascontiguousarray(order[..., :top_k], dtype=np.int32)
    ranked = ranking(
        rng.integers(-3, 4, shape), rng.random(shape) < 0.3, rng.random(shape, dtype=np.float32)
    )
    slots = (0, 1, top_k, layers * experts // 3, layers * experts)
    config = model(layers=layers, experts=experts, top_k=top_k)
    tally = Tally(model=config, horizons=horizons, tokens=tokens, slots=slots)
    at = 0
    for size in (1, tokens // 3, tokens - 1 - tokens // 3):
        part = slice(at, at + size)
        tally.add(
            truth[part],
            Ranking(
                scores=ranked.scores[part],
                proposed=ranked.proposed[part],
                probabilities=ranked.probabilities[part],
            ),
        )
        at += size
    second = SecondReading(truth, ranked, slots=slots, edges=tally.edges.tolist())
    np.testing.assert_array_equal(tally.ranks, second.ranks)
    np.testing.assert_array_equal(tally.own, second.own)
    np.testing.assert_array_equal(tally.cold, second.cold)
    np.testing.assert_array_equal(tally.misses, second.misses_found)
    np.testing.assert_array_equal(tally.calibration_counts, second.counts)
    np.testing.assert_allclose(tally.calibration_sums, second.sums)
    assert tally.ranks.sum() == tokens * layers * top_k * horizons
    assert tally.calibration_counts[:, 0, :, 0].sum() == tokens * layers * experts * horizons


def test_refusals():
    config = model(layers=2, experts=4, top_k=1)
    truth = np.zeros((1, 2, 1), dtype=np.int32)
    zeros = np.zeros((1, 1, 2, 4), dtype=np.int32)

    def add(**changed):
        tally = Tally(model=config, horizons=1, tokens=1)
        given = {"scores": zeros, "proposed": zeros.astype(bool), **changed}
        tally.add(truth, Ranking(**given))

    add()
    with pytest.raises(ValueError, match="^Scores must be a contiguous array of int32 of shape"):
        add(scores=zeros.astype(np.int64))
    with pytest.raises(ValueError, match=r"^Proposed .* of shape \[1, 1, 2, 4\], not bool of"):
        add(proposed=zeros[..., :3].astype(bool))
    with pytest.raises(ValueError, match="^Probabilities must be a contiguous array of float32"):
        add(probabilities=zeros.astype(float))
    for bad in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="^Probabilities must be between 0 and 1"):
            add(probabilities=np.full(zeros.shape, bad, dtype=np.float32))
    tally = Tally(model=config, horizons=1, tokens=1)
    tally.add(truth, Ranking(scores=zeros, proposed=zeros.astype(bool)))
    with pytest.raises(ValueError, match="^Tokens must be at most 1, not 2"):
        tally.add(truth, Ranking(scores=zeros, proposed=zeros.astype(bool)))
