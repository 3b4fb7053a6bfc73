"""Study of eviction: the golden buffer driven by hand must miss as often."""

import json

import numpy as np
import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.records import BufferCode, BufferOp, Policy, ValueKind
from prestage_sim.evaluate.eviction import SEARCHES, Search, Values, evaluate, main
from prestage_sim.model.buffer import ExpertBuffer
from prestage_sim.model.predictor import create_predictor
from prestage_sim.traces import Trace, save_trace

MODEL = ModelConfig(name="test-moe", layers=5, experts=16, top_k=3)
ALL, EIGHT = SEARCHES[0], Search(name="8", samples=8, remembered=1)


def walk(tokens, *, seed=0):
    """A trace whose routing follows the token, with some noise."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 12, tokens)
    taste = np.random.default_rng(99).normal(size=(12, MODEL.layers, MODEL.experts))
    score = taste[ids] + rng.normal(size=taste[ids].shape) / 2
    return Trace(
        experts=np.argsort(-score, axis=2)[:, :, : MODEL.top_k],
        experts_per_layer=MODEL.experts,
        token=ids.astype(np.int32),
        meta={"model": "test-moe"},
    )


def misses_of_the_golden_buffer(trace, *, slots, policy, form):
    """Miss rate of the last half, predictor and buffer as in the device."""
    config = DeviceConfig(
        model=MODEL,
        slots=slots,
        expert_bytes=512,
        contexts=4,  # makes a search look at 8 slots
        predictor="perceptron" if form else "none",
        form=form or "lite",
    )
    # One context is used, so that the others count for nothing.
    buffer = ExpertBuffer(config)
    buffer.policy = policy
    values = Values.of(trace, form) if form else Values.none(trace)
    lanes = config.predictor_lanes
    misses = 0

    def give(kind, layer, row):
        padded = np.zeros(config.lane_beats * lanes, int)
        padded[: MODEL.experts] = row
        for beat, part in enumerate(padded.reshape(-1, lanes).tolist()):
            buffer.values(kind, 0, layer, beat, part)

    for t in range(trace.tokens):
        for layer in range(MODEL.layers):
            give(ValueKind.CHANCE, layer, values.chances[0, t, layer])
        for layer in range(MODEL.layers):
            for index, expert in enumerate(trace.experts[t, layer].tolist()):
                answer = buffer.request(BufferOp.DEMAND, layer=layer, expert=expert, index=index)
                if answer.code == BufferCode.ALLOCATED:
                    misses += t >= trace.tokens // 2
                    buffer.request(BufferOp.FILL, slot=answer.slot, last=True)
            buffer.request(BufferOp.RELEASE, layer=layer)
            give(ValueKind.REUSE, layer, values.reuse[t, layer])
            for number, horizon in enumerate(values.horizons.tolist()):
                if horizon and layer + horizon < MODEL.layers:
                    row = values.chances[number, t, layer + horizon]
                    give(ValueKind.CHANCE, layer + horizon, row)
    buffer.check_invariants()
    return misses / (trace.tokens - trace.tokens // 2) / MODEL.layers / MODEL.top_k


@pytest.mark.parametrize("slots", [15, 30])
@pytest.mark.parametrize(
    ("policy", "name", "form"),
    [
        (Policy.LRU, "LRU", ""),
        (Policy.LFU, "LFU", ""),
        (Policy.NEXT_USE, "predicted next use", ""),
        (Policy.NEXT_USE, "predicted next use", "lite"),
    ],
)
def test_counts_what_the_golden_buffer_misses(policy, name, form, slots):
    trace = walk(300)
    share = slots / (MODEL.layers * MODEL.experts)
    rows = evaluate(
        trace,
        name="walk",
        forms=[form] if form else [],
        searches=[ALL if policy == Policy.LRU else EIGHT],
        residencies=[share],
    )
    wanted = form or ("none" if policy == Policy.NEXT_USE else "")
    (row,) = (row for row in rows if row.policy == name and row.values == wanted)
    (rate,) = row.miss_rates.values()
    golden = misses_of_the_golden_buffer(trace, slots=slots, policy=policy, form=form)
    assert rate == pytest.approx(golden)
    assert 0 < rate < 1


@pytest.mark.parametrize("form", ["lite", "full"])
def test_values_are_those_of_the_golden_predictor(form):
    trace = walk(60)
    config = DeviceConfig(
        model=MODEL, slots=15, expert_bytes=512, predictor="perceptron", form=form
    )
    predictor = create_predictor(config)
    values = Values.of(trace, form)
    lanes, stamp = config.predictor_lanes, 0
    for t in range(trace.tokens):
        predictor.begin(0, int(trace.token[t]), 1)
        for layer in range(MODEL.layers):
            stamp = (stamp + 1) % 256
            predictor.decide(0, layer, trace.experts[t, layer].tolist(), stamp)
            for kind, _, at, beat, given in predictor.values():
                if kind != ValueKind.REUSE:
                    continue
                assert at == layer
                expected = values.reuse[t, layer, beat * lanes : (beat + 1) * lanes]
                assert list(given)[: len(expected)] == expected.tolist()


def test_the_order_of_the_policies():
    rows = evaluate(walk(400), name="walk", forms=["lite"], residencies=[0.4])
    rate = {(row.policy, row.values, row.search): row.miss_rates["40"] for row in rows}
    belady = rate["Belady", "", ALL.name]
    assert belady < rate["predicted next use", "lite", ALL.name]
    assert rate["predicted next use", "lite", ALL.name] < rate["LRU", "", ALL.name]
    # With no values, searching everything still ranks by how often an expert was used.
    assert belady < rate["predicted next use", "none", ALL.name] < 1


def test_command(tmp_path, capsys):
    path = tmp_path / "walk.npz"
    save_trace(path, walk(40))
    out = tmp_path / "out.json"
    assert main([str(path), "--form", "lite", "--first", "30", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "### walk" in printed
    assert "| Belady |  | all slots |" in printed
    rows = json.loads(out.read_text())["rows"]
    assert {row["policy"] for row in rows} == {
        "LRU",
        "LRU of each layer",
        "LFU",
        "predicted next use",
        "Belady",
    }
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.npz")])
