"""Which tokens go through the layers together: batches, chunks of a prompt, drafts to be verified.

All that goes through a layer at once is a *step*; its tokens are the step's *members*. A layer of a
step wants the union of what its members chose.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_sim.traces import Trace

from .._jit import compiled

__all__ = ["Phases", "Schedule", "Visits", "arrange", "unions"]

#: Tokens whose contexts a batch may have: more than any trace is long says only that it is wrong.
_MOST = 4096


@dataclass(frozen=True, kw_only=True)
class Phases:
    """How the tokens of a trace are brought through the layers; one at a time as it stands.

    Parameters
    ----------
    batch : :class:`int`
        Contexts that decode in lock-step: the trace is cut into as many segments of equal length,
        and each context goes through the requests of one.
    prefill_chunk : :class:`int`
        Tokens of a prompt that go through a layer together; 0 takes them one by one, as in decode.
    prompt : :class:`int`
        First tokens of each request that are taken for its prompt, but for its last one; 0 stands
        for those that the trace calls so.
    draft : :class:`int`
        Tokens that a draft model proposes for each step, and the model verifies together with the
        certain one; 0 for no speculation. Where a draft is wrong, another token of the trace, drawn
        at random, stands for it.
    accept : :class:`float`
        Probability that a draft is right if all before it were.
    draft_time : :class:`float`
        Time that the draft model takes for a token, over that of a token with everything resident.
    cutoff : :class:`int` or None
        In steps with drafts, layers from this one on are not prefetched; None leaves it to the
        policy.

    Raises
    ------
    ValueError
        If a number is out of its range, or says something of a phase that there is not.
    """

    batch: int = 1
    prefill_chunk: int = 0
    prompt: int = 0
    draft: int = 0
    accept: float = 0.75
    draft_time: float = 0.05
    cutoff: int | None = None

    def __post_init__(self) -> None:
        for what, value, low in (
            ("Batch", self.batch, 1),
            ("Prefill chunk", self.prefill_chunk, 0),
            ("Prompt", self.prompt, 0),
            ("Draft", self.draft, 0),
        ):
            if not low <= value <= _MOST:
                raise ValueError(f"{what} must be between {low} and {_MOST:,} tokens, not {value}")
        if not 0 <= self.accept <= 1:
            raise ValueError(f"Acceptance must be between 0 and 1, not {self.accept}")
        if not 0 <= self.draft_time < float("inf"):
            raise ValueError(f"Time of a draft must be at least 0, not {self.draft_time}")
        if self.prompt and not self.prefill_chunk:
            raise ValueError("A prompt of so many tokens needs a prefill chunk, but there is none")
        if self.cutoff is not None and not self.draft:
            raise ValueError("A cut-off layer needs drafts, but there are none")
        if self.cutoff is not None and self.cutoff < 0:
            raise ValueError(f"Cut-off layer must be at least 0, not {self.cutoff}")

    @property
    def plain(self) -> bool:
        """Whether each step is one token."""
        return self.batch == 1 and not self.prefill_chunk and not self.draft

    def __str__(self) -> str:
        parts = []
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        if self.prefill_chunk:
            parts.append(f"prompts in chunks of {self.prefill_chunk}")
        if self.draft:
            parts.append(f"drafts of {self.draft}, {100 * self.accept:g} % right")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Steps and their members.

    Parameters
    ----------
    members : array of ``int64``, ``[M]``
        Token of the trace that each member is, in the order of the steps.
    first : array of ``int64``, ``[S + 1]``
        First member of each step.
    context : array of ``int64``, ``[M]``
        Context of each member; those of a step come one after another.
    chunk : array of :class:`bool`, ``[M]``
        Whether it is of a chunk of a prompt.
    draft : array of :class:`bool`, ``[M]``
        Whether it is a draft.
    progress, drafted : array of ``int64``, ``[S]``
        Tokens that the step brings the trace forward by, and drafts that are made before it, one
        after another.
    contexts : :class:`int`
        How many there are.
    """

    members: NDArray[np.int64]
    first: NDArray[np.int64]
    context: NDArray[np.int64]
    chunk: NDArray[np.bool_]
    draft: NDArray[np.bool_]
    progress: NDArray[np.int64]
    drafted: NDArray[np.int64]
    contexts: int

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.progress)

    @property
    def plain(self) -> bool:
        """Whether each step is one token that is decoded, of the only context."""
        one = len(self.members) == self.steps and self.contexts == 1
        return one and not self.chunk.any()

    @property
    def step_of(self) -> NDArray[np.int64]:
        """Step of each member."""
        return np.repeat(np.arange(self.steps), np.diff(self.first))

    @property
    def prefill(self) -> NDArray[np.bool_]:
        """Whether a step has members of chunks alone, ``[S]``."""
        return np.logical_and.reduceat(self.chunk, self.first[:-1])

    def digest(self) -> str:
        """Digest of all that predictions hang on."""
        digest = hashlib.sha256()
        for part in (self.members, self.first, self.context, self.chunk, self.draft):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def trace(self, trace: Trace) -> Trace:
        """The members of a trace, as one."""
        if self.plain:
            return trace
        at = self.members
        return Trace(
            experts=trace.experts[at],
            experts_per_layer=trace.experts_per_layer,
            token=trace.token[at],
            is_decode=trace.is_decode[at] & ~self.chunk,
            layer_ids=trace.layer_ids,
            meta={"model": trace.model},
        )


