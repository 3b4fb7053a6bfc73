"""Golden model of the order in which a layer's experts become candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..._jit import kernel

__all__ = ["rank", "ranked"]


@kernel
def rank(values: Any, threshold: Any, most: Any, experts: Any) -> Any:
    """Write the experts worth proposing to ``experts``, best first, and return how many they are.

    Parameters
    ----------
    values : array of :class:`int`
        Confidence of each expert.
    threshold : :class:`int`
        Least confidence.
    most : :class:`int`
        Most experts.
    experts : array of :class:`int`
        Where they go, at least ``most`` places.
    """
    count = 0
    for e in range(values.shape[0]):
        if values[e] < threshold:
            continue
        # Of equal values the lower expert comes first, and is there already.
        at = count
        while at > 0 and values[experts[at - 1]] < values[e]:
            at -= 1
        if at == most:
            continue
        count = min(count + 1, most)
        for n in range(count - 1, at, -1):
            experts[n] = experts[n - 1]
        experts[at] = e
    return count


def ranked(values: Sequence[int], *, threshold: int, most: int) -> list[tuple[int, int]]:
    """Experts worth proposing, best first.

    Parameters
    ----------
    values : sequence of :class:`int`
        Confidence of each expert, 0 to 255.
    threshold : :class:`int`
        Least confidence.
    most : :class:`int`
        Most experts.

    Returns
    -------
    list of (:class:`int`, :class:`int`)
        Expert and value, by value descending; of equal values, the lower expert comes first.
    """
    experts = np.empty(most, np.int64)
    count = rank(np.asarray(values, np.int64), threshold, most, experts)
    return [(expert, values[expert]) for expert in experts[:count].tolist()]
