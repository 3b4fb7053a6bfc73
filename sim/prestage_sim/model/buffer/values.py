"""How much an expert in a slot is worth keeping: the integers of the replacement policies.

``docs/buffer.md`` is the specification of both this and the RTL.
"""

from __future__ import annotations

from typing import Any

from ..._jit import kernel

__all__ = ["DECAYS", "discounts", "keep_value", "rate_after_use", "use_rate"]

#: Use rate after that many visits of the layer without a use, in 1/256; 0 after the last.
DECAYS = tuple(round(256 * (15 / 16) ** age) for age in range(64))


def discounts(layers: int) -> tuple[int, ...]:
    """Worth of a use that many layers ahead, 0 to ``layers``, in 1/256."""
    return tuple(min(255, round(256 * (63 / 64) ** ahead)) for ahead in range(layers + 1))


@kernel
def use_rate(rate: Any, age: Any, decays: Any) -> Any:
    """Use rate of an expert, in 1/256, ``age`` visits of its layer after it was ``rate``."""
    # Without a branch, and so is what follows: hardly any could be foreseen.
    now = (rate * decays[min(age, 63)]) >> 8
    return now if age < 64 else rate - rate


@kernel
def rate_after_use(rate: Any, age: Any, decays: Any) -> Any:
    """Use rate after another use, where the one before was ``age`` visits ago and left ``rate``."""
    now = use_rate(rate, age, decays)
    return now + ((271 - now) >> 4)


@kernel
def keep_value(
    chance: Any, reuse: Any, rate: Any, visited: Any, distance: Any, discount: Any
) -> Any:
    """Worth of an expert by predicted next use, 12 bits.

    Parameters
    ----------
    chance, reuse, rate : :class:`int`
        V, R and use rate, in 1/256.
    visited : :class:`bool`
        Whether R is newer than V.
    distance : :class:`int`
        Layers from the current one to the expert's, 0 to L - 1.
    discount : array of :class:`int`
        :func:`discounts`.
    """
    habit = reuse + rate
    if visited and distance == 0:
        distance = discount.shape[0] - 1
    # Of a visited one the habit itself.
    chance = 0 if visited else chance
    share = 4096 if visited else (256 - chance) * 13
    return ((2 * chance + ((share * habit) >> 12)) * discount[distance]) >> 5
