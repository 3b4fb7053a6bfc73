"""Replay a trace on a machine under a policy."""

from __future__ import annotations

from collections.abc import Sequence

from prestage_sim.traces import Trace

from .events import Recorder
from .machine import Machine
from .result import Result

__all__ = ["SCORES", "simulate"]

#: Which tokens count.
SCORES = ("second-half", "all")


def simulate(
    trace: Trace,
    *,
    machine: Machine,
    policy: str,
    residency: float,
    rho: float | None = None,
    warm: Sequence[Trace] = (),
    score: str = "second-half",
    seed: int = 1,
    name: str = "trace",
    recorder: Recorder | None = None,
) -> Result:
    """Time, hits and traffic of a trace.

    Parameters
    ----------
    trace : :class:`Trace`
        What the router chose.
    machine : :class:`Machine`
        Where it runs.
    policy : :class:`str`
        One of :data:`POLICIES`.
    residency : :class:`float`
        Share of all experts that fit in the slots; at least what a layer uses does.
    rho : :class:`float` or None
        Makes the links as much faster or slower as brings all k experts of a layer in that many
        times of a layer; None leaves them as the machine has them.
    warm : sequence of :class:`Trace`
        Traces of the same model that are replayed before; they do not count.
    score : :class:`str`
        ``"second-half"`` counts the tokens from the middle of the trace on, ``"all"`` all of it.
    seed : :class:`int`
        For whatever is drawn at random.
    name : :class:`str`
        What the result calls the trace.
    recorder : :class:`Recorder` or None
        Collects events.

    Raises
    ------
    ValueError
        If the policy or the score is unknown, a number is out of its range, or a trace to warm up
        with is of another shape.
    """
    raise NotImplementedError
