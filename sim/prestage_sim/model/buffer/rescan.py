"""Which missing expert is worth a prefetch most, by the buffer's own values.

What waits in the scheduler's queue was proposed with the values of its time, once, and is dropped
where its expert lay in a slot then. The buffer holds the latest values of all experts: going
through those of the next layers whenever there is room for a prefetch finds what was evicted since,
what turned out to be likelier, and what the next token will want of the layers that this one has
passed. ``docs/buffer.md`` is the specification of both this and the RTL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prestage_hw.contract.benefit import CONFIDENCE_STEPS
from prestage_hw.contract.records import RescanCode

from ..._jit import kernel
from .state import EMPTY, EXPERTS, LANES, STATE

__all__ = ["RescanResult", "rescan"]

_STEPS = np.array(CONFIDENCE_STEPS, np.int64)


class RescanResult(NamedTuple):
    """Answer to a rescan: the fields of the contract's record."""

    code: RescanCode
    layer: int = 0
    expert: int = 0
    value: int = 0
    ahead: int = 0


@kernel
def rescan(state: Any, ctx: Any, near: Any, ahead: Any, least: Any, cutoff_layer: Any) -> Any:
    """Key, confidence and layers ahead of the missing expert of greatest benefit; key -1 for none.

    Confidence is the chance V; half of the reuse value R where that is newer. Of equals the nearer
    layer comes first, then the lower expert.

    Parameters
    ----------
    state : :class:`BufferState`
        The buffer.
    ctx : :class:`int`
        Context whose layers are looked at.
    near : :class:`bool`
        Whether the first of them counts.
    ahead : :class:`int`
        How many, from the one after the latest decision's on, from layer 0 on before the first
        decision; those behind the last one are those of the next token.
    least : :class:`int`
        Least confidence, in 1/256.
    cutoff_layer : :class:`int`
        This layer and those above do not count.
    """
    layers, experts = state.visits.shape[0], state.shape[EXPERTS]
    best, score, distance = np.int64(-1), np.int64(0), np.int64(0)
    least_left = np.int64(1) << 32
    for d in range(1 if near else 2, ahead + 1):
        if d >= least_left:
            break  # not even certainty would do
        layer = (state.current[ctx] + d) % layers
        if layer >= cutoff_layer:
            continue
        for beat in range(state.visited.shape[2]):
            first = beat * state.shape[LANES]
            visited = state.visited[ctx, layer, beat]
            values = state.reuse[ctx, layer] if visited else state.chances[ctx, layer]
            values = values[first : min(first + state.shape[LANES], experts)]
            most, half = np.int64(0), np.int64(visited)
            for e in range(values.shape[0]):
                most = max(most, values[e])
            # More confidence never leaves more steps: where the most does not do, none does.
            if most >> half < least or d + _STEPS[most >> half] >= least_left:
                continue
            for e in range(values.shape[0]):
                value = values[e] >> half
                # Directory last: few are likely enough.
                if value < least or d + _STEPS[value] >= least_left:
                    continue
                key = layer * experts + first + e
                if state.experts[key, STATE] == EMPTY:
                    best, score, distance = key, value, np.int64(d)
                    least_left = d + _STEPS[value]
    return best, score, distance
