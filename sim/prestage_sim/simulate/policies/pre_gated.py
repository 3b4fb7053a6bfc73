"""Pre-gated MoE: the gate of a block chooses the experts of the next."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload
from .hints import hints

__all__ = ["PRE_GATED"]


def _plan(workload: Workload) -> Plan:
    trace = workload.trace
    return Plan(
        evict=Evict.LRU,
        candidates=workload.gather(hints(trace, {1: 1.0}, seed=workload.seed)),
        slots=workload.double_buffer,
        cancel=False,
        prefetch_inflight=trace.top_k,
    )


PRE_GATED = Policy(
    name="pre-gated",
    card=Card(
        source="Pre-gated MoE, arXiv 2308.12066 (ISCA 2024)",
        predicts_from="a retrained gate in block N chooses the experts of block N + 1: nothing is"
        " guessed, the model is another",
        simplified="a hint that is always right, one layer ahead; layer 0 on demand; no cache, a"
        " double buffer of 2k slots whatever the residency; the trace's routing stands for that of"
        " the retrained model",
    ),
    plan=_plan,
)
