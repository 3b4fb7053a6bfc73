"""Policies by name, a file each.

To add one, copy ``lru.py``, and register its policy in :data:`POLICIES`.
"""

from __future__ import annotations

from ..plan import Policy
from .lru import LRU

__all__ = ["POLICIES", "policy_by_name"]

#: All policies by name, in the order of tables.
POLICIES: dict[str, Policy] = {policy.name: policy for policy in (LRU,)}


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
