"""The page of a comparison: what prefetching buys, in numbers and plots, in one file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from prestage_sim._svg import Plot, legend, ticks

from .cells import Outcome
from .events import Event, EventKind
from .gap import LEAST_GAP
from .machines import MachineFile
from .policies import POLICIES

__all__ = ["Timeline", "choose_timelines", "render"]

_WIDE, _HALF = 1080, 528

#: Colours of the page, which policies take in turn.
_COLOURS = 10

#: Prefetching can't help where the bound itself is so far from everything resident: the link is
#: the limit; nor where LRU is as close to it as this.
_LINK_BOUND, _WARM = 1.05, 1.01

#: Plots are logarithmic from such a time on.
_LOG_FROM = 3.0

#: What no device can do: not worth a timeline.
_NO_POLICIES = ("resident", "bound", "bound-analytic")

#: Rows of numbers from which on they are folded.
_MANY = 30


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Events of a stretch of tokens.

    Parameters
    ----------
    outcome : :class:`Outcome`
        The cell that was recorded.
    token : :class:`int`
        First step recorded, of the trace, a token where they go one by one; its layers are drawn.
    replayed : :class:`int`
        Steps replayed before the trace, which events count too.
    layers : :class:`int`
        Layers of the model.
    events : list of :class:`Event`
        What happened.
    """

    outcome: Outcome
    token: int
    replayed: int
    layers: int
    events: list[Event]


class _Figure(NamedTuple):
    title: str
    text: str
    svg: Markup
    key: Markup
    wide: bool


class _Table(NamedTuple):
    title: str
    heads: list[str]
    rows: list[list[str]]
    folded: bool


class _Section(NamedTuple):
    name: str
    subtitle: str
    tables: list[_Table]
    figures: list[_Figure]


def _figure(
    title: str, text: str, plot: Plot, entries: Iterable[tuple[str, str]], *, wide: bool = False
) -> _Figure:
    # Plots escape what they are given, and so may go into the page as they are.
    return _Figure(title, text, Markup(str(plot)), Markup(legend(entries)), wide)


