"""Evict what is used last."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["BELADY"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.BELADY)


BELADY = Policy(
    name="belady",
    card=Card(
        source="L. A. Belady, A study of replacement algorithms, 1966",
        predicts_from="the whole trace; nothing is prefetched",
        simplified="nothing",
    ),
    plan=_plan,
)
