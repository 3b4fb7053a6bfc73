"""Host link: framing, sequence numbers, acknowledge and replay, and the dispatch of messages."""

from .deframer import Deframer
from .framer import Framer
from .link import Link

__all__ = ["Deframer", "Framer", "Link"]
