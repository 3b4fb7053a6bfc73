"""The command line in processes of its own: what it prints, what it writes, how it refuses."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import prestage
from prestage.cli import main
from prestage_hw.contract import PRESETS
from prestage_sim.traces import Trace, load_trace, save_trace

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"


def prestage_command(*args, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "prestage", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def refused(*args, code=2, **options):
    """The one line of error of a command that is refused."""
    done = prestage_command(*args, **options)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    first, *rest = done.stderr.splitlines()
    assert first.startswith("prestage: error: ")
    assert all(line.startswith("Try 'prestage") for line in rest)
    return first.removeprefix("prestage: error: ")


def make(tokens=12, *, layers=3, experts=8, top_k=2):
    rng = np.random.default_rng(3)
    order = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)
    return Trace(
        experts=order[..., :top_k],
        experts_per_layer=experts,
        request_id=np.arange(tokens) // 8,
        meta={"model": "test-moe", "domain": "tests"},
    )


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(path, make())
    return path


def test_replay(tmp_path, trace):
    page, data = tmp_path / "report.html", tmp_path / "run.json"
    done = prestage_command("replay", trace, "--json", data, "--report", page)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in (
        *("recall", "over-fetch", "precision", "coverage", "hit rate", "late", "useless"),
        *("bytes moved", "cycles", "bytes checked", "trace.npz on model://", f"Report: {page}"),
    ):
        assert word in done.stdout, word
    value = json.loads(data.read_text())
    assert value["complete"] is True
    assert value["counters"]["tokens"] == 12
    assert value["config"]["slots"] == 6
    assert value["config"]["predictor"] == "st_moe"
    assert value["versions"]["prestage"] == prestage.__version__
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(os.listdir(tmp_path)) == ["report.html", "run.json", "trace.npz"]


def test_replay_options(trace):
    arguments = ["replay", str(trace), "--json", "/dev/stdout", "--quiet"]
    done = prestage_command(
        *arguments,
        *("--first", 5, "--predictor", "none", "--slots", 9),
        *("--expert-bytes", 1024, "--tile-bytes", 1024),
    )
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    assert value["counters"]["tokens"] == 5
    assert value["counters"]["candidates"] == 0
    config = value["config"]
    assert (config["slots"], config["expert_bytes"], config["tile_bytes"]) == (9, 1024, 1024)


def test_sizes_of_layers(tmp_path, trace, capsys):
    data, page = tmp_path / "run.json", tmp_path / "report.html"
    command = ["replay", str(trace), "--json", str(data), "--report", str(page)]
    assert main([*command, "--layer-bytes", "2x512,1536"]) == 0
    assert "slots of 1536 bytes for experts of 512 to 1536" in " ".join(
        capsys.readouterr().out.split()
    )
    value = json.loads(data.read_text())
    assert value["complete"] is True
    config = value["config"]
    assert (config["expert_bytes"], config["layer_bytes"]) == (1536, [512, 512, 1536])
    assert value["checked"]["bytes"] == 12 * 2 * (512 + 512 + 1536)
    # All alike is what it was.
    assert main([*command, "--layer-bytes", "3x1024", "--quiet"]) == 0
    assert json.loads(data.read_text())["config"]["layer_bytes"] == []


def test_profile(tmp_path, trace, capsys):
    data = tmp_path / "run.json"
    command = ["replay", str(trace), "--profile", str(trace), "--json", str(data), "--quiet"]
    assert main(command) == 0
    assert json.loads(data.read_text())["config"]["profiled"] is True
    assert main([*command, "--predictor", "none"]) == 2
    assert "Predictor must be st_moe to hold a profile" in capsys.readouterr().err


def test_refused_writes_are_shown(tmp_path, trace, capsys, monkeypatch):
    """What an earlier program has left behind on the device."""

    @contextmanager
    def opened(*arguments, **options):
        with prestage.open(*arguments, **options) as device:
            device.write_register("cutoff_layer", 256)
            for layer in (2, 1):
                device.route(0, layer, [0, 1])
                list(device.wait_ready(0, layer))
                device.release(0, layer)
            yield device

    for module in ("cli", "tables_cli"):
        monkeypatch.setattr(f"prestage.{module}.open_device", opened)
    warning = (
        "prestage: warning: Write of register cutoff_layer was refused: The register can't hold"
        " that value.\n"
    )
    data = tmp_path / "run.json"
    assert main(["replay", str(trace), "--quiet", "--json", str(data)]) == 0
    expected = warning + "prestage: warning: 1 routing decisions came out of order\n"
    assert capsys.readouterr().err == expected
    assert json.loads(data.read_text())["refusal"] in warning
    shape = ["--layers", "3", "--experts", "8", "--top-k", "2"]
    command = ["tables", "save", str(tmp_path / "tables"), "--device", "model://", *shape]
    assert main(command) == 0
    assert capsys.readouterr().err == warning


def test_table_of_a_clocked_device(capsys):
    """The rows that only a clock fills."""
    from prestage.cli import _print_run
    from prestage.replay import device_config
    from prestage_sim.runs import Run

    run = Run(
        config=device_config(make()),
        url="sim://",
        pace="timed",
        trace=make(),
        complete=True,
        tokens=12,
        layers=36,
        counters={},
        cycles=10_000,
        seconds=0.5,
        spans=np.array([[[0, 700]]], np.uint64),
    )
    _print_run(run, "x.npz")
    out = capsys.readouterr().out
    assert "20,000 a second" in out
    assert "7.0 % of all, 700.0 a layer" in out
    assert "pace timed" in out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--slots", "1"], "Slot count must be at least contexts x top-k = 2, not 1"),
        (["--slots", "70000"], "Slot count must be between 1 and 65535"),
        (
            ["--predictor", "oracle"],
            "Predictor must be one of none, st_moe, perceptron, not 'oracle'",
        ),
        (["--form", "huge"], "Predictor form must be one of lite, compressed, full, not 'huge'"),
        (["--device", "pcie://"], "Device URL must start with one of model://, sim://, not 'pcie:"),
        (["--device", "model"], "Device URL must start with one of"),
        (["--device", "model://?x=1"], "Option of model:// must be error, not 'x'"),
        (["--pace", "fast"], "Pace must be one of drained, timed, not 'fast'"),
        (["--pace", "timed"], "Pace timed needs --layer-cycles"),
        (["--pace", "timed", "--layer-cycles", "9"], "needs a device with a clock, such as sim://"),
        (["--expert-bytes", "1000"], "Expert size must be a whole number of 512-byte tiles"),
        (["--layer-bytes", "512,1024"], "Layer sizes must be one for each of 3 layers, not 2"),
        (
            ["--layer-bytes", "512,1024,700"],
            "Expert size of layer 2 must be a whole number of 512-byte tiles, not 700 bytes",
        ),
        (
            ["--layer-bytes", "2x512,1024", "--expert-bytes", "2048"],
            "Greatest expert size of a layer must be that of a slot, 2048 bytes, not 1024",
        ),
        (
            ["--layer-bytes", "512,big"],
            "argument --layer-bytes: must be sizes as 2048 or 12x2048, separated by commas, not",
        ),
        (["--layer-bytes", "x512"], "argument --layer-bytes: must be sizes as 2048 or 12x2048"),
        (["--layer-bytes", "0.5x512"], "argument --layer-bytes: must be sizes as 2048 or 12x2048"),
        (["--tile-bytes", "700"], "Tile size in bytes must be a power of two, not 700"),
        (["--prefetch-tiles", "5"], "Prefetch tiles must be between 1 and 4, not 5"),
        (["--first", "0"], "argument --first: must be a positive integer, not 0"),
        (["--first", "x"], "argument --first: must be a positive integer, not 'x'"),
        (["--top-k", "4"], "has top-k 2, but 4 was asked for"),
        (["--experts", "4"], "has 8 experts a layer, but 4 were asked for"),
        (["--from", "xml"], "Trace format must be one of npz, jsonl, csv, not 'xml'"),
        (["--profile", "nothing.npz"], "nothing.npz: no such file"),
        (["--report", "nowhere/report.html"], "Report nowhere/report.html can't be written: there"),
        (["--json", "."], "JSON file . can't be written: it is a directory"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_refused_replays(trace, capsys, arguments, match):
    try:
        code = main(["replay", str(trace), *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("prestage: error: ")
    assert match in captured.err


def test_refused_traces(tmp_path):
    """Each of these ends with its own message, exit code 2, and no traceback."""
    path = tmp_path / "bad.npz"

    def error(**arrays):
        meta = np.array('{"num_experts": 8}')
        np.savez(path, **({"meta": meta} | arrays))
        return refused("replay", path, cwd=tmp_path)

    assert refused("replay", "no.npz", cwd=tmp_path) == "no.npz: no such file"
    save_trace(path, make())
    path.write_bytes(path.read_bytes()[:700])
    assert "not a whole .npz file, it may be truncated" in refused("replay", path)
    assert "must be between 0 and 7, but token 0, layer 1 has 9" in error(
        experts=np.array([[[0, 1], [9, 2]]])
    )
    assert "must be distinct, but token 1, layer 0 has 4 twice: [4, 4]" in error(
        experts=np.array([[[0, 1]], [[4, 4]]])
    )
    assert "at least one token, but holds none" in error(experts=np.zeros((0, 2, 2), int))
    assert "says top_k = 3 in its meta, but its arrays have 2" in error(
        experts=make().experts, meta=np.array('{"top_k": 3}')
    )
    assert "beyond what a device may have: Top-k must be between 1 and 16, not 17" in error(
        experts=np.arange(17).reshape(1, 1, 17), meta=np.array("{}")
    )


def test_refused_in_a_process(trace):
    """The same errors reach a shell: one line, exit code 2."""
    assert refused("replay", trace, "--slots", 1).startswith("Slot count must be at least")
    assert "--device" not in refused("replay", trace, "--device", "pcie://")
    assert "required: COMMAND" in refused()
    assert "invalid choice: 'fly'" in refused("fly")


def test_full_disk(tmp_path, trace):
    """A report that doesn't fit is an error, leaves nothing behind and doesn't lose the rest."""
    data = tmp_path / "run.json"
    done = prestage_command("replay", trace, "--json", data, "--report", "/dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        "prestage: error: Report /dev/full can't be written: No space left on device\n"
    )
    assert json.loads(data.read_text())["complete"] is True
    page = tmp_path / "report.html"
    page.write_text("before")

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = prestage_command(
        "replay", trace, "--report", page, "--json", data, preexec_fn=little_room
    )
    assert done.returncode == 2
    assert done.stderr == f"prestage: error: Report {page} can't be written: File too large\n"
    assert page.read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["report.html", "run.json", "trace.npz"]


def test_output_that_nobody_reads(trace):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "prestage", "trace", "info", str(trace)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == ("prestage: error: output can't be written: No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "prestage", "info"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_wrong_bytes(tmp_path, trace, capsys):
    """A device that fails is exit code 1, and what was counted is kept."""
    data = tmp_path / "run.json"
    expert = int(make().experts[0, 0, 0])
    url = f"model://?error={2048 * expert}:2048"
    assert main(["replay", str(trace), "--device", url, "--json", str(data), "--quiet"]) == 1
    text = f"(BUS: context 0, layer 0, expert {expert},"
    assert text in capsys.readouterr().err
    value = json.loads(data.read_text())
    assert value["complete"] is False
    assert "BUS" in value["error"]
    assert value["counters"]["fill_errors"] > 0


INTERRUPTED = """
import os, signal, sys
from prestage import cli
from prestage.device import Device
begin = Device.begin_token
count = 0
def begin_token(self, *args):
    global count
    count += 1
    if count == 6:
        os.kill(os.getpid(), signal.SIGINT)
    begin(self, *args)
