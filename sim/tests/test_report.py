"""Runs, their metrics, and the page with plots."""

from html.parser import HTMLParser

import numpy as np
import pytest

import prestage
from prestage.replay import replay
from prestage_hw.contract import TRANSFER_DTYPE, DeviceConfig, ModelConfig
from prestage_sim._svg import ticks
from prestage_sim.report import expert_transfers, render
from prestage_sim.runs import (
    METRICS,
    SAMPLE_DTYPE,
    Run,
    baseline_misses,
    layer_accuracy,
    metrics,
)
from prestage_sim.traces import Trace

MODEL = ModelConfig(name="test-moe", layers=4, experts=16, top_k=2)
CONFIG = DeviceConfig(model=MODEL, slots=12)


def walk(tokens, *, seed=0):
    """A trace whose routing follows a slow random walk, so that there is something to predict."""
    rng = np.random.default_rng(seed)
    state = 0
    rows = []
    for _ in range(tokens):
        state = (state + rng.integers(0, 3)) % 16
        rows.append([[(state + 3 * n) % 16, (state + 5 * n + 1) % 16] for n in range(4)])
    return Trace(experts=np.array(rows), experts_per_layer=16, meta={"model": "test-moe"})


def run_of(trace, config=CONFIG, **options):
    with prestage.open("model://", config=config) as device:
        return replay(device, trace, **options)


