"""MoE-Infinity: past requests whose activation matrix is like that of the present one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prestage_sim.traces import Trace

from ..phases import Schedule
from ..plan import Card, Evict, Plan, Policy, Workload
from .hints import collect

__all__ = ["MOE_INFINITY", "expected_activation"]

#: Past requests that are kept.
_COLLECTION = 64

#: Layers ahead that are proposed.
_FARTHEST = 3


class _Past:
    """Matrices of past requests, the last ones.

    Parameters
    ----------
    shape : tuple of :class:`int`
        Layers and experts.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._flat = np.zeros((0, shape[0] * shape[1]), np.float32)
        self._lengths = np.zeros(0, np.float32)
        self._shape = shape

    def add(self, matrix: NDArray[np.float32]) -> None:
        """Keep the matrix of a request that has ended."""
        self._flat = np.concatenate([self._flat, matrix.reshape(1, -1)])[-_COLLECTION:]
        self._lengths = np.sqrt((self._flat**2).sum(axis=1))

    def expect(self, so_far: NDArray[np.float32]) -> NDArray[np.float32]:
        """Share of a layer's choices that go to each expert, for a request that has come so far."""
        total = so_far
        norm = float(np.sqrt((so_far**2).sum()))
        if len(self._flat) and norm:
            alike = int(np.argmax(self._flat @ so_far.ravel() / self._lengths))
            most = self._flat[alike].reshape(self._shape) / self._lengths[alike]
            total = so_far / norm + most
        elif len(self._flat):
            total = self._flat[-1].reshape(self._shape)
        share = total.sum(axis=1, keepdims=True)
        return np.asarray(total / np.maximum(share, 1e-9), np.float32)


def expected_activation(
    trace: Trace, schedule: Schedule, request: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Share of a layer's choices that go to each expert, as seen at the start of each token's step.

    It is the matrix of that past request whose matrix has the greatest cosine with that of the
    present request so far, added to the latter; before there is any, it is 0. Drafts don't count.
    ``request`` says of which request each token is.
    """
    tokens, layers, experts = trace.tokens, trace.layers, trace.experts_per_layer
    found = np.zeros((tokens, layers, experts), np.float32)
    past = _Past((layers, experts))
    running: dict[int, NDArray[np.float32]] = {}
    certain = np.flatnonzero(~schedule.draft)
    last = dict(zip(request[certain].tolist(), certain.tolist(), strict=True))
    rows = np.arange(layers)[:, None]
    for begin, end in zip(schedule.first[:-1].tolist(), schedule.first[1:].tolist(), strict=True):
        now: dict[int, NDArray[np.float32]] = {}
        for t in range(begin, end):
            ctx = int(schedule.context[t])
            if ctx not in now:
                # The first token of a context in a step is never a draft.
                one = int(request[t])
                so_far = running.setdefault(one, np.zeros((layers, experts), np.float32))
                now[ctx] = past.expect(so_far)
            found[t] = now[ctx]
        for t in range(begin, end):
            one = int(request[t])
            if not schedule.draft[t]:
                running[one][rows, trace.experts[t]] += 1
                if last[one] == t:
                    past.add(running.pop(one))
    return found


def _plan(workload: Workload) -> Plan:
    trace = workload.trace
    expected = expected_activation(trace, workload.schedule, workload.request)
    k = trace.top_k
    best = np.argsort(-expected, axis=-1, kind="stable")[..., :k].astype(np.int16)
    chance = np.take_along_axis(expected, best.astype(np.int64), axis=-1) * k
    parts = []
    for ahead in range(1, min(_FARTHEST, trace.layers - 1) + 1):
        near = 1 - ahead / trace.layers
        score = np.clip(chance * near * 255, 1, 255).astype(np.int16)
        parts.append((ahead, best, score))
    return Plan(
        evict=Evict.LFU,
        candidates=workload.gather(collect(trace, parts, at_start=_FARTHEST)),
        prefetch_inflight=k,
    )


MOE_INFINITY = Policy(
    name="moe-infinity",
    card=Card(
        source="MoE-Infinity, arXiv 2401.14361",
        predicts_from="activation matrix of the request so far, matched by its cosine with those of"
        " 64 past requests",
        simplified="matched at each token's start, not at each layer; the k likeliest experts of"
        " the next three layers, weighted by 1 - distance / L; the buffer's own use rates in place"
        " of predicted reuse x layer position",
    ),
    plan=_plan,
)
