"""Golden model of a rule that the RTL does not have yet: candidates out of the buffer's own values.

What waits in the queue was proposed with the values of its time, once, and is dropped where its
expert lay in a slot then. The buffer holds the latest values of all experts: going through those of
the next layers whenever there is room for a prefetch finds what was evicted since, what turned out
to be likelier, and what the next token will want of the layers that this one has passed.
``docs/simulator.md`` says what that is worth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prestage_hw.contract.benefit import CONFIDENCE_STEPS

from ..._jit import kernel
from ..buffer.state import EMPTY, EXPERTS, LANES, STATE

__all__ = ["rescan"]

_STEPS = np.array(CONFIDENCE_STEPS, np.int64)


@kernel
def rescan(state: Any, ctx: Any, ahead: Any, least: Any) -> Any:
    """Key, confidence and layers ahead of the missing expert of greatest benefit; key -1 for none.

    Confidence is the chance V; half of the reuse value R where that is newer. Of equals the nearer
    layer comes first, then the lower expert.

    Parameters
    ----------
    state : :class:`BufferState`
        The buffer.
    ctx : :class:`int`
        Context whose layers are looked at.
    ahead : :class:`int`
        How many, from the one after the latest decision's on; those behind the last one are those
        of the next token.
    least : :class:`int`
        Least confidence, in 1/256.
    """
    layers, experts = state.visits.shape[0], state.shape[EXPERTS]
    best, score, distance = np.int64(-1), np.int64(0), np.int64(0)
    least_left = np.int64(1) << 32
    for d in range(1, ahead + 1):
        if d >= least_left:
            break  # not even certainty would do
        layer = (state.current[ctx] + d) % layers
        for beat in range(state.visited.shape[2]):
            visited = state.visited[ctx, layer, beat]
            first = beat * state.shape[LANES]
            for expert in range(first, min(first + state.shape[LANES], experts)):
                if visited:
                    value = state.reuse[ctx, layer, expert] >> 1
                else:
                    value = state.chances[ctx, layer, expert]
                # Directory last: few are likely enough.
                if value < least or d + _STEPS[value] >= least_left:
                    continue
                key = layer * experts + expert
                if state.experts[key, STATE] == EMPTY:
                    best, score, distance = key, value, np.int64(d)
                    least_left = d + _STEPS[value]
    return best, score, distance
