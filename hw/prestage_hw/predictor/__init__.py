"""Stage 2: predictors, selected by name.

To add one, copy ``none.py`` and its golden twin in ``prestage_sim/model/predictor``, and register
both classes under the same name (also in :attr:`DeviceConfig.PREDICTORS`); the bench
``tb/test_predictor.py`` runs every registered name.
"""

from prestage_hw.contract.params import require_config

from .base import Predictor, PredictorSignature
from .none import NonePredictor
from .perceptron import PerceptronPredictor
from .st_moe import StMoePredictor

__all__ = [
    "PREDICTORS",
    "NonePredictor",
    "PerceptronPredictor",
    "Predictor",
    "PredictorSignature",
    "StMoePredictor",
    "create_predictor",
]

#: Class of each predictor, by the name in :attr:`DeviceConfig.predictor`.
PREDICTORS = {
    "none": NonePredictor,
    "st_moe": StMoePredictor,
    "perceptron": PerceptronPredictor,
}


def create_predictor(config):
    """The predictor that the configuration names.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that the predictor is part of.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """
    require_config(config)
    return PREDICTORS[config.predictor](config)
