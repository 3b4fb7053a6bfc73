"""Golden model of the spatio-temporal predictor (ST-MoE, arXiv 2606.15453)."""

from __future__ import annotations

from collections.abc import Sequence

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source

from .base import Candidate, Settings, ValueBeat

__all__ = ["StMoePredictor"]

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


class StMoePredictor(Settings):
    """Predict from the experts that followed in the past and from the previous token's choice.

    An entry of a row is a pair of parallel lists: ``experts`` (-1 where invalid) and
    ``confidences``.

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
        # Rows that never hold an expert twice cannot exceed this; a row written from outside might.
        self._most_score = _MOST_CONFIDENCE * model.top_k + _HISTORY_WORTH
        self._successor_bits = _index_bits(config.successors)
        self._expert_bits = _index_bits(model.experts)
        self._index_bits = _index_bits(model.top_k)
        self._layer_bits = _index_bits(model.layers)
        self.clear()

    def clear(self) -> None:
        """Clear all tables and forget every context's previous layer."""
        rows = range(self._experts)
        pairs = range(self._layers - 1)
        contexts = range(self.config.contexts)
        self._row_experts = [[[-1] * self._successors for _ in rows] for _ in pairs]
        self._row_confidences = [[[0] * self._successors for _ in rows] for _ in pairs]
        self._history = [[(0,) * self._top_k for _ in range(self._layers)] for _ in contexts]
        self._history_valid = [[False] * self._layers for _ in contexts]
        self._previous = [-1 for _ in contexts]

    def begin(self, ctx: int, token: int, phase: int) -> list[Candidate]:
        """Start a token: the context's previous layer becomes "none"; there are no candidates."""
        self._previous[ctx] = -1
        return []

    def decide(self, ctx: int, layer: int, experts: Sequence[int], stamp: int) -> list[Candidate]:
        """Predict layer + 1, learn from the pair layer - 1 and layer, remember the choice."""
        chosen = tuple(experts)
        candidates = self._predict(ctx, layer, chosen, stamp) if layer < self._layers - 1 else []
        if layer > 0 and self._previous[ctx] == layer - 1 and self._history_valid[ctx][layer - 1]:
            for source in self._history[ctx][layer - 1]:
                self._learn(layer - 1, source, chosen)
        self._history[ctx][layer] = chosen
        self._history_valid[ctx][layer] = True
        self._previous[ctx] = layer
        return candidates

    def _predict(
        self, ctx: int, layer: int, chosen: tuple[int, ...], stamp: int
    ) -> list[Candidate]:
        # A dict keeps the order of first insertion, which is the order of first touch.
        scores: dict[int, int] = {}
        layer_experts = self._row_experts[layer]
        layer_confidences = self._row_confidences[layer]
        for source in chosen:
            for expert, confidence in zip(
                layer_experts[source], layer_confidences[source], strict=True
            ):
                if expert >= 0:
                    scores[expert] = scores.get(expert, 0) + confidence
        target = layer + 1
        if self._history_valid[ctx][target]:
            for expert in self._history[ctx][target]:
                scores[expert] = scores.get(expert, 0) + _HISTORY_WORTH
        deadline = (stamp + 1) & 0xFF
        most = self._most_score
        # Saturate before ranking: equal scores rank by first touch.
        ranked = [
            (min(score, most), expert) for expert, score in scores.items() if score >= _THRESHOLD
        ]
        ranked.sort(key=lambda pair: -pair[0])
        return [(ctx, target, expert, score, 0, deadline) for score, expert in ranked]

    def _learn(self, layer: int, source: int, chosen: tuple[int, ...]) -> None:
        row_experts = self._row_experts[layer][source]
        row_confidences = self._row_confidences[layer][source]
        unused = list(chosen)
        open_entries = []
        for position, expert in enumerate(row_experts):
            if expert in chosen:
                if row_confidences[position] < _MOST_CONFIDENCE:
                    row_confidences[position] += 1
                if expert in unused:
                    unused.remove(expert)
            elif expert >= 0 and row_confidences[position] > 0:
                row_confidences[position] -= 1
            else:
                open_entries.append(position)
        for position, expert in zip(open_entries, unused, strict=False):
            row_experts[position] = expert
            row_confidences[position] = _NEW_CONFIDENCE

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
            expert = self._row_experts[layer][source][position]
            if expert < 0:
                return 0
            confidence = self._row_confidences[layer][source][position]
            return expert | confidence << _CONFIDENCE_SHIFT | 1 << _VALID_SHIFT
        if table == 1 and (place := self._history_place(word)):
            ctx, layer, index = place
            valid = self._history_valid[ctx][layer]
            return self._history[ctx][layer][index] | valid << _VALID_SHIFT
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
            self._row_experts[layer][source][position] = expert if kept else -1
            self._row_confidences[layer][source][position] = confidence if kept else 0
        elif table == 1 and (place := self._history_place(word)):
            ctx, layer, index = place
            row = list(self._history[ctx][layer])
            row[index] = expert if exists else 0
            self._history[ctx][layer] = tuple(row)
            if not exists:
                self._history_valid[ctx][layer] = False
            elif index == 0:
                self._history_valid[ctx][layer] = valid
