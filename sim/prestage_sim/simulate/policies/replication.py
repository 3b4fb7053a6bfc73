"""Fast MoE by predictive prefetching and replication, as one compute unit sees it."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload
from .hints import collect, hinted

__all__ = ["REPLICATION"]

#: No recall is published; its outputs keep 90 to 95 % of the quality.
_RECALL = 0.92


def _plan(workload: Workload) -> Plan:
    trace = workload.trace
    guessed = hinted(trace, recall=_RECALL, seed=(workload.seed, 1))
    room = max(1, workload.slots // workload.visits.width - 1)
    return Plan(
        evict=Evict.LRU,
        candidates=workload.gather(collect(trace, [(trace.layers, guessed, 0)], at_start=room)),
        prefetch_inflight=trace.top_k,
    )


REPLICATION = Policy(
    name="replication",
    card=Card(
        source="Fast MoE inference by predictive prefetching and expert replication, arXiv"
        " 2605.11537",
        predicts_from="a recurrent network over the tokens of the next batch",
        simplified="emulated hints of recall 92 % for all layers at the token's start, as far as"
        " slots reach (published: no recall, 90 to 95 % of the quality). One token on one unit has"
        " nothing to replicate: prestage_sim.simulate.replication runs batches over several units",
    ),
    plan=_plan,
)
