"""SP-MoE: the draft's attention output through the target's gates, up to a cut-off layer."""

from __future__ import annotations

import math

from ..plan import Card, Evict, Plan, Policy, Workload
from .hints import collect, hinted

__all__ = ["SP_MOE", "cutoff_layer"]

#: Published: 88 to 89 % of the first choice.
_RECALL = 0.885


def cutoff_layer(*, layers: int, top_k: int, slots: int, rho: float) -> int:
    """Layers that are prefetched while the draft runs: what fits in slots and in its time."""
    room = max(1, slots // top_k - 1)
    time = max(1, math.ceil(layers / max(rho, 1e-9)))
    return min(layers, room, time)


def _plan(workload: Workload) -> Plan:
    trace = workload.trace
    cutoff = cutoff_layer(
        layers=trace.layers,
        top_k=trace.top_k,
        slots=workload.slots,
        rho=workload.machine.rho(trace.top_k),
    )
    guessed = hinted(trace, recall=_RECALL, seed=(workload.seed, 1))
    # Everything is proposed at the token's start: no layer proposes for another.
    return Plan(
        evict=Evict.LRU,
        candidates=collect(trace, [(trace.layers, guessed, 0)], at_start=cutoff),
        prefetch_inflight=trace.top_k,
    )


SP_MOE = Policy(
    name="sp-moe",
    card=Card(
        source="SP-MoE, arXiv 2510.10302",
        predicts_from="the draft model's attention output through the target model's gates",
        simplified="emulated hints at the token's start of recall 88.5 % (published: 88 to 89 % of"
        " the first choice); cut-off where slots or a token's time end; one token a block, and the"
        " draft's own time is not counted; LRU",
    ),
    plan=_plan,
)