class _Cells:
    """Outcomes of one trace on one machine."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = list(outcomes)
        self.policies = list(dict.fromkeys(o.result.policy for o in outcomes))
        self.rhos = sorted({o.result.rho for o in outcomes})
        self.residencies = sorted({o.result.residency for o in outcomes})
        self._at = {(o.result.policy, o.result.rho, o.result.residency): o for o in outcomes}

    def get(self, policy: str, rho: float, residency: float) -> Outcome | None:
        return self._at.get((policy, rho, residency))

    def time(self, policy: str, rho: float, residency: float) -> float | None:
        outcome = self.get(policy, rho, residency)
        return None if outcome is None else outcome.result.tpot

    def places(self) -> list[tuple[float, float]]:
        return [(rho, residency) for rho in self.rhos for residency in self.residencies]

    def middle(self) -> float:
        """The residency that plots of one residency show: the one nearest to a quarter."""
        return min(self.residencies, key=lambda r: abs(r - 0.25))


def _kinds(policies: Sequence[str]) -> dict[str, str]:
    """CSS class of each policy."""
    kinds = {"bound": "bound", "bound-analytic": "analytic", "resident": "ideal"}
    others = [policy for policy in policies if policy not in kinds]
    for at, policy in enumerate(others):
        kinds[policy] = f"s{at % _COLOURS}" + (" dashed" if at >= _COLOURS else "")
    return {policy: kinds[policy] for policy in policies}


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _times(cells: _Cells, rho: float, kinds: Mapping[str, str]) -> _Figure:
    shown = [p for p in cells.policies if p != "resident"]
    found = [t for p in shown for r in cells.residencies if (t := cells.time(p, rho, r))]
    top = max([*found, 1.1])
    logarithmic = top > _LOG_FROM

    def at(value: float) -> float:
        return math.log10(value) if logarithmic else value

    shares = [100 * r for r in cells.residencies]
    margin = max(2.0, (shares[-1] - shares[0]) / 20)
    left, right = max(0.0, shares[0] - margin), min(100.0, shares[-1] + margin)
    low = at(min([*found, 1.0]))
    pad = (at(top) - low) / 20
    plot = Plot(
        title=f"Time of a token over residency, rho {rho:.3g}",
        width=_HALF,
        height=320,
        x=(left, right),
        y=(low - pad, at(top) + pad),
        x_label="experts that fit in the slots, %",
        y_label="time of a token / resident",
    )
    shaded = _shade(plot, cells, rho, (left, right), (low - pad, at(top) + pad))
    plot.x_ticks(shares)
    if logarithmic:
        marks = [m for m in (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100) if m <= top * 1.05]
        plot.y_ticks([at(m) for m in marks], texts=[f"{m:g}" for m in marks])
    else:
        plot.y_ticks(ticks(1.0, top))
    for policy in shown:
        points = [(100 * r, at(t)) for r in cells.residencies if (t := cells.time(policy, rho, r))]
        plot.line([x for x, _ in points], [y for _, y in points], kinds[policy])
        for x, y in points:
            time = 10**y if logarithmic else y
            tip = f"{policy}, {x:g} % resident: {time:.3f}"
            plot.dot(x, y, kinds[policy], tip=tip)
    entries = [(kinds[p], p) for p in shown] + shaded
    return _figure(f"rho {rho:.3g}", "", plot, entries)


def _shade(
    plot: Plot, cells: _Cells, rho: float, x: tuple[float, float], y: tuple[float, float]
) -> list[tuple[str, str]]:
    """Shade residencies at which prefetching can't help; each reaches half-way to the next."""
    found = {}
    shares = [100 * r for r in cells.residencies]
    for at, residency in enumerate(cells.residencies):
        bound, lru = cells.time("bound", rho, residency), cells.time("lru", rho, residency)
        if lru is not None and lru <= _WARM:
            kind = "warm"
        elif bound is not None and bound > _LINK_BOUND:
            kind = "linkbound"
        else:
            continue
        left = x[0] if at == 0 else (shares[at - 1] + shares[at]) / 2
        right = x[1] if at == len(shares) - 1 else (shares[at] + shares[at + 1]) / 2
        plot.bar((left, right), y, kind)
        found[kind] = {
            "warm": "warm: LRU is within 1 % of resident",
            "linkbound": "link-bound: even the bound is above 1.05",
        }[kind]
    return list(found.items())


def _stacked(
    title: str,
    text: str,
    rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]],
    entries: Sequence[tuple[str, str]],
    *,
    label: str,
    ends: Mapping[str, tuple[float, float]] | None = None,
) -> _Figure:
    """Horizontal bars, one a policy, of parts with a kind, a length and a tip."""
    ends = ends or {}
    reach = max([sum(part[1] for part in parts) for _, parts in rows])
    most = max([reach, *(high for _, high in ends.values()), 1e-30]) * 1.04
    longest = max(len(name) for name, _ in rows)
    plot = Plot(
        title=title,
        width=_HALF,
        height=56 + 24 * len(rows),
        x=(0, most),
        y=(len(rows) - 0.4, -0.6),
        x_label=label,
        y_label="",
        left=20 + round(6.4 * longest),
    )
    plot.x_ticks(ticks(0, most, count=5))
    plot.y_ticks(list(range(len(rows))), texts=[name for name, _ in rows])
    for at, (name, parts) in enumerate(rows):
        start = 0.0
        for kind, length, tip in parts:
            if length > 0:
                plot.bar((start, start + length), (at - 0.34, at + 0.34), kind, tip=tip)
            start += length
        if name in ends:
            low, high = ends[name]
            plot.line([low, high], [at, at], "whisker")
    return _figure(title, text, plot, entries)


_TRAFFIC = (
    ("demand", "demanded"),
    ("useful", "prefetched in time"),
    ("late", "prefetched late"),
    ("useless", "useless"),
)


