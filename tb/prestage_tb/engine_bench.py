"""Benchmarks of the engine: ``python -m prestage_tb.engine_bench``, which ``make bench`` calls.

Prints tables and writes ``build/bench.json``: the DMA engine (:mod:`prestage_tb.dma_bench`), the
search for a victim by policy, and routing decisions through the whole device. Cycles are exact. The
half below :func:`main` runs in the simulator.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import cocotb
from cocotb.triggers import FallingEdge

from prestage_hw.buffer import ExpertBuffer
from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.records import BufferCode, BufferOp, Policy
from prestage_hw.layouts import RecordLayout
from prestage_tb import dma_bench
from prestage_tb.bench import StreamSink, StreamSource, parameters, reset, run_bench, start_clock
from prestage_tb.compiled import bench as compiled_bench
from prestage_tb.compiled.build import ENGINES

__all__ = ["BUFFER", "main", "measure_victims"]

#: Buffer whose searches are measured.
BUFFER = DeviceConfig(
    model=preset("gpt-oss-20b"), slots=192, predictor="perceptron", expert_bytes=512
)

#: Clock that cycles are turned into decisions a second with, in MHz: the target on an ECP5.
CLOCK_MHZ = 100

_ROOT = Path(__file__).resolve().parents[2]
_DEMANDS = 400


def measure_victims(*, output: Path) -> list[dict[str, object]]:
    """Cycles from a request that finds no slot for its expert to its result, for each policy, with
    what the buffer states where no slot has to be skipped.

    Parameters
    ----------
    output : path
        File for the numbers.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    buffer = ExpertBuffer(config=BUFFER, valued=True)
    run_bench(
        buffer,
        module="prestage_tb.engine_bench",
        name="buffer",
        parameters={"config": BUFFER, "output": str(output)},
    )
    result: list[dict[str, object]] = json.loads(output.read_text())
    for row in result:
        by_order = row["policy"] == Policy.LRU.name
        row["stated"] = buffer.walk_latency if by_order else buffer.search_latency
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and compare with the bars; the status is 1 if one is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_tb.engine_bench",
        description="Measure the DMA engine, the buffer's searches and whole devices.",
        epilog="example: python -m prestage_tb.engine_bench --quick --json build/bench.json",
    )
    parser.add_argument("--quick", action="store_true", help="of the DMA engine what has a bar")
    parser.add_argument("--json", type=Path, default=_ROOT / "build" / "bench.json", metavar="FILE")
    options = parser.parse_args(arguments)
    folder = options.json.resolve().parent
    dma = dma_bench.measure(quick=options.quick, output=folder / "bench_dma.json")
    dma_bench.show(dma)
    victims = measure_victims(output=folder / "bench_victims.json")
    print(f"Victims among {BUFFER.slots} slots, cycles from request to result:")
    for row in victims:
        print(
            f"  {row['policy']:8} {row['least']:>4} to {row['most']:>4},"
            f" {row['mean']:.1f} on average of {row['searches']}"
        )
    routes = []
    print(f"Decisions, each layer when the device is idle, at {CLOCK_MHZ} MHz:")
    for predictor in DeviceConfig.PREDICTORS:
        config = DeviceConfig(model=preset("gpt-oss-20b"), slots=192, predictor=predictor)
        row = compiled_bench.measure(config, engine=ENGINES[0], cycles=1000, tokens=20)
        a_second = round(CLOCK_MHZ * 1e6 / row["busy_cycles_per_layer"])
        routes.append({**row, "clock_mhz": CLOCK_MHZ, "routes_per_second": a_second})
        print(
            f"  {predictor:10} {row['busy_cycles_per_layer']:>6,} cycles, {a_second:>8,} a second"
        )
    options.json.write_text(
        json.dumps({"dma": dma, "victims": victims, "routes": routes}, indent=1) + "\n"
    )
    texts = dma_bench.missed(dma)
    for text in texts:
        print(text, file=sys.stderr)
    return 1 if texts else 0


# --- in the simulator


@cocotb.test()
async def victims(dut):
    """Demands of random experts, a layer after the other, with the buffer full and no stalls."""
    config = parameters()["config"]
    model = config.model
    start_clock(dut)
    requests = StreamSource(dut, "requests", RecordLayout("BufferRequest", config=config))
    results = StreamSink(dut, "results", RecordLayout("BufferResult", config=config))
    for name in ("writes", "values", "reads"):
        getattr(dut, f"{name}__valid").value = 0
    dut.beats__ready.value = 1
    dut.clear.value = 0
    rows = []
    for policy in Policy:
        generator = random.Random(5)
        dut.policy.value = int(policy)
        await reset(dut, drivers=[requests, results])
        blank = dict.fromkeys(RecordLayout("BufferRequest", config=config).members, 0)

        async def ask(op, blank=blank, **fields):
            """Result of an operation, and its cycles."""
            before = len(results.received)
            requests.send({**blank, "op": int(op), **fields})
            while not (int(dut.requests__valid.value) and int(dut.requests__ready.value)):
                await FallingEdge(dut.clk)
            # The request is taken at the edge after this, the result a cycle before it is seen.
            cycles = -1
            while len(results.received) == before:
                await FallingEdge(dut.clk)
                cycles += 1
            return results.received[-1], cycles

        spans = []
        filled = 0
        for step in range(_DEMANDS):
            layer = step % model.layers
            for index, expert in enumerate(generator.sample(range(model.experts), model.top_k)):
                result, cycles = await ask(BufferOp.DEMAND, layer=layer, expert=expert, index=index)
                if result["code"] == BufferCode.ALLOCATED:
                    if filled >= config.slots:
                        spans.append(cycles)
                    filled += 1
                    last = config.tiles - 1
                    await ask(BufferOp.FILL, slot=result["slot"], tile=last, last=1)
            await ask(BufferOp.RELEASE, layer=layer)
        rows.append(
            {
                "policy": policy.name,
                "slots": config.slots,
                "searches": len(spans),
                "least": min(spans),
                "mean": sum(spans) / len(spans),
                "most": max(spans),
            }
        )
    Path(parameters()["output"]).write_text(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(main())
