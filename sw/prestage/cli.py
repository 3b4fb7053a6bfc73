"""The command ``prestage``."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from prestage_hw.contract import PRESETS, DeviceConfig
from prestage_hw.contract.perceptron import FORMS
from prestage_sim.runs import METRICS, Run
from prestage_sim.traces import (
    FORMATS,
    Trace,
    TraceError,
    format_of,
    load_trace,
    model_config,
    write_trace,
)

from . import __version__
from .errors import ArgumentError, PrestageError
from .evaluate_cli import add_evaluate
from .opening import known_links, open_device
from .output import Files, OutputError, check_writable, write_file
from .replay import (
    PACES,
    POLICIES,
    Interrupt,
    default_slots,
    device_config,
    profile_tables,
    replay,
    run_object,
)
from .simulate_cli import add_simulate, add_sweep
from .snapshot import Snapshot, read_snapshot
from .tables_cli import add_tables
from .terminal import progress_bar, warn

__all__ = ["main"]

#: Exit codes: a device that failed or gave wrong bytes, input that was refused, Ctrl-C.
_FAILED, _REFUSED, _INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors look like all the others of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(_REFUSED, f"prestage: error: {message}\nTry '{self.prog} --help'.\n")


def _positive(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {value}")
    return value


def _layer_sizes(text: str) -> tuple[int, ...]:
    """Sizes in bytes, separated by commas, each for one layer or, as ``12x2048``, for several."""
    sizes: list[int] = []
    for each in text.split(","):
        count, times, size = each.rpartition("x")
        if not (size.isdecimal() and (count.isdecimal() or not times)) or len(count) > 3:
            raise argparse.ArgumentTypeError(
                f"must be sizes as 2048 or 12x2048, separated by commas, not {each!r}"
            )
        sizes += [int(size)] * (int(count) if times else 1)
    return tuple(sizes)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, text: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.split(". ")[0].rstrip("."),
        description=text,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading the trace")
    group.add_argument(
        "--from",
        dest="source",
        metavar="FORMAT",
        help=f"format of the input: {', '.join(FORMATS)} (default: by its suffix)",
    )
    group.add_argument(
        "--experts",
        type=_positive,
        metavar="E",
        help="experts a layer, where the trace doesn't say",
    )
    group.add_argument(
        "--layers", type=_positive, metavar="L", help="MoE layers, where the trace doesn't say"
    )
    group.add_argument(
        "--top-k", type=_positive, metavar="K", help="experts a row, where the trace doesn't say"
    )


def _load(args: argparse.Namespace, path: str) -> Trace:
    return load_trace(
        path, name=args.source, experts=args.experts, layers=args.layers, top_k=args.top_k
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="prestage",
        description="Predict and prefetch the experts of Mixture-of-Experts models.",
        epilog="examples:\n"
        "  prestage replay trace.npz\n"
        "  prestage replay trace.npz --device sim:// --report report.html\n"
        "  prestage evaluate trace.npz --predictor st_moe --report quality.html\n"
        "  prestage simulate trace.npz --machine unit --rho 4 --report time.html\n"
        "  prestage trace info trace.npz\n"
        "  prestage info",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prestage {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_replay(commands)
    add_evaluate(
        add=functools.partial(_command, commands),
        add_reading=_add_reading,
        positive=_positive,
        load=_load,
    )
    for add_command in (add_simulate, add_sweep):
        add_command(
            add=functools.partial(_command, commands),
            add_reading=_add_reading,
            positive=_positive,
            load=_load,
        )
    add_tables(commands, add=_command, positive=_positive)
    _add_trace(commands)
    _command(
        commands,
        "info",
        _run_info,
        text="List the model presets and the devices that can be opened.",
        examples="  prestage info",
    )
    return parser


def _add_replay(commands: Any) -> None:
    parser = _command(
        commands,
        "replay",
        _run_replay,
        text="Stream a routing trace through a device. Every byte of every expert that comes ready"
        " is compared with\nmemory, and the device's counters are printed.",
        examples="  prestage replay trace.npz\n"
        "  prestage replay trace.npz --device 'sim://?latency=64&bytes_per_cycle=16' --first 200\n"
        "  prestage replay trace.npz --device sim:// --pace timed --layer-cycles 2000\n"
        "  prestage replay test.npz --profile train1.npz --profile train2.npz --json run.json\n"
        "  prestage replay train.npz --save-tables learned.tables\n"
        "  prestage replay test.npz --tables learned.tables\n"
        "  prestage replay trace.npz --predictor none --slots 64 --report report.html",
    )
    parser.add_argument("trace", metavar="TRACE", help="routing trace: .npz, .jsonl or .csv")
    parser.add_argument(
        "--device", default="model://", metavar="URL", help="device (default: %(default)s)"
    )
    parser.add_argument(
        "--first", type=_positive, metavar="N", help="replay only the first N tokens"
    )
    parser.add_argument(
        "--pace",
        default=PACES[0],
        metavar="PACE",
        help="drained: a layer is posted when the device is idle, so that counters are the same on"
        " every device; timed: layers come at the model's pace (default: %(default)s)",
    )
    parser.add_argument(
        "--layer-cycles",
        type=_positive,
        metavar="N",
        help="clock cycles that a layer computes, at timed pace",
    )
    device = parser.add_argument_group("device")
    device.add_argument(
        "--predictor",
        default="st_moe",
        metavar="NAME",
        help=f"predictor: {', '.join(DeviceConfig.PREDICTORS)} (default: %(default)s)",
    )
    device.add_argument(
        "--form",
        default="lite",
        metavar="NAME",
        help=f"form of the perceptron predictor: {', '.join(FORMS)} (default: %(default)s)",
    )
    device.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="experts that the buffer holds (default: a quarter of all)",
    )
    device.add_argument(
        "--expert-bytes",
        type=int,
        metavar="N",
        help="size of an expert, scaled down (default: 2048, or the greatest of --layer-bytes)",
    )
    device.add_argument(
        "--layer-bytes",
        type=_layer_sizes,
        default=(),
        metavar="N,N,...",
        help="sizes of an expert of each layer, where they differ; 12x2048 stands for twelve layers"
        " of 2048 bytes (default: all alike)",
    )
    device.add_argument(
        "--tile-bytes",
        type=int,
        default=512,
        metavar="N",
        help="unit of transfer (default: %(default)s)",
    )
    device.add_argument(
        "--prefetch-tiles",
        type=int,
        metavar="N",
        help="prefetch tiles under way at once, 1 to 4 (default: 4 at drained pace, 1 at timed)",
    )
    device.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        help="which expert gives way to another (default: next-use with the predictor perceptron,"
        " else lru)",
    )
    device.add_argument(
        "--throttle",
        action=argparse.BooleanOptionalAction,
        help="switch off prefetches of a kind while they cost more than they save (default: at"
        " timed pace)",
    )
    device.add_argument(
        "--budget",
        type=int,
        default=0,
        metavar="EIGHTHS",
        help="at timed pace drop a prefetch of which fewer eighths are expected before its layer is"
        " routed (default: 0, drops none)",
    )
    device.add_argument(
        "--rescan",
        type=int,
        default=0,
        metavar="LAYERS",
        help="prefetch what the buffer's own values of so many next layers say, in place of the"
        " predictor's candidates (default: 0, its candidates)",
    )
    device.add_argument(
        "--rescan-least",
        type=int,
        metavar="CONFIDENCE",
        help="least confidence of what is found so, 1 to 255 in 1/256 (default: 24)",
    )
    device.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="TRACE",
        help="let the predictor learn this trace before; may be given several times",
    )
    device.add_argument(
        "--tables",
        type=Path,
        metavar="FILE",
        help="start with the predictor's tables as this snapshot has them",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object")
    output.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with plots")
    output.add_argument(
        "--save-tables",
        type=Path,
        metavar="FILE",
        help="write a snapshot of the predictor's tables after the replay",
    )
    output.add_argument("--quiet", action="store_true", help="print no table and no progress")
    _add_reading(parser)


def _add_trace(commands: Any) -> None:
    group = commands.add_parser(
        "trace",
        help="Look at routing traces and convert them",
        description="Look at routing traces and convert them.",
        epilog="examples:\n"
        "  prestage trace info trace.npz\n"
        "  prestage trace convert responses.jsonl trace.npz --experts 128\n"
        "  prestage trace validate trace.csv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    info = _command(
        actions,
        "info",
        _run_trace_info,
        text="Print a trace's shape, where it comes from, and how its routing is spread.",
        examples="  prestage trace info trace.npz\n  prestage trace info trace.npz --json",
    )
    info.add_argument("trace", metavar="TRACE", help="routing trace")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    _add_reading(info)
    convert = _command(
        actions,
        "convert",
        _run_trace_convert,
        text="Convert a trace to another format: .npz, .jsonl or .csv.",
        examples="  prestage trace convert vllm.jsonl trace.npz --experts 128\n"
        "  prestage trace convert sglang.jsonl trace.npz --layers 48 --top-k 8 --experts 128\n"
        "  prestage trace convert trace.npz trace.csv --first 100",
    )
    convert.add_argument("trace", metavar="TRACE", help="trace to read")
    convert.add_argument("output", metavar="OUTPUT", type=Path, help="trace to write")
    convert.add_argument(
        "--to", metavar="FORMAT", help="format of the output (default: by its suffix)"
    )
    convert.add_argument("--first", type=_positive, metavar="N", help="only the first N tokens")
    convert.add_argument("--model", metavar="NAME", help="name of the model to record")
    _add_reading(convert)
    validate = _command(
        actions,
        "validate",
        _run_trace_validate,
        text="Check that traces keep the rules: shapes, ids in range, no id twice in a row.",
        examples="  prestage trace validate trace.npz\n  prestage trace validate traces/*.npz",
    )
    validate.add_argument("traces", metavar="TRACE", nargs="+", help="traces to check")
    _add_reading(validate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (PrestageError, TraceError) as error:
        print(f"prestage: error: {error}", file=sys.stderr)
        return _REFUSED if isinstance(error, ValueError | OutputError | ImportError) else _FAILED
    except KeyboardInterrupt:
        print("prestage: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone: the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except OSError as error:
        print(f"prestage: error: output can't be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _REFUSED


def _run_replay(args: argparse.Namespace) -> int:
    for path, what in (
        (args.json, "JSON file"),
        (args.report, "Report"),
        (args.save_tables, "Snapshot"),
    ):
        if path is not None:
            check_writable(path, what=what)
    if args.pace == "timed" and args.layer_cycles is None:
        raise ArgumentError("Pace timed needs --layer-cycles")
    if args.tables and args.profile:
        raise ArgumentError("Replay must start from --tables or --profile, not from both")
    trace = _load(args, args.trace)
    if args.first is not None:
        trace = trace.first(args.first)
    config = device_config(
        trace,
        slots=args.slots,
        predictor=args.predictor,
        form=args.form,
        expert_bytes=max(args.layer_bytes, default=2048)
        if args.expert_bytes is None
        else args.expert_bytes,
        layer_bytes=args.layer_bytes,
        tile_bytes=args.tile_bytes,
    )
    if args.save_tables is not None and config.predictor == "none":
        raise ArgumentError("Predictor must have tables to save, but none has none")
    tables: dict[int, NDArray[np.uint32]] = {}
    start: Snapshot | None = None
    if args.tables is not None:
        start = read_snapshot(args.tables)
        start.check(config)
        tables = dict(start.tables)
    elif args.profile:
        tables = profile_tables(config, (load_trace(path) for path in args.profile))
    with open_device(args.device, config=config) as device, Interrupt() as interrupt:
        if start is not None:
            device.load_tables(start)
        elif tables:
            device.configure(tables=tables)
        with progress_bar("tokens", quiet=args.quiet) as progress:
            task = progress.add_task("replay", total=trace.tokens)
            run = replay(
                device,
                trace,
                pace=args.pace,
                layer_cycles=args.layer_cycles or 0,
                prefetch_tiles=args.prefetch_tiles,
                policy=None if args.policy is None else POLICIES[args.policy],
                throttle=args.throttle,
                budget=args.budget,
                rescan=args.rescan,
                rescan_least=args.rescan_least,
                interrupt=interrupt,
                progress=lambda done: progress.update(task, completed=done),
                tables=tables,
            )
        failure: PrestageError | None = None
        if args.save_tables is not None and not run.error:
            # What the replay has found is shown even if this goes wrong.
            try:
                device.save_tables(args.save_tables)
            except PrestageError as error:
                failure = error
    if not args.quiet:
        _print_run(run, args.trace)
    _write_results(args, run)
    if run.refusal:
        warn(run.refusal)
    if unordered := run.counters.get("routes_out_of_order"):
        warn(f"{unordered:,} routing decisions came out of order")
    if run.error:
        print(f"prestage: error: {run.error}", file=sys.stderr)
        return _FAILED
    if failure is not None:
        raise failure
    if not run.complete:
        print(
            f"prestage: interrupted after {run.tokens} of {run.trace.tokens} tokens",
            file=sys.stderr,
        )
        return _INTERRUPTED
    return 0


def _write_results(args: argparse.Namespace, run: Run) -> None:
    """Write all files that were asked for; an error in one doesn't lose the others."""
    files = Files()
    if args.json is not None:
        text = json.dumps(run_object(run, trace_path=args.trace), indent=2) + "\n"
        files.write(args.json, text, what="JSON file")
    if args.report is not None:
        # Only the page needs the template engine.
        from prestage_sim.report import render

        files.write(args.report, render(run, trace_path=args.trace), what="Report")
        if files.complete and not args.quiet:
            print(f"Report: {args.report}")
    files.close()


