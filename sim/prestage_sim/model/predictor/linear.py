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

from ..._jit import inlined, inner, kernel

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
    "head_predict_and_learn",
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
    features : array of ``int64``
        Numbers of all features whose sets the head looks at.
    sets, known : array of ``int64``, shape ``[features, k]``, and of :class:`bool`
        Room for the set of each feature, and whether it is known.
    found : array of ``int64``
        Room for the numbers of active rows.
    sums : array of ``int32``, shape ``[experts]``
        Room for sums of weights.
    errors : array of ``int16``, shape ``[experts]``
        Room for what each value is short of its target.
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
    features: NDArray[np.int64]
    sets: NDArray[np.int64]
    known: NDArray[np.bool_]
    found: NDArray[np.int64]
    sums: NDArray[np.int32]
    errors: NDArray[np.int16]


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
        features=np.array([_CODES[name] for name in FEATURES if name in head.features()], np.int64),
        sets=np.zeros((len(FEATURES), model.top_k), np.int64),
        known=np.zeros(len(FEATURES), np.bool_),
        found=np.zeros(len(head.rows) * model.top_k + _CROSS_PAIRS, np.int64),
        sums=np.zeros(model.experts, np.int32),
        errors=np.zeros(model.experts, np.int16),
    )


def clear_head(head: Head, *, number: int) -> None:
    """Clear all weights and restart the random numbers."""
    for table in (head.weights, head.places, head.maturity, head.diagonal):
        table[:] = 0
    head.lfsr[0] = LFSR_SEED + number


def _eight_steps(word: int) -> int:
    """State of the random numbers eight steps on (Galois, 32 bits, polynomial 0xA3000000)."""
    for _ in range(8):
        word = word >> 1 ^ (0xA3000000 if word & 1 else 0)
    return word


#: What the eight bits that leave the state in eight steps do to the others.
_LFSR_TABLE = np.array([_eight_steps(bits) for bits in range(256)], np.uint32)


#: As many as a configuration may have.
_MOST_LANES = 1024

#: Noise of lane j is ``low + 97 j`` modulo 256. As 97 is odd, the lanes of every ``low`` are a
#: stretch of one sequence, and the stretch begins at ``low / 97`` modulo 256.
_NOISE_STEP = pow(97, -1, 256)
_NOISE = (97 * np.arange(256 + _MOST_LANES) & 255).astype(np.int16)

#: Powers of two to multiply by: shifts by what is no constant are done in 64 bits.
_POWERS = (1 << np.arange(15)).astype(np.int16)


@inlined
def lfsr_next(state: Any) -> Any:
    """State of the random numbers eight steps on."""
    word = np.uint32(state)
    return np.uint32(word >> np.uint32(8)) ^ _LFSR_TABLE[word & np.uint32(255)]


@inlined
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
    chosen: Any,
) -> Any:
    """Write the set of a feature to ``chosen``, shape ``[k]``; False where it is unknown."""
    layers = this.shape[0]
    known = True
    if reuse:
        near, far = (this, prev) if now else (prev, before)
        if code == _B:
            source, at = near, layer
        elif code == _BP and layer > 0:
            source, at = near, layer - 1
        elif code == _BN and layer + 1 < layers:
            source, at = far, layer + 1
        elif code == _G:
            source, at = far, layer
        else:
            source, at = memo[4 if now else 3], layer
            known = code == _S
    elif code <= _D:
        source, at = this, layer - horizon - code
        known = at >= 0
    elif code == _B:
        source, at = prev, layer
    elif code == _BN:
        source, at = prev, layer + 1
        known = at < layers
    elif code == _BP:
        source, at = prev, layer - 1
        known = at >= 0
    elif code == _G:
        source, at = before, layer
    else:
        source, at = memo[code - _T], layer
    if not known:
        return False
    for i in range(chosen.shape[0]):
        chosen[i] = source[at, i]
    return chosen[0] >= 0


@inlined
def _hash(first: Any, second: Any, bits: Any) -> Any:
    """Row of a conjunction of two experts."""
    return (first * 157 + second * 1265) & ((1 << bits) - 1)


