"""Records and messages: packing against the NumPy dtypes, lengths, names and codes."""

import random
import re

import numpy as np
import pytest

from prestage_hw.contract import MESSAGES, RECORDS, DeviceConfig, Field, message_by_code, preset
from prestage_hw.contract.records import ERROR_TEXT, ErrorCode, message_by_name
from prestage_hw.contract.wire import FRAME_OVERHEAD, MAX_FRAME_BYTES

CONFIGS = [
    DeviceConfig(model=preset("tiny"), slots=4, contexts=2, data_bytes=4, address_bits=32),
    DeviceConfig(model=preset("gpt-oss-20b"), slots=192),
    DeviceConfig(model=preset("qwen3-30b-a3b"), slots=65535, contexts=8, data_bytes=64),
]


def raises(kind, text):
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def random_value(field, config, generator):
    def one():
        return generator.getrandbits(field.wire_bits)

    return one() if field.count is None else tuple(one() for _ in range(field.length(config)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model.name)
@pytest.mark.parametrize("name", RECORDS)
def test_pack_is_what_the_dtype_says(name, config):
    record = RECORDS[name]
    generator = random.Random(name)
    values = [random_value(field, config, generator) for field in record.fields]
    body = record.pack(config, *values)
    dtype = record.dtype(config)
    assert len(body) == dtype.itemsize == record.wire_bytes(config)
    seen = np.frombuffer(body, dtype)[0]
    assert [np.asarray(seen[field.name]).tolist() for field in record.fields] == [
        list(value) if isinstance(value, tuple) else value for value in values
    ]
    assert record.unpack(config, body) == {
        field.name: value for field, value in zip(record.fields, values, strict=True)
    }


@pytest.mark.parametrize("name", RECORDS)
def test_unpack_refuses_other_lengths(name):
    record, config = RECORDS[name], CONFIGS[0]
    size = record.wire_bytes(config)
    for wrong in (size - 1, size + 1):
        with raises(ValueError, f"{name} must be {size} bytes, not {wrong}"):
            record.unpack(config, bytes(wrong))


def test_known_bytes():
    config = CONFIGS[1]
    assert RECORDS["Route"].pack(config, 0, 5, (1, 2, 3, 258)) == bytes.fromhex(
        "00 05 0100 0200 0300 0201"
    )
    assert RECORDS["RegisterWrite"].pack(config, 0x11, 0x01020304) == bytes.fromhex("1100 04030201")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model.name)
@pytest.mark.parametrize("name", RECORDS)
def test_fields_fit_on_the_wire(name, config):
    for field in RECORDS[name].fields:
        assert 1 <= field.bits(config) <= field.wire_bits
        assert field.wire_bits in (8, 16, 32, 64)
        assert field.description.endswith(".")


def test_field_by_name():
    record = RECORDS["Release"]
    assert record.field("layer").wire_bits == 8
    with raises(ValueError, "Field of Release must be one of ctx, layer, not 'expert'"):
        record.field("expert")


def test_field_of_fixed_width_ignores_the_configuration():
    field = Field(name="x", kind=5, wire_bits=8, description="Anything.")
    assert [field.bits(config) for config in CONFIGS] == [5, 5, 5]
    assert field.length(CONFIGS[0]) == 1


def test_message_codes_are_unique_and_never_zero():
    codes = [message.code for message in MESSAGES.values()]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 256 for code in codes)


def test_message_by_code():
    for message in MESSAGES.values():
        assert message_by_code(message.code) is message
    assert message_by_code(0) is None
    assert message_by_code(0xFF) is None


def test_message_by_name():
    assert message_by_name("ROUTE") is MESSAGES["ROUTE"]
    with raises(ValueError, f"Message must be one of {', '.join(MESSAGES)}, not 'WAIT'"):
        message_by_name("WAIT")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model.name)
def test_every_message_fits_into_a_frame(config):
    for message in MESSAGES.values():
        assert FRAME_OVERHEAD + message.body_bytes(config) <= MAX_FRAME_BYTES
    assert MESSAGES["LINK_ACK"].body_bytes(config) == 0


def test_longest_body_fits_into_a_frame():
    longest = DeviceConfig(
        model=preset("tiny").__class__(name="widest", layers=255, experts=1024, top_k=16),
        slots=65535,
        data_bytes=64,
    )
    for message in MESSAGES.values():
        assert FRAME_OVERHEAD + message.body_bytes(longest) <= MAX_FRAME_BYTES


def test_every_error_has_a_text():
    assert set(ERROR_TEXT) == set(ErrorCode)
    assert all(text.endswith(".") for text in ERROR_TEXT.values())
