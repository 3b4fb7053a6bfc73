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
from .phases import Phases, Schedule, Visits, arrange, unions
from .plan import Candidates, Plan, Workload
from .policies import policy_by_name
from .result import Counts, Result
from .values import Values, perceptron_candidates, perceptron_values

__all__ = ["SCORES", "Run", "run_plan", "scored_steps", "simulate", "simulate_counted"]

#: Which tokens count.
SCORES = ("second-half", "all")

#: Beyond all layers.
_NO_CUTOFF = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a plan took and did.

    Parameters
    ----------
    seconds, resident : :class:`float`
        Time of the scored steps, and that with everything resident.
    counts : :class:`Counts`
        What was counted meanwhile.
    prefill_resident : :class:`float`
        Of the time with everything resident, that of steps with nothing but chunks of prompts.
    """

    seconds: float
    resident: float
    counts: Counts
    prefill_resident: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Times:
    """How long what a schedule computes takes.

    Parameters
    ----------
    attention, lead : array of :class:`float`, ``[S]``
        Of each step a layer's time until its routing is known, and what comes before the layers.
    work : array of :class:`float`
        Time of each expert of :class:`Visits`.
    """

    attention: NDArray[np.float64]
    lead: NDArray[np.float64]
    work: NDArray[np.float64]


def _times(
    machine: Machine, schedule: Schedule, visits: Visits, *, layers: int, top_k: int, draft: float
) -> _Times:
    """Times of a machine; a draft takes so many times of a token with everything resident."""
    tokens, used = np.diff(schedule.first), np.diff(visits.first)
    return _Times(
        attention=machine.before_routing(tokens),
        lead=schedule.drafted * np.float64(draft * layers * machine.layer_seconds),
        work=machine.of_experts(
            visits.weight,
            tokens=np.repeat(np.repeat(tokens, layers), used),
            used=np.repeat(used, used),
            top_k=top_k,
        ),
    )


def _resident(
    machine: Machine,
    schedule: Schedule,
    visits: Visits,
    times: _Times,
    chosen: NDArray[np.bool_],
    *,
    top_k: int,
) -> float:
    """Time of the chosen steps with everything resident."""
    if not chosen.any():
        return 0.0
    used = np.diff(visits.first).reshape(schedule.steps, -1)
    # A layer of one token takes the machine's time; sums of its parts may round.
    single = (used == top_k) & (np.diff(schedule.first) == 1)[:, None]
    if single.all() and not schedule.drafted.any():
        return int(single[chosen].sum()) * machine.layer_seconds
    experts = np.add.reduceat(times.work, visits.first[:-1]).reshape(used.shape)
    others = np.where(single, 0.0, experts + times.attention[:, None]).sum(axis=1) + times.lead
    return int(single[chosen].sum()) * machine.layer_seconds + float(others[chosen].sum())


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
    phases: Phases | None = None,
    schedule: Schedule | None = None,
    visits: Visits | None = None,
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
        First step that counts.
    phases : :class:`Phases` or None
        How long a draft takes, and how far it is prefetched for.
    schedule : :class:`Schedule` or None
        Steps that the tokens of the trace are members of; None stands for one token a step.
    visits : :class:`Visits` or None
        What their layers want, if that is known already.
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
    phases = phases or Phases()
    if schedule is None:
        schedule, _ = arrange([trace], Phases(), seed=0)
    if visits is None or plan.executes is not None:
        chosen = trace.experts if plan.executes is None else plan.executes
        visits = unions(chosen, schedule, experts)
    width = visits.width
    slots = slots if plan.slots is None else plan.slots
    if not width <= slots <= layers * experts:
        raise ValueError(
            f"Slots must be from the {width} that a layer uses to all {layers * experts} experts,"
            f" not {slots}"
        )
    engine = create_engine(plan, machine, layers=layers, experts=experts, width=width, slots=slots)
    uses = _uses(visits.first, visits.experts, layers, experts)
    engine = engine._replace(use_first=uses[0], use_at=uses[1], use_next=uses[0][:-1].copy())
    if recorder is not None:
        engine.settings[6:8] = recorder.first, recorder.first + recorder.tokens
        engine = engine._replace(events=np.zeros((recorder.most, RECORDED)))
    values, candidates = Values.none(), plan.candidates
    if plan.predictor is not None:
        values = perceptron_values(trace, plan.predictor, schedule=schedule, folder=folder)
        if candidates is None and plan.proposes:
            candidates = perceptron_candidates(
                values,
                top_k=k,
                threshold=plan.threshold,
                far_threshold=plan.far_threshold,
                ahead=plan.ahead,
            )
    if candidates is None:
        candidates = _no_candidates(schedule.steps, layers)
    candidates.check(schedule.steps, layers=layers, experts=experts)
    hint = candidates.hint
    if hint is None:
        hint = np.ones(len(candidates.expert), np.bool_)
    times = _times(machine, schedule, visits, layers=layers, top_k=k, draft=phases.draft_time)
    cutoff = np.full(schedule.steps, _NO_CUTOFF)
    if phases.cutoff is not None:
        cutoff[schedule.drafted > 0] = phases.cutoff
    ends = np.zeros(schedule.steps)
    started = busy = 0.0
    before, tiers_before = engine.counts.copy(), engine.tier_tiles.copy()
    for begin, end in ((0, first), (first, schedule.steps)):
        started, busy = float(engine.clock[0]), float(engine.clock[1])
        before, tiers_before = engine.counts.copy(), engine.tier_tiles.copy()
        done = run(
            engine,
            np.zeros(width, np.int64),
            begin,
            end,
            visits.first,
            visits.experts,
            times.work,
            times.attention,
            times.lead,
            cutoff,
            ends,
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
    scored = np.arange(schedule.steps) >= first
    prefill = scored & schedule.prefill

    def resident(chosen: NDArray[np.bool_]) -> float:
        return _resident(machine, schedule, visits, times, chosen, top_k=k)

    counted = dict(zip(COUNTED, (engine.counts - before).tolist(), strict=True))
    members = int(schedule.first[-1] - schedule.first[first])
    tokens, steps = int(schedule.progress[first:].sum()), schedule.steps - first
    prefill_seconds = float(np.diff(ends, prepend=0.0)[prefill].sum())
    if plan.analytic:
        loads = counted["tiles_moved"] / machine.tiles / k
        seconds = max(resident(scored), loads * machine.rho(k) * machine.layer_seconds)
        prefill_seconds = seconds * resident(prefill) / resident(scored)
    return Run(
        seconds=seconds,
        resident=resident(scored),
        prefill_resident=resident(prefill),
        counts=Counts(
            tokens=tokens,
            layers=layers,
            tiles=machine.tiles,
            seconds=seconds,
            busy=float(engine.clock[1]) - busy,
            steps=steps,
            rejected=members - tokens,
            joined=members - steps,
            shared=members * layers * k - counted["demands"],
            prefill_tokens=int(schedule.progress[prefill].sum()),
            prefill_seconds=prefill_seconds,
            prefill_steps=int(prefill.sum()),
            tier_tiles=tuple((engine.tier_tiles - tiers_before).tolist()),
            **counted,
        ),
    )


def scored_steps(
    traces: Sequence[Trace], phases: Phases, *, score: str, seed: int
) -> tuple[Schedule, int]:
    """Steps of traces, of which the last one counts, and the first step that does.

    Parameters
    ----------
    traces, phases, seed
        As for :func:`arrange`.
    score : :class:`str`
        ``"second-half"`` or ``"all"``.

    Raises
    ------
    ValueError
        As :func:`arrange`; and if no step that counts decodes.
    """
    schedule, steps = arrange(traces, phases, seed=seed)
    first = schedule.steps - steps[-1]
    if score == "second-half":
        first += steps[-1] // 2
    if schedule.prefill[first:].all():
        raise ValueError("Steps that count must decode, but all of them are chunks of prompts")
    return schedule, first


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
    phases: Phases | None = None,
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
        ``"second-half"`` counts the steps from the middle of the trace on, ``"all"`` all of it.
    seed : :class:`int`
        For whatever is drawn at random.
    name : :class:`str`
        What the result calls the trace.
    recorder : :class:`Recorder` or None
        Collects events; its steps count those to warm up with.
    phases : :class:`Phases` or None
        Which tokens go through the layers together; None stands for one at a time.
    folder : path or None
        Where predictions are kept on disk, for all runs over the same trace.

    Raises
    ------
    ValueError
        If the policy or the score is unknown, a number is out of its range, a trace to warm up
        with is of another shape, or the trace has no such phases.
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
        phases=phases,
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
    phases: Phases | None = None,
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
    phases = phases or Phases()
    whole = _joined([*warm, trace])
    schedule, first = scored_steps([*warm, trace], phases, score=score, seed=seed)
    members = schedule.trace(whole)
    visits = unions(members.experts, schedule, trace.experts_per_layer)
    slots = max(visits.width, round(residency * trace.layers * trace.experts_per_layer))
    plan = chosen.plan(
        Workload(
            trace=members,
            schedule=schedule,
            phases=phases,
            visits=visits,
            request=whole.request_id[schedule.members],
            machine=machine,
            slots=slots,
            seed=seed,
            folder=folder,
        )
    )
    done = run_plan(
        plan,
        members,
        machine=machine,
        slots=slots,
        first=first,
        phases=phases,
        schedule=schedule,
        visits=visits,
        recorder=recorder,
        folder=folder,
    )
    return _result(
        done, trace, machine, phases, name=name, policy=policy, residency=residency
    ), done.counts


def _result(
    done: Run,
    trace: Trace,
    machine: Machine,
    phases: Phases,
    *,
    name: str,
    policy: str,
    residency: float,
) -> Result:
    """What a run comes to, per token."""
    counts = done.counts
    joules = tier_joules = None
    if machine.joules is not None:
        joules = machine.joules(counts) / counts.tokens
        tier_joules = tuple(part.typical / counts.tokens for part in machine.joules.by_tier(counts))
    wanted = counts.tokens * trace.layers * trace.top_k
    moved, proposed = counts.tiles_moved, counts.candidates
    decoded, seconds = counts.tokens - counts.prefill_tokens, done.seconds - counts.prefill_seconds
    prefill = None
    if counts.prefill_steps:
        prefill = counts.prefill_seconds / done.prefill_resident
    return Result(
        trace=name,
        machine=machine.name,
        policy=policy,
        residency=residency,
        rho=machine.rho(trace.top_k),
        tpot=seconds / (done.resident - done.prefill_resident),
        hit_rate=counts.hits / counts.demands,
        bytes_per_token=moved / counts.tiles / wanted,
        recall=counts.right / counts.demands if proposed else None,
        precision=counts.right / proposed if proposed else None,
        overfetch=proposed / counts.demands if proposed else None,
        late=counts.late / counts.demands,
        useless=counts.useless_tiles / moved if moved else 0.0,
        polluting=counts.polluting / counts.demands,
        joules_per_token=joules,
        batch=phases.batch,
        prefill_chunk=phases.prefill_chunk,
        draft=phases.draft,
        accept=phases.accept if phases.draft else None,
        tokens_per_step=decoded / (counts.steps - counts.prefill_steps),
        token_seconds=seconds / decoded,
        prefill=prefill,
        tier_bytes=tuple(tiles / counts.tiles / wanted for tiles in counts.tier_tiles),
        tier_joules=tier_joules,
    )


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
