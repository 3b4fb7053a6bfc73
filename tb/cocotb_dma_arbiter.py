"""Arbiter of the DMA engine in lockstep with its golden model (the simulator's half)."""

import random

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_sim.model.dma import Arbiter
from prestage_tb.bench import cycles, parameters, reset, start_clock
from prestage_tb.coverage import hit


def pack(values, bits):
    return sum(value << (bits * at) for at, value in enumerate(values))


@cocotb.test()
async def choices(dut):
    generator = random.Random(cocotb.RANDOM_SEED)
    channels = parameters()["config"].dma_channels
    golden = Arbiter(channels)
    start_clock(dut)
    dut.take.value = 0
    await reset(dut)
    traffic, weights, share = [0] * channels, [1] * channels, 0.5
    dut.traffic.value = 0
    dut.weight.value = pack(weights, 4)
    await cycles(dut, 2)
    take, since = False, 2
    for cycle in range(3000):
        if cycle % 100 == 99:
            # A class counts from the cycle after, and so do grants.
            traffic = [generator.randrange(3) for _ in range(channels)]
            weights = [generator.randrange(1, 16) for _ in range(channels)]
            dut.take.value = 0
            await RisingEdge(dut.clk)
            await RisingEdge(dut.clk)
            dut.traffic.value = pack(traffic, 2)
            dut.weight.value = pack(weights, 4)
            await RisingEdge(dut.clk)
            await RisingEdge(dut.clk)
            take, since = False, 2
            share = generator.choice((0.2, 0.6, 1.0))
        wants = [c for c in range(channels) if generator.random() < share]
        # Grants are counted in the two cycles after.
        since = 0 if take else since + 1
        take = since >= 2 and generator.random() < 0.8
        dut.wants.value = sum(1 << c for c in wants)
        dut.take.value = int(take)
        await FallingEdge(dut.clk)
        before = list(golden.left)
        chosen = golden.choose(wants, traffic, weights)
        if not take:
            golden.left = before
        expected = 0 if chosen is None else 1 << chosen
        assert since < 2 or int(dut.choice.value) == expected, (
            f"cycle {cycle}: {wants} of {traffic}"
        )
        await RisingEdge(dut.clk)
    hit("dma.arbiter")
