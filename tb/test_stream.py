# amaranth: UnusedElaboratable=no
"""Prefetches of a prefill chunk on a channel of their own, in a whole engine.

::

    commands, candidates ─▶ Engine ─▶ bus ─▶ AXI4 memory
"""

import random
from pathlib import Path

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.pattern import expert_memory
from prestage_hw.contract.records import Source
from prestage_hw.contract.registers import register_by_name
from prestage_hw.engine import Engine
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
from prestage_tb.coverage import hit

_CONFIGS = {
    # Tiles of eight bursts, so that overtaking within a tile shows.
    "tiny": TINY_DEVICE.replace(slots=16, expert_bytes=2048, burst_beats=16, prefetch_inflight=4),
    "three": pytest.param(
        TINY_DEVICE.replace(slots=16, dma_channels=3, axi_ids=3), marks=pytest.mark.soak
    ),
}


OVERTAKEN = ("demands", "not fetched again", "nothing starves")


class _Bench:
    def __init__(self, dut, *, tiles=4, latency=12):
        self.dut = dut
        self.config = config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)

        def record(name):
            return RecordLayout(name, config=config)

        self.commands = StreamSource(dut, "commands", record("Command"))
        self.candidates = StreamSource(dut, "candidates", record("Candidate"))
        self.ready = StreamSink(dut, "ready", record("Ready"))
        self.events = StreamSink(dut, "events", record("Event"))
        image = expert_memory(config)
        self.memory = AXIMemory(
            dut,
            data=lambda address, size: image[address : address + size].tobytes(),
            data_bytes=config.data_bytes,
            address_bits=config.address_bits,
            latency=latency,
            outstanding=config.outstanding_bursts,
            burst_beats=config.burst_beats,
        )
        for name in ("settings", "values", "reads", "statistics_requests"):
            getattr(dut, f"{name}__valid").value = 0
        for name in ("beats", "statistics_values"):
            getattr(dut, f"{name}__ready").value = 1
        for name in (
            *("commit", "lower_credits", "abort", "abort_tag", "abort_all", "timeout"),
            *("hold", "alone", "throttle_enable", "budget", "clear", "clear_statistics"),
            *("expert_base", "policy"),
        ):
            getattr(dut, name).value = 0
        dut.enable.value = 1
        dut.cutoff_layer.value = 255
        dut.cancel_enable.value = 1
        dut.throttle_weights.value = register_by_name("throttle").reset
        dut.prefetch_tiles.value = tiles
        dut.streaming.value = 1
        dut.gathering.value = 1
        self.routes = 0

    async def reset(self):
        await reset(self.dut, drivers=[self.commands, self.candidates, self.ready, self.events])
        for _ in range(2000):
            await RisingEdge(self.dut.clk)
            if str(self.dut.idle.value) == "1":
                return
        raise AssertionError("not idle")

    def route(self, layer, experts, *, ctx=0):
        self.routes += ctx == 0
        for index, expert in enumerate(experts):
            fields = {"release": 0, "lock": 0, "ctx": ctx, "layer": layer, "repeat": 0}
            self.commands.send({**fields, "expert": expert, "index": index})

    def release(self, layer, *, ctx=0):
        fields = {"release": 1, "lock": 0, "ctx": ctx, "layer": layer, "repeat": 0}
        self.commands.send({**fields, "expert": 0, "index": 0})

    def propose(self, layer, experts, *, ctx=0, deadline=None):
        """Candidates of a chunk's union for the next layer."""
        for expert in experts:
            self.candidates.send(
                {
                    "ctx": ctx,
                    "layer": layer,
                    "expert": expert,
                    "score": 200,
                    "source": int(Source.PREDICTOR),
                    "deadline": (self.routes + 1 if deadline is None else deadline) % 256,
                }
            )

    async def answers(self, count):
        """Wait for so many answers since the start."""
        for _ in range(20_000):
            if len(self.ready.received) >= count:
                return
            await RisingEdge(self.dut.clk)
        raise AssertionError(f"only {len(self.ready.received)} of {count} experts came")


