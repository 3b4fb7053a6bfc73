"""Golden model of the link: framing, sequence numbers, acknowledge and replay."""

from .deframer import Deframer, Frame
from .framer import frame_bytes
from .link import DeviceLink

__all__ = ["Deframer", "DeviceLink", "Frame", "frame_bytes"]
