"""The simulator in the time domain against the RTL: the same trace, a link as fast and as far away.

::

    trace ─▶ sim:// (compiled RTL, memory of that bandwidth and latency) ─▶ cycles, counters, order
          └▶ prestage_sim.simulate, a machine with the same figures ─▶ seconds, counts, events
"""

from fractions import Fraction

import numpy as np
import pytest

import prestage
from prestage.replay import device_config
from prestage_hw.contract.records import Phase
from prestage_hw.contract.records import Policy as BufferPolicy
from prestage_sim.simulate import EventKind, Link, Machine, Plan, Recorder
from prestage_sim.simulate.run import run_plan
from prestage_sim.simulate.values import st_moe_candidates
from prestage_sim.traces import Trace

_LAYER_CYCLES = 512
#: Of the memory, and what the DMA engine adds to it.
_LATENCY, _DMA_CYCLES = 64, 6
#: From a layer's routing to the first candidate's request.
_PREDICTOR_CYCLES = 40


def _trace(tokens):
    """A pattern that comes back after three tokens, with noise; four layers of eight experts."""
    rng = np.random.default_rng(3)
    experts = np.empty((tokens, 4, 2), np.int16)
    for token in range(tokens):
        for layer in range(4):
            first = (token % 3 + layer) % 8
            experts[token, layer] = sorted((first, (first + 3) % 8))
            if rng.random() < 0.3:
                experts[token, layer] = rng.permutation(8)[:2]
    return Trace(
        experts=experts, experts_per_layer=8, token=(np.arange(tokens) % 3).astype(np.int32)
    )


def _on_rtl(trace, config, *, bandwidth, prefetch):
    """Cycles, counters, and the experts of all transfers in their order."""
    url = f"sim://?latency={_LATENCY}&bytes_per_cycle={bandwidth}"
    with prestage.open(url, config=config) as device:
        device.configure(prefetch=prefetch, policy=BufferPolicy.LRU, throttle=False)
        started = device.cycles
        for token, layers in zip(trace.token.tolist(), trace.experts.tolist(), strict=True):
            device.begin_token(0, token, Phase.DECODE)
            for layer, experts in enumerate(layers):
                device.route(0, layer, experts)
                device.collect(0, layer)
                device.run(_LAYER_CYCLES)
                device.release(0, layer)
        cycles = device.cycles - started
        device.drain()
        order = device.simulated.transfers()["address"] // config.expert_bytes
        return cycles, device.stats(), order.tolist()


@pytest.fixture(scope="module")
def overhead():
    """Cycles that messages add to a layer: measured where everything is resident."""
    resident = np.tile(np.arange(8).reshape(1, 4, 2), (30, 1, 1))
    trace = Trace(experts=resident, experts_per_layer=8, token=np.arange(30) % 3)
    config = device_config(trace, slots=8, predictor="st_moe")
    cycles = [
        _on_rtl(trace.first(tokens), config, bandwidth=4, prefetch=False)[0] for tokens in (10, 30)
    ]
    return (cycles[1] - cycles[0]) / 80 - _LAYER_CYCLES


@pytest.mark.parametrize("rho", [3, 6])
@pytest.mark.parametrize("prefetch", [False, True])
def test_agrees_with_the_rtl(rho, prefetch, overhead):
    """The same counters, bytes and order of tiles, and time within 2 %."""
    trace = _trace(40)
    config = device_config(trace, slots=8, predictor="st_moe")
    bandwidth = Fraction(2 * config.expert_bytes, _LAYER_CYCLES) / rho
    cycles, counters, order = _on_rtl(trace, config, bandwidth=bandwidth, prefetch=prefetch)
    machine = Machine(
        name="rtl",
        layer_seconds=_LAYER_CYCLES + overhead,
        alpha=overhead / (_LAYER_CYCLES + overhead),
        expert_bytes=config.expert_bytes,
        tiles=config.tiles,
        links=(Link(bandwidth=float(bandwidth), latency=_LATENCY + _DMA_CYCLES),),
        ready_first=False,
        predict_seconds=_PREDICTOR_CYCLES,
    )
    recorder = Recorder(tokens=trace.tokens)
    plan = Plan(
        candidates=st_moe_candidates(trace) if prefetch else None, prefetch_tiles=1, eager=True
    )
    done = run_plan(plan, trace, machine=machine, slots=8, recorder=recorder)
    assert done.seconds == pytest.approx(cycles, rel=0.02)
    counts = done.counts
    for ours, theirs in {
        "hits": "hits",
        "misses": "misses",
        "late": "late",
        "issued": "prefetch_issued",
        "useful": "useful",
        "useless": "useless",
        "polluting": "pollution",
        "cancelled": "prefetch_cancelled",
    }.items():
        assert getattr(counts, ours) == counters[theirs], ours
    assert counts.demand_tiles * config.tile_bytes == counters["demand_bytes"]
    moved = counters["demand_bytes"] + counters["prefetch_bytes"]
    assert counts.tiles_moved * config.tile_bytes == moved
    tiles = (EventKind.DEMAND_TILE, EventKind.PREFETCH_TILE)
    ours = [8 * event.layer + event.expert for event in recorder.events if event.kind in tiles]
    assert ours == order
    assert not prefetch or counts.late > 50