def _traffic(cells: _Cells, rho: float, residency: float) -> _Figure | None:
    rows = []
    for policy in cells.policies:
        outcome = cells.get(policy, rho, residency)
        if outcome is None or policy == "resident" or not outcome.counts.demands:
            continue
        c = outcome.counts
        unit = c.demands * c.tiles  # tiles of all that was demanded: k x L experts a token
        in_time = c.useful_tiles - c.late_tiles
        sizes = (c.demand_tiles, in_time, c.late_tiles, c.useless_tiles)
        parts = [
            (kind, size / unit, f"{policy}, {text}: {size / unit:.3f}")
            for (kind, text), size in zip(_TRAFFIC, sizes, strict=True)
        ]
        rows.append((policy, parts))
    if not rows:
        return None
    return _stacked(
        f"Traffic at rho {rho:.3g}",
        f"{100 * residency:g} % resident.",
        rows,
        _TRAFFIC,
        label="bytes of a token / k·L experts",
    )


_ENERGY = (
    ("compute", "compute, resident weights, idle power"),
    ("useful", "useful traffic"),
    ("useless", "wasted traffic"),
)


def _energies(cells: _Cells, rho: float, residency: float) -> _Figure | None:
    rows = []
    ends = {}
    for policy in cells.policies:
        outcome = cells.get(policy, rho, residency)
        energy = None if outcome is None else outcome.energy
        if energy is None:
            continue
        parts = [
            (
                kind,
                spread.typical,
                f"{policy}, {text}: {spread.typical:.3g} J ({spread.low:.3g} to {spread.high:.3g})",
            )
            for (kind, text), spread in zip(_ENERGY, energy, strict=True)
        ]
        rows.append((policy, parts))
        ends[policy] = (energy.total.low, energy.total.high)
    if not rows:
        return None
    return _stacked(
        f"Energy at rho {rho:.3g}",
        f"{100 * residency:g} % resident. Lines: least and greatest total that the sources allow.",
        rows,
        _ENERGY,
        label="joules of a token",
        ends=ends,
    )


def _summary(cells: _Cells) -> _Table | None:
    """What each policy makes of all cells, against LRU and the bound."""
    if "lru" not in cells.policies:
        return None
    rows = []
    for policy in cells.policies:
        if policy == "resident":
            continue
        ratios, gaps, bytes_ratios = [], [], []
        for rho, residency in cells.places():
            outcome, lru = cells.get(policy, rho, residency), cells.get("lru", rho, residency)
            if outcome is None or lru is None:
                continue
            ratios.append(outcome.result.tpot / lru.result.tpot)
            if lru.result.bytes_per_token:
                bytes_ratios.append(outcome.result.bytes_per_token / lru.result.bytes_per_token)
            bound = cells.time("bound", rho, residency)
            if bound is not None and lru.result.tpot - bound > LEAST_GAP:
                gap = (lru.result.tpot - outcome.result.tpot) / (lru.result.tpot - bound)
                gaps.append(gap)
        if not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        rows.append(
            [
                policy,
                f"{mean:.3f}",
                f"{min(ratios):.3f}",
                f"{max(ratios):.3f}",
                f"{sum(gaps) / len(gaps):.2f}" if gaps else "–",
                f"{sum(bytes_ratios) / len(bytes_ratios):.2f}" if bytes_ratios else "–",
            ]
        )
    return _Table(
        f"All {len(cells.places())} cells against LRU",
        ["Policy", "Time / LRU's", "Best", "Worst", "Gap to bound closed", "Bytes / LRU's"],
        rows,
        False,
    )


def _numbers(cells: _Cells) -> _Table:
    rows = []
    for rho, residency in cells.places():
        for policy in cells.policies:
            outcome = cells.get(policy, rho, residency)
            if outcome is None:
                continue
            r, energy = outcome.result, outcome.energy
            joules = "–"
            if energy is not None:
                total = energy.total
                joules = f"{total.typical:.3g} ({total.low:.2g}–{total.high:.2g})"
            rows.append(
                [
                    r.policy,
                    f"{r.rho:.3g}",
                    f"{100 * r.residency:g} %",
                    f"{r.tpot:.3f}",
                    _percent(r.hit_rate),
                    f"{r.bytes_per_token:.3f}",
                    _percent(r.recall),
                    _percent(r.precision),
                    "–" if r.overfetch is None else f"{r.overfetch:.2f} ×",
                    *(_percent(v) for v in (r.late, r.useless, r.polluting)),
                    joules,
                ]
            )
    heads = [
        "Policy",
        "rho",
        "Resident",
        "Time",
        "Hits",
        "Bytes",
        "Recall",
        "Precision",
        "Over-fetch",
        "Late",
        "Useless",
        "Polluting",
        "J/token",
    ]
    return _Table(f"All {len(rows)} results", heads, rows, len(rows) > _MANY)


