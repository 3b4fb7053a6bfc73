"""EPS-MoE: experts of a layer as a pipeline, nothing predicted."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["EPS_MOE"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.LRU, slots=workload.double_buffer)


EPS_MOE = Policy(
    name="eps-moe",
    card=Card(
        source="EPS-MoE, arXiv 2410.12247",
        predicts_from="nothing: it schedules",
        simplified="each expert is computed as it comes while the next is loaded, those of most"
        " tokens first; no cache, slots for two layers. Its choice of matrix kernels is left out:"
        " an expert takes the longer of reading it and its tokens' arithmetic. One token at a time"
        " this is on-demand; it is meant for --prefill-chunk and --batch",
    ),
    plan=_plan,
)