@dataclass(kw_only=True)
class _Request:
    """What is left of a request."""

    at: int
    prompt: int
    end: int


class _Steps:
    """Steps as they are put together."""

    def __init__(self) -> None:
        self.members: list[NDArray[np.int64]] = []
        self.context: list[NDArray[np.int64]] = []
        self.chunk: list[NDArray[np.bool_]] = []
        self.draft: list[NDArray[np.bool_]] = []
        self.first = [0]
        self.progress: list[int] = []
        self.drafted: list[int] = []
        self._count = 0

    def add(self, members: NDArray[np.int64], context: int, *, chunk: bool, drafts: int) -> None:
        """Let a context take part in the step with some tokens, of which the last are drafts."""
        count = len(members)
        self._count += count
        self.members.append(members)
        self.context.append(np.full(count, context))
        self.chunk.append(np.full(count, chunk))
        self.draft.append(np.arange(count) >= count - drafts)

    def end(self, progress: int, drafted: int) -> None:
        """No more of them take part in the step."""
        self.first.append(self._count)
        self.progress.append(progress)
        self.drafted.append(drafted)


def _requests(trace: Trace, phases: Phases, start: int, end: int) -> deque[_Request]:
    """Requests of a segment of a trace, in order."""
    edges = np.flatnonzero(np.diff(trace.request_id[start:end])) + 1 + start
    bounds = [start, *edges.tolist(), end]
    found: deque[_Request] = deque()
    for begin, after in zip(bounds[:-1], bounds[1:], strict=True):
        prompt = begin
        if phases.prefill_chunk and phases.prompt:
            prompt = min(begin + phases.prompt, after - 1)
        elif phases.prefill_chunk:
            decode = np.flatnonzero(trace.is_decode[begin:after])
            prompt = begin + int(decode[0]) if len(decode) else after
        found.append(_Request(at=begin, prompt=prompt, end=after))
    return found


def _check(trace: Trace, phases: Phases) -> None:
    if phases.batch > trace.tokens:
        raise ValueError(
            f"Batch must be at most the trace's {trace.tokens:,} tokens, not {phases.batch:,}"
        )
    if phases.prefill_chunk and not phases.prompt and trace.is_decode.all():
        raise ValueError(
            "Trace has no tokens of prompts to take in chunks: --prompt N takes the first N of each"
            " request for its prompt"
        )


