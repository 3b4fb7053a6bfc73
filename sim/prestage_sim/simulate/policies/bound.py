"""Belady with perfect prefetch, and what no schedule can pass."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["BOUND", "BOUND_ANALYTIC"]


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


def _plan_analytic(workload: Workload) -> Plan:
    return Plan(evict=Evict.BELADY, analytic=True)


BOUND_ANALYTIC = Policy(
    name="bound-analytic",
    card=Card(
        source="the longer of compute, all resident, and of the links' time for Belady's bytes",
        predicts_from="the whole trace",
        simplified="nothing is scheduled: no policy passes it, and none need reach it",
    ),
    plan=_plan_analytic,
)
