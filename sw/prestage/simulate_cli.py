"""The commands ``prestage simulate`` and ``prestage sweep``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prestage_sim.traces import Trace, TraceError

from .errors import ArgumentError, PrestageError
from .output import Files, check_writable
from .terminal import progress_bar, versions

if TYPE_CHECKING:
    from prestage_sim.simulate.cells import Cell, Outcome
    from prestage_sim.simulate.machines import MachineFile
    from prestage_sim.simulate.models import ModelCard
    from prestage_sim.simulate.phases import Phases
    from prestage_sim.simulate.sweep import Store

__all__ = ["add_simulate", "add_sweep"]

_INTERRUPTED = 130

# Names that the help lists: importing what has them would slow down all other commands. A test
# compares them.
_MACHINES = (
    "unit",
    "paper",
    "rtx-4090-pcie4",
    "h100-pcie5",
    "laptop-nvme",
    "laptop-gpu-nvme",
    "ecpix5",
)
_POLICIES = (
    "resident",
    "on-demand",
    "lru",
    "lru-layer",
    "lfu",
    "st-moe",
    "pre-gated",
    "adap-gating",
    "speculating-experts",
    "speculating-experts-executed",
    "duoserve",
    "sp-moe",
    "eps-moe",
    "replication",
    "moe-infinity",
    "promoe",
    "prestage-rtl",
    "prestage",
    "oracle-h1",
    "oracle-h3",
    "belady",
    "bound",
    "bound-analytic",
)
_SCORES = ("second-half", "all")

#: What is simulated where no policy is asked for, as far as it is there.
_DEFAULT_POLICIES = (
    "on-demand",
    "lru",
    "lfu",
    "st-moe",
    "prestage",
    "belady",
    "bound",
    "bound-analytic",
)

_DEFAULT_RESIDENCIES = (0.10, 0.25, 0.40, 0.60)

_Load = Callable[[argparse.Namespace, str], Trace]


class _SweepError(PrestageError):
    """A sweep that can't be run where it was asked to."""


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0.5,1,4, not {text!r}") from None


def _residencies(text: str) -> list[float]:
    values = _numbers(text)
    for value in values:
        if not 0 < value <= 1:
            raise argparse.ArgumentTypeError(
                f"must be above 0 and at most 1, since there are no more slots than experts,"
                f" not {value:g}"
            )
    return values


def _counts(text: str) -> list[int]:
    values = _numbers(text)
    for value in values:
        if value < 0 or value != int(value):
            raise argparse.ArgumentTypeError(f"must be whole numbers from 0 on, not {value:g}")
    return [int(value) for value in values]


def _positives(text: str) -> list[float]:
    values = _numbers(text)
    for value in values:
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, not {value:g}")
    return values


def _add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    parser.add_argument(
        "--machine",
        type=_names,
        nargs="+",
        action="extend",
        default=[],
        metavar="M",
        help=f"machines: {', '.join(_MACHINES)}, or a .toml file of your own (default: unit)",
    )
    parser.add_argument(
        "--policy",
        type=_names,
        nargs="+",
        action="extend",
        default=[],
        metavar="P",
        help=f"policies: {', '.join(_POLICIES)}; or all (default: the most telling ones)",
    )
    parser.add_argument(
        "--residency",
        type=_residencies,
        metavar="SHARES",
        help="shares of all experts that fit in the slots (default: 0.10,0.25,0.40,0.60)",
    )
    links = parser.add_mutually_exclusive_group()
    links.add_argument(
        "--rho",
        type=_positives,
        metavar="R",
        help="times of a layer that loading all its k experts takes: the links are made as much"
        " faster or slower (default: as the machine has them)",
    )
    links.add_argument(
        "--bandwidth",
        type=_positives,
        metavar="GB/S",
        help="bandwidth of all links together, in place of the machine's",
    )
    parser.add_argument(
        "--warm",
        nargs="+",
        action="extend",
        default=[],
        metavar="TRACE",
        help="traces that are replayed before, in this order; they don't count",
    )
    parser.add_argument(
        "--score",
        choices=_SCORES,
        default=_SCORES[0],
        help="which tokens of the trace count (default: %(default)s)",
    )
    parser.add_argument(
        "--first", type=positive, metavar="N", help="only the first N tokens of each trace"
    )
    parser.add_argument(
        "--expert-bytes",
        type=positive,
        metavar="N",
        help="size of an expert, where neither the trace nor the model's name says",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="for whatever is drawn at random (default: %(default)s)",
    )