@inner
def _look(head: Any, layer: Any, now: Any, this: Any, prev: Any, before: Any, memo: Any) -> None:
    """Look up the sets of all features that the head asks for."""
    shape = head.shape
    for code in head.features:
        head.known[code] = gather(
            *(code, shape[_REUSE], now, layer, shape[_HORIZON]),
            *(this, prev, before, memo, head.sets[code]),
        )


@inner
def _rows(head: Any, place: Any) -> Any:
    """Find the numbers of the active rows of a layer of a bank; how many there are."""
    shape, found, sets, known = head.shape, head.found, head.sets, head.known
    layers, expert_bits, cross_bits = shape[_LAYERS], shape[_EXPERT_BITS], shape[_CROSS_BITS]
    k = sets.shape[1]
    count = 0
    for f in range(head.rows.shape[0]):
        code = head.rows[f]
        for i in range(k if known[code] else 0):
            found[count] = ((f * layers + place) << expert_bits) + sets[code, i]
            count += 1
    first = head.rows.shape[0] * layers << expert_bits
    a = sets[_A]
    for x in range(head.crosses.shape[0] if known[_A] else 0):
        cross = head.crosses[x]
        other = _A if cross == _AA else _C if cross == _AC else _B
        if not known[other]:
            continue
        row, b = first + ((x * layers + place) << cross_bits), sets[other]
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


@inlined
def _is_again(chosen: Any, at: Any) -> Any:
    """Whether a place names an expert that an earlier one named: a set that was loaded may."""
    for n in range(at):
        if chosen[n] == chosen[at]:
            return True
    return False


@inlined
def _step(error: Any, shift: Any, noise: Any, bits: Any) -> Any:
    """What an error moves a weight by: rounded down after noise, 0 to 255."""
    return ((error << shift) + (noise << (bits - 8))) >> bits


@inlined
def _move(row: Any, errors: Any, shift: Any, low: Any, bits: Any, most: Any) -> None:
    """Move a stretch of weights by what their values are short of, with the noise of ``low``."""
    # In 16 bits, so that the compiler does many at a time: a weight has 12 at most, an error is
    # from -1023 to 1024 and the shift 4 at most, and as much noise as 4 * 255 comes on top.
    scale, unit, rest = _POWERS[shift], _POWERS[bits - 8], _POWERS[16 - bits]
    least, limit = np.int16(-most), np.int16(most)
    noise = _NOISE[low * _NOISE_STEP & 255 :]
    for j in range(errors.shape[0]):
        moved = np.int16(errors[j] * scale + noise[j] * unit)
        # The upper half of a product: there is an instruction for that.
        step = np.int32(moved * rest) >> 16
        row[j] = min(max(np.int16(row[j] + step), least), limit)


@inner
def _add_rows(head: Any, count: Any) -> None:
    """Add the weights of the active rows to the sums."""
    shape, found, weights, sums = head.shape, head.found, head.weights, head.sums
    lanes, entries, beats = shape[_LANES], shape[_ENTRIES], shape[_BEATS]
    experts = shape[_EXPERTS]
    if entries:
        for r in range(count):
            for beat in range(beats):
                word = found[r] * beats + beat
                for j in range(lanes):
                    e = head.places[word, j] * entries + beat * lanes + j
                    if e < experts:
                        sums[e] += weights[word, j]
        return
    for beat in range(beats):
        # Stretches from 0 on: else numba looks for negative numbers in every step.
        part = sums[beat * lanes : min((beat + 1) * lanes, experts)]
        # Four rows at a time: their sum fits into 16 bits.
        for r in range(0, count - 3, 4):
            a, b = weights[found[r] * beats + beat], weights[found[r + 1] * beats + beat]
            c, d = weights[found[r + 2] * beats + beat], weights[found[r + 3] * beats + beat]
            for j in range(part.shape[0]):
                part[j] += np.int16(np.int16(a[j] + b[j]) + np.int16(c[j] + d[j]))
        for r in range(count - count % 4, count):
            row = weights[found[r] * beats + beat]
            for j in range(part.shape[0]):
                part[j] += row[j]


