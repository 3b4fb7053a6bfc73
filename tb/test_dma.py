# amaranth: UnusedElaboratable=no
"""DMA engine and block memory (the half that pytest runs)."""

from pathlib import Path

import pytest
from amaranth.sim import Simulator

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.dma import DMA, AXI4ReadSignature, AXIBlockMemory
from prestage_hw.dma.arbiter import Arbiter
from prestage_hw.dma.backend import BackEnd
from prestage_hw.dma.frontend import FrontEnd
from prestage_hw.dma.midend import MidEnd
from prestage_hw.dma.order import OrderLists
from prestage_hw.dma.settings import Settings
from prestage_hw.dma.watchdog import Watchdog
from prestage_tb import dma_bench
from prestage_tb.axi import pattern
from prestage_tb.bench import run_bench

HERE = Path(__file__).parent

#: Configurations whose benches take minutes.
_SOAK = ("wide", "short-bursts")

CONFIGS = {
    "tiny": TINY_DEVICE,
    "gpt-oss-20b": DeviceConfig(model=preset("gpt-oss-20b"), slots=64),
    "wide": DeviceConfig(
        model=preset("olmoe-1b-7b"),
        slots=24,
        data_bytes=64,
        address_bits=32,
        outstanding_bursts=8,
        burst_beats=256,
        expert_bytes=3 * 8192,
        tile_bytes=8192,
        dma_channels=7,
        axi_ids=3,
        dma_queue_depth=2,
    ),
    "short-bursts": DeviceConfig(
        model=preset("tiny"),
        slots=5,
        data_bytes=32,
        address_bits=17,
        outstanding_bursts=16,
        burst_beats=1,
        expert_bytes=512,
        dma_channels=2,
        axi_ids=1,
    ),
    "slots-in-memory": TINY_DEVICE.replace(
        slot_store="axi", data_bytes=16, outstanding_bursts=8, expert_bytes=2048, tile_bytes=1024
    ),
    "one-credit": DeviceConfig(
        model=preset("tiny"),
        slots=5,
        data_bytes=64,
        address_bits=36,
        outstanding_bursts=1,
        burst_beats=8,
        expert_bytes=1536,
        dma_channels=1,
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.soak if name in _SOAK else ()) for name in CONFIGS],
)
def test_dma(name):
    config = CONFIGS[name]
    run_bench(
        DMA(config=config),
        module=HERE / "cocotb_dma.py",
        name="dma",
        parameters={"config": config},
    )


#: Parts whose rows are shorter than a tile, longer, a whole fraction of it, and none.
_ROWS = TINY_DEVICE.replace(
    expert_bytes=4608,
    parts=(1536, 1536, 1024, 512),
    rows=((48, 80), (768, 1024), (64, 640), ()),
)


def test_rows():
    """Tiles whose part says what rows they lie in."""
    run_bench(
        DMA(config=_ROWS),
        module=HERE / "cocotb_dma.py",
        name="dma",
        parameters={"config": _ROWS},
        testcase=[
            "rows/stall=some",
            "rows_wrap",
            "lockstep/stall=some/reorder=0.1",
            "aborts/stall=some",
            "settings_refused",
            "launch_latency",
            "reset_in_flight",
        ],
    )


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_arbiter(name):
    config = CONFIGS[name]
    run_bench(
        Arbiter(config=config),
        module=HERE / "cocotb_dma_arbiter.py",
        name="dma_arbiter",
        parameters={"config": config},
    )


@pytest.mark.parametrize("name", ["tiny", "gpt-oss-20b"])
def test_block_memory(name):
    config = CONFIGS[name]
    size = 9 * 1024 + config.data_bytes
    run_bench(
        AXIBlockMemory(config=config, init=pattern(0, size)),
        module=HERE / "cocotb_rom.py",
        name="rom",
        parameters={"config": config, "size": size},
    )


@pytest.mark.parametrize("block", [DMA, FrontEnd, Settings, Arbiter, Watchdog])
def test_bad_config(block):
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 'tiny'"):
        block(config="tiny")


