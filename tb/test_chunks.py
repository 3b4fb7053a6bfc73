# amaranth: UnusedElaboratable=no
"""What a chunk of tokens is predicted to choose: gathered, and handed on once, best first.

::

    token, decision (listened to) ─▶ ┌────────────┐
    i ◀─▶                            │ ChunkUnion │ ◀─▶ o
    wanted, hold ─▶                  └────────────┘
"""

import random
from collections import Counter

import cocotb
import pytest

from prestage_hw.contract.params import TINY_DEVICE, DeviceConfig, ModelConfig
from prestage_hw.contract.records import Phase, Source
from prestage_hw.layouts import RecordLayout
from prestage_hw.scheduler.chunks import ChunkUnion
from prestage_sim.model.scheduler.chunks import ChunkUnion as GoldenUnion
from prestage_tb.bench import (
    StreamSink,
    StreamSource,
    assert_no_x,
    cycles,
    parameters,
    reset,
    run_bench,
    start_clock,
)
from prestage_tb.coverage import hit

_FIELDS = ("ctx", "layer", "expert", "score", "source", "deadline")


class _Bench:
    def __init__(self, dut, *, stall=0.0):
        self.dut = dut
        self.config = parameters()["config"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        candidate = RecordLayout("Candidate", config=self.config)
        start_clock(dut)
        self.source = StreamSource(dut, "i", candidate, stall=stall)
        self.sink = StreamSink(dut, "o", candidate, stall=stall)
        self.stamp = [0] * self.config.contexts

    async def reset(self):
        dut = self.dut
        for signal in (dut.token_valid, dut.decision_valid, dut.wanted, dut.hold):
            signal.value = 0
        await reset(dut, drivers=[self.source, self.sink])
        self.stamp = [0] * self.config.contexts

    async def _show(self, name, record, fields):
        layout = RecordLayout(record, config=self.config)
        getattr(self.dut, name).value = layout.const(fields).as_bits()
        getattr(self.dut, f"{name}_valid").value = 1
        await cycles(self.dut)
        getattr(self.dut, f"{name}_valid").value = 0

    async def begin(self, ctx, phase):
        await self._show("token", "BeginToken", {"ctx": ctx, "phase": phase})

    async def decide(self, ctx, layer, *, again=False):
        self.stamp[ctx] = (self.stamp[ctx] + (not again)) % 256
        await self._show("decision", "RoutingDecision", {"ctx": ctx, "layer": layer})

    def candidate(self, ctx, layer, expert, score, *, ahead=1, source=Source.PREDICTOR):
        return ctx, layer, expert, score, int(source), (self.stamp[ctx] + ahead) % 256

    def some(self, ctx, layer):
        """Candidates as a predictor gives them after a decision: most for the next layer."""
        rng, model = self.random, self.config.model
        found = []
        for expert in rng.sample(range(model.experts), rng.randrange(model.experts + 1)):
            ahead = rng.choice([1, 1, 1, 2])
            if layer + ahead - 1 >= model.layers:
                continue
            source = rng.choice([Source.PREDICTOR] * 4 + [Source.HINT])
            score = rng.choice([0, 1, 255, rng.randrange(256)])
            where = layer + ahead - 1
            found.append(self.candidate(ctx, where, expert, score, ahead=ahead, source=source))
        return found

    def send(self, candidates):
        for candidate in candidates:
            self.source.send(dict(zip(_FIELDS, candidate, strict=True)))

    def received(self, start=0):
        return [tuple(int(c[name]) for name in _FIELDS) for c in self.sink.received[start:]]

    async def quiet(self, limit=60_000):
        await self.source.sent()
        for _ in range(limit):
            await cycles(self.dut)
            if str(self.dut.idle.value) == "1" and str(self.dut.o__valid.value) == "0":
                return
        raise AssertionError("candidates stay in the block")


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def follows_golden(dut, stall):
    """With everything gathered before anything is wanted, the order is the golden model's."""
    bench = _Bench(dut, stall=stall)
    config, rng = bench.config, bench.random
    golden = GoldenUnion(config)
    await bench.reset()
    expected = []
    gathered = repeated = 0

    async def offer(candidates):
        nonlocal gathered
        dut.hold.value = 1
        bench.send(candidates)
        await bench.source.sent()
        await cycles(dut, 8)
        dut.hold.value = 0
        order = [candidate for offered in golden.offer(candidates) for candidate in offered]
        gathered += len(candidates) - len(order)
        expected.extend(order)
        while str(dut.idle.value) != "1":
            dut.wanted.value = int(rng.random() < 0.7)
            await cycles(dut, rng.randrange(1, 2 * config.model.experts))
        await bench.quiet()
        assert bench.received() == expected
        streaming = sum(int(each) << at for at, each in enumerate(golden.streaming))
        assert dut.streaming.value.to_unsigned() == streaming
        gathering = sum(int(each) << at for at, each in enumerate(golden.gathering))
        assert dut.gathering.value.to_unsigned() == gathering

    # More decisions than the stamps have values: old rows come round again.
    for turn in range(18 if config.model.experts > 16 else 45):
        ctx = rng.randrange(config.contexts)
        phase = (Phase.PREFILL, Phase.VERIFY, Phase.DECODE)[turn % 3]
        await bench.begin(ctx, phase)
        golden.begin(ctx, phase)
        await offer(bench.some(ctx, 0))
        for layer in range(config.model.layers):
            for token in range(1 if phase is Phase.DECODE else rng.randrange(1, 4)):
                repeated += token > 0
                await bench.decide(ctx, layer, again=token > 0)
                golden.decide(ctx, layer)
                await offer(bench.some(ctx, layer + 1))
        assert turn or expected
    assert repeated and gathered > 10
    assert_no_x(dut.idle)
    hit("chunks.lockstep")


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def hands_on_once(dut, stall):
    """Candidates come while others are handed on: each expert once, all of them in the end, and
    none that is less popular than one that waits.
    """
    bench = _Bench(dut, stall=stall)
    config, rng = bench.config, bench.random
    await bench.reset()
    dut.wanted.value = 1
    contexts = range(config.contexts)
    for ctx in contexts:
        await bench.begin(ctx, rng.choice([Phase.PREFILL, Phase.VERIFY]))
    for layer in range(config.model.layers):
        start = len(bench.sink.received)
        passed, union = [], [Counter() for _ in contexts]
        for token in range(4):
            for ctx in contexts:
                await bench.decide(ctx, layer, again=token > 0)
                candidates = bench.some(ctx, layer + 1)
                bench.send(candidates)
                for candidate in candidates:
                    if candidate[1] == layer + 1 and candidate[4] == Source.PREDICTOR:
                        union[ctx][candidate[2]] += max(candidate[3], 1)
                    else:
                        passed.append(candidate)
                dut.wanted.value = int(rng.random() < 0.8)
                await cycles(dut, rng.randrange(3 * config.model.experts))
        dut.wanted.value = 1
        await bench.quiet()
        out = bench.received(start)
        mine = [c for c in out if c[1] == layer + 1 and c[4] == Source.PREDICTOR]
        assert [c for c in out if c not in mine] == passed
        for ctx in contexts:
            sent = [c[2] for c in mine if c[0] == ctx]
            assert sorted(sent) == sorted(union[ctx]), (ctx, sent, union[ctx])
            assert all(c[3] <= min(255, union[ctx][c[2]]) for c in mine if c[0] == ctx)
    hit("chunks.once")


@cocotb.test()
async def forgets_what_was_routed(dut):
    """The next layer's first route ends the union, even in the middle of a search."""
    bench = _Bench(dut)
    config, rng = bench.config, bench.random
    await bench.reset()
    experts = range(config.model.experts)
    await bench.begin(0, Phase.PREFILL)
    for turn in range(30):
        layer = turn % (config.model.layers - 1)
        await bench.decide(0, layer)
        bench.send([bench.candidate(0, layer + 1, expert, expert + 1) for expert in experts])
        await bench.source.sent()
        before = len(bench.sink.received)
        dut.wanted.value = 1
        await cycles(dut, rng.randrange(1, 3 * config.model.experts))
        await bench.decide(0, layer + 1)
        dut.wanted.value = int(rng.random() < 0.5)
        # What is in the output register may still leave.
        await cycles(dut, 3)
        left = len(bench.sink.received)
        dut.wanted.value = 1
        await cycles(dut, 3 * config.model.experts)
        assert len(bench.sink.received) == left
        assert str(dut.idle.value) == "1"
        best = [c[2] for c in bench.received(before)]
        assert best == sorted(experts, reverse=True)[: len(best)]
        dut.wanted.value = 0
        await bench.begin(0, Phase.PREFILL)
    hit("chunks.forgotten")


@cocotb.test()
async def latency(dut):
    """What passes takes the stated cycle, at one a cycle; a search takes the stated cycles."""
    bench = _Bench(dut)
    config = bench.config
    await bench.reset()
    await cycles(dut, bench.config.contexts << config.bits("expert"))
    bench.send([bench.candidate(0, 1, expert % config.model.experts, 9) for expert in range(20)])
    taken = [0]
    while len(bench.sink.received) < 20:
        await cycles(dut)
        assert len(bench.sink.received) == taken[-1]
        taken.append(bench.source.sent_count)
    assert bench.sink.arrival[-1] - bench.sink.arrival[0] == 19
    await bench.begin(0, Phase.PREFILL)
    bench.send([bench.candidate(0, 0, 0, 9)])
    await bench.source.sent()
    await cycles(dut, 10)
    dut.wanted.value = 1
    await cycles(dut)
    took = 0
    while str(dut.o__valid.value) != "1":
        await cycles(dut)
        took += 1
    assert took == ChunkUnion(config=config).search_cycles
    hit("chunks.latency")


@cocotb.test()
async def popularity_saturates(dut):
    """The most popular stay so."""
    bench = _Bench(dut)
    await bench.reset()
    await bench.begin(0, Phase.PREFILL)
    few = [bench.candidate(0, 0, 1, 255)] * 270 + [bench.candidate(0, 0, 0, 1)] * 3
    bench.send(few)
    await bench.source.sent()
    await cycles(dut, 8)
    dut.wanted.value = 1
    await bench.quiet()
    assert [(c[2], c[3]) for c in bench.received()] == [(1, 255), (0, 3)]
    hit("chunks.saturated")


@cocotb.test()
async def reset_in_flight(dut):
    """A reset forgets phases, what was gathered and what was handed on."""
    bench = _Bench(dut, stall=0.2)
    config, rng = bench.config, bench.random
    await bench.reset()
    for _ in range(12):
        await bench.begin(0, Phase.VERIFY)
        bench.send([bench.candidate(0, 0, e, 5) for e in range(config.model.experts)])
        dut.wanted.value = 1
        await cycles(dut, rng.randrange(1, 8 * config.model.experts))
        await bench.reset()
        # Not in a chunk: it passes.
        bench.send([bench.candidate(0, 0, 1, 7)] * 2)
        await bench.quiet()
        assert [c[3] for c in bench.received()] == [7, 7]
        await bench.begin(0, Phase.VERIFY)
        bench.send([bench.candidate(0, 0, 1, 7)])
        dut.wanted.value = 1
        await bench.quiet()
        assert [c[3] for c in bench.received()] == [7, 7, 7]
        await bench.reset()
    hit("chunks.reset")


_SHAPES = {
    "tiny": TINY_DEVICE,
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=3, experts=21, top_k=3), slots=11, contexts=3
    ),
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_chunks(shape):
    config = _SHAPES[shape]
    run_bench(
        lambda: ChunkUnion(config=config),
        module=__file__,
        name="chunks",
        parameters={"config": config},
    )


def test_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        ChunkUnion(config=3)
