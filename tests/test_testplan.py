"""What a run of all tests makes of the testplans, on a small project with tests of its own."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prestage_tb import coverage
from prestage_tb.testplan import TestplanCheck

CONFTEST = """
from pathlib import Path
from prestage_tb import coverage
from prestage_tb.testplan import TestplanCheck

coverage._PLANS = Path(__file__).parent / "plans"
coverage._FOLDER = Path(__file__).parent / "build" / "coverage"

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(TestplanCheck(config))
"""

SETTINGS = """
[pytest]
addopts = -m "not soak"
testpaths = checks
markers =
    soak
    extra
"""

PLAN = """
| Testpoint | Stimulus | Checking |
|---|---|---|
| `a.one` | Once | One |
| `a.parts` | In parts | As above |
| `a.long` (soak) | For long | As above |
"""

# What the tests do beside hitting is told by a variable.
CHECKS = """
import os
import subprocess
import sys
import pytest
from prestage_tb.coverage import hit

DO = os.environ.get("DO", "").split()

def test_one():
    # As a simulator does, elsewhere and with another environment.
    code = "import conftest; from prestage_tb.coverage import hit; hit('a.one')"
    folder = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/",
                   env={"PYTHONPATH": folder}) if "miss" not in DO else None

@pytest.mark.parametrize("part", "xy")
def test_parts(part):
    assert "fail" not in DO
    if part == "x" or "miss" not in DO:
        hit("a.parts", part, of="xy")

@pytest.mark.soak
def test_long():
    if "miss" not in DO:
        hit("a.long")

def test_skipped():
    if "skip" in DO:
        pytest.skip("no reason")

@pytest.mark.extra
def test_extra():
    pytest.skip("no trace")
"""

# Nothing that may hit.
OTHERS = """
import pytest

def test_other():
    pytest.skip("nothing to do")
"""


@pytest.fixture
def project(tmp_path):
    """A folder with tests, a testplan, and a file of an older run."""
    for name, text in (
        ("conftest.py", CONFTEST),
        ("pytest.ini", SETTINGS),
        ("plans/a.md", PLAN),
        ("checks/test_all.py", CHECKS),
        ("checks/test_others.py", OTHERS),
        ("build/coverage/hits-1-old.json", json.dumps({"a.one": [[], []], "a.long": [[], []]})),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(project, *arguments, do=""):
    """Run the project's tests: status, what was printed, whether older hits are still there."""
    left_out = ("PYTEST_", "COCOTB_", "COV_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=project,
        env={**environment, "DO": do},
        capture_output=True,
        text=True,
    )
    kept = (project / "build/coverage/hits-1-old.json").exists()
    return result.returncode, result.stdout + result.stderr, kept


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_all_are_hit(project, workers):
    status, text, kept = run(project, *workers)
    assert (status, kept) == (0, False), text
    assert "2 of 2 testpoints were hit" in text


def test_missed_ones_fail_and_are_named(project):
    """An older hit counts for nothing."""
    status, text, _ = run(project, "-n", "2", do="miss")
    assert status == 1, text
    assert "0 of 2 testpoints were hit" in text
    assert "missed  a.one\nmissed  a.parts (y)\n" in text
    assert "FAILED docs/testplan - Testpoints must all be hit" in text
    assert "1 failed, 4 passed, 2 skipped" in text


@pytest.mark.parametrize(
    ("do", "reason"), [("miss fail", "tests failed"), ("miss skip", "tests were skipped: ")]
)
def test_excuses(project, do, reason):
    """What may be why is told; a test marked extra, or that can't hit, is none."""
    status, text, kept = run(project, do=do)
    assert (status, kept) == ("fail" in do, False), text
    assert f"that is no failure, since {reason}" in text
    assert "FAILED docs/testplan" not in text
    told = text.partition("since")[2].partition("\n")[0]
    assert "test_extra" not in told and "test_other" not in told


def test_part_of_the_tests(project):
    status, text, kept = run(project, "checks/test_all.py", do="miss")
    assert (status, kept) == (0, True), text
    assert "testpoints" not in text


def test_soak_adds_to_what_is_there(project):
    status, text, kept = run(project, "-m", "soak")
    assert (status, kept) == (0, True), text
    assert "1 of 1 testpoints were hit" in text
    status, text, _ = run(project, "-m", "soak", do="miss")
    assert status == 1 and "missed  a.long" in text, text


def check(*, source="TESTPATHS", **options):
    option = SimpleNamespace(**{"markexpr": "not soak", "keyword": "", **options})
    return TestplanCheck(
        SimpleNamespace(args_source=pytest.Config.ArgsSource[source], option=option)
    )


