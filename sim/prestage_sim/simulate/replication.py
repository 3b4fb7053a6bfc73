"""Batches over several compute units, hot experts replicated into spare slots.

The claim of arXiv 2605.11537: predicted overload and replication bring the units near full use, and
up to three times the throughput. ``python -m prestage_sim.simulate.replication`` runs it again on a
top-1 batch workload that is made of routing traces.

A layer of a batch takes as long as its busiest unit. Every expert lies on one unit, in turn; units
have spare slots for replicas, which are placed by predicted load before the batch comes. The tokens
of an expert may then go to any of its replicas. Bringing replicas takes no time here: how many were
brought is counted beside.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_sim._jit import compiled
from prestage_sim.traces import Trace, TraceError, load_trace

__all__ = [
    "PLANS",
    "Usage",
    "batches",
    "loads",
    "main",
    "place",
    "spread",
    "use_units",
]

#: Where predicted loads come from.
PLANS = ("static", "previous batch", "running mean", "predicted", "known")

#: What the running mean keeps of a batch's loads.
_KEEP = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How a workload uses its units.

    Parameters
    ----------
    trace, plan : :class:`str`
        What was run, and where its predictions come from.
    units, batch, spare : :class:`int`
        Compute units, tokens of a batch, and slots a layer of each unit beyond its share.
    utilisation : :class:`float`
        Work done over what the units could have done meanwhile.
    speedup : :class:`float`
        Time of the static placement over that of this one.
    moved : :class:`float`
        Replicas that were brought for a batch and layer, over experts that it used.
    layer_batches : :class:`int`
        Layers times batches.
    """

    trace: str
    plan: str
    units: int
    batch: int
    spare: int
    utilisation: float
    speedup: float
    moved: float
    layer_batches: int


def batches(trace: Trace, batch: int) -> NDArray[np.int64]:
    """Tokens of each batch, ``[N, batch]``: one of each of ``batch`` streams at a time.

    The trace is cut into as many streams of the same length, as if they were decoded side by side.

    Raises
    ------
    ValueError
        If the trace has fewer tokens than two batches.
    """
    length = trace.tokens // batch
    if length < 2:
        raise ValueError(
            f"Batch must be at most half the trace's {trace.tokens} tokens, not {batch}"
        )
    return np.arange(length)[:, None] + length * np.arange(batch)[None, :]


def loads(trace: Trace, rows: NDArray[np.int64], chosen: NDArray[np.int16]) -> NDArray[np.int64]:
    """Tokens of each expert, ``[N, L, E]``: each token goes to one, ``chosen`` is ``[T, L]``."""
    found = np.zeros((len(rows), trace.layers, trace.experts_per_layer), np.int64)
    batch = np.arange(len(rows))[:, None, None]
    layer = np.arange(trace.layers)[None, None, :]
    np.add.at(found, (batch, layer, chosen[rows]), 1)
    return found


@compiled
def place(predicted: Any, home: Any, spare: Any) -> Any:
    """Units that hold each expert, ``[E, U]``: its home, and replicas of the hottest.

    One replica after another goes to whoever has most predicted tokens a replica, into a spare slot
    of the unit with the least predicted work that doesn't hold it yet, until no slot is left or
    nobody is expected to have more than the mean of a unit's work.

    Parameters
    ----------
    predicted : array of ``float64``, ``[E]``
        Predicted tokens of each expert.
    home : array of bool, ``[E, U]``
        Where each expert always lies.
    spare : int
        Slots of each unit for replicas.
    """
    experts, units = home.shape
    holds = home.copy()
    left = np.full(units, spare)
    count = np.ones(experts, np.int64)
    for _ in range(spare * units):
        work = np.zeros(units)
        for expert in range(experts):
            for unit in range(units):
                if holds[expert, unit]:
                    work[unit] += predicted[expert] / count[expert]
        # The busiest unit is relieved of its hottest expert that can go somewhere else.
        best, best_unit, most = -1, -1, 0.0
        busiest = int(np.argmax(work))
        for expert in range(experts):
            each = predicted[expert] / count[expert]
            if not holds[expert, busiest] or each <= most:
                continue
            to, least = -1, work[busiest]
            for unit in range(units):
                if left[unit] and not holds[expert, unit] and work[unit] < least:
                    to, least = unit, work[unit]
            if to >= 0:
                best, best_unit, most = expert, to, each
        if best < 0:
            break
        holds[best, best_unit] = True
        left[best_unit] -= 1
        count[best] += 1
    return holds


@compiled
def spread(load: Any, holds: Any) -> Any:
    """Tokens of each unit: experts with fewest replicas first, each token to the least loaded.

    Parameters
    ----------
    load : array of ``int64``, ``[E]``
        Tokens of each expert.
    holds : array of bool, ``[E, U]``
        Which units hold it.
    """
    experts, units = holds.shape
    work = np.zeros(units, np.int64)
    for replicas in range(1, units + 1):
        for expert in range(experts):
            if holds[expert].sum() != replicas:
                continue
            for _ in range(load[expert]):
                to = -1
                for unit in range(units):
                    if holds[expert, unit] and (to < 0 or work[unit] < work[to]):
                        to = unit
                work[to] += 1
    return work


