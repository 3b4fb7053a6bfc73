"""Benchmark of the DMA engine: ``python -m prestage_tb.dma_bench``.

Prints a table and writes ``build/dma_bench.json``; ``docs/dma.md`` says how each number is taken.
The half below :func:`main` runs in the simulator.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.dma import DMA
from prestage_hw.layouts import RecordLayout
from prestage_tb.axi import AXIMemory
from prestage_tb.bench import (
    StreamSink,
    StreamSource,
    cycles,
    parameters,
    reset,
    run_bench,
    start_clock,
)

__all__ = [
    "BARS",
    "DEVICE",
    "LATENCIES",
    "OUTSTANDING",
    "SIZES",
    "main",
    "measure",
    "missed",
    "show",
]

#: Device that is measured.
DEVICE = DeviceConfig(
    model=preset("gpt-oss-20b"),
    slots=64,
    expert_bytes=16384,
    tile_bytes=4096,
    data_bytes=16,
    outstanding_bursts=16,
    burst_beats=64,
    dma_channels=4,
    predictor="none",
)

#: Bytes of a transfer. Above a tile it is several requests.
SIZES = tuple(64 << n for n in range(11))

#: Cycles from an address to its first beat.
LATENCIES = (4, 16, 64, 256)

#: Bursts that may be outstanding.
OUTSTANDING = (1, 4, 16)

#: Least share of busy cycles at (size, latency, outstanding).
BARS = {(4096, 64, 16): 0.99, (1024, 64, 16): 0.95}

_ROOT = Path(__file__).resolve().parents[2]


def measure(*, quick: bool = False, output: Path) -> dict[str, object]:
    """Run the benchmark and give what it writes to ``output``.

    Parameters
    ----------
    quick : :class:`bool`
        Only the points that have bars.
    output : path
        File for the numbers.
    """
    points = [
        (size, latency, outstanding)
        for size in SIZES
        for latency in LATENCIES
        for outstanding in OUTSTANDING
        if not quick or (size, latency, outstanding) in BARS
    ]
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    run_bench(
        DMA(config=DEVICE),
        module="prestage_tb.dma_bench",
        name="dma",
        parameters={"config": DEVICE, "points": points, "output": str(output)},
    )
    result: dict[str, object] = json.loads(output.read_text())
    return result


def missed(result: dict) -> list[str]:
    """Bars that the numbers miss, a sentence each."""
    texts = []
    if result["launch_cycles"] > 4:
        texts.append(f"Launch must take at most 4 cycles, not {result['launch_cycles']}")
    if result["bubbles"]:
        texts.append(f"There must be no bubbles between tiles, not {result['bubbles']}")
    wait = result["demand_wait"]
    if wait["worst_beats"] > wait["tile_beats"]:
        texts.append(f"A demand must wait for at most a tile, not {wait['worst_beats']} beats")
    for point in result["utilisation"]:
        bar = BARS.get((point["size"], point["latency"], point["outstanding"]), 0)
        if point["share"] < bar:
            texts.append(f"Utilisation must be at least {bar}, but {point} is not")
    return texts


def _table(result: dict) -> str:
    """The utilisation, a row a size."""
    shares = {
        (p["size"], p["latency"], p["outstanding"]): p["share"] for p in result["utilisation"]
    }
    columns = sorted({key[1:] for key in shares})
    lines = [
        "latency " + " ".join(f"{latency:>6}" for latency, _ in columns),
        "bursts  " + " ".join(f"{outstanding:>6}" for _, outstanding in columns),
    ]
    for size in sorted({key[0] for key in shares}):
        cells = (shares.get((size, *column)) for column in columns)
        lines.append(
            f"{size:>6} B " + " ".join("     -" if c is None else f"{c:6.3f}" for c in cells)
        )
    return "\n".join(lines)


def show(result: dict) -> None:
    """Print the numbers."""
    wait = result["demand_wait"]
    print("Share of cycles with a beat, by size, memory latency and outstanding bursts:")
    print(_table(result))
    print(f"Launch: {result['launch_cycles']} cycles from request to address")
    print(f"Bubbles between tiles of 4 KiB: {result['bubbles']}")
    print(
        f"Demand behind prefetch: at most {wait['worst_beats']} of {wait['tile_beats']} beats"
        f" (a tile), {wait['worst_cycles']} cycles; {wait['alone_cycles']} cycles alone"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and compare with the bars; the status is 1 if one is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_tb.dma_bench", description="Measure the DMA engine."
    )
    parser.add_argument("--quick", action="store_true", help="only what has a bar")
    parser.add_argument("--output", type=Path, default=_ROOT / "build" / "dma_bench.json")
    options = parser.parse_args(arguments)
    result = measure(quick=options.quick, output=options.output)
    show(result)
    texts = missed(result)
    for text in texts:
        print(text, file=sys.stderr)
    return 1 if texts else 0


# --- in the simulator


class _Device:
    """The engine between a source of requests and a memory."""

    def __init__(self, dut, *, latency):
        self.dut = dut
        self.config = config = parameters()["config"]
        start_clock(dut)
        self.fetches = StreamSource(dut, "fetches", RecordLayout("FetchRequest", config=config))
        self.settings = StreamSource(
            dut, "settings", RecordLayout("ChannelSettings", config=config)
        )
        self.writes = StreamSink(dut, "writes", RecordLayout("BufferWrite", config=config))
        self.completions = StreamSink(dut, "completions", RecordLayout("Completion", config=config))
        self.memory = AXIMemory(
            dut,
            data=lambda address, size: bytes(size),
            data_bytes=config.data_bytes,
            address_bits=config.address_bits,
            latency=latency,
        )
        for name in ("commit", "abort", "abort_all", "abort_tag", "timeout", "lower_credits"):
            getattr(dut, name).value = 0
        self.number = 0

    def transfer(self, size, *, channel=0):
        """Requests for the next ``size`` bytes."""
        tile = self.config.tile_bytes
        count = -(-size // tile)
        for _ in range(count):
            self.fetches.send(
                {
                    "tag": 0,
                    "demand": 1,
                    "slot": 0,
                    "tile": 0,
                    "address": self.number * tile,
                    "channel": channel,
                    "sized": 1,
                    "bytes": min(size, tile),
                }
            )
            self.number += 1
        return count

    async def limit(self, credits):
        """Give channel 0 this many bursts."""
        self.settings.send(
            {
                "channel": 0,
                "enable": 1,
                "traffic": 0,
                "weight": 1,
                "burst_beats": self.config.longest_burst,
                "credits": credits,
                "row_bytes": 0,
                "row_stride": 0,
            }
        )
        await self.settings.sent()
        self.dut.commit.value = 1
        await cycles(self.dut)
        self.dut.commit.value = 0
        await cycles(self.dut, 8)


def _store(**numbers):
    path = Path(parameters()["output"])
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stored, **numbers}, indent=1) + "\n")


@cocotb.test()
async def launch(dut):
    Path(parameters()["output"]).unlink(missing_ok=True)
    device = _Device(dut, latency=4)
    await reset(dut)
    await cycles(dut, 10)
    device.transfer(4096)
    accepted = None
    for cycle in range(100):
        await FallingEdge(dut.clk)
        if accepted is None and str(dut.fetches__valid.value) == "1":
            accepted = cycle
        if str(dut.bus__arvalid.value) == "1":
            break
        await RisingEdge(dut.clk)
    config = device.config
    _store(
        device={
            "data_bytes": config.data_bytes,
            "tile_bytes": config.tile_bytes,
            "burst_beats": config.longest_burst,
            "channels": config.dma_channels,
        },
        launch_cycles=cycle - accepted,
    )


@cocotb.test()
async def bubbles(dut):
    device = _Device(dut, latency=64)
    await reset(dut)
    count = sum(device.transfer(4096) for _ in range(12))
    await device.completions.receive(count)
    beats = device.memory.beat_cycles
    _store(bubbles=beats[-1] - beats[0] + 1 - len(beats))


@cocotb.test()
async def demand_wait(dut):
    """Prefetches on all other channels, without an end; demands at random moments."""
    device = _Device(dut, latency=64)
    await reset(dut)
    config = device.config
    generator = random.Random(1)
    worst = {"worst_beats": 0, "worst_cycles": 0}
    device.transfer(config.tile_bytes)
    await device.completions.receive(1)
    first = device.memory.transfers[0]
    alone = first.start - first.asked + DMA.launch_latency + 1
    for _ in range(40):
        for _ in range(4 * config.dma_queue_depth):
            device.transfer(config.tile_bytes, channel=generator.randrange(1, config.dma_channels))
        await cycles(dut, generator.randrange(100, 1500))
        while device.fetches.pending:
            await cycles(dut)
        device.transfer(config.tile_bytes)
        address = (device.number - 1) * config.tile_bytes
        await device.fetches.sent()
        accepted = device.memory.cycle
        while not any(t.address == address and t.start >= 0 for t in device.memory.transfers):
            await cycles(dut)
        (start,) = (t.start for t in device.memory.transfers if t.address == address)
        beats = sum(accepted < at < start for at in device.memory.beat_cycles)
        worst["worst_beats"] = max(worst["worst_beats"], beats)
        worst["worst_cycles"] = max(worst["worst_cycles"], start - accepted)
        while str(dut.idle.value) != "1":
            await cycles(dut)
    _store(demand_wait={**worst, "tile_beats": config.tile_beats, "alone_cycles": alone})


@cocotb.test()
async def utilisation(dut):
    """Back-to-back transfers, without the first ones."""
    device = _Device(dut, latency=1)
    await reset(dut)
    config = device.config
    result = []
    for size, latency, outstanding in parameters()["points"]:
        device.memory.latency = latency
        await device.limit(outstanding)
        # About four memory latencies, all credits used at least twice, and 2,000 beats at most.
        beats = size // config.data_bytes
        count = max(8, 3 * outstanding, 600 // beats)
        if size > config.tile_bytes:
            count = 8
        begun = len(device.memory.transfers)
        requests = sum(device.transfer(size) for _ in range(count))
        await device.completions.receive(requests, limit=1_000_000)
        bursts = device.memory.transfers[begun:]
        # Credits make bursts come in groups, so that only whole groups are looked at.
        groups = max(1, (len(bursts) * 2 // 3) // outstanding)
        first, last = bursts[-1 - groups * outstanding], bursts[-1]
        moved = sum(burst.beats for burst in bursts[-1 - groups * outstanding : -1])
        result.append(
            {
                "size": size,
                "latency": latency,
                "outstanding": outstanding,
                "share": round(moved / (last.start - first.start), 4),
            }
        )
        device.memory.beat_cycles.clear()
        device.writes.clear()
    _store(utilisation=result)


if __name__ == "__main__":
    sys.exit(main())