def test_whole_runs():
    assert check().whole() and check().soak() is False
    assert check(markexpr="soak").whole() and check(markexpr="soak").soak()
    assert check(markexpr="").whole() and check(markexpr="").soak() is None
    assert check(collectonly=False, deselect=None, lf=False).whole()
    for options in (
        {"source": "ARGS"},
        {"source": "INVOCATION_DIR"},
        {"markexpr": "soak and extra"},
        {"keyword": "dma"},
        {"deselect": ["tb/test_dma.py"]},
        {"ignore": ["tb"]},
        {"ignore_glob": ["*dma*"]},
        {"lf": True},
        {"stepwise": True},
        {"collectonly": True},
        {"setupplan": True},
        {"override_ini": ["testpaths=tests"]},
    ):
        assert not check(**options).whole(), options


def test_every_excuse(monkeypatch):
    session = SimpleNamespace(testsfailed=0, shouldfail=False, shouldstop=False)
    monkeypatch.delenv("COCOTB_RANDOM_SEED", raising=False)
    one = check()
    assert one.excuse(session) == ""
    monkeypatch.setenv("COCOTB_RANDOM_SEED", "7")
    assert one.excuse(session) == "COCOTB_RANDOM_SEED is set"
    one.skipped.append("tb/test_dma.py::test_dma")
    assert one.excuse(session) == "tests were skipped: tb/test_dma.py::test_dma"
    session.shouldstop = "enough"
    assert one.excuse(session) == "not all tests were run"
    session.testsfailed = 1
    assert one.excuse(session) == "tests failed"


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """Testplans and hits of their own."""
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "a.md").write_text(PLAN)
    monkeypatch.setattr(coverage, "_PLANS", tmp_path / "plans")
    monkeypatch.setattr(coverage, "_FOLDER", tmp_path / "hits")
    monkeypatch.setattr(coverage, "_mine", {})
    for cached in (coverage.testpoints, coverage._file):
        cached.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cached in (coverage.testpoints, coverage._file):
        cached.cache_clear()


def test_parts_of_several_processes(plans, monkeypatch):
    coverage.hit("a.parts", "x", of="xy")
    coverage.hit("a.one")
    coverage.hit("a.parts", of="xy")
    assert coverage.hits()["a.parts"].missing == ["y"]
    assert coverage.missed(coverage.hits(), ["a.one", "a.parts", "a.long"]) == [
        "a.parts (y)",
        "a.long",
    ]
    # Another process, even of the same number.
    monkeypatch.setattr(coverage, "_mine", {})
    coverage._file.cache_clear()
    coverage.hit("a.parts", "y", of="xy")
    assert len(coverage.files()) == 2
    assert coverage.hits()["a.parts"].whole and coverage.hits()["a.parts"].processes == 2
    with pytest.raises(ValueError, match="in a page of docs/testplan, not 'a.two'"):
        coverage.hit("a.two")
    with pytest.raises(ValueError, match=r"Part of a.parts must be one of \['x', 'y'\], not 'z'"):
        coverage.hit("a.parts", "z", of="xy")


def test_hits_outlive_a_clear(plans):
    """A process that goes on writes what it hits again to a new file."""
    coverage.hit("a.one")
    coverage.clear()
    assert not coverage.files()
    coverage.hit("a.one")
    assert coverage.hits()["a.one"].whole


def test_report(plans, capsys):
    coverage.hit("a.parts", "x", of="xy")
    coverage.hit("a.one")
    assert coverage.main([]) == 0
    assert capsys.readouterr().out == (
        "hit     a.one\nmissed  a.parts (y)\nsoak    a.long\n1 of 2 testpoints were hit\n"
    )
    found = json.loads((plans / "hits" / "coverage.json").read_text())
    assert found == {"a.one": 1, "a.parts": 0, "a.long": 0}
    assert coverage.main(["--strict"]) == 1
    coverage.hit("a.parts", "y", of="xy")
    assert coverage.main(["--strict", "--page", "a"]) == 0
    assert coverage.main(["--strict", "--soak"]) == 1
    assert coverage.main(["--clear"]) == 0
    assert coverage.hits() == {}
    with pytest.raises(SystemExit):
        coverage.main(["--page", "b"])


def test_names_are_in_one_row_only(plans):
    (plans / "plans" / "b.md").write_text(PLAN)
    with pytest.raises(ValueError, match="Testpoint a.one must be in one row only, not in two"):
        coverage.testpoints()
