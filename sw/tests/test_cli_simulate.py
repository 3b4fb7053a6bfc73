"""``prestage simulate`` and ``prestage sweep``: files, messages, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest

from prestage import simulate_cli
from prestage.cli import main
from prestage_sim.simulate import FIELDS, POLICIES, SCORES
from prestage_sim.simulate.machines import MACHINES
from prestage_sim.traces import Trace, save_trace


def make(path, *, seed=1, tokens=60, model="test-moe", **meta):
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(8), (tokens, 3, 1)), axis=-1)
    trace = Trace(
        experts=order[..., :2],
        experts_per_layer=8,
        token=rng.integers(0, 9, tokens),
        meta={"model": model, **meta},
    )
    save_trace(path, trace)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make("one.npz")
    make("two.npz", seed=2, expert_bytes=36864)
    return tmp_path


def test_help_lists_what_there_is():
    assert simulate_cli._MACHINES == MACHINES
    assert simulate_cli._POLICIES == tuple(POLICIES)
    assert simulate_cli._SCORES == SCORES
    assert set(simulate_cli._DEFAULT_POLICIES) <= set(POLICIES)


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_json_has_the_fields_and_one_object_a_cell(folder, capsys):
    command = ["simulate", "one.npz", "--rho", "1,4", "--policy", "lru", "bound,on-demand"]
    assert main([*command, "--json", "cells.json", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    rows = json.loads((folder / "cells.json").read_text())
    assert len(rows) == 3 * 2 * 4
    for row in rows:
        assert tuple(row) == FIELDS
    assert {(r["policy"], r["rho"], r["residency"]) for r in rows} == {
        (policy, rho, residency)
        for policy in ("lru", "bound", "on-demand")
        for rho in (1.0, 4.0)
        for residency in (0.10, 0.25, 0.40, 0.60)
    }
    assert {(r["trace"], r["machine"], r["joules_per_token"]) for r in rows} == {
        ("one.npz", "unit", None)
    }
    # On demand all k experts of every layer are loaded, the first tile after half a layer.
    assert {r["tpot"] for r in rows if r["policy"] == "on-demand" and r["rho"] == 4.0} == {4.75}


def test_tables(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "130")
    command = ["simulate", "two.npz", "--machine", "ecpix5", "--policy", "lru"]
    assert main([*command, "--residency", "0.25,0.5"]) == 0
    wide = capsys.readouterr().out
    assert "two.npz on ecpix5, rho " in wide
    assert re.search(r"policy +resident +time +hits +bytes +J/token +recall", wide)
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--residency", "0.25,0.5"]) == 0
    narrow = capsys.readouterr().out
    assert "…" not in narrow
    assert re.search(r"policy +resident +time +hits +bytes +J/token *\n", narrow)
    assert max(map(len, narrow.splitlines())) <= 80


def test_machine_sets_rho_unless_told(folder):
    command = ["simulate", "two.npz", "--machine", "ecpix5", "--policy", "lru", "--quiet"]
    assert main([*command, "--residency", "0.5", "--json", "own.json"]) == 0
    (own,) = json.loads((folder / "own.json").read_text())
    assert own["joules_per_token"] > 0
    # 1.2 GB/s is what the board has; half of that loads in twice the time.
    assert main([*command, "--residency", "0.5", "--bandwidth", "1.2,0.6", "--json", "b.json"]) == 0
    same, half = json.loads((folder / "b.json").read_text())
    assert same == own
    assert half["rho"] == pytest.approx(2 * own["rho"])
    assert half["tpot"] > own["tpot"]


def test_own_machine_file(folder, capsys):
    text = "[layer]\nseconds = 2\nalpha = 0.5\nexpert_bytes = 1\n[[links]]\nbandwidth = 1\n"
    (folder / "mine.toml").write_text(text)
    command = ["simulate", "one.npz", "--machine", "mine.toml", "--policy", "on-demand", "--quiet"]
    assert main([*command, "--json", "cells.json"]) == 0
    rows = json.loads((folder / "cells.json").read_text())
    assert {(r["machine"], r["rho"]) for r in rows} == {("mine", 1.0)}
    (folder / "mine.toml").write_text(text.replace("seconds = 2", "seconds = -2"))
    assert (
        "prestage: error: Machine file mine.toml: layer.seconds must be above 0, not -2"
        in refused(capsys, *command)
    )
    (folder / "mine.toml").write_text(text.replace("alpha = 0.5", ""))
    assert "Machine file mine.toml: layer.alpha is missing" in refused(capsys, *command)


def test_slots_of_a_machine_file(folder, capsys):
    text = "[layer]\nseconds = 1\nalpha = 0.5\nexpert_bytes = 1\n[[links]]\nbandwidth = 1\n[fast]\n"
    (folder / "mine.toml").write_text(text + "slots = 12\n")
    command = ["simulate", "one.npz", "--machine", "mine.toml", "--policy", "lru", "--quiet"]
    assert main([*command, "--json", "cells.json"]) == 0
    assert [r["residency"] for r in json.loads((folder / "cells.json").read_text())] == [0.5]
    (folder / "mine.toml").write_text(text + "slots = 25\n")
    assert "fast.slots must be at most the model's 3 x 8 = 24 experts, not 25" in refused(
        capsys, *command
    )


def test_unknown_expert_size_is_asked_for(folder, capsys):
    command = ["simulate", "one.npz", "--machine", "ecpix5", "--policy", "lru", "--quiet"]
    assert (
        "one.npz: Trace of model test-moe doesn't say how large an expert is, and the model is not"
        " known: give --expert-bytes" in refused(capsys, *command)
    )
    assert main([*command, "--expert-bytes", "4096"]) == 0
    assert "Attention of test-moe isn't known" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--policy", "luck"], f"Policy must be one of {', '.join(POLICIES)}, not 'luck'"),
        (["--machine", "gpu"], "Machine must be one of unit, paper, rtx-4090-pcie4"),
        (["--machine", "gpu.toml"], "Machine file gpu.toml can't be read: No such file"),
        (["--json", "no/where.json"], "JSON file no/where.json can't be written"),
        (["--report", "."], "Report . can't be written: it is a directory"),
        (["--warm", "none.npz"], "none.npz"),
        (["--timeline", "60", "--report", "r.html"], "token of the trace, 0 to 59, not 60"),
        (
            ["--batch", "4", "--timeline", "15", "--chrome", "c.json"],
            "a step of the trace, 0 to 14",
        ),
        (["--batch", "0"], "Batch must be between 1 and 4,096 tokens, not 0"),
        (["--batch", "61"], "one.npz: Batch must be at most the trace's 60 tokens, not 61"),
        (["--prefill-chunk", "4"], "one.npz: Trace has no tokens of prompts to take in chunks"),
        (["--prompt", "4"], "--prompt needs --prefill-chunk"),
        (["--accept", "0.5"], "--accept needs --draft"),
        (["--draft-time", "0.5"], "--draft-time needs --draft"),
        (["--cutoff", "2"], "--cutoff needs --draft"),
        (["--draft", "2", "--accept", "1.5"], "Acceptance must be between 0 and 1, not 1.5"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(folder, capsys, arguments, message):
    base = ["simulate", "one.npz", "--residency", "0.5"]
    policy = [] if "--policy" in arguments else ["--policy", "lru"]
    assert message in refused(capsys, *base, *policy, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--residency", "1.5"], "no more slots than experts, not 1.5"),
        (["--residency", "half"], "must be numbers such as 0.5,1,4, not 'half'"),
        (["--rho", "0"], "must be above 0, not 0"),
        (["--rho", "1", "--bandwidth", "2"], "not allowed with argument"),
        (["--score", "some"], "invalid choice: 'some'"),
        (["--batch", "1.5"], "must be whole numbers from 0 on, not 1.5"),
        (["--draft", "-1"], "must be whole numbers from 0 on, not -1"),
    ],
    ids=str,
)
def test_bad_options(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["simulate", "one.npz", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_warm_traces_must_have_the_shape(folder, capsys):
    rng = np.random.default_rng(1)
    order = rng.permuted(np.tile(np.arange(8), (9, 4, 1)), axis=-1)[..., :2]
    save_trace("other.npz", Trace(experts=order, experts_per_layer=8))
    said = refused(capsys, "simulate", "one.npz", "--policy", "lru", "--warm", "other.npz")
    assert "other.npz: Trace to learn from must have 3 layers" in said
    assert "as in one.npz" in said


def test_notes(folder, capsys):
    assert main(["simulate", "two.npz", "--machine", "ecpix5", "--policy", "lru", "--quiet"]) == 0
    assert "ecpix5 has room for 9 of the 24 experts" in capsys.readouterr().err
    command = ["simulate", "one.npz", "--residency", "0.05", "--policy", "lru", "--quiet"]
    assert main([*command, "--warm", "one.npz"]) == 0
    said = capsys.readouterr().err
    assert "Residency 0.05 is less than the k = 2 experts of a layer" in said
    assert "one.npz is replayed before it counts" in said


def test_report(folder, capsys):
    command = ["simulate", "two.npz", "--machine", "ecpix5", "--rho", "0.5,4", "--policy", "lru"]
    command += ["bound", "adap-gating", "--warm", "one.npz", "--report", "page.html"]
    assert main(command) == 0
    assert "Report: page.html" in capsys.readouterr().out
    page = (folder / "page.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    for text in (
        "two.npz on ecpix5",
        "Traffic at rho 4",
        "Energy at rho 4",
        "Timeline of token 45",
    ):
        assert text in page, text
    assert "1 trace replayed before" in page
    # Every figure of the machine has its source beside it, every policy its card.
    assert "LFE5U-85F" in page and "AdapMoE" in page
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(plots) == 2 + 2 + 2 + 2
    for plot in plots:
        ElementTree.fromstring(plot)
    assert 'class="bound"' in plots[0]


def test_report_shades_where_prefetching_cannot_help(folder):
    command = ["simulate", "one.npz", "--policy", "lru", "bound", "--residency", "0.2,1"]
    assert main([*command, "--rho", "20", "--report", "page.html", "--quiet"]) == 0
    page = (folder / "page.html").read_text()
    assert 'class="linkbound"' in page and 'class="warm"' in page


def test_chrome_trace(folder):
    command = ["simulate", "one.npz", "--policy", "on-demand", "--residency", "0.5", "--quiet"]
    assert main([*command, "--rho", "1", "--timeline", "7", "--chrome", "run.json"]) == 0
    events = json.loads((folder / "run.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"on-demand on unit, 50 % resident", "compute", "link 0"}
    timed = [e for e in events if e["ph"] != "M"]
    assert {e["args"]["token"] for e in timed} == {7, 8}
    assert [e["ts"] for e in timed] == sorted(e["ts"] for e in timed)
    attention = [e for e in timed if e["cat"] == "attention"]
    assert len(attention) == 2 * 3
    assert {e["dur"] for e in attention} == {5e5}
    tiles = [e for e in timed if e["cat"] == "demand_tile"]
    assert len(tiles) == 2 * 3 * 2 * 8
    assert {e["tid"] for e in tiles} == {100}


def test_sweep_keeps_outcomes(folder, capsys):
    command = ["sweep", "one.npz", "two.npz", "--policy", "lru", "--rho", "1,2", "--jobs", "1"]
    assert main([*command, "--json", "first.json"]) == 0
    assert "kept from before" not in capsys.readouterr().out
    assert main([*command, "--json", "second.json"]) == 0
    assert "16 of 16 cells were kept from before" in capsys.readouterr().out
    assert (folder / "first.json").read_text() == (folder / "second.json").read_text()
    assert len(list((folder / "cache" / "prestage" / "sweep").glob("??/*.json"))) == 16
    assert main([*command, "--no-cache", "--quiet", "--json", "third.json"]) == 0
    assert (folder / "first.json").read_text() == (folder / "third.json").read_text()
    rows = json.loads((folder / "first.json").read_text())
    assert {r["trace"] for r in rows} == {"one.npz", "two.npz"}


def test_phases(folder, capsys):
    command = [
        "simulate",
        "one.npz",
        "--policy",
        "lru,sp-moe",
        "--residency",
        "0.1",
        "--score",
        "all",
    ]
    phases = ["--batch", "1,3", "--prefill-chunk", "4", "--prompt", "6", "--draft", "0,2"]
    assert main([*command, *phases, "--json", "cells.json", "--report", "page.html"]) == 0
    said = capsys.readouterr()
    assert "batch 3, prompts in chunks of 4, drafts of 2, 75 % right" in " ".join(said.out.split())
    assert "slots are taken" in said.err and "with batch 3" in said.err
    rows = json.loads((folder / "cells.json").read_text())
    assert [(r["batch"], r["draft"], r["policy"]) for r in rows] == [
        (batch, draft, policy)
        for batch in (1, 3)
        for draft in (0, 2)
        for policy in ("lru", "sp-moe")
    ]
    for row in rows:
        assert row["prefill_chunk"] == 4 and row["prefill"] >= 1
        assert row["accept"] == (0.75 if row["draft"] else None)
        assert row["tokens_per_step"] >= row["batch"] - 1
    page = (folder / "page.html").read_text()
    assert "one.npz on unit, batch 3, prompts in chunks of 4, drafts of 2" in page


def test_a_sweep_keeps_phases_apart(folder, capsys):
    command = ["sweep", "one.npz", "--policy", "lru", "--residency", "0.5", "--jobs", "1"]
    assert main([*command, "--batch", "1,2", "--json", "first.json"]) == 0
    assert main([*command, "--batch", "2,4", "--json", "second.json"]) == 0
    assert "1 of 2 cells were kept from before" in capsys.readouterr().out
    first, second = (json.loads((folder / f"{n}.json").read_text()) for n in ("first", "second"))
    assert [r["batch"] for r in first + second] == [1, 2, 2, 4]
    assert first[1] == second[0] != second[1]


def test_sweep_with_others_before(folder, capsys):
    said = refused(capsys, "sweep", "one.npz", "--warm-others", "--policy", "lru")
    assert "--warm-others needs more than one trace" in said
    command = ["sweep", "one.npz", "two.npz", "--warm-others", "--policy", "lru", "--rho", "1"]
    assert main([*command, "--residency", "0.5", "--jobs", "1", "--quiet"]) == 0


def test_sweep_without_a_scheduler(folder, capsys, monkeypatch):
    pytest.importorskip("distributed", reason="Dask isn't installed")
    from prestage_sim.simulate import sweep as module

    monkeypatch.setattr(module, "_PATIENCE", 1)
    command = ["sweep", "one.npz", "--policy", "lru", "--scheduler", "tcp://127.0.0.1:9"]
    assert main(command) == 1
    assert "There is no Dask scheduler at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_ctrl_c_ends_processes_and_the_same_command_goes_on(folder):
    """The command itself, on two processes, ended in the middle as a terminal would."""
    make("long.npz", tokens=2500)
    command = ["sweep", "long.npz", "--policy", "lru", "--residency", "0.25,0.5", "--quiet"]
    command += ["--rho", ",".join(str(n) for n in range(1, 31)), "--json", "cells.json"]
    running = subprocess.Popen(
        [sys.executable, "-m", "prestage", *command, "--jobs", "2"],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
        start_new_session=True,
    )
    kept = folder / "cache" / "prestage" / "sweep"
    deadline = time.monotonic() + 120
    while len(list(kept.glob("??/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert re.search(r"interrupted after \d+ of 60 cells; the same command goes on", said)
    assert not (folder / "cells.json").exists()
    done = len(list(kept.glob("??/*.json")))
    assert 3 <= done < 60
    assert main([*command, "--jobs", "1"]) == 0
    rows = (folder / "cells.json").read_text()
    assert main([*command, "--jobs", "1", "--no-cache"]) == 0
    assert (folder / "cells.json").read_text() == rows
