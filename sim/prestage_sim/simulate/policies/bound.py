"""Belady with perfect prefetch."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["BOUND"]


def _plan(workload: Workload) -> Plan:
    return Plan(evict=Evict.BELADY, foresees=True, cancel=False)


BOUND = Policy(
    name="bound",
    card=Card(
        source="Belady, with what is used next prefetched as long as what has to go is used later",
        predicts_from="the whole trace",
        simplified="greedy: it is a bound of what is known, not of what is possible",
    ),
    plan=_plan,
)
