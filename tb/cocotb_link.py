"""Tests of the link that run in the simulation; test_link.py builds the components and starts them.

::

    host (random frames,          ┌────────── Link ──────────┐
    or sw/prestage/link.py) ─ rx ▶│ deframer ─▶ sequence     │─ messages ▶ sink, or an engine that
            ▲                     │             acknowledge  │             answers with replies
            └──────────────── tx ◀│ framer ◀─ replay memory  │◀ replies ─┘
                                  └──────────────────────────┘
"""

import random
import re

import cocotb
from cocotb.task import bridge, resume
from cocotb.triggers import FallingEdge, RisingEdge, with_timeout

from prestage.link import HostLink
from prestage_hw.contract import MESSAGES
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET, LINK_RESET_DONE
from prestage_hw.contract.wire import decode_frame, encode_frame
from prestage_hw.link import Deframer, Framer, Link, MessageLayout, body_lengths
from prestage_hw.link.deframer import FrameLayout
from prestage_hw.link.framer import RawLayout
from prestage_sim.model.link import Deframer as GoldenDeframer
from prestage_sim.model.link import DeviceLink, frame_bytes
from prestage_tb.bench import (
    Stall,
    StreamSink,
    StreamSource,
    assert_no_x,
    cycles,
    parameters,
    reset,
    start_clock,
)

_CONTROL = (LINK_RESET, LINK_ACK, LINK_NAK)
_UNKNOWN = (0x00, 0x03, 0x33, 0x81, 0x90, 0xFF, LINK_RESET_DONE)
_STALLS = (0.0, 0.3, Stall(0.6, burst=(1, 40)))


def random_body(rng, length):
    """Bytes with many zeros and, now and then, long runs without any."""
    zeros = rng.choice((0.0, 0.3, 1.0))
    return bytes(0 if rng.random() < zeros else rng.randrange(256) for _ in range(length))


def random_message(rng, config):
    code, length = rng.choice(list(body_lengths(config, to_device=True).items()))
    return code, random_body(rng, length)


def damage(rng, frame):
    """A frame as a bad wire delivers it. May come out whole, or as several frames."""
    frame = bytearray(frame)
    kind = rng.randrange(9)
    at = rng.randrange(len(frame))
    if kind == 0:
        frame[at] ^= 1 << rng.randrange(8)
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
    elif kind == 7:
        frame[at:at] = bytes(rng.randrange(1, 256) for _ in range(rng.randrange(1, 600)))
    else:
        frame[at] = 255
    return bytes(frame)


def odd_frames(rng, config):
    """Frames that are whole but strange, and noise that is none."""
    longest = max(body_lengths(config, to_device=True).values())
    header = {"sequence": rng.randrange(256), "acknowledge": rng.randrange(256)}
    code = rng.choice(_UNKNOWN)
    known = rng.choice(list(body_lengths(config, to_device=True)))
    return rng.choice(
        (
            b"\0",
            b"\0\0\0",
            b"\1\0",
            b"\xff\0",
            bytes(rng.randrange(1, 7) for _ in range(rng.randrange(8))) + b"\0",
            bytes(rng.randrange(256) for _ in range(rng.randrange(600))) + b"\0",
            encode_frame(code, **header, body=random_body(rng, rng.randrange(2 * longest))),
            encode_frame(known, **header, body=random_body(rng, rng.randrange(2 * longest))),
            encode_frame(known, **header, body=random_body(rng, rng.choice((245, 246)))),
            encode_frame(rng.choice(_CONTROL), **header, body=bytes(rng.randrange(1, 9))),
            stuffed_long(rng, rng.randrange(254, 300)),
        )
    )


def stuffed_long(rng, length):
    """A frame with a good CRC that is longer than any may be."""
    import zlib

    raw = bytes((1,)) + bytes(rng.randrange(2) for _ in range(length - 5))
    raw += zlib.crc32(raw).to_bytes(4, "little")
    assert b"\0" in raw
    runs = raw.split(b"\0")
    if any(len(run) > 253 for run in runs):
        return b"\0"
    return b"".join(bytes((len(run) + 1,)) + run for run in runs) + b"\0"


# --- deframer ---


async def setup_deframer(dut, *, stall=0.0):
    config = parameters()["config"]
    start_clock(dut)
    rx = StreamSource(dut, "rx", 8, stall=stall)
    frames = StreamSink(dut, "frames", FrameLayout(config=config), stall=stall)
    await reset(dut, drivers=(rx, frames))
    return config, rx, frames


