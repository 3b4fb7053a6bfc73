"""The host's end of the link against the golden device's end over good and bad wires."""

import random

import pytest

from prestage.link import HostLink, LinkError
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET, LINK_RESET_DONE
from prestage_hw.contract.wire import decode_frame, encode_frame
from prestage_sim.model.link import DeviceLink

ROUTE, SYNC, READY, SYNCED = 0x11, 0x15, 0x90, 0x95


def parts(data):
    return [decode_frame(stuffed) for stuffed in data.split(b"\0") if stuffed]


class ScriptedPipe:
    """A pipe that answers from a list and remembers what was sent."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.sent = []

    def exchange(self, data, *, frames=1, limit=None):
        self.sent.append(data)
        return self.answers.pop(0) if self.answers and frames else b""

    def close(self):
        pass


def scripted(*answers, **options):
    pipe = ScriptedPipe(*answers)
    return pipe, HostLink(pipe, TINY_DEVICE, **options)


def from_device(code, sequence, acknowledge, body=b""):
    return encode_frame(code, sequence=sequence, acknowledge=acknowledge, body=body)


class BadWire:
    """The golden device's end, an engine that answers, and a wire that treats frames badly."""

    def __init__(self, *, seed, loss, burst=3):
        self.rng = random.Random(seed)
        self.loss = loss
        self.burst = burst
        self.device = DeviceLink(TINY_DEVICE)
        self.received = []
        self.replied = []
        self.frames = 0
        self.treated = 0
        self.late = {True: [], False: []}

    def close(self):
        pass

    def damage(self, frame):
        rng = self.rng
        frame = bytearray(frame)
        kind = rng.randrange(8)
        at = rng.randrange(len(frame))
        if kind == 0:
            for _ in range(rng.randrange(1, 9)):
                frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del frame[at]
        elif kind == 2:
            frame.insert(at, rng.randrange(256))
        elif kind == 3:
            frame.clear()
        elif kind == 4:
            frame *= 2
        elif kind == 5:
            del frame[at:]
        elif kind == 6:
            del frame[-1]
        else:
            frame[at:at] = rng.randbytes(rng.randrange(400))
        return bytes(frame)

    def treat(self, data, down):
        out = []
        for stuffed in data.split(b"\0"):
            if not stuffed:
                continue
            self.frames += 1
            frame = stuffed + b"\0"
            if self.rng.random() >= self.loss:
                out.append(frame)
                continue
            self.treated += 1
            if self.rng.random() < 0.2:
                # Some frames come much later: with the next data in this direction.
                self.late[down].append(frame)
            else:
                out.append(self.damage(frame))
        if self.rng.random() < 0.3:
            out += self.late[down]
            self.late[down] = []
        if self.loss and len(out) > 1 and self.rng.random() < 0.1:
            at = self.rng.randrange(len(out) - 1)
            out[at], out[at + 1] = out[at + 1], out[at]
        return b"".join(out)

    def exchange(self, data, *, frames=1, limit=None):
        rng = self.rng
        for message in self.device.receive(self.treat(data, True)):
            self.received.append(message)
            for _ in range(rng.randrange(self.burst)):
                reply = rng.choice(
                    ((READY, rng.randbytes(6)), (SYNCED, bytes(2)), (0x81, bytes(5) + b"\1"))
                )
                self.replied.append(reply)
                self.device.reply(*reply)
        answer = self.device.transmit(idle=frames > 0)
        if not answer and frames and not data:
            self.device.expire()
            answer = self.device.transmit()
        return self.treat(answer, False)


def converse(wire, *, count, rng):
    link = HostLink(wire, TINY_DEVICE, attempts=200)
    link.reset()
    posted, got = [], []
    for _ in range(count):
        message = rng.choice(
            ((ROUTE, rng.randbytes(6)), (SYNC, bytes(2)), (0x13, b"\0\7"), (0x33, bytes(9)))
        )
        posted.append(message)
        link.post(*message)
        if rng.random() < 0.3:
            got += link.poll(frames=rng.randrange(4))
    link.flush()
    for _ in range(100):
        if len(got) >= len(wire.replied):
            break
        got += link.poll(frames=len(wire.replied) - len(got))
    assert wire.received == posted
    assert got == wire.replied
    return link


def test_good_wire():
    wire = BadWire(seed=1, loss=0.0)
    link = converse(wire, count=3000, rng=random.Random(2))
    assert link.errors == link.replays == wire.device.errors == wire.device.replays == 0
    assert link.unacknowledged == 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("loss", [0.01, 0.1, 0.3])
def test_bad_wire(seed, loss):
    """Exactly once and in order both ways; a single undetected damage would show here."""
    wire = BadWire(seed=seed, loss=loss)
    link = converse(wire, count=1500, rng=random.Random(seed))
    assert wire.treated > 10
    assert link.replays and wire.device.replays
    assert link.errors + wire.device.errors > wire.treated // 10


