"""Least frequently used."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["LFU"]


def _plan(workload: Workload) -> Plan:
    trace = workload.trace
    return Plan(evict=Evict.LFU, samples=trace.layers * trace.experts_per_layer)


LFU = Policy(
    name="lfu",
    card=Card(
        source="the golden buffer's policy LFU: moving average of uses over 16 visits of a layer",
        predicts_from="nothing is prefetched",
        simplified="a search looks at all slots, where the hardware's looks at 32",
    ),
    plan=_plan,
)
