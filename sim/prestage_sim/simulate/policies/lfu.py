"""Least frequently used."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["LFU"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.LFU)


LFU = Policy(
    name="lfu",
    card=Card(
        source="the golden buffer's policy LFU: moving average of uses over 16 visits of a layer",
        predicts_from="nothing is prefetched",
        simplified="nothing; a search looks at 32 slots, as in the hardware",
    ),
    plan=_plan,
)
