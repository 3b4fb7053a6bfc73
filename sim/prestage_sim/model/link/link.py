"""The device's end of the link: messages in order, once, whatever the wire does."""

from __future__ import annotations

from collections import deque

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET, LINK_RESET_DONE

from .deframer import Deframer
from .framer import frame_bytes

__all__ = ["DeviceLink"]


class DeviceLink:
    """Exchange messages with the host over a wire that loses or damages bytes (go-back-N).

    The model has no clock: :meth:`transmit` stands for a pause in which everything that is due goes
    out, and :meth:`expire` for the end of the replay timer. Messages are taken as soon as they are
    accepted, so there is always room.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose messages are carried.
    replay_frames : :class:`int`
        Replies kept until they are acknowledged, 2 to 64. More wait outside the replay memory.
    acknowledge_every : :class:`int`
        Messages after which a frame goes out that acknowledges them, 1 to 64.

    Members
    -------
    errors : :class:`int`
        Damaged frames so far.
    replays : :class:`int`
        Times that replies were sent again so far.
    resets : :class:`int`
        Times that the host restarted the link so far.

    Raises
    ------
    TypeError
        If a parameter is not of its type.
    ValueError
        If a parameter is out of its range.
    """

    def __init__(
        self, config: DeviceConfig, *, replay_frames: int = 16, acknowledge_every: int = 8
    ) -> None:
        for what, value, low in (
            ("Replay memory size in frames", replay_frames, 2),
            ("Acknowledge interval", acknowledge_every, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{what} must be an integer, not {value!r}")
            if not low <= value <= 64:
                raise ValueError(f"{what} must be between {low} and 64, not {value}")
        self.config = config
        self.replay_frames = replay_frames
        self.acknowledge_every = acknowledge_every
        self.errors = 0
        self.replays = 0
        self.resets = 0
        self._deframer = Deframer(config)
        self._reset_marks: list[int] = []
        self._restart()

    def _restart(self) -> None:
        # Numbers are counted from the last reset; only the wire reduces them modulo 256.
        self._accepted = 0
        self._oldest = 0
        self._sent = 0
        self._replies: deque[tuple[int, bytes]] = deque()
        self._owed = 0
        self._owed_duplicate = False
        self._nak = False
        self._nak_armed = True

    @property
    def idle(self) -> bool:
        """True if every reply was sent and acknowledged."""
        return not self._replies

    def receive(self, data: bytes) -> list[tuple[int, bytes]]:
        """Messages that ``data`` completes, in order, as frame type and body.

        A message of a known type whose body has the wrong length has type 0.
        """
        messages = []
        for code, sequence, acknowledge, body, damaged, misfit in self._deframer.receive(data):
            if damaged:
                self.errors += 1
                self._ask_again()
                continue
            if code == LINK_RESET:
                self._restart()
                self.resets += 1
                self._reset_marks.append(sequence)
                continue
            self._acknowledged(acknowledge)
            if code == LINK_NAK:
                self._go_back()
                continue
            if code == LINK_ACK:
                continue
            behind = (self._accepted - sequence) % 256
            if behind == 0:
                messages.append((0 if misfit else code, body))
                self._accepted += 1
                self._owed += 1
                self._nak = False
                self._nak_armed = True
            elif behind <= 128:
                self._owed_duplicate = True
            else:
                self._ask_again()
        return messages

    def reply(self, code: int, body: bytes = b"") -> None:
        """Queue a message for the host."""
        self._replies.append((code, body))

    def transmit(self, *, idle: bool = True) -> bytes:
        """Bytes of everything that is due now.

        Parameters
        ----------
        idle : :class:`bool`
            True if the wire from the host has been quiet for the time after which anything accepted
            is acknowledged.
        """
        acknowledge = self._accepted % 256
        frames = []
        for mark in self._reset_marks:
            frames.append(frame_bytes(LINK_RESET_DONE, mark, 0))
        self._reset_marks.clear()
        if self._nak:
            frames.append(frame_bytes(LINK_NAK, 0, acknowledge))
            self._nak = False
        first = self._sent - self._oldest
        last = min(len(self._replies), self.replay_frames)
        for at in range(first, last):
            code, body = self._replies[at]
            frames.append(frame_bytes(code, (self._oldest + at) % 256, acknowledge, body))
        self._sent = max(self._sent, self._oldest + last)
        if not frames and (
            self._owed >= self.acknowledge_every or (idle and (self._owed or self._owed_duplicate))
        ):
            frames.append(frame_bytes(LINK_ACK, 0, acknowledge))
        if frames:
            self._owed = 0
            self._owed_duplicate = False
        return b"".join(frames)

    def expire(self) -> None:
        """Let the time pass after which unacknowledged replies are sent again."""
        self._go_back()

    def _ask_again(self) -> None:
        if self._nak_armed:
            self._nak = True
            self._nak_armed = False

    def _acknowledged(self, acknowledge: int) -> None:
        count = (acknowledge - self._oldest) % 256
        # The window: replies that are in the replay memory.
        if count <= min(len(self._replies), self.replay_frames):
            for _ in range(count):
                self._replies.popleft()
            self._oldest += count
            self._sent = max(self._sent, self._oldest)

    def _go_back(self) -> None:
        if self._sent > self._oldest:
            self._sent = self._oldest
            self.replays += 1
