"""Fetch on demand, keep nothing."""

from __future__ import annotations

from ..plan import Card, Plan, Policy, Workload

__all__ = ["ON_DEMAND"]


def _plan(workload: Workload) -> Plan:
    return Plan(slots=workload.visits.width)


ON_DEMAND = Policy(
    name="on-demand",
    card=Card(
        source="no policy: what is fetched when it is wanted and kept no longer than its layer",
        predicts_from="nothing is prefetched",
        simplified="slots for one layer, whatever the residency",
    ),
    plan=_plan,
)
