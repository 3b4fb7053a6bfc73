"""Golden model of stage 3: the scheduler."""

from .inflight import Entry
from .scheduler import Event, Ready, Scheduler

__all__ = ["Entry", "Event", "Ready", "Scheduler"]
