"""Sweeps: kept by content, resumed after Ctrl-C, on processes and on a real Dask cluster."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prestage_sim.simulate import cells as cells_module
from prestage_sim.simulate import sweep as sweep_module
from prestage_sim.simulate.cells import Cell, at_rho, run_cell, trace_digest
from prestage_sim.simulate.machines import load_machine
from prestage_sim.simulate.models import ModelCard
from prestage_sim.simulate.sweep import Store, SweepError, SweepInterrupted, sweep
from prestage_sim.traces import Trace

CARD = ModelCard(name="test-moe", layers=3, experts=8, top_k=2, expert_bytes=1000)


def make(seed, tokens=60):
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(8), (tokens, 3, 1)), axis=-1)
    return Trace(
        experts=order[..., :2],
        experts_per_layer=8,
        token=rng.integers(0, 9, tokens),
        meta={"model": "test-moe"},
    )


def grid(trace, *, machine="unit", policies=("lru",), warm=(), rhos=(1.0, 4.0), **given):
    resolved = load_machine(machine).for_model(CARD)
    return [
        Cell(
            trace=trace_digest(trace),
            name=given.get("name", "one"),
            warm=tuple(trace_digest(other) for other in warm),
            machine=at_rho(resolved, rho, 2),
            policy=policy,
            residency=residency,
            rho=rho,
            score=given.get("score", "all"),
            seed=given.get("seed", 1),
        )
        for policy in policies
        for rho in rhos
        for residency in (0.25, 0.5)
    ]


def table(outcomes):
    return [outcome.result.as_json() for outcome in outcomes]


ONE, TWO = make(1), make(2)
TRACES = {trace_digest(trace): trace for trace in (ONE, TWO)}


@pytest.fixture
def runs(monkeypatch):
    """Cells that were really simulated, in this process."""
    seen = []
    monkeypatch.setattr(
        sweep_module, "run_cell", lambda cell, *a, **k: seen.append(cell) or run_cell(cell, *a, **k)
    )
    return seen


def test_outcomes_come_in_order_of_the_cells(runs):
    wanted = grid(ONE, rhos=(4.0, 1.0))
    done = []
    outcomes = sweep(wanted, TRACES, jobs=1, progress=lambda *n: done.append(n))
    assert [outcome.cell for outcome in outcomes] == wanted
    assert done == [(n, 0) for n in range(5)]
    assert [outcome.result.rho for outcome in outcomes] == [4.0, 4.0, 1.0, 1.0]
    # Twice the same cell is simulated once.
    assert len(sweep([*wanted, wanted[0]], TRACES, jobs=1)) == 5
    assert len(runs) == 8


def test_what_was_simulated_is_not_again(runs, tmp_path):
    first = sweep(grid(ONE), TRACES, jobs=1, store=Store(tmp_path))
    assert len(runs) == 4
    done = []
    again = sweep(
        grid(ONE, name="other"), TRACES, store=Store(tmp_path), progress=lambda *n: done.append(n)
    )
    assert len(runs) == 4
    assert done == [(4, 4)]
    assert table(again) == [{**row, "trace": "other"} for row in table(first)]
    assert [o.counts for o in again] == [o.counts for o in first]


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "ecpix5"},
        {"policies": ("on-demand",)},
        {"warm": (TWO,)},
        {"rhos": (2.0, 3.0)},
        {"score": "second-half"},
        {"seed": 2},
    ],
    ids=str,
)
def test_everything_is_part_of_the_key(change):
    before = {cell.key() for cell in grid(ONE)}
    assert not before & {cell.key() for cell in grid(ONE, **change)}


def test_content_is_part_of_the_key():
    other = Trace(experts=ONE.experts, experts_per_layer=9, token=ONE.token, meta=ONE.meta)
    assert len({trace_digest(trace) for trace in (ONE, TWO, other, ONE.named("x"))}) == 4
    assert trace_digest(make(1)) == trace_digest(ONE)


def test_code_is_part_of_the_key(monkeypatch):
    cell = grid(ONE)[0]
    before = cell.key()
    monkeypatch.setattr(cells_module, "code_digest", lambda: "another")
    assert cell.key() != before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"result": {}, "counts": {}}'])
def test_damaged_outcomes_are_simulated_again(runs, tmp_path, text):
    wanted = grid(ONE)
    first = sweep(wanted, TRACES, jobs=1, store=Store(tmp_path))
    for path in tmp_path.rglob("*.json"):
        path.write_text(text)
    assert table(sweep(wanted, TRACES, jobs=1, store=Store(tmp_path))) == table(first)
    assert len(runs) == 8


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match=r"Outcomes can't be kept in .*file"):
        sweep(grid(ONE), TRACES, jobs=1, store=Store(tmp_path / "file"))


def test_interrupted_sweep_goes_on(runs, tmp_path, monkeypatch):
    wanted = grid(ONE)
    whole = table(sweep(wanted, TRACES, jobs=1))
    runs.clear()

    def interrupt(cell, *arguments, **keywords):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(cell)
        return run_cell(cell, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "run_cell", interrupt)
        with pytest.raises(SweepInterrupted, match="interrupted after 2 of 4 cells"):
            sweep(wanted, TRACES, jobs=1, store=Store(tmp_path))
    assert table(sweep(wanted, TRACES, jobs=1, store=Store(tmp_path))) == whole
    assert runs == wanted


def test_rho_scales_links_and_tiers_alike():
    machine = load_machine("rtx-4090-pcie4").for_model(CARD)
    at = at_rho(machine, 8.0, 2)
    factor = machine.rho(2) / 8
    assert at.rho(2) == pytest.approx(8)
    assert at.links[0].latency == pytest.approx(machine.links[0].latency / factor)
    assert at.tiers[0].bandwidth == pytest.approx(machine.tiers[0].bandwidth * factor)
    assert at_rho(machine, machine.rho(2), 2) == machine


def test_outcome_has_energy_of_a_token():
    outcome = run_cell(grid(ONE, machine="ecpix5")[0], ONE)
    energy, joules = outcome.energy, outcome.result.joules_per_token
    assert energy.total.typical == pytest.approx(joules)
    assert energy.total.low < joules < energy.total.high
    unit = run_cell(grid(ONE)[0], ONE)
    assert unit.energy is None and unit.result.joules_per_token is None


def environment():
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


class Cluster:
    """A scheduler and workers of Dask as processes of their own, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        self._start("scheduler", "--no-dashboard", "--host", "127.0.0.1", "--port", "0")
        self.address = self._said(0, r"Scheduler at: +(tcp://\S+)")

    def _start(self, kind, *options):
        log = (self.folder / f"{len(self.processes)}.log").open("wb")
        command = [sys.executable, "-m", "distributed.cli.dask_" + kind, *options]
        self.processes.append(
            subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment())
        )
        log.close()

    def _said(self, number, pattern):
        # A busy machine takes its time to start a Python that imports Dask.
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = re.search(pattern, (self.folder / f"{number}.log").read_text())
            if found:
                return found[1]
            time.sleep(0.05)
        raise AssertionError((self.folder / f"{number}.log").read_text())

    def add_worker(self):
        options = ("--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1")
        self._start("worker", self.address, *options, "--local-directory", str(self.folder))
        return self.processes[-1]

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    pytest.importorskip("distributed", reason="Dask isn't installed")
    one = Cluster(tmp_path)
    yield one
    one.close()