def arrange(traces: Sequence[Trace], phases: Phases, *, seed: int) -> tuple[Schedule, list[int]]:
    """Steps of traces one after another, and how many each has.

    Parameters
    ----------
    traces : sequence of :class:`Trace`
        Their tokens are counted through.
    phases : :class:`Phases`
        How they are brought through.
    seed : :class:`int`
        For which drafts are right, and what stands for those that are wrong.

    Raises
    ------
    ValueError
        If a trace is shorter than the batch, or has no prompts where chunks of them are asked for.
    """
    total = sum(trace.tokens for trace in traces)
    if phases.plain:
        return _one_by_one(total), [trace.tokens for trace in traces]
    rng = np.random.default_rng([seed, 0xD])
    steps, counts, begin = _Steps(), [], 0
    for trace in traces:
        _check(trace, phases)
        before = len(steps.progress)
        borders = [n * trace.tokens // phases.batch for n in range(phases.batch + 1)]
        waiting = [
            _requests(trace, phases, start, end)
            for start, end in zip(borders[:-1], borders[1:], strict=True)
        ]
        while any(waiting):
            progress = drafted = 0
            for context, requests in enumerate(waiting):
                if requests:
                    more, drafts = _take(steps, requests[0], context, begin, phases, total, rng)
                    progress, drafted = progress + more, max(drafted, drafts)
                    if requests[0].at == requests[0].end:
                        requests.popleft()
            steps.end(progress, drafted)
        counts.append(len(steps.progress) - before)
        begin += trace.tokens
    schedule = Schedule(
        members=np.concatenate(steps.members),
        first=np.array(steps.first),
        context=np.concatenate(steps.context),
        chunk=np.concatenate(steps.chunk),
        draft=np.concatenate(steps.draft),
        progress=np.array(steps.progress),
        drafted=np.array(steps.drafted),
        contexts=phases.batch,
    )
    return schedule, counts


def _one_by_one(tokens: int) -> Schedule:
    nothing = np.zeros(tokens, np.bool_)
    return Schedule(
        members=np.arange(tokens),
        first=np.arange(tokens + 1),
        context=np.zeros(tokens, np.int64),
        chunk=nothing,
        draft=nothing,
        progress=np.ones(tokens, np.int64),
        drafted=np.zeros(tokens, np.int64),
        contexts=1,
    )


def _take(
    steps: _Steps,
    request: _Request,
    context: int,
    before: int,
    phases: Phases,
    total: int,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Let a request take part in a step: how far it comes, and how many drafts were made.

    ``before`` tokens are those of earlier traces.
    """
    begin = request.at
    if begin < request.prompt:
        request.at = min(begin + phases.prefill_chunk, request.prompt)
        steps.add(np.arange(begin, request.at) + before, context, chunk=True, drafts=0)
        return request.at - begin, 0
    drafts = min(phases.draft, request.end - begin - 1)
    members = np.arange(begin, begin + drafts + 1) + before
    right = drafts
    if drafts:
        wrong = np.flatnonzero(rng.random(drafts) >= phases.accept)
        right = int(wrong[0]) if len(wrong) else drafts
        members[right + 1 :] = rng.integers(0, total, drafts - right)
    request.at = begin + right + 1
    steps.add(members, context, chunk=False, drafts=drafts)
    return right + 1, drafts


@dataclass(frozen=True, kw_only=True, eq=False)
class Visits:
    """What each layer of each step wants.

    Parameters
    ----------
    first : array of ``int64``, ``[S * L + 1]``
        First expert of each visit of a layer.
    experts : array of ``int16``
        Experts, those first that most members chose, else in the order of members and router.
    weight : array of ``int64``
        How many members chose each.
    """

    first: NDArray[np.int64]
    experts: NDArray[np.int16]
    weight: NDArray[np.int64]

    @property
    def width(self) -> int:
        """Most experts that a visit wants."""
        return int(np.diff(self.first).max())


@compiled
def _unions(chosen: Any, members: Any, experts: Any, first: Any, wanted: Any, weight: Any) -> Any:
    """Fill the arrays of :class:`Visits`; how many experts there are."""
    layers, k = chosen.shape[1], chosen.shape[2]
    votes = np.zeros(experts, np.int64)
    count = visit = 0
    for step in range(members.shape[0] - 1):
        for layer in range(layers):
            begin = count
            for m in range(members[step], members[step + 1]):
                for n in range(k):
                    expert = chosen[m, layer, n]
                    if votes[expert] == 0:
                        wanted[count] = expert
                        count += 1
                    votes[expert] += 1
            for at in range(begin + 1, count):
                # Sorted in place; of equals the first to come stays first.
                expert = wanted[at]
                to = at
                while to > begin and votes[wanted[to - 1]] < votes[expert]:
                    wanted[to] = wanted[to - 1]
                    to -= 1
                wanted[to] = expert
            for at in range(begin, count):
                weight[at] = votes[wanted[at]]
                votes[wanted[at]] = 0
            visit += 1
            first[visit] = count
    return count


def unions(chosen: NDArray[np.int16], schedule: Schedule, experts: int) -> Visits:
    """Visits of a schedule whose members chose ``chosen``, ``[M, L, k]``."""
    members, layers, _ = chosen.shape
    first = np.zeros(schedule.steps * layers + 1, np.int64)
    wanted = np.empty(chosen.size, np.int16)
    weight = np.empty(chosen.size, np.int64)
    count = int(_unions(chosen, schedule.first, experts, first, wanted, weight))
    assert members == schedule.first[-1]
    return Visits(first=first, experts=wanted[:count], weight=weight[:count])
