"""The paper's predictor, with recency."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload
from ..values import st_moe_candidates

__all__ = ["ST_MOE"]


def _plan(workload: Workload) -> Plan:
    candidates = st_moe_candidates(workload.trace, workload.schedule)
    return Plan(evict=Evict.LRU, candidates=workload.gather(candidates))


ST_MOE = Policy(
    name="st-moe",
    card=Card(
        source="ST-MoE, arXiv 2606.15453: the golden predictor st_moe, with LRU",
        predicts_from="routing of this token one layer before, of the token before in that layer",
        simplified="learns online without a profile; the throttle is off",
    ),
    plan=_plan,
)
