# amaranth: UnusedElaboratable=no
"""Throttle of the scheduler against its golden model.

::

    outcomes ─▶ Throttle ─▶ admits, state
"""

import random
from collections import Counter
from pathlib import Path

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.records import PrefetchKind
from prestage_hw.contract.registers import THROTTLE_FIELDS, register_by_name
from prestage_hw.contract.statistics import statistics_word
from prestage_hw.scheduler.statistics import MarksLayout
from prestage_hw.scheduler.throttle import Outcome, OutcomeLayout, Throttle
from prestage_sim.model.scheduler import PrefetchStatistics
from prestage_sim.model.scheduler import Throttle as GoldenThrottle
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
    "tiny": TINY_DEVICE,
    # Nothing a power of two, a whole expert in three tiles.
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=5, experts=11, top_k=3),
        slots=13,
        expert_bytes=1536,
        contexts=2,
    ),
    "sizes": TINY_DEVICE.replace(expert_bytes=5632, layer_bytes=(5632, 512, 3584, 1536)),
}


class _Bench:
    """A buffer of the simplest kind, whose outcomes go to the throttle and its golden model."""

    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        start_clock(dut)
        self.outcomes = StreamSource(
            dut, "outcomes", OutcomeLayout(config=self.config), stall=stall
        )
        self.marks = StreamSink(dut, "marks", MarksLayout(config=self.config), stall=stall)
        dut.enable.value = 1
        dut.clear.value = 0
        self.weigh(register_by_name("throttle").reset)
        self.forget()

    def weigh(self, value):
        self.weights = value
        self.dut.weights.value = value

    def forget(self):
        self.golden = GoldenThrottle(self.config)
        self.golden.enable = True
        self.golden.register = self.weights
        self.statistics = PrefetchStatistics(self.config)
        self.marks.clear()
        self.evicted_for = {}  # kind or None by expert
        self.slots = [None] * self.config.slots  # (layer, expert, kind or None)

    async def reset(self):
        await reset(self.dut, drivers=[self.outcomes, self.marks])
        self.forget()
        await self.idle()

    async def idle(self):
        for _ in range(2000):
            await RisingEdge(self.dut.clk)
            if str(self.dut.idle.value) == "1" and not self.outcomes.pending:
                return
        raise AssertionError("not idle")

    def compare(self):
        assert int(self.dut.state.value) == self.golden.state
        admits = sum(int(self.golden.admits(kind)) << kind for kind in PrefetchKind)
        assert int(self.dut.admits.value) == admits
        counts = Counter(
            statistics_word(mark["layer"], mark["kind"], mark["outcome"])
            for marks in self.marks.received
            for mark in (marks["first"], marks["second"])
            if mark["valid"]
        )
        words = range(self.statistics.words)
        assert counts == {w: self.statistics.read(w) for w in words if self.statistics.read(w)}

    def step(self, *, useful=0.5):
        """One random outcome that a buffer could have."""
        rng, model, slots = self.random, self.config.model, self.slots
        slot = rng.randrange(len(slots))
        fields = dict.fromkeys(OutcomeLayout(config=self.config).members, 0)
        fields["slot"] = slot
        now = slots[slot]
        if now is not None and now[2] is not None and rng.random() < useful:
            if rng.random() < 0.1:
                self.golden.dropped(slot)
                self.statistics.dropped(slot)
                slots[slot] = None
                fields["outcome"] = Outcome.DROPPED.value
            else:
                tiles = self.config.layer_tiles[now[0]]
                returned = tiles if rng.random() < 0.7 else rng.randrange(tiles)
                self.golden.used(slot, returned=returned)
                self.statistics.used(slot, returned=returned)
                slots[slot] = (*now[:2], None)
                if returned == tiles and rng.random() < 0.5:
                    returned = self.config.tiles  # A resident expert has all it can have.
                fields.update(outcome=Outcome.USED.value, returned=returned)
                if self.config.layer_bytes:
                    fields["last_tile"] = tiles - 1
            self.outcomes.send(fields)
            return
        held = {owner[:2] for owner in slots if owner is not None}
        layer, expert = rng.randrange(model.layers), rng.randrange(model.experts)
        if (layer, expert) in held:
            return
        kind = rng.choice(list(PrefetchKind))
        evicted = now is not None
        unused = evicted and now[2] is not None
        prefetches = rng.random() < 0.5 and self.golden.admits(kind)
        polluted = not prefetches and self.evicted_for.pop((layer, expert), None) is not None
        if evicted:
            self.evicted_for[now[:2]] = kind if prefetches else None
        fields.update(
            layer=layer,
            expert=expert,
            kind=int(kind),
            evicted=int(evicted),
            unused=int(unused),
        )
        if prefetches:
            for told in (self.golden, self.statistics):
                told.prefetch(layer, expert, kind, slot=slot, evicted=evicted, unused=unused)
            fields["outcome"] = Outcome.PREFETCH.value
            slots[slot] = (layer, expert, kind)
        else:
            waits = rng.random() < 0.2
            self.golden.miss(
                layer,
                expert,
                slot=slot,
                evicted=evicted,
                unused=unused,
                waits_for=kind if waits else None,
            )
            self.statistics.miss(
                layer, expert, slot=slot, evicted=evicted, unused=unused, polluted=polluted
            )
            fields.update(outcome=Outcome.MISS.value, waits=int(waits), polluted=int(polluted))
            slots[slot] = (layer, expert, None)
        self.outcomes.send(fields)


