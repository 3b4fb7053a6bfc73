"""Golden model of the accuracy counters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prestage_hw.contract.params import DeviceConfig

from .counters import Counters

__all__ = ["Accuracy"]


class Accuracy:
    """Compare what was proposed for a context's next layer with what the layer chose.

    The next layer is the one after the layer routed last, layer 0 at the start of a token. Only the
    predictor's own candidates for it count, each expert once. A layer that is routed again right
    away is compared only the first time, and what was proposed in between is kept.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    counters : :class:`Counters`
        Counters ``candidates``, ``candidates_correct`` and ``demands_predicted`` go up here.
    """

    def __init__(self, config: DeviceConfig, counters: Counters) -> None:
        self._counters = counters
        self._next = [0] * config.contexts
        self._proposed: list[set[int]] = [set() for _ in range(config.contexts)]

    def begin(self, ctx: int) -> None:
        """A token of the context starts."""
        self._next[ctx] = 0
        self._proposed[ctx] = set()

    def truth(self, ctx: int, layer: int, experts: Sequence[int]) -> None:
        """The layer's choice is known."""
        # A token's first layer has none before it: it counts only if something was proposed.
        if self._next[ctx] == layer and (layer or self._proposed[ctx]):
            self._counters["demands_predicted"] += len(experts)
            self._counters["candidates_correct"] += len(self._proposed[ctx].intersection(experts))
        if self._next[ctx] != layer + 1:
            self._proposed[ctx] = set()
        self._next[ctx] = layer + 1

    def proposed(self, ctx: int, candidates: Iterable[tuple[int, int]]) -> None:
        """The predictor proposes ``(layer, expert)`` pairs."""
        for layer, expert in candidates:
            if layer == self._next[ctx] and expert not in self._proposed[ctx]:
                self._counters["candidates"] += 1
                self._proposed[ctx].add(expert)
