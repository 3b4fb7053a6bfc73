"""Golden model of the rescans: when the buffer's own values are looked through, and for whom.

A context is *awake* while its values may hold an expert that is worth a prefetch: from values that
come, or a slot that may be taken again, until a rescan finds nothing, or what it finds is given no
slot; all rest once a prefetch has failed. ``docs/scheduler.md`` is the specification of both this
and the RTL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..._jit import kernel

__all__ = ["RescanState", "create_rescans", "next_rescan", "rescanned", "rest", "wake"]


class RescanState(NamedTuple):
    """All that is known of rescans.

    Parameters
    ----------
    awake : array of :class:`bool`, shape ``[C]``
        Contexts whose values are to be looked through.
    turn : array of ``int64``, shape ``[1]``
        The first of them to be so.
    """

    awake: NDArray[np.bool_]
    turn: NDArray[np.int64]


def create_rescans(contexts: int) -> RescanState:
    """Nobody is awake."""
    return RescanState(awake=np.zeros(contexts, np.bool_), turn=np.zeros(1, np.int64))


@kernel
def wake(state: Any, ctx: Any) -> None:
    """Values of a context have come, or, for -1, a slot may be taken again."""
    if ctx >= 0:
        state.awake[ctx] = True
    else:
        state.awake[:] = True


@kernel
def next_rescan(state: Any) -> Any:
    """Context whose values are to be looked through, -1 for none."""
    contexts = state.awake.shape[0]
    for n in range(contexts):
        ctx = (state.turn[0] + n) % contexts
        if state.awake[ctx]:
            return ctx
    return np.int64(-1)


@kernel
def rescanned(state: Any, ctx: Any, found: Any) -> None:
    """They were; it is the next context's turn."""
    state.turn[0] = (ctx + 1) % state.awake.shape[0]
    if not found:
        state.awake[ctx] = False


@kernel
def rest(state: Any, ctx: Any) -> None:
    """What was found in a context's values is given no slot now; for -1, a prefetch has failed."""
    if ctx >= 0:
        state.awake[ctx] = False
    else:
        state.awake[:] = False