def _add_phases(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    together = parser.add_argument_group("tokens that go through the layers together")
    together.add_argument(
        "--batch",
        type=_counts,
        default=[1],
        metavar="B",
        help="contexts that decode in lock-step, each a segment of the trace (default: 1)",
    )
    together.add_argument(
        "--prefill-chunk",
        type=positive,
        metavar="C",
        help="tokens of a prompt that go together (default: one by one)",
    )
    together.add_argument(
        "--prompt",
        type=positive,
        metavar="N",
        help="take the first N tokens of each request for its prompt, whatever the trace says",
    )
    together.add_argument(
        "--draft",
        type=_counts,
        default=[0],
        metavar="D",
        help="tokens that a draft model proposes and the model verifies together (default: none)",
    )
    together.add_argument(
        "--accept",
        type=float,
        metavar="P",
        help="probability that a draft is right if those before it were (default: 0.75)",
    )
    together.add_argument(
        "--draft-time",
        type=float,
        metavar="T",
        help="time of a draft over that of a token with everything resident (default: 0.05)",
    )
    together.add_argument(
        "--cutoff",
        type=positive,
        metavar="LAYER",
        help="with drafts, prefetch nothing from this layer on (default: up to the policy)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write a list of JSON objects")
    output.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with plots")
    output.add_argument(
        "--timeline",
        type=int,
        metavar="TOKEN",
        help="token whose timeline the page and the Chrome trace show (default: one at three"
        " quarters of the trace)",
    )
    output.add_argument("--quiet", action="store_true", help="print no tables and no progress")


def add_simulate(
    *,
    add: Callable[..., argparse.ArgumentParser],
    add_reading: Callable[[argparse.ArgumentParser], None],
    positive: Callable[[str], int],
    load: _Load,
) -> None:
    """Add ``prestage simulate`` to the other commands.

    Parameters
    ----------
    add : callable
        Makes a command's parser from its name, what runs it, ``text`` and ``examples``.
    add_reading : callable
        Adds the options of reading a trace.
    positive : callable
        Converts the text of a positive integer.
    load : callable
        Reads the trace of a path by those options.
    """
    parser = add(
        "simulate",
        lambda args: _simulate(args, load),
        text="Say what prefetching buys on a machine in time, bytes and joules. A routing trace is"
        " replayed under each\npolicy; the time of a token is relative to one with all experts"
        " resident.",
        examples="  prestage simulate trace.npz\n"
        "  prestage simulate trace.npz --machine unit --rho 1,4,12 --policy lru prestage bound\n"
        "  prestage simulate trace.npz --machine rtx-4090-pcie4 --residency 0.25,0.5"
        " --expert-bytes 13219200\n"
        "  prestage simulate test.npz --warm train.npz --score all --json cells.json\n"
        "  prestage simulate trace.npz --machine unit --policy lru prestage --report page.html\n"
        "  prestage simulate trace.npz --policy prestage --residency 0.25 --chrome trace.json\n"
        "  prestage simulate trace.npz --batch 1,8 --prefill-chunk 64 --prompt 128\n"
        "  prestage simulate trace.npz --policy lru sp-moe --draft 4 --accept 0.8",
    )
    parser.add_argument("traces", metavar="TRACE", nargs=1, help="routing trace")
    _add_options(parser, positive)
    _add_phases(parser, positive)
    _add_output(parser)
    parser.add_argument(
        "--chrome",
        type=Path,
        metavar="FILE.json",
        help="write the events of the last cell for Perfetto or chrome://tracing",
    )
    add_reading(parser)


def add_sweep(
    *,
    add: Callable[..., argparse.ArgumentParser],
    add_reading: Callable[[argparse.ArgumentParser], None],
    positive: Callable[[str], int],
    load: _Load,
) -> None:
    """Add ``prestage sweep``; the parameters are those of :func:`add_simulate`."""
    parser = add(
        "sweep",
        lambda args: _sweep(args, load),
        text="Simulate every combination of traces, machines, residencies, bandwidths and policies."
        " What is done is kept:\nafter Ctrl-C the same command goes on, and cells that were"
        " simulated before aren't again.",
        examples="  prestage sweep traces/*.npz --policy lru st-moe prestage bound"
        " --rho 0.5,1,2,4,12,24\n"
        "  prestage sweep trace.npz --machine unit ecpix5 --residency 0.10,0.25 --json cells.json\n"
        "  prestage sweep traces/*.npz --warm-others --report sweep.html\n"
        "  prestage sweep trace.npz --jobs 1 --no-cache\n"
        "  prestage sweep traces/*.npz --scheduler tcp://10.0.0.1:8786",
    )
    parser.add_argument(
        "traces", metavar="TRACE", nargs="+", help="routing traces: .npz, .jsonl or .csv"
    )
    _add_options(parser, positive)
    _add_phases(parser, positive)
    parser.add_argument(
        "--warm-others",
        action="store_true",
        help="let each TRACE be preceded by all others of the command",
    )
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--jobs", type=positive, default=0, metavar="N", help="processes (default: one a core)"
    )
    where.add_argument(
        "--scheduler",
        metavar="URL",
        help="run on the workers of this Dask scheduler, as tcp://host:8786",
    )
    where.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="where outcomes are kept (default: prestage/sweep in your cache directory)",
    )
    where.add_argument("--no-cache", action="store_true", help="keep no outcomes and use none")
    _add_output(parser)
    add_reading(parser)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What was asked for, checked."""

    cells: list[Cell]
    traces: dict[str, Trace]
    machines: list[MachineFile]
    notes: list[str]


def _policies(args: argparse.Namespace) -> list[str]:
    from prestage_sim.simulate.policies import POLICIES, policy_by_name

    names = [name for part in args.policy for name in part]
    if "all" in names:
        names = list(POLICIES)
    for name in names:
        try:
            policy_by_name(name)
        except ValueError as error:
            raise ArgumentError(str(error)) from None
    return list(dict.fromkeys(names)) or [name for name in _DEFAULT_POLICIES if name in POLICIES]


def _machines(args: argparse.Namespace) -> list[MachineFile]:
    from prestage_sim.simulate.machines import MachineError, load_machine

    names = [name for part in args.machine for name in part] or ["unit"]
    try:
        return [load_machine(name) for name in dict.fromkeys(names)]
    except MachineError as error:
        raise ArgumentError(str(error)) from None


def _card(args: argparse.Namespace, machine: MachineFile, trace: Trace, path: str) -> ModelCard:
    from prestage_sim.simulate.models import model_card

    size = args.expert_bytes
    if size is None:
        given = machine.get("model.expert_bytes")
        # A machine with times of its own asks no model for its size.
        size = int(given) if given is not None else None if machine.needs_model else 1
    try:
        return model_card(trace, expert_bytes=size)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None


def _phases(args: argparse.Namespace) -> list[Phases]:
    """Every combination that was asked for."""
    from prestage_sim.simulate.phases import Phases

    if args.prompt is not None and args.prefill_chunk is None:
        raise ArgumentError("--prompt needs --prefill-chunk")
    drafting = {"accept": args.accept, "draft_time": args.draft_time, "cutoff": args.cutoff}
    drafting = {name: value for name, value in drafting.items() if value is not None}
    if drafting and not any(args.draft):
        raise ArgumentError(f"--{next(iter(drafting)).replace('_', '-')} needs --draft")
    try:
        return [
            Phases(
                batch=batch,
                prefill_chunk=args.prefill_chunk or 0,
                prompt=args.prompt or 0,
                draft=draft,
                **(drafting if draft else {}),
            )
            for batch in dict.fromkeys(args.batch)
            for draft in dict.fromkeys(args.draft)
        ]
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def _check_phases(
    args: argparse.Namespace, phases: Sequence[Phases], traces: Sequence[Trace], path: str
) -> list[str]:
    """Refuse phases that a trace, the last one, does not have; notes about the others."""
    from prestage_sim.simulate.phases import unions
    from prestage_sim.simulate.run import scored_steps

    notes = []
    for one in phases:
        try:
            schedule, _ = scored_steps(traces, one, score=args.score, seed=args.seed)
        except ValueError as error:
            raise ArgumentError(f"{path}: {error}") from None
        if one.plain:
            continue
        experts = traces[-1].experts_per_layer
        chosen = np.concatenate([trace.experts for trace in traces])[schedule.members]
        width, total = unions(chosen, schedule, experts).width, traces[-1].layers * experts
        least = min(args.residency or _DEFAULT_RESIDENCIES)
        if least * total < width:
            notes.append(
                f"Residency {least:g} is less than the {width} experts that a layer of {path} wants"
                f" with {one}: {width} slots are taken"
            )
    return notes


def _job(args: argparse.Namespace, load: _Load) -> _Job:
    """Read and check everything before anything is simulated."""
    from prestage_sim.evaluate.run import check_warm
    from prestage_sim.simulate.cells import trace_digest

    policies, machines, phases = _policies(args), _machines(args), _phases(args)
    paths = list(dict.fromkeys(args.traces))
    others = getattr(args, "warm_others", False)
    if others and len(paths) < 2:
        raise ArgumentError("--warm-others needs more than one trace")
    loaded = {path: load(args, path) for path in dict.fromkeys([*paths, *args.warm])}
    if args.first is not None:
        loaded = {path: trace.first(args.first) for path, trace in loaded.items()}
    digests = {path: trace_digest(trace) for path, trace in loaded.items()}
    cells: list[Cell] = []
    notes: list[str] = []
    for path in paths:
        warm = [*args.warm, *(other for other in paths if others and other != path)]
        for other in warm:
            try:
                check_warm(loaded[path], loaded[other])
            except TraceError as error:
                raise TraceError(f"{other}: {error} as in {path}") from error
        if path in args.warm:
            notes.append(f"{path} is replayed before it counts: it says nothing about new text")
        notes += _check_phases(args, phases, [loaded[other] for other in [*warm, path]], path)
        for machine in machines:
            card = _card(args, machine, loaded[path], path)
            found, more = _grid(args, machine, card, policies, path)
            notes += more
            cells += [
                _cell(
                    trace=digests[path],
                    name=path,
                    warm=tuple(digests[other] for other in warm),
                    machine=resolved,
                    policy=policy,
                    residency=residency,
                    rho=rho,
                    score=args.score,
                    seed=args.seed,
                    phases=one,
                )
                for one in phases
                for resolved, policy, residency, rho in found
            ]
    return _Job(
        cells=list(dict.fromkeys(cells)),
        traces={digests[path]: trace for path, trace in loaded.items()},
        machines=machines,
        notes=list(dict.fromkeys(notes)),
    )


def _cell(**given: Any) -> Cell:
    from prestage_sim.simulate.cells import Cell

    return Cell(**given)


def _grid(
    args: argparse.Namespace,
    machine: MachineFile,
    card: ModelCard,
    policies: Sequence[str],
    path: str,
) -> tuple[list[tuple[Any, str, float, float]], list[str]]:
    """Machine, policy, residency and rho of the cells of one trace, and notes about them."""
    from prestage_sim.simulate.cells import at_rho
    from prestage_sim.simulate.machines import MachineError

    try:
        machine_of_model = machine.for_model(card)
        slots = machine.slots(card)
    except MachineError as error:
        raise ArgumentError(str(error)) from None
    total, k = card.layers * card.experts, card.top_k
    own = machine_of_model.rho(k)
    if args.rho is not None:
        rhos = args.rho
    elif args.bandwidth is not None:
        now = sum(link.bandwidth for link in machine_of_model.links)
        rhos = [own * now / (1e9 * bandwidth) for bandwidth in args.bandwidth]
    else:
        rhos = [own]
    residencies = args.residency
    if residencies is None:
        residencies = _DEFAULT_RESIDENCIES if slots is None else [slots / total]
    notes = []
    room = machine.room(machine.card(card))
    least = min(residencies)
    if room is not None and max(residencies) * total > room:
        notes.append(
            f"{machine.name} has room for {room:,} of the {total:,} experts of {card.name}"
            f" ({100 * room / total:.0f} %): larger residencies are what-if"
        )
    if least * total < k:
        notes.append(
            f"Residency {least:g} is less than the k = {k} experts of a layer in {path}: {k} slots"
            " are taken"
        )
    if len(machine_of_model.tiers) > 1:
        notes.append(
            f"{machine_of_model.tiers[0].name} of {machine.name} holds"
            f" {machine_of_model.tiers[0].experts:,} of the {total:,} experts of {card.name}: the"
            f" others come from {machine_of_model.tiers[1].name} through it"
        )
    if machine.needs_model and card.attention_bytes is None:
        notes.append(
            f"Attention of {card.name} isn't known: it's taken to last as long as the k experts"
        )
    cells = [
        (at_rho(machine_of_model, rho, k), policy, residency, round(rho, 9))
        for policy in policies
        for rho in dict.fromkeys(rhos)
        for residency in dict.fromkeys(residencies)
    ]
    return cells, notes


def _check_outputs(args: argparse.Namespace) -> None:
    outputs = [(args.json, "JSON file"), (args.report, "Report")]
    outputs.append((getattr(args, "chrome", None), "Chrome trace"))
    for path, what in outputs:
        if path is not None:
            check_writable(path, what=what)


def _simulate(args: argparse.Namespace, load: _Load) -> int:
    _check_outputs(args)
    job = _job(args, load)
    return _run(args, job, store=None, jobs=1, scheduler=None)


def _sweep(args: argparse.Namespace, load: _Load) -> int:
    from prestage_sim.simulate.sweep import Store, default_folder

    _check_outputs(args)
    job = _job(args, load)
    folder = None if args.no_cache else args.cache or default_folder()
    return _run(args, job, store=Store(folder), jobs=args.jobs, scheduler=args.scheduler)


def _run(
    args: argparse.Namespace, job: _Job, *, store: Store | None, jobs: int, scheduler: str | None
) -> int:
    from prestage_sim.simulate.sweep import SweepError, SweepInterrupted, sweep

    for note in job.notes:
        print(f"prestage: note: {note}", file=sys.stderr)
    found = 0
    try:
        with progress_bar("cells", quiet=args.quiet) as progress:
            task = progress.add_task("simulate", total=len(job.cells))

            def show(done: int, kept: int) -> None:
                nonlocal found
                found = kept
                progress.update(task, completed=done)

            outcomes = sweep(
                job.cells, job.traces, jobs=jobs, scheduler=scheduler, store=store, progress=show
            )
    except SweepInterrupted as error:
        kept = store is not None and store.folder is not None
        then = "the same command goes on from there" if kept else "nothing of it was kept"
        print(f"prestage: {error}; {then}", file=sys.stderr)
        return _INTERRUPTED
    except SweepError as error:
        raise _SweepError(str(error)) from error
    if not args.quiet:
        _print_outcomes(outcomes)
        if found:
            print(f"{found} of {len(outcomes)} cells were kept from before.")
    _write(args, job, outcomes)
    return 0


def _write(args: argparse.Namespace, job: _Job, outcomes: Sequence[Outcome]) -> None:
    """Write all files that were asked for; an error in one doesn't lose the others."""
    files = Files()
    if args.json is not None:
        objects = [outcome.result.as_json() for outcome in outcomes]
        files.write(args.json, json.dumps(objects, indent=2) + "\n", what="JSON file")
    chrome = getattr(args, "chrome", None)
    if chrome is not None:
        from prestage_sim.simulate.chrome import chrome_trace

        recorded = _record(args, job, [outcomes[-1]])
        files.write(chrome, chrome_trace(recorded[0]) + "\n", what="Chrome trace")
    if args.report is not None:
        # Only the page needs the template engine.
        from prestage_sim.simulate.report import choose_timelines, render

        page = render(
            outcomes,
            timelines=_record(args, job, choose_timelines(outcomes)),
            machines=job.machines,
            notes=job.notes,
            settings=_settings(args),
        )
        files.write(args.report, page, what="Report")
        if files.complete and not args.quiet:
            print(f"Report: {args.report}")
    files.close()


