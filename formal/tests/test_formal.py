"""The runner of the formal proofs, its engine and its mutations, on the smallest proof."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prestage_formal import __main__ as runner
from prestage_formal import engine, export
from prestage_formal.mutation import Mutation
from prestage_formal.proofs import PROOFS

ROOT = Path(__file__).parents[2]
SMALL = PROOFS[0]


def test_a_proof_and_its_broken_twin(tmp_path, capsys):
    report = tmp_path / "formal.json"
    arguments = ["--only", SMALL.name, "--json", str(report), "--folder", str(tmp_path / "work")]
    assert runner.main([*arguments, "--jobs", "1"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[:2] == ["proof", "depth"]
    assert "1 of 1 proofs hold and fail once broken" in out
    assert f"{SMALL.name}: broken twin" in err
    told = json.loads(report.read_text())
    (row,) = told["proofs"]
    assert told["errors"] == [] and row["passed"]
    assert row["proof"] == SMALL.name and row["result"] == "proven"
    assert [twin["result"].startswith("fails in cycle ") for twin in row["twins"]] == [True]


def test_every_mutation_finds_its_text():
    names = [proof.name for proof in PROOFS]
    assert len(set(names)) == len(names)
    for proof in PROOFS:
        assert proof.twins and all(twin.source() != "" for twin in proof.twins)


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.name)
def test_every_harness_fits_the_rtl(proof, tmp_path):
    # Proving takes minutes; a port that is gone or a parameter that has another name shows here.
    for variant in ("whole", "covers") if proof.cover_parameters else ("whole",):
        assert export.main([proof.name, str(tmp_path), variant]) == 0
        text = (tmp_path / "design.il").read_text()
        assert "cell $check" in text
        assert 'FLAVOR "assert"' in text and 'FLAVOR "cover"' in text


def test_a_proof_that_fails_and_a_twin_that_passes_are_told(monkeypatch, tmp_path, capsys):
    def twin(result):
        return engine.TwinResult(name="-", result=result, seconds=1.0)

    def result(name, **changes):
        values = {
            "proof": name,
            "depth": 1,
            "engine": "-",
            "seconds": 1.0,
            "result": "proven",
            "twins": (twin("fails in cycle 1"), twin("fails in cycle 2")),
        }
        return engine.Result(**(values | changes))

    first, second = PROOFS[0].name, PROOFS[1].name
    passes = twin("PASSES for 9 cycles")
    for told, changes in (
        ("FAILS in cycle 3", {"result": "FAILS in cycle 3"}),
        ("PASSES for 9 cycles", {"twins": (twin("fails in cycle 1"), passes)}),
    ):
        monkeypatch.setattr(
            runner,
            "run_proof",
            lambda proof, changes=changes, **_: result(
                proof.name, **(changes if proof.name == second else {})
            ),
        )
        assert runner.main(["--only", first, "--only", second]) == 1
        out = capsys.readouterr().out
        assert told in out
        assert "1 of 2 proofs hold" in out


def test_a_tool_that_fails_is_told(monkeypatch, tmp_path, capsys):
    def fail(proof, **_):
        raise engine.EngineError("yosys is ill")

    monkeypatch.setattr(runner, "run_proof", fail)
    report = tmp_path / "formal.json"
    assert runner.main(["--only", SMALL.name, "--json", str(report)]) == 1
    assert "yosys is ill" in capsys.readouterr().err
    assert json.loads(report.read_text())["errors"] == ["yosys is ill"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "perpetual-motion"], "Proof must be one of .*, not 'perpetual-motion'"),
        (["--jobs", "0"], "Number of jobs must be a positive integer, not 0"),
        (["--timeout", "-1"], "Timeout must be a positive number of seconds, not -1"),
        (["--solver", "abacus"], "invalid choice: 'abacus'"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        runner.main(arguments)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_solver_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(engine.SOLVERS, "boolector", "no_such_solver")
    with pytest.raises(SystemExit) as end:
        runner.main(["--solver", "boolector"])
    assert end.value.code == 2
    assert "needs the Python package no-such-solver" in capsys.readouterr().err


def test_list_and_help(capsys):
    assert runner.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        proof.name for proof in PROOFS
    ]
    with pytest.raises(SystemExit) as end:
        runner.main(["--help"])
    assert end.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize("old, times", [("no such text", 0), ("self", "[0-9]+")])
def test_mutations_that_do_not_fit(old, times):
    mutation = Mutation(
        name="none", module="prestage_hw.predictor.two_beats", old=old, new="nothing"
    )
    message = f"^Mutation 'none' must find its text once in .*two_beats, but finds it {times} times"
    with pytest.raises(ValueError, match=message):
        mutation.source()


def test_a_module_is_not_broken_once_it_is_imported():
    code = (
        "import prestage_hw.predictor.two_beats\n"
        "from prestage_formal.proofs import PROOFS\n"
        "PROOFS[0].twins[0].install()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "two_beats was imported before it was broken" in done.stderr


def test_variables_of_a_block():
    from prestage_formal.harness import Inside
    from prestage_hw.predictor.two_beats import TwoBeats

    inside = Inside(TwoBeats(4))
    # Amaranth finds no name for the first of two signals that are made in one line.
    assert inside.local("spare") is inside.signal("spare")
    assert inside.local("spare", part="TwoBeats") is inside.local("spare")
    message = "^Variable must be one of .*spare_valid.*, not 'worn'$"
    with pytest.raises(ValueError, match=message):
        inside.local("worn")
    with pytest.raises(ValueError, match="^Component Wheel must be there once, not 0 times$"):
        inside.local("spare", part="Wheel")


def test_the_page_names_every_proof():
    page = (ROOT / "docs" / "formal.md").read_text()
    for proof in PROOFS:
        assert f"`{proof.name}`" in page, proof.name
        for twin in proof.twins:
            assert twin.name in page.replace("\n", " "), twin.name
