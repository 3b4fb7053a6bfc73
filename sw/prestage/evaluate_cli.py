"""The command ``prestage evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prestage_sim.evaluate.rankers import FARTHEST_HORIZON, RANKERS
from prestage_sim.traces import Trace, TraceError

from .errors import ArgumentError
from .output import Files, check_writable
from .terminal import progress_bar, versions

if TYPE_CHECKING:
    from prestage_sim.evaluate.run import Evaluation

__all__ = ["add_evaluate"]

#: Columns of the cold-start table.
_COLD_COLUMNS = 7


def _horizons(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        low, dots, high = part.replace("-", "..").partition("..")
        try:
            first = int(low)
            last = int(high) if dots else first
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must be numbers and ranges such as 1,3 or 1..4, not {text!r}"
            ) from None
        if last < first:
            raise argparse.ArgumentTypeError(f"must be an ascending range, not {part!r}")
        for end in (first, last):
            if not 1 <= end <= FARTHEST_HORIZON:
                raise argparse.ArgumentTypeError(
                    f"must be between 1 and {FARTHEST_HORIZON}, not {end}"
                )
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _residencies(text: str) -> tuple[float, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be shares such as 0.10,0.25,0.40, not {text!r}"
        ) from None
    for value in values:
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {value:g}")
    return tuple(dict.fromkeys(values))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def add_evaluate(
    *,
    add: Callable[..., argparse.ArgumentParser],
    add_reading: Callable[[argparse.ArgumentParser], None],
    positive: Callable[[str], int],
    load: Callable[[argparse.Namespace, str], Trace],
) -> None:
    """Add the command to the others.

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
        "evaluate",
        lambda args: _run(args, load),
        text="Measure predictors on routing traces: recall, precision, calibration. Each predictor"
        " ranks the experts of\nevery layer by what was known some layers before, and learns as it"
        " goes.",
        examples="  prestage evaluate trace.npz\n"
        "  prestage evaluate trace.npz --predictor popularity st_moe --first 500\n"
        "  prestage evaluate test.npz --warm train1.npz train2.npz --json quality.json\n"
        "  prestage evaluate traces/*.npz --warm-others --predictor st_moe --report quality.html\n"
        "  prestage evaluate trace.npz --predictor st_moe:successors=4 st_moe:successors=16\n"
        "  prestage evaluate trace.npz --predictor previous-token --horizon 1..3",
    )
    parser.add_argument(
        "traces", metavar="TRACE", nargs="+", help="routing traces to score: .npz, .jsonl or .csv"
    )
    parser.add_argument(
        "--predictor",
        type=_names,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"predictors, NAME or NAME:OPTION=VALUE: {', '.join(RANKERS)} (default: all but the"
        " oracle)",
    )
    parser.add_argument(
        "--horizon",
        type=_horizons,
        default=(1,),
        metavar="H",
        help="layers ahead, as 1,3 or 1..4: layer m is ranked by what was known when layer m - H"
        " was routed, or at the token's start (default: 1)",
    )
    parser.add_argument(
        "--warm",
        nargs="+",
        action="extend",
        default=[],
        metavar="TRACE",
        help="traces to learn before, in this order; they aren't scored",
    )
    parser.add_argument(
        "--warm-others",
        action="store_true",
        help="let each TRACE be preceded by all others of the command",
    )
    parser.add_argument(
        "--first",
        type=positive,
        metavar="N",
        help="score only the first N tokens of each trace; those to learn before stay whole",
    )
    parser.add_argument(
        "--residency",
        type=_residencies,
        default=(0.10, 0.25, 0.40),
        metavar="SHARES",
        help="shares of all experts that the LRU caches hold whose misses are looked at (default:"
        " 0.10,0.25,0.40)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write a list of JSON objects")
    output.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with plots")
    output.add_argument("--quiet", action="store_true", help="print no tables and no progress")
    add_reading(parser)


