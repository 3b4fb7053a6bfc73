# amaranth: UnusedElaboratable=no
"""The serial line of the boards, in Amaranth's simulator.

::

    host (bits by hand) ── rx_pin ──▶ UART ──▶ received
                        ◀── tx_pin ──      ◀── sent
"""

import random

import pytest
from amaranth.sim import Simulator

from prestage_fpga.uart import UART

CLOCK_HZ = 1_600_000
BAUD = 100_000
DIVISOR = 16


def _simulate(dut, *benches):
    """Run until the last of the benches ends."""
    sim = Simulator(dut)
    sim.add_clock(1 / CLOCK_HZ)
    for bench in benches:
        sim.add_testbench(bench)
    sim.run()


async def _send(ctx, dut, data, *, bit=DIVISOR, stop=1, gap=0):
    """Bytes on the line with bits of ``bit`` clock cycles, which may be a fraction."""
    now = 0.0
    passed = 0
    for byte in data:
        for level in (0, *(byte >> n & 1 for n in range(8)), stop):
            ctx.set(dut.rx_pin, level)
            now += bit
            await ctx.tick().repeat(max(1, int(now) - passed))
            passed = max(passed + 1, int(now))
        ctx.set(dut.rx_pin, 1)
        if gap:
            await ctx.tick().repeat(gap)
            now += gap
            passed += gap


@pytest.mark.parametrize("bit", [15.36, 15.7, 16, 16.3, 16.64])
def test_receive_bears_four_percent(bit):
    dut = UART(clock_hz=CLOCK_HZ, baud=BAUD, buffer_bytes=64)
    data = bytes(random.Random(1).randrange(256) for _ in range(40)) + b"\0\xff\x55\xaa"
    got = []
    strobes = []

    async def host(ctx):
        await ctx.tick().repeat(5)
        await _send(ctx, dut, data, bit=bit)
        await ctx.tick().repeat(4 * DIVISOR)
        while ctx.get(dut.received.valid):
            ctx.set(dut.received.ready, 1)
            got.append(ctx.get(dut.received.payload))
            await ctx.tick()
        ctx.set(dut.received.ready, 0)

    async def watch(ctx):
        for _ in range(int(len(data) * 10 * 16.64) + 100):
            strobes.append(ctx.get(dut.framing) | ctx.get(dut.overflow))
            await ctx.tick()

    _simulate(dut, host, watch)
    assert bytes(got) == data
    assert not any(strobes)


@pytest.mark.parametrize("bit", [14, 18.5])
def test_receive_does_not_bear_twelve_percent(bit):
    """The tolerance test above can fail."""
    dut = UART(clock_hz=CLOCK_HZ, baud=BAUD)
    data = b"\x5a\xc3\x01\x80"
    got = []

    async def host(ctx):
        await _send(ctx, dut, data, bit=bit)
        await ctx.tick().repeat(20 * DIVISOR)
        while ctx.get(dut.received.valid):
            ctx.set(dut.received.ready, 1)
            got.append(ctx.get(dut.received.payload))
            await ctx.tick()

    _simulate(dut, host)
    assert bytes(got) != data


