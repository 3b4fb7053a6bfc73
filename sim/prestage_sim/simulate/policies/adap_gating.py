"""AdapMoE: the next layers' own gates on the present activation."""

from __future__ import annotations

from ..plan import Card, Evict, Plan, Policy, Workload
from .hints import hints

__all__ = ["ADAP_GATING"]

#: Share of the true experts by layers ahead. The paper says about 90 % in most layers; each further
#: layer costs 3.5 to 5 points in other systems that apply a later layer's gate.
_RECALLS = {1: 0.90, 2: 0.86, 3: 0.82}


def _plan(workload: Workload) -> Plan:
    trace = workload.trace
    recalls = {ahead: r for ahead, r in _RECALLS.items() if ahead < trace.layers}
    return Plan(
        evict=Evict.LAYER_LRU,
        candidates=workload.gather(hints(trace, recalls, seed=workload.seed, at_start=1)),
        prefetch_inflight=trace.top_k,
    )


ADAP_GATING = Policy(
    name="adap-gating",
    card=Card(
        source="AdapMoE, arXiv 2408.10284 (ICCAD 2024); whether the paper's Adap-Gating is this one"
        " is not known",
        predicts_from="the gates of the next 1 to 3 layers applied to the present hidden state, and"
        " a small gate for layer 0",
        simplified="emulated hints of recall 90, 86 and 82 % one, two and three layers ahead"
        " (published: about 90 % one ahead); an equal share of slots a layer in place of dynamic"
        " programming; no expert is left out, so that outputs stay exact",
    ),
    plan=_plan,
)