def _weights(rng, *, cheap):
    """Weights of all kinds, or such that prefetches are soon worth their price."""
    values = {name: rng.randrange(1 << bits) for name, (_, bits) in THROTTLE_FIELDS.items()}
    if cheap:
        values.update(useful=15, price=1, pollution=values["pollution"] % 4, wait=1, floor=5)
    return sum(value << THROTTLE_FIELDS[name][0] for name, value in values.items())


@cocotb.test()
@cocotb.parametrize(useful=[0.15, 0.5, 0.9])
async def follows_golden(dut, useful):
    """Credits, switches and probes after every outcome, under weights of all kinds."""
    bench = _Bench(dut)
    switches = set()
    for run in range(8):
        if run:
            bench.weigh(_weights(bench.random, cheap=run % 2))
        await bench.reset()
        for _ in range(400):
            bench.step(useful=useful)
            await bench.idle()
            bench.compare()
            switches.add(bench.golden.state >> 24)
    if useful > 0.5:
        assert len(switches) >= 4, "kinds were hardly ever switched"
        hit("throttle.lockstep")
        if bench.config.layer_bytes:
            hit("throttle.sizes")


@cocotb.test()
async def takes_outcomes_at_any_time(dut):
    """Outcomes back to back and with pauses; each takes the stated cycles."""
    measured = 0
    for stall in (0.0, 0.4):
        bench = _Bench(dut, stall=stall)
        await bench.reset()
        for _ in range(100):
            bench.step()
        first = None
        taken = 0
        for cycle in range(100 * 40):
            await RisingEdge(dut.clk)
            if str(dut.outcomes__valid.value) == "1" and str(dut.outcomes__ready.value) == "1":
                taken += 1
                if stall == 0.0 and first is not None:
                    assert cycle - first == Throttle.latency
                    measured += 1
                first = cycle
            if str(dut.idle.value) == "1" and not bench.outcomes.pending:
                break
        assert taken and str(dut.idle.value) == "1"
        bench.compare()
    assert measured > 50
    hit("throttle.latency")


@cocotb.test()
async def admits_all_while_off(dut):
    bench = _Bench(dut)
    dut.enable.value = 0
    await bench.reset()
    await cycles(dut, 2)
    assert int(dut.admits.value) == 7
    dut.enable.value = 1
    await cycles(dut, 2)
    assert int(dut.admits.value) == 0
    hit("throttle.off")


@cocotb.test()
async def clears(dut):
    """A clear or a reset at any moment leaves nothing behind."""
    bench = _Bench(dut)
    await bench.reset()
    for turn in range(8):
        for _ in range(60):
            bench.step()
        if turn % 2:
            await cycles(dut, bench.random.randrange(600))
            await bench.reset()
        else:
            await bench.idle()
            dut.clear.value = 1
            await cycles(dut, 1)
            dut.clear.value = 0
            await cycles(dut, 1)
            assert str(dut.idle.value) == "0"
            bench.forget()
            await bench.idle()
        bench.compare()
        for _ in range(40):
            bench.step(useful=0.9)
        await bench.idle()
        bench.compare()
    hit("throttle.clear")


@pytest.mark.parametrize("name", _CONFIGS)
def test_throttle(name):
    run_bench(
        Throttle(config=_CONFIGS[name]),
        module=Path(__file__),
        name="throttle",
        parameters={"config": _CONFIGS[name]},
    )


def test_bad_config():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        Throttle(config=3)
