"""Golden model of the spatio-temporal predictor (ST-MoE, arXiv 2606.15453)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source

from ..._jit import kernel
from .base import Candidate, Settings, ValueBeat

__all__ = ["StMoePredictor", "StMoeTables", "create_tables", "st_moe_decide"]

_CONFIDENCE_SHIFT = 16
_VALID_SHIFT = 18
_EXPERT_MASK = 0xFFFF

#: Confidence is two bits; a new entry starts in the upper half ("preferred").
_MOST_CONFIDENCE = 3
_NEW_CONFIDENCE = 2

#: What the previous token's choice is worth, and the least score of a candidate.
_HISTORY_WORTH = 2
_THRESHOLD = 2


def _index_bits(count: int) -> int:
    """Bits of an index below ``count`` after rounding it up to a power of two; 0 for 1."""
    return (count - 1).bit_length()


class StMoeTables(NamedTuple):
    """All that the predictor knows.

    Parameters
    ----------
    experts, confidences : array of ``int64``, shape ``[L - 1, E, K]``
        Entries of each row of the correlation table; expert -1 is an invalid one.
    history : array of ``int64``, shape ``[C, L, k]``
        Latest choice of each context.
    valid : array of :class:`bool`, shape ``[C, L]``
        Whether there is one.
    previous : array of ``int64``, shape ``[C]``
        Layer that was routed last in this token, -1 for none.
    scores, ranked : array of ``int64``, shape ``[E]``
        Room to work in, and the latest candidates, best first.
    """

    experts: NDArray[np.int64]
    confidences: NDArray[np.int64]
    history: NDArray[np.int64]
    valid: NDArray[np.bool_]
    previous: NDArray[np.int64]
    scores: NDArray[np.int64]
    ranked: NDArray[np.int64]


def create_tables(config: DeviceConfig) -> StMoeTables:
    """Cleared tables."""
    model = config.model
    rows = (model.layers - 1, model.experts, config.successors)
    return StMoeTables(
        experts=np.full(rows, -1, np.int64),
        confidences=np.zeros(rows, np.int64),
        history=np.zeros((config.contexts, model.layers, model.top_k), np.int64),
        valid=np.zeros((config.contexts, model.layers), np.bool_),
        previous=np.full(config.contexts, -1, np.int64),
        scores=np.zeros(model.experts, np.int64),
        ranked=np.zeros(model.experts, np.int64),
    )


@kernel
def _add(tables: Any, expert: Any, worth: Any, count: Any) -> Any:
    """Add to an expert's score, and to the list of those that have one, in order of first touch."""
    scores = tables.scores
    found = scores[expert] >= 0
    if not found:
        scores[expert] = 0
        tables.ranked[count] = expert
        count += 1
    scores[expert] += worth
    return count


@kernel
def _predict(tables: Any, ctx: Any, layer: Any, chosen: Any) -> Any:
    """Rank the experts of the next layer, and return how many are candidates."""
    scores, ranked = tables.scores, tables.ranked
    scores[:] = -1
    count = 0
    for source in chosen:
        for n in range(tables.experts.shape[2]):
            expert = tables.experts[layer, source, n]
            if expert >= 0:
                count = _add(tables, expert, tables.confidences[layer, source, n], count)
    if tables.valid[ctx, layer + 1]:
        for n in range(tables.history.shape[2]):
            count = _add(tables, tables.history[ctx, layer + 1, n], _HISTORY_WORTH, count)
    # Rows that never hold an expert twice cannot exceed this; a row written from outside might.
    most = _MOST_CONFIDENCE * chosen.shape[0] + _HISTORY_WORTH
    kept = 0
    for n in range(count):
        expert = ranked[n]
        # Saturate before ranking: equal scores rank by first touch.
        scores[expert] = min(scores[expert], most)
        if scores[expert] < _THRESHOLD:
            continue
        at = kept
        while at > 0 and scores[ranked[at - 1]] < scores[expert]:
            ranked[at] = ranked[at - 1]
            at -= 1
        ranked[at] = expert
        kept += 1
    return kept


@kernel
def _learn(tables: Any, layer: Any, source: Any, chosen: Any) -> None:
    """Learn what followed a source expert."""
    experts, confidences = tables.experts[layer, source], tables.confidences[layer, source]
    # Chosen experts that no entry holds take those entries, in order, that have no confidence left.
    taken = 0
    for position in range(experts.shape[0]):
        expert = experts[position]
        used = False
        for other in chosen:
            used = used or other == expert
        if used:
            if confidences[position] < _MOST_CONFIDENCE:
                confidences[position] += 1
            continue
        if expert >= 0 and confidences[position] > 0:
            confidences[position] -= 1
            continue
        while taken < chosen.shape[0]:
            held = False
            for n in range(experts.shape[0]):
                held = held or experts[n] == chosen[taken]
            if not held:
                break
            taken += 1
        if taken < chosen.shape[0]:
            experts[position], confidences[position] = chosen[taken], _NEW_CONFIDENCE
            taken += 1