def _percent(value: float | int | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _rows(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and explanation of what the table shows."""
    c, m = run.counters, run.metrics()
    rows = [
        ("recall", _percent(m["recall"]), METRICS["recall"]),
        (
            "over-fetch",
            "–" if m["over_fetch"] is None else f"{m['over_fetch']:.2f} x",
            METRICS["over_fetch"],
        ),
        ("precision", _percent(m["precision"]), METRICS["precision"]),
        ("coverage", _percent(m["coverage"]), METRICS["coverage"]),
        ("hit rate", _percent(m["hit_rate"]), METRICS["hit_rate"]),
    ]
    if c:
        rows += [
            ("demands", f"{c['demands']:,}", f"hits {c['hits']:,}, misses {c['misses']:,}"),
            ("late", f"{c['late']:,}", "Demands that found their expert in flight as a prefetch."),
            ("useful", f"{c['useful']:,}", "Prefetched experts demanded before eviction."),
            ("useless", f"{c['useless']:,}", "Prefetched experts evicted without a demand."),
            (
                "bytes moved",
                _bytes(c["demand_bytes"] + c["prefetch_bytes"]),
                f"demand {_bytes(c['demand_bytes'])}, prefetch {_bytes(c['prefetch_bytes'])}",
            ),
        ]
    if run.cycles:
        rate = f"{run.cycles / run.seconds:,.0f} a second" if run.seconds else ""
        rows.append(("cycles", f"{run.cycles:,}", rate))
    else:
        rows.append(("cycles", "–", "The device has no clock."))
    if run.pace == "timed":
        stall = run.stall_summary()
        share = stall["stall_cycles"] / run.cycles if run.cycles else None
        rows.append(
            (
                "stall cycles",
                f"{stall['stall_cycles']:,}",
                f"{_percent(share)} of all, {stall['stall_mean']:,} a layer",
            )
        )
    checked = f"{run.experts_checked:,} experts, each byte as in memory"
    rows.append(("bytes checked", _bytes(run.bytes_checked), checked))
    rows.append(("seconds", f"{run.seconds:.1f}", f"{run.tokens} of {run.trace.tokens} tokens"))
    return rows


def _sizes(config: DeviceConfig) -> str:
    """What slots hold, where experts differ in size."""
    if not config.layer_bytes:
        return ""
    return f" for experts of {min(config.layer_bytes)} to {max(config.layer_bytes)}"


def _print_run(run: Run, path: str) -> None:
    model = run.config.model
    table = Table(
        title=f"{Path(path).name} on {run.url}",
        caption=f"{model.name}: {model.layers} layers x {model.experts} experts, k = {model.top_k};"
        f" predictor {run.config.predictor}, {run.config.slots} slots of"
        f" {run.config.expert_bytes} bytes{_sizes(run.config)}, pace {run.pace}",
        show_header=False,
    )
    table.add_column(style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in _rows(run):
        table.add_row(*row)
    Console().print(table)


def _run_trace_info(args: argparse.Namespace) -> int:
    trace = _load(args, args.trace)
    info = _trace_info(trace)
    if args.json:
        print(json.dumps({"path": args.trace, **info}, indent=2))
        return 0
    table = Table(title=args.trace, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in info.items():
        if isinstance(value, float):
            value = f"{value:.3f}"
        table.add_row(name.replace("_", " "), "–" if value is None else str(value))
    Console().print(table)
    return 0


def _trace_info(trace: Trace) -> dict[str, Any]:
    config = model_config(trace)
    counts = np.stack(
        [
            np.bincount(trace.experts[:, layer].ravel(), minlength=trace.experts_per_layer)
            for layer in range(trace.layers)
        ]
    )
    share = np.sort(counts, axis=1)[:, ::-1] / counts.sum(axis=1, keepdims=True)
    quarter = max(1, trace.experts_per_layer // 4)
    repeated = None
    if trace.tokens > 1:
        same = (trace.experts[1:, :, :, None] == trace.experts[:-1, :, None, :]).any(axis=-1)
        repeated = float(same[np.diff(trace.request_id) == 0].mean())
    return {
        "model": trace.model,
        "preset": config.name if config.name in PRESETS else None,
        "domain": trace.meta.get("domain"),
        "tokens": trace.tokens,
        "requests": trace.requests,
        "decode_tokens": int(trace.is_decode.sum()),
        "layers": trace.layers,
        "experts": trace.experts_per_layer,
        "top_k": trace.top_k,
        "token_ids": "known" if (trace.token >= 0).all() else "partly or not known",
        "scores": trace.scores is not None,
        "share_of_busiest_quarter": float(share[:, :quarter].sum(axis=1).mean()),
        "repeated_from_previous_token": repeated,
        "default_slots": default_slots(
            layers=trace.layers, experts=trace.experts_per_layer, top_k=trace.top_k
        ),
    }


def _run_trace_convert(args: argparse.Namespace) -> int:
    target = format_of(args.output, name=args.to)
    check_writable(args.output, what="Trace")
    trace = _load(args, args.trace)
    if args.first is not None:
        trace = trace.first(args.first)
    if args.model is not None:
        trace = trace.named(args.model)
    write_file(args.output, lambda file: write_trace(file, trace, name=target), what="Trace")
    print(
        f"{args.output}: {trace.tokens} tokens, {trace.layers} layers,"
        f" {trace.experts_per_layer} experts, k = {trace.top_k}"
    )
    return 0


def _run_trace_validate(args: argparse.Namespace) -> int:
    failed = 0
    for path in args.traces:
        try:
            trace = _load(args, path)
            model_config(trace)
        except TraceError as error:
            failed += 1
            text = str(error) if str(error).startswith(path) else f"{path}: {error}"
            print(f"prestage: error: {text}", file=sys.stderr)
        else:
            print(
                f"{path}: valid, {trace.tokens} tokens, {trace.layers} layers,"
                f" {trace.experts_per_layer} experts, k = {trace.top_k}"
            )
    return _REFUSED if failed else 0


def _run_info(args: argparse.Namespace) -> int:
    table = Table(title="Model presets")
    for name in ("name", "layers", "experts", "k", "expert size", "default slots"):
        table.add_column(name, justify="left" if name == "name" else "right")
    for preset in PRESETS.values():
        slots = default_slots(layers=preset.layers, experts=preset.experts, top_k=preset.top_k)
        table.add_row(
            preset.name,
            str(preset.layers),
            str(preset.experts),
            str(preset.top_k),
            _bytes(preset.expert_bytes),
            str(slots),
        )
    console = Console()
    console.print(table)
    console.print(f"Devices: {', '.join(f'{name}://' for name in sorted(known_links()))}")
    console.print(f"Predictors: {', '.join(DeviceConfig.PREDICTORS)}")
    return 0
