"""Hold a run of all tests against the testplans: each testpoint must have been hit by this run.

The root ``conftest.py`` registers :class:`TestplanCheck` in the process that the run was started
in; with pytest-xdist that is the controller, which knows the outcome of every test, but collects
none. What the tests of a run hit lies in files (:mod:`prestage_tb.coverage`), since benches hit in
simulators, which are processes of their own.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from prestage_tb import coverage

__all__ = ["TestplanCheck"]

#: Marker of tests that need what the project doesn't ship, and hit nothing that others don't.
EXTRA = "extra"

#: What a module of tests that may hit something has to import.
_PACKAGE = __name__.partition(".")[0]

#: Options that leave tests out, or run none.
_PARTIAL = (
    *("keyword", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "collectonly"),
    # Settings of the command line may stand for any of them.
    *("setuponly", "setupplan", "override_ini"),
)


class TestplanCheck:
    """Clear what was hit before a run of all tests, and fail the run if it misses a testpoint.

    A run of all tests has no paths and no option that chooses tests, but ``-m soak``, which adds
    its hits to what is there and is held to the testpoints that only it hits, or ``-m ""`` for all.
    Nothing is held against a run in which a test failed, or that was cut short, in which a test was
    skipped that may hit something and is not marked ``extra``, or whose random seed was given: what
    is rare may not come then. It says so instead.
    """

    __test__ = False  # For pytest no class of tests.

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.skipped: list[str] = []
        self.lines: list[str] = []

    def soak(self) -> bool | None:
        """Whether the run is one of the soak tests, or of the others; None for all."""
        return {"not soak": False, "soak": True}.get(self.config.option.markexpr)

    def whole(self) -> bool:
        """Whether the run is to be one of all tests, as far as its options say."""
        option = self.config.option
        return (
            self.config.args_source is pytest.Config.ArgsSource.TESTPATHS
            and option.markexpr in ("not soak", "soak", "")
            and not any(getattr(option, name, None) for name in _PARTIAL)
        )

    def wanted(self) -> list[str]:
        """Testpoints that the run has to hit."""
        soak = self.soak()
        return [name for name, point in coverage.testpoints().items() if soak in (None, point.soak)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note who is skipped, unless nothing hangs on it."""
        if not report.skipped or hasattr(report, "wasxfail") or EXTRA in report.keywords:
            return
        module = self.config.rootpath / report.nodeid.partition("::")[0]
        if _PACKAGE in module.read_text():
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Forget older hits before the first test, and look at the new ones after the last."""
        if not self.whole():
            return (yield)
        if self.soak() is not True:
            coverage.clear()
        older = coverage.files()
        result = yield
        wanted = self.wanted()
        lacking = coverage.missed(coverage.hits(coverage.files() - older), wanted)
        self.lines = [f"{len(wanted) - len(lacking)} of {len(wanted)} testpoints were hit"]
        if not lacking:
            return result
        self.lines += [f"missed  {name}" for name in lacking]
        if reason := self.excuse(session):
            self.lines.append(f"that is no failure, since {reason}")
        else:
            self.fail(lacking)
        return result

    def excuse(self, session: pytest.Session) -> str:
        """Why a testpoint may be missing, or nothing."""
        if session.testsfailed:
            return "tests failed"
        if session.shouldfail or session.shouldstop:
            return "not all tests were run"
        if self.skipped:
            return f"tests were skipped: {', '.join(self.skipped)}"
        if os.environ.get("COCOTB_RANDOM_SEED"):
            return "COCOTB_RANDOM_SEED is set"
        return ""

    def fail(self, lacking: list[str]) -> None:
        """Let the run have one failure more, so that its last lines and its status say it."""
        message = f"Testpoints must all be hit, but these were missed: {', '.join(lacking)}"
        report = pytest.TestReport(
            nodeid="docs/testplan",
            location=("docs/testplan", None, "docs/testplan"),
            keywords={},
            outcome="failed",
            longrepr=message,
            when="call",
        )
        self.config.hook.pytest_runtest_logreport(report=report)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the report's summary."""
        if self.lines:
            terminalreporter.section("testplan")
            for line in self.lines:
                terminalreporter.write_line(line)