def _section(name: str, outcomes: Sequence[Outcome]) -> _Section:
    cells = _Cells(outcomes)
    kinds = _kinds(cells.policies)
    first = outcomes[0]
    figures: list[_Figure | None] = [_times(cells, rho, kinds) for rho in cells.rhos]
    residency = cells.middle()
    figures += [_traffic(cells, rho, residency) for rho in cells.rhos]
    figures += [_energies(cells, rho, residency) for rho in cells.rhos]
    machine = first.cell.machine
    warm = len(first.cell.warm)
    subtitle = (
        f"{machine.name}: {_seconds(machine.layer_seconds)} a layer with all experts resident,"
        f" {100 * machine.alpha:.0f} % of it before its routing is known;"
        f" {first.counts.tokens:,} tokens count"
        + (f"; {warm} trace{'s' if warm > 1 else ''} replayed before" if warm else "")
    )
    tables = [table for table in (_summary(cells), _numbers(cells)) if table is not None]
    return _Section(name, subtitle, tables, [f for f in figures if f is not None])


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


_LANES = (
    ("attention", "attention and gate"),
    ("expert", "expert"),
    ("stall", "stall"),
    ("demand", "demanded tiles"),
    ("useful", "prefetched tiles"),
)


def _extent(timeline: Timeline) -> tuple[float, float]:
    """When the first layer of the token begins, and its last one ends."""
    token = timeline.replayed + timeline.token
    mine = [e for e in timeline.events if e.token == token and e.link < 0]
    bars = [e for e in mine if e.kind in (EventKind.ATTENTION, EventKind.COMPUTE, EventKind.STALL)]
    if not bars:
        return 0.0, 0.0
    return min(e.start for e in bars), max(e.end for e in bars)


