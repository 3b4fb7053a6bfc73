"""Replay a trace on a machine under a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prestage_sim.traces import Trace

from .._jit import compiled
from .engine import COUNTED, RECORDED, create_engine, run
from .events import Event, EventKind, Recorder
from .machine import Machine
from .plan import Candidates, Plan, Workload
from .policies import policy_by_name
from .result import Counts, Result
from .values import Values, perceptron_candidates, perceptron_values

__all__ = ["SCORES", "Run", "run_plan", "simulate", "simulate_counted"]

#: Which tokens count.
SCORES = ("second-half", "all")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a plan took and did.

    Parameters
    ----------
    seconds, resident : :class:`float`
        Time of the scored tokens, and that with everything resident.
    counts : :class:`Counts`
        What was counted meanwhile.
    """

    seconds: float
    resident: float
    counts: Counts


@compiled
def _uses(wanted_first: NDArray[np.int64], wanted: NDArray[np.int16], layers: int, experts: int):  # type: ignore[no-untyped-def]
    """Visits that use each expert, in order, and where each one's are listed."""
    first = np.zeros(layers * experts + 1, np.int64)
    visits = wanted_first.shape[0] - 1
    for visit in range(visits):
        for n in range(wanted_first[visit], wanted_first[visit + 1]):
            first[visit % layers * experts + wanted[n] + 1] += 1
    for key in range(layers * experts):
        first[key + 1] += first[key]
    at = first[:-1].copy()
    uses = np.zeros(wanted.shape[0], np.int64)
    for visit in range(visits):
        for n in range(wanted_first[visit], wanted_first[visit + 1]):
            key = visit % layers * experts + wanted[n]
            uses[at[key]] = visit
            at[key] += 1
    return first, uses


def _no_candidates(steps: int, layers: int) -> Candidates:
    nothing = np.zeros(0, np.int16)
    return Candidates(
        offset=np.zeros(steps * (layers + 1) + 1, np.int64),
        ahead=nothing,
        expert=nothing,
        score=nothing,
    )


def run_plan(
    plan: Plan,
    trace: Trace,
    *,
    machine: Machine,
    slots: int,
    first: int = 0,
    recorder: Recorder | None = None,
    folder: Path | None = None,
) -> Run:
    """Replay a trace by a plan.

    Parameters
    ----------
    plan : :class:`Plan`
        What the engine does.
    trace : :class:`Trace`
        What the router chose.
    machine : :class:`Machine`
        Where it runs.
    slots : :class:`int`
        Slots, unless the plan says otherwise.
    first : :class:`int`
        First token that counts.
    recorder : :class:`Recorder` or None
        Collects events.
    folder : path or None
        Where predictions are kept on disk.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """
    layers, experts, k = trace.layers, trace.experts_per_layer, trace.top_k
    slots = slots if plan.slots is None else plan.slots
    if not k <= slots <= layers * experts:
        raise ValueError(
            f"Slots must be from the {k} that a layer uses to all {layers * experts} experts,"
            f" not {slots}"
        )
    engine = create_engine(plan, machine, layers=layers, experts=experts, width=k, slots=slots)
    executed = trace.experts if plan.executes is None else plan.executes
    wanted = np.ascontiguousarray(executed.reshape(-1))
    wanted_first = np.arange(0, len(wanted) + 1, k, dtype=np.int64)
    uses = _uses(wanted_first, wanted, layers, experts)
    engine = engine._replace(use_first=uses[0], use_at=uses[1], use_next=uses[0][:-1].copy())
    if recorder is not None:
        engine.settings[6:8] = recorder.first, recorder.first + recorder.tokens
        engine = engine._replace(events=np.zeros((recorder.most, RECORDED)))
    values, candidates = Values.none(), plan.candidates
    if plan.predictor is not None:
        values = perceptron_values(trace, plan.predictor, folder=folder)
        if candidates is None and plan.proposes:
            candidates = perceptron_candidates(
                values,
                top_k=k,
                threshold=plan.threshold,
                far_threshold=plan.far_threshold,
                ahead=plan.ahead,
            )
    if candidates is None:
        candidates = _no_candidates(trace.tokens, layers)
    candidates.check(trace)
    hint = candidates.hint
    if hint is None:
        hint = np.ones(len(candidates.expert), np.bool_)
    attention = np.full(trace.tokens, machine.alpha * machine.layer_seconds)
    compute = np.full(2, (1 - machine.alpha) * machine.layer_seconds / k)
    started = busy = 0.0
    before, tiers_before = engine.counts.copy(), engine.tier_tiles.copy()
    for begin, end in ((0, first), (first, trace.tokens)):
        started, busy = float(engine.clock[0]), float(engine.clock[1])
        before, tiers_before = engine.counts.copy(), engine.tier_tiles.copy()
        done = run(
            engine,
            np.zeros(k, np.int64),
            begin,
            end,
            wanted_first,
            wanted,
            np.ones(len(wanted), np.int8),
            attention,
            compute,
            values.horizons,
            values.chances,
            values.reuse,
            candidates.offset,
            candidates.ahead,
            candidates.expert,
            candidates.score,
            hint,
        )
        if not done:
            raise RuntimeError("A demand found no slot, or nothing is on its way")
    seconds = float(engine.clock[0]) - started
    if recorder is not None:
        rows = engine.events[: engine.registers[3]].tolist()
        recorder.events += sorted(
            (
                Event(EventKind(int(kind)), start, end, *(int(number) for number in rest))
                for kind, start, end, *rest in rows
            ),
            key=lambda event: (event.start, event.end),
        )
    tokens = trace.tokens - first
    counted = dict(zip(COUNTED, (engine.counts - before).tolist(), strict=True))
    return Run(
        seconds=seconds,
        resident=tokens * layers * machine.layer_seconds,
        counts=Counts(
            tokens=tokens,
            layers=layers,
            tiles=machine.tiles,
            seconds=seconds,
            busy=float(engine.clock[1]) - busy,
            tier_tiles=tuple((engine.tier_tiles - tiers_before).tolist()),
            **counted,
        ),
    )