def _record(args: argparse.Namespace, job: _Job, outcomes: Sequence[Outcome]) -> list[Any]:
    """Simulate cells again, with the events of some tokens."""
    from prestage_sim.simulate.cells import run_cell
    from prestage_sim.simulate.events import Recorder
    from prestage_sim.simulate.phases import arrange
    from prestage_sim.simulate.report import Timeline

    timelines = []
    for outcome in outcomes:
        cell = outcome.cell
        trace = job.traces[cell.trace]
        warm = [job.traces[digest] for digest in cell.warm]
        *replayed, steps = arrange([*warm, trace], cell.phases, seed=cell.seed)[1]
        before = sum(replayed)
        first = args.timeline if args.timeline is not None else steps * 3 // 4
        if not 0 <= first < steps:
            what = "token" if cell.phases.plain else "step"
            raise ArgumentError(
                f"--timeline must be a {what} of the trace, 0 to {steps - 1}, not {first}"
            )
        # The recorder counts what is replayed before.
        recorder = Recorder(first=before + first, tokens=2)
        run_cell(cell, trace, warm, recorder=recorder)
        timelines.append(
            Timeline(
                outcome=outcome,
                token=first,
                replayed=before,
                layers=trace.layers,
                events=list(recorder.events),
            )
        )
    return timelines


