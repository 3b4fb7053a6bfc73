"""Golden model of the candidate queue: each context's candidates, the most beneficial first."""

from __future__ import annotations

from collections.abc import Sequence

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.benefit import CONFIDENCE_STEPS
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source

__all__ = ["CandidateQueue", "enters", "stale"]

#: Context, layer, expert, score, source and deadline.
Candidate = tuple[int, int, int, int, int, int]


def enters(source: int, layer: int, *, enable: bool, cutoff_layer: int) -> bool:
    """Whether a candidate of that source, for that layer, enters the queue."""
    return (enable or source != Source.PREDICTOR) and layer < cutoff_layer


def stale(deadline: int, *, routes: int) -> bool:
    """Whether the decision with the stamp ``deadline`` has come: both counts are modulo 256."""
    return (routes - deadline) % 256 < 128


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
    stale, overflow : :class:`int`
        Candidates dropped because their deadline had come, and lost to a full queue.
    """

    def __init__(self, config: DeviceConfig, *, routes: Sequence[int]) -> None:
        require_config(config)
        self._routes = routes
        self._share = config.candidate_share
        self._waiting: list[list[Candidate]] = [[] for _ in range(config.contexts)]
        self._turn = 0
        self.stale = 0
        self.overflow = 0

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._waiting)

    def _left(self, candidate: Candidate) -> int:
        """Steps that a fresh candidate has left: the fewer, the more it is worth."""
        ctx, _, _, score, _, deadline = candidate
        return (deadline - self._routes[ctx]) % 256 + CONFIDENCE_STEPS[score]

    def _purge(self, ctx: int) -> list[Candidate]:
        """What is left of a context's candidates without the stale ones."""
        routes = self._routes[ctx]
        before = self._waiting[ctx]
        fresh = [c for c in before if not stale(c[5], routes=routes)]
        self.stale += len(before) - len(fresh)
        self._waiting[ctx] = fresh
        return fresh

    def push(self, candidate: Candidate) -> None:
        """A candidate comes; where there is no place, the worst of its context goes."""
        ctx, deadline = candidate[0], candidate[5]
        if stale(deadline, routes=self._routes[ctx]):
            self.stale += 1
            return
        waiting = self._waiting[ctx]
        if len(waiting) == self._share:
            waiting = self._purge(ctx)
        if len(waiting) == self._share:
            self.overflow += 1
            # Of equals the last to come.
            worst = max(range(len(waiting)), key=lambda n: (self._left(waiting[n]), n))
            if self._left(candidate) >= self._left(waiting[worst]):
                return
            del waiting[worst]
        waiting.append(candidate)

    def best(self) -> Candidate | None:
        """The candidate that goes next, if any."""
        contexts = len(self._waiting)
        for ctx in (*range(self._turn, contexts), *range(self._turn)):
            if self._waiting[ctx] and (waiting := self._purge(ctx)):
                return min(waiting, key=self._left)
        return None

    def take(self) -> Candidate | None:
        """Remove that candidate; it is the next context's turn."""
        best = self.best()
        if best is not None:
            self._waiting[best[0]].remove(best)
            self._turn = (best[0] + 1) % len(self._waiting)
        return best
