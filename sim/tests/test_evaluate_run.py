"""Whole evaluations, their page, and where compiled code is kept."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from prestage_sim.evaluate import RANKERS, Ranker, Ranking
from prestage_sim.evaluate.report import render
from prestage_sim.evaluate.run import check_horizons, check_warm, defined_horizons, evaluate
from prestage_sim.traces import Trace, TraceError, load_trace

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("PRESTAGE_TRACES", ROOT.parent / "shared" / "traces"))


def walk(tokens, *, seed=0, layers=4, experts=16):
    """A trace whose routing follows a slow random walk, so that there is something to predict."""
    rng = np.random.default_rng(seed)
    state = np.cumsum(rng.integers(0, 3, tokens))
    rows = [
        [[(s + 3 * n) % experts, (s + 5 * n + 1 + 2 * n * n) % experts] for n in range(layers)]
        for s in state.tolist()
    ]
    rows = np.array(rows)
    same = rows[..., 0] == rows[..., 1]
    rows[same, 1] = (rows[same, 1] + 1) % experts
    return Trace(
        experts=rows,
        experts_per_layer=experts,
        token=(state % 50).astype(np.int32),
        request_id=np.arange(tokens) // 40,
        meta={"model": "test-moe"},
    )


class SecondRanker(Ranker):
    """The best expert is always 1, then 3; certain of the first, unsure of the second."""

    def rank(self, experts, tokens, requests):
        shape = (len(experts), len(self.horizons), self.model.layers, self.model.experts)
        scores = np.zeros(shape, dtype=np.int32)
        scores[..., 1], scores[..., 3] = 2, 1
        probabilities = np.zeros(shape, dtype=np.float32)
        probabilities[..., 1], probabilities[..., 3] = 1, 0.25
        return Ranking(scores=scores, proposed=scores == 2, probabilities=probabilities)


@pytest.fixture
def second(monkeypatch):
    monkeypatch.setitem(RANKERS, "second", SecondRanker)


def test_by_hand(second):
    # Ranked 1, 3, 0, 2, 4, ...; truth has 1 and 0 in layer 0, and 3 and 7 in layer 1.
    trace = Trace(experts=np.array([[[1, 0], [3, 7]]] * 2), experts_per_layer=8)
    (result,) = evaluate(trace, predictor="second", residencies=(0.25, 0.5), name="t.npz")
    value = result.as_object()
    assert json.loads(json.dumps(value)) == value
    # Places of the true experts: 0 and 2, 1 and 7.
    assert value["recall_at"] == [0.25, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75, 1]
    names = ("recall_at_k", "recall_at_1_5k", "recall_at_2k", "recall_at_3k")
    assert [value[name] for name in names] == [0.5, 0.75, 0.75, 0.75]
    # One is proposed for each layer of k = 2.
    assert (value["own_recall"], value["own_precision"], value["over_fetch"]) == (0.25, 0.5, 0.5)
    # Of 32 predictions: 4 of 1.0 (2 came), 4 of 0.25 (2 came), 24 of 0 (4 came).
    assert value["ece"] == pytest.approx((2 + 1 + 4) / 32)
    assert value["ece_proposed"] == pytest.approx(0.5)
    assert value["reliability"][4]["observed"] == 0.5
    assert value["reliability_proposed"][15]["count"] == 4
    assert value["cold_start"] == [{"first": 0, "tokens": 2, "recall_at_k": 0.5}]
    # All four experts fit; the second token finds them all. 4 = 1/4 of 16.
    assert value["miss_recall"][0] == {
        "residency": 0.25,
        "slots": 4,
        "misses": 4,
        "miss_rate": 0.5,
        "recall_at_k": 0.5,
        "recall_at_2k": 0.75,
    }
    assert value["miss_recall"][1]["slots"] == 8
    assert value["by_layer"][0] == {
        "layer": 0,
        "recall_at_k": 0.5,
        "recall_at_2k": 1.0,
        "own_recall": 0.5,
        "own_precision": 1.0,
        "over_fetch": 0.5,
    }
    assert value["by_layer"][1]["recall_at_2k"] == 0.5
    assert value["by_layer"][1]["own_precision"] == 0
    assert (value["trace"], value["predictor"], value["horizon"]) == ("t.npz", "second", 1)
    assert (value["tokens"], value["requests"], value["layers"]) == (2, 1, 2)
    assert (value["warm"], value["warm_tokens"]) == ([], 0)
    assert value["seconds"] > 0
    assert value["token_layers_per_second"] == pytest.approx(4 / value["seconds"])


def test_oracle_finds_everything():
    results = evaluate(walk(300), predictor="oracle", horizons=(3, 1))
    assert [r.horizon for r in results] == [1, 3]
    for r in results:
        assert r.recall_at == [0.5] + 15 * [1.0]
        assert (r.own_recall, r.own_precision, r.over_fetch) == (1, 1, 1)
        assert (r.ece, r.ece_proposed) == (0, 0)
        assert {row["recall_at_k"] for row in r.cold_start} == {1}
        assert {row["recall_at_k"] for row in r.miss_recall} == {1}


def without_time(results):
    found = [result.as_object() for result in results]
    for value in found:
        del value["seconds"], value["token_layers_per_second"]
    return found


def test_nothing_proposed_has_no_precision():
    trace = walk(1)
    (result,) = evaluate(trace, predictor="previous-token")
    assert (result.own_precision, result.own_recall, result.over_fetch) == (None, 0, 0)
    assert result.ece is None
    assert result.reliability is None
    (result,) = evaluate(trace, predictor="previous-token", residencies=(1.0,))
    assert result.miss_recall[0]["slots"] == 64


def test_no_cache_is_asked_for(second):
    trace = Trace(experts=np.array([[[1, 0], [3, 7]]]), experts_per_layer=8)
    (result,) = evaluate(trace, predictor="second", residencies=())
    assert result.miss_recall == []


@pytest.mark.parametrize("residency", [0.1, 0.3, 0.7])
def test_slots_are_not_lost_to_rounding(residency):
    # 0.1 * 3 * 10 is 3.0000000000000004 and 0.7 * 3 * 10 is 20.999999999999996 in binary.
    trace = walk(3, layers=3, experts=10)
    (result,) = evaluate(trace, predictor="popularity", residencies=(residency,))
    assert result.miss_recall[0]["slots"] == round(30 * residency)


def test_warm_traces_are_learned_but_not_scored():
    train, test = walk(700, seed=1), walk(60, seed=2)
    (cold,) = evaluate(test, predictor="st_moe-counts")
    progress = []
    (warm,) = evaluate(
        test,
        predictor="st_moe-counts",
        warm=[train, train],
        name="test.npz",
        warm_names=["train.npz", "train.npz"],
        progress=progress.append,
    )
    assert (cold.tokens, warm.tokens) == (60, 60)
    assert (warm.warm, warm.warm_tokens) == (["train.npz", "train.npz"], 1400)
    assert warm.recall_at_k > cold.recall_at_k + 0.05
    assert progress[-1] == 1460
    assert progress == sorted(progress)
    # The caches start empty all the same.
    assert [row["misses"] for row in warm.miss_recall] == [r["misses"] for r in cold.miss_recall]


def test_a_trace_may_be_warmed_on_itself():
    trace = walk(200)
    (result,) = evaluate(trace, predictor="st_moe", warm=[trace])
    assert result.tokens == 200
    assert sum(row["tokens"] for row in result.cold_start) == 200


def test_long_traces_come_in_chunks(monkeypatch):
    """Chunks are a matter of memory: the numbers are the same."""
    trace = walk(1200)
    whole = evaluate(trace, predictor="st_moe")
    monkeypatch.setattr("prestage_sim.evaluate.run._CHUNK_BYTES", 5000)
    assert without_time(evaluate(trace, predictor="st_moe")) == without_time(whole)


def test_defined_horizons():
    assert defined_horizons("st_moe:successors=4", (3, 1)) == (1,)
    assert defined_horizons("st_moe-counts", (2, 3)) == ()
    assert defined_horizons("popularity", (4, 1, 4)) == (1, 4)
    with pytest.raises(ValueError, match="^Predictor must be one of"):
        defined_horizons("nothing", (1,))


def test_refusals():
    trace = walk(5)
    check_horizons(trace, (1, 2, 3))
    with pytest.raises(ValueError, match="^Horizon must be between 1 and 4, not 0"):
        check_horizons(trace, (1, 0))
    with pytest.raises(ValueError, match="^Horizon must be between 1 and 4, not 5"):
        check_horizons(trace, (5,))
    with pytest.raises(ValueError, match="^Horizon 4 is beyond the last layer of the trace, la"):
        check_horizons(trace, (4,))
    with pytest.raises(ValueError, match="^Horizon 4 is beyond the last layer"):
        evaluate(trace, predictor="popularity", horizons=(4,))
    message = "must have 4 layers, 16 experts and k = 2, not 4, 12 and 2"
    with pytest.raises(TraceError, match=message):
        check_warm(trace, walk(5, experts=12))
    with pytest.raises(TraceError, match="not 3, 16 and 2"):
        evaluate(trace, predictor="popularity", warm=[walk(5, layers=3)])
    with pytest.raises(ValueError, match="^Residency must be between 0 and 1, not 1.5"):
        evaluate(trace, predictor="popularity", residencies=(0.5, 1.5))
    with pytest.raises(ValueError, match="^Horizon must be between 1 and 1, not 2"):
        evaluate(trace, predictor="st_moe", horizons=(2,))
    with pytest.raises(ValueError, match="^Horizons must be ascending"):
        evaluate(trace, predictor="popularity", horizons=())


class Page(HTMLParser):
    """Tags of a page, and whether they are balanced."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report(second):
    trace = walk(150)
    results = evaluate(trace, predictor="second", horizons=(1, 2), name="a/one<&>.npz")
    results += evaluate(trace, predictor="st_moe", name="a/one<&>.npz")
    results += evaluate(
        walk(90, seed=3), predictor="st_moe", name="two.npz", warm=[trace], warm_names=["a/one.npz"]
    )
    text = render(results, notes=["A <note>."], settings={"version": "1 < 2"})
    page = Page(text)
    assert page.open == []
    # Six figures for the first trace; the second has no probabilities and so no calibration.
    assert page.seen.count("figure") == page.seen.count("svg") == 11
    # Recall, layers and cold start of four results; calibration of two, and its ideal.
    assert page.seen.count("polyline") == 3 * 4 + 2 + 1
    for phrase in (
        *("A &lt;note&gt;.", "1 &lt; 2", "one&lt;&amp;&gt;.npz", "learned before: one.npz"),
        *("second, 2 ahead", "Cold start", "Calibration", "By layer", "Misses, recall@2k"),
        f"{100 * results[0].recall_at_2k:.1f} %",
    ):
        assert phrase in text, phrase
    assert "<note>" not in text
    # Nothing is loaded from outside, and nothing is drawn nowhere.
    assert not any(name in ("src", "href") for name, _ in page.attributes)
    assert "nan" not in text.lower().replace("nanmoe", "")
    assert "inf" not in text


