"""On-demand miss rates of the expert buffer's replacement policies.

``python -m prestage_sim.evaluate.eviction TRACE...`` replays traces without any prefetch through a
buffer of a given share of all experts, one context, and counts the misses of the last half of each
trace. The arithmetic of the keep value is that of the buffer's golden model
(:mod:`prestage_sim.model.buffer.values`); the predictor's values come from its golden heads.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.perceptron import FORMS, perceptron_form
from prestage_sim.traces import Trace, load_trace, model_config

from .._jit import compiled
from ..model.buffer.values import DECAYS, discounts, keep_value, rate_after_use, use_rate
from ..model.predictor.perceptron import TraceRunner

__all__ = ["RESIDENCIES", "SEARCHES", "Row", "Search", "Values", "evaluate", "main", "render"]

#: Shares of all experts that fit in the buffer.
RESIDENCIES = (0.10, 0.25, 0.40, 0.60)

_LRU, _LFU, _KEEP, _LAYER_LRU, _BELADY = range(5)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a victim is looked for.

    Parameters
    ----------
    name : :class:`str`
        Name in tables.
    samples : :class:`int`
        Slots that a search looks at, beside those it remembers; 0 stands for all.
    remembered : :class:`int`
        Slots of least value that a search leaves to the next one.
    random : :class:`bool`
        Whether samples are drawn by an LFSR; else a pointer goes round.
    """

    name: str
    samples: int = 0
    remembered: int = 0
    random: bool = False


SEARCHES = (
    Search(name="all slots"),
    *(
        Search(name=f"{n} by pointer, {m} remembered", samples=n, remembered=m)
        for n in (8, 16, 32, 64)
        for m in (0, 1, 4)
    ),
    Search(name="32 by LFSR", samples=32, random=True),
    Search(name="32 by LFSR, 4 remembered", samples=32, remembered=4, random=True),
)

