"""Golden model of the candidate queue: each context's candidates, the most beneficial first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.benefit import CONFIDENCE_STEPS
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source

from ..._jit import kernel

__all__ = [
    "CandidateQueue",
    "QueueState",
    "create_queue",
    "enters",
    "is_stale",
    "queue_best",
    "queue_push",
    "queue_take",
    "stale",
]

#: Context, layer, expert, score, source and deadline.
Candidate = tuple[int, int, int, int, int, int]

#: Columns of :attr:`QueueState.waiting`.
LAYER, EXPERT, SCORE, SOURCE, DEADLINE = range(5)

#: Places of :attr:`QueueState.registers`.
TURN, STALE, OVERFLOW = range(3)


class QueueState(NamedTuple):
    """All that a queue knows.

    Parameters
    ----------
    waiting : array of ``int64``, shape ``[C, places, 5]``
        Candidates of each context in the order of arrival: layer, expert, score, source, deadline.
    counts : array of ``int64``, shape ``[C]``
        How many of each context wait.
    routes : array of ``int64``, shape ``[C]``
        Routing decisions of each context, modulo 256.
    registers : array of ``int64``
        Whose turn it is; candidates dropped as stale, and lost to a full queue.
    steps : array of ``int64``
        :data:`CONFIDENCE_STEPS`.
    """

    waiting: NDArray[np.int64]
    counts: NDArray[np.int64]
    routes: NDArray[np.int64]
    registers: NDArray[np.int64]
    steps: NDArray[np.int64]


def create_queue(config: DeviceConfig) -> QueueState:
    """An empty queue."""
    contexts = config.contexts
    return QueueState(
        waiting=np.zeros((contexts, config.candidate_share, 5), np.int64),
        counts=np.zeros(contexts, np.int64),
        routes=np.zeros(contexts, np.int64),
        registers=np.zeros(3, np.int64),
        steps=np.array(CONFIDENCE_STEPS, np.int64),
    )


def enters(source: int, layer: int, *, enable: bool, cutoff_layer: int) -> bool:
    """Whether a candidate of that source, for that layer, enters the queue."""
    return (enable or source != Source.PREDICTOR) and layer < cutoff_layer


@kernel
def is_stale(deadline: Any, routes: Any) -> Any:
    """Whether the decision with that stamp has come: :func:`stale`."""
    return (routes - deadline) % 256 < 128


def stale(deadline: int, *, routes: int) -> bool:
    """Whether the decision with the stamp ``deadline`` has come: both counts are modulo 256."""
    return bool(is_stale(deadline, routes))


@kernel
def _left(state: Any, ctx: Any, score: Any, deadline: Any) -> Any:
    """Steps that a fresh candidate has left: the fewer, the more it is worth."""
    return (deadline - state.routes[ctx]) % 256 + state.steps[score]


@kernel
def _remove(state: Any, ctx: Any, place: Any) -> None:
    """Close the gap that a candidate leaves."""
    waiting = state.waiting[ctx]
    state.counts[ctx] -= 1
    for n in range(place, state.counts[ctx]):
        for column in range(waiting.shape[1]):
            waiting[n, column] = waiting[n + 1, column]


@kernel
def _purge(state: Any, ctx: Any) -> None:
    """Drop a context's stale candidates."""
    waiting = state.waiting[ctx]
    kept = 0
    for n in range(state.counts[ctx]):
        if is_stale(waiting[n, DEADLINE], state.routes[ctx]):
            state.registers[STALE] += 1
            continue
        if kept < n:
            for column in range(waiting.shape[1]):
                waiting[kept, column] = waiting[n, column]
        kept += 1
    state.counts[ctx] = kept


