"""Host link: framing, sequence numbers, acknowledge and replay, and the dispatch of messages."""

from .deframer import Deframer
from .framer import Framer
from .layouts import MessageLayout, body_lengths
from .link import Link

__all__ = ["Deframer", "Framer", "Link", "MessageLayout", "body_lengths"]
