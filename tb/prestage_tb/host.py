"""Host end of an undamaged link, for benches of whole devices."""

from __future__ import annotations

from collections.abc import Iterable

from prestage_hw.contract import MESSAGES, DeviceConfig, decode_frame, encode_frame
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET_DONE

from .bench import Stall, StreamSink, StreamSource

__all__ = ["LinkHost"]

#: Messages of the device between two acknowledges.
_ACKNOWLEDGE_EVERY = 8


class LinkHost:
    """Send and receive messages: it counts sequences and acknowledges, and repeats nothing.

    Parameters
    ----------
    dut : handle
        Device under test, with the streams ``rx`` and ``tx``.
    config : :class:`DeviceConfig`
        Its parameters.
    stall : :class:`float`, :class:`Stall` or iterable of :class:`bool`
        When both streams pause.

    Members
    -------
    answers : list of (:class:`int`, :class:`bytes`)
        Code and body of the messages that have come, as far as :meth:`take` keeps them.
    """

    def __init__(
        self, dut: object, config: DeviceConfig, *, stall: float | Stall | Iterable[bool] = 0.0
    ) -> None:
        self.dut = dut
        self.config = config
        self.rx = StreamSource(dut, "rx", 8, stall=stall)
        self.tx = StreamSink(dut, "tx", 8, stall=stall)
        self.clear()

    def clear(self) -> None:
        """Forget everything, as after a reset of the device."""
        self.sequence = self.expected = 0
        self.answers: list[tuple[int, bytes]] = []
        self._frame = bytearray()
        self._bytes = 0

    def post(self, name: str, *values: object) -> tuple[int, bytes]:
        """Queue a message and return its code and body."""
        record = MESSAGES[name].record
        assert record is not None
        body = record.pack(self.config, *values)
        self.post_raw(MESSAGES[name].code, body)
        return MESSAGES[name].code, body

    def post_raw(self, code: int, body: bytes) -> None:
        """Queue a message of any code and body."""
        frame = encode_frame(code, sequence=self.sequence, acknowledge=self.expected, body=body)
        self.rx.send(*frame)
        self.sequence += 1

    def poll(self) -> None:
        """Parse what has come since the last call."""
        for byte in self.tx.received[self._bytes :]:
            self._bytes += 1
            if byte:
                self._frame.append(byte)
                continue
            code, sequence, _, body = decode_frame(bytes(self._frame))
            self._frame.clear()
            assert code != LINK_NAK
            if code == LINK_RESET_DONE:
                self.restarted()
                continue
            if code == LINK_ACK:
                continue
            assert sequence == self.expected % 256
            self.expected += 1
            self.take(code, body)
            if self.expected % _ACKNOWLEDGE_EVERY == 0:
                self.rx.send(*encode_frame(LINK_ACK, sequence=0, acknowledge=self.expected))

    def take(self, code: int, body: bytes) -> None:
        """A message has come."""
        self.answers.append((code, body))

    def restarted(self) -> None:
        """The device has restarted the link."""
        self.sequence = self.expected = 0