def test_framing_error():
    dut = UART(clock_hz=CLOCK_HZ, baud=BAUD)
    framing = []
    got = []

    async def host(ctx):
        await _send(ctx, dut, b"\x11", gap=20)
        await _send(ctx, dut, b"\x22", stop=0, gap=20)
        await _send(ctx, dut, b"\x33", gap=20)
        # A line that stays low is one error, not one for each ten bits.
        ctx.set(dut.rx_pin, 0)
        await ctx.tick().repeat(50 * DIVISOR)
        ctx.set(dut.rx_pin, 1)
        await ctx.tick().repeat(2 * DIVISOR)
        # Shorter than half a bit: noise.
        ctx.set(dut.rx_pin, 0)
        await ctx.tick().repeat(DIVISOR // 2 - 2)
        ctx.set(dut.rx_pin, 1)
        await ctx.tick().repeat(2 * DIVISOR)
        await _send(ctx, dut, b"\x44", gap=20)
        while ctx.get(dut.received.valid):
            ctx.set(dut.received.ready, 1)
            got.append(ctx.get(dut.received.payload))
            await ctx.tick()

    async def watch(ctx):
        for _ in range(120 * DIVISOR):
            framing.append(ctx.get(dut.framing))
            await ctx.tick()

    _simulate(dut, host, watch)
    assert bytes(got) == b"\x11\x33\x44"
    assert sum(framing) == 2


def test_overflow():
    dut = UART(clock_hz=CLOCK_HZ, baud=BAUD, buffer_bytes=4)
    overflow = []
    got = []

    async def host(ctx):
        await _send(ctx, dut, range(10), gap=4)
        while ctx.get(dut.received.valid):
            ctx.set(dut.received.ready, 1)
            got.append(ctx.get(dut.received.payload))
            await ctx.tick()

    async def watch(ctx):
        for _ in range(110 * DIVISOR):
            overflow.append(ctx.get(dut.overflow))
            await ctx.tick()

    _simulate(dut, host, watch)
    assert len(got) + sum(overflow) == 10
    assert got == list(range(len(got))) and 4 <= len(got) <= 5


def test_send():
    dut = UART(clock_hz=CLOCK_HZ, baud=BAUD)
    data = b"\x00\xff\x55\x01\x80\x7e"
    levels = []
    done = []

    async def device(ctx):
        for byte in data:
            ctx.set(dut.sent.payload, byte)
            ctx.set(dut.sent.valid, 1)
            await ctx.tick().until(dut.sent.ready)
            ctx.set(dut.sent.valid, 0)
        await ctx.tick().repeat(12 * DIVISOR)
        done.append(True)

    async def line(ctx):
        while not done:
            levels.append(ctx.get(dut.tx_pin))
            await ctx.tick()

    _simulate(dut, device, line)
    got = []
    at = 0
    while 0 in levels[at:]:
        at = levels.index(0, at)
        bits = [levels[at + DIVISOR // 2 + DIVISOR * n] for n in range(10)]
        # Every bit is as long as every other.
        for n in range(10):
            assert set(levels[at + DIVISOR * n : at + DIVISOR * (n + 1)]) == {bits[n]}
        assert bits[9] == 1
        got.append(sum(bit << n for n, bit in enumerate(bits[1:9])))
        at += DIVISOR * 10
    assert bytes(got) == data


def test_loopback_at_the_board_rate():
    dut = UART(clock_hz=50_000_000, baud=1_000_000)
    assert dut.divisor == 50
    data = bytes(random.Random(2).randrange(256) for _ in range(8))
    got = []

    async def device(ctx):
        for byte in data:
            ctx.set(dut.sent.payload, byte)
            ctx.set(dut.sent.valid, 1)
            await ctx.tick().until(dut.sent.ready)
            ctx.set(dut.sent.valid, 0)

    async def wire(ctx):
        for _ in range(len(data) * 510 + 200):
            ctx.set(dut.rx_pin, ctx.get(dut.tx_pin))
            if ctx.get(dut.received.valid):
                got.append(ctx.get(dut.received.payload))
            ctx.set(dut.received.ready, 1)
            await ctx.tick()

    _simulate(dut, device, wire)
    assert bytes(got) == data


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"clock_hz": 0}, ValueError, "Clock frequency must be positive, not 0"),
        ({"clock_hz": 5e7}, TypeError, "Clock frequency must be an integer, not 50000000.0"),
        ({"baud": -1}, ValueError, "Baud rate must be positive, not -1"),
        ({"baud": 10_000_000}, ValueError, "at most an eighth of the clock's 50000000 Hz"),
        ({"baud": 3_000_000}, ValueError, "must divide the clock's 50000000 Hz to 1 %"),
        ({"buffer_bytes": 1}, ValueError, "Buffer size must be between 2 and 4096 bytes, not 1"),
    ],
)
def test_bad_parameters(parameters, error, message):
    with pytest.raises(error, match=message):
        UART(**({"clock_hz": 50_000_000, "baud": 1_000_000} | parameters))
