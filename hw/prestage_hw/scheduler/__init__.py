"""Fetch scheduler: demands before prefetches, one transfer for each expert in flight.

``scheduler`` decides, ``inflight`` holds what is being fetched and offers its tiles, ``queue``
keeps candidates until there is time for them, ``chunks`` gathers those of a chunk of tokens,
``rescan`` asks the buffer for others, ``throttle`` says whose candidates pay, ``budget`` which
would come late, and ``statistics`` counts what became of them.
"""

from .budget import Budget
from .chunks import ChunkUnion
from .inflight import InflightTable
from .queue import CandidateQueue
from .rescan import Rescans
from .scheduler import STROBES, Scheduler
from .statistics import PrefetchStatistics
from .throttle import Throttle, ThrottleStateLayout, WeightsLayout

__all__ = [
    "STROBES",
    "Budget",
    "CandidateQueue",
    "ChunkUnion",
    "InflightTable",
    "PrefetchStatistics",
    "Rescans",
    "Scheduler",
    "Throttle",
    "ThrottleStateLayout",
    "WeightsLayout",
]
