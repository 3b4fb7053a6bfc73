"""Least recently used."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["LRU"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.LRU)


LRU = Policy(
    name="lru",
    card=Card(
        source="the golden buffer's policy LRU; what most public offloading code does",
        predicts_from="nothing is prefetched",
        simplified="nothing",
    ),
    plan=_plan,
)