def test_bursts_of_answers():
    wire = BadWire(seed=3, loss=0.05, burst=60)
    converse(wire, count=300, rng=random.Random(3))


def test_posting_waits_for_the_poll():
    pipe, link = scripted(from_device(READY, 0, 1, b"123456"))
    link.post(SYNC, b"\1\0")
    assert pipe.sent == [] and link.unacknowledged == 1
    assert link.poll() == [(READY, b"123456")]
    assert parts(pipe.sent[0]) == [(SYNC, 0, 0, b"\1\0")]
    assert link.unacknowledged == 0
    # The next message carries the acknowledge.
    link.post(SYNC, b"\2\0")
    assert link.poll(frames=0) == []
    assert parts(pipe.sent[1]) == [(SYNC, 1, 1, b"\2\0")]


def test_full_window_waits():
    pipe, link = scripted(from_device(LINK_ACK, 0, 2), window=4)
    for _ in range(4):
        link.post(SYNC, b"\1\0")
    assert pipe.sent == []
    link.post(SYNC, b"\1\0")
    assert [f[1] for f in parts(pipe.sent[0])] == [0, 1, 2, 3]
    assert link.unacknowledged == 3


def test_acknowledges_by_itself():
    answer = b"".join(from_device(SYNCED, at, 0, bytes(2)) for at in range(8))
    pipe, link = scripted(answer)
    assert len(link.poll(frames=8)) == 8
    link.poll(frames=0)
    assert len(pipe.sent) == 1, "nothing to send, nothing to exchange"
    link.acknowledge()
    assert parts(pipe.sent[1]) == [(LINK_ACK, 0, 8, b"")]
    link.acknowledge()
    assert len(pipe.sent) == 2


def test_acknowledges_while_it_waits():
    pipe, link = scripted(from_device(SYNCED, 0, 0, bytes(2)), from_device(SYNCED, 1, 0, bytes(2)))
    assert len(link.poll(frames=2)) == 2
    assert parts(pipe.sent[1]) == [(LINK_ACK, 0, 1, b"")]


def test_asks_once_for_what_is_missing():
    pipe, link = scripted(
        from_device(SYNCED, 1, 0, bytes(2)) + from_device(SYNCED, 2, 0, bytes(2)) + b"\5\1\0",
        from_device(SYNCED, 0, 0, b"\7\7"),
    )
    assert link.poll() == [(SYNCED, b"\7\7")]
    assert link.errors == 1
    assert parts(pipe.sent[1]) == [(LINK_NAK, 0, 0, b"")]


def test_asks_again_after_the_next_in_order():
    pipe, link = scripted()
    for sequence, asks in ((1, 1), (2, 1), (0, 1), (2, 2), (1, 2), (1, 2), (3, 3)):
        link.receive(from_device(SYNCED, sequence, 0, bytes(2)))
        link.poll(frames=0)
        assert sum(f[0] == LINK_NAK for f in parts(b"".join(pipe.sent))) == asks


def test_numbers_behind_are_duplicates():
    for sequence, code in ((-127, LINK_ACK), (-128, LINK_NAK)):
        pipe, link = scripted()
        link.receive(from_device(SYNCED, 0, 0, bytes(2)))
        link.acknowledge()
        link.receive(from_device(SYNCED, sequence % 256, 0, bytes(2)))
        link.acknowledge()
        assert [f[:3] for f in parts(pipe.sent[1])] == [(code, 0, 1)]


def test_acknowledges_outside_the_window_are_ignored():
    pipe, link = scripted()
    link.post(SYNC, bytes(2))
    link.post(SYNC, bytes(2))
    for acknowledge in (0, 3, 128, 255):
        link.receive(from_device(LINK_ACK, 0, acknowledge))
        assert link.unacknowledged == 2
    link.receive(from_device(LINK_ACK, 0, 1))
    assert link.unacknowledged == 1


def test_asks_after_a_silence():
    """The device's last message got lost, and nothing after it tells of the gap."""
    pipe, link = scripted(b"", b"", from_device(SYNCED, 0, 0, bytes(2)))
    assert link.poll() == [(SYNCED, bytes(2))]
    assert parts(b"".join(pipe.sent)) == [(LINK_NAK, 0, 0, b"")]


def test_silence_with_everything_acknowledged_is_no_error():
    pipe, link = scripted(from_device(LINK_ACK, 0, 1))
    link.post(SYNC, bytes(2))
    assert link.poll() == []
    assert link.unacknowledged == 0


def test_goes_back_on_a_nak():
    pipe, link = scripted(
        from_device(LINK_NAK, 0, 1), from_device(SYNCED, 0, 3, bytes(2)), window=8
    )
    for at in range(3):
        link.post(SYNC, bytes((at, 0)))
    assert len(link.poll()) == 1
    assert [(f[1], f[3][0]) for f in parts(pipe.sent[1])] == [(1, 1), (2, 2)]
    assert link.replays == 1


