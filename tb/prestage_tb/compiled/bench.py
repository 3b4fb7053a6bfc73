"""Speed of the compiled simulation: ``python -m prestage_tb.compiled.bench [PRESET] [--json]``."""

from __future__ import annotations

import argparse
import json
import time

from prestage_hw.contract import PRESETS, DeviceConfig, preset
from prestage_hw.contract.pattern import expert_memory

from .build import ENGINES, TOP, build_library
from .pipe import CompiledPipe
from .traffic import Traffic

__all__ = ["main", "measure"]


def measure(
    config: DeviceConfig, *, engine: str, cycles: int, tokens: int
) -> dict[str, float | int | str]:
    """Speed of an idle device and of one that serves tokens, each layer when it is idle.

    Seconds of the simulation are those that the processor spent, so that a busy machine doesn't
    count.
    """
    begun = time.perf_counter()
    build_library(config, engine=engine, top=TOP)
    build_seconds = time.perf_counter() - begun
    with CompiledPipe(config, memory=expert_memory(config), engine=engine) as pipe:
        traffic = Traffic(config)
        traffic.synchronize(pipe, b"")
        begun = time.process_time()
        pipe.run(cycles)
        idle_seconds = time.process_time() - begun
        first = pipe.cycles
        begun = time.process_time()
        for _ in range(tokens):
            traffic.token(pipe)
        busy_seconds = time.process_time() - begun
        busy_cycles = pipe.cycles - first
    return {
        "preset": config.model.name,
        "slots": config.slots,
        "predictor": config.predictor,
        "engine": engine,
        "build_seconds": round(build_seconds, 2),
        "idle_cycles": cycles,
        "idle_cycles_per_second": round(cycles / idle_seconds),
        "busy_cycles": busy_cycles,
        "busy_cycles_per_second": round(busy_cycles / busy_seconds),
        "busy_cycles_per_layer": round(busy_cycles / tokens / config.model.layers),
        "layers_per_second": round(tokens * config.model.layers / busy_seconds),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the speed of the compiled simulation.")
    parser.add_argument("preset", nargs="?", default="gpt-oss-20b", choices=sorted(PRESETS))
    parser.add_argument("--slots", type=int, default=192)
    parser.add_argument("--predictor", default="st_moe", choices=DeviceConfig.PREDICTORS)
    parser.add_argument("--engine", default=ENGINES[0], choices=ENGINES)
    parser.add_argument("--cycles", type=int, default=2_000_000, help="cycles of the idle run")
    parser.add_argument("--tokens", type=int, default=50, help="tokens of the busy run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    config = DeviceConfig(
        model=preset(options.preset), slots=options.slots, predictor=options.predictor
    )
    result = measure(config, engine=options.engine, cycles=options.cycles, tokens=options.tokens)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:24} {value:>14,}" if isinstance(value, int) else f"{name:24} {value:>14}")


if __name__ == "__main__":
    main()
