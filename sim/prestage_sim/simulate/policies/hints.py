"""Hints of policies that look into the model's hidden states, which a routing trace does not have.

They are emulated: the policy's own predictor is replaced by a source that is right as often as its
paper says. Each true expert is hinted with that probability, by itself; in place of each that is
not comes another expert, drawn evenly among those that are wrong. Real errors come together and hit
popular experts, so that this is optimistic.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prestage_sim.traces import Trace

from ..plan import Candidates
from ..values import trace_digest

__all__ = ["collect", "hinted", "hints"]

#: Hints of the last traces and policies: those of all residencies and links are the same.
_KEPT = 3
_memory: OrderedDict[tuple[object, ...], Candidates] = OrderedDict()

#: Tokens whose wrong experts are drawn at a time, so that memory stays small.
_CHUNK = 1024


def hinted(trace: Trace, *, recall: float, seed: Sequence[int]) -> NDArray[np.int16]:
    """What a source hints that is right with a probability: k experts for each token and layer.

    Parameters
    ----------
    trace : :class:`Trace`
        The truth.
    recall : :class:`float`
        Probability that a true expert is hinted, 0 to 1.
    seed : sequence of :class:`int`
        For the errors.

    Raises
    ------
    ValueError
        If the recall is not a probability.
    """
    if not 0 <= recall <= 1:
        raise ValueError(f"Recall must be between 0 and 1, not {recall}")
    found = trace.experts.copy()
    k, experts = trace.top_k, trace.experts_per_layer
    rng = np.random.default_rng(list(seed))
    for at in range(0, trace.tokens, _CHUNK):
        part = found[at : at + _CHUNK]
        right = rng.random(part.shape) < recall
        order = rng.random((*part.shape[:2], experts), dtype=np.float32)
        np.put_along_axis(order, part.astype(np.int64), 2.0, axis=-1)
        wrong = np.argsort(order, axis=-1)[..., :k].astype(np.int16)
        if experts < 2 * k:
            # There are too few wrong experts to make all of them wrong.
            right[..., experts - k :] = True
        part[~right] = wrong[~right]
    return found


def collect(
    trace: Trace,
    parts: Sequence[tuple[int, NDArray[np.int16], NDArray[np.int16] | int]],
    *,
    at_start: int = 0,
    only: NDArray[np.bool_] | None = None,
) -> Candidates:
    """Candidates from what is proposed for every token and layer some layers ahead.

    Parameters
    ----------
    trace : :class:`Trace`
        What they are for.
    parts : sequence
        Of each horizon: how many routing decisions ahead, which experts ``[T, L, n]`` by the layer
        that they are for, and their score, one for all or an array like the experts. Entries of
        one step come in this order.
    at_start : :class:`int`
        How many layers are proposed at the token's start besides, from the first part's experts.
    only : array of :class:`bool`, ``[T]``, or None
        Tokens for which anything is proposed; None for all.
    """
    tokens, layers = trace.tokens, trace.layers
    steps, aheads, experts, scores = [], [], [], []
    token = np.arange(tokens)[:, None]

    def add(layer: NDArray[np.int64], ahead: NDArray[np.int64] | int, part: int) -> None:
        """Propose what ``parts`` has for layers, ``ahead`` decisions before each is routed."""
        _, chosen, score = parts[part]
        width = chosen.shape[-1]
        shape = (tokens, len(layer), width)
        step = token * (layers + 1) + 1 + layer - ahead
        steps.append(np.broadcast_to(step[..., None], shape).ravel())
        aheads.append(np.broadcast_to(np.reshape(ahead, (1, -1, 1)), shape).ravel())
        experts.append(chosen[:, layer].ravel())
        of_layers = score if isinstance(score, int) else score[:, layer]
        scores.append(np.broadcast_to(of_layers, shape).ravel())

    for part, (ahead, _, _) in enumerate(parts):
        add(np.arange(ahead, layers), ahead, part)
    if at_start:
        first = np.arange(min(at_start, layers))
        # The step of a token's start is just before that of its layer 0.
        add(first, first + 1, 0)
    if only is not None:
        keep = [only[step // (layers + 1)] for step in steps]
        steps = [column[k] for column, k in zip(steps, keep, strict=True)]
        aheads = [column[k] for column, k in zip(aheads, keep, strict=True)]
        experts = [column[k] for column, k in zip(experts, keep, strict=True)]
        scores = [column[k] for column, k in zip(scores, keep, strict=True)]
    step = np.concatenate(steps) if steps else np.zeros(0, np.int64)
    order = np.argsort(step, kind="stable")
    offset = np.searchsorted(step[order], np.arange(tokens * (layers + 1) + 1))

    def column(values: Sequence[NDArray[np.int16] | NDArray[np.int64]]) -> NDArray[np.int16]:
        return np.concatenate(values).astype(np.int16)[order] if values else np.zeros(0, np.int16)

    return Candidates(
        offset=offset.astype(np.int64),
        ahead=column(aheads),
        expert=column(experts),
        score=column(scores),
    )


def hints(
    trace: Trace,
    recalls: Mapping[int, float],
    *,
    seed: int,
    at_start: int = 0,
    only: NDArray[np.bool_] | None = None,
) -> Candidates:
    """Emulated hints, k experts for each layer that is so many routing decisions ahead.

    They take a slot whatever it is worth, as in the systems that they stand for.

    Parameters
    ----------
    trace : :class:`Trace`
        The truth.
    recalls : mapping
        Recall by how many routing decisions ahead.
    seed : :class:`int`
        For the errors.
    at_start, only
        As for :func:`collect`.
    """
    chosen = tuple(sorted(recalls.items()))
    tokens = None if only is None else only.tobytes()
    key = (trace_digest(trace), chosen, seed, at_start, tokens)
    if key not in _memory:
        parts: list[tuple[int, NDArray[np.int16], NDArray[np.int16] | int]] = [
            (ahead, hinted(trace, recall=recall, seed=(seed, ahead)), 0) for ahead, recall in chosen
        ]
        while len(_memory) >= _KEPT:
            _memory.popitem(last=False)
        _memory[key] = collect(trace, parts, at_start=at_start, only=only)
    _memory.move_to_end(key)
    return _memory[key]
