"""Policies by name, a file each.

To add one, copy ``lru.py``, and register its policy in :data:`POLICIES`.
"""

from __future__ import annotations

from ..plan import Policy
from .belady import BELADY
from .bound import BOUND
from .layer_lru import LAYER_LRU
from .lfu import LFU
from .lru import LRU
from .on_demand import ON_DEMAND
from .prestage import PRESTAGE
from .resident import RESIDENT

__all__ = ["POLICIES", "policy_by_name"]

#: All policies by name, in the order of tables.
POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (RESIDENT, ON_DEMAND, LRU, LAYER_LRU, LFU, PRESTAGE, BELADY, BOUND)
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
