"""Golden models of the predictors, selected by name.

To add one, copy ``none.py``, and register its class in :data:`PREDICTORS` under the name that its
RTL twin has.
"""

from __future__ import annotations

from collections.abc import Callable

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config

from .base import Candidate, Predictor, Settings, ValueBeat
from .none import NonePredictor
from .perceptron import PerceptronPredictor
from .st_moe import StMoePredictor

__all__ = [
    "PREDICTORS",
    "Candidate",
    "NonePredictor",
    "PerceptronPredictor",
    "Predictor",
    "ValueBeat",
    "Settings",
    "StMoePredictor",
    "create_predictor",
]

#: Golden model of each predictor, by the name in :attr:`DeviceConfig.predictor`.
PREDICTORS: dict[str, Callable[[DeviceConfig], Predictor]] = {
    "none": NonePredictor,
    "st_moe": StMoePredictor,
    "perceptron": PerceptronPredictor,
}


def create_predictor(config: DeviceConfig) -> Predictor:
    """The golden model of the predictor that the configuration names.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """
    require_config(config)
    return PREDICTORS[config.predictor](config)
