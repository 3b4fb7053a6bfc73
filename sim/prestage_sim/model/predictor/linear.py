"""Golden model of one head of the ``perceptron`` predictor: an online linear model in integers.

The functions are compiled, and are the only copy of the arithmetic: the golden predictor calls
them for each message, ``prestage evaluate`` for a whole trace. ``docs/predictor-perceptron.md`` is
the specification of both this and the RTL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.perceptron import CROSSES, FEATURES, HeadConfig

from ..._jit import compiled

__all__ = [
    "LFSR_SEED",
    "NOW",
    "OLD",
    "Head",
    "clear_head",
    "create_head",
    "gather",
    "head_learn",
    "head_predict",
    "lfsr_next",
]

#: Seed of the first head's random numbers; the head of number n starts from seed + n.
LFSR_SEED = 0xACE1ACE1

#: Which token's point of view the sets of a reuse head are gathered from: after this visit of the
#: layer, or after the visit before.
NOW, OLD = 1, 0

_CODES = {name: code for code, name in enumerate(FEATURES)}
_CROSS_CODES = {name: code for code, name in enumerate(CROSSES)}

_A, _C, _D, _B, _BN, _BP, _G, _T, _T2, _Q, _S = range(len(FEATURES))
_AC, _AA, _AB = range(len(CROSSES))

#: Most pairs of all conjunctions together.
_CROSS_PAIRS = 4 + 3 + 4


class Head(NamedTuple):
    """State and shape of one head.

    Parameters
    ----------
    rows, crosses, diagonals : array of ``int64``
        Numbers of the features.
    shape : array of ``int64``
        Horizon, whether it is the reuse head, lanes, list entries (0: full rows), beats of a row,
        layers times banks, bits of an expert number, bits of a conjunction's row number, experts,
        bits of a value, largest weight, prior.
    weights : array of ``int16``, shape ``[words, lanes]``
        Weights of the rows.
    places : array of ``int16``, shape ``[words, lanes]``
        In lists: which of its lane's experts an entry is about. Full rows: ``[1, 1]``.
    maturity : array of ``uint8``, shape ``[words]``
        Stage of learning, 0 to 2.
    diagonal : array of ``int16``, shape ``[layers * banks, features + 1, lanes * beats]``
        Weights of the diagonal features; number 0 is the bias. Experts are rounded up to whole
        beats.
    lfsr : array of ``uint32``, shape ``[1]``
        State of the random numbers.
    """

    rows: NDArray[np.int64]
    crosses: NDArray[np.int64]
    diagonals: NDArray[np.int64]
    shape: NDArray[np.int64]
    weights: NDArray[np.int16]
    places: NDArray[np.int16]
    maturity: NDArray[np.uint8]
    diagonal: NDArray[np.int16]
    lfsr: NDArray[np.uint32]


_HORIZON, _REUSE, _LANES, _ENTRIES, _BEATS, _LAYERS = range(6)
_EXPERT_BITS, _CROSS_BITS, _EXPERTS, _VALUE_BITS, _MOST, _PRIOR = range(6, 12)


def create_head(config: DeviceConfig, head: HeadConfig, *, number: int) -> Head:
    """A head with cleared tables.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor has the head.
    head : :class:`HeadConfig`
        The head.
    number : :class:`int`
        Its place among the heads, from 0.
    """
    perceptron = config.perceptron
    assert perceptron is not None
    model, lanes = config.model, config.predictor_lanes
    entries = perceptron.list_entries
    beats = entries // lanes if entries else config.lane_beats
    layers = model.layers * (config.contexts if perceptron.banked else 1)
    expert_bits = config.bits("expert")
    cross_bits = perceptron.cross_rows.bit_length() - 1
    row_count = (len(head.rows) * layers << expert_bits) + (
        len(head.crosses) * layers << cross_bits
    )
    words = max(1, row_count * beats)
    scale = 1 << head.value_bits
    prior = scale // 4 if head.is_reuse else scale * model.top_k // model.experts
    shape = [
        head.horizon,
        int(head.is_reuse),
        lanes,
        entries,
        beats,
        layers,
        expert_bits,
        cross_bits,
        model.experts,
        head.value_bits,
        (1 << (head.weight_bits - 1)) - 1,
        prior,
    ]
    return Head(
        rows=np.array([_CODES[name] for name in head.rows], np.int64),
        crosses=np.array([_CROSS_CODES[name] for name in head.crosses], np.int64),
        diagonals=np.array([_CODES[name] for name in head.diagonals], np.int64),
        shape=np.array(shape, np.int64),
        weights=np.zeros((words, lanes), np.int16),
        places=np.zeros((words, lanes) if entries else (1, 1), np.int16),
        maturity=np.zeros(words, np.uint8),
        diagonal=np.zeros((layers, len(head.diagonals) + 1, config.lane_beats * lanes), np.int16),
        lfsr=np.array([LFSR_SEED + number], np.uint32),
    )


def clear_head(head: Head, *, number: int) -> None:
    """Clear all weights and restart the random numbers."""
    for table in (head.weights, head.places, head.maturity, head.diagonal):
        table[:] = 0
    head.lfsr[0] = LFSR_SEED + number


@compiled
def lfsr_next(state: Any) -> Any:
    """State of the random numbers eight steps on (Galois, 32 bits, polynomial 0xA3000000)."""
    word = np.uint32(state)
    for _ in range(8):
        bit = word & np.uint32(1)
        word = word >> np.uint32(1)
        if bit:
            word ^= np.uint32(0xA3000000)
    return word


@compiled
def gather(
    code: Any,
    reuse: Any,
    now: Any,
    layer: Any,
    horizon: Any,
    this: Any,
    prev: Any,
    before: Any,
    memo: Any,
) -> Any:
    """The set of a feature, shape ``[k]``; its first id is -1 where it is unknown."""
    layers = this.shape[0]
    if reuse:
        near, far = (this, prev) if now else (prev, before)
        if code == _B:
            return near[layer]
        if code == _BP and layer > 0:
            return near[layer - 1]
        if code == _BN and layer + 1 < layers:
            return far[layer + 1]
        if code == _G:
            return far[layer]
        if code == _S:
            return memo[4 if now else 3, layer]
        return memo[5, layer]
    if code <= _D:
        source = layer - horizon - code
        return this[source] if source >= 0 else memo[5, layer]
    if code == _B:
        return prev[layer]
    if code == _BN:
        return prev[layer + 1] if layer + 1 < layers else memo[5, layer]
    if code == _BP:
        return prev[layer - 1] if layer > 0 else memo[5, layer]
    if code == _G:
        return before[layer]
    return memo[code - _T, layer]


@compiled
def _hash(first: Any, second: Any, bits: Any) -> Any:
    """Row of a conjunction of two experts."""
    return (first * 157 + second * 1265) & ((1 << bits) - 1)


@compiled
def _rows(
    head: Any,
    base: Any,
    layer: Any,
    now: Any,
    this: Any,
    prev: Any,
    before: Any,
    memo: Any,
    found: Any,
) -> Any:
    """Write the numbers of the active rows to ``found`` and return how many there are."""
    shape = head.shape
    horizon, reuse, layers = shape[_HORIZON], shape[_REUSE], shape[_LAYERS]
    expert_bits, cross_bits = shape[_EXPERT_BITS], shape[_CROSS_BITS]
    k = this.shape[1]
    count = 0
    for f in range(head.rows.shape[0]):
        chosen = gather(head.rows[f], reuse, now, layer, horizon, this, prev, before, memo)
        if chosen[0] < 0:
            continue
        for i in range(k):
            found[count] = ((f * layers + base + layer) << expert_bits) + chosen[i]
            count += 1
    first = head.rows.shape[0] * layers << expert_bits
    for x in range(head.crosses.shape[0]):
        cross = head.crosses[x]
        row = first + ((x * layers + base + layer) << cross_bits)
        a = gather(_A, reuse, now, layer, horizon, this, prev, before, memo)
        b = a
        if cross == _AC:
            b = gather(_C, reuse, now, layer, horizon, this, prev, before, memo)
        elif cross == _AB:
            b = gather(_B, reuse, now, layer, horizon, this, prev, before, memo)
        if a[0] < 0 or b[0] < 0:
            continue
        if cross == _AA:
            for i in range(min(3, k)):
                for j in range(i):
                    low, high = min(a[i], a[j]), max(a[i], a[j])
                    found[count] = row + _hash(low, high, cross_bits)
                    count += 1
        else:
            for i in range(min(2, k)):
                for j in range(min(2, k)):
                    found[count] = row + _hash(a[i], b[j], cross_bits)
                    count += 1
    return count


@compiled
def head_predict(
    head: Any,
    base: Any,
    layer: Any,
    now: Any,
    this: Any,
    prev: Any,
    before: Any,
    memo: Any,
    values: Any,
) -> None:
    """Value of each expert of a layer.

    Parameters
    ----------
    head : :class:`Head`
        The head.
    base : :class:`int`
        First layer of the context's bank of weights.
    layer : :class:`int`
        Target layer.
    now : :class:`int`
        ``NOW`` or ``OLD``; only the reuse head asks.
    this, prev, before : array of :class:`int`, shape ``[layers, k]``
        Choices of this token, the one before, and the one before that; -1 where unknown.
    memo : array of :class:`int`, shape ``[6, layers, k]``
        Sets T, T2, Q, S, the S of the next token, and a set that is always unknown.
    values : array of :class:`int`, shape ``[experts]``
        Where the values go, 0 to ``2**value_bits - 1``.
    """
    shape = head.shape
    lanes, entries, beats = shape[_LANES], shape[_ENTRIES], shape[_BEATS]
    experts, most = shape[_EXPERTS], (1 << shape[_VALUE_BITS]) - 1
    found = np.empty(head.rows.shape[0] * this.shape[1] + _CROSS_PAIRS, np.int64)
    count = _rows(head, base, layer, now, this, prev, before, memo, found)
    weights = head.diagonal[base + layer]
    for e in range(experts):
        values[e] = shape[_PRIOR] + weights[0, e]
    for r in range(count):
        for beat in range(beats):
            word = found[r] * beats + beat
            if entries:
                for j in range(lanes):
                    e = head.places[word, j] * entries + beat * lanes + j
                    if e < experts:
                        values[e] += head.weights[word, j]
            else:
                for j in range(min(lanes, experts - beat * lanes)):
                    values[beat * lanes + j] += head.weights[word, j]
    for f in range(head.diagonals.shape[0]):
        chosen = gather(
            head.diagonals[f], shape[_REUSE], now, layer, shape[_HORIZON], this, prev, before, memo
        )
        if chosen[0] >= 0:
            # A set that was loaded may name an expert twice; it is in it once all the same.
            for i in range(len(chosen)):
                again = False
                for j in range(i):
                    again = again or chosen[j] == chosen[i]
                if not again:
                    values[chosen[i]] += weights[f + 1, chosen[i]]
    for e in range(experts):
        values[e] = min(max(values[e], 0), most)


@compiled
def head_learn(
    head: Any,
    base: Any,
    layer: Any,
    this: Any,
    prev: Any,
    before: Any,
    memo: Any,
    values: Any,
    targets: Any,
    used: Any,
) -> None:
    """Move the weights that gave ``values`` towards ``targets``.

    Parameters
    ----------
    head, base, layer, this, prev, before, memo
        As in :func:`head_predict`; the reuse head takes the sets of its visit before.
    values : array of :class:`int`, shape ``[experts]``
        What was predicted.
    targets : array of :class:`int`, shape ``[experts]``
        What would have been right, 0 to ``2**value_bits``.
    used : array of :class:`bool`, shape ``[experts]``
        The experts that were chosen: lists take in no others.
    """
    shape = head.shape
    lanes, entries, beats = shape[_LANES], shape[_ENTRIES], shape[_BEATS]
    experts, bits, most = shape[_EXPERTS], shape[_VALUE_BITS], shape[_MOST]
    boost = 1 if shape[_REUSE] else 0
    found = np.empty(head.rows.shape[0] * this.shape[1] + _CROSS_PAIRS, np.int64)
    count = _rows(head, base, layer, OLD, this, prev, before, memo, found)
    errors = targets - values
    state = head.lfsr[0]
    for r in range(count):
        for beat in range(beats):
            word = found[r] * beats + beat
            state = lfsr_next(state)
            stage: Any = min(np.int64(head.maturity[word]), 2)
            shift = 3 - stage + boost
            low = np.int64(state) & 255
            if entries == 0:
                # Apart from lists and without a branch: most of the time goes into this loop.
                first = beat * lanes
                row = head.weights[word]
                for j in range(min(lanes, experts - first)):
                    u = ((low + 97 * j) & 255) << (bits - 8)
                    weight = row[j] + (((errors[first + j] << shift) + u) >> bits)
                    row[j] = min(max(weight, -most), most)
            for j in range(lanes if entries else 0):
                u = ((low + 97 * j) & 255) << (bits - 8)
                weight = np.int64(head.weights[word, j])
                at = head.places[word, j]
                if abs(weight) < 4:
                    target = -1
                    for i in range((experts + entries - 1) // entries):
                        e = i * entries + beat * lanes + j
                        if e < experts and used[e] and not (i == at and weight != 0):
                            target = i
                            break
                    if target >= 0:
                        head.places[word, j] = target
                        head.weights[word, j] = 8 >> stage
                        continue
                e = at * entries + beat * lanes + j
                if weight == 0 or e >= experts:
                    continue
                weight += ((errors[e] << shift) + u) >> bits
                head.weights[word, j] = min(max(weight, -most), most)
            draw = np.int64(state) >> 24
            if stage == 0 and draw < 64 or stage == 1 and draw < 16:
                head.maturity[word] = stage + 1
    weights = head.diagonal[base + layer]
    masks = np.zeros((head.diagonals.shape[0] + 1, experts), np.bool_)
    masks[0] = True
    for f in range(head.diagonals.shape[0]):
        chosen = gather(
            head.diagonals[f], shape[_REUSE], OLD, layer, shape[_HORIZON], this, prev, before, memo
        )
        if chosen[0] >= 0:
            for e in chosen:
                masks[f + 1, e] = True
    shift = 1 + boost
    for beat in range((experts + lanes - 1) // lanes):
        state = lfsr_next(state)
        for f in range(masks.shape[0]):
            for j in range(min(lanes, experts - beat * lanes)):
                e = beat * lanes + j
                if masks[f, e]:
                    u = ((np.int64(state) + 97 * j + 59 * f) & 255) << (bits - 8)
                    weight = weights[f, e] + (((errors[e] << shift) + u) >> bits)
                    weights[f, e] = min(max(weight, -most), most)
    head.lfsr[0] = state
