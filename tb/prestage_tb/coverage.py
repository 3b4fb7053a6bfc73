"""Functional coverage: which testpoints of the testplans were hit.

A testplan is a page in ``docs/testplan/`` with a table that has a row for each testpoint, its name
first: ``| `dma.retry_after_timeout` | what is done | what is checked |``. ``(soak)`` after the name
says that only ``make soak`` gets there. A bench calls :func:`hit` where it has checked one. Every
process writes what it has hit to a file of its own in ``build/coverage``; ``python -m
prestage_tb.coverage`` puts it together in ``build/coverage/coverage.json`` and says what was hit
and what was missed. :mod:`prestage_tb.testplan` does so at the end of a run of all tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["Hits", "Testpoint", "files", "hit", "hits", "main", "testpoints"]

_ROOT = Path(__file__).resolve().parents[2]
_PLANS = _ROOT / "docs" / "testplan"
_FOLDER = _ROOT / "build" / "coverage"
_ROW = re.compile(r"^\| `([a-z0-9_]+\.[a-z0-9_.]+)`( \(soak\))? \|", re.MULTILINE)


class Testpoint(NamedTuple):
    """A row of a testplan."""

    page: str
    soak: bool
    """Only tests that are marked ``soak`` hit it."""


@dataclass
class Hits:
    """What is known of one testpoint: how often it was hit, or which of its parts were."""

    processes: int = 0
    parts: set[str] = field(default_factory=set)
    of: set[str] = field(default_factory=set)

    @property
    def missing(self) -> list[str]:
        """Parts that nobody has hit."""
        return sorted(self.of - self.parts)

    @property
    def whole(self) -> bool:
        """Whether it counts as hit."""
        return self.processes > 0 and not self.missing


_mine: dict[str, Hits] = {}


@cache
def testpoints(folder: Path | None = None) -> dict[str, Testpoint]:
    """Each testpoint by its name, in the order of the pages.

    Raises
    ------
    ValueError
        If two pages, or two rows, have a testpoint of the same name.
    """
    found: dict[str, Testpoint] = {}
    for page in sorted((folder or _PLANS).glob("*.md")):
        for name, soak in _ROW.findall(page.read_text()):
            if name in found:
                raise ValueError(f"Testpoint {name} must be in one row only, not in two")
            found[name] = Testpoint(page.stem, bool(soak))
    return found


def hit(name: str, *parts: object, of: Iterable[object] = ()) -> None:
    """Note that a testpoint was reached and checked.

    Parameters
    ----------
    name : :class:`str`
        Testpoint.
    parts : object
        What of it was, where one test reaches it in part only: text, numbers or members of an
        enumeration. They may come from different processes.
    of : iterable of object
        All its parts.

    Raises
    ------
    ValueError
        If no testplan has it, or it has no such part.
    """
    if name not in testpoints():
        raise ValueError(f"Testpoint must be in a page of docs/testplan, not {name!r}")
    told, all_parts = ({_text(part) for part in each} for each in (parts, of))
    if told - all_parts:
        raise ValueError(
            f"Part of {name} must be one of {sorted(all_parts)}, not {min(told - all_parts)!r}"
        )
    if all_parts and not told:
        return
    path = _file(os.getpid())
    mine = _mine.get(name)
    if mine and mine.parts >= told and mine.of >= all_parts and path.exists():
        return
    mine = _mine.setdefault(name, Hits(processes=1))
    mine.parts |= told
    mine.of |= all_parts
    # At once, since a simulation may end without a chance to do it later.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(
        json.dumps({n: [sorted(each.parts), sorted(each.of)] for n, each in _mine.items()})
    )
    temporary.replace(path)


def _text(part: object) -> str:
    return part.name if isinstance(part, Enum) else str(part)


@cache
def _file(process: int) -> Path:
    """File of a process, of a name that no other one ever has, whatever numbers come again."""
    return _FOLDER / f"testpoints-{process}-{uuid.uuid4().hex}.json"


def files() -> set[Path]:
    """Files of all processes so far."""
    return set(_FOLDER.glob("testpoints-*.json"))


def clear() -> None:
    """Forget what was hit so far."""
    for path in [*_FOLDER.glob("*.json"), *_FOLDER.glob("*.new")]:
        path.unlink(missing_ok=True)


def hits(paths: Iterable[Path] | None = None) -> dict[str, Hits]:
    """What the processes of these files, or all, have hit."""
    found: dict[str, Hits] = {}
    for path in sorted(files() if paths is None else paths):
        for name, (parts, of) in json.loads(path.read_text()).items():
            each = found.setdefault(name, Hits())
            each.processes += 1
            each.parts.update(parts)
            each.of.update(of)
    return found


def missed(seen: Mapping[str, Hits], names: Collection[str]) -> list[str]:
    """Those of the names that were not hit, each with the parts that are missing."""
    found = []
    for name in names:
        each = seen.get(name, Hits())
        if not each.whole:
            # Of one that nobody came near the parts are not known.
            rest = f" ({', '.join(each.missing)})" if each.missing else ""
            found.append(f"{name}{rest}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the status is 1 if ``--strict`` and something was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_tb.coverage",
        description="Say which testpoints of docs/testplan the benches have hit.",
    )
    parser.add_argument("--page", help="only testpoints of this page, for example dma")
    parser.add_argument("--strict", action="store_true", help="fail if a testpoint was missed")
    parser.add_argument("--soak", action="store_true", help="want those of make soak, too")
    parser.add_argument("--clear", action="store_true", help="forget what was hit so far")
    options = parser.parse_args(arguments)
    if options.clear:
        clear()
        return 0
    if options.page not in {None, *(point.page for point in testpoints().values())}:
        parser.error(f"no page docs/testplan/{options.page}.md has a testpoint")
    seen = hits()
    plan = {n: point for n, point in testpoints().items() if options.page in (None, point.page)}
    _FOLDER.mkdir(parents=True, exist_ok=True)
    (_FOLDER / "coverage.json").write_text(
        json.dumps(
            {n: seen[n].processes if n in seen and seen[n].whole else 0 for n in plan}, indent=1
        )
        + "\n"
    )
    wanted = [n for n, point in plan.items() if options.soak or not point.soak]
    lacking = missed(seen, wanted)
    for name in plan:
        (text,) = missed(seen, [name]) or [name]
        word = "hit" if text == name and name in seen else "missed" if name in wanted else "soak"
        print(f"{word:<6}  {text}")
    print(f"{len(wanted) - len(lacking)} of {len(wanted)} testpoints were hit")
    return 1 if options.strict and lacking else 0


if __name__ == "__main__":
    sys.exit(main())
