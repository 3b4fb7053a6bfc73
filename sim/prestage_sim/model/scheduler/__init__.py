"""Golden model of stage 3: the scheduler."""

from .inflight import Copy, Entry
from .queue import CandidateQueue
from .scheduler import Event, Ready, Scheduler
from .throttle import Throttle, kind_of

__all__ = ["CandidateQueue", "Copy", "Entry", "Event", "Ready", "Scheduler", "Throttle", "kind_of"]
