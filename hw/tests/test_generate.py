# amaranth: UnusedElaboratable=no
"""Verilog of the presets, its synthesis, and the table of areas."""

import json
import re

import pytest

from prestage_hw import generate
from prestage_hw.contract import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_default_slots_are_a_quarter(name):
    model = preset(name)
    slots = generate.default_slots(name)
    assert slots >= model.layers * model.experts / 4
    assert slots >= model.top_k
    assert generate.preset_device(name).slots == slots


def test_default_slots_suffice_for_all_contexts():
    assert generate.default_slots("tiny") == 8
    assert generate.default_slots("tiny", contexts=8) == 16


def test_options_reach_the_device():
    config = generate.preset_device("tiny", slots=6, contexts=2, predictor="none")
    assert (config.slots, config.contexts, config.predictor) == (6, 2, "none")


def test_refusals_are_told(capsys):
    assert generate.main(["tiny", "--slots", "1"]) == 2
    assert capsys.readouterr().err == "Slot count must be at least contexts x top-k = 2, not 1\n"
    with pytest.raises(SystemExit):
        generate.main(["gpt-5"])
    assert "invalid choice: 'gpt-5'" in capsys.readouterr().err


def test_tiny_synthesizes_without_latches_or_warnings(tmp_path, capsys):
    path = tmp_path / "tiny.v"
    assert generate.main(["tiny", "--output", str(path), "--area"]) == 0, capsys.readouterr().err
    text = path.read_text()
    assert re.search(r"^module prestage\(", text, re.MULTILINE)
    for port in ("rx__payload", "tx__valid", "bus__arvalid", "reads__ready", "beats__payload"):
        assert re.search(rf"^  (input|output) (\[.*\] )?{port};", text, re.MULTILINE), port
    # No memory is set to zero word by word.
    assert not re.search(r"^  initial begin\n    \S+ ?\[0\] = \d+'h0+;", text, re.MULTILINE)
    report = json.loads(path.with_suffix(".area.json").read_text())
    assert report["config"]["model"]["name"] == "tiny"
    blocks = report["blocks"]
    assert {"link", "predictor", "scheduler", "dma", "buffer"} <= blocks.keys()
    for resource in ("luts", "flip_flops", "block_rams"):
        parts = [area[resource] for block, area in blocks.items() if block != "total"]
        assert sum(parts) == blocks["total"][resource] > 0
    assert "| total |" in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.parametrize(
    ("preset", "form"),
    # The compressed form needs more than eight experts.
    [("tiny", "lite"), ("gpt-oss-20b", "compressed"), ("tiny", "full")],
)
def test_perceptron_synthesizes_without_latches_or_warnings(preset, form, tmp_path, capsys):
    options = ["--predictor", "perceptron", "--form", form, "--check"]
    path = tmp_path / "device.v"
    assert generate.main([preset, "--output", str(path), *options]) == 0, capsys.readouterr().err
    assert "synthesis: no latches, no warnings" in capsys.readouterr().out


LATCH = """
module prestage(input enable, input d, output reg q);
always @* if (enable) q = d;
endmodule
"""

TWO_DRIVERS = """
module prestage(input a, input b, output q);
assign q = a;
assign q = b;
endmodule
"""

OTHER_WIDTH = """
module narrow(input [1:0] a, output q);
assign q = ^a;
endmodule
module prestage(input a, output q);
narrow inside(.a(a), .q(q));
endmodule
"""

MISSING_MODULE = """
module prestage(input a, output q);
other instance_of_other(.a(a), .q(q));
endmodule
"""


@pytest.mark.parametrize(
    "text, message",
    [
        (LATCH, "yosys failed"),
        (TWO_DRIVERS, "yosys failed on .*multiple conflicting drivers"),
        (OTHER_WIDTH, "yosys warned about .*Resizing cell port"),
        (MISSING_MODULE, "yosys failed on .*referenced in module"),
    ],
    ids=["latch", "two drivers", "other width", "missing module"],
)
def test_faults_are_found(tmp_path, text, message):
    path = tmp_path / "fault.v"
    path.write_text(text)
    with pytest.raises(generate.SynthesisError, match=f"(?s){message}"):
        generate.synthesize(path)


def test_missing_yosys(tmp_path, monkeypatch):
    monkeypatch.setattr(generate.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(generate.SynthesisError, match=r"^yosys is missing: install the extra"):
        generate.synthesize(tmp_path / "x.v")


def test_area_counts_what_is_below():
    def module(**cells):
        return {"num_cells_by_type": {key.replace("__", "."): n for key, n in cells.items()}}

    statistics = {
        "modules": {
            "\\top": module(top__a=1, top__b=1, LUT4=5),
            "\\top.a": module(top__a__c=2, TRELLIS_FF=3, PFUMX=9),
            "\\top.a.c": module(CCU2C=1, DP16KD=4),
            "\\top.b": module(TRELLIS_DPR16X4=1, MULT18X18D=2),
        }
    }
    blocks = generate.area_of_blocks(statistics, name="top")
    assert blocks == {
        "a": {"luts": 4, "flip_flops": 3, "block_rams": 8, "multipliers": 0},
        "b": {"luts": 6, "flip_flops": 0, "block_rams": 0, "multipliers": 2},
        "(top)": {"luts": 5, "flip_flops": 0, "block_rams": 0, "multipliers": 0},
        "total": {"luts": 15, "flip_flops": 3, "block_rams": 8, "multipliers": 2},
    }
    assert "| a | 4 | 3 | 8 | 0 |" in generate.area_table(blocks)
