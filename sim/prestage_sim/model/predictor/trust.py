"""Golden model of what hints from outside are worth: learned trust on top of the heads' values.

``docs/predictor-perceptron.md``, "Hints", is the specification of both this and the RTL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config

from .linear import LFSR_SEED, lfsr_next

__all__ = ["Trust"]

_SEED = LFSR_SEED + 7

#: Layers of a context that may hold hints at a time.
_PLACES = 4

_DISTANCES, _BINS = 4, 8
_MOST_TRUST = 255


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


class _Hint:
    """One hint: what it is about, and the value of its expert without and with it."""

    def __init__(self, expert: int, distance: int, score_bin: int) -> None:
        self.expert = expert
        self.distance = distance
        self.bin = score_bin
        self.plain = 0
        self.value = 0


class Trust:
    """The heads' latest values of every layer, the hints for layers to come, and their trust.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``. Without ``config.perceptron.hints`` every hint
        is ignored.

    Attributes
    ----------
    trust : list of lists of :class:`int`
        What a hint adds to its expert's value, by distance (less one) and bin, -255 to 255.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If the device has no ``perceptron`` predictor.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        if config.perceptron is None:
            raise ValueError("Device must have a perceptron predictor to weigh hints")
        self._config = config
        self._enabled = config.perceptron.hints
        self._most = 2 * config.model.top_k
        self.clear()

    def clear(self) -> None:
        """Forget values, hints and trust; restart the random numbers."""
        model = self._config.model
        contexts = range(self._config.contexts)
        self._values = [[[0] * model.experts for _ in range(model.layers)] for _ in contexts]
        self._hints: list[dict[int, list[_Hint]]] = [{} for _ in contexts]
        self._last = [-1 for _ in contexts]
        self.trust = [[0] * _BINS for _ in range(_DISTANCES)]
        self._lfsr = _SEED

    def begin(self, ctx: int) -> None:
        """Start a token: the context's hints are forgotten, no layer is routed."""
        self._hints[ctx] = {}
        self._last[ctx] = -1

    def written(self, ctx: int, layer: int, values: Sequence[int]) -> list[int]:
        """Take a head's values for a layer; return them with the layer's hints on top."""
        self._values[ctx][layer] = list(values)
        for hint in self._hints[ctx].get(layer, ()):
            self._apply(ctx, layer, hint)
        return [self.value(ctx, layer, expert) for expert in range(len(values))]

    def hint(self, ctx: int, layer: int, expert: int, score: int) -> int | None:
        """Take a hint; return its expert's new value, or None if it is ignored.

        Ignored are hints for a layer that was routed already, repeated ones, those beyond the most
        that a layer may have, and those for a layer whose place another layer's hints take.
        """
        distance = layer - self._last[ctx]
        if not self._enabled or distance < 1:
            return None
        places = self._hints[ctx]
        if any(other != layer and other % _PLACES == layer % _PLACES for other in places):
            return None
        hints = places.setdefault(layer, [])
        if len(hints) == self._most or any(hint.expert == expert for hint in hints):
            return None
        hint = _Hint(expert, min(distance, _DISTANCES) - 1, score >> 5)
        hints.append(hint)
        self._apply(ctx, layer, hint)
        return hint.value

    def routed(self, ctx: int, layer: int, experts: Iterable[int]) -> None:
        """Learn from a layer's hints and drop them; the layer is now the last one routed."""
        chosen = set(experts)
        self._last[ctx] = layer
        for hint in self._hints[ctx].pop(layer, ()):
            self._lfsr = int(lfsr_next(np.uint32(self._lfsr)))
            trust = self.trust[hint.distance]
            error = 256 * (hint.expert in chosen) - self._weigh(hint)
            change = (error + (self._lfsr & 255)) >> 8
            trust[hint.bin] = _clamp(trust[hint.bin] + change, -_MOST_TRUST, _MOST_TRUST)

    def value(self, ctx: int, layer: int, expert: int) -> int:
        """Latest value of an expert, with its hint on top while it has one; 0 before the first."""
        for hint in self._hints[ctx].get(layer, ()):
            if hint.expert == expert:
                return hint.value
        return self._values[ctx][layer][expert]

    def _apply(self, ctx: int, layer: int, hint: _Hint) -> None:
        hint.plain = self._values[ctx][layer][hint.expert]
        hint.value = self._weigh(hint)

    def _weigh(self, hint: _Hint) -> int:
        return _clamp(hint.plain + self.trust[hint.distance][hint.bin], 0, 255)
