"""Least recently used of the same layer."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["LAYER_LRU"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.LAYER_LRU)


LAYER_LRU = Policy(
    name="lru-layer",
    card=Card(
        source="LRU where a layer's expert takes the place of one of the same layer",
        predicts_from="nothing is prefetched",
        simplified="how many slots a layer has is settled while they fill; where all of its own"
        " are in use, the layer that holds most gives way",
    ),
    plan=_plan,
)
