"""Simulation half of the bench of the whole ``perceptron`` predictor.

The ports and the lockstep with the golden model are those of ``cocotb_predictor.py``; here the
routing has structure, so that every head, the token tables and hints have something to learn.
"""

import random

import cocotb
import numpy as np
from cocotb.handle import ArrayObject, HierarchyObject
from cocotb.triggers import FallingEdge, RisingEdge

from cocotb_predictor import PredictorBench
from prestage_hw.contract.records import Phase, Source
from prestage_hw.predictor import PerceptronPredictor
from prestage_tb.bench import Stall, cycles, parameters

#: Bounds that the predictor has to keep for 128 experts and k = 8 (cycles).
_FIRST, _LAST, _EVERY = 64, 160, 200


def memories(handle, path=""):
    """Memories below a handle, by path; the queue of results is no table."""
    found = {}
    for child in handle:
        name = f"{path}.{child._name}"
        if isinstance(child, ArrayObject):
            found[name] = child
        elif isinstance(child, HierarchyObject) and child._name != "order":
            found.update(memories(child, name))
    return found


def flip_memory_bit(memory, chance):
    """Flip any bit of any word."""
    word = memory[chance.randrange(len(memory))]
    word.value = int(word.value) ^ 1 << chance.randrange(len(word))


class Walk:
    """Tokens of several contexts, layer by layer; a layer's choice follows from the token and from
    the layer before.
    """

    def __init__(self, bench, *, seed=1, vocabulary=9, noise=0.4):
        model = bench.config.model
        self.bench, self.model, self.noise = bench, model, noise
        self.random = np.random.default_rng(seed)
        shape = (vocabulary, model.layers, model.experts)
        self.likes = self.random.random(shape)
        self.follows = self.random.random((model.layers, model.experts, model.experts)) ** 4
        self.stamps = [0] * bench.config.contexts

    def choices(self, token):
        """A choice for each layer."""
        model, chosen = self.model, []
        for layer in range(model.layers):
            score = self.likes[token, layer] + self.random.random(model.experts) * self.noise
            if layer:
                score = score + self.follows[layer, chosen[-1]].sum(0)
            chosen.append(np.argsort(-score)[: model.top_k].tolist())
        return chosen

    def token(self, ctx, *, phase=Phase.DECODE, hints=0.0, layers=None, drafts=0):
        """Messages of one token."""
        bench, last = self.bench, self.model.layers - 1
        token = int(self.random.integers(len(self.likes)))
        known = self.random.random() < 0.9
        payload = {"ctx": ctx, "phase": int(phase), "token": token if known else 0xFFFFFFFF}
        bench.send(bench.begin, payload)
        chosen = self.choices(token)
        yield
        for layer, experts in enumerate(chosen[:layers]):
            self.stamps[ctx] += 1
            bench.send_decision(ctx, layer, experts, self.stamps[ctx])
            yield
            for _ in range(drafts):
                bench.send_decision(ctx, layer, self.choices(token)[layer], self.stamps[ctx])
                yield
            if layer < last and self.random.random() < hints:
                ahead = min(last, layer + 1 + int(self.random.integers(3)))
                for expert in chosen[ahead][: int(self.random.integers(1, self.model.top_k + 1))]:
                    if self.random.random() < 0.3:
                        expert = int(self.random.integers(self.model.experts))
                    deadline = self.stamps[ctx] + ahead - layer
                    bench.send_hint(ctx, ahead, expert, deadline)
                    yield


async def _play(bench, walk, tokens, *, waits, hints=0.0, phases=False):
    """Play tokens of all contexts, their messages interleaved."""
    chance = random.Random(tokens)
    for _ in range(tokens):
        streams = []
        for ctx in range(bench.config.contexts):
            phase = Phase.DECODE
            if phases and chance.random() < 0.4:
                phase = chance.choice((Phase.PREFILL, Phase.VERIFY))
            drafts = 0 if phase == Phase.DECODE else chance.randrange(3)
            streams.append(walk.token(ctx, phase=phase, hints=hints, drafts=drafts))
        while streams:
            stream = chance.choice(streams)
            if next(stream, "end") == "end":
                streams.remove(stream)
            # Messages on three streams keep their order only if each waits for the one before.
            await bench.sent()
            if chance.random() < waits:
                await bench.until_idle()


