# amaranth: UnusedElaboratable=no
"""Counters of DMA channels: random strobes against plain sums.

::

    strobes, clear ─▶ ChannelCounters ◀─ address
        │                  └─▶ value ─▶ compare
        └──▶ sums ──────────────────────┘
"""

import random

import cocotb
import pytest
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.registers import CHANNEL_COUNTERS
from prestage_hw.stats import ChannelCounters
from prestage_tb.bench import cycles, parameters, reset, run_bench, start_clock
from prestage_tb.coverage import hit

_KINDS = len(CHANNEL_COUNTERS)


async def _read(dut, channels):
    """All counters, channel by channel."""
    found = []
    for channel in range(channels):
        for number in range(_KINDS):
            dut.address.value = channel << 3 | number
            await RisingEdge(dut.clk)
            await FallingEdge(dut.clk)
            found.append(int(dut.value.value))
    return found


@cocotb.test()
async def counts(dut):
    """Strobes of any number of channels at once, clears and resets at any moment."""
    config = parameters()["config"]
    latency = ChannelCounters(config=config).latency
    rng = random.Random(cocotb.RANDOM_SEED)
    bits = config.dma_channels * _KINDS
    start_clock(dut)
    dut.strobes.value = dut.clear.value = dut.address.value = 0
    await reset(dut)
    for run in range(12):
        sums = [0] * bits
        # At first every strobe in every cycle, the most that a turn has to take.
        rate = [1.0, 0.0, rng.random()][min(run, 2)]
        for _ in range(rng.randrange(1, 5 * latency)):
            await FallingEdge(dut.clk)
            strobes = [rng.random() < rate for _ in range(bits)]
            cleared = rng.random() < 0.005
            dut.strobes.value = sum(strobe << at for at, strobe in enumerate(strobes))
            dut.clear.value = cleared
            sums = [0] * bits if cleared else [a + b for a, b in zip(sums, strobes, strict=True)]
        await FallingEdge(dut.clk)
        dut.strobes.value = dut.clear.value = 0
        await cycles(dut, latency)
        await FallingEdge(dut.clk)
        assert await _read(dut, config.dma_channels) == sums
        if rng.random() < 0.3:
            await reset(dut)
        else:
            dut.clear.value = 1
            await RisingEdge(dut.clk)
            await FallingEdge(dut.clk)
            dut.clear.value = 0
        if rng.random() < 0.5:  # Else strobes come while rows are being cleared.
            await cycles(dut, latency)
            await FallingEdge(dut.clk)
            assert not any(await _read(dut, config.dma_channels))
    hit("dma.channel_counters")


@pytest.mark.parametrize("channels", [4, 1, pytest.param(8, marks=pytest.mark.soak)])
def test_channels(channels):
    config = TINY_DEVICE.replace(dma_channels=channels, axi_ids=0)
    run_bench(
        lambda: ChannelCounters(config=config),
        module=__file__,
        name="channels",
        parameters={"config": config},
    )


def test_rejects_what_is_no_configuration():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        ChannelCounters(config=3)
