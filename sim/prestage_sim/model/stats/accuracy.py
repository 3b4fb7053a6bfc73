"""Golden model of the accuracy counters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prestage_hw.contract.params import DeviceConfig

from .counters import Counters

__all__ = ["Accuracy"]


class Accuracy:
    """Compare what was proposed for a context's next layer with what the layer chose.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    counters : :class:`Counters`
        Counters ``candidates``, ``candidates_correct`` and ``demands_predicted`` go up here.
    """

    def __init__(self, config: DeviceConfig, counters: Counters) -> None:
        self._counters = counters
        self._next: list[int | None] = [None] * config.contexts
        self._proposed: list[set[int]] = [set() for _ in range(config.contexts)]

    def begin(self, ctx: int) -> None:
        """A token of the context starts: no layer is predicted before its first one."""
        self._next[ctx] = None
        self._proposed[ctx] = set()

    def truth(self, ctx: int, layer: int, experts: Sequence[int]) -> None:
        """The layer's choice is known."""
        if self._next[ctx] == layer:
            self._counters["demands_predicted"] += len(experts)
            self._counters["candidates_correct"] += len(self._proposed[ctx].intersection(experts))
        self._next[ctx] = layer + 1
        self._proposed[ctx] = set()

    def proposed(self, ctx: int, candidates: Iterable[tuple[int, int]]) -> None:
        """The predictor proposes ``(layer, expert)`` pairs."""
        for layer, expert in candidates:
            self._counters["candidates"] += 1
            if layer == self._next[ctx]:
                self._proposed[ctx].add(expert)