@cocotb.test()
async def follows_golden_on_structure(dut):
    """Learnable routing of all contexts, drained and back to back, with stalls, hints, phases."""
    bench = PredictorBench(dut)
    await bench.start()
    tokens = parameters()["tokens"]
    walk = Walk(bench)
    await _play(bench, walk, tokens, waits=1.0, hints=0.3)
    # Of several layers proposed at a token's start, the farther ones get k candidates at most.
    dut.ahead.value = bench.golden.ahead = parameters()["ahead"]
    dut.far_threshold.value = bench.golden.far_threshold = 8
    for stall in (0.0, 0.4, Stall(0.7, burst=(1, 60))):
        for driver in bench.drivers:
            driver.stall = stall
        await _play(bench, walk, tokens, waits=0.05, hints=0.4, phases=True)
    for driver in bench.drivers:
        driver.stall = 0.0
    await bench.until_idle()
    sources = {candidate["source"] for candidate in bench.expected}
    assert sources == {int(Source.PREDICTOR), int(Source.HINT)}
    assert {kind for kind, *_ in bench.expected_worth} == {0, 1}
    if parameters()["compare"]:
        await bench.compare_tables()
    bench.check()


@cocotb.test()
async def is_as_fast_as_promised(dut):
    """First and last candidate of a decision, and decisions at their sustained rate."""
    bench = PredictorBench(dut)
    await bench.start()
    config = bench.config
    walk = Walk(bench, noise=0.0)
    for _ in range(parameters()["tokens"]):
        for _ in walk.token(0):
            await bench.until_idle()
    # All sets are known now; every expert is good enough to be a candidate.
    dut.threshold.value = dut.far_threshold.value = 0
    bench.golden.threshold = bench.golden.far_threshold = 0
    predictor = PerceptronPredictor(config)
    firsts, lasts = [], []
    most = min(2 * config.model.top_k, config.model.experts)
    for at, _ in enumerate(walk.token(0)):
        if at == 0:
            await bench.until_idle()
            continue
        before = len(bench.candidates.received)
        await bench.decisions.sent()
        start = bench.candidates.cycle
        await bench.until_idle()
        arrival = [cycle - start for cycle in bench.candidates.arrival[before:]]
        if arrival:
            firsts.append(arrival[0])
            lasts.append(arrival[most - 1])
    dut._log.info(
        f"cycles first={max(firsts)} last={max(lasts)} bounds {predictor.first_candidate_cycles}"
        f" {predictor.last_candidate_cycles} {predictor.decision_cycles}"
    )
    assert max(firsts) <= predictor.first_candidate_cycles
    assert max(lasts) <= predictor.last_candidate_cycles
    assert max(firsts) > 0.7 * predictor.first_candidate_cycles
    if (config.model.experts, config.model.top_k) == (128, 8):
        assert predictor.first_candidate_cycles <= _FIRST
        assert predictor.last_candidate_cycles <= _LAST
        assert predictor.decision_cycles <= _EVERY
    # Sustained: each decision is taken as soon as it is offered.
    every = predictor.decision_cycles
    messages = walk.token(0)
    next(messages)
    await bench.until_idle()
    late = 0
    for _ in messages:
        offered = bench.candidates.cycle
        await bench.decisions.sent()
        late = max(late, bench.candidates.cycle - offered)
        await cycles(dut, every - (bench.candidates.cycle - offered))
    dut._log.info(f"cycles until a decision was taken, at most: {late}")
    assert late <= 4
    await bench.until_idle()
    bench.check()


@cocotb.test()
async def survives_flipped_bits(dut):
    """A bit is flipped in every memory, time and again: quality may suffer, nothing else."""
    bench = PredictorBench(dut)
    await bench.start()
    walk = Walk(bench, noise=0.1)
    for _ in range(parameters()["tokens"]):
        for _ in walk.token(0):
            await bench.sent()
    await bench.until_idle()
    bench.check()
    bench.lockstep = False  # the golden model knows of no faults
    chance = random.Random(3)
    found = memories(dut)
    assert len(found) >= parameters()["memories"], sorted(found)
    counted = 0

    async def count():
        nonlocal counted
        while True:
            await FallingEdge(dut.clk)
            counted += int(dut.parity_errors.value)

    counter = cocotb.start_soon(count())
    for _ in range(parameters()["tokens"]):
        for memory in found.values():
            flip_memory_bit(memory, chance)
        for _ in walk.token(0, hints=0.5):
            await bench.until_idle()
    faulty = counted
    assert faulty > 0
    # Clearing mends everything; then the golden model is followed again.
    dut.clear.value = 1
    await RisingEdge(dut.clk)
    dut.clear.value = 0
    await bench.until_idle()
    model = bench.config.model
    for candidate in bench.candidates.received:
        assert candidate["layer"] < model.layers and candidate["expert"] < model.experts
    await bench.start()
    bench.lockstep = True
    counted = 0
    walk = Walk(bench)
    await _play(bench, walk, 6, waits=0.2, hints=0.3)
    await bench.until_idle()
    bench.check()
    assert counted == 0
    counter.cancel()
