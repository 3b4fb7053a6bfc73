"""Fetch scheduler: demands before prefetches, one transfer for each expert in flight.

``scheduler`` decides, ``inflight`` holds what is being fetched and offers its tiles, ``queue``
keeps candidates until there is time for them, ``chunks`` gathers those of a chunk of tokens,
``throttle`` says whose candidates pay.
"""

from .chunks import ChunkUnion
from .inflight import InflightTable
from .queue import CandidateQueue
from .scheduler import STROBES, Scheduler
from .throttle import Throttle, ThrottleStateLayout, WeightsLayout

__all__ = [
    "STROBES",
    "CandidateQueue",
    "ChunkUnion",
    "InflightTable",
    "Scheduler",
    "Throttle",
    "ThrottleStateLayout",
    "WeightsLayout",
]
