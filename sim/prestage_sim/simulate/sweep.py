"""Many cells, on all cores or on a Dask cluster, kept by content so that a sweep can go on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from prestage_sim.traces import Trace

from .cells import Cell, Outcome, code_digest, run_cell

__all__ = ["Store", "SweepError", "SweepInterrupted", "default_folder", "sweep"]

#: Seconds after which a Dask scheduler that doesn't answer counts as not there.
_PATIENCE = 10

#: Deaths of workers that a cell survives before it is taken for their cause.
_RETRIES = 5


class SweepError(Exception):
    """A sweep that can't be run where it was asked to."""


class SweepInterrupted(Exception):
    """Ctrl-C during a sweep.

    Parameters
    ----------
    done, total : :class:`int`
        Cells that are done, and all.
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"interrupted after {done} of {total} cells")
        self.done, self.total = done, total


def default_folder() -> Path:
    """Where outcomes are kept: ``prestage/sweep`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base else Path.home() / ".cache") / "prestage" / "sweep"


class Store:
    """Outcomes on disk, by the digest of all that they hang on.

    Parameters
    ----------
    folder : path or None
        Where they are kept; None keeps none.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @property
    def predictions(self) -> Path | None:
        """Where what predictors say of a trace is kept, for all its cells."""
        return None if self.folder is None else self.folder / "predictions"

    def _path(self, cell: Cell) -> Path | None:
        if self.folder is None:
            return None
        key = cell.key()
        return self.folder / key[:2] / f"{key}.json"

    def get(self, cell: Cell) -> Outcome | None:
        """Outcome of a cell; None if it isn't there or can't be read."""
        path = self._path(cell)
        if path is None:
            return None
        try:
            return Outcome.from_stored(cell, json.loads(path.read_bytes()))
        except (OSError, ValueError):
            return None

    def put(self, outcome: Outcome) -> None:
        """Keep an outcome, whole or not at all.

        Raises
        ------
        SweepError
            If it can't be written.
        """
        path = self._path(outcome.cell)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                json.dump(outcome.as_stored(), file)
            Path(name).replace(path)
        except OSError as error:
            raise SweepError(
                f"Outcomes can't be kept in {self.folder}: {error.strerror}"
            ) from error


class _Bench:
    """Runs cells whose traces it has.

    Parameters
    ----------
    traces : mapping
        Traces by their digest.
    folder : path or None
        Where predictions are kept.
    """

    def __init__(self, traces: Mapping[str, Trace], folder: Path | None) -> None:
        self.traces, self.folder = dict(traces), folder

    def run(self, cell: Cell) -> dict[str, Any]:
        warm = [self.traces[digest] for digest in cell.warm]
        outcome = run_cell(cell, self.traces[cell.trace], warm, folder=self.folder)
        return outcome.as_stored()


#: The bench of a worker process.
_benches: list[_Bench] = []


def _prepare(bench: _Bench) -> None:
    # Ctrl-C goes to all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _benches.append(bench)


def _run(cell: Cell) -> dict[str, Any]:
    return _benches[-1].run(cell)


def _in_process(cells: Sequence[Cell], bench: _Bench) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for cell in cells:
        yield cell, bench.run(cell)


def _on_cores(
    cells: Sequence[Cell], bench: _Bench, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    # Spawned, since forking a process that draws a progress bar in a thread may hang.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_prepare, initargs=(bench,)
    )
    finished = False
    try:
        futures = {executor.submit(_run, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
        finished = True
    except BrokenProcessPool as error:
        raise SweepError(
            "A worker process was ended from outside, perhaps for want of memory; the same command"
            " goes on from what is done, and --jobs takes fewer"
        ) from error
    finally:
        executor.shutdown(wait=finished, cancel_futures=True)
        if not finished:
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
                process.join(_PATIENCE)


def _same(value: Any) -> Any:
    return value


def _on_worker(cell: Cell, trace: Trace, warm: list[Trace], code: str) -> dict[str, Any]:
    """Run a cell on a worker of a cluster, whose prestage must be the same as here."""
    if code_digest() != code:
        raise SweepError("A Dask worker has another version of prestage than this machine")
    return run_cell(cell, trace, warm).as_stored()


def _on_cluster(
    cells: Sequence[Cell], traces: Mapping[str, Trace], scheduler: str
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    try:
        import distributed as dask
    except ImportError:
        raise SweepError(
            "--scheduler needs Dask, which isn't installed: pip install 'prestage[dask]'"
        ) from None
    try:
        # Dask's own annotations are patchy.
        distributed: Any = dask
        client = distributed.Client(scheduler, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise SweepError(
            f"There is no Dask scheduler at {scheduler}: no answer in {_PATIENCE} s"
            f" ({type(error).__name__}); start one with 'dask scheduler'"
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            try:
                client.wait_for_workers(1, timeout=_PATIENCE)
            except TimeoutError:
                raise SweepError(
                    f"The Dask scheduler at {scheduler} has no workers:"
                    f" start some with 'dask worker {scheduler} --nthreads 1'"
                ) from None
        # Traces are results of tasks, not scattered data: those are lost with their worker.
        held = {
            digest: client.submit(_same, trace, key=f"trace-{digest}")
            for digest, trace in traces.items()
        }
        futures = {}
        for cell in cells:
            warm = [held[w] for w in cell.warm]
            arguments = (cell, held[cell.trace], warm, code_digest())
            future = client.submit(_on_worker, *arguments, pure=False, retries=_RETRIES)
            futures[future.key] = (future, cell)
        done = distributed.as_completed(
            [future for future, _ in futures.values()], loop=client.loop
        )
        for future in done:
            try:
                stored = future.result()
            except distributed.KilledWorker as error:
                raise SweepError(f"Dask workers die of a cell: {error}") from error
            yield futures.pop(future.key)[1], stored


def sweep(
    cells: Sequence[Cell],
    traces: Mapping[str, Trace],
    *,
    jobs: int = 0,
    scheduler: str | None = None,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Outcomes of cells, in their order.

    Parameters
    ----------
    cells : sequence of :class:`Cell`
        What to simulate.
    traces : mapping
        Traces by their digest.
    jobs : :class:`int`
        Processes; 1 takes none but this one, 0 one a core.
    scheduler : :class:`str` or None
        Address of a Dask scheduler, ``tcp://host:port``, whose workers run the cells.
    store : :class:`Store` or None
        Where outcomes are kept as they come, and looked up before.
    progress : callable or None
        Takes how many cells are done, and how many of those were kept from before.

    Raises
    ------
    SweepInterrupted
        On Ctrl-C; what was done is kept.
    SweepError
        If the scheduler isn't there, or workers die.
    """
    store = store or Store(None)
    outcomes: dict[Cell, Outcome] = {}
    for cell in cells:
        kept = store.get(cell)
        if kept is not None:
            outcomes[cell] = kept
    found = len(outcomes)
    missing = [cell for cell in dict.fromkeys(cells) if cell not in outcomes]
    if progress is not None:
        progress(found, found)
    used = {digest for cell in missing for digest in (cell.trace, *cell.warm)}
    needed = {digest: traces[digest] for digest in used}
    bench = _Bench(needed, store.predictions)
    jobs = min(jobs or os.cpu_count() or 1, len(missing))
    if scheduler is not None and missing:
        running = _on_cluster(missing, needed, scheduler)
    elif jobs > 1:
        running = _on_cores(missing, bench, jobs)
    else:
        running = _in_process(missing, bench)
    with contextlib.closing(running):  # type: ignore[type-var]
        try:
            for cell, stored in running:
                outcome = Outcome.from_stored(cell, stored)
                store.put(outcome)
                outcomes[cell] = outcome
                if progress is not None:
                    progress(len(outcomes), found)
        except KeyboardInterrupt:
            raise SweepInterrupted(len(outcomes), len(set(cells))) from None
    return [outcomes[cell] for cell in cells]