@inner
def _predict(head: Any, place: Any, count: Any, values: Any) -> None:
    """:func:`head_predict` of what was looked up."""
    shape, sums = head.shape, head.sums
    prior, most = shape[_PRIOR], (1 << shape[_VALUE_BITS]) - 1
    weights = head.diagonal[place]
    bias = weights[0]
    for e in range(sums.shape[0]):
        sums[e] = prior + bias[e]
    _add_rows(head, count)
    for f in range(head.diagonals.shape[0]):
        code = head.diagonals[f]
        chosen = head.sets[code]
        for i in range(chosen.shape[0] if head.known[code] else 0):
            if not _is_again(chosen, i):
                sums[chosen[i]] += weights[f + 1, chosen[i]]
    for e in range(sums.shape[0]):
        values[e] = min(max(sums[e], 0), most)


@kernel
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
    _look(head, layer, now, this, prev, before, memo)
    _predict(head, base + layer, _rows(head, base + layer), values)


@inner
def _learn_list(head: Any, word: Any, beat: Any, stage: Any, low: Any, used: Any) -> None:
    """Move the weights of a word of a list, and let it take in what was chosen."""
    shape, errors = head.shape, head.errors
    lanes, entries, experts = shape[_LANES], shape[_ENTRIES], shape[_EXPERTS]
    most = shape[_MOST]
    for j in range(lanes):
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
        shift = 3 - stage + shape[_REUSE]
        weight += _step(errors[e], shift, (low + 97 * j) & 255, shape[_VALUE_BITS])
        head.weights[word, j] = min(max(weight, -most), most)


@inner
def _learn(head: Any, place: Any, count: Any, values: Any, targets: Any, used: Any) -> None:
    """:func:`head_learn` of what was looked up."""
    shape, found, errors = head.shape, head.found, head.errors
    lanes, entries, beats = shape[_LANES], shape[_ENTRIES], shape[_BEATS]
    experts, bits, most = shape[_EXPERTS], shape[_VALUE_BITS], shape[_MOST]
    for e in range(experts):
        errors[e] = targets[e] - values[e]
    state = head.lfsr[0]
    for r in range(count):
        for beat in range(beats):
            word = found[r] * beats + beat
            state = lfsr_next(state)
            stage: Any = min(np.int64(head.maturity[word]), 2)
            low = np.int64(state) & 255
            if entries:
                _learn_list(head, word, beat, stage, low, used)
            else:
                part = errors[beat * lanes : min((beat + 1) * lanes, experts)]
                _move(head.weights[word], part, 3 - stage + shape[_REUSE], low, bits, most)
            draw = np.int64(state) >> 24
            if stage == 0 and draw < 64 or stage == 1 and draw < 16:
                head.maturity[word] = stage + 1
    weights = head.diagonal[place]
    shift = 1 + shape[_REUSE]
    for beat in range((experts + lanes - 1) // lanes):
        state = lfsr_next(state)
        low, first = np.int64(state), beat * lanes
        last = min(first + lanes, experts)
        _move(weights[0, first:last], errors[first:last], shift, low, bits, most)
        for f in range(head.diagonals.shape[0]):
            code = head.diagonals[f]
            chosen = head.sets[code]
            for i in range(chosen.shape[0] if head.known[code] else 0):
                e = chosen[i]
                if not first <= e < last or _is_again(chosen, i):
                    continue
                noise = low + 97 * (e - first) + 59 * (f + 1)
                step = _step(errors[e], shift, noise & 255, bits)
                weights[f + 1, e] = min(max(weights[f + 1, e] + step, -most), most)
    head.lfsr[0] = state


@kernel
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
    _look(head, layer, OLD, this, prev, before, memo)
    _learn(head, base + layer, _rows(head, base + layer), values, targets, used)


@inner
def head_predict_and_learn(
    head: Any,
    layer: Any,
    this: Any,
    prev: Any,
    before: Any,
    memo: Any,
    values: Any,
    targets: Any,
    used: Any,
) -> None:
    """:func:`head_predict` and :func:`head_learn` of a P head at once, in the first bank.

    Parameters
    ----------
    head, layer, this, prev, before, memo, values, targets, used
        As in those.
    """
    _look(head, layer, OLD, this, prev, before, memo)
    count = _rows(head, layer)
    _predict(head, layer, count, values)
    _learn(head, layer, count, values, targets, used)
