"""Every error of the device has an exception that names what it is about."""

import pytest

from prestage.errors import DEVICE_ERRORS, DeviceError, LinkError, PrestageError, device_error
from prestage_hw.contract.records import ERROR_TEXT, ErrorCode


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code(code):
    error = device_error(code, ctx=1, layer=2, expert=345, address=0x678)
    assert type(error) is DEVICE_ERRORS[code]
    assert isinstance(error, PrestageError)
    assert (error.code, error.ctx, error.layer, error.expert) == (code, 1, 2, 345)
    assert error.address == 0x678
    assert str(error).startswith(f"{ERROR_TEXT[code]} ({code.name}: ")


def test_errors_name_expert_and_address():
    text = str(device_error(ErrorCode.BUS, ctx=1, layer=2, expert=345, address=0x678))
    assert "context 1, layer 2, expert 345, address 0x678" in text


def test_unknown_code():
    error = device_error(77, ctx=0, layer=0, expert=0, address=0)
    assert isinstance(error, LinkError)
    assert not isinstance(error, DeviceError)
