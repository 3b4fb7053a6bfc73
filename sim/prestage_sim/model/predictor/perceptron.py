"""Golden model of the ``perceptron`` predictor: online linear models over routing histories.

``docs/predictor-perceptron.md`` is the specification of both this and the RTL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.perceptron import HeadConfig
from prestage_hw.contract.records import NO_TOKEN, Phase, Source, ValueKind

from ..._jit import compiled, kernel
from ..._reference import by_reference
from .base import Candidate, Settings, ValueBeat
from .histories import Histories
from .linear import (
    NOW,
    OLD,
    Head,
    clear_head,
    create_head,
    head_learn,
    head_predict,
    head_predict_and_learn,
)
from .ranking import ranked
from .tokens import create_tokens, token_fetch, token_store
from .trust import Trust

__all__ = ["PerceptronPredictor", "TraceRunner"]

#: Reuse value of an expert that was not used, relative to that at its next visit.
_DISCOUNT = 13


@kernel
def reuse_targets(values: Any, used: Any, targets: Any) -> None:
    """Temporal difference: 1 for what was used, else the discounted value of the next visit."""
    for e in range(values.shape[0]):
        targets[e] = 1024 if used[e] else (_DISCOUNT * values[e]) >> 4


@kernel
def run_head(
    head: Any, routed: Any, memos: Any, targets: Any, used: Any, out: Any, learns: Any
) -> None:
    """Predict and learn every layer of every token, in the device's order for one context.

    ``routed`` holds two tokens more than ``memos``: those before the first. ``targets`` and
    ``used`` are room for one of each expert.
    """
    head = by_reference(head)
    layers = memos.shape[2]
    for t in range(memos.shape[0]):
        this, prev, before, memo = routed[t + 2], routed[t + 1], routed[t], memos[t]
        for m in range(head.shape[0], layers):
            if not learns:
                head_predict(head, 0, m, OLD, this, prev, before, memo, out[t, m])
                continue
            for e in range(used.shape[0]):
                used[e], targets[e] = False, 0
            for e in this[m]:
                used[e], targets[e] = True, 256
            head_predict_and_learn(head, m, this, prev, before, memo, out[t, m], targets, used)


@kernel
def run_reuse(
    head: Any,
    routed: Any,
    memos: Any,
    targets: Any,
    used: Any,
    new: Any,
    old: Any,
    known: Any,
    out: Any,
) -> None:
    """Reuse values after each routing of a layer, in 1/256; ``old`` are those of the visit before.

    ``routed`` holds two tokens more than ``memos``: those before the first. ``targets``, ``used``
    and ``new`` are room for one of each expert.
    """
    head = by_reference(head)
    for t in range(memos.shape[0]):
        this, prev, before, memo = routed[t + 2], routed[t + 1], routed[t], memos[t]
        for m in range(memos.shape[2]):
            head_predict(head, 0, m, NOW, this, prev, before, memo, new)
            for e in range(used.shape[0]):
                used[e] = False
            for e in this[m]:
                used[e] = True
            if known[m]:
                reuse_targets(new, used, targets)
                head_learn(head, 0, m, this, prev, before, memo, old[m], targets, used)
            known[m] = True
            for e in range(used.shape[0]):
                old[m, e] = new[e]
                out[t, m, e] = new[e] >> 2


@compiled
def _run_tokens(
    tables: Any, tokens: Any, routed: Any, previous: Any, memo: Any, memos: Any, learns: Any
) -> None:
    """Token tables over consecutive tokens; ``previous`` holds the two ids before the first."""
    for t in range(tokens.shape[0]):
        if learns and routed[t + 1, 0, 0] >= 0:
            token_store(tables, previous[1], previous[0], routed[t + 1])
        token_fetch(tables, tokens[t], previous[1], memo)
        previous[0], previous[1] = previous[1], tokens[t]
        memos[t] = memo


class _HeadTables:
    """Words of a head's tables as the table port cuts them.

    Table 0 holds the rows, 1 the diagonal features. A stored word without its parity bits is cut
    into words of 32 bits, low first.
    """

    def __init__(self, head: Head, config: HeadConfig, *, experts: int) -> None:
        self._head = head
        self._bits = config.weight_bits
        self._rows = bool(config.rows or config.crosses)
        lanes, entries = int(head.shape[2]), int(head.shape[3])
        self._lanes = lanes
        self._index_bits = 0
        if entries:
            self._index_bits = max(1, (-(-experts // entries) - 1).bit_length())
        self._beats = head.diagonal.shape[2] // lanes
        row_bits = lanes * (self._bits + self._index_bits) + 2
        diagonal_bits = head.diagonal.shape[1] * lanes * self._bits
        self._chunks = (-(-row_bits // 32), -(-diagonal_bits // 32))
        self._sizes = (row_bits, diagonal_bits)

    def words(self, table: int) -> int:
        """Table words; 0 for the rows of a head that has none."""
        if table == 0:
            return len(self._head.weights) * self._chunks[0] if self._rows else 0
        return int(len(self._head.diagonal) * self._beats * self._chunks[1])

    def read(self, table: int, word: int) -> int:
        """A table word."""
        at, chunk = divmod(word, self._chunks[table])
        return int(self._stored(table, at) >> 32 * chunk & 0xFFFFFFFF)

    def write(self, table: int, word: int, value: int) -> None:
        """Write a table word."""
        at, chunk = divmod(word, self._chunks[table])
        bits = self._stored(table, at)
        bits = bits & ~(0xFFFFFFFF << 32 * chunk) | value << 32 * chunk
        bits &= (1 << self._sizes[table]) - 1
        width = self._bits + (self._index_bits if table == 0 else 0)
        fields = [
            bits >> n * width & ((1 << width) - 1) for n in range(self._sizes[table] // width)
        ]
        half = 1 << self._bits - 1
        weights = [((field & 2 * half - 1) ^ half) - half for field in fields]
        if table:
            layer, beat = divmod(at, self._beats)
            part = slice(beat * self._lanes, (beat + 1) * self._lanes)
            self._head.diagonal[layer, :, part] = np.reshape(weights, (-1, self._lanes))
            return
        self._head.weights[at] = weights[: self._lanes]
        if self._index_bits:
            self._head.places[at] = [field >> self._bits for field in fields[: self._lanes]]
        self._head.maturity[at] = min(bits >> self._lanes * width, 2)

    def _stored(self, table: int, at: int) -> int:
        """A stored word without its parity bits."""
        mask = (1 << self._bits) - 1
        if table:
            layer, beat = divmod(at, self._beats)
            part = slice(beat * self._lanes, (beat + 1) * self._lanes)
            fields = (self._head.diagonal[layer, :, part].reshape(-1) & mask).tolist()
            return int(sum(field << n * self._bits for n, field in enumerate(fields)))
        width = self._bits + self._index_bits
        fields = (self._head.weights[at] & mask).tolist()
        word = sum(field << n * width for n, field in enumerate(fields))
        if self._index_bits:
            indices = self._head.places[at].tolist()
            word |= sum(i << n * width + self._bits for n, i in enumerate(indices))
        return int(word | int(self._head.maturity[at]) << self._lanes * width)


class PerceptronPredictor(Settings):
    """Rank experts by online linear models over what was routed before.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that is modelled.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If its predictor is another.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        if config.predictor != "perceptron" or config.perceptron is None:
            raise ValueError(f"Predictor must be perceptron, not {config.predictor!r}")
        self.config = config
        self._perceptron = config.perceptron
        self._configs = config.perceptron.heads
        self.heads = [
            create_head(config, head, number=number) for number, head in enumerate(self._configs)
        ]
        self.histories = Histories(config)
        self.trust = Trust(config)
        model = config.model
        shape = (len(self.heads), config.contexts, model.layers, model.experts)
        self._saved = np.zeros(shape, np.int64)
        self._known = np.zeros(shape[:3], np.bool_)
        self._routed = np.zeros(shape[1:3], np.bool_)
        self._phases = [int(Phase.DECODE)] * config.contexts
        self._stamps = [0] * config.contexts
        self._values: list[ValueBeat] = []
        parts = [
            _HeadTables(head, config, experts=model.experts)
            for head, config in zip(self.heads, self._configs, strict=True)
        ]
        self._tables: list[tuple[Any, int]] = [
            (part, table) for part in parts for table in (0, 1) if part.words(table)
        ]
        self._first_token_table = len(self._tables)

    def clear(self) -> None:
        """Clear all tables, and forget all histories and hints.

        What the contexts counted last stays: the host goes on counting.
        """
        for number, head in enumerate(self.heads):
            clear_head(head, number=number)
        self.histories.clear()
        self.trust.clear()
        self._saved[:] = 0
        self._known[:] = False
        self._routed[:] = False
        self._phases = [int(Phase.DECODE)] * self.config.contexts

    def begin(self, ctx: int, token: int, phase: int) -> list[Candidate]:
        """Start a token: rank every layer, and return the candidates of the first ones."""
        self.histories.begin(ctx, token, phase)
        self.trust.begin(ctx)
        self._phases[ctx] = phase
        self._routed[ctx] = False
        found: list[Candidate] = []
        for number, head in enumerate(self._configs):
            if not head.is_reuse:
                self._known[number, ctx] = False
            if head.name != "P0":
                continue
            for layer in range(self.config.model.layers):
                values = self._predict(number, ctx, layer, self.histories.this[ctx])
                self._save(number, ctx, layer, values, learned=phase != Phase.PREFILL)
                ranking = self._keep(ctx, layer, values)
                if layer < self.ahead:
                    deadline = (self._stamps[ctx] + layer + 1) & 0xFF
                    found += self._candidates(ctx, layer, ranking, deadline, near=layer == 0)
        return found

    def decide(self, ctx: int, layer: int, experts: Sequence[int], stamp: int) -> list[Candidate]:
        """Take the router's choice for a layer: predict the next ones, then learn."""
        phase = self._phases[ctx]
        first = not self._routed[ctx, layer]
        self._routed[ctx, layer] = True
        self._stamps[ctx] = stamp
        extra = not first and phase == Phase.VERIFY
        if first:
            self.trust.routed(ctx, layer, list(experts))
        this = self.histories.this[ctx]
        if extra:
            this = this.copy()
            this[layer] = experts
        else:
            self.histories.route(ctx, layer, experts)
        found: list[Candidate] = []
        if first or extra:
            found = self._predict_ahead(ctx, layer, this, stamp, extra=extra)
        if first and phase != Phase.PREFILL:
            self._learn(ctx, layer, experts)
        return found

    def hint(self, ctx: int, layer: int, expert: int, score: int, deadline: int) -> list[Candidate]:
        """Weigh an opinion from outside by what such opinions were worth."""
        value = self.trust.hint(ctx, layer, expert, score)
        near = (deadline - self._stamps[ctx]) & 0xFF == 1
        if value is None or value < (self.threshold if near else self.far_threshold):
            return []
        return [(ctx, layer, expert, value, int(Source.HINT), deadline)]

    def values(self) -> list[ValueBeat]:
        """What experts are worth, as it was given out since the last call."""
        given, self._values = self._values, []
        return given

    def table_words(self, table: int) -> int:
        """Words in a table: rows and diagonals of each head, then those by token, pair, successor;
        0 if there is none of that number.
        """
        part, number = self._table(table)
        return int(part.words(number)) if part else self.histories.table_words(number)

    def read_table(self, table: int, word: int) -> int:
        """Word of a table; 0 beyond the end and in a table that does not exist."""
        if word >= self.table_words(table):
            return 0
        part, number = self._table(table)
        return int(part.read(number, word)) if part else self.histories.read_table(number, word)

    def write_table(self, table: int, word: int, value: int) -> None:
        """Write a word of a table; ignored where there is none."""
        if word >= self.table_words(table):
            return
        part, number = self._table(table)
        if part:
            part.write(number, word, value)
        else:
            self.histories.write_table(number, word, value)

    def _table(self, table: int) -> tuple[Any, int]:
        """A head's part and its table, or None and the number of a token table."""
        if table < self._first_token_table:
            return self._tables[table]
        present = [number for number in range(3) if self.histories.table_words(number)]
        at = table - self._first_token_table
        return None, present[at] if at < len(present) else 3

    def _base(self, ctx: int) -> int:
        """First layer of the context's bank of weights."""
        return ctx * self.config.model.layers if self._perceptron.banked else 0

    def _predict(
        self, number: int, ctx: int, layer: int, this: NDArray[np.int16], *, now: int = OLD
    ) -> NDArray[np.int64]:
        """Values of a head for a layer."""
        values = np.empty(self.config.model.experts, np.int64)
        histories = self.histories
        head_predict(
            self.heads[number],
            self._base(ctx),
            layer,
            now,
            this,
            histories.prev[ctx],
            histories.before[ctx],
            histories.memo[ctx],
            values,
        )
        return values

    def _save(
        self, number: int, ctx: int, layer: int, values: NDArray[np.int64], *, learned: bool
    ) -> None:
        """Keep what was predicted until the truth comes."""
        self._saved[number, ctx, layer] = values
        self._known[number, ctx, layer] = learned

    def _predict_ahead(
        self, ctx: int, layer: int, this: NDArray[np.int16], stamp: int, *, extra: bool
    ) -> list[Candidate]:
        """Candidates of the layers to come, nearest first."""
        found: list[Candidate] = []
        for number, head in enumerate(self._configs):
            target = layer + head.horizon
            if not head.horizon or target >= self.config.model.layers:
                continue
            values = self._predict(number, ctx, target, this)
            ranking = values.tolist()
            if not extra:
                learned = self._phases[ctx] != Phase.PREFILL
                self._save(number, ctx, target, values, learned=learned)
                ranking = self._keep(ctx, target, values)
            deadline = (stamp + head.horizon) & 0xFF
            found += self._candidates(ctx, target, ranking, deadline, near=head.horizon == 1)
        return found

    def _candidates(
        self, ctx: int, layer: int, values: Sequence[int], deadline: int, *, near: bool
    ) -> list[Candidate]:
        """Candidates of a layer, best first."""
        threshold = self.threshold if near else self.far_threshold
        model = self.config.model
        most = min((2 if near else 1) * model.top_k, model.experts)
        return [
            (ctx, layer, expert, value, int(Source.PREDICTOR), deadline)
            for expert, value in ranked(values, threshold=threshold, most=most)
        ]

    def _learn(self, ctx: int, layer: int, experts: Sequence[int]) -> None:
        """Learn the truth of a layer in every head that predicted it."""
        used = np.zeros(self.config.model.experts, np.bool_)
        used[list(experts)] = True
        targets = np.where(used, 256, 0)
        for number, head in enumerate(self._configs):
            known = bool(self._known[number, ctx, layer])
            old = self._saved[number, ctx, layer]
            if head.is_reuse:
                new = self._predict(number, ctx, layer, self.histories.this[ctx], now=NOW)
                targets = np.zeros(len(used), np.int64)
                reuse_targets(new, used, targets)
            if known:
                histories = self.histories
                head_learn(
                    self.heads[number],
                    self._base(ctx),
                    layer,
                    histories.this[ctx],
                    histories.prev[ctx],
                    histories.before[ctx],
                    histories.memo[ctx],
                    old,
                    targets,
                    used,
                )
            if head.is_reuse:
                self._save(number, ctx, layer, new, learned=True)
                self._give(ValueKind.REUSE, ctx, layer, new >> 2)
            else:
                self._known[number, ctx, layer] = False

    def _keep(self, ctx: int, layer: int, values: NDArray[np.int64]) -> list[int]:
        """Give chances on and keep them for the hints; returns them with what hints add."""
        self._give(ValueKind.CHANCE, ctx, layer, values)
        return self.trust.written(ctx, layer, values.tolist())

    def _give(self, kind: ValueKind, ctx: int, layer: int, values: NDArray[np.int64]) -> None:
        """Say what the experts of a layer are worth, in 1/256."""
        lanes = self.config.predictor_lanes
        padded = np.zeros(self.config.lane_beats * lanes, np.int64)
        padded[: len(values)] = values
        for beat, part in enumerate(padded.reshape(-1, lanes).tolist()):
            self._values.append((int(kind), ctx, layer, beat, tuple(part)))


