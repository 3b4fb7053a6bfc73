"""Stage 6: counters, accuracy and the register bank."""

from .accuracy import Accuracy
from .counters import Counters
from .profiles import Profiles
from .registers import RegisterBank

__all__ = ["Accuracy", "Counters", "Profiles", "RegisterBank"]
