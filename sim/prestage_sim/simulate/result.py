"""What a simulation finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["FIELDS", "Counts", "Result"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was counted over the scored tokens.

    Tiles count when they move, but what a prefetch brought counts as useful or useless once that is
    known: their sum is that of all tiles but for prefetches that were open at either end.

    Parameters
    ----------
    tokens, layers, tiles : :class:`int`
        Tokens scored, layers of the model, tiles of an expert.
    seconds, busy : :class:`float`
        Time that the tokens took, and the time that links moved tiles in.
    demands, hits, misses : :class:`int`
        Experts demanded, found whole in a slot, and not found at all.
    late : :class:`int`
        Experts demanded while a prefetch brought them.
    issued, useful, useless, polluting, cancelled : :class:`int`
        Prefetches that were given a slot; that a demand came for; that were evicted without; demand
        misses on what a prefetch had evicted; prefetches given up on their way.
    throttled, outbid : :class:`int`
        Candidates that the throttle dropped, and those that no slot was given to.
    tiles_moved, demand_tiles, useful_tiles, useless_tiles : :class:`int`
        Tiles moved in all, for demands, and for prefetches that a demand came for or did not come
        for.
    late_tiles : :class:`int`
        Those of the useful ones whose prefetch was still on its way when the demand came.
    candidates, right : :class:`int`
        Experts that were proposed for a layer before it was routed, and those of them that it then
        chose; an expert counts once a layer and token.
    steps : :class:`int`
        Times that tokens went through the layers, together or alone.
    rejected, joined, shared : :class:`int`
        Drafts that went through in vain; tokens that went through together with an earlier one;
        choices of an expert that an earlier token of the step and layer had made.
    prefill_steps, prefill_tokens, prefill_seconds : :class:`int` and :class:`float`
        Of the steps, the tokens and the time, what was of nothing but chunks of prompts.
    tier_tiles : tuple of :class:`int`
        Tiles that left each memory tier, nearest first; what comes from a farther one leaves all
        that are nearer, too.
    """

    tokens: int = 0
    layers: int = 0
    tiles: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    demands: int = 0
    hits: int = 0
    misses: int = 0
    late: int = 0
    issued: int = 0
    useful: int = 0
    useless: int = 0
    polluting: int = 0
    cancelled: int = 0
    throttled: int = 0
    outbid: int = 0
    tiles_moved: int = 0
    demand_tiles: int = 0
    useful_tiles: int = 0
    useless_tiles: int = 0
    late_tiles: int = 0
    candidates: int = 0
    right: int = 0
    steps: int = 0
    rejected: int = 0
    joined: int = 0
    shared: int = 0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    tier_tiles: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """One cell of a comparison: the fields of the JSON object, in its order.

    Parameters
    ----------
    trace, machine, policy : :class:`str`
        What was replayed, on what, and how.
    residency : :class:`float`
        Share of all experts that fit in the slots.
    rho : :class:`float`
        Time to load all k experts of a layer over the layer's time with everything resident.
    tpot : :class:`float`
        Time of a token relative to everything resident; chunks of prompts apart.
    hit_rate : :class:`float`
        Share of the demands that found their expert whole in a slot.
    bytes_per_token : :class:`float`
        What the links moved for a token, in units of k·L experts.
    recall, precision, overfetch : :class:`float` or None
        Share of the chosen experts that were proposed before, share of the proposed ones that were
        chosen, and proposed ones over k. None where nothing is ever proposed.
    late, useless, polluting : :class:`float`
        Demands that found a prefetch on its way, and demand misses on what a prefetch had evicted,
        each over all demands; and prefetched bytes that no demand came for, over all bytes moved.
    joules_per_token : :class:`float` or None
        Energy of a token; None where the machine does not say.
    batch, prefill_chunk, draft : :class:`int`
        Contexts that decode in lock-step, tokens of a prompt that go together (0: one by one), and
        drafts of a step.
    accept : :class:`float` or None
        Probability that a draft is right; None without drafts.
    tokens_per_step : :class:`float`
        Tokens that a step with decode brings forward: one a context, and drafts that were right.
    token_seconds : :class:`float`
        Time of a token over the steps with decode.
    prefill : :class:`float` or None
        Time of the steps with nothing but chunks of prompts, relative to everything resident; None
        where there are none.
    tier_bytes : tuple of :class:`float`
        What left each memory tier for a token, nearest first, in units of k·L experts.
    tier_joules : tuple of :class:`float` or None
        Energy of a token that each memory tier takes; None where the machine does not say.
    """

    trace: str
    machine: str
    policy: str
    residency: float
    rho: float
    tpot: float
    hit_rate: float
    bytes_per_token: float
    recall: float | None
    precision: float | None
    overfetch: float | None
    late: float
    useless: float
    polluting: float
    joules_per_token: float | None
    batch: int = 1
    prefill_chunk: int = 0
    draft: int = 0
    accept: float | None = None
    tokens_per_step: float = 1.0
    token_seconds: float = 0.0
    prefill: float | None = None
    tier_bytes: tuple[float, ...] = ()
    tier_joules: tuple[float, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return asdict(self)


#: Names of the JSON object's fields, in its order.
FIELDS = tuple(field.name for field in fields(Result))