class TraceRunner:
    """The heads over a whole trace: what evaluation and simulation need.

    Contexts share weights and token tables, and take turns by whole tokens.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.
    contexts : :class:`int`
        How many there are; those of ``config`` don't matter.
    """

    def __init__(self, config: DeviceConfig, *, contexts: int = 1) -> None:
        require_config(config)
        perceptron = config.perceptron
        assert perceptron is not None
        self._config = config
        heads = [
            (head, create_head(config, head, number=number))
            for number, head in enumerate(perceptron.heads)
        ]
        self._heads = {shape.horizon: head for shape, head in heads if not shape.is_reuse}
        self._reuse = next((head for shape, head in heads if shape.is_reuse), None)
        self._tables = create_tokens(config)
        model = config.model
        choice = (model.layers, model.top_k)
        self._tail = np.full((contexts, 2, *choice), -1, np.int16)
        self._memo = np.full((contexts, 6, *choice), -1, np.int16)
        self._previous = np.full((contexts, 2), NO_TOKEN, np.int64)
        self._old = np.zeros((contexts, model.layers, model.experts), np.int64)
        self._known = np.zeros((contexts, model.layers), np.bool_)

    @property
    def horizons(self) -> tuple[int, ...]:
        """Layers ahead that have a head of their own; 0 is the head of token start."""
        return tuple(self._heads)

    def run(self, experts: ArrayLike, tokens: ArrayLike) -> dict[int, NDArray[np.int16]]:
        """Predict and learn the next tokens of the trace.

        Parameters
        ----------
        experts : array of :class:`int`, shape ``[tokens, layers, k]``
            Chosen experts.
        tokens : array of :class:`int`, shape ``[tokens]``
            Ids of the input tokens; negative where unknown.

        Returns
        -------
        :class:`dict`
            For each horizon of :attr:`horizons`: confidences in 1/256, shape ``[tokens, layers,
            experts]``. Layers below the horizon are those of the head of token start.
        """
        return self._chances(*self._begin(experts, tokens, 0, learns=True), learns=True)

    def run_all(
        self, experts: ArrayLike, tokens: ArrayLike, *, ctx: int = 0
    ) -> tuple[dict[int, NDArray[np.int16]], NDArray[np.int16]]:
        """Predict and learn the next tokens of a context with the reuse head too.

        Returns
        -------
        dict, array
            What :meth:`run` returns, and the reuse values after each routing, in 1/256, shape
            ``[tokens, layers, experts]``; 0 without a reuse head.
        """
        routed, memos = self._begin(experts, tokens, ctx, learns=True)
        model = self._config.model
        reuse = np.zeros((len(memos), model.layers, model.experts), np.int16)
        if self._reuse is not None:
            old, known = self._old[ctx], self._known[ctx]
            targets, used = self._room()
            new = np.zeros_like(targets)
            run_reuse(self._reuse, routed, memos, targets, used, new, old, known, reuse)
        return self._chances(routed, memos, learns=True), reuse

    def look(
        self, experts: ArrayLike, tokens: ArrayLike, *, ctx: int, goes_on: bool
    ) -> dict[int, NDArray[np.int16]]:
        """Predict tokens without learning, as those of a prefill chunk or drafts.

        Parameters
        ----------
        experts, tokens, ctx
            As of :meth:`run_all`.
        goes_on : :class:`bool`
            Whether the context goes on from the last of them, as after a chunk, or from where it
            was, as after drafts.

        Returns
        -------
        :class:`dict`
            What :meth:`run` returns.
        """
        tail, memo, previous = (
            self._tail[ctx].copy(),
            self._memo[ctx].copy(),
            self._previous[ctx].copy(),
        )
        found = self._chances(*self._begin(experts, tokens, ctx, learns=False), learns=False)
        if not goes_on:
            self._tail[ctx], self._memo[ctx], self._previous[ctx] = tail, memo, previous
        return found

    def reuse(self, ctx: int) -> NDArray[np.int64]:
        """Latest reuse values of a context in 1/256, shape ``[layers, experts]``."""
        return np.asarray(self._old[ctx] >> 2)

    def _begin(
        self, experts: ArrayLike, tokens: ArrayLike, ctx: int, *, learns: bool
    ) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """The choices behind the two tokens before them, and the sets of the token tables."""
        chosen = np.asarray(experts, np.int16)
        ids = np.asarray(tokens, np.int64)
        ids = np.where(ids < 0, NO_TOKEN, ids)
        routed = np.concatenate([self._tail[ctx], chosen])
        memos = np.empty((len(chosen), *self._memo.shape[1:]), np.int16)
        _run_tokens(self._tables, ids, routed, self._previous[ctx], self._memo[ctx], memos, learns)
        self._tail[ctx] = routed[-2:]
        return routed, memos

    def _chances(
        self, routed: NDArray[np.int16], memos: NDArray[np.int16], *, learns: bool
    ) -> dict[int, NDArray[np.int16]]:
        """What the P heads say."""
        model = self._config.model
        targets, used = self._room()
        out: dict[int, NDArray[np.int16]] = {}
        for horizon, head in sorted(self._heads.items()):
            result = (
                out[0].copy()
                if horizon
                else np.zeros((len(memos), model.layers, model.experts), np.int16)
            )
            run_head(head, routed, memos, targets, used, result, learns)
            out[horizon] = result
        return out

    def _room(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Room for what an expert's value should be, and whether it was used."""
        experts = self._config.model.experts
        return np.zeros(experts, np.int64), np.zeros(experts, np.bool_)