@kernel
def st_moe_decide(tables: Any, ctx: Any, layer: Any, chosen: Any) -> Any:
    """Take the router's choice for a layer: how many experts of the next one are candidates.

    They are in ``tables.ranked``, best first, with ``tables.scores``.
    """
    layers = tables.valid.shape[1]
    count = _predict(tables, ctx, layer, chosen) if layer < layers - 1 else 0
    if layer > 0 and tables.previous[ctx] == layer - 1 and tables.valid[ctx, layer - 1]:
        for n in range(tables.history.shape[2]):
            _learn(tables, layer - 1, tables.history[ctx, layer - 1, n], chosen)
    for n in range(chosen.shape[0]):
        tables.history[ctx, layer, n] = chosen[n]
    tables.valid[ctx, layer] = True
    tables.previous[ctx] = layer
    return count


class StMoePredictor(Settings):
    """Predict from the experts that followed in the past and from the previous token's choice.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that is modelled.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.config = config
        model = config.model
        self._layers = model.layers
        self._experts = model.experts
        self._top_k = model.top_k
        self._successors = config.successors
        self._successor_bits = _index_bits(config.successors)
        self._expert_bits = _index_bits(model.experts)
        self._index_bits = _index_bits(model.top_k)
        self._layer_bits = _index_bits(model.layers)
        self.tables = create_tables(config)

    def clear(self) -> None:
        """Clear all tables and forget every context's previous layer."""
        tables = self.tables
        tables.experts[:] = -1
        tables.confidences[:] = 0
        tables.history[:] = 0
        tables.valid[:] = False
        tables.previous[:] = -1

    def begin(self, ctx: int, token: int, phase: int) -> list[Candidate]:
        """Start a token: the context's previous layer becomes "none"; there are no candidates."""
        self.tables.previous[ctx] = -1
        return []

    def decide(self, ctx: int, layer: int, experts: Sequence[int], stamp: int) -> list[Candidate]:
        """Predict layer + 1, learn from the pair layer - 1 and layer, remember the choice."""
        tables = self.tables
        count = st_moe_decide(tables, ctx, layer, np.asarray(experts, np.int64))
        deadline = (stamp + 1) & 0xFF
        source = int(Source.PREDICTOR)
        return [
            (ctx, layer + 1, expert, int(tables.scores[expert]), source, deadline)
            for expert in tables.ranked[:count].tolist()
        ]

    def hint(self, ctx: int, layer: int, expert: int, score: int, deadline: int) -> list[Candidate]:
        """Pass a hint on as it is."""
        return [(ctx, layer, expert, score, int(Source.HINT), deadline)]

    def values(self) -> list[ValueBeat]:
        """What experts are worth: nothing is said of it."""
        return []

    def table_words(self, table: int) -> int:
        """Words in a table, padding included: 0 is the correlation table, 1 the history."""
        if table == 0:
            return (self._layers - 1) << (self._expert_bits + self._successor_bits)
        if table == 1:
            return self.config.contexts << (self._layer_bits + self._index_bits)
        return 0

    def _correlation_place(self, word: int) -> tuple[int, int, int] | None:
        position = word & ((1 << self._successor_bits) - 1)
        source = (word >> self._successor_bits) & ((1 << self._expert_bits) - 1)
        layer = word >> (self._successor_bits + self._expert_bits)
        if position < self._successors and source < self._experts and layer < self._layers - 1:
            return layer, source, position
        return None

    def _history_place(self, word: int) -> tuple[int, int, int] | None:
        index = word & ((1 << self._index_bits) - 1)
        layer = (word >> self._index_bits) & ((1 << self._layer_bits) - 1)
        ctx = word >> (self._index_bits + self._layer_bits)
        if index < self._top_k and layer < self._layers and ctx < self.config.contexts:
            return ctx, layer, index
        return None

    def read_table(self, table: int, word: int) -> int:
        """Word of a table; 0 in padding, beyond the end and in a table that does not exist."""
        if table == 0 and (place := self._correlation_place(word)):
            layer, source, position = place
            expert = int(self.tables.experts[layer, source, position])
            if expert < 0:
                return 0
            confidence = int(self.tables.confidences[layer, source, position])
            return expert | confidence << _CONFIDENCE_SHIFT | 1 << _VALID_SHIFT
        if table == 1 and (place := self._history_place(word)):
            ctx, layer, index = place
            valid = bool(self.tables.valid[ctx, layer])
            return int(self.tables.history[ctx, layer, index]) | valid << _VALID_SHIFT
        return 0

    def write_table(self, table: int, word: int, value: int) -> None:
        """Write a word of a table.

        An invalid correlation entry, and one whose expert does not exist, is stored as 0. In the
        history an expert that does not exist is stored as 0 and makes its row invalid.
        """
        expert = value & _EXPERT_MASK
        valid = bool(value >> _VALID_SHIFT & 1)
        exists = expert < self._experts
        if table == 0 and (place := self._correlation_place(word)):
            layer, source, position = place
            kept = valid and exists
            confidence = value >> _CONFIDENCE_SHIFT & _MOST_CONFIDENCE
            self.tables.experts[layer, source, position] = expert if kept else -1
            self.tables.confidences[layer, source, position] = confidence if kept else 0
        elif table == 1 and (place := self._history_place(word)):
            ctx, layer, index = place
            self.tables.history[ctx, layer, index] = expert if exists else 0
            if not exists:
                self.tables.valid[ctx, layer] = False
            elif index == 0:
                self.tables.valid[ctx, layer] = valid