def test_messages_sent_again_acknowledge_what_came_meanwhile():
    """A stale acknowledge would look new to the device once the numbers have wrapped."""
    answers = [
        b"".join(from_device(SYNCED, at % 256, 0, bytes(2)) for at in range(n, n + 50))
        for n in range(0, 250, 50)
    ]
    pipe, link = scripted(*answers, from_device(LINK_NAK, 0, 0), from_device(LINK_ACK, 0, 1))
    link.post(SYNC, bytes(2))
    assert len(link.poll(frames=250)) == 250
    link.flush()
    (again,) = [f for f in parts(b"".join(pipe.sent[1:])) if f[0] == SYNC]
    assert again[1:3] == (0, 250)


def test_dead_device():
    pipe, link = scripted(attempts=3)
    link.post(SYNC, bytes(2))
    with pytest.raises(LinkError, match="did not acknowledge 1 messages in 3 attempts"):
        link.poll()
    with pytest.raises(LinkError, match="did not answer a reset of the link in 3 attempts"):
        link.reset()


def test_device_that_talks_nonsense():
    pipe, link = scripted(*[b"\5\1\0"] * 100, attempts=2)
    link.post(SYNC, bytes(2))
    with pytest.raises(LinkError, match="in 16 attempts"):
        link.flush()


class ResetPipe(ScriptedPipe):
    """Answers each reset after some older traffic."""

    def __init__(self, *before, lost=0):
        super().__init__()
        self.before = list(before)
        self.lost = lost

    def exchange(self, data, *, frames=1, limit=None):
        self.sent.append(data)
        answer = b""
        for code, sequence, *_ in parts(data):
            if code == LINK_RESET:
                if self.lost:
                    self.lost -= 1
                    continue
                answer += b"".join(self.before) + from_device(LINK_RESET_DONE, sequence, 0)
                answer += from_device(SYNCED, 0, 0, b"\7\7")
        return answer


def test_reset_drops_older_traffic():
    stale = from_device(SYNCED, 0, 0, b"\1\1") + b"\5\1\0"
    pipe = ResetPipe(b"half of a frame\0", stale)
    link = HostLink(pipe, TINY_DEVICE)
    link.post(SYNC, bytes(2))
    link.reset()
    assert link.unacknowledged == 0
    assert link.poll() == [(SYNCED, b"\7\7")]


def test_reset_tells_answers_apart():
    pipe = ResetPipe()
    link = HostLink(pipe, TINY_DEVICE, attempts=2)
    link.reset()
    mark = parts(pipe.sent[0])[0][1]
    older = from_device(LINK_RESET_DONE, mark, 0) + from_device(SYNCED, 0, 0, b"\1\1")
    pipe.before = [older]
    link.reset()
    assert link.poll() == [(SYNCED, b"\7\7")]
    # One that comes later than that changes nothing.
    link.receive(older[: older.index(0) + 1] + from_device(SYNCED, 1, 0, b"\3\3"))
    assert link.poll() == [(SYNCED, b"\3\3")]


def test_reset_tries_again():
    link = HostLink(ResetPipe(lost=2), TINY_DEVICE)
    link.reset()
    assert link.poll() == [(SYNCED, b"\7\7")]


def test_bytes_from_elsewhere():
    pipe, link = scripted()
    frame = from_device(SYNCED, 0, 0, b"\1\2")
    link.receive(frame[:3])
    assert link.poll(frames=0) == []
    link.receive(frame[3:])
    assert link.poll() == [(SYNCED, b"\1\2")]
    assert pipe.sent == []


def test_message_of_the_wrong_length():
    pipe, link = scripted(from_device(SYNCED, 0, 0, b"\1") + from_device(0x33, 1, 0, b"\1"))
    assert link.poll(frames=2) == [(0, b"\1"), (0x33, b"\1")]


@pytest.mark.parametrize(
    "stuffed",
    [
        b"\xff" + b"\1" * 254,
        b"\3\1\1",
        from_device(LINK_ACK, 0, 0, b"\1")[:-1],
        from_device(SYNCED, 0, 0, b"\1\2")[:-2],
    ],
)
def test_damaged_frames(stuffed):
    pipe, link = scripted(stuffed + b"\0", attempts=1)
    assert link.poll() == []
    assert link.errors == 1


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        HostLink(ScriptedPipe(), None)
    with pytest.raises(ValueError, match="Window must be between 1 and 64, not 65"):
        HostLink(ScriptedPipe(), TINY_DEVICE, window=65)
    with pytest.raises(TypeError, match="Attempt count must be an integer, not '3'"):
        HostLink(ScriptedPipe(), TINY_DEVICE, attempts="3")
    with pytest.raises(ValueError, match="Patience must be positive, not 0"):
        HostLink(ScriptedPipe(), TINY_DEVICE, patience=0)
    link = HostLink(ScriptedPipe(), TINY_DEVICE)
    with pytest.raises(ValueError, match="Message type must be 0 to 255 .* not 126"):
        link.post(LINK_ACK)
    with pytest.raises(ValueError, match="Body must be at most 246 bytes, not 247"):
        link.post(SYNC, bytes(247))