@cocotb.test()
async def demands_overtake_the_union(dut):
    """A union streams in while a layer is computed; the next layer's demands go before all of it
    but the burst on its way, also one for an expert in part.
    """
    bench = _Bench(dut)
    config = bench.config
    k = config.model.top_k
    stream = config.stream_channel
    overtaken = 0
    for _ in range(30):
        await bench.reset()
        bench.routes = 0
        bench.ready.clear()
        del bench.memory.transfers[:]
        bench.route(0, list(range(k)))
        await bench.answers(k)
        bench.propose(1, range(8))
        await cycles(dut, bench.random.randrange(80, 900))
        before = len(bench.memory.transfers)
        # An expert that nobody proposed, and one of the union that has not come whole.
        wanted = [config.model.experts - 1, 7]
        bench.route(1, wanted[:k])
        # Until the demands are looked up, and from the choice of a burst to the bus.
        await cycles(dut, 100)
        bench.release(0)
        await bench.answers(2 * k)
        ids = [t.identifier for t in bench.memory.transfers[before:]]
        assert 0 in ids
        first = ids.index(0)
        # What is fetched for demands is not interrupted, once it has begun, by more than what
        # was on its way.
        last = len(ids) - 1 - ids[::-1].index(0)
        bursts = config.tile_beats // config.longest_burst or 1
        assert ids[first : last + 1].count(stream) <= bursts, ids
        overtaken += stream in ids[last:]
        await cycles(dut, 400)
        bench.release(1)
        await cycles(dut, 60)
    assert overtaken > 3, "hardly any union was left to overtake"
    hit("scheduler.stream_overtaken", "demands", of=OVERTAKEN)


@cocotb.test()
async def union_streams_while_a_layer_is_computed(dut):
    """Double-buffered: what the union brings in while a layer's experts are held is there at once
    when the next layer asks for it.
    """
    bench = _Bench(dut)
    config = bench.config
    k = config.model.top_k
    await bench.reset()
    bench.route(0, list(range(k)))
    await bench.answers(k)
    for layer in range(1, config.model.layers):
        union = bench.random.sample(range(config.model.experts), 2 * k)
        bench.propose(layer, union)
        # A layer's computation, as long as its union takes on the bus.
        await cycles(dut, 2 * len(union) * config.expert_beats + 400)
        came = len(bench.memory.transfers)
        bench.route(layer, union[-k:])
        await bench.answers(k * (layer + 1))
        assert len(bench.memory.transfers) == came, "a demand had to be fetched"
        bench.release(layer - 1)
        await cycles(dut, 40)
    assert {t.identifier for t in bench.memory.transfers} == {0, config.stream_channel}
    assert not bench.events.received
    hit("scheduler.stream_overtaken", "not fetched again", of=OVERTAKEN)


@cocotb.test()
async def other_prefetches_do_not_starve_a_chunk(dut):
    """Context 1 prefetches without end on channel 1; a demand of context 0 for an expert of its
    union, a tile of which is on its way, is served all the same.
    """
    bench = _Bench(dut)
    config = bench.config
    k = config.model.top_k
    await bench.reset()
    for turn in range(20):
        layer = turn % (config.model.layers - 1) + 1
        bench.propose(layer, [turn % config.model.experts])
        for n in range(6):
            bench.propose(
                (layer + n) % config.model.layers,
                bench.random.sample(range(config.model.experts), 2),
                ctx=1,
                deadline=100,
            )
        await cycles(dut, bench.random.randrange(30, 200))
        before = len(bench.ready.received)
        bench.route(layer, [(turn + i) % config.model.experts for i in range(k)])
        await bench.answers(before + k)
        bench.release(layer)
        await cycles(dut, 30)
    ids = {t.identifier for t in bench.memory.transfers}
    assert ids == {0, 1, config.stream_channel}
    hit("scheduler.stream_overtaken", "nothing starves", of=OVERTAKEN)


@pytest.mark.parametrize("config", _CONFIGS.values(), ids=_CONFIGS)
def test_stream(config):
    run_bench(
        lambda: Engine(config=config),
        module=Path(__file__),
        name="engine",
        parameters={"config": config},
    )


def test_channels():
    channels = {
        count: TINY_DEVICE.replace(dma_channels=count, axi_ids=0).scheduled_channels
        for count in (1, 2, 3, 4, 8)
    }
    assert channels == {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 3), 8: (0, 1, 7)}
