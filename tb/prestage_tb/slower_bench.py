"""Whether prefetching makes the RTL slower: ``python -m prestage_tb.slower_bench TRACE``.

Traces are replayed through the simulated device at timed pace, with prefetching and without: a
layer is computed once its experts are there, while the device prefetches. The link brings all k
experts of a layer in ``rho`` times that. :mod:`prestage_sim.evaluate.slower` asks the same of the
golden model, in a fraction of the time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

import prestage
from prestage.replay import device_config
from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import Phase, Policy
from prestage_sim.evaluate.slower import BAR, RATES, RESIDENCIES, SOURCES
from prestage_sim.traces import Trace, load_trace

__all__ = ["Cell", "cycles_of", "main", "measure"]

#: Time of a layer over the least time in which the port brings its k experts: the smallest rho's.
_PORT_SHARE = 2
_NOISE_SCORE = 200


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One comparison, in clock cycles a token.

    Parameters
    ----------
    trace, source, policy : :class:`str`
        What was replayed, who proposed, and who gave way.
    residency, rho : :class:`float`
        Share of all experts in the buffer, and time of the link for all experts of a layer over
        that in which it is computed.
    tokens : :class:`int`
        Tokens replayed.
    without, throttled : :class:`float`
        Cycles a token without prefetching, and with it behind the throttle.
    """

    trace: str
    source: str
    policy: str
    residency: float
    rho: float
    tokens: int
    without: float
    throttled: float

    @property
    def ratio(self) -> float:
        """Time with prefetching over time without."""
        return self.throttled / self.without


def cycles_of(
    trace: Trace,
    config: DeviceConfig,
    *,
    rho: float,
    policy: Policy,
    prefetch: bool,
    noise: bool = False,
    seed: int = 1,
) -> int:
    """Clock cycles of a trace on the simulated RTL.

    Parameters
    ----------
    trace : :class:`Trace`
        What the router chose.
    config : :class:`DeviceConfig`
        Device.
    rho : :class:`float`
        Time of the link for all experts of a layer over that in which it is computed; at least 0.5.
    policy : :class:`Policy`
        Which expert gives way.
    prefetch : :class:`bool`
        Whether anything is prefetched.
    noise : :class:`bool`
        Send k hints a layer, drawn at random for the next layer.
    seed : :class:`int`
        Seed of the noise.

    Raises
    ------
    ValueError
        If rho is out of its range.
    """
    if not rho >= 1 / _PORT_SHARE:
        raise ValueError(f"Rho must be at least {1 / _PORT_SHARE}, the memory port's, not {rho:g}")
    k, layers, experts = config.model.top_k, config.model.layers, config.model.experts
    bandwidth = Fraction(config.data_bytes) / Fraction(str(rho)) / _PORT_SHARE
    layer_cycles = _PORT_SHARE * k * config.expert_bytes // config.data_bytes
    generator = np.random.default_rng(seed)
    with prestage.open(f"sim://?latency=64&bytes_per_cycle={bandwidth}", config=config) as device:
        device.configure(prefetch=prefetch, hints=prefetch and noise, policy=policy, throttle=True)
        started = device.cycles
        for token, chosen in zip(trace.token.tolist(), trace.experts.tolist(), strict=True):
            device.begin_token(0, token if token >= 0 else None, Phase.DECODE)
            for layer, wanted in enumerate(chosen):
                device.route(0, layer, wanted)
                if noise and layer + 1 < layers:
                    for expert in generator.choice(experts, k, replace=False).tolist():
                        device.hint(0, layer + 1, expert, _NOISE_SCORE)
                device.collect(0, layer)
                device.run(layer_cycles)
                device.release(0, layer)
        device.drain()
        return device.cycles - started


def measure(
    trace: Trace, *, name: str, source: str, residency: float, rho: float, policy: Policy
) -> Cell:
    """Compare prefetching with none; the noise is sent to both."""
    model = (trace.layers, trace.experts_per_layer)
    slots = max(trace.top_k, int(residency * model[0] * model[1]))
    predictor = "none" if source == "noise" else source
    config = device_config(trace, slots=slots, predictor=predictor)

    def cycles(prefetch: bool) -> float:
        total = cycles_of(
            trace, config, rho=rho, policy=policy, prefetch=prefetch, noise=source == "noise"
        )
        return total / trace.tokens

    return Cell(
        trace=name,
        source=source,
        policy=policy.name.lower(),
        residency=residency,
        rho=rho,
        tokens=trace.tokens,
        without=cycles(False),
        throttled=cycles(True),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m prestage_tb.slower_bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_tb.slower_bench",
        description="Cycles a token on the simulated RTL, with prefetching over without. The status"
        f" is 1 if that is above {BAR} in a cell.",
        epilog="example: python -m prestage_tb.slower_bench cs.npz --first 60 --json build/a.json",
    )
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="routing traces")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N tokens")
    parser.add_argument(
        "--source",
        nargs="+",
        choices=SOURCES,
        default=[name for name in SOURCES if name != "none"],
        metavar="NAME",
        help=f"who proposes: {', '.join(SOURCES)} (default: all but none)",
    )
    parser.add_argument("--residency", nargs="+", type=float, default=RESIDENCIES, metavar="SHARE")
    parser.add_argument("--rho", nargs="+", type=float, default=RATES, metavar="X")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of objects")
    options = parser.parse_args(arguments)
    cells = []
    print("trace source policy residency rho | cycles a token without, x with")
    for path in options.traces:
        trace = load_trace(path)
        if options.first is not None:
            trace = trace.first(options.first)
        for source in options.source:
            policy = Policy.NEXT_USE if source == "perceptron" else Policy.LRU
            for residency in options.residency:
                for rho in options.rho:
                    cell = measure(
                        trace,
                        name=path.stem,
                        source=source,
                        residency=residency,
                        rho=rho,
                        policy=policy,
                    )
                    cells.append(cell)
                    print(
                        f"{cell.trace} {source} {cell.policy} {residency:.2f} {rho:g} |"
                        f" {cell.without:.0f} {cell.ratio:.4f}",
                        flush=True,
                    )
    worst = max(cells, key=lambda cell: cell.ratio)
    print(
        f"worst of {len(cells)}: {worst.ratio:.4f}"
        f" ({worst.trace}, {worst.source}, {worst.residency:.2f}, {worst.rho:g})"
    )
    if options.json is not None:
        command = shlex.join(["python", "-m", "prestage_tb.slower_bench", *sys.argv[1:]])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"command": command, "cells": [asdict(cell) for cell in cells]}, indent=1)
            + "\n"
        )
    return int(worst.ratio > BAR)


if __name__ == "__main__":
    sys.exit(main())
