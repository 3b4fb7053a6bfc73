"""Rankers: what all of them keep to, and what each of them ranks."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_sim.evaluate import RANKERS, Ranking, create_ranker
from prestage_sim.evaluate.rankers import ranker_class, split_name
from prestage_sim.model.predictor import create_predictor
from prestage_sim.traces import load_trace, model_config

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("PRESTAGE_TRACES", ROOT.parent / "shared" / "traces"))
MODEL = ModelConfig(name="test", layers=6, experts=16, top_k=2)
NAMES = list(RANKERS)
HONEST = [name for name in NAMES if not ranker_class(name).knows_truth]


def shape(*, layers, experts, top_k):
    return ModelConfig(name="test", layers=layers, experts=experts, top_k=top_k)


def horizons_of(name, model=MODEL):
    farthest = min(ranker_class(name).farthest, model.layers - 1)
    return tuple(range(1, farthest + 1))


def make(tokens, *, seed=0, model=MODEL, structured=True):
    """Routing that follows token ids, earlier layers and the previous token, with noise."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 7, tokens).astype(np.int32)
    ids[rng.random(tokens) < 0.2] = -1
    experts = np.zeros((tokens, model.layers, model.top_k), dtype=np.int16)
    for t in range(tokens):
        for m in range(model.layers):
            favoured = rng.permutation(model.experts)
            if structured and rng.random() < 0.8:
                base = ids[t] + 3 * m + np.arange(model.top_k)
                favoured = np.concatenate([base % model.experts, favoured])
            _, first = np.unique(favoured, return_index=True)
            experts[t, m] = favoured[np.sort(first)][: model.top_k]
    requests = (np.arange(tokens) // 9).astype(np.int32)
    return experts, ids, requests


def rank_all(name, trace, *, chunks=None, model=MODEL, horizons=None):
    ranker = create_ranker(name, model=model, horizons=horizons or horizons_of(name, model))
    parts = []
    at = 0
    tokens = len(trace[0])
    sizes = chunks or [tokens]
    while at < tokens:
        size = sizes[len(parts) % len(sizes)]
        parts.append(ranker.rank(*(column[at : at + size] for column in trace)))
        at += size
    probabilities = None
    if parts[0].probabilities is not None:
        probabilities = np.concatenate([part.probabilities for part in parts])
    return Ranking(
        scores=np.concatenate([part.scores for part in parts]),
        proposed=np.concatenate([part.proposed for part in parts]),
        probabilities=probabilities,
    )


def arrays(ranking):
    found = {"scores": ranking.scores, "proposed": ranking.proposed}
    if ranking.probabilities is not None:
        found["probabilities"] = ranking.probabilities
    return found


def recall_at_k(ranking, experts):
    """Recall@k of each token, layer and horizon, by sorting."""
    top_k = experts.shape[-1]
    count = ranking.scores.shape[-1]
    keys = ranking.scores.astype(np.int64) * count - np.arange(count)
    best = np.argsort(-keys, axis=-1)[..., :top_k]
    hit = best[..., :, np.newaxis] == experts[:, np.newaxis, :, np.newaxis, :]
    return hit.any(axis=-1).mean(axis=-1)


def peeked(name, *, token, layer, tokens=30):
    """Names of arrays that depend on what was unknown: all from a token's layer on is changed."""
    trace = make(tokens, seed=1)
    other = make(tokens, seed=2, structured=False)
    changed = [column.copy() for column in trace]
    changed[0][token, layer:] = other[0][token, layer:]
    for column, new in zip(changed, other, strict=True):
        column[token + 1 :] = new[token + 1 :]
    before, after = arrays(rank_all(name, trace)), arrays(rank_all(name, changed))
    horizons = horizons_of(name)
    found = set()
    for what in before:
        if not np.array_equal(before[what][:token], after[what][:token]):
            found.add(what)
        for at, horizon in enumerate(horizons):
            # Ranked when layer m - h was routed, or at the token's start.
            known = [m for m in range(MODEL.layers) if m - horizon < layer]
            if not np.array_equal(before[what][token, at, known], after[what][token, at, known]):
                found.add(what)
    return found


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize(("token", "layer"), [(0, 0), (11, 0), (17, 3), (29, 5)])
def test_no_peeking(name, token, layer):
    assert peeked(name, token=token, layer=layer) == set()


def test_peeking_is_caught():
    assert peeked("oracle", token=17, layer=3) == {"scores", "proposed", "probabilities"}


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name):
    trace = make(5)
    horizons = horizons_of(name)
    ranking = rank_all(name, trace)
    wanted = (5, len(horizons), MODEL.layers, MODEL.experts)
    assert (ranking.scores.shape, ranking.scores.dtype) == (wanted, np.int32)
    assert (ranking.proposed.shape, ranking.proposed.dtype) == (wanted, np.bool_)
    if ranking.probabilities is not None:
        assert (ranking.probabilities.shape, ranking.probabilities.dtype) == (wanted, np.float32)
        assert ranking.probabilities.min() >= 0
        assert ranking.probabilities.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name):
    trace = make(40)
    whole = arrays(rank_all(name, trace))
    for chunks in ([1], [7], [13, 2, 1]):
        parts = arrays(rank_all(name, trace, chunks=chunks))
        for what in whole:
            np.testing.assert_array_equal(whole[what], parts[what], err_msg=f"{what}, {chunks}")


