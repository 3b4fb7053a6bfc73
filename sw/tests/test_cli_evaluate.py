"""``prestage evaluate``: what it prints, what it writes, how it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prestage.cli import main
from prestage_sim.evaluate import RANKERS
from prestage_sim.traces import Trace, save_trace

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("PRESTAGE_TRACES", ROOT.parent / "shared" / "traces"))
CODE, PROSE = (
    str(ROOT / f"models/tinymoe/traces/tinymoe__{name}.npz") for name in ("code", "prose")
)

#: Keys that every object has, whatever else it holds.
KEYS = [
    *("trace", "predictor", "horizon", "recall_at_k", "recall_at_1_5k", "recall_at_2k"),
    *("recall_at_3k", "ece", "tokens"),
]


def command(*args, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "prestage", "evaluate", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def evaluated(tmp_path, *args):
    """Objects of a run in this process."""
    path = tmp_path / "quality.json"
    assert main(["evaluate", *map(str, args), "--json", str(path), "--quiet"]) == 0
    return json.loads(path.read_text())


def save(path, *, layers=4, experts=16, tokens=40, seed=0):
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)
    save_trace(path, Trace(experts=order[..., :2], experts_per_layer=experts))
    return str(path)


@pytest.fixture
def refused(capsys):
    """The one line of error of a command that is refused, which must print nothing else."""

    def run(*args):
        try:
            code = main(["evaluate", *map(str, args)])
        except SystemExit as end:
            code = end.code
        assert code == 2
        out, err = capsys.readouterr()
        assert out == ""
        first, *rest = err.splitlines()
        assert first.startswith("prestage: error: ")
        assert all(line == "Try 'prestage evaluate --help'." for line in rest)
        return first.removeprefix("prestage: error: ")

    return run


def test_tables_and_files(tmp_path):
    page, data = tmp_path / "quality.html", tmp_path / "quality.json"
    done = command(
        *(CODE, "--first", 300, "--horizon", "1,3", "--json", data, "--report", page),
        *("--predictor", "popularity", "st_moe", "--predictor", "oracle"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "prestage: note: Predictor st_moe isn't defined for horizon 3: left out\n"
    )
    for phrase in (
        "tinymoe__code.npz\ntinymoe: 8 layers x 32 experts, k = 4; 300 tokens\n",
        *("@k", "@1.5k", "@2k", "@3k", "recall", "precision", "over-fetch", "ECE"),
        *("Misses behind an LRU cache", "Cold start", "Calibration", "Recall@k by layer"),
        f"Report: {page}",
    ):
        assert phrase in done.stdout, phrase
    values = json.loads(data.read_text())
    assert [(v["predictor"], v["horizon"]) for v in values] == [
        ("popularity", 1),
        ("popularity", 3),
        ("st_moe", 1),
        ("oracle", 1),
        ("oracle", 3),
    ]
    for value in values:
        assert set(KEYS) <= set(value)
        assert value["trace"] == CODE
        assert value["tokens"] == 300
    assert values[0]["ece"] is None
    assert values[3]["ece"] == 0
    assert values[3]["recall_at_k"] == 1
    st_moe = values[2]
    assert 0.2 < st_moe["recall_at_k"] < st_moe["recall_at_2k"] < st_moe["recall_at_3k"] < 1
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "st_moe isn&#39;t defined for horizon 3" in text
    assert sorted(os.listdir(tmp_path)) == ["quality.html", "quality.json"]


def test_tables_fit_a_narrow_terminal(tmp_path, monkeypatch, capsys):
    """No number is cut off at 80 columns, and wide tables go on below."""
    monkeypatch.setenv("COLUMNS", "80")
    names = ["previous-token", "st_moe", "st_moe-counts:history=0.125", "oracle"]
    data = tmp_path / "quality.json"
    assert (
        main(
            [
                "evaluate",
                CODE,
                "--first",
                "600",
                "--horizon",
                "1..4",
                "--json",
                str(data),
                "--predictor",
                *names,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("Recall@k by layer") > 1
    for value in json.loads(data.read_text()):
        for name in ("recall_at_k", "recall_at_3k", "own_precision"):
            assert f" {100 * value[name]:.1f} " in out
        for row in value["by_layer"]:
            assert f" {100 * row['recall_at_k']:.1f} " in out
        assert f" {value['token_layers_per_second']:,.0f}" in out
        for row in value["reliability"] or ():
            assert not row["count"] or f" of {row['count']:,} " in out


def test_quiet(tmp_path):
    done = command(
        CODE, "--first", 20, "--predictor", "popularity", "--quiet", "--json", "/dev/stdout"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)) == 1


def test_default_is_all_but_the_oracle(tmp_path):
    values = evaluated(tmp_path, CODE, "--first", 40)
    assert [value["predictor"] for value in values] == [n for n in RANKERS if n != "oracle"]
    assert {value["horizon"] for value in values} == {1}


@pytest.mark.parametrize(
    ("text", "horizons"),
    [("1", [1]), ("2,1", [1, 2]), ("1..3", [1, 2, 3]), ("2-4", [2, 3, 4]), ("1,3..4,3", [1, 3, 4])],
)
def test_horizons(tmp_path, text, horizons):
    values = evaluated(
        tmp_path, CODE, "--first", 10, "--predictor", "previous-token", "--horizon", text
    )
    assert [value["horizon"] for value in values] == horizons


def test_predictors_by_commas_and_options(tmp_path):
    names = ["st_moe:successors=1", "st_moe:successors=8", "popularity"]
    values = evaluated(
        *(tmp_path, CODE, "--first", 200, "--predictor", ",".join(names[:2]), "popularity"),
        *("st_moe:successors=1",),
    )
    assert [value["predictor"] for value in values] == names
    assert values[0]["own_recall"] < values[1]["own_recall"]
    assert values[0]["over_fetch"] < values[1]["over_fetch"]


def test_warm(tmp_path):
    few = ("--first", 60, "--predictor", "st_moe-counts")
    (cold,) = evaluated(tmp_path, CODE, *few)
    (known,) = evaluated(tmp_path, CODE, *few, "--warm", CODE)
    (warm,) = evaluated(tmp_path, CODE, *few, "--warm", PROSE)
    assert (warm["tokens"], warm["warm"], warm["warm_tokens"]) == (60, [PROSE], 8192)
    assert cold["warm"] == []
    assert warm["recall_at_k"] != cold["recall_at_k"]
    assert known["recall_at_k"] > warm["recall_at_k"]


def test_warm_others(tmp_path):
    one, two, three = (save(tmp_path / f"{n}.npz", seed=n) for n in range(3))
    values = evaluated(tmp_path, one, two, one, "--warm-others", "--predictor", "popularity")
    assert [(value["trace"], value["warm"]) for value in values] == [(one, [two]), (two, [one])]
    values = evaluated(
        *(tmp_path, one, two, "--warm-others", "--predictor", "popularity", "--warm", three),
    )
    assert [value["warm"] for value in values] == [[three, two], [three, one]]


def test_warmed_on_itself_is_noted(tmp_path, capsys):
    path = save(tmp_path / "t.npz")
    evaluated(tmp_path, path, "--warm", path, "--predictor", "popularity")
    assert f"note: {path} is learned before it's scored" in capsys.readouterr().err


def test_traces_of_several_shapes(tmp_path):
    one, two = save(tmp_path / "1.npz"), save(tmp_path / "2.npz", layers=3, experts=8)
    values = evaluated(tmp_path, one, two, "--residency", "0.5,1", "--predictor", "oracle")
    assert [value["experts"] for value in values] == [16, 8]
    assert [row["slots"] for row in values[0]["miss_recall"]] == [32, 64]


def test_reading_options(tmp_path):
    csv = tmp_path / "trace.txt"
    csv.write_text("step,layer,e0\n0,0,1\n0,1,2\n1,0,1\n1,1,3\n")
    (value,) = evaluated(tmp_path, csv, "--from", "csv", "--experts", 9, "--predictor", "oracle")
    assert (value["experts"], value["tokens"], value["layers"]) == (9, 2, 2)


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  prestage evaluate trace.npz\n" in text
    for name in RANKERS:
        assert name in text.replace("\n                        ", " ")


def test_refused_arguments(refused):
    assert "the following arguments are required: TRACE" in refused()
    assert refused(CODE, "--horizon", "0") == "argument --horizon: must be between 1 and 4, not 0"
    assert (
        refused(CODE, "--horizon", "1..5") == "argument --horizon: must be between 1 and 4, not 5"
    )
    assert "must be an ascending range, not '3..1'" in refused(CODE, "--horizon", "3..1")
    for text in ("", "x", "1,", "1..", "1.5"):
        assert "must be numbers and ranges such as" in refused(CODE, "--horizon", text)
    assert "must be a positive integer, not 0" in refused(CODE, "--first", 0)
    assert "must be a positive integer, not -3" in refused(CODE, "--first", -3)
    assert "must be between 0 and 1, not 40" in refused(CODE, "--residency", "0.1,40")
    assert "must be between 0 and 1, not nan" in refused(CODE, "--residency", "nan")
    assert "must be shares such as" in refused(CODE, "--residency", "ten")


def test_refused_predictors(refused):
    error = refused(CODE, "--predictor", "st-moe")
    assert error.startswith("Predictor must be one of popularity, previous-token, st_moe, ")
    assert error.endswith(", not 'st-moe'. Did you mean st_moe?")
    assert "Option of predictor st_moe must be" in refused(CODE, "--predictor", "st_moe:x=1")
    error = refused(CODE, "--predictor", "st_moe", "--horizon", "2,3")
    assert error == (
        "No predictor is left to evaluate. Predictor st_moe isn't defined for horizon 2 and 3:"
        " left out"
    )
    error = refused(CODE, "--predictor", "st_moe:successors=33")
    assert error == f"{CODE}: Successor count must be between 0 and 32, not 33"


def test_refused_traces(tmp_path, refused):
    missing = tmp_path / "missing.npz"
    assert refused(missing) == f"{missing}: no such file"
    assert refused(CODE, "--warm", missing) == f"{missing}: no such file"
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK")
    assert refused(CODE, broken).startswith(f"{broken}: is not a whole .npz file")
    other = save(tmp_path / "other.npz")
    assert refused(CODE, "--warm", other) == (
        f"{other}: Trace to learn from must have 8 layers, 32 experts and k = 4, not 4, 16 and 2"
        f" as in {CODE}"
    )
    assert refused(CODE, other, "--warm-others").startswith(f"{other}: Trace to learn from must")
    assert refused(CODE, "--warm-others") == "--warm-others needs more than one trace"
    flat = save(tmp_path / "flat.npz", layers=1)
    assert refused(flat) == f"{flat}: Horizon 1 is beyond the last layer of the trace, layer 0"
    assert "Horizon 4 is beyond the last layer of the trace, layer 3" in refused(
        other, "--horizon", "1..4"
    )


def test_refused_output(tmp_path, refused):
    path = tmp_path / "no" / "quality.json"
    assert refused(CODE, "--json", path).startswith(f"JSON file {path} can't be written")
    assert refused(CODE, "--report", tmp_path) == (
        f"Report {tmp_path} can't be written: it is a directory"
    )


def test_a_full_disk_loses_only_its_own_file(tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not here")
    page = tmp_path / "quality.html"
    arguments = [CODE, "--first", "5", "--predictor", "oracle", "--json", "/dev/full"]
    assert main(["evaluate", *arguments, "--report", str(page)]) == 2
    assert "JSON file /dev/full can't be written" in capsys.readouterr().err
    assert page.exists()


@pytest.mark.parametrize(
    "name", ["gpt-oss-20b__cs", "qwen3-30b-a3b__techqa", "gpt-oss-120b__techqa"]
)
def test_real_traces(tmp_path, name):
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"trace {path} is not here")
    values = evaluated(tmp_path, path, "--first", 200, "--horizon", "1,3")
    for value in values:
        assert 0.1 < value["recall_at_k"] <= value["recall_at_1_5k"] <= value["recall_at_2k"] < 1
        assert value["token_layers_per_second"] > 0


def test_other_commands_load_no_compiler():
    program = "import sys, prestage.cli; print({'numba', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
