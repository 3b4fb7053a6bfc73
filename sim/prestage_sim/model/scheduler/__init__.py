"""Golden model of stage 3: the scheduler."""

from .budget import Budget
from .host import HostScheduler
from .inflight import Copy, Entry, InflightTable
from .queue import CandidateQueue
from .scheduler import Event, Ready, Scheduler
from .statistics import PrefetchStatistics
from .throttle import Throttle, kind_of

__all__ = [
    "Budget",
    "CandidateQueue",
    "Copy",
    "Entry",
    "Event",
    "HostScheduler",
    "InflightTable",
    "PrefetchStatistics",
    "Ready",
    "Scheduler",
    "Throttle",
    "kind_of",
]
