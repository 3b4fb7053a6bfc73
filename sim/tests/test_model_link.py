"""Golden model of the link against published vectors and its own rules."""

import random
import zlib

import pytest

from prestage_hw.contract import wire
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET, LINK_RESET_DONE
from prestage_sim.model.link import Deframer, DeviceLink, frame_bytes

ROUTE, SYNC, READY, SYNCED = 0x11, 0x15, 0x90, 0x95

# Cheshire and Baker's examples and those of the encyclopedia; unstuffed, stuffed.
COBS_VECTORS = [
    ("", "01"),
    ("00", "01 01"),
    ("00 00", "01 01 01"),
    ("00 11 00", "01 02 11 01"),
    ("11 22 00 33", "03 11 22 02 33"),
    ("11 22 33 44", "05 11 22 33 44"),
    ("11 00 00 00", "02 11 01 01 01"),
    (
        "45 00 00 2C 4C 79 00 00 40 06 4F 37",
        "02 45 01 04 2C 4C 79 01 05 40 06 4F 37",
    ),
    (bytes(range(1, 0xFE)).hex(), "FE" + bytes(range(1, 0xFE)).hex()),
]


def stuff(raw):
    """COBS as the paper writes it: byte by byte."""
    out, code_at = bytearray(1), 0
    for byte in raw:
        if byte:
            out.append(byte)
        else:
            out[code_at] = len(out) - code_at
            code_at = len(out)
            out.append(0)
    out[code_at] = len(out) - code_at
    return bytes(out)


