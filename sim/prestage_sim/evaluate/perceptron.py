"""The ``perceptron`` predictor as a ranker: the golden model's own arithmetic over a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import REGISTERS, DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import CROSSES, FEATURES, PerceptronConfig, perceptron_form

from .._jit import compiled
from ..model.predictor.perceptron import TraceRunner
from .rankers import Ranker, Ranking

__all__ = ["PerceptronRanker"]


def _names(text: str) -> tuple[str, ...]:
    """Names joined by plus signs."""
    names = tuple(text.split("+"))
    for name in names:
        if name not in FEATURES and name not in CROSSES:
            raise ValueError(f"no such feature: {name}")
    return names


def _without(config: PerceptronConfig, names: Iterable[str]) -> PerceptronConfig:
    """The same predictor with some features switched off in every head."""
    gone = set(names)
    return config.replace(
        heads=tuple(
            head.replace(
                rows=tuple(name for name in head.rows if name not in gone),
                crosses=tuple(name for name in head.crosses if name not in gone),
                diagonals=tuple(name for name in head.diagonals if name not in gone),
            )
            for head in config.heads
        )
    )


@compiled
def _propose(
    scores: NDArray[np.int32],
    least: NDArray[np.int32],
    most: NDArray[np.int64],
    proposed: NDArray[np.bool_],
) -> None:
    """Mark the best experts of each layer that reach the threshold of their horizon."""
    tokens, horizons, layers, experts = scores.shape
    for t in range(tokens):
        for h in range(horizons):
            for m in range(layers):
                row = scores[t, h, m]
                for e in range(experts):
                    if row[e] < least[h]:
                        continue
                    better = 0
                    for other in range(experts):
                        if row[other] > row[e] or (row[other] == row[e] and other < e):
                            better += 1
                    proposed[t, h, m, e] = better < most[h]


class PerceptronRanker(Ranker):
    """Rank by confidence; propose what the device would with its registers at reset.

    Parameters
    ----------
    form : :class:`str`
        Named form of the predictor.
    without : tuple of :class:`str`
        Features and conjunctions that are switched off in every head.
    list_entries, token_rows, pair_rows, cross_rows : :class:`int` or None
        Replace the form's parameters of these names.
    """

    options: ClassVar[Mapping[str, Callable[[str], Any]]] = {
        "form": str,
        "without": _names,
        "list_entries": int,
        "token_rows": int,
        "pair_rows": int,
        "cross_rows": int,
    }

    def __init__(
        self,
        *,
        model: ModelConfig,
        horizons: Iterable[int] = (1,),
        form: str = "full",
        without: Iterable[str] = (),
        **parameters: int,
    ) -> None:
        super().__init__(model=model, horizons=horizons)
        config = _without(perceptron_form(form).replace(**parameters), without)
        # Models with few layers have no room for the farther heads.
        config = config.replace(
            heads=tuple(head for head in config.heads if head.horizon < model.layers)
        )
        self._runner = TraceRunner(
            DeviceConfig(
                model=model,
                slots=model.top_k,
                expert_bytes=512,
                predictor="perceptron",
                perceptron=config,
            )
        )
        reset = {register.name: register.reset for register in REGISTERS}
        self._thresholds = {
            horizon: reset["predict_threshold" if horizon == 1 else "predict_far_threshold"]
            for horizon in self.horizons
        }

    def rank(
        self, experts: NDArray[np.integer], tokens: NDArray[np.int32], requests: NDArray[np.int32]
    ) -> Ranking:
        values = self._runner.run(experts, tokens)
        stacked = np.stack([values.get(h, values[0]) for h in self.horizons], axis=1)
        scores: NDArray[np.int32] = np.ascontiguousarray(stacked, np.int32)
        least = np.array([self._thresholds[h] for h in self.horizons], np.int32)
        most = np.array([2 if h == 1 else 1 for h in self.horizons]) * self.model.top_k
        proposed = np.zeros(scores.shape, np.bool_)
        _propose(scores, least, most, proposed)
        probabilities = scores.astype(np.float32) / np.float32(256)
        return Ranking(scores=scores, proposed=proposed, probabilities=probabilities)