@pytest.mark.filterwarnings("ignore:::distributed")
def test_dask_cluster_that_loses_a_worker(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "_PATIENCE", 120)
    wanted = [*grid(ONE, rhos=range(1, 16)), *grid(TWO, warm=(ONE,), rhos=range(1, 16))]
    whole = table(sweep(wanted, TRACES, jobs=1))
    first, _second = cluster.add_worker(), cluster.add_worker()
    killed = []

    def kill(done, found):
        if done == 5:
            first.send_signal(signal.SIGKILL)
            killed.append(first.wait())

    outcomes = sweep(
        wanted, TRACES, scheduler=cluster.address, store=Store(tmp_path / "kept"), progress=kill
    )
    assert killed == [-signal.SIGKILL]
    assert table(outcomes) == whole
    # What the cluster found is kept like anything else.
    assert table(sweep(wanted, {}, store=Store(tmp_path / "kept"))) == whole


@pytest.mark.filterwarnings("ignore:::distributed")
def test_dask_cluster_without_workers(cluster, monkeypatch):
    # Long enough to find the scheduler even on a busy machine.
    monkeypatch.setattr(sweep_module, "_PATIENCE", 4)
    with pytest.raises(SweepError, match=r"scheduler at tcp://.* has no workers: start some with"):
        sweep(grid(ONE), TRACES, scheduler=cluster.address)


@pytest.mark.filterwarnings("ignore:::distributed")
def test_scheduler_that_is_not_there(monkeypatch):
    pytest.importorskip("distributed", reason="Dask isn't installed")
    monkeypatch.setattr(sweep_module, "_PATIENCE", 1)
    began = time.monotonic()
    with pytest.raises(SweepError, match=r"There is no Dask scheduler at tcp://127.0.0.1:9"):
        sweep(grid(ONE), TRACES, scheduler="tcp://127.0.0.1:9")
    assert time.monotonic() - began < 60


def test_dask_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SweepError, match=r"isn't installed: pip install 'prestage\[dask\]'"):
        sweep(grid(ONE), TRACES, scheduler="tcp://127.0.0.1:9")
