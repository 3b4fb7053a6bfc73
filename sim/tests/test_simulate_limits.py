"""The simulator against the columns of a float prototype's tables that no predictor is part of.

Tables and traces lie beside the project, ``../shared/limits.md`` and ``../shared/traces``; where
they are absent these tests skip.
"""

import os
from functools import cache
from pathlib import Path

import pytest

from prestage_sim.simulate import UNIT, simulate
from prestage_sim.traces import load_trace

SHARED = Path(os.environ.get("PRESTAGE_TRACES", "/work/shared/traces"))
TABLES = SHARED.parent / "limits.md"

#: Columns of the tables, and the policies the best of which a column shows.
COLUMNS = {
    "LRU (better of global, per layer)": ("lru", "lru-layer"),
    "LFU": ("lfu",),
    "Belady on demand": ("belady",),
}


@cache
def _tables():
    """Cells by file, residency in percent and rho: a time for each column."""
    tables, name, head = {}, None, []
    for line in TABLES.read_text(encoding="utf-8").splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("### "):
            name = line[4:].strip()
        elif row[0] == "slots":
            head = row
        elif name and row[0].endswith("%"):
            cells = {column: row[head.index(column)] for column in COLUMNS}
            tables[name, int(row[0][:-1]), int(row[1])] = {c: float(t) for c, t in cells.items()}
    return tables


@cache
def _trace(name):
    return load_trace(SHARED / f"gpt-oss-20b__{name}.npz")


def _check(name, percent, rho):
    path = SHARED / f"gpt-oss-20b__{name}.npz"
    if not (TABLES.exists() and path.exists()):
        pytest.skip(f"{TABLES} or {path} is not there")
    for column, expected in _tables()[name, percent, rho].items():
        found = {
            policy: simulate(
                _trace(name), machine=UNIT, policy=policy, residency=percent / 100, rho=rho
            ).tpot
            for policy in COLUMNS[column]
        }
        assert min(found.values()) == pytest.approx(expected, rel=0.01), (column, found)


@pytest.mark.parametrize(
    ("name", "percent", "rho"),
    [("cs", 10, 24), ("general", 25, 24), ("cs", 40, 24), ("general", 60, 12)],
)
def test_columns_of_the_prototype(name, percent, rho):
    """What is missed does not hang on rho; the greatest shows a difference most."""
    _check(name, percent, rho)


@pytest.mark.soak
@pytest.mark.parametrize("rho", [1, 2, 4, 12, 24])
@pytest.mark.parametrize("percent", [10, 25, 40, 60])
@pytest.mark.parametrize("name", ["cs", "math", "general"])
def test_every_cell_of_the_prototype(name, percent, rho):
    _check(name, percent, rho)
