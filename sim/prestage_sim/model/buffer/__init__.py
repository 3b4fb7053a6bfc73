"""Golden model of stage 5: the expert buffer."""

from .buffer import BufferResult, ExpertBuffer

__all__ = ["BufferResult", "ExpertBuffer"]
