"""How much of the gap between LRU and the bound a policy closes, and whether it is ever slower.

``python -m prestage_sim.simulate.gap TRACE...`` replays traces on machine ``unit`` in cells of
residency and rho, and prints JSON: of each trace the time of every policy in every cell, the share
of the gap that is closed, its mean, and the worst time over that of ``lru``. The gap of a cell is
from the better of global LRU and LRU a layer to ``bound``; cells count whose gap is large enough to
be a share of.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prestage_sim.traces import Trace, TraceError, load_trace

from .cells import Cell, trace_digest
from .machine import UNIT
from .policies import policy_by_name
from .run import SCORES
from .sweep import Store, SweepError, SweepInterrupted, default_folder, sweep

__all__ = ["LEAST_GAP", "REFERENCES", "gaps", "main", "summary"]

#: Gaps between LRU and bound that are too small to be a share of.
LEAST_GAP = 0.02

#: What every cell is held against.
REFERENCES = ("lru", "lru-layer", "bound")

Times = Mapping[tuple[float, float], Mapping[str, float]]


def summary(times: Times, policy: str) -> dict[str, Any]:
    """What a policy makes of all cells of a trace.

    Parameters
    ----------
    times : mapping
        Time of each policy relative to everything resident, by residency and rho;
        :data:`REFERENCES` among them.
    policy : :class:`str`
        The policy.
    """
    shares = []
    for cell in times.values():
        lru = min(cell["lru"], cell["lru-layer"])
        if lru - cell["bound"] > LEAST_GAP:
            shares.append((lru - cell[policy]) / (lru - cell["bound"]))
    return {
        "policy": policy,
        "cells_with_a_gap": len(shares),
        "gap_closed": round(sum(shares) / len(shares), 4) if shares else None,
        "worst_over_lru": round(max(cell[policy] / cell["lru"] for cell in times.values()), 5),
    }


def gaps(
    traces: Mapping[str, Trace],
    *,
    policies: Sequence[str],
    residencies: Sequence[float],
    rhos: Sequence[float],
    score: str = "second-half",
    jobs: int = 1,
    store: Store | None = None,
) -> list[dict[str, Any]]:
    """Times and shares of the gap, one object a trace.

    Parameters
    ----------
    traces : mapping
        Traces by their name.
    policies : sequence of :class:`str`
        What is measured, besides :data:`REFERENCES`.
    residencies, rhos : sequence of :class:`float`
        The cells.
    score : :class:`str`
        Which tokens count.
    jobs : :class:`int`
        Processes; 0 takes one a core.
    store : :class:`Store` or None
        Where outcomes are kept.

    Raises
    ------
    ValueError
        If a policy is unknown, or a number is out of its range.
    """
    named = list(dict.fromkeys([*REFERENCES, *policies]))
    for policy in named:
        policy_by_name(policy)
    digests = {name: trace_digest(trace) for name, trace in traces.items()}
    cells = [
        Cell(
            trace=digests[name],
            name=name,
            warm=(),
            machine=UNIT.with_rho(rho, trace.top_k),
            policy=policy,
            residency=residency,
            rho=rho,
            score=score,
            seed=1,
        )
        for name, trace in traces.items()
        for policy in named
        for residency in residencies
        for rho in rhos
    ]
    outcomes = sweep(
        cells, {digests[name]: traces[name] for name in traces}, jobs=jobs, store=store
    )
    found = []
    for name in traces:
        times: dict[tuple[float, float], dict[str, float]] = {}
        for outcome in outcomes:
            result = outcome.result
            if result.trace == name:
                times.setdefault((result.residency, result.rho), {})[result.policy] = result.tpot
        found.append(
            {
                "trace": name,
                "score": score,
                "policies": [summary(times, policy) for policy in named],
                "cells": [
                    {
                        "residency": residency,
                        "rho": rho,
                        **{policy: round(tpot, 5) for policy, tpot in cell.items()},
                    }
                    for (residency, rho), cell in times.items()
                ],
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_sim.simulate.gap",
        description="Share of the gap between LRU and the bound that policies close, as JSON.",
    )
    parser.add_argument("traces", metavar="TRACE", nargs="+", type=Path, help="routing traces")
    parser.add_argument("--policy", nargs="+", default=["prestage"], metavar="P", help="policies")
    parser.add_argument("--residency", type=float, nargs="+", default=[0.10, 0.25, 0.40, 0.60])
    parser.add_argument("--rho", type=float, nargs="+", default=[1.0, 2.0, 4.0, 12.0, 24.0])
    parser.add_argument("--score", choices=SCORES, default=SCORES[0], help="which tokens count")
    parser.add_argument("--jobs", type=int, default=1, help="processes (0: one a core)")
    parser.add_argument("--no-cache", action="store_true", help="keep no outcomes and use none")
    args = parser.parse_args(argv)
    try:
        found = gaps(
            {path.stem: load_trace(path) for path in args.traces},
            policies=args.policy,
            residencies=args.residency,
            rhos=args.rho,
            score=args.score,
            jobs=args.jobs,
            store=Store(None if args.no_cache else default_folder()),
        )
    except (TraceError, SweepError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SweepInterrupted as error:
        print(f"{error}; the same command goes on from there", file=sys.stderr)
        return 130
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
