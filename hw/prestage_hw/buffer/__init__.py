"""Stage 5: the expert buffer."""

from .buffer import ExpertBuffer
from .directory import Directory, EntryLayout, EntryState, PinLayout, SlotLayout
from .recency import RecencyList
from .storage import Storage
from .victims import Victims

__all__ = [
    "Directory",
    "EntryLayout",
    "EntryState",
    "ExpertBuffer",
    "PinLayout",
    "RecencyList",
    "SlotLayout",
    "Storage",
    "Victims",
]
