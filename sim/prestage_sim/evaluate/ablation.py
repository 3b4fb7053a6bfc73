"""What each part of a ``perceptron`` predictor is worth, and what it costs.

``python -m prestage_sim.evaluate.ablation TRACE...`` takes a named form apart: it leaves out each
feature, conjunction and head, adds each that is missing, varies the sizes of the tables, and prints
what that does to recall, bits of memory and cycles of a prediction.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import (
    CROSSES,
    FEATURES,
    FORMS,
    HeadConfig,
    PerceptronConfig,
    perceptron_form,
)
from prestage_hw.contract.records import NO_TOKEN
from prestage_sim.traces import Trace, TraceError, load_trace, model_config

from .._jit import compiled
from ..model.predictor.linear import NOW, OLD, create_head, head_learn, head_predict
from ..model.predictor.perceptron import reuse_targets
from ..model.predictor.tokens import create_tokens, token_fetch, token_store
from .metrics import cut_offs
from .run import check_horizons

__all__ = [
    "MARKERS",
    "Ablation",
    "Row",
    "Variant",
    "ablate",
    "main",
    "prediction_cycles",
    "render",
    "row_bits",
    "table_bits",
    "variants",
    "weight_bits",
]

#: Lines of a page between which a generated part stands.
MARKERS = ("<!-- ablations begin -->", "<!-- ablations end -->")

#: Features that are about the predicted layer itself, where a weight for an expert's own presence
#: means something.
_OWN_LAYER = ("B", "G", "T", "T2", "Q", "S")

#: Share of a layer's experts that the cache holds by which the reuse head is judged.
_CACHED = 0.25

_GROUPS = {
    "head": "Heads",
    "P1": "P1, the next layer",
    "P2": "P2, two layers ahead",
    "P3": "P3, three layers ahead",
    "P0": "P0, from token start",
    "R": "R, the reuse value",
    "lists": "Lists against full rows",
    "sizes": "Sizes of the tables",
}


def _groups_of_lanes(lanes: int) -> int:
    return -(-lanes // 8)


def row_bits(config: DeviceConfig, head: HeadConfig) -> int:
    """Memory of a head's rows, parity and stages included, in bits."""
    perceptron, model = _perceptron(config), config.model
    lanes, entries = config.predictor_lanes, perceptron.list_entries
    beats = entries // lanes if entries else config.lane_beats
    banks = config.contexts if perceptron.banked else 1
    rows = (
        model.layers
        * banks
        * ((len(head.rows) << config.bits("expert")) + len(head.crosses) * perceptron.cross_rows)
    )
    index = (-(-model.experts // entries) - 1).bit_length() if entries else 0
    return rows * beats * (lanes * (head.weight_bits + index) + 2 + _groups_of_lanes(lanes))


def weight_bits(config: DeviceConfig, head: HeadConfig) -> int:
    """Memory of a head's weights, rows and diagonals, in bits."""
    lanes = config.predictor_lanes
    banks = config.contexts if _perceptron(config).banked else 1
    feature = lanes * head.weight_bits + _groups_of_lanes(lanes)
    diagonals = (
        config.model.layers * banks * config.lane_beats * (1 + len(head.diagonals)) * feature
    )
    return row_bits(config, head) + diagonals


def table_bits(config: DeviceConfig) -> int:
    """Memory of the token tables, tags included, in bits."""
    perceptron, model = _perceptron(config), config.model
    used = perceptron.features()
    # A choice has a bit that says whether it's known and one of parity, as has a tag.
    choice = model.layers * (model.top_k * config.bits("expert") + 2)
    tag = 16 + 2
    return (
        perceptron.token_rows * bool(used & {"T", "T2"}) * (choice * (1 + ("T2" in used)) + tag)
        + perceptron.pair_rows * ("Q" in used) * (choice + tag)
        + perceptron.token_rows * ("S" in used) * (choice + tag)
    )


def prediction_cycles(config: DeviceConfig, head: HeadConfig) -> int:
    """Words that a prediction reads with every set known: active row words and diagonal beats.

    One word a cycle; the last value comes out at most 6 cycles later.
    """
    k = config.model.top_k
    entries = _perceptron(config).list_entries
    beats = entries // config.predictor_lanes if entries else config.lane_beats
    squares = min(2, k) ** 2
    pairs = {"AC": squares, "AB": squares, "AA": min(3, k) * (min(3, k) - 1) // 2}
    rows = len(head.rows) * k + sum(pairs[cross] for cross in head.crosses)
    return rows * beats + config.lane_beats


def _perceptron(config: DeviceConfig) -> PerceptronConfig:
    assert config.perceptron is not None
    return config.perceptron


def _device(model: ModelConfig, perceptron: PerceptronConfig) -> DeviceConfig:
    return DeviceConfig(
        model=model,
        slots=model.top_k,
        expert_bytes=512,
        predictor="perceptron",
        perceptron=perceptron,
    )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change of a form.

    Parameters
    ----------
    group : :class:`str`
        What it belongs to: ``"head"``, a head's name, ``"lists"`` or ``"sizes"``; empty for the
        form as it is.
    change : :class:`str`
        The change in words.
    config : :class:`PerceptronConfig`
        The form with the change.
    instead : mapping of :class:`int` to :class:`str`
        Heads that rank at a horizon in place of its own.
    """

    group: str
    change: str
    config: PerceptronConfig
    instead: Mapping[int, str] = field(default_factory=dict)

    @property
    def replaced(self) -> frozenset[str]:
        """Heads that others stand in for."""
        return frozenset(f"P{horizon}" for horizon in self.instead)

    def head(self, horizon: int) -> HeadConfig:
        """The head that ranks at a horizon; layers below it are always those of P0."""
        name = self.instead.get(horizon, f"P{horizon}")
        head = self.config.head(name) or self.config.head("P0")
        assert head is not None
        return head


def _with(config: PerceptronConfig, head: HeadConfig) -> PerceptronConfig:
    return config.replace(
        heads=tuple(head if old.name == head.name else old for old in config.heads)
    )


def _without_name(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


def _changed_heads(head: HeadConfig) -> Iterable[tuple[str, HeadConfig]]:
    """Everything that can be left out of a head or added to it."""
    for what, key in (("row", "rows"), ("conjunction", "crosses"), ("diagonal", "diagonals")):
        for name in getattr(head, key):
            yield (
                f"without {what} {name}",
                head.replace(**{key: _without_name(getattr(head, key), name)}),
            )
    candidates = [
        *(("conjunction", "crosses", name) for name in CROSSES),
        *(("row", "rows", name) for name in FEATURES),
        *(("diagonal", "diagonals", name) for name in _OWN_LAYER),
    ]
    for what, key, name in candidates:
        if name in getattr(head, key) or (key == "diagonals" and name in head.rows):
            continue
        try:
            more = head.replace(**{key: (*getattr(head, key), name)})
        except ValueError:
            continue  # the head cannot know it
        yield f"with {what} {name}", more


def _powers(first: int, last: int) -> list[int]:
    found = []
    while first <= last:
        found.append(first)
        first *= 2
    return found


def variants(
    config: PerceptronConfig, *, model: ModelConfig, horizons: Iterable[int]
) -> list[Variant]:
    """All changes of a form whose worth is asked for; the first is none.

    Parameters
    ----------
    config : :class:`PerceptronConfig`
        The form.
    model : :class:`ModelConfig`
        Model that it serves.
    horizons : iterable of :class:`int`
        Layers ahead that are looked at; heads of other horizons stay as they are.
    """
    wanted = tuple(horizons)
    found = [Variant(group="", change="as it is", config=config)]
    for head in config.heads:
        if head.horizon and head.horizon not in wanted:
            continue
        rest = tuple(other for other in config.heads if other is not head)
        if head.name == "P1":
            found.append(
                Variant(
                    group="head",
                    change="P0 in place of P1",
                    config=_with(config, HeadConfig(name="P1")),
                    instead={1: "P0"},
                )
            )
        elif head.name != "P0":
            found.append(
                Variant(
                    group="head",
                    change="without R" if head.is_reuse else f"P0 in place of {head.name}",
                    config=config.replace(heads=rest),
                )
            )
        found += [
            Variant(group=head.name, change=change, config=_with(config, other))
            for change, other in _changed_heads(head)
        ]
    lengths = _powers(4, model.experts // 2)
    for entries in (0, *lengths):
        if entries == config.list_entries:
            continue
        lanes = min(config.lanes, entries) if entries else config.lanes
        found.append(
            Variant(
                group="lists",
                change=f"lists of {entries}" if entries else "full rows",
                config=config.replace(list_entries=entries, lanes=lanes),
            )
        )
    used = config.features()
    for key, what, present in (
        ("cross_rows", "rows of a conjunction", any(head.crosses for head in config.heads)),
        ("token_rows", "entries of the table by token", bool(used & {"T", "T2", "S"})),
        ("pair_rows", "entries of the table by pair", "Q" in used),
    ):
        size = getattr(config, key)
        for other in (size // 4, size // 2, size * 2, size * 4) if present else ():
            most = 4096 if key == "cross_rows" else 1 << 20
            if 4 <= other <= most:
                changed = config.replace(**{key: other})
                found.append(Variant(group="sizes", change=f"{other} {what}", config=changed))
    return found


@compiled
def _look_up(tables: Any, tokens: Any, routed: Any, memos: Any) -> None:
    """Token tables over a trace; ``routed`` holds two tokens more than ``memos``, unknown ones."""
    memo = np.full(memos.shape[1:], -1, np.int16)
    before = previous = np.int64(NO_TOKEN)
    for t in range(tokens.shape[0]):
        if t > 0:
            token_store(tables, previous, before, routed[t + 1])
        token_fetch(tables, tokens[t], previous, memo)
        before, previous = previous, tokens[t]
        memos[t] = memo


@compiled
def _count_hits(head: Any, routed: Any, memos: Any, first: int, cuts: Any, hits: Any) -> None:
    """Predict and learn in the device's order; count what is among the best from ``first`` on."""
    tokens, layers = memos.shape[0], memos.shape[2]
    horizon, experts = head.shape[0], head.diagonal.shape[2]
    values = np.zeros(experts, np.int64)
    targets = np.zeros(experts, np.int64)
    used = np.zeros(experts, np.bool_)
    for t in range(tokens):
        this, prev, before = routed[t + 2], routed[t + 1], routed[t]
        for m in range(horizon, layers):
            head_predict(head, 0, m, OLD, this, prev, before, memos[t], values)
            used[:] = False
            targets[:] = 0
            for chosen in this[m]:
                used[chosen] = True
                targets[chosen] = 256
                if t < first:
                    continue
                better = 0
                for e in range(experts):
                    if values[e] > values[chosen] or (values[e] == values[chosen] and e < chosen):
                        better += 1
                for c in range(cuts.shape[0]):
                    if better < cuts[c]:
                        hits[m, c] += 1
            head_learn(head, 0, m, this, prev, before, memos[t], values, targets, used)


@compiled
def _count_cached(head: Any, routed: Any, memos: Any, first: int, slots: int) -> int:
    """Hits of a cache of ``slots`` experts a layer that gives up what has the least reuse value."""
    tokens, layers = memos.shape[0], memos.shape[2]
    experts = head.diagonal.shape[2]
    new = np.zeros(experts, np.int64)
    old = np.zeros((layers, experts), np.int64)
    targets = np.zeros(experts, np.int64)
    used = np.zeros(experts, np.bool_)
    held = np.zeros((layers, experts), np.bool_)
    count = np.zeros(layers, np.int64)
    hits = 0
    for t in range(tokens):
        this, prev, before = routed[t + 2], routed[t + 1], routed[t]
        for m in range(layers):
            head_predict(head, 0, m, NOW, this, prev, before, memos[t], new)
            used[:] = False
            for chosen in this[m]:
                used[chosen] = True
            if t > 0:
                reuse_targets(new, used, targets)
                head_learn(head, 0, m, this, prev, before, memos[t], old[m], targets, used)
            old[m] = new
            for chosen in this[m]:
                if held[m, chosen]:
                    hits += t >= first
                    continue
                if count[m] < slots:
                    count[m] += 1
                else:
                    victim = -1
                    for e in range(experts):
                        if held[m, e] and not used[e] and (victim < 0 or new[e] < new[victim]):
                            victim = e
                    held[m, victim] = False
                held[m, chosen] = True
    return hits


class _Course:
    """One trace behind those learned before it, and what heads scored on it.

    Every head learns by itself, so that a change of one leaves the scores of the others.
    """

    def __init__(self, trace: Trace, *, warm: Sequence[Trace], model: ModelConfig) -> None:
        self.model = model
        experts = np.concatenate([other.experts for other in (*warm, trace)])
        tokens = np.concatenate([other.token for other in (*warm, trace)]).astype(np.int64)
        self._tokens = np.where(tokens < 0, NO_TOKEN, tokens)
        self._first = len(experts) - trace.tokens
        self._truths = trace.tokens * model.top_k
        nothing = np.full((2, *experts.shape[1:]), -1, np.int16)
        self._routed = np.concatenate([nothing, experts.astype(np.int16)])
        self._memos: tuple[Any, NDArray[np.int16]] | None = None
        self._scores: dict[Any, Any] = {}

    @property
    def tokens(self) -> int:
        """Tokens that a head has to go through."""
        return len(self._tokens)

    def _memory(self, config: PerceptronConfig) -> NDArray[np.int16]:
        key = (config.token_rows, config.pair_rows)
        if self._memos is None or self._memos[0] != key:
            heads = (
                HeadConfig(name="P1", diagonals=("T", "T2", "Q", "S")),
                HeadConfig(name="P0"),
            )
            tables = create_tokens(_device(self.model, config.replace(heads=heads)))
            shape = (self.tokens, 6, self.model.layers, self.model.top_k)
            memos = np.empty(shape, np.int16)
            _look_up(tables, self._tokens, self._routed, memos)
            self._memos = (key, memos)
        return self._memos[1]

    def key(self, config: PerceptronConfig, head: HeadConfig) -> Any:
        """What a head's score depends on."""
        tables = {*head.rows, *head.diagonals} & {"T", "T2", "Q", "S"}
        return (
            head,
            config.lanes,
            config.list_entries,
            config.cross_rows if head.crosses else 0,
            (config.token_rows, config.pair_rows) if tables else 0,
        )

    def score(self, config: PerceptronConfig, head: HeadConfig) -> Any:
        """Recall at k and 2k of each layer, shape ``[L, 2]``; the reuse head's hit rate."""
        key = self.key(config, head)
        if key not in self._scores:
            device = _device(self.model, config)
            number = [other.name for other in config.heads].index(head.name)
            state = create_head(device, head, number=number)
            arguments = (state, self._routed, self._memory(config), self._first)
            if head.is_reuse:
                slots = max(self.model.top_k, int(self.model.experts * _CACHED))
                cached = _count_cached(*arguments, slots)
                self._scores[key] = cached / (self._truths * self.model.layers)
            else:
                at_k, _, at_2k, _ = cut_offs(top_k=self.model.top_k, experts=self.model.experts)
                hits = np.zeros((self.model.layers, 2))
                _count_hits(*arguments, np.array([at_k, at_2k]), hits)
                self._scores[key] = hits / self._truths
        return self._scores[key]

    def recall(self, variant: Variant, horizon: int) -> tuple[float, float]:
        """Recall at k and at 2k over all layers."""
        start = variant.config.head("P0")
        assert start is not None
        by_layer = self.score(variant.config, start).copy()
        head = variant.head(horizon)
        if head.horizon:
            by_layer[horizon:] = self.score(variant.config, head)[horizon:]
        at_k, at_2k = by_layer.mean(axis=0)
        return float(at_k), float(at_2k)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a variant scores and costs.

    Parameters
    ----------
    group, change : :class:`str`
        As in :class:`Variant`.
    recall_at_k, recall_at_2k : mapping of :class:`int` to :class:`float`
        Recall over all layers at each horizon, mean over the traces.
    reuse_hits : :class:`float` or None
        Hit rate of a cache of a quarter of each layer's experts that gives up what has the least
        reuse value, mean over the traces; None without that head.
    weight_bits, table_bits : :class:`int`
        Memory of all heads' weights and of the token tables, parity included, in bits.
    cycles : mapping of :class:`str` to :class:`int`
        Words that each head reads for a prediction, one a cycle.
    """

    group: str
    change: str
    recall_at_k: Mapping[int, float]
    recall_at_2k: Mapping[int, float]
    reuse_hits: float | None
    weight_bits: int
    table_bits: int
    cycles: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A form taken apart on some traces of one shape.

    Parameters
    ----------
    form : :class:`str`
        Name of the form.
    model : :class:`str`
        Model of the traces.
    layers, experts, top_k : :class:`int`
        Its shape.
    traces : list of :class:`str`
        Paths as given.
    tokens : :class:`int`
        Tokens scored.
    warm_others : :class:`bool`
        Whether each trace was preceded by the others.
    horizons : list of :class:`int`
        Layers ahead.
    rows : list of :class:`Row`
        The variants; the first is the form as it is.
    """

    form: str
    model: str
    layers: int
    experts: int
    top_k: int
    traces: list[str]
    tokens: int
    warm_others: bool
    horizons: list[int]
    rows: list[Row]

    def as_object(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)


def _form_for(name: str, model: ModelConfig) -> PerceptronConfig:
    """A form without the heads that a model of few layers has no room for."""
    config = perceptron_form(name)
    return config.replace(heads=tuple(head for head in config.heads if head.horizon < model.layers))


def ablate(
    traces: Sequence[Trace],
    *,
    form: str = "full",
    horizons: Iterable[int] = (1,),
    warm_others: bool = False,
    names: Sequence[str] = (),
    groups: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ablation:
    """Take a form apart.

    Parameters
    ----------
    traces : sequence of :class:`Trace`
        Traces of one shape; numbers are means over them.
    form : :class:`str`
        Named form (:data:`prestage_hw.contract.perceptron.FORMS`).
    horizons : iterable of :class:`int`
        Layers ahead, 1 to 4 and below the traces' layers.
    warm_others : :class:`bool`
        Whether each trace is preceded by the others, which are learned and not scored.
    names : sequence of :class:`str`
        Paths of the traces, for the result.
    groups : iterable of :class:`str` or None
        Groups of :class:`Variant` to look at; None stands for all.
    progress : callable or None
        Takes the head runs done and the head runs in all.

    Raises
    ------
    TraceError
        If the traces differ in shape.
    ValueError
        If there is no trace, or the form, a horizon or a group is refused.
    """
    if not traces:
        raise ValueError("Ablation needs at least one trace")
    wanted = tuple(sorted(set(horizons)))
    model = model_config(traces[0])
    for trace in traces:
        if _shape(trace) != _shape(traces[0]):
            raise TraceError("Traces of an ablation must have the same layers, experts and k")
        check_horizons(trace, wanted)
    if not wanted:
        raise ValueError("Ablation needs at least one horizon")
    config = _form_for(form, model)
    found = variants(config, model=model, horizons=wanted)
    if groups is not None:
        chosen = set(groups)
        for group in chosen:
            if group not in _GROUPS:
                raise ValueError(f"Group must be one of {', '.join(_GROUPS)}, not {group!r}")
        found = [variant for variant in found if not variant.group or variant.group in chosen]
    scores = _score(traces, found, model, wanted, warm_others, progress)
    rows = []
    for variant, recalls, hits in zip(found, *scores, strict=True):
        device = _device(model, variant.config)
        rows.append(
            Row(
                group=variant.group,
                change=variant.change,
                recall_at_k={h: float(recalls[:, at, 0].mean()) for at, h in enumerate(wanted)},
                recall_at_2k={h: float(recalls[:, at, 1].mean()) for at, h in enumerate(wanted)},
                reuse_hits=float(np.mean(hits)) if hits else None,
                weight_bits=sum(
                    weight_bits(device, head)
                    for head in variant.config.heads
                    if head.name not in variant.replaced
                ),
                table_bits=table_bits(device),
                cycles={
                    head.name: prediction_cycles(device, head)
                    for head in variant.config.heads
                    if head.name not in variant.replaced
                },
            )
        )
    return Ablation(
        form=form,
        model=model.name,
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        traces=list(names),
        tokens=sum(trace.tokens for trace in traces),
        warm_others=warm_others and len(traces) > 1,
        horizons=list(wanted),
        rows=rows,
    )


def _shape(trace: Trace) -> tuple[int, int, int]:
    return trace.layers, trace.experts_per_layer, trace.top_k


def _score(
    traces: Sequence[Trace],
    found: Sequence[Variant],
    model: ModelConfig,
    horizons: tuple[int, ...],
    warm_others: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[NDArray[np.float64]], list[list[float]]]:
    """Recall of each variant, shape ``[traces, horizons, 2]``, and its reuse hits."""
    recalls = [np.zeros((len(traces), len(horizons), 2)) for _ in found]
    hits: list[list[float]] = [[] for _ in found]
    # Variants of one table size stand together, so that the tables are looked up once.
    order = sorted(range(len(found)), key=lambda at: _sizes(found[at].config))
    runs = 0
    wanted: list[list[tuple[PerceptronConfig, HeadConfig]]] = []
    for variant in found:
        heads = [variant.config.head("P0"), *(variant.head(h) for h in horizons)]
        heads.append(variant.config.head("R"))
        wanted.append([(variant.config, head) for head in heads if head is not None])
    total = len(traces) * sum(len(heads) for heads in wanted)
    for place, trace in enumerate(traces):
        warm = [other for other in traces if other is not trace] if warm_others else []
        course = _Course(trace, warm=warm, model=model)
        for at in order:
            for config, head in wanted[at]:
                course.score(config, head)
                runs += 1
                if progress is not None:
                    progress(runs, total)
            for number, horizon in enumerate(horizons):
                recalls[at][place, number] = course.recall(found[at], horizon)
            reuse = found[at].config.head("R")
            if reuse is not None:
                hits[at].append(course.score(found[at].config, reuse))
    return recalls, hits


def _sizes(config: PerceptronConfig) -> tuple[int, int]:
    return config.token_rows, config.pair_rows


def _bits(bits: int) -> str:
    return f"{bits / 1000:.0f}"


def _points(now: float, before: float) -> str:
    """Difference in percentage points."""
    difference = 100 * (now - before)
    return "" if abs(difference) < 0.005 else f"{difference:+.2f}"


def _cells(row: Row, base: Row, horizons: Sequence[int]) -> list[str]:
    cells = []
    for horizon in horizons:
        cells.append(_points(row.recall_at_k[horizon], base.recall_at_k[horizon]))
        cells.append(_points(row.recall_at_2k[horizon], base.recall_at_2k[horizon]))
    if base.reuse_hits is not None:
        reuse = row.reuse_hits
        cells.append("" if reuse is None else _points(reuse, base.reuse_hits))
    for now, before in (
        (row.weight_bits, base.weight_bits),
        (row.table_bits, base.table_bits),
    ):
        cells.append("" if now == before else f"{(now - before) / 1000:+.0f}")
    changed = [
        f"{name} {row.cycles[name] - cycles:+d}"
        for name, cycles in base.cycles.items()
        if row.cycles.get(name, cycles) != cycles
    ]
    return [*cells, ", ".join(changed)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _heading(result: Ablation) -> list[str]:
    return [
        "change",
        *(f"@{m}, h={h}" for h in result.horizons for m in ("k", "2k")),
        *(["reuse hits"] if result.rows[0].reuse_hits is not None else []),
        "weights, kbit",
        "tables, kbit",
        "words",
    ]


def render(results: Sequence[Ablation], *, command: str) -> str:
    """Tables in Markdown.

    Parameters
    ----------
    results : sequence of :class:`Ablation`
        Forms and models, each a section.
    command : :class:`str`
        What made them.
    """
    lines = ["```sh", command, "```", ""]
    for result in results:
        base = result.rows[0]
        names = ", ".join(Path(name).stem for name in result.traces)
        learned = "each after the others" if result.warm_others else "cold"
        lines += [
            f"## `{result.form}`, {result.model}",
            "",
            f"{result.layers} layers of {result.experts} experts, k = {result.top_k}. Mean over"
            f" {names}: {result.tokens} tokens, {learned}.",
            "",
        ]
        whole = ["as it is"]
        for horizon in result.horizons:
            whole += [f"{base.recall_at_k[horizon]:.4f}", f"{base.recall_at_2k[horizon]:.4f}"]
        if base.reuse_hits is not None:
            whole.append(f"{base.reuse_hits:.4f}")
        words = ", ".join(f"{name} {cycles}" for name, cycles in base.cycles.items())
        whole += [_bits(base.weight_bits), _bits(base.table_bits), words]
        lines += [*_table(_heading(result), [whole]), ""]
        for group, title in _GROUPS.items():
            rows = [row for row in result.rows if row.group == group]
            if rows:
                cells = [[row.change, *_cells(row, base, result.horizons)] for row in rows]
                lines += [f"### {title}", "", *_table(_heading(result), cells), ""]
    return "\n".join(lines[:-1]) + "\n"


def _horizons(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,3, not {text!r}") from None


def _form(text: str) -> str:
    try:
        perceptron_form(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prestage_sim.evaluate.ablation",
        description="Take forms of the perceptron predictor apart: what each feature, conjunction,"
        " head and table size does to recall, to bits of memory and to cycles of a prediction."
        " Traces of one shape are averaged.",
    )
    parser.add_argument(
        "traces", metavar="TRACE", nargs="+", help="routing traces: .npz, .jsonl or .csv"
    )
    parser.add_argument(
        "--warm-others",
        action="store_true",
        help="let each trace be preceded by the others of its shape",
    )
    parser.add_argument(
        "--first",
        type=int,
        metavar="N",
        help="only the first N tokens of each trace, those to learn before as well",
    )
    parser.add_argument(
        "--horizon",
        type=_horizons,
        default=(1,),
        metavar="H",
        help="layers ahead, as 1,3 (default: 1)",
    )
    parser.add_argument(
        "--form",
        type=_form,
        nargs="+",
        default=["full"],
        metavar="FORM",
        help=f"forms to take apart: {', '.join(FORMS)} (default: full)",
    )
    parser.add_argument(
        "--group",
        choices=list(_GROUPS),
        nargs="+",
        help="only these changes: of the heads, inside a head, of lists, of sizes",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of JSON objects")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="write the tables, or replace those between the page's markers",
    )
    parser.add_argument("--quiet", action="store_true", help="print no tables and no progress")
    return parser


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise OSError(f"{path} can't be written: it is a directory")
    if not path.parent.is_dir():
        raise OSError(f"{path} can't be written: there is no directory {path.parent}")


def _insert(path: Path, text: str) -> str:
    """The page with the tables between its markers, or a new one."""
    begin, end = MARKERS
    whole = f"{begin}\n\n{text}\n{end}"
    if not path.exists():
        return f"# Ablations\n\n{whole}\n"
    page = path.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(end) < page.index(begin):
        raise ValueError(f"{path} must have one line {begin} and one line {end} after it")
    return page[: page.index(begin)] + whole + page[page.index(end) + len(end) :]


def _ablate_all(args: argparse.Namespace, traces: Mapping[str, Trace]) -> list[Ablation]:
    from rich.console import Console
    from rich.progress import Progress

    shapes: dict[tuple[Any, ...], list[str]] = {}
    for path, trace in traces.items():
        shapes.setdefault((trace.model, *_shape(trace)), []).append(path)
    results = []
    console = Console(stderr=True)
    with Progress(console=console, disable=args.quiet or not console.is_terminal) as bar:
        for paths in shapes.values():
            for form in args.form:
                task = bar.add_task(f"{form}: {Path(paths[0]).stem}", total=None)

                def show(done: int, total: int, task: Any = task) -> None:
                    bar.update(task, completed=done, total=total)

                results.append(
                    ablate(
                        [traces[path] for path in paths],
                        form=form,
                        horizons=args.horizon,
                        warm_others=args.warm_others,
                        names=paths,
                        groups=args.group,
                        progress=show,
                    )
                )
                bar.remove_task(task)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of :class:`str` or None
        Its arguments; None stands for those of the process.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = f"python -m prestage_sim.evaluate.ablation {shlex.join(given)}"
    try:
        for path in (args.json, args.markdown):
            if path is not None:
                _check_writable(path)
        if args.markdown is not None:
            _insert(args.markdown, "")
        traces = {path: load_trace(path) for path in dict.fromkeys(args.traces)}
        if args.first is not None:
            traces = {path: trace.first(args.first) for path, trace in traces.items()}
        results = _ablate_all(args, traces)
        text = render(results, command=command)
        if not args.quiet:
            print(text, end="")
        if args.json is not None:
            objects = [result.as_object() for result in results]
            args.json.write_text(json.dumps(objects, indent=2) + "\n", encoding="utf-8")
        if args.markdown is not None:
            args.markdown.write_text(_insert(args.markdown, text), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
