"""The engine of this project."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["PRESTAGE"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.NEXT_USE, predictor="full")


PRESTAGE = Policy(
    name="prestage",
    card=Card(
        source="this project's engine: predictor perceptron, form full; eviction by predicted next use",
        predicts_from="routing of this token and the two before it, ids of tokens; learns online",
        simplified="the predictor takes no time",
    ),
    plan=_plan,
)
