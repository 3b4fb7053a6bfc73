"""Golden model of the order in which a layer's experts become candidates."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ranked"]


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
    worth = [(expert, value) for expert, value in enumerate(values) if value >= threshold]
    return sorted(worth, key=lambda pair: (-pair[1], pair[0]))[:most]
