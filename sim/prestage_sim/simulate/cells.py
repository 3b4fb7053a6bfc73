"""Cells of a comparison: one trace on one machine under one policy, ready to be run anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import prestage_hw.contract
from prestage_sim.traces import Trace

from .energy import Energy
from .events import Recorder
from .machine import Machine
from .phases import Phases
from .result import Counts, Result
from .run import simulate_counted

__all__ = ["Cell", "Outcome", "at_rho", "code_digest", "run_cell", "trace_digest"]


_ONE_BY_ONE = Phases()


@cache
def code_digest() -> str:
    """Digest of all code that a result hangs on: the golden model, the simulator, the contract."""
    digest = hashlib.sha256()
    for module in (Path(__file__).parents[1], Path(prestage_hw.contract.__file__).parent):
        for path in sorted(module.rglob("*.py")):
            digest.update(path.relative_to(module).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def trace_digest(trace: Trace) -> str:
    """Digest of all that a trace holds, whatever the format of its file."""
    digest = hashlib.sha256()
    arrays: list[NDArray[Any]] = [
        trace.experts,
        trace.request_id,
        trace.is_decode,
        trace.token,
        trace.layer_ids,
    ]
    if trace.scores is not None:
        arrays.append(trace.scores)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(str(trace.experts_per_layer).encode())
    digest.update(json.dumps(trace.meta, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def at_rho(machine: Machine, rho: float, top_k: int) -> Machine:
    """The machine at that rho, its latencies the same share of a transfer as before."""
    return machine.with_rho(rho, top_k, latencies=True)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to simulate.

    Parameters
    ----------
    trace : :class:`str`
        Digest of the trace.
    name : :class:`str`
        What results call it.
    warm : tuple of :class:`str`
        Digests of the traces to warm up with.
    machine : :class:`Machine`
        Where it runs, links already at their rho.
    policy : :class:`str`
        Name of the policy.
    residency : :class:`float`
        Share of all experts that fit in the slots.
    rho : :class:`float`
        What the result gives as rho: that which was asked for, or the machine's own.
    score : :class:`str`
        Which tokens count.
    seed : :class:`int`
        For whatever is drawn at random.
    phases : :class:`Phases`
        Which tokens go through the layers together.
    """

    trace: str
    name: str
    warm: tuple[str, ...]
    machine: Machine
    policy: str
    residency: float
    rho: float
    score: str
    seed: int
    phases: Phases = _ONE_BY_ONE

    def key(self) -> str:
        """Digest of everything that the outcome hangs on, the code's version among it."""
        content = replace(self, name="", rho=0.0)
        return hashlib.sha256(f"{code_digest()} {content!r}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cell gave.

    Parameters
    ----------
    cell : :class:`Cell`
        What was simulated.
    result : :class:`Result`
        The fields of the JSON object.
    counts : :class:`Counts`
        What was counted over the scored tokens.
    """

    cell: Cell
    result: Result
    counts: Counts

    @property
    def energy(self) -> Energy | None:
        """Joules of a token, by what they were spent for; None where the machine doesn't say."""
        model = self.cell.machine.joules
        if model is None or not self.counts.tokens:
            return None
        return Energy(*(part.times(1 / self.counts.tokens) for part in model.split(self.counts)))

    def as_stored(self) -> dict[str, Any]:
        """The outcome as JSON takes it."""
        return {"result": asdict(self.result), "counts": asdict(self.counts)}

    @classmethod
    def from_stored(cls, cell: Cell, stored: Mapping[str, Any]) -> Outcome:
        """The outcome of a cell that was stored before; names are the cell's.

        Raises
        ------
        ValueError
            If something else was stored.
        """
        try:
            counts = dict(stored["counts"])
            counts["tier_tiles"] = tuple(counts["tier_tiles"])
            result = {**stored["result"], "trace": cell.name, "rho": cell.rho}
            for name in ("tier_bytes", "tier_joules"):
                result[name] = None if result[name] is None else tuple(result[name])
            if set(counts) != {f.name for f in fields(Counts)}:
                raise ValueError("other counts")
            return cls(cell=cell, result=Result(**result), counts=Counts(**counts))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an outcome: {error}") from error


def run_cell(
    cell: Cell,
    trace: Trace,
    warm: Sequence[Trace] = (),
    *,
    recorder: Recorder | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Simulate a cell.

    Parameters
    ----------
    cell : :class:`Cell`
        What to simulate.
    trace, warm : :class:`Trace` and sequence of :class:`Trace`
        The traces that its digests stand for.
    recorder : :class:`Recorder` or None
        Collects events.
    folder : path or None
        Where predictions are kept on disk, for all cells of the same trace.
    """
    result, counts = simulate_counted(
        trace,
        machine=cell.machine,
        policy=cell.policy,
        residency=cell.residency,
        warm=warm,
        score=cell.score,
        seed=cell.seed,
        name=cell.name,
        recorder=recorder,
        phases=cell.phases,
        folder=folder,
    )
    return Outcome(cell=cell, result=replace(result, rho=cell.rho), counts=counts)
