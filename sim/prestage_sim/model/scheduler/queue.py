"""Golden model of the candidate queue: which candidates enter, and which are stale."""

from __future__ import annotations

from prestage_hw.contract.records import Source

__all__ = ["enters", "stale"]


def enters(source: int, *, enable: bool) -> bool:
    """Whether a candidate of that source enters the queue."""
    return enable or source != Source.PREDICTOR


def stale(deadline: int, *, routes: int) -> bool:
    """Whether the decision with the stamp ``deadline`` has come: both counts are modulo 256."""
    return (routes - deadline) % 256 < 128
