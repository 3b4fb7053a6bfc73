"""Whether prefetching makes a token slower: time with prefetching over time without.

``python -m prestage_sim.evaluate.slower TRACE...`` replays traces through the golden predictor,
buffer and throttle, and lets one link bring experts tile by tile: demands before prefetches, a
prefetch's tile that has begun is brought to its end. A layer with all its experts resident takes
the time 1: half of it until its routing is known, half for its experts, which are computed as they
come. All k experts of a layer take the link the time ``rho``. Predictors cost no time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import (
    BufferCode,
    BufferOp,
    Phase,
    Policy,
    PrefetchKind,
)
from prestage_sim.traces import Trace, load_trace, model_config

from ..model.buffer import ExpertBuffer
from ..model.predictor import create_predictor
from ..model.predictor.base import Candidate
from ..model.scheduler import CandidateQueue, Throttle, kind_of
from ..model.scheduler.queue import stale

__all__ = ["BAR", "RATES", "RESIDENCIES", "SOURCES", "Cell", "main", "measure", "time_of"]

#: Most that time with prefetching may be, in times of that without.
BAR = 1.005
#: Shares of all experts that fit in the buffer.
RESIDENCIES = (0.10, 0.25, 0.40, 0.60)
#: Times that the link needs for all experts of a layer, over the layer's time.
RATES = (0.5, 2.0, 12.0)
#: Predictors, and hints that are drawn at random.
SOURCES = ("none", "st_moe", "perceptron", "noise")

_NOISE_SCORE = 200


@dataclass
class _Fetch:
    """An expert on its way."""

    key: tuple[int, int]
    slot: int
    demand: bool
    deadline: int
    kind: PrefetchKind | None
    left: int
    end: float = 0.0  # when its last tile arrived


class _Engine:
    """Golden scheduler rules over a link that takes time.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    tile : :class:`float`
        Time of a tile on the link.
    policy : :class:`Policy`
        Which expert gives way.
    throttle : :class:`bool`
        Whether kinds of prefetches are switched off.
    budget : :class:`int`
        Eighths of a prefetch's tiles that must be expected before its deadline; 0: none need be.
    """

    def __init__(
        self, config: DeviceConfig, *, tile: float, policy: Policy, throttle: bool, budget: int
    ) -> None:
        self.config = config
        self.tile = tile
        self._due_tiles = [-(-tiles * budget // 8) for tiles in config.layer_tiles]
        self._layer: float | None = None  # mean time of a layer
        self._routed: float | None = None  # when the last decision came
        self.buffer = ExpertBuffer(config)
        self.buffer.policy = policy
        self.throttle = Throttle(config)
        self.throttle.enable = throttle
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        self._free = 0.0  # when the link ends the tile that it has begun
        self._last: _Fetch | None = None  # whose tile that is
        self._routes = [0]
        self._queue = CandidateQueue(config, routes=self._routes)
        self._demands: list[_Fetch] = []
        self._prefetches: list[_Fetch] = []
        self._arriving: list[_Fetch] = []
        self._fetches: dict[tuple[int, int], _Fetch] = {}

    @property
    def routes(self) -> int:
        """Routing decisions so far, modulo 256."""
        return self._routes[0]

    def offer(self, candidates: Iterable[Candidate]) -> None:
        """Queue candidates."""
        for candidate in candidates:
            self._queue.push(candidate)

    def route(self, layer: int, experts: Sequence[int]) -> list[_Fetch]:
        """Look up the demands of a decision; what they wait for."""
        self._routes[0] = (self.routes + 1) % 256
        if self._routed is not None:
            gap = self.now - self._routed
            self._layer = gap if self._layer is None else self._layer + (gap - self._layer) / 8
        self._routed = self.now
        busy = self._last if self._free > self.now else None
        waits_for = None if busy is None else busy.kind
        waiting = []
        for index, expert in enumerate(experts):
            key = (layer, expert)
            result = self.buffer.request(
                BufferOp.DEMAND, ctx=0, layer=layer, expert=expert, index=index
            )
            fetch = self._fetches.get(key)
            if result.prefetched:
                tiles = self.config.layer_tiles[layer]
                self.throttle.used(
                    result.slot, returned=tiles if fetch is None else tiles - fetch.left
                )
            if result.code == BufferCode.ALLOCATED:
                self.counts["misses"] += 1
                self.throttle.miss(
                    layer,
                    expert,
                    slot=result.slot,
                    evicted=result.evicted,
                    unused=result.evicted_unused,
                    waits_for=waits_for,
                )
                waits_for = None
                fetch = self._start(key, result.slot, demand=True)
                self._demands.append(fetch)
            elif result.code == BufferCode.FILLING:
                self.counts["late"] += 1
                assert fetch is not None
                if not fetch.demand:
                    fetch.demand, fetch.kind = True, None
                    if fetch.left:
                        self._prefetches.remove(fetch)
                        self._demands.append(fetch)
            elif result.code == BufferCode.RESIDENT:
                self.counts["hits"] += 1
            else:
                raise ValueError(f"Buffer must hold all experts of a layer, but had no slot: {key}")
            if fetch is not None:
                waiting.append(fetch)
        for fetch in [f for f in self._prefetches if stale(f.deadline, routes=self.routes)]:
            self.counts["cancelled"] += 1
            self._prefetches.remove(fetch)
            del self._fetches[fetch.key]
            self.buffer.request(BufferOp.CANCEL, slot=fetch.slot)
            self.throttle.dropped(fetch.slot)
        return waiting

    def _start(
        self,
        key: tuple[int, int],
        slot: int,
        *,
        demand: bool,
        deadline: int = 0,
        kind: PrefetchKind | None = None,
    ) -> _Fetch:
        fetch = _Fetch(key, slot, demand, deadline, kind, self.config.layer_tiles[key[0]])
        self._fetches[key] = fetch
        return fetch

    def advance(self, until: float) -> None:
        """Let the link work up to a time, and begin the tile that it works on then."""
        self._free = max(self._free, self.now)
        while self._free <= until:
            fetch = self._next()
            if fetch is None:
                break
            self._free += self.tile
            self._last = fetch
            fetch.left -= 1
            if not fetch.left:
                (self._demands if fetch.demand else self._prefetches).remove(fetch)
                fetch.end = self._free
                self._arriving.append(fetch)
        self.now = until
        for fetch in [f for f in self._arriving if f.end <= until]:
            self._arriving.remove(fetch)
            del self._fetches[fetch.key]
            last = self.config.layer_tiles[fetch.key[0]] - 1
            self.buffer.request(BufferOp.FILL, slot=fetch.slot, tile=last, last=True)

    def _comes_late(self, layer: int, deadline: int) -> bool:
        """Whether too little of a prefetch would come in time, behind those that have begun."""
        due = self._due_tiles[layer]
        if not due or self._layer is None or self._routed is None:
            return False
        left = (deadline - self.routes) % 256 * self._layer
        left -= max(self._free, self.now) - self._routed
        tiles = sum(fetch.left for fetch in self._prefetches) + due
        return tiles * self.tile > left

    def step(self) -> None:
        """Let the link end its tile."""
        self.advance(max(self.now, self._free))

    def _next(self) -> _Fetch | None:
        """What the link brings a tile of next."""
        if self._demands:
            return self._demands[0]
        while (
            len(self._prefetches) < self.config.prefetch_inflight
            and (candidate := self._queue.take()) is not None
        ):
            _, layer, expert, score, source, deadline = candidate
            kind = kind_of(source, deadline, routes=self.routes)
            if not self.throttle.admits(kind):
                self.counts["throttled"] += 1
                continue
            if self._comes_late(layer, deadline):
                self.counts["too late"] += 1
                continue
            result = self.buffer.request(
                BufferOp.PREFETCH, ctx=0, layer=layer, expert=expert, value=score
            )
            if result.code != BufferCode.ALLOCATED:
                continue
            self.counts["prefetches"] += 1
            self.throttle.prefetch(
                layer,
                expert,
                kind,
                slot=result.slot,
                evicted=result.evicted,
                unused=result.evicted_unused,
            )
            self._prefetches.append(
                self._start(
                    (layer, expert), result.slot, demand=False, deadline=deadline, kind=kind
                )
            )
        return self._prefetches[0] if self._prefetches else None


def time_of(
    trace: Trace,
    *,
    source: str,
    residency: float,
    rho: float,
    policy: Policy = Policy.LRU,
    prefetch: bool = True,
    throttle: bool = True,
    budget: int = 0,
    seed: int = 1,
) -> tuple[float, Counter[str]]:
    """Time of a layer in units of its time with everything resident, and what was counted.

    Parameters
    ----------
    trace : :class:`Trace`
        What the router chose, on one context.
    source : :class:`str`
        One of :data:`SOURCES`; ``"noise"`` is predictor ``none`` with k hints a layer, drawn at
        random for the next layer.
    residency : :class:`float`
        Share of all experts that fit in the buffer; at least k of them do.
    rho : :class:`float`
        Time of the link for all experts of a layer.
    policy : :class:`Policy`
        Which expert gives way.
    prefetch, throttle : :class:`bool`
        False drops all candidates; False admits all kinds.
    budget : :class:`int`
        Drop a candidate unless so many eighths of its tiles are expected before its deadline, by
        the mean time of a layer (of an eighth each) and the tiles before it; 0 drops none.
    seed : :class:`int`
        Seed of the noise.

    Raises
    ------
    ValueError
        If the source is unknown, or a number is out of its range.
    """
    if source not in SOURCES:
        raise ValueError(f"Source must be one of {', '.join(SOURCES)}, not {source!r}")
    if not 0 < residency <= 1:
        raise ValueError(f"Residency must be above 0 and at most 1, not {residency}")
    if not rho > 0:
        raise ValueError(f"Rho must be above 0, not {rho}")
    if not 0 <= budget <= 8:
        raise ValueError(f"Budget must be between 0 and 8 eighths, not {budget}")
    model = model_config(trace)
    k = model.top_k
    config = DeviceConfig(
        model=model,
        slots=max(k, int(residency * model.layers * model.experts)),
        predictor="none" if source == "noise" else source,
    )
    predictor = create_predictor(config)
    engine = _Engine(
        config, tile=rho / k / config.tiles, policy=policy, throttle=throttle, budget=budget
    )
    generator = np.random.default_rng(seed)

    def told(candidates: Sequence[Candidate]) -> None:
        if prefetch:
            engine.offer(candidates)
        for beat in predictor.values():
            engine.buffer.values(*beat)

    now = 0.0
    for token, layers in zip(trace.token.tolist(), trace.experts.tolist(), strict=True):
        told(predictor.begin(0, token, Phase.DECODE))
        for layer, experts in enumerate(layers):
            now += 0.5
            engine.advance(now)
            waiting = engine.route(layer, experts)
            told(predictor.decide(0, layer, experts, engine.routes))
            if source == "noise" and layer + 1 < model.layers:
                deadline = (engine.routes + 1) % 256
                for expert in generator.choice(model.experts, k, replace=False).tolist():
                    told(predictor.hint(0, layer + 1, expert, _NOISE_SCORE, deadline))
            now += 0.5 / k * (len(experts) - len(waiting))
            while waiting:
                arrived = [fetch for fetch in waiting if not fetch.left]
                if not arrived:
                    engine.step()
                    continue
                fetch = min(arrived, key=lambda fetch: fetch.end)
                waiting.remove(fetch)
                now = max(now, fetch.end) + 0.5 / k
            engine.advance(max(now, engine.now))
            engine.buffer.request(BufferOp.RELEASE, ctx=0, layer=layer)
    return now / trace.tokens / model.layers, engine.counts


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One comparison.

    Parameters
    ----------
    trace, source, policy : :class:`str`
        What was replayed, who proposed, and who gave way.
    residency, rho : :class:`float`
        Buffer and link.
    without, unthrottled, throttled : :class:`float`
        Time of a layer without prefetching, with all of it, and with the throttle.
    """

    trace: str
    source: str
    policy: str
    residency: float
    rho: float
    without: float
    unthrottled: float
    throttled: float


