"""The page of an evaluation: numbers and plots in one file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from prestage_sim._svg import Plot, legend, ticks

from .metrics import cut_offs
from .run import Evaluation

__all__ = ["render"]

_WIDE, _HALF = 1080, 528

#: Colours of the page, which series take in turn.
_COLOURS = 10

#: Recall is drawn up to so many times k.
_FARTHEST_CUT = 4


class _Series(NamedTuple):
    kind: str
    name: str
    result: Evaluation


class _Figure(NamedTuple):
    title: str
    text: str
    svg: Markup
    key: Markup
    wide: bool


class _Section(NamedTuple):
    name: str
    subtitle: str
    rows: list[list[str]]
    figures: list[_Figure]


def _figure(
    title: str, text: str, plot: Plot, series: Sequence[_Series], *, wide: bool = False
) -> _Figure:
    # Plots escape what they are given, and so may go into the page as they are.
    key = legend((one.kind, one.name) for one in series)
    return _Figure(title, text, Markup(str(plot)), Markup(key), wide)


def _percent_axis(plot: Plot) -> None:
    plot.y_ticks([0, 25, 50, 75, 100])


def _cuts(series: Sequence[_Series]) -> _Figure:
    first = series[0].result
    most = min(first.experts, _FARTHEST_CUT * first.top_k)
    right = most / first.top_k
    plot = Plot(
        title="Recall over experts taken",
        width=_HALF,
        height=300,
        x=(0, right),
        y=(0, 100),
        x_label="experts taken / k",
        y_label="recall, %",
    )
    plot.x_ticks(ticks(0, right, count=8))
    _percent_axis(plot)
    for one in series:
        r = one.result
        xs = [m / r.top_k for m in range(most + 1)]
        plot.line(xs, [0.0, *(100 * v for v in r.recall_at[:most])], one.kind)
        for m in sorted(set(cut_offs(top_k=r.top_k, experts=r.experts))):
            if m <= most:
                tip = f"{one.name}: recall@{m} {_percent(r.recall_at[m - 1])}"
                plot.dot(m / r.top_k, 100 * r.recall_at[m - 1], one.kind, tip=tip)
        if 0 < r.over_fetch <= right:
            size = right / 100
            plot.bar(
                (r.over_fetch - size, r.over_fetch + size),
                (100 * r.own_recall - 1.4, 100 * r.own_recall + 1.4),
                one.kind,
                tip=f"{one.name}, own stopping rule: recall {_percent(r.own_recall)} at over-fetch"
                f" {r.over_fetch:.2f}",
            )
    return _figure(
        "Recall",
        "Share of the true experts among the best ranked. Squares: the predictor's own stopping"
        " rule.",
        plot,
        series,
    )


def _reliability(series: Sequence[_Series]) -> _Figure | None:
    calibrated = [one for one in series if one.result.reliability is not None]
    if not calibrated:
        return None
    plot = Plot(
        title="Predicted and observed probability",
        width=_HALF,
        height=300,
        x=(0, 1),
        y=(0, 1),
        x_label="predicted",
        y_label="observed",
    )
    marks = [0, 0.25, 0.5, 0.75, 1]
    plot.x_ticks(marks)
    plot.y_ticks(marks)
    plot.line([0, 1], [0, 1], "ideal")
    for one in calibrated:
        rows = [row for row in one.result.reliability or () if row["count"]]
        plot.line([r["predicted"] for r in rows], [r["observed"] for r in rows], one.kind)
        for row in rows:
            tip = (
                f"{one.name}: predicted {row['predicted']:.3f}, observed {row['observed']:.3f},"
                f" {row['count']:,} predictions"
            )
            plot.dot(row["predicted"], row["observed"], one.kind, tip=tip)
    return _figure(
        "Calibration",
        "How often experts of a predicted probability came, over all experts.",
        plot,
        calibrated,
    )


def _by_layer(series: Sequence[_Series]) -> _Figure:
    layers = series[0].result.layers
    plot = Plot(
        title="Recall@k by layer",
        width=_WIDE,
        height=260,
        x=(-0.5, layers - 0.5),
        y=(0, 100),
        x_label="layer",
        y_label="recall@k, %",
    )
    plot.x_ticks(list(range(0, layers, max(1, layers // 12))))
    _percent_axis(plot)
    for one in series:
        rows = one.result.by_layer
        plot.line([r["layer"] for r in rows], [100 * r["recall_at_k"] for r in rows], one.kind)
        for row in rows:
            tip = f"{one.name}, layer {row['layer']}: recall@k {_percent(row['recall_at_k'])}"
            plot.dot(row["layer"], 100 * row["recall_at_k"], one.kind, tip=tip)
    return _figure("By layer", "Recall@k of each layer.", plot, series, wide=True)


def _cold_start(series: Sequence[_Series]) -> _Figure:
    blocks = series[0].result.cold_start
    last = series[0].result.tokens
    low, high = math.log10(max(1.0, blocks[0]["tokens"] / 2)), math.log10(max(2, last))
    plot = Plot(
        title="Recall@k over tokens",
        width=_WIDE,
        height=260,
        x=(low, high),
        y=(0, 100),
        x_label="tokens learned of this trace",
        y_label="recall@k, %",
    )
    powers = range(math.ceil(low), int(high) + 1)
    plot.x_ticks(list(powers), texts=[f"{10**power:,}" for power in powers])
    _percent_axis(plot)
    for one in series:
        rows = one.result.cold_start
        # A block stands where its middle token does.
        xs = [math.log10(max(1.0, r["first"] + r["tokens"] / 2)) for r in rows]
        plot.line(xs, [100 * r["recall_at_k"] for r in rows], one.kind)
        for x, row in zip(xs, rows, strict=True):
            tip = (
                f"{one.name}, tokens {row['first']:,} to {row['first'] + row['tokens'] - 1:,}:"
                f" recall@k {_percent(row['recall_at_k'])}"
            )
            plot.dot(x, 100 * row["recall_at_k"], one.kind, tip=tip)
    return _figure(
        "Cold start", "Recall@k of blocks of tokens, ever wider.", plot, series, wide=True
    )


def _misses(series: Sequence[_Series], *, key: str, cut: str) -> _Figure | None:
    caches = series[0].result.miss_recall
    if not caches:
        return None
    plot = Plot(
        title=f"Recall@{cut} of misses",
        width=_HALF,
        height=260,
        x=(-0.5, len(caches) - 0.5),
        y=(0, 100),
        x_label="experts that the cache holds",
        y_label=f"recall@{cut} of misses, %",
    )
    plot.x_ticks(list(range(len(caches))), texts=[f"{100 * c['residency']:g} %" for c in caches])
    _percent_axis(plot)
    width = 0.84 / len(series)
    for number, one in enumerate(series):
        for at, row in enumerate(one.result.miss_recall):
            if row[key] is None:
                continue
            left = at - 0.42 + number * width
            tip = (
                f"{one.name}, {row['slots']:,} slots: recall@{cut} {_percent(row[key])} of"
                f" {row['misses']:,} misses"
            )
            plot.bar((left, left + 0.9 * width), (0, 100 * row[key]), one.kind, tip=tip)
    return _figure(
        f"Misses, recall@{cut}",
        "True experts that an LRU cache over all layers doesn't hold.",
        plot,
        series,
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _row(result: Evaluation) -> list[str]:
    return [
        result.predictor,
        str(result.horizon),
        *(
            _percent(value)
            for value in (
                result.recall_at_k,
                result.recall_at_1_5k,
                result.recall_at_2k,
                result.recall_at_3k,
                result.own_recall,
                result.own_precision,
            )
        ),
        f"{result.over_fetch:.2f} ×",
        "–" if result.ece is None else f"{result.ece:.4f}",
        "–" if result.ece_proposed is None else f"{result.ece_proposed:.4f}",
        f"{result.token_layers_per_second:,.0f}",
    ]


def _section(path: str, results: Sequence[Evaluation]) -> _Section:
    first = results[0]
    several = len({r.horizon for r in results}) > 1
    series = [
        _Series(
            f"s{at % _COLOURS}",
            f"{r.predictor}, {r.horizon} ahead" if several else r.predictor,
            r,
        )
        for at, r in enumerate(results)
    ]
    figures: list[_Figure | None] = [
        _cuts(series),
        _reliability(series),
        _misses(series, key="recall_at_k", cut="k"),
        _misses(series, key="recall_at_2k", cut="2k"),
        _by_layer(series),
        _cold_start(series),
    ]
    subtitle = (
        f"{first.model}: {first.layers} layers × {first.experts} experts, top {first.top_k};"
        f" {first.tokens:,} tokens in {first.requests:,} requests"
    )
    if first.warm:
        names = ", ".join(PurePath(name).name or name for name in first.warm)
        subtitle += f"; learned before: {names} ({first.warm_tokens:,} tokens)"
    return _Section(
        name=PurePath(path).name or path,
        subtitle=subtitle,
        rows=[_row(r) for r in results],
        figures=[figure for figure in figures if figure is not None],
    )


def _sections(results: Iterable[Evaluation]) -> list[_Section]:
    by_trace: dict[str, list[Evaluation]] = {}
    for result in results:
        by_trace.setdefault(result.trace, []).append(result)
    return [_section(path, group) for path, group in by_trace.items()]


def render(
    results: Sequence[Evaluation],
    *,
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The whole page, as HTML that needs nothing from outside.

    Parameters
    ----------
    results : sequence of :class:`Evaluation`
        What to show, at least one; results of one trace make a section.
    notes : sequence of :class:`str`
        Sentences for the head of the page.
    settings : mapping or None
        Names and values for the foot of the page.
    """
    names = list(dict.fromkeys(r.predictor for r in results))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("prestage_sim.evaluate").joinpath("evaluate.html.j2")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        title="Predictors on " + ", ".join(dict.fromkeys(PurePath(r.trace).name for r in results)),
        subtitle=", ".join(names),
        notes=list(notes),
        heads=[
            ("Predictor", False),
            ("Layers ahead", True),
            *((f"Recall@{cut}", True) for cut in ("k", "1.5k", "2k", "3k")),
            ("Own recall", True),
            ("Own precision", True),
            ("Over-fetch", True),
            ("ECE", True),
            ("ECE, proposed", True),
            ("Token-layers/s", True),
        ],
        sections=_sections(results),
        colours=_COLOURS,
        settings=list((settings or {}).items()),
    )