#: The search of the hardware.
CHOSEN = Search(name="32 by pointer, 1 remembered", samples=32, remembered=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """What a predictor says of every expert in the course of a trace.

    Parameters
    ----------
    horizons : array of :class:`int`, ``[H]``
        Layers ahead of each row of ``chances``; the first is 0, token start.
    chances : array of :class:`int`, ``[H, T, L, E]``
        V: chance in 1/256 that the expert is chosen.
    reuse : array of :class:`int`, ``[T, L, E]``
        R: reuse value in 1/256 after the layer was routed.
    given : :class:`bool`
        Whether the buffer gets them; else it knows of use rates alone.
    """

    horizons: NDArray[np.int64]
    chances: NDArray[np.int16]
    reuse: NDArray[np.int16]
    given: bool = True

    @classmethod
    def none(cls, trace: Trace) -> Values:
        """No values at all, as with a predictor that has none."""
        shape = (trace.tokens, trace.layers, trace.experts_per_layer)
        nothing = np.zeros(shape, np.int16)
        return cls(
            horizons=np.zeros(1, np.int64), chances=nothing[None], reuse=nothing, given=False
        )

    @classmethod
    def of(cls, trace: Trace, form: str) -> Values:
        """Values of a form of the perceptron predictor that learns online from the trace."""
        model = model_config(trace)
        config = DeviceConfig(
            model=model,
            slots=model.top_k,
            expert_bytes=512,
            predictor="perceptron",
            perceptron=perceptron_form(form),
        )
        assert config.perceptron is not None
        found, reuse = TraceRunner(config).run_all(trace.experts, trace.token)
        horizons = sorted(found)
        return cls(
            horizons=np.array(horizons, np.int64),
            chances=np.stack([found[horizon] for horizon in horizons]),
            reuse=reuse,
        )


@compiled
def _next_uses(chosen: Any, experts: int) -> Any:
    """Number of the demand that wants the same expert next, for each demand."""
    tokens, layers, k = chosen.shape
    following = np.full((layers, experts), np.int64(1) << 40, np.int64)
    out = np.empty((tokens, layers, k), np.int64)
    for t in range(tokens - 1, -1, -1):
        for m in range(layers - 1, -1, -1):
            for i in range(k):
                e = chosen[t, m, i]
                out[t, m, i] = following[m, e]
            for i in range(k):
                following[m, chosen[t, m, i]] = (t * layers + m) * k + i
    return out


@compiled
def _misses(
    chosen: Any,
    uses: Any,
    horizons: Any,
    chances: Any,
    reuse: Any,
    given: bool,
    first: int,
    slots: int,
    policy: int,
    samples: int,
    remembered: int,
    random: bool,
    discount: Any,
    decay: Any,
) -> Any:
    """Demands and misses from token ``first`` on."""
    tokens, layers, k = chosen.shape
    experts = chances.shape[3]
    v = np.zeros((layers, experts), np.int64)
    r = np.zeros((layers, experts), np.int64)
    visited = np.zeros(layers, np.bool_)
    rate = np.zeros((layers, experts), np.int64)
    stamp = np.zeros((layers, experts), np.int64)
    place = np.full((layers, experts), -1, np.int64)
    layer_of = np.full(slots, -1, np.int64)
    expert_of = np.zeros(slots, np.int64)
    pinned = np.zeros(slots, np.bool_)
    last = np.zeros(slots, np.int64)
    following = np.zeros(slots, np.int64)
    pool = np.full(remembered + 1, -1, np.int64)
    best = np.zeros(remembered + 1, np.int64)
    best_keep = np.zeros(remembered + 1, np.int64)
    pointer, clock = 0, 0
    lfsr = 0xACE1
    demands = misses = 0
    for t in range(tokens):
        for m in range(layers):
            v[m] = chances[0, t, m]
            visited[m] = False
        for m in range(layers):
            for i in range(k):
                e = chosen[t, m, i]
                clock += 1
                s = place[m, e]
                if t >= first:
                    demands += 1
                    misses += s < 0
                if s < 0:
                    found = 0
                    step = 0
                    kept = 0
                    while kept < remembered and pool[kept] >= 0:
                        kept += 1
                    wanted = kept + (samples if samples else slots)
                    while step < slots + kept and (step < wanted or found == 0):
                        if step < kept:
                            c = pool[step]
                        elif random:
                            lfsr = (lfsr >> 1) ^ (0xB400 if lfsr & 1 else 0)
                            c = (lfsr * slots) >> 16
                        else:
                            c = pointer
                            pointer = pointer + 1 if pointer + 1 < slots else 0
                        step += 1
                        if pinned[c]:
                            continue
                        again = False
                        for q in range(found):
                            again = again or best[q] == c
                        if again:
                            continue
                        n, x = layer_of[c], expert_of[c]
                        if n < 0:
                            keep = np.int64(-1) << 50  # free
                        elif policy == _LRU:
                            keep = last[c]
                        elif policy == _LAYER_LRU:
                            keep = last[c] + (0 if n == m else 1 << 40)
                        elif policy == _BELADY:
                            keep = -following[c]
                        else:
                            rate_now = use_rate(rate[n, x], t + (n <= m) - stamp[n, x], decay)
                            distance = n - m if n >= m else n - m + layers
                            keep = rate_now << 4
                            if policy == _KEEP:
                                keep = keep_value(
                                    v[n, x], r[n, x], rate_now, visited[n], distance, discount
                                )
                        at = found
                        if found <= remembered:
                            found += 1
                        elif best_keep[remembered] > keep:
                            at = remembered
                        else:
                            continue
                        while at > 0 and best_keep[at - 1] > keep:
                            best[at], best_keep[at] = best[at - 1], best_keep[at - 1]
                            at -= 1
                        best[at], best_keep[at] = c, keep
                    s = best[0]
                    for q in range(remembered):
                        pool[q] = best[q + 1] if q + 1 < found else -1
                    if layer_of[s] >= 0:
                        place[layer_of[s], expert_of[s]] = -1
                if place[m, e] < 0:
                    layer_of[s], expert_of[s] = m, e
                    place[m, e] = s
                rate[m, e] = rate_after_use(rate[m, e], t + 1 - stamp[m, e], decay)
                stamp[m, e] = t + 1
                pinned[s] = True
                last[s] = clock
                following[s] = uses[t, m, i]
            for i in range(k):
                pinned[place[m, chosen[t, m, i]]] = False
            r[m] = reuse[t, m]
            visited[m] = given
            for h in range(1, horizons.shape[0]):
                n = m + horizons[h]
                if n < layers:
                    v[n] = chances[h, t, n]
    return demands, misses


@dataclass(frozen=True, kw_only=True)
class Row:
    """Miss rates of one policy on one trace.

    Parameters
    ----------
    trace : :class:`str`
        Path of the trace.
    policy : :class:`str`
        What evicts.
    values : :class:`str`
        Whose values it goes by; empty for none.
    search : :class:`str`
        How it looks for a victim.
    miss_rates : dict of :class:`str` to :class:`float`
        Misses over demands, by residency in percent.
    """

    trace: str
    policy: str
    values: str
    search: str
    miss_rates: dict[str, float]


def _measure(
    trace: Trace,
    values: Values,
    *,
    policy: int,
    search: Search,
    residencies: Sequence[float],
) -> dict[str, float]:
    chosen = trace.experts
    uses = _next_uses(chosen, trace.experts_per_layer)
    discount = np.array(discounts(trace.layers), np.int64)
    decay = np.array(DECAYS, np.int64)
    rates = {}
    for residency in residencies:
        slots = max(trace.top_k, round(residency * trace.layers * trace.experts_per_layer))
        demands, misses = _misses(
            chosen,
            uses,
            values.horizons,
            values.chances,
            values.reuse,
            values.given,
            trace.tokens // 2,
            slots,
            policy,
            search.samples,
            search.remembered,
            search.random,
            discount,
            decay,
        )
        rates[f"{100 * residency:g}"] = misses / demands
    return rates


def evaluate(
    trace: Trace,
    *,
    name: str,
    forms: Iterable[str] = ("full", "lite"),
    searches: Sequence[Search] = (SEARCHES[0], CHOSEN),
    residencies: Sequence[float] = RESIDENCIES,
) -> list[Row]:
    """Miss rates of all policies on a trace.

    Parameters
    ----------
    trace : :class:`Trace`
        Its first half is to learn from, its second half counts.
    name : :class:`str`
        What the rows call it.
    forms : iterable of :class:`str`
        Forms of the perceptron predictor whose values are used.
    searches : sequence of :class:`Search`
        How policies by value look for a victim.
    residencies : sequence of :class:`float`
        Sizes of the buffer as a share of all experts.
    """
    rows: list[Row] = []

    def add(policy: str, number: int, values: Values, source: str, search: Search) -> None:
        found = _measure(trace, values, policy=number, search=search, residencies=residencies)
        rows.append(
            Row(trace=name, policy=policy, values=source, search=search.name, miss_rates=found)
        )

    everything = SEARCHES[0]
    nothing = Values.none(trace)
    add("LRU", _LRU, nothing, "", everything)
    add("LRU of each layer", _LAYER_LRU, nothing, "", everything)
    for search in searches:
        add("LFU", _LFU, nothing, "", search)
    for search in searches:
        add("predicted next use", _KEEP, nothing, "none", search)
    for form in forms:
        values = Values.of(trace, form)
        for search in searches:
            add("predicted next use", _KEEP, values, form, search)
    add("Belady", _BELADY, nothing, "", everything)
    return rows


def render(rows: Sequence[Row]) -> str:
    """Tables in Markdown, one for each trace."""
    lines = []
    for trace in dict.fromkeys(row.trace for row in rows):
        mine = [row for row in rows if row.trace == trace]
        shares = list(mine[0].miss_rates)
        lines += [
            f"### {Path(trace).stem}",
            "",
            f"| policy | values | search | {' | '.join(f'{share} %' for share in shares)} |",
            f"|---|---|---|{'--:|' * len(shares)}",
        ]
        for row in mine:
            cells = (f"{row.miss_rates[share]:.4f}" for share in shares)
            lines.append(f"| {row.policy} | {row.values} | {row.search} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prestage_sim.evaluate.eviction",
        description="Miss rates of the expert buffer without prefetch, by replacement policy.",
    )
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="routing traces")
    parser.add_argument(
        "--form",
        choices=list(FORMS),
        nargs="+",
        default=["full", "lite"],
        help="forms of the perceptron predictor (default: full lite)",
    )
    parser.add_argument("--first", type=int, metavar="N", help="only the first N tokens of each")
    parser.add_argument(
        "--searches", action="store_true", help="compare all ways to look for a victim"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    return parser


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
    rows: list[Row] = []
    try:
        for path in dict.fromkeys(args.traces):
            trace = load_trace(path)
            if args.first is not None:
                trace = trace.first(args.first)
            searches = SEARCHES if args.searches else (SEARCHES[0], CHOSEN)
            rows += evaluate(trace, name=path, forms=args.form, searches=searches)
        print(render(rows), end="")
        if args.json is not None:
            result = {
                "command": f"python -m prestage_sim.evaluate.eviction {shlex.join(given)}",
                "rows": [asdict(row) for row in rows],
            }
            args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
