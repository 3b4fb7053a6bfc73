"""Golden model of the DMA engine's time-out."""

from __future__ import annotations

__all__ = ["bounds"]


def bounds(cycles: int) -> tuple[int, int] | None:
    """Least and most cycles without progress after which a channel expires, None for never."""
    quarter = cycles // 4
    if not quarter:
        return None
    # Five ticks, the first of which may come at once.
    return 4 * quarter, 5 * quarter