@pytest.mark.parametrize("name", [name for name in NAMES if len(horizons_of(name)) > 1])
def test_horizons_are_independent(name):
    """Asking for one horizon gives the same as asking for all."""
    trace = make(30)
    together = arrays(rank_all(name, trace))
    for at, horizon in enumerate(horizons_of(name)):
        alone = arrays(rank_all(name, trace, horizons=(horizon,)))
        for what in together:
            np.testing.assert_array_equal(together[what][:, at], alone[what][:, 0], err_msg=what)


@pytest.mark.parametrize("name", NAMES)
def test_every_ranker_learns(name):
    """The same routing over and over is known by heart, at every layer and horizon."""
    one = make(1)
    trace = tuple(np.repeat(column, 200, axis=0) for column in one)
    ranking = rank_all(name, trace)
    recall = recall_at_k(ranking, trace[0])[100:]
    assert recall.mean(axis=(0, 2)).min() > 0.98
    sent = ranking.proposed[100:, :, 1:]
    assert sent.sum(axis=-1).mean() >= MODEL.top_k * 0.98


def test_popularity_by_hand():
    model = shape(layers=1, experts=4, top_k=2)
    model2 = shape(layers=2, experts=4, top_k=2)
    with pytest.raises(ValueError, match="^Horizon must be between 1 and 0, not 1"):
        create_ranker("popularity", model=model)
    experts = np.array([[[3, 1], [0, 1]], [[3, 2], [0, 1]], [[0, 1], [2, 3]]])
    ranker = create_ranker("popularity", model=model2)
    ranking = ranker.rank(experts, np.zeros(3, np.int32), np.zeros(3, np.int32))
    assert ranking.scores[:, 0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 2]]
    # Equal counts: the lower number first; what never was is not proposed.
    assert ranking.proposed[:, 0, 0].astype(int).tolist() == [
        [0, 0, 0, 0],
        [0, 1, 0, 1],
        [0, 1, 0, 1],
    ]
    assert ranking.scores[:, 0, 1].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 0, 0]]
    assert ranking.probabilities is None


def test_previous_token_by_hand():
    model = shape(layers=2, experts=4, top_k=2)
    experts = np.array([[[3, 1], [0, 1]], [[3, 2], [0, 1]], [[0, 1], [2, 3]]])
    ranker = create_ranker("previous-token", model=model)
    ranking = ranker.rank(experts, np.zeros(3, np.int32), np.zeros(3, np.int32))
    big = 1 << 30
    assert ranking.scores[:, 0, 0].tolist() == [
        [0, 0, 0, 0],
        [0, 1 + big, 0, 1 + big],
        [0, 1, 1 + big, 2 + big],
    ]
    assert ranking.proposed[:, 0, 0].astype(int).tolist() == [
        [0, 0, 0, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 1],
    ]