def _settings(args: argparse.Namespace) -> Mapping[str, str]:
    return {
        "tokens that count": args.score,
        "first tokens only": "–" if args.first is None else f"{args.first:,}",
        "seed": str(args.seed),
        **versions("numpy", "numba"),
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _joules(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _print_outcomes(outcomes: Sequence[Outcome]) -> None:
    console = Console(highlight=False)
    groups: dict[tuple[str, str, str, float], list[Outcome]] = {}
    for outcome in outcomes:
        result, phases = outcome.result, str(outcome.cell.phases)
        groups.setdefault((result.trace, result.machine, phases, result.rho), []).append(outcome)
    for (trace, machine, phases, rho), group in groups.items():
        console.print(
            f"[bold]{escape(Path(trace).name)}[/bold] on {escape(machine)}, rho {rho:.3g}"
            + (phases and f", {phases}")
        )
        by_residency = sorted(group, key=lambda o: o.result.residency)
        # Where the terminal is narrow the columns come as two tables.
        tables = [(*_TIME, *_QUALITY)] if console.width >= _BOTH_FIT else [_TIME, _QUALITY]
        if phases:
            tables.append(_TOGETHER)
        for columns in tables:
            console.print(_table(columns, by_residency))
    console.print(
        "Shares in %; time relative to everything resident; bytes in units of k x L experts."
    )


#: Columns of the tables: head and text of a cell.
_TIME: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("resident", lambda r: _percent(r.residency)),
    ("time", lambda r: f"{r.tpot:.3f}"),
    ("hits", lambda r: _percent(r.hit_rate)),
    ("bytes", lambda r: f"{r.bytes_per_token:.3f}"),
    ("J/token", lambda r: _joules(r.joules_per_token)),
)
_QUALITY: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("recall", lambda r: _percent(r.recall)),
    ("precision", lambda r: _percent(r.precision)),
    ("over-fetch", lambda r: "–" if r.overfetch is None else f"{r.overfetch:.2f}"),
    ("late", lambda r: _percent(r.late)),
    ("useless", lambda r: _percent(r.useless)),
    ("polluting", lambda r: _percent(r.polluting)),
)

_TOGETHER: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("tokens/step", lambda r: f"{r.tokens_per_step:.2f}"),
    ("s/token", lambda r: f"{r.token_seconds:.3g}"),
    ("prefill", lambda r: "–" if r.prefill is None else f"{r.prefill:.3f}"),
)

#: Width at which all columns fit into one table.
_BOTH_FIT = 120


def _table(
    columns: Sequence[tuple[str, Callable[[Any], str]]], outcomes: Sequence[Outcome]
) -> Table:
    if columns is _QUALITY or columns is _TOGETHER:
        columns = (_TIME[0], *columns)
    table = Table(box=SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    last = None
    for outcome in outcomes:
        result = outcome.result
        if last is not None and result.residency != last:
            table.add_section()
        last = result.residency
        table.add_row(result.policy, *(text(result) for _, text in columns))
    return table
