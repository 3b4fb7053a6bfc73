"""Discrete-event simulator: what prefetching buys in time, bytes and joules.

:func:`simulate` replays a routing trace on a :class:`Machine` under a policy and says how long a
token takes beside one with everything resident. The buffer, the queue of candidates, the throttle
and the predictors are the golden model's own code; the simulator supplies time. To add a policy,
copy a file of ``policies/`` and register it by name there.
"""

from __future__ import annotations

from .events import Event, EventKind, Recorder
from .machine import UNIT, Link, Machine, Tier
from .phases import Phases
from .plan import Candidates, Card, Evict, Plan, Policy, Workload
from .policies import POLICIES, policy_by_name
from .result import FIELDS, Counts, Result
from .run import SCORES, simulate

__all__ = [
    "FIELDS",
    "POLICIES",
    "SCORES",
    "UNIT",
    "Candidates",
    "Card",
    "Counts",
    "Event",
    "EventKind",
    "Evict",
    "Link",
    "Machine",
    "Phases",
    "Plan",
    "Policy",
    "Recorder",
    "Result",
    "Tier",
    "Workload",
    "policy_by_name",
    "simulate",
]
