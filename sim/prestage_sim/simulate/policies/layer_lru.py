"""Least recently used, each layer with a share."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["LAYER_LRU"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.LAYER_LRU)


LAYER_LRU = Policy(
    name="lru-layer",
    card=Card(
        source="LRU with an equal share of the slots for each layer",
        predicts_from="nothing is prefetched",
        simplified="the layer that holds most gives up its least recent expert",
    ),
    plan=_plan,
)
