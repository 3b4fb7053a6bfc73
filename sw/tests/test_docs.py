"""What the documents show runs, and says what is true."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from prestage.cli import main
from prestage_sim.runs import METRICS
from prestage_sim.traces import Trace, save_trace

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ["driver.md", "traces.md", "evaluate.md", "simulate.md"]


def blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def make(name):
    rng = np.random.default_rng(1)
    order = rng.permuted(np.tile(np.arange(16), (12, 4, 1)), axis=-1)
    trace = Trace(experts=order[..., :2], experts_per_layer=16, meta={"model": "test-moe"})
    save_trace(name, trace)


@pytest.mark.parametrize("page", [*PAGES, "profiles.md"])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("traces").mkdir()
    for name in ("trace.npz", "test.npz", "train.npz", "traces/one.npz", "responses.jsonl"):
        make(name)
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            program, *arguments = shlex.split(line.replace("*", "one"))
            assert program == "prestage"
            # The trace made here has 16 experts, and building sim:// takes too long for this test.
            arguments = ["16" if a == "128" else a for a in arguments]
            if not any(a.startswith("sim://") for a in arguments):
                assert main(arguments) == 0, (line, capsys.readouterr().err)


def test_csv_block_loads(tmp_path):
    from prestage_sim.traces import load_trace

    (block,) = blocks("traces.md", "csv")
    path = tmp_path / "trace.csv"
    path.write_text(block)
    trace = load_trace(path)
    assert (trace.tokens, trace.layers, trace.top_k, trace.experts_per_layer) == (1, 2, 2, 8)


def test_every_metric_is_documented():
    text = (DOCS / "driver.md").read_text(encoding="utf-8")
    for name in METRICS:
        if name != "bytes_moved":
            assert f"| {name.replace('_', '-' if name == 'over_fetch' else ' ')} |" in text