class Page(HTMLParser):
    """Tags of a page, and whether they are balanced."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.seen = []
        self.attributes = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    page = Page(text)
    assert page.open == []
    # Nothing is fetched from anywhere.
    assert not {"script", "link", "img", "iframe"} & set(page.seen)
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert "http" not in text and "url(" not in text
    return page


def test_metrics():
    counters = {
        "candidates": 100,
        "candidates_correct": 30,
        "demands_predicted": 40,
        "demands": 50,
        "hits": 35,
        "misses": 10,
        "useful": 30,
        "useless": 20,
        "demand_bytes": 1000,
        "prefetch_bytes": 5000,
    }
    assert metrics(counters, baseline=40) == {
        "recall": 0.75,
        "over_fetch": 2.5,
        "precision": 0.3,
        "coverage": 0.75,
        "accuracy": 0.6,
        "hit_rate": 0.7,
        "bytes_moved": 6000,
    }
    assert metrics({}, baseline=0) == dict.fromkeys(METRICS)
    assert metrics(dict.fromkeys(counters, 0), baseline=0)["recall"] is None


@pytest.mark.parametrize("slots", [2, 5, 12, 64])
def test_baseline_misses_are_those_of_no_predictor(slots):
    trace = walk(40)
    plain = run_of(trace, CONFIG.replace(slots=slots, predictor="none"))
    assert plain.baseline_misses == plain.counters["misses"]
    assert plain.metrics()["coverage"] == 0
    # A device that prefetches has the same baseline, whatever it misses itself.
    ahead = run_of(trace, CONFIG.replace(slots=slots))
    assert ahead.baseline_misses == plain.baseline_misses
    assert baseline_misses(trace, layers=1, slots=slots) == 2


@pytest.mark.parametrize("profiled", [False, True])
def test_layer_accuracy_adds_up_to_the_counters(profiled):
    trace = walk(60)
    tables = {}
    if profiled:
        with prestage.open("model://", config=CONFIG) as device:
            replay(device, walk(30, seed=1))
            tables = {0: device.save_table(0)}
    with prestage.open("model://", config=CONFIG) as device:
        device.configure(tables=tables)
        run = replay(device, trace, tables=tables)
    accuracy = layer_accuracy(run)
    assert accuracy.demands.sum() == run.counters["demands_predicted"]
    assert accuracy.candidates.sum() == run.counters["candidates"]
    assert accuracy.correct.sum() == run.counters["candidates_correct"]
    assert accuracy.demands[0] == 0
    # Only what was replayed counts.
    run.layers = 6
    assert layer_accuracy(run).demands.tolist() == [0, 4, 2, 2]


def test_page_of_a_device_without_a_clock():
    run = run_of(walk(60))
    text = render(run, trace_path="/somewhere/<b>walk.npz")
    page = check_page(text)
    assert "&lt;b&gt;walk.npz" in text and "<b>walk" not in text
    assert page.seen.count("svg") == page.seen.count("figure") == 6
    assert "This device has no clock" in text
    assert "Complete: 60 tokens" in text
    for name in run.counters:
        assert f"<td>{name}</td>" in text


def test_page_without_prediction():
    text = render(run_of(walk(20), CONFIG.replace(predictor="none")))
    page = check_page(text)
    assert "Over-fetch" in text
    assert page.seen.count("svg") == 3


@pytest.mark.parametrize(
    ("error", "text"), [("", "Interrupted after 0 of 20 tokens"), ("bus", "Failed after 0 tokens")]
)
def test_page_of_nothing(error, text):
    run = Run(
        config=CONFIG,
        url="model://",
        pace="drained",
        trace=walk(20),
        complete=False,
        error=error,
        tokens=0,
        layers=0,
        counters={},
        cycles=0,
        seconds=0.0,
    )
    page = render(run)
    check_page(page)
    assert text in page
    assert run.stall_summary() == {
        "stall_cycles": 0,
        "stall_mean": 0,
        "stall_median": 0,
        "stall_p99": 0,
    }


def clocked_run(*, pace="timed"):
    """Two tokens of two layers with 1,000 cycles each; what was fetched when is written by hand."""
    config = DeviceConfig(
        model=ModelConfig(name="two", layers=2, experts=4, top_k=1), slots=4, expert_bytes=1024
    )
    trace = Trace(experts=np.array([[[0], [1]], [[2], [3]]]), experts_per_layer=4)
    starts = np.arange(4, dtype=np.uint64).reshape(2, 2) * 1000
    spans = np.stack([starts, starts + np.array([[100, 200], [300, 400]], np.uint64)], axis=-1)
    bursts = [
        (10, 40, 0, 512, 0),  # layer 0, expert 0: demand, two bursts
        (41, 80, 512, 512, 0),
        (300, 360, 5 * 1024, 1024, 0),  # layer 1, expert 1: prefetch that is used
        (400, 460, 4 * 1024, 1024, 0),  # layer 1, expert 0: prefetch that isn't
        (1500, 1560, 2 * 1024, 1024, 0),  # layer 0, expert 2: for the next token
        (2600, 2660, 2 * 1024, 1024, 0),  # layer 0 again while it is the current layer
    ]
    return Run(
        config=config,
        url="sim://",
        pace=pace,
        layer_cycles=500,
        trace=trace,
        complete=True,
        tokens=2,
        layers=4,
        counters=run_of(trace, config).counters,
        cycles=4000,
        seconds=0.5,
        samples=np.array([(0, 0, 0, 0, 0, 0, 0, 0), (2, 4000, 4, 1, 3, 0, 0, 1)], SAMPLE_DTYPE),
        spans=spans,
        transfers=np.array(bursts, TRANSFER_DTYPE),
    )


def test_transfers_are_joined_and_classified():
    run = clocked_run()
    found = expert_transfers(run, tokens=range(2))
    assert [(t.layer, t.expert, t.kind, t.start, t.end, t.size) for t in found] == [
        (0, 0, "demand", 10, 80, 1024),
        (1, 1, "used", 300, 360, 1024),
        (1, 0, "unused", 400, 460, 1024),
        (0, 2, "used", 1500, 1560, 1024),
        (0, 2, "demand", 2600, 2660, 1024),
    ]
    assert len(expert_transfers(run, tokens=range(1))) == 4
    assert [t.start for t in expert_transfers(run, tokens=range(1, 2))] == [2600]


@pytest.mark.parametrize("pace", ["drained", "timed"])
def test_page_of_a_device_with_a_clock(pace):
    run = clocked_run(pace=pace)
    text = render(run, trace_path="two.npz")
    page = check_page(text)
    assert "Transfers against layers" in text
    assert "prefetch, used: layer 1, expert 1, 300 to 360" in text
    assert "layer 1: routed at 3,000, ready after 400 cycles" in text
    assert "This device has no clock" not in text
    assert page.seen.count("svg") >= 6
    assert run.stall_summary() == {
        "stall_cycles": 1000,
        "stall_mean": 250.0,
        "stall_median": 250.0,
        "stall_p99": 397.0,
    }
    assert ("Stalled" in text) == (pace == "timed")


def test_ticks():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 192) == [0, 50, 100, 150]
    assert ticks(3, 3) == [3]