def test_report_of_one_token():
    results = evaluate(walk(1), predictor="previous-token", residencies=())
    text = render(results)
    assert Page(text).open == []
    assert text.count("<figure") == 3


def test_report_of_many_series(second):
    results = []
    for successors in range(1, 13):
        results += evaluate(walk(30), predictor=f"st_moe:successors={successors}", name="t.npz")
    text = render(results)
    assert "st_moe:successors=12" in text
    assert Page(text).open == []


@pytest.mark.parametrize("kept", [True, False])
def test_compiled_code_outside_the_package(tmp_path, kept):
    """A package that can't be written: code is kept for the user, or nowhere."""
    program = (
        "import numpy as np\n"
        "from prestage_hw.contract import ModelConfig\n"
        "from prestage_sim.evaluate.metrics import LruCache\n"
        "model = ModelConfig(name='m', layers=2, experts=4, top_k=1)\n"
        "cache = LruCache(model=model, slots=2)\n"
        "print(cache.demand(np.zeros((2, 2, 1), np.int32)).sum())\n"
    )
    where = "UserWideCacheLocator" if kept else "UserProvidedCacheLocator"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"},
        "NUMBA_CACHE_LOCATOR_CLASSES": where,
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "2", "")
    assert bool(list(tmp_path.rglob("*.nbi"))) == kept


def test_real_traces():
    """Numbers that stand in the documents."""
    path = SHARED / "gpt-oss-20b__cs.npz"
    if not path.exists():
        pytest.skip(f"trace {path} is not here")
    trace = load_trace(path)
    (st_moe,) = evaluate(trace, predictor="st_moe")
    rows = st_moe.by_layer[1:]
    assert np.mean([row["own_recall"] for row in rows]) == pytest.approx(0.844, abs=5e-4)
    assert np.mean([row["recall_at_k"] for row in rows]) == pytest.approx(0.597, abs=5e-4)
    assert np.mean([row["over_fetch"] for row in rows]) == pytest.approx(2.30, abs=5e-3)
    # The slowest machine that this was run on did 500,000.
    assert st_moe.token_layers_per_second > 20_000
    (counts,) = evaluate(trace, predictor="st_moe-counts")
    assert counts.recall_at_k == pytest.approx(0.585, abs=1e-3)
    assert counts.recall_at_2k == pytest.approx(0.781, abs=1e-3)
