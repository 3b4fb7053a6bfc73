"""Stage 6: counters, accuracy and the register bank."""

from .accuracy import Accuracy
from .channels import ChannelCounters
from .counters import Counters
from .profiles import Profiles
from .registers import RegisterBank

__all__ = ["Accuracy", "ChannelCounters", "Counters", "Profiles", "RegisterBank"]