def check_frames(config, got, expected):
    longest = max(body_lengths(config, to_device=True).values())
    assert len(got) == len(expected)
    for at, (frame, golden) in enumerate(zip(got, expected, strict=True)):
        assert frame["damaged"] == golden.damaged, f"frame {at}: {frame} against {golden}"
        if golden.damaged:
            continue
        for field in ("code", "sequence", "acknowledge", "misfit"):
            assert frame[field] == getattr(golden, field), f"frame {at}: {field}"
        length = min(longest, len(golden.body))
        assert bytes(frame["body"][:length]) == golden.body[:length], f"frame {at}: body"


@cocotb.test()
async def frames_in_matches_the_model(dut):
    config, rx, frames = await setup_deframer(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    golden = GoldenDeframer(config)
    for stall in _STALLS:
        rx.stall = frames.stall = stall
        data = b""
        for _ in range(200):
            code, body = random_message(rng, config)
            frame = encode_frame(
                code, sequence=rng.randrange(256), acknowledge=rng.randrange(256), body=body
            )
            kind = rng.random()
            data += damage(rng, frame) if kind < 0.3 else frame
            if kind > 0.7:
                data += odd_frames(rng, config)
        data += b"\0"
        expected = golden.receive(data)
        assert sum(f.damaged for f in expected) > 20
        assert sum(not f.damaged for f in expected) > 60
        assert any(f.misfit for f in expected)
        frames.clear()
        rx.send(*data)
        await rx.sent()
        await cycles(dut, 50)
        frames.stall = 0
        await cycles(dut, 5)
        check_frames(config, frames.received, expected)


@cocotb.test()
async def frames_in_latency_and_pace(dut):
    config, rx, frames = await setup_deframer(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    data = b"".join(
        encode_frame(code, sequence=0, acknowledge=0, body=body)
        for code, body in (random_message(rng, config) for _ in range(50))
    )
    rx.send(*data)
    start = rx.cycle
    await rx.sent()
    assert rx.cycle - start <= len(data) + 1, "one byte a cycle"
    end = rx.cycle
    await cycles(dut, 10)
    assert len(frames.received) == 50
    assert frames.arrival[-1] - end == Deframer.latency


@cocotb.test()
async def frames_in_forgets_in_reset(dut):
    config, rx, frames = await setup_deframer(dut)
    whole = encode_frame(0x15, sequence=7, acknowledge=9, body=b"\1\2")
    for cut in range(1, len(whole)):
        rx.send(*whole[:cut])
        await rx.sent()
        await reset(dut, drivers=(rx, frames))
        rx.send(*whole)
        check_frames(config, await frames.receive(1), GoldenDeframer(config).receive(whole))


# --- framer ---


async def setup_framer(dut, *, stall=0.0):
    start_clock(dut)
    raw = StreamSource(dut, "raw", RawLayout(), stall=stall)
    tx = StreamSink(dut, "tx", 8, stall=stall)
    await reset(dut, drivers=(raw, tx))
    return raw, tx


def send_raw(raw, data):
    raw.send(*({"byte": byte, "last": at == len(data) - 1} for at, byte in enumerate(data)))


@cocotb.test()
async def frames_out_matches_the_model(dut):
    raw, tx = await setup_framer(dut)
    longest = parameters()["longest"]
    rng = random.Random(cocotb.RANDOM_SEED)
    for stall in _STALLS:
        raw.stall = tx.stall = stall
        expected = b""
        sizes = [longest - 4, longest - 4, 1, 2, 3]
        sizes += [rng.randint(1, longest - 4) for _ in range(1500 // longest)]
        for size in sizes:
            data = random_body(rng, size)
            send_raw(raw, data)
            # The model's frames have a header of three bytes; shorter ones are built by hand.
            if size >= 3:
                expected += frame_bytes(data[0], data[1], data[2], data[3:])
            else:
                import zlib

                whole = data + zlib.crc32(data).to_bytes(4, "little")
                expected += b"".join(bytes((len(r) + 1,)) + r for r in whole.split(b"\0")) + b"\0"
        got = await tx.receive(len(expected))
        assert bytes(got) == expected
        tx.stall = 0
        await cycles(dut, 20)
        assert len(tx.received) == tx._taken, "nothing but the frames"
        assert dut.idle.value == 1


@cocotb.test()
async def frames_out_published_crc(dut):
    """The check value of CRC-32, 0xCBF43926, which every table of CRCs prints."""
    raw, tx = await setup_framer(dut)
    send_raw(raw, b"123456789")
    expected = bytes.fromhex("0E 313233343536373839 2639F4CB 00")
    assert bytes(await tx.receive(len(expected))) == expected


@cocotb.test()
async def frames_out_latency_and_pace(dut):
    raw, tx = await setup_framer(dut)
    longest = parameters()["longest"]
    send_raw(raw, bytes(longest - 4))
    await raw.sent()
    end = raw.cycle
    assert dut.idle.value == 0
    await tx.receive(longest + 2)
    assert tx.arrival[0] - end == Framer.latency
    # Back to back: one byte a cycle from the second frame on.
    before = len(tx.received)
    for _ in range(10):
        send_raw(raw, bytes(longest - 4))
    await tx.receive(10 * (longest + 2))
    taken = tx.arrival[-1] - tx.arrival[before]
    assert taken == 10 * (longest + 2) - 1, "one byte a cycle"


@cocotb.test()
async def frames_out_forgets_in_reset(dut):
    raw, tx = await setup_framer(dut)
    data = bytes((1, 0, 3))
    for wait in range(24):
        send_raw(raw, bytes((9, 9, 9)))
        await cycles(dut, 1 + wait)
        await reset(dut, drivers=(raw, tx))
        send_raw(raw, data)
        expected = frame_bytes(1, 0, 3)
        assert bytes(await tx.receive(len(expected))) == expected


# --- link ---


class Bench:
    """A Link with a driver on each of its streams, and what came out of it."""

    def __init__(self, dut):
        self.dut = dut
        values = parameters()
        self.config = values["config"]
        self.options = values["options"]
        start_clock(dut)
        self.rx = StreamSource(dut, "rx", 8)
        self.tx = StreamSink(dut, "tx", 8)
        self.messages = StreamSink(
            dut, "messages", MessageLayout(config=self.config, to_device=True)
        )
        self.replies = StreamSource(
            dut, "replies", MessageLayout(config=self.config, to_device=False)
        )
        self.lengths = body_lengths(self.config, to_device=True)
        self.reply_lengths = body_lengths(self.config, to_device=False)
        self.longest_reply = max(self.reply_lengths.values())
        self.errors = 0
        self.replays = 0
        self._read = 0

    @property
    def drivers(self):
        return self.rx, self.tx, self.messages, self.replies

    async def start(self):
        await reset(self.dut, drivers=self.drivers)
        self._read = 0
        self.errors = self.replays = 0
        self._counter = cocotb.start_soon(self._count())
        await cycles(self.dut, 2)
        return self

    async def _count(self):
        while True:
            await FallingEdge(self.dut.clk)
            self.errors += int(self.dut.errors.value)
            self.replays += int(self.dut.replays.value)

    def set_stall(self, stall):
        for driver in self.drivers:
            driver.stall = stall

    def got_messages(self):
        """Accepted messages as code and body; the body of unknown ones is left out."""
        return [self.cut(m["code"], bytes(m["body"])) for m in self.messages.received]

    def cut(self, code, body):
        return code, bytes(body[: self.lengths.get(code, 0)])

    def send(self, code, *, sequence=0, acknowledge=0, body=None):
        if body is None:
            body = bytes(self.lengths.get(code, 0))
        self.rx.send(*encode_frame(code, sequence=sequence, acknowledge=acknowledge, body=body))

    def reply(self, code, body):
        assert len(body) == self.reply_lengths.get(code, 0)
        padded = bytes(body) + bytes((0xA5,)) * (self.longest_reply - len(body))
        self.replies.send({"code": code, "body": padded})

    def random_reply(self, rng):
        code, length = rng.choice(list(self.reply_lengths.items()))
        return code, random_body(rng, length)

    def frames(self):
        """Frames that ended on tx since the last call, as type, sequence, acknowledge, body."""
        data = bytes(self.tx.received[self._read :])
        end = data.rfind(b"\0") + 1
        self._read += end
        return [decode_frame(stuffed) for stuffed in data[:end].split(b"\0")[:-1]]

    async def settle(self, count=None):
        """Wait until the wire to the device is empty and everything due has come back."""
        await with_timeout(self.rx.sent(), 1, "ms")  # 100,000 cycles
        await cycles(self.dut, count or self.options["acknowledge_idle"] + 150)


async def start(dut):
    return await Bench(dut).start()


@cocotb.test()
async def link_matches_the_model(dut):
    """Frames in any order and state, against the golden model of the device's end."""
    bench = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    golden = DeviceLink(
        bench.config,
        replay_frames=bench.options["replay_frames"],
        acknowledge_every=bench.options["acknowledge_every"],
    )
    expected = []
    naks = 0
    acknowledges = [0]
    position = 0
    for stall in _STALLS:
        bench.set_stall(stall)
        for _ in range(250):
            code, body = random_message(rng, bench.config)
            kind = rng.random()
            sequence = position
            if kind < 0.08:
                sequence = rng.randrange(256)
            elif kind < 0.12:
                sequence -= rng.randint(1, 3)
            elif kind < 0.16:
                sequence += rng.randint(1, 3)
            frame = encode_frame(code, sequence=sequence, acknowledge=rng.randrange(256), body=body)
            if 0.2 < kind < 0.28:
                frame = damage(rng, frame)
            elif 0.28 < kind < 0.36:
                frame = odd_frames(rng, bench.config)
            elif 0.36 < kind < 0.42:
                code = rng.choice((LINK_ACK, LINK_NAK))
                frame = encode_frame(code, sequence=5, acknowledge=rng.randrange(256))
            elif 0.42 < kind < 0.43:
                frame = encode_frame(LINK_RESET, sequence=rng.randrange(256), acknowledge=0)
            elif 0.43 < kind < 0.5:
                length = rng.randrange(20)
                frame = encode_frame(
                    rng.choice(_UNKNOWN), sequence=sequence, acknowledge=0, body=bytes(length)
                )
            elif 0.5 < kind < 0.55:
                frame = encode_frame(code, sequence=sequence, acknowledge=0, body=body + b"\1")
            # Damage may make several frames, between which the device finds time to answer.
            for piece in re.findall(rb"[^\0]*\0|[^\0]+$", frame):
                expected += [bench.cut(*message) for message in golden.receive(piece)]
                for answer in golden.transmit(idle=False).split(b"\0")[:-1]:
                    naks += decode_frame(answer)[0] == LINK_NAK
                position = golden._accepted % 256
                if acknowledges[-1] != position:
                    acknowledges.append(position)
            bench.rx.send(*frame)
        await bench.settle()
    bench.set_stall(0)
    bench.rx.send(0)
    expected += [bench.cut(*message) for message in golden.receive(b"\0")]
    await bench.settle()
    got = bench.got_messages()
    assert len(expected) > 200
    assert any(code == 0 for code, _ in expected)
    assert any(code in _UNKNOWN and code for code, _ in expected)
    assert got == expected
    assert bench.errors == golden.errors > 20
    # What the device acknowledges walks through what it has accepted; when, is up to time.
    at = 0
    counts = dict.fromkeys((LINK_ACK, LINK_NAK, LINK_RESET_DONE), 0)
    for code, _, acknowledge, body in bench.frames():
        counts[code] += 1
        assert body == b""
        if code == LINK_RESET_DONE:
            assert acknowledge == 0
            continue
        while acknowledges[at] != acknowledge:
            at += 1
    assert 0 < counts[LINK_NAK] <= naks
    assert counts[LINK_ACK] and counts[LINK_RESET_DONE]
    assert acknowledges[at] == position


class Wire:
    """A pipe over the streams of a simulated Link that treats frames badly both ways."""

    def __init__(self, bench, rng, *, loss):
        self.bench = bench
        self.rng = rng
        self.loss = loss
        self.damaged = 0
        self._read = 0
        self._back = b""

    def close(self):
        pass

    def _treat(self, data):
        """Each frame may be lost, damaged or doubled, or change places with its neighbour."""
        out = []
        for stuffed in data.split(b"\0")[:-1]:
            frame = stuffed + b"\0"
            if self.rng.random() < self.loss:
                self.damaged += 1
                if out and self.rng.random() < 0.1:
                    out.insert(-1, frame)
                else:
                    out.append(damage(self.rng, frame))
            else:
                out.append(frame)
        return b"".join(out)

    @resume
    async def exchange(self, data, *, frames=1, limit=None):
        bench = self.bench
        assert data == b"" or data.endswith(b"\0")
        bench.rx.send(*self._treat(data))
        await with_timeout(bench.rx.sent(), 1, "ms")
        answer = b""
        end = bench.tx.cycle + int(limit or 700)
        while True:
            received = bench.tx.received
            if len(received) > self._read and received[-1] == 0:
                answer += self._treat(bytes(received[self._read :]))
                self._read = len(received)
            left = end - bench.tx.cycle
            if answer.count(b"\0") >= frames or left <= 0:
                return answer
            await cycles(bench.dut, min(left, 8))


async def converse(dut, *, loss, stall, count, burst=1):
    """The driver's end of the link against the RTL: everything once, in order, both ways."""
    bench = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    bench.set_stall(stall)
    wire = Wire(bench, rng, loss=loss)
    posted, replied, got = [], [], []
    received = []

    async def engine():
        while True:
            message = (await bench.messages.receive(1, limit=None))[0]
            received.append(bench.cut(message["code"], bytes(message["body"])))
            for _ in range(rng.randrange(2 * burst)):
                reply = bench.random_reply(rng)
                replied.append(reply)
                bench.reply(*reply)
            if burst > 1:
                # An engine that takes the next message only when its answers are on their way.
                bench.messages.paused = True
                await bench.replies.sent()
                bench.messages.paused = False

    cocotb.start_soon(engine())

    def host():
        link = HostLink(wire, bench.config, attempts=200, patience=300)
        link.reset()
        for at in range(count):
            message = random_message(rng, bench.config)
            posted.append(message)
            link.post(*message)
            if rng.random() < 0.3:
                got.extend(link.poll(frames=rng.randrange(3)))
            if at == count // 2:
                link.flush()
        link.flush()
        for _ in range(50):
            got.extend(link.poll(frames=max(1, len(replied) - len(got))))
            if len(got) == len(replied) and not bench.replies.pending:
                break
        link.flush()
        return link

    link = await bridge(host)()
    await bench.settle()
    assert received == posted
    assert got == replied
    assert len(posted) == count and len(replied) > count // 4
    return bench, wire, link


@cocotb.test()
async def link_serves_the_driver(dut):
    bench, _, link = await converse(dut, loss=0.0, stall=0.0, count=300)
    assert bench.errors == bench.replays == link.errors == link.replays == 0


@cocotb.test()
async def link_serves_the_driver_with_stalls(dut):
    bench, _, link = await converse(dut, loss=0.0, stall=0.4, count=100)
    assert bench.errors == link.errors == link.replays == 0


@cocotb.test()
async def link_serves_the_driver_on_a_bad_wire(dut):
    bench, wire, link = await converse(dut, loss=0.1, stall=0.2, count=200)
    assert wire.damaged > 30
    assert bench.errors and link.errors and link.replays and bench.replays


@cocotb.test()
async def link_serves_the_driver_in_bursts(dut):
    """Answers fill the replay memory while messages wait: neither side may block the other."""
    await converse(dut, loss=0.0, stall=0.0, count=30, burst=40)


@cocotb.test()
async def link_serves_the_driver_in_bursts_on_a_bad_wire(dut):
    await converse(dut, loss=0.05, stall=0.1, count=30, burst=20)


@cocotb.test()
async def link_message_latency_and_pace(dut):
    bench = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    total = 0
    for at in range(40):
        code, body = random_message(rng, bench.config)
        frame = encode_frame(code, sequence=at, acknowledge=0, body=body)
        total += len(frame)
        bench.rx.send(*frame)
    begin = bench.rx.cycle
    await bench.rx.sent()
    assert bench.rx.cycle - begin <= total + 1, "one byte a cycle"
    end = bench.rx.cycle
    await bench.messages.receive(40)
    assert bench.messages.arrival[-1] - end == Link.message_latency


@cocotb.test()
async def link_reply_latency_and_pace(dut):
    bench = await start(dut)
    for code, length in bench.reply_lengths.items():
        first = len(bench.tx.received)
        offered = bench.replies.cycle
        bench.reply(code, bytes(length))
        await bench.replies.sent()
        # One cycle for the driver to offer it, one for the code, one to take it.
        assert bench.replies.cycle - offered == length + 3
        end = bench.replies.cycle
        await bench.settle()
        assert bench.tx.arrival[first] - end == length + Link.reply_overhead
        sequence = bench.frames()[-1][1]
        bench.send(LINK_ACK, acknowledge=sequence + 1)
    # Many replies: one byte a cycle as long as the window lasts.
    await bench.settle()
    sequence += 1
    first = len(bench.tx.received)
    code, length = max(bench.reply_lengths.items(), key=lambda item: item[1])
    for _ in range(bench.options["replay_frames"]):
        bench.reply(code, bytes((1,)) * length)
    await bench.settle((length + 12) * bench.options["replay_frames"] + 500)
    frame = length + 9
    count = bench.options["replay_frames"] * frame
    assert bench.tx.arrival[first + count - 1] - bench.tx.arrival[first] == count - 1


@cocotb.test()
async def link_naks_once(dut):
    bench = await start(dut)
    sync = 0x15
    bench.send(sync, sequence=0)
    await bench.settle()
    assert bench.frames() == [(LINK_ACK, 0, 1, b"")]
    # A gap, more of it, and a damaged frame: one LINK_NAK.
    bench.send(sync, sequence=2)
    bench.send(sync, sequence=3)
    bench.rx.send(5, 1, 2, 3, 0)
    await bench.settle()
    assert bench.frames() == [(LINK_NAK, 0, 1, b"")]
    assert bench.errors == 1
    # In order again, then another gap: a second one.
    bench.send(sync, sequence=1)
    await bench.settle()
    assert bench.frames() == [(LINK_ACK, 0, 2, b"")]
    bench.send(sync, sequence=129)
    await bench.settle()
    assert bench.frames() == [(LINK_NAK, 0, 2, b"")]
    assert len(bench.messages.received) == 2


@cocotb.test()
async def link_acknowledges_duplicates(dut):
    bench = await start(dut)
    bench.send(0x15, sequence=0)
    await bench.settle()
    bench.frames()
    # 1 and 128 behind are duplicates, 129 behind is a gap.
    for sequence, answer in ((0, LINK_ACK), (1 - 128, LINK_ACK), (1 - 129, LINK_NAK)):
        bench.send(0x15, sequence=sequence)
        await bench.settle()
        assert bench.frames() == [(answer, 0, 1, b"")]
    assert len(bench.messages.received) == 1
    assert bench.errors == 0


@cocotb.test()
async def link_acknowledges_in_time(dut):
    bench = await start(dut)
    every, idle = bench.options["acknowledge_every"], bench.options["acknowledge_idle"]
    # After so many messages, without waiting.
    for at in range(every):
        bench.send(0x15, sequence=at)
    await bench.rx.sent()
    end = bench.rx.cycle
    await bench.tx.receive(9)
    assert bench.frames() == [(LINK_ACK, 0, every, b"")]
    assert bench.tx.arrival[0] - end < idle
    # After a quiet time, counted from the last byte.
    bench.send(0x15, sequence=every)
    await bench.rx.sent()
    end = bench.rx.cycle
    first = len(bench.tx.received)
    await bench.settle()
    assert bench.frames() == [(LINK_ACK, 0, every + 1, b"")]
    assert idle <= bench.tx.arrival[first] - end <= idle + 20
    # Nothing new: nothing to say. An acknowledge is not acknowledged.
    bench.send(LINK_ACK, acknowledge=0)
    await bench.settle(3 * idle)
    assert bench.frames() == []
    # A reply carries the acknowledge.
    bench.send(0x15, sequence=every + 1)
    await bench.rx.sent()
    bench.reply(0x95, b"\1\2")
    await bench.settle()
    assert bench.frames() == [(0x95, 0, every + 2, b"\1\2")]


async def fill_window(bench, *, more=0):
    """Offer as many replies as the replay memory holds, and ``more``."""
    replies = [(0x95, bytes((at % 256, 7))) for at in range(bench.options["replay_frames"] + more)]
    for reply in replies:
        bench.reply(*reply)
    await bench.settle()
    return [(code, at, 0, body) for at, (code, body) in enumerate(replies)]


@cocotb.test()
async def link_keeps_the_window(dut):
    bench = await start(dut)
    size = bench.options["replay_frames"]
    sent = await fill_window(bench, more=3)
    assert bench.frames() == sent[:size]
    assert bench.replies.pending == 3
    # Acknowledges outside the window are ignored.
    for acknowledge in (0, size + 1, 128, 255):
        bench.send(LINK_ACK, acknowledge=acknowledge)
    await bench.settle()
    assert bench.frames() == []
    bench.send(LINK_ACK, acknowledge=2)
    await bench.settle()
    assert bench.frames() == sent[size : size + 2]
    assert bench.replies.pending == 1
    bench.send(LINK_ACK, acknowledge=size + 2)
    await bench.settle()
    assert bench.frames() == sent[size + 2 :]
    assert bench.replays == 0


@cocotb.test()
async def link_goes_back(dut):
    bench = await start(dut)
    size = bench.options["replay_frames"]
    sent = await fill_window(bench)
    bench.frames()
    # The acknowledge of the LINK_NAK counts first.
    bench.send(LINK_NAK, acknowledge=1)
    await bench.settle()
    assert bench.frames() == sent[1:]
    assert bench.replays == 1
    # A storm of them, quicker than the frames go out: repeats, then everything in order.
    for _ in range(20):
        bench.send(LINK_NAK, acknowledge=1)
    await bench.settle()
    storm = bench.frames()
    assert storm[-(size - 1) :] == sent[1:]
    assert all(frame in sent[1:] for frame in storm)
    assert 2 <= bench.replays <= 21
    # An acknowledge for what was sent before going back moves on.
    bench.send(LINK_ACK, acknowledge=size)
    await bench.settle()
    replays = bench.replays
    # Nothing unacknowledged: nothing to go back to.
    bench.send(LINK_NAK, acknowledge=size)
    await bench.settle()
    assert bench.frames() == []
    assert bench.replays == replays


@cocotb.test()
async def link_skips_what_is_acknowledged_late(dut):
    """An acknowledge beyond the place where sending again has come to."""
    bench = await start(dut)
    sent = await fill_window(bench)
    bench.frames()
    bench.tx.paused = True
    bench.send(LINK_NAK, acknowledge=0)
    await bench.settle()
    bench.send(LINK_ACK, acknowledge=len(sent))
    await bench.settle()
    bench.tx.paused = False
    bench.reply(0x95, b"\7\7")
    await bench.settle()
    # Two frames in the framer and one on its way there; the rest is not repeated.
    assert bench.frames() == [*sent[:3], (0x95, len(sent), 0, b"\7\7")]
    assert bench.replays == 1


@cocotb.test()
async def link_replays_in_time(dut):
    bench = await start(dut)
    wait = bench.options["replay_cycles"]
    sent = await fill_window(bench)
    last = bench.tx.arrival[-1]
    assert bench.frames() == sent
    first = len(bench.tx.received)
    await cycles(dut, wait + 500)
    assert bench.frames() == sent
    assert bench.replays == 1
    assert 0 < bench.tx.arrival[first] - last - wait < 30
    # Progress starts the time anew, and without anything unacknowledged it does not run.
    await cycles(dut, wait // 2)
    bench.send(LINK_ACK, acknowledge=1)
    await cycles(dut, wait // 2 + 100)
    assert bench.replays == 1 and bench.frames() == []
    bench.send(LINK_ACK, acknowledge=len(sent))
    await cycles(dut, 2 * wait)
    assert bench.replays == 1 and bench.frames() == []


@cocotb.test()
async def link_waits_for_a_slow_wire(dut):
    """The replay time starts when the frame has left, however slowly."""
    bench = await start(dut)
    wait = bench.options["replay_cycles"]
    bench.tx.paused = True
    bench.reply(0x95, b"\1\2")
    await cycles(dut, 3 * wait)
    assert bench.replays == 0
    bench.tx.paused = False
    await cycles(dut, wait - 10)
    assert bench.replays == 0 and len(bench.frames()) == 1


@cocotb.test()
async def link_holds_two_messages(dut):
    """Messages that nobody takes hold up the wire, but do not get lost."""
    bench = await start(dut)
    bench.messages.paused = True
    data = b"".join(frame_bytes(0x15, at, 0, bytes((at, 0))) for at in range(6))
    bench.rx.send(*data)
    await cycles(dut, 2 * len(data))
    # The third frame waits behind the second one, all but its COBS code.
    assert bench.rx.sent_count == 2 * len(data) // 6 + 1
    assert bench.errors == 0
    bench.messages.paused = False
    await bench.settle()
    assert [bytes(m["body"][:2]) for m in bench.messages.received] == [
        bytes((at, 0)) for at in range(6)
    ]
    assert all(code == LINK_ACK for code, *_ in bench.frames())


@cocotb.test()
async def link_refuses_while_the_replay_memory_is_full(dut):
    """A full replay memory must not block the acknowledges that empty it."""
    bench = await start(dut)
    size = bench.options["replay_frames"]
    bench.messages.paused = True
    sent = await fill_window(bench, more=1)
    assert bench.frames() == sent[:size]
    for at in range(4):
        bench.send(0x15, sequence=at, body=bytes((at, 0)))
    await bench.settle()
    assert [f for f in bench.frames() if f[0] == LINK_NAK] == [], "no room yet"
    assert len(bench.messages.received) == 0
    # Acknowledges come through although messages could not.
    bench.send(LINK_ACK, acknowledge=size)
    await bench.settle()
    assert [f[:2] for f in bench.frames() if f[0] != LINK_ACK] == [(0x95, size)]
    # Room: the refused ones are asked for once.
    bench.messages.paused = False
    await bench.settle()
    assert [f for f in bench.frames() if f[0] == LINK_NAK] == [(LINK_NAK, 0, 1, b"")]
    for at in range(1, 4):
        bench.send(0x15, sequence=at, body=bytes((at, 0)))
    await bench.settle()
    assert [m["body"][0] for m in bench.messages.received] == [0, 1, 2, 3]
    assert bench.errors == 0


@cocotb.test()
async def link_reset_frame_in_flight(dut):
    """LINK_RESET at every moment of a running conversation."""
    bench = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    bench.set_stall(0.1)
    code, length = max(bench.reply_lengths.items(), key=lambda item: item[1])
    for mark in range(40):
        for at in range(rng.randrange(4)):
            bench.send(0x15, sequence=at)
        for at in range(rng.randrange(4)):
            bench.reply(code, bytes((at,)) * length)
        await cycles(dut, rng.randrange(80))
        bench.send(LINK_RESET, sequence=mark, acknowledge=99)
        await bench.rx.sent()
        await cycles(dut, 300 + 8 * length)
        frames = bench.frames()
        done = [at for at, frame in enumerate(frames) if frame[0] == LINK_RESET_DONE]
        assert [frames[at] for at in done] == [(LINK_RESET_DONE, mark, 0, b"")]
        # After the answer both directions are at 0: only what was offered, not taken, may follow.
        after = [f for f in frames[done[0] + 1 :] if f[0] not in (LINK_ACK, LINK_NAK)]
        assert [f[1] for f in after] == list(range(len(after)))
        for frame in after:
            assert frame[0] == code and len(set(frame[3])) == 1, "a reply is whole"
        before = len(bench.messages.received)
        bench.send(0x10, sequence=0, acknowledge=len(after), body=bytes((3, 0, 0, 0, 0, mark)))
        await bench.rx.sent()
        await cycles(dut, 20)
        bench.reply(0x95, bytes((mark, 0)))
        await cycles(dut, 200 + 2 * length)
        assert bytes(bench.messages.received[before]["body"][:6])[5] == mark
        assert [f for f in bench.frames() if f[0] == 0x95] == [
            (0x95, len(after), 1, bytes((mark, 0)))
        ]
        # Restart for the next round with everything acknowledged.
        bench.send(LINK_RESET, sequence=0)
        await bench.rx.sent()
        await cycles(dut, 200 + 2 * length)
        bench.frames()
    assert bench.errors == 0


@cocotb.test()
async def link_rst_in_flight(dut):
    """``rst`` at any moment leaves the state of a fresh device."""
    bench = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    for _ in range(40):
        for at in range(3):
            bench.send(0x15, sequence=at)
            bench.reply(*bench.random_reply(rng))
        bench.rx.send(9, 1, 2)
        await cycles(dut, rng.randrange(1, 150))
        bench._counter.cancel()
        await bench.start()
        bench.send(0x10, sequence=0, body=b"\1\0\2\0\3\0")
        bench.reply(0x90, b"\0\1\0\2\0\3")
        await bench.settle()
        assert bench.got_messages() == [(0x10, b"\1\0\2\0\3\0")]
        assert [f for f in bench.frames() if f[0] == 0x90] == [(0x90, 0, 0, b"\0\1\0\2\0\3")] or (
            bench.tx.received
        )
        assert bench.errors == 0


@cocotb.test()
async def link_sequence_wraps(dut):
    """More than 256 messages and replies."""
    bench = await start(dut)
    for at in range(600):
        bench.send(0x15, sequence=at, acknowledge=at, body=bytes((at % 256, at // 256)))
        bench.reply(0x95, bytes((at % 256, at // 256)))
        await bench.messages.receive(1)
        while bench.replies.pending:
            await RisingEdge(dut.clk)
        await cycles(dut, 30)
    await bench.settle()
    bodies = [bytes((at % 256, at // 256)) for at in range(600)]
    assert [bytes(m["body"][:2]) for m in bench.messages.received] == bodies
    replies = [f for f in bench.frames() if f[0] == 0x95]
    assert [f[3] for f in replies] == bodies
    assert [f[1] for f in replies] == [at % 256 for at in range(600)]
    assert bench.replays == 0


@cocotb.test()
async def link_outputs_are_known(dut):
    """No output is undefined after reset or under traffic (Icarus shows X, Verilator does not)."""
    bench = await start(dut)
    for at in range(3):
        bench.send(0x15, sequence=at)
        bench.reply(0x95, bytes((at, 0)))
    for _ in range(300):
        await FallingEdge(dut.clk)
        assert_no_x(dut.rx__ready, dut.tx__valid, dut.tx__payload, dut.messages__valid)
        assert_no_x(dut.messages__payload, dut.replies__ready, dut.errors, dut.replays)


def check_codes():
    """The codes that the tests write as numbers."""
    assert {name: MESSAGES[name].code for name in ("SYNC", "BEGIN_TOKEN", "SYNCED", "READY")} == {
        "SYNC": 0x15,
        "BEGIN_TOKEN": 0x10,
        "SYNCED": 0x95,
        "READY": 0x90,
    }


check_codes()
