"""Golden model of the candidate queue: which candidates enter, and which are stale."""

from __future__ import annotations

from prestage_hw.contract.records import Source

__all__ = ["enters", "stale"]


def enters(source: int, layer: int, *, enable: bool, cutoff_layer: int) -> bool:
    """Whether a candidate of that source, for that layer, enters the queue."""
    return (enable or source != Source.PREDICTOR) and layer < cutoff_layer


def stale(deadline: int, *, routes: int) -> bool:
    """Whether the decision with the stamp ``deadline`` has come: both counts are modulo 256."""
    return (routes - deadline) % 256 < 128
