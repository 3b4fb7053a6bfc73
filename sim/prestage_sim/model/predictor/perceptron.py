"""Golden model of the ``perceptron`` predictor: online linear models over routing histories.

``docs/predictor-perceptron.md`` is the specification of both this and the RTL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config

from ..._jit import compiled
from .base import Candidate
from .linear import LFSR_SEED, NOW, OLD, Head, clear_head, create_head, head_learn, head_predict
from .tokens import UNKNOWN, clear_tokens, create_tokens, token_fetch, token_store

__all__ = ["PerceptronPredictor", "TraceRunner"]

#: Reuse value of an expert that was not used, relative to that at its next visit.
_DISCOUNT = 13


@compiled
def _reuse_targets(values, used, targets):  # type: ignore[no-untyped-def]
    """Temporal difference: 1 for what was used, else the discounted value of the next visit."""
    for e in range(values.shape[0]):
        targets[e] = 1024 if used[e] else (_DISCOUNT * values[e]) >> 4


@compiled
def _run_head(head, routed, memos, values, out):  # type: ignore[no-untyped-def]
    """Predict and learn every layer of every token, in the device's order for one context.

    ``routed`` holds two tokens more than ``memos``: those before the first.
    """
    tokens, layers = memos.shape[0], memos.shape[2]
    experts = values.shape[0]
    horizon = head.shape[0]
    targets = np.zeros(experts, np.int64)
    used = np.zeros(experts, np.bool_)
    for t in range(tokens):
        this, prev, before = routed[t + 2], routed[t + 1], routed[t]
        for m in range(layers):
            if m < horizon:
                continue
            head_predict(head, 0, m, OLD, this, prev, before, memos[t], values)
            out[t, m] = values
            used[:] = False
            targets[:] = 0
            for e in this[m]:
                used[e] = True
                targets[e] = 256
            head_learn(head, 0, m, this, prev, before, memos[t], values, targets, used)


@compiled
def _run_tokens(tables, tokens, routed, previous, memo, memos):  # type: ignore[no-untyped-def]
    """Token tables over consecutive tokens; ``previous`` holds the two ids before the first."""
    for t in range(tokens.shape[0]):
        if routed[t + 1, 0, 0] >= 0:
            token_store(tables, previous[1], previous[0], routed[t + 1])
        token_fetch(tables, tokens[t], previous[1], memo)
        previous[0], previous[1] = previous[1], tokens[t]
        memos[t] = memo


class TraceRunner:
    """The P heads over a whole trace, one context: what ``prestage evaluate`` needs.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        perceptron = config.perceptron
        assert perceptron is not None
        self._config = config
        self._heads = {
            head.horizon: create_head(config, head, number=number)
            for number, head in enumerate(perceptron.heads)
            if not head.is_reuse
        }
        self._tables = create_tokens(config)
        choice = (config.model.layers, config.model.top_k)
        self._tail = np.full((2, *choice), -1, np.int16)
        self._memo = np.full((6, *choice), -1, np.int16)
        self._previous = np.full(2, UNKNOWN, np.int64)

    @property
    def horizons(self) -> tuple[int, ...]:
        """Layers ahead that have a head of their own; 0 is the head of token start."""
        return tuple(self._heads)

    def run(self, experts: ArrayLike, tokens: ArrayLike) -> dict[int, NDArray[np.int16]]:
        """Predict and learn the next tokens of the trace.

        Parameters
        ----------
        experts : array of :class:`int`, shape ``[tokens, layers, k]``
            Chosen experts.
        tokens : array of :class:`int`, shape ``[tokens]``
            Ids of the input tokens; negative where unknown.

        Returns
        -------
        :class:`dict`
            For each horizon of :attr:`horizons`: confidences in 1/256, shape ``[tokens, layers,
            experts]``. Layers below the horizon are those of the head of token start.
        """
        chosen = np.asarray(experts, np.int16)
        ids = np.asarray(tokens, np.int64)
        ids = np.where(ids < 0, UNKNOWN, ids)
        routed = np.concatenate([self._tail, chosen])
        memos = np.empty((len(chosen), *self._memo.shape), np.int16)
        _run_tokens(self._tables, ids, routed, self._previous, self._memo, memos)
        self._tail = routed[-2:].copy()
        model = self._config.model
        values = np.zeros(model.experts, np.int64)
        out: dict[int, NDArray[np.int16]] = {}
        for horizon, head in sorted(self._heads.items()):
            result = out[0].copy() if horizon else np.zeros(
                (len(chosen), model.layers, model.experts), np.int16
            )
            _run_head(head, routed, memos, values, result)
            out[horizon] = result
        return out