@pytest.mark.parametrize("block", [MidEnd, BackEnd])
def test_bad_tile_limit(block):
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        block(config=None, tiles=4)
    with pytest.raises(ValueError, match="Tile limit must be a positive integer, not 0"):
        block(config=TINY_DEVICE, tiles=0)


def test_bad_lists():
    with pytest.raises(TypeError, match="List count must be an integer, not '2'"):
        OrderLists(lists="2", entries=4)
    with pytest.raises(ValueError, match="Entry count must be a positive integer, not 0"):
        OrderLists(lists=2, entries=0)


def test_bad_block_memory():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 4"):
        AXIBlockMemory(config=4, init=bytes(16))
    for size in (0, 10):
        with pytest.raises(
            ValueError,
            match=f"Memory contents must be a whole number of 4-byte beats, not {size} bytes",
        ):
            AXIBlockMemory(config=TINY_DEVICE, init=bytes(size))


def test_axi_signature():
    signature = AXI4ReadSignature(address_bits=32, data_bits=64)
    assert signature == AXI4ReadSignature(address_bits=32, data_bits=64, id_bits=1)
    assert signature != AXI4ReadSignature(address_bits=32, data_bits=32)
    assert signature.data_bytes == 8
    assert "address_bits=32, data_bits=64" in repr(signature)
    with pytest.raises(TypeError, match="Address width must be an integer, not '32'"):
        AXI4ReadSignature(address_bits="32", data_bits=32)
    with pytest.raises(ValueError, match="Address width must be between 12 and 64 bits, not 65"):
        AXI4ReadSignature(address_bits=65, data_bits=32)
    with pytest.raises(ValueError, match="Data width must be a power of two"):
        AXI4ReadSignature(address_bits=32, data_bits=24)
    with pytest.raises(ValueError, match="ID width must be at least 1 bit, not 0"):
        AXI4ReadSignature(address_bits=32, data_bits=32, id_bits=0)


def test_bars(tmp_path):
    """What the benchmark measures keeps its bars."""
    result = dma_bench.measure(quick=True, output=tmp_path / "dma_bench.json")
    assert dma_bench.missed(result) == []
    result["launch_cycles"] = 5
    assert dma_bench.missed(result) == ["Launch must take at most 4 cycles, not 5"]


def test_a_time_out_that_meets_the_last_beat_spares_the_next_tile():
    """Each of two tiles completes once, in order, and as whole only with its own beat.

    The first tile's beat comes at about the time at which its channel expires, and the second
    tile begins at about that time: all offsets are tried.
    """
    config = DeviceConfig(
        model=preset("tiny"),
        slots=5,
        data_bytes=64,
        address_bits=16,
        expert_bytes=512,
        dma_channels=1,
    )
    dut = DMA(config=config)
    told = []

    async def bench(ctx):
        ctx.set(dut.timeout, 4)
        ctx.set(dut.writes.ready, 1)
        ctx.set(dut.completions.ready, 1)
        ctx.set(dut.bus.arready, 1)
        ctx.set(dut.bus.rlast, 1)
        for latency in range(1, 9):
            for wait in range(1, 13):
                offers = {0: 0, wait: 1}
                due, completed, written = {}, [], set()
                for cycle in range(80):
                    tag = offers.pop(cycle, None)
                    ctx.set(dut.fetches.valid, tag is not None)
                    if tag is not None:
                        fetch = {"tag": tag, "slot": tag, "address": 0x1000 * (tag + 1)}
                        ctx.set(dut.fetches.payload, {**fetch, "sized": 1, "bytes": 64})
                    ctx.set(dut.bus.rvalid, cycle in due)
                    if ctx.get(dut.bus.arvalid):
                        after = cycle + latency
                        while after in due:
                            after += 1
                        due[after] = ctx.get(dut.bus.araddr)
                    if ctx.get(dut.writes.valid):
                        written.add(ctx.get(dut.writes.payload.slot))
                    if ctx.get(dut.completions.valid):
                        record = dut.completions.payload
                        tag, failed = ctx.get(record.tag), ctx.get(record.failed)
                        completed.append(tag)
                        assert failed or tag in written, (latency, wait, tag)
                    await ctx.tick()
                assert completed == [0, 1], (latency, wait, completed)
                told.append(ctx.get(dut.expired))

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert len(told) == 96
