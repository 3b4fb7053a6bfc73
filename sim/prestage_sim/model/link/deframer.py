"""Wire bytes to checked frames: COBS, CRC-32 and length."""

from __future__ import annotations

import zlib
from typing import NamedTuple

from prestage_hw.contract import MESSAGES, DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET
from prestage_hw.contract.wire import FRAME_OVERHEAD, MAX_FRAME_BYTES

__all__ = ["Deframer", "Frame"]


class Frame(NamedTuple):
    """A received frame and the verdict on it. Of a damaged frame only ``damaged`` counts."""

    code: int
    sequence: int
    acknowledge: int
    body: bytes
    damaged: bool
    #: The frame is whole and its type known, but its body has the wrong length for that type.
    misfit: bool


_DAMAGED = Frame(code=0, sequence=0, acknowledge=0, body=b"", damaged=True, misfit=False)


class Deframer:
    """Take bytes off the wire and give one checked frame for each delimiter after a byte.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose messages are received.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.config = config
        self._lengths = {
            message.code: message.body_bytes(config)
            for message in MESSAGES.values()
            if message.to_device and message.record is not None and message.known(config)
        }
        self._bare = frozenset((LINK_RESET, LINK_ACK, LINK_NAK))
        self._rest = b""

    def receive(self, data: bytes) -> list[Frame]:
        """Frames that end in ``data``; bytes of an unfinished one are kept for the next call."""
        *ended, self._rest = (self._rest + data).split(b"\0")
        return [self._check(stuffed) for stuffed in ended if stuffed]

    def _check(self, stuffed: bytes) -> Frame:
        # Hop from code to code and put back the zero that each but the first stands for.
        raw = bytearray(stuffed)
        size = len(raw)
        at = 0
        while at < size:
            code = raw[at]
            raw[at] = 0
            at += code
        # A code of 255, which stands for no zero, cannot occur: its run alone is too long.
        if at != size or not FRAME_OVERHEAD < size <= MAX_FRAME_BYTES + 1:
            return _DAMAGED
        end = size - 4
        if zlib.crc32(raw[1:end]) != int.from_bytes(raw[end:], "little"):
            return _DAMAGED
        code = raw[1]
        body = bytes(raw[4:end])
        if code in self._bare and body:
            return _DAMAGED
        misfit = self._lengths.get(code, len(body)) != len(body)
        return Frame(code, raw[2], raw[3], body, False, misfit)