def _predictions(
    plan: str, actual: NDArray[np.int64], hinted: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Predicted loads of each batch, ``[N, L, E]``."""
    if plan == "known":
        return actual.astype(np.float64)
    if plan == "predicted":
        return hinted.astype(np.float64)
    found = np.zeros(actual.shape)
    if plan == "previous batch":
        found[1:] = actual[:-1]
    elif plan == "running mean":
        mean = np.zeros(actual.shape[1:])
        for n in range(1, len(actual)):
            mean += _KEEP * (actual[n - 1] - mean)
            found[n] = mean
    return found


def use_units(
    trace: Trace,
    *,
    units: int,
    batch: int,
    spare: int,
    plan: str,
    recall: float = 0.92,
    seed: int = 1,
    most: int = 200,
    name: str = "trace",
) -> Usage:
    """Run a top-1 batch workload over several units.

    Parameters
    ----------
    trace : :class:`Trace`
        Its first choices are the workload.
    units, batch, spare : :class:`int`
        Compute units, tokens of a batch, and slots a layer of each unit beyond its own experts.
    plan : :class:`str`
        One of :data:`PLANS`: where loads are predicted from.
    recall : :class:`float`
        Share of the tokens whose expert the plan ``"predicted"`` foresees.
    seed : :class:`int`
        For its errors.
    most : :class:`int`
        Batches to run at most.
    name : :class:`str`
        What the result calls the trace.

    Raises
    ------
    ValueError
        If a number is out of its range, or the plan is unknown.
    """
    from .policies.hints import hinted

    for what, value, least in (("Units", units, 1), ("Batch", batch, 1), ("Spare slots", spare, 0)):
        if value < least:
            raise ValueError(f"{what} must be at least {least}, not {value}")
    if plan not in PLANS:
        raise ValueError(f"Plan must be one of {', '.join(PLANS)}, not {plan!r}")
    experts = trace.experts_per_layer
    rows = batches(trace, batch)[:most]
    actual = loads(trace, rows, trace.experts[..., 0])
    one = Trace(experts=trace.experts[..., :1], experts_per_layer=experts)
    guess = hinted(one, recall=recall, seed=(seed, 0))[..., 0]
    predicted = _predictions(plan, actual, loads(trace, rows, guess))
    home = np.zeros((experts, units), np.bool_)
    home[np.arange(experts), np.arange(experts) % units] = True
    busiest = static = work = moved = used = 0
    held = np.repeat(home[None], trace.layers, axis=0)
    for n in range(len(rows)):
        for layer in range(trace.layers):
            load = actual[n, layer]
            at_home = spread(load, home)
            static += int(at_home.max())
            work += int(load.sum())
            used += int((load > 0).sum())
            if plan == "static":
                busiest += int(at_home.max())
                continue
            holds = place(predicted[n, layer], home, spare)
            moved += int((holds & ~held[layer]).sum())
            held[layer] = holds
            busiest += int(spread(load, holds).max())
    return Usage(
        trace=name,
        plan=plan,
        units=units,
        batch=batch,
        spare=spare,
        utilisation=work / (units * busiest),
        speedup=static / busiest,
        moved=moved / used,
        layer_batches=len(rows) * trace.layers,
    )


def table(rows: Sequence[Usage]) -> str:
    """A table in Markdown."""
    lines = [
        "| trace | units | batch | spare | loads from | utilisation | speed-up | moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.trace} | {row.units} | {row.batch} | {row.spare} | {row.plan} |"
        f" {100 * row.utilisation:.1f} % | {row.speedup:.2f} x | {row.moved:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_sim.simulate.replication",
        description="Use of several compute units by a top-1 batch workload, with hot experts"
        " replicated by predicted load.",
    )
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="routing traces")
    parser.add_argument("--units", type=int, nargs="+", default=[4, 8], help="compute units")
    parser.add_argument("--batch", type=int, nargs="+", default=[64], help="tokens of a batch")
    parser.add_argument("--spare", type=int, nargs="+", default=[1, 4], help="spare slots a layer")
    parser.add_argument("--most", type=int, default=200, help="batches at most")
    parser.add_argument("--recall", type=float, default=0.92, help="recall of 'predicted'")
    parser.add_argument("--json", type=Path, help="write a list of JSON objects")
    args = parser.parse_args(argv)
    try:
        rows = [
            use_units(
                load_trace(path),
                units=units,
                batch=batch,
                spare=spare,
                plan=plan,
                recall=args.recall,
                most=args.most,
                name=Path(path).stem,
            )
            for path in args.traces
            for units in args.units
            for batch in args.batch
            for spare in args.spare
            for plan in PLANS
            if plan != "static" or spare == args.spare[0]
        ]
    except (TraceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