def simulate(
    trace: Trace,
    *,
    machine: Machine,
    policy: str,
    residency: float,
    rho: float | None = None,
    warm: Sequence[Trace] = (),
    score: str = "second-half",
    seed: int = 1,
    name: str = "trace",
    recorder: Recorder | None = None,
    folder: Path | None = None,
) -> Result:
    """Time, hits and traffic of a trace.

    Parameters
    ----------
    trace : :class:`Trace`
        What the router chose.
    machine : :class:`Machine`
        Where it runs.
    policy : :class:`str`
        One of :data:`POLICIES`.
    residency : :class:`float`
        Share of all experts that fit in the slots; at least what a layer uses does.
    rho : :class:`float` or None
        Makes the links as much faster or slower as brings all k experts of a layer in that many
        times of a layer; None leaves them as the machine has them.
    warm : sequence of :class:`Trace`
        Traces of the same model that are replayed before; they do not count.
    score : :class:`str`
        ``"second-half"`` counts the tokens from the middle of the trace on, ``"all"`` all of it.
    seed : :class:`int`
        For whatever is drawn at random.
    name : :class:`str`
        What the result calls the trace.
    recorder : :class:`Recorder` or None
        Collects events; its tokens count those to warm up with.
    folder : path or None
        Where predictions are kept on disk, for all runs over the same trace.

    Raises
    ------
    ValueError
        If the policy or the score is unknown, a number is out of its range, or a trace to warm up
        with is of another shape.
    """
    return simulate_counted(
        trace,
        machine=machine,
        policy=policy,
        residency=residency,
        rho=rho,
        warm=warm,
        score=score,
        seed=seed,
        name=name,
        recorder=recorder,
        folder=folder,
    )[0]


def simulate_counted(
    trace: Trace,
    *,
    machine: Machine,
    policy: str,
    residency: float,
    rho: float | None = None,
    warm: Sequence[Trace] = (),
    score: str = "second-half",
    seed: int = 1,
    name: str = "trace",
    recorder: Recorder | None = None,
    folder: Path | None = None,
) -> tuple[Result, Counts]:
    """What :func:`simulate` says, and what was counted; it takes the same."""
    chosen = policy_by_name(policy)
    if score not in SCORES:
        raise ValueError(f"Score must be one of {', '.join(SCORES)}, not {score!r}")
    if not 0 < residency <= 1:
        raise ValueError(f"Residency must be above 0 and at most 1, not {residency}")
    if rho is not None:
        machine = machine.with_rho(rho, trace.top_k)
    for number, other in enumerate(warm):
        if _shape(other) != _shape(trace):
            raise ValueError(
                "Trace to warm up with must have {} layers, {} experts and k = {}, but number"
                " {} has {}, {} and {}".format(*_shape(trace), number, *_shape(other))
            )
    whole = _joined([*warm, trace])
    first = whole.tokens - trace.tokens
    if score == "second-half":
        first += trace.tokens // 2
    slots = max(trace.top_k, round(residency * trace.layers * trace.experts_per_layer))
    plan = chosen.plan(
        Workload(trace=whole, first=first, machine=machine, slots=slots, seed=seed, folder=folder)
    )
    done = run_plan(
        plan, whole, machine=machine, slots=slots, first=first, recorder=recorder, folder=folder
    )
    counts = done.counts
    joules = tier_joules = None
    if machine.joules is not None:
        joules = machine.joules(counts) / counts.tokens
        tier_joules = tuple(part.typical / counts.tokens for part in machine.joules.by_tier(counts))
    wanted = counts.tokens * trace.layers * trace.top_k
    moved = counts.tiles_moved
    result = Result(
        trace=name,
        machine=machine.name,
        policy=policy,
        residency=residency,
        rho=machine.rho(trace.top_k),
        tpot=done.seconds / done.resident,
        hit_rate=counts.hits / counts.demands,
        bytes_per_token=moved / counts.tiles / wanted,
        recall=counts.right / wanted if counts.candidates else None,
        precision=counts.right / counts.candidates if counts.candidates else None,
        overfetch=counts.candidates / wanted if counts.candidates else None,
        late=counts.late / counts.demands,
        useless=counts.useless_tiles / moved if moved else 0.0,
        polluting=counts.polluting / counts.demands,
        joules_per_token=joules,
        tier_bytes=tuple(tiles / counts.tiles / wanted for tiles in counts.tier_tiles),
        tier_joules=tier_joules,
    )
    return result, counts


def _shape(trace: Trace) -> tuple[int, int, int]:
    return trace.layers, trace.experts_per_layer, trace.top_k


def _starts(trace: Trace) -> NDArray[np.int32]:
    """1 for the first token of each request, else 0."""
    return np.diff(trace.request_id, prepend=trace.request_id[0] - 1).astype(bool).astype(np.int32)


def _joined(traces: Sequence[Trace]) -> Trace:
    """Traces one after another, as one."""
    if len(traces) == 1:
        return traces[0]
    last = traces[-1]
    return Trace(
        experts=np.concatenate([trace.experts for trace in traces]),
        experts_per_layer=last.experts_per_layer,
        token=np.concatenate([trace.token for trace in traces]),
        is_decode=np.concatenate([trace.is_decode for trace in traces]),
        request_id=np.cumsum(np.concatenate([_starts(trace) for trace in traces])),
        layer_ids=last.layer_ids,
        meta={"model": last.model},
    )
