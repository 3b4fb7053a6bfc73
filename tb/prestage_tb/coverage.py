"""Functional coverage: which testpoints of the testplans were hit.

A testplan is a page in ``docs/testplan/`` with a table that has a row for each testpoint, its name
first: ``| `dma.retry_after_timeout` | what is done | what is checked |``. A bench calls
:func:`hit` where it has checked one. Every process writes what it has hit to ``build/coverage``;
``python -m prestage_tb.coverage`` puts it together in ``build/coverage/coverage.json`` and says
what was hit and what was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

__all__ = ["hit", "hits", "main", "testpoints"]

_ROOT = Path(__file__).resolve().parents[2]
_PLANS = _ROOT / "docs" / "testplan"
_FOLDER = _ROOT / "build" / "coverage"
_ROW = re.compile(r"^\| `([a-z0-9_]+\.[a-z0-9_.]+)` \|", re.MULTILINE)

_counts: dict[str, int] = {}


@cache
def testpoints(folder: Path = _PLANS) -> dict[str, str]:
    """Page of each testpoint, in the order of the pages.

    Raises
    ------
    ValueError
        If two pages, or two rows, have a testpoint of the same name.
    """
    found: dict[str, str] = {}
    for page in sorted(folder.glob("*.md")):
        for name in _ROW.findall(page.read_text()):
            if name in found:
                raise ValueError(f"Testpoint {name} must be in one row only, not in two")
            found[name] = page.stem
    return found


def hit(name: str) -> None:
    """Note that a testpoint was reached and checked.

    Raises
    ------
    ValueError
        If no testplan has it.
    """
    if name not in testpoints():
        raise ValueError(f"Testpoint must be in a page of docs/testplan, not {name!r}")
    _counts[name] = _counts.get(name, 0) + 1
    if _counts[name] == 1:
        # At once, since a simulation may end without a chance to do it later. One file a process.
        _FOLDER.mkdir(parents=True, exist_ok=True)
        path = _FOLDER / f"hits-{os.getpid()}.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(sorted(_counts)))
        temporary.replace(path)


def hits(folder: Path = _FOLDER) -> dict[str, int]:
    """Processes that have hit each testpoint."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("hits-*.json")):
        for name in json.loads(path.read_text()):
            counts[name] = counts.get(name, 0) + 1
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the status is 1 if ``--strict`` and something was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_tb.coverage",
        description="Say which testpoints of docs/testplan the benches have hit.",
    )
    parser.add_argument("--page", help="only testpoints of this page, for example dma")
    parser.add_argument("--strict", action="store_true", help="fail if a testpoint was missed")
    parser.add_argument("--clear", action="store_true", help="forget what was hit so far")
    options = parser.parse_args(arguments)
    if options.clear:
        for path in _FOLDER.glob("*.json"):
            path.unlink()
        return 0
    counts = hits()
    plan = {n: page for n, page in testpoints().items() if options.page in (None, page)}
    _FOLDER.mkdir(parents=True, exist_ok=True)
    (_FOLDER / "coverage.json").write_text(
        json.dumps({name: counts.get(name, 0) for name in plan}, indent=1) + "\n"
    )
    missed = [name for name in plan if not counts.get(name)]
    for name in plan:
        print(f"{'missed' if name in missed else 'hit   '}  {name}")
    print(f"{len(plan) - len(missed)} of {len(plan)} testpoints were hit")
    return 1 if options.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
