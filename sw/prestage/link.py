"""The host's end of the link: messages in order, once, whatever the wire does."""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable

from prestage_hw.contract import MESSAGES, DeviceConfig, Pipe
from prestage_hw.contract.checks import require_integer
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET, LINK_RESET_DONE
from prestage_hw.contract.wire import FRAME_OVERHEAD, MAX_FRAME_BYTES, encode_frame

from .errors import LinkError

__all__ = ["HostLink", "LinkError"]


class HostLink:
    """Exchange messages with a device over a pipe that loses or damages bytes (go-back-N).

    Posting only queues bytes; they leave with the next :meth:`poll`, or when the window is full.
    The device's clock may stand still between calls, so everything that has to happen in time
    happens within a call.

    Parameters
    ----------
    pipe : :class:`Pipe`
        Byte streams to and from the device.
    config : :class:`DeviceConfig`
        Device that is spoken to.
    window : :class:`int`
        Messages that may be on their way unacknowledged, 1 to 64.
    acknowledge_every : :class:`int`
        Messages from the device after which an acknowledge goes out by itself, 1 to 64.
    attempts : :class:`int`
        Silent waits after which the device is taken for dead, at least 1.
    patience : :class:`float`
        Longest wait, in the pipe's unit of time, after which messages that have arrived are
        acknowledged even if more are waited for. Shorter than the device's replay delay.

    Members
    -------
    errors : :class:`int`
        Damaged frames received so far.
    replays : :class:`int`
        Times that messages were sent again so far.

    Raises
    ------
    TypeError
        If a parameter is not of its type.
    ValueError
        If a parameter is out of its range.
    """

    def __init__(
        self,
        pipe: Pipe,
        config: DeviceConfig,
        *,
        window: int = 16,
        acknowledge_every: int = 8,
        attempts: int = 8,
        patience: float = 16_384,
    ) -> None:
        require_config(config)
        require_integer("Window", window, low=1, high=64)
        require_integer("Acknowledge interval", acknowledge_every, low=1, high=64)
        require_integer("Attempt count", attempts, low=1, high=1 << 16)
        if not patience > 0:
            raise ValueError(f"Patience must be positive, not {patience!r}")
        self.pipe = pipe
        self.config = config
        self.window = window
        self.acknowledge_every = acknowledge_every
        self.attempts = attempts
        self.patience = patience
        self.errors = 0
        self.replays = 0
        self._lengths = {
            message.code: message.body_bytes(config)
            for message in MESSAGES.values()
            if not message.to_device and message.record is not None
        }
        # A program that ran before may have left the answer to its own reset on the wire.
        self._mark = os.urandom(1)[0]
        self._restart()

    def _restart(self) -> None:
        self._partial = b""
        self._outgoing: list[bytes] = []
        self._unacknowledged: deque[tuple[int, bytes]] = deque()
        self._following = 0  # number of the next message to the device
        self._expected = 0  # number of the next message from the device
        self._inbox: list[tuple[int, bytes]] = []
        self._owed = 0  # messages and duplicates that no frame has acknowledged yet
        self._nak_armed = True
        self._go_back_wanted = False
        self._progress = False  # something new was accepted or acknowledged

    @property
    def unacknowledged(self) -> int:
        """Messages whose arrival the device has not confirmed."""
        return len(self._unacknowledged)

    def reset(self, *, limit: float | None = None) -> None:
        """Restart both directions. What is on its way is lost; the engine behind the link goes on.

        Parameters
        ----------
        limit : :class:`float` or None
            Longest wait for one answer, as for :meth:`Pipe.exchange`.

        Raises
        ------
        LinkError
            If the device does not answer.
        """
        self._restart()
        for _ in range(self.attempts):
            self._mark = (self._mark + 1) & 0xFF
            # The delimiter in front ends what an interrupted program may have left half sent.
            data = b"\0" + encode_frame(LINK_RESET, sequence=self._mark, acknowledge=0)
            # A device that was busy may have many frames under way before the answer.
            for _ in range(1024):
                answer = self.pipe.exchange(data, frames=1, limit=limit)
                if not answer:
                    break
                data = b""
                *ended, self._partial = (self._partial + answer).split(b"\0")
                for at, stuffed in enumerate(ended):
                    raw = self._check(stuffed) if stuffed else None
                    if raw and raw[0] == LINK_RESET_DONE and raw[1] == self._mark:
                        self._receive(ended[at + 1 :])
                        return
        raise LinkError(f"Device did not answer a reset of the link in {self.attempts} attempts")

    def post(self, code: int, body: bytes = b"", *, limit: float | None = None) -> None:
        """Queue a message for the device. Waits only while the window is full.

        Parameters
        ----------
        code : :class:`int`
            Frame type, 0 to 255, not one of the link's own.
        body : :class:`bytes`
            Body in wire order.
        limit : :class:`float` or None
            Longest wait for one answer, as for :meth:`Pipe.exchange`.

        Raises
        ------
        LinkError
            If the device stopped answering.
        ValueError
            If ``code`` is not a message's or the body is too long for a frame.
        """
        if not 0 <= code <= 255 or LINK_RESET <= code <= LINK_NAK:
            raise ValueError(f"Message type must be 0 to 255 and not a link frame's, not {code}")
        if len(body) > MAX_FRAME_BYTES - FRAME_OVERHEAD:
            raise ValueError(
                f"Body must be at most {MAX_FRAME_BYTES - FRAME_OVERHEAD} bytes, not {len(body)}"
            )
        if len(self._unacknowledged) >= self.window:
            self._wait(lambda: len(self._unacknowledged) < self.window, 1, limit)
        self._outgoing.append(self._frame(code, self._following, body))
        self._unacknowledged.append((code, body))
        self._following = (self._following + 1) & 0xFF
        self._owed = 0

    def poll(self, *, frames: int = 1, limit: float | None = None) -> list[tuple[int, bytes]]:
        """Send what is queued; return messages from the device in order, as frame type and body.

        A message of a known type whose body has the wrong length has type 0.

        Parameters
        ----------
        frames : :class:`int`
            Messages to wait for; 0 sends and returns what is there. More may be returned.
        limit : :class:`float` or None
            Longest wait for one answer, as for :meth:`Pipe.exchange`. Fewer than ``frames``
            messages are returned if the device is silent for longer although it has everything that
            was posted.

        Raises
        ------
        LinkError
            If the device does not acknowledge what was posted.
        """
        if self._outgoing and not frames:
            self._exchange(frames=0, limit=limit)
        if len(self._inbox) < frames:
            self._wait(lambda: len(self._inbox) >= frames, frames, limit)
        elif self._outgoing:
            self._exchange(frames=0, limit=limit)
        messages = self._inbox
        self._inbox = []
        return messages

    def flush(self, *, limit: float | None = None) -> None:
        """Send what is queued and wait until the device has acknowledged all of it.

        Messages that arrive meanwhile are kept for :meth:`poll`.

        Raises
        ------
        LinkError
            If the device does not acknowledge what was posted.
        """
        if self._unacknowledged:
            self._wait(lambda: not self._unacknowledged, 1, limit)

    def acknowledge(self) -> None:
        """Send the acknowledge that would otherwise ride on the next message.

        To be called before the device runs for long without a message to it, or it sends its last
        messages again.
        """
        if self._owed:
            self._send_control(LINK_ACK)
        if self._outgoing:
            self._exchange(frames=0, limit=None)

    def receive(self, data: bytes) -> None:
        """Take in bytes that came from the pipe in another way than through this link.

        The messages in them are returned by the next :meth:`poll`.
        """
        *ended, self._partial = (self._partial + data).split(b"\0")
        self._receive(ended)

    # --- waiting
    # -----------------------------------------------------------------------------------

    def _wait(self, done: Callable[[], bool], frames: int, limit: float | None) -> None:
        """Exchange bytes until ``done()``, or until nothing more can be expected."""
        silent = 0
        fruitless = 0
        while not done():
            if self._owed:
                self._send_control(LINK_ACK)
            self._progress = False
            missing = max(1, frames - len(self._inbox))
            patient = limit is None or limit > self.patience
            answered = self._exchange(frames=missing, limit=self.patience if patient else limit)
            if not answered and patient:
                # Nothing to acknowledge yet: wait in one piece, but only for the first frame.
                rest = None if limit is None else limit - self.patience
                answered = self._exchange(frames=1, limit=rest)
            if self._progress:
                silent = fruitless = 0
                continue
            fruitless += 1
            if not answered:
                silent += 1
            if silent >= self.attempts or fruitless >= 8 * self.attempts:
                if self._unacknowledged:
                    raise LinkError(
                        f"Device did not acknowledge {len(self._unacknowledged)} messages"
                        f" in {fruitless} attempts"
                    )
                return
            if answered:
                continue
            if self._unacknowledged:
                self._go_back()
            elif silent == 1:
                # Its last messages may be lost. A device that has nothing to repeat ignores this.
                self._send_control(LINK_NAK)
            else:
                return

    def _exchange(self, *, frames: int, limit: float | None) -> bool:
        """Send what is queued, take in what comes; True if anything came."""
        if self._owed >= self.acknowledge_every:
            self._send_control(LINK_ACK)
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        answer = self.pipe.exchange(data, frames=frames, limit=limit)
        if not answer:
            return False
        *ended, self._partial = (self._partial + answer).split(b"\0")
        self._receive(ended)
        return True

    # --- frames
    # ------------------------------------------------------------------------------------

    def _frame(self, code: int, sequence: int, body: bytes) -> bytes:
        raw = bytes((code, sequence, self._expected)) + body
        # A place for the first COBS code in front; then every zero becomes the distance to the next
        # one.
        stuffed = bytearray(b"\0" + raw + zlib.crc32(raw).to_bytes(4, "little") + b"\0")
        last = len(stuffed) - 1
        at = 0
        while at < last:
            zero = stuffed.find(0, at + 1)
            stuffed[at] = zero - at
            at = zero
        return bytes(stuffed)

    def _send_control(self, code: int) -> None:
        self._outgoing.append(encode_frame(code, sequence=0, acknowledge=self._expected))
        self._owed = 0

    def _go_back(self) -> None:
        """Queue all unacknowledged messages again, with the acknowledge of now."""
        self.replays += 1
        sequence = self._following - len(self._unacknowledged)
        # The delimiter in front ends what damage may have left unended.
        self._outgoing = [b"\0"]
        for at, (code, body) in enumerate(self._unacknowledged):
            self._outgoing.append(self._frame(code, (sequence + at) & 0xFF, body))
        self._owed = 0

    def _check(self, stuffed: bytes) -> bytearray | None:
        """Type, sequence, acknowledge and body of a frame, None if it is damaged."""
        raw = bytearray(stuffed)
        size = len(raw)
        at = 0
        while at < size:
            code = raw[at]
            raw[at] = 0
            at += code
        end = size - 4
        # A code of 255, which stands for no zero, cannot occur: its run alone is too long.
        if at != size or not FRAME_OVERHEAD < size <= MAX_FRAME_BYTES + 1:
            return None
        if zlib.crc32(raw[1:end]) != int.from_bytes(raw[end:], "little"):
            return None
        if LINK_RESET <= raw[1] <= LINK_NAK and size != FRAME_OVERHEAD + 1:
            return None
        return raw[1:end]

    def _receive(self, ended: list[bytes]) -> None:
        """Take in whole frames without their delimiters."""
        unacknowledged = self._unacknowledged
        go_back = False
        for stuffed in ended:
            if not stuffed:
                continue
            raw = self._check(stuffed)
            if raw is None:
                self.errors += 1
                self._ask_again()
                continue
            code = raw[0]
            if code == LINK_RESET_DONE:
                continue  # The answer to an earlier try; reset() has waited for the last one.
            count = (raw[2] - self._following + len(unacknowledged)) & 0xFF
            if 0 < count <= len(unacknowledged):
                self._progress = True
                for _ in range(count):
                    unacknowledged.popleft()
            if code == LINK_NAK:
                go_back = True
                continue
            if code == LINK_ACK:
                continue
            behind = (self._expected - raw[1]) & 0xFF
            if behind == 0:
                body = bytes(raw[3:])
                if self._lengths.get(code, len(body)) != len(body):
                    code = 0
                self._inbox.append((code, body))
                self._expected = (self._expected + 1) & 0xFF
                self._owed += 1
                self._nak_armed = True
                self._progress = True
            elif behind <= 128:
                self._owed += 1
            else:
                self._ask_again()
        if go_back and unacknowledged:
            self._go_back()

    def _ask_again(self) -> None:
        if self._nak_armed:
            self._nak_armed = False
            self._send_control(LINK_NAK)
