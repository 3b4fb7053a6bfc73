"""Stage 6: counters, accuracy and the register bank."""

from .accuracy import Accuracy
from .counters import Counters
from .registers import RegisterBank

__all__ = ["Accuracy", "Counters", "RegisterBank"]
