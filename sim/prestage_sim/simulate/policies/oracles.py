"""What perfect prediction a few layers ahead is worth."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload
from ..values import foreseen_candidates

__all__ = ["ORACLE_H1", "ORACLE_H3"]


def _oracle(ahead: int) -> Policy:
    def plan(workload: Workload) -> Plan:
        return Plan(
            evict=Evict.NEXT_USE,
            predictor="full",
            candidates=foreseen_candidates(
                workload.visits, layers=workload.trace.layers, ahead=ahead
            ),
        )

    return Policy(
        name=f"oracle-h{ahead}",
        card=Card(
            source="no policy: what is known ahead, and nothing else",
            predicts_from=f"the trace itself, {ahead} layers ahead; eviction as of prestage",
            simplified="the next token's first layers count as layers ahead",
        ),
        plan=plan,
    )


ORACLE_H1 = _oracle(1)
ORACLE_H3 = _oracle(3)
