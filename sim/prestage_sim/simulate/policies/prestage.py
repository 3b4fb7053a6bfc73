"""The engine of this project."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload

__all__ = ["PRESTAGE", "PRESTAGE_RTL"]


def _plan(workload: Workload) -> Plan:
    # The RTL with the registers rescan_ahead and rescan_least written so, and
    # ``DeviceConfig(prefetch_inflight=1, victim_samples=64)``.
    return Plan(
        evict=Evict.NEXT_USE,
        samples=64,
        predictor="full",
        rescan=12,
        rescan_least=24,
        prefetch_inflight=1,
    )


PRESTAGE = Policy(
    name="prestage",
    card=Card(
        source="this project's engine: predictor perceptron, eviction by predicted next use,"
        " candidates out of the buffer's latest values",
        predicts_from="routing of this token and the two before it, ids of tokens; learns online",
        simplified="the predictor takes no time, and neither does a walk through the values",
    ),
    plan=_plan,
)


def _plan_rtl(workload: Workload) -> Plan:
    return Plan(evict=Evict.NEXT_USE, predictor="full", eager=True)


PRESTAGE_RTL = Policy(
    name="prestage-rtl",
    card=Card(
        source="this project's engine with all registers as after reset, throttle off",
        predicts_from="the same; the predictor's candidates wait in a queue",
        simplified="the predictor takes no time",
    ),
    plan=_plan_rtl,
)
