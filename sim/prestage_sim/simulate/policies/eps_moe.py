"""EPS-MoE: experts of a layer as a pipeline, nothing predicted."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["EPS_MOE"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.LRU, slots=min(workload.slots, 2 * workload.trace.top_k))


EPS_MOE = Policy(
    name="eps-moe",
    card=Card(
        source="EPS-MoE, arXiv 2410.12247",
        predicts_from="nothing: it schedules",
        simplified="each expert is computed as it comes while the next is loaded; no cache, 2k"
        " slots. Its choice of matrix kernels for large prefill batches can't be seen in a routing"
        " trace: of one token at a time this is on-demand",
    ),
    plan=_plan,
)