def measure(
    trace: Trace,
    *,
    name: str,
    source: str,
    residency: float,
    rho: float,
    policy: Policy,
    budget: int = 0,
) -> Cell:
    """Compare prefetching with none; the budget is that of prefetching with the throttle."""

    def time(**switches: int) -> float:
        return time_of(
            trace,
            source=source,
            residency=residency,
            rho=rho,
            policy=policy,
            prefetch=bool(switches.get("prefetch", True)),
            throttle=bool(switches.get("throttle", True)),
            budget=switches.get("budget", 0),
        )[0]

    return Cell(
        trace=name,
        source=source,
        policy=policy.name.lower(),
        residency=residency,
        rho=rho,
        without=time(prefetch=False),
        unthrottled=time(throttle=False),
        throttled=time(budget=budget),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m prestage_sim.evaluate.slower``."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_sim.evaluate.slower",
        description="Time with prefetching over time without, by source, buffer and link. The"
        f" status is 1 if that is above {BAR} with the throttle in a cell.",
        epilog="example: python -m prestage_sim.evaluate.slower cs.npz --first 300 --json a.json",
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
    parser.add_argument(
        "--policy",
        choices=[policy.name.lower() for policy in Policy],
        help="who gives way (default: next_use with the perceptron, else lru)",
    )
    parser.add_argument("--residency", nargs="+", type=float, default=RESIDENCIES, metavar="SHARE")
    parser.add_argument("--rho", nargs="+", type=float, default=RATES, metavar="X")
    parser.add_argument(
        "--budget",
        type=int,
        default=0,
        metavar="EIGHTHS",
        help="with the throttle, drop what brings fewer eighths in time (default: 0, off)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of objects")
    options = parser.parse_args(arguments)
    cells = []
    print("trace source policy residency rho | time without, x with all, x with the throttle")
    for path in options.traces:
        trace = load_trace(path)
        if options.first is not None:
            trace = trace.first(options.first)
        for source in options.source:
            best = Policy.NEXT_USE if source == "perceptron" else Policy.LRU
            policy = best if options.policy is None else Policy[options.policy.upper()]
            for residency in options.residency:
                for rho in options.rho:
                    cell = measure(
                        trace,
                        name=path.stem,
                        source=source,
                        residency=residency,
                        rho=rho,
                        policy=policy,
                        budget=options.budget,
                    )
                    cells.append(cell)
                    print(
                        f"{cell.trace} {source} {cell.policy} {residency:.2f} {rho:g} |"
                        f" {cell.without:.3f} {cell.unthrottled / cell.without:.4f}"
                        f" {cell.throttled / cell.without:.4f}",
                        flush=True,
                    )
    print("source rho | x with all: mean, worst | x with the throttle: best, mean, worst")
    for source, rho in dict.fromkeys((cell.source, cell.rho) for cell in cells):
        these = [cell for cell in cells if (cell.source, cell.rho) == (source, rho)]
        everything = [cell.unthrottled / cell.without for cell in these]
        throttled = [cell.throttled / cell.without for cell in these]
        print(
            f"{source} {rho:g} | {fmean(everything):.4f} {max(everything):.4f}"
            f" | {min(throttled):.4f} {fmean(throttled):.4f} {max(throttled):.4f}"
        )
    if options.json is not None:
        command = shlex.join(["python", "-m", "prestage_sim.evaluate.slower", *sys.argv[1:]])
        options.json.write_text(
            json.dumps({"command": command, "cells": [asdict(cell) for cell in cells]}, indent=1)
            + "\n"
        )
    return int(any(cell.throttled / cell.without > BAR for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
