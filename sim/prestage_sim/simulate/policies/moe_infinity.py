"""MoE-Infinity: past requests whose activation matrix is like that of the present one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prestage_sim.traces import Trace

from ..plan import Card, Evict, Plan, Policy, Workload
from .hints import collect

__all__ = ["MOE_INFINITY", "expected_activation"]

#: Past requests that are kept.
_COLLECTION = 64

#: Layers ahead that are proposed.
_FARTHEST = 3


def expected_activation(trace: Trace) -> NDArray[np.float32]:
    """Share of a layer's choices that go to each expert, as seen at the start of each token.

    It is the matrix of that past request whose matrix has the greatest cosine with that of the
    present request so far, added to the latter; before there is any, it is 0.
    """
    tokens, layers, experts = trace.tokens, trace.layers, trace.experts_per_layer
    found = np.zeros((tokens, layers, experts), np.float32)
    past: list[NDArray[np.float32]] = []
    edges = [0, *(np.flatnonzero(np.diff(trace.request_id)) + 1).tolist(), tokens]
    rows = np.arange(layers)[:, None]
    for start, end in zip(edges, edges[1:], strict=False):
        so_far = np.zeros((layers, experts), np.float32)
        kept = np.stack(past) if past else np.zeros((0, layers, experts), np.float32)
        flat = kept.reshape(len(kept), layers * experts)
        lengths = np.sqrt((flat**2).sum(axis=1))
        for t in range(start, end):
            total = so_far
            norm = float(np.sqrt((so_far**2).sum()))
            if len(flat) and norm:
                alike = int(np.argmax(flat @ so_far.ravel() / lengths))
                total = so_far / norm + kept[alike] / lengths[alike]
            elif len(flat):
                total = kept[-1]
            share = total.sum(axis=1, keepdims=True)
            found[t] = total / np.maximum(share, 1e-9)
            so_far[rows, trace.experts[t]] += 1
        past = [*past, so_far][-_COLLECTION:]
    return found


def _plan(workload: Workload) -> Plan:
    trace = workload.trace
    expected = expected_activation(trace)
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
        candidates=collect(trace, parts, at_start=_FARTHEST),
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
