"""What every ranker offers, and the rankers by name.

This module compiles nothing, so that a command line may list the names at no cost.
"""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import ModelConfig

__all__ = [
    "FARTHEST_HORIZON",
    "RANKERS",
    "Ranker",
    "Ranking",
    "create_ranker",
    "ranker_class",
    "split_name",
]

#: Greatest number of layers ahead that can be asked for.
FARTHEST_HORIZON = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """Order of the experts of every layer, for n tokens and H horizons.

    Parameters
    ----------
    scores : array of int32, ``[n, H, L, E]``
        Higher is better; equal scores rank by expert number, the lower first.
    proposed : array of bool, ``[n, H, L, E]``
        What the predictor would send to the engine by its own stopping rule.
    probabilities : array of float32, ``[n, H, L, E]``, or None
        Probability that the expert is chosen, 0 to 1. None where scores say nothing about it.
    """

    scores: NDArray[np.int32]
    proposed: NDArray[np.bool_]
    probabilities: NDArray[np.float32] | None = None


class Ranker(ABC):
    """A predictor as the evaluation sees it, for one context, learning as it goes.

    Parameters
    ----------
    model : :class:`ModelConfig`
        Shape of the model.
    horizons : iterable of :class:`int`
        Layers ahead, each 1 to ``farthest`` and below the model's layers, ascending. The H axis of
        a :class:`Ranking` follows this order.

    Members
    -------
    farthest : :class:`int`
        Greatest horizon that it's defined for.
    knows_truth : :class:`bool`
        True for a ranker that looks at what it ought to predict.
    options : mapping of :class:`str` to callable
        Further keyword parameters, each with what converts its text.

    Raises
    ------
    TypeError
        If ``model`` is not a :class:`ModelConfig` or a horizon not an integer.
    ValueError
        If there is no horizon, or one is out of its range or not ascending.
    """

    farthest: ClassVar[int] = FARTHEST_HORIZON
    knows_truth: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, *, model: ModelConfig, horizons: Iterable[int] = (1,)) -> None:
        if not isinstance(model, ModelConfig):
            raise TypeError(f"Model must be a ModelConfig, not {model!r}")
        self.model = model
        self.horizons = tuple(horizons)
        most = min(self.farthest, model.layers - 1)
        for horizon in self.horizons:
            if isinstance(horizon, bool) or not isinstance(horizon, int):
                raise TypeError(f"Horizon must be an integer, not {horizon!r}")
            if not 1 <= horizon <= most:
                raise ValueError(f"Horizon must be between 1 and {most}, not {horizon}")
        if not self.horizons or list(self.horizons) != sorted(set(self.horizons)):
            raise ValueError(f"Horizons must be ascending, not {list(self.horizons)}")

    @abstractmethod
    def rank(
        self, experts: NDArray[np.integer], tokens: NDArray[np.int32], requests: NDArray[np.int32]
    ) -> Ranking:
        """Rank the experts of the next n tokens and learn from them.

        The scores for token t, layer m and horizon h depend on nothing but all earlier tokens, the
        id of token t, and its choices in layers 0 to m - h (none where m < h). What is learned
        stays for the next call, so that a trace can be given in chunks of any length.

        Parameters
        ----------
        experts : array of :class:`int`, ``[n, L, k]``
            The router's choice.
        tokens : array of int32, ``[n]``
            Id of each input token, -1 where unknown.
        requests : array of int32, ``[n]``
            Request of each token.
        """


#: Class of each ranker by name, or ``"module:class"`` to import it from when it's wanted.
RANKERS: dict[str, str | type[Ranker]] = {
    "popularity": "prestage_sim.evaluate.baselines:PopularityRanker",
    "previous-token": "prestage_sim.evaluate.baselines:PreviousTokenRanker",
    "st_moe": "prestage_sim.evaluate.baselines:StMoeRanker",
    "st_moe-counts": "prestage_sim.evaluate.baselines:StMoeCountsRanker",
    "perceptron": "prestage_sim.evaluate.perceptron:PerceptronRanker",
    "oracle": "prestage_sim.evaluate.baselines:OracleRanker",
}


def ranker_class(name: str) -> type[Ranker]:
    """Class of a ranker.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    found = RANKERS.get(name)
    if found is None:
        near = difflib.get_close_matches(name.lower(), RANKERS, n=1, cutoff=0.5)
        hint = f". Did you mean {near[0]}?" if near else ""
        raise ValueError(f"Predictor must be one of {', '.join(RANKERS)}, not {name!r}{hint}")
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        loaded: type[Ranker] = getattr(importlib.import_module(module), attribute)
        return loaded
    return found


def split_name(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``NAME[:OPTION=VALUE]...``.

    Raises
    ------
    ValueError
        If the name or an option is unknown, or a value can't be read.
    """
    name, *parts = text.split(":")
    known = ranker_class(name).options
    options: dict[str, Any] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals or option not in known:
            choice = f"one of {', '.join(known)}" if known else "left out"
            raise ValueError(f"Option of predictor {name} must be {choice}, not {part!r}")
        try:
            options[option] = known[option](value)
        except ValueError:
            raise ValueError(f"Option {option} of predictor {name} can't be {value!r}") from None
    return name, options


def create_ranker(
    name: str, *, model: ModelConfig, horizons: Iterable[int] = (1,), **options: Any
) -> Ranker:
    """A ranker that has learned nothing.

    Parameters
    ----------
    name : :class:`str`
        A name of :data:`RANKERS`, with options behind it or not: ``"st_moe:successors=4"``.
    model : :class:`ModelConfig`
        Shape of the model.
    horizons : iterable of :class:`int`
        Layers ahead, ascending.
    options
        Further parameters of the ranker; they override those in the name.

    Raises
    ------
    TypeError
        If a parameter is of the wrong kind.
    ValueError
        If the name or an option is unknown or a parameter out of its range.
    """
    base, given = split_name(name)
    return ranker_class(base)(model=model, horizons=horizons, **{**given, **options})
