"""What a policy tells the simulator's engine to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prestage_sim.traces import Trace

from .machine import Machine
from .phases import Phases, Schedule, Visits

__all__ = ["Candidates", "Card", "Evict", "Plan", "Policy", "Workload"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a policy is.

    Parameters
    ----------
    source : :class:`str`
        Where it comes from.
    predicts_from : :class:`str`
        What it knows when it predicts.
    simplified : :class:`str`
        What was left out or emulated.
    """

    source: str
    predicts_from: str
    simplified: str


class Evict(IntEnum):
    """Who gives way. The first three are the golden buffer's policies."""

    LRU = 0
    LFU = 1
    NEXT_USE = 2
    LAYER_LRU = 3  # the least recently used of the same layer
    BELADY = 4  # whose next use is farthest; knows the whole trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Experts that a policy proposes, in the order in which it does.

    Moment ``s * (L + 1)`` is the start of step s, ``s * (L + 1) + 1 + l`` that when its layer l was
    routed; a step is a token, where tokens go one by one. What belongs to moment m are the entries
    ``offset[m]`` to ``offset[m + 1]``.

    Parameters
    ----------
    offset : array of int64, ``[S * (L + 1) + 1]``
        First entry of each moment.
    ahead : array of int16
        How many routing decisions until the entry's layer is routed: 1 is the next one, and more
        than what is left of the token reaches into the next.
    expert : array of int16
        Which expert of that layer.
    score : array of int16
        Confidence, 1 to 255; 0 takes a slot whatever it is worth.
    hint : array of bool, or None
        Whether it is an opinion from outside, for the throttle; None stands for all.
    """

    offset: NDArray[np.int64]
    ahead: NDArray[np.int16]
    expert: NDArray[np.int16]
    score: NDArray[np.int16]
    hint: NDArray[np.bool_] | None = None

    def joined(self, other: Candidates) -> Candidates:
        """These and others, of each moment these first; both are opinions from outside."""
        counts = (np.diff(self.offset), np.diff(other.offset))
        moment = np.concatenate([np.repeat(np.arange(len(n)), n) for n in counts])
        order = np.argsort(moment, kind="stable")
        return Candidates(
            offset=self.offset + other.offset,
            ahead=np.concatenate([self.ahead, other.ahead])[order],
            expert=np.concatenate([self.expert, other.expert])[order],
            score=np.concatenate([self.score, other.score])[order],
        )

    def check(self, steps: int, *, layers: int, experts: int) -> None:
        """Refuse what does not fit a workload: compiled functions would go beyond their arrays.

        Raises
        ------
        ValueError
            If there are more or fewer steps, or a number is out of its range.
        """
        moments = steps * (layers + 1)
        if self.offset.shape != (moments + 1,) or np.any(np.diff(self.offset) < 0):
            raise ValueError(
                f"Candidates must have {moments + 1} ascending offsets for {steps} tokens of"
                f" {layers} layers, not shape {list(self.offset.shape)}"
            )
        count = int(self.offset[-1])
        for name, values, low, high in (
            ("Layers ahead", self.ahead, 1, 127),
            ("Expert", self.expert, 0, experts - 1),
            ("Confidence", self.score, 0, 255),
        ):
            if len(values) < count:
                raise ValueError(f"{name} of {count} candidates must be given, not {len(values)}")
            if count and not low <= int(values.min()) <= int(values.max()) <= high:
                raise ValueError(
                    f"{name} of a candidate must be between {low} and {high}, not from"
                    f" {values.min()} to {values.max()}"
                )
        if self.hint is not None and len(self.hint) < count:
            raise ValueError(f"Source of {count} candidates must be given, not {len(self.hint)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """How the engine works.

    Parameters
    ----------
    evict : :class:`Evict`
        Who gives way.
    candidates : :class:`Candidates` or None
        What is prefetched, if there is time.
    predictor : :class:`str` or None
        A form of the golden perceptron whose values and candidates are used: ``"full"`` or
        ``"lite"``.
    slots : :class:`int` or None
        Slots in place of those that the residency gives.
    preload : :class:`bool`
        Whether experts lie in all slots from the start.
    proposes : :class:`bool`
        Whether the predictor's candidates are prefetched; else it only says what is worth keeping.
    threshold, far_threshold, ahead : :class:`int` or None
        Registers of the predictor in place of their values after reset: least confidence of a
        candidate for the next layer, for others, and layers proposed when a token starts.
    foresees : :class:`bool`
        Prefetch what is missing and used next, as long as what has to go is used later; knows the
        whole trace.
    samples : :class:`int`
        Slots that a search for a victim looks at, at most all: the device's ``victim_samples``.
        0 stands for its 32.
    rescan : :class:`int`
        Layers ahead in which candidates are looked for among the buffer's latest values, in place
        of the predictor's own: the register ``rescan_ahead``; 0 for none.
    rescan_least : :class:`int`
        Least confidence of those, in 1/256: the register ``rescan_least``.
    throttle : :class:`bool`
        Whether the golden throttle drops kinds of prefetches that cost more than they save.
    cancel : :class:`bool`
        Whether a prefetch on its way that its layer did not want is given up at a tile's edge.
    preempt : :class:`bool`
        Whether a demand goes before prefetches at a tile's edge; else at an expert's end.
    prefetch_inflight : :class:`int`
        Prefetches that may be on their way at a time.
    prefetch_tiles : :class:`int`
        Tiles of prefetches that may be on their way at a time; 0 for any number.
    eager : :class:`bool`
        Whether candidates are given slots as soon as there is room, as the RTL does, though demands
        are still to be fetched; else once a link has nothing better to do.
    executes : array of int16, ``[M, L, k]``, or None
        What layers run in place of what the router chose: outputs change.
    analytic : :class:`bool`
        The time is the longer of everything resident and of the links' work for what was moved, in
        place of the one that was simulated; chunks have their share of it.
    """

    evict: Evict = Evict.LRU
    candidates: Candidates | None = None
    predictor: str | None = None
    slots: int | None = None
    preload: bool = False
    proposes: bool = True
    threshold: int | None = None
    far_threshold: int | None = None
    ahead: int | None = None
    foresees: bool = False
    samples: int = 0
    rescan: int = 0
    rescan_least: int = 24
    throttle: bool = False
    cancel: bool = True
    preempt: bool = True
    prefetch_inflight: int = 2
    prefetch_tiles: int = 0
    eager: bool = False
    executes: NDArray[np.int16] | None = None
    analytic: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a policy may look at when it makes its plan.

    Parameters
    ----------
    trace : :class:`Trace`
        What the router chose: the traces to warm up with, then the one that counts. In order of
        the steps; only oracles look ahead in it.
    schedule : :class:`Schedule`
        Steps, and which tokens of that trace are their members.
    phases : :class:`Phases`
        What they come from.
    visits : :class:`Visits`
        What each layer of each step wants.
    request : array of :class:`int`, ``[M]``
        Request of each token.
    machine : :class:`Machine`
        Where it runs, links already at their rho.
    slots : :class:`int`
        Slots that the residency gives.
    seed : :class:`int`
        For whatever is drawn at random.
    folder : path or None
        Where what hangs on the trace alone may be kept on disk.
    """

    trace: Trace
    schedule: Schedule
    phases: Phases
    visits: Visits
    request: NDArray[np.int32]
    machine: Machine
    slots: int
    seed: int
    folder: Path | None = None

    @property
    def double_buffer(self) -> int:
        """Slots for what two layers want at most, or as many as there are."""
        return min(self.slots, 2 * self.visits.width)

    def gather(self, candidates: Candidates) -> Candidates:
        """Candidates of steps from those of their members.

        What several members propose comes once, the most popular first; its confidence is the sum
        of theirs, as of a chunk in the hardware.

        Parameters
        ----------
        candidates : :class:`Candidates`
            What is proposed at the start and after each layer of every member.
        """
        schedule = self.schedule
        layers, experts = self.trace.layers, self.trace.experts_per_layer
        if schedule.plain:
            return candidates
        count = int(candidates.offset[-1])
        at = np.repeat(np.arange(len(candidates.offset) - 1), np.diff(candidates.offset))
        step = schedule.step_of[at // (layers + 1)] * (layers + 1) + at % (layers + 1)
        ahead, expert = candidates.ahead[:count], candidates.expert[:count]
        key = (step * 128 + ahead) * experts + expert
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        votes = np.diff(starts, append=count)
        one = order[starts]
        scores = candidates.score[:count].astype(np.int64)[order]
        total = np.minimum(np.add.reduceat(scores, starts), 255) if count else scores
        best = np.lexsort((one, -votes, ahead[one], step[one]))
        one = one[best]
        offset = np.searchsorted(step[one], np.arange(schedule.steps * (layers + 1) + 1))
        return replace(
            candidates,
            offset=offset.astype(np.int64),
            ahead=ahead[one],
            expert=expert[one],
            score=total[best].astype(np.int16),
            hint=None if candidates.hint is None else candidates.hint[:count][one],
        )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy by name.

    Parameters
    ----------
    name : :class:`str`
        Its name.
    card : :class:`Card`
        What it is.
    plan : callable
        Makes the plan for a workload.
    """

    name: str
    card: Card
    plan: Callable[[Workload], Plan]
