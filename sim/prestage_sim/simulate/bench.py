"""How fast the simulator is: ``python -m prestage_sim.simulate.bench`` prints JSON.

One core replays a made-up trace of the shape of gpt-oss-20b: token-layers a second of the event
loop alone, of the predictor alone, and of both, which is what the first cell of a sweep takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from prestage_sim.traces import Trace, load_trace

from .machine import UNIT
from .run import simulate
from .values import forget, perceptron_values

__all__ = ["main", "measure"]


def _made_up(tokens: int) -> Trace:
    """Tokens of a small vocabulary, each with habits, and noise."""
    rng = np.random.default_rng(1)
    habits = rng.permuted(np.tile(np.arange(32), (200, 24, 1)), axis=2)[:, :, :4]
    token = rng.integers(0, 200, tokens)
    experts = habits[token]
    noise = rng.permuted(np.tile(np.arange(32), (tokens, 24, 1)), axis=2)[:, :, :4]
    experts = np.where(rng.random((tokens, 24, 1)) < 0.4, noise, experts)
    return Trace(experts=experts, experts_per_layer=32, token=token, meta={"model": "made-up"})


def measure(trace: Trace, *, policies: Sequence[str], residency: float, rho: float) -> list[object]:
    """Token-layers a second of the process's own time, one row a policy."""
    rows: list[object] = []
    count = trace.tokens * trace.layers
    for policy in policies:
        settings = {"machine": UNIT, "policy": policy, "residency": residency, "rho": rho}
        simulate(trace.first(8), **settings)  # type: ignore[arg-type]
        forget()
        started = time.process_time()
        simulate(trace, **settings)  # type: ignore[arg-type]
        both = time.process_time() - started
        started = time.process_time()
        simulate(trace, **settings)  # type: ignore[arg-type]
        again = time.process_time() - started
        rows.append(
            {
                "policy": policy,
                "residency": residency,
                "rho": rho,
                "with_predictor": round(count / both),
                "predictions_known": round(count / again),
            }
        )
    forget()
    started = time.process_time()
    perceptron_values(trace, "full")
    taken = time.process_time() - started
    rows.append({"predictor": "full", "token_layers_a_second": round(count / taken)})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m prestage_sim.simulate.bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_sim.simulate.bench",
        description="Token-layers a second on one core, as JSON.",
    )
    parser.add_argument("trace", nargs="?", help="routing trace (default: one made up)")
    parser.add_argument("--tokens", type=int, default=4000, metavar="N", help="how many")
    parser.add_argument("--policy", nargs="+", default=["lru", "lfu", "prestage"], metavar="NAME")
    parser.add_argument("--residency", type=float, default=0.25)
    parser.add_argument("--rho", type=float, default=4.0)
    options = parser.parse_args(arguments)
    trace = _made_up(options.tokens) if options.trace is None else load_trace(options.trace)
    trace = trace.first(options.tokens)
    rows = measure(trace, policies=options.policy, residency=options.residency, rho=options.rho)
    print(json.dumps({"tokens": trace.tokens, "layers": trace.layers, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
