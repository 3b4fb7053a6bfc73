"""Everything in fast memory."""

from __future__ import annotations

from ..plan import Card, Plan, Policy, Workload

__all__ = ["RESIDENT"]


def _plan(workload: Workload) -> Plan:
    return Plan(slots=workload.trace.layers * workload.trace.experts_per_layer, preload=True)


RESIDENT = Policy(
    name="resident",
    card=Card(
        source="no policy: the baseline of all times",
        predicts_from="nothing has to come",
        simplified="all experts lie in fast memory from the start, whatever the residency",
    ),
    plan=_plan,
)