def _timeline(timeline: Timeline, length: float) -> _Figure | None:
    """A row for each layer: what computes above, what the links bring for it below."""
    begin, last = _extent(timeline)
    if last <= begin:
        return None
    end, token = begin + length, timeline.replayed + timeline.token
    scale, unit = next(
        ((s, u) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if end - begin >= s),
        (1e-9, "ns"),
    )
    result = timeline.outcome.result
    step_name = "token" if timeline.outcome.cell.phases.plain else "step"
    layers = timeline.layers
    plot = Plot(
        title=f"Timeline of {step_name} {timeline.token}, {result.policy}",
        width=_WIDE,
        height=60 + 15 * layers,
        x=(0, (end - begin) / scale),
        y=(layers, 0),
        x_label=f"time, {unit}",
        y_label="layer",
        left=46,
    )
    plot.x_ticks(ticks(0, (end - begin) / scale, count=10))
    shown = range(0, layers, max(1, layers // 24))
    plot.y_ticks([n + 0.5 for n in shown], texts=[str(n) for n in shown])
    kinds = {
        EventKind.ATTENTION: "attention",
        EventKind.COMPUTE: "expert",
        EventKind.STALL: "stall",
        EventKind.DEMAND_TILE: "demand",
        EventKind.PREFETCH_TILE: "useful",
    }
    stalls_first = sorted(_joined(timeline.events), key=lambda e: e.kind != EventKind.STALL)
    for event in stalls_first:
        kind = kinds.get(EventKind(event.kind))
        start, stop = max(event.start, begin), min(event.end, last)
        if kind is None or stop <= start or (event.link < 0 and event.token != token):
            continue
        lane = (0.08, 0.48) if event.link < 0 else (0.52, 0.92)
        what = dict(_LANES)[kind]
        about = f" {event.expert}" if event.expert >= 0 else ""
        tip = (
            f"layer {event.layer}, {what}{about}, {step_name} {event.token - timeline.replayed}:"
            f" {(start - begin) / scale:.4g} to {(stop - begin) / scale:.4g} {unit}"
        )
        plot.bar(
            ((start - begin) / scale, (stop - begin) / scale),
            (event.layer + lane[0], event.layer + lane[1]),
            kind,
            tip=tip,
        )
    return _figure(
        f"Timeline of {step_name} {timeline.token:,} under {result.policy}",
        f"rho {result.rho:.3g}, {100 * result.residency:g} % resident. Upper half of a row: the"
        " layer computes or waits. Lower half: what the links bring for it, also for the next"
        f" {step_name}.",
        plot,
        _LANES,
        wide=True,
    )


def _joined(events: Iterable[Event]) -> list[Event]:
    """Events with the tiles of an expert that follow each other made one."""
    joined: list[Event] = []
    last: dict[int, int] = {}
    for event in events:
        if event.link >= 0:
            at = last.get(event.link)
            if at is not None:
                one = joined[at]
                same = (one.kind, one.token, one.layer, one.expert)
                near = event.start - one.end <= 1e-9 * max(abs(event.start), 1e-30)
                if same == (event.kind, event.token, event.layer, event.expert) and near:
                    joined[at] = one._replace(end=event.end)
                    continue
            last[event.link] = len(joined)
        joined.append(event)
    return joined


def choose_timelines(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The two cells whose timelines tell most: without prefetching, and with it, at one place.

    LRU and prestage if they are there; else what is best.

    Parameters
    ----------
    outcomes : sequence of :class:`Outcome`
        All that were simulated.
    """
    first = outcomes[0].result
    cells = _Cells(
        [
            outcome
            for outcome in outcomes
            if outcome.result.trace == first.trace and outcome.result.machine == first.machine
        ]
    )
    rho = min(cells.rhos, key=lambda r: abs(math.log(r / 4)))
    at_place = [cells.get(policy, rho, cells.middle()) for policy in cells.policies]
    found = [o for o in at_place if o is not None and o.result.policy not in _NO_POLICIES]
    plain = [o for o in found if not o.counts.issued]
    prefetching = [o for o in found if o.counts.issued]
    chosen = []
    for group, best in ((plain, "lru"), (prefetching, "prestage")):
        group.sort(key=lambda o: (o.result.policy != best, o.result.tpot))
        chosen += group[:1]
    return chosen or [o for o in at_place if o is not None][:1]


def render(
    outcomes: Sequence[Outcome],
    *,
    timelines: Sequence[Timeline] = (),
    machines: Sequence[MachineFile] = (),
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The whole page, as HTML that needs nothing from outside.

    Parameters
    ----------
    outcomes : sequence of :class:`Outcome`
        What to show, at least one; those of one trace on one machine make a section.
    timelines : sequence of :class:`Timeline`
        Tokens to draw layer by layer.
    machines : sequence of :class:`MachineFile`
        Machines whose figures and sources are listed.
    notes : sequence of :class:`str`
        Sentences for the head of the page.
    settings : mapping or None
        Names and values for the foot of the page.
    """
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        result, phases = outcome.result, str(outcome.cell.phases)
        groups.setdefault((result.trace, result.machine, phases), []).append(outcome)
    policies = list(dict.fromkeys(o.result.policy for o in outcomes))
    # All timelines have the same scale.
    length = max([end - begin for begin, end in map(_extent, timelines)], default=0.0)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("prestage_sim.simulate").joinpath("simulate.html.j2")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        title="What prefetching buys on "
        + ", ".join(dict.fromkeys(PurePath(trace).name for trace, _, _ in groups)),
        subtitle="Time of a token, relative to one with all experts resident, by how many experts"
        " fit in the slots. rho is the time to load all k experts of a layer over that of the"
        " layer.",
        notes=list(notes),
        sections=[
            _section(
                f"{PurePath(trace).name or trace} on {machine}" + (phases and f", {phases}"), group
            )
            for (trace, machine, phases), group in groups.items()
        ],
        timelines=[f for t in timelines if (f := _timeline(t, length)) is not None],
        cards=[(name, POLICIES[name].card) for name in policies if name in POLICIES],
        machines=[(machine.title, machine.name, machine.sources()) for machine in machines],
        colours=_COLOURS,
        settings=list((settings or {}).items()),
    )
