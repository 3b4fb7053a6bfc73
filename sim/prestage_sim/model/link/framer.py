"""Frames to wire bytes: CRC-32, COBS and the delimiter."""

from __future__ import annotations

import zlib

__all__ = ["frame_bytes"]


def frame_bytes(code: int, sequence: int, acknowledge: int, body: bytes = b"") -> bytes:
    """Bytes of one frame as they go over the wire, delimiter included."""
    raw = bytes((code, sequence, acknowledge)) + body
    raw += zlib.crc32(raw).to_bytes(4, "little")
    # A place for the first code in front; then every zero becomes the distance to the next one.
    stuffed = bytearray(b"\0" + raw + b"\0")
    last = len(stuffed) - 1
    at = 0
    while at < last:
        zero = stuffed.find(0, at + 1)
        stuffed[at] = zero - at
        at = zero
    return bytes(stuffed)
