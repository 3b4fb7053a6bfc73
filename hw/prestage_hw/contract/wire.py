"""Frames on the wire: header, body and CRC-32, stuffed with COBS.

A frame is ``type, sequence, acknowledge, body, crc`` where the first three are one byte each and
``crc`` is the CRC-32 of IEEE 802.3 over everything before it, least significant byte first. COBS
(Cheshire and Baker, 1999) removes the zero bytes and a zero byte ends the frame, so a receiver
finds the next frame after any damage.
"""

from __future__ import annotations

import struct
import zlib

__all__ = [
    "FRAME_OVERHEAD",
    "MAX_FRAME_BYTES",
    "WireError",
    "cobs_decode",
    "cobs_encode",
    "decode_frame",
    "encode_frame",
]

#: Bytes of a frame that are not body: type, sequence, acknowledge and CRC-32.
FRAME_OVERHEAD = 7

#: Longest frame before stuffing, in bytes. Below 254, COBS adds one byte and never splits a run.
MAX_FRAME_BYTES = 253

_CRC = struct.Struct("<I")


class WireError(ValueError):
    """A frame that is damaged: its stuffing, its length or its CRC is wrong."""


def cobs_encode(raw: bytes) -> bytes:
    """Stuff ``raw`` so that it holds no zero byte; the delimiter is not appended.

    Raises
    ------
    ValueError
        If ``raw`` is longer than :data:`MAX_FRAME_BYTES`.
    """
    if len(raw) > MAX_FRAME_BYTES:
        raise ValueError(f"Frame must be at most {MAX_FRAME_BYTES} bytes, not {len(raw)}")
    return b"".join(bytes((len(run) + 1,)) + run for run in raw.split(b"\0"))


def cobs_decode(stuffed: bytes) -> bytes:
    """Undo :func:`cobs_encode`.

    Raises
    ------
    WireError
        If a code byte points beyond the end, or is zero or 255 (no frame is that long).
    """
    runs = []
    at = 0
    while at < len(stuffed):
        code = stuffed[at]
        end = at + code
        if code == 0 or code == 255 or end > len(stuffed):
            raise WireError(
                f"COBS code {code} at byte {at} does not fit a {len(stuffed)}-byte frame"
            )
        runs.append(stuffed[at + 1 : end])
        at = end
    return b"\0".join(runs)


def encode_frame(code: int, *, sequence: int, acknowledge: int, body: bytes = b"") -> bytes:
    """Bytes of one frame as they go over the wire, delimiter included."""
    raw = bytes((code, sequence & 0xFF, acknowledge & 0xFF)) + body
    return cobs_encode(raw + _CRC.pack(zlib.crc32(raw))) + b"\0"


def decode_frame(stuffed: bytes) -> tuple[int, int, int, bytes]:
    """Type, sequence, acknowledge and body of a frame without its delimiter.

    Raises
    ------
    WireError
        If the frame is damaged.
    """
    raw = cobs_decode(stuffed)
    if len(raw) < FRAME_OVERHEAD:
        raise WireError(f"Frame must be at least {FRAME_OVERHEAD} bytes, not {len(raw)}")
    (crc,) = _CRC.unpack_from(raw, len(raw) - 4)
    actual = zlib.crc32(raw[:-4])
    if crc != actual:
        raise WireError(f"Frame CRC must be {actual:#010x}, not {crc:#010x}")
    return raw[0], raw[1], raw[2], raw[3:-4]
