"""The page of a replay: numbers and plots in one file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import PurePath
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from prestage_hw.contract.registers import COUNTERS

from ._svg import Plot, legend, ticks
from .runs import METRICS, Run, layer_accuracy

__all__ = ["Transfer", "expert_transfers", "render"]

#: About so many layers fit in the timeline side by side.
_TIMELINE_LAYERS = 48
_WIDE, _HALF = 1080, 528


class Transfer(NamedTuple):
    """All bursts of one expert that followed each other."""

    start: int
    end: int
    layer: int
    expert: int
    kind: str  # "demand", "used" or "unused"
    size: int


def expert_transfers(run: Run, *, tokens: range) -> list[Transfer]:
    """Transfers that began while some tokens were replayed.

    A transfer for the layer that is being routed is a demand's. Any other is a prefetch, used if
    that layer's next choice has its expert.
    """
    config = run.config
    spans = run.spans
    layers = config.model.layers
    begun = spans[tokens.start, 0, 0]
    following = tokens.stop < len(spans)
    ended = spans[tokens.stop, 0, 0] if following else np.iinfo(np.uint64).max
    bursts = run.transfers
    chosen = bursts[(bursts["start"] >= begun) & (bursts["start"] < ended)]
    order = np.argsort(chosen["start"], kind="stable")
    routes = spans[tokens.start : tokens.stop, :, 0].ravel()
    found: list[Transfer] = []
    last: tuple[int, int] | None = None
    for burst in chosen[order]:
        start, end = int(burst["start"]), int(burst["end"])
        layer, expert = config.expert_at(int(burst["address"]))
        size = int(burst["bytes"])
        at = int(np.searchsorted(routes, start, side="right")) - 1
        token, current = divmod(at, layers)
        token += tokens.start
        if last == (layer, expert) and found[-1].size < config.layer_sizes[layer]:
            before = found[-1]
            found[-1] = before._replace(end=max(end, before.end), size=before.size + size)
            continue
        last = (layer, expert)
        if layer == current:
            kind = "demand"
        else:
            when = token if layer > current else token + 1
            rows = run.trace.experts
            used = when < len(rows) and expert in rows[when, min(layer, layers - 1)]
            kind = "used" if used else "unused"
        found.append(Transfer(start, end, layer, expert, kind, size))
    return found


def _timeline(run: Run) -> tuple[Plot, str] | None:
    layers = run.config.model.layers
    if not len(run.spans) or not len(run.transfers):
        return None
    count = min(len(run.spans), max(1, _TIMELINE_LAYERS // layers))
    tokens = range(len(run.spans) - count, len(run.spans))
    spans = run.spans[tokens.start : tokens.stop].astype(np.int64)
    transfers = expert_transfers(run, tokens=tokens)
    zero = int(spans[0, 0, 0])
    last = max([int(spans[-1, -1, 1]), *(t.end for t in transfers)])
    plot = Plot(
        title="Timeline of transfers against layers",
        width=_WIDE,
        height=64 + (26 if layers <= 8 else 16) * min(layers, 36),
        x=(0, last - zero),
        y=(layers - 0.5, -0.5),
        x_label="clock cycles",
        y_label="layer",
        top=24,
    )
    plot.x_ticks(ticks(0, last - zero, count=8))
    step = max(1, layers // 12)
    plot.y_ticks(list(range(0, layers, step)))
    for at, token in enumerate(tokens):
        plot.vertical(int(spans[at, 0, 0]) - zero, "token", text=f"token {token}")
        for layer in range(layers):
            start, end = (int(c) - zero for c in spans[at, layer])
            plot.bar(
                (start, end),
                (layer - 0.46, layer + 0.46),
                "span",
                tip=f"layer {layer}: routed at {start:,}, ready after {end - start:,} cycles",
            )
    names = {"demand": "demand", "used": "prefetch, used", "unused": "prefetch, not used"}
    for t in transfers:
        plot.bar(
            (t.start - zero, t.end - zero),
            (t.layer - 0.32, t.layer + 0.32),
            t.kind,
            tip=f"{names[t.kind]}: layer {t.layer}, expert {t.expert},"
            f" {t.start - zero:,} to {t.end - zero:,}",
        )
    wait = "route to last ready" if run.pace == "timed" else "route to idle"
    key = legend([("span", wait), *((kind, f"transfer: {n}") for kind, n in names.items())])
    return plot, key


def _demands(run: Run) -> tuple[Plot, str] | None:
    s = run.samples
    if len(s) < 2:
        return None
    steps = {name: np.diff(s[name].astype(np.int64)) for name in s.dtype.names or ()}
    whole = np.maximum(steps["demands"], 1)
    ahead = np.clip(steps["useful"] - steps["late"], 0, steps["hits"])
    parts = [
        ("kept", "hit, kept from before", steps["hits"] - ahead),
        ("used", "hit, prefetched", ahead),
        ("late", "late: still in flight", steps["late"] + steps["merged"]),
        ("demand", "miss", steps["misses"]),
    ]
    edges = s["token"].astype(int)
    plot = Plot(
        title="What demands found, over tokens",
        width=_WIDE,
        height=250,
        x=(0, int(edges[-1])),
        y=(0, 100),
        x_label="tokens",
        y_label="demands, %",
    )
    plot.x_ticks(ticks(0, int(edges[-1]), count=8))
    plot.y_ticks([0, 25, 50, 75, 100])
    xs = np.repeat(edges, 2)[1:-1].tolist()
    low = np.zeros(len(xs))
    for kind, _, counts in parts:
        high = low + np.repeat(100 * counts / whole, 2)
        plot.area(xs, low.tolist(), high.tolist(), kind)
        low = high
    return plot, legend([(kind, text) for kind, text, _ in parts])


def _bytes_by_class(run: Run) -> tuple[Plot, str] | None:
    c = run.counters
    # Of experts of different sizes the mean: which of them were used is not counted.
    size = round(sum(run.config.layer_sizes) / run.config.model.layers)
    if not c or not c["demand_bytes"] + c["prefetch_bytes"]:
        return None
    used = min(c["useful"] * size, c["prefetch_bytes"])
    unused = min(c["useless"] * size, c["prefetch_bytes"] - used)
    parts = [
        ("demand", "demand", c["demand_bytes"]),
        ("used", "prefetch, used", used),
        ("unused", "prefetch, evicted unused", unused),
        ("rest", "prefetch, still waiting", c["prefetch_bytes"] - used - unused),
    ]
    most = max(n for _, _, n in parts)
    scale, unit = next((s, u) for s, u in _UNITS if most >= s)
    plot = Plot(
        title="Bytes by class",
        width=_HALF,
        height=250,
        x=(-0.5, 3.5),
        y=(0, most / scale * 1.08),
        x_label="",
        y_label=unit,
    )
    plot.y_ticks(ticks(0, most / scale * 1.08))
    plot.x_ticks([0, 1, 2, 3], texts=["demand", "used", "evicted unused", "waiting"])
    for at, (kind, text, count) in enumerate(parts):
        tip = f"{text}: {count:,} bytes"
        plot.bar((at - 0.36, at + 0.36), (0, count / scale), kind, tip=tip)
    return plot, ""


def _candidates(run: Run) -> tuple[Plot, str] | None:
    c = run.counters
    if not c or not c["candidates"] + c["hints"]:
        return None
    waiting = c["prefetch_issued"] - c["useful"] - c["useless"]
    parts = [
        ("used", "fetched, used", c["useful"]),
        ("unused", "fetched, evicted unused", c["useless"]),
        ("rest", "fetched, waiting", max(waiting, 0)),
        ("kept", "resident already", c["prefetch_redundant"]),
        ("late", "too late", c["prefetch_stale"]),
        ("demand", "no slot", c["prefetch_no_slot"] + c["prefetch_overflow"]),
    ]
    most = max(max(n for _, _, n in parts), 1) * 1.08
    plot = Plot(
        title="What became of candidates",
        width=_HALF,
        height=250,
        x=(0, most),
        y=(len(parts) - 0.5, -0.5),
        x_label="experts",
        y_label="",
        left=160,
    )
    plot.x_ticks(ticks(0, most, count=4))
    plot.y_ticks(list(range(len(parts))), texts=[text for _, text, _ in parts])
    for at, (kind, text, count) in enumerate(parts):
        if count:
            plot.bar((0, count), (at - 0.34, at + 0.34), kind, tip=f"{text}: {count:,}")
    return plot, ""


_UNITS = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes")]


def _accuracy(run: Run) -> tuple[tuple[Plot, str], tuple[Plot, str]] | None:
    if run.config.predictor == "none" or not run.layers:
        return None
    accuracy = layer_accuracy(run)
    layers = [n for n in range(run.config.model.layers) if accuracy.demands[n]]
    if not layers:
        return None
    demands = accuracy.demands[layers]
    recall = 100 * accuracy.correct[layers] / demands
    precision = 100 * accuracy.correct[layers] / np.maximum(accuracy.candidates[layers], 1)
    over_fetch = accuracy.candidates[layers] / demands
    marks = _layer_marks(run.config.model.layers)
    plot = Plot(
        title="Recall and precision by layer",
        width=_HALF,
        height=250,
        x=(-0.5, run.config.model.layers - 0.5),
        y=(0, 100),
        x_label="layer",
        y_label="%",
    )
    plot.x_ticks(marks)
    plot.y_ticks([0, 25, 50, 75, 100])
    for kind, values in (("recall", recall), ("precision", precision)):
        plot.line(layers, values.tolist(), kind)
        for layer, value in zip(layers, values.tolist(), strict=True):
            plot.dot(layer, value, kind, tip=f"layer {layer}: {kind} {value:.1f} %")
    most = float(max(over_fetch.max(), 1)) * 1.08
    second = Plot(
        title="Over-fetch by layer",
        width=_HALF,
        height=250,
        x=(-0.5, run.config.model.layers - 0.5),
        y=(0, most),
        x_label="layer",
        y_label="proposed / chosen",
    )
    second.x_ticks(marks)
    second.y_ticks(ticks(0, most))
    for layer, value in zip(layers, over_fetch.tolist(), strict=True):
        tip = f"layer {layer}: {value:.2f} proposed for each chosen"
        second.bar((layer - 0.4, layer + 0.4), (0, value), "precision", tip=tip)
    keys = legend([("recall", "recall"), ("precision", "precision")])
    return (plot, keys), (second, legend([("precision", "over-fetch")]))


def _layer_marks(layers: int) -> list[float]:
    return list(range(0, layers, max(1, layers // 12)))


def _waits(run: Run) -> tuple[Plot, str] | None:
    stalls = run.stalls()
    if not stalls.size:
        return None
    low, middle, high = np.percentile(stalls, [5, 50, 95], axis=0)
    most = float(high.max()) * 1.08 or 1.0
    layers = run.config.model.layers
    plot = Plot(
        title="Cycles a layer waits",
        width=_WIDE,
        height=230,
        x=(-0.5, layers - 0.5),
        y=(0, most),
        x_label="layer",
        y_label="clock cycles",
    )
    plot.x_ticks(_layer_marks(layers))
    plot.y_ticks(ticks(0, most))
    half = 3 * layers / _WIDE  # 3 pixels
    for layer in range(layers):
        tip = (
            f"layer {layer}: median {middle[layer]:,.0f},"
            f" 5 % {low[layer]:,.0f}, 95 % {high[layer]:,.0f} cycles"
        )
        plot.bar((layer - half, layer + half), (low[layer], high[layer]), "unused", tip=tip)
        plot.dot(layer, middle[layer], "kept", tip=tip)
    return plot, legend([("kept", "median"), ("unused", "5 % to 95 %")])


def _usage(run: Run) -> tuple[Plot, str]:
    model = run.config.model
    rows = run.trace.experts[: max(run.tokens, 1)]
    counts: NDArray[np.int64] = np.stack(
        [np.bincount(rows[:, n].ravel(), minlength=model.experts) for n in range(model.layers)]
    )
    share = counts / counts.sum(axis=1, keepdims=True) * model.top_k
    plot = Plot(
        title="How often each expert was chosen",
        width=_WIDE,
        height=min(560, 70 + max(8, 320 // model.layers) * model.layers),
        x=(-0.5, model.experts - 0.5),
        y=(model.layers - 0.5, -0.5),
        x_label="expert",
        y_label="layer",
    )
    plot.x_ticks(list(range(0, model.experts, max(1, model.experts // 16))))
    plot.y_ticks(_layer_marks(model.layers))
    top = max(float(share.max()), 1e-9)
    for layer in range(model.layers):
        for expert in range(model.experts):
            part = float(share[layer, expert])
            if part == 0:
                continue
            level = min(9, int(10 * (part / top) ** 0.5))
            tip = f"layer {layer}, expert {expert}: {100 * part:.1f} % of tokens"
            plot.bar(
                (expert - 0.48, expert + 0.48), (layer - 0.48, layer + 0.48), f"h{level}", tip=tip
            )
    key = legend([("h0", "hardly ever"), ("h5", f"{25 * top:.0f} %"), ("h9", f"{100 * top:.0f} %")])
    return plot, key


class _Figure(NamedTuple):
    title: str
    text: str
    svg: Markup
    key: Markup
    wide: bool


def _figure(title: str, text: str, drawn: tuple[Plot, str], *, wide: bool = False) -> _Figure:
    plot, key = drawn
    # Plots escape what they are given, and so may go into the page as they are.
    return _Figure(title, text, Markup(str(plot)), Markup(key), wide)


def _figures(run: Run) -> Iterable[_Figure]:
    timeline = _timeline(run)
    if timeline is not None:
        yield _figure(
            "Transfers against layers",
            "The last tokens. A row is a layer; a bar is an expert on its way into its slot.",
            timeline,
            wide=True,
        )
    demands = _demands(run)
    if demands is not None:
        yield _figure(
            "What demands found", "Shares of all demands, over tokens.", demands, wide=True
        )
    sent = _bytes_by_class(run)
    if sent is not None:
        yield _figure("Bytes moved", "From memory to slots, by what became of them.", sent)
    candidates = _candidates(run)
    if candidates is not None:
        yield _figure("Candidates", "What became of the experts that were proposed.", candidates)
    accuracy = _accuracy(run)
    if accuracy is not None:
        yield _figure(
            "Recall and precision", "By layer, of what the predictor proposed.", accuracy[0]
        )
        yield _figure("Over-fetch", "By layer: proposed experts for each chosen one.", accuracy[1])
    waits = _waits(run)
    if waits is not None:
        what = (
            "route to last ready" if run.pace == "timed" else "route to idle, prefetches included"
        )
        yield _figure("Cycles a layer takes", f"From {what}.", waits, wide=True)
    yield _figure(
        "Routing",
        "How often each expert was chosen in the replayed tokens.",
        _usage(run),
        wide=True,
    )


def _percent(value: float | int | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _size(count: float) -> str:
    scale, unit = next(((s, u) for s, u in _UNITS if count >= s), _UNITS[-1])
    return f"{count / scale:,.1f} {unit}" if scale > 1 else f"{count:,.0f} {unit}"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    m, c = run.metrics(), run.counters
    over = m["over_fetch"]
    tiles = [
        ("Recall", _percent(m["recall"]), METRICS["recall"]),
        ("Over-fetch", "–" if over is None else f"{over:.2f} ×", METRICS["over_fetch"]),
        ("Precision", _percent(m["precision"]), METRICS["precision"]),
        ("Coverage", _percent(m["coverage"]), METRICS["coverage"]),
        ("Hit rate", _percent(m["hit_rate"]), METRICS["hit_rate"]),
    ]
    if c:
        tiles += [
            ("Late", f"{c['late']:,}", "Demands that found their expert in flight as a prefetch."),
            ("Useless", f"{c['useless']:,}", "Prefetched experts evicted without a demand."),
            ("Moved", _size(c["demand_bytes"] + c["prefetch_bytes"]), METRICS["bytes_moved"]),
        ]
    if run.cycles:
        rate = f"{run.cycles / run.seconds:,.0f} a second" if run.seconds else ""
        tiles.append(("Cycles", f"{run.cycles:,}", rate))
    if run.pace == "timed":
        stall = run.stall_summary()
        tiles.append(
            ("Stalled", f"{stall['stall_cycles']:,}", f"cycles, {stall['stall_mean']:,} a layer")
        )
    tiles.append(
        ("Checked", _size(run.bytes_checked), f"{run.experts_checked:,} experts, each byte right")
    )
    return tiles


def _settings(run: Run, trace_path: str) -> Sequence[tuple[str, Any]]:
    config = asdict(run.config)
    model = config.pop("model")
    pace = run.pace if run.pace == "drained" else f"timed, {run.layer_cycles:,} cycles a layer"
    return [
        ("trace", PurePath(trace_path).name or "–"),
        ("device", run.url),
        ("pace", pace),
        ("prefetch tiles at once", run.prefetch_tiles),
        ("eviction", run.policy),
        ("throttle", "on" if run.throttle else "off"),
        ("budget", f"{run.budget} eighths in time" if run.budget else "off"),
        ("rescan", f"{run.rescan} layers" if run.rescan else "off"),
        ("profiled before", "yes" if run.tables else "no"),
        ("wall time", f"{run.seconds:.1f} s"),
        *((f"model {name}".replace("_", " "), value) for name, value in model.items()),
        *((name.replace("_", " "), value) for name, value in config.items()),
        *((f"version of {name}".replace("_", " "), value) for name, value in run.versions.items()),
    ]


def render(run: Run, *, trace_path: str = "") -> str:
    """The whole page, as HTML that needs nothing from outside."""
    model = run.config.model
    if run.complete:
        state, text = "good", f"Complete: {run.tokens:,} tokens, every byte as in memory."
    elif run.error:
        state, text = "bad", f"Failed after {run.tokens:,} tokens: {run.error}"
    else:
        state = "partial"
        text = f"Interrupted after {run.tokens:,} of {run.trace.tokens:,} tokens."
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("prestage_sim").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        name=PurePath(trace_path).name or run.trace.model,
        subtitle=f"{model.name}: {model.layers} layers × {model.experts} experts, top {model.top_k}"
        f", predictor {run.config.predictor}, {run.config.slots:,} slots, {run.url}",
        state=state,
        text=text,
        tiles=_tiles(run),
        figures=list(_figures(run)),
        clockless=not run.cycles,
        counters=[
            (counter.stage, counter.name, run.counters[counter.name], counter.description)
            for counter in COUNTERS
            if counter.name in run.counters
        ],
        prefetches=run.prefetch_rows(),
        settings=_settings(run, trace_path),
    )
