# amaranth: UnusedElaboratable=no
"""The board's device at its serial line: frames go in and an expert's bytes come out as bits."""

import pytest
from amaranth.sim import Simulator

from prestage_fpga.device import SerialDevice
from prestage_fpga.ecpix5 import ECPIX5Device
from prestage_hw.contract import MESSAGES, decode_frame, encode_frame, register_by_name
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.pattern import expert_pattern
from prestage_hw.contract.records import message_by_code
from prestage_hw.contract.registers import DEVICE_ID

CONFIG = TINY_DEVICE
DIVISOR = 8


def _frames():
    for sequence, (name, values) in enumerate(
        (
            ("REGISTER_READ", (register_by_name("device_id").address,)),
            ("ROUTE", (1, 2, (5, 3))),
            ("SYNC", (77,)),
        )
    ):
        message = MESSAGES[name]
        body = message.record.pack(CONFIG, *values)
        yield encode_frame(message.code, sequence=sequence, acknowledge=0, body=body)


def test_expert_over_the_line():
    dut = SerialDevice(config=CONFIG, clock_hz=8_000_000, baud=1_000_000)
    replies = []
    waiting = list(_frames())

    async def send(ctx):
        while waiting or not replies or replies[-1][0] != "DATA":
            if not waiting:
                await ctx.tick().repeat(100)
                continue
            for byte in waiting.pop(0):
                for level in (0, *(byte >> n & 1 for n in range(8)), 1):
                    ctx.set(dut.rx_pin, level)
                    await ctx.tick().repeat(DIVISOR)

    async def receive(ctx):
        stuffed = bytearray()
        while not replies or replies[-1][0] != "DATA":
            await ctx.tick().until(~dut.tx_pin)
            await ctx.tick().repeat(DIVISOR + DIVISOR // 2 - 1)
            byte = 0
            for n in range(8):
                byte |= ctx.get(dut.tx_pin) << n
                await ctx.tick().repeat(DIVISOR)
            assert ctx.get(dut.tx_pin) == 1
            if byte:
                stuffed.append(byte)
                continue
            code, sequence, _, body = decode_frame(bytes(stuffed))
            stuffed.clear()
            message = message_by_code(code)
            if message.record is None:
                continue
            values = message.record.unpack(CONFIG, body)
            replies.append((message.name, values))
            if message.name == "SYNCED":
                slot = next(v["slot"] for n, v in replies if n == "READY" and v["expert"] == 3)
                read = MESSAGES["READ"]
                body = read.record.pack(CONFIG, slot, 9, 1)
                waiting.append(
                    encode_frame(read.code, sequence=3, acknowledge=sequence + 1, body=body)
                )

    sim = Simulator(dut)
    sim.add_clock(1 / 8_000_000)
    sim.add_testbench(send)
    sim.add_testbench(receive)
    sim.run()
    assert replies[0] == ("REGISTER_VALUE", {"register": 0, "value": DEVICE_ID})
    ready = sorted((v["ctx"], v["layer"], v["expert"]) for n, v in replies if n == "READY")
    assert ready == [(1, 2, 3), (1, 2, 5)]
    assert ("SYNCED", {"tag": 77}) in replies
    data = replies[-1][1]
    assert data["ok"] == 1 and data["beat"] == 9
    expected = expert_pattern(2, 3, size=CONFIG.expert_bytes)[9 * 4 : 10 * 4]
    assert bytes(data["data"]) == expected.tobytes()


def test_bad_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        SerialDevice(config=None, clock_hz=50_000_000, baud=1_000_000)
    for clock_hz in (5_000_000, 70_000_000):
        with pytest.raises(ValueError, match=f"Clock must be 600 MHz .* not {clock_hz} Hz"):
            ECPIX5Device(clock_hz=clock_hz)
