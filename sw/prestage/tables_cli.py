"""The command ``prestage tables``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig, preset
from prestage_hw.contract.perceptron import FORMS, PerceptronConfig

from .device import Device
from .errors import ArgumentError
from .opening import open_device
from .output import check_writable
from .replay import default_slots
from .snapshot import Snapshot, read_snapshot
from .terminal import warn

__all__ = ["add_tables"]

#: Options of a device that a snapshot knows too, with the parameters of :class:`DeviceConfig`.
_KNOWN = ("contexts", "successors")


def add_tables(
    commands: Any,
    *,
    add: Callable[..., argparse.ArgumentParser],
    positive: Callable[[str], int],
) -> None:
    """Add the command to a command line.

    Parameters
    ----------
    commands
        What :meth:`argparse.ArgumentParser.add_subparsers` has returned.
    add : callable
        Adds a command with description and examples.
    positive : callable
        Type of a positive integer.
    """
    group = commands.add_parser(
        "tables",
        help="Save and load what a predictor has learned",
        description="Save and load what a device's predictor has learned.",
        epilog="examples:\n"
        "  prestage tables save learned.tables --device model:// --model gpt-oss-20b\n"
        "  prestage tables load learned.tables --device model://\n"
        "  prestage tables info learned.tables",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    save = add(
        actions,
        "save",
        _run_save,
        text="Save the tables of a device's predictor to a file. Words are read one at a time while"
        " the device is idle,\nso that nothing else is disturbed.",
        examples="  prestage tables save learned.tables --device model:// --model gpt-oss-20b\n"
        "  prestage tables save learned.tables --device 'sim://?latency=64' --model tiny"
        " --contexts 2\n"
        "  prestage replay trace.npz --save-tables learned.tables",
    )
    save.add_argument("file", metavar="FILE", type=Path, help="snapshot to write")
    _add_device(save, positive, default="--model says")
    load = add(
        actions,
        "load",
        _run_load,
        text="Load the tables of a device's predictor from a file, in place of all that it has"
        " learned. Nothing is written\nbefore the whole file was checked.",
        examples="  prestage tables load learned.tables --device model://\n"
        "  prestage tables load learned.tables --device sim:// --slots 64\n"
        "  prestage replay trace.npz --tables learned.tables",
    )
    load.add_argument("file", metavar="FILE", type=Path, help="snapshot to read")
    _add_device(load, positive, default="the snapshot says")
    info = add(
        actions,
        "info",
        _run_info,
        text="Check a snapshot and print what it is of.",
        examples="  prestage tables info learned.tables\n"
        "  prestage tables info learned.tables --json",
    )
    info.add_argument("file", metavar="FILE", type=Path, help="snapshot to read")
    info.add_argument("--json", action="store_true", help="print one JSON object")


def _add_device(
    parser: argparse.ArgumentParser, positive: Callable[[str], int], *, default: str
) -> None:
    parser.add_argument(
        "--device", default="model://", metavar="URL", help="device (default: %(default)s)"
    )
    group = parser.add_argument_group("what the device is; it is checked")
    group.add_argument("--model", metavar="NAME", help=f"model preset: {', '.join(PRESETS)}")
    group.add_argument("--layers", type=positive, metavar="L", help=f"MoE layers (or as {default})")
    group.add_argument(
        "--experts", type=positive, metavar="E", help=f"experts a layer (or as {default})"
    )
    group.add_argument(
        "--top-k", type=positive, metavar="K", help=f"experts that are chosen (or as {default})"
    )
    group.add_argument(
        "--predictor", metavar="NAME", help=f"predictor: {', '.join(DeviceConfig.PREDICTORS)}"
    )
    group.add_argument(
        "--form", metavar="NAME", help=f"form of the perceptron predictor: {', '.join(FORMS)}"
    )
    group.add_argument(
        "--successors", type=positive, metavar="N", help="entries in a row of the st_moe predictor"
    )
    group.add_argument("--contexts", type=positive, metavar="N", help="sequences side by side")
    group.add_argument(
        "--slots", type=positive, metavar="N", help="slots (default: a quarter of all experts)"
    )
    for name, what in (
        ("--expert-bytes", "size of an expert"),
        ("--tile-bytes", "unit of transfer"),
        ("--data-bytes", "width of the memory port"),
    ):
        group.add_argument(name, type=positive, metavar="N", help=f"{what}, in bytes")


def _config(args: argparse.Namespace, snapshot: Snapshot | None) -> DeviceConfig:
    """Device that the options, or else the snapshot, describe."""
    try:
        model = preset(args.model) if args.model is not None else None
        shape = {}
        for name in ("layers", "experts", "top_k"):
            value = getattr(args, name)
            if value is None:
                value = getattr(model or snapshot, name, None)
            if value is None:
                raise ArgumentError("Device needs --model, or --layers, --experts and --top-k")
            shape[name] = value
        named = model or snapshot
        name = getattr(named, "name", getattr(named, "model", "custom"))
        model = ModelConfig(name=name, **shape)
        given = {
            name: getattr(args, name)
            for name in (
                *("predictor", "form", "slots", "expert_bytes", "tile_bytes", "data_bytes"),
                *_KNOWN,
            )
            if getattr(args, name) is not None
        }
        if snapshot is not None:
            known: dict[str, Any] = {"predictor": snapshot.predictor}
            if snapshot.form and args.form is None:
                known["form"] = snapshot.form
                known["perceptron"] = PerceptronConfig.from_fields(
                    snapshot.parameters["perceptron"]
                )
            known |= {n: snapshot.parameters[n] for n in _KNOWN if n in snapshot.parameters}
            given = {**known, **given}
        given.setdefault("slots", default_slots(**shape, contexts=given.get("contexts", 1)))
        return DeviceConfig(model=model, **given)
    except (ValueError, TypeError, KeyError) as error:
        raise ArgumentError(str(error)) from error


def _print(path: Path, snapshot: Snapshot, done: str) -> None:
    print(f"{path}: {len(snapshot.tables)} tables, {snapshot.words:,} words {done}")


def _warn_of_refusal(device: Device) -> None:
    """Say which register write the device has refused, if any."""
    if refused := device.refusal(clear=False):
        warn(str(refused))


def _run_save(args: argparse.Namespace) -> int:
    check_writable(args.file, what="Snapshot")
    with open_device(args.device, config=_config(args, None)) as device:
        snapshot = device.save_tables(args.file)
        _warn_of_refusal(device)
    _print(args.file, snapshot, "saved")
    return 0


def _run_load(args: argparse.Namespace) -> int:
    snapshot = read_snapshot(args.file)
    config = _config(args, snapshot)
    snapshot.check(config)
    with open_device(args.device, config=config) as device:
        device.load_tables(snapshot)
        _warn_of_refusal(device)
    _print(args.file, snapshot, "loaded")
    return 0


def _run_info(args: argparse.Namespace) -> int:
    snapshot = read_snapshot(args.file)
    info: dict[str, Any] = {
        "model": snapshot.model,
        "layers": snapshot.layers,
        "experts": snapshot.experts,
        "top_k": snapshot.top_k,
        "predictor": snapshot.predictor,
        "form": snapshot.form or None,
        "parameters": dict(snapshot.parameters),
        "register_hash": f"{snapshot.register_hash:#010x}",
        "tables": [len(table) for table in snapshot.tables.values()],
    }
    if args.json:
        print(json.dumps({"path": str(args.file), **info}, indent=2))
        return 0
    table = Table(title=str(args.file), show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in info.items():
        if name == "tables":
            value = ", ".join(f"{words:,} words" for words in info["tables"])
        elif name == "parameters":
            value = json.dumps(value)
        table.add_row(name.replace("_", " "), "–" if value is None else str(value))
    Console().print(table)
    return 0