def test_counts_by_hand():
    model = shape(layers=2, experts=4, top_k=1)
    experts = np.array([[[0], [1]], [[0], [2]], [[0], [1]], [[0], [3]], [[2], [0]]])
    ranker = create_ranker("st_moe-counts:history=0.25", model=model)
    assert ranker.history == 0.25
    ranking = ranker.rank(experts, np.zeros(5, np.int32), np.zeros(5, np.int32))
    third, half, quarter = 4096 // 3, 2048, 1024
    assert ranking.scores[:, 0, 1].tolist() == [
        [0, 0, 0, 0],
        [0, 4096 + quarter, 0, 0],
        [0, half, half + quarter, 0],
        [0, 2 * 4096 // 3 + quarter, third, 0],
        # The source was never seen: the previous token alone.
        [0, 0, 0, quarter],
    ]
    assert ranking.scores[:, 0, 0].tolist()[:2] == [[0, 0, 0, 0], [quarter, 0, 0, 0]]
    assert ranking.proposed[2, 0, 1].astype(int).tolist() == [0, 0, 1, 0]


def golden_rows(experts, config):
    """Candidates of the golden model, for each token and layer but the first."""
    predictor = create_predictor(config)
    for t, token in enumerate(np.asarray(experts).tolist()):
        predictor.begin(0, 0xFFFFFFFF, 1)
        for layer, choice in enumerate(token):
            candidates = predictor.decide(0, layer, choice, 1)
            if layer + 1 < config.model.layers:
                yield t, layer + 1, [(c[2], c[3]) for c in candidates]


def assert_st_moe_is_golden(experts, model, *, successors):
    ranker = create_ranker(f"st_moe:successors={successors}", model=model)
    unknown = np.full(len(experts), -1, dtype=np.int32)
    ranking = ranker.rank(experts, unknown, np.zeros_like(unknown))
    config = DeviceConfig(model=model, slots=model.top_k, successors=successors)
    some = 0
    for t, layer, candidates in golden_rows(experts, config):
        scores = ranking.scores[t, 0, layer].astype(np.int64)
        order = np.lexsort((np.arange(model.experts), -scores)).tolist()
        assert order[: len(candidates)] == [expert for expert, _ in candidates]
        assert [int(scores[expert]) >> 10 for expert, _ in candidates] == [s for _, s in candidates]
        proposed = np.flatnonzero(ranking.proposed[t, 0, layer]).tolist()
        assert proposed == sorted(expert for expert, _ in candidates)
        # What isn't a candidate has less than the threshold.
        assert (scores[order[len(candidates) :]] >> 10 < 2).all()
        some += len(candidates)
    assert some > len(experts)
    assert not ranking.proposed[:, :, 0].any()


@pytest.mark.parametrize("successors", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("structured", [True, False])
def test_st_moe_is_the_golden_model(successors, structured):
    experts, _, _ = make(80, seed=5, structured=structured)
    assert_st_moe_is_golden(experts, MODEL, successors=successors)


@pytest.mark.parametrize("successors", [4, 8])
def test_st_moe_is_the_golden_model_on_a_shipped_trace(successors):
    trace = load_trace(ROOT / "models/tinymoe/traces/tinymoe__code.npz").first(200)
    assert_st_moe_is_golden(trace.experts, model_config(trace), successors=successors)


@pytest.mark.parametrize("name", ["gpt-oss-20b__cs", "qwen3-30b-a3b__techqa"])
def test_st_moe_is_the_golden_model_on_a_real_trace(name):
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"trace {path} is not here")
    trace = load_trace(path).first(100)
    assert_st_moe_is_golden(trace.experts, model_config(trace), successors=8)


def test_st_moe_ranks_layer_0_by_history():
    experts = np.array([[[3, 1], [0, 1]], [[3, 2], [0, 1]]])
    ranker = create_ranker("st_moe", model=shape(layers=2, experts=4, top_k=2))
    scores = ranker.rank(experts, np.zeros(2, np.int32), np.zeros(2, np.int32)).scores[:, 0, 0]
    # Worth 2 each, in the order of the previous choice.
    assert (scores >> 10).tolist() == [[0, 0, 0, 0], [0, 2, 0, 2]]
    assert scores[1, 3] > scores[1, 1]


def test_names():
    assert {"popularity", "previous-token", "st_moe", "st_moe-counts", "oracle"} <= set(RANKERS)
    assert split_name("st_moe:successors=4") == ("st_moe", {"successors": 4})
    assert create_ranker("st_moe", model=MODEL, successors=3)._rows.shape == (5, 16, 3)
    assert create_ranker("st_moe:successors=2", model=MODEL, successors=3)._rows.shape[2] == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("st-moe", "Predictor must be one of popularity, .*, not 'st-moe'. Did you mean st_moe?"),
        ("Popularity", "not 'Popularity'. Did you mean popularity?"),
        ("zzz", "not 'zzz'$"),
        ("", "not ''$"),
        ("st_moe:k=4", "Option of predictor st_moe must be one of successors, not 'k=4'"),
        ("st_moe:successors", "must be one of successors, not 'successors'"),
        ("st_moe:successors=x", "Option successors of predictor st_moe can't be 'x'"),
        ("oracle:a=1", "Option of predictor oracle must be left out, not 'a=1'"),
        ("st_moe:successors=40", "Successor count must be"),
        ("st_moe-counts:history=-1", "Worth of the history must be between 0 and 16, not -1.0"),
    ],
)
def test_refused_names(name, message):
    with pytest.raises(ValueError, match=message.replace("?", re.escape("?"))):
        create_ranker(name, model=MODEL)


@pytest.mark.parametrize(
    ("horizons", "kind", "message"),
    [
        ((0,), ValueError, "Horizon must be between 1 and 4, not 0"),
        ((5,), ValueError, "Horizon must be between 1 and 4, not 5"),
        ((), ValueError, "Horizons must be ascending, not"),
        ((2, 1), ValueError, "Horizons must be ascending, not"),
        ((1, 1), ValueError, "Horizons must be ascending, not"),
        ((1.0,), TypeError, "Horizon must be an integer, not 1.0"),
        ((True,), TypeError, "Horizon must be an integer, not True"),
    ],
)
def test_refused_horizons(horizons, kind, message):
    with pytest.raises(kind, match=message):
        create_ranker("popularity", model=MODEL, horizons=horizons)


def test_refused_model():
    with pytest.raises(TypeError, match="^Model must be a ModelConfig, not 3"):
        create_ranker("popularity", model=3)