Device.begin_token = begin_token
sys.exit(cli.main(sys.argv[1:]))
"""


def test_interrupt(tmp_path, trace):
    """Ctrl-C in the middle: what was replayed is kept, in the table, the object and the page."""
    data, page = tmp_path / "run.json", tmp_path / "report.html"
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-c", INTERRUPTED),
            *("replay", trace, "--json", data, "--report", page),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 130
    assert done.stderr == "prestage: interrupted after 5 of 12 tokens\n"
    assert "5 of 12 tokens" in done.stdout
    value = json.loads(data.read_text())
    assert value["complete"] is False
    assert value["error"] is None
    assert value["trace"]["tokens_replayed"] == 5
    # The layer that was under way was finished, and the next token begun.
    assert value["counters"]["routes"] == value["trace"]["layers_replayed"] == 16
    assert "Interrupted after 5 of 12 tokens" in page.read_text()


def processes_with(mark):
    """Command lines of the processes whose environment holds a mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_interrupt_while_a_simulation_is_built(tmp_path, trace):
    """Ctrl-C while sim:// elaborates or compiles ends every child process too."""
    mark = f"PRESTAGE_TEST_MARK={os.getpid()}-{time.time_ns()}"
    name, value = mark.split("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "prestage", "replay", str(trace), "--device", "sim://"],
        env=os.environ | {"PRESTAGE_CACHE": str(tmp_path / "cache"), name: value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not any("elaborate" in command for command in processes_with(mark)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err.endswith("prestage: interrupted\n")
    assert "Traceback" not in err
    assert processes_with(mark) == []


def test_version_and_help():
    done = prestage_command("--version")
    assert done.stdout == f"prestage {prestage.__version__}\n"
    for command in ([], ["replay"], ["info"], *(["trace", a] for a in ("info", "convert"))):
        done = prestage_command(*command, "--help")
        assert done.returncode == 0
        assert f"examples:\n  prestage {' '.join(command)}" in done.stdout
    assert "examples:" in prestage_command("trace", "--help").stdout
    assert "examples:" in prestage_command("trace", "validate", "--help").stdout


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in PRESETS:
        assert name in out
    assert "model://" in out and "sim://" in out
    assert "st_moe" in out


def test_trace_info(trace, capsys):
    assert main(["trace", "info", str(trace), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["tokens"], info["layers"], info["experts"], info["top_k"]) == (12, 3, 8, 2)
    assert (info["requests"], info["decode_tokens"], info["default_slots"]) == (2, 12, 6)
    assert (info["model"], info["preset"], info["domain"]) == ("test-moe", None, "tests")
    assert 0.25 < info["share_of_busiest_quarter"] < 1
    assert 0 < info["repeated_from_previous_token"] < 1
    assert main(["trace", "info", str(trace), "--first", "1"][:3]) == 0
    assert "share of busiest quarter" in capsys.readouterr().out


def test_trace_convert(tmp_path, trace, capsys):
    lines, table = tmp_path / "trace.jsonl", tmp_path / "trace.dat"
    assert main(["trace", "convert", str(trace), str(lines), "--model", "olmoe-1b-7b"]) == 0
    assert main(["trace", "convert", str(lines), str(table), "--to", "csv", "--first", "4"]) == 0
    assert f"{table}: 4 tokens, 3 layers, 8 experts, k = 2" in capsys.readouterr().out
    copy = load_trace(table, name="csv")
    assert copy.model == "olmoe-1b-7b"
    np.testing.assert_array_equal(copy.experts, make().experts[:4])
    assert main(["trace", "info", str(table), "--from", "csv"]) == 0
    assert main(["trace", "convert", str(trace), str(tmp_path / "x.bin")]) == 2
    assert main(["trace", "convert", str(trace), str(tmp_path / "no" / "x.csv")]) == 2
    assert main(["trace", "convert", "no.npz", str(tmp_path / "x.csv")]) == 2
    err = capsys.readouterr().err
    assert "must end in one of" in err
    assert "there is no directory" in err
    assert "no.npz: no such file" in err
    # A failed conversion leaves no file.
    assert not (tmp_path / "x.csv").exists()


def test_trace_validate(tmp_path, trace, capsys):
    bad = tmp_path / "bad.csv"
    bad.write_text("step,layer,e0,e1\n0,0,1,1\n")
    wide = tmp_path / "wide.npz"
    save_trace(wide, make(experts=32, top_k=17))
    assert main(["trace", "validate", str(trace)]) == 0
    assert main(["trace", "validate", str(bad), str(trace), str(wide)]) == 2
    captured = capsys.readouterr()
    assert captured.out.count(f"{trace}: valid, 12 tokens, 3 layers, 8 experts, k = 2") == 2
    assert f"{bad}: Expert ids of a row must be distinct" in captured.err
    assert f"{wide}: Trace is beyond what a device may have" in captured.err


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real traces in {SHARED}")
@pytest.mark.parametrize("predictor", ["none", "st_moe"])
def test_real_trace(tmp_path, predictor):
    data = tmp_path / "run.json"
    arguments = ["--predictor", predictor, "--first", "20", "--json", str(data), "--quiet"]
    assert main(["replay", str(SHARED / "gpt-oss-20b__cs.npz"), *arguments]) == 0
    value = json.loads(data.read_text())
    assert value["config"]["model"]["name"] == "gpt-oss-20b"
    assert value["config"]["slots"] == 192
    assert value["counters"]["demands"] == 20 * 24 * 4
    if predictor == "st_moe":
        assert value["metrics"]["recall"] > 0.5