def crc32(data):
    """CRC-32 bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(("raw", "stuffed"), COBS_VECTORS)
def test_cobs_vectors(raw, stuffed):
    raw, stuffed = bytes.fromhex(raw), bytes.fromhex(stuffed)
    assert stuff(raw) == stuffed
    assert wire.cobs_encode(raw) == stuffed
    assert wire.cobs_decode(stuffed) == raw


def test_crc_vectors():
    assert crc32(b"123456789") == zlib.crc32(b"123456789") == 0xCBF43926
    assert frame_bytes(0x31, 0x32, 0x33, b"456789") == bytes.fromhex(
        "0E 313233343536373839 2639F4CB 00"
    )


def test_frame_is_stuffed_crc():
    rng = random.Random(1)
    for _ in range(500):
        raw = bytes(
            rng.choice((0, 0, 1, 255, rng.randrange(256))) for _ in range(3 + rng.randrange(40))
        )
        expected = stuff(raw + crc32(raw).to_bytes(4, "little")) + b"\0"
        assert frame_bytes(raw[0], raw[1], raw[2], raw[3:]) == expected
        assert (
            wire.encode_frame(raw[0], sequence=raw[1], acknowledge=raw[2], body=raw[3:]) == expected
        )


def test_deframer_gives_what_went_in():
    rng = random.Random(2)
    sent = [
        (SYNC, rng.randrange(256), rng.randrange(256), bytes((0, rng.randrange(256))))
        for _ in range(200)
    ]
    data = b"\0".join(frame_bytes(*frame) for frame in sent)
    got = []
    deframer = Deframer(TINY_DEVICE)
    while data:
        size = rng.randrange(1, 30)
        got += deframer.receive(data[:size])
        data = data[size:]
    assert [tuple(frame) for frame in got] == [(*frame, False, False) for frame in sent]


def test_deframer_finds_every_single_bit_error():
    frame = frame_bytes(ROUTE, 3, 4, b"\0\1\2\0\3\0")
    for bit in range(8 * (len(frame) - 1)):
        bad = bytearray(frame)
        bad[bit // 8] ^= 1 << bit % 8
        assert all(f.damaged for f in Deframer(TINY_DEVICE).receive(bytes(bad)))


@pytest.mark.parametrize(
    "stuffed",
    [
        b"\1",
        b"\5\1",
        b"\xff" + bytes([1]) * 254,
        stuff(b"\1\2" + crc32(b"\1\2").to_bytes(4, "little")),
        stuff(bytes(250) + crc32(bytes(250)).to_bytes(4, "little")),
        frame_bytes(LINK_ACK, 0, 0, b"\1")[:-1],
        frame_bytes(LINK_RESET, 0, 0, b"\1")[:-1],
        frame_bytes(LINK_NAK, 0, 0, b"\1")[:-1],
    ],
    ids=["bare", "overrun", "code255", "short", "long", "ack body", "reset body", "nak body"],
)
def test_deframer_calls_damaged(stuffed):
    (frame,) = Deframer(TINY_DEVICE).receive(stuffed + b"\0")
    assert frame.damaged


def test_deframer_marks_misfits():
    deframer = Deframer(TINY_DEVICE)
    (frame,) = deframer.receive(frame_bytes(SYNC, 0, 0, b"\1"))
    assert frame.misfit and not frame.damaged
    # The longest frame is whole; its type is unknown, so any length fits.
    (frame,) = deframer.receive(frame_bytes(0x33, 0, 0, bytes(246)))
    assert not frame.misfit and not frame.damaged


def parts(data):
    return [wire.decode_frame(stuffed) for stuffed in data.split(b"\0")[:-1]]


def sync(sequence, *, acknowledge=0):
    return frame_bytes(SYNC, sequence % 256, acknowledge, bytes((sequence % 256, 0)))


def test_accepts_in_order_once():
    link = DeviceLink(TINY_DEVICE)
    assert link.receive(sync(0) + sync(0) + sync(1)) == [(SYNC, b"\0\0"), (SYNC, b"\1\0")]
    assert parts(link.transmit()) == [(LINK_ACK, 0, 2, b"")]
    assert link.transmit() == b""
    assert link.receive(sync(0)) == []
    assert parts(link.transmit()) == [(LINK_ACK, 0, 2, b"")]
    assert link.errors == 0


def test_numbers_behind_are_duplicates():
    for sequence, code in ((1 - 128, LINK_ACK), (1 - 129, LINK_NAK)):
        link = DeviceLink(TINY_DEVICE)
        link.receive(sync(0))
        link.transmit()
        assert link.receive(sync(sequence)) == []
        assert parts(link.transmit()) == [(code, 0, 1, b"")]


def test_unknown_and_misfitting_messages():
    link = DeviceLink(TINY_DEVICE)
    assert link.receive(frame_bytes(0x33, 0, 0, b"\1")) == [(0x33, b"\1")]
    assert link.receive(frame_bytes(SYNC, 1, 0, b"\1")) == [(0, b"\1")]
    assert link.receive(frame_bytes(LINK_RESET_DONE, 2, 0)) == [(LINK_RESET_DONE, b"")]


def test_one_nak_until_in_order_again():
    link = DeviceLink(TINY_DEVICE)
    link.receive(sync(1))
    link.receive(b"\5\1\0")
    assert link.errors == 1
    assert parts(link.transmit()) == [(LINK_NAK, 0, 0, b"")]
    link.receive(sync(2) + b"\5\1\0")
    assert link.transmit() == b""
    assert link.receive(sync(0)) == [(SYNC, b"\0\0")]
    link.receive(sync(2))
    assert parts(link.transmit()) == [(LINK_NAK, 0, 1, b"")]
    # An accepted frame that overtakes the LINK_NAK cancels it.
    link.receive(sync(1) + sync(3) + sync(2))
    assert parts(link.transmit()) == [(LINK_ACK, 0, 3, b"")]


def test_acknowledges_every_so_many():
    link = DeviceLink(TINY_DEVICE, acknowledge_every=3)
    link.receive(sync(0) + sync(1))
    assert link.transmit(idle=False) == b""
    link.receive(sync(2))
    assert parts(link.transmit(idle=False)) == [(LINK_ACK, 0, 3, b"")]


def test_window_and_replay():
    link = DeviceLink(TINY_DEVICE, replay_frames=4)
    for at in range(6):
        link.reply(SYNCED, bytes((at, 0)))
    assert [f[1] for f in parts(link.transmit())] == [0, 1, 2, 3]
    for outside in (5, 128, 255, 0):
        link.receive(frame_bytes(LINK_ACK, 0, outside))
    assert link.transmit() == b""
    link.receive(frame_bytes(LINK_NAK, 0, 2))
    assert [(f[1], f[3][0]) for f in parts(link.transmit())] == [(2, 2), (3, 3), (4, 4), (5, 5)]
    assert link.replays == 1
    link.expire()
    link.receive(frame_bytes(LINK_ACK, 0, 5))
    assert [f[1] for f in parts(link.transmit())] == [5]
    assert not link.idle
    link.receive(frame_bytes(LINK_ACK, 0, 6))
    link.expire()
    link.receive(frame_bytes(LINK_NAK, 0, 6))
    assert link.idle and link.transmit() == b"" and link.replays == 2


def test_reset():
    link = DeviceLink(TINY_DEVICE)
    link.receive(sync(0) + sync(1))
    link.reply(SYNCED, b"\1\2")
    link.transmit()
    assert link.receive(frame_bytes(LINK_RESET, 77, 5)) == []
    assert parts(link.transmit()) == [(LINK_RESET_DONE, 77, 0, b"")]
    assert link.idle
    assert link.receive(sync(0)) == [(SYNC, b"\0\0")]
    link.reply(SYNCED, b"\3\4")
    assert parts(link.transmit()) == [(SYNCED, 0, 1, b"\3\4")]


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        DeviceLink(3)
    with pytest.raises(TypeError, match="Acknowledge interval must be an integer, not 1.5"):
        DeviceLink(TINY_DEVICE, acknowledge_every=1.5)
    with pytest.raises(
        ValueError, match="Replay memory size in frames must be between 2 and 64, not 1"
    ):
        DeviceLink(TINY_DEVICE, replay_frames=1)
