"""Memory tiers between the slots and where all experts lie, each with its least recent on top."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._jit import inner, kernel
from .state import TOUCHES

__all__ = ["find_source", "forget"]


@inner
def forget(engine: Any, tier: Any, key: Any) -> None:
    """Take an expert out of a tier, if it is there."""
    if engine.stamps[tier, key] >= 0:
        engine.stamps[tier, key] = -1
        engine.filled[tier] -= 1


@kernel
def _make_room(engine: Any, tier: Any) -> None:
    """Take the least recent expert out of a tier that is full."""
    if engine.filled[tier] < engine.rooms[tier]:
        return
    oldest = np.int64(-1)
    for key in range(engine.stamps.shape[1]):
        stamp = engine.stamps[tier, key]
        if stamp >= 0 and (oldest < 0 or stamp < engine.stamps[tier, oldest]):
            oldest = np.int64(key)
    forget(engine, tier, oldest)


@inner
def find_source(engine: Any, key: Any) -> Any:
    """Nearest tier that holds an expert; on its way it is put into all nearer ones.

    Its place there is taken at once. An expert that leaves a tier on its way still comes through.
    """
    bounded = engine.stamps.shape[0]
    source = np.int64(0)
    while source < bounded and engine.stamps[source, key] < 0:
        source += 1
    for tier in range(min(source + 1, bounded)):
        if tier < source:
            _make_room(engine, tier)
            engine.filled[tier] += 1
        engine.registers[TOUCHES] += 1
        engine.stamps[tier, key] = engine.registers[TOUCHES]
    return source