def _choose_horizons(
    predictors: Sequence[str], horizons: Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Horizons of each predictor, and notes about those that it isn't defined for."""
    from prestage_sim.evaluate.run import defined_horizons

    chosen: dict[str, tuple[int, ...]] = {}
    notes = []
    for name in predictors:
        try:
            kept = defined_horizons(name, horizons)
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        left_out = [str(horizon) for horizon in horizons if horizon not in kept]
        if left_out:
            notes.append(
                f"Predictor {name} isn't defined for horizon {' and '.join(left_out)}: left out"
            )
        if kept:
            chosen[name] = kept
    if not chosen:
        raise ArgumentError(f"No predictor is left to evaluate. {'. '.join(notes)}")
    return chosen, notes


def _default_predictors() -> list[str]:
    from prestage_sim.evaluate.rankers import ranker_class

    return [name for name in RANKERS if not ranker_class(name).knows_truth]


def _warm_paths(args: argparse.Namespace, path: str, paths: Sequence[str]) -> list[str]:
    others = [other for other in paths if other != path] if args.warm_others else []
    return [*args.warm, *others]


def _check(
    args: argparse.Namespace,
    paths: Sequence[str],
    traces: Mapping[str, Trace],
    chosen: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse what can't be done before anything is."""
    from prestage_sim.evaluate.rankers import create_ranker
    from prestage_sim.evaluate.run import check_horizons, check_warm
    from prestage_sim.traces import model_config

    for path in paths:
        trace = traces[path]
        for other in _warm_paths(args, path, paths):
            try:
                check_warm(trace, traces[other])
            except TraceError as error:
                raise TraceError(f"{other}: {error} as in {path}") from error
        try:
            model = model_config(trace)
            check_horizons(trace, args.horizon)
            for name, horizons in chosen.items():
                create_ranker(name, model=model, horizons=horizons)
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from error
        except ValueError as error:
            raise ArgumentError(f"{path}: {error}") from error


def _run(args: argparse.Namespace, load: Callable[[argparse.Namespace, str], Trace]) -> int:
    for path, what in ((args.json, "JSON file"), (args.report, "Report")):
        if path is not None:
            check_writable(path, what=what)
    names = list(dict.fromkeys(name for part in args.predictor for name in part))
    chosen, notes = _choose_horizons(names or _default_predictors(), args.horizon)
    paths = list(dict.fromkeys(args.traces))
    if args.warm_others and len(paths) < 2:
        raise ArgumentError("--warm-others needs more than one trace")
    traces = {path: load(args, path) for path in dict.fromkeys([*paths, *args.warm])}
    _check(args, paths, traces, chosen)
    for path in paths:
        if path in args.warm:
            notes.append(
                f"{path} is learned before it's scored: its recall says nothing about new text"
            )
    for note in notes:
        print(f"prestage: note: {note}", file=sys.stderr)
    results = _evaluate_all(args, paths, traces, chosen)
    if not args.quiet:
        _print_results(results)
    _write_results(args, results, notes)
    return 0


def _evaluate_all(
    args: argparse.Namespace,
    paths: Sequence[str],
    traces: Mapping[str, Trace],
    chosen: Mapping[str, tuple[int, ...]],
) -> list[Evaluation]:
    from prestage_sim.evaluate.run import evaluate

    results: list[Evaluation] = []
    with progress_bar("tokens", quiet=args.quiet) as progress:
        for path in paths:
            trace = traces[path] if args.first is None else traces[path].first(args.first)
            warm = _warm_paths(args, path, paths)
            total = trace.tokens + sum(traces[other].tokens for other in warm)
            for name, horizons in chosen.items():
                task = progress.add_task(f"{Path(path).stem}: {name}", total=total)

                def show(done: int, task: Any = task) -> None:
                    progress.update(task, completed=done)

                results += evaluate(
                    trace,
                    predictor=name,
                    horizons=horizons,
                    warm=[traces[other] for other in warm],
                    residencies=args.residency,
                    name=path,
                    warm_names=warm,
                    progress=show,
                )
                progress.remove_task(task)
    return results


def _write_results(
    args: argparse.Namespace, results: Sequence[Evaluation], notes: Sequence[str]
) -> None:
    """Write all files that were asked for; an error in one doesn't lose the other."""
    files = Files()
    if args.json is not None:
        text = json.dumps([result.as_object() for result in results], indent=2) + "\n"
        files.write(args.json, text, what="JSON file")
    if args.report is not None:
        # Only the page needs the template engine.
        from prestage_sim.evaluate.report import render

        page = render(results, notes=notes, settings=_settings(args))
        files.write(args.report, page, what="Report")
        if files.complete and not args.quiet:
            print(f"Report: {args.report}")
    files.close()


def _settings(args: argparse.Namespace) -> dict[str, str]:
    return {
        "first tokens only": "–" if args.first is None else f"{args.first:,}",
        "residency of the LRU caches": ", ".join(f"{r:g}" for r in args.residency),
        **versions("numpy", "numba"),
    }


def _percent(value: float | None) -> str:
    """Number of percent; the tables' titles say so."""
    return "–" if value is None else f"{100 * value:.1f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    """A table without lines between its columns, since there are many."""
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE,
        collapse_padding=True,
        pad_edge=False,
    )
    for at, column in enumerate(columns):
        # Long names are folded; a number that is cut off would be another number.
        table.add_column(column, justify="right" if at else "left", no_wrap=at > 0, overflow="fold")
    return table


def _print_results(results: Sequence[Evaluation]) -> None:
    console = Console(highlight=False)
    by_trace: dict[str, list[Evaluation]] = {}
    for result in results:
        by_trace.setdefault(result.trace, []).append(result)
    for path, group in by_trace.items():
        first = group[0]
        console.print(f"[bold]{escape(Path(path).name)}[/bold]")
        console.print(
            f"{escape(first.model)}: {first.layers} layers x {first.experts} experts,"
            f" k = {first.top_k}; {first.tokens:,} tokens"
            + (f", {first.warm_tokens:,} learned before" if first.warm else "")
        )
        for table in (
            _quality(group),
            _own_rule(group),
            *_misses(group),
            _cold_start(group),
            *_reliability(group, width=console.width),
            *_layers(group, width=console.width),
        ):
            console.print(table)


def _quality(group: Sequence[Evaluation]) -> Table:
    table = _table(
        "Recall of the best ranked, in %; expected calibration error",
        ["predictor", "h", "@k", "@1.5k", "@2k", "@3k", "ECE", "token-layers/s"],
    )
    for r in group:
        table.add_row(
            r.predictor,
            str(r.horizon),
            *(_percent(v) for v in (r.recall_at_k, r.recall_at_1_5k)),
            *(_percent(v) for v in (r.recall_at_2k, r.recall_at_3k)),
            _error(r.ece),
            f"{r.token_layers_per_second:,.0f}",
        )
    return table


def _own_rule(group: Sequence[Evaluation]) -> Table:
    table = _table(
        "At the predictor's own stopping rule, in %; calibration error of what it proposes",
        ["predictor", "h", "recall", "precision", "over-fetch", "ECE"],
    )
    for r in group:
        table.add_row(
            r.predictor,
            str(r.horizon),
            _percent(r.own_recall),
            _percent(r.own_precision),
            f"{r.over_fetch:.2f} x",
            _error(r.ece_proposed),
        )
    return table


def _misses(group: Sequence[Evaluation]) -> list[Table]:
    caches = group[0].miss_recall
    if not caches:
        return []
    table = _table(
        "Misses behind an LRU cache of a share of all experts: of all demands, and recall, in %",
        [
            *("predictor", "h"),
            *(
                f"{100 * cache['residency']:g} %\n{what}"
                for cache in caches
                for what in ("miss", "@k", "@2k")
            ),
        ],
    )
    for r in group:
        cells = []
        for cache in r.miss_recall:
            cells += [cache["miss_rate"], cache["recall_at_k"], cache["recall_at_2k"]]
        table.add_row(r.predictor, str(r.horizon), *map(_percent, cells))
    return [table]


def _cold_start(group: Sequence[Evaluation]) -> Table:
    blocks = group[0].cold_start
    count = min(_COLD_COLUMNS, len(blocks))
    picked = [round(n * (len(blocks) - 1) / max(1, count - 1)) for n in range(count)]
    heads = [
        f"{blocks[at]['first']}\n–{blocks[at]['first'] + blocks[at]['tokens'] - 1}" for at in picked
    ]
    table = _table("Cold start: recall@k of tokens, in %", ["predictor", "h", *heads])
    for r in group:
        cells = [_percent(r.cold_start[at]["recall_at_k"]) for at in picked]
        table.add_row(r.predictor, str(r.horizon), *cells)
    return table


def _side_by_side(
    title: str, first: str, rows: Sequence[str], columns: Mapping[str, Sequence[str]], *, width: int
) -> list[Table]:
    """Tables of as many columns as fit beside the first."""
    heads = list(columns)
    room = width - 2 - max(map(len, (first, *rows)))
    tables = []
    while heads:
        taken = 0
        used = 0
        for head in heads:
            used += 1 + max(len(text) for text in (*head.split("\n"), *columns[head]))
            if taken and used > room:
                break
            taken += 1
        table = _table(title, [first, *heads[:taken]])
        for at, row in enumerate(rows):
            table.add_row(row, *(columns[head][at] for head in heads[:taken]))
        tables.append(table)
        heads = heads[taken:]
    return tables


def _reliability(group: Sequence[Evaluation], *, width: int) -> list[Table]:
    calibrated = {_head(r): r.reliability for r in group if r.reliability is not None}
    if not calibrated:
        return []
    bins = next(iter(calibrated.values()))
    return _side_by_side(
        "Calibration: share that came true in %, and number of predictions",
        "predicted",
        [f"{row['low']:.3f} to {row['high']:.3f}" for row in bins],
        {
            head: [
                f"{_percent(row['observed'])} of {row['count']:,}" if row["count"] else "–"
                for row in table
            ]
            for head, table in calibrated.items()
        },
        width=width,
    )


def _layers(group: Sequence[Evaluation], *, width: int) -> list[Table]:
    return _side_by_side(
        "Recall@k by layer, in %",
        "layer",
        [str(layer) for layer in range(group[0].layers)],
        {_head(r): [_percent(row["recall_at_k"]) for row in r.by_layer] for r in group},
        width=width,
    )


def _head(result: Evaluation) -> str:
    return f"{result.predictor}\nh = {result.horizon}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
