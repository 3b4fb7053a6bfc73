# amaranth: UnusedElaboratable=no
"""The memory behind AXI4 that simulations give a device, against an array of bytes."""

import random

import pytest
from amaranth.sim import Simulator

from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.dma.ram import AXIMemory

SIZE = 256


async def _read(ctx, bus, chance, address, beats, number):
    """Beats of a burst, each ``(data, response)``."""
    ctx.set(bus.araddr, address)
    ctx.set(bus.arlen, beats - 1)
    ctx.set(bus.arid, number)
    ctx.set(bus.arvalid, 1)
    await ctx.tick().until(bus.arready)
    ctx.set(bus.arvalid, 0)
    found = []
    while len(found) < beats:
        ready = chance.random() < 0.6
        ctx.set(bus.rready, ready)
        _, _, valid, data, response, last, got = await ctx.tick().sample(
            bus.rvalid, bus.rdata, bus.rresp, bus.rlast, bus.rid
        )
        if ready and valid:
            found.append((data, response))
            assert last == (len(found) == beats) and got == number
    ctx.set(bus.rready, 0)
    return found


async def _write(ctx, bus, chance, address, words, strobes, number):
    """Response to a burst."""
    ctx.set(bus.awaddr, address)
    ctx.set(bus.awid, number)
    ctx.set(bus.awvalid, 1)
    await ctx.tick().until(bus.awready)
    ctx.set(bus.awvalid, 0)
    for at, (word, strobe) in enumerate(zip(words, strobes, strict=True)):
        await ctx.tick().repeat(chance.randrange(1, 3))
        ctx.set(bus.wdata, word)
        ctx.set(bus.wstrb, strobe)
        ctx.set(bus.wlast, at == len(words) - 1)
        ctx.set(bus.wvalid, 1)
        await ctx.tick().until(bus.wready)
        ctx.set(bus.wvalid, 0)
    ctx.set(bus.bready, 1)
    response, got = await ctx.tick().sample(bus.bresp, bus.bid).until(bus.bvalid)
    ctx.set(bus.bready, 0)
    assert got == number
    return response


def test_bursts():
    memory = AXIMemory(config=TINY_DEVICE, size=SIZE)
    width = TINY_DEVICE.data_bytes
    chance = random.Random(1)
    mirror = bytearray(SIZE)

    async def bench(ctx):
        failed = 0
        for _ in range(150):
            address = chance.randrange(SIZE // width) * width
            beats = chance.randrange(1, 9)
            number = chance.randrange(2)
            inside = [address + at * width < SIZE for at in range(beats)]
            if chance.random() < 0.5:
                words = [chance.getrandbits(8 * width) for _ in range(beats)]
                strobes = [chance.getrandbits(width) for _ in range(beats)]
                response = await _write(ctx, memory.bus, chance, address, words, strobes, number)
                assert response == (0 if all(inside) else AXIMemory.RESPONSE_DECERR)
                for at, (word, strobe) in enumerate(zip(words, strobes, strict=True)):
                    for byte in range(width):
                        if inside[at] and strobe >> byte & 1:
                            mirror[address + at * width + byte] = word >> 8 * byte & 0xFF
            else:
                found = await _read(ctx, memory.bus, chance, address, beats, number)
                for at, (data, response) in enumerate(found):
                    assert response == (0 if inside[at] else AXIMemory.RESPONSE_DECERR)
                    if inside[at]:
                        part = mirror[address + at * width : address + (at + 1) * width]
                        assert data == int.from_bytes(part, "little")
            failed += not all(inside)
        assert failed > 5 and any(mirror)

    simulator = Simulator(memory)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def test_refuses():
    with pytest.raises(ValueError, match="whole number of 4-byte beats, not 6 bytes"):
        AXIMemory(config=TINY_DEVICE, size=6)
    with pytest.raises(ValueError, match="Memory size must be between 4 and 4294967296, not 0"):
        AXIMemory(config=TINY_DEVICE, size=0)
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        AXIMemory(config=3, size=64)
