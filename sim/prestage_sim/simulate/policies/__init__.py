"""Policies by name, a file each.

To add one, copy ``lru.py``, and register its policy in :data:`POLICIES`.
"""

from __future__ import annotations

from ..plan import Policy
from .adap_gating import ADAP_GATING
from .belady import BELADY
from .bound import BOUND, BOUND_ANALYTIC
from .duoserve import DUOSERVE
from .eps_moe import EPS_MOE
from .layer_lru import LAYER_LRU
from .lfu import LFU
from .lru import LRU
from .moe_infinity import MOE_INFINITY
from .on_demand import ON_DEMAND
from .oracles import ORACLE_H1, ORACLE_H3
from .pre_gated import PRE_GATED
from .prestage import PRESTAGE, PRESTAGE_RTL
from .promoe import PROMOE
from .replication import REPLICATION
from .resident import RESIDENT
from .sp_moe import SP_MOE
from .speculating import SPECULATING_EXPERTS, SPECULATING_EXPERTS_EXECUTED
from .st_moe import ST_MOE

__all__ = ["POLICIES", "policy_by_name"]

#: What other systems do, in the order of tables.
_RIVALS = (
    PRE_GATED,
    ADAP_GATING,
    SPECULATING_EXPERTS,
    SPECULATING_EXPERTS_EXECUTED,
    DUOSERVE,
    SP_MOE,
    EPS_MOE,
    REPLICATION,
    MOE_INFINITY,
    PROMOE,
)

#: All policies by name, in the order of tables.
POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        RESIDENT,
        ON_DEMAND,
        LRU,
        LAYER_LRU,
        LFU,
        ST_MOE,
        *_RIVALS,
        PRESTAGE_RTL,
        PRESTAGE,
        ORACLE_H1,
        ORACLE_H3,
        BELADY,
        BOUND,
        BOUND_ANALYTIC,
    )
}


def policy_by_name(name: str) -> Policy:
    """The policy of that name.

    Raises
    ------
    ValueError
        If there is none; the message lists those that there are.
    """
    try:
        return POLICIES[name]
    except KeyError:
        raise ValueError(f"Policy must be one of {', '.join(POLICIES)}, not {name!r}") from None
