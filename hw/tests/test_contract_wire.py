"""Frames: COBS against published examples, CRC, damage."""

import random
import re
import zlib

import pytest

from prestage_hw.contract import WireError, decode_frame, encode_frame
from prestage_hw.contract.wire import (
    FRAME_OVERHEAD,
    MAX_FRAME_BYTES,
    cobs_decode,
    cobs_encode,
)


def raises(kind, text):
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


# The first is the example of Cheshire and Baker, "Consistent Overhead Byte Stuffing": the beginning
# of an IPv4 packet. The rest are the usual ones.
EXAMPLES = [
    ("45 00 00 2c 4c 79 00 00 40 06 4f 37", "02 45 01 04 2c 4c 79 01 05 40 06 4f 37"),
    ("00", "01 01"),
    ("00 00", "01 01 01"),
    ("00 11 00", "01 02 11 01"),
    ("11 22 00 33", "03 11 22 02 33"),
    ("11 22 33 44", "05 11 22 33 44"),
    ("11 00 00 00", "02 11 01 01 01"),
]


@pytest.mark.parametrize("raw, stuffed", EXAMPLES)
def test_cobs_examples(raw, stuffed):
    assert cobs_encode(bytes.fromhex(raw)) == bytes.fromhex(stuffed)
    assert cobs_decode(bytes.fromhex(stuffed)) == bytes.fromhex(raw)


def test_cobs_of_the_longest_run():
    raw = bytes(range(1, 254))
    assert len(raw) == MAX_FRAME_BYTES
    assert cobs_encode(raw) == b"\xfe" + raw
    assert cobs_decode(b"\xfe" + raw) == raw


def test_cobs_round_trips():
    generator = random.Random(1)
    for _ in range(2000):
        length = generator.randrange(MAX_FRAME_BYTES + 1)
        zeros = generator.random()
        raw = bytes(
            0 if generator.random() < zeros else generator.randrange(256) for _ in range(length)
        )
        stuffed = cobs_encode(raw)
        assert 0 not in stuffed
        assert len(stuffed) == len(raw) + 1
        assert cobs_decode(stuffed) == raw


def test_cobs_refuses_what_is_too_long():
    with raises(ValueError, "Frame must be at most 253 bytes, not 254"):
        cobs_encode(bytes(254))


@pytest.mark.parametrize(
    "stuffed, code, at, length",
    [
        ("03 11", 3, 0, 2),
        ("02 11 00", 0, 2, 3),
        ("02 11 05 11", 5, 2, 4),
        ("ff" + "11" * 254, 255, 0, 255),
    ],
)
def test_cobs_finds_damage(stuffed, code, at, length):
    with raises(WireError, f"COBS code {code} at byte {at} does not fit a {length}-byte frame"):
        cobs_decode(bytes.fromhex(stuffed))


def test_crc_is_that_of_ieee_802_3():
    # The check value that catalogues of CRCs give for the digits 1 to 9.
    assert zlib.crc32(b"123456789") == 0xCBF43926
    frame = encode_frame(0x31, sequence=0x32, acknowledge=0x33, body=b"456789")
    assert cobs_decode(frame[:-1]) == b"123456789" + bytes.fromhex("2639f4cb")


def test_frame_layout():
    frame = encode_frame(0x7E, sequence=0, acknowledge=5)
    assert frame[-1] == 0
    assert 0 not in frame[:-1]
    assert len(frame) == FRAME_OVERHEAD + 2
    assert decode_frame(frame[:-1]) == (0x7E, 0, 5, b"")


def test_numbers_are_modulo_256():
    frame = encode_frame(1, sequence=256, acknowledge=-1)
    assert decode_frame(frame[:-1]) == (1, 0, 255, b"")


def test_frame_round_trips():
    generator = random.Random(2)
    for _ in range(500):
        body = generator.randbytes(generator.randrange(MAX_FRAME_BYTES - FRAME_OVERHEAD + 1))
        head = [generator.randrange(256) for _ in range(3)]
        frame = encode_frame(head[0], sequence=head[1], acknowledge=head[2], body=body)
        assert decode_frame(frame[:-1]) == (*head, body)


def test_longest_body():
    encode_frame(1, sequence=0, acknowledge=0, body=bytes(246))
    with raises(ValueError, "Frame must be at most 253 bytes, not 254"):
        encode_frame(1, sequence=0, acknowledge=0, body=bytes(247))


def test_short_frame():
    with raises(WireError, "Frame must be at least 7 bytes, not 6"):
        decode_frame(cobs_encode(b"abcdef"))


def test_every_flipped_bit_is_found():
    frame = bytearray(encode_frame(0x11, sequence=3, acknowledge=9, body=bytes([0, 1, 0, 2])))[:-1]
    for at in range(len(frame)):
        for bit in range(8):
            damaged = bytearray(frame)
            damaged[at] ^= 1 << bit
            with pytest.raises(WireError):
                decode_frame(bytes(damaged))


def test_crc_message():
    raw = b"\x01\x00\x00abc"
    crc = zlib.crc32(raw)
    with raises(WireError, f"Frame CRC must be {crc:#010x}, not 0x00000000"):
        decode_frame(cobs_encode(raw + bytes(4)))