@kernel
def queue_push(
    state: Any, ctx: Any, layer: Any, expert: Any, score: Any, source: Any, deadline: Any
) -> None:
    """A candidate comes; where there is no place, the worst of its context goes."""
    if is_stale(deadline, state.routes[ctx]):
        state.registers[STALE] += 1
        return
    waiting = state.waiting[ctx]
    places = waiting.shape[0]
    if state.counts[ctx] == places:
        _purge(state, ctx)
    if state.counts[ctx] == places:
        state.registers[OVERFLOW] += 1
        worst, most = 0, np.int64(-1)
        for n in range(places):
            left = _left(state, ctx, waiting[n, SCORE], waiting[n, DEADLINE])
            # Of equals the last to come.
            if left >= most:
                worst, most = n, left
        if _left(state, ctx, score, deadline) >= most:
            return
        _remove(state, ctx, worst)
    place = state.counts[ctx]
    waiting[place, LAYER], waiting[place, EXPERT], waiting[place, SCORE] = layer, expert, score
    waiting[place, SOURCE], waiting[place, DEADLINE] = source, deadline
    state.counts[ctx] += 1


@kernel
def queue_best(state: Any) -> Any:
    """Context and place of the candidate that goes next, -1 for none."""
    contexts = state.counts.shape[0]
    for n in range(contexts):
        ctx = (state.registers[TURN] + n) % contexts
        if state.counts[ctx]:
            _purge(state, ctx)
        if state.counts[ctx] == 0:
            continue
        waiting = state.waiting[ctx]
        best, least = 0, _left(state, ctx, waiting[0, SCORE], waiting[0, DEADLINE])
        for place in range(1, state.counts[ctx]):
            left = _left(state, ctx, waiting[place, SCORE], waiting[place, DEADLINE])
            if left < least:
                best, least = place, left
        return ctx, np.int64(best)
    return np.int64(-1), np.int64(-1)


@kernel
def queue_take(state: Any) -> Any:
    """Remove that candidate: context (-1 for none), layer, expert, score, source, deadline."""
    ctx, place = queue_best(state)
    if ctx < 0:
        return ctx, ctx, ctx, ctx, ctx, ctx
    row = state.waiting[ctx, place]
    layer, expert, score, source, deadline = row[0], row[1], row[2], row[3], row[4]
    _remove(state, ctx, place)
    state.registers[TURN] = (ctx + 1) % state.counts.shape[0]
    return ctx, layer, expert, score, source, deadline


class CandidateQueue:
    """Candidates that wait, in the order of arrival.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    routes : sequence of :class:`int`
        Routing decisions of each context, modulo 256; kept up to date by its owner.

    Attributes
    ----------
    state : :class:`QueueState`
        The queue, in arrays that the compiled functions of this module work on.
    """

    def __init__(self, config: DeviceConfig, *, routes: Sequence[int]) -> None:
        require_config(config)
        self._routes = routes
        self.state = create_queue(config)

    @property
    def stale(self) -> int:
        """Candidates dropped because their deadline had come."""
        return int(self.state.registers[STALE])

    @stale.setter
    def stale(self, count: int) -> None:
        self.state.registers[STALE] = count

    @property
    def overflow(self) -> int:
        """Candidates lost to a full queue."""
        return int(self.state.registers[OVERFLOW])

    @overflow.setter
    def overflow(self, count: int) -> None:
        self.state.registers[OVERFLOW] = count

    def __len__(self) -> int:
        return int(self.state.counts.sum())

    def push(self, candidate: Candidate) -> None:
        """A candidate comes; where there is no place, the worst of its context goes.

        Raises
        ------
        ValueError
            If its confidence is out of range.
        """
        if not 0 <= candidate[3] <= 255:
            raise ValueError(f"Confidence must be between 0 and 255, not {candidate[3]}")
        self.state.routes[:] = self._routes
        queue_push(self.state, *candidate)

    def best(self) -> Candidate | None:
        """The candidate that goes next, if any."""
        self.state.routes[:] = self._routes
        ctx, place = queue_best(self.state)
        if ctx < 0:
            return None
        layer, expert, score, source, deadline = self.state.waiting[ctx, place].tolist()
        return int(ctx), layer, expert, score, source, deadline

    def take(self) -> Candidate | None:
        """Remove that candidate; it is the next context's turn."""
        self.state.routes[:] = self._routes
        candidate: Candidate = queue_take(self.state)
        return None if candidate[0] < 0 else candidate
